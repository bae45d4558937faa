use clustermesh_api::IdentitySplit;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::settings::example;
use crate::view::MapView;

fn peer(cluster: &str, cluster_id: u32) -> Peer {
    Peer {
        cluster: cluster.to_owned(),
        cluster_id,
        split: IdentitySplit::Clusters255,
        cached: false,
        synced_canaries: true,
        services: true,
        endpoint_slices: true,
    }
}

fn c2() -> (PeerCopyState, CidrOwners) {
    (
        PeerCopyState::new(peer("c2", 2)),
        CidrOwners::new(&example()),
    )
}

type Event = (Bytes, Option<Bytes>);

fn put(key: &str, value: serde_json::Value) -> Event {
    (key.to_owned().into(), Some(value.to_string().into()))
}

fn gone(key: &str) -> Event {
    (key.to_owned().into(), None)
}

fn node_of(cluster: &str, id: u32, name: &str, underlay: &str, cidr: &str) -> Event {
    let network = cidr.split('/').next().unwrap();
    put(
        &format!("cilium/state/nodes/v1/{cluster}/{name}"),
        json!({"Name": name, "Cluster": cluster, "ClusterID": id,
            "IPAddresses": [{"Type": "InternalIP", "IP": underlay}],
            "IPv4AllocCIDR": {"IP": network, "Mask": "////AA=="}, "IPv4HealthIP": network.replace(".0.0", ".0.2")}),
    )
}

fn node(name: &str, underlay: &str, cidr: &str) -> Event {
    node_of("c2", 2, name, underlay, cidr)
}

fn ip(address: &str, id: u32, host: &str) -> Event {
    put(
        &format!("cilium/state/ip/v1/default/{address}"),
        json!({"IP": address, "HostIP": host, "ID": id}),
    )
}

fn service(cluster: &str, backend: &str) -> Event {
    put(
        "cilium/state/services/v1/c2/shop/cart",
        json!({"cluster": cluster, "namespace": "shop", "name": "cart", "clusterID": 2,
            "backends": {backend: {"http": {"Protocol": "TCP", "Port": 80}}}}),
    )
}

fn keys_of(changes: &[PeerChange]) -> Vec<(String, bool)> {
    changes
        .iter()
        .map(|c| {
            (
                String::from_utf8(c.key.to_vec()).unwrap(),
                c.value.is_some(),
            )
        })
        .collect()
}

fn reasons(state: &PeerCopyState) -> Vec<&'static str> {
    state
        .refused()
        .map(|(_, refusal)| refusal.reason())
        .collect()
}

const ID: u32 = (2 << 16) + 1;

#[test]
fn accepted_records_are_copied_byte_for_byte() {
    let (mut state, mut owners) = c2();
    let events = [
        ip("10.2.0.4", ID, "192.0.2.21"),
        node("n1", "192.0.2.21", "10.2.0.0/24"),
        service("c2", "10.2.0.4"),
    ];
    let outcome = state.ingest(&mut owners, &events);
    assert_eq!(reasons(&state), [""; 0]);
    assert_eq!(
        keys_of(&outcome.changes),
        [
            ("cilium/cache/ip/v1/c2/10.2.0.4".to_owned(), true),
            ("cilium/cache/nodes/v1/c2/n1".to_owned(), true),
            ("cilium/cache/services/v1/c2/shop/cart".to_owned(), true),
        ]
    );
    assert_eq!(outcome.changes[0].value, events[0].1);
}

