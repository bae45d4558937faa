//! Random operations over few keys, leases and revisions, so that they meet each other; one in ten is wrong somehow.

mod access;
mod queue;
mod txn;

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use clustermesh_api::etcd::election::LeaderKey;
use clustermesh_api::etcd::rpc::watch_create_request::FilterType;
use clustermesh_api::etcd::rpc::{
    CompactionRequest, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
    LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest,
    WatchCreateRequest,
};
use rand::rngs::StdRng;
use rand::{Rng, RngExt};

use super::answer::Answer;
use super::operation::Op;
use super::watching::{Lane, UNKNOWN_WATCH, WatchOp};

/// Keys that operations are about.
const KEYS: [&[u8]; 10] = [
    b"a", b"b", b"c", b"ab", b"a/1", b"a/2", b"a/2/x", b"b\xff", b"\xff", b"\x00",
];
/// Of ranges that end here or before none has more than [`KEYS`].
const LAST_OF_FEW: &[u8] = b"c\xff";
/// Leases that operations are about.
const LEASES: i64 = 8;
/// A lease that is never granted.
const UNKNOWN_LEASE: i64 = 4_242;
/// Watches of one seed.
const WATCHES_MAX: usize = 40;
/// Watches of one seed that begin in the past: etcd lets each wait up to 100 ms.
const PAST_WATCHES_MAX: usize = 8;
/// Steps between two looks at what watches got.
const STEPS_PER_BARRIER: usize = 25;
/// Steps between two comparisons of everything stored.
const STEPS_PER_HASH: usize = 60;

/// Makes operations, and remembers enough of the answers to make them meaningful.
pub struct Generator {
    rng: StdRng,
    revision: i64,
    compacted: i64,
    /// Lane and id of watches that run.
    watches: Vec<(Lane, i64)>,
    watches_made: usize,
    past_watches: usize,
    next_value: u64,
    queued: VecDeque<Op>,
    contenders_have_leases: bool,
    /// Whether ranges end after their beginning.
    no_backward_ranges: bool,
    /// Lease of who has a lock or an office, or had it last.
    holders: BTreeMap<&'static [u8], i64>,
    /// By the office: who was elected.
    leaders: BTreeMap<Bytes, LeaderKey>,
}

impl Generator {
    pub fn new(rng: StdRng) -> Self {
        Self {
            rng,
            revision: 1,
            compacted: 0,
            watches: Vec::new(),
            watches_made: 0,
            past_watches: 0,
            next_value: 0,
            queued: VecDeque::new(),
            contenders_have_leases: false,
            no_backward_ranges: false,
            holders: BTreeMap::new(),
            leaders: BTreeMap::new(),
        }
    }

    /// The operation of a step.
    pub fn next_op(&mut self, step: usize) -> Op {
        if let Some(op) = self.queued.pop_front() {
            return op;
        }
        if step % STEPS_PER_HASH == STEPS_PER_HASH - 1 {
            return self.hash_kv();
        }
        if step % STEPS_PER_BARRIER == STEPS_PER_BARRIER - 1 {
            return self.barrier();
        }
        match self.rng.random_range(0..100) {
            0..25 => Op::Range(self.range()),
            25..28 => Op::RangeStream(self.streamed_range()),
            28..47 => Op::Put(self.put()),
            47..54 => Op::DeleteRange(self.delete_range()),
            54..68 => Op::Txn(self.txn()),
            68..70 => self.compact(),
            70..74 => Op::LeaseGrant(self.lease_grant()),
            74..76 => Op::LeaseRevoke(LeaseRevokeRequest { id: self.lease() }),
            76..78 => Op::LeaseKeepAlive(LeaseKeepAliveRequest { id: self.lease() }),
            78..81 => Op::LeaseTimeToLive(LeaseTimeToLiveRequest {
                id: self.lease(),
                keys: self.chance(0.7),
            }),
            81..83 => Op::LeaseLeases(LeaseLeasesRequest {}),
            83..86 => self.queue(),
            86..91 => Op::Access(self.access()),
            _ => self.watch(),
        }
    }

