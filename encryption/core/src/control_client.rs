//! The client's half of the control socket's text (www.wireguard.com/xplatform): requests written, answers read.

use std::fmt::Write as _;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::config::{Change, DeviceConfig, PeerChange, PeerConfig, canonical};
use crate::control::{
    COUNTER_PREFIX, ERRORS, HANDSHAKES, OWN_PUBLIC_KEY, PeerStatus, RECEIVED_DATA,
};
use crate::key::{KEY_BYTES, PresharedKey, PrivateKey, PublicKey, from_hex, to_hex};
use crate::secret_text::SecretText;

/// The question for configuration and status, with all keys.
pub const GET: &str = "get=1\n\n";
/// The same without secrets, which only a device of ours understands.
pub const GET_STATUS: &str = "get=status\n\n";
/// Asks a device of ours to answer when all packets that wait in it now have passed.
pub const FENCE: &str = "fence=1\n\n";

/// Why an answer is not understood, or what the device says it cannot do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// The device refused; a number of `errno(3)`.
    #[error("the device refuses it with error number {0}")]
    Refused(i32),
    /// A line that is not understood.
    #[error("the device's answer has a bad line at {key:?}")]
    BadLine {
        /// What stands before the equals sign.
        key: String,
    },
    /// The answer ends before its `errno`.
    #[error("the device's answer is not complete")]
    Incomplete,
}

/// What a device says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Its configuration; without secrets where they were not asked for.
    pub config: DeviceConfig,
    /// The public key that belongs to its private key.
    pub public_key: Option<PublicKey>,
    /// What is known of each peer, in the order of `config.peers`.
    pub peers: Vec<PeerStatus>,
    /// What a device of ours counts, by name.
    pub counters: Vec<(String, u64)>,
}

/// The request that takes these steps, with the empty line at its end.
#[must_use]
pub fn set_request(changes: &[Change]) -> SecretText {
    let mut text = SecretText::default();
    text.push(b"set=1\n");
    let mut line = |key: &str, value: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{key}={value}");
    };
    // Lines behind a peer's are the peer's: what concerns the device goes first.
    for change in changes {
        match change {
            Change::PrivateKey(key) => {
                let none = [0; KEY_BYTES];
                let bytes = key.as_ref().map_or(&none, PrivateKey::bytes);
                line("private_key", &Zeroizing::new(to_hex(bytes)));
            }
            Change::ListenPort(port) => line("listen_port", &port.to_string()),
            Change::Fwmark(mark) => line("fwmark", &mark.to_string()),
            Change::RemoveAllPeers => line("replace_peers", "true"),
            Change::RemovePeer(_) | Change::Peer(_) => {}
        }
    }
    for change in changes {
        match change {
            Change::RemovePeer(key) => {
                line("public_key", &to_hex(&key.0));
                line("remove", "true");
            }
            Change::Peer(change) => peer_lines(change, &mut line),
            _ => {}
        }
    }
    text.push(b"\n");
    text
}

fn peer_lines(change: &PeerChange, line: &mut impl FnMut(&str, &str)) {
    line("public_key", &to_hex(&change.public_key.0));
    if change.update_only {
        line("update_only", "true");
    }
    if let Some(key) = &change.preshared_key {
        let none = [0; KEY_BYTES];
        let bytes = key.as_ref().map_or(&none, PresharedKey::bytes);
        line("preshared_key", &Zeroizing::new(to_hex(bytes)));
    }
    if let Some(endpoint) = change.endpoint {
        line("endpoint", &endpoint.to_string());
    }
    if let Some(seconds) = change.persistent_keepalive_seconds {
        line("persistent_keepalive_interval", &seconds.to_string());
    }
    if change.replace_allowed_ips {
        line("replace_allowed_ips", "true");
    }
    for prefix in &change.remove_allowed_ips {
        line("allowed_ip", &format!("-{prefix}"));
    }
    for prefix in &change.add_allowed_ips {
        line("allowed_ip", &prefix.to_string());
    }
}

