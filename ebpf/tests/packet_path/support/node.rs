//! A node made of namespaces: an underlay device, the pair between host and pods, one pod; programs attached.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::programs::tc::qdisc_add_clsact;
use aya::programs::{SchedClassifier, TcAttachType};
use clustermesh_ebpf::Features;
use clustermesh_ebpf_abi::{
    ENDPOINT_HOST, EndpointValue, IDENTITY_REMOTE_NODE, InterfaceValue, NODE_CLEAR_REFUSED,
    NODE_DIRECT, NODE_ENCRYPTED, NODE_INDEX_LOCAL, NODE_PRESENT, NODE_WITHHELD, NodeConfig,
    NodeValue, TUNNEL_PORT, V4_MAPPED_BITS,
};

use super::bpf::{Datapath, mapped};
use super::net::{Namespaces, check, device, device_index, inside, ip, sysctl};
use super::wireguard::{Offloads, Wireguard};

/// Largest packet of the underlay.
const UNDERLAY_MTU: u32 = 1500;
/// Largest packet of a pod: 1,500 less 70 bytes of headers with IPv6 outside.
pub const POD_MTU: u32 = 1430;
/// Largest packet of the WireGuard device: 1,500 less 80 bytes of headers with IPv6 outside.
const WIREGUARD_MTU: u16 = 1420;
/// The same, less a tunnel's headers with IPv6 outside.
const WIREGUARD_POD_MTU: u16 = WIREGUARD_MTU - 70;
/// Mark of WireGuard's sockets.
pub const WIREGUARD_MARK: u32 = 0xca6c;
/// Port of WireGuard.
pub const WIREGUARD_PORT: u16 = 51871;
/// A server's port.
pub const CONTROL_PORT: u16 = 2379;
/// Identity of the pod on node `n`: its cluster is `n`.
pub const fn pod_identity(n: u8) -> u32 {
    ((n as u32) << 16) | 7
}

/// A node and its pod.
pub struct Node {
    /// Number: the cluster, and part of every address.
    pub number: u8,
    /// Namespace of the host.
    pub host: String,
    /// Namespace of the pod.
    pub pod: String,
    /// Programs and maps.
    pub datapath: Datapath,
    /// Underlay device in the host's namespace.
    pub underlay_ifindex: u32,
}

/// Underlay address of node `n`.
pub fn underlay(n: u8, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 0, 0, u16::from(n), 0, 0, 0, 1).into()
    } else {
        Ipv4Addr::new(192, 168, n, 1).into()
    }
}

/// Address `host` in the pod CIDR of node `n`: 1 = router, 4 = pod.
pub fn in_cidr(n: u8, host: u8, v6: bool) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd10, 0, 0, u16::from(n), 0, 0, 0, u16::from(host)).into()
    } else {
        Ipv4Addr::new(10, n, 0, host).into()
    }
}

/// The router between the nodes: one device `to<n>` for each.
pub fn router(namespaces: &mut Namespaces) -> String {
    let router = namespaces.add("router");
    sysctl(&router, "net/ipv4/ip_forward", "1");
    sysctl(&router, "net/ipv6/conf/all/forwarding", "1");
    router
}

/// A host with an underlay device `eth0` towards the router.
pub fn host(namespaces: &mut Namespaces, router: &str, n: u8) -> String {
    let host = namespaces.add(&format!("node{n}"));
    ip(&format!(
        "link add eth0 netns {host} type veth peer name to{n} netns {router}"
    ));
    for (namespace, link, last) in [
        (host.as_str(), "eth0".to_owned(), 1),
        (router, format!("to{n}"), 254),
    ] {
        ip(&format!(
            "-n {namespace} addr add 192.168.{n}.{last}/24 dev {link}"
        ));
        ip(&format!(
            "-n {namespace} addr add fd00:0:0:{n:x}::{last:x}/64 dev {link} nodad"
        ));
        ip(&format!("-n {namespace} link set {link} up"));
    }
    ip(&format!("-n {host} route add default via 192.168.{n}.254"));
    ip(&format!(
        "-n {host} -6 route add default via fd00:0:0:{n:x}::fe"
    ));
    host
}

/// A pod with `eth0`, its other end `pod0` in the host's namespace.
pub fn pod(namespaces: &mut Namespaces, host: &str, n: u8, mtu: u32) -> String {
    let pod = namespaces.add(&format!("pod{n}"));
    ip(&format!(
        "link add eth0 netns {pod} type veth peer name pod0 netns {host}"
    ));
    ip(&format!("-n {host} link set pod0 up"));
    let (_, mac) = device(host, "pod0");
    let mac = mac.map(|b| format!("{b:02x}")).join(":");
    ip(&format!("-n {pod} link set eth0 up mtu {mtu}"));
    for (v6, bits, dad) in [(false, 32, ""), (true, 128, "nodad")] {
        let (own, gateway) = (in_cidr(n, 4, v6), in_cidr(n, 1, v6));
        ip(&format!("-n {pod} addr add {own}/{bits} dev eth0 {dad}"));
        ip(&format!("-n {pod} route add {gateway} dev eth0"));
        ip(&format!("-n {pod} route add default via {gateway}"));
        ip(&format!(
            "-n {pod} neigh replace {gateway} lladdr {mac} dev eth0 nud permanent"
        ));
    }
    pod
}

