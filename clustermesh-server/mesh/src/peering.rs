//! Copies of peers: what we take from another cluster, under which key, and what an absence means.

mod config;
mod copy;
mod owners;
mod rules;
mod usage;

pub use config::{ConfigRefused, Peer, accept_config, copied_config};
pub use copy::{
    Ingested, MAX_REFUSED_BYTES, MAX_REFUSED_RECORDS, PeerChange, PeerCopyState, forget,
};
pub use owners::{CidrOwners, Conflict};
pub use rules::Refusal;
pub use usage::CopyQuota;
