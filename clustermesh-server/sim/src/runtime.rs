//! A deterministic runtime: one thread, a virtual clock, every choice from one seed. Tasks belong to a life of a replica, and end with it.

mod executor;
mod time;
mod watch;
mod watchdog;

use std::{convert::Infallible, future::Future, io, time::Duration};

use openraft::async_runtime::{AsyncRuntime, Instant};
use openraft_rt_tokio::{TokioMpsc, TokioMutex, TokioOneshot};

pub use self::{
    executor::{
        Ended, JoinHandle, Life, WORLD, begin_life, block_on, current_life, draw, elapsed,
        end_life, is_alive, pause_life, resume_life, set_clock_rate, spawn_in, steps, trace,
        trace_hash,
    },
    time::{Elapsed, SimInstant, Sleep, Timeout},
    watch::SimWatch,
    watchdog::{Pulse, Watchdog},
};
use crate::random::Random;

/// The runtime for openraft and for our replicas.
#[derive(Debug)]
pub struct SimRuntime;

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

    #[track_caller]
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
        Timeout::new(deadline, future)
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
