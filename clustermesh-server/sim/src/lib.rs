//! Deterministic simulation of a group of replicas below gRPC: one seed decides clocks, network, disks and crashes.

pub mod client;
pub mod history;
pub mod network;
pub mod random;
pub mod runtime;
pub mod watcher;
pub mod world;
