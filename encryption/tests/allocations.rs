//! Packets go through the device without an allocation for any of them: counted by an allocator, in both directions.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]
#![expect(unsafe_code, reason = "an allocator that counts")]

mod machines;

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use clustermesh_encryption::process::{ProcessDevice, ProcessOptions};
use clustermesh_encryption::userspace::control_socket::ControlSocket;
use clustermesh_encryption::userspace::{Options, UserspaceDevice};
use clustermesh_encryption_core::key::PrivateKey;
use machines::{Machines, shake_hands};

/// Datagrams that are counted, in windows.
const DATAGRAMS: u64 = 20_000;
/// Datagrams on the way at once.
const WINDOW: u64 = 50;
/// Bytes of a stream that are counted.
const STREAM_BYTES: u64 = 64 << 20;
/// Largest segment of the stream, bytes.
const SEGMENT_BYTES: u64 = 1_380;
/// Timers and handshakes allocate now and then: so many packets for each allocation at least.
const PACKETS_PER_ALLOCATION: u64 = 100;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counted.
struct Counting;

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller has promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller has promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Does it once to warm up, and counts the allocations of the second time.
fn allocations(mut act: impl FnMut()) -> u64 {
    act();
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    act();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn no_packet_costs_an_allocation() {
    let machines = Machines::new('a');
    let dir = tempfile::tempdir().unwrap();
    let names = [0, 1].map(|side| format!("{}{side}", machines.prefix));
    // In this process: its allocator counts for them, too.
    let running = [0, 1].map(|side| {
        let options = Options {
            workers: Some(1),
            mtu: None,
            follows: None,
        };
        let open = || UserspaceDevice::open(&names[side], &options).unwrap();
        let device = machines.within(side, open);
        let (events, shared) = (device.events(), device.shared());
        let socket = ControlSocket::serve(dir.path(), &names[side], events, shared).unwrap();
        (device, socket)
    });
    let devices = [0, 1].map(|side| {
        let options = ProcessOptions {
            program: PathBuf::new(),
            socket_dir: dir.path().to_owned(),
            mtu: 1_420,
            follows: None,
        };
        machines.set_up(side, &names[side]);
        machines.route(side, &names[side]);
        ProcessDevice::open(&names[side], &options).unwrap().0
    });
    shake_hands(&devices, 51_871, |side| {
        PrivateKey::from_bytes([if side == 0 { 5 } else { 6 }; 32])
    });

    let [sender, receiver] = [0, 1].map(|side| machines.socket(side));
    sender.connect("10.9.0.2:7777").unwrap();
    let datagrams = || {
        let mut room = [0; 1_200];
        for _ in 0..DATAGRAMS / WINDOW {
            for _ in 0..WINDOW {
                sender.send(&room).unwrap();
            }
            for _ in 0..WINDOW {
                receiver.recv(&mut room).unwrap();
            }
        }
    };
    let counted = allocations(datagrams);
    let most = DATAGRAMS / PACKETS_PER_ALLOCATION;
    assert!(counted <= most, "{counted} for {DATAGRAMS} datagrams");

    let listener = machines.within(1, || TcpListener::bind("10.9.0.2:7778").unwrap());
    let mut from = machines.within(0, || TcpStream::connect("10.9.0.2:7778").unwrap());
    let (mut to, _) = listener.accept().unwrap();
    let (go, begun) = std::sync::mpsc::sync_channel(2);
    let sending = std::thread::spawn(move || {
        let room = vec![7; 1 << 16];
        while begun.recv().is_ok() {
            for _ in 0..STREAM_BYTES >> 16 {
                from.write_all(&room).unwrap();
            }
        }
    });
    let mut room = vec![0; 1 << 16];
    let counted = allocations(|| {
        go.send(()).unwrap();
        for _ in 0..STREAM_BYTES >> 16 {
            to.read_exact(&mut room).unwrap();
        }
    });
    drop(go);
    sending.join().unwrap();
    let packets = STREAM_BYTES / SEGMENT_BYTES;
    let most = packets / PACKETS_PER_ALLOCATION;
    assert!(counted <= most, "{counted} for {packets} segments");
    for (side, name) in names.iter().enumerate() {
        machines.remove(side, name);
    }
    drop(running);
}
