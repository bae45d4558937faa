//! The server over real TLS: etcd's API, agents, peering, and the binary under kill -9.

mod agents;
mod etcd;
mod peering;
mod process;
mod support;
