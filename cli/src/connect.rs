//! From flags to a connection.

use std::path::Path;

use anyhow::{Error, Result, bail};
use clustermesh_client::{Client, ClientConfig, ClientError, TlsPaths};
use clustermesh_process::{Organisation, PeerIdentity, said_once};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::args::GlobalArgs;

/// What the flags say.
pub fn config(global: &GlobalArgs) -> Result<ClientConfig> {
    let tls = match (&global.ca, &global.cert, &global.key) {
        (Some(ca), Some(cert), Some(key)) => Some(TlsPaths {
            ca: ca.clone(),
            cert: cert.clone(),
            key: key.clone(),
        }),
        (None, None, None) => None,
        (ca, cert, key) => {
            let missing: Vec<&str> = [("--ca", ca), ("--cert", cert), ("--key", key)]
                .into_iter()
                .filter(|(_, value)| value.is_none())
                .map(|(flag, _)| flag)
                .collect();
            bail!(
                "--ca, --cert and --key belong together: {} missing",
                missing.join(" and ")
            );
        }
    };
    Ok(ClientConfig {
        endpoints: global.endpoint.clone(),
        tls,
        server_name: global.server_name.clone(),
    })
}

/// A connection to the server.
pub async fn connect(global: &GlobalArgs) -> Result<Client> {
    let config = config(global)?;
    if config.tls.is_none()
        && config
            .endpoints
            .iter()
            .any(|url| url.starts_with("https://"))
    {
        bail!(
            "give --ca, --cert and --key, or set CLUSTERMESH_CA, CLUSTERMESH_CERT and CLUSTERMESH_KEY"
        );
    }
    Ok(Client::connect(&config).await?)
}

/// The error as the operator reads it: every cause once, and what to do about it where a connection or a refusal is at
/// the bottom of it. Servers may say less, as etcd does.
pub fn explain(global: &GlobalArgs, error: &Error) -> String {
    if let Some(status) = error.downcast_ref::<tonic::Status>() {
        return format!("the node agent answers: {}", status.message());
    }
    let text = said_once(error.as_ref());
    let client = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<ClientError>());
    match client.and_then(|client| remedy(global, client)) {
        Some(remedy) => format!("{text}; {remedy}"),
        None => text,
    }
}

fn remedy(global: &GlobalArgs, error: &ClientError) -> Option<String> {
    let text = error.to_string();
    if error.is_denied() {
        return global.cert.as_deref().map(holder);
    }
    if error.is_unimplemented() {
        return Some(
            "the server has no such call: a plain store, without [cluster] in its configuration, has no nodes, \
             services and manifests"
                .to_owned(),
        );
    }
    let is_clear = global
        .endpoint
        .iter()
        .any(|url| url.starts_with("http://") && text.contains(url));
    let is_broken = matches!(error, ClientError::Connect(_)) || text.contains("connection error");
    let remedy = if text.contains("invalid peer certificate") {
        "--ca must name the CA of the server's certificate, which must be for the endpoint's host or --server-name"
    } else if text.contains("received fatal alert") {
        // With TLS 1.3 this is heard after the connection was made.
        "the server does not take the certificate of --cert: its own CA must have signed it, and it must not have expired"
    } else if text.contains("corrupt message") {
        "what listens there does not speak TLS: --endpoint names the server's `listen_client`"
    } else if is_clear && is_broken {
        "http:// is for `listen_client_clear`, on the server's own machine; everything else is https://"
    } else if matches!(error, ClientError::Connect(_)) {
        "is clustermesh-server running there? --endpoint or CLUSTERMESH_ENDPOINT says where"
    } else if ["connection closed", "broken pipe", "onnection reset"]
        .iter()
        .any(|said| text.contains(said))
    {
        "the server ended the connection: its log says why, a certificate in --cert that it does not take for instance"
    } else if [
        "etcdserver: no leader",
        "etcdserver: request timed out",
        "Timeout expired",
    ]
    .iter()
    .any(|said| text.contains(said))
    {
        "more than half of the store's replicas must run and reach each other: `clustermesh status` shows who is missing"
    } else {
        return None;
    };
    Some(remedy.to_owned())
}

