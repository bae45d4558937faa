//! Namespaces, cgroups and BPF file systems for contenders that need no lab, removed as a lab is.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use clustermesh_ebpf::{AttachMode, Datapath, Options};

use crate::lab::host::{cgroup2_root, ip_batch, netns_path, sh};
use crate::lab::tap::in_netns;
use crate::lab::teardown::{self, PREFIX_START};

/// A place of its own on this machine.
#[derive(Debug)]
pub(super) struct Site {
    prefix: String,
    folder: PathBuf,
}

impl Site {
    /// A new one.
    pub(super) fn new() -> Result<Self> {
        static SITES: AtomicU32 = AtomicU32::new(0);
        let number = SITES.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("{PREFIX_START}{:x}xb{number}", std::process::id());
        let folder = teardown::make_folder(&prefix)?;
        Ok(Self { prefix, folder })
    }

    /// Where files may be written.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes a namespace in which `addresses` are local and `routed` leads to the loopback device.
    pub(super) async fn netns(
        &self,
        name: &str,
        addresses: &[Ipv4Addr],
        routed: &str,
    ) -> Result<String> {
        let netns = format!("{}-{name}", self.prefix);
        sh("ip", &["netns", "add", &netns]).await?;
        let mut lines = "link set lo up\n".to_owned();
        for address in addresses {
            lines.push_str(&format!("addr add {address}/32 dev lo\n"));
        }
        if let Some(source) = addresses.first() {
            lines.push_str(&format!("route add {routed} dev lo src {source}\n"));
        }
        ip_batch(Some(&netns), &lines).await?;
        // The accept queue must hold what arrives while the server has lost its CPU.
        self.sysctl(&netns, "net.core.somaxconn=65535").await?;
        self.sysctl(&netns, "net.ipv4.tcp_max_syn_backlog=65535")
            .await?;
        Ok(netns)
    }

    /// Sets a kernel parameter of a namespace.
    pub(super) async fn sysctl(&self, netns: &str, setting: &str) -> Result<()> {
        let arguments = ["netns", "exec", netns, "sysctl", "-qw", setting];
        sh("ip", &arguments).await.map(drop)
    }

    /// Makes a cgroup.
    pub(super) fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let cgroup = cgroup2_root()?.join(&self.prefix).join(name);
        std::fs::create_dir_all(&cgroup).with_context(|| cgroup.display().to_string())?;
        Ok(cgroup)
    }

    /// Mounts a BPF file system.
    pub(super) async fn bpffs(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        std::fs::create_dir_all(&path)?;
        let text = path.display().to_string();
        sh("mount", &["-t", "bpf", "none", &text]).await?;
        Ok(path)
    }

    /// Loads the programs and attaches them to `cgroup`, and to a device of their own in `netns`. They
    /// stay; the maps are on the BPF file system that is returned.
    pub(super) async fn datapath(&self, name: &str, netns: &str, cgroup: &Path) -> Result<PathBuf> {
        let bpffs = self.bpffs(name).await?;
        let device = format!("{name}-net");
        let lines =
            format!("link add {device} type veth peer name {name}-end\nlink set {device} up\n");
        ip_batch(Some(netns), &lines).await?;
        let options = Options {
            bpffs: bpffs.clone(),
            attach_mode: AttachMode::detect(),
            cgroup: Some(cgroup.to_owned()),
        };
        in_netns(&netns_path(netns), move || {
            let ifindex = nix::net::if_::if_nametoindex(device.as_str())?;
            let (mut datapath, _) = Datapath::open(&options)?;
            datapath.activate(ifindex, &[])?;
            Ok(())
        })?;
        Ok(bpffs)
    }

    /// Ends every process and removes every name.
    pub(super) async fn remove(self) -> Result<()> {
        let failures = teardown::remove_lab(&self.prefix).await;
        anyhow::ensure!(failures.is_empty(), "clean-up: {}", failures.join("; "));
        Ok(())
    }
}

/// An address with port, as text.
pub(super) fn at(address: Ipv4Addr, port: u16) -> String {
    SocketAddr::from((address, port)).to_string()
}
