//! Real traffic between two nodes whose WireGuard devices are joined.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use clustermesh_ebpf_abi::{
    CONFIG_ENCRYPT_NODES, CONFIG_STRICT, DropReason, TrafficPath, WireTraffic,
};

use crate::support::net::{Namespaces, check, inside, run};
use crate::support::node::{CONTROL_PORT, Node, in_cidr, router, underlay};
use crate::support::tcp::transfer;
use crate::support::wireguard::{Link, Offloads};

const TRANSFER_BYTES: usize = 8 << 20;
/// More than the device says that it takes at best.
const SUPER_BYTES: usize = 4 * 1420;

/// Longest wait of a conversation.
const PATIENCE: Duration = Duration::from_secs(10);

struct Pair {
    a: Node,
    b: Node,
    link: Link,
    router: String,
    _namespaces: Namespaces,
}

/// Two nodes that encrypt everything between them, in strict mode; `None` if this kernel lacks the offloads.
fn pair(offloads: Offloads, v6_outside: bool, direct: bool) -> Option<Pair> {
    let mut namespaces = Namespaces::new();
    let router = router(&mut namespaces);
    let mut nodes = [1, 2].map(|n| Node::new(&mut namespaces, &router, n));
    let flags = CONFIG_STRICT | CONFIG_ENCRYPT_NODES;
    let mut ends = Vec::new();
    for node in &mut nodes {
        ends.push(node.add_wireguard(offloads, flags)?);
    }
    let [a, b] = nodes;
    a.learn_encrypted(2, v6_outside, direct);
    b.learn_encrypted(1, v6_outside, direct);
    let end = ends.pop()?;
    Some(Pair {
        link: Link::between(ends.pop()?, end),
        a,
        b,
        router,
        _namespaces: namespaces,
    })
}

impl Pair {
    fn failed(&self, what: &str, error: &str) -> ! {
        let drops = [&self.a, &self.b].map(|node| node.datapath.all_drops());
        panic!("{what}: {error}; drops {drops:?}")
    }

    fn talk(&self, from: &str, to: &str, target: IpAddr) {
        for bytes in ["56", "1280"] {
            let target = target.to_string();
            let ping = ["-c2", "-i0.05", "-W1", "-s", bytes, &target];
            let output = run(from, "ping", &ping);
            if !output.status.success() {
                self.failed(&target, &String::from_utf8_lossy(&output.stdout));
            }
        }
        transfer(from, to, target, TRANSFER_BYTES)
            .unwrap_or_else(|error| self.failed(&target.to_string(), &error));
    }

    /// Pods, hosts, and each with the other.
    fn all_talk(&self) {
        let (a, b) = (&self.a, &self.b);
        for v6 in [false, true] {
            self.talk(&a.pod, &b.pod, in_cidr(2, 4, v6));
            self.talk(&b.pod, &a.pod, in_cidr(1, 4, v6));
            self.talk(&a.host, &b.pod, in_cidr(2, 4, v6));
            self.talk(&a.pod, &b.host, in_cidr(2, 1, v6));
            self.talk(&a.host, &b.host, underlay(2, v6));
        }
    }

    /// The router between the nodes has carried no IP packet from one to the other.
    fn nothing_was_in_clear(&self) {
        for node in [&self.a, &self.b] {
            assert_eq!(node.datapath.all_drops(), []);
            assert_eq!(node.datapath.wire(WireTraffic::ClearOut).packets, 0);
            assert_eq!(node.datapath.wire(WireTraffic::ClearIn).packets, 0);
            assert!(node.datapath.wire(WireTraffic::EncryptedOut).bytes > TRANSFER_BYTES as u64);
            assert!(node.datapath.wire(WireTraffic::EncryptedIn).bytes > TRANSFER_BYTES as u64);
        }
        for counter in ["IpForwDatagrams", "Ip6OutForwDatagrams"] {
            let text = check(&self.router, "nstat", &["-asz", counter]);
            let count = text.lines().find_map(|line| {
                let mut words = line.split_whitespace();
                (words.next()? == counter).then(|| words.next().map(str::to_owned))?
            });
            assert_eq!(count.as_deref(), Some("0"), "{text}");
        }
    }
}

