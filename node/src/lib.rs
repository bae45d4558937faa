//! The node agent and the CNI plugin.
//!
//! Below stands what knows nobody here, above who uses it; [`agent`] puts it together.
//!
//! * Programs: [`agent`] (`clustermesh-node run`), [`command`] (its other subcommands), [`cni_plugin`].
//! * Who is spoken to: [`session`] (to the server, the only way in which a node writes), [`local_api`] (from the plugin and
//!   from people).
//! * Who keeps what: [`records`] (maps of nodes, addresses, services), [`endpoints`] (pods), [`readiness`] (ports of pods),
//!   [`paths`] (to other nodes), [`encryption`] (keys and WireGuard devices), [`strict_mode`] (prefixes of the mesh),
//!   [`host`] (underlay, addresses, routes), [`flows`] (flow records).
//! * What they share: [`signals`] (the latest word on this node), [`settings_map`] (of the kernel programs), [`config`], [`state_files`], [`metrics`].
//! * The machine: [`netlink`], [`echo`], [`privileges`].

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
pub mod settings_map;
pub mod signals;
pub mod state_files;
pub mod strict_mode;
