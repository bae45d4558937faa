use clustermesh_api::etcd::rpc::LeaseRevokeRequest;
use proptest::prelude::*;

use crate::{
    KvError, Outcome, State,
    limits::{LEASE_OVERHEAD_BYTES, VERSION_OVERHEAD_BYTES},
    model_tests::requests::commands,
    pb::{self, AlarmKind, Batch, Leader, MemberAlarm, PeerChange, PeerCopy, proposal::Command},
    test_support::{
        TERM, bytes, compact, delete, grant, group, numbered, one, put, put_op, range_op, txn,
    },
};

const LEADER: u64 = 11;

fn entry(quota_bytes: u64, commands: impl IntoIterator<Item = Command>) -> Batch {
    let leader = Leader {
        id: LEADER,
        time_unix_ms: 0,
        quota_bytes,
        feature_level: 1,
    };
    Batch::new(leader, commands.into_iter().map(Into::into).collect())
}

fn limited(state: &mut State, quota_bytes: u64, command: Command) -> Result<Outcome, KvError> {
    let applied = state.apply(&entry(quota_bytes, [command]), TERM).unwrap();
    state.check().unwrap();
    applied.outcomes.into_iter().next().unwrap().result
}

fn alarm(active: bool, kind: AlarmKind) -> Command {
    Command::Alarm(pb::AlarmChange {
        active,
        alarm: Some(MemberAlarm {
            member_id: LEADER,
            kind: kind.into(),
        }),
    })
}

fn no_space() -> MemberAlarm {
    MemberAlarm {
        member_id: LEADER,
        kind: AlarmKind::Nospace.into(),
    }
}

#[test]
fn past_the_quota_only_what_frees_space_goes_on() {
    let mut state = group();
    let quota = 3 * (VERSION_OVERHEAD_BYTES + 2);
    for key in ["a", "b"] {
        limited(&mut state, quota, put(key, "1")).unwrap();
    }
    assert_eq!(state.alarms().count(), 0);
    let revision = state.revision();
    assert_eq!(
        limited(&mut state, quota, put("c", "1")),
        Err(KvError::NoSpace)
    );
    assert_eq!(state.revision(), revision);
    assert_eq!(state.alarms().collect::<Vec<_>>(), [no_space()]);
    // The alarm stays when the quota does not.
    for refused in [
        put("c", "1"),
        grant(7, 60),
        Command::Txn(txn(vec![], vec![], vec![put_op("c", "1")])),
    ] {
        assert_eq!(limited(&mut state, 0, refused), Err(KvError::NoSpace));
    }
    for allowed in [
        Command::Txn(txn(vec![], vec![range_op("a", "")], vec![])),
        delete("a", "b"),
        compact(state.revision() + 1),
    ] {
        assert!(
            limited(&mut state, quota, allowed.clone()).is_ok(),
            "{allowed:?}"
        );
    }
    assert_eq!(
        limited(&mut state, quota, alarm(false, AlarmKind::Nospace)),
        Ok(Outcome::Alarm {
            alarms: vec![no_space()]
        })
    );
    assert!(limited(&mut state, 0, put("c", "1")).is_ok());
}

#[test]
fn leases_count_for_the_quota() {
    let mut state = group();
    let quota = 2 * LEASE_OVERHEAD_BYTES + 1;
    assert!(limited(&mut state, quota, grant(1, 60)).is_ok());
    assert!(limited(&mut state, quota, grant(2, 60)).is_ok());
    assert_eq!(
        limited(&mut state, quota, grant(3, 60)),
        Err(KvError::NoSpace)
    );
    let revoke = Command::LeaseRevoke(LeaseRevokeRequest { id: 1 });
    assert!(limited(&mut state, quota, revoke).is_ok());
}

#[test]
fn a_corrupt_replica_stops_all_changes_of_keys() {
    let mut state = group();
    one(&mut state, grant(7, 60)).unwrap();
    one(&mut state, put("a", "1")).unwrap();
    one(&mut state, alarm(true, AlarmKind::Corrupt)).unwrap();
    for refused in [
        put("a", "2"),
        delete("a", ""),
        compact(2),
        grant(8, 60),
        Command::Txn(txn(vec![], vec![put_op("c", "1")], vec![])),
        Command::LeaseRevoke(LeaseRevokeRequest { id: 7 }),
        Command::LeaseExpire(pb::LeaseExpire {
            term: TERM,
            ids: vec![7],
        }),
    ] {
        assert_eq!(one(&mut state, refused), Err(KvError::Corrupt));
    }
    one(&mut state, alarm(false, AlarmKind::Corrupt)).unwrap();
    assert!(one(&mut state, put("a", "2")).is_ok());
}

