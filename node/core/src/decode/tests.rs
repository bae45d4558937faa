use proptest::prelude::*;

use super::*;

fn decoder() -> Decoder {
    Decoder::new("c2".into(), IdentitySplit::Clusters255)
}

const NODE: &str = r#"{"Name":"w1","Cluster":"c1","IPAddresses":[{"Type":"CiliumInternalIP","IP":"10.1.0.7"},{"Type":"ExternalIP","IP":"203.0.113.9"},{"Type":"InternalIP","IP":"192.0.2.11"}],"IPv4AllocCIDR":{"IP":"10.1.0.0","Mask":"////AA=="},"IPv4HealthIP":"10.1.0.9","ClusterID":1}"#;

#[test]
fn a_peers_node_is_read_from_its_copy() {
    let change = decoder()
        .decode(b"cilium/cache/nodes/v1/c1/w1", Some(NODE.as_bytes()))
        .unwrap();
    let Change::Node {
        cluster,
        name,
        node: Some(node),
    } = change
    else {
        panic!("{change:?}");
    };
    assert_eq!((&*cluster, &*name), ("c1", "w1"));
    let text: Vec<String> = node.underlay.iter().map(ToString::to_string).collect();
    assert_eq!(text, ["192.0.2.11", "203.0.113.9"]);
    assert_eq!(node.routers[0].to_string(), "10.1.0.7");
    assert_eq!(node.pod_cidrs[0].to_string(), "10.1.0.0/24");
}

#[test]
fn wireguard_keys_of_a_node_are_read_as_cilium_and_as_we_write_them() {
    let keys = |more: &str| {
        let json = NODE.replace("\"ClusterID\":1", &format!("\"ClusterID\":1,{more}"));
        let decoded = decoder().decode(b"cilium/cache/nodes/v1/c1/w1", Some(json.as_bytes()));
        match decoded.unwrap() {
            Change::Node {
                node: Some(node), ..
            } => node.keys,
            other => panic!("{other:?}"),
        }
    };
    let (one, two) = (
        "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
        "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
    );
    let key = |number: u8, port, epoch| NodeKey {
        epoch,
        key: [number; 32],
        port,
    };
    let current = format!("\"WireguardPubKey\":\"{one}\"");
    assert_eq!(keys(&current), [key(1, 51_871, EPOCH_ANY)]);
    let more = |next: &str, epoch: u32| {
        format!(
            "{current},\"clustermesh.io\":{{\"wireguard\":{{\"port\":7,\"epoch\":4,\"next\":{{\"pubKey\":\"{next}\",\"port\":8,\"epoch\":{epoch}}}}}}}"
        )
    };
    assert_eq!(keys(&more(two, 5)), [key(1, 7, 4), key(2, 8, 5)]);
    // A second key needs an epoch of its own, and to be another one.
    assert_eq!(keys(&more(two, 4)), [key(1, 7, 4)]);
    assert_eq!(keys(&more(one, 5)), [key(1, 7, 4)]);
    // Who counts epochs names one: all of them would put two keys of one node on one device.
    assert_eq!(keys(&more(two, EPOCH_ANY)), [key(1, 7, 4)]);
    let any = more(two, 5).replace("\"epoch\":4", &format!("\"epoch\":{EPOCH_ANY}"));
    assert_eq!(keys(&any), []);
    assert_eq!(keys("\"WireguardPubKey\":\"no key\""), []);
}

#[test]
fn an_address_is_read_alike_with_and_without_an_encryption_key() {
    let read = |own: bool, number: u8| {
        let key = if own {
            "cilium/state/ip/v1/default/10.1.0.23"
        } else {
            "cilium/cache/ip/v1/c1/10.1.0.23"
        };
        let identity = if own { 131_073 } else { 65_812 };
        let json = format!(
            "{{\"IP\":\"10.1.0.23\",\"Mask\":null,\"HostIP\":\"192.0.2.11\",\"ID\":{identity},\"Key\":{number},\"Metadata\":\"\"}}"
        );
        decoder()
            .decode(key.as_bytes(), Some(json.as_bytes()))
            .unwrap()
    };
    for own in [true, false] {
        let without = read(own, 0);
        assert!(matches!(without, Change::Address { owner: Some(_), .. }));
        assert_eq!(read(own, 255), without);
    }
}

