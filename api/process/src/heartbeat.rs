//! Liveness: every loop of a process beats, and one that has been silent for too long is stuck.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The loops of a process; clones share them.
#[derive(Debug, Clone)]
pub struct Heartbeats {
    silence_max: Duration,
    loops: Arc<Mutex<Loops>>,
}

#[derive(Debug, Default)]
struct Loops {
    next: u64,
    beats: BTreeMap<u64, (&'static str, Instant)>,
}

/// One loop. Dropping it says that the loop has ended, which is no fault.
#[derive(Debug)]
#[must_use = "a loop that is dropped is not watched"]
pub struct Heartbeat {
    id: u64,
    loops: Arc<Mutex<Loops>>,
}

impl Heartbeats {
    /// No loops yet; one that is silent for longer than `silence_max` will count as stuck.
    #[must_use]
    pub fn new(silence_max: Duration) -> Self {
        Self {
            silence_max,
            loops: Arc::default(),
        }
    }

    /// Watches a loop from now on.
    pub fn watch(&self, name: &'static str) -> Heartbeat {
        let mut loops = lock(&self.loops);
        let id = loops.next;
        loops.next += 1;
        loops.beats.insert(id, (name, Instant::now()));
        Heartbeat {
            id,
            loops: Arc::clone(&self.loops),
        }
    }

    /// Whether every loop goes round at `now`. Never waits for one of them.
    ///
    /// # Errors
    /// Names the loops that are stuck, and for how long.
    pub fn check(&self, now: Instant) -> Result<(), String> {
        let stuck: Vec<String> = lock(&self.loops)
            .beats
            .values()
            .map(|(name, last)| (name, now.saturating_duration_since(*last)))
            .filter(|(_, silence)| *silence > self.silence_max)
            .map(|(name, silence)| format!("{name} has been stuck for {} s", silence.as_secs()))
            .collect();
        if stuck.is_empty() {
            Ok(())
        } else {
            Err(stuck.join(", "))
        }
    }
}

impl Heartbeat {
    /// The loop goes round.
    pub fn beat(&self) {
        if let Some((_, last)) = lock(&self.loops).beats.get_mut(&self.id) {
            *last = Instant::now();
        }
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        lock(&self.loops).beats.remove(&self.id);
    }
}

fn lock(loops: &Mutex<Loops>) -> MutexGuard<'_, Loops> {
    loops.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_loop_is_named_until_it_beats_or_ends() {
        let heartbeats = Heartbeats::new(Duration::from_secs(60));
        let main = heartbeats.watch("main loop");
        let records = heartbeats.watch("record stream");
        let late = Instant::now() + Duration::from_secs(90);
        assert_eq!(heartbeats.check(Instant::now()), Ok(()));
        let stuck = heartbeats.check(late).unwrap_err();
        assert!(
            stuck.contains("main loop has been stuck for") && stuck.contains("record stream"),
            "{stuck}"
        );
        drop(records);
        assert!(!heartbeats.check(late).unwrap_err().contains("record"));
        let beaten = Instant::now();
        main.beat();
        assert_eq!(heartbeats.check(beaten + Duration::from_secs(60)), Ok(()));
        drop(main);
        assert_eq!(heartbeats.check(late), Ok(()));
    }
}
