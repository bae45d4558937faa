//! Checks of requests that need no state: done before proposing, and again at apply so that an entry can never bring in what they refuse.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::Bound,
};

use clustermesh_api::etcd::rpc::{
    DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    range_request::{SortOrder, SortTarget},
    request_op::Request,
};

use crate::{
    error::KvError,
    limits::{
        MAX_APPLIED_TXN_OPS, MAX_LEASE_TTL_SECONDS, MAX_REQUEST_BYTES, MAX_TXN_DEPTH, MAX_TXN_OPS,
    },
};

pub use crate::peer::check_peer_copy;

/// Checks the encoded size of a request before it is proposed.
///
/// # Errors
/// [`KvError::RequestTooLarge`].
pub const fn check_size(encoded_bytes: usize) -> Result<(), KvError> {
    if encoded_bytes > MAX_REQUEST_BYTES {
        return Err(KvError::RequestTooLarge);
    }
    Ok(())
}

/// Checks a range request.
///
/// # Errors
/// [`KvError::EmptyKey`], [`KvError::InvalidSortOption`].
pub fn check_range(request: &RangeRequest) -> Result<(), KvError> {
    if request.key.is_empty() {
        return Err(KvError::EmptyKey);
    }
    if SortOrder::try_from(request.sort_order).is_err()
        || SortTarget::try_from(request.sort_target).is_err()
    {
        return Err(KvError::InvalidSortOption);
    }
    Ok(())
}

/// Checks a put.
///
/// # Errors
/// [`KvError::EmptyKey`], [`KvError::ValueProvided`], [`KvError::LeaseProvided`].
pub fn check_put(request: &PutRequest) -> Result<(), KvError> {
    if request.key.is_empty() {
        return Err(KvError::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(KvError::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(KvError::LeaseProvided);
    }
    Ok(())
}

/// Checks a delete.
///
/// # Errors
/// [`KvError::EmptyKey`].
pub fn check_delete_range(request: &DeleteRangeRequest) -> Result<(), KvError> {
    if request.key.is_empty() {
        return Err(KvError::EmptyKey);
    }
    Ok(())
}

/// Checks a lease grant; an id of 0 is right here, the proposer fills it in.
///
/// # Errors
/// [`KvError::LeaseTtlTooLarge`].
pub const fn check_lease_grant(request: &LeaseGrantRequest) -> Result<(), KvError> {
    if request.ttl > MAX_LEASE_TTL_SECONDS {
        return Err(KvError::LeaseTtlTooLarge);
    }
    Ok(())
}

/// Checks a transaction: depth, number of operations, each operation, and that no key is written twice on one path.
///
/// # Errors
/// [`KvError::TooManyOps`] (also for too deep a nesting), [`KvError::EmptyKey`], [`KvError::KeyNotFound`] for an empty operation, [`KvError::DuplicateKey`], and
/// those of the operations.
pub fn check_txn(request: &TxnRequest) -> Result<(), KvError> {
    check_depth(request, MAX_TXN_DEPTH)?;
    check_txn_ops(request, MAX_TXN_OPS)
}

/// The log wraps a request in messages of its own, and a decoder takes only so many levels: what was accepted deeper could be committed but
/// never read again.
fn check_depth(request: &TxnRequest, allowed: usize) -> Result<(), KvError> {
    let left = allowed.checked_sub(1).ok_or(KvError::TooManyOps)?;
    for op in request.success.iter().chain(&request.failure) {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            check_depth(nested, left)?;
        }
    }
    Ok(())
}

/// Checks a transaction that the log holds: as [`check_txn`], but for depth and number of operations, which were the proposer's affair.
///
/// # Errors
/// As [`check_txn`].
pub(crate) fn check_applied_txn(request: &TxnRequest) -> Result<(), KvError> {
    check_txn_ops(request, MAX_APPLIED_TXN_OPS)
}

fn check_txn_ops(request: &TxnRequest, allowed: usize) -> Result<(), KvError> {
    check_ops(request, allowed)?;
    written_keys(&request.success)?;
    written_keys(&request.failure)?;
    Ok(())
}

fn check_ops(request: &TxnRequest, allowed: usize) -> Result<(), KvError> {
    let most = request
        .compare
        .len()
        .max(request.success.len())
        .max(request.failure.len());
    let left = allowed.checked_sub(most).ok_or(KvError::TooManyOps)?;
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(KvError::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Request::RequestRange(range)) => check_range(range)?,
            Some(Request::RequestPut(put)) => check_put(put)?,
            Some(Request::RequestDeleteRange(delete)) => check_delete_range(delete)?,
            Some(Request::RequestTxn(txn)) => check_ops(txn, left)?,
            None => return Err(KvError::KeyNotFound),
        }
    }
    Ok(())
}

/// Keys and ranges that a list of operations may write.
#[derive(Default)]
struct Written<'a> {
    puts: HashSet<&'a [u8]>,
    deletes: DeletedRanges<'a>,
}

impl<'a> Written<'a> {
    /// Notes a put; `twin` holds the puts of the other branch, which excludes this one.
    fn put(&mut self, key: &'a [u8], twin: Option<&HashSet<&[u8]>>) -> Result<(), KvError> {
        let seen = self.puts.contains(key) && !twin.is_some_and(|twin| twin.contains(key));
        if seen || self.deletes.contains(key) {
            return Err(KvError::DuplicateKey);
        }
        self.puts.insert(key);
        Ok(())
    }
}

/// Follows etcd's rules with their order: deletes of this level count for all its puts, those of a nested transaction only for later ones.
fn written_keys(ops: &[RequestOp]) -> Result<Written<'_>, KvError> {
    let mut written = Written::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(delete)) = &op.request {
            written.deletes.add(&delete.key, &delete.range_end);
        }
    }
    for op in ops {
        if let Some(Request::RequestTxn(txn)) = &op.request {
            let success = written_keys(&txn.success)?;
            let failure = written_keys(&txn.failure)?;
            for key in &success.puts {
                written.put(key, None)?;
            }
            for key in &failure.puts {
                written.put(key, Some(&success.puts))?;
            }
            written.deletes.merge(success.deletes);
            written.deletes.merge(failure.deletes);
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(put)) = &op.request {
            written.put(&put.key, None)?;
        }
    }
    Ok(written)
}

/// Union of deleted ranges. etcd reads a `range_end` of `\0` literally here, so a delete "from key on" overlaps nothing: "delete all, then put"
/// is a transaction that people write.
#[derive(Default)]
struct DeletedRanges<'a> {
    singles: BTreeSet<&'a [u8]>,
    /// Start to end, disjoint.
    ranges: BTreeMap<&'a [u8], &'a [u8]>,
}

impl<'a> DeletedRanges<'a> {
    fn add(&mut self, key: &'a [u8], range_end: &'a [u8]) {
        if range_end.is_empty() {
            self.singles.insert(key);
        } else if key < range_end {
            self.add_range(key, range_end);
        }
    }

    fn add_range(&mut self, mut start: &'a [u8], mut end: &'a [u8]) {
        // Swallow every range that touches the new one.
        while let Some((&other_start, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.ranges.insert(start, end);
    }

    fn merge(&mut self, other: Self) {
        self.singles.extend(other.singles);
        for (start, end) in other.ranges {
            self.add_range(start, end);
        }
    }

    fn contains(&self, key: &[u8]) -> bool {
        self.singles.contains(key)
            || self
                .ranges
                .range::<[u8], _>((Bound::Unbounded, Bound::Included(key)))
                .next_back()
                .is_some_and(|(_, end)| key < *end)
    }
}

#[cfg(test)]
mod tests;
