//! Calls of clients: gRPC messages and the gateway's JSON, up to what the keyspace makes of them.

use std::sync::OnceLock;

use bytes::Bytes;
use clustermesh_api::etcd::auth::{Permission, permission};
use clustermesh_api::etcd::rpc::request_op::Request;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest, WatchCreateRequest, WatchRequest,
    watch_request,
};
use clustermesh_core::limits::{BATCH_FORMAT, FEATURE_LEVEL};
use clustermesh_core::pb::proposal::Command;
use clustermesh_core::pb::{
    AlarmChange, AlarmKind, AuthChange, AuthRoleAdd, AuthRoleGrantPermission, AuthUserAdd, Batch,
    FeatureLevel, MemberAlarm, Proposal, auth_change,
};
use clustermesh_core::{KeyRange, State, WatchIndex, check, is_read_only};
use clustermesh_server::gateway::{Methods, Objects};
use prost::Message;

use crate::input::Input;

const TERM: u64 = 1;
/// Bytes of JSON that a stream may hold; less than a server's, so that the limit is met.
const JSON_MAX_BYTES: usize = 4096;
const PATHS: [&str; 12] = [
    "kv/range",
    "kv/put",
    "kv/deleterange",
    "kv/txn",
    "kv/compaction",
    "watch",
    "lease/grant",
    "lease/revoke",
    "auth/user/add",
    "auth/role/grant",
    "cluster/member/add",
    "election/campaign",
];

fn batch(command: Command) -> Batch {
    Batch {
        format: BATCH_FORMAT,
        proposals: vec![Proposal::system(command)],
        ..Batch::default()
    }
}

fn put(key: &str, value: &str, lease: i64) -> PutRequest {
    PutRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        lease,
        ..PutRequest::default()
    }
}

/// A store with keys, versions, a lease, users and a compaction.
pub(crate) fn store() -> State {
    let mut state = State::new();
    let user = |name: &str| AuthUserAdd {
        name: name.to_owned(),
        no_password: true,
        ..AuthUserAdd::default()
    };
    let auth = |change| {
        Command::Auth(AuthChange {
            change: Some(change),
        })
    };
    let commands = [
        Command::FeatureLevel(FeatureLevel {
            level: FEATURE_LEVEL,
        }),
        Command::LeaseGrant(LeaseGrantRequest { id: 7, ttl: 60 }),
        Command::Put(put("a", "1", 0)),
        Command::Put(put("b", "2", 7)),
        Command::Put(put("a", "3", 7)),
        Command::Put(put("c", "4", 0)),
        Command::DeleteRange(DeleteRangeRequest {
            key: "c".into(),
            ..DeleteRangeRequest::default()
        }),
        Command::Compact(CompactionRequest {
            revision: 3,
            physical: false,
        }),
        auth(auth_change::Change::UserAdd(user("u"))),
        auth(auth_change::Change::RoleAdd(AuthRoleAdd {
            name: "r".to_owned(),
        })),
    ];
    for command in commands {
        apply(&mut state, command);
    }
    state
}

/// What every replica must be able to do with what was accepted.
fn apply(state: &mut State, command: Command) -> bool {
    let applied = match state.apply(&batch(command.clone()), TERM) {
        Ok(applied) => applied,
        Err(error) => panic!("{command:?} was proposed and stops every replica: {error}"),
    };
    assert_eq!(state.check(), Ok(()), "{command:?}");
    applied
        .outcomes
        .first()
        .is_some_and(|outcome| outcome.result.is_ok())
}

pub(crate) fn grpc(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let kind = input.choice(9);
    let body = Bytes::copy_from_slice(input.rest());
    taken(kind, body).is_some()
}

