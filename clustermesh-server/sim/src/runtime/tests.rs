use openraft_rt::testing::Suite;

use super::{SimRuntime, begin_life, block_on, end_life, spawn_in};

#[test]
fn it_is_what_openraft_expects_of_a_runtime() {
    Suite::<SimRuntime>::test_all();
}

#[test]
fn tasks_end_with_their_life() {
    block_on(1, async {
        let life = begin_life();
        let task = spawn_in(life, std::future::pending::<()>());
        end_life(life);
        assert!(task.await.is_err());
        assert!(spawn_in(life, async {}).await.is_err());
    });
}
