//! What the WireGuard device in user space reads: datagrams of anybody, packets of the kernel, requests on its control socket.

use std::cell::RefCell;
use std::time::Duration;

use clustermesh_encryption_core::checksum::{Sum, pseudo_header};
use clustermesh_encryption_core::config::Config;
use clustermesh_encryption_core::control::{PeerStatus, Request, Secrets, describe, parse};
use clustermesh_encryption_core::control_client::{read_description, set_request};
use clustermesh_encryption_core::difference::difference;
use clustermesh_encryption_core::engine::{Engine, Now, Output};
use clustermesh_encryption_core::key::PrivateKey;
use clustermesh_encryption_core::message::{
    COOKIE_REPLY_BYTES, Message, TRANSPORT_HEADER_BYTES, TRANSPORT_OVERHEAD_BYTES,
    parse as parse_message,
};
use clustermesh_encryption_core::packet;
use clustermesh_encryption_core::secret_text::SecretText;
use clustermesh_encryption_core::session::{Role, Session, SessionKeys};
use clustermesh_encryption_core::test_support::{merge, split};
use clustermesh_encryption_core::vnet::{
    GSO_ECN, GSO_NONE, GSO_UDP_L4, GSO_UDP_TUNNEL_IPV4, GSO_UDP_TUNNEL_IPV6, VNET_HEADER_BYTES,
    VnetHeader,
};

/// Packets that are joined at once.
const PACKETS_MAX: usize = 64;
/// The kernel is told of the outer header of a tunnel as if so many bytes were before it.
const LINK_HEADER_BYTES: u16 = 14;
/// UDP, VXLAN and the inner link header of a tunnel.
const TUNNEL_HEADER_BYTES: usize = 30;
/// Index of the first end's session.
const INDEX: u32 = 7;

/// Random bytes that are the same every time: seeds must fit the devices of the target.
fn fixed(room: &mut [u8]) {
    room.fill(7);
}

const NOW: Now = Now {
    monotonic: Duration::from_secs(1_000),
    wall: Duration::from_secs(1_700_000_000),
};

/// A device that knows the other one.
fn device(own: u8, other: u8) -> Engine {
    let mut engine = Engine::new(&mut fixed);
    engine.set_private_key(Some(PrivateKey::from_bytes([own; 32])), &mut Vec::new());
    engine.add_peer(PrivateKey::from_bytes([other; 32]).public(), &mut fixed);
    engine
}

/// What a device sends first.
fn sent(out: Vec<Output>) -> Vec<u8> {
    let mut datagrams = out.into_iter().filter_map(|output| match output {
        Output::Send { datagram, .. } => Some(datagram),
        _ => None,
    });
    datagrams.next().unwrap_or_default()
}

/// Two devices in the middle of a handshake: the second has the first message before it, the first waits for the answer.
struct Handshake {
    initiator: Engine,
    initiation: Vec<u8>,
    responder: Engine,
}

impl Handshake {
    fn begun() -> Self {
        let (mut initiator, mut out) = (device(1, 2), Vec::new());
        initiator.wanted(0, NOW, &mut fixed, &mut out);
        Self {
            initiator,
            initiation: sent(out),
            responder: device(2, 1),
        }
    }
}

thread_local! {
    /// Kept from input to input: what is refused changes nothing, and keys take long to make. What was taken ends it.
    static HANDSHAKE: RefCell<Option<Handshake>> = const { RefCell::new(None) };
}

/// The two ends of a session, with nothing received yet.
fn session() -> Option<(Session, Session)> {
    let end = |local_index, remote_index, role, sending, receiving| {
        let keys = SessionKeys {
            local_index,
            remote_index,
            sending: [sending; 32],
            receiving: [receiving; 32],
            role,
        };
        Session::new(&keys, NOW.monotonic)
    };
    let initiator = end(INDEX, INDEX + 1, Role::Initiator, 3, 4)?;
    let responder = end(INDEX + 1, INDEX, Role::Responder, 4, 3)?;
    Some((initiator, responder))
}

/// A datagram from anywhere, at a device that shakes hands and has a session.
pub(crate) fn datagram(bytes: &[u8]) -> bool {
    let Ok(message) = parse_message(bytes) else {
        return false;
    };
    if let Message::Transport { receiver, counter } = message {
        transport(bytes, receiver, counter);
    } else {
        HANDSHAKE.with_borrow_mut(|held| {
            let mut handshake = held.take().unwrap_or_else(Handshake::begun);
            if !shake(&mut handshake, &message) {
                *held = Some(handshake);
            }
        });
    }
    true
}