/// One message as the services take it: decoded, checked, then read or applied. `None` when it was refused.
fn taken(kind: u8, body: Bytes) -> Option<()> {
    check::check_size(body.len()).ok()?;
    let mut state = store();
    let applied = match kind {
        0 => {
            let request = RangeRequest::decode(body).ok()?;
            check::check_range(&request).ok()?;
            return range(&state, &request);
        }
        1 => {
            let request = PutRequest::decode(body).ok()?;
            check::check_put(&request).ok()?;
            apply(&mut state, Command::Put(request))
        }
        2 => {
            let request = DeleteRangeRequest::decode(body).ok()?;
            check::check_delete_range(&request).ok()?;
            apply(&mut state, Command::DeleteRange(request))
        }
        3 => {
            let request = TxnRequest::decode(body).ok()?;
            check::check_txn(&request).ok()?;
            // The log's decoder must take what was accepted, in its own wrappings.
            let encoded = batch(Command::Txn(request.clone())).encode_to_vec();
            assert!(Batch::decode(&*encoded).is_ok(), "{request:?}");
            if is_read_only(&request) {
                let revision = state.revision();
                let read = state.read_txn(&request);
                assert_eq!(state.revision(), revision);
                return read.ok().map(drop);
            }
            apply(&mut state, Command::Txn(request))
        }
        4 => {
            let request = CompactionRequest::decode(body).ok()?;
            apply(&mut state, Command::Compact(request))
        }
        5 => {
            let request = LeaseGrantRequest::decode(body).ok()?;
            check::check_lease_grant(&request).ok()?;
            apply(&mut state, Command::LeaseGrant(request))
        }
        6 => {
            let request = LeaseRevokeRequest::decode(body).ok()?;
            apply(&mut state, Command::LeaseRevoke(request))
        }
        7 => {
            let request = AuthChange::decode(body).ok()?;
            // The services choose the change, clients fill it.
            request.change.as_ref()?;
            let change = apply(&mut state, Command::Auth(request));
            // Whoever has rights now, the checks answer.
            let _ = state.auth().roles().count() + state.auth().users().count();
            change
        }
        _ => return watch(WatchRequest::decode(body).ok()?),
    };
    applied.then_some(())
}

fn range(state: &State, request: &RangeRequest) -> Option<()> {
    let response = state.range(request).ok()?;
    if let Ok(limit @ 1..) = usize::try_from(request.limit) {
        assert!(response.kvs.len() <= limit, "{request:?}");
    }
    let range = KeyRange::new(&request.key, &request.range_end);
    for kv in &response.kvs {
        assert!(range.contains(&kv.key), "{request:?}: {kv:?}");
    }
    assert!(
        request.count_only || response.count >= i64::try_from(response.kvs.len()).ok()?,
        "{request:?}"
    );
    Some(())
}

fn watch(request: WatchRequest) -> Option<()> {
    let watch_request::RequestUnion::CreateRequest(create) = request.request_union? else {
        return Some(());
    };
    let range = KeyRange::new(&create.key, &create.range_end);
    let mut index = WatchIndex::new();
    let id = 1;
    index.add(id, range.clone());
    for key in [&b"a"[..], b"b", b"\0", b"\xff", &create.key] {
        assert_eq!(!index.matching(key).is_empty(), range.contains(key));
    }
    index.remove(id);
    assert!(index.is_empty());
    Some(())
}

fn methods() -> &'static Methods {
    static METHODS: OnceLock<Methods> = OnceLock::new();
    METHODS.get_or_init(|| match Methods::load() {
        Ok(methods) => methods,
        Err(error) => panic!("{error:#}"),
    })
}

pub(crate) fn json(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let path = PATHS[usize::from(input.choice(12))];
    let cut = usize::from(input.byte()).max(1);
    let text = input.rest();
    assert_eq!(objects(text, cut), objects(text, text.len().max(1)));
    let Some(method) = methods().get(path) else {
        panic!("no method at {path}");
    };
    let Ok(message) = method.request(text) else {
        return false;
    };
    // What the gateway makes, the services can read.
    let kind = match path {
        "kv/range" => 0,
        "kv/put" => 1,
        "kv/deleterange" => 2,
        "kv/txn" => 3,
        "kv/compaction" => 4,
        "lease/grant" => 5,
        "lease/revoke" => 6,
        "watch" => 8,
        _ => return true,
    };
    if kind == 3 {
        assert!(
            TxnRequest::decode(message.clone()).is_ok() || text.len() > 100,
            "{text:?}"
        );
    }
    let _ = taken(kind, message);
    true
}

