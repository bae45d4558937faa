//! `get`: records of this cluster and of the copies of its peers, read with plain Range calls.

use std::collections::BTreeMap;

use anyhow::Result;
use clap::ValueEnum as _;
use clustermesh_api::{
    Record, RecordKey,
    etcd::mvcc::KeyValue,
    keys::{CACHE_PREFIX, STORED_SERVICES_PREFIX},
    manifest::StoredService,
    records::{ClusterService, Identity, IpIdentityPair, Node, PortMap},
};
use clustermesh_client::Client;
use serde::Serialize;

use crate::{
    args::{GetArgs, GetKind, GlobalArgs, Output},
    connect::connect,
    output::{self, Table},
};

/// Most records that are read: a million is beyond what a mesh holds of one kind.
const MAX_RECORDS: usize = 1_000_000;
/// Broken records that are named one by one.
const MAX_FAULTS_SHOWN: usize = 5;

pub async fn run(global: &GlobalArgs, args: &GetArgs) -> Result<()> {
    let client = connect(global).await?;
    // Keys of the own cluster's addresses and identities do not name it.
    let own = client.mesh_status().await?.cluster;
    let mut kvs = Vec::new();
    for prefix in prefixes(args.kind, &own) {
        kvs.extend(client_list(&client, &prefix).await?);
    }
    let (rows, faults) = read(&kvs, &own);
    let found = rows.len();
    let rows: Vec<Row> = rows.into_iter().filter(|row| row.matches(args)).collect();
    if rows.is_empty() {
        output::note(&nothing_found(args, found));
    }
    match global.output {
        Output::Json => output::json(&rows)?,
        Output::Table => output::print(&table(args.kind, &rows).render())?,
    }
    for fault in faults.iter().take(MAX_FAULTS_SHOWN) {
        output::note(&format!("clustermesh: left out: {fault}"));
    }
    if faults.len() > MAX_FAULTS_SHOWN {
        output::note(&format!(
            "clustermesh: left out: {} more",
            faults.len() - MAX_FAULTS_SHOWN
        ));
    }
    Ok(())
}

/// Why the list is empty: standard error, so that programs read a list.
fn nothing_found(args: &GetArgs, found: usize) -> String {
    let kind = args
        .kind
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned());
    match found {
        0 => format!("no {kind} are on record"),
        _ => format!(
            "no {kind} of this cluster or namespace are on record, {found} of others; see `clustermesh get {kind}`"
        ),
    }
}

async fn client_list(client: &Client, prefix: &str) -> Result<Vec<KeyValue>> {
    Ok(client.list_prefix(prefix).collect(MAX_RECORDS).await?.kvs)
}

fn prefixes(kind: GetKind, own: &str) -> Vec<String> {
    use clustermesh_api::Kind;
    let kind = match kind {
        GetKind::Nodes => Kind::Nodes,
        GetKind::Endpoints => Kind::Ip,
        GetKind::Identities => Kind::Identities,
        GetKind::Services => Kind::Services,
    };
    let mut prefixes = vec![kind.state_prefix(own), format!("{CACHE_PREFIX}{kind}/v1/")];
    if kind == Kind::Services {
        prefixes.push(STORED_SERVICES_PREFIX.to_owned());
    }
    prefixes
}

