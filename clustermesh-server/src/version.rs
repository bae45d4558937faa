//! The versions that this server names.

/// The etcd release whose API this server matches.
pub const ETCD_VERSION: &str = "3.7.3";
/// Its cluster version: major and minor of that release.
pub const ETCD_CLUSTER_VERSION: &str = "3.7.0";
/// This project's own version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Body of `GET /version`: etcd's fields and our own.
#[must_use]
pub fn version_json() -> String {
    serde_json::json!({
        "etcdserver": ETCD_VERSION,
        "etcdcluster": ETCD_CLUSTER_VERSION,
        "storage": ETCD_CLUSTER_VERSION,
        "clustermesh": VERSION,
    })
    .to_string()
}
