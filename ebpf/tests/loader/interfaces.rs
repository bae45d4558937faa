//! Programs at interfaces, on tcx and on clsact.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::time::Instant;

use clustermesh_ebpf::abi::{
    CONFIG_FLOWS, CONFIG_STRICT, DropReason, HOOK_FROM_POD, IPCACHE_PREFIX_BASE_BITS, IpcacheKey,
    IpcacheValue, NODE_ENCRYPTED, NODE_PRESENT, NodeConfig, NodeValue, TUNNEL_PORT,
    VERDICT_DROPPED, v4_mapped,
};
use clustermesh_ebpf::{AttachMode, Datapath, Error, Features, Maps};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::node::{Node, PATIENCE, ifindex, in_node, ip};

/// What this kernel has; clsact is everywhere.
fn modes() -> Vec<AttachMode> {
    let tcx = Features::probe().tcx.then_some(AttachMode::Tcx);
    tcx.into_iter().chain([AttachMode::Clsact]).collect()
}

/// The least that makes a node's end of the tunnel.
const CONFIG: NodeConfig = NodeConfig {
    underlay_v4: v4_mapped([10, 9, 0, 1]),
    underlay_v6: [0; 16],
    identity_local_bits: 16,
    cluster_id: 1,
    tunnel_port_be: TUNNEL_PORT.to_be_bytes(),
    host_ifindex: 1,
    ..NodeConfig::EMPTY
};

/// A pod's veth pair: what `pod` sends comes in at `host_end`.
struct Pod {
    socket: UdpSocket,
    host_end: u32,
}

impl Pod {
    fn new() -> Self {
        ip("link add host_end type veth peer name pod");
        ip("link set host_end up");
        ip("addr add 10.9.0.2/24 dev pod");
        ip("link set pod up");
        ip("neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev pod nud permanent");
        Self {
            socket: UdpSocket::bind("10.9.0.2:0").unwrap(),
            host_end: ifindex("host_end"),
        }
    }

    /// Sends what no program lets pass: without configuration nothing goes on from a pod, and from
    /// the network no tunnel packet of a stranger.
    fn send(&self) {
        let to = ("10.9.0.1", TUNNEL_PORT);
        self.socket.send_to(&[0; 64], to).unwrap();
    }

    /// As [`Self::send`], where a program drops it before it leaves: the kernel may or may not tell.
    fn send_refused(&self) {
        let _ = self.socket.send_to(&[0; 64], ("10.9.0.1", TUNNEL_PORT));
    }
}

/// Packets that our programs dropped.
fn refused(maps: &Maps) -> u64 {
    maps.drops().unwrap().iter().map(|(_, count)| count).sum()
}

fn refused_reaches(maps: &Maps, wanted: u64) {
    let deadline = Instant::now() + PATIENCE;
    while refused(maps) < wanted {
        assert!(
            Instant::now() < deadline,
            "{} of {wanted} packets met a program",
            refused(maps)
        );
        std::thread::yield_now();
    }
    assert_eq!(refused(maps), wanted);
}

fn open(node: &Node, mode: AttachMode) -> Datapath {
    Datapath::open(&node.options_with(mode)).unwrap().0
}

#[test]
fn no_packet_passes_while_programs_are_switched() {
    for mode in modes() {
        in_node(|node| {
            let pod = Pod::new();
            let (mut one, mut other) = (open(node, mode), open(node, mode));
            one.attach_pod(pod.host_end).unwrap();
            let maps = one.maps().clone();
            pod.send();
            refused_reaches(&maps, 1);
            let mut sent = 1;
            std::thread::scope(|scope| {
                let switcher = scope.spawn(|| {
                    for _ in 0..50 {
                        other.activate(node.cm_net, &[]).unwrap();
                        one.activate(node.cm_net, &[]).unwrap();
                    }
                });
                while !switcher.is_finished() {
                    pod.send();
                    sent += 1;
                    // No more on the way than the receive queue takes.
                    if sent % 64 == 0 {
                        refused_reaches(&maps, sent);
                    }
                }
            });
            refused_reaches(&maps, sent);
            assert!(sent > 100, "{mode:?}: only {sent} packets");

            drop((one, other));
            pod.send();
            refused_reaches(&maps, sent + 1);
        });
    }
}

