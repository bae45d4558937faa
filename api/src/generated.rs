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
    pub mod v3lockpb {
        include!(concat!(env!("OUT_DIR"), "/messages/v3lockpb.rs"));
    }
    pub mod v3electionpb {
        include!(concat!(env!("OUT_DIR"), "/messages/v3electionpb.rs"));
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
    /// Package `v3lockpb`: locks that a lease holds.
    pub mod lock {
        pub use crate::generated::messages::v3lockpb::*;
        #[cfg(feature = "grpc")]
        include!(concat!(env!("OUT_DIR"), "/services/v3lockpb.rs"));
    }
    /// Package `v3electionpb`: leaders that a lease holds.
    pub mod election {
        pub use crate::generated::messages::v3electionpb::*;
        #[cfg(feature = "grpc")]
        include!(concat!(env!("OUT_DIR"), "/services/v3electionpb.rs"));
    }
}

/// Package `clustermesh.v1`: node sessions, the agents' stream, the operator's API, the agent's local API.
pub mod v1 {
    pub use crate::generated::messages::clustermesh::v1::*;
    #[cfg(feature = "grpc")]
    include!(concat!(env!("OUT_DIR"), "/services/clustermesh.v1.rs"));
}

/// All of `proto/` as an encoded `google.protobuf.FileDescriptorSet`: what reflection and the JSON gateway go by.
#[cfg(feature = "grpc")]
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