/// The objects of a stream that comes in parts of `cut` bytes, up to the first fault, and whether there was one.
fn objects(text: &[u8], cut: usize) -> (Vec<Bytes>, bool) {
    let mut objects = Objects::default();
    let mut found = Vec::new();
    if text.len() > JSON_MAX_BYTES {
        return (found, true);
    }
    for part in text.chunks(cut) {
        if objects.push(part, JSON_MAX_BYTES).is_err() {
            return (found, true);
        }
        loop {
            match objects.next_object() {
                Ok(Some(object)) => found.push(Bytes::copy_from_slice(object.trim_ascii())),
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    (found, false)
}

fn seed(kind: u8, message: &impl Message) -> Vec<u8> {
    [vec![kind], message.encode_to_vec()].concat()
}

pub(crate) fn grpc_seeds() -> Vec<Vec<u8>> {
    let all = RangeRequest {
        key: "a".into(),
        range_end: "z".into(),
        limit: 1,
        sort_order: 2,
        sort_target: 3,
        max_mod_revision: 9,
        ..RangeRequest::default()
    };
    let op = |request| RequestOp {
        request: Some(request),
    };
    let txn = TxnRequest {
        compare: vec![Compare {
            key: "a".into(),
            ..Compare::default()
        }],
        success: vec![
            op(Request::RequestPut(put("x", "1", 7))),
            op(Request::RequestRange(all.clone())),
        ],
        failure: vec![op(Request::RequestTxn(TxnRequest {
            success: vec![op(Request::RequestDeleteRange(DeleteRangeRequest {
                key: "a".into(),
                range_end: "\0".into(),
                prev_kv: true,
            }))],
            ..TxnRequest::default()
        }))],
    };
    let grant = AuthChange {
        change: Some(auth_change::Change::RoleGrantPermission(
            AuthRoleGrantPermission {
                role: "r".to_owned(),
                permission: Some(Permission {
                    perm_type: permission::Type::Readwrite.into(),
                    key: "a".into(),
                    range_end: "b".into(),
                }),
            },
        )),
    };
    let watch = WatchRequest {
        request_union: Some(watch_request::RequestUnion::CreateRequest(
            WatchCreateRequest {
                key: "a".into(),
                range_end: "\0".into(),
                start_revision: 3,
                prev_kv: true,
                ..WatchCreateRequest::default()
            },
        )),
    };
    let delete = DeleteRangeRequest {
        key: "a".into(),
        range_end: "c".into(),
        prev_kv: true,
    };
    vec![
        seed(0, &all),
        seed(1, &put("k", "v", 7)),
        seed(2, &delete),
        seed(3, &txn),
        seed(
            4,
            &CompactionRequest {
                revision: 5,
                physical: true,
            },
        ),
        seed(5, &LeaseGrantRequest { id: 9, ttl: 60 }),
        seed(6, &LeaseRevokeRequest { id: 7 }),
        seed(7, &grant),
        seed(8, &watch),
    ]
}

pub(crate) fn json_seeds() -> Vec<Vec<u8>> {
    let text = |path: u8, text: &str| [&[path, 5][..], text.as_bytes()].concat();
    vec![
        text(
            0,
            r#"{"key":"YQ==","range_end":"eg==","limit":"1","sort_order":"DESCEND","sort_target":"MOD"}"#,
        ),
        text(
            1,
            r#"{"key":"YQ==","value":"YmE=","lease":"7","prev_kv":true}"#,
        ),
        text(2, r#"{"key":"YQ==","rangeEnd":"AA=="}"#),
        text(
            3,
            r#"{"compare":[{"key":"YQ==","target":"VALUE","value":"MQ=="}],"success":[{"request_put":{"key":"eA==","value":"MQ=="}},{"requestTxn":{"success":[{"request_range":{"key":"YQ=="}}]}}]}"#,
        ),
        text(4, r#"{"revision":"5","physical":true}"#),
        text(
            5,
            r#"{"create_request":{"key":"YQ==","filters":["NOPUT"],"start_revision":"3"}}"#,
        ),
        text(6, r#"{"TTL":60,"ID":"9"}"#),
        text(7, r#"{"ID":"7"}"#),
        text(
            8,
            r#"{"name":"u","password":"p","options":{"no_password":false}}"#,
        ),
        text(
            9,
            r#"{"name":"r","perm":{"permType":"READWRITE","key":"YQ==","range_end":"Yg=="}}"#,
        ),
        text(10, r#"{"peerURLs":["https://s:2380"],"isLearner":true}"#),
        text(11, r#"{"name":"b2ZmaWNl","lease":"7","value":"bWU="}"#),
    ]
}

/// What an operator raises, for other targets that need entries of many kinds.
pub(crate) fn alarm() -> Command {
    Command::Alarm(AlarmChange {
        active: true,
        alarm: Some(MemberAlarm {
            member_id: 1,
            kind: AlarmKind::Nospace.into(),
        }),
    })
}
