use super::*;

fn call(variables: &[(&str, &str)]) -> Result<Call, CniError> {
    Call::from_environment(|name| {
        variables
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| (*value).to_owned())
    })
}

const ADD: [(&str, &str); 5] = [
    ("CNI_COMMAND", "ADD"),
    ("CNI_CONTAINERID", "abc-1"),
    ("CNI_NETNS", "/run/netns/x"),
    ("CNI_IFNAME", "eth0"),
    (
        "CNI_ARGS",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0",
    ),
];

#[test]
fn add_takes_the_workload_from_its_arguments() {
    let call = call(&ADD).unwrap();
    assert_eq!((&*call.namespace, &*call.name), ("shop", "web-0"));
}

#[test]
fn every_missing_variable_is_named() {
    for missing in [
        "CNI_COMMAND",
        "CNI_CONTAINERID",
        "CNI_NETNS",
        "CNI_IFNAME",
        "CNI_ARGS",
    ] {
        let rest: Vec<_> = ADD.into_iter().filter(|(key, _)| *key != missing).collect();
        let error = call(&rest).unwrap_err();
        assert_eq!(error.code, code::INVALID_ENVIRONMENT);
        assert!(error.msg.contains(missing), "{error}");
    }
}

#[test]
fn names_that_would_leave_a_folder_are_refused() {
    for id in ["", "../x", "a/b", "-a", &"x".repeat(300)] {
        assert!(check_container_id(id).is_err(), "{id}");
    }
    for name in ["", ".", "..", "a/b", "a b", "abcdefghijklmnop"] {
        assert!(check_ifname(name).is_err(), "{name}");
    }
}

#[test]
fn del_does_without_a_namespace() {
    let rest: Vec<_> = ADD
        .into_iter()
        .filter(|(key, _)| !matches!(*key, "CNI_NETNS" | "CNI_ARGS" | "CNI_COMMAND"))
        .chain([("CNI_COMMAND", "DEL")])
        .collect();
    assert_eq!(call(&rest).unwrap().command, Command::Del);
}

#[test]
fn an_unknown_version_and_no_json_have_their_codes() {
    let error = Config::from_json(br#"{"cniVersion":"9.9.9"}"#).unwrap_err();
    assert_eq!(error.code, code::INCOMPATIBLE_VERSION);
    let error = Config::from_json(b"{").unwrap_err();
    assert_eq!(error.code, code::DECODING_FAILURE);
}

#[test]
fn an_error_is_written_as_the_specification_says() {
    let error = CniError::new(code::TRY_AGAIN_LATER, "no workload", "apply it");
    let json: serde_json::Value = serde_json::to_value(&error).unwrap();
    assert_eq!(
        json,
        serde_json::json!({"cniVersion": "1.1.0", "code": 11, "msg": "no workload", "details": "apply it"})
    );
}

#[test]
fn gc_reads_the_attachments_to_keep() {
    let config = Config::from_json(
        br#"{"cniVersion":"1.1.0","name":"n","type":"t","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#,
    )
    .unwrap();
    assert_eq!(config.valid_attachments.unwrap()[0].container_id, "a");
}

#[test]
fn older_callers_get_the_older_form() {
    let result = AddResult {
        interfaces: vec![Interface {
            name: "eth0".to_owned(),
            mtu: Some(1450),
            ..Interface::default()
        }],
        ips: vec![IpConfig {
            address: "10.1.0.4/32".parse().unwrap(),
            gateway: None,
            interface: Some(0),
            version: None,
        }],
        ..AddResult::default()
    };
    let old = result.clone().for_version("0.4.0");
    assert_eq!(old.ips[0].version.as_deref(), Some("4"));
    assert_eq!(old.interfaces[0].mtu, None);
    let new = result.for_version("1.1.0");
    assert_eq!(new.interfaces[0].mtu, Some(1450));
    assert_eq!(new.ips[0].version, None);
}