    /// What a seed ends with: everything that watches got, everything stored, before and after a compaction.
    pub fn last_ops(&mut self) -> Vec<Op> {
        let hash = |revision| Op::HashKv(HashKvRequest { revision });
        let middle = i64::midpoint(self.compacted.max(1), self.revision);
        let mut ops = vec![
            Op::Watch(WatchOp::Barrier {
                revision: self.revision,
                last: true,
            }),
            Op::Range(RangeRequest {
                key: Bytes::from_static(b"\0"),
                range_end: Bytes::from_static(b"\0"),
                ..RangeRequest::default()
            }),
            Op::LeaseLeases(LeaseLeasesRequest {}),
            hash(0),
            hash(middle),
            hash(middle.saturating_add(1)),
            Op::Compact(CompactionRequest {
                revision: middle,
                physical: true,
            }),
            hash(middle),
            hash(middle.saturating_add(1)),
            hash(0),
        ];
        ops.extend(self.checked_ops());
        // The shortest TTL is the server's to choose: nothing may come after such leases that shows whether they live.
        ops.extend([
            Op::LeaseGrant(LeaseGrantRequest { ttl: 0, id: 9_001 }),
            Op::LeaseGrant(LeaseGrantRequest { ttl: 1, id: 9_002 }),
            Op::LeaseGrant(LeaseGrantRequest { ttl: -7, id: 9_003 }),
        ]);
        ops
    }

    /// Takes in etcd's answer.
    pub fn learn(&mut self, op: &Op, answer: &Answer) {
        self.revision = self.revision.max(answer.revision());
        if let (Op::Compact(request), true) = (op, answer.is_ok()) {
            self.compacted = request.revision;
        }
        if let Some(leader) = answer.leader() {
            self.leaders.insert(leader.name.clone(), leader.clone());
        }
        // When one of the future lane is cancelled, what it got by then is a matter of speed.
        if let Op::Watch(WatchOp::Create(lane, _)) = op
            && *lane != Lane::Future
            && let Some(id) = answer.running_watch()
        {
            self.watches.push((*lane, id));
        }
    }

    fn chance(&mut self, probability: f64) -> bool {
        self.rng.random_bool(probability)
    }

    fn key(&mut self) -> Bytes {
        if self.chance(0.01) {
            return Bytes::new();
        }
        Bytes::from_static(KEYS[self.rng.random_range(0..KEYS.len())])
    }

    /// A key with the end of its range.
    fn key_range(&mut self) -> (Bytes, Bytes) {
        let key = self.key();
        let end = match self.rng.random_range(0..100) {
            0..40 => Bytes::new(),
            40..52 => Bytes::from_static(b"\0"),
            52..70 => prefix_end(&key),
            70..90 => self.key(),
            90..95 => [&key[..], b"\0"].concat().into(),
            _ => key.clone(),
        };
        let ends_before = !matches!(end.as_ref(), [] | [0]) && end <= key;
        if self.no_backward_ranges && ends_before {
            return (key, Bytes::new());
        }
        (key, end)
    }

    /// A revision of the past, of now, or one that cannot be had.
    fn any_revision(&mut self) -> i64 {
        match self.rng.random_range(0..20) {
            0 => -1,
            1 => self.revision + 1,
            2 => i64::MAX,
            3 => self.compacted,
            4 => self.compacted - 1,
            5 | 6 => self.revision,
            _ => self.rng.random_range(self.compacted.max(1)..=self.revision),
        }
    }

    fn bound_revision(&mut self) -> i64 {
        if self.chance(0.85) {
            0
        } else {
            self.any_revision()
        }
    }

