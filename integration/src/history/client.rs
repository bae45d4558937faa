//! One client: it writes values that nobody else writes, reads, swaps, deletes, and notes what it was told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::compare::{CompareResult, CompareTarget, TargetUnion};
use clustermesh_api::etcd::rpc::request_op::Request;
use clustermesh_api::etcd::rpc::response_op::Response;
use clustermesh_api::etcd::rpc::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RangeResponse, RequestOp,
    ResponseHeader, TxnRequest,
};
use clustermesh_client::{Client, ClientError};
use clustermesh_oracle::{Action, Answer, Operation};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::{LoadConfig, OPERATIONS_MAX, Shared};

/// Keys that all clients use.
const KEYS: u32 = 6;
/// All of them begin so.
pub(super) const PREFIX: &str = "load/";
/// What has no answer by then has an unknown outcome.
const PATIENCE: Duration = Duration::from_secs(4);
/// One operation in so many goes to another replica than the one before, for clients that move.
const MOVES_ONE_IN: u32 = 6;
/// Lives of different replicas have different numbers.
const LIVES_MAX: u64 = 1 << 32;
/// Refused before it was proposed, by etcd's words.
const REFUSALS: [&str; 2] = ["database space exceeded", "too many requests"];

struct Recorder {
    shared: Arc<Shared>,
    number: usize,
    random: StdRng,
    replica: usize,
    connections: Vec<Option<Client>>,
    written: u64,
    /// Its last operation had no answer.
    failed: bool,
    /// Last change of each key that it was told.
    changed: BTreeMap<Bytes, i64>,
}

pub(super) fn key(number: u32) -> Bytes {
    format!("{PREFIX}k{number}").into()
}

