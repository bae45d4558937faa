//! The replicas' own port: gRPC over mutual TLS with certificates of servers only.

mod port;
mod transport;

pub use port::PeerPort;
pub use transport::GrpcTransport;

/// One message between replicas has at most so many bytes: a read of the log and what is around it.
const MAX_PEER_MESSAGE_BYTES: usize = 32 << 20;
/// A quiet connection is pinged this often.
const KEEPALIVE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(2);
/// A ping must be answered by then, or the connection is closed.
const KEEPALIVE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// HTTP/2 window of one stream.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// HTTP/2 window of one connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// What the build script made of raft.proto: the service; its messages are [`clustermesh_raft::wire`].
#[expect(
    clippy::allow_attributes,
    reason = "generated services carry their own exemptions"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/clustermesh.raft.v1.rs"));
}
