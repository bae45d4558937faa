//! Connections that have not said yet who they are: bounded in number, so that those who never say it keep nobody out.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::oneshot;

/// Beginnings under way on a port; past the limit the oldest ends, which a client in earnest is not.
#[derive(Debug, Clone)]
pub struct Openings {
    state: Arc<Mutex<State>>,
    most: usize,
    evicted: Counter,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// In the order of their coming.
    open: BTreeMap<u64, oneshot::Sender<()>>,
}

/// One beginning, counted until it is dropped.
#[derive(Debug)]
pub struct Opening {
    number: u64,
    state: Arc<Mutex<State>>,
}

/// Hears when a beginning had to make room.
#[derive(Debug)]
pub struct Evicted(oneshot::Receiver<()>);

impl Openings {
    /// At most `most` at once; `evicted` counts those that made room.
    #[must_use]
    pub fn new(most: usize, evicted: Counter) -> Self {
        Self {
            state: Arc::default(),
            most,
            evicted,
        }
    }

    /// One more.
    #[must_use]
    pub fn begin(&self) -> (Opening, Evicted) {
        let (told, evicted) = oneshot::channel();
        let mut state = self.state.lock();
        if state.open.len() >= self.most
            && let Some((_, oldest)) = state.open.pop_first()
        {
            self.evicted.inc();
            // Whoever does not listen any more has ended already.
            let _gone = oldest.send(());
        }
        let number = state.next;
        state.next += 1;
        state.open.insert(number, told);
        let opening = Opening {
            number,
            state: Arc::clone(&self.state),
        };
        (opening, Evicted(evicted))
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.state.lock().open.remove(&self.number);
    }
}

impl Evicted {
    /// Resolves when it had to make room; never, once it has ended otherwise.
    pub async fn told(&mut self) {
        if (&mut self.0).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn the_oldest_makes_room_and_those_that_ended_need_none() {
        let count = Counter::default();
        let openings = Openings::new(2, count.clone());
        let (first, mut first_told) = openings.begin();
        let (second, mut second_told) = openings.begin();
        drop(first);
        assert_eq!(first_told.told().now_or_never(), None);
        let (_third, mut third_told) = openings.begin();
        assert_eq!(count.get(), 0);
        let (_fourth, mut fourth_told) = openings.begin();
        assert_eq!(second_told.told().now_or_never(), Some(()));
        assert_eq!(third_told.told().now_or_never(), None);
        assert_eq!(fourth_told.told().now_or_never(), None);
        assert_eq!(count.get(), 1);
        drop(second);
    }
}
