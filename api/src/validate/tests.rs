use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::records::{Endpoint, EndpointPort};

const C1: Claimant<'_> = Claimant {
    cluster: "c1",
    cluster_id: 1,
    split: IdentitySplit::Clusters255,
};

#[test]
fn cluster_names_follow_ciliums_rule() {
    for name in ["a", "0", "eu-west-1", &"a".repeat(32)] {
        check_cluster_name(name).unwrap();
    }
    for name in ["", "-a", "a-", "A", "a_b", "a.b", "ä", &"a".repeat(33)] {
        assert!(check_cluster_name(name).is_err(), "{name}");
    }
}

#[test]
fn cluster_ids_end_where_the_division_ends() {
    use IdentitySplit::{Clusters255, Clusters511};
    check_cluster("c1", 255, Clusters255).unwrap();
    check_cluster("c1", 511, Clusters511).unwrap();
    for (id, split) in [
        (0, Clusters255),
        (256, Clusters255),
        (0, Clusters511),
        (512, Clusters511),
    ] {
        let error = check_cluster("c1", id, split).unwrap_err().to_string();
        assert!(
            error.contains(&format!("cluster id {id} is not within")),
            "{error}"
        );
    }
    assert_eq!(
        check_cluster("default", 1, Clusters255),
        Err(NameError::ReservedCluster.into())
    );
}

#[test]
fn identities_of_a_cluster_are_where_cilium_has_them() {
    assert_eq!(
        IdentitySplit::Clusters255.identities_of(1),
        Ok(65_536..=131_071)
    );
    assert_eq!(
        IdentitySplit::Clusters511.identities_of(1),
        Ok(32_768..=65_535)
    );
    assert_eq!(IdentitySplit::Clusters255.max_local(), 65_535);
    assert_eq!(IdentitySplit::Clusters511.max_local(), 32_767);
}

proptest! {
    #[test]
    fn an_identity_is_of_the_cluster_that_numbered_it(cluster in 1_u32..=511, local in 1_u32..=65_535, big in any::<bool>()) {
        let split = if big { IdentitySplit::Clusters511 } else { IdentitySplit::Clusters255 };
        match split.identity(cluster, local) {
            Ok(identity) => {
                prop_assert!(identity < 1 << 24);
                prop_assert_eq!(split.cluster_of(identity), cluster);
                prop_assert!(split.identities_of(cluster).unwrap().contains(&identity));
            }
            Err(_) => prop_assert!(cluster > split.max_cluster_id() || local > split.max_local()),
        }
    }
}

fn reason(result: Result<(), Violation>) -> &'static str {
    result.map_or_else(|violation| violation.reason(), |()| "accepted")
}

#[test]
fn a_node_must_carry_the_name_of_its_key_and_cluster() {
    let node = |name: &str, cluster: &str, cluster_id| Node {
        name: name.to_owned(),
        cluster: cluster.to_owned(),
        cluster_id,
        ..Node::default()
    };
    assert_eq!(
        reason(C1.check_node("w1", &node("w1", "c1", 1))),
        "accepted"
    );
    assert_eq!(
        reason(C1.check_node("w2", &node("w1", "c1", 1))),
        "key-mismatch"
    );
    assert_eq!(
        reason(C1.check_node("w1", &node("w1", "c2", 1))),
        "cluster-name"
    );
    assert_eq!(
        reason(C1.check_node("w1", &node("w1", "c1", 2))),
        "cluster-id"
    );
    assert_eq!(reason(C1.check_node("", &node("", "c1", 1))), "name");
}

#[test]
fn an_address_may_have_an_identity_of_its_cluster_or_a_reserved_one() {
    let ip: IpAddr = "10.0.0.1".parse().unwrap();
    let check = |id| reason(C1.check_ip(&IpIdentityPair::new(ip, id, None)));
    for id in [0, 1, 6, 255, 65_536, 131_071] {
        assert_eq!(check(id), "accepted", "{id}");
    }
    for id in [256, 65_535, 131_072, 1 << 24 | 65_536, u32::MAX] {
        assert_eq!(check(id), "identity-range", "{id}");
    }
}