impl Node {
    /// Makes node `n` behind the router and attaches the programs; it knows nobody yet.
    pub fn new(namespaces: &mut Namespaces, router: &str, n: u8) -> Self {
        let host = host(namespaces, router, n);
        sysctl(&host, "net/ipv4/ip_forward", "1");
        sysctl(&host, "net/ipv6/conf/all/forwarding", "1");
        ip(&format!(
            "-n {host} link add cm_host type veth peer name cm_net"
        ));
        ip(&format!("-n {host} link set cm_host arp off"));
        ip(&format!("-n {host} link set cm_net up"));
        ip(&format!("-n {host} link set cm_host up"));
        ip(&format!("-n {host} addr add 10.{n}.0.1/32 dev cm_host"));
        ip(&format!(
            "-n {host} addr add {}/128 dev cm_host nodad",
            in_cidr(n, 1, true)
        ));
        ip(&format!(
            "-n {host} route add 10.0.0.0/8 dev cm_host src 10.{n}.0.1 mtu {POD_MTU}"
        ));
        ip(&format!(
            "-n {host} -6 route add fd10::/16 dev cm_host src {} mtu {POD_MTU}",
            in_cidr(n, 1, true)
        ));
        let pod = pod(namespaces, &host, n, POD_MTU);

        let (underlay_ifindex, _) = device(&host, "eth0");
        let mut node = Self {
            number: n,
            host,
            pod,
            datapath: Datapath::load(),
            underlay_ifindex,
        };
        node.fill_own_maps();
        for (link, program) in [
            ("pod0", "from_pod"),
            ("cm_net", "from_host"),
            ("eth0", "from_network"),
        ] {
            node.attach(link, program, TcAttachType::Ingress);
        }
        node
    }

    fn attach(&mut self, link: &str, program: &str, direction: TcAttachType) {
        let program: &mut SchedClassifier = self
            .datapath
            .ebpf
            .program_mut(program)
            .expect(program)
            .try_into()
            .expect("a tc program");
        inside(&self.host, || {
            if !Features::probe().tcx {
                // It is there already where another program was attached.
                let _ = qdisc_add_clsact(link);
            }
            program.attach(link, direction).map(drop)
        })
        .expect("attach");
    }

    /// Makes the node's WireGuard device, and settings with these `flags`; `None` if this kernel does not know those
    /// offloads.
    pub fn add_wireguard(&mut self, offloads: Offloads, flags: u32) -> Option<Wireguard> {
        let wireguard = Wireguard::new(&self.host, offloads)?;
        self.join_wireguard(flags);
        Some(wireguard)
    }

    /// As [`Self::add_wireguard`], for a device that is there.
    pub fn join_wireguard(&mut self, flags: u32) {
        self.attach("eth0", "to_network", TcAttachType::Egress);
        self.attach("wg0", "from_wireguard", TcAttachType::Ingress);
        self.configure(flags);
        let (host, pod, n) = (&self.host, &self.pod, self.number);
        ip(&format!("-n {pod} link set eth0 mtu {WIREGUARD_POD_MTU}"));
        ip(&format!(
            "-n {host} route replace 10.0.0.0/8 dev cm_host src 10.{n}.0.1 mtu {WIREGUARD_POD_MTU}"
        ));
        ip(&format!(
            "-n {host} -6 route replace fd10::/16 dev cm_host src {} mtu {WIREGUARD_POD_MTU}",
            in_cidr(n, 1, true)
        ));
    }

    /// As [`Self::learn`], of a node that is sent to through WireGuard and taken from there only.
    pub fn learn_encrypted(&self, other: u8, v6_outside: bool, direct: bool) {
        self.learn(other, v6_outside, direct);
        let flags = NODE_ENCRYPTED | NODE_CLEAR_REFUSED;
        self.datapath.set_node(
            u32::from(other),
            &NodeValue {
                flags: NODE_PRESENT | flags | if direct { NODE_DIRECT } else { 0 },
                path_mtu_bytes: if direct {
                    WIREGUARD_MTU
                } else {
                    WIREGUARD_POD_MTU
                },
                egress_ifindex: device_index(&self.host, "wg0"),
                ..self.node_value(other, v6_outside, direct)
            },
        );
    }

    /// Node `other` is to be sent to encrypted, but its key is not known.
    pub fn withhold(&self, other: u8) {
        self.datapath.set_node(
            u32::from(other),
            &NodeValue {
                flags: NODE_PRESENT | NODE_WITHHELD | NODE_CLEAR_REFUSED,
                ..self.node_value(other, false, false)
            },
        );
    }

    fn node_value(&self, other: u8, v6_outside: bool, direct: bool) -> NodeValue {
        NodeValue {
            endpoint: mapped(underlay(other, v6_outside)),
            cluster_id: u16::from(other),
            flags: NODE_PRESENT | if direct { NODE_DIRECT } else { 0 },
            // The agent leaves room for a tunnel only where one is the rule.
            path_mtu_bytes: if direct { UNDERLAY_MTU } else { POD_MTU } as u16,
            reserved: 0,
            egress_ifindex: self.underlay_ifindex,
            reserved2: 0,
            #[cfg(feature = "layout-next")]
            next_layout: 0,
        }
    }

