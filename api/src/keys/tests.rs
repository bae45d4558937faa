use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

pub(crate) fn any_tree() -> impl Strategy<Value = Tree> {
    prop_oneof![Just(Tree::State), Just(Tree::Cache)]
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(Kind::ALL.to_vec())
}

fn any_cluster() -> impl Strategy<Value = String> {
    "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?"
}

fn any_part() -> impl Strategy<Value = String> {
    "[^/\\x00]{1,20}"
}

pub(crate) fn any_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from(bits))),
        any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from(bits)).to_canonical()),
    ]
}

fn any_origin() -> impl Strategy<Value = Origin> {
    prop_oneof![Just(Origin::Own), any_cluster().prop_map(Origin::Copy)]
}

fn any_key() -> impl Strategy<Value = RecordKey> {
    let address =
        (any_address(), proptest::option::of(0_u8..=32)).prop_map(|(address, prefix_bits)| {
            AddressOrPrefix {
                address,
                prefix_bits,
            }
        });
    prop_oneof![
        Just(RecordKey::Heartbeat),
        any_cluster().prop_map(|cluster| RecordKey::ClusterConfig { cluster }),
        (any_cluster(), any_tree(), any_kind()).prop_map(|(cluster, tree, kind)| {
            RecordKey::Synced {
                cluster,
                tree,
                kind,
            }
        }),
        (any_tree(), any_cluster(), any_part()).prop_map(|(tree, cluster, name)| RecordKey::Node {
            tree,
            cluster,
            name
        }),
        (any_origin(), address).prop_map(|(origin, address)| RecordKey::Ip { origin, address }),
        (any_origin(), any::<u32>()).prop_map(|(origin, id)| RecordKey::Identity { origin, id }),
        (
            any_tree(),
            any_cluster(),
            any_part(),
            any_part(),
            any::<bool>()
        )
            .prop_map(|(tree, cluster, namespace, name, slice)| if slice {
                RecordKey::EndpointSlice {
                    tree,
                    cluster,
                    namespace,
                    name,
                }
            } else {
                RecordKey::Service {
                    tree,
                    cluster,
                    namespace,
                    name,
                }
            }),
        (any_part(), any_part())
            .prop_map(|(namespace, name)| RecordKey::Workload { namespace, name }),
        (any_part(), any_part())
            .prop_map(|(namespace, name)| RecordKey::StoredService { namespace, name }),
        (any_part(), any_part())
            .prop_map(|(namespace, name)| RecordKey::LocalEndpointSlice { namespace, name }),
        (any_part(), any_address())
            .prop_map(|(node, address)| RecordKey::Readiness { node, address }),
        any_part().prop_map(|node| RecordKey::Session { node }),
        "[a-z/]{1,20}".prop_map(|path| RecordKey::Alloc { path }),
    ]
}

