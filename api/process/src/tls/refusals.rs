//! Handshakes that fail for a certificate: told to the operator, however many there are.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::{AlertDescription, Error};
use tracing::{debug, warn};

/// A line in the log at most this often; the others are counted in the next one.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What was refused since the last line; one kind must not hide the other.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    ours: Mutex<State>,
    theirs: Mutex<State>,
}

/// Whose certificate is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Ours,
    Theirs,
}

#[derive(Debug, Default)]
struct State {
    told: Option<Instant>,
    untold: u64,
}

impl Refusals {
    /// Tells of a failed handshake with `remote` at `place`.
    pub(super) fn tell(&self, place: &str, remote: &dyn std::fmt::Display, error: &io::Error) {
        let Some((fault, reason)) = reason(error) else {
            debug!(%remote, %error, "TLS handshake at the {place}");
            return;
        };
        let state = match fault {
            Fault::Ours => &self.ours,
            Fault::Theirs => &self.theirs,
        };
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.told.is_some_and(|told| told.elapsed() < LOG_INTERVAL) {
            state.untold += 1;
            debug!(%remote, reason, "TLS handshake at the {place}");
            return;
        }
        state.told = Some(Instant::now());
        let untold = std::mem::take(&mut state.untold);
        warn!(%remote, reason, more_before = untold, "TLS handshake at the {place} failed");
    }
}

/// What is wrong with whose certificate; `None` when the handshake failed for something else.
fn reason(error: &io::Error) -> Option<(Fault, String)> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    match error {
        Error::InvalidCertificate(reason) => Some((
            Fault::Theirs,
            format!(
                "the other side's certificate is not accepted: {reason}; check its dates, its names and that its CA is in our CA file"
            ),
        )),
        Error::NoCertificatesPresented => Some((
            Fault::Theirs,
            "the other side shows no certificate; give it one".to_owned(),
        )),
        Error::AlertReceived(
            alert @ (AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateRequired
            // A CA made anew under the same name: its signature does not fit.
            | AlertDescription::DecryptError),
        ) => Some((
            Fault::Ours,
            format!(
                "the other side does not accept our certificate: {alert:?}; check its dates, its names and the other side's CA file"
            ),
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rustls::CertificateError;

    use super::*;

    #[test]
    fn a_refusal_says_whose_certificate_is_at_fault() {
        let of = |error| reason(&io::Error::new(io::ErrorKind::InvalidData, error));
        let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let (fault, theirs) = of(unknown).unwrap();
        assert_eq!(fault, Fault::Theirs, "{theirs}");
        let expired = Error::AlertReceived(AlertDescription::CertificateExpired);
        let (fault, ours) = of(expired).unwrap();
        assert_eq!(fault, Fault::Ours);
        assert!(
            ours.contains("accept our") && ours.contains("Expired"),
            "{ours}"
        );
        assert_eq!(of(Error::HandshakeNotComplete), None);
        assert_eq!(reason(&io::ErrorKind::UnexpectedEof.into()), None);
    }
}
