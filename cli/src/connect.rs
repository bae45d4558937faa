//! From flags to a connection.

use std::path::Path;

use anyhow::{Error, Result, anyhow, bail};
use clustermesh_client::{Client, ClientConfig, ClientError, TlsPaths};
use clustermesh_process::{Organisation, PeerIdentity};
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
    Client::connect(&config).await.map_err(with_remedy)
}

/// What the operator can look at when no server takes the connection.
fn with_remedy(error: ClientError) -> Error {
    let text = error.to_string();
    let remedy = match &error {
        ClientError::Connect(_) if text.contains("invalid peer certificate") => {
            "--ca must name the CA of the server's certificate, which must be for the endpoint's host or --server-name"
        }
        ClientError::Connect(_) if text.contains("received fatal alert") => {
            "the server does not take the certificate of --cert: its own CA must have signed it"
        }
        ClientError::Connect(_) => {
            "is clustermesh-server running there? --endpoint or CLUSTERMESH_ENDPOINT says where"
        }
        _ => return error.into(),
    };
    anyhow!("{text}; {remedy}")
}

/// Whose certificate was used, where the server refuses what it asks for: the server may say less, as etcd does.
pub fn explain(global: &GlobalArgs, error: Error) -> Error {
    let denied = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<ClientError>())
        .any(ClientError::is_denied);
    match &global.cert {
        Some(cert) if denied => anyhow!("{error:#}; {}", holder(cert)),
        _ => error,
    }
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
    fn a_failed_connection_comes_with_what_to_look_at() {
        for (reason, flag) in [
            ("Connection refused (os error 111)", "--endpoint"),
            ("invalid peer certificate: UnknownIssuer", "--ca"),
            ("received fatal alert: UnknownCA", "--cert"),
        ] {
            let error = with_remedy(ClientError::Connect(format!("https://s1:2379: {reason}")));
            let text = format!("{error:#}");
            assert!(
                text.starts_with(&format!("cannot connect: https://s1:2379: {reason}; "))
                    && text.contains(flag),
                "{text}"
            );
        }
    }
}
