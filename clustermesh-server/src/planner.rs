//! Runs the pure planners: in one task, on the newest state, many plans in one transaction, again when a guard fails.

use std::fmt;
use std::future::Future;

use clustermesh_mesh::allocate::Plan;
use clustermesh_mesh::{ClusterIndex, Draft, Step, Txn, View};
use tokio::sync::{mpsc, oneshot};
use tonic::{Code, Status};

use crate::store::Store;
use crate::view::IndexedView;

/// Plans are made again so often when others change what they were made on.
pub const MAX_PLAN_ATTEMPTS: usize = 16;
/// Plans that wait for their turn; more wait at the sender.
pub const MAX_WAITING_PLANS: usize = 1_024;
/// Plans of one transaction.
const MAX_BATCH_PLANS: usize = 512;
/// A transaction takes no further plan once it writes so many keys.
const MAX_BATCH_KEYS: usize = 4_096;
/// Or once it has about so many bytes; one entry of the log takes four times that.
const MAX_BATCH_BYTES: usize = 1 << 20;

/// The one place from which planned transactions are proposed; clones share it.
#[derive(Debug, Clone)]
pub struct Planner {
    jobs: mpsc::Sender<Box<dyn Job>>,
}

/// A plan that was carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done<T> {
    /// What the planner promised.
    pub result: T,
    /// The revision at which it is true.
    pub revision: i64,
}

/// Why a plan was not carried out.
#[derive(Debug)]
pub enum CommitError<E> {
    /// The planner said no.
    Refused(E),
    /// The store could not commit.
    Store(Status),
}

impl<E: fmt::Display> From<CommitError<E>> for Status {
    fn from(error: CommitError<E>) -> Self {
        match error {
            CommitError::Refused(error) => Self::failed_precondition(error.to_string()),
            CommitError::Store(status) => status,
        }
    }
}

/// A plan with its planner's and its waiter's types erased.
trait Job: Send {
    /// Plans on `view`; the outcome is kept until `finish` or `advance`.
    fn plan(&mut self, view: &dyn View, now_unix_ms: i64) -> Txn;
    /// Whether what was planned last is not all: the job keeps its place, and nobody overtakes it.
    fn has_more(&self) -> bool {
        false
    }
    /// What was planned last is committed: the next `plan` goes on behind it.
    fn advance(&mut self) {}
    /// Answers the waiter.
    fn finish(self: Box<Self>, committed: Result<i64, Status>);
}

struct TypedJob<T, E, F> {
    plan: F,
    outcome: Option<Result<T, E>>,
    reply: oneshot::Sender<Result<Done<T>, CommitError<E>>>,
}

impl<T, E, F> Job for TypedJob<T, E, F>
where
    T: Send,
    E: Send,
    F: Fn(&dyn View, i64) -> Result<Plan<T>, E> + Send,
{
    fn plan(&mut self, view: &dyn View, now_unix_ms: i64) -> Txn {
        match (self.plan)(view, now_unix_ms) {
            Ok(Plan { txn, result }) => {
                self.outcome = Some(Ok(result));
                txn
            }
            Err(error) => {
                self.outcome = Some(Err(error));
                Txn::new()
            }
        }
    }

    fn finish(self: Box<Self>, committed: Result<i64, Status>) {
        let answer = match (committed, self.outcome) {
            (Ok(_), Some(Err(error))) => Err(CommitError::Refused(error)),
            (Ok(revision), Some(Ok(result))) => Ok(Done { result, revision }),
            (Err(status), _) => Err(CommitError::Store(status)),
            (Ok(_), None) => Err(CommitError::Store(Status::internal("a plan was not made"))),
        };
        // The waiter may have given up.
        let _ = self.reply.send(answer);
    }
}

/// A job of several transactions, each on the state that the one before left.
struct SteppedJob<T, P, E, F> {
    plan: F,
    progress: P,
    outcome: Option<Result<Step<T, P>, E>>,
    reply: oneshot::Sender<Result<Done<T>, CommitError<E>>>,
}

impl<T, P, E, F> Job for SteppedJob<T, P, E, F>
where
    T: Send,
    P: Send,
    E: Send,
    F: Fn(&dyn View, i64, &P) -> Result<Plan<Step<T, P>>, E> + Send,
{
    fn plan(&mut self, view: &dyn View, now_unix_ms: i64) -> Txn {
        match (self.plan)(view, now_unix_ms, &self.progress) {
            Ok(Plan { txn, result }) => {
                self.outcome = Some(Ok(result));
                txn
            }
            Err(error) => {
                self.outcome = Some(Err(error));
                Txn::new()
            }
        }
    }

    fn has_more(&self) -> bool {
        matches!(self.outcome, Some(Ok(Step::More(_))))
    }

    fn advance(&mut self) {
        if let Some(Ok(Step::More(progress))) = self.outcome.take() {
            self.progress = progress;
        }
    }

    fn finish(self: Box<Self>, committed: Result<i64, Status>) {
        let answer = match (committed, self.outcome) {
            (Ok(_), Some(Err(error))) => Err(CommitError::Refused(error)),
            (Ok(revision), Some(Ok(Step::Done(result)))) => Ok(Done { result, revision }),
            (Err(status), _) => Err(CommitError::Store(status)),
            (Ok(_), Some(Ok(Step::More(_))) | None) => {
                Err(CommitError::Store(Status::internal("a plan was not made")))
            }
        };
        // The waiter may have given up.
        let _ = self.reply.send(answer);
    }
}

