//! Two machines joined by an underlay, and WireGuard devices of several makers between them.

pub mod device;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

use crate::lab::host::{command_in, ip_batch, run, run_unchecked, sh};
use crate::lab::requirements;
use crate::lab::teardown::{self, PREFIX_START};
use device::{Device, Maker, Running};

/// The two machines, by place.
pub const SIDES: [usize; 2] = [0, 1];

/// Two network namespaces with a veth pair between them.
#[derive(Debug)]
pub struct Pair {
    prefix: String,
    folder: PathBuf,
    tunnels: AtomicU32,
}

/// A tunnel between the two: a device on either side.
#[derive(Debug)]
pub struct Tunnel {
    /// By side.
    pub devices: [Device; 2],
    number: u32,
}

/// Which IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Pair {
    /// Makes the namespaces.
    ///
    /// # Errors
    /// When the machine lacks something, or a command fails.
    pub async fn new() -> Result<Self> {
        static PAIRS: AtomicU32 = AtomicU32::new(0);
        let mut missing = requirements::missing();
        missing.extend(requirements::program("wg", "wireguard-tools"));
        anyhow::ensure!(
            missing.is_empty(),
            "this machine lacks: {}",
            missing.join("; ")
        );
        let number = PAIRS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{PREFIX_START}{:x}xw{number}", std::process::id());
        let folder = teardown::make_folder(&prefix)?;
        let pair = Self {
            prefix,
            folder,
            tunnels: AtomicU32::new(1 + 100 * number),
        };
        for side in SIDES {
            sh("ip", &["netns", "add", &pair.netns(side)]).await?;
        }
        let (one, other) = (pair.netns(0), pair.netns(1));
        ip_batch(
            None,
            &format!("link add eth0 netns {one} type veth peer name eth0 netns {other}\n"),
        )
        .await?;
        for side in SIDES {
            let own = side + 1;
            let lines = format!(
                "link set lo up\naddr add 192.0.2.{own}/24 dev eth0\naddr add 2001:db8::{own}/64 dev eth0 nodad\nlink set eth0 up\n"
            );
            ip_batch(Some(&pair.netns(side)), &lines).await?;
        }
        Ok(pair)
    }

    /// Name of a side's namespace.
    #[must_use]
    pub fn netns(&self, side: usize) -> String {
        format!("{}-{side}", self.prefix)
    }

    /// Where files may be written.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Address of a side on the underlay.
    #[must_use]
    pub fn underlay(&self, side: usize, version: Version) -> String {
        match version {
            Version::V4 => format!("192.0.2.{}", side + 1),
            Version::V6 => format!("[2001:db8::{}]", side + 1),
        }
    }

    /// Starts a device on either side and makes them peers; side 0 knows where the other is.
    ///
    /// # Errors
    /// When a device does not start, or `wg` refuses.
    pub async fn tunnel(&self, makers: [Maker; 2], outer: Version) -> Result<Tunnel> {
        self.tunnel_as(makers, outer, |_| Running::default()).await
    }

    /// As [`Self::tunnel`], with a say in how each side runs.
    ///
    /// # Errors
    /// As there.
    pub async fn tunnel_as(
        &self,
        makers: [Maker; 2],
        outer: Version,
        running: impl Fn(usize) -> Running,
    ) -> Result<Tunnel> {
        let number = self.tunnels.fetch_add(1, Ordering::Relaxed);
        let [first, second] = makers;
        let devices = [
            Device::start_as(self, 0, number, first, running(0)).await?,
            Device::start_as(self, 1, number, second, running(1)).await?,
        ];
        for side in SIDES {
            let (own, other) = (&devices[side], &devices[1 - side]);
            let prefixes = format!(
                "10.{}.0.{}/32,fd00:{number}::{}/128",
                number % 250,
                2 - side,
                2 - side
            );
            let mut change = vec!["peer", other.public_key(), "allowed-ips", &prefixes];
            let endpoint = format!("{}:{}", self.underlay(1 - side, outer), other.port());
            if side == 0 {
                change.extend(["endpoint", &endpoint]);
            }
            own.wg(&change).await?;
            let address = side + 1;
            let name = own.name();
            let lines = format!(
                "addr add 10.{}.0.{address}/24 dev {name}\naddr add fd00:{number}::{address}/64 dev {name} nodad\nlink set {name} mtu 1420 up\n",
                number % 250
            );
            ip_batch(Some(&self.netns(side)), &lines).await?;
        }
        Ok(Tunnel { devices, number })
    }

    /// Sends echo requests from a side to an address; gives how many were answered.
    ///
    /// # Errors
    /// When ping cannot be run.
    pub async fn ping(&self, from: usize, to: &str, count: u32) -> Result<u32> {
        let mut command = command_in(&self.netns(from), None, Path::new("ping"));
        let count = count.to_string();
        command.args(["-n", "-c", &count, "-i", "0.05", "-W", "10", to]);
        let output = run_unchecked(&mut command).await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.split_whitespace()
            .zip(text.split_whitespace().skip(1))
            .find(|(_, next)| next.starts_with("received"))
            .and_then(|(number, _)| number.parse().ok())
            .with_context(|| format!("ping {to}: {text}"))
    }

    /// Turns a feature of the underlay on or off, on both sides.
    ///
    /// # Errors
    /// When ethtool fails.
    pub async fn set_feature(&self, feature: &str, setting: &str) -> Result<()> {
        for side in SIDES {
            let mut command = command_in(&self.netns(side), None, Path::new("ethtool"));
            run(command.args(["-K", "eth0", feature, setting])).await?;
        }
        Ok(())
    }

    /// Ends every process and removes every name.
    ///
    /// # Errors
    /// When something stays.
    pub async fn remove(self) -> Result<()> {
        let failures = teardown::remove_lab(&self.prefix).await;
        anyhow::ensure!(failures.is_empty(), "clean-up: {}", failures.join("; "));
        Ok(())
    }
}

impl Tunnel {
    /// Address of a side inside the tunnel.
    #[must_use]
    pub fn address(&self, side: usize, version: Version) -> String {
        match version {
            Version::V4 => format!("10.{}.0.{}", self.number % 250, side + 1),
            Version::V6 => format!("fd00:{}::{}", self.number, side + 1),
        }
    }

    /// Ends both devices.
    ///
    /// # Errors
    /// When one does not end.
    pub async fn stop(self) -> Result<()> {
        for device in self.devices {
            device.stop().await?;
        }
        Ok(())
    }
}
