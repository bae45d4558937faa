use clustermesh_api::v1::{EncryptionReport, Laggard, SourceRevision};

use super::*;

fn source(cluster: &str, store_id: u64, revision: i64) -> SourceRevision {
    SourceRevision {
        cluster: cluster.to_owned(),
        store_id,
        revision,
    }
}

fn status() -> MeshStatusResponse {
    let node = |name: &str, state: node_status::State, applied| NodeStatus {
        node: name.to_owned(),
        state: state.into(),
        applied,
        last_report_age_ms: 40,
        agent_version: "0.1.0".to_owned(),
        pod_cidrs: vec!["10.1.0.0/24".to_owned()],
        ..NodeStatus::default()
    };
    let mut first = node(
        "w1",
        node_status::State::Connected,
        vec![source("c1", 0xab, 120), source("c2", 0xcd, 77)],
    );
    first.encryption = Some(EncryptionReport {
        backend: "userspace".to_owned(),
        encrypted: 3,
        fault: true,
        ..EncryptionReport::default()
    });
    MeshStatusResponse {
        cluster: "c1".to_owned(),
        cluster_id: 1,
        store_id: 0xab,
        revision: 120,
        server_version: "0.1.0".to_owned(),
        peers: vec![PeerStatus {
            cluster: "c2".to_owned(),
            cluster_id: 2,
            state: peer_status::State::Synced.into(),
            revision: 77,
            store_id: 0xcd,
            nodes: 2,
            refused_records: BTreeMap::from([("cluster-id".to_owned(), 3)]),
            ..PeerStatus::default()
        }],
        nodes: vec![
            first,
            node(
                "w2",
                node_status::State::Stale,
                vec![source("c1", 0xab, 110), source("c2", 0xee, 99)],
            ),
        ],
        ..MeshStatusResponse::default()
    }
}

#[test]
fn the_table_says_what_every_node_has_applied() {
    assert_eq!(
        to_text(&status()),
        "\
Cluster c1 (id 1), store ab, revision 120, server 0.1.0

Peers
  CLUSTER  ID  STATE   REVISION  NODES  ENDPOINTS  IDENTITIES  SERVICES  REFUSED       LAST ERROR
  c2       2   synced  77        2      0          0           0         cluster-id:3  -

Nodes: everything applied on 1 of 2
  NAME  STATE      APPLIED                  REPORT     POD CIDRS    ENCRYPTION                     REFUSED  VERSION
  w1    connected  c1=120 c2=77             40 ms ago  10.1.0.0/24  userspace: 3 encrypted, fault  -        0.1.0
  w2    stale      c1=110 (10 behind) c2=-  40 ms ago  10.1.0.0/24  -                              -        0.1.0
"
    );
}

#[test]
fn a_revision_of_another_store_is_not_taken_for_one_of_this() {
    let json = to_json(&status());
    assert_eq!(
        json["nodes"][0]["applied"]["c2"],
        json!({ "revision": 77, "behind": 0 })
    );
    assert_eq!(
        json["nodes"][1]["applied"]["c2"],
        json!({ "revision": null, "behind": null })
    );
    assert_eq!(json["nodes"][1]["applied"]["c1"]["behind"], 10);
    assert_eq!(
        (json["storeID"].as_str(), json["revision"].as_i64()),
        (Some("ab"), Some(120))
    );
}

#[test]
fn a_wait_that_ran_out_names_the_laggards() {
    let laggard = |number| Laggard {
        node: format!("w{number}"),
        reason: "no report for 3000 ms".to_owned(),
    };
    let mut progress = WaitProgress {
        targets: vec![source("c1", 1, 120)],
        nodes_total: 13,
        nodes_applied: 1,
        laggards: (1..=12).map(laggard).collect(),
        done: false,
    };
    let text = laggards(Some(&progress));
    assert!(
        text.starts_with(": applied on 1 of 13 nodes; w1: no report for 3000 ms; w2: "),
        "{text}"
    );
    assert!(text.ends_with("; 2 more"), "{text}");
    progress.laggards.truncate(1);
    assert!(!laggards(Some(&progress)).contains("more"));
    assert_eq!(
        progress_line(&progress),
        "applied on 1 of 13 nodes (c1=120)"
    );
}

#[test]
fn a_wait_for_no_node_says_so() {
    let mut progress = WaitProgress {
        done: true,
        ..WaitProgress::default()
    };
    let hint = nobody_to_wait_for(&progress).unwrap();
    assert!(
        hint.contains("no node of this cluster is on record"),
        "{hint}"
    );
    progress.nodes_total = 1;
    assert_eq!(nobody_to_wait_for(&progress), None);
}

#[test]
fn what_a_restarted_server_refused_is_unknown_and_not_nothing() {
    let peer = |incomplete, counts: &[(&str, u64)]| PeerStatus {
        refused_incomplete: incomplete,
        refused_records: counts
            .iter()
            .map(|(reason, count)| ((*reason).to_owned(), *count))
            .collect(),
        ..PeerStatus::default()
    };
    assert_eq!(refused_of(&peer(false, &[])), "");
    assert_eq!(refused_of(&peer(false, &[("quota", 3)])), "quota:3");
    assert_eq!(refused_of(&peer(true, &[])), "unknown");
    assert_eq!(refused_of(&peer(true, &[("quota", 3)])), "quota:3,unknown");
}
