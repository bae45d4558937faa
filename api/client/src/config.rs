//! Where the server is and who we are.

use std::net::IpAddr;

use clustermesh_process::TlsPaths;
use http::{Uri, uri::Scheme};
use rustls_pki_types::ServerName;

/// Most endpoints of one cluster.
pub const MAX_ENDPOINTS: usize = 16;

/// How to reach the server of one cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientConfig {
    /// `https://host:port`, or `http://` for a loopback address; tried in turn.
    pub endpoints: Vec<String>,
    /// CA, certificate and key; needed for `https`.
    pub tls: Option<TlsPaths>,
    /// Name that the server's certificate must have, when it is not the endpoint's host.
    pub server_name: Option<String>,
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No endpoint, or too many.
    #[error("{0} endpoints given, 1 to {MAX_ENDPOINTS} are needed")]
    EndpointCount(usize),
    /// Not a URL of the expected form.
    #[error("endpoint {0:?} is not https://HOST:PORT")]
    Malformed(String),
    /// Clear text leaves the machine.
    #[error("endpoint {0:?} is in clear and not on this machine; use https")]
    Plaintext(String),
    /// `https` without certificates.
    #[error("endpoint {0:?} needs a CA, a certificate and a key")]
    MissingTls(String),
    /// Not a name that a certificate can have.
    #[error("server name {0:?} is neither a DNS name nor an IP address")]
    ServerName(String),
}

/// One checked endpoint.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    pub url: String,
    pub host: String,
    pub port: u16,
    /// `None` = clear text.
    pub tls_name: Option<ServerName<'static>>,
}

impl ClientConfig {
    pub(crate) fn check(&self) -> Result<Vec<Endpoint>, ConfigError> {
        if self.endpoints.is_empty() || self.endpoints.len() > MAX_ENDPOINTS {
            return Err(ConfigError::EndpointCount(self.endpoints.len()));
        }
        self.endpoints
            .iter()
            .map(|url| self.check_endpoint(url))
            .collect()
    }

    fn check_endpoint(&self, url: &str) -> Result<Endpoint, ConfigError> {
        let malformed = || ConfigError::Malformed(url.to_owned());
        let uri: Uri = url.parse().map_err(|_| malformed())?;
        let host = uri
            .host()
            .ok_or_else(malformed)?
            .trim_matches(['[', ']'])
            .to_owned();
        let port = uri.port_u16().ok_or_else(malformed)?;
        if uri.path().len() > 1 || uri.query().is_some() {
            return Err(malformed());
        }
        let tls_name = if uri.scheme() == Some(&Scheme::HTTPS) {
            if self.tls.is_none() {
                return Err(ConfigError::MissingTls(url.to_owned()));
            }
            let name = self.server_name.as_deref().unwrap_or(&host);
            let name =
                ServerName::try_from(name).map_err(|_| ConfigError::ServerName(name.to_owned()))?;
            Some(name.to_owned())
        } else if uri.scheme() == Some(&Scheme::HTTP) {
            if !is_loopback(&host) {
                return Err(ConfigError::Plaintext(url.to_owned()));
            }
            None
        } else {
            return Err(malformed());
        };
        Ok(Endpoint {
            url: url.to_owned(),
            host,
            port,
            tls_name,
        })
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}
