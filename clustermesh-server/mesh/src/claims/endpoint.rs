//! Endpoints of a machine: address records under its own pod CIDRs, and their readiness.

use std::net::IpAddr;

use clustermesh_api::limits::{MAX_ADDRESSES_PER_ENDPOINT, MAX_PORTS_PER_ENDPOINT};
use clustermesh_api::manifest::StoredWorkload;
use clustermesh_api::records::{
    IpExtension, IpIdentityPair, Node, PortReadiness, Readiness, WIREGUARD_ENCRYPTION_KEY,
};
use clustermesh_api::v1::{DeleteEndpoint, ReportReadiness, UpsertEndpoint};

use super::{ClaimError, FIRST_POD_INDEX, NodeMemo, node, parse_all};
use crate::address::{bounds, number};
use crate::allocate::Plan;
use crate::draft::Draft;
use crate::holders::Holders;
use crate::keys;
use crate::settings::ClusterSettings;
use crate::view::View;

/// Protocols of service ports.
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];

/// Plans the record of each address of one endpoint. The identity is that of the endpoint's Workload.
///
/// # Errors
/// An address is not the node's to give, the Workload is unknown, or another connected node runs it.
pub fn plan_upsert(
    view: &dyn View,
    settings: &ClusterSettings,
    node: &str,
    memo: &mut NodeMemo,
    claim: &UpsertEndpoint,
) -> Result<Plan<()>, ClaimError> {
    let key = keys::node(&settings.name, node);
    let record = memo.stored(view, &key, node)?;
    let mut draft = Draft::new(view);
    upsert(&mut draft, record, claim)?;
    // The node's pod CIDRs are what the claim was judged by.
    draft.guard(key);
    Ok(Plan {
        txn: draft.into_txn(),
        result: (),
    })
}

pub(super) fn upsert(
    draft: &mut Draft<'_>,
    node: &Node,
    claim: &UpsertEndpoint,
) -> Result<Vec<IpAddr>, ClaimError> {
    let (namespace, name) = (&claim.namespace, &claim.name);
    let object = format!("endpoint {namespace}/{name} of node {}", node.name);
    let addresses = parse_all(
        &object,
        "addresses",
        &claim.addresses,
        MAX_ADDRESSES_PER_ENDPOINT,
    )?;
    for address in &addresses {
        check_owned(node, *address)?;
    }
    let held = Holders::read(draft, namespace, name);
    if let Some(holder) = held
        .0
        .keys()
        .find(|holder| **holder != node.name && node::is_connected(draft, holder))
    {
        return Err(ClaimError::NameTaken {
            namespace: namespace.clone(),
            name: name.clone(),
            holder: holder.clone(),
        });
    }
    let workload_key = keys::workload(namespace, name);
    let Some(kv) = draft.get(&workload_key) else {
        // The Workload was deleted while its endpoint lives: what is stored stays, nothing new is.
        if addresses
            .iter()
            .all(|address| is_stored(draft, node, claim, *address))
        {
            return Ok(addresses);
        }
        return Err(ClaimError::UnknownWorkload {
            namespace: namespace.clone(),
            name: name.clone(),
        });
    };
    let workload = StoredWorkload::decode(&kv.value).map_err(|error| ClaimError::Damaged {
        object: format!("Workload {namespace}/{name}"),
        reason: error.to_string(),
    })?;
    // An Apply in between may give the Workload another identity.
    draft.guard(workload_key);
    for &address in &addresses {
        let key = keys::address(address);
        let stored = draft.get(&key);
        draft.guard(key.clone());
        if let Some(old) = stored.and_then(|kv| IpIdentityPair::decode(&kv.value).ok())
            && (&old.k8s_namespace, &old.k8s_pod_name) != (namespace, name)
        {
            Holders::remove(
                draft,
                &old.k8s_namespace,
                &old.k8s_pod_name,
                &node.name,
                address,
            );
            draft.delete(keys::readiness(&node.name, address));
        }
        draft.put(key, pair(node, &workload, address).encode());
    }
    let all_known = held
        .0
        .get(&node.name)
        .is_some_and(|known| addresses.iter().all(|address| known.contains(address)));
    if !all_known {
        held.with(&node.name, &addresses)
            .write(draft, namespace, name);
    }
    Ok(addresses)
}

fn pair(node: &Node, workload: &StoredWorkload, address: IpAddr) -> IpIdentityPair {
    let metadata = &workload.object.metadata;
    // The tunnel takes either family inside, so a node with one underlay family serves both.
    let host_ip = node
        .tunnel_endpoint(address.is_ipv4())
        .or_else(|| node.tunnel_endpoint(!address.is_ipv4()));
    IpIdentityPair {
        k8s_namespace: metadata.namespace.clone(),
        k8s_pod_name: metadata.name.clone(),
        k8s_service_account: workload
            .object
            .spec
            .service_account
            .clone()
            .unwrap_or_default(),
        extension: Some(IpExtension {
            node: node.name.clone(),
        }),
        // Cilium's nodes send encrypted where this says so; ours go by the node's record.
        key: if node.wireguard_pub_key.is_empty() {
            0
        } else {
            WIREGUARD_ENCRYPTION_KEY
        },
        ..IpIdentityPair::new(address, workload.status.identity, host_ip)
    }
}