proptest! {
    #[test]
    fn parsing_the_text_of_a_key_gives_the_key(key in any_key()) {
        prop_assert_eq!(RecordKey::parse(&key.to_bytes()).unwrap(), key);
    }

    #[test]
    fn parsing_any_bytes_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = RecordKey::parse(&bytes);
    }

    #[test]
    fn parsing_text_near_a_key_gives_that_very_text_or_an_error(
        key in any_key(), position in any::<prop::sample::Index>(), byte in any::<u8>()
    ) {
        let mut bytes = key.to_bytes();
        let index = position.index(bytes.len());
        bytes[index] = byte;
        if let Ok(parsed) = RecordKey::parse(&bytes) {
            prop_assert_eq!(parsed.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_prefix_range_holds_exactly_the_keys_with_the_prefix(
        prefix in prop::collection::vec(any::<u8>(), 1..6), key in prop::collection::vec(any::<u8>(), 1..8)
    ) {
        let end = prefix_end(&prefix);
        let inside = key >= prefix && (end == [0] || key < end);
        prop_assert_eq!(inside, key.starts_with(&prefix));
    }

    #[test]
    fn every_shared_key_stands_under_the_prefix_of_its_kind(key in any_key()) {
        if let (Some(kind), Some(tree)) = (key.kind(), key.tree()) {
            let prefix = kind.prefix(tree, key.cluster().unwrap_or("own"));
            prop_assert!(key.to_string().starts_with(&prefix));
        }
    }
}

fn text(key: &RecordKey) -> String {
    key.to_string()
}

#[test]
fn canaries_leave_out_id_and_default() {
    let canary = |tree, kind| {
        text(&RecordKey::Synced {
            cluster: "c1".to_owned(),
            tree,
            kind,
        })
    };
    assert_eq!(
        canary(Tree::State, Kind::Identities),
        "cilium/synced/c1/cilium/state/identities/v1"
    );
    assert_eq!(
        canary(Tree::State, Kind::Ip),
        "cilium/synced/c1/cilium/state/ip/v1"
    );
    assert_eq!(
        canary(Tree::Cache, Kind::Ip),
        "cilium/synced/c1/cilium/cache/ip/v1"
    );
    assert_eq!(
        canary(Tree::State, Kind::Nodes),
        "cilium/synced/c1/cilium/state/nodes/v1"
    );
}

#[test]
fn published_keys_are_copied_to_ciliums_cache_keys() {
    for (state, cache) in [
        ("cilium/state/nodes/v1/c1/w1", "cilium/cache/nodes/v1/c1/w1"),
        (
            "cilium/state/ip/v1/default/10.1.0.23",
            "cilium/cache/ip/v1/c1/10.1.0.23",
        ),
        (
            "cilium/state/ip/v1/default/10.1.0.0/24",
            "cilium/cache/ip/v1/c1/10.1.0.0/24",
        ),
        (
            "cilium/state/identities/v1/id/65812",
            "cilium/cache/identities/v1/c1/id/65812",
        ),
        (
            "cilium/state/services/v1/c1/shop/cart",
            "cilium/cache/services/v1/c1/shop/cart",
        ),
        (
            "cilium/state/endpointslices/v1/c1/shop/x",
            "cilium/cache/endpointslices/v1/c1/shop/x",
        ),
        (
            "cilium/synced/c1/cilium/state/ip/v1",
            "cilium/synced/c1/cilium/cache/ip/v1",
        ),
    ] {
        let key = RecordKey::parse(state.as_bytes()).unwrap();
        assert_eq!(text(&key.to_cache("c1").unwrap()), cache);
    }
}

#[test]
fn a_key_of_another_cluster_is_not_copied() {
    for key in [
        "cilium/state/nodes/v1/c2/w1",
        "cilium/cache/nodes/v1/c1/w1",
        "clustermesh.io/sessions/v1/w1",
    ] {
        assert_eq!(
            RecordKey::parse(key.as_bytes()).unwrap().to_cache("c1"),
            None,
            "{key}"
        );
    }
}

#[test]
fn malformed_keys_are_refused_with_a_reason() {
    for (key, reason) in [
        ("cilium/state/nodes/v1/c1/", "a part is empty"),
        (
            "cilium/state/nodes/v1/c1",
            "1 parts after the prefix, expected 2",
        ),
        ("cilium/state/nodes/v1/C1/w1", "cluster name \"C1\""),
        ("cilium/state/ip/v1/other/10.0.0.1", "not \"default\""),
        ("cilium/state/ip/v1/default/fe80::1%eth0", "IPv6 zone"),
        ("cilium/state/ip/v1/default/10.0.0.1/33", "not a CIDR"),
        ("cilium/state/ip/v1/default/1:0::1", "not canonical"),
        (
            "cilium/state/identities/v1/id/007",
            "not an identity number",
        ),
        (
            "cilium/state/identities/v1/id/4294967296",
            "not an identity number",
        ),
        (
            "cilium/state/identities/v1/value/k8s:a=b;/w1",
            "of no known kind",
        ),
        ("clustermesh.io/unknown/v1/x", "of no known kind"),
        ("other", "of no known kind"),
    ] {
        let error = RecordKey::parse(key.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains(key), "{error}");
    }
}

#[test]
fn keys_that_are_too_long_or_not_text_are_refused() {
    assert_eq!(
        RecordKey::parse(&vec![b'a'; MAX_KEY_BYTES + 1]),
        Err(KeyError::TooLong(MAX_KEY_BYTES + 1))
    );
    assert!(matches!(
        RecordKey::parse(b"cilium/\xff"),
        Err(KeyError::NotUtf8(_))
    ));
}
