//! What a leader decided in one term does not come after what its successor did.

use super::Group;
use crate::{ProposeError, test_support::put};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_in_a_term_is_not_proposed_in_a_later_one() {
    let group = Group::three().await;
    let first = group.leader(&[0, 1, 2]).await;
    let leader = &group.replicas[first];
    let term = leader.leading_term().unwrap();
    leader
        .propose_in_term(term, put("k", "1", 0))
        .await
        .unwrap();
    let second = group.others(first)[0];
    let to = group.replicas[second].id();
    leader.transfer_leader(to).await.unwrap();
    assert_eq!(group.leader(&[0, 1, 2]).await, second);
    assert_eq!(leader.leading_term(), None);
    let refused = leader.propose_in_term(term, put("k", "2", 0)).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { .. })));
    group.replicas[second]
        .transfer_leader(leader.id())
        .await
        .unwrap();
    assert_eq!(group.leader(&[0, 1, 2]).await, first);
    // It leads again, and another one has led meanwhile.
    let refused = leader.propose_in_term(term, put("k", "2", 0)).await;
    assert!(matches!(refused, Err(ProposeError::NotLeader { .. })));
    leader.propose_as_leader(put("k", "3", 0)).await.unwrap();
    let term = leader.leading_term().unwrap();
    let told = leader
        .propose_in_term(term, put("k", "4", 0))
        .await
        .unwrap();
    assert_eq!((told.term, told.revision), (term, 4));
    group.shutdown().await;
}
