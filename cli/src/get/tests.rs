use super::*;

fn kv(key: &str, value: &str) -> KeyValue {
    KeyValue {
        key: key.as_bytes().to_vec().into(),
        value: value.as_bytes().to_vec().into(),
        ..KeyValue::default()
    }
}

fn vectors() -> Vec<KeyValue> {
    let lines = include_str!("../../../api/tests/vectors/cilium-1.20.jsonl").lines();
    let read = |line: &str| {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        Some(kv(json["key"].as_str()?, json["text"].as_str()?))
    };
    lines.filter_map(read).collect()
}

fn text(kind: GetKind, kvs: &[KeyValue]) -> String {
    let kept: Vec<KeyValue> = kvs
        .iter()
        .filter(|kv| {
            prefixes(kind, "c1")
                .iter()
                .any(|prefix| kv.key.starts_with(prefix.as_bytes()))
        })
        .cloned()
        .collect();
    let (rows, faults) = read(&kept, "c1");
    assert_eq!(faults, Vec::<String>::new());
    table(kind, &rows).render()
}

#[test]
fn ciliums_records_are_shown_as_tables() {
    let kvs = vectors();
    assert_eq!(
        text(GetKind::Endpoints, &kvs),
        "CLUSTER  NAMESPACE  NAME    ADDRESS    IDENTITY  NODE  HOST\n\
         c1       shop       cart-0  10.1.0.23  65812     -     192.0.2.11\n\
         c1       shop       cart-0  fd01::17   65812     -     2001:db8::11\n"
    );
    assert_eq!(
        text(GetKind::Services, &kvs),
        "CLUSTER  NAMESPACE  NAME  ADDRESSES  PORTS   BACKENDS  SCOPE   AFFINITY\n\
         c1       shop       cart  10.96.0.7  80/TCP  1         global  -\n"
    );
    assert_eq!(
        text(GetKind::Nodes, &kvs),
        "CLUSTER  NAME  ADDRESSES                            POD CIDRS               VERSION\n\
         c1       w1    192.0.2.11                           10.1.0.0/24             -\n\
         c1       w2    192.0.2.11,2001:db8::11,203.0.113.9  10.1.0.0/24,fd01::/104  -\n"
    );
    assert!(text(GetKind::Identities, &kvs).contains("c1       65812  k8s:app=cart k8s:io.cilium"));
}

#[test]
fn copies_are_shown_under_the_name_of_their_cluster() {
    let kvs = [
        kv("cilium/cache/identities/v1/c2/id/131080", "k8s:a=b;"),
        kv("cilium/state/identities/v1/id/65540", "k8s:a=b;"),
    ];
    let (rows, _) = read(&kvs, "c1");
    assert_eq!(
        serde_json::to_value(rows).unwrap(),
        serde_json::json!([
            {"cluster": "c1", "id": 65540, "namespace": "", "labels": ["k8s:a=b"]},
            {"cluster": "c2", "id": 131_080, "namespace": "", "labels": ["k8s:a=b"]},
        ])
    );
}

#[test]
fn a_stored_service_and_its_published_record_are_one_row() {
    let stored = r#"{"apiVersion":"clustermesh.io/v1","kind":"Service","metadata":{"name":"cart","namespace":"shop",
        "annotations":{"service.cilium.io/global":"true","service.cilium.io/affinity":"local"}},
        "spec":{"selector":{"app":"cart"},"ports":[{"port":80,"protocol":"TCP"}]},"status":{"clusterIPs":["10.96.0.7","fd00::7"]}}"#;
    let published = vectors()
        .into_iter()
        .find(|kv| kv.key.starts_with(b"cilium/state/services/"))
        .unwrap();
    for kvs in [
        [
            kv("clustermesh.io/services/v1/shop/cart", stored),
            published.clone(),
        ],
        [
            published,
            kv("clustermesh.io/services/v1/shop/cart", stored),
        ],
    ] {
        let (rows, _) = read(&kvs, "c1");
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!(
            json,
            serde_json::json!([{
                "cluster": "c1", "namespace": "shop", "name": "cart", "addresses": ["10.96.0.7", "fd00::7"],
                "ports": ["80/TCP"], "backends": ["10.1.0.23"], "global": true, "shared": true, "affinity": "local",
            }])
        );
    }
}

#[test]
fn a_broken_record_is_named_and_hides_no_other() {
    let mut kvs = vectors();
    kvs.push(kv("cilium/state/nodes/v1/c1/bad", "{"));
    let (rows, faults) = read(&kvs, "c1");
    assert!(
        rows.iter()
            .any(|row| matches!(row, Row::Node(node) if node.name == "w1"))
    );
    assert_eq!(faults.len(), 1);
    assert!(
        faults[0].starts_with("cilium/state/nodes/v1/c1/bad: "),
        "{faults:?}"
    );
}

#[test]
fn rows_are_filtered_by_cluster_and_namespace() {
    let (rows, _) = read(&vectors(), "c1");
    let kept = |cluster: Option<&str>, namespace: Option<&str>| {
        let args = GetArgs {
            kind: GetKind::Endpoints,
            cluster: cluster.map(str::to_owned),
            namespace: namespace.map(str::to_owned),
        };
        rows.iter().filter(|row| row.matches(&args)).count()
    };
    assert_eq!(kept(Some("c1"), None), rows.len());
    assert_eq!(kept(Some("c2"), None), 0);
    assert_eq!(kept(None, Some("other")), 2, "nodes have no namespace");
}
