//! The paths to other nodes: what they take, found by echo requests that go the way of pods' packets, through tunnel and
//! WireGuard.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clustermesh_api::v1::PathStatus;
use clustermesh_ebpf::abi::PROBE_MARK;
use clustermesh_node_core::path_mtu::{ATTEMPTS_MAX, PathMtu};
use clustermesh_process::Drain;
use tracing::{info, warn};

use crate::config::Config;
use crate::echo::{Asker, EchoSocket};
use crate::metrics::{Labels, Metrics};
use crate::records::Reconciler;
use crate::signals::Signals;

/// What is due is sent this often.
const TICK: Duration = Duration::from_millis(50);
/// Probes of one tick: 400 a second.
const PROBES_PER_TICK_MAX: usize = 20;
/// The nodes are asked for again this often, whatever is said of changes.
const REFRESH_EVERY: Duration = Duration::from_secs(5);
/// The first probe of a node is sent within this time.
const FIRST_WITHIN_MS: u64 = 3_000;

/// Cluster and node.
type Name = (Box<str>, Box<str>);

/// The paths to all other nodes, as far as they are known.
#[derive(Debug, Default)]
pub struct Paths(Mutex<BTreeMap<Name, Path>>);

#[derive(Debug)]
struct Path {
    address: IpAddr,
    mtu: PathMtu,
    /// Sequence numbers of the probes of one size that may still be answered.
    sent: Vec<u16>,
    /// That size.
    sent_bytes: u16,
    /// What the kernel was told.
    told_bytes: u16,
    /// What was shown last: usable size, and whether it is a black hole.
    shown: Option<(u16, bool)>,
}

impl Paths {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Name, Path>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the local API, by cluster and node.
    #[must_use]
    pub fn statuses(&self) -> Vec<PathStatus> {
        let paths = self.lock();
        paths
            .iter()
            .map(|((cluster, node), path)| PathStatus {
                cluster: cluster.to_string(),
                node: node.to_string(),
                address: path.address.to_string(),
                mtu_bytes: path.mtu.usable_bytes().into(),
                device_mtu_bytes: path.mtu.most_bytes().into(),
                black_hole: path.mtu.is_black_hole(),
                answers: path.mtu.has_answered(),
            })
            .collect()
    }
}

/// What the probes work with.
#[derive(Clone)]
pub struct Handles {
    /// Settings.
    pub config: Arc<Config>,
    /// Where the findings go, for the local API.
    pub paths: Arc<Paths>,
    /// Where the findings go, for the kernel; knows the nodes.
    pub reconciler: Arc<Reconciler>,
    /// Whether there is a session.
    pub signals: Arc<Signals>,
    /// Counters.
    pub metrics: Metrics,
}

/// Probes until the drain.
pub async fn run(handles: Handles, drain: Drain) {
    let seconds = handles.config.path_probe_seconds;
    if seconds == 0 {
        return;
    }
    let open = |v6| match EchoSocket::open(v6, PROBE_MARK) {
        Ok(socket) => Some(socket),
        Err(error) => {
            warn!(%error, v6, "paths to other nodes are not probed over this family");
            None
        }
    };
    let (v4, v6) = (open(false), open(true));
    let mut prober = Prober {
        handles,
        asker: Asker {
            id: rand::random(),
            token: rand::random(),
        },
        next_sequence: rand::random(),
        waiting: HashMap::new(),
        started: Instant::now(),
        confirm_every_ms: u64::from(seconds) * 1_000,
    };
    let asker = prober.asker;
    let mut changes = prober.handles.reconciler.peer_changes.subscribe();
    let mut refreshes = tokio::time::interval(REFRESH_EVERY);
    let mut ticks = tokio::time::interval(TICK);
    for interval in [&mut refreshes, &mut ticks] {
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    }
    loop {
        tokio::select! {
            _ = ticks.tick() => prober.send_due(v4.as_ref(), v6.as_ref()),
            Some(sequence) = answer(v4.as_ref(), asker) => prober.take(sequence),
            Some(sequence) = answer(v6.as_ref(), asker) => prober.take(sequence),
            Ok(()) = changes.changed() => prober.refresh(),
            _ = refreshes.tick() => prober.refresh(),
            () = drain.draining() => return,
        }
        prober.publish();
    }
}

