//! bcrypt beside the async runtime: slow on purpose, so few at once and few waiting.

use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use tokio::sync::Semaphore;
use tonic::Status;

/// Work factor, as etcd's default (`--bcrypt-cost`).
const COST: u32 = 10;
/// Longest password, bytes: bcrypt takes no more.
const MAX_PASSWORD_BYTES: usize = 72;
/// Hashes computed at once.
const MAX_RUNNING: usize = 2;
/// Hashes computed or waiting; more are refused.
const MAX_WAITING: usize = 128;

static RUNNING: Semaphore = Semaphore::const_new(MAX_RUNNING);
static WAITING: AtomicUsize = AtomicUsize::new(0);

struct Waiting;

impl Waiting {
    fn take() -> Result<Self, Status> {
        if WAITING.fetch_add(1, Ordering::Relaxed) >= MAX_WAITING {
            WAITING.fetch_sub(1, Ordering::Relaxed);
            return Err(Status::resource_exhausted("etcdserver: too many requests"));
        }
        Ok(Self)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        WAITING.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    let _waiting = Waiting::take()?;
    let stopped = || Status::unavailable("etcdserver: server stopped");
    let _running = RUNNING.acquire().await.map_err(|_| stopped())?;
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| stopped())
}

/// The hash of a password, in bcrypt's text form.
///
/// # Errors
/// Longer than bcrypt takes, with the code that etcd answers; too many at once.
pub async fn hash(password: String) -> Result<Bytes, Status> {
    if password.len() > MAX_PASSWORD_BYTES {
        return Err(Status::unknown("bcrypt: password length exceeds 72 bytes"));
    }
    run(move || bcrypt::hash(password, COST))
        .await?
        .map(Bytes::from)
        .map_err(|error| Status::unknown(error.to_string()))
}

/// Whether the password is that of the hash.
///
/// # Errors
/// Too many at once.
pub async fn verify(password: String, hash: Bytes) -> Result<bool, Status> {
    run(move || {
        std::str::from_utf8(&hash).is_ok_and(|hash| bcrypt::verify(password, hash).unwrap_or(false))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_is_known_by_its_hash_and_etcds_hashes_are_read() {
        let hashed = hash("secret".into()).await.unwrap();
        assert!(verify("secret".into(), hashed.clone()).await.unwrap());
        assert!(!verify("Secret".into(), hashed).await.unwrap());
        assert!(!verify("x".into(), Bytes::new()).await.unwrap());
        let error = hash("x".repeat(73)).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::Unknown);
        // Made by Go's library, whose prefix is another.
        let go = Bytes::from_static(GO_HASH);
        assert!(verify("etcd".into(), go).await.unwrap());
    }

    const GO_HASH: &[u8] = b"$2a$04$E.5Jsf.fkjF9IhVenE5g3Ozd7E0AxYRnrnn1GaPWGf1biOqUOqAsW";
}
