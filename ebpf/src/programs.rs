//! The object with the kernel programs: its names, and loading it onto pinned maps.

use std::io::ErrorKind;
use std::os::fd::{AsFd as _, BorrowedFd};

use aya::programs::{Program, ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader};

use crate::layout::SPECS;
use crate::pins::Pins;
use crate::sys::bpf::AttachType;
use crate::{Error, Features, features};

/// Compiled by `build.rs`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("CLUSTERMESH_BPF_OBJECT"));

/// Bytes of a verifier's log that an error keeps, from its end.
const VERIFIER_LOG_KEPT_BYTES_MAX: usize = 4_096;

/// Attempts to load one program while the verifier answers EAGAIN.
const LOAD_ATTEMPTS_MAX: u32 = 5;

/// Where packets are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hook {
    /// Host end of a pod's veth pair.
    Pod,
    /// The peer of the host's own veth pair.
    Host,
    /// A device of the underlay.
    Network,
    /// A WireGuard device.
    Wireguard,
    /// A device of the underlay, where packets leave.
    NetworkOut,
}

impl Hook {
    pub(crate) const ALL: [Self; 5] = [
        Self::Pod,
        Self::Host,
        Self::Network,
        Self::Wireguard,
        Self::NetworkOut,
    ];

    /// Name of the program, and in pins.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Pod => "from_pod",
            Self::Host => "from_host",
            Self::Network => "from_network",
            Self::Wireguard => "from_wireguard",
            Self::NetworkOut => "to_network",
        }
    }

    /// True where packets leave the interface.
    pub(crate) const fn is_egress(self) -> bool {
        matches!(self, Self::NetworkOut)
    }
}

/// The programs at the cgroup.
pub(crate) const SOCKET_PROGRAMS: [(&str, AttachType); 9] = [
    ("socket_connect4", AttachType::Connect4),
    ("socket_connect6", AttachType::Connect6),
    ("socket_sendmsg4", AttachType::Sendmsg4),
    ("socket_sendmsg6", AttachType::Sendmsg6),
    ("socket_recvmsg4", AttachType::Recvmsg4),
    ("socket_recvmsg6", AttachType::Recvmsg6),
    ("socket_getpeername4", AttachType::Getpeername4),
    ("socket_getpeername6", AttachType::Getpeername6),
    ("socket_release", AttachType::SocketRelease),
];

/// The loaded programs. Dropping them detaches nothing: links are made and held outside of aya.
#[derive(Debug)]
pub(crate) struct Programs(Ebpf);

impl Programs {
    /// Loads the programs onto the maps of this layout; maps that are not there are made and pinned.
    pub(crate) fn load(pins: &Pins, with_sockets: bool) -> Result<Self, Error> {
        Self::load_here(pins, with_sockets).map_err(|cause| match features::too_old() {
            Some(release) => Error::KernelTooOld {
                release,
                cause: Box::new(cause),
            },
            None => cause,
        })
    }

    fn load_here(pins: &Pins, with_sockets: bool) -> Result<Self, Error> {
        let constants = Features::probe().constants();
        let mut loader = EbpfLoader::new();
        for (name, value) in &constants {
            loader.override_global(name, value, true);
        }
        for spec in &SPECS {
            loader.map_pin_path(spec.symbol, pins.map(spec));
        }
        let mut programs = Self(loader.load(OBJECT).map_err(Box::new)?);
        for hook in Hook::ALL {
            let name = hook.name();
            let program = programs.classifier(name)?;
            patiently(|| program.load(), interrupted).map_err(|e| refused(name, &e))?;
        }
        if with_sockets {
            for (name, _) in SOCKET_PROGRAMS {
                match programs.0.program_mut(name) {
                    Some(Program::CgroupSockAddr(program)) => {
                        patiently(|| program.load(), interrupted).map_err(|e| refused(name, &e))?;
                    }
                    Some(Program::CgroupSock(program)) => {
                        patiently(|| program.load(), interrupted).map_err(|e| refused(name, &e))?;
                    }
                    _ => return Err(missing(name)),
                }
            }
        }
        Ok(programs)
    }

    /// A program for an interface.
    pub(crate) fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, Error> {
        match self.0.program_mut(name) {
            Some(Program::SchedClassifier(program)) => Ok(program),
            _ => Err(missing(name)),
        }
    }

    /// The descriptor of a loaded program.
    pub(crate) fn fd(&self, name: &'static str) -> Result<BorrowedFd<'_>, Error> {
        let program = self.0.program(name).ok_or_else(|| missing(name))?;
        let fd = program.fd().map_err(|e| refused(name, &e))?;
        Ok(fd.as_fd())
    }
}

/// Loads again where the verifier gave up because a signal was pending, as libbpf does.
fn patiently<E>(
    mut load: impl FnMut() -> Result<(), E>,
    interrupted: impl Fn(&E) -> bool,
) -> Result<(), E> {
    for _ in 1..LOAD_ATTEMPTS_MAX {
        match load() {
            Err(error) if interrupted(&error) => {}
            ended => return ended,
        }
    }
    load()
}

/// Whether the verifier answered EAGAIN.
fn interrupted(error: &ProgramError) -> bool {
    matches!(
        error,
        ProgramError::LoadError { io_error, .. } if io_error.kind() == ErrorKind::WouldBlock
    )
}

fn missing(program: &'static str) -> Error {
    Error::Program {
        program,
        cause: "the object has no such program".to_owned(),
    }
}

fn refused(program: &'static str, error: &ProgramError) -> Error {
    let mut cause = error.to_string();
    if let Some(excess) = cause.len().checked_sub(VERIFIER_LOG_KEPT_BYTES_MAX) {
        let from = (excess..cause.len()).find(|i| cause.is_char_boundary(*i));
        cause.drain(..from.unwrap_or_default());
    }
    Error::Program { program, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_load_is_repeated_five_times_at_most_and_a_refused_one_never() {
        let mut attempts = 0;
        let result = patiently(
            || {
                attempts += 1;
                if attempts < 3 { Err("again") } else { Ok(()) }
            },
            |_| true,
        );
        assert!(result.is_ok());
        assert_eq!(attempts, 3);
        let mut attempts = 0;
        let result = patiently(
            || {
                attempts += 1;
                Err("again")
            },
            |_| true,
        );
        assert!(result.is_err());
        assert_eq!(attempts, LOAD_ATTEMPTS_MAX);
        let mut attempts = 0;
        let result = patiently(
            || {
                attempts += 1;
                Err("refused")
            },
            |_| false,
        );
        assert!(result.is_err());
        assert_eq!(attempts, 1);
    }
}
