//! Who may do what: the role that a certificate gives, and the key ranges of each role.

mod credentials;
pub mod password;
mod ready_made;
mod tokens;

use std::sync::Arc;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{Compare, RequestOp, TxnRequest, request_op};
use clustermesh_api::limits::MAX_TXN_OPS;
use clustermesh_process::{Organisation, PeerIdentity};
use tonic::Status;

pub use credentials::Credentials;
pub use ready_made::seed;
pub use tokens::{TokenUses, new_token, token_digest};

/// etcd's text for a refused call.
pub const PERMISSION_DENIED: &str = "etcdserver: permission denied";

/// What a transaction of a role that only reads may hold.
const READ_TXN: &str = "a transaction of this role reads at most 128 single keys or counts";

/// The verified holder of one connection's certificate, as this cluster sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    role: Role,
    readable: Arc<[Span]>,
    /// The certificate's, which may name a user of the store.
    common_name: Option<String>,
}

/// What a caller is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// An agent of this cluster: reads records, writes through its session.
    Node {
        /// The node's name, from the certificate.
        name: String,
    },
    /// Another cluster's server: reads what this cluster exports.
    Peer {
        /// That cluster's name, from the certificate.
        cluster: String,
    },
    /// May do everything.
    Operator {
        /// Common name, for logs.
        name: String,
    },
    /// Known to the CA, but with no right here.
    Nobody {
        /// Why not, and what would help.
        reason: String,
    },
}

/// Keys from `start` up to, without, `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Span {
    start: Bytes,
    end: Bytes,
}

impl Span {
    fn prefix(prefix: impl Into<Bytes>) -> Self {
        let start = prefix.into();
        let end = clustermesh_mesh::prefix_end(&start);
        Self { start, end }
    }

    fn key(key: impl Into<Bytes>) -> Self {
        let start = key.into();
        let mut end = start.to_vec();
        end.push(0);
        Self {
            start,
            end: end.into(),
        }
    }

    fn covers(&self, key: &[u8], range_end: &[u8]) -> bool {
        let from = key >= self.start.as_ref() && key < self.end.as_ref();
        match range_end {
            [] => from,
            // "All keys from here": no span reaches that far.
            [0] => false,
            end => from && end <= self.end.as_ref(),
        }
    }
}

impl Caller {
    /// The role of `identity` in `cluster` (`None`: a plain store, which only knows operators).
    #[must_use]
    pub fn new(identity: &PeerIdentity, cluster: Option<&str>) -> Self {
        let role = role(identity, cluster);
        let readable = match (&role, cluster) {
            (Role::Node { .. }, _) => {
                [Span::prefix("cilium/"), Span::prefix("clustermesh.io/")].into()
            }
            (Role::Peer { .. }, Some(own)) => [
                Span::prefix("cilium/.heartbeat"),
                Span::prefix("cilium/state/"),
                Span::key(format!("cilium/cluster-config/{own}")),
                Span::prefix(format!("cilium/synced/{own}/")),
            ]
            .into(),
            _ => [].into(),
        };
        Self {
            role,
            readable,
            common_name: Some(identity.common_name.clone()),
        }
    }

    /// Who calls in clear: a process of this machine, where the configuration says that it may do everything.
    #[must_use]
    pub fn local() -> Self {
        Self {
            role: Role::Operator {
                name: "local".to_owned(),
            },
            readable: [].into(),
            common_name: None,
        }
    }

    /// A caller whose certificate says nothing that this project knows.
    #[must_use]
    pub fn nobody(reason: String) -> Self {
        Self {
            role: Role::Nobody { reason },
            readable: [].into(),
            common_name: None,
        }
    }

