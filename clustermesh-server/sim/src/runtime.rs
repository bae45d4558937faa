//! A deterministic runtime: one thread, a virtual clock, every choice from one seed. Tasks belong to a life of a replica, and end with it.

mod watch;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fmt,
    future::Future,
    io,
    ops::{Add, AddAssign, Sub, SubAssign},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::future::BoxFuture;
use openraft::async_runtime::{AsyncRuntime, Instant};
use openraft_rt_tokio::{TokioMpsc, TokioMutex, TokioOneshot};
use parking_lot::Mutex;
use tokio::sync::oneshot;

pub use self::watch::SimWatch;
use crate::random::Random;

/// The first instant, so that what lies before it can be named.
const EPOCH_NS: u64 = 3600 * 1_000_000_000;
/// What running a task once takes: nothing goes on for ever at one instant.
const STEP_NS: u64 = 1000;
/// The future given to [`block_on`].
const ROOT: u64 = 0;

/// One run of a replica, from its start to its crash.
pub type Life = u64;
/// The life that does not end: the world around the replicas.
pub const WORLD: Life = 0;

struct TaskWaker {
    id: u64,
    queued: AtomicBool,
    ready: Arc<Mutex<Vec<u64>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.ready.lock().push(self.id);
        }
    }
}

struct Task {
    life: Life,
    future: BoxFuture<'static, ()>,
    waker: Arc<TaskWaker>,
}

struct Executor {
    now_ns: u64,
    random: Random,
    trace: u64,
    steps: u64,
    ready: Arc<Mutex<Vec<u64>>>,
    tasks: BTreeMap<u64, Task>,
    timers: BTreeMap<(u64, u64), Waker>,
    next_id: u64,
    life: Life,
    alive: BTreeSet<Life>,
}

thread_local! {
    static EXECUTOR: RefCell<Option<Executor>> = const { RefCell::new(None) };
}

/// What `access` returns must hold no task: dropping one comes back here.
fn with<T>(access: impl FnOnce(&mut Executor) -> T) -> Option<T> {
    EXECUTOR.with_borrow_mut(|executor| executor.as_mut().map(access))
}

impl Executor {
    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn waker(&self, id: u64) -> Arc<TaskWaker> {
        Arc::new(TaskWaker {
            id,
            queued: AtomicBool::new(false),
            ready: self.ready.clone(),
        })
    }

    fn note(&mut self, what: u64) {
        self.trace = (self.trace ^ what)
            .wrapping_mul(0x0100_0000_01b3)
            .rotate_left(17);
    }
}

/// Notes something that happened in the trace of this run.
pub fn trace(what: u64) {
    with(|executor| executor.note(what));
}

/// What happened so far, as one number: the same for the same seed.
#[must_use]
pub fn trace_hash() -> u64 {
    with(|executor| executor.trace).unwrap_or(0)
}

/// Tasks that were run so far.
#[must_use]
pub fn steps() -> u64 {
    with(|executor| executor.steps).unwrap_or(0)
}

/// Time since the run began.
#[must_use]
pub fn elapsed() -> Duration {
    Duration::from_nanos(with(|executor| executor.now_ns - EPOCH_NS).unwrap_or(0))
}

/// Draws from the seed.
pub fn draw<T: Default>(draw: impl FnOnce(&mut Random) -> T) -> T {
    with(|executor| draw(&mut executor.random)).unwrap_or_default()
}

/// Begins a life.
#[must_use]
pub fn begin_life() -> Life {
    with(|executor| {
        let life = executor.new_id();
        executor.alive.insert(life);
        life
    })
    .unwrap_or(WORLD)
}

/// The life of the task that runs.
#[must_use]
pub fn current_life() -> Life {
    with(|executor| executor.life).unwrap_or(WORLD)
}

/// Whether a life has not ended.
#[must_use]
pub fn is_alive(life: Life) -> bool {
    with(|executor| executor.alive.contains(&life)).unwrap_or(false)
}

/// Ends a life and all its tasks, wherever they are.
pub fn end_life(life: Life) {
    let ended = with(|executor| {
        executor.alive.remove(&life);
        let mut ended = Vec::new();
        let tasks = std::mem::take(&mut executor.tasks);
        for (id, task) in tasks {
            if task.life == life {
                ended.push(task);
            } else {
                executor.tasks.insert(id, task);
            }
        }
        ended
    });
    drop(ended);
}