/// Reads the answer to [`GET`] or [`GET_STATUS`].
///
/// # Errors
/// When the device refused, or the answer is not understood.
pub fn read_description(answer: &str) -> Result<Description, AnswerError> {
    let mut description = Description::default();
    let mut handshake = Duration::ZERO;
    for line in answer.lines() {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let bad = || AnswerError::BadLine {
            key: key.chars().take(64).collect(),
        };
        match key {
            "errno" => {
                let number: i32 = value.parse().map_err(|_| bad())?;
                return match number {
                    0 => Ok(description),
                    // Some devices say it as a negative number.
                    number => Err(AnswerError::Refused(number.saturating_abs())),
                };
            }
            "public_key" => {
                let key = PublicKey(from_hex(value).map_err(|_| bad())?);
                description.config.peers.push(PeerConfig::new(key));
                description.peers.push(PeerStatus::default());
                handshake = Duration::ZERO;
            }
            _ => {
                let peer = description.config.peers.last_mut();
                match peer.zip(description.peers.last_mut()) {
                    Some((peer, status)) => {
                        read_peer_line(key, value, peer, status, &mut handshake)
                    }
                    None => read_device_line(key, value, &mut description),
                }
                .ok_or_else(bad)?;
            }
        }
    }
    Err(AnswerError::Incomplete)
}

/// Reads the answer to a change.
///
/// # Errors
/// When the device refused it, or the answer is not understood.
pub fn read_result(answer: &str) -> Result<(), AnswerError> {
    read_description(answer).map(drop)
}

/// `None` for a bad value; what is not known is passed over: newer devices say more.
fn read_device_line(key: &str, value: &str, description: &mut Description) -> Option<()> {
    let config = &mut description.config;
    if let Some(name) = key.strip_prefix(COUNTER_PREFIX) {
        description
            .counters
            .push((name.to_owned(), value.parse().ok()?));
        return Some(());
    }
    match key {
        "private_key" => {
            let bytes = Zeroizing::new(from_hex(value).ok()?);
            config.private_key = (*bytes != [0; KEY_BYTES]).then(|| PrivateKey::from_bytes(*bytes));
            description.public_key = config.private_key.as_ref().map(PrivateKey::public);
        }
        OWN_PUBLIC_KEY => {
            description.public_key = Some(PublicKey(from_hex(value).ok()?));
        }
        "listen_port" => config.listen_port = value.parse().ok()?,
        "fwmark" => config.fwmark = value.parse().ok()?,
        _ => {}
    }
    Some(())
}

