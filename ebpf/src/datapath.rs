//! A node's kernel programs and maps, from opening to taking over to removal.

use std::path::PathBuf;

use clustermesh_ebpf_abi::LAYOUT_VERSION;

use crate::layout::SPECS;
use crate::links::{self, AttachMode};
use crate::maps::{self, Maps};
use crate::pins::{self, Pins};
use crate::programs::{Hook, Programs};
use crate::sys::bpf;
use crate::{Error, FlowReader};

/// Where a node's kernel state lives.
#[derive(Clone, Debug)]
pub struct Options {
    /// Mount point of a BPF file system; pins go to `clustermesh/` below it.
    pub bpffs: PathBuf,
    /// How programs are attached to interfaces.
    pub attach_mode: AttachMode,
    /// The cgroup (v2) whose sockets are load-balanced; `None` = none are.
    pub cgroup: Option<PathBuf>,
}

/// What was there when a [`Datapath`] was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Takeover {
    /// Nothing.
    Fresh,
    /// Maps of this layout, with what a process before us wrote.
    Adopted,
    /// Maps of other layouts, which traffic uses until [`Datapath::activate`]. The maps of this layout
    /// are to be filled first; they hold something only if another take-over was cut off.
    LayoutChanged {
        /// Versions that were found, ascending.
        from: Vec<u32>,
    },
}

/// A node's kernel programs and maps.
///
/// Dropping it, or ending the process in any way, leaves everything attached.
#[derive(Debug)]
pub struct Datapath {
    options: Options,
    pins: Pins,
    programs: Programs,
    maps: Maps,
}

impl Datapath {
    /// Opens the pinned maps, makes the missing ones, and loads the programs onto them. Attaches nothing.
    ///
    /// # Errors
    ///
    /// [`Error::BpffsNotMounted`]; [`Error::PinnedMapMismatch`] if a pinned map of this layout version is
    /// not as expected; [`Error::Load`] and [`Error::Program`] if the kernel refuses the object; [`Error::Pin`].
    pub fn open(options: &Options) -> Result<(Self, Takeover), Error> {
        let pins = Pins::below(&options.bpffs)?;
        pins.create()?;
        let versions = pins.versions()?;
        let others: Vec<u32> = versions
            .iter()
            .copied()
            .filter(|version| *version != LAYOUT_VERSION)
            .collect();
        let takeover = if !others.is_empty() {
            keep_socket_maps(&pins, &others)?;
            Takeover::LayoutChanged { from: others }
        } else if versions.is_empty() {
            Takeover::Fresh
        } else {
            Takeover::Adopted
        };
        for spec in &SPECS {
            let path = pins.map(spec);
            if path.exists() {
                maps::open_checked(&path, spec)?;
            }
        }
        let programs = Programs::load(&pins, options.cgroup.is_some())?;
        let maps = Maps::open(&pins)?;
        let datapath = Self {
            options: options.clone(),
            pins,
            programs,
            maps,
        };
        Ok((datapath, takeover))
    }

    /// The maps of this layout.
    #[must_use]
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Makes this object's programs run everywhere: at `cm_net`, the peer of the host's own veth pair, at the
    /// devices of the underlay, at every pod interface and every device of
    /// [`set_encryption_devices`](Self::set_encryption_devices) known from before, and at the cgroup. What is
    /// attached already is switched in place, no packet meets a gap; what is attached to other devices, or by
    /// another build to hooks that this one does not know, is detached. Repeating it is fine.
    ///
    /// Interfaces are those of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::InterfaceGone`] for `cm_net` or a device of the underlay; [`Error::Interface`];
    /// [`Error::Cgroup`]; [`Error::Pin`]. What was done before the error stays.
    pub fn activate(
        &mut self,
        cm_net_ifindex: u32,
        underlay_ifindexes: &[u32],
    ) -> Result<(), Error> {
        let before = links::attached(&self.pins)?;
        for (hook, ifindex) in &before {
            if matches!(hook, Hook::Pod | Hook::Wireguard | Hook::NetworkOut) {
                match self.attach(*hook, *ifindex) {
                    // Deleted while nobody looked.
                    Err(Error::InterfaceGone { .. }) => {
                        links::detach(&self.pins, *hook, *ifindex)?;
                    }
                    result => result?,
                }
            }
        }
        self.attach(Hook::Host, cm_net_ifindex)?;
        for ifindex in underlay_ifindexes {
            self.attach(Hook::Network, *ifindex)?;
        }
        for (hook, ifindex) in before {
            let wanted = match hook {
                Hook::Pod | Hook::Wireguard | Hook::NetworkOut => true,
                Hook::Host => ifindex == cm_net_ifindex,
                Hook::Network => underlay_ifindexes.contains(&ifindex),
            };
            if !wanted {
                links::detach(&self.pins, hook, ifindex)?;
            }
        }
        links::detach_unknown(&self.pins)?;
        match &self.options.cgroup {
            Some(cgroup) => links::attach_cgroup(&self.pins, &self.programs, cgroup),
            None => links::detach_cgroup(&self.pins),
        }
    }