/// Starts a task of `life`; gone at once when that life has ended.
pub fn spawn_in<T: Send + 'static>(
    life: Life,
    future: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let (sender, receiver) = oneshot::channel();
    let future = async move {
        // Whoever started it need not wait for it.
        drop(sender.send(future.await));
    };
    let mut future: Option<BoxFuture<'static, ()>> = Some(Box::pin(future));
    with(|executor| {
        if !executor.alive.contains(&life) {
            return;
        }
        let id = executor.new_id();
        let waker = executor.waker(id);
        waker.wake_by_ref();
        if let Some(future) = future.take() {
            executor.tasks.insert(
                id,
                Task {
                    life,
                    future,
                    waker,
                },
            );
        }
    });
    drop(future);
    JoinHandle(receiver)
}

/// Takes the executor away at the end of a run, also of one that panics.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        let tasks = with(|executor| {
            executor.alive.clear();
            std::mem::take(&mut executor.tasks)
        });
        drop(tasks);
        let executor = EXECUTOR.with_borrow_mut(Option::take);
        drop(executor);
    }
}

/// Runs `future` and what it starts until it is done.
///
/// # Panics
/// When nothing can happen any more; and a panic of any task ends the run.
pub fn block_on<T>(seed: u64, future: impl Future<Output = T>) -> T {
    let executor = Executor {
        now_ns: EPOCH_NS,
        random: Random::new(seed),
        trace: 0xcbf2_9ce4_8422_2325,
        steps: 0,
        ready: Arc::default(),
        tasks: BTreeMap::new(),
        timers: BTreeMap::new(),
        next_id: ROOT,
        life: WORLD,
        alive: BTreeSet::from([WORLD]),
    };
    let root = executor.waker(ROOT);
    root.wake_by_ref();
    EXECUTOR.with_borrow_mut(|slot| {
        assert!(slot.is_none(), "a simulation runs in this thread already");
        *slot = Some(executor);
    });
    let _running = Running;
    let mut future = pin!(future);
    let root_waker = Waker::from(root.clone());
    loop {
        match next_task() {
            Some(ROOT) => {
                root.queued.store(false, Ordering::Relaxed);
                with(|executor| executor.life = WORLD);
                let polled = future.as_mut().poll(&mut Context::from_waker(&root_waker));
                if let Poll::Ready(value) = polled {
                    return value;
                }
            }
            Some(id) => run_task(id),
            None => assert!(
                advance_clock(),
                "nothing can happen any more: every task waits for another"
            ),
        }
    }
}

fn next_task() -> Option<u64> {
    with(|executor| {
        let ready = executor.ready.clone();
        let mut ready = ready.lock();
        if ready.is_empty() {
            return None;
        }
        let place = executor.random.place(ready.len());
        let id = ready.swap_remove(place);
        executor.now_ns += STEP_NS;
        executor.steps += 1;
        let now_ns = executor.now_ns;
        executor.note(id ^ now_ns);
        Some(id)
    })
    .flatten()
}

fn run_task(id: u64) {
    let task = with(|executor| {
        let task = executor.tasks.remove(&id)?;
        executor.life = task.life;
        Some(task)
    })
    .flatten();
    let Some(mut task) = task else {
        return;
    };
    task.waker.queued.store(false, Ordering::Relaxed);
    let waker = Waker::from(task.waker.clone());
    let polled = task.future.as_mut().poll(&mut Context::from_waker(&waker));
    let mut left = polled.is_pending().then_some(task);
    with(|executor| {
        executor.life = WORLD;
        if left
            .as_ref()
            .is_some_and(|task| executor.alive.contains(&task.life))
            && let Some(task) = left.take()
        {
            executor.tasks.insert(id, task);
        }
    });
    drop(left);
}

/// Goes on to the next deadline.
fn advance_clock() -> bool {
    let due = with(|executor| {
        let ((at, _), first) = executor.timers.pop_first()?;
        executor.now_ns = executor.now_ns.max(at);
        let mut due = vec![first];
        while let Some(entry) = executor.timers.first_entry() {
            if entry.key().0 > executor.now_ns {
                break;
            }
            due.push(entry.remove());
        }
        Some(due)
    })
    .flatten();
    let Some(due) = due else {
        return false;
    };
    due.into_iter().for_each(Waker::wake);
    true
}

