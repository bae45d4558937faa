//! Listings, restarts, and steps that failed.

use super::*;

#[test]
fn nothing_is_planned_before_the_listing_is_complete() {
    let mut model = model_of(Tables::default());
    for change in two_clusters() {
        model.apply(change);
    }
    assert!(model.plan().is_empty());
}

#[test]
fn a_restart_over_the_same_kernel_state_plans_nothing() {
    let mut first = listed(two_clusters(), Tables::default());
    settle(&mut first);
    let mut changes = two_clusters();
    changes.reverse();
    let mut again = listed(changes, first.actual().clone());
    assert_eq!(again.plan(), Plan::default());
}

#[test]
fn a_rejected_step_is_planned_again() {
    let mut model = listed(two_clusters(), Tables::default());
    let plan = model.plan();
    for step in plan.steps() {
        model.reject(&step);
    }
    assert_eq!(model.plan(), plan);
}
