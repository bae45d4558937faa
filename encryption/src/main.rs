//! Entry point of the WireGuard device of user space.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use clustermesh_encryption::userspace::control_socket::{ControlSocket, SOCKET_DIR};
use clustermesh_encryption::userspace::{Options, UserspaceDevice, WORKERS_MAX};
use clustermesh_process::logging::{self, LogFormat};
use clustermesh_process::notify::NOTIFY_SOCKET_VARIABLE;
use nix::sys::signal::{SigSet, Signal};

/// Longest that a device in the background may take until it is ready.
const READY_SECONDS_MAX: u64 = 30;

/// A WireGuard device in user space, fast by segmentation offload. Configure it with `wg` (package wireguard-tools).
#[derive(Parser)]
#[command(name = "clustermesh-wireguard", version)]
struct Arguments {
    /// Name of the network device.
    name: String,
    /// Stay in the foreground; otherwise the command returns when the device is ready.
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
    /// Device of ours whose packets go first while this one takes over from it: first packets are held until it says that
    /// none of before waits in it, 0.2 s at most.
    #[arg(long, value_name = "NAME")]
    follows: Option<String>,
    /// Leave the terminal's session: this is the process in the background.
    #[arg(long, hide = true)]
    detached: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = if arguments.foreground || arguments.detached {
        run(&arguments)
    } else {
        start_in_background()
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("clustermesh-wireguard: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the same command once more, detached, and waits until it is ready.
fn start_in_background() -> Result<()> {
    let name = format!("clustermesh-wireguard-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut child = Command::new(std::env::current_exe().context("path of the running program")?)
        .args(std::env::args_os().skip(1))
        .arg("--detached")
        .env(NOTIFY_SOCKET_VARIABLE, format!("@{name}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let begun = Instant::now();
    let mut message = [0; 256];
    while begun.elapsed() < Duration::from_secs(READY_SECONDS_MAX) {
        if let Ok(length) = socket.recv(&mut message)
            && message[..length].starts_with(b"READY=1")
        {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            // It has said why.
            bail!("the device did not start ({status})");
        }
    }
    child.kill()?;
    bail!("the device was not ready after {READY_SECONDS_MAX} s")
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.detached {
        nix::unistd::setsid().context("setsid")?;
    }
    logging::init(LogFormat::Text)?;
    // Before there are threads: they inherit it.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let options = Options {
        workers: arguments.workers.map(usize::from),
        mtu: arguments.mtu,
        follows: arguments
            .follows
            .as_ref()
            .map(|name| ControlSocket::path_of(&arguments.socket_dir, name)),
    };
    let device = UserspaceDevice::open(&arguments.name, &options)?;
    let socket = ControlSocket::serve(
        &arguments.socket_dir,
        &arguments.name,
        device.events(),
        device.shared(),
    )
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
