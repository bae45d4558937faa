use super::*;
use crate::change::ServicePort;
use crate::decode::PROTOCOL_UDP;

fn target(protocol: u8) -> Target {
    Target {
        address: "10.1.0.4".parse().unwrap(),
        port: 8080,
        protocol,
    }
}

fn one(protocol: u8) -> Probes {
    let mut probes = Probes::new(1_000);
    probes.set_targets(&BTreeSet::from([target(protocol)]), 0);
    probes
}

fn probe(probes: &mut Probes, success: bool, now_ms: u64) -> Option<bool> {
    assert_eq!(probes.take_due(now_ms), [target(PROTOCOL_TCP)]);
    probes.outcome(&target(PROTOCOL_TCP), success, now_ms);
    probes
        .take_changes()
        .first()
        .and_then(|(_, ports)| ports.first().map(|(_, ready)| *ready))
}

#[test]
fn one_success_makes_ready_and_two_failures_in_a_row_make_not_ready() {
    let mut probes = one(PROTOCOL_TCP);
    assert_eq!(probe(&mut probes, true, 0), Some(true));
    assert_eq!(probe(&mut probes, false, 1_000), None);
    assert_eq!(probe(&mut probes, true, 1_250), None);
    assert_eq!(probe(&mut probes, false, 2_250), None);
    assert_eq!(probe(&mut probes, false, 2_500), Some(false));
    assert_eq!(probe(&mut probes, true, 3_500), Some(true));
}

#[test]
fn a_port_that_never_answered_is_not_ready() {
    assert_eq!(probe(&mut one(PROTOCOL_TCP), false, 0), Some(false));
}

#[test]
fn a_target_is_not_due_while_its_probe_runs() {
    let mut probes = one(PROTOCOL_TCP);
    assert_eq!(probes.take_due(0).len(), 1);
    assert_eq!(probes.take_due(9_999), []);
    assert_eq!(probes.next_due_ms(), None);
    probes.outcome(&target(PROTOCOL_TCP), true, 10_000);
    assert_eq!(probes.next_due_ms(), Some(11_000));
}

#[test]
fn udp_ports_are_not_probed_and_count_as_ready() {
    let mut probes = one(PROTOCOL_UDP);
    assert_eq!(probes.take_due(u64::MAX - 1), []);
    assert_eq!(probes.take_changes()[0].1, [(target(PROTOCOL_UDP), true)]);
}

#[test]
fn only_ports_that_a_service_of_the_namespace_leads_to_are_targets() {
    let workload = |namespace: &str| WorkloadName {
        namespace: namespace.into(),
        name: "web-0".into(),
    };
    let declaration = WorkloadDeclaration {
        labels: BTreeMap::from([("app".to_owned(), "web".to_owned())]),
        identity: Some(70_000),
    };
    let service = |key: &str, value: &str| ServiceDeclaration {
        selector: BTreeMap::from([(key.to_owned(), value.to_owned())]),
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: PROTOCOL_TCP,
            port: 80,
            target_port: 8080,
        }],
        ..ServiceDeclaration::default()
    };
    let services = [
        (workload("shop"), service("app", "web")),
        (workload("shop2"), service("app", "other")),
        (workload("shop3"), ServiceDeclaration::default()),
    ];
    let addresses = [target(PROTOCOL_TCP).address];
    let found = |namespace: &str| {
        let workload = workload(namespace);
        let endpoint = LocalEndpoint {
            workload: &workload,
            declaration: &declaration,
            addresses: &addresses,
        };
        targets([endpoint], services.iter().map(|(n, s)| (n, s)))
    };
    assert_eq!(found("shop"), BTreeSet::from([target(PROTOCOL_TCP)]));
    assert!(found("shop2").is_empty());
    assert!(found("shop3").is_empty());
    assert!(found("elsewhere").is_empty());
}
