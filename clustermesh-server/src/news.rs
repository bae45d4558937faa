//! What the replicas of a group tell each other beside Raft: which agents are connected to each, and how the leader's peers are.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clustermesh_process::Drain;
use clustermesh_raft::{AsideError, ReplicaId};
use prost::Message;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use crate::agents::registry::Registry;
use crate::peering::PeerStatuses;
use crate::store::Store;
use crate::wire;

/// Without a change, the others hear this often that this replica is there.
const TELL_INTERVAL: Duration = Duration::from_millis(500);
/// Changes of so long go into one message.
const COALESCE_INTERVAL: Duration = Duration::from_millis(20);
/// A message without answer after this is told again.
const TELL_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the members of the group are looked at.
const MEMBERS_INTERVAL: Duration = Duration::from_secs(1);

/// What is told and what is heard; clones share it.
#[derive(Debug, Clone, Default)]
pub struct News {
    /// The sessions of agents.
    pub sessions: Registry,
    /// The peers.
    pub peers: PeerStatuses,
}

impl News {
    /// Takes what replica `from` tells.
    ///
    /// # Errors
    /// A text, upon which the sender begins anew.
    pub fn take(&self, from: ReplicaId, message: Bytes) -> Result<(), String> {
        let mut told = wire::News::decode(message).map_err(|error| error.to_string())?;
        if let Some(leading) = told.leading.take() {
            self.peers.take_from_leader(leading);
        }
        self.sessions.take_from(from, told)
    }

    /// Tells every other replica, until the drain has begun.
    pub async fn tell_others(self, store: Store, drain: Drain) {
        let mut told: BTreeMap<ReplicaId, tokio::task::AbortHandle> = BTreeMap::new();
        let mut tasks = JoinSet::new();
        loop {
            told.retain(|_, task| !task.is_finished());
            while tasks.try_join_next().is_some() {}
            for member in store.replica().status().members {
                if member.id != store.member_id() && !told.contains_key(&member.id) {
                    let task = self.clone().tell(store.clone(), member.id);
                    told.insert(member.id, tasks.spawn(task));
                }
            }
            tokio::select! {
                () = tokio::time::sleep(MEMBERS_INTERVAL) => {}
                () = drain.draining() => return,
            }
        }
    }

    /// Ends when the group has no such replica any more.
    async fn tell(self, store: Store, to: ReplicaId) {
        let mut changes = self.sessions.changes_here();
        let mut taken = 0;
        let mut peers_told: Option<Instant> = None;
        loop {
            changes.mark_unchanged();
            loop {
                let (mut message, more) = self.sessions.since(taken);
                // Agents report far more often than peers change.
                if !more && peers_told.is_none_or(|told| told.elapsed() >= TELL_INTERVAL) {
                    peers_told = Some(Instant::now());
                    message.leading = store.leading_term().map(|term| self.peers.to_tell(term));
                }
                let version = message.to_version;
                let bytes = message.encode_to_vec().into();
                match store.replica().tell(to, bytes, TELL_TIMEOUT).await {
                    Ok(()) => taken = version,
                    Err(AsideError::Unknown) => return,
                    Err(error) => {
                        debug!(replica = %format_args!("{to:016x}"), %error, "news are told again");
                        // Whether it was taken or not shows at the next one.
                        if matches!(error, AsideError::Refused(_)) {
                            taken = 0;
                        }
                        break;
                    }
                }
                if !more {
                    break;
                }
            }
            // The registry outlives this task.
            let _changed_or_time = timeout(TELL_INTERVAL, changes.changed()).await;
            tokio::time::sleep(COALESCE_INTERVAL).await;
        }
    }
}
