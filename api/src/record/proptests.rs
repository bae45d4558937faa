use std::net::IpAddr;

use ipnetwork::IpNetwork;
use proptest::{collection::btree_map, option, prelude::*};

use super::*;
use crate::records::*;
use crate::{
    address::{Cidr, Mask},
    keys::tests::any_address,
    manifest::{
        IpFamily, Metadata, Object, Protocol, ServicePort, ServiceSpec, ServiceStatus, Stored,
        WorkloadSpec, WorkloadStatus,
    },
};

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9.-]{0,8}", any::<String>()]
}

fn texts() -> impl Strategy<Value = std::collections::BTreeMap<String, String>> {
    btree_map(text(), text(), 0..4)
}

fn any_cidr() -> impl Strategy<Value = Cidr> {
    (any_address(), 0_u8..=128).prop_map(|(address, bits)| {
        let bits = if address.is_ipv4() { bits % 33 } else { bits };
        Cidr(IpNetwork::new(address, bits).unwrap())
    })
}

fn any_node() -> impl Strategy<Value = Node> {
    let kinds = prop_oneof![
        Just(AddressType::InternalIP),
        Just(AddressType::ExternalIP),
        Just(AddressType::CiliumInternalIP),
        Just(AddressType::Other("Hostname".to_owned())),
    ];
    let address =
        (kinds, any_address()).prop_map(|(address_type, ip)| NodeAddress { address_type, ip });
    let names = (text(), text(), text(), text(), text());
    let cidrs = (
        option::of(any_cidr()),
        prop::collection::vec(any_cidr(), 0..3),
        option::of(any_cidr()),
    );
    let rest = (
        option::of(any_address()),
        option::of(any_address()),
        any::<u32>(),
        any::<u8>(),
        texts(),
        texts(),
    );
    let extension = option::of(text().prop_map(|agent_version| NodeExtension {
        wireguard: None,
        agent_version,
        unknown: serde_json::Map::new(),
    }));
    let unknown = btree_map("x[a-z]{1,5}", any::<i64>(), 0..3);
    (
        names,
        prop::collection::vec(address, 0..4),
        cidrs,
        rest,
        extension,
        unknown,
    )
        .prop_map(
            |(names, ip_addresses, cidrs, rest, extension, unknown)| Node {
                name: names.0,
                cluster: names.1,
                ip_addresses,
                ipv4_alloc_cidr: cidrs.0,
                ipv4_secondary_alloc_cidrs: cidrs.1.clone(),
                ipv6_alloc_cidr: cidrs.2,
                ipv6_secondary_alloc_cidrs: cidrs.1,
                ipv4_health_ip: rest.0,
                ipv6_health_ip: rest.1,
                ipv4_ingress_ip: rest.1,
                ipv6_ingress_ip: rest.0,
                cluster_id: rest.2,
                source: names.2,
                encryption_key: rest.3,
                labels: rest.4,
                annotations: rest.5,
                wireguard_pub_key: names.3,
                boot_id: names.4,
                extension,
                unknown: unknown
                    .into_iter()
                    .map(|(key, value)| (key, value.into()))
                    .collect(),
            },
        )
}

fn any_pair() -> impl Strategy<Value = IpIdentityPair> {
    let port = (text(), any::<u16>(), text()).prop_map(|(name, port, protocol)| NamedPort {
        name,
        port,
        protocol,
    });
    let numbers = (any::<u32>(), any::<u8>(), option::of(0_u8..=32));
    (
        any_address(),
        option::of(any_address()),
        numbers,
        (text(), text(), text(), text()),
        prop::collection::vec(port, 0..3),
        option::of(text()),
    )
        .prop_map(
            |(ip, host_ip, numbers, names, named_ports, node)| IpIdentityPair {
                mask: numbers.2.map(|bits| Mask::of(ip, bits)),
                ip,
                host_ip,
                id: numbers.0,
                key: numbers.1,
                metadata: names.0,
                k8s_namespace: names.1,
                k8s_pod_name: names.2,
                k8s_service_account: names.3,
                named_ports,
                extension: node.map(|node| IpExtension { node }),
            },
        )
}

fn any_identity() -> impl Strategy<Value = Identity> {
    btree_map(
        "[a-zA-Z0-9./:-]{1,12}",
        ("[a-z0-9]{1,4}", "[^;]{0,8}"),
        1..6,
    )
    .prop_map(|labels| {
        let label = |(key, (source, value))| Label { source, key, value };
        Identity::new(labels.into_iter().map(label)).unwrap()
    })
}

