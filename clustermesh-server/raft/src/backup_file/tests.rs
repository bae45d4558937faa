use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use clustermesh_api::etcd::rpc::LeaseGrantRequest;
use clustermesh_core::pb::proposal::Command;
use sha2::{Digest, Sha256};

use super::*;
use crate::{
    InitialMember, REVISION_BUMP, Replica, StoreError, WatchEnd,
    test_support::{R, everything, folder, put, value},
};

/// As the server streams it.
fn seal(mut content: Vec<u8>) -> Vec<u8> {
    content.resize(content.len().next_multiple_of(512), 0);
    let digest = Sha256::digest(&content);
    content.extend_from_slice(&digest);
    content
}

/// A backup of 20 keys, one of them deleted, one of them with a lease.
async fn backup(dir: &Path) -> (PathBuf, u64) {
    let replica = Replica::<R>::start(folder(&dir.join("old"))).await.unwrap();
    let lease = LeaseGrantRequest { id: 7, ttl: 600 };
    replica
        .propose(Command::LeaseGrant(lease).into())
        .await
        .unwrap();
    for n in 0..20 {
        let lease = if n == 0 { 7 } else { 0 };
        replica
            .propose(put(&format!("k{n}"), format!("v{n}"), lease))
            .await
            .unwrap();
    }
    let mut content = Vec::new();
    let file = replica.backup().await.unwrap();
    file.bytes().unwrap().read_to_end(&mut content).unwrap();
    let cluster_id = replica.read(|state| state.cluster_id());
    replica.shutdown().await;
    let path = dir.join("backup");
    fs::write(&path, seal(content)).unwrap();
    (path, cluster_id)
}

fn wanted(data_dir: PathBuf) -> Restore {
    Restore {
        data_dir,
        cluster_name: "test".into(),
        name: "r1".into(),
        members: Vec::new(),
        token: None,
        revision_bump: REVISION_BUMP,
    }
}

#[tokio::test]
async fn a_backup_tells_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, cluster_id) = backup(dir.path()).await;
    let summary = BackupFile::open(&path).unwrap().summary().unwrap();
    assert_eq!(summary.cluster_id, cluster_id);
    assert_eq!(
        (summary.revision, summary.keys, summary.leases),
        (21, 20, 1)
    );
    assert_eq!((summary.format, summary.members.len()), (1, 1));
    assert_eq!(summary.bytes, fs::metadata(&path).unwrap().len());
    assert_ne!(summary.hash_kv, 0);
}

#[tokio::test]
async fn a_restored_group_has_the_content_and_new_ids_and_revisions() {
    let dir = tempfile::tempdir().unwrap();
    let (path, cluster_id) = backup(dir.path()).await;
    let backup = BackupFile::open(&path).unwrap();
    let restored = backup
        .restore::<R>(&wanted(dir.path().join("new")))
        .await
        .unwrap();
    let revision = 21 + REVISION_BUMP;
    assert_eq!(restored.revision, revision);
    let replica = Replica::<R>::start(folder(&dir.path().join("new")))
        .await
        .unwrap();
    assert_eq!(replica.id(), restored.replica_id);
    let status = replica.status();
    assert_eq!(status.cluster_id, restored.cluster_id);
    assert_ne!(status.cluster_id, cluster_id);
    assert_eq!(
        (status.revision, status.compact_revision),
        (revision, revision)
    );
    for n in 0..20 {
        assert_eq!(value(&replica, &format!("k{n}")).unwrap(), format!("v{n}"));
    }
    replica.read(|state| assert_eq!(state.lease_ttl_s(7), Some(600)));
    // Who watched the old group learns that it must list again, and never waits for revisions that come twice.
    let mut old = replica.watch(everything(22));
    assert_eq!(
        old.next().await.unwrap_err(),
        WatchEnd::Compacted {
            compact_revision: revision
        }
    );
    let committed = replica.propose(put("more", "x", 0)).await.unwrap();
    assert_eq!(committed.revision, revision + 1);
    replica.shutdown().await;
    let again = backup
        .restore::<R>(&wanted(dir.path().join("again")))
        .await
        .unwrap();
    assert_ne!(again.cluster_id, restored.cluster_id);
}