/// The runtime for openraft and for our replicas.
#[derive(Debug)]
pub struct SimRuntime;

/// Virtual time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SimInstant(u64);

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}

impl Add<Duration> for SimInstant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

impl AddAssign<Duration> for SimInstant {
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}

impl Sub<Duration> for SimInstant {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

impl SubAssign<Duration> for SimInstant {
    fn sub_assign(&mut self, duration: Duration) {
        *self = *self - duration;
    }
}

impl Sub<Self> for SimInstant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Instant for SimInstant {
    fn now() -> Self {
        Self(with(|executor| executor.now_ns).unwrap_or(EPOCH_NS))
    }
}

/// Waits for an instant.
#[derive(Debug)]
pub struct Sleep {
    until: SimInstant,
    timer: Option<(u64, u64)>,
}

impl Sleep {
    const fn new(until: SimInstant) -> Self {
        Self { until, timer: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let until = self.until;
        let known = self.timer;
        let waker = context.waker().clone();
        let timer = with(|executor| {
            if executor.now_ns >= until.0 {
                return (None, known.and_then(|key| executor.timers.remove(&key)));
            }
            let key = known.unwrap_or_else(|| (until.0, executor.new_id()));
            (Some(key), executor.timers.insert(key, waker))
        });
        let Some((timer, _old_waker)) = timer else {
            return Poll::Pending;
        };
        self.timer = timer;
        if timer.is_some() {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.timer.take() {
            let waker = with(|executor| executor.timers.remove(&key));
            drop(waker);
        }
    }
}

/// The time was up.
#[derive(Debug, Clone, Copy)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the time was up")
    }
}

/// A future with a deadline.
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    sleep: Sleep,
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(value) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(value));
        }
        Pin::new(&mut self.sleep)
            .poll(context)
            .map(|()| Err(Elapsed))
    }
}

/// Why a task has no value: its life ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended;

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the task ended with its replica")
    }
}

/// Waits for a task, which goes on without it too.
pub struct JoinHandle<T>(oneshot::Receiver<T>);

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, Ended>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0)
            .poll(context)
            .map(|value| value.map_err(|_| Ended))
    }
}

/// Draws from the seed of the run.
#[derive(Debug, Clone, Copy)]
pub struct SimRng;

impl rand::rand_core::TryRng for SimRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        let [a, b, c, d, ..] = draw(Random::number).to_le_bytes();
        Ok(u32::from_le_bytes([a, b, c, d]))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(draw(Random::number))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for chunk in bytes.chunks_mut(8) {
            for (byte, drawn) in chunk.iter_mut().zip(draw(Random::number).to_le_bytes()) {
                *byte = drawn;
            }
        }
        Ok(())
    }
}

impl AsyncRuntime for SimRuntime {
    type JoinError = Ended;
    type JoinHandle<T: Send + 'static> = JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = SimInstant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + Send> = Timeout<T>;
    type ThreadLocalRng = SimRng;
    type Mpsc = TokioMpsc;
    type Watch = SimWatch;
    type Oneshot = TokioOneshot;
    type Mutex<T: Send + 'static> = TokioMutex<T>;

    fn spawn<T>(future: T) -> JoinHandle<T::Output>
    where
        T: Future + Send + 'static,
        T::Output: Send + 'static,
    {
        spawn_in(current_life(), future)
    }

    fn sleep(duration: Duration) -> Sleep {
        Sleep::new(SimInstant::now() + duration)
    }

    fn sleep_until(deadline: SimInstant) -> Sleep {
        Sleep::new(deadline)
    }

    fn timeout<R, F: Future<Output = R> + Send>(duration: Duration, future: F) -> Timeout<F> {
        Self::timeout_at(SimInstant::now() + duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + Send>(deadline: SimInstant, future: F) -> Timeout<F> {
        Timeout {
            future: Box::pin(future),
            sleep: Sleep::new(deadline),
        }
    }

    fn is_panic(_: &Ended) -> bool {
        false
    }

    fn thread_rng() -> SimRng {
        SimRng
    }

    fn new(_threads: usize) -> Self {
        Self
    }

    fn block_on<F: Future<Output = T>, T>(&mut self, future: F) -> T {
        block_on(0, future)
    }

    async fn spawn_blocking<F, T>(work: F) -> Result<T, io::Error>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        Ok(work())
    }
}

#[cfg(test)]
mod tests;
