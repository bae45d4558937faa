//! Our own WireGuard device in user space.
//!
//! **Threads.** One worker for each processor that the process may use, [`WORKERS_MAX`] at most. Worker *i* owns queue *i*
//! of the TUN device and socket pair *i* of the UDP port, and runs packets of both directions to completion: read, split,
//! seal, send; receive, open, join, write. The kernel chooses the queue by flow and the socket by the peer's address, so
//! packets of a flow stay in order without a hand-over between threads. One control thread owns handshakes, timers and
//! configuration; one serves the control socket. Threads are not pinned: the scheduler keeps a worker near the
//! application that it serves.
//!
//! **Per packet** there is no allocation and no lock: workers hold the routing table and each peer's session by reference
//! and look at one atomic number to see that they still hold. Per run of datagrams one uncontended lock guards the
//! session's replay window.

pub mod control;
pub mod control_socket;
pub mod events;
pub mod fence;
pub mod handover;
mod inbound;
mod outbound;
pub mod peer;
mod release;
pub mod shared;
pub mod tun;
pub mod turn;
pub mod udp;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use clustermesh_encryption_core::engine::Engine;

use crate::link;
use control::Control;
use events::{ApplyError, Event, Events};
use handover::Handover;
use shared::Shared;
use tun::Tun;

/// Workers of one device.
pub const WORKERS_MAX: usize = 8;

/// Why a device cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The TUN device.
    #[error("device {name}: {source}")]
    Tun {
        /// Its name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The sockets.
    #[error(transparent)]
    Sockets(#[from] ApplyError),
    /// A thread or event descriptor.
    #[error("cannot start the device's threads: {0}")]
    Threads(io::Error),
}

/// How a device is opened.
#[derive(Clone, Debug)]
pub struct Options {
    /// Workers; `None`: by the rule above.
    pub workers: Option<usize>,
    /// MTU that the network device gets, bytes; `None`: it keeps what it has, a new one gets [`tun::MTU_DEFAULT`].
    pub mtu: Option<u32>,
    /// Control socket of the device that this one takes over from.
    pub follows: Option<PathBuf>,
}

/// A running device.
#[derive(Debug)]
pub struct UserspaceDevice {
    shared: Arc<Shared>,
    events: Events,
    workers: Vec<JoinHandle<()>>,
    control: Option<JoinHandle<io::Result<()>>>,
    handover: Option<JoinHandle<()>>,
}

/// Number of workers where none is asked for.
#[must_use]
pub fn default_workers() -> usize {
    std::thread::available_parallelism()
        .map_or(1, usize::from)
        .min(WORKERS_MAX)
}

impl UserspaceDevice {
    /// Makes or takes the network device `name`, in the calling thread's network namespace, and starts.
    ///
    /// # Errors
    /// When the device, the sockets or the threads are not to be had.
    pub fn open(name: &str, options: &Options) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Tun {
            name: name.to_owned(),
            source,
        };
        let count = options.workers.unwrap_or_else(default_workers);
        let count = count.clamp(1, WORKERS_MAX);
        let is_new = tun::mtu(name).is_err();
        let tun = Tun::open(name, count).map_err(failed)?;
        let mtu = options.mtu.or(is_new.then_some(tun::MTU_DEFAULT));
        if let Some(mtu) = mtu {
            tun::set_mtu(name, mtu).map_err(failed)?;
        }
        let mtu = tun::mtu(name).map_err(failed)?;
        link::set_segments_max(name, udp::segments_per_call(mtu)).map_err(failed)?;
        let engine = Engine::new(&mut |room| rand::fill(room));
        let handover = options.follows.clone().map(Handover::new);
        let shared = Shared::new(count, engine.index_mask(), mtu, handover)
            .map_err(|error| OpenError::Threads(error.into()))?;
        let shared = Arc::new(shared);
        let (events, queue) = Events::queue();
        let control = Control::new(name, count, &shared, engine, events.clone())?;
        let mut device = Self {
            shared,
            events,
            workers: Vec::new(),
            control: None,
            handover: None,
        };
        let thread = std::thread::Builder::new().name(format!("{name}-control"));
        let control = thread.spawn(move || control.run(&queue));
        device.control = Some(control.map_err(OpenError::Threads)?);
        let joins = tun.joins();
        for (index, queue) in tun.into_queues().into_iter().enumerate() {
            let (shared, events) = (Arc::clone(&device.shared), device.events.clone());
            let work = move || {
                if let Err(error) = worker::run(index, &shared, &events, &queue, joins) {
                    events.send(Event::Broken(error));
                }
            };
            let thread = std::thread::Builder::new().name(format!("{name}-{index}"));
            device
                .workers
                .push(thread.spawn(work).map_err(OpenError::Threads)?);
        }
        if device.shared.handover.is_some() {
            let (shared, events) = (Arc::clone(&device.shared), device.events.clone());
            let hand_over = move || {
                if let Some(handover) = &shared.handover {
                    release::run(handover, &shared, &events);
                }
            };
            let thread = std::thread::Builder::new().name(format!("{name}-handover"));
            device.handover = Some(thread.spawn(hand_over).map_err(OpenError::Threads)?);
        }
        Ok(device)
    }

    /// What the device's threads share.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Where the control socket's requests go.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Waits until the device ends by itself: it was removed, for instance.
    ///
    /// # Errors
    /// The reason.
    pub fn wait(mut self) -> io::Result<()> {
        match self.control.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the control thread panicked")),
            None => Ok(()),
        }
    }

    /// Ends all threads; the network device goes unless it was made persistent.
    pub fn close(self) {
        drop(self);
    }
}

impl Drop for UserspaceDevice {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Release);
        self.shared.wake_all();
        if let Some(handover) = &self.shared.handover {
            handover.stop();
        }
        if let Some(thread) = self.handover.take() {
            let _ = thread.join();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
        self.events.send(Event::Stop);
        if let Some(control) = self.control.take() {
            let _ = control.join();
        }
    }
}
