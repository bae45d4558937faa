//! The lab, the demo, scenarios and benchmarks with real processes.