    /// The caller of a request, put there by the accept loop.
    ///
    /// # Errors
    /// `Unauthenticated` when the request did not come through it.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Arc<Self>, Status> {
        request
            .extensions()
            .get::<Arc<Self>>()
            .cloned()
            .ok_or_else(|| Status::unauthenticated("no client certificate"))
    }

    /// The role.
    #[must_use]
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// Under which name what it takes is counted; `None` for who may have as much as there is.
    #[must_use]
    pub fn holder(&self) -> Option<String> {
        match &self.role {
            Role::Node { name } => Some(format!("node {name}")),
            Role::Peer { cluster } => Some(format!("peer {cluster}")),
            Role::Operator { .. } | Role::Nobody { .. } => None,
        }
    }

    /// Whether every key of the range may be read.
    #[must_use]
    pub fn may_read(&self, key: &[u8], range_end: &[u8]) -> bool {
        match &self.role {
            Role::Operator { .. } => true,
            Role::Nobody { .. } => false,
            Role::Node { .. } | Role::Peer { .. } => {
                self.readable.iter().any(|span| span.covers(key, range_end))
            }
        }
    }

    /// Reads of a range.
    ///
    /// # Errors
    /// `PermissionDenied` when the role does not hold the whole range.
    pub fn check_read(&self, key: &[u8], range_end: &[u8]) -> Result<(), Status> {
        if self.may_read(key, range_end) {
            Ok(())
        } else {
            Err(self.denied())
        }
    }

    /// Writes, leases, compaction, manifests: operators only.
    ///
    /// # Errors
    /// `PermissionDenied` for every other role.
    pub fn check_operator(&self) -> Result<(), Status> {
        match self.role {
            Role::Operator { .. } => Ok(()),
            _ => Err(self.denied()),
        }
    }

    /// Calls that touch no key (status, members).
    ///
    /// # Errors
    /// `PermissionDenied` when the certificate gives no role here.
    pub fn check_known(&self) -> Result<(), Status> {
        match self.role {
            Role::Nobody { .. } => Err(self.denied()),
            _ => Ok(()),
        }
    }

    /// The agents' stream: nodes of this cluster and operators.
    ///
    /// # Errors
    /// `PermissionDenied` for others.
    pub fn check_agent_stream(&self) -> Result<(), Status> {
        match self.role {
            Role::Node { .. } | Role::Operator { .. } => Ok(()),
            _ => Err(self.denied()),
        }
    }

    /// All compares and operations of a transaction, nested ones too. Whoever may not write may not multiply a listing
    /// by the operations of one request either: single keys and counts only, and few of them.
    ///
    /// # Errors
    /// `PermissionDenied` when one of them is not allowed.
    pub fn check_txn(&self, txn: &TxnRequest) -> Result<(), Status> {
        match self.role {
            Role::Operator { .. } => Ok(()),
            _ => self.check_reads(txn, &mut { MAX_TXN_OPS }),
        }
    }

    /// Depth is bounded by prost's decoder (100).
    fn check_reads(&self, txn: &TxnRequest, left: &mut usize) -> Result<(), Status> {
        let count = txn.compare.len() + txn.success.len() + txn.failure.len();
        *left = left
            .checked_sub(count)
            .ok_or_else(|| Status::permission_denied(format!("{PERMISSION_DENIED}: {READ_TXN}")))?;
        for Compare { key, range_end, .. } in &txn.compare {
            self.check_read(key, range_end)?;
        }
        for RequestOp { request } in txn.success.iter().chain(&txn.failure) {
            match request {
                Some(request_op::Request::RequestRange(range)) => {
                    self.check_read(&range.key, &range.range_end)?;
                    if !range.range_end.is_empty() && !range.count_only {
                        return Err(Status::permission_denied(format!(
                            "{PERMISSION_DENIED}: {READ_TXN}"
                        )));
                    }
                }
                Some(request_op::Request::RequestTxn(nested)) => self.check_reads(nested, left)?,
                Some(
                    request_op::Request::RequestPut(_) | request_op::Request::RequestDeleteRange(_),
                ) => return Err(self.denied()),
                None => {}
            }
        }
        Ok(())
    }

    fn denied(&self) -> Status {
        match &self.role {
            Role::Nobody { reason } => {
                Status::permission_denied(format!("{PERMISSION_DENIED}: {reason}"))
            }
            _ => Status::permission_denied(PERMISSION_DENIED),
        }
    }
}