#[test]
fn pods_are_attached_and_detached_in_both_modes() {
    for mode in modes() {
        in_node(|node| {
            let pod = Pod::new();
            let mut datapath = open(node, mode);
            datapath.attach_pod(pod.host_end).unwrap();
            datapath.attach_pod(pod.host_end).unwrap();
            assert_eq!(datapath.attached_pods().unwrap(), [pod.host_end]);
            pod.send();
            refused_reaches(datapath.maps(), 1);
            datapath.detach_pod(pod.host_end).unwrap();
            datapath.detach_pod(pod.host_end).unwrap();
            assert!(datapath.attached_pods().unwrap().is_empty());
            let before = received("host_end");
            pod.send();
            let deadline = Instant::now() + PATIENCE;
            while received("host_end") == before {
                assert!(Instant::now() < deadline, "the packet did not arrive");
            }
            refused_reaches(datapath.maps(), 1);
        });
    }
}

/// Packets that came in at an interface of this namespace.
fn received(interface: &str) -> u64 {
    let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let mut fields = line.unwrap().split_whitespace();
    fields.nth(1).unwrap().parse().unwrap()
}

#[test]
fn an_interface_that_is_gone_is_its_own_error() {
    for mode in modes() {
        in_node(|node| {
            let mut datapath = open(node, mode);
            for result in [
                datapath.attach_pod(99_999),
                datapath.activate(99_999, &[]),
                datapath.activate(node.cm_net, &[99_999]),
            ] {
                match result {
                    Err(Error::InterfaceGone { ifindex: 99_999 }) => {}
                    other => panic!("{mode:?}: {other:?}"),
                }
            }
            datapath.detach_pod(99_999).unwrap();
        });
    }
}

#[test]
fn activation_forgets_pods_whose_interface_is_gone() {
    for mode in modes() {
        in_node(|node| {
            let pod = Pod::new();
            let mut datapath = open(node, mode);
            datapath.attach_pod(pod.host_end).unwrap();
            ip("link del host_end");
            assert_eq!(datapath.attached_pods().unwrap(), [pod.host_end]);
            datapath.activate(node.cm_net, &[]).unwrap();
            assert!(datapath.attached_pods().unwrap().is_empty());
        });
    }
}

#[test]
fn activation_detaches_from_what_is_no_longer_underlay() {
    for mode in modes() {
        in_node(|node| {
            let uplink = Pod::new();
            let mut datapath = open(node, mode);
            datapath.maps().set_config(&CONFIG).unwrap();
            assert_eq!(datapath.maps().config().unwrap(), Some(CONFIG));
            datapath.activate(node.cm_net, &[uplink.host_end]).unwrap();
            uplink.send();
            refused_reaches(datapath.maps(), 1);
            datapath.activate(node.cm_net, &[]).unwrap();
            uplink.send();
            let deadline = Instant::now() + PATIENCE;
            while received("host_end") < 2 {
                assert!(Instant::now() < deadline, "the packet did not arrive");
            }
            refused_reaches(datapath.maps(), 1);
        });
    }
}

/// In clear from the pod's address to a pod of a node that is to be sent to encrypted only.
fn set_strict(maps: &Maps) {
    let mut config = CONFIG;
    config.flags = CONFIG_STRICT;
    maps.set_config(&config).unwrap();
    let node = NodeValue {
        endpoint: v4_mapped([10, 9, 0, 7]),
        cluster_id: 2,
        flags: NODE_PRESENT | NODE_ENCRYPTED,
        path_mtu_bytes: 0,
        reserved: 0,
        egress_ifindex: 1,
        reserved2: 0,
        #[cfg(feature = "layout-next")]
        next_layout: 0,
    };
    maps.nodes.upsert(&[(1, node)]).unwrap();
    let key = IpcacheKey {
        prefix_len_bits: IPCACHE_PREFIX_BASE_BITS + 128,
        cluster_id_be: [0; 2],
        reserved: [0; 2],
        address: v4_mapped([10, 9, 0, 1]),
    };
    let value = IpcacheValue {
        identity: (2 << 16) | 1,
        node_index: 1,
    };
    maps.ipcache.upsert(&[(key, value)]).unwrap();
}

