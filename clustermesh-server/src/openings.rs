//! Connections that have not said yet who they are: bounded in number, so that those who never say it keep nobody out.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::oneshot;
use tracing::warn;

/// That some had to make room is told so often at most.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Beginnings under way on a port. Past the limit the oldest of the address that has most ends: a client in earnest is not,
/// and one host alone ends its own only.
#[derive(Debug, Clone)]
pub struct Openings {
    state: Arc<Mutex<State>>,
    port: &'static str,
    most: usize,
    evicted: Counter,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    count: usize,
    /// Of each address in the order of their coming.
    open: HashMap<IpAddr, BTreeMap<u64, oneshot::Sender<()>>>,
    warned: Option<Instant>,
}

impl State {
    fn remove(&mut self, address: IpAddr, number: u64) -> Option<oneshot::Sender<()>> {
        let open = self.open.get_mut(&address)?;
        let told = open.remove(&number)?;
        if open.is_empty() {
            self.open.remove(&address);
        }
        self.count -= 1;
        Some(told)
    }

    /// The one that makes room, and how many its address has.
    fn next_to_go(&self) -> Option<(IpAddr, u64, usize)> {
        let oldest = self.open.iter().filter_map(|(address, open)| {
            let (number, _) = open.first_key_value()?;
            Some((*address, *number, open.len()))
        });
        oldest.max_by_key(|(_, number, count)| (*count, Reverse(*number)))
    }

    fn is_warning_due(&mut self, now: Instant) -> bool {
        let due = self
            .warned
            .is_none_or(|before| now.duration_since(before) >= WARNING_INTERVAL);
        if due {
            self.warned = Some(now);
        }
        due
    }
}

/// One beginning, counted until it is dropped.
#[derive(Debug)]
pub struct Opening {
    address: IpAddr,
    number: u64,
    state: Arc<Mutex<State>>,
}

/// Hears when a beginning had to make room.
#[derive(Debug)]
pub struct Evicted(oneshot::Receiver<()>);

impl Openings {
    /// At most `most` at once on `port`, which logs name; `evicted` counts those that made room.
    #[must_use]
    pub fn new(port: &'static str, most: usize, evicted: Counter) -> Self {
        Self {
            state: Arc::default(),
            port,
            most,
            evicted,
        }
    }

    /// One more, from `address`.
    #[must_use]
    pub fn begin(&self, address: IpAddr) -> (Opening, Evicted) {
        let address = address.to_canonical();
        let (told, evicted) = oneshot::channel();
        let mut state = self.state.lock();
        if state.count >= self.most {
            self.make_room(&mut state);
        }
        let number = state.next;
        state.next += 1;
        state.count += 1;
        state.open.entry(address).or_default().insert(number, told);
        let opening = Opening {
            address,
            number,
            state: Arc::clone(&self.state),
        };
        (opening, Evicted(evicted))
    }

    fn make_room(&self, state: &mut State) {
        let Some((address, number, count)) = state.next_to_go() else {
            return;
        };
        self.evicted.inc();
        if state.is_warning_due(Instant::now()) {
            warn!(
                port = self.port,
                %address,
                of_this_address = count,
                limit = self.most,
                "too many connections that have not shown who they are: the oldest of the address that has most ends"
            );
        }
        if let Some(oldest) = state.remove(address, number) {
            // Whoever does not listen any more has ended already.
            let _gone = oldest.send(());
        }
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.state.lock().remove(self.address, self.number);
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

    const ONE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    #[test]
    fn the_oldest_makes_room_and_those_that_ended_need_none() {
        let count = Counter::default();
        let openings = Openings::new("test", 2, count.clone());
        let (first, mut first_told) = openings.begin(ONE);
        let (second, mut second_told) = openings.begin(ONE);
        drop(first);
        assert_eq!(first_told.told().now_or_never(), None);
        let (_third, mut third_told) = openings.begin(OTHER);
        assert_eq!(count.get(), 0);
        let (_fourth, mut fourth_told) = openings.begin(OTHER);
        assert_eq!(second_told.told().now_or_never(), Some(()));
        assert_eq!(third_told.told().now_or_never(), None);
        assert_eq!(fourth_told.told().now_or_never(), None);
        assert_eq!(count.get(), 1);
        drop(second);
    }

    #[test]
    fn a_flood_from_one_address_ends_no_other_addresss_beginning() {
        let count = Counter::default();
        let openings = Openings::new("test", 16, count.clone());
        let (replica, mut told) = openings.begin(OTHER);
        let mapped = IpAddr::V6("::ffff:192.0.2.1".parse().unwrap());
        let mut flood: Vec<_> = (0..200)
            .map(|n| openings.begin(if n % 2 == 0 { ONE } else { mapped }))
            .collect();
        // One that comes into the flood has its place, too.
        let (late, mut late_told) = openings.begin(OTHER);
        flood.extend((0..200).map(|_| openings.begin(ONE)));
        assert_eq!(told.told().now_or_never(), None);
        assert_eq!(late_told.told().now_or_never(), None);
        assert_eq!(count.get(), 402 - 16);
        let ended = flood
            .iter_mut()
            .filter_map(|(_, told)| told.told().now_or_never())
            .count();
        assert_eq!(ended, 402 - 16);
        drop((replica, late, flood));
        let state = openings.state.lock();
        assert_eq!((state.count, state.open.len()), (0, 0));
    }

    #[test]
    fn a_flood_is_told_now_and_then() {
        let (mut state, start) = (State::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let told = [0, 1, 59, 60, 61, 121].map(|seconds| state.is_warning_due(at(seconds)));
        assert_eq!(told, [true, false, false, true, false, true]);
    }
}
