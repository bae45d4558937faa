//! Other people's programs and tests as judges of the store: etcd itself, etcdctl, and suites of its clients.

pub mod differential;
pub mod etcdctl;
pub mod group;
pub mod programs;
