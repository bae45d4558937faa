//! Clients: they write values that nobody else writes, read them, and note what they were told.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest,
    RequestOp, TxnRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
};
use clustermesh_core::{KvError, Outcome, pb, pb::proposal::Command};
use clustermesh_oracle::{Action, Answer, Operation};
use clustermesh_raft::{Committed, ProposeError, Replica};
use openraft::async_runtime::AsyncRuntime;

use crate::{
    runtime::{SimRuntime, draw, elapsed},
    world::{MAX_LEASE_TTL_S, PATIENCE, World},
};

/// Clients at once.
pub const CLIENTS: usize = 6;
/// Keys that all of them use.
const KEYS: u64 = 4;
/// Revisions that a compaction leaves.
const KEPT_REVISIONS: i64 = 40;

struct Client {
    world: Arc<World>,
    number: usize,
    replica: usize,
    written: u64,
    /// Its own leases: id and TTL, s.
    leases: Vec<(i64, i64)>,
}

fn put(key: &Bytes, value: &Bytes, lease: i64) -> PutRequest {
    PutRequest {
        key: key.clone(),
        value: value.clone(),
        lease,
        ..PutRequest::default()
    }
}

/// A second key that goes with a swap.
fn twin(key: &Bytes) -> Bytes {
    let mut twin = key.to_vec();
    twin.extend_from_slice(b"/twin");
    twin.into()
}

fn swap(key: &Bytes, value: &Bytes, expected: i64) -> TxnRequest {
    let op = |request| RequestOp {
        request: Some(request),
    };
    let read = RangeRequest {
        key: key.clone(),
        ..RangeRequest::default()
    };
    TxnRequest {
        compare: vec![Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: key.clone(),
            target_union: Some(TargetUnion::ModRevision(expected)),
            ..Compare::default()
        }],
        success: vec![
            op(Request::RequestPut(put(key, value, 0))),
            op(Request::RequestPut(put(&twin(key), &twin(value), 0))),
        ],
        failure: vec![op(Request::RequestRange(read))],
    }
}

fn answer(told: Result<Committed, ProposeError>) -> Answer {
    let committed = match told {
        Ok(committed) => committed,
        Err(ProposeError::Unknown | ProposeError::Timeout | ProposeError::Stopped) => {
            return Answer::Unknown;
        }
        Err(_) => return Answer::Refused,
    };
    let revision = committed.revision;
    match committed.outcome {
        Ok(Outcome::Put(_)) => Answer::Written {
            revision,
            deleted: 0,
        },
        Ok(Outcome::DeleteRange(response)) => Answer::Written {
            revision,
            deleted: response.deleted,
        },
        Ok(Outcome::Txn(response)) if response.succeeded => Answer::Written {
            revision,
            deleted: 0,
        },
        Ok(Outcome::Txn(response)) => {
            use clustermesh_api::etcd::rpc::response_op::Response;
            let found =
                response
                    .responses
                    .into_iter()
                    .find_map(|response| match response.response {
                        Some(Response::ResponseRange(range)) => range.kvs.into_iter().next(),
                        _ => None,
                    });
            Answer::Read {
                revision,
                found: found.map(|kv| (kv.value, kv.mod_revision)),
            }
        }
        Ok(_) => Answer::Done,
        Err(_) => Answer::Refused,
    }
}

async fn read(replica: &Replica<SimRuntime>, key: &Bytes, linearizable: bool, at: i64) -> Answer {
    if linearizable && replica.linearize().await.is_err() {
        return Answer::Unknown;
    }
    let request = RangeRequest {
        key: key.clone(),
        revision: at,
        ..RangeRequest::default()
    };
    let (revision, found) = replica.read(|state| (state.revision(), state.range(&request)));
    match found {
        Ok(response) => Answer::Read {
            revision,
            found: response
                .kvs
                .into_iter()
                .next()
                .map(|kv| (kv.value, kv.mod_revision)),
        },
        Err(KvError::Compacted) => Answer::Compacted,
        Err(_) => Answer::Refused,
    }
}

async fn act(replica: &Replica<SimRuntime>, action: &Action) -> Answer {
    let command = match action {
        Action::Put { key, value, lease } => Command::Put(put(key, value, *lease)),
        Action::Swap {
            key,
            value,
            expected,
        } => Command::Txn(swap(key, value, *expected)),
        Action::Delete { key } => Command::DeleteRange(DeleteRangeRequest {
            key: key.clone(),
            ..DeleteRangeRequest::default()
        }),
        Action::Get {
            key,
            linearizable,
            revision,
        } => return read(replica, key, *linearizable, *revision).await,
        Action::Compact { revision } => Command::Compact(CompactionRequest {
            revision: *revision,
            physical: false,
        }),
        Action::Grant { lease, ttl_s } => Command::LeaseGrant(LeaseGrantRequest {
            id: *lease,
            ttl: *ttl_s,
        }),
        Action::KeepAlive { lease, .. } => {
            return match replica.keep_alive(*lease).await {
                Ok(Some(_)) => Answer::Done,
                Ok(None) => Answer::Refused,
                Err(_) => Answer::Unknown,
            };
        }
    };
    answer(replica.propose(pb::Proposal::from(command)).await)
}

