//! The server over real TLS: etcd's API, agents, peering, and the binary under kill -9.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

mod abuse;
mod agents;
mod api;
mod auth;
mod bystander;
mod etcd;
mod gateway;
mod http2;
mod limits;
mod operations;
mod peering;
mod process;
mod replicas;
mod slow;
mod strangers;
mod support;
