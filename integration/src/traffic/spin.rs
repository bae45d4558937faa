//! Connections as fast as one CPU makes them, to a server that spins on another.
//!
//! A server that blocks would be woken for every connection, and those wake-ups cost more than
//! what is to be measured.

use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrIn, accept4, bind, connect,
    listen, setsockopt, socket, sockopt,
};
use nix::unistd::{Pid, close};
use serde::Serialize;

use super::percentile;

/// How long connections are made before they are counted.
const WARM_UP: Duration = Duration::from_millis(50);
/// Samples of latency that are kept.
const SAMPLES_MAX: usize = 4_000_000;

/// What [`connect_for`] counted.
#[derive(Debug, Serialize)]
pub struct Rate {
    /// Connections made and closed.
    pub connections: u64,
    /// The same, for each second.
    pub per_second: f64,
    /// Median of `connect()`, microseconds.
    pub p50_us: f64,
    /// 99th percentile of `connect()`, microseconds.
    pub p99_us: f64,
}

/// Accepts and closes on `cpu` until the process is ended.
///
/// # Errors
/// When the CPU or the address cannot be had.
pub fn serve(address: SocketAddr, cpu: usize) -> Result<()> {
    pin(cpu)?;
    let listener = tcp_socket(SockFlag::SOCK_NONBLOCK)?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    bind(listener.as_raw_fd(), &v4(address)?).with_context(|| address.to_string())?;
    // As many as the namespace allows may wait: the server may lose its CPU for some milliseconds.
    listen(&listener, Backlog::MAXALLOWABLE)?;
    clustermesh_process::notify_ready()?;
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(connection) => close(connection)?,
            Err(Errno::EAGAIN | Errno::ECONNABORTED | Errno::EINTR) => std::hint::spin_loop(),
            Err(error) => return Err(error).context("accept"),
        }
    }
}

/// Connects from `cpu` to `addresses` in turn and closes, for the length of `time`.
///
/// Closing resets the connection, so that no port waits for its reuse.
///
/// # Errors
/// When the CPU cannot be had, or any connection fails.
pub fn connect_for(addresses: &[SocketAddr], cpu: usize, time: Duration) -> Result<Rate> {
    let addresses: Vec<SockaddrIn> = addresses
        .iter()
        .map(|address| v4(*address))
        .collect::<Result<_>>()?;
    if addresses.is_empty() {
        bail!("no address to connect to");
    }
    pin(cpu)?;
    let mut turns = addresses.iter().cycle();
    let warm = Instant::now();
    while warm.elapsed() < WARM_UP {
        once(&mut turns)?;
    }
    let mut took_ns: Vec<u32> = Vec::with_capacity(SAMPLES_MAX / 4);
    let start = Instant::now();
    let mut connections = 0;
    while start.elapsed() < time {
        let took = once(&mut turns)?;
        connections += 1;
        if took_ns.len() < SAMPLES_MAX {
            took_ns.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    took_ns.sort_unstable();
    let micros: Vec<f64> = took_ns.iter().map(|ns| f64::from(*ns) / 1e3).collect();
    Ok(Rate {
        connections,
        per_second: f64::from(u32::try_from(connections)?) / seconds,
        p50_us: percentile(&micros, 50),
        p99_us: percentile(&micros, 99),
    })
}

fn once<'a>(turns: &mut impl Iterator<Item = &'a SockaddrIn>) -> Result<Duration> {
    let address = turns.next().context("no address")?;
    let client = tcp_socket(SockFlag::empty())?;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&client, sockopt::Linger, &linger)?;
    let begun = Instant::now();
    connect(client.as_raw_fd(), address).with_context(|| format!("connect to {address}"))?;
    Ok(begun.elapsed())
}

fn tcp_socket(flags: SockFlag) -> Result<std::os::fd::OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    Ok(socket(
        AddressFamily::Inet,
        SockType::Stream,
        flags,
        SockProtocol::Tcp,
    )?)
}

fn v4(address: SocketAddr) -> Result<SockaddrIn> {
    match address {
        SocketAddr::V4(address) => Ok(SockaddrIn::from(SocketAddrV4::new(
            *address.ip(),
            address.port(),
        ))),
        SocketAddr::V6(address) => bail!("{address} is not IPv4"),
    }
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("CPU {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("CPU {cpu}"))
}