/// Whether the message was taken.
fn shake(handshake: &mut Handshake, message: &Message<'_>) -> bool {
    let from = ([192, 0, 2, 9], 9).into();
    // Long after, so that nothing is refused for being early.
    let later = Now {
        monotonic: NOW.monotonic + Duration::from_secs(100),
        wall: NOW.wall + Duration::from_secs(100),
    };
    let Handshake {
        initiator,
        responder,
        ..
    } = handshake;
    let mut out = Vec::new();
    let taken = match message {
        Message::Initiation(message) => {
            let taken = responder.take_initiation(message, from, later, &mut fixed, &mut out);
            if taken.is_ok() {
                let again = responder.take_initiation(message, from, later, &mut fixed, &mut out);
                assert!(again.is_err(), "the same initiation was taken twice");
            }
            taken
        }
        Message::Response(message) => initiator.take_response(message, from, later, &mut out),
        Message::CookieReply(message) => initiator.take_cookie(message, later),
        Message::Transport { .. } => return false,
    };
    if taken.is_ok() {
        for engine in [initiator, responder] {
            engine.tick(later, |_| Default::default(), &mut fixed, &mut out);
        }
    }
    taken.is_ok()
}

fn transport(bytes: &[u8], receiver: u32, counter: u64) {
    let Some((session, _)) = session().filter(|(ours, _)| ours.local_index() == receiver) else {
        return;
    };
    let mut datagram = bytes.to_vec();
    let Ok(length) = session.opener().open(counter, &mut datagram) else {
        return;
    };
    if let Some(plain) = datagram.get_mut(TRANSPORT_HEADER_BYTES..TRANSPORT_HEADER_BYTES + length) {
        let _ = (packet::stated_len(plain), packet::source(plain));
        let _ = packet::take_over_ecn(plain, 3);
    }
    let again = session.opener().open(counter, &mut bytes.to_vec());
    assert!(again.is_err(), "the same message was taken twice");
}

pub(crate) fn datagram_seeds() -> Vec<Vec<u8>> {
    let Handshake {
        initiation,
        mut responder,
        ..
    } = Handshake::begun();
    let mut out = Vec::new();
    if let Ok(Message::Initiation(message)) = parse_message(&initiation) {
        let from = ([192, 0, 2, 1], 51_871).into();
        let taken = responder.take_initiation(message, from, NOW, &mut fixed, &mut out);
        assert!(taken.is_ok(), "{taken:?}");
    }
    let index = initiation.get(4..8).unwrap_or_default().to_vec();
    let mut seeds = vec![
        initiation,
        sent(out),
        // For the handshake under way, but not authentic.
        [&[3, 0, 0, 0][..], &index, &[0; COOKIE_REPLY_BYTES - 8]].concat(),
    ];
    for packet in [&b""[..], &[0x45; 32]] {
        let mut sealed = vec![0; TRANSPORT_OVERHEAD_BYTES + packet.len()];
        if let Some(room) = sealed.get_mut(TRANSPORT_HEADER_BYTES..) {
            room.iter_mut()
                .zip(packet)
                .for_each(|(to, from)| *to = *from);
        }
        if let Some((_, peer)) = session()
            && peer.seal(9, &mut sealed).is_ok()
        {
            seeds.push(sealed);
        }
    }
    seeds
}

/// Where a packet has the headers of which a super-packet's header speaks.
#[derive(Clone, Copy)]
struct Places {
    /// The IP header, the inner one in a tunnel.
    network: usize,
    transport: usize,
    protocol: u8,
}

impl Places {
    /// Behind the IP header at `network`.
    fn behind(network: usize, packet: &[u8]) -> Option<Self> {
        let header = packet.get(network..)?;
        let first = *header.first()?;
        let (length, protocol) = match first >> 4 {
            4 => (usize::from(first & 15) * 4, *header.get(9)?),
            6 => (packet::IPV6_HEADER_BYTES, *header.get(6)?),
            _ => return None,
        };
        Some(Self {
            network,
            transport: network + length,
            protocol,
        })
    }

