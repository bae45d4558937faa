//! Records of the mesh on their way into the kernel: the stream that brings them, and the rounds of map calls.

pub mod reconcile;
pub mod stream;
