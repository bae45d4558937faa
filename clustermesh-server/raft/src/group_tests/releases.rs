//! Replicas of neighbouring releases in one group, and entries of a release that a replica does not know.

use std::time::Duration;

use clustermesh_core::{limits::FEATURE_LEVEL, pb::Batch};
use clustermesh_store::Command;
use prost::Message;

use super::{Group, MemoryNetwork, first_members, replica_config, start, url, wait};
use crate::{
    MemoryData, ReplicaConfig, Start,
    test_support::{put, value},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_feature_level_rises_once_every_replica_knows_it() {
    let old = |config: &mut ReplicaConfig| config.feature_level = 0;
    let mut group = Group::three_with(old).await;
    for upgraded in 0..3 {
        for replica in &group.replicas {
            assert_eq!(replica.read(|state| state.feature_level()), 0);
        }
        group.replicas[upgraded].shutdown().await;
        let (name, data) = (group.names[upgraded], &group.data[upgraded]);
        let config = replica_config(name, data, Start::Existing);
        group.replicas[upgraded] = start(&group.network, config).await.unwrap();
    }
    wait("the new feature level", || {
        group
            .replicas
            .iter()
            .all(|replica| replica.read(|state| state.feature_level()) == FEATURE_LEVEL)
            .then_some(())
    })
    .await;
    // A replica of the old release may not join any more.
    let mut joins = replica_config("d", &MemoryData::default(), Start::Join(vec![url("a")]));
    joins.feature_level = 0;
    joins.start_timeout = Duration::from_millis(100);
    let refused = start(&group.network, joins).await.err().unwrap();
    assert!(refused.to_string().contains("upgrade it"), "{refused}");
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_of_a_newer_release_stops_the_replica_and_a_restart_does_not_skip_it() {
    let network = MemoryNetwork::default();
    let data = MemoryData::default();
    let replica = start(&network, replica_config("a", &data, first_members(&["a"])))
        .await
        .unwrap();
    let written = replica.propose(put("k", "1", 0)).await.unwrap();
    let newer = Batch {
        format: 127,
        ..Batch::default()
    };
    let entry = Command::new(newer.encode_to_vec());
    // Committed, and then nobody can say what came of it.
    assert!(replica.raft().client_write(entry).await.is_err());
    let failure = wait("the reason", || replica.status().failure).await;
    assert!(failure.contains("upgrade this replica"), "{failure}");
    assert!(replica.propose(put("k", "2", 0)).await.is_err());
    assert!(replica.linearize().await.is_err());
    assert_eq!(value(&replica, "k").unwrap(), "1");
    assert_eq!(
        replica.read(|state| state.revision()),
        written.revision,
        "nothing after the entry is applied"
    );
    replica.shutdown().await;

    let mut config = replica_config("a", &data, Start::Existing);
    config.start_timeout = Duration::from_secs(2);
    let refused = start(&network, config).await.err().unwrap();
    assert!(
        refused.to_string().contains("upgrade this replica"),
        "{refused}"
    );
}