    /// Those of a super-packet that is what its header says, as the kernel's are; `None` of any other.
    fn named(vnet: VnetHeader, packet: &[u8]) -> Option<Self> {
        let tunnel = GSO_UDP_TUNNEL_IPV4 | GSO_UDP_TUNNEL_IPV6;
        let mut network = 0;
        if vnet.gso_type & tunnel != 0 {
            let outer = Self::behind(0, packet)?.transport;
            network = outer + TUNNEL_HEADER_BYTES;
            if outer != usize::from(vnet.outer_transport)
                || network != usize::from(vnet.inner_network)
            {
                return None;
            }
        }
        let protocol = match vnet.gso_type & !(tunnel | GSO_ECN) {
            GSO_NONE => return None,
            GSO_UDP_L4 => packet::UDP,
            _ => packet::TCP,
        };
        // The offset within that header follows from the kind: nothing reads it here.
        let places = Self::behind(network, packet)?;
        (places.transport == usize::from(vnet.csum_start) && places.protocol == protocol)
            .then_some(places)
    }

    /// Whether the sums over a cut packet's headers and payload come out as at a receiver.
    fn has_checksums(self, segment: &[u8]) -> bool {
        let is_v4 = packet::version(&segment[self.network..]) == Some(4);
        let header = &segment[self.network..self.transport];
        let body = &segment[self.transport..];
        let addresses = &header[if is_v4 { 12..20 } else { 8..40 }];
        let Ok(length) = u16::try_from(body.len()) else {
            return false;
        };
        let sum = pseudo_header(addresses, self.protocol)
            .add_u16(length)
            .add_bytes(body);
        let is_none = self.protocol == packet::UDP && body[6..8] == [0, 0];
        let header = Sum::default().add_bytes(header).folded();
        sum.folded() == [0xff; 2] && !is_none && (!is_v4 || header == [0xff; 2])
    }
}

/// A packet of the kernel: cut, joined again, and cut once more.
pub(crate) fn offload(bytes: &[u8]) -> bool {
    let Some((header, packet)) = bytes.split_first_chunk::<VNET_HEADER_BYTES>() else {
        return false;
    };
    let vnet = VnetHeader::from_bytes(header);
    let Some(mut segments) = split(vnet, packet, PACKETS_MAX) else {
        return false;
    };
    let named = Places::named(vnet, packet);
    if let Some(places) = named {
        for segment in &segments {
            assert!(places.has_checksums(segment), "{vnet:?}: {segment:02x?}");
        }
    }
    // As the device joins them: what is behind the length that they state is cut off before.
    segments.retain(|segment| packet::stated_len(segment) == Some(segment.len()));
    let merged = merge(&segments);
    // Where the header does not name the packet's own places, the cut packets' checksums are wrong. Nobody looks at
    // them when packets are joined, and cutting again makes them right: only the lengths are the same then.
    let is_same = named.is_some() || merged.len() == segments.len();
    let mut again: Vec<Vec<u8>> = Vec::new();
    for (mut vnet, joined) in merged {
        if vnet.outer_transport > 0 {
            vnet.outer_transport -= LINK_HEADER_BYTES;
        }
        let cut = split(vnet, &joined, PACKETS_MAX);
        assert!(cut.is_some(), "what was joined cannot be cut: {vnet:?}");
        again.extend(cut.into_iter().flatten());
    }
    // Flows may pass each other.
    if is_same {
        segments.sort_unstable();
        again.sort_unstable();
        assert_eq!(again, segments, "joined and cut again");
    }
    let lengths = |packets: &[Vec<u8>]| {
        let mut lengths: Vec<usize> = packets.iter().map(Vec::len).collect();
        lengths.sort_unstable();
        lengths
    };
    assert_eq!(lengths(&again), lengths(&segments), "lengths of {vnet:?}");
    true
}

/// An IPv4 packet that must not be cut, of this protocol, with so many bytes behind its header.
fn ipv4(protocol: u8, length: u16) -> Vec<u8> {
    let total = 20 + length;
    let mut packet = vec![0; total.into()];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    (packet[6], packet[8], packet[9]) = (0x40, 64, protocol);
    packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    packet
}

