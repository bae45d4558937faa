//! The lab, the demo, scenarios and benchmarks: real processes in network namespaces.

pub mod bench;
pub mod demo;
pub mod encryption;
pub mod history;
pub mod judges;
pub mod lab;
pub mod scenario;
pub mod traffic;