impl Planner {
    /// Starts the task that proposes to `store`, which is cluster `cluster`'s; it ends with the last clone.
    #[must_use]
    pub fn start(store: Store, cluster: &str) -> Self {
        let (jobs, queue) = mpsc::channel(MAX_WAITING_PLANS);
        let cluster = cluster.to_owned();
        tokio::spawn(run(store, cluster, queue));
        Self { jobs }
    }

    /// Queues a plan; plans are carried out in the order in which this returns. The returned future waits for the outcome.
    ///
    /// # Errors
    /// `Unavailable` when the server stops.
    pub async fn submit<T, E, F>(
        &self,
        plan: F,
    ) -> Result<impl Future<Output = Result<Done<T>, CommitError<E>>> + Send + use<T, E, F>, Status>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: Fn(&dyn View, i64) -> Result<Plan<T>, E> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = TypedJob {
            plan,
            outcome: None,
            reply,
        };
        self.queue(Box::new(job)).await?;
        Ok(answered(answer))
    }

    /// [`Self::submit`] of a plan that may take several transactions. Plans behind it wait for its last one.
    ///
    /// # Errors
    /// `Unavailable` when the server stops.
    pub async fn submit_steps<T, P, E, F>(
        &self,
        plan: F,
    ) -> Result<
        impl Future<Output = Result<Done<T>, CommitError<E>>> + Send + use<T, P, E, F>,
        Status,
    >
    where
        T: Send + 'static,
        P: Default + Send + 'static,
        E: Send + 'static,
        F: Fn(&dyn View, i64, &P) -> Result<Plan<Step<T, P>>, E> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job = SteppedJob {
            plan,
            progress: P::default(),
            outcome: None,
            reply,
        };
        self.queue(Box::new(job)).await?;
        Ok(answered(answer))
    }

    async fn queue(&self, job: Box<dyn Job>) -> Result<(), Status> {
        self.jobs.send(job).await.map_err(|_| stopped())
    }

    /// [`Self::submit`] and wait. `plan` also gets the wall clock, ms since 1970.
    ///
    /// # Errors
    /// The planner's refusal, or why the store did not commit.
    pub async fn commit<T, E, F>(&self, plan: F) -> Result<Done<T>, CommitError<E>>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: Fn(&dyn View, i64) -> Result<Plan<T>, E> + Send + 'static,
    {
        self.submit(plan).await.map_err(CommitError::Store)?.await
    }
}

fn stopped() -> Status {
    Status::unavailable("etcdserver: server stopped")
}

async fn answered<T, E>(
    answer: oneshot::Receiver<Result<Done<T>, CommitError<E>>>,
) -> Result<Done<T>, CommitError<E>> {
    answer
        .await
        .unwrap_or_else(|_| Err(CommitError::Store(stopped())))
}

async fn run(store: Store, cluster: String, mut queue: mpsc::Receiver<Box<dyn Job>>) {
    let mut waiting: Vec<Box<dyn Job>> = Vec::new();
    let mut index = ClusterIndex::new(&cluster);
    loop {
        if waiting.is_empty() && queue.recv_many(&mut waiting, MAX_BATCH_PLANS).await == 0 {
            return;
        }
        let (mut taken, outcome) = commit_some(&store, &cluster, &mut index, &mut waiting).await;
        if outcome.is_ok()
            && let Some(last) = taken.checked_sub(1)
            && let Some(job) = waiting.get_mut(last).filter(|job| job.has_more())
        {
            job.advance();
            taken = last;
        }
        for job in waiting.drain(..taken) {
            job.finish(outcome.clone());
        }
    }
}

