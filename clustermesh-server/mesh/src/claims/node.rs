//! The machine itself: its record, pod CIDRs and session state.

use std::net::IpAddr;

use bytes::Bytes;
use clustermesh_api::address::{Cidr, parse_cidr};
use clustermesh_api::keys::{Kind, READINESS_PREFIX};
use clustermesh_api::limits::MAX_LABELS_PER_OBJECT;
use clustermesh_api::names::check_dns_subdomain;
use clustermesh_api::records::{
    AddressType, IpIdentityPair, NextWireguardKey, Node, NodeAddress, NodeExtension, NodeWireguard,
    Session, SessionState, WIREGUARD_ENCRYPTION_KEY,
};
use clustermesh_api::v1::{Hello, WireguardKey};

use super::{ClaimError, HEALTH_INDEX, ROUTER_INDEX, parse_all};
use crate::address::{Family, nth};
use crate::allocate::{NodePodCidrs, Plan, assign_pod_cidrs, release_pod_cidrs};
use crate::draft::Draft;
use crate::holders::Holders;
use crate::keys;
use crate::settings::ClusterSettings;
use crate::view::{Kv, View};

/// Kind of a node where an operator names one.
pub const KIND_NODE: &str = "Node";
/// Underlay addresses of one machine.
pub const MAX_UNDERLAY_ADDRESSES: usize = 16;
/// One label, version or id that a machine says of itself (a label's key with its prefix is the longest).
const MAX_HELLO_TEXT_BYTES: usize = 320;
/// A WireGuard key in base64.
const WIREGUARD_KEY_CHARACTERS: usize = 44;
/// Pod CIDRs that a machine may say it held.
const MAX_CIDRS_HELD: usize = 16;
/// `Source` of our node records: which component knows the node.
const SOURCE: &str = "clustermesh";

/// Plans a session's first message: pod CIDRs for the node and its node record.
///
/// # Errors
/// The name or an address is wrong, another node has one of the addresses, or no pod CIDR is free.
pub fn plan_hello(
    view: &dyn View,
    settings: &ClusterSettings,
    hello: &Hello,
) -> Result<Plan<NodePodCidrs>, ClaimError> {
    let node = &hello.node;
    check_dns_subdomain(node).map_err(|error| ClaimError::Name(error.to_string()))?;
    let object = format!("node {node}");
    let underlay = parse_all(
        &object,
        "underlay addresses",
        &hello.underlay_addresses,
        MAX_UNDERLAY_ADDRESSES,
    )?;
    check_underlay(view, settings, node, &underlay)?;
    check_texts(&object, hello)?;
    let wireguard = wireguard(&object, hello)?;
    let held = hello
        .pod_cidrs_held
        .iter()
        .take(MAX_CIDRS_HELD)
        .map(|text| {
            parse_cidr(text).map_err(|source| ClaimError::Address {
                object: object.clone(),
                source,
            })
        })
        .collect::<Result<Vec<_>, _>>()?;

    let mut draft = Draft::new(view);
    let cidrs = assign_pod_cidrs(&mut draft, settings, node, &held)?;
    // Another node with the same address may introduce itself at the same time.
    draft.guard_prefix(Kind::Nodes.state_prefix(&settings.name));
    let key = keys::node(&settings.name, node);
    draft.guard(key.clone());
    let mut record = record(settings, hello, &underlay, cidrs);
    if let Some(keys) = wireguard {
        record.wireguard_pub_key = keys.public_key;
        record.encryption_key = keys.encryption_key;
        if let Some(extension) = &mut record.extension {
            extension.wireguard = Some(Box::new(keys.more));
        }
    }
    draft.put(key, record.encode());
    Ok(Plan {
        txn: draft.into_txn(),
        result: cidrs,
    })
}

/// Every agent of the mesh reads the node's record, so a node cannot make it large.
fn check_texts(object: &str, hello: &Hello) -> Result<(), ClaimError> {
    let count = hello.labels.len();
    if count > MAX_LABELS_PER_OBJECT {
        return Err(ClaimError::Count {
            object: object.to_owned(),
            what: "labels",
            count,
            limit: MAX_LABELS_PER_OBJECT,
        });
    }
    let labels = hello.labels.iter().flat_map(|(key, value)| [key, value]);
    let texts = [&hello.boot_id, &hello.agent_version, &hello.instance_id];
    match labels
        .chain(texts)
        .find(|text| text.len() > MAX_HELLO_TEXT_BYTES)
    {
        Some(text) => Err(ClaimError::TooLong {
            object: object.to_owned(),
            bytes: text.len(),
            limit: MAX_HELLO_TEXT_BYTES,
        }),
        None => Ok(()),
    }
}

