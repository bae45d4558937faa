use clustermesh_api::records::{IpIdentityPair, Node, Readiness, SessionState};
use clustermesh_api::v1::refused::Reason;
use clustermesh_api::v1::{
    DeleteEndpoint, EndpointReadiness, ReportReadiness, SyncEndpoints, WireguardKey, WireguardKeys,
};

use super::*;
use crate::keys;
use crate::step::Step;
use crate::test_support::{Lab, claim, commit, hello, workload};
use crate::view::View;

fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.apply(&[
        workload("cart-0", &[("app", "cart")]),
        workload("cart-1", &[("app", "cart")]),
    ]);
    lab.node("n1", "192.0.2.1");
    lab.node("n2", "192.0.2.2");
    lab
}

fn pair(lab: &Lab, address: &str) -> Option<IpIdentityPair> {
    let kv = lab
        .view
        .get(format!("cilium/state/ip/v1/default/{address}").as_bytes())?;
    Some(IpIdentityPair::decode(&kv.value).unwrap())
}

#[test]
fn hello_writes_a_node_record_with_router_and_health_addresses() {
    let lab = lab();
    let kv = lab.view.get(b"cilium/state/nodes/v1/c1/n1").unwrap();
    let node = Node::decode(&kv.value).unwrap();
    assert_eq!(node.ipv4_alloc_cidr.unwrap().to_string(), "10.1.0.0/24");
    assert_eq!(node.ipv6_alloc_cidr.unwrap().to_string(), "fd01::/64");
    assert_eq!(node.ipv4_health_ip, Some("10.1.0.2".parse().unwrap()));
    assert_eq!(
        node.tunnel_endpoint(true),
        Some("192.0.2.1".parse().unwrap())
    );
    let router: Vec<_> = node
        .addresses_of(&clustermesh_api::records::AddressType::CiliumInternalIP)
        .collect();
    assert_eq!(
        router,
        [
            "10.1.0.1".parse::<IpAddr>().unwrap(),
            "fd01::1".parse().unwrap()
        ]
    );
}

#[test]
fn hello_again_changes_nothing() {
    let lab = lab();
    let plan = plan_hello(&lab.view, &lab.settings, &hello("n1", "192.0.2.1")).unwrap();
    assert!(plan.txn.is_empty());
    assert_eq!(plan.result.v4, Some("10.1.0.0/24".parse().unwrap()));
}

#[test]
fn a_node_cannot_make_its_record_large() {
    let lab = lab();
    let mut many = hello("n1", "192.0.2.1");
    many.labels = (0..65).map(|n| (format!("l{n}"), String::new())).collect();
    let mut long = hello("n1", "192.0.2.1");
    long.boot_id = "x".repeat(1_000);
    for claim in [many, long] {
        let error = plan_hello(&lab.view, &lab.settings, &claim).unwrap_err();
        assert_eq!(error.reason(), Reason::Limit, "{error}");
        assert!(error.to_string().contains("node n1"), "{error}");
    }
}

#[test]
fn a_node_that_was_removed_gets_no_session_record_by_its_loss() {
    let lab = lab();
    let plan = plan_session(&lab.view, "gone", SessionState::Stale, "i", 15, 1);
    assert!(plan.txn.is_empty());
}

#[test]
fn an_underlay_address_of_another_node_is_refused_with_both_named() {
    let lab = lab();
    let error = plan_hello(&lab.view, &lab.settings, &hello("n3", "192.0.2.1")).unwrap_err();
    assert_eq!(error.reason(), Reason::Conflict);
    assert!(
        error.to_string().contains("n3") && error.to_string().contains("n1"),
        "{error}"
    );
}

#[test]
fn bad_underlay_addresses_are_refused() {
    let lab = lab();
    for (address, reason) in [
        ("127.0.0.1", Reason::Invalid),
        ("10.1.9.9", Reason::Conflict),
        ("10.96.1.1", Reason::Conflict),
        ("fe80::1%eth0", Reason::Invalid),
        ("nonsense", Reason::Invalid),
    ] {
        let error = plan_hello(&lab.view, &lab.settings, &hello("n3", address)).unwrap_err();
        assert_eq!(error.reason(), reason, "{address}: {error}");
    }
}

