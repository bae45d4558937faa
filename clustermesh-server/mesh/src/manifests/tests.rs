use super::*;
use crate::test_support::{Lab, commit, service, workload};
use crate::view::View;

fn actions(outcomes: &[ObjectOutcome]) -> Vec<Action> {
    outcomes.iter().map(|outcome| outcome.action()).collect()
}

#[test]
fn apply_says_created_configured_unchanged() {
    let mut lab = Lab::new();
    let list = [
        workload("a", &[("app", "x")]),
        service("s", &[("app", "x")], &[]),
    ];
    assert_eq!(
        actions(&lab.apply(&list)),
        [Action::Created, Action::Created]
    );
    let revision = lab.view.revision();
    assert_eq!(
        actions(&lab.apply(&list)),
        [Action::Unchanged, Action::Unchanged]
    );
    assert_eq!(lab.view.revision(), revision, "nothing to propose");
    let changed = [
        workload("a", &[("app", "y")]),
        service("s", &[("app", "y")], &[]),
    ];
    assert_eq!(
        actions(&lab.apply(&changed)),
        [Action::Configured, Action::Configured]
    );
}

#[test]
fn one_label_set_has_one_identity_within_a_list_too() {
    let mut lab = Lab::new();
    let outcomes = lab.apply(&[
        workload("a", &[("app", "x")]),
        workload("b", &[("app", "x")]),
        workload("c", &[]),
    ]);
    assert_eq!(outcomes[0].identity, outcomes[1].identity);
    assert_ne!(outcomes[0].identity, outcomes[2].identity);
    let key = format!("cilium/state/identities/v1/id/{}", outcomes[0].identity);
    let labels = lab.view.get(key.as_bytes()).unwrap().value;
    assert_eq!(
        labels,
        "k8s:app=x;k8s:io.cilium.k8s.policy.cluster=c1;k8s:io.kubernetes.pod.namespace=shop;"
    );
}

#[test]
fn services_get_an_address_of_each_family_and_keep_it() {
    let mut lab = Lab::new();
    let first = lab.apply(&[
        service("s", &[("app", "x")], &[]),
        service("t", &[("app", "x")], &[]),
    ]);
    assert_eq!(first[0].addresses, ["10.96.1.1", "fd00:96:1::1"]);
    assert_eq!(first[1].addresses, ["10.96.1.2", "fd00:96:1::2"]);
    let again = lab.apply(&[service("s", &[("app", "z")], &[])]);
    assert_eq!(again[0].addresses, first[0].addresses);
}

#[test]
fn one_bad_manifest_stops_the_list_and_every_fault_is_told() {
    let lab = Lab::new();
    let list = [
        workload("a", &[]),
        "{".into(),
        workload("a", &[]),
        service("S!", &[("app", "x")], &[]),
    ];
    let errors = plan_apply(&lab.view, &lab.settings, &list, 0).unwrap_err();
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 3, "{texts:?}");
    assert!(
        texts[0].starts_with("object 1:") && texts[1].contains("Workload shop/a occurs twice"),
        "{texts:?}"
    );
}

#[test]
fn changed_labels_rewrite_the_addresses_in_the_same_plan() {
    let mut lab = Lab::new();
    let old = lab.apply(&[workload("a", &[("app", "x")])])[0].identity;
    lab.node("n1", "192.0.2.1");
    lab.endpoint("n1", "a", "10.1.0.4");
    let plan = plan_apply(
        &lab.view,
        &lab.settings,
        &[workload("a", &[("app", "y")])],
        0,
    )
    .unwrap();
    let keys: Vec<_> = plan
        .txn
        .writes()
        .keys()
        .map(|key| String::from_utf8_lossy(key).into_owned())
        .collect();
    assert!(
        keys.contains(&"cilium/state/ip/v1/default/10.1.0.4".to_owned()),
        "{keys:?}"
    );
    let new = commit(&mut lab.view, plan)[0].identity;
    assert_ne!(new, old);
    let pair = lab
        .view
        .get(b"cilium/state/ip/v1/default/10.1.0.4")
        .unwrap();
    assert_eq!(IpIdentityPair::decode(&pair.value).unwrap().id, new);
}

