//! A TCP transfer between two namespaces, with a check of every byte.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::net::inside;

/// A connection that makes no progress for this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Byte `position` of the stream: a pattern whose period fits no packet size.
fn byte_at(position: usize) -> u8 {
    ((position % 251) ^ ((position / 251) % 241)) as u8
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
    // Before the connection: the other end has patience for packets, not for this.
    let data: Vec<u8> = (0..bytes).map(byte_at).collect();
    let mut stream =
        TcpStream::connect_timeout(&target, PATIENCE).map_err(|e| format!("connect: {e}"))?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .map_err(|e| e.to_string())?;
    stream
        .set_read_timeout(Some(PATIENCE))
        .map_err(|e| e.to_string())?;
    stream.write_all(&data).map_err(|e| format!("write: {e}"))?;
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
        if let Some(wrong) = (0..count).find(|i| buffer[*i] != byte_at(position + i)) {
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
