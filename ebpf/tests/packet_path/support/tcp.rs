//! A TCP transfer between two namespaces, with a check of every byte.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::time::Duration;

use super::net::inside;

/// A connection that makes no progress for this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Bytes after which the pattern repeats: they fit no packet size.
const PERIOD: usize = 251 * 241;
/// What the stream is made of, again and again.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let byte_at = |position| ((position % 251) ^ (position / 251)) as u8;
    (0..PERIOD).map(byte_at).collect()
});

/// The stream from `position` on, as far as the pattern goes in one piece.
fn pattern_from(position: usize) -> &'static [u8] {
    &PATTERN[position % PERIOD..]
}

/// The first place at which `bytes` are not the stream's from `position` on.
fn first_wrong(bytes: &[u8], position: usize) -> Option<usize> {
    let mut checked = 0;
    while checked < bytes.len() {
        let wanted = pattern_from(position + checked);
        let found = &bytes[checked..];
        let together = wanted.len().min(found.len());
        if wanted[..together] != found[..together] {
            let same = wanted.iter().zip(found).take_while(|(w, f)| w == f);
            return Some(checked + same.count());
        }
        checked += together;
    }
    None
}

/// Sends `bytes` from one namespace to an address in another and back the number received.
///
/// # Errors
/// What failed, for people.
pub fn transfer(from: &str, to: &str, address: IpAddr, bytes: usize) -> Result<(), String> {
    let listener = inside(to, || TcpListener::bind(SocketAddr::new(address, 0)))
        .map_err(|e| format!("bind: {e}"))?;
    let target = listener.local_addr().map_err(|e| e.to_string())?;
    std::thread::scope(|scope| {
        let server = scope.spawn(move || receive(&listener, bytes));
        let sent = inside(from, || send(target, bytes));
        let received = server
            .join()
            .unwrap_or_else(|_| Err("the receiver panicked".to_owned()));
        match (sent, received) {
            (Ok(()), Ok(())) => Ok(()),
            (sent, received) => Err(format!("sender: {sent:?}, receiver: {received:?}")),
        }
    })
}

fn send(target: SocketAddr, bytes: usize) -> Result<(), String> {
    let mut stream =
        TcpStream::connect_timeout(&target, PATIENCE).map_err(|e| format!("connect: {e}"))?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .map_err(|e| e.to_string())?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .map_err(|e| e.to_string())?;
    let mut position = 0;
    while position < bytes {
        let piece = pattern_from(position);
        let piece = &piece[..piece.len().min(bytes - position)];
        stream.write_all(piece).map_err(|e| format!("write: {e}"))?;
        position += piece.len();
    }
    let mut answer = [0; 8];
    stream
        .read_exact(&mut answer)
        .map_err(|e| format!("read of the answer: {e}"))?;
    if u64::from_be_bytes(answer) == bytes as u64 {
        Ok(())
    } else {
        Err("the receiver counted differently".to_owned())
    }
}

fn receive(listener: &TcpListener, bytes: usize) -> Result<(), String> {
    let mut stream = accept(listener)?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .map_err(|e| e.to_string())?;
    let mut buffer = vec![0; 1 << 16];
    let mut position = 0;
    while position < bytes {
        let count = stream
            .read(&mut buffer)
            .map_err(|e| format!("read at {position}: {e}"))?;
        if count == 0 {
            return Err(format!("the stream ended at {position}"));
        }
        if let Some(wrong) = first_wrong(&buffer[..count], position) {
            return Err(format!("byte {} is wrong", position + wrong));
        }
        position += count;
    }
    stream
        .write_all(&(position as u64).to_be_bytes())
        .map_err(|e| format!("answer: {e}"))
}

/// Accepts within [`PATIENCE`]; a listener has no timeout of its own.
fn accept(listener: &TcpListener) -> Result<TcpStream, String> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(PATIENCE).map_err(|e| e.to_string())?;
    match poll(&mut waiting, timeout) {
        Ok(0) => Err("nobody connected".to_owned()),
        Ok(_) => listener
            .accept()
            .map(|(stream, _)| stream)
            .map_err(|e| format!("accept: {e}")),
        Err(error) => Err(format!("poll: {error}")),
    }
}

#[test]
fn one_wrong_byte_is_found_wherever_the_pattern_begins() {
    let stream: Vec<u8> = PATTERN.iter().cycle().take(3 * PERIOD).copied().collect();
    for (start, length) in [(0, 5), (PERIOD - 2, 5), (7, 2 * PERIOD)] {
        let mut bytes = stream[start..start + length].to_vec();
        assert_eq!(first_wrong(&bytes, start), None);
        for wrong in [0, 2, length - 1] {
            bytes[wrong] ^= 1;
            assert_eq!(first_wrong(&bytes, start), Some(wrong));
            bytes[wrong] ^= 1;
        }
    }
}
