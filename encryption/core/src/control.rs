//! The text of the cross-platform control socket (www.wireguard.com/xplatform): requests in, answers out.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use zeroize::Zeroizing;

use crate::config::{Change, Config, PeerChange, canonical};
use crate::key::{PresharedKey, PrivateKey, PublicKey, from_hex, to_hex};
use crate::secret_text::SecretText;

/// Longest request, bytes: some 30,000 peers.
pub const REQUEST_BYTES_MAX: usize = 16 << 20;

/// What stands before the names of counters of ours in an answer; other programs pass such lines over.
pub const COUNTER_PREFIX: &str = "counter.";
/// What stands before our public key in an answer without secrets.
pub const OWN_PUBLIC_KEY: &str = "own_public_key";
/// What stands before the number of times that packets came from a peer.
pub const RECEIVED_DATA: &str = "received_data";
/// What stands before the number of handshakes with a peer.
pub const HANDSHAKES: &str = "handshakes";
/// What stands before the number of a peer's packets and datagrams that did not pass.
pub const ERRORS: &str = "errors";
/// A bad value (`EINVAL`).
pub const EINVAL: i32 = 22;
/// The device cannot do it now (`EIO`).
pub const EIO: i32 = 5;
/// A request that is none (`EPROTO`).
pub const EPROTO: i32 = 71;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Configuration and status.
    Get(Secrets),
    /// Change in these steps.
    Set(Vec<Change>),
    /// An addition of ours: to be answered when all packets that wait in the device now have passed.
    Fence,
}

/// Whether an answer has private and preshared keys in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrets {
    /// As the protocol has it.
    Told,
    /// An addition of ours: who only looks how things are needs none.
    Kept,
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Neither `get=1` nor `set=1`.
    #[error("a request begins with get=1 or set=1")]
    NoRequest,
    /// A line that is not understood.
    #[error("{key}: bad value or place")]
    BadLine {
        /// What stands before the equals sign.
        key: String,
    },
}

impl ControlError {
    /// The number for `errno=`.
    #[must_use]
    pub const fn errno(&self) -> i32 {
        match self {
            Self::NoRequest => EPROTO,
            Self::BadLine { .. } => EINVAL,
        }
    }
}

/// Reads a request, without the empty line at its end.
///
/// # Errors
/// When it is not understood; nothing must be changed then.
pub fn parse(request: &str) -> Result<Request, ControlError> {
    let mut lines = request.lines().filter(|line| !line.is_empty());
    match lines.next() {
        Some("get=1") if lines.next().is_none() => Ok(Request::Get(Secrets::Told)),
        Some("get=status") if lines.next().is_none() => Ok(Request::Get(Secrets::Kept)),
        Some("fence=1") if lines.next().is_none() => Ok(Request::Fence),
        Some("set=1") => {
            let mut changes = Vec::new();
            let mut peer = None;
            for line in lines {
                let (key, value) = line.split_once('=').unwrap_or((line, ""));
                step(key, value, &mut changes, &mut peer).ok_or_else(|| ControlError::BadLine {
                    key: key.chars().take(64).collect(),
                })?;
            }
            changes.extend(peer.map(Change::Peer));
            Ok(Request::Set(changes))
        }
        _ => Err(ControlError::NoRequest),
    }
}

/// One line of a change; `None` if it is bad.
fn step(
    key: &str,
    value: &str,
    changes: &mut Vec<Change>,
    peer: &mut Option<PeerChange>,
) -> Option<()> {
    if key == "public_key" {
        let public_key = PublicKey(from_hex(value).ok()?);
        changes.extend(peer.replace(PeerChange::new(public_key)).map(Change::Peer));
        return Some(());
    }
    if let Some(change) = peer {
        if key == "remove" {
            let gone = change.public_key;
            (value == "true").then_some(())?;
            changes.push(Change::RemovePeer(gone));
            // What follows of this peer is about one that is gone.
            change.update_only = true;
            return Some(());
        }
        return peer_step(key, value, change);
    }
    changes.push(match key {
        "private_key" => {
            let bytes = Zeroizing::new(from_hex(value).ok()?);
            Change::PrivateKey((*bytes != [0; 32]).then(|| PrivateKey::from_bytes(*bytes)))
        }
        "listen_port" => Change::ListenPort(value.parse().ok()?),
        "fwmark" => Change::Fwmark(value.parse().ok()?),
        "replace_peers" if value == "true" => Change::RemoveAllPeers,
        _ => return None,
    });
    Some(())
}