#[test]
fn wireguard_keys_stand_in_the_node_record_and_bad_ones_are_refused() {
    let mut lab = lab();
    let key = |text: &str, port, epoch| WireguardKey {
        public_key: text.to_owned(),
        port,
        epoch,
    };
    let good = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=";
    let mut asks = hello("n3", "192.0.2.3");
    asks.wireguard = Some(WireguardKeys {
        current: Some(key(good, 51_871, 4)),
        next: Some(key(good, 51_872, 5)),
        nodes: true,
    });
    let plan = plan_hello(&lab.view, &lab.settings, &asks).unwrap();
    commit(&mut lab.view, plan);
    let kv = lab.view.get(&keys::node(&lab.settings.name, "n3")).unwrap();
    let node = Node::decode(&kv.value).unwrap();
    assert_eq!(
        (node.wireguard_pub_key.as_str(), node.encryption_key),
        (good, 255)
    );
    let more = node.extension.unwrap().wireguard.unwrap();
    assert_eq!((more.port, more.epoch), (51_871, 4));
    let next = more.next.unwrap();
    assert_eq!((next.port, next.epoch), (51_872, 5));
    for (text, port) in [("", 1), (good, 0), (good, 65_536), ("short=", 1)] {
        asks.wireguard = Some(WireguardKeys {
            current: Some(key(text, port, 0)),
            ..Default::default()
        });
        let error = plan_hello(&lab.view, &lab.settings, &asks).unwrap_err();
        assert_eq!(error.reason(), Reason::Invalid, "{error}");
    }
}

#[test]
fn two_hellos_with_one_address_never_both_succeed() {
    let mut lab = lab();
    let first = plan_hello(&lab.view, &lab.settings, &hello("n3", "192.0.2.3")).unwrap();
    let second = plan_hello(&lab.view, &lab.settings, &hello("n4", "192.0.2.3")).unwrap();
    commit(&mut lab.view, first);
    assert!(!second.txn.holds(&lab.view));
}

#[test]
fn a_claim_writes_the_record_with_the_workloads_identity() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    let pair = pair(&lab, "10.1.0.4").unwrap();
    assert_eq!(pair.host_ip, Some("192.0.2.1".parse().unwrap()));
    assert_eq!(
        (pair.k8s_namespace.as_str(), pair.k8s_pod_name.as_str()),
        ("shop", "cart-0")
    );
    assert_eq!(pair.node(), Some("n1"));
    assert_eq!(pair.id, 65537);
    let again = plan_upsert(
        &lab.view,
        &lab.settings,
        "n1",
        &mut NodeMemo::default(),
        &claim("cart-0", &["10.1.0.4"]),
    )
    .unwrap();
    assert!(again.txn.is_empty());
}

#[test]
fn addresses_of_a_node_with_a_wireguard_key_say_so_as_cilium_reads_it() {
    let mut lab = lab();
    let key = "cilium/state/ip/v1/default/10.1.0.4";
    let golden = |key: u8| {
        format!(
            "{{\"IP\":\"10.1.0.4\",\"Mask\":null,\"HostIP\":\"192.0.2.1\",\"ID\":65537,\"Key\":{key},\"Metadata\":\"\",\
             \"K8sNamespace\":\"shop\",\"K8sPodName\":\"cart-0\",\"clustermesh.io\":{{\"node\":\"n1\"}}}}"
        )
    };
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    assert_eq!(lab.view.get(key.as_bytes()).unwrap().value, golden(0));
    // The node's agent is told to encrypt: its new session says the key, then all its endpoints once more.
    let mut asks = hello("n1", "192.0.2.1");
    asks.wireguard = Some(WireguardKeys {
        current: Some(WireguardKey {
            public_key: "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=".to_owned(),
            port: 51_871,
            epoch: 0,
        }),
        ..Default::default()
    });
    let plan = plan_hello(&lab.view, &lab.settings, &asks).unwrap();
    commit(&mut lab.view, plan);
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    assert_eq!(lab.view.get(key.as_bytes()).unwrap().value, golden(255));
    // And back.
    let plan = plan_hello(&lab.view, &lab.settings, &hello("n1", "192.0.2.1")).unwrap();
    commit(&mut lab.view, plan);
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    assert_eq!(lab.view.get(key.as_bytes()).unwrap().value, golden(0));
}

