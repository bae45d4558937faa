//! Underlay addresses of our own nodes, kept up in what peers' claims are judged by: ours come first.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::keys::Kind;
use clustermesh_api::records::{AddressType, Node};
use clustermesh_core::{EventKind, KeyRange};
use clustermesh_mesh::{View, prefix_end};
use clustermesh_raft::{WatchEnd, WatchItem, WatchSpec};
use tracing::debug;

use super::Shared;
use crate::store::TokioWatcher;
use crate::view::StateView;

/// Pause before all nodes are read again after the watch ended.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Follows our node records until it is dropped.
pub(super) async fn follow(shared: Arc<Shared>) {
    loop {
        let mut watcher = take_up(&shared);
        match changes(&shared, &mut watcher).await {
            Ok(never) => match never {},
            Err(end) => debug!(%end, "own nodes are read again"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Reads all nodes; the watcher yields what changes from then on.
pub(super) fn take_up(shared: &Shared) -> TokioWatcher {
    let prefix = Kind::Nodes.state_prefix(&shared.settings.name);
    let (nodes, revision) = shared.store.read(|state| {
        let listed = StateView(state).list(prefix.as_bytes());
        let nodes: BTreeMap<_, _> = listed
            .iter()
            .filter_map(|kv| {
                let name = name_of(&kv.key, &prefix)?;
                Some((name.to_owned(), addresses(&kv.value)))
            })
            .collect();
        (nodes, state.revision())
    });
    shared.owners.lock().set_own_nodes(&nodes);
    shared.store.watch(WatchSpec {
        ranges: vec![KeyRange::Between(
            prefix.clone().into(),
            prefix_end(prefix.as_bytes()),
        )],
        start_revision: revision + 1,
        filter: None,
        cursors: false,
    })
}

async fn changes(shared: &Shared, watcher: &mut TokioWatcher) -> Result<Infallible, WatchEnd> {
    let prefix = Kind::Nodes.state_prefix(&shared.settings.name);
    loop {
        let WatchItem::Events(group) = watcher.next().await? else {
            continue;
        };
        let mut owners = shared.owners.lock();
        for event in group.events() {
            let Some(name) = name_of(event.key(), &prefix) else {
                continue;
            };
            let addresses = match event.kind() {
                EventKind::Put => addresses(event.kv().value_bytes()),
                EventKind::Delete => Vec::new(),
            };
            owners.set_own_node(name, &addresses);
        }
    }
}

fn name_of<'k>(key: &'k [u8], prefix: &str) -> Option<&'k str> {
    std::str::from_utf8(key.strip_prefix(prefix.as_bytes())?).ok()
}

fn addresses(value: &[u8]) -> Vec<IpAddr> {
    // A record that cannot be read claims nothing.
    Node::decode(value)
        .map(|node| node.addresses_of(&AddressType::InternalIP).collect())
        .unwrap_or_default()
}
