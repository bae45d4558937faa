//! What `Status` says of peers and nodes.

use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_api::keys::{Kind, RecordKey};
use clustermesh_api::records::{AddressType, Node, Session, SessionState};
use clustermesh_api::v1::{MeshStatusResponse, NodeStatus, PeerStatus, node_status};
use clustermesh_core::State;
use clustermesh_mesh::{View, prefix_end};

use super::Shared;
use crate::version::VERSION;
use crate::view::StateView;

/// A node that this cluster has on record.
pub(super) struct RecordedNode {
    pub(super) record: Node,
    /// `None`: it never had a session.
    pub(super) session: Option<Session>,
}

/// All nodes on record, by name.
pub(super) fn recorded_nodes(shared: &Shared) -> Vec<RecordedNode> {
    shared.store.read(|state| {
        let view = StateView(state);
        view.list(Kind::Nodes.state_prefix(&shared.settings.name).as_bytes())
            .into_iter()
            .filter_map(|kv| {
                let record = Node::decode(&kv.value).ok()?;
                let key = RecordKey::Session {
                    node: record.name.clone(),
                };
                let session = view
                    .get(&key.to_bytes())
                    .and_then(|kv| Session::decode(&kv.value).ok());
                Some(RecordedNode { record, session })
            })
            .collect()
    })
}

pub(super) fn status(shared: &Shared) -> MeshStatusResponse {
    let peers = shared
        .peers
        .all(&shared.store)
        .into_iter()
        .map(|status| peer(shared, status))
        .collect();
    let nodes = recorded_nodes(shared)
        .into_iter()
        .map(|recorded| node(shared, recorded))
        .collect();
    MeshStatusResponse {
        cluster: shared.settings.name.clone(),
        cluster_id: shared.settings.id,
        store_id: shared.store.cluster_id(),
        revision: shared.store.revision(),
        server_version: VERSION.to_owned(),
        peers,
        nodes,
        ..MeshStatusResponse::default()
    }
}

/// Adds what stands in the store.
fn peer(shared: &Shared, status: PeerStatus) -> PeerStatus {
    let name = &status.cluster;
    shared.store.read(|state| {
        // While a listing is under way, the copy equals no revision of the peer.
        let cursor = state.peer_cursor(name).filter(|cursor| cursor.synced);
        let count = |kind: Kind| count(state, &kind.cache_prefix(name));
        PeerStatus {
            revision: cursor.map_or(0, |cursor| cursor.revision),
            store_id: cursor.map_or(0, |cursor| cursor.store_id),
            nodes: count(Kind::Nodes),
            endpoints: count(Kind::Ip),
            identities: count(Kind::Identities),
            services: count(Kind::Services),
            ..status.clone()
        }
    })
}

fn count(state: &State, prefix: &str) -> u64 {
    let request = RangeRequest {
        key: prefix.to_owned().into(),
        range_end: prefix_end(prefix.as_bytes()),
        count_only: true,
        ..RangeRequest::default()
    };
    state
        .range(&request)
        .ok()
        .and_then(|response| u64::try_from(response.count).ok())
        .unwrap_or(0)
}

fn node(shared: &Shared, recorded: RecordedNode) -> NodeStatus {
    let RecordedNode { record, session } = recorded;
    let report = shared.registry.report(&record.name);
    let connected =
        report.is_some() || session.is_some_and(|session| session.state == SessionState::Connected);
    let state = if connected {
        node_status::State::Connected
    } else {
        node_status::State::Stale
    };
    let report = report.unwrap_or_default();
    let age = report
        .age()
        .and_then(|age| i64::try_from(age.as_millis()).ok());
    NodeStatus {
        state: state.into(),
        applied: report.applied,
        // Negative: it has not reported in this session.
        last_report_age_ms: age.unwrap_or(-1),
        agent_version: record
            .extension
            .as_ref()
            .map(|extension| extension.agent_version.clone())
            .unwrap_or_default(),
        map_layout_version: report.map_layout_version,
        pod_cidrs: record.pod_cidrs().map(|cidr| cidr.to_string()).collect(),
        underlay_addresses: record
            .addresses_of(&AddressType::InternalIP)
            .map(|address| address.to_string())
            .collect(),
        refused_records: report.refused_records.into_iter().collect(),
        encryption: report.encryption,
        node: record.name,
    }
}
