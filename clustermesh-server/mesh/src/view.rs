//! What the planners read: one revision of the keyspace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::ControlFlow;

use bytes::Bytes;
use clustermesh_api::keys::Kind;
use clustermesh_api::records::{AddressType, IpIdentityPair, Node};

use crate::keys::{OWN_ADDRESSES_PREFIX, own_address};

/// One key of the keyspace with the revision of its last change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kv {
    /// Full key.
    pub key: Bytes,
    /// Stored value.
    pub value: Bytes,
    /// Revision of the last put of this key.
    pub mod_revision: i64,
}

/// Read access to the keyspace at one revision.
///
/// All calls on one value must answer from the same revision: the planners put it into their compares.
pub trait View {
    /// Revision that this view shows.
    fn revision(&self) -> i64;

    /// The key, if it exists.
    fn get(&self, key: &[u8]) -> Option<Kv>;

    /// Calls `visit` for each key that starts with `prefix`, in key order, until it breaks.
    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(Kv) -> ControlFlow<()>);

    /// All keys that start with `prefix`, in key order.
    fn list(&self, prefix: &[u8]) -> Vec<Kv> {
        let mut found = Vec::new();
        self.scan(prefix, &mut |kv| {
            found.push(kv);
            ControlFlow::Continue(())
        });
        found
    }

    /// Addresses whose records name `node` as their machine, in order; perhaps some more. An index spares reading all.
    fn addresses_of(&self, node: &str) -> BTreeSet<IpAddr> {
        scan_addresses_of(self, node)
    }

    /// Names of the nodes of `cluster` with this underlay address, in order; perhaps some more. An index spares reading all.
    fn nodes_at(&self, cluster: &str, address: IpAddr) -> BTreeSet<String> {
        scan_nodes_at(self, cluster, address)
    }
}

/// What [`View::addresses_of`] says, read from all address records.
fn scan_addresses_of<V: View + ?Sized>(view: &V, node: &str) -> BTreeSet<IpAddr> {
    let mut found = BTreeSet::new();
    view.scan(OWN_ADDRESSES_PREFIX.as_bytes(), &mut |kv| {
        if let Ok(pair) = IpIdentityPair::decode(&kv.value)
            && pair.node() == Some(node)
            && let Some(address) = own_address(&kv.key)
        {
            found.insert(address);
        }
        ControlFlow::Continue(())
    });
    found
}

/// What [`View::nodes_at`] says, read from all node records.
fn scan_nodes_at<V: View + ?Sized>(view: &V, cluster: &str, address: IpAddr) -> BTreeSet<String> {
    let prefix = Kind::Nodes.state_prefix(cluster);
    let mut found = BTreeSet::new();
    view.scan(prefix.as_bytes(), &mut |kv| {
        if let Ok(node) = Node::decode(&kv.value)
            && node
                .addresses_of(&AddressType::InternalIP)
                .any(|other| other == address)
        {
            let name = String::from_utf8_lossy(&kv.key[prefix.len()..]).into_owned();
            found.insert(name);
        }
        ControlFlow::Continue(())
    });
    found
}

impl<V: View + ?Sized> View for &V {
    fn revision(&self) -> i64 {
        (**self).revision()
    }

    fn get(&self, key: &[u8]) -> Option<Kv> {
        (**self).get(key)
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(Kv) -> ControlFlow<()>) {
        (**self).scan(prefix, visit);
    }

    fn addresses_of(&self, node: &str) -> BTreeSet<IpAddr> {
        (**self).addresses_of(node)
    }

    fn nodes_at(&self, cluster: &str, address: IpAddr) -> BTreeSet<String> {
        (**self).nodes_at(cluster, address)
    }
}

/// A keyspace in a `BTreeMap`, without history: for tests and for dry runs.
#[derive(Clone, Debug, Default)]
pub struct MapView {
    revision: i64,
    entries: BTreeMap<Bytes, (Bytes, i64)>,
}

impl MapView {
    /// An empty keyspace at revision 1, as etcd starts.
    #[must_use]
    pub fn new() -> Self {
        Self {
            revision: 1,
            entries: BTreeMap::new(),
        }
    }

    /// Stores one key at a new revision.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.revision += 1;
        self.entries
            .insert(key.into(), (value.into(), self.revision));
    }

    /// Removes one key at a new revision, if it exists.
    pub fn delete(&mut self, key: &[u8]) {
        if self.entries.remove(key).is_some() {
            self.revision += 1;
        }
    }

    /// Applies writes as one revision, as a transaction does.
    pub fn apply(&mut self, writes: impl IntoIterator<Item = (Bytes, Option<Bytes>)>) {
        let revision = self.revision + 1;
        for (key, value) in writes {
            let changed = match value {
                Some(value) => {
                    self.entries.insert(key, (value, revision));
                    true
                }
                None => self.entries.remove(&key).is_some(),
            };
            if changed {
                self.revision = revision;
            }
        }
    }
}

impl View for MapView {
    fn revision(&self) -> i64 {
        self.revision
    }

    fn get(&self, key: &[u8]) -> Option<Kv> {
        let (key, (value, mod_revision)) = self.entries.get_key_value(key)?;
        Some(Kv {
            key: key.clone(),
            value: value.clone(),
            mod_revision: *mod_revision,
        })
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(Kv) -> ControlFlow<()>) {
        let from = Bytes::copy_from_slice(prefix);
        for (key, (value, mod_revision)) in self.entries.range(from..) {
            if !key.starts_with(prefix) {
                return;
            }
            let kv = Kv {
                key: key.clone(),
                value: value.clone(),
                mod_revision: *mod_revision,
            };
            if visit(kv).is_break() {
                return;
            }
        }
    }
}
