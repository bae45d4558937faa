//! The lab, the demo, scenarios and benchmarks: real processes in network namespaces.

pub mod lab;
pub mod traffic;