pub(crate) fn offload_seeds() -> Vec<Vec<u8>> {
    let tcp = {
        let mut packet = ipv4(6, 20 + 2_500);
        packet[20..24].copy_from_slice(&[0, 9, 0, 80]);
        (packet[32], packet[33]) = (0x50, 0x10);
        packet
    };
    let tunnel = {
        // UDP to port 8472, without a checksum, VXLAN, Ethernet with IPv4.
        let length = u16::try_from(30 + tcp.len()).unwrap_or_default();
        let mut packet = ipv4(17, length);
        packet[20..24].copy_from_slice(&[0, 9, 0x21, 0x18]);
        packet[24..26].copy_from_slice(&length.to_be_bytes());
        packet[28] = 8;
        packet[48..50].copy_from_slice(&[8, 0]);
        packet[50..].copy_from_slice(&tcp);
        packet
    };
    let udp = {
        let mut packet = vec![0; 48 + 900];
        packet[0] = 0x60;
        packet[4..6].copy_from_slice(&908_u16.to_be_bytes());
        (packet[6], packet[7]) = (17, 64);
        packet[8..40].fill(0xfd);
        packet[40..46].copy_from_slice(&[0, 9, 0, 80, 3, 0x8c]);
        packet
    };
    let vnet = |gso_type, hdr_len, gso_size, csum_start, csum_offset| VnetHeader {
        flags: 1,
        gso_type,
        hdr_len,
        gso_size,
        csum_start,
        csum_offset,
        ..VnetHeader::default()
    };
    let in_tunnel = VnetHeader {
        outer_transport: 20,
        inner_network: 50,
        ..vnet(0x21, 90, 1_000, 70, 16)
    };
    let seed = |vnet: VnetHeader, packet: &[u8]| [&vnet.to_bytes()[..], packet].concat();
    vec![
        seed(vnet(1, 40, 1_000, 20, 16), &tcp),
        seed(vnet(5, 48, 300, 40, 6), &udp),
        seed(in_tunnel, &tunnel),
        seed(VnetHeader::default(), &udp),
    ]
}

/// A request on the control socket, or a device's answer.
pub(crate) fn control(bytes: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return false;
    };
    let is_answer = read_description(text).is_ok();
    let Ok(request) = parse(text) else {
        return is_answer;
    };
    let Request::Set(changes) = request else {
        return true;
    };
    let mut config = Config::default();
    for change in &changes {
        // A limit, at worst.
        let _ = config.apply(change);
    }
    let wanted = config.to_device();
    let mut said = SecretText::default();
    let status = |key: &_| PeerStatus {
        endpoint: config.peer(key).and_then(|peer| peer.endpoint),
        ..PeerStatus::default()
    };
    describe(
        &config,
        config.listen_port(),
        Secrets::Told,
        status,
        &mut said,
    );
    said.push(b"errno=0\n\n");
    let description = read_description(said.as_str());
    assert!(
        description.as_ref().is_ok_and(|said| said.config == wanted),
        "{wanted:?} is described as {description:?}"
    );
    // The difference to nothing, as a client sends it, makes the same device.
    if let Ok(steps) = difference(&Config::default().to_device(), &wanted) {
        let mut copy = Config::default();
        let read = parse(set_request(&steps).as_str());
        let Ok(Request::Set(read)) = read else {
            panic!("{steps:?} became {read:?}");
        };
        for change in &read {
            assert!(copy.apply(change).is_ok(), "{change:?}");
        }
        assert_eq!(copy.to_device(), wanted);
    }
    true
}

pub(crate) fn control_seeds() -> Vec<Vec<u8>> {
    let (key, peer, other) = ("1a".repeat(32), "0b".repeat(32), "0c".repeat(32));
    let set = format!(
        "set=1\nprivate_key={key}\nlisten_port=51871\nfwmark=3584\nreplace_peers=true\npublic_key={peer}\n\
         preshared_key={key}\nendpoint=[2001:db8::1]:51871\npersistent_keepalive_interval=25\nreplace_allowed_ips=true\n\
         allowed_ip=10.1.2.3/16\nallowed_ip=fd00::/64\nallowed_ip=-10.9.0.0/24\npublic_key={other}\nupdate_only=true\n\
         public_key={peer}\nremove=true\n\n"
    );
    let answer = format!(
        "counter.no_peer=3\nown_public_key={key}\nlisten_port=1\npublic_key={peer}\nprotocol_version=1\n\
         endpoint=192.0.2.1:7\nlast_handshake_time_sec=5\nlast_handshake_time_nsec=6\ntx_bytes=1\nrx_bytes=2\n\
         received_data=3\npersistent_keepalive_interval=0\nallowed_ip=10.0.0.0/8\nerrno=0\n\n"
    );
    let texts = [
        "get=1\n\n".to_owned(),
        "get=status\n\n".to_owned(),
        set,
        answer,
    ];
    texts.map(String::into_bytes).into()
}
