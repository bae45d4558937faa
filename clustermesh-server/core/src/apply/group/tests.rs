use proptest::prelude::*;

use crate::{
    ApplyError, KvError, Outcome, SnapshotLoader, State,
    limits::FEATURE_LEVEL,
    model_tests::requests::commands,
    pb::{self, AlarmKind, LeaseExpire, MemberAlarm, proposal::Command},
    test_support::{
        TERM, apply, batch, contents, delete, grant, group, one, put, put_with_lease, range,
    },
};

fn alarm(active: bool, member_id: u64, kind: i32) -> Command {
    Command::Alarm(pb::AlarmChange {
        active,
        alarm: Some(MemberAlarm { member_id, kind }),
    })
}

fn recover(cluster_id: u64, revision_bump: i64) -> Command {
    Command::Recover(pb::Recover {
        cluster_id,
        revision_bump,
    })
}

fn through_a_snapshot(state: &State) -> State {
    let mut cursor = state.snapshot();
    let mut loader = SnapshotLoader::new();
    while let Some(chunk) = cursor.next_chunk(state, 64).unwrap() {
        loader.push(chunk).unwrap();
    }
    loader.finish().unwrap()
}

#[test]
fn alarms_follow_etcds_rules() {
    let mut state = group();
    let nospace = i32::from(AlarmKind::Nospace);
    let stands = |member_id| Outcome::Alarm {
        alarms: vec![MemberAlarm {
            member_id,
            kind: nospace,
        }],
    };
    let none = || Ok(Outcome::Alarm { alarms: vec![] });
    assert_eq!(one(&mut state, alarm(true, 1, nospace)), Ok(stands(1)));
    assert_eq!(one(&mut state, alarm(true, 1, nospace)), Ok(stands(1)));
    // Neither no kind nor an unknown one, and 0 is a replica like any other.
    assert_eq!(one(&mut state, alarm(true, 1, 0)), none());
    assert_eq!(one(&mut state, alarm(true, 1, 9)), none());
    assert_eq!(one(&mut state, alarm(false, 0, nospace)), none());
    assert_eq!(one(&mut state, alarm(false, 1, 0)), none());
    assert_eq!(state.alarms().count(), 1);
    assert_eq!(one(&mut state, alarm(false, 1, nospace)), Ok(stands(1)));
    assert_eq!(state.alarms().count(), 0);
    assert_eq!(state.revision(), 1);
}

#[test]
fn a_removed_replica_is_never_forgotten_and_its_alarms_go() {
    let mut state = group();
    let corrupt = i32::from(AlarmKind::Corrupt);
    one(&mut state, alarm(true, 5, corrupt)).unwrap();
    let removed = Command::MemberRemoved(pb::MemberRemoved { member_id: 5 });
    one(&mut state, removed).unwrap();
    assert!(state.is_removed_member(5));
    assert_eq!(state.alarms().count(), 0);
    assert_eq!(
        through_a_snapshot(&state)
            .removed_members()
            .collect::<Vec<_>>(),
        [5]
    );
}

#[test]
fn a_newer_feature_level_stops_the_replica() {
    let mut state = group();
    let level = |level| batch([Command::FeatureLevel(pb::FeatureLevel { level })]);
    assert_eq!(
        state.apply(&level(FEATURE_LEVEL + 1), TERM).unwrap_err(),
        ApplyError::UnknownFeatureLevel {
            wanted: FEATURE_LEVEL + 1,
            known: FEATURE_LEVEL
        }
    );
    state.apply(&level(0), TERM).unwrap();
    assert_eq!(state.feature_level(), FEATURE_LEVEL);
    let unknown = batch([Command::Auth(pb::AuthChange { change: None })]);
    assert_eq!(
        state.apply(&unknown, TERM).unwrap_err(),
        ApplyError::UnknownCommand { position: 0 }
    );
}

#[test]
fn a_downgrade_is_announced_and_taken_back() {
    let mut state = group();
    let target = |version: &str| {
        Command::Downgrade(pb::Downgrade {
            target_version: version.into(),
        })
    };
    one(&mut state, target("3.6")).unwrap();
    assert_eq!(through_a_snapshot(&state).downgrade_target(), Some("3.6"));
    one(&mut state, target("")).unwrap();
    assert_eq!(state.downgrade_target(), None);
}