#[test]
fn claims_beyond_the_peers_right_are_refused() {
    let label = |cluster: &str| format!("k8s:io.cilium.k8s.policy.cluster={cluster};");
    let identity = |id: u32, cluster: &str| -> Event {
        (
            format!("cilium/state/identities/v1/id/{id}").into(),
            Some(label(cluster).into()),
        )
    };
    let cases: Vec<(Event, &str)> = vec![
        (identity(65_537, "c2"), "identity-range"),
        (identity(ID, "c3"), "cluster-label"),
        (identity(200, "c2"), "identity-range"),
        (ip("10.2.0.4", 65_537, "192.0.2.21"), "identity-range"),
        (ip("10.9.0.4", ID, "192.0.2.21"), "not-owned"),
        (ip("10.1.0.4", ID, "192.0.2.21"), "not-owned"),
        (ip("10.2.0.4", ID, "192.0.2.99"), "unknown-host"),
        (ip("10.2.0.4", 1, "192.0.2.21"), "reserved-identity"),
        (ip("10.2.0.2", 8, "192.0.2.21"), "reserved-identity"),
        (ip("192.0.2.21", 2, "192.0.2.21"), "reserved-identity"),
        (service("c3", "10.2.0.4"), "cluster-name"),
        (service("c2", "10.1.0.4"), "not-owned"),
        (service("c2", "fe80::1%eth0"), "address"),
        (node("n2", "192.0.2.22", "10.1.5.0/24"), "overlap"),
        (node("n2", "10.1.0.1", "10.2.1.0/24"), "overlap"),
        (node("n2", "127.0.0.1", "10.2.1.0/24"), "unusable-range"),
        (node("n2", "192.0.2.22", "127.1.0.0/24"), "unusable-range"),
        (
            put(
                "cilium/state/nodes/v1/c2/n2",
                json!({"Name": "n3", "Cluster": "c2", "ClusterID": 2}),
            ),
            "key-mismatch",
        ),
        (
            put(
                "cilium/state/nodes/v1/c2/n2",
                json!({"Name": "n2", "Cluster": "c2", "ClusterID": 9}),
            ),
            "cluster-id",
        ),
        (put("cilium/state/nodes/v1/c2/n2", json!([])), "malformed"),
    ];
    for (event, reason) in cases {
        let (mut state, mut owners) = c2();
        state.ingest(&mut owners, &[node("n1", "192.0.2.21", "10.2.0.0/24")]);
        let outcome = state.ingest(&mut owners, std::slice::from_ref(&event));
        assert_eq!(reasons(&state), [reason], "{event:?}");
        assert!(
            outcome.changes.iter().all(|change| change.value.is_none()),
            "{event:?}"
        );
        let name = String::from_utf8_lossy(&event.0).into_owned();
        assert!(
            outcome.refused[0].to_string().contains(&name),
            "{}",
            outcome.refused[0]
        );
        // Told once, not at every repetition.
        assert!(state.ingest(&mut owners, &[event]).refused.is_empty());
    }
}

#[test]
fn reserved_identities_are_taken_on_the_addresses_of_their_role() {
    let (mut state, mut owners) = c2();
    state.ingest(&mut owners, &[node("n1", "192.0.2.21", "10.2.0.0/24")]);
    let events = [
        ip("192.0.2.21", 1, "192.0.2.21"),
        ip("10.2.0.2", 4, "192.0.2.21"),
    ];
    assert_eq!(state.ingest(&mut owners, &events).changes.len(), 2);
    assert_eq!(reasons(&state), [""; 0]);
}

#[test]
fn a_refused_update_withdraws_what_was_accepted_before() {
    let (mut state, mut owners) = c2();
    state.ingest(
        &mut owners,
        &[
            node("n1", "192.0.2.21", "10.2.0.0/24"),
            ip("10.2.0.4", ID, "192.0.2.21"),
        ],
    );
    let outcome = state.ingest(&mut owners, &[ip("10.2.0.4", 65_537, "192.0.2.21")]);
    assert_eq!(
        keys_of(&outcome.changes),
        [("cilium/cache/ip/v1/c2/10.2.0.4".to_owned(), false)]
    );
}

#[test]
fn refused_records_are_taken_when_the_conflict_is_gone() {
    let mut owners = CidrOwners::new(&example());
    let (mut first, mut second) = (
        PeerCopyState::new(peer("c2", 2)),
        PeerCopyState::new(peer("c3", 3)),
    );
    first.ingest(&mut owners, &[node("n1", "192.0.2.21", "10.2.0.0/24")]);
    let claims = [
        node_of("c3", 3, "n1", "192.0.2.31", "10.2.0.0/24"),
        ip("10.2.0.9", (3 << 16) + 1, "192.0.2.31"),
    ];
    let outcome = second.ingest(&mut owners, &claims);
    assert_eq!(outcome.refused.len(), 2);
    assert!(
        outcome
            .refused
            .iter()
            .any(|refusal| refusal.to_string().contains("of cluster c2"))
    );
    assert!(second.reconsider(&mut owners).is_empty());
    first.ingest(&mut owners, &[gone("cilium/state/nodes/v1/c2/n1")]);
    assert_eq!(
        keys_of(&second.reconsider(&mut owners)),
        [
            ("cilium/cache/ip/v1/c3/10.2.0.9".to_owned(), true),
            ("cilium/cache/nodes/v1/c3/n1".to_owned(), true)
        ]
    );
    assert_eq!(second.refused().count(), 0);
}

