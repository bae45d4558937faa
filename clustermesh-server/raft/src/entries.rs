//! Makes log entries of batches on the leader, and tells those who wait what came of them.

use std::sync::Arc;

use clustermesh_core::pb;
use clustermesh_store::{Command, LogId, Node, Origin, ReplicaId};
use openraft::{
    Raft,
    async_runtime::{AsyncRuntime, Mpsc, MpscSender, Oneshot, WatchReceiver},
    errors::{ClientWriteError, ForwardToLeader},
    impls::ProgressResponder,
    raft::ClientWriteResult,
};
use prost::Message;

use crate::{
    Types,
    answer::{Answer, Committed},
    error::ProposeError,
    metrics::{Metrics, add},
    proposal::Waiting,
    state_machine::StateMachine,
};

/// Makes log entries of batches, on the leader.
pub(crate) struct Entries<R: AsyncRuntime> {
    pub(crate) raft: Raft<Types<R>, StateMachine<R>>,
    /// What the leader says of itself in its entries.
    pub(crate) leader: Box<dyn Fn() -> pb::Leader + Send + Sync>,
    pub(crate) metrics: Arc<Metrics>,
}

/// An entry on its way.
pub(crate) struct Submitted<R: AsyncRuntime> {
    batch: Vec<Waiting<R>>,
    command: Command,
    answer: Option<OneshotReceiverOf<R, ClientWriteResult<Types<R>>>>,
    metrics: Arc<Metrics>,
}

type OneshotReceiverOf<R, T> = <<R as AsyncRuntime>::Oneshot as Oneshot>::Receiver<T>;

impl<R: AsyncRuntime> Entries<R> {
    /// The term in which this replica leads, as far as it knows.
    pub(crate) fn leading_term(&self) -> Option<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leads = metrics.state.is_leader();
        leads.then_some(metrics.vote.leader_id.term)
    }

    pub(crate) async fn submit(&self, mut batch: Vec<Waiting<R>>) -> Submitted<R> {
        let origins = (0_u32..)
            .zip(&batch)
            .filter_map(|(place, waiting)| {
                let (replica_id, request_id) = waiting.origin?;
                Some(Origin {
                    place,
                    replica_id,
                    request_id,
                })
            })
            .collect();
        let proposals = batch
            .iter_mut()
            .map(|waiting| std::mem::take(&mut waiting.proposal))
            .collect();
        let encoded = pb::Batch::new((self.leader)(), proposals).encode_to_vec();
        let command = Command {
            batch: encoded.into(),
            origins,
        };
        add(&self.metrics.entries_proposed_total, 1);
        let (responder, answer) = ProgressResponder::complete_only();
        let write = self.raft.write(command.clone()).responder(responder);
        let sent = write.await;
        Submitted {
            batch,
            command,
            answer: sent.is_ok().then_some(answer),
            metrics: self.metrics.clone(),
        }
    }
}

impl<R: AsyncRuntime> Submitted<R> {
    /// Tells everyone what came of it; hands the batch back when it was refused before anything was proposed.
    pub(crate) async fn settle(
        self,
        done: &<R::Mpsc as Mpsc>::Sender<()>,
    ) -> Option<Vec<Waiting<R>>> {
        let Some(answer) = self.answer else {
            for waiting in self.batch {
                waiting.tell(Err(ProposeError::Stopped));
            }
            let _stopped = done.send(()).await;
            return None;
        };
        let deadline = self.batch.first().map(|waiting| waiting.deadline);
        let answer = match deadline {
            Some(deadline) => R::timeout_at(deadline, answer).await,
            None => Ok(answer.await),
        };
        match answer {
            Ok(Ok(Ok(response))) => {
                // The next entry need not wait until everyone is told.
                let _stopped = done.send(()).await;
                tell_results(self.batch, response.log_id, response.data);
                return None;
            }
            #[cfg(feature = "mutants")]
            Ok(Ok(Err(ClientWriteError::LogEntryDiscarded(_))))
                if crate::mutants::is(crate::mutants::Mutant::RetryDiscarded) =>
            {
                return Some(restore(self.batch, &self.command));
            }
            // Only this error says that nothing was proposed. A discarded entry may be committed yet.
            Ok(Ok(Err(ClientWriteError::ForwardToLeader(_)))) => {
                return Some(restore(self.batch, &self.command));
            }
            Ok(Ok(Err(_)) | Err(_)) => {
                add(&self.metrics.proposals_unknown_total, self.batch.len());
                for waiting in self.batch {
                    waiting.tell(Err(ProposeError::Unknown));
                }
            }
            Err(_) => {
                add(&self.metrics.proposals_unknown_total, self.batch.len());
                for waiting in self.batch {
                    waiting.tell(Err(ProposeError::Timeout));
                }
            }
        }
        let _stopped = done.send(()).await;
        None
    }
}

/// Gives the proposals back to those who wait for them.
fn restore<R: AsyncRuntime>(mut batch: Vec<Waiting<R>>, command: &Command) -> Vec<Waiting<R>> {
    let proposals = pb::Batch::decode(command.batch.clone())
        .map(|batch| batch.proposals)
        .unwrap_or_default();
    for (waiting, proposal) in batch.iter_mut().zip(proposals) {
        waiting.proposal = proposal;
    }
    batch
}

pub(crate) fn leader_of<R: AsyncRuntime>(
    forward: ForwardToLeader<Types<R>>,
) -> Option<(ReplicaId, Node)> {
    forward.leader_id.zip(forward.leader_node)
}

fn tell_results<R: AsyncRuntime>(batch: Vec<Waiting<R>>, log_id: LogId, answer: Answer) {
    let compact_revision = answer.compact_revision;
    let mut results = answer.results.into_iter();
    for waiting in batch {
        let told = results.next().map_or(Err(ProposeError::Unknown), |result| {
            Ok(Committed {
                outcome: result.result,
                revision: result.revision,
                compact_revision,
                term: log_id.leader_id.term,
                index: log_id.index,
            })
        });
        waiting.tell(told);
    }
}
