//! Watchers against a model, over random orders of apply, hand-out and reading.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{PutRequest, RequestOp, TxnRequest, request_op};
use clustermesh_core::{State, limits::BATCH_FORMAT, pb, pb::proposal::Command};
use clustermesh_store::SnapshotMeta;
use futures_util::FutureExt;
use parking_lot::RwLock;
use proptest::prelude::*;

use super::*;
use crate::{
    lease::LeaseKeeper,
    metrics::Metrics,
    shared::{Applied, Reports, Shared},
    test_support::R,
};

/// Small, so that watchers often fall behind.
const MAX_QUEUE_ITEMS: usize = 3;
const KEYS: u8 = 6;

#[derive(Debug, Clone)]
enum Step {
    /// One entry: some keys in one transaction, perhaps a peer's cursor.
    Apply {
        keys: Vec<u8>,
        cursor: bool,
    },
    HandOut,
    Replace,
    Watch {
        ranges: Vec<(u8, u8)>,
        back: i64,
        cursors: bool,
    },
    Read {
        watcher: usize,
        items: usize,
    },
    Progress {
        watcher: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (prop::collection::btree_set(0..KEYS, 0..4), any::<bool>())
            .prop_map(|(keys, cursor)| Step::Apply { keys: keys.into_iter().collect(), cursor }),
        6 => Just(Step::HandOut),
        1 => Just(Step::Replace),
        2 => (prop::collection::vec((0..KEYS, 0..=KEYS), 1..4), -2..4_i64, any::<bool>())
            .prop_map(|(ranges, back, cursors)| Step::Watch { ranges, back, cursors }),
        6 => (0..8_usize, 1..5_usize).prop_map(|(watcher, items)| Step::Read { watcher, items }),
        1 => (0..8_usize).prop_map(|watcher| Step::Progress { watcher }),
    ]
}

fn key(number: u8) -> Bytes {
    vec![b'a' + number].into()
}

fn batch(keys: &[u8], cursor: Option<i64>) -> pb::Batch {
    let mut proposals = Vec::new();
    if !keys.is_empty() {
        let put = |number: &u8| RequestOp {
            request: Some(request_op::Request::RequestPut(PutRequest {
                key: key(*number),
                ..PutRequest::default()
            })),
        };
        let txn = TxnRequest {
            success: keys.iter().map(put).collect(),
            ..TxnRequest::default()
        };
        proposals.push(Command::Txn(txn).into());
    }
    if let Some(revision) = cursor {
        let copy = pb::PeerCopy {
            cluster: "east".into(),
            store_id: 1,
            revision,
            ..pb::PeerCopy::default()
        };
        proposals.push(Command::PeerCopy(copy).into());
    }
    pb::Batch {
        format: BATCH_FORMAT,
        proposals,
        ..pb::Batch::default()
    }
}

struct Reader {
    watcher: Watcher<R>,
    ranges: Vec<KeyRange>,
    got: Vec<(i64, Vec<Bytes>)>,
    cursor: Option<i64>,
    /// The peer's cursor at each revision bound: a cursor must never come before what it covers.
    wants_cursors: bool,
}

impl Reader {
    fn take(&mut self, cursor_needs: &BTreeMap<i64, i64>) -> bool {
        // A pending answer may only be a yield.
        let Some(item) = (0..3).find_map(|_| self.watcher.next().now_or_never()) else {
            return false;
        };
        let seen = self.got.last().map_or(0, |(revision, _)| *revision);
        match item.unwrap() {
            WatchItem::Events(events) => {
                let keys = events
                    .events()
                    .map(|event| Bytes::copy_from_slice(event.key()))
                    .collect();
                self.got.push((events.revision(), keys));
            }
            WatchItem::Cursor { cursor, .. } => {
                assert!(self.wants_cursors);
                let cursor = cursor.unwrap().revision;
                assert!(Some(cursor) > self.cursor, "cursors go forward");
                // Everything wanted up to the revision that it came with was delivered.
                let needs = cursor_needs[&cursor];
                let wanted = self.wanted(needs);
                assert!(
                    wanted.last().is_none_or(|revision| *revision <= seen),
                    "{cursor} before {wanted:?}"
                );
                self.cursor = Some(cursor);
            }
            WatchItem::Progress { revision } => {
                assert!(
                    self.wanted(revision)
                        .last()
                        .is_none_or(|wanted| *wanted <= seen)
                );
            }
        }
        true
    }

