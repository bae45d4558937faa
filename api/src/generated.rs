//! What the build script made of `proto/`, under the paths that the rest of the project uses.

#![expect(
    missing_docs,
    clippy::all,
    reason = "generated from proto/, where the comments are"
)]
#![cfg_attr(
    feature = "grpc",
    expect(
        clippy::allow_attributes,
        clippy::missing_errors_doc,
        reason = "generated services carry their own exemptions"
    )
)]

mod messages {
    pub mod mvccpb {
        include!(concat!(env!("OUT_DIR"), "/messages/mvccpb.rs"));
    }
    pub mod authpb {
        include!(concat!(env!("OUT_DIR"), "/messages/authpb.rs"));
    }
    pub mod etcdserverpb {
        include!(concat!(env!("OUT_DIR"), "/messages/etcdserverpb.rs"));
    }
    pub mod clustermesh {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/messages/clustermesh.v1.rs"));
        }
    }
}

/// The etcd v3 API.
pub mod etcd {
    /// Package `mvccpb`: keys, values and events.
    pub mod mvcc {
        pub use crate::generated::messages::mvccpb::*;
    }
    /// Package `authpb`: users, roles and permissions.
    pub mod auth {
        pub use crate::generated::messages::authpb::*;
    }
    /// Package `etcdserverpb`: requests, responses and services.
    pub mod rpc {
        pub use crate::generated::messages::etcdserverpb::*;
        #[cfg(feature = "grpc")]
        include!(concat!(env!("OUT_DIR"), "/services/etcdserverpb.rs"));
    }
}

/// Package `clustermesh.v1`: node sessions, the agents' stream, the operator's API, the agent's local API.
pub mod v1 {
    pub use crate::generated::messages::clustermesh::v1::*;
    #[cfg(feature = "grpc")]
    include!(concat!(env!("OUT_DIR"), "/services/clustermesh.v1.rs"));
}