fn read_peer_line(
    key: &str,
    value: &str,
    peer: &mut PeerConfig,
    status: &mut PeerStatus,
    handshake: &mut Duration,
) -> Option<()> {
    match key {
        "preshared_key" => {
            let bytes = Zeroizing::new(from_hex(value).ok()?);
            peer.preshared_key = PresharedKey::from_bytes(*bytes);
        }
        "endpoint" => {
            peer.endpoint = Some(value.parse().ok()?);
            status.endpoint = peer.endpoint;
        }
        "persistent_keepalive_interval" => {
            let seconds: u16 = value.parse().ok()?;
            peer.persistent_keepalive_seconds = (seconds > 0).then_some(seconds);
        }
        "allowed_ip" => {
            peer.allowed_ips.insert(canonical(value.parse().ok()?));
        }
        "last_handshake_time_sec" => *handshake = Duration::from_secs(value.parse().ok()?),
        "last_handshake_time_nsec" => {
            let nanoseconds: u32 = value.parse().ok()?;
            let time = *handshake + Duration::from_nanos(nanoseconds.into());
            status.last_handshake = (!time.is_zero()).then_some(time);
        }
        "tx_bytes" => status.tx_bytes = value.parse().ok()?,
        "rx_bytes" => status.rx_bytes = value.parse().ok()?,
        RECEIVED_DATA => status.received_data = Some(value.parse().ok()?),
        HANDSHAKES => status.handshakes = Some(value.parse().ok()?),
        ERRORS => status.errors = Some(value.parse().ok()?),
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::control::{Request, Secrets, describe, parse};
    use crate::difference::difference;

    fn peer(number: u8) -> PeerConfig {
        PeerConfig {
            preshared_key: PresharedKey::from_bytes([number; 32]),
            endpoint: Some(([192, 0, 2, number], 51_871).into()),
            persistent_keepalive_seconds: Some(25),
            allowed_ips: [format!("10.0.{number}.0/24").parse().unwrap()].into(),
            ..PeerConfig::new(PublicKey([number; 32]))
        }
    }

    fn device() -> DeviceConfig {
        DeviceConfig {
            private_key: Some(PrivateKey::from_bytes([9; 32])),
            listen_port: 51_871,
            fwmark: 0xe00,
            peers: vec![peer(1), peer(2)],
        }
    }

    #[test]
    fn what_a_client_writes_a_device_understands_and_says_back() {
        let mut wanted = device();
        let mut config = Config::default();
        for _ in 0..2 {
            let changes = difference(&config.to_device(), &wanted).unwrap();
            let Ok(Request::Set(read)) = parse(set_request(&changes).as_str()) else {
                panic!("{changes:?}");
            };
            // Behind a removed peer's line there is room for changes of one that is not there.
            let read: Vec<Change> = read
                .into_iter()
                .filter(|change| !matches!(change, Change::Peer(peer) if peer.update_only))
                .collect();
            assert_eq!(read, changes);
            for change in &read {
                config.apply(change).unwrap();
            }
            let status = PeerStatus {
                endpoint: Some(([192, 0, 2, 77], 7).into()),
                last_handshake: Some(Duration::new(5, 6)),
                rx_bytes: 7,
                tx_bytes: 8,
                ..PeerStatus::default()
            };
            let say = |secrets, status: PeerStatus| {
                let mut text = SecretText::default();
                describe(
                    &config,
                    config.listen_port(),
                    secrets,
                    |_| status,
                    &mut text,
                );
                text.push(b"errno=0\n\n");
                read_description(text.as_str()).unwrap()
            };
            let said = say(Secrets::Told, status);
            assert!(said.peers.iter().all(|peer| *peer == status));
            let counted = PeerStatus {
                received_data: Some(9),
                handshakes: Some(10),
                errors: Some(11),
                ..status
            };
            let known = say(Secrets::Kept, counted);
            assert!(known.peers.iter().all(|peer| *peer == counted));
            assert_eq!(known.public_key, said.public_key);
            assert!(known.public_key.is_some() && known.config.private_key.is_none());
            let mut expected = wanted.clone();
            for peer in &mut expected.peers {
                // Where it was heard from, not where it was looked for.
                peer.endpoint = status.endpoint;
            }
            assert_eq!(said.config, expected);
            // One goes, one loses a prefix and a secret, one comes.
            wanted.peers.remove(0);
            wanted.peers[0].allowed_ips.clear();
            wanted.peers[0].preshared_key = None;
            wanted.peers.push(peer(3));
        }
    }

    #[test]
    fn refusals_and_nonsense_are_told_apart() {
        assert_eq!(read_result("errno=0\n\n"), Ok(()));
        assert_eq!(read_result("errno=-98\n\n"), Err(AnswerError::Refused(98)));
        assert_eq!(read_result(""), Err(AnswerError::Incomplete));
        let counted = read_description("counter.no_peer=7\nerrno=0\n").unwrap();
        assert_eq!(counted.counters, [("no_peer".to_owned(), 7)]);
        let bad = read_description("listen_port=x\nerrno=0\n");
        let key = "listen_port".to_owned();
        assert_eq!(bad, Err(AnswerError::BadLine { key }));
    }

    #[test]
    fn no_secret_is_in_what_is_printed() {
        let shown = format!("{:?}", device());
        assert!(!shown.contains("09, 9") && !shown.contains("[9"), "{shown}");
    }
}
