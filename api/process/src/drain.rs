//! Drain: SIGTERM or SIGINT asks tasks to finish; past a deadline they are dropped.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

/// How far the end of the process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainPhase {
    /// Normal work.
    Running,
    /// Finish what is begun, take nothing new.
    Draining,
    /// Stop at once.
    Forced,
}

/// A task's view of the drain. The process waits for every clone to be dropped.
#[derive(Debug, Clone)]
pub struct Drain {
    phase: watch::Receiver<DrainPhase>,
    _alive: mpsc::Sender<()>,
}

/// The side that begins the drain and waits for its end.
#[derive(Debug)]
pub struct DrainTrigger {
    phase: watch::Sender<DrainPhase>,
    drained: mpsc::Receiver<()>,
}

/// A trigger and the view to clone into tasks.
#[must_use]
pub fn drain() -> (DrainTrigger, Drain) {
    let (phase, view) = watch::channel(DrainPhase::Running);
    let (alive, drained) = mpsc::channel(1);
    (
        DrainTrigger { phase, drained },
        Drain {
            phase: view,
            _alive: alive,
        },
    )
}

impl Drain {
    /// The phase now.
    #[must_use]
    pub fn phase(&self) -> DrainPhase {
        *self.phase.borrow()
    }

    /// Waits until the drain begins (a vanished trigger counts as that).
    pub async fn draining(&self) {
        self.reached(DrainPhase::Draining).await;
    }

    /// Waits until work must stop at once.
    pub async fn forced(&self) {
        self.reached(DrainPhase::Forced).await;
    }

    /// A view that the drain does not wait for.
    pub(crate) fn observe(&self) -> watch::Receiver<DrainPhase> {
        self.phase.clone()
    }

    async fn reached(&self, wanted: DrainPhase) {
        let mut phase = self.phase.clone();
        let _ = phase.wait_for(|phase| *phase >= wanted).await;
    }
}

impl DrainTrigger {
    /// Begins the drain, waits at most `deadline` for all views to be dropped, then forces the rest.
    /// True when everything ended in time.
    pub async fn drain(mut self, deadline: Duration) -> bool {
        self.phase.send_replace(DrainPhase::Draining);
        if tokio::time::timeout(deadline, self.drained.recv())
            .await
            .is_ok()
        {
            return true;
        }
        warn!(
            deadline_seconds = deadline.as_secs(),
            "drain deadline passed, stopping what is left"
        );
        self.phase.send_replace(DrainPhase::Forced);
        false
    }
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// When the handlers cannot be installed.
pub async fn shutdown_signal() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    info!(signal = name, "draining");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drain_ends_when_the_last_view_is_dropped() {
        let (trigger, view) = drain();
        let task = tokio::spawn(async move {
            view.draining().await;
            assert_eq!(view.phase(), DrainPhase::Draining);
        });
        assert!(trigger.drain(Duration::from_secs(30)).await);
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn past_the_deadline_the_rest_is_forced() {
        let (trigger, view) = drain();
        let task = tokio::spawn(async move {
            view.forced().await;
            view.phase()
        });
        assert!(!trigger.drain(Duration::from_secs(5)).await);
        assert_eq!(task.await.unwrap(), DrainPhase::Forced);
    }
}