    fn expected(&self, upto: i64) -> Vec<(i64, Vec<Bytes>)> {
        let groups = self.watcher.shared_history();
        let wants = |key: &Bytes| self.ranges.iter().any(|range| range.contains(key));
        groups
            .iter()
            .filter(|group| (self.watcher.start_revision()..=upto).contains(&group.revision))
            .map(|group| {
                (
                    group.revision,
                    group
                        .events
                        .iter()
                        .map(|event| Bytes::copy_from_slice(event.key()))
                        .filter(wants)
                        .collect(),
                )
            })
            .filter(|(_, keys): &(i64, Vec<Bytes>)| !keys.is_empty())
            .collect()
    }

    fn wanted(&self, upto: i64) -> Vec<i64> {
        self.expected(upto)
            .into_iter()
            .map(|(revision, _)| revision)
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn every_watcher_gets_exactly_what_it_wants_in_order(steps in prop::collection::vec(step(), 1..80)) {
        let metrics = Arc::new(Metrics::default());
        let applied =
            Applied::new(State::new(), SnapshotMeta::default());
        let (reports, _) = Reports::new(u64::MAX);
        let shared = Arc::new(Shared::<R> {
            group: crate::group::GroupView::new(&State::new(), 1),
            hashes: crate::hashes::Hashes::new(true),
            applied: RwLock::new(applied),
            leases: LeaseKeeper::new(),
            pending: Arc::new(crate::pending::Pending::new(1, 1)),
            contact: crate::contact::Contact::new(),
            metrics: metrics.clone(),
            diverged: std::sync::atomic::AtomicBool::new(false),
            reports,
        });
        let hub = Arc::new(Hub::new(metrics, 1, MAX_QUEUE_ITEMS));
        let mut pending = VecDeque::new();
        let mut readers: Vec<Reader> = Vec::new();
        let mut cursor = 0;
        let mut cursor_needs = BTreeMap::new();
        for step in steps {
            match step {
                Step::Apply { keys, cursor: with_cursor } => {
                    cursor += i64::from(with_cursor);
                    let batch = batch(&keys, with_cursor.then_some(cursor));
                    let mut applied = shared.applied.write();
                    let done = applied.state.apply(&batch, 1).unwrap();
                    cursor_needs.entry(cursor).or_insert_with(|| applied.state.revision());
                    if !done.groups.is_empty() || !done.cursors.is_empty() {
                        applied.sequence += 1;
                        let sequence = applied.sequence;
                        pending.push_back(Publication::Applied { sequence, groups: done.groups, cursors: done.cursors });
                    }
                }
                Step::HandOut => pending.pop_front().into_iter().for_each(|publication| hub.hand_out(publication)),
                Step::Replace => {
                    let mut applied = shared.applied.write();
                    applied.sequence += 1;
                    pending.push_back(Publication::Replaced { sequence: applied.sequence });
                }
                Step::Watch { ranges, back, cursors } => {
                    let ranges: Vec<_> = ranges.iter().map(|(a, b)| KeyRange::Between(key(*a), key(*b))).collect();
                    let start_revision = (shared.applied.read().state.revision() - back).max(0);
                    let spec = WatchSpec { ranges: ranges.clone(), start_revision, cursors, filter: None };
                    let watcher = Watcher::new(shared.clone(), hub.clone(), spec);
                    readers.push(Reader { watcher, ranges, got: Vec::new(), cursor: None, wants_cursors: cursors });
                }
                Step::Read { watcher, items } => {
                    if let Some(reader) = readers.get_mut(watcher) {
                        (0..items).all(|_| reader.take(&cursor_needs));
                    }
                }
                Step::Progress { watcher } => {
                    if let Some(reader) = readers.get_mut(watcher) {
                        reader.watcher.request_progress();
                    }
                }
            }
        }
        pending.into_iter().for_each(|publication| hub.hand_out(publication));
        for mut reader in readers {
            while reader.take(&cursor_needs) {}
            assert_eq!(reader.got, reader.expected(i64::MAX));
            if reader.wants_cursors {
                assert_eq!(reader.cursor.unwrap_or(0), cursor);
            }
        }
    }
}
