//! What one task tells the others of this node: channels that hold the latest word, each with one task that writes it.

use std::collections::HashSet;

use clustermesh_node_core::ipam::Attachment;
use tokio::sync::watch;

use crate::host::Underlay;
use crate::state_files::NodeFacts;

/// The latest word on this node. What the records say stands in [`crate::records::Reconciler`].
pub struct Signals {
    /// Devices, addresses and MTU of the underlay that the kernel's state is made for. The main loop follows them.
    pub underlay: watch::Sender<Underlay>,
    /// What the server says of this node, by the session or, until that is open, by the last run; `None` until the
    /// server has welcomed this node for the first time.
    pub facts: watch::Sender<Option<NodeFacts>>,
    /// True while a session is open.
    pub connected: watch::Sender<bool>,
    /// Attachments whose endpoints the server has stored, by the session.
    pub registered: watch::Sender<HashSet<Attachment>>,
    /// True while programs of an earlier map layout go on with their maps, by the main loop.
    pub is_taking_over: watch::Sender<bool>,
    /// The WireGuard devices themselves have changed, by the task that keeps them.
    pub wireguard_changes: watch::Sender<()>,
    /// Other nodes are to know of this one's changed devices: the main loop has made the programs know them.
    pub announcements: watch::Sender<()>,
}

impl Signals {
    /// Nothing is known yet but the underlay.
    #[must_use]
    pub fn new(underlay: Underlay) -> Self {
        Self {
            underlay: watch::Sender::new(underlay),
            facts: watch::Sender::new(None),
            connected: watch::Sender::new(false),
            registered: watch::Sender::new(HashSet::new()),
            is_taking_over: watch::Sender::new(false),
            wireguard_changes: watch::Sender::new(()),
            announcements: watch::Sender::new(()),
        }
    }
}