fn role(identity: &PeerIdentity, cluster: Option<&str>) -> Role {
    let own = cluster == Some(identity.cluster.as_str());
    let elsewhere = || Role::Nobody {
        reason: format!(
            "the certificate is for cluster {:?}, this server is of {}; use one issued for it",
            identity.cluster,
            cluster.map_or_else(|| "no cluster".to_owned(), |name| format!("{name:?}")),
        ),
    };
    match identity.organisation {
        Organisation::Operator if own || cluster.is_none() => Role::Operator {
            name: identity.common_name.clone(),
        },
        Organisation::Node if own => Role::Node {
            name: identity.common_name.clone(),
        },
        // A server's own certificate serves towards its peers where no other is configured.
        Organisation::Peer | Organisation::Server if cluster.is_some() => Role::Peer {
            cluster: identity.cluster.clone(),
        },
        _ => elsewhere(),
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_api::etcd::rpc::{PutRequest, RangeRequest};

    use super::*;

    fn caller(organisation: Organisation, cluster: &str) -> Caller {
        let identity = PeerIdentity {
            organisation,
            cluster: cluster.into(),
            common_name: "w1".into(),
        };
        Caller::new(&identity, Some("c1"))
    }

    #[test]
    fn a_peer_reads_what_this_cluster_exports_and_nothing_else() {
        let peer = caller(Organisation::Peer, "c2");
        for (key, end) in [
            ("cilium/state/nodes/v1/c1/", "cilium/state/nodes/v1/c10"),
            ("cilium/state/", "cilium/state0"),
            ("cilium/.heartbeat", "cilium/.heartbeau"),
            ("cilium/cluster-config/c1", ""),
            ("cilium/synced/c1/", "cilium/synced/c10"),
        ] {
            assert!(peer.may_read(key.as_bytes(), end.as_bytes()), "{key}");
        }
        for (key, end) in [
            ("cilium/", "cilium0"),
            ("cilium/cache/nodes/v1/c3/", "cilium/cache/nodes/v1/c30"),
            ("cilium/cluster-config/c3", ""),
            ("cilium/cluster-config/c1", "cilium/cluster-config/c3"),
            ("cilium/synced/c2/", "cilium/synced/c20"),
            (
                "clustermesh.io/workloads/v1/",
                "clustermesh.io/workloads/v10",
            ),
            ("cilium/state/", "\0"),
            ("\0", "\0"),
        ] {
            assert!(!peer.may_read(key.as_bytes(), end.as_bytes()), "{key}");
        }
        assert!(peer.check_operator().is_err());
    }

    #[test]
    fn a_node_reads_its_own_cluster_only() {
        let node = caller(Organisation::Node, "c1");
        assert!(node.may_read(b"cilium/", b"cilium0"));
        assert!(node.may_read(b"clustermesh.io/services/v1/a", b""));
        assert!(!node.may_read(b"registry/", b"registry0"));
        let stranger = caller(Organisation::Node, "c2");
        let error = stranger.check_read(b"cilium/a", b"").unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied);
        assert!(error.message().contains("c2"), "{error}");
    }

    #[test]
    fn an_operator_of_another_cluster_has_no_rights() {
        assert!(
            caller(Organisation::Operator, "c1")
                .check_operator()
                .is_ok()
        );
        assert!(
            caller(Organisation::Operator, "c2")
                .check_operator()
                .is_err()
        );
        assert!(caller(Organisation::Operator, "c2").check_known().is_err());
    }

    #[test]
    fn a_transaction_is_judged_by_each_of_its_parts() {
        let node = caller(Organisation::Node, "c1");
        let read = RequestOp {
            request: Some(request_op::Request::RequestRange(RangeRequest {
                key: "cilium/a".into(),
                ..Default::default()
            })),
        };
        let write = RequestOp {
            request: Some(request_op::Request::RequestPut(PutRequest {
                key: "cilium/a".into(),
                ..Default::default()
            })),
        };
        let nested = |operation: &RequestOp| TxnRequest {
            failure: vec![RequestOp {
                request: Some(request_op::Request::RequestTxn(TxnRequest {
                    success: vec![operation.clone()],
                    ..Default::default()
                })),
            }],
            ..Default::default()
        };
        assert!(node.check_txn(&nested(&read)).is_ok());
        let error = node.check_txn(&nested(&write)).unwrap_err();
        assert_eq!(error.message(), PERMISSION_DENIED);
        let compare = TxnRequest {
            compare: vec![Compare {
                key: "registry/a".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        assert!(node.check_txn(&compare).is_err());
    }

    #[test]
    fn a_reader_cannot_multiply_a_listing_by_one_transaction() {
        let peer = caller(Organisation::Peer, "c2");
        let reads = |count_only, count| TxnRequest {
            success: vec![
                RequestOp {
                    request: Some(request_op::Request::RequestRange(RangeRequest {
                        key: "cilium/state/".into(),
                        range_end: "cilium/state0".into(),
                        count_only,
                        ..Default::default()
                    })),
                };
                count
            ],
            ..Default::default()
        };
        let nested = |inner: TxnRequest, count| TxnRequest {
            failure: vec![
                RequestOp {
                    request: Some(request_op::Request::RequestTxn(inner)),
                };
                count
            ],
            ..Default::default()
        };
        assert!(peer.check_txn(&reads(true, 128)).is_ok());
        for refused in [
            reads(false, 1),
            reads(true, 129),
            nested(reads(true, 60), 3),
        ] {
            let error = peer.check_txn(&refused).unwrap_err();
            assert_eq!(error.code(), tonic::Code::PermissionDenied);
            assert!(error.message().contains("single keys"), "{error}");
        }
        let operator = caller(Organisation::Operator, "c1");
        assert!(operator.check_txn(&nested(reads(false, 60), 3)).is_ok());
    }
}