    /// Makes packets that WireGuard devices open be taken, and what leaves by `guarded` devices of the underlay be
    /// judged: to be called with all of them after [`activate`](Self::activate) and whenever they change, with none
    /// where nothing is encrypted. The program at the way out is needed with
    /// [`CONFIG_STRICT`](clustermesh_ebpf_abi::CONFIG_STRICT) and
    /// [`CONFIG_ENCRYPT_NODES`](clustermesh_ebpf_abi::CONFIG_ENCRYPT_NODES) only. Other devices are let go of, after
    /// the new ones are attached. Repeating it is fine.
    ///
    /// # Errors
    ///
    /// [`Error::InterfaceGone`], [`Error::Interface`], [`Error::Pin`]. What was done before the error stays.
    pub fn set_encryption_devices(
        &mut self,
        wireguard: &[u32],
        guarded: &[u32],
    ) -> Result<(), Error> {
        for (hook, wanted) in [(Hook::NetworkOut, guarded), (Hook::Wireguard, wireguard)] {
            for ifindex in wanted {
                self.attach(hook, *ifindex)?;
            }
            for (attached, ifindex) in links::attached(&self.pins)? {
                if attached == hook && !wanted.contains(&ifindex) {
                    links::detach(&self.pins, hook, ifindex)?;
                }
            }
        }
        Ok(())
    }

    /// Attaches the program for packets from a pod to the host end of its veth pair; repeating it is fine.
    ///
    /// # Errors
    ///
    /// [`Error::InterfaceGone`], [`Error::Interface`], [`Error::Pin`].
    pub fn attach_pod(&mut self, ifindex: u32) -> Result<(), Error> {
        self.attach(Hook::Pod, ifindex)
    }

    /// Detaches what [`attach_pod`](Self::attach_pod) attached; the interface may be gone.
    ///
    /// # Errors
    ///
    /// [`Error::Interface`], [`Error::Pin`].
    pub fn detach_pod(&mut self, ifindex: u32) -> Result<(), Error> {
        links::detach(&self.pins, Hook::Pod, ifindex)
    }

    /// Host-end interfaces to which [`attach_pod`](Self::attach_pod) attached, now or in a process before us.
    ///
    /// # Errors
    ///
    /// [`Error::Pin`].
    pub fn attached_pods(&self) -> Result<Vec<u32>, Error> {
        let attached = links::attached(&self.pins)?;
        Ok(attached
            .into_iter()
            .filter(|(hook, _)| *hook == Hook::Pod)
            .map(|(_, ifindex)| ifindex)
            .collect())
    }

    /// Removes the maps of other layouts; to be called after [`activate`](Self::activate), when nothing uses
    /// them any more. Until then the next [`open`](Self::open) reports [`Takeover::LayoutChanged`] again.
    ///
    /// # Errors
    ///
    /// [`Error::Pin`].
    pub fn finish_takeover(&self) -> Result<(), Error> {
        self.pins.remove_other_versions()
    }

    /// Detaches everything and removes all pins, of every layout; nothing there is fine.
    ///
    /// # Errors
    ///
    /// [`Error::BpffsNotMounted`], [`Error::Interface`], [`Error::Pin`].
    pub fn uninstall(options: &Options) -> Result<(), Error> {
        let pins = Pins::below(&options.bpffs)?;
        for (hook, ifindex) in links::attached(&pins)? {
            links::detach(&pins, hook, ifindex)?;
        }
        links::detach_unknown(&pins)?;
        links::detach_cgroup(&pins)?;
        pins.remove_all()
    }

    fn attach(&mut self, hook: Hook, ifindex: u32) -> Result<(), Error> {
        let mode = self.options.attach_mode;
        links::attach(&self.pins, &mut self.programs, mode, hook, ifindex)
    }
}

const _: () = {
    const fn can_be_shared<T: Send + Sync>() {}
    const fn can_be_sent<T: Send>() {}
    can_be_shared::<Datapath>();
    can_be_shared::<Maps>();
    can_be_sent::<FlowReader>();
};

/// Carries over what sockets remember, if it looks the same in the newest other layout: sockets live on
/// while the programs change, and their peers' names and answers depend on it.
fn keep_socket_maps(pins: &Pins, others: &[u32]) -> Result<(), Error> {
    for spec in SPECS.iter().filter(|spec| spec.belongs_to_sockets()) {
        let path = pins.map(spec);
        let Some(version) = others
            .iter()
            .rev()
            .find(|version| pins.map_of(spec, **version).exists())
        else {
            continue;
        };
        if !path.exists()
            && let Ok(map) = maps::open_checked(&pins.map_of(spec, *version), spec)
        {
            bpf::pin(std::os::fd::AsFd::as_fd(&map), &path)
                .map_err(|e| pins::failed("pin the map at", &path, e))?;
        }
    }
    Ok(())
}
