use std::{fs, path::Path};

use clustermesh_store::NewDataDir;

use super::*;
use crate::{
    Replica,
    test_support::{R, folder, put},
};

/// A replica's folder with 30 keys and a snapshot in the middle, not running.
async fn replica(path: &Path) -> u64 {
    let replica = Replica::<R>::start(folder(path)).await.unwrap();
    for n in 0..30 {
        replica
            .propose(put(&format!("k{n}"), vec![b'x'; 2000], 0))
            .await
            .unwrap();
        if n == 15 {
            replica.backup().await.unwrap();
        }
    }
    let cluster_id = replica.read(|state| state.cluster_id());
    replica.shutdown().await;
    cluster_id
}

async fn check(path: &Path, name: Option<&str>) -> CheckReport {
    let scratch = tempfile::tempdir().unwrap();
    check_data::<R>(path, name, scratch.path()).await
}

/// Names and content of all files.
fn content(path: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for found in fs::read_dir(path).unwrap() {
        let file = found.unwrap().path();
        if file.is_dir() {
            all.extend(content(&file));
        } else {
            all.push((file.clone(), fs::read(&file).unwrap()));
        }
    }
    all.sort();
    all
}

#[tokio::test]
async fn a_sound_folder_is_good_and_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let cluster_id = replica(dir.path()).await;
    let before = content(dir.path());
    let report = check(dir.path(), Some("test")).await;
    assert_eq!(report.findings, []);
    assert!(report.is_good());
    assert_eq!((report.revision, report.keys), (Some(31), Some(30)));
    assert_eq!(report.identity.unwrap().cluster_id, cluster_id);
    assert_eq!(report.snapshots.len(), 1);
    assert_eq!(report.snapshots[0].revision, Some(17));
    assert_eq!(report.committed, report.last_log_id);
    assert!(report.vote_term.is_some());
    assert!(content(dir.path()) == before, "a file was changed");
}

#[tokio::test]
async fn a_folder_in_use_or_of_another_cluster_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let running = Replica::<R>::start(folder(dir.path())).await.unwrap();
    let report = check(dir.path(), None).await;
    assert!(report.findings[0].text.contains("in use"), "{report:?}");
    running.shutdown().await;
    let report = check(dir.path(), Some("west")).await;
    assert!(!report.is_good());
    let text = &report.findings[0].text;
    assert!(
        text.contains("\"test\"") && text.contains("\"west\""),
        "{text}"
    );
    let report = check(&dir.path().join("nothing"), None).await;
    assert!(report.findings[0].text.contains("holds no replica"));
}

#[tokio::test]
async fn an_altered_and_a_cut_off_snapshot_are_told() {
    let dir = tempfile::tempdir().unwrap();
    replica(dir.path()).await;
    let file = check(dir.path(), None).await.snapshots[0].path.clone();
    let whole = fs::read(&file).unwrap();
    let mut altered = whole.clone();
    altered[whole.len() / 2] ^= 1;
    for broken in [altered.as_slice(), &whole[..whole.len() / 2]] {
        fs::write(&file, broken).unwrap();
        let report = check(dir.path(), None).await;
        assert!(!report.is_good());
        let finding = &report.findings[0];
        assert_eq!(finding.object, file.display().to_string());
        assert!(finding.text.contains("damaged"), "{finding:?}");
        // The log reaches back to the start, so nothing is lost yet.
        assert_eq!(report.keys, Some(30));
    }
    assert!(file.exists(), "the check sets nothing aside");
}

#[tokio::test]
async fn files_of_two_folders_are_told() {
    let one = tempfile::tempdir().unwrap();
    let two = tempfile::tempdir().unwrap();
    replica(one.path()).await;
    replica(two.path()).await;
    fs::remove_dir_all(one.path().join("snapshots")).unwrap();
    fs::rename(two.path().join("snapshots"), one.path().join("snapshots")).unwrap();
    let report = check(one.path(), None).await;
    assert!(!report.is_good());
    assert!(
        report
            .findings
            .iter()
            .any(|finding| finding.text.contains("two folders")),
        "{report:?}"
    );
}

/// A log of its own making, with the identity last, as a restore does it.
async fn with_log<F: AsyncFnOnce(&mut SledLog<R, Answer>)>(path: &Path, write: F) {
    let data_dir = NewDataDir::prepare(path).unwrap();
    let mut log = SledLog::<R, Answer>::open(&data_dir.log_path()).unwrap();
    write(&mut log).await;
    close(log).await;
    data_dir
        .finish(Identity {
            replica_id: 1,
            cluster_name: "test".into(),
            cluster_id: 5,
        })
        .unwrap();
}

#[tokio::test]
async fn a_vote_behind_the_log_and_lost_entries_are_told() {
    use clustermesh_store::{Entry, LogId, Vote};
    use openraft::storage::RaftLogStorageExt;
    let dir = tempfile::tempdir().unwrap();
    with_log(dir.path(), async |log| {
        log.save_vote(&Vote::new(3, 1)).await.unwrap();
        let blank = |index| Entry::new(LogId::new_term_index(4, index), EntryPayload::Blank);
        log.save_committed(Some(LogId::new_term_index(4, 9)))
            .await
            .unwrap();
        log.blocking_append((0..10).map(blank)).await.unwrap();
        log.truncate_after(Some(LogId::new_term_index(4, 2)))
            .await
            .unwrap();
    })
    .await;
    let report = check(dir.path(), None).await;
    let told = |object: &str, text: &str| {
        let mut findings = report.findings.iter();
        assert!(
            findings.any(|finding| finding.object == object && finding.text.contains(text)),
            "{text}: {report:?}"
        );
    };
    told("vote", "given twice");
    told("log", "acknowledged writes are lost");
    assert_eq!(report.first_index, Some(0));
}

#[tokio::test]
async fn entries_that_were_handed_over_and_not_written_are_no_loss() {
    use clustermesh_store::{Entry, LogId, Vote};
    use openraft::storage::RaftLogStorageExt;
    let dir = tempfile::tempdir().unwrap();
    with_log(dir.path(), async |log| {
        let blank = |index| Entry::new(LogId::new_term_index(4, index), EntryPayload::Blank);
        // The rest of what was committed was not written before the process ended.
        log.save_committed(Some(LogId::new_term_index(4, 9)))
            .await
            .unwrap();
        log.blocking_append((0..3).map(blank)).await.unwrap();
        log.save_vote(&Vote::new(4, 1)).await.unwrap();
    })
    .await;
    let report = check(dir.path(), None).await;
    assert!(report.is_good(), "{report:?}");
    assert_eq!(report.committed, Some(LogId::new_term_index(4, 2)));
}
