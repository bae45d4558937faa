use std::{collections::BTreeMap, io::Read as _};

use base64::{Engine, engine::general_purpose::STANDARD};
use prost::Message as _;

use super::*;
use crate::records::*;
use crate::{IdentitySplit, keys::RecordKey, validate::Claimant};

const VECTORS: &str = include_str!("../../tests/vectors/cilium-1.20.jsonl");

struct Vector {
    kind: String,
    key: RecordKey,
    value: Vec<u8>,
    is_text: bool,
}

fn vectors() -> Vec<Vector> {
    let read = |line: &str| {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        let field = |name: &str| json[name].as_str();
        Vector {
            kind: field("kind").unwrap().to_owned(),
            key: RecordKey::parse(field("key").unwrap().as_bytes()).unwrap(),
            value: match field("text") {
                Some(text) => text.as_bytes().to_vec(),
                None => STANDARD.decode(field("base64").unwrap()).unwrap(),
            },
            is_text: json["text"].is_string(),
        }
    };
    VECTORS
        .lines()
        .filter(|line| !line.is_empty())
        .map(read)
        .collect()
}

#[test]
fn ciliums_text_records_are_written_back_to_the_same_bytes() {
    let mut kinds = Vec::new();
    for vector in vectors() {
        let record = Record::decode(&vector.key, &vector.value).unwrap();
        if vector.is_text {
            assert_eq!(record.encode(), vector.value, "{}", vector.key);
        }
        assert_eq!(
            vector.key.to_bytes(),
            RecordKey::parse(&vector.key.to_bytes()).unwrap().to_bytes()
        );
        kinds.push(vector.kind);
    }
    for kind in [
        "cluster-config",
        "node",
        "identity",
        "ip",
        "service",
        "endpointslice",
    ] {
        assert!(
            kinds.iter().any(|found| found == kind),
            "no vector of {kind}"
        );
    }
}

#[test]
fn ciliums_records_are_valid_claims_of_their_cluster_only() {
    let claimant = |cluster, cluster_id| Claimant {
        cluster,
        cluster_id,
        split: IdentitySplit::Clusters255,
    };
    for vector in vectors() {
        let record = Record::decode(&vector.key, &vector.value).unwrap();
        claimant("c1", 1).check(&vector.key, &record).unwrap();
        let error = claimant("c2", 2).check(&vector.key, &record).unwrap_err();
        assert_eq!(error.object, vector.key.to_string());
    }
}

#[test]
fn ciliums_endpoint_slice_has_the_same_protobuf_bytes() {
    let vector = vectors()
        .into_iter()
        .find(|vector| vector.kind == "endpointslice")
        .unwrap();
    let slice = EndpointSlice::decode(&vector.value).unwrap();
    assert_eq!((slice.cluster.as_str(), slice.cluster_id), ("c1", 1));
    assert_eq!(
        (slice.namespace.as_str(), slice.name.as_str()),
        ("shop", "cart-x7k2p")
    );
    assert_eq!(slice.service_name(), Some("cart"));
    assert_eq!(slice.address_type, "IPv4");
    let endpoint = &slice.endpoints[0];
    assert_eq!(endpoint.addresses, ["10.1.0.23"]);
    assert_eq!(
        (endpoint.node_name.as_deref(), endpoint.zone.as_deref()),
        (Some("w1"), Some("a"))
    );
    assert!(endpoint.is_ready() && endpoint.is_serving() && !endpoint.is_terminating());
    let port = &slice.ports[0];
    assert_eq!(
        (port.name.as_deref(), port.port),
        (Some("http"), Some(8080))
    );
    let cilium = zstd::decode_all(vector.value.as_slice()).unwrap();
    assert_eq!(slice.encode_to_vec(), cilium);
    assert_eq!(EndpointSlice::decode(&slice.encode()).unwrap(), slice);
}

#[test]
fn absent_conditions_mean_ready_serving_and_not_terminating() {
    let endpoint = Endpoint {
        conditions: None,
        ..Endpoint::default()
    };
    assert!(endpoint.is_ready() && endpoint.is_serving() && !endpoint.is_terminating());
    let terminating = Endpoint {
        conditions: Some(EndpointConditions {
            ready: Some(false),
            serving: None,
            terminating: Some(true),
        }),
        ..Endpoint::default()
    };
    assert!(!terminating.is_ready() && terminating.is_serving() && terminating.is_terminating());
}

#[test]
fn a_slice_that_unpacks_to_more_than_the_limit_is_refused() {
    let bomb = zstd::encode_all(std::io::repeat(0).take(17 * 1024 * 1024), 3).unwrap();
    assert!(bomb.len() < 10_000, "the frame itself is small");
    let error = EndpointSlice::decode(&bomb).unwrap_err();
    assert!(matches!(error, DecodeError::Zstd { .. }), "{error}");
}

