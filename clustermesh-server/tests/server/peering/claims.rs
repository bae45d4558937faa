//! What a peer may not have copied, and what is said of it.

use clustermesh_api::v1::peer_status::State;

use super::{
    COPY, address, delete, node, until_gone, until_state, until_there, with_a_node, write,
};
use crate::support::{Cluster, Pki, put, soon, until};

#[tokio::test(flavor = "multi_thread")]
async fn claims_that_a_peer_may_not_make_are_refused_and_shown() {
    let pki = Pki::new();
    let (a, at_a) = with_a_node(&pki).await;
    write(&at_a, address(1, 1, 4, 65_600)).await;
    // Another cluster's identity, our own pod CIDR, and a record that is none.
    write(&at_a, address(1, 1, 5, 3 * 65_536)).await;
    let (key, value) = node(1, "w2", 2);
    write(&at_a, (key, value.replace("10.1.2.0", "10.2.2.0"))).await;
    write(
        &at_a,
        (
            "cilium/state/nodes/v1/c1/w3".to_owned(),
            "not json".to_owned(),
        ),
    )
    .await;
    let b = Cluster::start(&pki, 2, &[&a]).await;
    let at_b = b.operator(&pki);
    let status = until_state(&at_b, State::Synced).await;
    assert_eq!((status.nodes, status.endpoints), (1, 1), "{status:?}");
    assert_eq!(
        status.refused_records.values().sum::<u64>(),
        3,
        "{:?}",
        status.refused_records
    );
    // Put right, it is taken.
    write(&at_a, node(1, "w2", 2)).await;
    until_there(&at_b, "cilium/cache/nodes/v1/c1/w2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_is_copied_up_to_its_quota_and_goes_on_when_there_is_room() {
    const RECORDS: usize = 10;
    let pki = Pki::new();
    let (a, at_a) = with_a_node(&pki).await;
    for host in 10..30 {
        write(&at_a, address(1, 1, host, 65_600)).await;
    }
    let limit = "[limits]\nmax_records_per_peer = 10";
    let b = Cluster::start_with(&pki, 2, &[&a], limit).await;
    let at_b = b.operator(&pki);
    let copied = || async {
        let records = at_b.list_prefix("cilium/cache/").collect(1_000).await;
        records.unwrap().kvs.len()
    };
    let status = until_state(&at_b, State::Synced).await;
    assert_eq!(copied().await, RECORDS);
    assert_eq!(
        status.refused_records.get("quota"),
        Some(&11),
        "{:?}",
        status.refused_records
    );
    // What is there may change and go, what is new finds no room before.
    write(&at_a, address(1, 1, 10, 65_601)).await;
    until(&at_b, &format!("{COPY}10"), |value| {
        value.is_some_and(|value| value.contains("65601"))
    })
    .await;
    let last = write(&at_a, address(1, 1, 40, 65_600)).await;
    soon("the watermark", async {
        while until_state(&at_b, State::Synced).await.revision < last {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(copied().await, RECORDS);
    delete(&at_a, "cilium/state/ip/v1/default/10.1.1.11").await;
    until_gone(&at_b, &format!("{COPY}11")).await;
    soon("one that waited has the room", async {
        while copied().await < RECORDS {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_our_id_is_refused_with_the_reason_and_its_revision_is_not_waited_for_silently()
{
    let pki = Pki::new();
    let a = Cluster::start(&pki, 1, &[]).await;
    let at_a = a.operator(&pki);
    at_a.put(put(
        "cilium/cluster-config/c1",
        r#"{"id":2,"capabilities":{"syncedCanaries":true}}"#,
    ))
    .await
    .unwrap();
    let b = Cluster::start(&pki, 2, &[&a]).await;
    let at_b = b.operator(&pki);
    let status = until_state(&at_b, State::Refused).await;
    assert!(
        status.last_error.contains("cluster id 2"),
        "{}",
        status.last_error
    );
    let mut wait = at_b.wait(std::time::Duration::from_secs(2)).await.unwrap();
    let progress = soon("progress", wait.next()).await.unwrap().unwrap();
    assert!(!progress.done);
    assert!(progress.laggards[0].reason.contains("c1"), "{progress:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_claims_our_nodes_underlay_address_is_refused_and_loses_it() {
    let pki = Pki::new();
    let (a, at_a) = with_a_node(&pki).await;
    write(&at_a, node(1, "w2", 2)).await;
    let b = Cluster::start(&pki, 2, &[&a]).await;
    let at_b = b.operator(&pki);
    assert_eq!(until_state(&at_b, State::Synced).await.nodes, 2);

    // Ours came later, and is ours all the same.
    write(&at_b, node(2, "own", 1)).await;
    until_gone(&at_b, "cilium/cache/nodes/v1/c1/w1").await;
    let status = soon("the refusal in the status", async {
        loop {
            let status = at_b.mesh_status().await.unwrap().peers[0].clone();
            if !status.refused_incomplete && !status.refused_records.is_empty() {
                return status;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(
        status.refused_records.get("overlap"),
        Some(&1),
        "{status:?}"
    );
    assert!(
        at_b.get("cilium/cache/nodes/v1/c1/w2")
            .await
            .unwrap()
            .is_some()
    );

    // When our node is gone, the peer gets it.
    delete(&at_b, "cilium/state/nodes/v1/c2/own").await;
    until_there(&at_b, "cilium/cache/nodes/v1/c1/w1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_does_not_say_that_it_refused_nothing() {
    let pki = Pki::new();
    let (a, at_a) = with_a_node(&pki).await;
    write(&at_a, address(1, 1, 5, 3 * 65_536)).await;
    let mut b = Cluster::start(&pki, 2, &[&a]).await;
    let status = until_state(&b.operator(&pki), State::Synced).await;
    assert!(!status.refused_incomplete && status.refused_records.len() == 1);
    b.stop().await;
    b.restart(&pki).await;
    let status = until_state(&b.operator(&pki), State::Synced).await;
    assert!(status.refused_incomplete, "{status:?}");
}