#[test]
fn claims_outside_the_nodes_right_are_refused() {
    let mut lab = lab();
    let cases: [(&str, &str, &[&str], Reason); 9] = [
        ("n1", "cart-0", &["10.1.1.4"], Reason::NotOwned),
        ("n1", "cart-0", &["10.1.0.1"], Reason::NotOwned),
        ("n1", "cart-0", &["10.1.0.2"], Reason::NotOwned),
        ("n1", "cart-0", &["10.1.0.255"], Reason::NotOwned),
        ("n1", "cart-0", &["10.1.0.4", "192.0.2.1"], Reason::NotOwned),
        ("n1", "unknown", &["10.1.0.4"], Reason::UnknownWorkload),
        ("n1", "cart-0", &["x"], Reason::Invalid),
        ("n1", "cart-0", &[], Reason::Limit),
        ("n9", "cart-0", &["10.1.0.4"], Reason::NotOwned),
    ];
    for (node, name, addresses, reason) in cases {
        let error = plan_upsert(
            &lab.view,
            &lab.settings,
            node,
            &mut NodeMemo::default(),
            &claim(name, addresses),
        )
        .unwrap_err();
        assert_eq!(error.reason(), reason, "{addresses:?}: {error}");
    }
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    let foreign = DeleteEndpoint {
        request_id: 0,
        addresses: vec!["10.1.0.4".to_owned()],
    };
    assert_eq!(
        plan_delete_endpoint(&lab.view, "n2", &foreign)
            .unwrap_err()
            .reason(),
        Reason::NotOwned
    );
}

#[test]
fn a_name_on_another_live_node_is_refused_until_that_node_is_stale() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    let plan = plan_session(&lab.view, "n1", SessionState::Connected, "i", 15, 1);
    commit(&mut lab.view, plan);
    let error = plan_upsert(
        &lab.view,
        &lab.settings,
        "n2",
        &mut NodeMemo::default(),
        &claim("cart-0", &["10.1.1.4"]),
    )
    .unwrap_err();
    assert_eq!(error.reason(), Reason::Conflict);
    let plan = plan_session(&lab.view, "n1", SessionState::Stale, "i", 15, 2);
    commit(&mut lab.view, plan);
    lab.endpoint("n2", "cart-0", "10.1.1.4");
    assert!(
        pair(&lab, "10.1.0.4").is_some(),
        "a stale node's records stay"
    );
}

#[test]
fn an_apply_between_plan_and_commit_voids_the_claim() {
    let mut lab = lab();
    let plan = plan_upsert(
        &lab.view,
        &lab.settings,
        "n1",
        &mut NodeMemo::default(),
        &claim("cart-0", &["10.1.0.4"]),
    )
    .unwrap();
    lab.apply(&[workload("cart-0", &[("app", "other")])]);
    assert!(!plan.txn.holds(&lab.view));
}

#[test]
fn delete_takes_readiness_along_and_may_come_twice() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    lab.ready("n1", "10.1.0.4", true);
    let delete = DeleteEndpoint {
        request_id: 0,
        addresses: vec!["10.1.0.4".to_owned()],
    };
    let plan = plan_delete_endpoint(&lab.view, "n1", &delete).unwrap();
    commit(&mut lab.view, plan);
    assert!(pair(&lab, "10.1.0.4").is_none());
    assert!(lab.view.list(b"clustermesh.io/readiness/").is_empty());
    assert!(lab.view.list(b"clustermesh.io/alloc/endpoints/").is_empty());
    assert!(
        plan_delete_endpoint(&lab.view, "n1", &delete)
            .unwrap()
            .txn
            .is_empty()
    );
}

#[test]
fn sync_deletes_what_is_not_in_the_set_and_only_of_that_node() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    lab.ready("n1", "10.1.0.4", true);
    lab.endpoint("n2", "cart-1", "10.1.1.4");
    let sync = SyncEndpoints {
        request_id: 1,
        endpoints: vec![
            claim("cart-0", &["10.1.0.9"]),
            claim("unknown", &["10.1.0.10"]),
        ],
    };
    let plan = plan_sync(
        &lab.view,
        &lab.settings,
        "n1",
        &mut NodeMemo::default(),
        &sync,
        &SyncProgress::default(),
    )
    .unwrap();
    let Step::Done(refused) = commit(&mut lab.view, plan) else {
        panic!("a small set is one step");
    };
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].reason(), Reason::UnknownWorkload);
    assert!(
        pair(&lab, "10.1.0.4").is_none()
            && pair(&lab, "10.1.0.9").is_some()
            && pair(&lab, "10.1.1.4").is_some()
    );
    assert!(lab.view.list(b"clustermesh.io/readiness/").is_empty());
}

#[test]
fn an_endpoint_survives_the_deletion_of_its_workload() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    lab.view.delete(b"clustermesh.io/workloads/v1/shop/cart-0");
    let sync = SyncEndpoints {
        request_id: 1,
        endpoints: vec![claim("cart-0", &["10.1.0.4"])],
    };
    let plan = plan_sync(
        &lab.view,
        &lab.settings,
        "n1",
        &mut NodeMemo::default(),
        &sync,
        &SyncProgress::default(),
    )
    .unwrap();
    assert_eq!(commit(&mut lab.view, plan), Step::Done(Vec::new()));
    assert!(pair(&lab, "10.1.0.4").is_some());
}

