//! Readiness: a process is ready when the last of its start-up tokens has been dropped.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// The set of start-up steps that are still pending; clones share it.
#[derive(Debug, Clone)]
pub struct Readiness {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pending: Mutex<BTreeMap<&'static str, usize>>,
    ready: watch::Sender<bool>,
}

/// One pending step; dropping it says that the step is done.
#[derive(Debug)]
#[must_use = "a token that is dropped at once makes the step count as done"]
pub struct ReadyToken {
    step: &'static str,
    inner: Arc<Inner>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// Without a token: ready.
    #[must_use]
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                pending: Mutex::new(BTreeMap::new()),
                ready: watch::Sender::new(true),
            }),
        }
    }

    /// Registers `step`: not ready until the token is dropped.
    pub fn token(&self, step: &'static str) -> ReadyToken {
        *self.inner.lock().entry(step).or_insert(0) += 1;
        self.inner.ready.send_replace(false);
        ReadyToken {
            step,
            inner: Arc::clone(&self.inner),
        }
    }

    /// True when no step is pending.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.inner.lock().is_empty()
    }

    /// Names of the pending steps, sorted.
    #[must_use]
    pub fn pending(&self) -> Vec<&'static str> {
        self.inner.lock().keys().copied().collect()
    }

    /// Waits until no step is pending.
    pub async fn ready(&self) {
        let mut receiver = self.inner.ready.subscribe();
        // The sender lives in `self`, so the wait cannot end by its loss.
        let _ = receiver.wait_for(|ready| *ready).await;
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, usize>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ReadyToken {
    fn drop(&mut self) {
        let mut pending = self.inner.lock();
        if let Some(count) = pending.get_mut(self.step) {
            *count -= 1;
            if *count == 0 {
                pending.remove(self.step);
            }
        }
        if pending.is_empty() {
            self.inner.ready.send_replace(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ready_when_the_last_token_is_dropped() {
        let readiness = Readiness::new();
        let store = readiness.token("store");
        let records = readiness.token("records");
        let twice = readiness.token("records");
        assert!(!readiness.is_ready());
        assert_eq!(readiness.pending(), ["records", "store"]);
        drop(records);
        drop(store);
        assert_eq!(readiness.pending(), ["records"]);
        let waiter = tokio::spawn({
            let readiness = readiness.clone();
            async move { readiness.ready().await }
        });
        drop(twice);
        waiter.await.unwrap();
        assert!(readiness.is_ready());
    }
}
