//! Service manager notification: the protocol of `sd_notify(3)`.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Environment variable with the manager's socket: a path, or `@name` for an abstract one.
pub const NOTIFY_SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// Tells the service manager that the process is ready; without a manager it does nothing.
///
/// # Errors
/// When the socket that the environment names cannot be reached.
pub fn notify_ready() -> std::io::Result<()> {
    match std::env::var(NOTIFY_SOCKET_VARIABLE) {
        Ok(socket) if !socket.is_empty() => send(&socket, b"READY=1\n"),
        _ => Ok(()),
    }
}

/// Tells the service manager that the process is ending; without a manager it does nothing.
///
/// # Errors
/// When the socket that the environment names cannot be reached.
pub fn notify_stopping() -> std::io::Result<()> {
    match std::env::var(NOTIFY_SOCKET_VARIABLE) {
        Ok(socket) if !socket.is_empty() => send(&socket, b"STOPPING=1\n"),
        _ => Ok(()),
    }
}

fn send(socket: &str, message: &[u8]) -> std::io::Result<()> {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(message, &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_reaches_a_socket_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        send(path.to_str().unwrap(), b"READY=1\n").unwrap();
        let name = format!("clustermesh-test-{}", std::process::id());
        let by_name =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(&format!("@{name}"), b"READY=1\n").unwrap();
        for socket in [by_path, by_name] {
            let mut buffer = [0; 32];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1\n");
        }
        assert!(send("/nonexistent/notify", b"READY=1\n").is_err());
    }
}
