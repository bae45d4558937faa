//! The node agent and the CNI plugin.
pub mod agent;
pub mod cni_plugin;
pub mod command;
pub mod config;
pub mod echo;
pub mod encryption;
pub mod endpoints;
#[cfg(test)]
mod fixture;
pub mod flows;
pub mod host;
pub mod local_api;
pub mod metrics;
pub mod netlink;
pub mod paths;
pub mod privileges;
pub mod readiness;
pub mod records;
pub mod session;
pub mod shared;
pub mod state_files;
pub mod strict_mode;
