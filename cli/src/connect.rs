//! From flags to a connection.

use anyhow::{Result, bail};
use clustermesh_client::{Client, ClientConfig, TlsPaths};

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
