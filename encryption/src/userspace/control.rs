//! The control thread: configuration, handshakes and timers. It alone owns the protocol's state; the workers tell it what
//! they cannot do themselves.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::TunnResult;
use boringtun::noise::rate_limiter::RateLimiter;
use clustermesh_encryption_core::config::{Change, Config};
use clustermesh_encryption_core::control::{COUNTER_PREFIX, PeerStatus, Secrets, describe};
use clustermesh_encryption_core::engine::{Engine, Now, Output, Slot, TICK};
use clustermesh_encryption_core::key::{PrivateKey, PublicKey};
use clustermesh_encryption_core::message::{Message, parse};
use clustermesh_encryption_core::secret_text::SecretText;

use super::events::{ApplyError, Event, Events, Handshake};
use super::outbound::Outbound;
use super::peer::Peer;
use super::shared::{Shared, Sockets, Table, count};
use super::tun;
use super::turn::Way;
use super::udp::{self, HANDSHAKE_TOS, Socket};
use crate::link;

/// Handshake messages in a second that are taken without asking for a cookie.
const HANDSHAKES_PER_SECOND_MAX: u64 = 200;
/// How often the device's MTU is looked at.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// The control thread's state.
pub struct Control {
    name: String,
    workers: usize,
    shared: Arc<Shared>,
    engine: Engine,
    config: Config,
    limiter: Option<RateLimiter>,
    peers: HashMap<PublicKey, Arc<Peer>>,
    sockets: Vec<Arc<Sockets>>,
    listen_port: u16,
    outbound: Outbound,
    out: Vec<Output>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Control({})", self.name)
    }
}

fn random(room: &mut [u8]) {
    rand::fill(room);
}

impl Control {
    /// Opens the sockets, at a port that the kernel chooses.
    ///
    /// # Errors
    /// When there are none to be had.
    pub fn new(
        name: &str,
        workers: usize,
        shared: &Arc<Shared>,
        engine: Engine,
        events: Events,
    ) -> Result<Self, ApplyError> {
        let mut control = Self {
            name: name.to_owned(),
            workers,
            shared: Arc::clone(shared),
            engine,
            config: Config::default(),
            limiter: None,
            peers: HashMap::new(),
            sockets: Vec::new(),
            listen_port: 0,
            outbound: Outbound::new(Arc::clone(shared), events),
            out: Vec::new(),
        };
        control.listen(0)?;
        control.publish();
        Ok(control)
    }

