//! A plan in the making: a view with the plan's own writes on top.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::ControlFlow;

use bytes::Bytes;
use clustermesh_api::keys::Kind;

use crate::keys::{OWN_ADDRESSES_PREFIX, own_address};
use crate::step::{MAX_STEP_GUARDS, MAX_STEP_WRITES};
use crate::txn::{Guard, Txn};
use crate::view::{Kv, View};

/// A view and the writes planned on it. Reads see the writes, guards name the view beneath,
/// so that several decisions (two Workloads with new labels, say) share one transaction.
pub struct Draft<'a> {
    base: &'a dyn View,
    txn: Txn,
}

impl<'a> Draft<'a> {
    /// An empty plan on `base`.
    #[must_use]
    pub fn new(base: &'a dyn View) -> Self {
        Self {
            base,
            txn: Txn::new(),
        }
    }

    /// The finished transaction.
    #[must_use]
    pub fn into_txn(self) -> Txn {
        self.txn
    }

    /// The plan holds only while this key stays as the view beneath has it.
    pub fn guard(&mut self, key: impl Into<Bytes>) {
        let key = key.into();
        let seen = self.base.get(&key);
        self.txn.guard_seen(key, seen.as_ref());
    }

    /// The plan holds only while nothing is put under this prefix.
    pub fn guard_prefix(&mut self, prefix: impl Into<Bytes>) {
        self.txn
            .guard(Guard::PrefixUnchanged(prefix.into(), self.base.revision()));
    }

    /// Stores a value where it differs; says whether it did.
    pub fn put(&mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> bool {
        let (key, value) = (key.into(), value.into());
        let changed = self.get(&key).is_none_or(|kv| kv.value != value);
        if changed {
            self.txn.put(key, value);
        }
        changed
    }

    /// Removes a key if it is there; says whether it was.
    pub fn delete(&mut self, key: impl Into<Bytes>) -> bool {
        let key = key.into();
        let existed = self.get(&key).is_some();
        if existed {
            self.txn.delete(key);
        }
        existed
    }

    /// Takes over a plan that was made on this draft: its guards hold on the view beneath but for keys that this
    /// draft writes itself, and its writes differ from what is here.
    pub fn absorb(&mut self, plan: Txn) {
        let (guards, writes) = plan.into_parts();
        for guard in guards {
            match &guard {
                // What an earlier plan writes is settled by the transaction itself.
                Guard::Absent(key) | Guard::Unchanged(key, _)
                    if self.txn.writes().contains_key(key) => {}
                Guard::Absent(_) | Guard::Unchanged(..) | Guard::PrefixUnchanged(..) => {
                    self.txn.guard(guard);
                }
            }
        }
        for (key, value) in writes {
            match value {
                Some(value) => self.txn.put(key, value),
                None => self.txn.delete(key),
            }
        }
    }

    /// Number of keys that the plan writes so far.
    #[must_use]
    pub fn writes(&self) -> usize {
        self.txn.writes().len()
    }

    /// Whether a step has as much as it may have.
    pub(crate) fn is_full_step(&self) -> bool {
        self.writes() >= MAX_STEP_WRITES || self.txn.guards().len() >= MAX_STEP_GUARDS
    }

    fn pending_under<'p>(
        &'p self,
        prefix: &'p [u8],
    ) -> impl Iterator<Item = (&'p Bytes, &'p Option<Bytes>)> {
        self.txn
            .writes()
            .range(Bytes::copy_from_slice(prefix)..)
            .take_while(move |(key, _)| key.starts_with(prefix))
    }

    fn pending(&self, key: &Bytes, value: &Bytes) -> Kv {
        Kv {
            key: key.clone(),
            value: value.clone(),
            mod_revision: self.base.revision() + 1,
        }
    }
}

impl View for Draft<'_> {
    fn revision(&self) -> i64 {
        self.base.revision()
    }

    fn get(&self, key: &[u8]) -> Option<Kv> {
        match self.txn.writes().get_key_value(key) {
            Some((key, value)) => value.as_ref().map(|value| self.pending(key, value)),
            None => self.base.get(key),
        }
    }

    fn scan(&self, prefix: &[u8], visit: &mut dyn FnMut(Kv) -> ControlFlow<()>) {
        let mut pending = self.pending_under(prefix).peekable();
        let mut stopped = false;
        self.base.scan(prefix, &mut |kv| {
            while let Some((key, value)) = pending.next_if(|(key, _)| **key <= kv.key) {
                if let Some(value) = value
                    && visit(self.pending(key, value)).is_break()
                {
                    stopped = true;
                    return ControlFlow::Break(());
                }
            }
            if self.txn.writes().contains_key(&kv.key) {
                return ControlFlow::Continue(());
            }
            let flow = visit(kv);
            stopped = flow.is_break();
            flow
        });
        if stopped {
            return;
        }
        for (key, value) in pending {
            if let Some(value) = value
                && visit(self.pending(key, value)).is_break()
            {
                return;
            }
        }
    }

    fn addresses_of(&self, node: &str) -> BTreeSet<IpAddr> {
        let mut found = self.base.addresses_of(node);
        found.extend(
            self.pending_under(OWN_ADDRESSES_PREFIX.as_bytes())
                .filter_map(|(key, _)| own_address(key)),
        );
        found
    }

    fn nodes_at(&self, cluster: &str, address: IpAddr) -> BTreeSet<String> {
        let mut found = self.base.nodes_at(cluster, address);
        let prefix = Kind::Nodes.state_prefix(cluster);
        found.extend(
            self.pending_under(prefix.as_bytes())
                .filter_map(|(key, _)| std::str::from_utf8(&key[prefix.len()..]).ok())
                .map(str::to_owned),
        );
        found
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::view::MapView;

    proptest! {
        #[test]
        fn reads_equal_the_view_after_the_plan(
            before in prop::collection::btree_map(0_u8..20, 0_u8..4, 0..12),
            writes in prop::collection::vec((0_u8..20, prop::option::of(0_u8..4)), 0..20),
        ) {
            let mut base = MapView::new();
            let mut model = BTreeMap::new();
            for (key, value) in before {
                base.put(vec![b'p', key], vec![value]);
                model.insert(vec![b'p', key], vec![value]);
            }
            base.put("q", "outside");
            let mut draft = Draft::new(&base);
            for (key, value) in writes {
                let key = vec![b'p', key];
                match value {
                    Some(value) => { draft.put(key.clone(), vec![value]); model.insert(key, vec![value]); }
                    None => { draft.delete(key.clone()); model.remove(&key); }
                }
            }
            let listed: BTreeMap<_, _> = draft.list(b"p").into_iter().map(|kv| (kv.key.to_vec(), kv.value.to_vec())).collect();
            prop_assert_eq!(&listed, &model);
            for key in 0_u8..20 {
                let key = vec![b'p', key];
                prop_assert_eq!(draft.get(&key).map(|kv| kv.value.to_vec()), model.get(&key).cloned());
            }
            let txn = draft.into_txn();
            let mut after = base.clone();
            after.apply(txn.writes().clone());
            prop_assert_eq!(after.list(b"p").len(), model.len());
        }
    }
}
