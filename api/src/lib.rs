//! The contract: protobuf, key schema, records, validation and limits; no I/O.
//!
//! * [`etcd`] and [`v1`]: the messages of the etcd v3 API and of our own services; with feature `grpc` also their
//!   clients and servers.
//! * [`keys`]: every key of the schema as one typed [`RecordKey`].
//! * [`records`]: the values, each kind for itself, read and written byte for byte as Cilium does.
//! * [`manifest`]: what an operator applies, and how it is stored.
//! * [`record`]: any value of these two as one typed [`Record`], by its key.
//! * [`identity_split`], [`validate`]: numbering and what a cluster may claim.
//! * [`limits`]: every limit of the project, with its unit.
//!
//! A build script that compiles protobuf which imports ours adds `../../api/proto` (relative to its crate) to its
//! include path and maps the packages with `extern_path`: `.mvccpb` to `::clustermesh_api::etcd::mvcc`,
//! `.etcdserverpb` to `::clustermesh_api::etcd::rpc`, `.clustermesh.v1` to `::clustermesh_api::v1`.

mod generated;

pub mod address;
pub mod identity_split;
pub mod keys;
pub mod limits;
pub mod manifest;
pub mod names;
pub mod record;
pub mod records;
pub mod validate;

#[cfg(feature = "grpc")]
pub use generated::FILE_DESCRIPTOR_SET;
pub use generated::{etcd, v1};
pub use identity_split::IdentitySplit;
pub use keys::{Kind, RecordKey, Tree};
pub use record::{Record, RecordError};
