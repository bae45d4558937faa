//! What the programs must know of their node: one entry in an array map, readable and replaceable at run time.

use crate::Address;

/// UDP port of the tunnel (VXLAN as Cilium and Linux use it, not the IANA port).
pub const TUNNEL_PORT: u16 = 8472;

/// Source MAC address inside the tunnel (and of what is handed to the host). A VXLAN device at
/// the other end drops frames whose two addresses are equal.
pub const TUNNEL_MAC_SOURCE: [u8; 6] = [0x02, 0x63, 0x6d, 0, 0, 1];
/// Destination MAC address inside the tunnel: a VXLAN device at the other end must have it as its own.
pub const TUNNEL_MAC_DESTINATION: [u8; 6] = [0x02, 0x63, 0x6d, 0, 0, 2];

/// [`NodeConfig::flags`]: write a flow record for every packet.
pub const CONFIG_FLOWS: u32 = 1 << 0;
/// [`NodeConfig::flags`]: pods are reached by direct routing, by the world outside the mesh too.
pub const CONFIG_DIRECT: u32 = 1 << 1;

/// [`NodeConfig::flags`]: what goes between mesh addresses, one of which is a pod's, and would leave in clear though
/// the other node is [`crate::NODE_ENCRYPTED`] or [`crate::NODE_WITHHELD`], is dropped.
pub const CONFIG_STRICT: u32 = 1 << 2;
/// [`NodeConfig::flags`]: what the host itself sends to the address of such a node is encrypted too.
pub const CONFIG_ENCRYPT_NODES: u32 = 1 << 3;

/// `SO_MARK` of the host's probes of paths: they are sent whatever size is known to pass. Marks of pods do not leave
/// their namespaces.
pub const PROBE_MARK: u32 = 0xe01;

/// WireGuard devices of a node: the present one, and while keys change a second one.
pub const WIREGUARD_DEVICES_MAX: usize = 2;
/// Ports of the control plane in [`NodeConfig::control_ports_be`].
pub const CONTROL_PORTS_MAX: usize = 4;

/// How many bits of an identity number are local to its cluster.
///
/// 24 bits in all; 16 local bits allow 255 clusters, 15 allow 511.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdentitySplit(u8);

impl IdentitySplit {
    /// 255 clusters of 65,535 identities.
    pub const CLUSTERS_255: Self = Self(16);
    /// 511 clusters of 32,767 identities.
    pub const CLUSTERS_511: Self = Self(15);

    /// The split with that many local bits, if it is one of the two.
    #[must_use]
    pub const fn from_local_bits(bits: u8) -> Option<Self> {
        match bits {
            15 => Some(Self::CLUSTERS_511),
            16 => Some(Self::CLUSTERS_255),
            _ => None,
        }
    }

    /// Number of local bits.
    #[must_use]
    pub const fn local_bits(self) -> u8 {
        self.0
    }

    /// The cluster that an identity belongs to; 0 for reserved ones.
    #[must_use]
    pub const fn cluster_of(self, identity: u32) -> u32 {
        identity >> self.0
    }
}

/// Largest identity number that is reserved and belongs to no cluster.
pub const RESERVED_IDENTITY_MAX: u32 = 255;
/// Reserved identity: the node itself. Never accepted from the wire.
pub const IDENTITY_HOST: u32 = 1;
/// Reserved identity: outside the mesh.
pub const IDENTITY_WORLD: u32 = 2;
/// Reserved identity: the health address of a node.
pub const IDENTITY_HEALTH: u32 = 4;
/// Reserved identity: another node.
pub const IDENTITY_REMOTE_NODE: u32 = 6;

/// The node's own settings.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Own tunnel end, IPv4, mapped; zeros = none.
    pub underlay_v4: Address,
    /// Own tunnel end, IPv6; zeros = none.
    pub underlay_v6: Address,
    /// Pod CIDR of this node, IPv4, mapped; unknown addresses in it are answered with RST or ICMP.
    pub pod_cidr_v4: Address,
    /// Pod CIDR of this node, IPv6.
    pub pod_cidr_v6: Address,
    /// Bits of the mapped `pod_cidr_v4` that count (96 and more); 0 = no IPv4.
    pub pod_cidr_v4_bits: u8,
    /// Bits of `pod_cidr_v6` that count; 0 = no IPv6.
    pub pod_cidr_v6_bits: u8,
    /// Local bits of identities, see [`IdentitySplit`].
    pub identity_local_bits: u8,
    /// Zero.
    pub reserved: u8,
    /// Own cluster.
    pub cluster_id: u16,
    /// UDP port of the tunnel, big-endian.
    pub tunnel_port_be: [u8; 2],
    /// Host's side of the veth pair between host and pods.
    pub host_ifindex: u32,
    /// `CONFIG_*` bits.
    pub flags: u32,
    /// MAC of `host_ifindex`.
    pub host_mac: [u8; 6],
    /// Zero.
    pub reserved2: [u8; 2],
    /// WireGuard devices, the present one first; 0 = none.
    pub wireguard_ifindexes: [u32; WIREGUARD_DEVICES_MAX],
    /// `SO_MARK` of the sockets from which the WireGuard devices send (`fwmark`); 0 = none is known by it.
    pub wireguard_mark: u32,
    /// UDP ports of those devices, big-endian; 0 = none.
    pub wireguard_ports_be: [[u8; 2]; WIREGUARD_DEVICES_MAX],
    /// TCP ports of servers, big-endian; 0 = none. Connections between nodes to these ports stay as they are, also
    /// with [`CONFIG_ENCRYPT_NODES`]: keys are learnt through them. They have TLS of their own.
    pub control_ports_be: [[u8; 2]; CONTROL_PORTS_MAX],
}

impl NodeConfig {
    /// All zeros: nothing is configured.
    pub const EMPTY: Self = Self {
        underlay_v4: [0; 16],
        underlay_v6: [0; 16],
        pod_cidr_v4: [0; 16],
        pod_cidr_v6: [0; 16],
        pod_cidr_v4_bits: 0,
        pod_cidr_v6_bits: 0,
        identity_local_bits: 0,
        reserved: 0,
        cluster_id: 0,
        tunnel_port_be: [0; 2],
        host_ifindex: 0,
        flags: 0,
        host_mac: [0; 6],
        reserved2: [0; 2],
        wireguard_ifindexes: [0; WIREGUARD_DEVICES_MAX],
        wireguard_mark: 0,
        wireguard_ports_be: [[0; 2]; WIREGUARD_DEVICES_MAX],
        control_ports_be: [[0; 2]; CONTROL_PORTS_MAX],
    };
}

const _: () = assert!(size_of::<NodeConfig>() == 112 && align_of::<NodeConfig>() == 4);
const _: () = assert!(core::mem::offset_of!(NodeConfig, wireguard_ifindexes) == 88);
const _: () = assert!(core::mem::offset_of!(NodeConfig, control_ports_be) == 104);