fn any_service() -> impl Strategy<Value = ClusterService> {
    let port =
        (text(), any::<u16>()).prop_map(|(protocol, port)| ServicePortNumber { protocol, port });
    let ports = btree_map(text(), port, 0..3);
    let addresses = btree_map(
        any_address().prop_map(|address| address.to_string()),
        ports,
        0..4,
    )
    .boxed();
    let zone = (
        text(),
        prop::collection::vec(text().prop_map(|name| ZoneName { name }), 0..3),
    )
        .prop_map(|(zone, for_zones)| BackendZone { zone, for_zones });
    (
        (text(), text(), text()),
        (addresses.clone(), addresses),
        (texts(), btree_map(text(), zone, 0..3), texts(), texts()),
        (any::<bool>(), any::<bool>(), any::<u32>()),
    )
        .prop_map(|(names, addresses, maps, rest)| ClusterService {
            cluster: names.0,
            namespace: names.1,
            name: names.2,
            frontends: addresses.0,
            backends: addresses.1,
            hostnames: maps.0,
            zones: maps.1,
            labels: maps.2,
            selector: maps.3,
            include_external: rest.0,
            shared: rest.1,
            cluster_id: rest.2,
        })
}

fn any_slice() -> impl Strategy<Value = EndpointSlice> {
    let conditions = (
        any::<Option<bool>>(),
        any::<Option<bool>>(),
        any::<Option<bool>>(),
    )
        .prop_map(|(ready, serving, terminating)| EndpointConditions {
            ready,
            serving,
            terminating,
        });
    let hints = prop::collection::vec(text(), 0..3).prop_map(|names| EndpointHints {
        for_zones: names.into_iter().map(|name| ForZone { name }).collect(),
    });
    let endpoint = (
        prop::collection::vec(text(), 0..3),
        option::of(conditions),
        (option::of(text()), option::of(text()), option::of(text())),
        texts(),
        option::of(hints),
    )
        .prop_map(
            |(addresses, conditions, names, deprecated_topology, hints)| Endpoint {
                addresses,
                conditions,
                hostname: names.0,
                deprecated_topology,
                node_name: names.1,
                zone: names.2,
                hints,
            },
        );
    let port = (
        option::of(text()),
        option::of(text()),
        any::<Option<i32>>(),
        option::of(text()),
    )
        .prop_map(|(name, protocol, port, app_protocol)| EndpointPort {
            name,
            protocol,
            port,
            app_protocol,
        });
    (
        (text(), any::<u32>(), text(), text(), text()),
        (texts(), texts()),
        prop::collection::vec(endpoint, 0..4),
        prop::collection::vec(port, 0..4),
    )
        .prop_map(|(head, maps, endpoints, ports)| EndpointSlice {
            cluster: head.0,
            cluster_id: head.1,
            namespace: head.2,
            name: head.3,
            labels: maps.0,
            annotations: maps.1,
            address_type: head.4,
            endpoints,
            ports,
        })
}

fn any_config() -> impl Strategy<Value = ClusterConfig> {
    (
        any::<u32>(),
        any::<bool>(),
        any::<bool>(),
        any::<u32>(),
        any::<Option<bool>>(),
        text(),
    )
        .prop_map(
            |(
                id,
                synced_canaries,
                cached,
                max_connected_clusters,
                service_exports_enabled,
                mode,
            )| ClusterConfig {
                id,
                capabilities: ClusterConfigCapabilities {
                    synced_canaries,
                    cached,
                    max_connected_clusters,
                    service_exports_enabled,
                    endpoint_slices_export_mode: EndpointSlicesExportMode::from(mode),
                },
            },
        )
}

fn any_object<Spec>(spec: Spec, kind: &str) -> impl Strategy<Value = Object<Spec>>
where
    Spec: Clone + std::fmt::Debug,
{
    let kind = kind.to_owned();
    (text(), text(), texts(), texts()).prop_map(move |(name, namespace, labels, annotations)| {
        Object {
            api_version: crate::manifest::API_VERSION.to_owned(),
            kind: kind.clone(),
            metadata: Metadata {
                name,
                namespace,
                labels,
                annotations,
            },
            spec: spec.clone(),
        }
    })
}

fn any_stored() -> impl Strategy<Value = (Record, RecordKey)> {
    let (namespace, name) = ("ns".to_owned(), "name".to_owned());
    let workload_key = RecordKey::Workload {
        namespace: namespace.clone(),
        name: name.clone(),
    };
    let service_key = RecordKey::StoredService { namespace, name };
    let workload =
        (option::of(text()), any::<u32>()).prop_flat_map(move |(service_account, identity)| {
            let key = workload_key.clone();
            any_object(WorkloadSpec { service_account }, "Workload").prop_map(move |object| {
                (
                    Record::Workload(Stored {
                        object,
                        status: WorkloadStatus { identity },
                    }),
                    key.clone(),
                )
            })
        });
    let port = (text(), any::<bool>(), any::<u16>(), any::<Option<u16>>()).prop_map(
        |(name, tcp, port, target_port)| {
            let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
            ServicePort {
                name,
                protocol,
                port,
                target_port,
            }
        },
    );
    let families = prop::sample::subsequence(vec![IpFamily::IPv4, IpFamily::IPv6], 0..=2);
    let spec = (texts(), prop::collection::vec(port, 0..3), families).prop_map(
        |(selector, ports, ip_families)| ServiceSpec {
            selector,
            ports,
            ip_families,
        },
    );
    let service = (spec, prop::collection::vec(any_address(), 0..3)).prop_flat_map(
        move |(spec, cluster_ips)| {
            let key = service_key.clone();
            any_object(spec, "Service").prop_map(move |object| {
                let status = ServiceStatus {
                    cluster_ips: cluster_ips.clone(),
                };
                (
                    Record::StoredService(Stored { object, status }),
                    key.clone(),
                )
            })
        },
    );
    prop_oneof![workload, service]
}

