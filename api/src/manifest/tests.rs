use proptest::prelude::*;

use super::*;

const SERVICE: &str = r#"{
  "apiVersion": "clustermesh.io/v1", "kind": "Service",
  "metadata": {"name": "cart", "namespace": "shop", "annotations": {"service.cilium.io/global": "true"}},
  "spec": {"selector": {"app": "cart"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]}
}"#;

fn read(json: &str) -> Result<Manifest, ManifestError> {
    Manifest::from_json(json.as_bytes())
}

fn refusal(json: &str) -> String {
    read(json).unwrap_err().to_string()
}

#[test]
fn a_service_is_read_with_defaults() {
    let Manifest::Service(service) = read(SERVICE).unwrap() else {
        panic!("not a Service")
    };
    let port = &service.spec.ports[0];
    assert_eq!(
        (port.protocol, port.port, port.target()),
        (Protocol::Tcp, 80, 8080)
    );
    assert!(service.spec.ip_families.is_empty());
    assert_eq!(
        service.service_annotations(),
        ServiceAnnotations {
            global: true,
            shared: true,
            affinity: Affinity::None
        }
    );
}

#[test]
fn a_workload_needs_no_namespace_and_no_account() {
    let json = r#"{"apiVersion":"clustermesh.io/v1","kind":"Workload","metadata":{"name":"vm-1"},"spec":{}}"#;
    let manifest = read(json).unwrap();
    assert_eq!(
        (manifest.kind(), manifest.metadata().namespace.as_str()),
        ("Workload", "default")
    );
    assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
}

