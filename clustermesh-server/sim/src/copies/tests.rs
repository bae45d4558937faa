use clustermesh_core::pb::{Batch, Leader};

use super::*;

fn apply(state: &mut State, revision: i64, changes: Vec<PeerChange>) {
    let copy = Command::PeerCopy(PeerCopy {
        cluster: CLUSTER.to_owned(),
        store_id: STORE_ID,
        revision,
        synced: true,
        changes,
        ..PeerCopy::default()
    });
    let batch = Batch::new(Leader::default(), vec![Proposal::system(copy)]);
    let applied = state.apply(&batch, 1).unwrap();
    assert!(
        applied
            .outcomes
            .iter()
            .all(|outcome| outcome.result.is_ok())
    );
}

#[test]
fn a_copy_that_is_as_its_cursor_says_is_right() {
    let (copies, mut state) = (Copies::default(), State::new());
    copies.check(1, &state).unwrap();
    apply(&mut state, 3, (1..=3).map(change_at).collect());
    copies.check(1, &state).unwrap();
    apply(&mut state, 9, (4..=9).map(change_at).collect());
    copies.check(1, &state).unwrap();
}

#[test]
fn a_cursor_ahead_of_its_records_is_found() {
    let (copies, mut state) = (Copies::default(), State::new());
    apply(&mut state, 9, (1..=4).map(change_at).collect());
    let fault = copies.check(1, &state).unwrap_err();
    assert!(fault.contains("the cursor of a copy is at 9"), "{fault}");
}

#[test]
fn a_cursor_that_goes_back_is_found_in_one_life() {
    let (copies, mut state) = (Copies::default(), State::new());
    apply(&mut state, 9, (1..=9).map(change_at).collect());
    copies.check(1, &state).unwrap();
    let mut older = State::new();
    apply(&mut older, 3, (1..=3).map(change_at).collect());
    let fault = copies.check(1, &older).unwrap_err();
    assert!(fault.contains("went back from 9 to 3"), "{fault}");
    // After a crash a replica begins with what it has.
    copies.check(2, &older).unwrap();
}
