//! The node agent and the CNI plugin.
pub mod agent;
pub mod cni;
pub mod command;
pub mod config;
pub mod echo;
pub mod encryption;
pub mod endpoint;
#[cfg(test)]
mod fixture;
pub mod flows;
pub mod host;
pub mod local_api;
pub mod mesh;
pub mod metrics;
pub mod netlink;
pub mod path_probe;
pub mod privileges;
pub mod probe;
pub mod reconcile;
pub mod session;
pub mod shared;
pub mod state;
pub mod stream;