#[test]
fn refused_records_are_bounded_and_the_rest_asks_for_a_listing() {
    let (mut state, mut owners) = c2();
    let events: Vec<_> = (0..=MAX_REFUSED_RECORDS)
        .map(|index| {
            ip(
                &format!("10.3.{}.{}", index / 256, index % 256),
                ID,
                "192.0.2.21",
            )
        })
        .collect();
    state.ingest(&mut owners, &events);
    assert_eq!(state.refused().count(), MAX_REFUSED_RECORDS);
    assert!(!state.needs_relist(&owners));
    owners
        .claim("c9", "n", &["10.3.0.0/24".parse().unwrap()])
        .unwrap();
    owners.release("c9", "n");
    assert!(state.needs_relist(&owners));
    state.begin_listing();
    assert!(!state.needs_relist(&owners));
}

fn listing(events: &[Event]) -> Vec<(Bytes, Bytes)> {
    events
        .iter()
        .filter_map(|(key, value)| Some((key.clone(), value.clone()?)))
        .collect()
}

fn write(view: &mut MapView, changes: &[PeerChange]) {
    view.apply(
        changes
            .iter()
            .map(|change| (change.key.clone(), change.value.clone())),
    );
}

const CANARY: &str = "cilium/synced/c2/cilium/state/nodes/v1";

#[test]
fn absence_deletes_only_after_the_peers_canary() {
    let (mut state, mut owners) = c2();
    let mut view = MapView::new();
    let full = [
        node("n1", "192.0.2.21", "10.2.0.0/24"),
        node("n2", "192.0.2.22", "10.2.1.0/24"),
    ];
    let outcome = state.replace(&mut owners, Kind::Nodes, &listing(&full), &view, 0);
    assert_eq!(outcome.changes.len(), 2, "no canary of ours yet");
    write(&mut view, &outcome.changes);
    let outcome = state.replace(&mut owners, Kind::Nodes, &listing(&full[..1]), &view, 0);
    assert_eq!(outcome.changes, []);

    let outcome = state.ingest(&mut owners, &[(CANARY.into(), Some("then".into()))]);
    assert_eq!(outcome.completed, [Kind::Nodes]);
    let outcome = state.replace(&mut owners, Kind::Nodes, &listing(&full[..1]), &view, 0);
    assert_eq!(
        keys_of(&outcome.changes),
        [
            ("cilium/cache/nodes/v1/c2/n2".to_owned(), false),
            ("cilium/synced/c2/cilium/cache/nodes/v1".to_owned(), true)
        ]
    );
    write(&mut view, &outcome.changes);
    assert_eq!(
        state
            .replace(&mut owners, Kind::Nodes, &listing(&full[..1]), &view, 0)
            .changes,
        []
    );
    owners
        .claim("c3", "n", &["10.2.1.0/24".parse().unwrap()])
        .unwrap();
}

#[test]
fn the_canary_of_another_store_permits_no_deletion() {
    let (mut state, mut owners) = c2();
    let mut view = MapView::new();
    let full = [node("n1", "192.0.2.21", "10.2.0.0/24")];
    state.ingest(&mut owners, &[(CANARY.into(), Some("then".into()))]);
    let outcome = state.replace(&mut owners, Kind::Nodes, &listing(&full), &view, 0);
    write(&mut view, &outcome.changes);
    state.begin_canaries();
    assert_eq!(
        state
            .replace(&mut owners, Kind::Nodes, &[], &view, 0)
            .changes,
        []
    );
}

#[test]
fn a_restored_copy_asks_for_a_listing_when_a_node_may_make_a_refused_record_good() {
    let (mut before, mut owners) = c2();
    let early = ip("10.2.0.4", ID, "192.0.2.21");
    before.ingest(&mut owners, std::slice::from_ref(&early));
    assert_eq!(reasons(&before), ["not-owned"]);
    let (mut state, _) = PeerCopyState::restore(peer("c2", 2), &mut owners, &MapView::new());
    assert!(!state.needs_relist(&owners));
    state.ingest(&mut owners, &[node("n1", "192.0.2.21", "10.2.0.0/24")]);
    assert!(
        state.needs_relist(&owners),
        "nobody holds the address any more"
    );
    state.begin_listing();
    assert!(!state.needs_relist(&owners));
}

#[test]
fn changes_that_were_not_stored_are_listed_again() {
    let (mut state, mut owners) = c2();
    state.ingest(&mut owners, &[ip("10.2.0.4", ID, "192.0.2.21")]);
    let lost = state.ingest(&mut owners, &[node("n1", "192.0.2.21", "10.2.0.0/24")]);
    assert_eq!(lost.changes.len(), 2, "the node and the address");
    assert!(!state.needs_relist(&owners));
    state.changes_lost();
    assert!(state.needs_relist(&owners));
}