#[test]
fn a_record_of_another_name_than_its_key_is_refused_by_name() {
    let error = decoder()
        .decode(b"cilium/cache/nodes/v1/c1/w2", Some(NODE.as_bytes()))
        .unwrap_err();
    assert_eq!(error.reason, Reason::NotOwnName);
    assert_eq!(error.object, "cilium/cache/nodes/v1/c1/w2");
}

#[test]
fn a_peer_cannot_speak_in_our_name() {
    let own = NODE.replace("\"c1\"", "\"c2\"");
    let change = decoder()
        .decode(b"cilium/cache/nodes/v1/c2/w1", Some(own.as_bytes()))
        .unwrap();
    assert_eq!(change, Change::Nothing);
}

#[test]
fn a_deletion_needs_no_value() {
    let change = decoder()
        .decode(b"cilium/cache/ip/v1/c1/10.1.0.23", None)
        .unwrap();
    assert!(matches!(change, Change::Address { owner: None, .. }));
}

#[test]
fn backends_of_a_service_record_are_grouped_by_ports() {
    let json = r#"{"cluster":"c1","namespace":"shop","name":"cart","frontends":{},"backends":{"10.1.0.23":{"http":{"Protocol":"TCP","Port":8080}},"10.1.0.24":{"http":{"Protocol":"TCP","Port":8080}},"10.1.0.25":{"http":{"Protocol":"TCP","Port":9090},"sync":{"Protocol":"SCTP","Port":1}}},"labels":{},"selector":{},"includeExternal":true,"shared":true,"clusterID":1}"#;
    let change = decoder()
        .decode(
            b"cilium/cache/services/v1/c1/shop/cart",
            Some(json.as_bytes()),
        )
        .unwrap();
    let Change::LegacyBackends {
        groups: Some(groups),
        ..
    } = change
    else {
        panic!("{change:?}");
    };
    let sizes: Vec<(usize, usize)> = groups
        .iter()
        .map(|group| (group.ports.len(), group.endpoints.len()))
        .collect();
    assert_eq!(sizes, [(1, 2), (1, 1)]);
}

#[test]
fn keys_of_unknown_kinds_say_nothing() {
    for key in [
        "cilium/.initlock/a/b",
        "cilium/state/serviceexports/v1/c2/a/b",
        "other",
    ] {
        assert_eq!(
            decoder().decode(key.as_bytes(), Some(b"x")),
            Ok(Change::Nothing)
        );
    }
}

proptest! {
    #[test]
    fn any_value_under_any_key_is_a_change_or_a_refusal(
        key in prop_oneof![
            Just("cilium/cache/nodes/v1/c1/w1"), Just("cilium/cache/ip/v1/c1/10.1.0.23"),
            Just("cilium/cache/endpointslices/v1/c1/shop/cart-1"), Just("cilium/cluster-config/c1"),
            Just("clustermesh.io/services/v1/shop/cart"), Just("clustermesh.io/workloads/v1/shop/cart-0"),
        ],
        cut in 0usize..NODE.len(),
        bytes in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let _ = decoder().decode(key.as_bytes(), Some(&bytes));
        let _ = decoder().decode(key.as_bytes(), NODE.as_bytes().get(..cut));
    }
}

#[test]
fn an_endpoint_that_ends_is_used_only_while_it_still_serves() {
    let of = |ready, serving, terminating| {
        condition(&Endpoint {
            conditions: Some(records::EndpointConditions {
                ready,
                serving,
                terminating,
            }),
            ..Endpoint::default()
        })
    };
    assert_eq!(condition(&Endpoint::default()), Condition::Ready);
    assert_eq!(of(None, None, None), Condition::Ready);
    assert_eq!(of(Some(false), None, Some(true)), Condition::Draining);
    assert_eq!(
        of(Some(false), Some(false), Some(true)),
        Condition::Unusable
    );
    assert_eq!(of(Some(false), Some(true), None), Condition::Unusable);
}
