//! The node agent and the CNI plugin.
pub mod agent;
pub mod cni;
pub mod command;
pub mod config;
pub mod endpoint;
pub mod flows;
pub mod host;
pub mod local_api;
pub mod local_client;
pub mod metrics;
pub mod netlink;
pub mod probe;
pub mod reconcile;
pub mod session;
pub mod shared;
pub mod state;
pub mod stream;