/// One line. The JSON field names are an interface.
#[derive(Debug, PartialEq, Serialize)]
#[serde(untagged)]
enum Row {
    Node(NodeRow),
    Endpoint(EndpointRow),
    Service(ServiceRow),
    Identity(IdentityRow),
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeRow {
    cluster: String,
    name: String,
    addresses: Vec<AddressCell>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
    cluster_id: u32,
    labels: BTreeMap<String, String>,
    agent_version: String,
    encryption_key: u8,
}

#[derive(Debug, PartialEq, Serialize)]
struct AddressCell {
    #[serde(rename = "type")]
    role: String,
    address: String,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointRow {
    cluster: String,
    namespace: String,
    name: String,
    address: String,
    identity: u32,
    node: String,
    host_address: String,
}

#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceRow {
    cluster: String,
    namespace: String,
    name: String,
    addresses: Vec<String>,
    ports: Vec<String>,
    /// Published backends; absent for a service that is not shared.
    backends: Option<Vec<String>>,
    global: bool,
    shared: bool,
    affinity: String,
}

#[derive(Debug, PartialEq, Serialize)]
struct IdentityRow {
    cluster: String,
    id: u32,
    namespace: String,
    labels: Vec<String>,
}

impl Row {
    fn matches(&self, args: &GetArgs) -> bool {
        let (cluster, namespace) = match self {
            Self::Node(row) => (&row.cluster, None),
            Self::Endpoint(row) => (&row.cluster, Some(&row.namespace)),
            Self::Service(row) => (&row.cluster, Some(&row.namespace)),
            Self::Identity(row) => (&row.cluster, Some(&row.namespace)),
        };
        args.cluster.as_ref().is_none_or(|wanted| wanted == cluster)
            && args
                .namespace
                .as_ref()
                .is_none_or(|wanted| namespace.is_none_or(|namespace| namespace == wanted))
    }

