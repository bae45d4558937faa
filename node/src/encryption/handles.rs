//! What keeping keys and devices works with.

use std::sync::Arc;

use rtnetlink::Handle;

use super::devices::Encryption;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::records::Reconciler;
use crate::signals::Signals;

/// What keeping keys and devices works with.
#[derive(Clone)]
pub struct Handles {
    /// Settings.
    pub config: Arc<Config>,
    /// The keys and devices.
    pub encryption: Arc<Encryption>,
    /// Knows the peers; the kernel follows what the devices know.
    pub reconciler: Arc<Reconciler>,
    /// The underlay, whether there is a session, and notice of changed devices.
    pub signals: Arc<Signals>,
    /// Counters.
    pub metrics: Metrics,
    /// To the kernel's network.
    pub netlink: Handle,
}
