//! The server process: etcd v3 and mesh services on one port, sessions, peering, controllers.

pub mod config;
