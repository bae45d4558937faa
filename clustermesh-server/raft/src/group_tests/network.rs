//! A network in memory: replicas by address, each of which can be cut off from all others.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures_util::{StreamExt, future::BoxFuture, stream::BoxStream};
use parking_lot::Mutex;

use crate::{
    PeerHandler, Target, Transport, TransportError,
    test_support::R,
    wire::{AppendRequest, AppendResponse, CallRequest, CallResponse, SnapshotPart},
};

#[derive(Clone, Default)]
pub(super) struct MemoryNetwork(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    listeners: BTreeMap<String, PeerHandler<R>>,
    cut: BTreeSet<String>,
    /// Parts of a snapshot that one stream carries.
    snapshot_parts: Option<usize>,
    snapshot_streams: usize,
}

impl MemoryNetwork {
    pub(super) fn listen(&self, url: &str, handler: PeerHandler<R>) {
        self.0.lock().listeners.insert(url.to_owned(), handler);
    }

    pub(super) fn cut(&self, url: &str) {
        self.0.lock().cut.insert(url.to_owned());
    }

    pub(super) fn heal(&self, url: &str) {
        self.0.lock().cut.remove(url);
    }

    /// Ends each stream of a snapshot after so many parts.
    pub(super) fn break_snapshots_after(&self, parts: Option<usize>) {
        self.0.lock().snapshot_parts = parts;
    }

    pub(super) fn snapshot_streams(&self) -> usize {
        self.0.lock().snapshot_streams
    }

    pub(super) fn transport(&self, from: &str) -> Arc<dyn Transport> {
        Arc::new(MemoryTransport {
            network: self.clone(),
            from: from.to_owned(),
        })
    }
}

#[derive(Clone)]
struct MemoryTransport {
    network: MemoryNetwork,
    from: String,
}

impl MemoryTransport {
    fn reach(&self, to: &str) -> Result<PeerHandler<R>, TransportError> {
        let inner = self.network.0.lock();
        let unreachable = |reason: &str| TransportError::Unreachable {
            peer: to.to_owned(),
            reason: reason.into(),
        };
        if inner.cut.contains(to) || inner.cut.contains(&self.from) {
            return Err(unreachable("cut off"));
        }
        let listener = inner.listeners.get(to);
        listener
            .cloned()
            .ok_or_else(|| unreachable("nobody listens"))
    }

    /// What was on its way when the network was cut is lost.
    fn deliver<T>(&self, to: &str, message: T) -> Result<T, TransportError> {
        self.reach(to)
            .map(|_| message)
            .map_err(|error| TransportError::Broken {
                peer: to.to_owned(),
                reason: error.to_string(),
            })
    }
}

impl Transport for MemoryTransport {
    fn call(
        &self,
        target: Target,
        request: CallRequest,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        let this = self.clone();
        Box::pin(async move {
            let response = this.reach(&target.peer_url)?.call(request).await;
            this.deliver(&target.peer_url, response)
        })
    }

    fn append(
        &self,
        target: Target,
        requests: BoxStream<'static, AppendRequest>,
    ) -> BoxFuture<
        'static,
        Result<BoxStream<'static, Result<AppendResponse, TransportError>>, TransportError>,
    > {
        let this = self.clone();
        Box::pin(async move {
            let handler = this.reach(&target.peer_url)?;
            let url = target.peer_url;
            let requests = {
                let (this, url) = (this.clone(), url.clone());
                requests
                    .take_while(move |_| std::future::ready(this.reach(&url).is_ok()))
                    .boxed()
            };
            let responses = handler
                .append(requests)
                .map(move |response| this.deliver(&url, response));
            Ok(responses.boxed())
        })
    }

    fn install_snapshot(
        &self,
        target: Target,
        parts: BoxStream<'static, SnapshotPart>,
    ) -> BoxFuture<'static, Result<CallResponse, TransportError>> {
        let this = self.clone();
        Box::pin(async move {
            let handler = this.reach(&target.peer_url)?;
            let carried = {
                let mut inner = this.network.0.lock();
                inner.snapshot_streams += 1;
                inner.snapshot_parts
            };
            let parts = parts.take(carried.unwrap_or(usize::MAX)).boxed();
            let response = handler.install_snapshot(parts).await;
            this.deliver(&target.peer_url, response)
        })
    }
}