    fn option(&mut self, valid: std::ops::RangeInclusive<i32>) -> i32 {
        if self.chance(0.01) {
            return if self.chance(0.5) {
                -1
            } else {
                valid.end() + 1
            };
        }
        self.rng.random_range(valid)
    }

    fn range(&mut self) -> RangeRequest {
        let mut range = self.any_range();
        // etcd's order of keys that are equal in what it sorts by is chance where there are more than twelve: such
        // ranges have the keys of locks and offices in them.
        let has_many = range.range_end == b"\0"[..] || range.range_end > LAST_OF_FEW;
        if has_many && (1..=4).contains(&range.sort_target) {
            range.sort_target = 0;
        }
        range
    }

    fn any_range(&mut self) -> RangeRequest {
        let (key, range_end) = self.key_range();
        RangeRequest {
            key,
            range_end,
            limit: match self.rng.random_range(0..10) {
                0..6 => 0,
                6 => -1,
                7 => 1_000,
                _ => self.rng.random_range(1..4),
            },
            revision: if self.chance(0.6) {
                0
            } else {
                self.any_revision()
            },
            sort_order: self.option(0..=2),
            sort_target: self.option(0..=4),
            serializable: self.chance(0.3),
            keys_only: self.chance(0.15),
            count_only: self.chance(0.15),
            min_mod_revision: self.bound_revision(),
            max_mod_revision: self.bound_revision(),
            min_create_revision: self.bound_revision(),
            max_create_revision: self.bound_revision(),
        }
    }

    /// Mostly one that can be streamed.
    fn streamed_range(&mut self) -> RangeRequest {
        let range = self.range();
        if self.chance(0.3) {
            return range;
        }
        RangeRequest {
            sort_order: 0,
            min_mod_revision: 0,
            max_mod_revision: 0,
            min_create_revision: 0,
            max_create_revision: 0,
            ..range
        }
    }

    fn value(&mut self) -> Bytes {
        self.next_value += 1;
        let number = self.next_value;
        match self.rng.random_range(0..60) {
            0 => Bytes::new(),
            1 => vec![b'v'; 20_000].into(),
            2 => {
                let mut bytes = vec![0; 16];
                self.rng.fill_bytes(&mut bytes);
                bytes.into()
            }
            // Few values, so that compares with a value meet equal ones.
            3..20 => format!("v{}", number % 4).into(),
            _ => format!("value-{number}").into(),
        }
    }

    fn lease(&mut self) -> i64 {
        match self.rng.random_range(0..30) {
            0 => UNKNOWN_LEASE,
            1 => -1,
            2 => 0,
            _ => self.rng.random_range(1..=LEASES),
        }
    }

    fn put(&mut self) -> PutRequest {
        let (ignore_value, ignore_lease) = (self.chance(0.1), self.chance(0.1));
        let value = if self.chance(0.001) {
            // Above the limit of a request, below that of a message; and above both.
            let bytes = if self.chance(0.5) {
                1_600_000
            } else {
                3_000_000
            };
            vec![b'x'; bytes].into()
        } else if ignore_value && self.chance(0.9) {
            Bytes::new()
        } else {
            self.value()
        };
        PutRequest {
            key: self.key(),
            value,
            lease: if (ignore_lease && self.chance(0.9)) || self.chance(0.6) {
                0
            } else {
                self.lease()
            },
            prev_kv: self.chance(0.3),
            ignore_value,
            ignore_lease,
        }
    }

    fn delete_range(&mut self) -> DeleteRangeRequest {
        let (key, range_end) = self.key_range();
        DeleteRangeRequest {
            key,
            range_end,
            prev_kv: self.chance(0.4),
        }
    }

    fn compact(&mut self) -> Op {
        let revision = if self.chance(0.6) {
            self.rng.random_range(self.compacted.max(1)..=self.revision)
        } else {
            // Of a compaction of revision 0 etcd keeps a hash, which is from then on the answer for the newest revision.
            match self.any_revision() {
                0 => 1,
                revision => revision,
            }
        };
        let compact = Op::Compact(CompactionRequest {
            revision,
            physical: self.chance(0.5),
        });
        // Watches that are still behind would be cancelled or not, depending on who is faster.
        self.queued.push_back(compact);
        self.barrier()
    }