    fn order(&self) -> (&str, &str, &str, u32) {
        match self {
            Self::Node(row) => (&row.cluster, "", &row.name, 0),
            Self::Endpoint(row) => (&row.cluster, &row.namespace, &row.name, 0),
            Self::Service(row) => (&row.cluster, &row.namespace, &row.name, 0),
            Self::Identity(row) => (&row.cluster, "", "", row.id),
        }
    }
}

/// Rows in order, and what could not be read.
fn read(kvs: &[KeyValue], own: &str) -> (Vec<Row>, Vec<String>) {
    let mut rows = Vec::new();
    let mut faults = Vec::new();
    let mut services: BTreeMap<(String, String, String), ServiceRow> = BTreeMap::new();
    for kv in kvs {
        let (key, record) = match Record::decode_pair(&kv.key, &kv.value) {
            Ok(pair) => pair,
            Err(error) => {
                faults.push(error.to_string());
                continue;
            }
        };
        let cluster = key.cluster().unwrap_or(own).to_owned();
        match (key, record) {
            (_, Record::Node(node)) => rows.push(Row::Node(node_row(cluster, &node))),
            (_, Record::Ip(pair)) => rows.push(Row::Endpoint(endpoint_row(cluster, &pair))),
            (RecordKey::Identity { id, .. }, Record::Identity(identity)) => {
                rows.push(Row::Identity(identity_row(cluster, id, &identity)));
            }
            (
                RecordKey::Service {
                    namespace, name, ..
                },
                Record::Service(service),
            ) => {
                published(
                    services.entry((cluster, namespace, name)).or_default(),
                    &service,
                );
            }
            (RecordKey::StoredService { namespace, name }, Record::StoredService(service)) => {
                stored(
                    services.entry((cluster, namespace, name)).or_default(),
                    &service,
                );
            }
            _ => {}
        }
    }
    rows.extend(
        services
            .into_iter()
            .map(|((cluster, namespace, name), row)| {
                Row::Service(ServiceRow {
                    cluster,
                    namespace,
                    name,
                    ..row
                })
            }),
    );
    rows.sort_by(|a, b| a.order().cmp(&b.order()));
    (rows, faults)
}

fn node_row(cluster: String, node: &Node) -> NodeRow {
    let address = |address: &clustermesh_api::records::NodeAddress| AddressCell {
        role: serde_json::to_value(&address.address_type)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default(),
        address: address.ip.to_string(),
    };
    let extension = node.extension.as_ref();
    NodeRow {
        cluster,
        name: node.name.clone(),
        addresses: node.ip_addresses.iter().map(address).collect(),
        pod_cidrs: node.pod_cidrs().map(|cidr| cidr.to_string()).collect(),
        cluster_id: node.cluster_id,
        labels: node.labels.clone(),
        agent_version: extension
            .map(|extension| extension.agent_version.clone())
            .unwrap_or_default(),
        encryption_key: node.encryption_key,
    }
}

fn endpoint_row(cluster: String, pair: &IpIdentityPair) -> EndpointRow {
    EndpointRow {
        cluster,
        namespace: pair.k8s_namespace.clone(),
        name: pair.k8s_pod_name.clone(),
        address: pair.address_or_prefix().to_string(),
        identity: pair.id,
        node: pair.node().unwrap_or_default().to_owned(),
        host_address: pair.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
    }
}

fn identity_row(cluster: String, id: u32, identity: &Identity) -> IdentityRow {
    IdentityRow {
        cluster,
        id,
        namespace: identity.namespace().unwrap_or_default().to_owned(),
        labels: identity.labels().map(|label| label.to_string()).collect(),
    }
}

fn published(row: &mut ServiceRow, service: &ClusterService) {
    row.backends = Some(service.backends.keys().cloned().collect());
    row.global = true;
    row.shared = service.shared;
    // The manifest knows better, where there is one.
    if row.addresses.is_empty() {
        row.addresses = service.frontends.keys().cloned().collect();
    }
    if row.ports.is_empty() {
        let port = |ports: &PortMap| -> Vec<String> {
            ports
                .values()
                .map(|port| format!("{}/{}", port.port, port.protocol))
                .collect()
        };
        row.ports = service
            .frontends
            .values()
            .next()
            .map(port)
            .unwrap_or_default();
    }
}

fn stored(row: &mut ServiceRow, service: &StoredService) {
    let annotations = service.object.service_annotations();
    row.addresses = service
        .status
        .cluster_ips
        .iter()
        .map(ToString::to_string)
        .collect();
    let ports = service.object.spec.ports.iter();
    row.ports = ports
        .map(|port| format!("{}/{}", port.port, port.protocol.name()))
        .collect();
    row.global = annotations.global;
    row.shared = annotations.shared;
    row.affinity = annotations.affinity.to_string();
}

fn table(kind: GetKind, rows: &[Row]) -> Table {
    let mut table = Table::new(match kind {
        GetKind::Nodes => &["CLUSTER", "NAME", "ADDRESSES", "POD CIDRS", "VERSION"],
        GetKind::Endpoints => &[
            "CLUSTER",
            "NAMESPACE",
            "NAME",
            "ADDRESS",
            "IDENTITY",
            "NODE",
            "HOST",
        ],
        GetKind::Services => &[
            "CLUSTER",
            "NAMESPACE",
            "NAME",
            "ADDRESSES",
            "PORTS",
            "BACKENDS",
            "SCOPE",
            "AFFINITY",
        ],
        GetKind::Identities => &["CLUSTER", "ID", "LABELS"],
    });
    for row in rows {
        table.row(cells(row));
    }
    table
}

fn cells(row: &Row) -> Vec<String> {
    match row {
        Row::Node(row) => {
            let addresses = row
                .addresses
                .iter()
                .filter(|address| address.role != "CiliumInternalIP");
            let addresses: Vec<&str> = addresses.map(|address| address.address.as_str()).collect();
            vec![
                row.cluster.clone(),
                row.name.clone(),
                addresses.join(","),
                row.pod_cidrs.join(","),
                row.agent_version.clone(),
            ]
        }
        Row::Endpoint(row) => vec![
            row.cluster.clone(),
            row.namespace.clone(),
            row.name.clone(),
            row.address.clone(),
            row.identity.to_string(),
            row.node.clone(),
            row.host_address.clone(),
        ],
        Row::Service(row) => vec![
            row.cluster.clone(),
            row.namespace.clone(),
            row.name.clone(),
            row.addresses.join(","),
            row.ports.join(","),
            row.backends
                .as_ref()
                .map(|backends| backends.len().to_string())
                .unwrap_or_default(),
            match (row.global, row.shared) {
                (true, true) => "global",
                (true, false) => "global, not shared",
                (false, _) => "cluster",
            }
            .to_owned(),
            row.affinity.clone(),
        ],
        Row::Identity(row) => vec![
            row.cluster.clone(),
            row.id.to_string(),
            row.labels.join(" "),
        ],
    }
}

#[cfg(test)]
mod tests;
