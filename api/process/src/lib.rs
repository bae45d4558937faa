//! What every process of the project needs: logging, TLS material, readiness, drain, HTTP for metrics and health.

pub mod admin;
pub mod drain;
pub mod errors;
pub mod heartbeat;
pub mod identity;
pub mod logging;
pub mod notify;
pub mod readiness;
pub mod tls;

pub use admin::{AdminPages, AdminServer, DrainEnd, HealthCheck};
pub use drain::{Drain, DrainPhase, DrainTrigger, drain, shutdown_signal};
pub use errors::said_once;
pub use heartbeat::{Heartbeat, Heartbeats};
pub use identity::{Organisation, PeerIdentity};
pub use logging::{LogFormat, LoggingError};
pub use notify::{notify_ready, notify_stopping};
pub use readiness::{Readiness, ReadyToken};
pub use tls::{ClientTls, ServerTls, TlsError, TlsPaths, install_crypto_provider};

/// Exit code of a process whose configuration is bad (`EX_USAGE` of sysexits.h).
pub const EXIT_BAD_CONFIGURATION: u8 = 64;
