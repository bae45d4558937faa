//! Somebody who does nothing wrong, and must not notice those who do.

use std::time::{Duration, Instant};

use clustermesh_client::Client;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::support::put;

/// Longest wait for one put: far above any put of a quiet server, far below what a server that is stuck takes.
const WORST_PUT: Duration = Duration::from_secs(5);
const BETWEEN_PUTS: Duration = Duration::from_millis(5);

/// Writes all the time.
pub struct Bystander {
    stop: oneshot::Sender<()>,
    task: JoinHandle<(u64, Duration)>,
}

impl Bystander {
    pub fn new(client: Client) -> Self {
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let (mut written, mut worst) = (0, Duration::ZERO);
            loop {
                let begun = Instant::now();
                client.put(put("beside", "x")).await.unwrap();
                worst = worst.max(begun.elapsed());
                written += 1;
                tokio::select! {
                    _ = &mut stopped => return (written, worst),
                    () = tokio::time::sleep(BETWEEN_PUTS) => {}
                }
            }
        });
        Self { stop, task }
    }

    /// Fails when a put failed or took long.
    pub async fn was_not_disturbed(self) {
        let _gone = self.stop.send(());
        let (written, worst) = self.task.await.unwrap();
        assert!(
            written > 0 && worst < WORST_PUT,
            "{written} puts, one took {worst:?}"
        );
    }
}
