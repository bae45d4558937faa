//! Every program on single packets: what is dropped and why, what is passed, and what comes out.
//!
//! Frames with less than an IP header are sent for real, see `odd_frames`: the kernel refuses them here.

mod answer;
mod bad;
mod clear;
mod fixture;
mod flow;
mod forward;
mod pass;
