//! System calls that aya does not offer, and the plain-data rule they rest on.

pub(crate) mod bpf;
pub(crate) mod plain;
pub(crate) mod probe;
