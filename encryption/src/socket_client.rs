//! The asking side of a control socket: connections that never wait without end.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clustermesh_encryption_core::secret_text::SecretText;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use zeroize::Zeroizing;

/// Longest answer, bytes: 65,536 peers with a few prefixes each.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Bytes that are read at once.
const READ_BYTES: usize = 8_192;

/// Where the device `name` has its socket.
#[must_use]
pub(crate) fn socket_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

/// Connects without waiting: a server that takes no connections any more, with a full queue, is one that hangs.
pub(crate) fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?).map_err(|error| match error {
        Errno::EAGAIN => io::ErrorKind::TimedOut.into(),
        error => io::Error::from(error),
    })?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// What is left until then; an error when that is nothing.
fn time_left(deadline: Instant) -> io::Result<Option<Duration>> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(Some(left)),
    }
}

/// One request and its answer, up to the empty line, all of it by the deadline.
pub(crate) fn ask(socket: &Path, request: &[u8], deadline: Instant) -> io::Result<SecretText> {
    let mut stream = connect_now(socket)?;
    let mut rest = request;
    while !rest.is_empty() {
        stream.set_write_timeout(time_left(deadline)?)?;
        let count = match stream.write(rest) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        rest = rest.get(count..).unwrap_or_default();
    }
    let mut answer = SecretText::default();
    let mut room = Zeroizing::new([0; READ_BYTES]);
    loop {
        stream.set_read_timeout(time_left(deadline)?)?;
        let count = match stream.read(&mut room[..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if count == 0 && answer.as_bytes().is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        answer.push(room.get(..count).unwrap_or_default());
        if count == 0 || answer.as_bytes().ends_with(b"\n\n") {
            return Ok(answer);
        }
        if answer.as_bytes().len() > ANSWER_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("an answer of more than {ANSWER_BYTES_MAX} bytes"),
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_takes_no_connections_any_more_is_silent() {
        let dir = tempfile::tempdir().unwrap();
        let path = socket_of(dir.path(), "cmwg-none");
        let flags = SockFlag::SOCK_CLOEXEC;
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        let queue = nix::sys::socket::Backlog::new(1).unwrap();
        nix::sys::socket::listen(&listener, queue).unwrap();
        let mut waiting = Vec::new();
        let error = loop {
            match connect_now(&path) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break error,
            }
            assert!(waiting.len() < 100, "the queue does not fill");
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
