//! The join of Services, Workloads, addresses and readiness into endpoint slices and service records.

mod join;
mod render;

pub use join::{Change, SERVICE_RECORD_INTERVAL_MS, ServiceJoin};