/// What a node record says of its machine's WireGuard keys.
struct Wireguard {
    public_key: String,
    encryption_key: u8,
    more: NodeWireguard,
}

/// The keys of the Hello, each checked: what every other machine would refuse is not stored.
fn wireguard(object: &str, hello: &Hello) -> Result<Option<Wireguard>, ClaimError> {
    let Some(keys) = &hello.wireguard else {
        return Ok(None);
    };
    let malformed = || ClaimError::WireguardKey(object.to_owned());
    let checked = |key: &WireguardKey| {
        let is_key = key.public_key.len() == WIREGUARD_KEY_CHARACTERS
            && key.public_key.ends_with('=')
            && key
                .public_key
                .trim_end_matches('=')
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/'));
        match u16::try_from(key.port) {
            Ok(port) if is_key && port > 0 => Ok((key.public_key.clone(), port, key.epoch)),
            _ => Err(malformed()),
        }
    };
    let (public_key, port, epoch) = checked(keys.current.as_ref().ok_or_else(malformed)?)?;
    let next = keys.next.as_ref().map(checked).transpose()?;
    Ok(Some(Wireguard {
        public_key,
        encryption_key: if keys.nodes {
            WIREGUARD_ENCRYPTION_KEY
        } else {
            0
        },
        more: NodeWireguard {
            port,
            epoch,
            next: next.map(|(pub_key, port, epoch)| NextWireguardKey {
                pub_key,
                port,
                epoch,
            }),
            ..Default::default()
        },
    }))
}

fn check_underlay(
    view: &dyn View,
    settings: &ClusterSettings,
    node: &str,
    underlay: &[IpAddr],
) -> Result<(), ClaimError> {
    for &address in underlay {
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Err(ClaimError::UnusableUnderlay {
                node: node.to_owned(),
                address,
            });
        }
        let ranges = settings.pod_cidrs.iter().chain(&settings.service_cidrs);
        if let Some(range) = ranges.copied().find(|range| range.contains(address)) {
            return Err(ClaimError::UnderlayInRange {
                node: node.to_owned(),
                address,
                range,
            });
        }
    }
    for &address in underlay {
        for name in view.nodes_at(&settings.name, address) {
            let has = |other: Node| {
                other
                    .addresses_of(&AddressType::InternalIP)
                    .any(|held| held == address)
            };
            let taken = name != node
                && view
                    .get(&keys::node(&settings.name, &name))
                    .and_then(|kv| Node::decode(&kv.value).ok())
                    .is_some_and(has);
            if taken {
                return Err(ClaimError::UnderlayTaken {
                    node: node.to_owned(),
                    address,
                    holder: name,
                });
            }
        }
    }
    Ok(())
}

fn decode(kv: &Kv) -> Result<Node, ClaimError> {
    Node::decode(&kv.value).map_err(|error| ClaimError::Damaged {
        object: String::from_utf8_lossy(&kv.key).into_owned(),
        reason: error.to_string(),
    })
}

/// A machine's own record as it was read last, so that each of many claims need not decode it again.
#[derive(Clone, Debug, Default)]
pub struct NodeMemo(Option<(Bytes, Node)>);

impl NodeMemo {
    /// The node's record, which its claims are judged by.
    pub(super) fn stored(
        &mut self,
        view: &dyn View,
        key: &[u8],
        node: &str,
    ) -> Result<&Node, ClaimError> {
        let kv = view
            .get(key)
            .ok_or_else(|| ClaimError::UnknownNode(node.to_owned()))?;
        let known = match self.0.take() {
            Some(known) if known.0 == kv.value => known,
            _ => (kv.value.clone(), decode(&kv)?),
        };
        Ok(&self.0.insert(known).1)
    }
}

