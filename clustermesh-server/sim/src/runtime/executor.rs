//! Runs tasks in an order decided by the seed, and moves the clock when none can run.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    panic::Location,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{Pulse, Watchdog};
use crate::random::Random;

/// The first instant, so that what lies before it can be named.
pub(super) const EPOCH_NS: u64 = 3600 * 1_000_000_000;
/// What running a task once takes: nothing goes on for ever at one instant.
const STEP_NS: u64 = 1000;
/// The future given to [`block_on`].
const ROOT: u64 = 0;
/// Tasks run in one run, most: a run ends, or something in it turns in circles.
const MAX_STEPS: u64 = 100_000_000;
/// A single step takes less, of real time, on the busiest machine.
const STUCK_AFTER: Duration = Duration::from_secs(60);
/// Places told of a run that is stuck, most.
const MAX_PLACES_TOLD: usize = 20;
/// Clock rates are in parts per million.
const MILLION: i128 = 1_000_000;

/// One run of a replica, from its start to its crash.
pub type Life = u64;
/// The life that does not end: the world around the replicas.
pub const WORLD: Life = 0;

type Origin = &'static Location<'static>;

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
    origin: Origin,
    future: BoxFuture<'static, ()>,
    waker: Arc<TaskWaker>,
}

pub(super) struct Executor {
    pub(super) now_ns: u64,
    random: Random,
    trace: u64,
    steps: u64,
    ready: Arc<Mutex<Vec<u64>>>,
    tasks: BTreeMap<u64, Task>,
    pub(super) timers: BTreeMap<(u64, u64), Waker>,
    next_id: u64,
    life: Life,
    alive: BTreeSet<Life>,
    /// Lives that stand still, with their tasks that could run.
    paused: BTreeMap<Life, Vec<u64>>,
    /// How much faster than the world's a life's clock runs, parts per million.
    rates: BTreeMap<Life, i64>,
    /// How often tasks from each place ran.
    busy: BTreeMap<(&'static str, u32), u64>,
    pulse: Arc<Pulse>,
}

thread_local! {
    static EXECUTOR: RefCell<Option<Executor>> = const { RefCell::new(None) };
}

/// What `access` returns must hold no task: dropping one comes back here.
pub(super) fn with<T>(access: impl FnOnce(&mut Executor) -> T) -> Option<T> {
    EXECUTOR.with_borrow_mut(|executor| executor.as_mut().map(access))
}

impl Executor {
    pub(super) fn new_id(&mut self) -> u64 {
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

    fn rate(&self) -> i128 {
        self.rates.get(&self.life).copied().unwrap_or(0).into()
    }

    /// What the clock of the life that runs shows.
    pub(super) fn local_now_ns(&self) -> u64 {
        let since = i128::from(self.now_ns - EPOCH_NS);
        let local = since + since * self.rate() / MILLION;
        EPOCH_NS + u64::try_from(local).unwrap_or(0)
    }

    /// When the clock of the life that runs shows `local_ns`; never too early.
    pub(super) fn global_ns(&self, local_ns: u64) -> u64 {
        let since = i128::from(local_ns.saturating_sub(EPOCH_NS));
        let rate = MILLION + self.rate();
        let global = (since * MILLION).div_euclid(rate) + i128::from(self.rate() != 0);
        EPOCH_NS.saturating_add(u64::try_from(global).unwrap_or(u64::MAX))
    }

    /// Places where tasks that wait were started, the most frequent first.
    fn waiting(&self) -> String {
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for task in self.tasks.values() {
            *places
                .entry(format!("life {} at {}", task.life, task.origin))
                .or_default() += 1;
        }
        let mut places: Vec<_> = places.into_iter().collect();
        places.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let told: Vec<String> = places
            .iter()
            .take(MAX_PLACES_TOLD)
            .map(|(place, count)| format!("{count} of {place}"))
            .collect();
        told.join("; ")
    }

    fn busiest(&self) -> String {
        let mut places: Vec<_> = self.busy.iter().collect();
        places.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let told: Vec<String> = places
            .iter()
            .take(MAX_PLACES_TOLD)
            .map(|((file, line), count)| format!("{count} steps at {file}:{line}"))
            .collect();
        told.join("; ")
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

/// Time since the run began, on the world's clock.
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

/// Lets the clock of a life run faster by `ppm` parts per million, or slower; before its first task.
pub fn set_clock_rate(life: Life, ppm: i64) {
    with(|executor| executor.rates.insert(life, ppm));
}

/// No task of a life runs until [`resume_life`]; its clock goes on.
pub fn pause_life(life: Life) {
    with(|executor| {
        if executor.alive.contains(&life) {
            executor.paused.entry(life).or_default();
        }
    });
}

/// A paused life goes on.
pub fn resume_life(life: Life) {
    with(|executor| {
        let stopped = executor.paused.remove(&life).unwrap_or_default();
        executor.ready.lock().extend(stopped);
    });
}

/// Ends a life and all its tasks, wherever they are.
pub fn end_life(life: Life) {
    let ended = with(|executor| {
        executor.alive.remove(&life);
        executor.paused.remove(&life);
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

/// Starts a task of `life`; gone at once when that life has ended.
#[track_caller]
pub fn spawn_in<T: Send + 'static>(
    life: Life,
    future: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let origin = Location::caller();
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
                    origin,
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

/// Runs `future` and what it starts until it is done. A run that stands still in one task for a minute of real time ends the process.
///
/// # Panics
/// When nothing can happen any more, or the run does not end; and a panic of any task ends the run.
#[track_caller]
pub fn block_on<T>(seed: u64, future: impl Future<Output = T>) -> T {
    let origin = Location::caller();
    let pulse = Arc::new(Pulse::default());
    let _watchdog = Watchdog::start(pulse.clone(), STUCK_AFTER, move |place| {
        eprintln!("seed {seed}: {place}");
        // The thread that runs the simulation does not come back.
        std::process::abort();
    });
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
        paused: BTreeMap::new(),
        rates: BTreeMap::new(),
        busy: BTreeMap::new(),
        pulse: pulse.clone(),
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
                pulse.beat(WORLD, origin);
                with(|executor| executor.life = WORLD);
                let polled = future.as_mut().poll(&mut Context::from_waker(&root_waker));
                if let Poll::Ready(value) = polled {
                    return value;
                }
            }
            Some(id) => run_task(id),
            None => {
                if !advance_clock() {
                    let waiting = with(|executor| executor.waiting()).unwrap_or_default();
                    panic!(
                        "stuck: nothing can happen any more, every task waits for another: {waiting}"
                    );
                }
            }
        }
    }
}

fn next_task() -> Option<u64> {
    let (next, steps) = with(|executor| {
        let ready = executor.ready.clone();
        let mut ready = ready.lock();
        loop {
            if ready.is_empty() {
                return (None, executor.steps);
            }
            let place = executor.random.place(ready.len());
            let id = ready.swap_remove(place);
            let life = executor.tasks.get(&id).map(|task| task.life);
            if let Some(stopped) = life.and_then(|life| executor.paused.get_mut(&life)) {
                stopped.push(id);
                continue;
            }
            executor.now_ns += STEP_NS;
            executor.steps += 1;
            let now_ns = executor.now_ns;
            executor.note(id ^ now_ns);
            return (Some(id), executor.steps);
        }
    })?;
    if steps > MAX_STEPS {
        let busiest = with(|executor| executor.busiest()).unwrap_or_default();
        panic!("stuck: the run does not end after {steps} steps: {busiest}");
    }
    next
}

fn run_task(id: u64) {
    let task = with(|executor| {
        let task = executor.tasks.remove(&id)?;
        executor.life = task.life;
        executor.pulse.beat(task.life, task.origin);
        let place = (task.origin.file(), task.origin.line());
        *executor.busy.entry(place).or_default() += 1;
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