#[test]
fn masks_are_base64_of_four_or_sixteen_bytes() {
    let node =
        |cidr: &str| Node::decode(format!(r#"{{"Name":"w","IPv4AllocCIDR":{cidr}}}"#).as_bytes());
    let cidr = |text| node(text).unwrap().ipv4_alloc_cidr.unwrap().to_string();
    assert_eq!(
        cidr(r#"{"IP":"10.1.0.0","Mask":"//8AAA=="}"#),
        "10.1.0.0/16"
    );
    assert_eq!(
        cidr(r#"{"IP":"fd01::","Mask":"/////////////////////w=="}"#),
        "fd01::/128"
    );
    for bad in [
        r#"{"IP":"10.1.0.0","Mask":"/wD/AA=="}"#,
        r#"{"IP":"10.1.0.0","Mask":"//8="}"#,
        r#"{"IP":"10.1.0.0","Mask":"?"}"#,
        r#"{"IP":"10.1.0.0","Mask":"/////////////////////w=="}"#,
        r#"{"IP":"10.1.0.0"}"#,
        r#"{"IP":"x","Mask":"//8AAA=="}"#,
    ] {
        assert!(node(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_masked_address_is_a_prefix() {
    let pair = IpIdentityPair::decode(
        br#"{"IP":"10.1.0.0","Mask":"////AA==","HostIP":"","ID":2,"Key":0,"Metadata":""}"#,
    );
    let pair = pair.unwrap();
    assert_eq!(pair.address_or_prefix().to_string(), "10.1.0.0/24");
    assert_eq!(pair.host_ip, None);
    let text = String::from_utf8(pair.encode().to_vec()).unwrap();
    assert_eq!(
        text,
        r#"{"IP":"10.1.0.0","Mask":"////AA==","HostIP":"","ID":2,"Key":0,"Metadata":""}"#
    );
    assert!(IpIdentityPair::decode(br#"{"IP":"fd01::","Mask":"////AA=="}"#).is_err());
}

#[test]
fn fields_of_a_node_that_we_do_not_know_pass_through() {
    let node = Node::decode(br#"{"Name":"w1","NodeIdentity":16777217,"New":{"a":[1,null]},"clustermesh.io":{"later":1}}"#).unwrap();
    let text = String::from_utf8(node.encode().to_vec()).unwrap();
    assert!(text.contains(r#""NodeIdentity":16777217"#), "{text}");
    assert!(text.contains(r#""New":{"a":[1,null]}"#), "{text}");
    assert!(text.contains(r#""clustermesh.io":{"later":1}"#), "{text}");
    assert!(
        !Node::decode(br#"{"Name":"w1"}"#)
            .unwrap()
            .encode()
            .windows(12)
            .any(|at| at == b"NodeIdentity")
    );
}

#[test]
fn unknown_fields_are_ignored_elsewhere() {
    assert!(ClusterService::decode(br#"{"cluster":"c1","new":1,"clustermesh.io":{}}"#).is_ok());
    assert!(
        IpIdentityPair::decode(
            br#"{"IP":"10.0.0.1","New":[],"clustermesh.io":{"node":"w1","x":2}}"#
        )
        .is_ok()
    );
    assert!(ClusterConfig::decode(br#"{"id":1,"capabilities":{"x":true}}"#).is_ok());
}

#[test]
fn the_extension_of_an_address_names_its_machine() {
    let mut pair = IpIdentityPair::new(
        "10.1.0.5".parse().unwrap(),
        65_540,
        "192.0.2.1".parse().ok(),
    );
    pair.extension = Some(IpExtension {
        node: "w1".to_owned(),
    });
    let text = String::from_utf8(pair.encode().to_vec()).unwrap();
    assert!(
        text.ends_with(r#","Metadata":"","clustermesh.io":{"node":"w1"}}"#),
        "{text}"
    );
    assert_eq!(
        IpIdentityPair::decode(text.as_bytes()).unwrap().node(),
        Some("w1")
    );
}

#[test]
fn service_exports_are_absent_off_or_on() {
    for (text, expected) in [
        (r#"{"id":3,"capabilities":{}}"#, None),
        (
            r#"{"id":3,"capabilities":{"serviceExportsEnabled":false}}"#,
            Some(false),
        ),
        (
            r#"{"id":3,"capabilities":{"serviceExportsEnabled":true}}"#,
            Some(true),
        ),
    ] {
        let config = ClusterConfig::decode(text.as_bytes()).unwrap();
        assert_eq!(config.capabilities.service_exports_enabled, expected);
        assert_eq!(config.encode(), text.as_bytes());
    }
}

#[test]
fn an_unknown_export_mode_is_kept_for_the_refusal() {
    let text = br#"{"id":3,"capabilities":{"endpointSlicesExportMode":"later"}}"#;
    let config = ClusterConfig::decode(text).unwrap();
    let mode = &config.capabilities.endpoint_slices_export_mode;
    assert_eq!(*mode, EndpointSlicesExportMode::Unknown("later".to_owned()));
    assert_eq!(config.encode(), &text[..]);
}

#[test]
fn go_nulls_are_read_as_empty() {
    let node = Node::decode(br#"{"Name":"w1","IPAddresses":null,"Labels":null}"#).unwrap();
    assert!(node.ip_addresses.is_empty() && node.labels.is_empty());
    let service =
        ClusterService::decode(br#"{"cluster":"c1","frontends":null,"labels":null}"#).unwrap();
    assert!(service.encode().starts_with(
        br#"{"cluster":"c1","namespace":"","name":"","frontends":{},"backends":{},"labels":{}"#
    ));
}

#[test]
fn text_is_escaped_as_go_does() {
    let service = ClusterService {
        labels: BTreeMap::from([("a".to_owned(), "<&>\u{2028}\"é".to_owned())]),
        ..ClusterService::default()
    };
    let text = String::from_utf8(service.encode().to_vec()).unwrap();
    assert!(
        text.contains(r#"{"a":"\u003c\u0026\u003e\u2028\"é"}"#),
        "{text}"
    );
    assert_eq!(ClusterService::decode(text.as_bytes()).unwrap(), service);
}

#[test]
fn the_tunnel_ends_at_internal_then_external_addresses_never_at_the_router() {
    let address = |address_type, ip: &str| NodeAddress {
        address_type,
        ip: ip.parse().unwrap(),
    };
    let mut node = Node {
        ip_addresses: vec![
            address(AddressType::CiliumInternalIP, "10.1.0.1"),
            address(AddressType::Other("Hostname".to_owned()), "192.0.2.7"),
            address(AddressType::ExternalIP, "203.0.113.9"),
            address(AddressType::InternalIP, "192.0.2.11"),
            address(AddressType::InternalIP, "192.0.2.12"),
        ],
        ..Node::default()
    };
    let end = |node: &Node| node.tunnel_endpoint(true).map(|ip| ip.to_string());
    assert_eq!(end(&node).as_deref(), Some("192.0.2.11"));
    node.ip_addresses.truncate(3);
    assert_eq!(end(&node).as_deref(), Some("203.0.113.9"));
    node.ip_addresses.truncate(2);
    assert_eq!(end(&node).as_deref(), Some("192.0.2.7"));
    node.ip_addresses.truncate(1);
    assert_eq!(end(&node), None);
    assert_eq!(node.tunnel_endpoint(false), None);
}

#[test]
fn labels_are_sorted_by_key_and_end_in_a_semicolon() {
    let labels = BTreeMap::from([("app".to_owned(), "cart".to_owned())]);
    let identity = Identity::of_workload("c1", "shop", Some("cart"), &labels).unwrap();
    let vector = vectors()
        .into_iter()
        .find(|vector| vector.kind == "identity")
        .unwrap();
    assert_eq!(identity.encode(), vector.value);
    assert_eq!(
        (identity.cluster(), identity.namespace()),
        (Some("c1"), Some("shop"))
    );
}

#[test]
fn a_label_of_another_source_does_not_name_the_cluster() {
    let identity = Identity::decode(b"any:io.cilium.k8s.policy.cluster=c1;").unwrap();
    assert_eq!(identity.cluster(), None);
}

#[test]
fn strings_that_are_no_label_set_are_refused() {
    for text in [
        "",
        ";",
        "k8s:a=b",
        "a=b;",
        "k8s:a=b;;",
        "k8s:a=b;k8s:a=c;",
        ":a=b;",
        "k8s:=b;",
        "k8s:a=b;x",
    ] {
        assert!(Identity::decode(text.as_bytes()).is_err(), "{text}");
    }
    assert!(Identity::decode(b"k8s:a=\xff;").is_err());
    assert!(Identity::decode(&vec![b'a'; crate::limits::MAX_IDENTITY_LABELS_BYTES + 1]).is_err());
}

#[test]
fn times_are_rfc_3339() {
    for (unix_ms, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59Z"),
        (951_782_400_000, "2000-02-29T00:00:00Z"),
        (1_709_251_199_999, "2024-02-29T23:59:59Z"),
        (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        (1_700_000_000_123, "2023-11-14T22:13:20Z"),
    ] {
        assert_eq!(Timestamp::from_unix_ms(unix_ms).0, text);
    }
}

#[test]
fn errors_name_the_record() {
    let key = RecordKey::parse(b"cilium/state/nodes/v1/c1/w1").unwrap();
    for value in [b"{".to_vec(), vec![0; crate::limits::MAX_VALUE_BYTES + 1]] {
        let error = Record::decode(&key, &value).unwrap_err().to_string();
        assert!(
            error.starts_with("cilium/state/nodes/v1/c1/w1: "),
            "{error}"
        );
    }
}
