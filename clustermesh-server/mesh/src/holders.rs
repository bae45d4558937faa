//! Index of claimed endpoints by Workload: which node holds which addresses under a name.
//!
//! Address records are keyed by address; without this index each claim would have to read all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use bytes::Bytes;
use clustermesh_api::keys::ALLOC_PREFIX;
use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::view::View;

/// Addresses of one Workload, by node. More than one node has some while a Workload moves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Holders(pub(crate) BTreeMap<String, BTreeSet<IpAddr>>);

fn key(namespace: &str, name: &str) -> Bytes {
    format!("{ALLOC_PREFIX}endpoints/{namespace}/{name}").into()
}

impl Holders {
    pub(crate) fn read(view: &dyn View, namespace: &str, name: &str) -> Self {
        // A damaged entry counts as empty: the next claim of the name writes it anew.
        view.get(&key(namespace, name))
            .and_then(|kv| serde_json::from_slice(&kv.value).ok())
            .unwrap_or_default()
    }

    /// Stores the entry, guarded: two claims of one name never both succeed on the same view.
    pub(crate) fn write(mut self, draft: &mut Draft<'_>, namespace: &str, name: &str) {
        self.0.retain(|_, addresses| !addresses.is_empty());
        let key = key(namespace, name);
        draft.guard(key.clone());
        if self.0.is_empty() {
            draft.delete(key);
        } else if let Ok(value) = serde_json::to_vec(&self) {
            draft.put(key, value);
        }
    }

    pub(crate) fn with(mut self, node: &str, addresses: &[IpAddr]) -> Self {
        self.0.entry(node.to_owned()).or_default().extend(addresses);
        self
    }

    pub(crate) fn remove(
        draft: &mut Draft<'_>,
        namespace: &str,
        name: &str,
        node: &str,
        address: IpAddr,
    ) {
        let mut holders = Self::read(draft, namespace, name);
        if let Some(addresses) = holders.0.get_mut(node) {
            addresses.remove(&address);
        }
        holders.write(draft, namespace, name);
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.0.values().flatten().copied()
    }
}
