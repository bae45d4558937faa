//! Counters, per CPU: drops by reason, traffic by path.

/// Why a packet was dropped or refused. The number is the index of its counter; numbers are never reused.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropReason {
    /// Headers end before they should, or lengths contradict each other.
    Malformed = 0,
    /// A frame with a VLAN tag, on a device of ours; on an underlay device one with two, the outer one without a VLAN.
    VlanTagged = 1,
    /// Not IPv4, IPv6 or ARP.
    UnknownEthertype = 2,
    /// A pod sent from an address that is not its own.
    SourceNotOwn = 3,
    /// A tunnel packet from an address that is no node's.
    TunnelFromUnknownNode = 4,
    /// A tunnel packet whose identity its node's cluster may not use.
    TunnelForgedIdentity = 5,
    /// A tunnel packet whose inner source does not live on the sending node.
    TunnelForgedSource = 6,
    /// A tunnel packet for an address that is not here and not in this node's pod CIDR.
    TunnelNotHere = 7,
    /// A tunnel packet with another flag than a valid VNI, or a fragment of one.
    TunnelMalformed = 8,
    /// The node behind the destination is withdrawn.
    NodeWithdrawn = 9,
    /// The node has no address of a family that we have.
    NoUnderlayFamily = 10,
    /// The helper that grows or shrinks the packet failed.
    EncapsulationFailed = 11,
    /// No route to the node.
    NoRoute = 12,
    /// IPv6 extension headers beyond the number that is parsed.
    ExtensionHeaders = 13,
    /// The program has no configuration yet.
    NotConfigured = 14,
    /// A packet for a pod address of this node that no pod has; answered with RST or ICMP.
    UnknownPod = 15,
    /// A direct-routed packet whose source is not known to live on another node of the mesh.
    DirectForgedSource = 16,
    /// Larger than the path to the node takes, and the host's route did not say so.
    TooBig = 17,
    /// The node behind the destination is to be sent to encrypted only, and its key is not known yet.
    AwaitingKey = 18,
    /// Came in clear from a node that is to send encrypted only.
    ClearReceived = 19,
    /// Would have left in clear for a node that is to be sent to encrypted only.
    ClearWouldLeave = 20,
    /// In clear, to or from an address of the mesh of which no record says who has it.
    MeshUnknown = 21,
    /// Came out of WireGuard for an address that is not this node's: peers may not use it as a router.
    NotForHere = 22,
}

impl DropReason {
    /// All reasons, in the order of their numbers.
    pub const ALL: [Self; 23] = [
        Self::Malformed,
        Self::VlanTagged,
        Self::UnknownEthertype,
        Self::SourceNotOwn,
        Self::TunnelFromUnknownNode,
        Self::TunnelForgedIdentity,
        Self::TunnelForgedSource,
        Self::TunnelNotHere,
        Self::TunnelMalformed,
        Self::NodeWithdrawn,
        Self::NoUnderlayFamily,
        Self::EncapsulationFailed,
        Self::NoRoute,
        Self::ExtensionHeaders,
        Self::NotConfigured,
        Self::UnknownPod,
        Self::DirectForgedSource,
        Self::TooBig,
        Self::AwaitingKey,
        Self::ClearReceived,
        Self::ClearWouldLeave,
        Self::MeshUnknown,
        Self::NotForHere,
    ];

    /// Label of the metric.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::VlanTagged => "vlan-tagged",
            Self::UnknownEthertype => "unknown-ethertype",
            Self::SourceNotOwn => "source-not-own",
            Self::TunnelFromUnknownNode => "tunnel-from-unknown-node",
            Self::TunnelForgedIdentity => "tunnel-forged-identity",
            Self::TunnelForgedSource => "tunnel-forged-source",
            Self::TunnelNotHere => "tunnel-not-here",
            Self::TunnelMalformed => "tunnel-malformed",
            Self::NodeWithdrawn => "node-withdrawn",
            Self::NoUnderlayFamily => "no-underlay-family",
            Self::EncapsulationFailed => "encapsulation-failed",
            Self::NoRoute => "no-route",
            Self::ExtensionHeaders => "extension-headers",
            Self::NotConfigured => "not-configured",
            Self::UnknownPod => "unknown-pod",
            Self::DirectForgedSource => "direct-forged-source",
            Self::TooBig => "too-big",
            Self::AwaitingKey => "awaiting-key",
            Self::ClearReceived => "clear-received",
            Self::ClearWouldLeave => "clear-would-leave",
            Self::MeshUnknown => "mesh-unknown",
            Self::NotForHere => "not-for-here",
        }
    }
}

/// Slots of the drop counter map.
pub const DROP_REASONS_MAX: u32 = 64;

/// Paths that are counted.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TrafficPath {
    /// Pod or host to a pod on this node.
    Local = 0,
    /// Into the tunnel.
    TunnelOut = 1,
    /// Out of the tunnel.
    TunnelIn = 2,
    /// Direct routing, outwards.
    DirectOut = 3,
    /// Direct routing, inwards.
    DirectIn = 4,
    /// Handed to the host's own stack.
    ToHost = 5,
    /// The host's own, to another node through WireGuard.
    NodeOut = 6,
}

impl TrafficPath {
    /// All paths, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Local,
        Self::TunnelOut,
        Self::TunnelIn,
        Self::DirectOut,
        Self::DirectIn,
        Self::ToHost,
        Self::NodeOut,
    ];

    /// Label of the metric.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::TunnelOut => "tunnel-out",
            Self::TunnelIn => "tunnel-in",
            Self::DirectOut => "direct-out",
            Self::DirectIn => "direct-in",
            Self::ToHost => "to-host",
            Self::NodeOut => "node-out",
        }
    }
}

/// How packets between this node and others went over the wire, counted beside their path in the same map.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WireTraffic {
    /// Sent through a WireGuard device.
    EncryptedOut = 8,
    /// Received from a WireGuard device.
    EncryptedIn = 9,
    /// Sent to another node in clear.
    ClearOut = 10,
    /// Received from another node in clear.
    ClearIn = 11,
}

impl WireTraffic {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 4] = [
        Self::EncryptedOut,
        Self::EncryptedIn,
        Self::ClearOut,
        Self::ClearIn,
    ];

    /// Label of the metric.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EncryptedOut => "encrypted-out",
            Self::EncryptedIn => "encrypted-in",
            Self::ClearOut => "clear-out",
            Self::ClearIn => "clear-in",
        }
    }
}

const _: () = assert!(TrafficPath::ALL.len() <= WireTraffic::EncryptedOut as usize);
const _: () = assert!((WireTraffic::ClearIn as u32) < TRAFFIC_PATHS_MAX);

/// Slots of the traffic counter map.
pub const TRAFFIC_PATHS_MAX: u32 = 16;

/// One CPU's share of a traffic counter.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrafficValue {
    /// Packets (a segmentation-offloaded one counts once).
    pub packets: u64,
    /// Bytes of the inner packet.
    pub bytes: u64,
}

const _: () = assert!(size_of::<TrafficValue>() == 16);
