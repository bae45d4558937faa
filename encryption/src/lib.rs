//! WireGuard devices: one trait, and our own device in user space.
//!
//! [`userspace`] opens a TUN device with segmentation offload and runs the protocol of
//! `clustermesh-encryption-core` on it.

use std::fmt;

use clustermesh_encryption_core::config::DeviceConfig;
use clustermesh_encryption_core::control::PeerStatus;
use clustermesh_encryption_core::key::PublicKey;

pub mod userspace;

/// What a device does, and with whom.
#[derive(Clone, Debug, Default)]
pub struct DeviceStatus {
    /// UDP port.
    pub listen_port: u16,
    /// Every peer and what is known of it.
    pub peers: Vec<(PublicKey, PeerStatus)>,
    /// Names and numbers of what did not pass.
    pub counters: Vec<(&'static str, u64)>,
}

/// A WireGuard device, whoever runs it.
pub trait Device: fmt::Debug + Send + Sync {
    /// Why a device refuses.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Name of the network device.
    fn name(&self) -> &str;

    /// Changes the device into what is wanted, by difference: a peer that stays keeps its sessions.
    ///
    /// # Errors
    /// When what is wanted contradicts itself, or cannot be had.
    fn configure(&self, wanted: DeviceConfig) -> Result<(), Self::Error>;

    /// How things are.
    ///
    /// # Errors
    /// When the device is gone.
    fn status(&self) -> Result<DeviceStatus, Self::Error>;
}
