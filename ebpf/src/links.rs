//! Attaching, switching and detaching programs so that traffic never meets a gap.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::{ProgramError, TcAttachType};
use nix::net::if_::if_indextoname;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use crate::Error;
use crate::pins::{self, Pins};
use crate::programs::{Hook, Programs, SOCKET_PROGRAMS};
use crate::sys::bpf::{self, AttachType, LinkInfo};

/// Priority of our filters on clsact; together with the handle it is how they are found again.
const FILTER_PRIORITY: u16 = 0xc1;
/// Handle of our filters on clsact.
const FILTER_HANDLE: TcHandle = TcHandle::new(0, 0xc1a5);
/// Why nothing can be attached with links.
const NO_TCX: &str = "this kernel has no tcx (6.6 or newer has): set attach_mode to auto or clsact";
/// Why there is no such queueing discipline.
const NO_CLSACT: &str = "this kernel has no clsact queueing discipline (module sch_ingress)";
/// End of the name of a pin that is about to replace another.
const NEXT_SUFFIX: &str = "_next";

/// How programs are attached to interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachMode {
    /// tcx links (kernel 6.6 and later).
    Tcx,
    /// Filters on a clsact qdisc.
    Clsact,
}

impl AttachMode {
    /// The best mode that this kernel has.
    #[must_use]
    pub fn detect() -> Self {
        if bpf::tcx_supported() {
            Self::Tcx
        } else {
            Self::Clsact
        }
    }
}

