//! Records of the mesh on their way into the kernel: the stream that brings them, the model of them, the map calls.

mod reconciler;
mod stream;
mod workloads;

pub use reconciler::{Applied, RETRY_AFTER, Reconciler, read_tables};
pub use stream::{Follower, Sinks};
pub use workloads::{WORKLOAD_WAIT, Workloads};