/// One client, until it is told to end. There is one that stays at each replica, whatever becomes of it; others move,
/// and leave one that does not answer.
pub(super) async fn run(shared: Arc<Shared>, config: LoadConfig, number: usize) {
    let replicas = shared.endpoints.len();
    let mut recorder = Recorder {
        random: StdRng::seed_from_u64(config.seed.wrapping_add(number as u64)),
        replica: number % replicas,
        connections: vec![None; replicas],
        shared,
        number,
        written: 0,
        failed: false,
        changed: BTreeMap::new(),
    };
    while !recorder.shared.stops() {
        recorder.step().await;
        let pause = recorder.random.random_range(0..=config.pause_ms_max);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

impl Recorder {
    fn choose(&mut self) -> Action {
        let key = key(self.random.random_range(0..KEYS));
        self.written += 1;
        let value = Bytes::from(format!("v{}.{}", self.number, self.written));
        match self.random.random_range(0..100) {
            0..35 => Action::Put {
                key,
                value,
                lease: 0,
            },
            35..50 => Action::Swap {
                expected: self.changed.get(&key).copied().unwrap_or(0),
                key,
                value,
            },
            50..56 => Action::Delete { key },
            roll => Action::Get {
                key,
                linearizable: roll < 86,
                revision: 0,
            },
        }
    }

    async fn step(&mut self) {
        let replicas = self.connections.len();
        let moves = self.number >= replicas;
        if moves && (self.failed || self.random.random_range(0..MOVES_ONE_IN) == 0) {
            self.replica = self.random.random_range(0..replicas);
        }
        let action = self.choose();
        let endpoint = self.shared.endpoints[self.replica].clone();
        let life = endpoint.lives.load(Ordering::SeqCst);
        let (asked, asked_at) = (self.shared.moment(), self.shared.begun.elapsed());
        let answer = match tokio::time::timeout(PATIENCE, self.act(&action)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                let text = error.to_string();
                self.shared.count_error(&text);
                if REFUSALS.iter().any(|refusal| text.contains(refusal)) {
                    Answer::Refused
                } else {
                    Answer::Unknown
                }
            }
            Err(_) => {
                // A new connection: this one may lead to a process that never answers.
                self.connections[self.replica] = None;
                self.shared.count_error("no answer in time");
                Answer::Unknown
            }
        };
        let answered = self.shared.moment();
        // Nobody knows which life an answer is of when there were two.
        let same = endpoint.lives.load(Ordering::SeqCst) == life;
        let life = if same {
            life + self.replica as u64 * LIVES_MAX
        } else {
            u64::MAX - asked
        };
        self.failed = answer == Answer::Unknown;
        self.learn(&action, &answer);
        let mut records = self.shared.records();
        if matches!(answer, Answer::Written { .. }) {
            endpoint.acknowledged.fetch_add(1, Ordering::SeqCst);
            let at = self.shared.begun.elapsed();
            records.acknowledged_at.push(at);
        }
        if records.operations.len() >= OPERATIONS_MAX {
            records
                .faults
                .push(format!("more than {OPERATIONS_MAX} operations"));
            self.shared.stops.store(true, Ordering::SeqCst);
            return;
        }
        records.operations.push(Operation {
            client: self.number,
            replica: self.replica,
            life,
            asked,
            asked_at,
            answered,
            action,
            answer,
        });
    }

    fn learn(&mut self, action: &Action, answer: &Answer) {
        let (Action::Put { key, .. }
        | Action::Swap { key, .. }
        | Action::Delete { key }
        | Action::Get { key, .. }) = action
        else {
            return;
        };
        let (revision, changed) = match answer {
            Answer::Written { revision, .. } if matches!(action, Action::Delete { .. }) => {
                (*revision, 0)
            }
            Answer::Written { revision, .. } => (*revision, *revision),
            Answer::Read { revision, found } => {
                (*revision, found.as_ref().map_or(0, |(_, at)| *at))
            }
            _ => return,
        };
        self.changed.insert(key.clone(), changed);
        self.shared.newest.fetch_max(revision, Ordering::SeqCst);
    }

    async fn act(&mut self, action: &Action) -> Result<Answer, ClientError> {
        let place = &mut self.connections[self.replica];
        let client = match place {
            Some(client) => client.clone(),
            None => place
                .insert(Client::new(&self.shared.endpoints[self.replica].config)?)
                .clone(),
        };
        match action {
            Action::Put { key, value, .. } => {
                let response = client.put(put(key, value)).await?;
                written(&client, response.header, 0)
            }
            Action::Swap {
                key,
                value,
                expected,
            } => {
                let response = client.txn(swap(key, value, *expected)).await?;
                if response.succeeded {
                    return written(&client, response.header, 0);
                }
                let range =
                    response
                        .responses
                        .into_iter()
                        .find_map(|response| match response.response {
                            Some(Response::ResponseRange(range)) => Some(range),
                            _ => None,
                        });
                let range = range.ok_or_else(|| broken(&client, "a swap without its read"))?;
                read(&client, response.header, range)
            }
            Action::Delete { key } => {
                let request = DeleteRangeRequest {
                    key: key.clone(),
                    ..DeleteRangeRequest::default()
                };
                let response = client.delete_range(request).await?;
                written(&client, response.header, response.deleted)
            }
            Action::Get {
                key, linearizable, ..
            } => {
                let request = RangeRequest {
                    key: key.clone(),
                    serializable: !linearizable,
                    ..RangeRequest::default()
                };
                let mut response = client.range(request).await?;
                let header = response.header.take();
                read(&client, header, response)
            }
            Action::Compact { .. }
            | Action::Grant { .. }
            | Action::KeepAlive { .. }
            | Action::Revoke { .. } => Ok(Answer::Refused),
        }
    }
}

fn put(key: &Bytes, value: &Bytes) -> PutRequest {
    PutRequest {
        key: key.clone(),
        value: value.clone(),
        ..PutRequest::default()
    }
}

/// Writes if the key was last changed at this revision, else reads.
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
        success: vec![op(Request::RequestPut(put(key, value)))],
        failure: vec![op(Request::RequestRange(read))],
    }
}

fn broken(client: &Client, reason: &str) -> ClientError {
    ClientError::Protocol {
        endpoint: client.endpoint(),
        reason: reason.to_owned(),
    }
}

fn revision(client: &Client, header: Option<ResponseHeader>) -> Result<i64, ClientError> {
    header
        .map(|header| header.revision)
        .ok_or_else(|| broken(client, "an answer without a header"))
}

fn written(
    client: &Client,
    header: Option<ResponseHeader>,
    deleted: i64,
) -> Result<Answer, ClientError> {
    let revision = revision(client, header)?;
    Ok(Answer::Written { revision, deleted })
}

fn read(
    client: &Client,
    header: Option<ResponseHeader>,
    range: RangeResponse,
) -> Result<Answer, ClientError> {
    Ok(Answer::Read {
        revision: revision(client, header)?,
        found: range
            .kvs
            .into_iter()
            .next()
            .map(|record| (record.value, record.mod_revision)),
    })
}
