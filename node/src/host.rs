//! The machine's own network: its underlay, the pair `cm_host` and `cm_net` between host and pods, and routes to pods.

mod pair;
mod routes;
mod underlay;

pub use pair::{HOST_DEVICE, HostPair, NET_DEVICE, ensure_pair, ensure_receive_offload, remove};
pub use routes::{RemoteCidrs, ensure_addresses_and_routes};
pub use underlay::Underlay;
