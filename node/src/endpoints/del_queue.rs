//! DELs that came while no agent answered: one file each, worked off at the start and from then on periodically.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clustermesh_node_core::ipam::Attachment;
use clustermesh_process::Drain;
use tracing::{info, warn};

use super::{Endpoints, interface_name};

/// Files that are looked at in one round.
const QUEUED_MAX: usize = 100_000;
/// A DEL that was queued while the agent started waits at most so long.
const WORKED_OFF_EVERY: Duration = Duration::from_secs(15);

/// Where the plugin leaves the DEL of an attachment.
#[must_use]
pub fn file_of(dir: &Path, attachment: &Attachment) -> PathBuf {
    dir.join(format!("{}.json", interface_name(attachment)))
}

/// The folder of queued DELs.
pub struct DelQueue {
    dir: PathBuf,
    /// Held from the look at a file to the end of what it asks for.
    at_work: tokio::sync::Mutex<()>,
}

impl DelQueue {
    /// The queue in `dir`, which need not exist.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            at_work: tokio::sync::Mutex::default(),
        }
    }

    /// Carries out every queued DEL; one that fails stays for the next round.
    pub async fn work_off(&self, endpoints: &Endpoints) {
        for path in self.queued() {
            let _at_work = self.at_work.lock().await;
            // An ADD may have dropped it since.
            let Some(attachment) = read(&path) else {
                continue;
            };
            let container = &attachment.container_id;
            match endpoints.del(&attachment).await {
                Ok(()) => {
                    info!(container, "queued DEL carried out");
                    if let Err(error) = fs::remove_file(&path) {
                        warn!(path = %path.display(), %error, "queued DEL cannot be removed");
                    }
                }
                Err(error) => {
                    warn!(container, %error, "queued DEL failed, trying again");
                }
            }
        }
    }

    fn queued(&self) -> Vec<PathBuf> {
        match fs::read_dir(&self.dir) {
            Ok(entries) => entries
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.extension().is_some_and(|e| e == "json"))
                .take(QUEUED_MAX)
                .collect(),
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                warn!(dir = %self.dir.display(), %error, "queued DELs cannot be read");
                Vec::new()
            }
        }
    }

    /// An ADD says that the attachment is wanted: a DEL that was queued before it must not remove it.
    pub async fn drop_before_add(&self, attachment: &Attachment) {
        let _at_work = self.at_work.lock().await;
        let path = file_of(&self.dir, attachment);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                warn!(path = %path.display(), %error, "queued DEL cannot be removed");
            }
            _ => {}
        }
    }
}

/// Works the queue off until the drain.
pub async fn run(queue: Arc<DelQueue>, endpoints: Arc<Endpoints>, drain: Drain) {
    let mut rounds = tokio::time::interval(WORKED_OFF_EVERY);
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = rounds.tick() => queue.work_off(&endpoints).await,
            () = drain.draining() => return,
        }
    }
}

fn read(path: &Path) -> Option<Attachment> {
    match fs::read(path).map(|bytes| serde_json::from_slice(&bytes)) {
        Ok(Ok(attachment)) => Some(attachment),
        Ok(Err(error)) => {
            warn!(path = %path.display(), %error, "queued DEL is damaged and dropped");
            let _ = fs::remove_file(path);
            None
        }
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => {
            warn!(path = %path.display(), %error, "queued DEL cannot be read");
            None
        }
    }
}
