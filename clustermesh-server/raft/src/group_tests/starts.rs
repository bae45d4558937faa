//! Starts of replicas whose group has no quorum.

use std::time::Duration;

use super::{Group, first_members, replica_config, start};
use crate::test_support::{put, value};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_at_its_start_a_replica_serves_what_it_has_and_the_rest_later() {
    let group = Group::three().await;
    let written = group.replicas[0].propose(put("k", "v", 0)).await.unwrap();
    for replica in &group.replicas {
        replica.linearize().await.unwrap();
    }
    for replica in &group.replicas {
        replica.shutdown().await;
    }
    let config = |index: usize| {
        let name = group.names[index];
        let mut config = replica_config(name, &group.data[index], first_members(&group.names));
        config.start_timeout = Duration::from_millis(500);
        config
    };
    let first = start(&group.network, config(0)).await.unwrap();
    assert_eq!(value(&first, "k").unwrap(), "v");
    assert_eq!(first.read(|state| state.revision()), written.revision);
    let alone = tokio::time::timeout(Duration::from_millis(500), first.linearize()).await;
    assert!(!matches!(alone, Ok(Ok(()))), "{alone:?}");
    assert_eq!(first.status().failure, None);
    let second = start(&group.network, config(1)).await.unwrap();
    // Whether a leader is known yet or not: within the request's time there is one.
    first.propose(put("k", "w", 0)).await.unwrap();
    second.propose(put("l", "w", 0)).await.unwrap();
    second.linearize().await.unwrap();
    assert_eq!(value(&second, "k").unwrap(), "w");
    first.shutdown().await;
    second.shutdown().await;
}
