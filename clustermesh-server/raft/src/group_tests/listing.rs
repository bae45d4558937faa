//! Members as a replica tells them.

use clustermesh_store::Node;

use super::{Group, url};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_members_is_told_of_by_the_replica_that_answered_it() {
    let group = Group::three().await;
    for round in 0..30_usize {
        let replica = &group.replicas[round % 3];
        let learner = Node {
            peer_url: url("learner"),
            ..Node::default()
        };
        let id = replica.add_member(learner).await.unwrap();
        let known = |id| {
            let status = replica.status();
            status.members.iter().any(|member| member.id == id)
        };
        assert!(known(id), "round {round}: not there");
        replica.remove_member(id).await.unwrap();
        assert!(!known(id), "round {round}: still there");
    }
    group.shutdown().await;
}
