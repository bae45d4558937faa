//! Proposals that this replica forwarded, until it has applied them itself.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use clustermesh_store::{Origin, ReplicaId};
use openraft::async_runtime::AsyncRuntime;
use parking_lot::Mutex;

use crate::proposal::{Told, Waiting};

/// Proposals that were forwarded, until they are applied here.
pub(crate) struct Pending<R: AsyncRuntime> {
    own: ReplicaId,
    waiting: Mutex<HashMap<u64, Waiting<R>>>,
    next_request_id: AtomicU64,
}

impl<R: AsyncRuntime> Pending<R> {
    /// `first_request_id` is random, so that entries of an earlier life are nobody's.
    pub(crate) fn new(own: ReplicaId, first_request_id: u64) -> Self {
        Self {
            own,
            waiting: Mutex::default(),
            next_request_id: AtomicU64::new(first_request_id),
        }
    }

    pub(crate) fn add(&self, waiting: Waiting<R>) -> u64 {
        let request_id = self.next_request_id.fetch_add(1, Ordering::Relaxed);
        self.waiting.lock().insert(request_id, waiting);
        request_id
    }

    /// Who waits for this entry's proposals, by place.
    pub(crate) fn take(&self, origins: &[Origin]) -> Vec<(u32, Waiting<R>)> {
        if !origins.iter().any(|origin| origin.replica_id == self.own) {
            return Vec::new();
        }
        let mut waiting = self.waiting.lock();
        origins
            .iter()
            .filter(|origin| origin.replica_id == self.own)
            .filter_map(|origin| Some((origin.place, waiting.remove(&origin.request_id)?)))
            .collect()
    }

    /// Those not answered yet.
    pub(crate) fn rest(&self, request_ids: &[u64]) -> Vec<Waiting<R>> {
        let mut waiting = self.waiting.lock();
        request_ids
            .iter()
            .filter_map(|request_id| waiting.remove(request_id))
            .collect()
    }

    pub(crate) fn tell_rest(&self, request_ids: &[u64], told: &Told) -> usize {
        let rest = self.rest(request_ids);
        let count = rest.len();
        for waiting in rest {
            waiting.tell(told.clone());
        }
        count
    }
}
