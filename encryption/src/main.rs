//! Entry point of the WireGuard device of user space.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use clustermesh_encryption::userspace::control_socket::{ControlSocket, SOCKET_DIR};
use clustermesh_encryption::userspace::{Options, UserspaceDevice, WORKERS_MAX};
use clustermesh_process::logging::{self, LogFormat};
use nix::sys::signal::{SigSet, Signal};

/// A WireGuard device in user space, fast by segmentation offload. Configure it with `wg` (package wireguard-tools).
#[derive(Parser)]
#[command(name = "clustermesh-wireguard", version)]
struct Arguments {
    /// Name of the network device.
    name: String,
    /// Stay in the foreground.
    #[arg(short, long)]
    foreground: bool,
    /// Worker threads (default: one for each processor, 8 at most).
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=WORKERS_MAX as i64))]
    workers: Option<u8>,
    /// MTU of the network device, bytes (default: 1420 for a new one).
    #[arg(long)]
    mtu: Option<u32>,
    /// Folder of the control socket.
    #[arg(long, default_value = SOCKET_DIR)]
    socket_dir: PathBuf,
}

fn main() -> ExitCode {
    match start(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("clustermesh-wireguard: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> Result<()> {
    anyhow::ensure!(
        arguments.foreground,
        "--foreground is required: leave it to the service manager to keep the device in the background"
    );
    logging::init(LogFormat::Text)?;
    // Before there are threads: they inherit it.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let options = Options {
        workers: arguments.workers.map(usize::from),
        mtu: arguments.mtu,
    };
    let device = UserspaceDevice::open(&arguments.name, &options)?;
    let socket = ControlSocket::serve(&arguments.socket_dir, &arguments.name, device.events())
        .context("control socket")?;
    clustermesh_process::notify_ready()?;
    tracing::info!(device = %arguments.name, socket = %socket.path().display(), "WireGuard device is ready");
    let (sender, ended) = std::sync::mpsc::sync_channel(2);
    let signalled = sender.clone();
    std::thread::spawn(move || {
        let _ = signals.wait();
        let _ = signalled.send(Ok(()));
    });
    std::thread::spawn(move || {
        let _ = sender.send(device.wait());
    });
    let result = ended.recv().context("the device's threads are gone")?;
    drop(socket);
    result.with_context(|| format!("device {}", arguments.name))
}
