//! A process that runs a WireGuard device: ours or another's, configured by `wg`.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::process::Command;

use super::Pair;
use crate::judges::programs::cache_folder;
use crate::lab::binaries_folder;
use crate::lab::host::{command_in, run, sh};
use crate::lab::process::Process;

/// wireguard-go, by the version in `integration/peers/wireguard/go.mod`.
const WIREGUARD_GO: &str = "wireguard-go-0.0.0-20260522210424-ecfc5a8d5446/wireguard-go";
/// boringtun's own device, by the version in `integration/peers/build.sh`.
const BORINGTUN: &str = "boringtun-0.7.1/bin/boringtun-cli";
/// Where all of them make their control sockets, whatever the namespace.
const SOCKET_DIR: &str = "/var/run/wireguard";
/// Longest wait for a control socket.
const START_MAX: Duration = Duration::from_secs(30);

/// Whose device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// Ours, by its own rule for threads.
    Ours,
    /// wireguard-go.
    WireguardGo,
    /// boringtun's, with so many threads.
    Boringtun(u8),
}

/// How a device is run beside the ordinary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Running {
    /// Before all other work of the machine.
    pub is_real_time: bool,
    /// On this processor only.
    pub processor: Option<usize>,
}

/// A running device.
#[derive(Debug)]
pub struct Device {
    process: Process,
    name: String,
    port: u16,
    public_key: String,
}

impl Device {
    /// Starts a device and gives it a key and a port.
    ///
    /// # Errors
    /// When its program is missing, it does not start, or `wg` refuses.
    pub async fn start(pair: &Pair, side: usize, number: u32, maker: Maker) -> Result<Self> {
        Self::start_as(pair, side, number, maker, Running::default()).await
    }

    /// As [`Self::start`], with a say in how it runs.
    ///
    /// # Errors
    /// As there.
    pub async fn start_as(
        pair: &Pair,
        side: usize,
        number: u32,
        maker: Maker,
        running: Running,
    ) -> Result<Self> {
        // Sockets are told apart by name on the whole machine.
        let name = format!("w{:x}{number}{}", std::process::id(), ["a", "b"][side]);
        let netns = pair.netns(side);
        let mut command = program(&netns, maker, &name, running)?;
        command
            .env("WG_PROCESS_FOREGROUND", "1")
            .env("LOG_LEVEL", "error");
        let log = pair.folder().join(format!("{name}.log"));
        let process = Process::start(&format!("{maker:?} {name}"), &mut command, &log)?;
        let socket = socket(&name);
        let begun = tokio::time::Instant::now();
        while tokio::net::UnixStream::connect(&socket).await.is_err() {
            if begun.elapsed() > START_MAX {
                bail!(
                    "{maker:?} {name} does not serve {}:\n{}",
                    socket.display(),
                    process.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let key = pair.folder().join(format!("{name}.key"));
        let private = sh("wg", &["genkey"]).await?;
        let mut file = std::fs::File::options()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&key)
            .with_context(|| key.display().to_string())?;
        file.write_all(private.as_bytes())?;
        let number = u16::try_from(number)?;
        let port = 20_000 + 2 * number + u16::try_from(side)?;
        let (key, text) = (key.display().to_string(), port.to_string());
        sh(
            "wg",
            &["set", &name, "private-key", &key, "listen-port", &text],
        )
        .await?;
        // Not every device says what its key is.
        let public_key = sh("sh", &["-c", "wg pubkey < \"$0\"", &key]).await?;
        Ok(Self {
            process,
            name,
            port,
            public_key: public_key.trim().to_owned(),
        })
    }

    /// Name of the network device.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket(&self.name)
    }

    /// Its UDP port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// Its public key, base64.
    #[must_use]
    pub fn public_key(&self) -> &str {
        &self.public_key
    }

    /// The process that runs it.
    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }

    /// Changes it: `wg set NAME …`.
    ///
    /// # Errors
    /// When `wg` refuses.
    pub async fn wg(&self, change: &[&str]) -> Result<()> {
        let mut arguments = vec!["set", &self.name];
        arguments.extend(change);
        sh("wg", &arguments).await.map(drop)
    }

    /// One column of `wg show` of its only peer.
    ///
    /// # Errors
    /// When `wg` fails or there is no peer.
    pub async fn show(&self, what: &str) -> Result<String> {
        let text = sh("wg", &["show", &self.name, what]).await?;
        let (_, value) = text
            .trim()
            .split_once('\t')
            .with_context(|| format!("wg show {} {what}: {text:?}", self.name))?;
        Ok(value.to_owned())
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop(self) -> Result<()> {
        // Other makers' devices do not all end by SIGTERM.
        self.process.stop(Signal::SIGKILL).await?;
        let _ = std::fs::remove_file(socket(&self.name));
        Ok(())
    }
}

fn socket(name: &str) -> PathBuf {
    Path::new(SOCKET_DIR).join(format!("{name}.sock"))
}

fn program(netns: &str, maker: Maker, name: &str, running: Running) -> Result<Command> {
    let path: PathBuf = match maker {
        Maker::Ours => binaries_folder()?.join("clustermesh-wireguard"),
        Maker::WireguardGo => cache_folder()?.join(WIREGUARD_GO),
        Maker::Boringtun(_) => cache_folder()?.join(BORINGTUN),
    };
    let remedy = if maker == Maker::Ours {
        "make build"
    } else {
        "make peers"
    };
    anyhow::ensure!(
        path.is_file(),
        "{} is missing: run `{remedy}`",
        path.display()
    );
    let mut words: Vec<String> = Vec::new();
    if running.is_real_time {
        words.extend(["chrt", "-f", "50"].map(str::to_owned));
    }
    if let Some(processor) = running.processor {
        words.extend(["taskset".to_owned(), "-c".to_owned(), processor.to_string()]);
    }
    words.push(path.display().to_string());
    match maker {
        Maker::Ours => words.push("--foreground".to_owned()),
        Maker::WireguardGo => words.push("-f".to_owned()),
        Maker::Boringtun(threads) => {
            let threads = threads.to_string();
            words.extend(["-f", "--disable-drop-privileges", "-t", &threads].map(str::to_owned));
        }
    }
    words.push(name.to_owned());
    let (first, rest) = words.split_first().context("a program")?;
    let mut command = command_in(netns, None, Path::new(first));
    command.args(rest);
    Ok(command)
}

/// A client of the tunnel that runs to its end.
///
/// # Errors
/// When it fails.
pub async fn run_in(netns: &str, program: &str, arguments: &[&str]) -> Result<String> {
    let output = run(command_in(netns, None, Path::new(program)).args(arguments)).await?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