#[test]
fn everything_goes_through_wireguard_in_a_tunnel_with_ipv4_outside() {
    for (offloads, longest) in [(Offloads::None, 0), (Offloads::Plain, SUPER_BYTES)] {
        let pair = pair(offloads, false, false).expect("offloads of every kernel");
        pair.all_talk();
        pair.nothing_was_in_clear();
        assert!(pair.a.datapath.traffic(TrafficPath::TunnelOut).packets > 0);
        assert!(pair.a.datapath.traffic(TrafficPath::NodeOut).packets > 0);
        assert!(pair.link.longest() > longest, "the host's own, offloaded");
    }
}

#[test]
fn everything_goes_through_wireguard_in_a_tunnel_with_ipv6_outside() {
    let pair = pair(Offloads::Plain, true, false).expect("offloads of every kernel");
    pair.all_talk();
    pair.nothing_was_in_clear();
}

#[test]
fn everything_goes_through_wireguard_by_direct_routing() {
    let pair = pair(Offloads::Plain, false, true).expect("offloads of every kernel");
    pair.all_talk();
    pair.nothing_was_in_clear();
    assert!(pair.a.datapath.traffic(TrafficPath::DirectOut).packets > 0);
    assert_eq!(pair.a.datapath.traffic(TrafficPath::TunnelOut).packets, 0);
    assert!(pair.link.longest() > SUPER_BYTES, "offloaded all the way");
}

#[test]
fn offloaded_packets_stay_whole_in_the_tunnel_where_the_kernel_can() {
    for v6_outside in [false, true] {
        let Some(pair) = pair(Offloads::Tunnel, v6_outside, false) else {
            eprintln!(
                "NOT TESTED: this kernel's TUN devices know no UDP tunnels (6.17 and newer do)"
            );
            return;
        };
        pair.all_talk();
        pair.nothing_was_in_clear();
        assert!(pair.link.longest() > SUPER_BYTES, "offloaded all the way");
    }
}

#[test]
fn without_keys_only_servers_are_reached_in_clear_and_with_one_sides_key_too() {
    let pair = pair(Offloads::None, false, false).expect("a device without offloads");
    let (a, b) = (&pair.a, &pair.b);
    for (a_has, b_has) in [(false, false), (true, false), (false, true)] {
        for (node, other, has_key) in [(a, 2, a_has), (b, 1, b_has)] {
            node.learn_encrypted(other, false, false);
            if !has_key {
                node.withhold(other);
            }
        }
        for v6 in [false, true] {
            for (from, to) in [(a, b), (b, a)] {
                let target = underlay(to.number, v6);
                let server = SocketAddr::new(target, CONTROL_PORT);
                exchange(&from.host, &to.host, server)
                    .unwrap_or_else(|error| pair.failed(&server.to_string(), &error));
                let refused = |from: &str, target: IpAddr| {
                    let output = run(from, "ping", &["-c1", "-W1", &target.to_string()]);
                    assert!(!output.status.success(), "{target} answers");
                };
                if !(a_has || b_has) {
                    refused(&from.host, target);
                    refused(&from.pod, in_cidr(to.number, 4, v6));
                }
            }
        }
    }
    assert!(a.datapath.drops(DropReason::AwaitingKey) >= 4);
    assert!(b.datapath.drops(DropReason::AwaitingKey) >= 4);
    // The pods' and pings' were dropped before they could be refused on the other side.
    assert_eq!(b.datapath.drops(DropReason::ClearReceived), 0);
}

/// A small conversation over TCP.
fn exchange(from: &str, to: &str, server: SocketAddr) -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let listener = inside(to, || TcpListener::bind(server)).map_err(failed)?;
    let mut client =
        inside(from, || TcpStream::connect_timeout(&server, PATIENCE)).map_err(failed)?;
    let (mut accepted, _) = listener.accept().map_err(failed)?;
    for stream in [&client, &accepted] {
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    }
    let mut answer = [0; 4];
    client.write_all(b"hello").map_err(failed)?;
    accepted.read_exact(&mut answer).map_err(failed)?;
    accepted.write_all(b"keys").map_err(failed)?;
    client.read_exact(&mut answer).map_err(failed)
}
