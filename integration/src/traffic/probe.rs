//! New connections, one after another, counted by outcome and by who answered.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::{Counts, end_signal};

/// When a probe ends; SIGTERM always ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// After so many attempts.
    Attempts(u64),
    /// After the first success.
    FirstSuccess,
    /// By the signal only.
    Signal,
}

/// Connects to `to` every `every`, reads the server's name, and counts.
///
/// # Errors
/// When the signal handler cannot be installed.
pub async fn probe(
    to: SocketAddr,
    until: Until,
    every: Duration,
    attempt_timeout: Duration,
) -> Result<Counts> {
    let mut end = end_signal()?;
    let mut counts = Counts::default();
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let start = Instant::now();
    if until == Until::Signal {
        clustermesh_process::notify_ready()?;
    }
    loop {
        tokio::select! {
            _ = end.recv() => break,
            _ = ticks.tick() => {}
        }
        let begun = Instant::now();
        match timeout(attempt_timeout, ask_name(to)).await {
            Ok(Ok(name)) => counts.success(start.elapsed(), begun.elapsed(), &name),
            Ok(Err(error)) => counts.failure(&error.kind().to_string()),
            Err(_) => counts.failure("timed out"),
        }
        match until {
            Until::Attempts(wanted) if counts.attempts >= wanted => break,
            Until::FirstSuccess if counts.ok > 0 => break,
            Until::Attempts(_) | Until::FirstSuccess | Until::Signal => {}
        }
    }
    counts.close(start.elapsed());
    Ok(counts)
}

async fn ask_name(to: SocketAddr) -> std::io::Result<String> {
    let stream = TcpStream::connect(to).await?;
    let peer = stream.peer_addr()?;
    if peer.port() != to.port() || peer.ip().to_canonical() != to.ip() {
        // The application must see the address that it named.
        return Err(std::io::Error::other(format!("getpeername says {peer}")));
    }
    let mut name = String::new();
    BufReader::new(stream).read_line(&mut name).await?;
    if name.is_empty() {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(name.trim_end().to_owned())
}
