//! Changes of who belongs to the group.

use std::sync::{Arc, atomic::Ordering};

use clustermesh_raft::{MemberError, Node, Replica, ReplicaId};
use openraft::async_runtime::AsyncRuntime;

use crate::{
    member::Member,
    runtime::{SimRuntime, WORLD, draw, spawn_in},
    world::{PATIENCE, World},
};

/// Replicas of a group, most.
const MAX_TAKEN: usize = 7;

/// What is asked of the group.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// A learner is added before it starts.
    Learner,
    /// A learner is to vote.
    Promote(ReplicaId),
    /// A member goes.
    Remove(ReplicaId),
    /// A new replica takes the place of another one.
    Replace(ReplicaId),
    /// Another voter leads.
    Transfer(ReplicaId),
}

impl World {
    /// Asks for some change, of `member` where it is about one.
    pub fn change_members(self: &Arc<Self>, member: &Member) {
        let free = self.members.iter().find(|member| !member.is_taken());
        let free = free.filter(|_| self.taken().count() < MAX_TAKEN);
        let id = member.replica_id();
        let change = match (draw(|random| random.below(100)), free, id) {
            (0..25, Some(free), _) => {
                free.take();
                self.start(free.index);
                return;
            }
            (25..40, Some(_), _) => Change::Learner,
            (40..55, _, Some(id)) => Change::Promote(id),
            (55..80, _, Some(id)) if self.taken().count() > 1 => Change::Remove(id),
            (80..90, Some(_), Some(id)) => Change::Replace(id),
            (90.., _, Some(id)) => Change::Transfer(id),
            _ => return,
        };
        let through: Vec<_> = self.members.iter().filter_map(Member::alive).collect();
        let Some((life, replica)) = through
            .get(draw(|random| random.place(through.len())))
            .cloned()
        else {
            return;
        };
        let free = free.map(|free| free.index);
        if let Change::Remove(id) | Change::Replace(id) = change {
            self.removals.lock().insert(id);
        }
        let world = self.clone();
        self.changes_pending.fetch_add(1, Ordering::Relaxed);
        let url = free.and_then(|free| Some(self.members.get(free)?.url.clone()));
        let asked = spawn_in(life, ask(replica, change, url.unwrap_or_default()));
        drop(spawn_in(WORLD, async move {
            let told = SimRuntime::timeout(PATIENCE, asked).await;
            // The replica may have ended with the change under way.
            let told = told.ok().and_then(Result::ok);
            world.follow(change, free, told.unwrap_or(Err(MemberError::Unknown)));
            world.changes_pending.fetch_sub(1, Ordering::Relaxed);
        }));
    }

    fn follow(
        self: &Arc<Self>,
        change: Change,
        free: Option<usize>,
        told: Result<(), MemberError>,
    ) {
        match (change, told) {
            (Change::Learner | Change::Replace(_), Ok(()) | Err(MemberError::Unknown)) => {
                let free = free.and_then(|free| self.members.get(free));
                if let Some(free) = free.filter(|free| !free.is_taken() && !self.has_ended()) {
                    free.take();
                    self.start(free.index);
                }
            }
            (Change::Remove(id), Ok(())) => {
                let removed = self
                    .taken()
                    .find(|member| member.replica_id() == Some(id))
                    .map(|member| member.index);
                let (Some(index), world) = (removed, self.clone()) else {
                    return;
                };
                drop(spawn_in(WORLD, async move {
                    // Some are told, and end by themselves; others never hear of it.
                    SimRuntime::sleep(draw(|random| random.time_ms(0..4000))).await;
                    if let Some(member) = world.members.get(index)
                        && member.replica_id() == Some(id)
                    {
                        world.free(member);
                    }
                }));
            }
            _ => {}
        }
    }

    /// What the group does by itself is done: who caught up votes, who is replaced is gone.
    pub fn members_settled(&self) -> bool {
        let ids: Vec<ReplicaId> = self.taken().filter_map(Member::replica_id).collect();
        self.taken().filter_map(Member::replica).all(|replica| {
            let members = replica.status().members;
            let known = |id: ReplicaId| members.iter().any(|member| member.id == id);
            // One that is being removed is about to make room.
            let complete = ids.iter().all(|id| known(*id));
            complete
                && members.iter().all(|member| {
                    let waits = member.node.join_as_voter && !member.voter;
                    let replaces = member.voter && known(member.node.replaces);
                    // One that was added and never started stays a learner.
                    !ids.contains(&member.id) || !waits && !replaces
                })
        })
    }

    /// Replicas that the group has removed make room, also when they were never told.
    pub fn free_removed(&self) {
        let replicas: Vec<_> = self.members.iter().filter_map(Member::replica).collect();
        for member in self.taken() {
            let Some(id) = member.replica_id() else {
                continue;
            };
            let removed =
                |replica: &Replica<SimRuntime>| replica.read(|state| state.is_removed_member(id));
            if replicas.iter().any(removed) {
                self.check_asked_to_remove(member.index, id);
                self.free(member);
            }
        }
    }
}

async fn ask(
    replica: Replica<SimRuntime>,
    change: Change,
    free_url: String,
) -> Result<(), MemberError> {
    let node = Node {
        peer_url: free_url,
        ..Node::default()
    };
    match change {
        Change::Learner => replica.add_member(node).await.map(drop),
        Change::Promote(id) => replica.promote_member(id).await,
        Change::Remove(id) => replica.remove_member(id).await,
        Change::Replace(id) => {
            let node = Node {
                replaces: id,
                join_as_voter: true,
                ..node
            };
            replica.add_member(node).await.map(drop)
        }
        Change::Transfer(id) => replica.transfer_leader(id).await,
    }
}
