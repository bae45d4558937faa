//! Numbered datagrams, echoed: counts what is lost.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::end_signal;

/// How long an echo may be under way when the tool ends.
const LAST_ECHO_MS_MAX: u64 = 300;

/// What was sent and what came back.
#[derive(Debug, Serialize)]
pub struct UdpReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Echoes received.
    pub received: u64,
    /// Sent less received.
    pub lost: u64,
    /// Sends that the kernel refused.
    pub send_errors: u64,
    /// Longest run of lost datagrams.
    pub lost_in_a_row_max: u64,
}

/// Sends a numbered datagram every `every` until SIGTERM.
///
/// # Errors
/// When no socket can be had.
pub async fn udp(to: SocketAddr, every: Duration) -> Result<UdpReport> {
    let mut end = end_signal()?;
    let any: SocketAddr = if to.is_ipv6() {
        "[::]:0".parse()?
    } else {
        "0.0.0.0:0".parse()?
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    let mut seen: Vec<bool> = Vec::new();
    let mut send_errors = 0;
    let mut buffer = [0; 512];
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    clustermesh_process::notify_ready()?;
    loop {
        tokio::select! {
            _ = end.recv() => break,
            _ = ticks.tick() => {
                let number = seen.len() as u64;
                match socket.send(&number.to_be_bytes()).await {
                    Ok(_) => seen.push(false),
                    Err(_) => send_errors += 1,
                }
            }
            result = socket.recv(&mut buffer) => {
                if let Ok(length) = result { note(&buffer[..length], &mut seen); }
            }
        }
    }
    while let Ok(Ok(length)) = timeout(
        Duration::from_millis(LAST_ECHO_MS_MAX),
        socket.recv(&mut buffer),
    )
    .await
    {
        note(&buffer[..length], &mut seen);
        if seen.iter().all(|echoed| *echoed) {
            break;
        }
    }
    let sent = seen.len() as u64;
    let received = seen.iter().filter(|echoed| **echoed).count() as u64;
    let lost_in_a_row_max = seen
        .split(|echoed| *echoed)
        .map(|run| run.len() as u64)
        .max()
        .unwrap_or(0);
    Ok(UdpReport {
        sent,
        received,
        lost: sent - received,
        send_errors,
        lost_in_a_row_max,
    })
}

/// Marks the datagram whose echo (`NAME ` and its 8-byte number) this is.
fn note(answer: &[u8], seen: &mut [bool]) {
    let Some(number) = answer.last_chunk::<8>() else {
        return;
    };
    let place = usize::try_from(u64::from_be_bytes(*number)).unwrap_or(usize::MAX);
    if let Some(slot) = seen.get_mut(place) {
        *slot = true;
    }
}
