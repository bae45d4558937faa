//! Virtual time, as the clock of a life shows it.

use std::{
    fmt,
    future::Future,
    ops::{Add, AddAssign, Sub, SubAssign},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use super::{
    Instant,
    executor::{EPOCH_NS, with},
};

/// A moment on the clock of the life that read it; those of two lives are not comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SimInstant(pub(super) u64);

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
        Self(with(|executor| executor.local_now_ns()).unwrap_or(EPOCH_NS))
    }
}

/// Waits for an instant.
#[derive(Debug)]
pub struct Sleep {
    until: SimInstant,
    timer: Option<(u64, u64)>,
}

impl Sleep {
    pub(super) const fn new(until: SimInstant) -> Self {
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
            if executor.local_now_ns() >= until.0 {
                return (None, known.and_then(|key| executor.timers.remove(&key)));
            }
            let key = known
                .filter(|(at, _)| *at > executor.now_ns)
                .unwrap_or_else(|| (executor.global_ns(until.0), executor.new_id()));
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

impl<F: Future> Timeout<F> {
    pub(super) fn new(deadline: SimInstant, future: F) -> Self {
        Self {
            future: Box::pin(future),
            sleep: Sleep::new(deadline),
        }
    }
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