async fn answer(socket: Option<&EchoSocket>, asker: Asker) -> Option<u16> {
    // A socket that fails once may work the next time; without it nothing is concluded.
    socket?.answer(asker).await.ok()
}

struct Prober {
    handles: Handles,
    asker: Asker,
    next_sequence: u16,
    /// By sequence number; [`ATTEMPTS_MAX`] for each path at most.
    waiting: HashMap<u16, Name>,
    started: Instant,
    confirm_every_ms: u64,
}

impl Prober {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Takes the nodes as they are now.
    fn refresh(&mut self) {
        let targets = match self.handles.reconciler.model().as_ref() {
            Some(model) if model.is_listed() => model.path_targets(),
            _ => return,
        };
        let now_ms = self.now_ms();
        let mut paths = self.handles.paths.lock();
        let mut gone: BTreeMap<Name, Path> = std::mem::take(&mut *paths);
        for target in targets {
            let name: Name = (Box::from(&*target.cluster), target.node.clone());
            let path = gone.remove(&name).map_or_else(
                || {
                    let first_ms = now_ms + rand::random_range(0..FIRST_WITHIN_MS);
                    let every_ms = self.confirm_every_ms;
                    Path {
                        address: target.address,
                        mtu: PathMtu::new(target.most_bytes, every_ms, first_ms)
                            .with_usable(target.usable_bytes),
                        sent: Vec::new(),
                        sent_bytes: 0,
                        told_bytes: target.usable_bytes,
                        shown: None,
                    }
                },
                |mut path| {
                    path.mtu.set_most(target.most_bytes, now_ms);
                    path.address = target.address;
                    path
                },
            );
            paths.insert(name, path);
        }
        drop(paths);
        for ((cluster, node), path) in gone {
            for sequence in &path.sent {
                self.waiting.remove(sequence);
            }
            let labels = labels(&cluster, &node);
            self.handles.metrics.path_mtu.remove(&labels);
            self.handles.metrics.path_black_hole.remove(&labels);
            if let Some(model) = self.handles.reconciler.model().as_mut() {
                model.forget_path_mtu(&cluster, &node);
            }
        }
    }

    /// Sends what is due, the longest waiting first.
    ///
    /// Nothing without a session: who is cut off from the records must fall silent, or changes of keys wait for it.
    fn send_due(&mut self, v4: Option<&EchoSocket>, v6: Option<&EchoSocket>) {
        if !*self.handles.signals.connected.borrow() {
            return;
        }
        let now_ms = self.now_ms();
        let mut paths = self.handles.paths.lock();
        let mut due: Vec<(u64, &Name, &mut Path)> = paths
            .iter_mut()
            .filter(|(_, path)| path.mtu.due_ms() <= now_ms)
            .map(|(name, path)| (path.mtu.due_ms(), name, path))
            .collect();
        due.sort_unstable_by_key(|(due_ms, _, _)| *due_ms);
        for (_, name, path) in due.into_iter().take(PROBES_PER_TICK_MAX) {
            let Some(size_bytes) = path.mtu.poll(now_ms) else {
                continue;
            };
            // An answer that comes late counts as long as the same is asked.
            if path.sent_bytes != size_bytes || path.sent.len() >= usize::from(ATTEMPTS_MAX) {
                for sequence in path.sent.drain(..) {
                    self.waiting.remove(&sequence);
                }
                path.sent_bytes = size_bytes;
            }
            let sequence = self.next_sequence;
            self.next_sequence = sequence.wrapping_add(1);
            // What cannot be sent is as good as lost: nobody answers, and nothing is concluded of it.
            let socket = if path.address.is_ipv4() { v4 } else { v6 };
            let sent = socket.map(|s| s.send(path.address, size_bytes, self.asker, sequence));
            if matches!(sent, Some(Ok(()))) {
                path.sent.push(sequence);
                self.waiting.insert(sequence, name.clone());
            }
        }
    }

    fn take(&mut self, sequence: u16) {
        let now_ms = self.now_ms();
        let Some(name) = self.waiting.remove(&sequence) else {
            return;
        };
        let mut paths = self.handles.paths.lock();
        if let Some(path) = paths.get_mut(&name)
            && path.sent.contains(&sequence)
        {
            for other in path.sent.drain(..) {
                self.waiting.remove(&other);
            }
            path.mtu.answered(path.sent_bytes, now_ms);
        }
    }

