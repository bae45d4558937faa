//! TLS material from PEM files, read again when the files change, without a restart.

mod refusals;

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tracing::{error, info, warn};
use x509_parser::prelude::{FromDer, X509Certificate};

use refusals::Refusals;

/// Files are looked at for changes at most this often.
pub const RELOAD_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The three PEM files of one party.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificates that the other side's chain must end in.
    pub ca: PathBuf,
    /// Own certificate chain, leaf first.
    pub cert: PathBuf,
    /// Own private key.
    pub key: PathBuf,
}

/// Why TLS material cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or holds no PEM block of the kind.
    #[error("{what} {path}: {reason}")]
    File {
        /// What the file should hold.
        what: &'static str,
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key are of different pairs.
    #[error(
        "key file {key} does not belong to certificate file {cert}; give the two that were issued together"
    )]
    KeyMismatch {
        /// The certificate file.
        cert: String,
        /// The key file.
        key: String,
    },
    /// The pieces cannot be used together.
    #[error("certificate file {cert} with key file {key}: {reason}")]
    Material {
        /// The certificate file.
        cert: String,
        /// The key file.
        key: String,
        /// What rustls says.
        reason: rustls::Error,
    },
    /// The own certificate is of no use at this time.
    #[error(
        "certificate {path} is valid from {not_before} to {not_after}, which is not now: issue it anew, or set the clock"
    )]
    NotValidNow {
        /// The certificate file.
        path: String,
        /// When it begins to be valid.
        not_before: String,
        /// When it ends.
        not_after: String,
    },
    /// The CA file cannot verify clients.
    #[error("client verification with {ca}: {reason}")]
    Verifier {
        /// The CA file.
        ca: String,
        /// What is wrong.
        reason: String,
    },
}

/// Installs `ring` as the process's crypto provider; later calls do nothing.
pub fn install_crypto_provider() {
    // Err means that one is installed already, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Server side: mutual TLS 1.3, ALPN h2 and http/1.1. Clones share the cache.
#[derive(Debug, Clone)]
pub struct ServerTls(Arc<Reloading<ServerConfig>>);

/// Client side: mutual TLS 1.3, ALPN h2. Clones share the cache.
#[derive(Debug, Clone)]
pub struct ClientTls(Arc<Reloading<ClientConfig>>);

impl ServerTls {
    /// Loads the files.
    ///
    /// # Errors
    /// When a file is missing, is not PEM, or certificate and key do not match.
    pub fn load(paths: TlsPaths) -> Result<Self, TlsError> {
        Ok(Self(Arc::new(Reloading::load(paths, server_config)?)))
    }

    /// The configuration for the next connection; fresh if the files have changed.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        self.0.current(RELOAD_CHECK_INTERVAL)
    }

    /// Tells the operator of a handshake with `remote` that failed for a certificate; many of them are one line.
    pub fn refused(&self, place: &str, remote: &dyn Display, error: &io::Error) {
        self.0.refusals.tell(place, remote, error);
    }
}

impl ClientTls {
    /// Loads the files.
    ///
    /// # Errors
    /// When a file is missing, is not PEM, or certificate and key do not match.
    pub fn load(paths: TlsPaths) -> Result<Self, TlsError> {
        Ok(Self(Arc::new(Reloading::load(paths, client_config)?)))
    }

    /// The configuration for the next connection; fresh if the files have changed.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        self.0.current(RELOAD_CHECK_INTERVAL)
    }

    /// Tells the operator of a handshake with `remote` that failed for a certificate; many of them are one line.
    pub fn refused(&self, place: &str, remote: &dyn Display, error: &io::Error) {
        self.0.refusals.tell(place, remote, error);
    }
}

type Build<T> = fn(&TlsPaths) -> Result<T, TlsError>;
type Stamp = [Option<(SystemTime, u64)>; 3];

#[derive(Debug)]
struct Reloading<T> {
    paths: TlsPaths,
    build: Build<T>,
    state: Mutex<Loaded<T>>,
    refusals: Refusals,
}

#[derive(Debug)]
struct Loaded<T> {
    config: Arc<T>,
    stamp: Stamp,
    checked: Instant,
    /// Why the files as they are now are not used; told once.
    refused: Option<String>,
}

