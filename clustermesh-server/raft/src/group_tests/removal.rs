//! Replicas that the group removed while they could not hear of it.

use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};

use super::{Group, replica_config, start, wait};
use crate::{
    MemberError, Start, Types,
    error::StartError,
    test_support::{R, put},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_was_removed_and_never_heard_that_this_is_committed_learns_it() {
    let group = Group::three().await;
    group.replicas[0].propose(put("k", "v", 0)).await.unwrap();
    let leader = group.leader(&[0, 1, 2]).await;
    let (removed, stays) = (group.others(leader)[0], group.others(leader)[1]);
    group.replicas[removed].shutdown().await;
    let id = group.replicas[removed].id();
    // A voter that answers late, as under load, counts as down.
    while let Err(error) = group.replicas[stays].remove_member(id).await {
        assert_eq!(error, MemberError::NoQuorum);
    }
    // The leader's last message to it brought the entries, and none came after it.
    let (mut from, mut to) = (
        group.data[leader].log.clone(),
        group.data[removed].log.clone(),
    );
    let state = RaftLogStorage::<Types<R>>::get_log_state(&mut to)
        .await
        .unwrap();
    let missing = state.last_log_id.map_or(0, |last| last.index + 1)..;
    let entries = RaftLogReader::<Types<R>>::try_get_log_entries(&mut from, missing)
        .await
        .unwrap();
    assert!(!entries.is_empty());
    RaftLogStorage::<Types<R>>::append(&mut to, entries, IOFlushed::noop())
        .await
        .unwrap();
    let config = replica_config(group.names[removed], &group.data[removed], Start::Existing);
    match start(&group.network, config).await {
        Err(StartError::Removed { id: found }) => assert_eq!(found, id),
        Err(other) => panic!("{other}"),
        // It was up before it heard.
        Ok(replica) => {
            let failure = wait("the end of the removed replica", || {
                replica.status().failure
            })
            .await;
            assert!(failure.contains("was removed"), "{failure}");
            replica.shutdown().await;
        }
    }
    group.shutdown().await;
}
