//! Every limit that more than one crate must agree on, with the unit in its name.

/// Largest value of a key, and largest request: etcd's `--max-request-bytes` default.
pub const MAX_VALUE_BYTES: usize = 1536 * 1024;
/// Longest key of a record of the mesh; keys of others are bound by the size of a request only, as in etcd.
pub const MAX_KEY_BYTES: usize = 4096;
/// Most operations (compares, or requests of one branch, nested ones included) of a transaction: etcd's `--max-txn-ops` default.
pub const MAX_TXN_OPS: usize = 128;
/// Keys per page when a range is listed, as Cilium's client does.
pub const LIST_PAGE_KEYS: usize = 256;
/// Largest gRPC message that a server or client of ours receives: a request plus framing.
pub const MAX_GRPC_RECV_BYTES: usize = 4 * 1024 * 1024;
/// Largest gRPC message that our client accepts from a server, whose pages hold many values.
pub const MAX_GRPC_CLIENT_RECV_BYTES: usize = 64 * 1024 * 1024;
/// Bytes of keys and values that one message of a listing or one batch of events aims at.
pub const STREAM_MESSAGE_TARGET_BYTES: usize = 1024 * 1024;
/// Watches on one gRPC stream: a Go client puts all that share metadata on one.
pub const MAX_WATCHES_PER_STREAM: usize = 16_384;
/// Streams of agents and sessions that one server serves.
pub const MAX_SESSIONS: usize = 10_000;
/// Messages in flight from a session that the server has not answered.
pub const SESSION_QUEUE_MESSAGES: usize = 256;
/// Shortest time to live of a node session.
pub const SESSION_TTL_MIN_SECONDS: u32 = 5;
/// Time to live of a node session when the node asks for none.
pub const SESSION_TTL_DEFAULT_SECONDS: u32 = 15;
/// Longest time to live of a node session.
pub const SESSION_TTL_MAX_SECONDS: u32 = 600;

/// Compressed or not, the largest endpoint slice that is decoded.
pub const MAX_ENDPOINT_SLICE_DECODED_BYTES: usize = 16 * 1024 * 1024;
/// Endpoints that we write into one slice, as Kubernetes does.
pub const ENDPOINTS_PER_SLICE: usize = 100;
/// Most endpoints of one slice that are read.
pub const MAX_ENDPOINTS_PER_SLICE: usize = 100_000;
/// Backends of one service record.
pub const MAX_BACKENDS_PER_SERVICE: usize = 10_000;
/// Frontends of one service record.
pub const MAX_FRONTENDS_PER_SERVICE: usize = 64;
/// Labels of one identity.
pub const MAX_LABELS_PER_IDENTITY: usize = 128;
/// Label string of one identity.
pub const MAX_IDENTITY_LABELS_BYTES: usize = 16 * 1024;
/// Addresses of one node record.
pub const MAX_ADDRESSES_PER_NODE: usize = 64;
/// Pod CIDRs of one node record, all families.
pub const MAX_POD_CIDRS_PER_NODE: usize = 64;
/// Ports of one endpoint that have a name or are probed.
pub const MAX_PORTS_PER_ENDPOINT: usize = 128;
/// Addresses of one endpoint.
pub const MAX_ADDRESSES_PER_ENDPOINT: usize = 16;
/// Endpoints of one node.
pub const MAX_ENDPOINTS_PER_NODE: usize = 10_000;

/// Longest cluster name, bytes.
pub const MAX_CLUSTER_NAME_BYTES: usize = 32;
/// Longest DNS-1123 label, bytes.
pub const MAX_DNS_LABEL_BYTES: usize = 63;
/// Longest DNS-1123 subdomain, bytes.
pub const MAX_DNS_SUBDOMAIN_BYTES: usize = 253;
/// Largest manifest, bytes of JSON.
pub const MAX_MANIFEST_BYTES: usize = 256 * 1024;
/// Manifests of one Apply, and objects of one Delete.
pub const MAX_MANIFESTS_PER_APPLY: usize = 1000;
/// Ports of one service.
pub const MAX_PORTS_PER_SERVICE: usize = 128;
/// Labels, or selector terms, of one object.
pub const MAX_LABELS_PER_OBJECT: usize = 64;
/// All annotations of one object, bytes, as in Kubernetes.
pub const MAX_ANNOTATIONS_BYTES: usize = 256 * 1024;

/// Records that are copied of one peer.
pub const MAX_PEER_COPY_RECORDS: usize = 1_000_000;
/// Keys and values that are copied of one peer, bytes.
pub const MAX_PEER_COPY_BYTES: usize = 512 * 1024 * 1024;

/// Peers that a server can be given: one less than the clusters that can be numbered.
pub const MAX_PEERS: usize = 510;
/// A heartbeat is written this often, seconds.
pub const HEARTBEAT_INTERVAL_SECONDS: u64 = 60;
/// An identity number is not given out again for this long, ms.
pub const IDENTITY_QUARANTINE_MS: i64 = 3_600_000;
/// Longest wait that `Mesh.Wait` grants, ms.
pub const WAIT_MAX_MS: u32 = 3_600_000;