fn is_stored(view: &dyn View, node: &Node, claim: &UpsertEndpoint, address: IpAddr) -> bool {
    view.get(&keys::address(address))
        .and_then(|kv| IpIdentityPair::decode(&kv.value).ok())
        .is_some_and(|pair| {
            pair.node() == Some(&node.name)
                && pair.k8s_namespace == claim.namespace
                && pair.k8s_pod_name == claim.name
        })
}

fn check_owned(node: &Node, address: IpAddr) -> Result<(), ClaimError> {
    let Some(cidr) = node
        .pod_cidrs()
        .map(|cidr| cidr.0)
        .find(|cidr| cidr.contains(address))
    else {
        return Err(ClaimError::NotOwned {
            node: node.name.clone(),
            address,
            cidrs: node
                .pod_cidrs()
                .map(|cidr| cidr.to_string())
                .collect::<Vec<_>>()
                .join(", "),
        });
    };
    let (first, last) = bounds(cidr);
    let at = number(address);
    if at - first < FIRST_POD_INDEX || (address.is_ipv4() && at == last) {
        return Err(ClaimError::ReservedAddress {
            node: node.name.clone(),
            address,
            cidr,
        });
    }
    Ok(())
}

/// Plans the deletion of a machine's address records. An address without record is fine: DEL may come twice.
///
/// # Errors
/// An address is malformed or held by another node.
pub fn plan_delete_endpoint(
    view: &dyn View,
    node: &str,
    claim: &DeleteEndpoint,
) -> Result<Plan<()>, ClaimError> {
    let object = format!("endpoint of node {node}");
    let addresses = parse_all(
        &object,
        "addresses",
        &claim.addresses,
        MAX_ADDRESSES_PER_ENDPOINT,
    )?;
    let mut draft = Draft::new(view);
    for address in addresses {
        delete(&mut draft, node, address)?;
    }
    Ok(Plan {
        txn: draft.into_txn(),
        result: (),
    })
}

pub(super) fn delete(draft: &mut Draft<'_>, node: &str, address: IpAddr) -> Result<(), ClaimError> {
    let key = keys::address(address);
    let Some(kv) = draft.get(&key) else {
        return Ok(());
    };
    let pair = IpIdentityPair::decode(&kv.value).map_err(|error| ClaimError::Damaged {
        object: format!("address {address}"),
        reason: error.to_string(),
    })?;
    if pair.node() != Some(node) {
        return Err(ClaimError::HeldByOther {
            node: node.to_owned(),
            address,
            holder: pair.node().unwrap_or("unknown").to_owned(),
        });
    }
    draft.guard(key.clone());
    draft.delete(key);
    draft.delete(keys::readiness(node, address));
    Holders::remove(
        draft,
        &pair.k8s_namespace,
        &pair.k8s_pod_name,
        node,
        address,
    );
    Ok(())
}

/// Plans the readiness records of a machine's endpoints; each replaces the one before.
///
/// # Errors
/// An address is malformed, is not one of the node's endpoints, or has too many ports.
pub fn plan_readiness(
    view: &dyn View,
    node: &str,
    report: &ReportReadiness,
) -> Result<Plan<()>, ClaimError> {
    let mut draft = Draft::new(view);
    for endpoint in &report.endpoints {
        let object = format!("readiness of {} on node {node}", endpoint.address);
        let [address] = parse_all(
            &object,
            "addresses",
            std::slice::from_ref(&endpoint.address),
            1,
        )?[..] else {
            continue;
        };
        let count = endpoint.ports.len();
        if count > MAX_PORTS_PER_ENDPOINT {
            return Err(ClaimError::Count {
                object,
                what: "ports",
                count,
                limit: MAX_PORTS_PER_ENDPOINT,
            });
        }
        let key = keys::address(address);
        let pair = view
            .get(&key)
            .and_then(|kv| IpIdentityPair::decode(&kv.value).ok());
        if pair.is_none_or(|pair| pair.node() != Some(node)) {
            return Err(ClaimError::NoEndpoint {
                node: node.to_owned(),
                address,
            });
        }
        // A report must not outlive its endpoint.
        draft.guard(key);
        let mut ports: Vec<_> = endpoint
            .ports
            .iter()
            .filter_map(|port| {
                let number = u16::try_from(port.port).ok()?;
                // What no service can name needs no record.
                if !PROTOCOLS.contains(&port.protocol.as_str()) {
                    return None;
                }
                Some(PortReadiness {
                    port: number,
                    protocol: port.protocol.clone(),
                    ready: port.ready,
                })
            })
            .collect();
        ports.sort();
        draft.put(keys::readiness(node, address), Readiness { ports }.encode());
    }
    Ok(Plan {
        txn: draft.into_txn(),
        result: (),
    })
}