impl Client {
    fn choose(&mut self) -> Action {
        let key = Bytes::from(format!("k{}", draw(|random| random.below(KEYS))));
        self.written += 1;
        let value = Bytes::from(format!("v{}.{}", self.number, self.written));
        let newest = self.world.history.newest();
        match draw(|random| random.below(100)) {
            0..25 => Action::Put {
                key,
                value,
                lease: 0,
            },
            25..37 => Action::Swap {
                expected: self.last_change(&key),
                key,
                value,
            },
            37..42 => Action::Delete { key },
            42..67 => Action::Get {
                key,
                linearizable: true,
                revision: 0,
            },
            67..80 => Action::Get {
                key,
                linearizable: false,
                revision: 0,
            },
            80..84 => Action::Get {
                key,
                linearizable: false,
                revision: (newest - draw(|random| random.place(20)) as i64).max(1),
            },
            84..86 if newest > 2 * KEPT_REVISIONS => Action::Compact {
                revision: newest - KEPT_REVISIONS,
            },
            86..89 => Action::Grant {
                lease: (draw(crate::random::Random::number) >> 1).cast_signed(),
                ttl_s: MAX_LEASE_TTL_S - draw(|random| random.place(4)) as i64,
            },
            89..94 => match self.lease() {
                Some((lease, _)) => Action::Put {
                    key: format!("lease/{lease:x}").into(),
                    value,
                    lease,
                },
                None => Action::Delete { key },
            },
            _ => match self.lease() {
                Some((lease, ttl_s)) => Action::KeepAlive { lease, ttl_s },
                None => Action::Get {
                    key,
                    linearizable: true,
                    revision: 0,
                },
            },
        }
    }

    fn lease(&self) -> Option<(i64, i64)> {
        let place = draw(|random| random.place(self.leases.len()));
        self.leases.get(place).copied()
    }

    /// When the key was last changed, as some replica knows.
    fn last_change(&self, key: &Bytes) -> i64 {
        let replica = self.world.members.get(self.replica);
        let known = replica
            .and_then(|member| member.replica())
            .map(|replica| replica.read(|state| state.get(key).map_or(0, |kv| kv.mod_revision)));
        known.unwrap_or(0)
    }

    async fn step(&mut self) {
        if draw(|random| random.chance(30)) {
            self.replica = draw(|random| random.place(self.world.members.len()));
        }
        let Some((life, replica)) = self
            .world
            .members
            .get(self.replica)
            .and_then(|member| member.alive())
        else {
            self.replica = draw(|random| random.place(self.world.members.len()));
            return;
        };
        let action = self.choose();
        if let Action::Compact { revision } = action {
            self.world.compaction.fetch_max(revision, Ordering::Relaxed);
        }
        let history = self.world.history.clone();
        let (asked, asked_at) = (history.moment(), elapsed());
        let answered = SimRuntime::timeout(PATIENCE, act(&replica, &action)).await;
        let answer = answered.unwrap_or(Answer::Unknown);
        match (&action, &answer) {
            (Action::Grant { lease, ttl_s }, Answer::Done) => self.leases.push((*lease, *ttl_s)),
            (Action::KeepAlive { lease, .. }, Answer::Refused) => {
                self.leases.retain(|(id, _)| id != lease);
            }
            _ => {}
        }
        if self.leases.len() > 4 {
            self.leases.remove(0);
        }
        history.note(Operation {
            client: self.number,
            replica: self.replica,
            life,
            asked,
            asked_at,
            answered: history.moment(),
            action,
            answer,
        });
    }
}

/// One client, until the world ends.
pub async fn run(world: Arc<World>, number: usize) {
    let mut client = Client {
        replica: draw(|random| random.place(world.members.len())),
        world,
        number,
        written: 0,
        leases: Vec::new(),
    };
    while !client.world.has_ended() {
        client.step().await;
        SimRuntime::sleep(draw(|random| random.time_ms(0..60))).await;
    }
}

/// Everything works again through every replica.
pub async fn check_liveness(world: &World) {
    for member in &world.members {
        let Some(replica) = member.replica() else {
            continue;
        };
        let key = Bytes::from(format!("alive/{}", member.index));
        let proposal = Command::Put(put(&key, &key, 0)).into();
        let written = SimRuntime::timeout(PATIENCE, replica.propose(proposal)).await;
        if !matches!(written, Ok(Ok(_))) {
            world.history.fault(format!(
                "after healing, a write through replica {} came to {written:?}",
                member.index
            ));
        }
        let read = SimRuntime::timeout(PATIENCE, replica.linearize()).await;
        if !matches!(read, Ok(Ok(()))) {
            world.history.fault(format!(
                "after healing, a read through replica {} came to {read:?}",
                member.index
            ));
        }
    }
}
