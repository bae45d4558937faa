//! Asks many addresses at once for an echo: who answers, and how soon.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Asker, EchoSocket};

/// Addresses that are asked at once.
pub const AT_ONCE_MAX: usize = 128;
/// Requests to one address.
pub const REQUESTS_MAX: u32 = 3;
/// Longest wait for the answer to one of them.
pub const ANSWER_MS_MAX: u64 = 1_000;
/// Bytes of a request with its IP header: more than keepalives and handshakes have, so that it can be told from them by
/// count.
pub const PACKET_BYTES: u16 = 548;
/// The host's own routes decide.
const NO_MARK: u32 = 0;

/// Asks each address up to [`REQUESTS_MAX`] times; gives the time to the answer, `None` where there was none. Only the
/// first [`AT_ONCE_MAX`] are asked.
///
/// # Errors
/// The machine gives no raw sockets.
pub async fn ask_all(addresses: &[IpAddr]) -> io::Result<Vec<Option<Duration>>> {
    let addresses = addresses.get(..AT_ONCE_MAX).unwrap_or(addresses);
    let asker = Asker {
        id: rand::random(),
        token: rand::random(),
    };
    let v4 = EchoSocket::open(false, NO_MARK)?;
    // A machine without IPv6 has none.
    let v6 = EchoSocket::open(true, NO_MARK).ok();
    let mut asked = vec![Instant::now(); addresses.len()];
    let mut answers = vec![None; addresses.len()];
    for _ in 0..REQUESTS_MAX {
        for (sequence, ((address, asked), answer)) in
            (0..).zip(addresses.iter().zip(&mut asked).zip(&answers))
        {
            let socket = if address.is_ipv4() {
                Some(&v4)
            } else {
                v6.as_ref()
            };
            if let (Some(socket), None) = (socket, answer) {
                *asked = Instant::now();
                // Who cannot be sent to does not answer.
                let _ = socket.send(*address, PACKET_BYTES, asker, sequence);
            }
        }
        let deadline = tokio::time::Instant::now() + Duration::from_millis(ANSWER_MS_MAX);
        while answers.iter().any(Option::is_none) {
            let sequence = tokio::select! {
                sequence = v4.answer(asker) => sequence?,
                sequence = answer(v6.as_ref(), asker) => sequence?,
                () = tokio::time::sleep_until(deadline) => break,
            };
            let place = usize::from(sequence);
            if let (Some(asked), Some(answer)) = (asked.get(place), answers.get_mut(place)) {
                answer.get_or_insert_with(|| asked.elapsed());
            }
        }
    }
    Ok(answers)
}

async fn answer(socket: Option<&EchoSocket>, asker: Asker) -> io::Result<u16> {
    match socket {
        Some(socket) => socket.answer(asker).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_is_there_answers_and_who_is_not_is_not_waited_for_without_end() {
        let addresses =
            ["127.0.0.1", "240.0.0.1", "127.0.0.9", "::1"].map(|ip| ip.parse().unwrap());
        let begun = Instant::now();
        let answers = ask_all(&addresses).await.unwrap();
        let answered: Vec<bool> = answers.iter().map(Option::is_some).collect();
        assert_eq!(answered, [true, false, true, true]);
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert_eq!(ask_all(&[]).await.unwrap(), []);
    }
}