#[test]
fn a_label_set_must_name_its_cluster() {
    let identity = |text: &str| Identity::decode(text.as_bytes()).unwrap();
    let own = identity("k8s:io.cilium.k8s.policy.cluster=c1;");
    assert_eq!(reason(C1.check_identity(65_540, &own)), "accepted");
    assert_eq!(reason(C1.check_identity(5, &own)), "identity-range");
    let other = identity("k8s:io.cilium.k8s.policy.cluster=c2;");
    assert_eq!(reason(C1.check_identity(65_540, &other)), "cluster-label");
    assert_eq!(
        reason(C1.check_identity(65_540, &identity("k8s:a=b;"))),
        "cluster-label"
    );
}

#[test]
fn a_service_must_have_addresses_without_zones() {
    let service = |address: &str| {
        let json = format!(
            r#"{{"cluster":"c1","namespace":"a","name":"b","clusterID":1,"backends":{{"{address}":{{"":{{"Protocol":"TCP","Port":80}}}}}}}}"#
        );
        ClusterService::decode(json.as_bytes()).unwrap()
    };
    assert_eq!(
        reason(C1.check_service("a", "b", &service("10.0.0.1"))),
        "accepted"
    );
    assert_eq!(
        reason(C1.check_service("a", "c", &service("10.0.0.1"))),
        "key-mismatch"
    );
    for bad in ["fe80::1%eth0", "10.0.0", "", "host"] {
        assert_eq!(
            reason(C1.check_service("a", "b", &service(bad))),
            "address",
            "{bad}"
        );
    }
    let mut many = service("10.0.0.1");
    for number in 0..=u32::try_from(MAX_BACKENDS_PER_SERVICE).unwrap() {
        many.backends.insert(
            IpAddr::from(number.to_be_bytes()).to_string(),
            Default::default(),
        );
    }
    assert_eq!(reason(C1.check_service("a", "b", &many)), "limit");
}

#[test]
fn a_slice_must_have_addresses_of_its_family_and_possible_ports() {
    let slice = |address_type: &str, address: &str, port| EndpointSlice {
        cluster: "c1".to_owned(),
        cluster_id: 1,
        namespace: "a".to_owned(),
        name: "b".to_owned(),
        address_type: address_type.to_owned(),
        endpoints: vec![Endpoint {
            addresses: vec![address.to_owned()],
            ..Endpoint::default()
        }],
        ports: vec![EndpointPort {
            port,
            ..EndpointPort::default()
        }],
        ..EndpointSlice::default()
    };
    let check = |slice: &EndpointSlice| reason(C1.check_slice("a", "b", slice));
    assert_eq!(check(&slice("IPv4", "10.0.0.1", Some(80))), "accepted");
    assert_eq!(check(&slice("IPv6", "fd00::1", None)), "accepted");
    assert_eq!(check(&slice("IPv6", "10.0.0.1", None)), "address");
    assert_eq!(check(&slice("FQDN", "example.org", None)), "address-type");
    for port in [0, -1, 65_536] {
        assert_eq!(check(&slice("IPv4", "10.0.0.1", Some(port))), "port");
    }
}

#[test]
fn a_record_under_a_key_of_another_kind_is_refused() {
    let key = RecordKey::parse(b"cilium/state/nodes/v1/c1/w1").unwrap();
    let pair = IpIdentityPair::new("10.0.0.1".parse().unwrap(), 65_540, None);
    let error = C1.check(&key, &Record::Ip(pair)).unwrap_err();
    assert_eq!(error.violation, Violation::Kind);
    assert_eq!(
        error.to_string(),
        "cilium/state/nodes/v1/c1/w1: is stored under a key of another kind"
    );
}
