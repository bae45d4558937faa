//! The wide-area link between two clusters: delays, cuts and heals on demand.
//!
//! Two TAP devices joined by a task of the lab, because the kernels this runs on may lack netem.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::tap::poll_tap;

/// Largest frame that crosses, bytes.
const FRAME_BYTES_MAX: usize = 9_216;
/// Bytes of an Ethernet header.
const ETHERNET_BYTES: usize = 14;
/// Frames under way in one direction; more are dropped as a full router queue would.
const FRAMES_IN_FLIGHT_MAX: usize = 65_536;

/// Control of one link. Clones steer the same link.
#[derive(Clone, Debug, Default)]
pub struct Wan {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    delay_us: AtomicU64,
    cut: AtomicBool,
    /// 0: as large as the devices send.
    frame_bytes_max: AtomicUsize,
    dropped_frames: AtomicU64,
}

impl Wan {
    /// One-way delay of both directions, from the next frame on.
    pub fn set_delay(&self, delay: Duration) {
        let micros = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.shared.delay_us.store(micros, Ordering::Relaxed);
    }

    /// Frames vanish silently, as with a failed provider: both ends keep their carrier.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::Relaxed);
    }

    /// Frames pass again.
    pub fn heal(&self) {
        self.shared.cut.store(false, Ordering::Relaxed);
    }

    /// Packets of more than so many bytes vanish, and nobody is told: a provider's tunnel without ICMP. `None`: no more.
    pub fn swallow_over(&self, packet_bytes: Option<usize>) {
        let frame = packet_bytes.map_or(0, |bytes| bytes + ETHERNET_BYTES);
        self.shared.frame_bytes_max.store(frame, Ordering::Relaxed);
    }

    /// Frames lost to cuts and full queues so far.
    #[must_use]
    pub fn dropped_frames(&self) -> u64 {
        self.shared.dropped_frames.load(Ordering::Relaxed)
    }

    /// Starts moving frames between the two devices until the returned tasks are aborted.
    ///
    /// # Errors
    /// When the descriptors cannot be polled.
    pub fn join(&self, left: File, right: File) -> Result<[tokio::task::JoinHandle<()>; 2]> {
        let left = Arc::new(poll_tap(left)?);
        let right = Arc::new(poll_tap(right)?);
        Ok([
            tokio::spawn(pump(self.shared.clone(), left.clone(), right.clone())),
            tokio::spawn(pump(self.shared.clone(), right, left)),
        ])
    }
}

async fn pump(shared: Arc<Shared>, from: Arc<AsyncFd<File>>, to: Arc<AsyncFd<File>>) {
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    loop {
        let due = under_way.front().map(|(due, _)| *due);
        tokio::select! {
            readable = from.readable() => {
                let Ok(mut ready) = readable else { return };
                // Drain what is there: one wake-up for a burst.
                loop {
                    match from.get_ref().read(&mut buffer) {
                        Ok(length) => {
                            let most = shared.frame_bytes_max.load(Ordering::Relaxed);
                            if shared.cut.load(Ordering::Relaxed)
                                || (most != 0 && length > most)
                                || under_way.len() >= FRAMES_IN_FLIGHT_MAX
                            {
                                shared.dropped_frames.fetch_add(1, Ordering::Relaxed);
                                continue;
                            }
                            let delay = shared.delay_us.load(Ordering::Relaxed);
                            if delay == 0 && under_way.is_empty() {
                                write_frame(&shared, &to, &buffer[..length]);
                            } else {
                                let due = Instant::now() + Duration::from_micros(delay);
                                under_way.push_back((due, buffer[..length].to_vec()));
                            }
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                            ready.clear_ready();
                            break;
                        }
                        // The device went with its namespace: the lab is being taken down.
                        Err(_) => return,
                    }
                }
            }
            () = sleep_until(due), if due.is_some() => {
                let now = Instant::now();
                while let Some((due, _)) = under_way.front() {
                    if *due > now { break; }
                    if let Some((_, frame)) = under_way.pop_front() {
                        if shared.cut.load(Ordering::Relaxed) {
                            shared.dropped_frames.fetch_add(1, Ordering::Relaxed);
                        } else {
                            write_frame(&shared, &to, &frame);
                        }
                    }
                }
            }
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due).await;
    }
}

fn write_frame(shared: &Shared, to: &AsyncFd<File>, frame: &[u8]) {
    // A full device queue loses the frame, as a router does.
    if to.get_ref().write(frame).is_err() {
        shared.dropped_frames.fetch_add(1, Ordering::Relaxed);
    }
}
