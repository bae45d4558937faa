//! Pure: records in, desired kernel state out, difference to actual.
//!
//! Nothing here reads a clock, a file, a socket or a map. The agent decodes records
//! with [`decode::Decoder`], feeds [`Model`], carries out its [`plan::Plan`] and tells
//! it what the kernel took. [`ipam`], [`probes`] and [`cni`] are the parts of the
//! endpoint life cycle that need no kernel.

pub mod change;
pub mod cni;
pub mod decode;
pub mod ipam;
pub mod mesh_prefixes;
pub mod model;
pub mod path_mtu;
pub mod plan;
pub mod probes;
pub mod progress;
pub mod refused;
pub mod rotation;
pub mod select;
pub mod settings;
pub mod tables;

pub use model::{
    ABSENCE_GRACE_MS, EMPTY_NODE, IPCACHE_WANTED_MAX, Model, PathTarget, PeerState, Protection,
    ProvableNode, WireguardPeer, WireguardState,
};
pub use settings::{EncryptionMode, EncryptionSettings, Settings, UnderlayPath};
