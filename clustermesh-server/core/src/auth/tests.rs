mod model;

use clustermesh_api::etcd::{
    auth::{Permission, permission::Type},
    rpc::{DeleteRangeRequest, LeaseRevokeRequest, PutRequest, TxnRequest},
};
use prost::Message;

use super::*;
use crate::{
    Outcome, State,
    pb::{self, Proposal, auth_change::Change, proposal::Command},
    test_support::{
        TERM, apply, batch, bytes, compact, grant, group, one, put, put_op, put_with_lease,
        range_op, txn, txn_op,
    },
};

pub(super) fn auth(change: Change) -> Command {
    Command::Auth(pb::AuthChange {
        change: Some(change),
    })
}

fn user_add(name: &str) -> Change {
    Change::UserAdd(pb::AuthUserAdd {
        name: name.into(),
        password_hash: bytes("hash"),
        ..Default::default()
    })
}

fn role_add(name: &str) -> Change {
    Change::RoleAdd(pb::AuthRoleAdd { name: name.into() })
}

fn grant_role(user: &str, role: &str) -> Change {
    Change::UserGrantRole(pb::AuthUserGrantRole {
        user: user.into(),
        role: role.into(),
    })
}

fn revoke_role(user: &str, role: &str) -> Change {
    Change::UserRevokeRole(pb::AuthUserRevokeRole {
        user: user.into(),
        role: role.into(),
    })
}

fn permit(role: &str, kind: Type, key: &str, range_end: &str) -> Change {
    Change::RoleGrantPermission(pb::AuthRoleGrantPermission {
        role: role.into(),
        permission: Some(Permission {
            perm_type: kind.into(),
            key: bytes(key),
            range_end: bytes(range_end),
        }),
    })
}

fn token(user: &str, digest: &str) -> Change {
    Change::Token(pb::AuthToken {
        user: user.into(),
        token_sha256: bytes(digest),
    })
}