#[test]
fn a_kind_that_the_peer_does_not_export_is_drained_and_complete() {
    let mut state = PeerCopyState::new(Peer {
        endpoint_slices: false,
        ..peer("c2", 2)
    });
    let mut owners = CidrOwners::new(&example());
    let mut view = MapView::new();
    view.put("cilium/cache/endpointslices/v1/c2/shop/old", "x");
    let outcome = state.replace(&mut owners, Kind::EndpointSlices, &[], &view, 0);
    assert_eq!(
        keys_of(&outcome.changes),
        [
            (
                "cilium/cache/endpointslices/v1/c2/shop/old".to_owned(),
                false
            ),
            (
                "cilium/synced/c2/cilium/cache/endpointslices/v1".to_owned(),
                true
            ),
        ]
    );
}

#[test]
fn a_restored_copy_knows_its_nodes() {
    let (mut state, mut owners) = c2();
    let mut view = MapView::new();
    let changes = state
        .ingest(&mut owners, &[node("n1", "192.0.2.21", "10.2.0.0/24")])
        .changes;
    write(&mut view, &changes);
    let mut owners = CidrOwners::new(&example());
    let (mut state, changes) = PeerCopyState::restore(peer("c2", 2), &mut owners, &view);
    assert_eq!(changes, []);
    state.ingest(&mut owners, &[ip("10.2.0.4", ID, "192.0.2.21")]);
    assert_eq!(reasons(&state), [""; 0]);
}

#[test]
fn a_forgotten_peer_leaves_nothing() {
    let (mut state, mut owners) = c2();
    let mut view = MapView::new();
    let changes = state
        .ingest(&mut owners, &[node("n1", "192.0.2.21", "10.2.0.0/24")])
        .changes;
    write(&mut view, &changes);
    view.put("cilium/cluster-config/c2", "{}");
    view.put("cilium/synced/c2/cilium/cache/nodes/v1", "t");
    view.put("cilium/cache/nodes/v1/c22/n1", "other");
    let changes = forget("c2", &mut owners, &view);
    write(&mut view, &changes);
    assert_eq!(view.list(b"cilium/").len(), 1);
    assert!(!owners.holds("c2", "10.2.0.4/32".parse().unwrap()));
}

proptest! {
    #[test]
    fn live_events_and_a_listing_give_the_same_copy(
        steps in prop::collection::vec((0_u8..3, 0_u8..6, any::<bool>(), 0_u8..4), 1..40),
    ) {
        let (mut live, mut owners) = c2();
        let mut copy = MapView::new();
        let mut source: BTreeMap<Bytes, Bytes> = BTreeMap::new();
        live.ingest(&mut owners, &Kind::ALL.map(|kind| {
            (format!("cilium/synced/c2/cilium/state/{kind}/v1").into(), Some("t".into()))
        }));
        for (kind, index, present, variant) in steps {
            let event = match kind {
                // Variant 3 claims our range.
                0 => node(&format!("n{index}"), &format!("192.0.2.{index}"), &format!("10.{}.{index}.0/24", if variant == 3 { 1 } else { 2 })),
                1 => ip(&format!("10.2.{index}.9"), ID, &format!("192.0.2.{}", index % 5)),
                _ => service("c2", &format!("10.2.{index}.9")),
            };
            let event = if present { event } else { (event.0, None) };
            match &event.1 {
                Some(value) => source.insert(event.0.clone(), value.clone()),
                None => source.remove(&event.0),
            };
            let changes = live.ingest(&mut owners, &[event]).changes;
            write(&mut copy, &changes);
        }
        // A listing over the live copy, with all that live events know, must end where one over nothing ends.
        let list = |state: &mut PeerCopyState, owners: &mut CidrOwners, view: &mut MapView| {
            for kind in [Kind::Nodes, Kind::Identities, Kind::Ip, Kind::EndpointSlices, Kind::Services] {
                let listing: Vec<_> = source.iter()
                    .filter(|(key, _)| RecordKey::parse(key).unwrap().kind() == Some(kind))
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect();
                let changes = state.replace(owners, kind, &listing, view, 0).changes;
                write(view, &changes);
            }
        };
        list(&mut live, &mut owners, &mut copy);
        let (mut fresh, mut fresh_owners) = c2();
        fresh.ingest(&mut fresh_owners, &Kind::ALL.map(|kind| {
            (format!("cilium/synced/c2/cilium/state/{kind}/v1").into(), Some("t".into()))
        }));
        let mut scratch = MapView::new();
        list(&mut fresh, &mut fresh_owners, &mut scratch);
        let pairs = |view: &MapView| view.list(b"cilium/cache/").into_iter().map(|kv| (kv.key, kv.value)).collect::<Vec<_>>();
        prop_assert_eq!(pairs(&copy), pairs(&scratch));
        prop_assert_eq!(live.refused_counts(), fresh.refused_counts());
    }
}