fn holder(cert: &Path) -> String {
    let shown = cert.display();
    let held = CertificateDer::from_pem_file(cert)
        .map_err(|error| error.to_string())
        .and_then(|der| PeerIdentity::from_certificate(&der).map_err(|error| error.to_string()));
    let operator = Organisation::Operator.as_str();
    match held {
        Ok(held) if held.organisation == Organisation::Operator => format!(
            "--cert {shown} is that of {operator} {} of cluster {}: is it the server's cluster, and do the users of \
             the store (etcd's auth) give it the right?",
            held.common_name, held.cluster
        ),
        Ok(held) => format!(
            "--cert {shown} is that of {} {} of cluster {}: give one of {operator}, as `clustermesh dev-ca issue \
             operator` makes",
            held.organisation.as_str(),
            held.common_name,
            held.cluster
        ),
        Err(reason) => format!("--cert {shown} names nobody: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::DnType;

    use super::*;

    #[test]
    fn a_refused_call_comes_with_whose_certificate_it_was_and_whose_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let cert = folder.path().join("w1.crt");
        let said = |organisation: Organisation| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name = rcgen::DistinguishedName::new();
            for (kind, value) in [
                (DnType::OrganizationName, organisation.as_str()),
                (DnType::OrganizationalUnitName, "c1"),
                (DnType::CommonName, "w1"),
            ] {
                params.distinguished_name.push(kind, value);
            }
            let key = rcgen::KeyPair::generate().unwrap();
            std::fs::write(&cert, params.self_signed(&key).unwrap().pem()).unwrap();
            holder(&cert)
        };
        let node = said(Organisation::Node);
        assert!(
            node.contains(
                "is that of clustermesh:node w1 of cluster c1: give one of clustermesh:operator"
            ),
            "{node}"
        );
        assert!(said(Organisation::Operator).contains("auth"));
        std::fs::write(&cert, "none").unwrap();
        assert!(holder(&cert).contains("names nobody"));
    }

    #[test]
    fn a_call_that_fails_without_a_word_comes_with_what_to_look_at() {
        use clap::Parser as _;
        let cli = crate::args::Cli::parse_from(["clustermesh", "status"]);
        for (message, remedy) in [
            ("cancelled: Timeout expired", "who is missing"),
            ("unavailable: etcdserver: no leader", "who is missing"),
            (
                "cancelled: operation was canceled: connection closed",
                "--cert",
            ),
            ("unimplemented", "plain store"),
            ("invalid argument: x", "argument: x"),
        ] {
            let code = if message == "unimplemented" {
                tonic::Code::Unimplemented
            } else {
                tonic::Code::Unavailable
            };
            let error = ClientError::Status {
                endpoint: "https://s1:2379".to_owned(),
                message: message.to_owned(),
                status: Box::new(tonic::Status::new(code, "")),
            };
            let text = explain(&cli.global, &Error::new(error));
            assert!(
                text.starts_with("https://s1:2379: ") && text.contains(remedy),
                "{text}"
            );
        }
    }

    fn told(endpoint: &str, reason: &str) -> String {
        use clap::Parser as _;
        let cli = crate::args::Cli::parse_from(["clustermesh", "--endpoint", endpoint, "status"]);
        let error = ClientError::Connect(format!("{endpoint}: {reason}"));
        explain(
            &cli.global,
            &Error::new(error).context("something asked for"),
        )
    }

    #[test]
    fn a_failed_connection_comes_with_what_to_look_at() {
        for (endpoint, reason, remedy) in [
            (
                "https://s1:2379",
                "Connection refused (os error 111)",
                "--endpoint",
            ),
            (
                "https://s1:2379",
                "invalid peer certificate: UnknownIssuer",
                "--ca",
            ),
            (
                "https://s1:2379",
                "received fatal alert: UnknownCA",
                "--cert",
            ),
            (
                "https://s1:9962",
                "received corrupt message of type X",
                "listen_client",
            ),
            (
                "http://s1:2379",
                "connection error: broken pipe",
                "https://",
            ),
        ] {
            let text = told(endpoint, reason);
            assert!(
                text.starts_with(&format!(
                    "something asked for: cannot connect: {endpoint}: {reason}; "
                )) && text.contains(remedy),
                "{text}"
            );
        }
    }
}