/// Interfaces at which a pin says that something is attached, sorted.
pub(crate) fn attached(pins: &Pins) -> Result<Vec<(Hook, u32)>, Error> {
    let mut found = Vec::new();
    for dir in [pins.links(), pins.filters()] {
        found.extend(pins::names(&dir)?.iter().filter_map(|name| parse(name)));
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Hook and interface in the name of a pin.
fn parse(name: &str) -> Option<(Hook, u32)> {
    let (hook, ifindex) = name.rsplit_once('-')?;
    let hook = Hook::ALL.into_iter().find(|known| known.name() == hook)?;
    Some((hook, ifindex.parse().ok()?))
}

/// Detaches links that another build knows and this one does not: nobody would switch or remove them.
pub(crate) fn detach_unknown(pins: &Pins) -> Result<(), Error> {
    let is_known = |name: &str| {
        parse(name).is_some() || SOCKET_PROGRAMS.iter().any(|(known, _)| *known == name)
    };
    for name in pins::names(&pins.links())? {
        if !is_known(&name) {
            detach_link(&pins.links().join(name))?;
        }
    }
    // What is left here is the half of a replacement that was cut off.
    for name in pins::names(&pins.filters())? {
        if parse(&name).is_none() {
            pins::remove(&pins.filters().join(name))?;
        }
    }
    Ok(())
}

/// Makes `hook`'s program run at the interface: attaches it, or puts it in the place of what is attached.
pub(crate) fn attach(
    pins: &Pins,
    programs: &mut Programs,
    mode: AttachMode,
    hook: Hook,
    ifindex: u32,
) -> Result<(), Error> {
    match mode {
        AttachMode::Tcx => {
            attach_tcx(pins, programs, hook, ifindex)?;
            detach_filter(pins, hook, ifindex)
        }
        AttachMode::Clsact => {
            attach_filter(pins, programs, hook, ifindex)?;
            detach_link(&pins.links().join(pin_name(hook, ifindex)))
        }
    }
}

/// Detaches `hook`'s program from the interface, however it was attached; the interface may be gone.
pub(crate) fn detach(pins: &Pins, hook: Hook, ifindex: u32) -> Result<(), Error> {
    detach_link(&pins.links().join(pin_name(hook, ifindex)))?;
    detach_filter(pins, hook, ifindex)
}

fn pin_name(hook: Hook, ifindex: u32) -> String {
    format!("{}-{ifindex}", hook.name())
}

fn attach_tcx(pins: &Pins, programs: &Programs, hook: Hook, ifindex: u32) -> Result<(), Error> {
    let program = programs.fd(hook.name())?;
    let path = pins.links().join(pin_name(hook, ifindex));
    let switched = switch_link(&path, program, |link| link.ifindex() == ifindex);
    if switched.map_err(|e| interface_error("switch", hook, ifindex, e))? {
        return Ok(());
    }
    let direction = if hook.is_egress() {
        AttachType::TcxEgress
    } else {
        AttachType::TcxIngress
    };
    bpf::link_tcx(program, ifindex, direction)
        .and_then(|link| bpf::pin(link.as_fd(), &path))
        .map_err(|e| {
            if bpf::tcx_supported() {
                interface_error("attach", hook, ifindex, e)
            } else {
                interface_failure("attach", hook, ifindex, NO_TCX.to_owned())
            }
        })
}

/// Switches the pinned link to `program`. False: there is no such link, or no longer one to this target; its pin is removed.
fn switch_link(
    path: &Path,
    program: BorrowedFd<'_>,
    is_ours: impl FnOnce(&LinkInfo) -> bool,
) -> io::Result<bool> {
    let link = match bpf::get_pinned(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    if is_ours(&bpf::link_info(link.as_fd())?) {
        match bpf::link_update(link.as_fd(), program) {
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            result => return result.map(|()| true),
        }
    }
    unlink(link.as_fd(), path)?;
    Ok(false)
}

fn unlink(link: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    match bpf::link_detach(link) {
        // What it was attached to is gone.
        Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => return Err(error),
        _ => {}
    }
    std::fs::remove_file(path)
}

fn detach_link(path: &Path) -> Result<(), Error> {
    let detached = match bpf::get_pinned(path) {
        Ok(link) => unlink(link.as_fd(), path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    detached.map_err(|e| pins::failed("detach the link", path, e))
}

fn interface_name(ifindex: u32) -> Result<String, Error> {
    let name = if_indextoname(ifindex).ok();
    name.as_deref()
        .and_then(|name| CStr::to_str(name).ok())
        .map(str::to_owned)
        .ok_or(Error::InterfaceGone { ifindex })
}

fn attach_filter(
    pins: &Pins,
    programs: &mut Programs,
    hook: Hook,
    ifindex: u32,
) -> Result<(), Error> {
    let interface = interface_name(ifindex)?;
    match qdisc_add_clsact(&interface) {
        Err(error) if tc_errno(&error) != Some(libc::EEXIST) => {
            let error = match tc_errno(&error) {
                Some(libc::ENOENT) => io::Error::other(NO_CLSACT),
                Some(errno) => io::Error::from_raw_os_error(errno),
                None => io::Error::other(error),
            };
            return Err(interface_error(
                "add a clsact qdisc for",
                hook,
                ifindex,
                error,
            ));
        }
        _ => {}
    }
    let classifier = programs.classifier(hook.name())?;
    let options = NlOptions {
        priority: FILTER_PRIORITY,
        handle: FILTER_HANDLE,
        classid: None,
    };
    let new = classifier.attach_with_options(
        &interface,
        direction(hook),
        TcAttachOptions::Netlink(options),
    );
    let attached = match new {
        Err(error) if errno(&error) == Some(libc::EEXIST) => our_filter(hook, &interface)
            .map_err(TcError::from)
            .map_err(ProgramError::from)
            .and_then(|filter| classifier.attach_to_link(filter)),
        attached => attached,
    };
    let filter = attached
        .and_then(|id| classifier.take_link(id))
        .map_err(|e| interface_error("attach", hook, ifindex, into_io(e)))?;
    // aya's drop would detach it.
    std::mem::forget(filter);

    let path = pins.filters().join(pin_name(hook, ifindex));
    let next = pins
        .filters()
        .join(format!("{}{NEXT_SUFFIX}", pin_name(hook, ifindex)));
    pins::remove(&next)?;
    bpf::pin(programs.fd(hook.name())?, &next)
        .and_then(|()| std::fs::rename(&next, &path))
        .map_err(|e| pins::failed("pin the program at", &path, e))
}

/// Where on clsact.
const fn direction(hook: Hook) -> TcAttachType {
    if hook.is_egress() {
        TcAttachType::Egress
    } else {
        TcAttachType::Ingress
    }
}

fn our_filter(hook: Hook, interface: &str) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        interface,
        direction(hook),
        FILTER_PRIORITY,
        FILTER_HANDLE,
        None,
    )
}

fn detach_filter(pins: &Pins, hook: Hook, ifindex: u32) -> Result<(), Error> {
    let path = pins.filters().join(pin_name(hook, ifindex));
    if !path.exists() {
        return Ok(());
    }
    if let Ok(interface) = interface_name(ifindex) {
        let detached = our_filter(hook, &interface)
            .map_err(|e| ProgramError::from(TcError::from(e)))
            .and_then(aya::programs::links::Link::detach);
        match detached {
            // The filter or its qdisc is gone, or the interface since its name was read.
            Err(error)
                if matches!(
                    errno(&error),
                    Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
                ) => {}
            Err(error) => {
                return Err(interface_error("detach", hook, ifindex, into_io(error)));
            }
            Ok(()) => {}
        }
    }
    pins::remove(&path)
}

fn tc_errno(error: &TcError) -> Option<i32> {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error(),
        TcError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}

fn errno(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::TcError(error) => tc_errno(error),
        ProgramError::NetlinkError(error) => error.raw_os_error(),
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

fn into_io(error: ProgramError) -> io::Error {
    errno(&error).map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

fn interface_error(action: &'static str, hook: Hook, ifindex: u32, error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENODEV | libc::ENXIO) => Error::InterfaceGone { ifindex },
        _ => interface_failure(action, hook, ifindex, error.to_string()),
    }
}

fn interface_failure(action: &'static str, hook: Hook, ifindex: u32, cause: String) -> Error {
    Error::Interface {
        action,
        program: hook.name(),
        ifindex,
        cause,
    }
}

/// Makes the socket programs run for the sockets of `cgroup` and below: attaches or switches them.
pub(crate) fn attach_cgroup(pins: &Pins, programs: &Programs, cgroup: &Path) -> Result<(), Error> {
    let failed = |action, program, source| Error::Cgroup {
        action,
        program,
        path: cgroup.to_owned(),
        source,
    };
    let (dir, id) = open_cgroup(cgroup).map_err(|e| failed("attach programs", "socket_*", e))?;
    for (name, attach_type) in SOCKET_PROGRAMS {
        let program = programs.fd(name)?;
        let path = pins.links().join(name);
        let switched = switch_link(&path, program, |link| link.cgroup_id() == id);
        if !switched.map_err(|e| failed("switch", name, e))? {
            attach_socket_program(program, &dir, attach_type, &path)
                .map_err(|e| failed("attach", name, e))?;
        }
    }
    Ok(())
}

/// The folder and the cgroup's id, which is its inode number.
fn open_cgroup(path: &Path) -> io::Result<(File, u64)> {
    let dir = File::open(path)?;
    if fstatfs(&dir)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(io::Error::other("it is not in a cgroup2 hierarchy"));
    }
    let id = dir.metadata()?.ino();
    Ok((dir, id))
}

fn attach_socket_program(
    program: BorrowedFd<'_>,
    cgroup: &File,
    attach_type: AttachType,
    path: &Path,
) -> io::Result<()> {
    let link = bpf::link_cgroup(program, cgroup.as_fd(), attach_type)?;
    bpf::pin(link.as_fd(), path)
}

/// Detaches the socket programs.
pub(crate) fn detach_cgroup(pins: &Pins) -> Result<(), Error> {
    SOCKET_PROGRAMS
        .iter()
        .try_for_each(|(name, _)| detach_link(&pins.links().join(name)))
}
