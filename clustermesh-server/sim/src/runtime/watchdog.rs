//! Notices a run that stands still: a task that blocks its thread or never returns cannot be noticed by that thread.

use std::{
    panic::Location,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// How often a run is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// What a run shows of itself.
#[derive(Debug, Default)]
pub struct Pulse {
    steps: AtomicU64,
    running: Mutex<Option<(u64, &'static Location<'static>)>>,
}

impl Pulse {
    /// A task of `life`, started at `origin`, runs now.
    pub(super) fn beat(&self, life: u64, origin: &'static Location<'static>) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        *self.running.lock() = Some((life, origin));
    }

    fn running(&self) -> String {
        self.running.lock().map_or_else(
            || "before its first task".to_owned(),
            |(life, origin)| format!("in a task of life {life} that was started at {origin}"),
        )
    }
}

/// Looks at a run from another thread until it is dropped.
pub struct Watchdog {
    done: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watchdog {
    /// Calls `stuck` with where the run is, once, when it made no step for `patience` of real time.
    pub fn start(
        pulse: Arc<Pulse>,
        patience: Duration,
        stuck: impl FnOnce(String) + Send + 'static,
    ) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let over = done.clone();
        let look = move || {
            let mut last = (pulse.steps.load(Ordering::Relaxed), Instant::now());
            while !over.load(Ordering::Acquire) {
                thread::park_timeout(LOOK_INTERVAL);
                let steps = pulse.steps.load(Ordering::Relaxed);
                if steps != last.0 {
                    last = (steps, Instant::now());
                } else if last.1.elapsed() >= patience {
                    stuck(format!(
                        "stuck for {patience:?} after {steps} steps, {}",
                        pulse.running()
                    ));
                    return;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("watchdog".to_owned())
            .spawn(look)
            .ok();
        Self { done, thread }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It cannot have panicked but in `stuck`, which was told.
            let _ended = thread.join();
        }
    }
}