fn change(state: &mut State, wanted: Change) -> Result<(), KvError> {
    let proposal = Proposal::system(auth(wanted));
    let mut entry = batch([]);
    entry.proposals.push(proposal);
    let applied = state.apply(&entry, TERM).unwrap();
    state.check().unwrap();
    match applied.outcomes.into_iter().next().unwrap().result {
        Ok(outcome) => {
            assert_eq!(outcome, Outcome::Auth);
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// As user `user` at the auth revision of now.
fn act(state: &mut State, user: &str, command: Command) -> Result<Outcome, KvError> {
    let auth_revision = state.auth().revision();
    act_at(state, user, auth_revision, command)
}

fn act_at(
    state: &mut State,
    user: &str,
    auth_revision: u64,
    command: Command,
) -> Result<Outcome, KvError> {
    let mut entry = batch([]);
    entry.proposals.push(Proposal {
        user: user.into(),
        auth_revision,
        ..command.into()
    });
    let applied = state.apply(&entry, TERM).unwrap();
    state.check().unwrap();
    applied.outcomes.into_iter().next().unwrap().result
}

/// `root`, and `alice` who may read `r`-keys, write `w`-keys and both for `b`-keys.
fn enabled() -> State {
    let mut state = group();
    for wanted in [
        user_add("root"),
        grant_role("root", "root"),
        user_add("alice"),
        role_add("worker"),
        grant_role("alice", "worker"),
        permit("worker", Type::Read, "r", "s"),
        permit("worker", Type::Write, "w", "x"),
        permit("worker", Type::Readwrite, "b", "c"),
        Change::Enable(pb::AuthEnable {}),
    ] {
        change(&mut state, wanted).unwrap();
    }
    state
}

fn alice(state: &State) -> Actor<'static> {
    Actor {
        user: "alice",
        auth_revision: state.auth().revision(),
    }
}

#[test]
fn enabling_needs_a_root_user_with_the_root_role() {
    let mut state = group();
    let enable = || Change::Enable(pb::AuthEnable {});
    assert_eq!(change(&mut state, enable()), Err(KvError::RootUserNotExist));
    change(&mut state, user_add("root")).unwrap();
    assert_eq!(change(&mut state, enable()), Err(KvError::RootRoleNotExist));
    // The role need not exist to be granted.
    change(&mut state, grant_role("root", "root")).unwrap();
    let revision = state.auth().revision();
    change(&mut state, enable()).unwrap();
    assert_eq!(state.auth().revision(), revision);
    change(&mut state, enable()).unwrap();
    change(&mut state, Change::Disable(pb::AuthDisable {})).unwrap();
    assert_eq!(state.auth().revision(), revision + 1);
    change(&mut state, Change::Disable(pb::AuthDisable {})).unwrap();
    assert_eq!(state.auth().revision(), revision + 1);
}

#[test]
fn nobody_gets_in_once_it_is_enabled() {
    let mut state = enabled();
    assert_eq!(one(&mut state, put("b", "1")), Err(KvError::UserEmpty));
    assert_eq!(one(&mut state, grant(7, 60)), Err(KvError::UserEmpty));
    assert_eq!(one(&mut state, compact(1)), Err(KvError::UserEmpty));
    assert_eq!(
        one(&mut state, auth(user_add("mallory"))),
        Err(KvError::UserEmpty)
    );
    assert_eq!(state.revision(), 1);
}

#[test]
fn each_operation_needs_its_permission() {
    let mut state = enabled();
    let put = |key: &str| {
        Command::Put(PutRequest {
            key: bytes(key),
            ..Default::default()
        })
    };
    let put_prev = |key: &str| {
        Command::Put(PutRequest {
            key: bytes(key),
            prev_kv: true,
            ..Default::default()
        })
    };
    let delete = |key: &str, end: &str, prev_kv| {
        Command::DeleteRange(DeleteRangeRequest {
            key: bytes(key),
            range_end: bytes(end),
            prev_kv,
        })
    };
    for allowed in [
        put("w1"),
        put("b1"),
        put_prev("b1"),
        delete("w1", "w5", false),
        delete("b", "c", true),
        grant(7, 60),
    ] {
        assert!(
            act(&mut state, "alice", allowed.clone()).is_ok(),
            "{allowed:?}"
        );
    }
    let revision = state.revision();
    for refused in [
        put("r1"),
        put("x"),
        put_prev("w1"),
        delete("w1", "x1", false),
        delete("w1", "\0", false),
        delete("w1", "", true),
        compact(1),
        auth(user_add("mallory")),
        Command::Bootstrap(pb::Bootstrap::default()),
    ] {
        assert_eq!(
            act(&mut state, "alice", refused.clone()),
            Err(KvError::PermissionDenied),
            "{refused:?}"
        );
        assert!(
            act(&mut state, "ghost", refused.clone()).is_err(),
            "{refused:?}"
        );
    }
    assert_eq!(state.revision(), revision);
    assert!(act(&mut state, "root", put("anything")).is_ok());
}

#[test]
fn a_transaction_needs_the_permission_of_all_its_parts() {
    let mut state = enabled();
    let allowed = txn(vec![], vec![put_op("b1", "1")], vec![range_op("r", "s")]);
    let nested = |inner: TxnRequest| txn(vec![], vec![], vec![txn_op(inner)]);
    let run = |state: &mut State, request| act(state, "alice", Command::Txn(request));
    assert!(run(&mut state, allowed.clone()).is_ok());
    assert!(run(&mut state, nested(allowed)).is_ok());
    for refused in [
        txn(vec![], vec![put_op("r1", "1")], vec![]),
        // The branch that is not taken counts too.
        txn(vec![], vec![put_op("b1", "1")], vec![range_op("w", "")]),
        txn(
            vec![crate::test_support::compare(
                "w1",
                clustermesh_api::etcd::rpc::compare::CompareTarget::Version,
                clustermesh_api::etcd::rpc::compare::CompareResult::Equal,
                clustermesh_api::etcd::rpc::compare::TargetUnion::Version(0),
            )],
            vec![],
            vec![],
        ),
    ] {
        for request in [refused.clone(), nested(refused)] {
            assert_eq!(run(&mut state, request), Err(KvError::PermissionDenied));
        }
    }
}

#[test]
fn a_lease_with_keys_of_others_can_be_neither_revoked_nor_joined() {
    let mut state = enabled();
    act(&mut state, "root", grant(7, 60)).unwrap();
    act(&mut state, "alice", put_with_lease("b1", "1", 7)).unwrap();
    act(&mut state, "root", put_with_lease("x", "1", 7)).unwrap();
    let revoke = || Command::LeaseRevoke(LeaseRevokeRequest { id: 7 });
    assert_eq!(
        act(&mut state, "alice", revoke()),
        Err(KvError::PermissionDenied)
    );
    assert_eq!(
        act(&mut state, "alice", put_with_lease("b2", "1", 7)),
        Err(KvError::PermissionDenied)
    );
    assert_eq!(
        state.check_lease_permitted(alice(&state), 7, Access::Read),
        Err(KvError::PermissionDenied)
    );
    act(
        &mut state,
        "root",
        Command::DeleteRange(DeleteRangeRequest {
            key: bytes("x"),
            ..Default::default()
        }),
    )
    .unwrap();
    assert_eq!(
        state.check_lease_permitted(alice(&state), 7, Access::Read),
        Ok(())
    );
    assert!(act(&mut state, "alice", revoke()).is_ok());
    // A lease that is not there is nobody's.
    assert_eq!(
        act(&mut state, "alice", revoke()),
        Err(KvError::LeaseNotFound)
    );
}

#[test]
fn an_old_auth_revision_is_refused_and_changes_of_auth_move_no_key() {
    let mut state = enabled();
    let before = state.auth().revision();
    assert!(act_at(&mut state, "alice", before, put("b", "1")).is_ok());
    let (revision, hash) = (state.revision(), state.hash());
    change(&mut state, user_add("bob")).unwrap();
    assert_eq!(state.revision(), revision);
    assert_ne!(state.hash(), hash);
    assert_eq!(
        act_at(&mut state, "alice", before, put("b", "2")),
        Err(KvError::AuthOldRevision)
    );
    // Whoever may do everything is bound by it too.
    assert_eq!(
        act_at(&mut state, "root", before, put("b", "2")),
        Err(KvError::AuthOldRevision)
    );
}

#[test]
fn root_cannot_lock_itself_out() {
    let mut state = enabled();
    for refused in [
        Change::UserDelete(pb::AuthUserDelete {
            name: "root".into(),
        }),
        revoke_role("root", "root"),
        Change::RoleDelete(pb::AuthRoleDelete {
            name: "root".into(),
        }),
    ] {
        assert_eq!(change(&mut state, refused), Err(KvError::InvalidAuthMgmt));
    }
}

#[test]
fn a_role_that_goes_is_taken_from_its_users() {
    let mut state = enabled();
    assert!(act(&mut state, "alice", put("b", "1")).is_ok());
    change(
        &mut state,
        Change::RoleDelete(pb::AuthRoleDelete {
            name: "worker".into(),
        }),
    )
    .unwrap();
    assert_eq!(
        act(&mut state, "alice", put("b", "1")),
        Err(KvError::PermissionDenied)
    );
    assert!(state.auth().user("alice").unwrap().roles.is_empty());
    // The same name again brings nothing back.
    change(&mut state, role_add("worker")).unwrap();
    assert_eq!(state.auth().role("worker"), Ok(vec![]));
}

#[test]
fn a_permission_is_found_by_its_key_as_etcd_finds_it() {
    let mut state = group();
    change(&mut state, role_add("r")).unwrap();
    let listed = |state: &State| -> Vec<(String, i32)> {
        state
            .auth()
            .role("r")
            .unwrap()
            .iter()
            .map(|p| {
                (
                    String::from_utf8_lossy(&p.range_end).into_owned(),
                    p.perm_type,
                )
            })
            .collect()
    };
    change(&mut state, permit("r", Type::Read, "a", "b")).unwrap();
    change(&mut state, permit("r", Type::Read, "a", "c")).unwrap();
    change(&mut state, permit("r", Type::Write, "a", "b")).unwrap();
    assert_eq!(listed(&state), [("b".into(), 1), ("c".into(), 0)]);
    // Only the first of a key is looked at.
    change(&mut state, permit("r", Type::Write, "a", "c")).unwrap();
    assert_eq!(
        listed(&state),
        [("b".into(), 1), ("c".into(), 0), ("c".into(), 1)]
    );
    let revoke = || {
        Change::RoleRevokePermission(pb::AuthRoleRevokePermission {
            role: "r".into(),
            key: bytes("a"),
            range_end: bytes("c"),
        })
    };
    change(&mut state, revoke()).unwrap();
    assert_eq!(listed(&state), [("b".into(), 1)]);
    assert_eq!(
        change(&mut state, revoke()),
        Err(KvError::PermissionNotGranted)
    );
    for (key, end) in [("", "b"), ("b", "b"), ("b", "a")] {
        assert_eq!(
            change(&mut state, permit("r", Type::Read, key, end)),
            Err(KvError::InvalidAuthMgmt)
        );
    }
    change(&mut state, permit("r", Type::Read, "b", "\0")).unwrap();
}

#[test]
fn tokens_are_bounded_and_go_with_their_user() {
    let mut state = group();
    assert_eq!(
        change(&mut state, token("alice", "t")),
        Err(KvError::AuthNotEnabled)
    );
    let mut state = enabled();
    let revision = state.auth().revision();
    for number in 0..=MAX_AUTH_TOKENS {
        change(&mut state, token("alice", &format!("t{number}"))).unwrap();
    }
    assert_eq!(state.auth().revision(), revision);
    assert_eq!(state.auth().token(b"t0"), None);
    assert_eq!(state.auth().token(b"t1").unwrap().user, "alice");
    change(&mut state, token("root", "mine")).unwrap();
    change(
        &mut state,
        Change::UserChangePassword(pb::AuthUserChangePassword {
            name: "alice".into(),
            password_hash: bytes("other"),
        }),
    )
    .unwrap();
    assert_eq!(state.auth().token(b"t4"), None);
    assert_eq!(state.auth().token(b"mine").unwrap().user, "root");
    change(&mut state, Change::Disable(pb::AuthDisable {})).unwrap();
    assert_eq!(state.auth().token(b"mine"), None);
}

#[test]
fn a_user_without_password_gets_no_token() {
    let mut state = enabled();
    change(
        &mut state,
        Change::UserAdd(pb::AuthUserAdd {
            name: "cert".into(),
            no_password: true,
            password_hash: bytes("ignored"),
        }),
    )
    .unwrap();
    assert!(state.auth().user("cert").unwrap().password_hash.is_empty());
    for user in ["cert", "ghost"] {
        assert_eq!(
            change(&mut state, token(user, "t")),
            Err(KvError::AuthFailed)
        );
    }
}

#[test]
fn what_a_server_comes_with_is_written_once() {
    let mut state = group();
    change(&mut state, user_add("remote")).unwrap();
    let seed = || {
        Change::Seed(pb::AuthSeed {
            roles: vec![clustermesh_api::etcd::auth::Role {
                name: bytes("remote"),
                key_permission: vec![],
            }],
            users: ["remote", "local-c1"]
                .map(|name| clustermesh_api::etcd::auth::User {
                    name: bytes(name),
                    roles: vec!["remote".into()],
                    ..Default::default()
                })
                .into(),
        })
    };
    change(&mut state, seed()).unwrap();
    assert!(state.auth().is_seeded());
    // What was there stays as it was.
    assert!(state.auth().user("remote").unwrap().roles.is_empty());
    assert_eq!(state.auth().user("local-c1").unwrap().roles, ["remote"]);
    change(
        &mut state,
        Change::UserDelete(pb::AuthUserDelete {
            name: "local-c1".into(),
        }),
    )
    .unwrap();
    change(&mut state, seed()).unwrap();
    assert!(state.auth().user("local-c1").is_none());
}

#[test]
fn seeing_a_user_or_a_role_is_for_those_who_have_it() {
    let state = enabled();
    let auth = state.auth();
    let alice = alice(&state);
    assert_eq!(auth.check_user_get(alice, "alice"), Ok(()));
    assert_eq!(
        auth.check_user_get(alice, "root"),
        Err(KvError::PermissionDenied)
    );
    assert_eq!(auth.check_role_get(alice, "worker"), Ok(()));
    assert_eq!(
        auth.check_role_get(alice, "root"),
        Err(KvError::PermissionDenied)
    );
    assert_eq!(
        auth.check_user_get(Actor::NOBODY, "root"),
        Err(KvError::UserEmpty)
    );
}

#[test]
fn before_its_feature_level_the_group_takes_no_change_of_auth() {
    let mut state = State::new();
    assert_eq!(
        change(&mut state, user_add("root")),
        Err(KvError::NotCapable)
    );
    apply(
        &mut state,
        [Command::FeatureLevel(pb::FeatureLevel { level: 1 })],
    );
    assert_eq!(change(&mut state, user_add("root")), Ok(()));
}

#[test]
fn the_log_takes_what_was_written_before_there_were_users() {
    // Of the first release: format, time and one put.
    let old = [
        0x08, 0x01, 0x10, 0x05, 0x1a, 0x09, 0x0a, 0x07, 0x0a, 0x01, b'k', 0x12, 0x02, b'v', b'1',
    ];
    let mut state = State::new();
    state
        .apply(&pb::Batch::decode(old.as_slice()).unwrap(), TERM)
        .unwrap();
    assert_eq!(state.revision(), 2);
}
