//! Records of another cluster, as a peer's watch brings them: lines of `KEY VALUE`, or `-KEY` for a deletion.

use bytes::Bytes;
use clustermesh_api::{IdentitySplit, Record, RecordKey};
use clustermesh_mesh::ClusterSettings;
use clustermesh_mesh::MapView;
use clustermesh_mesh::peering::{CidrOwners, Peer, PeerChange, PeerCopyState};

const PEER: &str = "c2";

/// The settings of the cluster that takes the records.
pub(crate) fn settings() -> ClusterSettings {
    let cidr = |text: &str| match text.parse() {
        Ok(cidr) => cidr,
        Err(error) => panic!("{text}: {error}"),
    };
    let settings = ClusterSettings {
        name: "c1".to_owned(),
        id: 1,
        split: IdentitySplit::Clusters255,
        pod_cidrs: vec![cidr("10.1.0.0/16"), cidr("fd01::/48")],
        node_mask_v4: 24,
        node_mask_v6: 64,
        service_cidrs: vec![cidr("10.96.1.0/24"), cidr("fd00:96:1::/112")],
    };
    match settings.checked() {
        Ok(settings) => settings,
        Err(error) => panic!("{error}"),
    }
}

fn peer() -> Peer {
    Peer {
        cluster: PEER.to_owned(),
        cluster_id: 2,
        split: IdentitySplit::Clusters255,
        cached: false,
        synced_canaries: true,
        services: true,
        endpoint_slices: true,
    }
}

type Event = (Bytes, Option<Bytes>);

fn events(bytes: &[u8]) -> Vec<Event> {
    bytes
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| match line.strip_prefix(b"-") {
            Some(key) => (Bytes::copy_from_slice(key), None),
            None => {
                let at = line.iter().position(|byte| *byte == b' ');
                let (key, value) = line.split_at(at.unwrap_or(line.len()));
                let value = value.strip_prefix(b" ").unwrap_or(value);
                (
                    Bytes::copy_from_slice(key),
                    Some(Bytes::copy_from_slice(value)),
                )
            }
        })
        .collect()
}

pub(crate) fn records(bytes: &[u8]) -> bool {
    let events = events(bytes);
    let mut any = false;
    for (key, value) in &events {
        any |= record(key, value.as_deref());
    }
    let settings = settings();
    let mut owners = CidrOwners::new(&settings);
    let mut copy = PeerCopyState::new(peer());
    let mut stored = MapView::new();
    for part in events.chunks(3) {
        let taken = copy.ingest(&mut owners, part);
        for change in &taken.changes {
            own_place(change);
        }
        stored.apply(
            taken
                .changes
                .into_iter()
                .map(|change| (change.key, change.value)),
        );
        let again = copy.reconsider(&mut owners);
        again.iter().for_each(own_place);
        stored.apply(again.into_iter().map(|change| (change.key, change.value)));
    }
    // A server that starts again takes up what it stored: all of its nodes were acceptable.
    let mut owners = CidrOwners::new(&settings);
    let (_, lost) = PeerCopyState::restore(peer(), &mut owners, &stored);
    assert!(lost.is_empty(), "stored, but not acceptable: {lost:?}");
    any
}

/// A peer writes nowhere but in its own copy.
fn own_place(change: &PeerChange) {
    let key = RecordKey::parse(&change.key);
    assert!(
        key.as_ref().is_ok_and(|key| key.cluster() == Some(PEER)),
        "{:?}",
        change.key
    );
    assert!(change.key.starts_with(b"cilium/cache/"), "{:?}", change.key);
}

/// A record that was read is read again from what it is written as.
fn record(key: &[u8], value: Option<&[u8]>) -> bool {
    let Ok(parsed) = RecordKey::parse(key) else {
        return false;
    };
    assert_eq!(
        RecordKey::parse(&parsed.to_bytes()).as_ref(),
        Ok(&parsed),
        "{key:?}"
    );
    let Some(value) = value else { return true };
    let Ok(record) = Record::decode(&parsed, value) else {
        return false;
    };
    let again = Record::decode(&parsed, &record.encode());
    assert!(
        again.as_ref().is_ok_and(|again| *again == record),
        "{record:?} became {again:?}"
    );
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let node = r#"cilium/state/nodes/v1/c2/n1 {"Name":"n1","Cluster":"c2","ClusterID":2,"IPAddresses":[{"Type":"InternalIP","IP":"192.0.2.1"},{"Type":"CiliumInternalIP","IP":"10.2.1.1"}],"IPv4AllocCIDR":{"IP":"10.2.1.0","Mask":"////AA=="},"IPv6AllocCIDR":null,"IPv4HealthIP":"10.2.1.2"}"#;
    let address = r#"cilium/state/ip/v1/default/10.2.1.5 {"IP":"10.2.1.5","HostIP":"192.0.2.1","ID":131073,"Key":0,"Metadata":"","K8sNamespace":"shop","K8sPodName":"p"}"#;
    let range = r#"cilium/state/ip/v1/default/10.2.1.0/24 {"IP":"10.2.1.0","Mask":"////AA==","HostIP":"192.0.2.1","ID":131073}"#;
    let identity = "cilium/state/identities/v1/id/131073 k8s:app=cart;k8s:io.cilium.k8s.policy.cluster=c2;k8s:io.kubernetes.pod.namespace=shop;";
    let service = r#"cilium/state/services/v1/c2/shop/cart {"cluster":"c2","clusterID":2,"namespace":"shop","name":"cart","frontends":{"10.96.2.1":{"http":{"Protocol":"TCP","Port":80}}},"backends":{"10.2.1.5":{"http":{"Protocol":"TCP","Port":8080}}},"labels":{},"selector":{"app":"cart"},"includeExternal":true,"shared":true}"#;
    let canary = "cilium/synced/c2/cilium/state/nodes/v1 2026-01-02T03:04:05Z";
    let config = r#"cilium/cluster-config/c2 {"id":2,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255}}"#;
    let gone = "-cilium/state/nodes/v1/c2/n1";
    let all = [
        node, address, range, identity, service, canary, config, gone,
    ];
    let mut seeds: Vec<Vec<u8>> = all.iter().map(|line| line.as_bytes().to_vec()).collect();
    seeds.push(all.join("\n").into_bytes());
    seeds
}
