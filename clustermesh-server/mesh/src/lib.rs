//! Pure mesh decisions: allocation, claims, service join, peer copies.
//!
//! Everything here reads a [`View`] of the store and hands out a [`Txn`] (or a list of changes) to be proposed;
//! guards in the transaction say what must still be true when it is applied. Time comes in as a parameter.

pub mod address;
pub mod allocate;
pub mod claims;
pub mod manifests;
pub mod peering;
pub mod services;
pub mod settings;

mod draft;
mod holders;
mod index;
mod keys;
mod step;
#[cfg(test)]
mod test_support;
mod txn;
mod view;

pub use draft::Draft;
pub use index::ClusterIndex;
pub use settings::{ClusterSettings, SettingsError};
pub use step::{MAX_STEP_WRITES, Step};
pub use txn::{Guard, Txn, prefix_end};
pub use view::{Kv, MapView, View};
