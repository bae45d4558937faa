//! Encryption between nodes: this node's keys and WireGuard devices, kept equal to what the records say.

mod change;
mod devices;
mod handles;
pub mod keys;
mod peers;
pub mod report;
mod task;
pub mod verify;

pub use devices::{DEVICE_NAMES, Encryption, MARK, left_over, remove_devices};
pub use handles::Handles;
pub use task::run;