fn record(
    settings: &ClusterSettings,
    hello: &Hello,
    underlay: &[IpAddr],
    cidrs: NodePodCidrs,
) -> Node {
    let internal = underlay.iter().map(|ip| NodeAddress {
        address_type: AddressType::InternalIP,
        ip: *ip,
    });
    let router = cidrs
        .iter()
        .filter_map(|cidr| nth(cidr, ROUTER_INDEX))
        .map(|ip| NodeAddress {
            address_type: AddressType::CiliumInternalIP,
            ip,
        });
    let health = |family| cidrs.of(family).and_then(|cidr| nth(cidr, HEALTH_INDEX));
    Node {
        name: hello.node.clone(),
        cluster: settings.name.clone(),
        ip_addresses: internal.chain(router).collect(),
        ipv4_alloc_cidr: cidrs.v4.map(Cidr),
        ipv6_alloc_cidr: cidrs.v6.map(Cidr),
        ipv4_health_ip: health(Family::IPv4),
        ipv6_health_ip: health(Family::IPv6),
        cluster_id: settings.id,
        source: SOURCE.to_owned(),
        labels: hello.labels.clone(),
        boot_id: hello.boot_id.clone(),
        extension: Some(NodeExtension {
            agent_version: hello.agent_version.clone(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Plans a change of a node's session state. Losing a session changes this record and deletes nothing; a node that was
/// removed meanwhile gets no record again.
#[must_use]
pub fn plan_session(
    view: &dyn View,
    node: &str,
    state: SessionState,
    instance_id: &str,
    ttl_seconds: u32,
    now_unix_ms: i64,
) -> Plan<()> {
    let mut draft = Draft::new(view);
    let key = keys::session(node);
    let known = view
        .get(&key)
        .and_then(|kv| Session::decode(&kv.value).ok());
    let removed = known.is_none() && state == SessionState::Stale;
    if !removed
        && known.is_none_or(|known| {
            known.state != state
                || known.instance_id != instance_id
                || known.ttl_seconds != ttl_seconds
        })
    {
        let session = Session {
            state,
            since_unix_ms: now_unix_ms,
            instance_id: instance_id.to_owned(),
            ttl_seconds,
        };
        draft.guard(key.clone());
        draft.put(key, session.encode());
    }
    Plan {
        txn: draft.into_txn(),
        result: (),
    }
}

/// Whether the node is on record as having an open session.
#[must_use]
pub fn is_connected(view: &dyn View, node: &str) -> bool {
    view.get(&keys::session(node))
        .and_then(|kv| Session::decode(&kv.value).ok())
        .is_some_and(|session| session.state == SessionState::Connected)
}

/// Removes all that a node has, within a larger plan; says whether there was a node.
///
/// # Errors
/// The node is connected, or bookkeeping is damaged.
pub fn remove_node(
    draft: &mut Draft<'_>,
    settings: &ClusterSettings,
    node: &str,
) -> Result<bool, ClaimError> {
    if is_connected(draft, node) {
        return Err(ClaimError::Connected(node.to_owned()));
    }
    let session = keys::session(node);
    draft.guard(session.clone());
    draft.delete(session);
    clear_endpoints(draft, node, usize::MAX);
    release_pod_cidrs(draft, node)?;
    let key = keys::node(&settings.name, node);
    draft.guard(key.clone());
    Ok(draft.delete(key))
}

/// Deletes endpoints of a node, with their readiness, until the plan writes `writes_max` keys.
pub(crate) fn clear_endpoints(draft: &mut Draft<'_>, node: &str, writes_max: usize) {
    for address in draft.addresses_of(node) {
        if draft.writes() >= writes_max {
            return;
        }
        let key = keys::address(address);
        let Some(pair) = draft
            .get(&key)
            .and_then(|kv| IpIdentityPair::decode(&kv.value).ok())
            .filter(|pair| pair.node() == Some(node))
        else {
            continue;
        };
        draft.guard(key.clone());
        draft.delete(key);
        Holders::remove(
            draft,
            &pair.k8s_namespace,
            &pair.k8s_pod_name,
            node,
            pair.ip,
        );
    }
    for kv in draft.list(format!("{READINESS_PREFIX}{node}/").as_bytes()) {
        if draft.writes() >= writes_max {
            return;
        }
        draft.delete(kv.key);
    }
}

/// [`remove_node`] as a plan of its own.
///
/// # Errors
/// As [`remove_node`].
pub fn plan_remove_node(
    view: &dyn View,
    settings: &ClusterSettings,
    node: &str,
) -> Result<Plan<bool>, ClaimError> {
    let mut draft = Draft::new(view);
    let existed = remove_node(&mut draft, settings, node)?;
    Ok(Plan {
        txn: draft.into_txn(),
        result: existed,
    })
}
