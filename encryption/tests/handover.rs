//! Two devices on each side, as while keys change: what goes through the new ones must not overtake what waits in the old
//! ones, on either side. A process that is stopped for a moment stands for one that has no processor.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod machines;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clustermesh_encryption::process::{ProcessDevice, ProcessOptions};
use clustermesh_encryption::userspace::handover::HOLD_MS_MAX;
use clustermesh_encryption_core::key::PrivateKey;
use machines::{Machines, PATIENCE, run, shake_hands};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A stop that took longer than this says nothing: packets are held no longer than [`HOLD_MS_MAX`].
const STOP_MAX: Duration = Duration::from_millis(HOLD_MS_MAX / 2);
/// For so long the old device is stopped while packets go through the new one.
const OVERTAKING: Duration = Duration::from_millis(30);
/// Attempts until a stop was short enough.
const TRIES_MAX: usize = 50;
/// Numbered datagrams before the switch, and after it.
const DATAGRAMS: u32 = 100;
const MTU: u32 = 1_420;

/// Two devices on either side: `o` of the old keys, `n` of the new ones.
struct Pairs {
    machines: Machines,
    dir: TempDir,
}

/// A side's key for the old or the new device.
fn key(side: usize, is_new: bool) -> PrivateKey {
    PrivateKey::from_bytes([1 + u8::try_from(side).unwrap() + 2 * u8::from(is_new); 32])
}

impl Pairs {
    fn name(&self, side: usize, is_new: bool) -> String {
        let letter = if is_new { 'n' } else { 'o' };
        format!("{}{side}{letter}", self.machines.prefix)
    }

    fn device(&self, side: usize, is_new: bool) -> ProcessDevice {
        let options = ProcessOptions {
            program: PathBuf::from(env!("CARGO_BIN_EXE_clustermesh-wireguard")),
            socket_dir: self.dir.path().to_owned(),
            mtu: MTU,
            follows: Some(self.name(side, !is_new)),
        };
        let name = self.name(side, is_new);
        let open = || ProcessDevice::open(&name, &options).unwrap();
        let (device, _) = self.machines.within(side, open);
        self.machines.set_up(side, &name);
        device
    }

    /// Starts both devices of both sides, which shake hands.
    fn start(test: char) -> Self {
        let pairs = Self {
            machines: Machines::new(test),
            dir: tempfile::tempdir().unwrap(),
        };
        for is_new in [false, true] {
            let devices = [0, 1].map(|side| pairs.device(side, is_new));
            let port = 51_871 + u16::from(is_new);
            shake_hands(&devices, port, |side| key(side, is_new));
        }
        pairs
    }

    /// Sends packets to the other side through one of the two devices.
    fn route(&self, is_new: bool) {
        for side in [0, 1] {
            self.machines.route(side, &self.name(side, is_new));
        }
    }

    fn pid(&self, side: usize, is_new: bool) -> Pid {
        let name = self.name(side, is_new);
        let pattern = format!("-f clustermesh-wireguard.{name}.--socket-dir");
        Pid::from_raw(run("pgrep", &pattern).trim().parse().unwrap())
    }
}

impl Drop for Pairs {
    fn drop(&mut self) {
        for (side, is_new) in [(0, false), (0, true), (1, false), (1, true)] {
            self.machines.remove(side, &self.name(side, is_new));
        }
    }
}

/// A process that is stopped until this is dropped, and would stay when a test fails.
struct Stopped(Pid);

impl Stopped {
    fn new(process: Pid) -> Self {
        kill(process, Signal::SIGSTOP).unwrap();
        let begun = Instant::now();
        // Each thread stops when it comes to it.
        while !is_stopped(process) {
            assert!(begun.elapsed() < PATIENCE, "it does not stop");
            std::thread::yield_now();
        }
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Whether all threads are (`T`, proc(5)).
fn is_stopped(process: Pid) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    threads.map(|thread| thread.unwrap().path()).all(|thread| {
        let stat = std::fs::read_to_string(thread.join("stat")).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('T'))
    })
}

/// Sends numbered datagrams from side 0, the second half after the switch to the new devices, while the old device of
/// `stopped` is stopped from before the first to `resume_after` the last one. Gives the numbers as they came, and for how
/// long packets had to wait.
fn switch(test: char, stopped: usize, resume_after: Duration) -> (Vec<u32>, Duration) {
    let pairs = Pairs::start(test);
    pairs.route(false);
    let [sender, receiver] = [0, 1].map(|side| pairs.machines.socket(side));
    let send = |numbers: std::ops::Range<u32>| {
        for number in numbers {
            sender
                .send_to(&number.to_be_bytes(), "10.9.0.2:7777")
                .unwrap();
        }
    };
    let receive = || {
        let mut room = [0; 4];
        receiver.recv(&mut room).unwrap();
        u32::from_be_bytes(room)
    };
    // The way is there, and both ends know each other's addresses.
    send(u32::MAX - 1..u32::MAX);
    assert_eq!(receive(), u32::MAX - 1);
    let process = Stopped::new(pairs.pid(stopped, false));
    send(0..DATAGRAMS);
    pairs.route(true);
    let begun = Instant::now();
    send(DATAGRAMS..2 * DATAGRAMS);
    let seen = if resume_after.is_zero() {
        // Time for one that overtakes to be here.
        receiver.set_read_timeout(Some(OVERTAKING)).unwrap();
        let _ = receiver.peek(&mut [0; 4]);
        drop(process);
        receiver.set_read_timeout(Some(PATIENCE)).unwrap();
        begun.elapsed()
    } else {
        // Those that need not wait for the stopped one come while it is stopped.
        let first = receive();
        assert_eq!(first, DATAGRAMS, "the old device is stopped");
        let waited = begun.elapsed();
        drop(process);
        let mut rest: Vec<u32> = (1..2 * DATAGRAMS).map(|_| receive()).collect();
        rest.insert(0, first);
        return (rest, waited);
    };
    let numbers = (0..2 * DATAGRAMS).map(|_| receive()).collect();
    (numbers, seen)
}

/// The numbers of a switch whose stop was short.
fn short_switch(test: char, stopped: usize) -> Vec<u32> {
    for _ in 0..TRIES_MAX {
        let (numbers, stop) = switch(test, stopped, Duration::ZERO);
        if stop < STOP_MAX {
            return numbers;
        }
    }
    panic!("this machine stops for longer than {STOP_MAX:?} each time");
}

fn in_order() -> Vec<u32> {
    (0..2 * DATAGRAMS).collect()
}

#[test]
fn packets_do_not_overtake_those_that_wait_in_the_senders_old_device() {
    assert_eq!(short_switch('s', 0), in_order());
}

#[test]
fn packets_do_not_overtake_those_that_wait_in_the_receivers_old_device() {
    assert_eq!(short_switch('r', 1), in_order());
}

#[test]
fn an_old_device_that_hangs_is_not_waited_for_and_nothing_is_lost() {
    let (mut numbers, waited) = switch('h', 0, PATIENCE);
    let least = Duration::from_millis(HOLD_MS_MAX) * 9 / 10;
    assert!(waited >= least, "held for {waited:?} only");
    numbers.sort_unstable();
    assert_eq!(numbers, in_order());
}