fn peer_step(key: &str, value: &str, change: &mut PeerChange) -> Option<()> {
    match key {
        "update_only" => {
            (value == "true").then_some(())?;
            change.update_only = true;
        }
        "preshared_key" => {
            change.preshared_key = Some(PresharedKey::from_bytes(from_hex(value).ok()?));
        }
        "endpoint" => change.endpoint = Some(value.parse::<SocketAddr>().ok()?),
        "persistent_keepalive_interval" => {
            change.persistent_keepalive_seconds = Some(value.parse().ok()?);
        }
        "replace_allowed_ips" => {
            (value == "true").then_some(())?;
            change.replace_allowed_ips = true;
            change.add_allowed_ips.clear();
        }
        "allowed_ip" => {
            let (value, list) = match value.strip_prefix('-') {
                Some(value) => (value, &mut change.remove_allowed_ips),
                None => (value, &mut change.add_allowed_ips),
            };
            let (address, length) = value.split_once('/')?;
            let prefix = IpNetwork::new(address.parse().ok()?, length.parse().ok()?).ok()?;
            list.push(canonical(prefix));
        }
        "protocol_version" => (value == "1").then_some(())?,
        _ => return None,
    }
    Some(())
}

/// What is known of a peer beside its configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerStatus {
    /// Where it is.
    pub endpoint: Option<SocketAddr>,
    /// Last finished handshake, since the Unix epoch.
    pub last_handshake: Option<Duration>,
    /// Bytes received in authentic messages.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Grows with every arrival of packets, not with keepalives and handshakes; `None`: the device does not count them.
    pub received_data: Option<u64>,
    /// Finished handshakes; `None`: the device does not count them.
    pub handshakes: Option<u64>,
    /// Packets to and datagrams from the peer that did not pass; `None`: the device does not count them.
    pub errors: Option<u64>,
}