    /// Makes the kernel follow what has been found, and says what a person must know.
    fn publish(&self) {
        let mut news = Vec::new();
        for ((cluster, node), path) in self.handles.paths.lock().iter_mut() {
            let now = (path.mtu.usable_bytes(), path.mtu.is_black_hole());
            if path.shown == Some(now) {
                continue;
            }
            let was_black_hole = path.shown.is_some_and(|(_, hole)| hole);
            path.shown = Some(now);
            self.show(cluster, node, path, was_black_hole);
            if path.told_bytes != now.0 {
                path.told_bytes = now.0;
                news.push((cluster.clone(), node.clone(), now.0));
            }
        }
        if news.is_empty() {
            return;
        }
        if let Some(model) = self.handles.reconciler.model().as_mut() {
            for (cluster, node, usable) in news {
                model.set_path_mtu(&cluster, &node, usable);
            }
        }
        // Whoever follows the records tries again what fails.
        tokio::task::block_in_place(|| self.handles.reconciler.round());
    }

    fn show(&self, cluster: &str, node: &str, path: &Path, was_black_hole: bool) {
        let metrics = &self.handles.metrics;
        let labels = labels(cluster, node);
        let (bytes, most) = (path.mtu.usable_bytes(), path.mtu.most_bytes());
        let is_black_hole = path.mtu.is_black_hole();
        metrics.path_mtu.get_or_create(&labels).set(bytes.into());
        let hole = metrics.path_black_hole.get_or_create(&labels);
        hole.set(is_black_hole.into());
        if is_black_hole == was_black_hole {
            return;
        }
        let config = &self.handles.config;
        let from = format!("{}/{}", config.cluster, config.node);
        let to = format!("{cluster}/{node}");
        if is_black_hole {
            warn!(
                from,
                to,
                devices_take_bytes = most,
                "black hole: packets that the devices take vanish on the way between these two nodes, and nobody says so; \
                 smaller ones are sent until larger ones pass. Give the underlay's devices the MTU that the network has, \
                 or set `mtu`; `clustermesh-node status` shows what passes"
            );
        } else {
            info!(
                from,
                to, bytes, "what the devices take passes again between these two nodes"
            );
        }
    }
}

