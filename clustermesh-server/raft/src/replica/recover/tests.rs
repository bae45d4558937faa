//! What a new group has of the old one's.

use std::path::Path;

use super::Replica;
use crate::test_support::{R, folder, put, value};

/// A data folder as it is now, without its lock: what a process that is killed leaves.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[tokio::test]
async fn the_last_write_that_was_acknowledged_is_in_the_new_group() {
    let dir = tempfile::tempdir().unwrap();
    let (lived, killed) = (dir.path().join("lived"), dir.path().join("killed"));
    let replica = Replica::<R>::start(folder(&lived)).await.unwrap();
    for n in 0..20 {
        let proposal = put(&format!("k{n}"), "v", 0);
        replica.propose(proposal).await.unwrap();
    }
    copy(&lived, &killed);
    replica.shutdown().await;
    let node = clustermesh_store::Node::default();
    Replica::<R>::force_new_cluster(&killed, "test", node)
        .await
        .unwrap();
    let replica = Replica::<R>::start(folder(&killed)).await.unwrap();
    assert_eq!(value(&replica, "k19").unwrap(), "v");
    replica.shutdown().await;
}
