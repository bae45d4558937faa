//! What the agent asks of the kernel's network: links, addresses, routes, neighbours, namespaces.

mod link;
mod namespace;
mod route;
mod sysctl;

use std::io;

pub use link::{
    Link, VethPair, add_address, addresses, create_closed_vxlan, create_veth, delete_link,
    link_by_name, set_link,
};
pub use namespace::{inside, open as open_namespace};
pub use route::{Route, add_neighbour, default_device, delete_route, put_route, routes_of};
pub use sysctl::write as write_sysctl;

use rtnetlink::Handle;

/// A request that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {source}")]
pub struct NetlinkError {
    /// What was tried, with the object's name.
    pub action: String,
    /// What the kernel said.
    pub source: io::Error,
}

impl NetlinkError {
    fn new(action: impl Into<String>, error: rtnetlink::Error) -> Self {
        let source = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other.to_string()),
        };
        Self {
            action: action.into(),
            source,
        }
    }

    /// A failure that netlink did not report itself.
    #[must_use]
    pub fn other(action: impl Into<String>, source: io::Error) -> Self {
        Self {
            action: action.into(),
            source,
        }
    }

    /// The kernel's error number.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }
}

/// A connection to the network namespace of the calling thread.
///
/// # Errors
/// No netlink socket.
pub fn connect() -> Result<Handle, NetlinkError> {
    let (connection, handle, _) = rtnetlink::new_connection()
        .map_err(|error| NetlinkError::other("open a netlink socket", error))?;
    tokio::spawn(connection);
    Ok(handle)
}
