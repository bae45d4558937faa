//! Copies of peers: what we take from another cluster, under which key, and what an absence means.

mod config;

mod owners;

pub use config::{ConfigRefused, Peer, accept_config, copied_config};

pub use owners::{CidrOwners, Conflict};
