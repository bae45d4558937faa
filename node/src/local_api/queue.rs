//! DELs that came while no agent ran: one file each, worked off at the start.

use std::fs;
use std::path::Path;

use clustermesh_node_core::ipam::Attachment;
use tracing::{info, warn};

use crate::endpoint::Endpoints;

/// Files that are looked at in one start.
const QUEUED_MAX: usize = 100_000;

/// Carries out every queued DEL; one that fails stays for the next start.
pub async fn work_off(dir: &Path, endpoints: &Endpoints) {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => {
            warn!(dir = %dir.display(), %error, "queued DELs cannot be read");
            return;
        }
    };
    for path in entries.flatten().map(|entry| entry.path()).take(QUEUED_MAX) {
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let attachment = match fs::read(&path).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(attachment)) => attachment,
            Ok(Err(error)) => {
                warn!(path = %path.display(), %error, "queued DEL is damaged and dropped");
                let _ = fs::remove_file(&path);
                continue;
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "queued DEL cannot be read");
                continue;
            }
        };
        let attachment: Attachment = attachment;
        match endpoints.del(&attachment).await {
            Ok(()) => {
                info!(
                    container = attachment.container_id,
                    "queued DEL carried out"
                );
                if let Err(error) = fs::remove_file(&path) {
                    warn!(path = %path.display(), %error, "queued DEL cannot be removed");
                }
            }
            Err(error) => {
                warn!(container = attachment.container_id, %error, "queued DEL failed, trying again at the next start");
            }
        }
    }
}
