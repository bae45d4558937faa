//! From flags to a connection.

use anyhow::{Error, Result, anyhow, bail};
use clustermesh_client::{Client, ClientConfig, ClientError, TlsPaths};

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

#[cfg(test)]
mod tests {
    use super::*;

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
