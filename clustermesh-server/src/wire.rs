//! What the servers of a group tell each other beside Raft (news.proto), and for how long it holds.

use std::time::Duration;

include!(concat!(env!("OUT_DIR"), "/clustermesh.server.v1.rs"));

/// A replica that said nothing for so long counts as gone, with all that it told.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(3);
