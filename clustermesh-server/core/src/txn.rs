//! Writes of one request under one main revision: puts, deletes and transactions, as etcd evaluates them.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest,
    ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
    response_op::Response,
};
use smallvec::SmallVec;

use crate::{
    error::KvError,
    key_range::KeyRange,
    keyspace::{Added, Keyspace},
    lease::LeaseTable,
    range::ReadView,
    version::{EventGroup, Revision, StoredEvent, Version},
};

/// Whether a transaction holds no write in any branch: it can be answered without a log entry.
#[must_use]
pub fn is_read_only(request: &TxnRequest) -> bool {
    request
        .success
        .iter()
        .chain(&request.failure)
        .all(|op| match &op.request {
            Some(Request::RequestRange(_)) => true,
            Some(Request::RequestTxn(nested)) => is_read_only(nested),
            _ => false,
        })
}

/// A transaction with its comparisons decided. All are decided before the first write, those of nested ones too.
pub(crate) struct Plan<'a> {
    succeeded: bool,
    ops: Vec<PlannedOp<'a>>,
}

enum PlannedOp<'a> {
    Range(&'a RangeRequest),
    Put(&'a PutRequest),
    Delete(&'a DeleteRangeRequest),
    Txn(Plan<'a>),
}

impl<'a> Plan<'a> {
    /// Decides the comparisons and checks the operations of the branches taken against what `view` shows.
    pub(crate) fn new(
        view: ReadView<'_>,
        leases: &LeaseTable,
        request: &'a TxnRequest,
    ) -> Result<Self, KvError> {
        let plan = Self::decide(view, request);
        plan.check(view, leases)?;
        Ok(plan)
    }

    fn decide(view: ReadView<'_>, request: &'a TxnRequest) -> Self {
        let succeeded = request.compare.iter().all(|compare| holds(view, compare));
        let ops = if succeeded {
            &request.success
        } else {
            &request.failure
        };
        Self {
            succeeded,
            ops: ops
                .iter()
                .filter_map(|op| {
                    Some(match op.request.as_ref()? {
                        Request::RequestRange(range) => PlannedOp::Range(range),
                        Request::RequestPut(put) => PlannedOp::Put(put),
                        Request::RequestDeleteRange(delete) => PlannedOp::Delete(delete),
                        Request::RequestTxn(txn) => PlannedOp::Txn(Self::decide(view, txn)),
                    })
                })
                .collect(),
        }
    }

    fn check(&self, view: ReadView<'_>, leases: &LeaseTable) -> Result<(), KvError> {
        for op in &self.ops {
            match op {
                PlannedOp::Range(range) => {
                    if range.revision > view.revision {
                        return Err(KvError::FutureRevision);
                    }
                    // Unlike a plain range, a negative revision is not "now" here.
                    if range.revision != 0 && range.revision < view.compact_revision {
                        return Err(KvError::Compacted);
                    }
                }
                PlannedOp::Put(put) => check_put(view.keyspace, leases, put)?,
                PlannedOp::Delete(_) => {}
                PlannedOp::Txn(nested) => nested.check(view, leases)?,
            }
        }
        Ok(())
    }

    /// Answers a transaction without writes.
    pub(crate) fn read(&self, view: ReadView<'_>) -> Result<TxnResponse, KvError> {
        let mut responses = Vec::with_capacity(self.ops.len());
        for op in &self.ops {
            responses.push(match op {
                PlannedOp::Range(range) => range_op(view, range)?,
                PlannedOp::Txn(nested) => txn_op(nested.read(view)?),
                // Callers ask `is_read_only` first.
                PlannedOp::Put(_) | PlannedOp::Delete(_) => return Err(KvError::KeyNotFound),
            });
        }
        Ok(self.response(responses))
    }

    /// Executes the operations in order; later ones see the writes of earlier ones.
    pub(crate) fn execute(&self, write: &mut WriteTxn<'_>) -> Result<TxnResponse, KvError> {
        let mut responses = Vec::with_capacity(self.ops.len());
        for op in &self.ops {
            responses.push(match op {
                PlannedOp::Range(range) => range_op(write.view(), range)?,
                PlannedOp::Put(put) => {
                    let mut response = write.put(put)?;
                    response.header = header(write.revision());
                    ResponseOp {
                        response: Some(Response::ResponsePut(response)),
                    }
                }
                PlannedOp::Delete(delete) => {
                    let mut response = write.delete_range(delete);
                    response.header = header(write.view().revision);
                    ResponseOp {
                        response: Some(Response::ResponseDeleteRange(response)),
                    }
                }
                PlannedOp::Txn(nested) => txn_op(nested.execute(write)?),
            });
        }
        Ok(self.response(responses))
    }

    const fn response(&self, responses: Vec<ResponseOp>) -> TxnResponse {
        TxnResponse {
            header: None,
            succeeded: self.succeeded,
            responses,
        }
    }
}

/// Headers inside a transaction carry the revision only.
#[expect(clippy::unnecessary_wraps, reason = "a message field is an Option")]
fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader {
        revision,
        ..ResponseHeader::default()
    })
}

fn range_op(view: ReadView<'_>, request: &RangeRequest) -> Result<ResponseOp, KvError> {
    let mut response = view.range(request)?;
    response.header = header(view.revision);
    Ok(ResponseOp {
        response: Some(Response::ResponseRange(response)),
    })
}

/// A nested transaction's header is there but empty, as etcd sends it.
fn txn_op(mut response: TxnResponse) -> ResponseOp {
    response.header = Some(ResponseHeader::default());
    ResponseOp {
        response: Some(Response::ResponseTxn(response)),
    }
}

/// Checks what a put needs of the state.
fn check_put(
    keyspace: &Keyspace,
    leases: &LeaseTable,
    request: &PutRequest,
) -> Result<(), KvError> {
    if request.lease != 0 && !leases.contains(request.lease) {
        return Err(KvError::LeaseNotFound);
    }
    if (request.ignore_value || request.ignore_lease) && keyspace.latest(&request.key).is_none() {
        return Err(KvError::KeyNotFound);
    }
    Ok(())
}

/// Whether a comparison holds for every key of its range.
fn holds(view: ReadView<'_>, compare: &Compare) -> bool {
    let range = KeyRange::new(&compare.key, &compare.range_end);
    let mut found = view.keyspace.visible(&range, view.revision).peekable();
    if found.peek().is_none() {
        // An absent key has all numbers 0, but no value, not even an empty one.
        return compare.target != CompareTarget::Value as i32 && holds_for(compare, None);
    }
    found.all(|version| holds_for(compare, Some(version)))
}

fn holds_for(compare: &Compare, version: Option<&Version>) -> bool {
    let number = |of: fn(&Version) -> i64| version.map_or(0, of);
    let wanted = compare.target_union.as_ref();
    let order = match (CompareTarget::try_from(compare.target), wanted) {
        (Ok(CompareTarget::Version), Some(TargetUnion::Version(wanted))) => {
            number(Version::version).cmp(wanted)
        }
        (Ok(CompareTarget::Version), _) => number(Version::version).cmp(&0),
        (Ok(CompareTarget::Create), Some(TargetUnion::CreateRevision(wanted))) => {
            number(Version::create_revision).cmp(wanted)
        }
        (Ok(CompareTarget::Create), _) => number(Version::create_revision).cmp(&0),
        (Ok(CompareTarget::Mod), Some(TargetUnion::ModRevision(wanted))) => {
            number(Version::mod_revision).cmp(wanted)
        }
        (Ok(CompareTarget::Mod), _) => number(Version::mod_revision).cmp(&0),
        (Ok(CompareTarget::Lease), Some(TargetUnion::Lease(wanted))) => {
            number(Version::lease).cmp(wanted)
        }
        (Ok(CompareTarget::Lease), _) => number(Version::lease).cmp(&0),
        (Ok(CompareTarget::Value), wanted) => {
            let wanted = match wanted {
                Some(TargetUnion::Value(wanted)) => wanted.as_ref(),
                _ => &[],
            };
            version.map_or(&[][..], Version::value_bytes).cmp(wanted)
        }
        // etcd takes an unknown target as equal and an unknown result as true.
        (Err(_), _) => std::cmp::Ordering::Equal,
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => order.is_eq(),
        Ok(CompareResult::NotEqual) => order.is_ne(),
        Ok(CompareResult::Greater) => order.is_gt(),
        Ok(CompareResult::Less) => order.is_lt(),
        Err(_) => true,
    }
}

/// All writes of one request. Ends with [`WriteTxn::commit`] or [`WriteTxn::roll_back`].
pub(crate) struct WriteTxn<'a> {
    keyspace: &'a mut Keyspace,
    leases: &'a mut LeaseTable,
    /// Revision before this request.
    base_revision: i64,
    compact_revision: i64,
    events: SmallVec<[StoredEvent; 1]>,
    /// For each event the lease that its key had before.
    leases_before: Vec<i64>,
}