fn labels(cluster: &str, node: &str) -> Labels {
    vec![
        ("cluster".to_owned(), cluster.to_owned()),
        ("node".to_owned(), node.to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use clustermesh_ebpf::abi::NODE_NARROW;
    use clustermesh_node_core::path_mtu::{ANSWER_WAIT_MS, BASE_BYTES};

    use super::*;
    use crate::fixture::{Fixture, PATH_BYTES};

    /// What the path lets through, bytes.
    const NARROW_BYTES: u16 = 1_400;

    fn prober(fixture: &Fixture) -> Prober {
        Prober {
            handles: Handles {
                config: Arc::clone(&fixture.config),
                paths: Arc::default(),
                reconciler: Arc::clone(&fixture.reconciler),
                signals: Arc::clone(&fixture.signals),
                metrics: fixture.metrics.clone(),
            },
            asker: Asker {
                id: 1,
                token: [2; 8],
            },
            next_sequence: u16::MAX,
            waiting: HashMap::new(),
            started: Instant::now(),
            confirm_every_ms: 15_000,
        }
    }

    fn with_nodes(numbers: &[u8]) -> (Fixture, Prober) {
        let fixture = Fixture::new("");
        for number in numbers {
            fixture.add_node(*number);
        }
        assert!(fixture.reconciler.round());
        let mut prober = prober(&fixture);
        prober.refresh();
        (fixture, prober)
    }

    /// Sends a probe as far as the books go; gives its number and size.
    fn send(prober: &mut Prober, node: &str, now_ms: u64) -> Option<(u16, u16)> {
        let name: Name = ("a".into(), node.into());
        let mut paths = prober.handles.paths.lock();
        let path = paths.get_mut(&name)?;
        let bytes = path.mtu.poll(now_ms)?;
        let sequence = prober.next_sequence;
        prober.next_sequence = sequence.wrapping_add(1);
        prober.waiting.insert(sequence, name);
        path.sent.push(sequence);
        path.sent_bytes = bytes;
        Some((sequence, bytes))
    }

    fn narrow_bytes(fixture: &Fixture) -> Vec<u16> {
        let nodes = fixture.maps.nodes.entries().unwrap().into_iter();
        let narrow = nodes.filter(|(_, node)| node.flags & NODE_NARROW != 0);
        narrow.map(|(_, node)| node.path_mtu_bytes).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_black_hole_is_written_shown_and_counted_and_so_is_its_end() {
        let (fixture, mut prober) = with_nodes(&[2]);
        prober.publish();
        assert!(narrow_bytes(&fixture).is_empty());
        let labels = labels("a", "n2");
        let hole = |fixture: &Fixture| {
            let metrics = &fixture.metrics;
            metrics.path_black_hole.get_or_create(&labels).get()
        };
        let mut now_ms = 10_000;
        // What is small comes back, what is large does not.
        for _ in 0..60 {
            if let Some((sequence, bytes)) = send(&mut prober, "n2", now_ms)
                && bytes <= NARROW_BYTES
            {
                prober.take(sequence);
            }
            prober.publish();
            now_ms += ANSWER_WAIT_MS;
        }
        let [found] = narrow_bytes(&fixture)[..] else {
            panic!("the kernel does not know it");
        };
        assert!((BASE_BYTES..=NARROW_BYTES).contains(&found), "{found}");
        assert_eq!(hole(&fixture), 1);
        let [shown] = &prober.handles.paths.statuses()[..] else {
            panic!("one path");
        };
        assert!(shown.black_hole && shown.mtu_bytes == u32::from(found));
        // The path widens; it is tried ever more seldom.
        for _ in 0..10_000 {
            if let Some((sequence, _)) = send(&mut prober, "n2", now_ms) {
                prober.take(sequence);
            }
            now_ms += ANSWER_WAIT_MS;
        }
        prober.publish();
        assert_eq!((narrow_bytes(&fixture), hole(&fixture)), (vec![], 0));
        assert_eq!(
            prober.handles.paths.statuses()[0].mtu_bytes,
            u32::from(PATH_BYTES)
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_answer_counts_once_and_for_its_own_path_only() {
        let (_fixture, mut prober) = with_nodes(&[2, 3]);
        let (first, _) = send(&mut prober, "n2", 10_000).unwrap();
        let answers = |prober: &Prober| -> Vec<bool> {
            let paths = prober.handles.paths.statuses();
            paths.iter().map(|path| path.answers).collect()
        };
        prober.take(first.wrapping_add(7));
        assert_eq!(answers(&prober), [false, false]);
        prober.take(first);
        assert_eq!(answers(&prober), [true, false]);
        assert!(prober.waiting.is_empty());
        prober.take(first);
        assert_eq!(answers(&prober), [true, false]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_node_that_goes_takes_its_probes_and_metrics_along() {
        let (fixture, mut prober) = with_nodes(&[2, 3]);
        send(&mut prober, "n2", 10_000).unwrap();
        send(&mut prober, "n3", 10_000).unwrap();
        prober.publish();
        fixture.remove_node(2);
        prober.refresh();
        let left: Vec<_> = prober.waiting.values().map(|(_, node)| &**node).collect();
        assert_eq!(left, ["n3"]);
        let paths = prober.handles.paths.statuses();
        assert_eq!((paths.len(), &*paths[0].node), (1, "n3"));
        let metric = &fixture.metrics.path_mtu;
        assert!(metric.get(&labels("a", "n2")).is_none());
        assert!(metric.get(&labels("a", "n3")).is_some());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_is_asked_without_a_session() {
        let (fixture, mut prober) = with_nodes(&[2]);
        let due = |prober: &Prober| {
            prober
                .handles
                .paths
                .lock()
                .values()
                .all(|p| p.mtu.due_ms() <= prober.now_ms())
        };
        while !due(&prober) {
            tokio::time::sleep(TICK).await;
        }
        prober.send_due(None, None);
        assert!(due(&prober), "still to be asked");
        fixture.signals.connected.send_replace(true);
        prober.send_due(None, None);
        // Asked, though nothing can be sent without a socket: nobody answers.
        assert!(!due(&prober) && prober.waiting.is_empty());
    }
}
