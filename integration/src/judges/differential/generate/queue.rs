//! Random locks and elections in which nobody ever has to wait.

use clustermesh_api::etcd::election::{
    CampaignRequest, LeaderKey, LeaderRequest, ProclaimRequest, ResignRequest,
};
use clustermesh_api::etcd::lock::{LockRequest, UnlockRequest};
use clustermesh_api::etcd::rpc::LeaseGrantRequest;
use rand::RngExt;

use super::{Generator, Op, UNKNOWN_LEASE};
use crate::judges::differential::queue::{QueueOp, contender_key, no_leader};

/// What is locked and campaigned for.
const LOCKS: [&[u8]; 2] = [b"lock-1", b"lock-2"];
const OFFICES: [&[u8]; 2] = [b"office-1", b"office-2"];
/// Leases of contenders: no other operation revokes them.
const CONTENDER_LEASES: [i64; 2] = [101, 102];
const LEASE_TTL_SECONDS: i64 = 5_000;

impl Generator {
    pub(super) fn queue(&mut self) -> Op {
        if !self.contenders_have_leases {
            self.contenders_have_leases = true;
            let [first, second] = CONTENDER_LEASES.map(|id| {
                Op::LeaseGrant(LeaseGrantRequest {
                    ttl: LEASE_TTL_SECONDS,
                    id,
                })
            });
            self.queued.push_back(second);
            return first;
        }
        Op::Queue(if self.chance(0.4) {
            self.lock()
        } else {
            self.election()
        })
    }

    /// Who may contend for `name` without waiting: who has it, or anyone while nobody ever had it since.
    fn contender(&mut self, name: &'static [u8]) -> i64 {
        let wanted = CONTENDER_LEASES[self.rng.random_range(0..CONTENDER_LEASES.len())];
        *self.holders.entry(name).or_insert(wanted)
    }

    fn lock(&mut self) -> QueueOp {
        let name = LOCKS[self.rng.random_range(0..LOCKS.len())];
        if self.chance(0.08) {
            return QueueOp::Lock(LockRequest {
                name: name.into(),
                lease: UNKNOWN_LEASE,
            });
        }
        if self.chance(0.5) {
            return QueueOp::Lock(LockRequest {
                name: name.into(),
                lease: self.contender(name),
            });
        }
        let lease = CONTENDER_LEASES[self.rng.random_range(0..CONTENDER_LEASES.len())];
        if self.holders.get(name) == Some(&lease) {
            self.holders.remove(name);
        }
        let key = if self.chance(0.1) {
            Vec::new()
        } else {
            contender_key(name, lease)
        };
        // An empty key unlocks nothing.
        if key.is_empty() {
            self.holders.insert(name, lease);
        }
        QueueOp::Unlock(UnlockRequest { key: key.into() })
    }

    fn election(&mut self) -> QueueOp {
        let name = OFFICES[self.rng.random_range(0..OFFICES.len())];
        let leader = self.known_leader(name);
        match self.rng.random_range(0..10) {
            0..3 => QueueOp::Campaign(CampaignRequest {
                name: name.into(),
                lease: self.contender(name),
                value: self.value(),
            }),
            3 => QueueOp::Campaign(CampaignRequest {
                name: name.into(),
                lease: UNKNOWN_LEASE,
                value: self.value(),
            }),
            4..7 => QueueOp::Proclaim(ProclaimRequest {
                leader,
                value: self.value(),
            }),
            7 => QueueOp::Leader(LeaderRequest { name: name.into() }),
            8 => {
                let office = LeaderRequest { name: name.into() };
                let value = self.value();
                self.queued
                    .push_back(Op::Queue(QueueOp::Leader(office.clone())));
                self.queued
                    .push_back(Op::Queue(QueueOp::Observe(office, value)));
                QueueOp::Campaign(CampaignRequest {
                    name: name.into(),
                    lease: self.contender(name),
                    value: self.value(),
                })
            }
            _ => {
                // Its key is gone after this, if it is who leads.
                if leader.is_some() && self.leaders.remove(name).is_some() {
                    self.holders.remove(name);
                }
                QueueOp::Resign(ResignRequest { leader })
            }
        }
    }

    fn known_leader(&mut self, name: &'static [u8]) -> Option<LeaderKey> {
        match self.rng.random_range(0..20) {
            0 => None,
            1 => Some(no_leader(name, CONTENDER_LEASES[0])),
            _ => Some(
                self.leaders
                    .get(name)
                    .cloned()
                    .unwrap_or_else(|| no_leader(name, CONTENDER_LEASES[1])),
            ),
        }
    }
}