fn any_own() -> impl Strategy<Value = (Record, RecordKey)> {
    let node = || "w1".to_owned();
    let port =
        (any::<u16>(), text(), any::<bool>()).prop_map(|(port, protocol, ready)| PortReadiness {
            port,
            protocol,
            ready,
        });
    let readiness = prop::collection::vec(port, 0..4).prop_map(move |ports| {
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        (
            Record::Readiness(Readiness { ports }),
            RecordKey::Readiness {
                node: node(),
                address,
            },
        )
    });
    let session = (any::<bool>(), any::<i64>(), text(), any::<u32>()).prop_map(
        move |(stale, since_unix_ms, instance_id, ttl_seconds)| {
            let state = if stale {
                SessionState::Stale
            } else {
                SessionState::Connected
            };
            let session = Session {
                state,
                since_unix_ms,
                instance_id,
                ttl_seconds,
            };
            (
                Record::Session(session),
                RecordKey::Session { node: node() },
            )
        },
    );
    prop_oneof![readiness, session]
}

fn with_key(record: Record) -> (Record, RecordKey) {
    let key = match record {
        Record::Node(_) => "cilium/state/nodes/v1/c1/w1",
        Record::Ip(_) => "cilium/state/ip/v1/default/10.0.0.1",
        Record::Identity(_) => "cilium/state/identities/v1/id/1",
        Record::Service(_) => "cilium/state/services/v1/c1/a/b",
        Record::EndpointSlice(_) => "cilium/state/endpointslices/v1/c1/a/b",
        Record::ClusterConfig(_) => "cilium/cluster-config/c1",
        Record::Canary(_) => "cilium/synced/c1/cilium/state/ip/v1",
        _ => "cilium/.heartbeat",
    };
    let key = RecordKey::parse(key.as_bytes()).unwrap();
    (record, key)
}

fn any_record() -> impl Strategy<Value = (Record, RecordKey)> {
    let shared = prop_oneof![
        any_node().prop_map(Record::Node),
        any_pair().prop_map(Record::Ip),
        any_identity().prop_map(Record::Identity),
        any_service().prop_map(Record::Service),
        any_slice().prop_map(Record::EndpointSlice),
        any_config().prop_map(Record::ClusterConfig),
        text().prop_map(|text| Record::Canary(Timestamp(text))),
        any::<i64>().prop_map(|ms| Record::Heartbeat(Timestamp::from_unix_ms(ms))),
    ];
    prop_oneof![8 => shared.prop_map(with_key), 2 => any_stored(), 2 => any_own()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn decoding_what_was_encoded_gives_the_record((record, key) in any_record()) {
        let bytes = record.encode();
        let decoded = Record::decode(&key, &bytes).unwrap();
        prop_assert_eq!(&decoded, &record);
        prop_assert_eq!(decoded.encode(), bytes);
    }

    #[test]
    fn decoding_any_bytes_does_not_panic((_, key) in any_record(), bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Record::decode(&key, &bytes);
    }

    #[test]
    fn decoding_damaged_records_does_not_panic(
        (record, key) in any_record(), position in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()
    ) {
        let mut bytes = record.encode().to_vec();
        prop_assume!(!bytes.is_empty());
        let index = position.index(bytes.len());
        if cut { bytes.truncate(index) } else { bytes[index] = byte }
        if let Ok(decoded) = Record::decode(&key, &bytes) {
            // What is accepted is stable: it survives a second round.
            prop_assert_eq!(Record::decode(&key, &decoded.encode()).unwrap(), decoded);
        }
    }

    #[test]
    fn decoding_damaged_slices_does_not_panic(slice in any_slice(), position in any::<prop::sample::Index>(), byte in any::<u8>()) {
        use prost::Message as _;
        let mut message = slice.encode_to_vec();
        prop_assume!(!message.is_empty());
        let index = position.index(message.len());
        message[index] = byte;
        let _ = EndpointSlice::decode(&zstd::encode_all(message.as_slice(), 1).unwrap());
    }
}
