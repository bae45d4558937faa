//! Tasks that end with the replica.

use std::future::Future;

use openraft::async_runtime::{AsyncRuntime, Select2, Watch, WatchReceiver, WatchSender};
use parking_lot::Mutex;

/// Tells tasks to stop.
pub(crate) struct Stopper<R: AsyncRuntime>(Mutex<<R::Watch as Watch>::Sender<bool>>);

/// Heard by tasks.
pub(crate) struct Stop<R: AsyncRuntime>(<R::Watch as Watch>::Receiver<bool>);

impl<R: AsyncRuntime> Clone for Stop<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: AsyncRuntime> Stopper<R> {
    pub(crate) fn new() -> (Self, Stop<R>) {
        let (sender, receiver) = R::Watch::channel(false);
        (Self(Mutex::new(sender)), Stop(receiver))
    }

    pub(crate) fn stop(&self) {
        // No listener left means that all have stopped.
        self.0
            .lock()
            .send_if_modified(|stopped| !std::mem::replace(stopped, true));
    }
}

impl<R: AsyncRuntime> Stop<R> {
    /// Runs `future` until it ends or the replica stops (`None`).
    pub(crate) async fn or<T: Send>(&self, future: impl Future<Output = T> + Send) -> Option<T> {
        let mut receiver = self.0.clone();
        // A gone sender is a stop too.
        let stopped = async move {
            let _stopped_or_gone = receiver.wait_until(|stopped| *stopped).await;
        };
        match R::select2(stopped, future).await {
            Select2::First(()) => None,
            Select2::Second(value) => Some(value),
        }
    }
}

/// Starts a task that nobody waits for.
#[track_caller]
pub(crate) fn spawn<R: AsyncRuntime>(future: impl Future<Output = ()> + Send + 'static) {
    drop(R::spawn(future));
}