#[test]
fn a_reused_address_leaves_its_old_name() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    lab.ready("n1", "10.1.0.4", true);
    lab.endpoint("n1", "cart-1", "10.1.0.4");
    assert_eq!(pair(&lab, "10.1.0.4").unwrap().k8s_pod_name, "cart-1");
    assert!(
        lab.view.list(b"clustermesh.io/readiness/").is_empty(),
        "readiness was the old endpoint's"
    );
    assert_eq!(
        lab.view
            .list(b"clustermesh.io/alloc/endpoints/shop/cart-0")
            .len(),
        0
    );
}

#[test]
fn readiness_is_taken_for_own_endpoints_only() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    lab.ready("n1", "10.1.0.4", true);
    let kv = lab
        .view
        .get(b"clustermesh.io/readiness/v1/n1/10.1.0.4")
        .unwrap();
    assert_eq!(
        Readiness::decode(&kv.value).unwrap().is_ready(8080, "TCP"),
        Some(true)
    );
    let report = ReportReadiness {
        request_id: 0,
        endpoints: vec![EndpointReadiness {
            address: "10.1.0.4".to_owned(),
            ports: vec![],
        }],
    };
    assert_eq!(
        plan_readiness(&lab.view, "n2", &report)
            .unwrap_err()
            .reason(),
        Reason::NotOwned
    );
}

#[test]
fn removing_a_node_frees_all_that_it_had_unless_it_is_connected() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    lab.ready("n1", "10.1.0.4", true);
    let plan = plan_session(&lab.view, "n1", SessionState::Connected, "i", 15, 1);
    commit(&mut lab.view, plan);
    assert_eq!(
        plan_remove_node(&lab.view, &lab.settings, "n1").unwrap_err(),
        ClaimError::Connected("n1".to_owned())
    );
    let plan = plan_session(&lab.view, "n1", SessionState::Stale, "i", 15, 2);
    commit(&mut lab.view, plan);
    let plan = plan_remove_node(&lab.view, &lab.settings, "n1").unwrap();
    assert!(commit(&mut lab.view, plan));
    assert!(pair(&lab, "10.1.0.4").is_none());
    for prefix in [
        "cilium/state/nodes/v1/c1/n1",
        "clustermesh.io/sessions/",
        "clustermesh.io/readiness/",
        "clustermesh.io/alloc/podcidrs/10.1.0.",
    ] {
        assert!(lab.view.list(prefix.as_bytes()).is_empty(), "{prefix}");
    }
    lab.node("n3", "192.0.2.1");
}

/// A view that counts what is read as a whole.
struct Counted<'a>(&'a dyn View, std::cell::RefCell<Vec<String>>);

impl View for Counted<'_> {
    fn revision(&self) -> i64 {
        self.0.revision()
    }

    fn get(&self, key: &[u8]) -> Option<crate::view::Kv> {
        self.0.get(key)
    }

    fn scan(
        &self,
        prefix: &[u8],
        visit: &mut dyn FnMut(crate::view::Kv) -> std::ops::ControlFlow<()>,
    ) {
        let prefix_text = String::from_utf8_lossy(prefix).into_owned();
        self.1.borrow_mut().push(prefix_text);
        self.0.scan(prefix, visit);
    }

    fn addresses_of(&self, node: &str) -> std::collections::BTreeSet<IpAddr> {
        self.0.addresses_of(node)
    }

    fn nodes_at(&self, cluster: &str, address: IpAddr) -> std::collections::BTreeSet<String> {
        self.0.nodes_at(cluster, address)
    }
}

#[test]
fn a_node_that_comes_back_reads_only_what_is_its_own() {
    let mut lab = lab();
    lab.endpoint("n1", "cart-0", "10.1.0.4");
    let counted = Counted(&lab.view, std::cell::RefCell::default());
    let plan = plan_hello(&counted, &lab.settings, &hello("n1", "192.0.2.1")).unwrap();
    assert_eq!(plan.result.v4.unwrap().to_string(), "10.1.0.0/24");
    let sync = SyncEndpoints {
        request_id: 1,
        endpoints: vec![claim("cart-0", &["10.1.0.4"])],
    };
    let (mut memo, progress) = (NodeMemo::default(), SyncProgress::default());
    plan_sync(&counted, &lab.settings, "n1", &mut memo, &sync, &progress).unwrap();
    assert_eq!(
        counted.1.into_inner(),
        ["clustermesh.io/readiness/v1/n1/".to_owned()]
    );
}
