//! Ports that cannot be had, with what to do about it.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;

/// Why `address`, which `key` of the configuration names, cannot be listened on.
#[must_use]
pub fn not_bound(key: &str, address: SocketAddr, error: &Error) -> anyhow::Error {
    let remedy = match error.kind() {
        ErrorKind::AddrInUse => "; another process listens there: stop it, or give another port",
        ErrorKind::AddrNotAvailable => "; give an address of this machine",
        ErrorKind::PermissionDenied => "; give a port from 1024 on, or the right to lower ones",
        _ => "",
    };
    anyhow::anyhow!("{key} {address}: {error}{remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_that_is_taken_is_named_with_what_to_do() {
        let holder = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = holder.local_addr().unwrap();
        let error = tokio::net::TcpListener::bind(address).await.unwrap_err();
        let text = not_bound("listen_client", address, &error).to_string();
        assert!(
            text.starts_with(&format!("listen_client {address}: "))
                && text.ends_with("give another port"),
            "{text}"
        );
    }
}