    /// Writes the node's settings.
    pub fn configure(&self, flags: u32) {
        let n = self.number;
        let (host_ifindex, host_mac) = device(&self.host, "cm_host");
        self.datapath.set_config(&NodeConfig {
            underlay_v4: mapped(underlay(n, false)),
            underlay_v6: mapped(underlay(n, true)),
            pod_cidr_v4: mapped(in_cidr(n, 0, false)),
            pod_cidr_v6: mapped(in_cidr(n, 0, true)),
            pod_cidr_v4_bits: (V4_MAPPED_BITS + 24) as u8,
            pod_cidr_v6_bits: 64,
            identity_local_bits: 16,
            cluster_id: u16::from(n),
            tunnel_port_be: TUNNEL_PORT.to_be_bytes(),
            host_ifindex,
            flags,
            host_mac,
            wireguard_ifindexes: [wireguard_ifindex(&self.host), 0],
            wireguard_mark: WIREGUARD_MARK,
            wireguard_ports_be: [WIREGUARD_PORT.to_be_bytes(), [0; 2]],
            control_ports_be: [CONTROL_PORT.to_be_bytes(), [0; 2], [0; 2], [0; 2]],
            ..NodeConfig::EMPTY
        });
    }

    fn fill_own_maps(&self) {
        let n = self.number;
        self.configure(0);
        let (host_ifindex, _) = device(&self.host, "cm_host");
        let (ifindex, end_mac) = device(&self.host, "pod0");
        let (_, pod_mac) = device(&self.pod, "eth0");
        for v6 in [false, true] {
            let pod = EndpointValue {
                ifindex,
                identity: pod_identity(n),
                pod_mac,
                host_mac: end_mac,
                flags: 0,
            };
            self.datapath.set_endpoint(mapped(in_cidr(n, 4, v6)), &pod);
            let router = EndpointValue {
                ifindex: host_ifindex,
                flags: ENDPOINT_HOST,
                ..pod
            };
            self.datapath
                .set_endpoint(mapped(in_cidr(n, 1, v6)), &router);
            self.datapath.set_ipcache(
                mapped(in_cidr(n, 4, v6)),
                128,
                pod_identity(n),
                NODE_INDEX_LOCAL,
            );
        }
        self.datapath.set_interface(
            ifindex,
            &InterfaceValue {
                address_v4: mapped(in_cidr(n, 4, false)),
                address_v6: mapped(in_cidr(n, 4, true)),
                identity: pod_identity(n),
                reserved: 0,
            },
        );
    }

    /// Makes node `other` known, of the cluster with its number.
    pub fn learn(&self, other: u8, v6_outside: bool, direct: bool) {
        self.learn_in_cluster(other, other, v6_outside, direct);
    }

    /// Makes node `other` known, with its pod, its router and the rest of its pod CIDRs.
    pub fn learn_in_cluster(&self, other: u8, cluster: u8, v6_outside: bool, direct: bool) {
        self.datapath.set_node(
            u32::from(other),
            &NodeValue {
                cluster_id: u16::from(cluster),
                ..self.node_value(other, v6_outside, direct)
            },
        );
        // A node sends from all its addresses; the first one is the tunnel's end.
        for v6 in [false, true] {
            let address = mapped(underlay(other, v6));
            self.datapath.set_node_address(address, u32::from(other));
            self.datapath
                .set_ipcache(address, 128, IDENTITY_REMOTE_NODE, u32::from(other));
        }
        for (v6, cidr_bits) in [(false, V4_MAPPED_BITS + 24), (true, 64)] {
            let index = u32::from(other);
            self.datapath.set_ipcache(
                mapped(in_cidr(other, 4, v6)),
                128,
                pod_identity(other),
                index,
            );
            self.datapath.set_ipcache(
                mapped(in_cidr(other, 1, v6)),
                128,
                IDENTITY_REMOTE_NODE,
                index,
            );
            self.datapath.set_ipcache(
                mapped(in_cidr(other, 0, v6)),
                cidr_bits,
                IDENTITY_REMOTE_NODE,
                index,
            );
        }
    }

    /// Pings from the pod; the text of `ping` if it fails.
    pub fn ping(&self, target: IpAddr, bytes: u32) -> Result<(), String> {
        let output = super::net::run(
            &self.pod,
            "ping",
            &[
                "-c3",
                "-i0.05",
                "-W1",
                "-s",
                &bytes.to_string(),
                &target.to_string(),
            ],
        );
        if output.status.success() {
            return Ok(());
        }
        Err(format!(
            "{}{} drops {:?} on {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.datapath.all_drops(),
            check(&self.host, "ip", &["-s", "link"]),
        ))
    }
}

/// Index of the node's WireGuard device, if it has one.
fn wireguard_ifindex(host: &str) -> u32 {
    inside(host, || nix::net::if_::if_nametoindex("wg0")).unwrap_or(0)
}