#[test]
fn mistakes_are_refused_with_object_field_and_reason() {
    for (from, to, expected) in [
        (
            "targetPort",
            "targetPrt",
            "Service shop/cart: unknown field spec.ports.0.targetPrt",
        ),
        (
            r#""metadata": {"#,
            r#""metadata": {"uid":"1","#,
            "Service shop/cart: unknown field metadata.uid",
        ),
        (
            "clustermesh.io/v1",
            "v1",
            "Service shop/cart: apiVersion \"v1\" is not known",
        ),
        (
            r#""Service""#,
            r#""Pod""#,
            "Pod shop/cart: kind \"Pod\" is not known",
        ),
        (
            "8080",
            "80800",
            "Service shop/cart: spec.ports[0].targetPort: invalid value: integer `80800`",
        ),
        (
            "8080",
            "0",
            "Service shop/cart: spec.ports[0].targetPort: must be 1 to 65535",
        ),
        (
            r#""port": 80,"#,
            r#""port": 0,"#,
            "Service shop/cart: spec.ports[0].port: must be 1 to 65535",
        ),
        (
            r#"{"app": "cart"}"#,
            "{}",
            "Service shop/cart: spec.selector: must not be empty",
        ),
        (
            r#"{"app": "cart"}"#,
            r#"{"app": "a b"}"#,
            "Service shop/cart: spec.selector: label \"app=a b\"",
        ),
        (
            r#""name": "cart""#,
            r#""name": "Cart""#,
            "metadata.name: name \"Cart\"",
        ),
        (
            r#""name": "cart""#,
            r#""name": "a.b""#,
            "metadata.name: name \"a.b\"",
        ),
        (r#""shop""#, r#""a.b""#, "metadata.namespace: name \"a.b\""),
        (
            r#"global": "true""#,
            r#"global": "yes""#,
            "annotation service.cilium.io/global is \"yes\", expected",
        ),
        (
            r#"global": "true""#,
            r#"affinity": "near""#,
            "annotation service.cilium.io/affinity is \"near\"",
        ),
        (
            r#""port": 80,"#,
            r#""port": 80, "protocol": "SCTP","#,
            "unknown variant `SCTP`",
        ),
        (
            r#""spec": {"#,
            r#""spec": {"ipFamilies":["IPv4","IPv4"],"#,
            "spec.ipFamilies: a family occurs twice",
        ),
    ] {
        let json = SERVICE.replacen(from, to, 1);
        assert_ne!(json, SERVICE, "{from} is not in the example");
        let error = refusal(&json);
        assert!(error.contains(expected), "{error}\n  expected {expected}");
    }
}

#[test]
fn several_ports_need_different_names_and_numbers() {
    let with = |ports: &str| {
        SERVICE.replace(
            r#"[{"name": "http", "port": 80, "targetPort": 8080}]"#,
            ports,
        )
    };
    read(&with(r#"[{"port":53,"protocol":"UDP"}]"#)).unwrap();
    read(&with(
        r#"[{"name":"a","port":53,"protocol":"UDP"},{"name":"b","port":53}]"#,
    ))
    .unwrap();
    assert!(refusal(&with("[]")).contains("spec.ports: must not be empty"));
    assert!(refusal(&with(r#"[{"name":"a","port":1},{"port":2}]"#)).contains("spec.ports[1].name"));
    assert!(
        refusal(&with(r#"[{"name":"a","port":1},{"name":"a","port":2}]"#))
            .contains("a occurs twice")
    );
    assert!(
        refusal(&with(r#"[{"name":"a","port":1},{"name":"b","port":1}]"#))
            .contains("1/TCP occurs twice")
    );
}

#[test]
fn a_workload_cannot_set_the_labels_of_the_mesh() {
    let json = r#"{"apiVersion":"clustermesh.io/v1","kind":"Workload","metadata":{"name":"a",
        "labels":{"io.cilium.k8s.policy.cluster":"other"}},"spec":{}}"#;
    assert!(refusal(json).contains("label \"io.cilium.k8s.policy.cluster\" is set by the mesh"));
}

#[test]
fn manifests_that_are_none_are_refused() {
    for json in ["", "[]", "{}", "null", "{\"kind\":1}"] {
        assert!(
            matches!(read(json), Err(ManifestError::NotAManifest(_))),
            "{json}"
        );
    }
    let large = vec![b' '; MAX_MANIFEST_BYTES + 1];
    assert!(matches!(
        Manifest::from_json(&large),
        Err(ManifestError::TooLarge(_))
    ));
}

#[test]
fn annotations_are_read_as_cilium_reads_them() {
    let read = |pairs: &[(&str, &str)]| {
        let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let annotations = ServiceAnnotations::read(&pairs.iter().map(pair).collect());
        (annotations.global, annotations.shared, annotations.affinity)
    };
    assert_eq!(read(&[]), (false, false, Affinity::None));
    assert_eq!(
        read(&[(SHARED_ANNOTATION, "true")]),
        (false, false, Affinity::None)
    );
    assert_eq!(
        read(&[(GLOBAL_ANNOTATION, "True")]),
        (true, true, Affinity::None)
    );
    assert_eq!(
        read(&[(GLOBAL_ANNOTATION, "true"), (SHARED_ANNOTATION, "false")]),
        (true, false, Affinity::None)
    );
    assert_eq!(
        read(&[
            ("io.cilium/global-service", "true"),
            (AFFINITY_ANNOTATION, "LOCAL")
        ]),
        (true, true, Affinity::Local)
    );
    assert_eq!(
        read(&[("io.cilium/service-affinity", "remote")]),
        (false, false, Affinity::Remote)
    );
    assert_eq!(
        read(&[(AFFINITY_ANNOTATION, "near")]),
        (false, false, Affinity::None)
    );
}

#[test]
fn a_stored_object_is_the_manifest_and_its_status() {
    let Manifest::Service(object) = read(SERVICE).unwrap() else {
        panic!("not a Service")
    };
    let cluster_ips = vec!["10.96.0.7".parse().unwrap()];
    let stored = Stored {
        object,
        status: ServiceStatus { cluster_ips },
    };
    let text = String::from_utf8(stored.encode().to_vec()).unwrap();
    assert!(
        text.starts_with(
            r#"{"apiVersion":"clustermesh.io/v1","kind":"Service","metadata":{"name":"cart","#
        ),
        "{text}"
    );
    assert!(
        text.ends_with(r#","status":{"clusterIPs":["10.96.0.7"]}}"#),
        "{text}"
    );
    let newer = text.replace(r#""status":{"#, r#""later":1,"status":{"later":2,"#);
    assert_eq!(StoredService::decode(newer.as_bytes()).unwrap(), stored);
}

proptest! {
    #[test]
    fn reading_any_text_does_not_panic(text in any::<String>()) {
        let _ = read(&text);
    }

    #[test]
    fn reading_a_damaged_manifest_does_not_panic(position in 0..SERVICE.len(), byte in any::<u8>()) {
        let mut json = SERVICE.as_bytes().to_vec();
        json[position] = byte;
        if let Ok(manifest) = Manifest::from_json(&json) {
            prop_assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
        }
    }
}

#[test]
fn a_workload_needs_no_spec_and_a_service_does() {
    let manifest = |kind: &str| {
        format!(
            r#"{{"apiVersion":"clustermesh.io/v1","kind":"{kind}","metadata":{{"name":"web","namespace":"shop","labels":{{"app":"web"}}}}}}"#
        )
    };
    let read = |kind: &str| Manifest::from_json(manifest(kind).as_bytes());
    assert!(read("Workload").is_ok());
    assert!(read("Service").is_err());
}