#[test]
fn the_way_out_is_guarded_in_both_modes_whatever_becomes_of_the_process() {
    for mode in modes() {
        in_node(|node| {
            // What the pod's side sends here leaves by a device of the underlay.
            let uplink = Pod::new();
            let out = ifindex("pod");
            let mut datapath = open(node, mode);
            set_strict(datapath.maps());
            let maps = datapath.maps().clone();
            datapath.activate(node.cm_net, &[]).unwrap();
            datapath.set_encryption_devices(&[], &[out]).unwrap();
            datapath.set_encryption_devices(&[], &[out]).unwrap();
            let would_leave = || {
                let drops = maps.drops().unwrap();
                let reason = DropReason::ClearWouldLeave;
                drops.iter().find(|(r, _)| *r == reason).unwrap().1
            };
            uplink.send_refused();
            assert_eq!(would_leave(), 1, "{mode:?}");
            // Taken over by the next process, switched, and with none at all.
            let mut next = open(node, mode);
            next.activate(node.cm_net, &[]).unwrap();
            uplink.send_refused();
            drop((datapath, next));
            uplink.send_refused();
            assert_eq!(would_leave(), 3, "{mode:?}");
            assert_eq!(received("host_end"), 0, "{mode:?}: nothing left");

            let mut datapath = open(node, mode);
            datapath.set_encryption_devices(&[], &[]).unwrap();
            uplink.send();
            assert_eq!(would_leave(), 3, "{mode:?}");
        });
    }
}

#[test]
fn what_wireguard_opens_is_judged_in_both_modes() {
    for mode in modes() {
        in_node(|node| {
            // A device that is none of WireGuard's does: the program is told what came in.
            let peer = Pod::new();
            let second = ifindex("cm_host");
            let mut datapath = open(node, mode);
            datapath.maps().set_config(&CONFIG).unwrap();
            datapath.activate(node.cm_net, &[]).unwrap();
            datapath
                .set_encryption_devices(&[peer.host_end, second], &[])
                .unwrap();
            let pins = || {
                let dirs = ["links", "filters"].map(|dir| fs::read_dir(node.pins().join(dir)));
                let names = dirs.into_iter().flatten().flatten();
                let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
                let mut names: Vec<_> = names.filter(|n| n.contains("wireguard")).collect();
                names.sort();
                names
            };
            assert_eq!(pins().len(), 2);
            datapath
                .set_encryption_devices(&[peer.host_end], &[])
                .unwrap();
            assert_eq!(pins(), [format!("from_wireguard-{}", peer.host_end)]);
            ip("link del host_end");
            datapath.activate(node.cm_net, &[]).unwrap();
            assert!(pins().is_empty(), "{mode:?}: a device that is gone");
            match datapath.set_encryption_devices(&[99_999], &[]) {
                Err(Error::InterfaceGone { ifindex: 99_999 }) => {}
                other => panic!("{mode:?}: {other:?}"),
            }
            Datapath::uninstall(&node.options()).unwrap();
        });
    }
}

#[test]
fn the_mode_can_be_changed_under_traffic() {
    in_node(|node| {
        let pod = Pod::new();
        // Where the kernel knows one mode only, processes of the same mode take turns.
        let mut best = open(node, AttachMode::detect());
        let mut clsact = open(node, AttachMode::Clsact);
        best.attach_pod(pod.host_end).unwrap();
        for (sent, datapath) in (1..).zip([&mut clsact, &mut best]) {
            datapath.activate(node.cm_net, &[]).unwrap();
            pod.send();
            refused_reaches(datapath.maps(), sent);
            assert_eq!(datapath.attached_pods().unwrap(), [pod.host_end]);
        }
        if Features::probe().tcx {
            let filters = fs::read_dir(node.pins().join("filters")).unwrap();
            assert_eq!(filters.count(), 0);
        }
        Datapath::uninstall(&node.options()).unwrap();
    });
}

#[test]
fn flow_records_are_read_when_the_descriptor_says_so() {
    in_node(|node| {
        let pod = Pod::new();
        let mut datapath = open(node, AttachMode::detect());
        let mut flows = datapath.maps().flows().unwrap();
        datapath.attach_pod(pod.host_end).unwrap();
        let mut config = CONFIG;
        config.flags = CONFIG_FLOWS;
        datapath.maps().set_config(&config).unwrap();
        assert_eq!(flows.next_record(), None);
        pod.send();
        let mut ready = [PollFd::new(flows.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut ready, patience).unwrap(), 1);
        let record = flows.next_record().unwrap();
        assert_eq!(record.hook, HOOK_FROM_POD);
        assert_eq!(record.verdict, VERDICT_DROPPED);
        assert_eq!(record.path_or_reason, DropReason::SourceNotOwn as u32);
        assert_eq!(flows.next_record(), None);
    });
}