#[tokio::test]
async fn the_replicas_of_one_restore_find_the_same_ids() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = backup(dir.path()).await;
    let backup = BackupFile::open(&path).unwrap();
    let members: Vec<InitialMember> = ["r1", "r2", "r3"]
        .map(|name| InitialMember {
            name: name.into(),
            peer_url: format!("https://{name}:2380"),
        })
        .into();
    let mut made = Vec::new();
    let mut token = None;
    for name in ["r1", "r2", "r3"] {
        let restored = backup
            .restore::<R>(&Restore {
                name: name.into(),
                members: members.clone(),
                token: token.clone(),
                ..wanted(dir.path().join(name))
            })
            .await
            .unwrap();
        token = Some(restored.token.clone());
        made.push(restored);
    }
    assert!(made.iter().all(|one| one.cluster_id == made[0].cluster_id));
    let summary = {
        let file = fs::read_dir(dir.path().join("r2/snapshots"))
            .unwrap()
            .next();
        let mut content = Vec::new();
        File::open(file.unwrap().unwrap().path())
            .unwrap()
            .read_to_end(&mut content)
            .unwrap();
        let path = dir.path().join("of-r2");
        fs::write(&path, seal(content)).unwrap();
        BackupFile::open(&path).unwrap().summary().unwrap()
    };
    let mut ids: Vec<_> = made.iter().map(|one| one.replica_id).collect();
    ids.sort_unstable();
    let listed: Vec<_> = summary.members.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, listed);
}

#[tokio::test]
async fn what_cannot_be_restored_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = backup(dir.path()).await;
    let whole = fs::read(&path).unwrap();
    let refused = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        BackupFile::open(&path).unwrap_err()
    };
    let error = refused("cut", &whole[..whole.len() - 100]);
    assert!(matches!(error, BackupError::NotWhole { .. }), "{error}");
    let error = refused("short", &whole[..whole.len() - 512]);
    assert!(matches!(error, BackupError::Altered { .. }), "{error}");
    assert!(error.to_string().contains("/short"), "{error}");
    let mut altered = whole.clone();
    altered[700] ^= 1;
    let error = refused("altered", &altered);
    assert!(matches!(error, BackupError::Altered { .. }), "{error}");
    let mut etcd = vec![0; 1024];
    etcd[16..20].copy_from_slice(&0xED0C_DAED_u32.to_le_bytes());
    assert!(matches!(
        refused("etcd", &seal(etcd)),
        BackupError::Etcd { .. }
    ));
    // Sealed well, but with another content.
    let error = refused("other", &seal(vec![7; 600]));
    assert!(
        matches!(
            error,
            BackupError::Snapshot {
                source: StoreError::Damaged { .. },
                ..
            }
        ),
        "{error}"
    );

    let backup = BackupFile::open(&path).unwrap();
    let used = dir.path().join("old");
    let error = backup.restore::<R>(&wanted(used)).await.unwrap_err();
    assert!(error.to_string().contains("is not empty"), "{error}");
    let error = backup
        .restore::<R>(&Restore {
            revision_bump: 0,
            ..wanted(dir.path().join("new"))
        })
        .await
        .unwrap_err();
    assert!(matches!(error, BackupError::Bump { .. }), "{error}");
    let error = backup
        .restore::<R>(&Restore {
            members: vec![InitialMember {
                name: "other".into(),
                peer_url: "https://other:2380".into(),
            }],
            ..wanted(dir.path().join("new"))
        })
        .await
        .unwrap_err();
    assert!(matches!(error, BackupError::Members(_)), "{error}");
    // What was refused left nothing behind.
    backup
        .restore::<R>(&wanted(dir.path().join("new")))
        .await
        .unwrap();
}
