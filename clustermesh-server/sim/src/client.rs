//! Clients: they write values that nobody else writes, read them, and note what they were told.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
};
use clustermesh_core::{
    KvError, Outcome,
    auth::{Access as AccessKind, Actor},
    pb,
    pb::proposal::Command,
};
use clustermesh_oracle::{Action, Answer, Operation};
use clustermesh_raft::{Committed, ProposeError, Replica};
use openraft::async_runtime::AsyncRuntime;

use crate::{
    access::{Access, Asker, Need, ROOT, Said, sign},
    member::Member,
    runtime::{Life, SimRuntime, draw, elapsed, spawn_in},
    spy::MAX_LAST_WORDS,
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

/// What came of a proposal, and whether it was said to be permitted.
fn answer(told: Result<Committed, ProposeError>) -> (Answer, Option<Said>) {
    let committed = match told {
        Ok(committed) => committed,
        Err(ProposeError::Unknown | ProposeError::Timeout | ProposeError::Stopped) => {
            return (Answer::Unknown, None);
        }
        Err(_) => return (Answer::Refused, None),
    };
    let revision = committed.revision;
    let written = |deleted| Answer::Written { revision, deleted };
    let answer = match committed.outcome {
        Ok(Outcome::Put(_)) => written(0),
        Ok(Outcome::DeleteRange(response)) => written(response.deleted),
        Ok(Outcome::LeaseRevoke(_)) => written(0),
        Ok(Outcome::Txn(response)) if response.succeeded => written(0),
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
        Err(KvError::PermissionDenied) => return (Answer::Refused, Some(Said::Denied)),
        Err(_) => return (Answer::Refused, None),
    };
    (answer, Some(Said::Done))
}

async fn read(
    replica: &Replica<SimRuntime>,
    key: &Bytes,
    linearizable: bool,
    at: i64,
    access: Option<(&Access, &mut Asker)>,
) -> (Answer, Option<Said>) {
    if linearizable && replica.linearize().await.is_err() {
        return (Answer::Unknown, None);
    }
    let request = RangeRequest {
        key: key.clone(),
        revision: at,
        ..RangeRequest::default()
    };
    let (revision, permitted, found) = replica.read(|state| {
        let permitted = access.is_none_or(|(access, asker)| {
            // A server finds the user out where it reads.
            asker.auth_revision = state.auth().revision();
            let actor = Actor {
                user: &asker.user,
                auth_revision: asker.auth_revision,
            };
            let noted = access.note(state).is_ok();
            let checked = state.auth().check_range(actor, key, &[], AccessKind::Read);
            noted && checked.is_ok()
        });
        (state.revision(), permitted, state.range(&request))
    });
    if !permitted {
        return (Answer::Refused, Some(Said::Denied));
    }
    let answer = match found {
        Ok(response) => Answer::Read {
            revision,
            found: response
                .kvs
                .into_iter()
                .next()
                .map(|kv| (kv.value, kv.mod_revision)),
        },
        Err(KvError::Compacted) => Answer::Compacted,
        Err(_) => return (Answer::Refused, None),
    };
    let said = if linearizable {
        Said::Done
    } else {
        Said::DoneHere
    };
    (answer, Some(said))
}

/// What somebody needs to be permitted.
fn needs(action: &Action) -> Vec<Need> {
    match action {
        Action::Put { key, .. } | Action::Delete { key } => vec![(key.clone(), true)],
        Action::Swap { key, .. } => {
            vec![(key.clone(), true), (twin(key), true), (key.clone(), false)]
        }
        Action::Get { key, .. } => vec![(key.clone(), false)],
        Action::Compact { .. }
        | Action::Grant { .. }
        | Action::KeepAlive { .. }
        | Action::Revoke { .. } => Vec::new(),
    }
}

/// Asks a replica, within its life.
async fn act(
    replica: Replica<SimRuntime>,
    action: Action,
    access: Option<(Access, Asker)>,
) -> Result<Answer, String> {
    let needs = needs(&action);
    let (access, mut asker) = access.unzip();
    let command = match action {
        Action::Put { key, value, lease } => Command::Put(put(&key, &value, lease)),
        Action::Swap {
            key,
            value,
            expected,
        } => Command::Txn(swap(&key, &value, expected)),
        Action::Delete { key } => Command::DeleteRange(DeleteRangeRequest {
            key,
            ..DeleteRangeRequest::default()
        }),
        Action::Get {
            key,
            linearizable,
            revision,
        } => {
            let who = access.as_ref().zip(asker.as_mut());
            let (answer, said) = read(&replica, &key, linearizable, revision, who).await;
            return judge(access, asker, &needs, answer, said);
        }
        Action::Compact { revision } => Command::Compact(CompactionRequest {
            revision,
            physical: false,
        }),
        Action::Grant { lease, ttl_s } => Command::LeaseGrant(LeaseGrantRequest {
            id: lease,
            ttl: ttl_s,
        }),
        Action::Revoke { lease } => Command::LeaseRevoke(LeaseRevokeRequest { id: lease }),
        Action::KeepAlive { lease, .. } => {
            return Ok(match replica.keep_alive(lease).await {
                Ok(Some(_)) => Answer::Done,
                Ok(None) => Answer::Refused,
                Err(_) => Answer::Unknown,
            });
        }
    };
    let mut proposal = pb::Proposal::from(command);
    sign(&mut proposal, asker.as_ref());
    let (answer, said) = answer(replica.propose(proposal).await);
    judge(access, asker, &needs, answer, said)
}

fn judge(
    access: Option<Access>,
    asker: Option<Asker>,
    needs: &[Need],
    answer: Answer,
    said: Option<Said>,
) -> Result<Answer, String> {
    if let (Some(access), Some(asker), Some(said)) = (access, asker, said)
        && !needs.is_empty()
    {
        access.check(&asker, needs, said)?;
    }
    Ok(answer)
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
            94..96 => match self.lease() {
                // It stays among its own: what is asked of it from now on must be refused.
                Some((lease, _)) => Action::Revoke { lease },
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

    /// Whoever asks, where permissions are checked.
    fn asker(&self, replica: &Replica<SimRuntime>, action: &Action) -> Option<(Access, Asker)> {
        let access = self.world.access.clone()?;
        let anyone = match action {
            Action::Put { lease, .. } => *lease == 0,
            Action::Swap { .. } | Action::Delete { .. } | Action::Get { .. } => true,
            Action::Compact { .. }
            | Action::Grant { .. }
            | Action::KeepAlive { .. }
            | Action::Revoke { .. } => false,
        };
        let user = if anyone {
            Access::some_user()
        } else {
            ROOT.to_owned()
        };
        match access.resolve(replica, &user) {
            Ok(asker) => Some((access, asker)),
            Err(fault) => {
                self.world.history.fault(fault);
                None
            }
        }
    }

    async fn step(&mut self) {
        let places: Vec<usize> = self.world.taken().map(|member| member.index).collect();
        if draw(|random| random.chance(30)) || !places.contains(&self.replica) {
            let place = draw(|random| random.place(places.len()));
            self.replica = places.get(place).copied().unwrap_or(0);
        }
        let Some((life, replica)) = self.world.members.get(self.replica).and_then(Member::alive)
        else {
            self.replica = usize::MAX;
            return;
        };
        let action = self.choose();
        if let Action::Compact { revision } = action {
            self.world.compaction.fetch_max(revision, Ordering::Relaxed);
        }
        let asker = self.asker(&replica, &action);
        let history = self.world.history.clone();
        let (asked, asked_at) = (history.moment(), elapsed());
        let acted = spawn_in(life, act(replica, action.clone(), asker));
        let answered = SimRuntime::timeout(PATIENCE, acted).await;
        let answer = match answered {
            Ok(Ok(Ok(answer))) => answer,
            Ok(Ok(Err(fault))) => {
                history.fault(format!("replica {}: {fault}", self.replica));
                Answer::Unknown
            }
            Ok(Err(_)) | Err(_) => Answer::Unknown,
        };
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
        let operation = Operation {
            client: self.number,
            replica: self.replica,
            life,
            asked,
            asked_at,
            answered: history.moment(),
            action,
            answer,
        };
        self.check_disk(life, &operation);
        history.note(operation);
    }

    /// A replica whose disk has failed promises nothing any more.
    fn check_disk(&self, life: Life, operation: &Operation) {
        let acknowledged = match (&operation.action, &operation.answer) {
            (Action::Get { linearizable, .. }, Answer::Read { .. }) => *linearizable,
            (_, Answer::Written { .. } | Answer::Read { .. } | Answer::Done) => true,
            (_, Answer::Unknown | Answer::Refused | Answer::Compacted) => false,
        };
        let failed = self.world.disk_failures.lock().get(&life).copied();
        if let Some(at) = failed
            && acknowledged
            && operation.asked_at > at + MAX_LAST_WORDS
        {
            self.world
                .history
                .fault(format!("{operation:?}, although its disk failed at {at:?}"));
        }
    }
}

/// One client, until the world ends.
pub async fn run(world: Arc<World>, number: usize) {
    let mut client = Client {
        replica: usize::MAX,
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
    for member in world.taken() {
        let Some((life, replica)) = member.alive() else {
            continue;
        };
        let key = Bytes::from(format!("alive/{}", member.index));
        let mut proposal: pb::Proposal = Command::Put(put(&key, &key, 0)).into();
        proposal.system = true;
        let alive = spawn_in(life, async move {
            let written = replica.propose(proposal).await;
            (written, replica.linearize().await)
        });
        let alive = SimRuntime::timeout(PATIENCE, alive).await;
        if !matches!(&alive, Ok(Ok((Ok(written), Ok(())))) if written.outcome.is_ok()) {
            world.history.fault(format!(
                "after healing, a write and a read through replica {} came to {alive:?}",
                member.index
            ));
        }
    }
}