/// Appends the answer to `get=1`, or to `get=status`, without `errno`.
pub fn describe(
    config: &Config,
    listen_port: u16,
    secrets: Secrets,
    status: impl Fn(&PublicKey) -> PeerStatus,
    text: &mut SecretText,
) {
    let mut line = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{key}={value}");
    };
    match (config.private_key(), secrets) {
        (Some(key), Secrets::Told) => {
            line("private_key", &*Zeroizing::new(to_hex(key.bytes())));
        }
        (Some(key), Secrets::Kept) => line(OWN_PUBLIC_KEY, &to_hex(&key.public().0)),
        (None, _) => {}
    }
    if listen_port != 0 {
        line("listen_port", &listen_port);
    }
    if config.fwmark() != 0 {
        line("fwmark", &config.fwmark());
    }
    for peer in config.peers() {
        let status = status(&peer.public_key);
        line("public_key", &to_hex(&peer.public_key.0));
        if secrets == Secrets::Told {
            let none = [0; 32];
            let key = peer.preshared_key.as_ref();
            let key = Zeroizing::new(to_hex(key.map_or(&none, PresharedKey::bytes)));
            line("preshared_key", &*key);
        }
        line("protocol_version", &1);
        if let Some(endpoint) = status.endpoint {
            line("endpoint", &endpoint);
        }
        let handshake = status.last_handshake.unwrap_or_default();
        line("last_handshake_time_sec", &handshake.as_secs());
        line("last_handshake_time_nsec", &handshake.subsec_nanos());
        line("tx_bytes", &status.tx_bytes);
        line("rx_bytes", &status.rx_bytes);
        if secrets == Secrets::Kept {
            for (key, count) in [
                (RECEIVED_DATA, status.received_data),
                (HANDSHAKES, status.handshakes),
                (ERRORS, status.errors),
            ] {
                if let Some(count) = count {
                    line(key, &count);
                }
            }
        }
        let keepalive = peer.persistent_keepalive_seconds.unwrap_or(0);
        line("persistent_keepalive_interval", &keepalive);
        for prefix in &peer.allowed_ips {
            line("allowed_ip", prefix);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(lines: &[&str]) -> String {
        lines.join("\n")
    }

    #[test]
    fn what_is_set_is_got() {
        let key = "0a".repeat(32);
        let peer = "0b".repeat(32);
        let private = format!("private_key={key}");
        let public = format!("public_key={peer}");
        let text = request(&[
            "set=1",
            &private,
            "listen_port=51871",
            "fwmark=7",
            "replace_peers=true",
            &public,
            "endpoint=[2001:db8::1]:51871",
            "persistent_keepalive_interval=25",
            "replace_allowed_ips=true",
            "allowed_ip=10.1.2.3/16",
            "allowed_ip=fd00::/64",
            "protocol_version=1",
        ]);
        let Ok(Request::Set(changes)) = parse(&text) else {
            panic!("{text}");
        };
        let mut config = Config::default();
        for change in &changes {
            config.apply(change).unwrap();
        }
        let status = |key: &PublicKey| PeerStatus {
            endpoint: config.peer(key).and_then(|peer| peer.endpoint),
            last_handshake: Some(Duration::new(5, 6)),
            rx_bytes: 1,
            tx_bytes: 2,
            received_data: Some(3),
            handshakes: Some(4),
            errors: Some(5),
        };
        let private = to_hex(PrivateKey::from_bytes([10; 32]).bytes());
        let mut got = SecretText::default();
        describe(&config, 51_871, Secrets::Told, status, &mut got);
        let mut told = SecretText::default();
        describe(&config, 51_871, Secrets::Kept, status, &mut told);
        let secret = ["private_key", "preshared_key", &private];
        assert!(!secret.iter().any(|word| told.as_str().contains(word)));
        let public = to_hex(&PrivateKey::from_bytes([10; 32]).public().0);
        assert!(
            told.as_str()
                .starts_with(&format!("own_public_key={public}\n"))
        );
        let counts = "\nreceived_data=3\nhandshakes=4\nerrors=5\n";
        assert!(told.as_str().contains(counts));
        let none = "0".repeat(64);
        assert_eq!(
            got.as_str(),
            format!(
                "private_key={private}\nlisten_port=51871\nfwmark=7\npublic_key={peer}\npreshared_key={none}\n\
                 protocol_version=1\nendpoint=[2001:db8::1]:51871\nlast_handshake_time_sec=5\n\
                 last_handshake_time_nsec=6\ntx_bytes=2\nrx_bytes=1\npersistent_keepalive_interval=25\n\
                 allowed_ip=10.1.0.0/16\nallowed_ip=fd00::/64\n"
            )
        );
    }

    #[test]
    fn a_peer_is_removed_and_prefixes_go_one_by_one() {
        let public = format!("public_key={}", "0b".repeat(32));
        let Ok(Request::Set(changes)) = parse(&request(&["set=1", &public, "remove=true"])) else {
            panic!();
        };
        assert_eq!(changes[0], Change::RemovePeer(PublicKey([11; 32])));
        let Ok(Request::Set(changes)) =
            parse(&request(&["set=1", &public, "allowed_ip=-10.0.0.0/8"]))
        else {
            panic!();
        };
        let mut expected = PeerChange::new(PublicKey([11; 32]));
        expected.remove_allowed_ips = vec!["10.0.0.0/8".parse().unwrap()];
        assert_eq!(changes, [Change::Peer(expected)]);
    }

    #[test]
    fn bad_requests_are_refused_with_their_number() {
        assert_eq!(parse("hello").unwrap_err().errno(), EPROTO);
        for line in [
            "private_key=12",
            "listen_port=65536",
            "allowed_ip=10.0.0.0/8",
            "nonsense=1",
            "replace_peers=yes",
        ] {
            let error = parse(&request(&["set=1", line])).unwrap_err();
            assert_eq!(error.errno(), EINVAL, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "(get=1\n|set=1\n)?([a-z_]{1,20}=[0-9a-f:./-]{0,70}\n){0,8}") {
            let _ = parse(&text);
        }
    }
}