impl<T> Reloading<T> {
    fn load(paths: TlsPaths, build: Build<T>) -> Result<Self, TlsError> {
        // The stamp first: a change during the read is then seen as a change later.
        let stamp = stamp(&paths);
        let config = Arc::new(build(&paths)?);
        // The clock may be what is wrong, and the other side decides.
        if let Err(error) = check_valid_now(&paths) {
            error!(%error, "the other side will not accept our certificate");
        }
        Ok(Self {
            paths,
            build,
            state: Mutex::new(Loaded {
                config,
                stamp,
                checked: Instant::now(),
                refused: None,
            }),
            refusals: Refusals::default(),
        })
    }

    fn current(&self, interval: Duration) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.checked.elapsed() >= interval {
            state.checked = Instant::now();
            let now = stamp(&self.paths);
            if now != state.stamp {
                // Certificate and key are replaced one after the other: a mismatch is retried, the old pair serves on.
                let built = check_valid_now(&self.paths).and_then(|()| (self.build)(&self.paths));
                match built {
                    Ok(config) => {
                        info!(cert = %self.paths.cert.display(), "TLS material read again");
                        state.config = Arc::new(config);
                        state.stamp = now;
                        state.refused = None;
                    }
                    Err(error) => {
                        let reason = error.to_string();
                        if state.refused.as_ref() != Some(&reason) {
                            warn!(%error, "changed TLS material cannot be used, keeping the old");
                            state.refused = Some(reason);
                        }
                    }
                }
            }
        }
        Arc::clone(&state.config)
    }
}

/// A new certificate that is expired or of tomorrow must not replace one that works.
fn check_valid_now(paths: &TlsPaths) -> Result<(), TlsError> {
    let chain = chain(&paths.cert)?;
    let Some(leaf) = chain.first() else {
        return Ok(());
    };
    let (_, leaf) = X509Certificate::from_der(leaf)
        .map_err(|error| file("certificate file", &paths.cert, error))?;
    let validity = leaf.validity();
    if validity.is_valid() {
        return Ok(());
    }
    Err(TlsError::NotValidNow {
        path: paths.cert.display().to_string(),
        not_before: validity.not_before.to_string(),
        not_after: validity.not_after.to_string(),
    })
}

fn stamp(paths: &TlsPaths) -> Stamp {
    [&paths.ca, &paths.cert, &paths.key].map(|path| {
        let data = std::fs::metadata(path).ok()?;
        Some((data.modified().ok()?, data.len()))
    })
}

fn server_config(paths: &TlsPaths) -> Result<ServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots(&paths.ca)?),
        Arc::clone(&provider),
    )
    .build()
    .map_err(|error| TlsError::Verifier {
        ca: paths.ca.display().to_string(),
        reason: error.to_string(),
    })?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|source| material(paths, source))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain(&paths.cert)?, key(&paths.key)?)
        .map_err(|source| material(paths, source))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn client_config(paths: &TlsPaths) -> Result<ClientConfig, TlsError> {
    let mut config =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| material(paths, source))?
            .with_root_certificates(roots(&paths.ca)?)
            .with_client_auth_cert(chain(&paths.cert)?, key(&paths.key)?)
            .map_err(|source| material(paths, source))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn material(paths: &TlsPaths, source: rustls::Error) -> TlsError {
    let (cert, key) = (
        paths.cert.display().to_string(),
        paths.key.display().to_string(),
    );
    match source {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            TlsError::KeyMismatch { cert, key }
        }
        reason => TlsError::Material { cert, key, reason },
    }
}

fn file(what: &'static str, path: &Path, reason: impl ToString) -> TlsError {
    TlsError::File {
        what,
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates("CA file", path)? {
        store
            .add(certificate)
            .map_err(|error| file("CA file", path, error))?;
    }
    Ok(store)
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    certificates("certificate file", path)
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let list: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| pem(what, path, error))?;
    if list.is_empty() {
        return Err(file(what, path, "no certificate in it"));
    }
    Ok(list)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| pem("key file", path, error))
}

/// In words of this file, where the library has its own.
fn pem(what: &'static str, path: &Path, error: pem::Error) -> TlsError {
    match error {
        pem::Error::Io(error) => file(what, path, error),
        pem::Error::NoItemsFound => file(what, path, "there is no such PEM block in it"),
        error => file(what, path, error),
    }
}

#[cfg(test)]
mod tests;
