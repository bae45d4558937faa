//! Faults under load, with real processes: what was acknowledged is there, nothing is told twice or out of order, every
//! replica has the same in the end, and everything goes on once the fault is gone.
//!
//! `cargo test -p clustermesh-integration --test faults leader_alone` runs one scenario.

mod clocks;
mod crashes;
mod disks;
mod partitions;
mod procedures;
mod rolling;
mod support;