/// Commits the first plans of `jobs` in one transaction; how many, and its revision.
async fn commit_some(
    store: &Store,
    cluster: &str,
    index: &mut ClusterIndex,
    jobs: &mut [Box<dyn Job>],
) -> (usize, Result<i64, Status>) {
    let mut most = jobs.len();
    // What a client was told before must be in the state that is planned on.
    if let Err(status) = store.linearize().await {
        return (jobs.len(), Err(status));
    }
    for _ in 0..MAX_PLAN_ATTEMPTS {
        let now = clustermesh_raft::wall_clock();
        let (txn, taken, revision) = store.read(|state| {
            let (txn, taken) = plan_batch(
                &IndexedView::new(state, cluster, index),
                jobs.get_mut(..most).unwrap_or_default(),
                now,
            );
            (txn, taken, state.revision())
        });
        if txn.is_empty() {
            return (taken, Ok(revision));
        }
        match store.txn_planned(txn.into_request()).await {
            Ok(response) if response.succeeded => {
                let revision = response.header.map_or(revision, |header| header.revision);
                return (taken, Ok(revision));
            }
            Ok(_) => {}
            // Together they are too large for one entry: one after the other.
            Err(status) if status.code() == Code::InvalidArgument && taken > 1 => most = 1,
            Err(status) => return (taken, Err(status)),
        }
    }
    let status = Status::aborted(format!(
        "other clients keep changing the same records; gave up after {MAX_PLAN_ATTEMPTS} attempts"
    ));
    (most.max(1).min(jobs.len()), Err(status))
}

/// Each plan is made on what the ones before it leave.
fn plan_batch(view: &dyn View, jobs: &mut [Box<dyn Job>], now_unix_ms: i64) -> (Txn, usize) {
    let mut draft = Draft::new(view);
    let (mut taken, mut bytes) = (0, 0);
    for job in jobs {
        let txn = job.plan(&draft, now_unix_ms);
        bytes += txn.approximate_bytes();
        draft.absorb(txn);
        taken += 1;
        if draft.writes() >= MAX_BATCH_KEYS || bytes >= MAX_BATCH_BYTES || job.has_more() {
            break;
        }
    }
    (draft.into_txn(), taken)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use clustermesh_mesh::{Guard, MapView};

    use super::*;

    fn counter(reply: oneshot::Sender<Result<Done<usize>, CommitError<String>>>) -> Box<dyn Job> {
        Box::new(TypedJob {
            plan: |view: &dyn View, _| {
                let mut draft = Draft::new(view);
                draft.guard("counter");
                let value = draft.get(b"counter").map_or(0, |kv| kv.value.len()) + 1;
                if value > 3 {
                    return Err("full".to_owned());
                }
                draft.put("counter", vec![b'x'; value]);
                Ok(Plan {
                    txn: draft.into_txn(),
                    result: value,
                })
            },
            outcome: None,
            reply,
        })
    }

    #[test]
    fn a_plan_of_several_steps_is_not_overtaken() {
        let (reply, mut answer) = oneshot::channel::<Result<Done<&str>, CommitError<String>>>();
        let stepped = SteppedJob {
            plan: |_: &dyn View, _, done: &usize| {
                let mut txn = Txn::new();
                txn.put(format!("step-{done}"), "x");
                let result = match done {
                    2 => Step::Done("all"),
                    _ => Step::More(done + 1),
                };
                Ok(Plan { txn, result })
            },
            progress: 0,
            outcome: None,
            reply,
        };
        let (other, _answer) = oneshot::channel();
        let mut jobs: Vec<Box<dyn Job>> = vec![Box::new(stepped), counter(other)];
        let mut view = MapView::new();
        for step in 0..2 {
            let (txn, taken) = plan_batch(&view, &mut jobs, 0);
            assert_eq!((taken, txn.writes().len()), (1, 1), "step {step}");
            assert!(jobs[0].has_more());
            // Planned again, as after a failed guard, it is the same step.
            assert_eq!(plan_batch(&view, &mut jobs, 0).0, txn);
            jobs[0].advance();
            view.apply(txn.writes().clone());
        }
        let (txn, taken) = plan_batch(&view, &mut jobs, 0);
        assert_eq!((taken, txn.writes().len()), (2, 2));
        jobs.remove(0).finish(Ok(7));
        assert!(matches!(
            answer.try_recv().unwrap(),
            Ok(Done {
                result: "all",
                revision: 7
            })
        ));
    }

    #[test]
    fn plans_of_one_batch_see_each_other_and_share_a_transaction_that_holds() {
        let mut view = MapView::new();
        view.put("other", "1");
        let (mut jobs, mut answers) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let (reply, answer) = oneshot::channel();
            jobs.push(counter(reply));
            answers.push(answer);
        }
        let (txn, taken) = plan_batch(&view, &mut jobs, 0);
        assert_eq!(taken, 5);
        assert!(txn.holds(&view));
        assert!(txn.guards().iter().eq([&Guard::Absent("counter".into())]));
        assert_eq!(
            txn.writes()
                .get(&Bytes::from_static(b"counter"))
                .unwrap()
                .as_ref()
                .unwrap()
                .len(),
            3
        );
        for job in jobs {
            job.finish(Ok(9));
        }
        let results: Vec<_> = answers
            .iter_mut()
            .map(|answer| answer.try_recv().unwrap())
            .collect();
        assert!(matches!(
            &results[2],
            Ok(Done {
                result: 3,
                revision: 9
            })
        ));
        assert!(matches!(&results[3], Err(CommitError::Refused(reason)) if reason == "full"));
    }
}
