//! Short forms of the keys that this crate writes; the schema itself is `clustermesh_api::keys`.

use std::net::IpAddr;

use bytes::Bytes;
use clustermesh_api::keys::{Origin, RecordKey, Tree};

/// Prefix of this cluster's address records.
pub(crate) const OWN_ADDRESSES_PREFIX: &str = "cilium/state/ip/v1/default/";
/// Prefix of this cluster's identities.
pub(crate) const OWN_IDENTITIES_PREFIX: &str = "cilium/state/identities/v1/id/";

pub(crate) fn bytes(key: &RecordKey) -> Bytes {
    key.to_bytes().into()
}

pub(crate) fn identity(id: u32) -> Bytes {
    bytes(&RecordKey::Identity {
        origin: Origin::Own,
        id,
    })
}

pub(crate) fn identity_of(key: &[u8]) -> Option<u32> {
    match RecordKey::parse(key) {
        Ok(RecordKey::Identity {
            origin: Origin::Own,
            id,
        }) => Some(id),
        _ => None,
    }
}

pub(crate) fn address(address: IpAddr) -> Bytes {
    bytes(&RecordKey::Ip {
        origin: Origin::Own,
        address: address.into(),
    })
}

/// The address of one of this cluster's address records; `None` for other keys.
pub(crate) fn own_address(key: &[u8]) -> Option<IpAddr> {
    let text = key.strip_prefix(OWN_ADDRESSES_PREFIX.as_bytes())?;
    std::str::from_utf8(text).ok()?.parse().ok()
}

pub(crate) fn node(cluster: &str, name: &str) -> Bytes {
    bytes(&RecordKey::Node {
        tree: Tree::State,
        cluster: cluster.to_owned(),
        name: name.to_owned(),
    })
}

pub(crate) fn workload(namespace: &str, name: &str) -> Bytes {
    bytes(&RecordKey::Workload {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

pub(crate) fn stored_service(namespace: &str, name: &str) -> Bytes {
    bytes(&RecordKey::StoredService {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    })
}

pub(crate) fn readiness(node: &str, address: IpAddr) -> Bytes {
    bytes(&RecordKey::Readiness {
        node: node.to_owned(),
        address,
    })
}

pub(crate) fn session(node: &str) -> Bytes {
    bytes(&RecordKey::Session {
        node: node.to_owned(),
    })
}
