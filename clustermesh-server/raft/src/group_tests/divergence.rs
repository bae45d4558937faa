//! Replicas whose data differs from their group's: found, named, and taken out of service.

use clustermesh_api::etcd::rpc::LeaseGrantRequest;
use clustermesh_core::pb::{
    AuthChange, AuthRoleAdd, AuthUserAdd, Batch, Leader, Proposal, auth_change::Change,
    proposal::Command,
};

use super::*;

/// A change that only this replica makes, as a fault in memory would.
fn damage(replica: &Replica<R>, change: Proposal) {
    let change = Batch::new(Leader::default(), vec![change]);
    let mut applied = replica.shared().applied.write();
    applied.state.apply(&change, 1).unwrap();
}

async fn one_is_taken_out_of_service(group: &Group, damaged: usize, change: Proposal) {
    damage(&group.replicas[damaged], change);
    let others = group.others(damaged);
    let healthy = &group.replicas[others[0]];
    healthy.propose(put("goes on", "v", 0)).await.unwrap();
    let accused = group.replicas[damaged].id();
    let failure = wait("a verdict", || group.replicas[damaged].status().failure).await;
    assert!(failure.contains("differs from its group's"), "{failure}");
    assert_eq!(
        group.replicas[damaged].linearize().await,
        Err(ReadError::Diverged)
    );
    // What it wrote would be answered, and what it saved restored, from the wrong data.
    assert_eq!(
        group.replicas[damaged].propose(put("k", "v", 0)).await,
        Err(ProposeError::Diverged)
    );
    let saved = group.replicas[damaged].backup().await;
    assert!(matches!(saved, Err(ReadError::Diverged)));
    let mut watcher = group.replicas[damaged].watch(everything(1));
    let watched = tokio::time::timeout(PATIENCE, watcher.next()).await;
    assert!(matches!(watched, Ok(Err(WatchEnd::Stopped))));
    group.leader(&others).await;
    for other in &others {
        let replica = &group.replicas[*other];
        replica.linearize().await.unwrap();
        let alarms: Vec<_> = replica.read(|state| state.alarms().collect());
        let named = |alarm: &MemberAlarm| (alarm.member_id, alarm.kind());
        assert_eq!(
            alarms.iter().map(named).collect::<Vec<_>>(),
            [(accused, AlarmKind::Corrupt)]
        );
        assert_eq!(replica.status().failure, None);
    }
    // As in etcd: nothing is written while the alarm stands. It goes with the replica.
    let replica = &group.replicas[others[0]];
    let refused = replica.propose(put("k", "v", 0)).await.unwrap();
    assert_eq!(refused.outcome, Err(KvError::Corrupt));
    replica.remove_member(accused).await.unwrap();
    let taken = replica.propose(put("k", "v", 0)).await.unwrap();
    assert!(taken.outcome.is_ok(), "{taken:?}");
}

fn compares_often(config: &mut ReplicaConfig) {
    config.compare_every = Duration::from_millis(200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_data_differs_is_taken_out_of_service() {
    let group = Group::three_with(compares_often).await;
    let leader = group.leader(&[0, 1, 2]).await;
    group.replicas[leader]
        .propose(put("k", "v", 0))
        .await
        .unwrap();
    group.same_state(&[0, 1, 2]).await;
    let damaged = group.others(leader)[0];
    let change = put("nobody wrote this", "x", 0);
    one_is_taken_out_of_service(&group, damaged, change).await;
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_data_differs_hands_over_and_is_taken_out_of_service() {
    let group = Group::three_with(compares_often).await;
    let leader = group.leader(&[0, 1, 2]).await;
    group.same_state(&[0, 1, 2]).await;
    let change = put("nobody wrote this", "x", 0);
    one_is_taken_out_of_service(&group, leader, change).await;
    group.shutdown().await;
}

fn lease(id: i64) -> Proposal {
    Command::LeaseGrant(LeaseGrantRequest { id, ttl: 600 }).into()
}

fn auth(change: Change) -> Proposal {
    let change = AuthChange {
        change: Some(change),
    };
    Proposal::system(Command::Auth(change))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_only_one_replica_has_takes_it_out_of_service() {
    let group = Group::three_with(compares_often).await;
    let leader = group.leader(&[0, 1, 2]).await;
    group.replicas[leader].propose(lease(7)).await.unwrap();
    group.same_state(&[0, 1, 2]).await;
    let damaged = group.others(leader)[1];
    one_is_taken_out_of_service(&group, damaged, lease(8)).await;
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_that_only_the_leader_has_takes_it_out_of_service() {
    let group = Group::three_with(compares_often).await;
    let leader = group.leader(&[0, 1, 2]).await;
    let role = AuthRoleAdd {
        name: "r".to_owned(),
    };
    let added = group.replicas[leader].propose(auth(Change::RoleAdd(role)));
    assert!(added.await.unwrap().outcome.is_ok());
    group.same_state(&[0, 1, 2]).await;
    let user = AuthUserAdd {
        name: "intruder".to_owned(),
        no_password: true,
        ..AuthUserAdd::default()
    };
    one_is_taken_out_of_service(&group, leader, auth(Change::UserAdd(user))).await;
    group.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_that_come_and_go_while_replicas_are_compared_are_no_difference() {
    let group = Group::three_with(compares_often).await;
    let leader = group.leader(&[0, 1, 2]).await;
    for id in 1..400 {
        let replica = &group.replicas[usize::try_from(id).unwrap() % 3];
        replica.propose(lease(id)).await.unwrap();
    }
    for replica in &group.replicas {
        assert_eq!(replica.status().failure, None);
        assert_eq!(replica.read(|state| state.alarms().count()), 0);
    }
    group.replicas[leader].linearize().await.unwrap();
    group.shutdown().await;
}