    /// Works until the device is closed.
    ///
    /// # Errors
    /// When the device breaks under it.
    pub fn run(mut self, events: &Receiver<Event>) -> io::Result<()> {
        let mut next_tick = Instant::now() + TICK;
        let mut next_look = Instant::now() + LOOK_AROUND;
        loop {
            let wait = next_tick.saturating_duration_since(Instant::now());
            match events.recv_timeout(wait) {
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Ok(Event::Broken(error)) => return Err(error),
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                self.tick();
            }
            if now >= next_look {
                next_look = now + LOOK_AROUND;
                self.look_around()?;
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Handshake(handshake) => self.handshake(&handshake),
            Event::Wanted(slot) => {
                let now = self.now();
                self.engine.wanted(slot, now, &mut random, &mut self.out);
                self.carry_out();
            }
            Event::Confirmed => self.tick(),
            // Whoever asked may have gone.
            Event::Apply(changes, answer) => drop(answer.send(self.apply(&changes))),
            Event::Describe(secrets, answer) => drop(answer.send(self.describe(secrets))),
            Event::Broken(_) | Event::Stop => {}
        }
    }

    fn now(&self) -> Now {
        let wall = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Now {
            monotonic: self.shared.now(),
            wall,
        }
    }

    fn tick(&mut self) {
        let now = self.now();
        let table = self.shared.table();
        let activity = |slot| {
            table
                .peer(slot)
                .map(|peer| peer.activity())
                .unwrap_or_default()
        };
        self.engine.tick(now, activity, &mut random, &mut self.out);
        self.carry_out();
    }

    fn look_around(&mut self) -> io::Result<()> {
        if let Some(limiter) = &self.limiter {
            limiter.reset_count();
        }
        let mtu = tun::mtu(&self.name)?;
        if self.shared.mtu.swap(mtu, Ordering::Relaxed) != mtu {
            link::set_segments_max(&self.name, udp::segments_per_call(mtu))?;
            self.publish();
        }
        Ok(())
    }

    /// Checks codes and cookies, then lets the engine look at the message.
    fn handshake(&mut self, handshake: &Handshake) {
        let Some(limiter) = &self.limiter else {
            return count(&self.shared.counters.handshakes_refused);
        };
        let (datagram, from) = (handshake.datagram(), handshake.from);
        let mut room = [0; 64];
        match limiter.verify_packet(Some(from.ip()), datagram, &mut room) {
            Ok(_) => {}
            Err(TunnResult::WriteToNetwork(cookie)) => {
                count(&self.shared.counters.cookies_sent);
                let _ = self.send(from, cookie);
                return;
            }
            Err(_) => return count(&self.shared.counters.handshakes_refused),
        }
        let now = self.now();
        let out = &mut self.out;
        let result = match parse(datagram) {
            Ok(Message::Initiation(message)) => {
                self.engine
                    .take_initiation(message, from, now, &mut random, out)
            }
            Ok(Message::Response(message)) => self.engine.take_response(message, from, now, out),
            Ok(Message::CookieReply(message)) => self.engine.take_cookie(message, now),
            Ok(Message::Transport { .. }) | Err(_) => return,
        };
        match result {
            Ok(slot) => {
                if let Some(peer) = self.shared.table().peer(slot) {
                    peer.note_received(self.shared.now_ms(), datagram.len(), false);
                }
            }
            Err(error) => {
                count(&self.shared.counters.handshakes_refused);
                tracing::debug!(device = %self.name, %from, %error, "handshake message refused");
            }
        }
        self.carry_out();
    }

    fn send(&self, to: SocketAddr, datagram: &[u8]) -> Result<(), nix::errno::Errno> {
        let socket = self
            .sockets
            .first()
            .and_then(|sockets| sockets.towards(to))
            .ok_or(nix::errno::Errno::EAFNOSUPPORT)?;
        socket.send(to, HANDSHAKE_TOS, datagram, datagram.len())
    }

    fn carry_out(&mut self) {
        let table = self.shared.table();
        for output in std::mem::take(&mut self.out) {
            match output {
                Output::Send { slot, to, datagram } => {
                    let Some(peer) = table.peer(slot) else {
                        continue;
                    };
                    let Some(to) = to.or_else(|| peer.read(|state| state.endpoint)) else {
                        count(&self.shared.counters.no_endpoint);
                        count(&peer.errors);
                        continue;
                    };
                    peer.note_sent(self.shared.now_ms(), datagram.len(), false);
                    if let Err(error) = self.send(to, &datagram) {
                        count(&self.shared.counters.send_errors);
                        count(&peer.errors);
                        tracing::debug!(device = %self.name, peer = %peer.key, %to, %error, "handshake message not sent");
                    }
                }
                Output::Heard { slot, from } => {
                    if let Some(peer) = table.peer(slot) {
                        peer.change(|state| state.endpoint = Some(from));
                    }
                }
                Output::Sessions { slot, sessions } => {
                    if let Some(peer) = table.peer(slot) {
                        peer.change(|state| {
                            state.sessions = sessions;
                            // A worker may have heard from the peer meanwhile.
                            state.sessions.promote();
                        });
                    }
                }
                Output::Flush { slot, confirm } => self.flush(&table, slot, confirm),
                Output::Keepalive { slot } => self.keepalive(&table, slot),
                Output::GiveUp { slot } => self.give_up(&table, slot),
            }
        }
    }

    fn flush(&mut self, table: &Table, slot: Slot, confirm: bool) {
        let Some(peer) = table.peer(slot) else {
            return;
        };
        peer.is_handshake_wanted.store(false, Ordering::Release);
        let ready = peer.read(|state| state.sessions.current.clone().zip(state.endpoint));
        let (Some((session, to)), Some(sockets)) = (ready, self.sockets.first()) else {
            return;
        };
        let is_held =
            peer.has_staged.load(Ordering::Acquire) && self.shared.holds(peer, Way::Outward);
        let had_any = !is_held && self.outbound.send_staged(peer, &session, to, sockets);
        if confirm && !had_any {
            self.outbound.keepalive(peer, &session, to, sockets);
        }
    }

    fn keepalive(&mut self, table: &Table, slot: Slot) {
        let Some(peer) = table.peer(slot) else {
            return;
        };
        let ready = peer.read(|state| state.sessions.current.clone().zip(state.endpoint));
        if let (Some((session, to)), Some(sockets)) = (ready, self.sockets.first()) {
            self.outbound.keepalive(peer, &session, to, sockets);
        }
    }

    fn give_up(&self, table: &Table, slot: Slot) {
        let Some(peer) = table.peer(slot) else {
            return;
        };
        let mut staged = peer.staged.lock();
        while staged.pop().is_some() {
            count(&self.shared.counters.staged_dropped);
            count(&peer.errors);
        }
        staged.end_hold();
        peer.has_staged.store(false, Ordering::Release);
        peer.is_handshake_wanted.store(false, Ordering::Release);
        tracing::info!(device = %self.name, peer = %peer.key, "peer does not answer handshakes; trying again when there is traffic");
    }

    fn apply(&mut self, changes: &[Change]) -> Result<(), ApplyError> {
        let result = changes.iter().try_for_each(|change| self.step(change));
        self.publish();
        self.carry_out();
        result
    }

    fn step(&mut self, change: &Change) -> Result<(), ApplyError> {
        if let Change::ListenPort(port) = change
            && *port != self.listen_port
        {
            self.listen(*port)?;
        }
        self.config.apply(change)?;
        match change {
            Change::PrivateKey(key) => {
                self.engine.set_private_key(key.clone(), &mut self.out);
                let public = key.as_ref().map(PrivateKey::public);
                self.limiter = public
                    .map(|public| RateLimiter::new(&public.0.into(), HANDSHAKES_PER_SECOND_MAX));
                if let Some(public) = public {
                    self.remove(&public);
                }
                // Before peers change: the old sessions end with the old key.
                self.carry_out();
            }
            Change::ListenPort(_) => {}
            Change::Fwmark(mark) => {
                for sockets in &self.sockets {
                    for socket in [Some(&sockets.v4), sockets.v6.as_ref()]
                        .into_iter()
                        .flatten()
                    {
                        socket.set_mark(*mark).map_err(|source| ApplyError::Port {
                            port: self.listen_port,
                            source,
                        })?;
                    }
                }
            }
            Change::RemoveAllPeers => {
                let all: Vec<PublicKey> = self.peers.keys().copied().collect();
                all.iter().for_each(|key| self.remove(key));
            }
            Change::RemovePeer(key) => self.remove(key),
            Change::Peer(change) => self.change_peer(change.public_key, change.endpoint),
        }
        Ok(())
    }

    fn remove(&mut self, key: &PublicKey) {
        self.engine.remove_peer(key);
        self.peers.remove(key);
    }

    fn change_peer(&mut self, key: PublicKey, endpoint: Option<SocketAddr>) {
        // The configuration may have declined it.
        let Some(wanted) = self.config.peer(&key) else {
            return;
        };
        let slot = self.engine.add_peer(key, &mut random);
        let keepalive = wanted
            .persistent_keepalive_seconds
            .map(|seconds| Duration::from_secs(seconds.into()));
        self.engine
            .set_peer(slot, wanted.preshared_key.clone(), keepalive);
        let turn = self.shared.first_turn();
        let peer = self
            .peers
            .entry(key)
            .or_insert_with(|| Arc::new(Peer::new(slot, key, turn)));
        if endpoint.is_some() {
            peer.change(|state| state.endpoint = endpoint);
        }
    }

    /// Opens sockets at a port, one pair for each worker; 0: at one that the kernel chooses.
    fn listen(&mut self, port: u16) -> Result<(), ApplyError> {
        let mark = self.config.fwmark();
        let failed = |port| move |source| ApplyError::Port { port, source };
        if port != 0 {
            // Ours share the port with each other, and must not with another device. This one asks for both families;
            // a machine may have only the one.
            let probe = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port));
            let probe = match probe {
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))
                }
                other => other,
            };
            drop(probe.map_err(failed(port))?);
        }
        let mut all = Vec::new();
        let mut chosen = port;
        for _ in 0..self.workers {
            let v4 = Socket::open(false, chosen, mark).map_err(failed(chosen))?;
            chosen = v4.port().map_err(failed(chosen))?;
            // A machine without IPv6 has no such sockets.
            let v6 = Socket::open(true, chosen, mark).ok();
            all.push(Arc::new(Sockets { v4, v6 }));
        }
        self.sockets = all;
        self.listen_port = chosen;
        Ok(())
    }

    fn publish(&mut self) {
        let mut peers = Vec::new();
        for peer in self.peers.values() {
            let place = peer.slot as usize;
            if peers.len() <= place {
                peers.resize(place + 1, None);
            }
            peers[place] = Some(Arc::clone(peer));
        }
        let slots = self
            .config
            .prefixes()
            .filter_map(|(prefix, owner)| Some((prefix, self.peers.get(&owner)?.slot)));
        let allowed_ips = clustermesh_encryption_core::allowed_ips::AllowedIps::new(slots);
        self.shared.publish(Table {
            allowed_ips,
            peers,
            sockets: self.sockets.clone(),
        });
        self.outbound.reset();
    }

    fn peer_status(&self, key: &PublicKey) -> PeerStatus {
        let Some(peer) = self.peers.get(key) else {
            return PeerStatus::default();
        };
        let (rx_bytes, tx_bytes) = peer.bytes();
        PeerStatus {
            endpoint: peer.read(|state| state.endpoint),
            last_handshake: self.engine.last_handshake(peer.slot),
            rx_bytes,
            tx_bytes,
            received_data: Some(peer.received_data()),
            handshakes: Some(self.engine.handshakes(peer.slot)),
            errors: Some(peer.errors.load(Ordering::Relaxed)),
        }
    }

    /// What the protocol of the control socket has, and our counters before it.
    fn describe(&self, secrets: Secrets) -> SecretText {
        use std::fmt::Write as _;

        let mut text = SecretText::default();
        for (name, number) in self.shared.counters.read() {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{COUNTER_PREFIX}{name}={number}");
        }
        let status = |key: &PublicKey| self.peer_status(key);
        describe(&self.config, self.listen_port, secrets, status, &mut text);
        text
    }
}