#[test]
fn delete_reports_what_was_there() {
    let mut lab = Lab::new();
    lab.apply(&[workload("a", &[]), service("s", &[("app", "x")], &[])]);
    let reference = |kind: &str, name: &str| ObjectRef {
        kind: kind.to_owned(),
        namespace: "shop".to_owned(),
        name: name.to_owned(),
    };
    let list = [
        reference("Workload", "a"),
        reference("Service", "s"),
        reference("Service", "none"),
    ];
    let plan = plan_delete(&lab.view, &lab.settings, &list, 5).unwrap();
    let outcomes = commit(&mut lab.view, plan);
    assert_eq!(
        actions(&outcomes),
        [Action::Deleted, Action::Deleted, Action::NotFound]
    );
    assert!(lab.view.list(b"clustermesh.io/services/").is_empty());
    let bad = plan_delete(&lab.view, &lab.settings, &[reference("Pod", "a")], 5).unwrap_err();
    assert!(bad[0].to_string().contains("Pod shop/a"));
}

#[test]
fn a_freed_address_is_not_given_to_another_service_for_a_while() {
    let mut lab = Lab::new();
    lab.apply(&[service("s", &[("app", "x")], &[])]);
    let gone = ObjectRef {
        kind: "Service".into(),
        namespace: "shop".into(),
        name: "s".into(),
    };
    let plan = plan_delete(&lab.view, &lab.settings, &[gone], lab.now_unix_ms).unwrap();
    commit(&mut lab.view, plan);
    // 254 usable IPv4 addresses, one in quarantine.
    for index in 0..253 {
        let outcome = lab.apply(&[service(&format!("f{index}"), &[("app", "x")], &[])]);
        assert_ne!(outcome[0].addresses[0], "10.96.1.1");
    }
    let full = plan_apply(
        &lab.view,
        &lab.settings,
        &[service("late", &[("a", "b")], &[])],
        lab.now_unix_ms,
    );
    let text = full.unwrap_err()[0].to_string();
    assert!(
        text.contains("no free IPv4 address for Service shop/late")
            && text.contains("10.96.1.0/24"),
        "{text}"
    );
    lab.now_unix_ms += crate::allocate::VIRTUAL_ADDRESS_QUARANTINE_MS;
    assert_eq!(
        lab.apply(&[service("late", &[("a", "b")], &[])])[0].addresses[0],
        "10.96.1.1"
    );
}

#[test]
fn a_node_with_many_endpoints_is_removed_in_bounded_steps() {
    let mut lab = Lab::new();
    lab.node("n1", "192.0.2.1");
    let count = MAX_STEP_WRITES;
    for part in (0..count).collect::<Vec<_>>().chunks(500) {
        let manifests: Vec<_> = part
            .iter()
            .map(|number| workload(&format!("w-{number}"), &[]))
            .collect();
        lab.apply(&manifests);
    }
    for number in 0..count {
        let address = format!("fd01::{:x}", 0x1000 + number);
        lab.endpoint("n1", &format!("w-{number}"), &address);
    }
    let node = [ObjectRef {
        kind: KIND_NODE.to_owned(),
        namespace: String::new(),
        name: "n1".to_owned(),
    }];
    let mut steps = 0;
    let outcomes = loop {
        let plan = plan_delete_step(&lab.view, &lab.settings, &node, 1).unwrap();
        assert!(plan.txn.writes().len() <= MAX_STEP_WRITES + 2);
        steps += 1;
        if let Step::Done(outcomes) = commit(&mut lab.view, plan) {
            break outcomes;
        }
    };
    assert!(steps > 1);
    assert_eq!(outcomes[0].action, i32::from(Action::Deleted));
    assert!(lab.view.addresses_of("n1").is_empty());
    assert!(lab.view.list(b"clustermesh.io/alloc/endpoints/").is_empty());
}
