//! What the kernel is told, and tells, of a TCP connection.
#![expect(unsafe_code, reason = "SIOCOUTQ has no safe wrapper")]

use std::io;
use std::os::fd::AsRawFd;

use socket2::SockRef;
use tokio::net::TcpStream;

/// Of what the congestion window does not let out yet, so much waits in the kernel (`TCP_NOTSENT_LOWAT`). More would only
/// make what must not wait (pings, heartbeats, newer events) stand behind megabytes on a link that has become slow.
const UNSENT_BYTES: u32 = 128 << 10;

/// For connections that carry small messages beside large ones.
///
/// # Errors
/// When the kernel does not take an option.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Small messages (events, acknowledgements) must not wait for more.
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES)
}

/// Bytes that were written and that the other end has not acknowledged.
///
/// # Errors
/// When the kernel does not say.
pub fn unacknowledged_bytes(stream: &TcpStream) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open as long as the stream is borrowed; the call writes one int (tcp(7), SIOCOUTQ).
    let told = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if told < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn what_the_other_end_has_no_room_for_is_unacknowledged_until_it_reads() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connecting = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(connecting, listener.accept());
        let (mut client, (mut server, _)) = (client.unwrap(), accepted.unwrap());
        prepare(&server).unwrap();
        assert_eq!(unacknowledged_bytes(&server).unwrap(), 0);
        let piece = [0; 64 << 10];
        let mut written = 0;
        let full = std::time::Duration::from_millis(300);
        while let Ok(count) = tokio::time::timeout(full, server.write(&piece)).await {
            written += count.unwrap();
        }
        let before = unacknowledged_bytes(&server).unwrap();
        assert!(
            before > 0 && (before as usize) < written,
            "{before} of {written}"
        );
        let mut rest = written;
        while rest > 0 {
            rest -= client.read(&mut vec![0; rest]).await.unwrap();
        }
        while unacknowledged_bytes(&server).unwrap() > 0 {
            tokio::task::yield_now().await;
        }
    }
}
