//! Deterministic simulation of a group of replicas below gRPC: one seed decides clocks, network, disks and crashes.

pub mod access;
pub mod access_changes;
pub mod chaos;
pub mod client;
pub mod copies;
pub mod history;
mod lives;
pub mod member;
mod membership;
pub mod network;
pub mod random;
pub mod run;
pub mod runtime;
mod spy;
pub mod watcher;
pub mod world;