#[test]
fn leases_that_expire_together_take_a_revision_each() {
    let expire = || {
        Command::LeaseExpire(LeaseExpire {
            term: TERM,
            ids: vec![7, 8, 9],
        })
    };
    let prepare = |state: &mut State| {
        apply(
            state,
            [
                grant(7, 60),
                grant(8, 60),
                put_with_lease("a", "1", 7),
                put_with_lease("b", "1", 7),
                put_with_lease("c", "1", 8),
            ],
        );
    };
    let mut state = group();
    prepare(&mut state);
    let applied = apply(&mut state, [expire()]);
    let groups: Vec<_> = applied
        .groups
        .iter()
        .map(|group| (group.revision, group.events.len()))
        .collect();
    assert_eq!(groups, [(5, 2), (6, 1)]);
    assert_eq!(
        applied.outcomes[0].result,
        Ok(Outcome::LeaseExpire {
            expired: vec![7, 8]
        })
    );
    // As replicas do that cannot know it yet.
    let mut old = State::new();
    prepare(&mut old);
    assert_eq!(apply(&mut old, [expire()]).groups.len(), 1);
}

#[test]
fn a_recovered_group_has_its_keys_at_revisions_that_nobody_saw() {
    let mut state = group();
    apply(
        &mut state,
        [
            grant(7, 60),
            put_with_lease("a", "1", 7),
            put("a", "2"),
            put_with_lease("b", "1", 7),
            put("c", "1"),
            delete("c", ""),
        ],
    );
    let revision = state.revision();
    assert_eq!(one(&mut state, recover(0, 1)), Err(KvError::ClusterIdZero));
    for bump in [0, -1, i64::MAX] {
        assert_eq!(
            one(&mut state, recover(5, bump)),
            Err(KvError::RecoveryRevision { revision, bump })
        );
    }
    one(&mut state, recover(5, 1_000_000_000)).unwrap();
    let revision = revision + 1_000_000_000;
    assert_eq!((state.cluster_id(), state.revision()), (5, revision));
    assert_eq!(state.compact_revision(), revision);
    assert_eq!(
        contents(&state, "a", "z"),
        [("a".into(), "2".into()), ("b".into(), "1".into())]
    );
    let mut old = range("a", "z");
    old.revision = revision - 1;
    assert_eq!(state.range(&old), Err(KvError::Compacted));
    assert!(state.history(revision - 2, 1).is_err());
    assert!(state.history(revision, 1).unwrap().is_empty());
    assert_eq!(state.lease(7).unwrap().keys.len(), 1);

    one(&mut state, put("a", "3")).unwrap();
    assert_eq!(state.revision(), revision + 1);
    let groups = state.history(revision, usize::MAX).unwrap();
    assert_eq!(groups[0].revision, revision + 1);
    assert_eq!(groups[0].events[0].prev().unwrap().value_bytes(), b"2");
    assert_eq!(through_a_snapshot(&state).hash(), state.hash());
}

proptest! {
    #[test]
    fn a_recovery_keeps_the_keys_and_what_follows_is_the_same_after_a_snapshot(
        before in commands(30),
        after in commands(30),
        twice in any::<bool>(),
    ) {
        let mut state = group();
        state.apply(&batch(before), TERM).unwrap();
        let all = range("\0", "\0");
        let keys = state.range(&all).unwrap().kvs;
        one(&mut state, recover(5, 1000)).unwrap();
        if twice {
            one(&mut state, recover(6, 1000)).unwrap();
        }
        prop_assert_eq!(state.range(&all).unwrap().kvs, keys);
        let mut loaded = through_a_snapshot(&state);
        for command in after {
            for state in [&mut state, &mut loaded] {
                state.apply(&batch([command.clone()]), TERM).unwrap();
                prop_assert_eq!(state.check(), Ok(()));
            }
        }
        prop_assert_eq!(state.hash(), loaded.hash());
    }
}