#[test]
fn past_the_quota_records_are_refused_and_counted_and_the_rest_is_unharmed() {
    let (state, mut owners) = c2();
    let mut state = state.with_quota(CopyQuota {
        records_max: 3,
        bytes_max: 1 << 20,
    });
    let outcome = state.ingest(
        &mut owners,
        &[
            node("n1", "192.0.2.21", "10.2.0.0/24"),
            ip("10.2.0.4", ID, "192.0.2.21"),
            ip("10.2.0.5", ID, "192.0.2.21"),
            ip("10.2.0.6", ID, "192.0.2.21"),
        ],
    );
    assert_eq!(
        outcome.changes.iter().filter(|c| c.value.is_some()).count(),
        3
    );
    assert_eq!(state.refused_counts(), BTreeMap::from([("quota", 1)]));
    assert!(outcome.refused[0].to_string().contains("3 records"));

    // What is there may still change, and what goes makes room.
    let outcome = state.ingest(&mut owners, &[ip("10.2.0.4", ID + 1, "192.0.2.21")]);
    assert_eq!(
        keys_of(&outcome.changes),
        [("cilium/cache/ip/v1/c2/10.2.0.4".to_owned(), true)]
    );
    let outcome = state.ingest(&mut owners, &[gone("cilium/state/ip/v1/default/10.2.0.5")]);
    assert_eq!(
        keys_of(&outcome.changes),
        [
            ("cilium/cache/ip/v1/c2/10.2.0.5".to_owned(), false),
            ("cilium/cache/ip/v1/c2/10.2.0.6".to_owned(), true),
        ]
    );
    assert!(state.refused_counts().is_empty());
}

#[test]
fn a_restored_copy_counts_against_the_quota_and_knows_not_what_was_refused() {
    let (mut state, mut owners) = c2();
    let events = [
        node("n1", "192.0.2.21", "10.2.0.0/24"),
        ip("10.2.0.4", ID, "192.0.2.21"),
    ];
    let mut view = MapView::new();
    view.apply(
        state
            .ingest(&mut owners, &events)
            .changes
            .into_iter()
            .map(|change| (change.key, change.value)),
    );
    assert!(state.refused_known());
    let (state, changes) = PeerCopyState::restore(peer("c2", 2), &mut owners, &view);
    assert!(changes.is_empty() && !state.refused_known());
    let mut state = state.with_quota(CopyQuota {
        records_max: 2,
        bytes_max: 1 << 20,
    });
    state.ingest(&mut owners, &[ip("10.2.0.5", ID, "192.0.2.21")]);
    assert_eq!(state.refused_counts(), BTreeMap::from([("quota", 1)]));
    state.begin_listing();
    assert!(state.refused_known());
}

#[test]
fn a_peer_does_not_get_the_underlay_address_of_our_own_node() {
    let (mut state, mut owners) = c2();
    owners.set_own_node("w1", &["192.0.2.1".parse().unwrap()]);
    state.ingest(&mut owners, &[node("n1", "192.0.2.1", "10.2.0.0/24")]);
    assert_eq!(reasons(&state), ["overlap"]);

    // One that it had already is taken from it when the copy is taken up again.
    let outcome = state.ingest(&mut owners, &[node("n2", "192.0.2.2", "10.2.1.0/24")]);
    let mut view = MapView::new();
    view.apply(
        outcome
            .changes
            .into_iter()
            .map(|change| (change.key, change.value)),
    );
    assert!(!state.is_outdated(&owners));
    owners.set_own_node("w2", &["192.0.2.2".parse().unwrap()]);
    assert!(state.is_outdated(&owners));
    let (state, changes) = PeerCopyState::restore(peer("c2", 2), &mut owners, &view);
    assert_eq!(
        keys_of(&changes),
        [("cilium/cache/nodes/v1/c2/n2".to_owned(), false)]
    );
    assert!(!state.is_outdated(&owners) && state.needs_relist(&owners));
}
