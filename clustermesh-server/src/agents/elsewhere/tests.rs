use super::super::registry::Registry;
use super::*;
use clustermesh_api::v1::{EncryptionReport, ReportApplied, SourceRevision};

/// Passes on what `from` has since `taken`; the version that it then has.
fn pass(from: &Registry, to: &Registry, mut taken: u64) -> Result<u64, String> {
    loop {
        let (message, more) = from.since(taken);
        taken = message.to_version;
        to.take_from(1, message)?;
        if !more {
            return Ok(taken);
        }
    }
}

fn revision(revision: i64) -> SourceRevision {
    SourceRevision {
        cluster: "c1".into(),
        store_id: 7,
        revision,
    }
}

#[test]
fn another_replica_knows_sessions_reports_and_ends() {
    let (here, there) = (Registry::new(), Registry::new());
    let session = here.open("w1", "a", Report::default()).unwrap();
    let taken = pass(&here, &there, 0).unwrap();
    assert!(there.is_open("w1"));
    assert_eq!(there.report("w1").unwrap().age(), None);
    let encryption = EncryptionReport {
        backend: "kernel".into(),
        encrypted: 7,
        ..Default::default()
    };
    session.applied(ReportApplied {
        sources: vec![revision(5)],
        refused_records: BTreeMap::from([("too_long".into(), 2)]),
        encryption: Some(encryption.clone()),
    });
    let second = here.open("w2", "b", Report::default()).unwrap();
    let taken = pass(&here, &there, taken).unwrap();
    let report = there.report("w1").unwrap();
    assert!(report.has_applied(&revision(5)) && report.age().is_some());
    assert_eq!(report.refused_records["too_long"], 2);
    assert_eq!(report.encryption, Some(encryption));
    assert!(there.is_open("w2"));
    drop(session);
    let taken = pass(&here, &there, taken).unwrap();
    assert!(!there.is_open("w1") && there.is_open("w2"));
    // Nothing new is a sign of life, not a change.
    let (message, _) = here.since(taken);
    assert_eq!((message.open.len(), message.closed.len()), (0, 0));
    let changes = there.changes();
    pass(&here, &there, taken).unwrap();
    assert!(!changes.has_changed().unwrap());
    drop(second);
}

#[test]
fn a_gap_is_refused_and_a_new_beginning_replaces_everything() {
    let (here, there) = (Registry::new(), Registry::new());
    let first = here.open("w1", "a", Report::default()).unwrap();
    let taken = pass(&here, &there, 0).unwrap();
    drop(first);
    let unheard = pass(&here, &Registry::new(), 0).unwrap();
    let _second = here.open("w2", "a", Report::default()).unwrap();
    assert!(unheard > taken);
    assert!(pass(&here, &there, unheard).is_err());
    pass(&here, &there, 0).unwrap();
    assert!(!there.is_open("w1") && there.is_open("w2"));
    // The sender's process is another one.
    assert!(pass(&Registry::new(), &there, taken).is_err());
}

#[test]
fn many_sessions_go_in_several_messages() {
    let (here, there) = (Registry::new(), Registry::new());
    let count = MAX_SESSIONS_PER_MESSAGE + 10;
    let sessions: Vec<_> = (0..count)
        .map(|n| here.open(&format!("w{n}"), "a", Report::default()).unwrap())
        .collect();
    let (first, more) = here.since(0);
    assert!(more && first.open.len() == MAX_SESSIONS_PER_MESSAGE);
    let taken = pass(&here, &there, 0).unwrap();
    assert!((0..count).all(|n| there.is_open(&format!("w{n}"))));
    drop(sessions);
    // More ends than are remembered for ever would be: the rest is told, all the same.
    pass(&here, &there, taken).unwrap();
    assert!((0..count).all(|n| !there.is_open(&format!("w{n}"))));
}

#[test]
fn another_instance_is_refused_while_the_first_is_connected_elsewhere() {
    let (here, there) = (Registry::new(), Registry::new());
    let session = here.open("w1", "a", Report::default()).unwrap();
    let taken = pass(&here, &there, 0).unwrap();
    let error = there.open("w1", "b", Report::default()).unwrap_err();
    assert!(error.to_string().contains("instance a"), "{error}");
    // The same agent may move.
    drop(there.open("w1", "a", Report::default()).unwrap());
    drop(session);
    pass(&here, &there, taken).unwrap();
    assert!(there.open("w1", "b", Report::default()).is_ok());
}

#[test]
fn who_is_not_heard_counts_no_more() {
    let (here, there) = (Registry::new(), Elsewhere::default());
    let _session = here.open("w1", "a", Report::default()).unwrap();
    let (message, _) = here.since(0);
    there.take(1, message).unwrap();
    assert!(there.report("w1").is_some());
    let long_ago = Instant::now().checked_sub(SILENCE_MAX).unwrap();
    there.replicas.lock().get_mut(&1).unwrap().heard = long_ago;
    assert!(there.report("w1").is_none());
    assert_eq!(there.other_holder("w1", "b"), None);
}
