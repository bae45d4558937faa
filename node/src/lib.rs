//! The node agent and the CNI plugin.
pub mod config;
pub mod endpoint;
pub mod host;
pub mod netlink;
pub mod state;