impl<'a> WriteTxn<'a> {
    pub(crate) fn new(
        keyspace: &'a mut Keyspace,
        leases: &'a mut LeaseTable,
        base_revision: i64,
        compact_revision: i64,
    ) -> Self {
        Self {
            keyspace,
            leases,
            base_revision,
            compact_revision,
            events: SmallVec::new(),
            leases_before: Vec::new(),
        }
    }

    /// Revision that the writes get.
    const fn revision(&self) -> i64 {
        self.base_revision + 1
    }

    /// What an operation at this place reads.
    fn view(&self) -> ReadView<'_> {
        ReadView {
            keyspace: self.keyspace,
            revision: self.base_revision + i64::from(!self.events.is_empty()),
            compact_revision: self.compact_revision,
        }
    }

    /// That of the next write.
    fn next_revision(&self) -> Revision {
        Revision {
            main: self.revision(),
            sub: u32::try_from(self.events.len()).unwrap_or(u32::MAX),
        }
    }

    fn record(&mut self, added: Added, lease: i64) -> Option<Version> {
        let before = added.replaced.as_ref().map_or(0, |old| old.lease());
        self.leases.move_key(added.version.key(), before, lease);
        self.leases_before.push(before);
        self.events
            .push(StoredEvent::new(added.version, added.before_revision));
        added.replaced
    }

    pub(crate) fn put(&mut self, request: &PutRequest) -> Result<PutResponse, KvError> {
        check_put(self.keyspace, self.leases, request)?;
        // Most puts look nothing up: a search of the index is most of what they cost here.
        let keeps = request.ignore_value || request.ignore_lease;
        let current = keeps.then(|| self.keyspace.latest(&request.key)).flatten();
        let (value, lease) = match current {
            Some(current) => (
                request.ignore_value.then(|| current.value()),
                request.ignore_lease.then(|| current.lease()),
            ),
            None => (None, None),
        };
        let replaced = self.put_value(
            &request.key,
            value.as_ref().unwrap_or(&request.value),
            lease.unwrap_or(request.lease),
        );
        Ok(PutResponse {
            header: None,
            prev_kv: replaced
                .filter(|_| request.prev_kv)
                .map(|old| old.to_key_value()),
        })
    }

    /// Writes a value and returns the live version that it replaced.
    pub(crate) fn put_value(&mut self, key: &[u8], value: &Bytes, lease: i64) -> Option<Version> {
        let added = self.keyspace.put(key, value, lease, self.next_revision());
        self.record(added, lease)
    }

    pub(crate) fn delete_range(&mut self, request: &DeleteRangeRequest) -> DeleteRangeResponse {
        let mut response = DeleteRangeResponse::default();
        let range = KeyRange::new(&request.key, &request.range_end);
        let found: Vec<Version> = self
            .keyspace
            .visible(&range, self.revision())
            .cloned()
            .collect();
        for version in found {
            if let Some(old) = self.delete_key(version.key()) {
                response.deleted += 1;
                if request.prev_kv {
                    response.prev_kvs.push(old.to_key_value());
                }
            }
        }
        response
    }

    /// Deletes a key and returns what it was; `None` where it does not live.
    pub(crate) fn delete_key(&mut self, key: &[u8]) -> Option<Version> {
        let added = self.keyspace.delete(key, self.next_revision())?;
        self.record(added, 0)
    }

    /// The newest live version of a key.
    pub(crate) fn latest(&self, key: &[u8]) -> Option<&Version> {
        self.keyspace.latest(key)
    }

    /// Takes back all writes.
    pub(crate) fn roll_back(self) {
        for (event, before) in self.events.iter().zip(&self.leases_before).rev() {
            self.leases
                .move_key(event.key(), event.kv().lease(), *before);
            self.keyspace.take_back(event.key());
        }
    }

    /// Hands out the events; `None` when nothing was written, and then no revision is used.
    pub(crate) fn commit(mut self) -> Option<EventGroup> {
        // It may stay for as long as there is history.
        self.events.shrink_to_fit();
        (!self.events.is_empty()).then_some(EventGroup {
            revision: self.base_revision + 1,
            events: self.events,
        })
    }
}

#[cfg(test)]
mod tests;