    fn lease_grant(&mut self) -> LeaseGrantRequest {
        LeaseGrantRequest {
            // Long enough to outlive the run.
            ttl: match self.rng.random_range(0..10) {
                0 => 9_000_000_001,
                1 => 9_000_000_000,
                _ => self.rng.random_range(3_000..4_000),
            },
            // 0 lets the server choose, and the two would choose differently.
            id: if self.chance(0.03) {
                -3
            } else {
                self.rng.random_range(1..=LEASES)
            },
        }
    }

    fn hash_kv(&mut self) -> Op {
        let revision = if self.chance(0.4) {
            0
        } else {
            self.any_revision()
        };
        Op::HashKv(HashKvRequest { revision })
    }

    fn barrier(&mut self) -> Op {
        Op::Watch(WatchOp::Barrier {
            revision: self.revision,
            last: false,
        })
    }

    fn watch(&mut self) -> Op {
        if self.watches_made >= WATCHES_MAX || (self.watches.len() > 4 && self.chance(0.3)) {
            return self.cancel_watch();
        }
        self.watches_made += 1;
        let (key, range_end) = self.key_range();
        let (lane, start_revision) = self.watch_start();
        let filters = match self.rng.random_range(0..10) {
            0 => vec![FilterType::Noput.into()],
            1 => vec![FilterType::Nodelete.into()],
            2 => vec![FilterType::Nodelete.into(), FilterType::Noput.into()],
            3 if self.chance(0.2) => vec![7],
            _ => Vec::new(),
        };
        let create = WatchCreateRequest {
            key,
            range_end,
            start_revision,
            progress_notify: self.chance(0.2),
            filters,
            prev_kv: self.chance(0.4),
            watch_id: match self.rng.random_range(0..10) {
                // etcd keeps the id of a watch that a compaction ended.
                _ if lane == Lane::Compacted => 0,
                0 => self.rng.random_range(1..12),
                1 if self.chance(0.2) => -5,
                _ => 0,
            },
            fragment: self.chance(0.2),
        };
        // Whatever began in the past has caught up before anything else happens.
        let barrier = self.barrier();
        self.queued.push_back(barrier);
        Op::Watch(WatchOp::Create(lane, create))
    }

    fn watch_start(&mut self) -> (Lane, i64) {
        match self.rng.random_range(0..20) {
            0 => (Lane::Caught, -1),
            1..3 => (Lane::Future, self.revision + self.rng.random_range(1..60)),
            3..11 if self.past_watches < PAST_WATCHES_MAX => {
                self.past_watches += 1;
                if self.compacted > 1 && self.chance(0.2) {
                    let start = self.rng.random_range(1..self.compacted);
                    return (Lane::Compacted, start);
                }
                let lowest = self.compacted.max(1);
                let start = self.rng.random_range(lowest..=self.revision);
                (Lane::Caught, start)
            }
            _ => (Lane::Caught, 0),
        }
    }

    fn cancel_watch(&mut self) -> Op {
        let barrier = self.barrier();
        if self.watches.is_empty() || self.chance(0.1) {
            self.queued
                .push_back(Op::Watch(WatchOp::Cancel(Lane::Caught, UNKNOWN_WATCH)));
            return barrier;
        }
        let chosen = self.rng.random_range(0..self.watches.len());
        let (lane, id) = self.watches.swap_remove(chosen);
        self.queued.push_back(Op::Watch(WatchOp::Cancel(lane, id)));
        barrier
    }
}

/// End of the range of all keys that begin with `key`.
fn prefix_end(key: &[u8]) -> Bytes {
    let mut end = key.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(b"\0")
}
