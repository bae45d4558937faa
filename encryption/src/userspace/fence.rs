//! Tells when everything that waited in the device's queues at one moment has passed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

/// Packets of the device that one worker takes for a fence at most: more than its queue holds (`tx_queue_len`, 500).
pub const FENCE_PACKETS_MAX: usize = 1_024;
/// Receive calls of one worker for a fence at most: more than its sockets' buffers hold.
pub const FENCE_RECEIVES_MAX: usize = 1_024;

/// Moments by number, and how far each worker has come.
#[derive(Debug)]
pub struct Fence {
    asked: AtomicU64,
    passed: Mutex<Vec<u64>>,
    changed: Condvar,
}

impl Fence {
    /// For so many workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self {
            asked: AtomicU64::new(0),
            passed: Mutex::new(vec![0; workers]),
            changed: Condvar::new(),
        }
    }

    /// The latest moment that somebody waits for.
    #[must_use]
    #[inline]
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Acquire)
    }

    /// This moment; the workers must be woken to see it.
    #[must_use]
    pub fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Worker `index` has nothing any more of what waited at moment `number`.
    pub fn pass(&self, index: usize, number: u64) {
        if let Some(place) = self.passed.lock().get_mut(index) {
            *place = number;
        }
        self.changed.notify_all();
    }

    /// Waits until all workers have passed moment `number`; false: they have not by the deadline.
    #[must_use]
    pub fn wait(&self, number: u64, deadline: Instant) -> bool {
        let mut passed = self.passed.lock();
        while passed.iter().any(|reached| *reached < number) {
            if self.changed.wait_until(&mut passed, deadline).timed_out() {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_moment_is_over_when_every_worker_has_passed_it_or_a_later_one() {
        let fence = Fence::new(2);
        let (first, second) = (fence.ask(), fence.ask());
        assert_eq!(fence.asked(), second);
        fence.pass(0, second);
        assert!(!fence.wait(first, Instant::now()));
        fence.pass(1, first);
        assert!(fence.wait(first, Instant::now()));
        assert!(!fence.wait(second, Instant::now()));
        std::thread::scope(|scope| {
            scope.spawn(|| fence.pass(1, second));
            assert!(fence.wait(second, Instant::now() + Duration::from_secs(30)));
        });
    }
}