#[test]
fn a_group_below_the_feature_level_has_no_quota() {
    let leader = Leader {
        quota_bytes: 1,
        ..Leader::default()
    };
    let old = Batch::new(leader, vec![put("a", "1").into()]);
    assert_eq!((old.format, old.quota_bytes), (1, 0));
}

fn copy(
    state: &mut State,
    limits: (u64, u64),
    changes: &[(&str, Option<&str>)],
) -> Result<Outcome, KvError> {
    let copy = PeerCopy {
        cluster: "east".into(),
        store_id: 9,
        revision: 1,
        synced: true,
        changes: changes
            .iter()
            .map(|(key, value)| PeerChange {
                key: bytes(&format!("cilium/cache/nodes/v1/{key}")),
                value: value.map(bytes),
            })
            .collect(),
        max_records: limits.0,
        max_bytes: limits.1,
        ..PeerCopy::default()
    };
    let copy = numbered(state, Command::PeerCopy(copy));
    one(state, copy)
}

#[test]
fn the_copy_of_a_peer_stays_within_its_own_limits() {
    let mut state = group();
    copy(
        &mut state,
        (2, 0),
        &[("east/a", Some("1")), ("east/b", Some("1"))],
    )
    .unwrap();
    copy(&mut state, (0, 0), &[("west/a", Some("1"))]).unwrap();
    let usage = state.peer_usage("east");
    assert_eq!((usage.records, usage.bytes), (2, 2 * 29));
    assert_eq!(
        copy(&mut state, (2, 0), &[("east/c", Some("1"))]),
        Err(KvError::PeerQuotaExceeded {
            cluster: "east".into(),
            what: "records",
            wanted: 3,
            limit: 2
        })
    );
    // One goes as another comes, or what is there changes.
    let swapped = [("east/c", Some("1")), ("east/a", None)];
    assert!(copy(&mut state, (2, 0), &swapped).is_ok());
    assert!(copy(&mut state, (2, 0), &[("east/c", Some("2"))]).is_ok());
    assert!(matches!(
        copy(&mut state, (0, 58), &[("east/c", Some("long"))]),
        Err(KvError::PeerQuotaExceeded {
            what: "bytes",
            wanted: 61,
            ..
        })
    ));
    // A lowered limit still lets it shrink.
    assert!(copy(&mut state, (1, 1), &[("east/c", None)]).is_ok());
    assert_eq!(state.peer_usage("east").records, 1);
    let peers: Vec<String> = state.peer_usages().map(|(name, _)| name).collect();
    assert_eq!(peers, ["east", "west"]);
}

proptest! {
    /// Whatever is asked for: never past the quota, the same on every replica, and deletes always go.
    #[test]
    fn the_quota_is_never_passed(commands in commands(40), quota in 1_u64..4000) {
        let mut state = group();
        let mut twin = group();
        for command in commands {
            let before = state.approximate_bytes();
            let stood = state.alarms().count() > 0;
            let command = numbered(&state, command);
            let result = limited(&mut state, quota, command.clone());
            prop_assert_eq!(&limited(&mut twin, quota, command.clone()), &result);
            let after = state.approximate_bytes();
            let grew = matches!(
                command,
                Command::Put(_) | Command::Txn(_) | Command::LeaseGrant(_) | Command::PeerCopy(_)
            );
            match &result {
                Err(KvError::NoSpace) => {
                    prop_assert!(grew);
                    prop_assert!(after <= before, "it wrote {}", after - before);
                    prop_assert_eq!(state.alarms().collect::<Vec<_>>(), [no_space()]);
                }
                Ok(_) if grew && after > before => {
                    // A tombstone may come with it, which is never refused.
                    let has_delete = matches!(command, Command::Txn(_) | Command::PeerCopy(_));
                    prop_assert!(after < quota || has_delete, "{after} of {quota}");
                    prop_assert!(!stood || has_delete);
                }
                _ => {}
            }
            if matches!(command, Command::DeleteRange(_)) {
                prop_assert!(result.is_ok());
            }
        }
        prop_assert_eq!(state.hash(), twin.hash());
    }
}
