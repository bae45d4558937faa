//! Tests of the programs on packets: one by one, and with real traffic between namespaces. They need root.
#![expect(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "helpers of tests fail the test; numbers are the tests' own"
)]

mod encrypted;
mod host;
mod kernel_vxlan;
mod odd_frames;
mod packets;
mod support;
mod tunnel;
