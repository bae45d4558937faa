//! What every WireGuard device can do, whoever runs it.

use std::fmt;
use std::io;

use clustermesh_encryption_core::config::{Change, DeviceConfig};
use clustermesh_encryption_core::control::PeerStatus;
use clustermesh_encryption_core::control_client::{AnswerError, Description};
use clustermesh_encryption_core::difference::{DifferenceError, difference, with_present};
use clustermesh_encryption_core::key::PublicKey;

/// Who runs a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Backend {
    /// The kernel.
    Kernel,
    /// A process of ours, `clustermesh-wireguard`.
    Userspace,
}

impl Backend {
    /// As in configuration and status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Userspace => "userspace",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// What a device does, and with whom.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStatus {
    /// The public key that belongs to its private key.
    pub public_key: Option<PublicKey>,
    /// UDP port.
    pub listen_port: u16,
    /// Every peer and what is known of it.
    pub peers: Vec<(PublicKey, PeerStatus)>,
    /// Names and numbers of what did not pass, where the device counts that.
    pub counters: Vec<(String, u64)>,
}

impl From<Description> for DeviceStatus {
    fn from(description: Description) -> Self {
        let Description {
            config,
            public_key,
            peers,
            counters,
        } = description;
        let keys = config.peers.iter().map(|peer| peer.public_key);
        Self {
            public_key,
            listen_port: config.listen_port,
            peers: keys.zip(peers).collect(),
            counters,
        }
    }
}

/// Why a device refuses.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A system call failed.
    #[error("cannot {action} the WireGuard device {device}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Name of the device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
    /// It gives no answer.
    #[error(
        "the WireGuard device {device} gives no answer within {waited_seconds} s: the process that serves its control socket \
         is stopped or stuck. `pkill -CONT -f 'clustermesh-wireguard {device}'` lets a stopped one go on; with `-KILL` it \
         ends, and the agent starts it again"
    )]
    Silent {
        /// Name of the device.
        device: String,
        /// How long the answer was waited for, seconds.
        waited_seconds: u64,
    },
    /// It says that it cannot, or says nothing that is understood.
    #[error("WireGuard device {device}: {source}")]
    Answer {
        /// Name of the device.
        device: String,
        /// What it said.
        source: AnswerError,
    },
    /// What is wanted contradicts itself.
    #[error("WireGuard device {device}: {source}")]
    Difference {
        /// Name of the device.
        device: String,
        /// Why.
        source: DifferenceError,
    },
    /// The program of the device in user space did not start.
    #[error(
        "{program} did not start the WireGuard device {device} ({detail}); it has written why to this log"
    )]
    NotStarted {
        /// Path of the program.
        program: String,
        /// Name of the device.
        device: String,
        /// How it ended.
        detail: String,
    },
    /// The kernel has no WireGuard.
    #[error(
        "this kernel has no WireGuard device (module wireguard, Linux 5.6): {source}; use the back end of user space"
    )]
    NoKernelDevice {
        /// What the kernel said.
        source: io::Error,
    },
}

/// A WireGuard device, whoever runs it. It lives on when the value is dropped.
pub trait Device: fmt::Debug + Send + Sync {
    /// Name of the network device.
    fn name(&self) -> &str;

    /// Who runs it.
    fn backend(&self) -> Backend;

    /// What it does now, with all keys.
    ///
    /// # Errors
    /// When the device is gone.
    fn describe(&self) -> Result<Description, DeviceError>;

    /// Takes these steps, in their order.
    ///
    /// # Errors
    /// When it cannot; some may be taken then.
    fn apply(&self, changes: &[Change]) -> Result<(), DeviceError>;

    /// Changes the device into what is wanted, by difference to what it is: a peer that stays keeps its sessions, and
    /// an address that moves from one peer to another is never without one. Gives the number of steps that it took.
    ///
    /// # Errors
    /// When what is wanted contradicts itself, or cannot be had.
    fn configure(&self, wanted: &DeviceConfig, others: Others) -> Result<usize, DeviceError> {
        let actual = self.describe()?.config;
        let whole = match others {
            Others::Removed => wanted,
            Others::Kept => &with_present(&actual, wanted),
        };
        let changes = difference(&actual, whole).map_err(|source| DeviceError::Difference {
            device: self.name().to_owned(),
            source,
        })?;
        if !changes.is_empty() {
            self.apply(&changes)?;
        }
        Ok(changes.len())
    }

    /// How things are.
    ///
    /// # Errors
    /// When the device is gone.
    fn status(&self) -> Result<DeviceStatus, DeviceError> {
        self.describe().map(DeviceStatus::from)
    }

    /// Ends the device and everything that runs it; one that is gone already is fine.
    ///
    /// # Errors
    /// When it stays.
    fn remove(&self) -> Result<(), DeviceError>;
}

/// What becomes of peers that are not among the wanted ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// They go.
    Removed,
    /// They stay: not everything that is wanted is known yet.
    Kept,
}

/// Whether a device was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It ran already, with its peers and their sessions.
    Adopted,
    /// It is new, and knows nobody.
    Started,
}
