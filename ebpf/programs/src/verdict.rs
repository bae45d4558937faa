//! From what a program decided to what the kernel does with the packet, and to the counters and flow records.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use clustermesh_ebpf_abi::{
    CONFIG_FLOWS, DropReason, FlowRecord, NodeConfig, TrafficPath, VERDICT_DROPPED,
    VERDICT_FORWARDED, WireTraffic,
};

use crate::frame::Frame;
use crate::maps::{CONFIG, DROPS, FLOWS, TRAFFIC};
use crate::parse::{PROTOCOL_TCP, PROTOCOL_UDP, Packet};

/// What a program decided.
pub enum Action {
    /// Not ours: the kernel goes on as if no program were there. Not counted.
    Pass,
    /// Link-scoped chatter that leads nowhere here: dropped without a word.
    Ignore,
    /// Redirected. The helpers fail for unknown flags only, so their result is not carried around.
    Forward(TrafficPath),
    /// Refused, and the packet turned into the answer to its sender, which was redirected.
    Answer(DropReason),
}

/// What is known of the packet while it is handled; flow records are made of it.
pub struct Seen {
    /// Inner packet, as far as it was parsed.
    pub packet: Packet,
    /// Identity of its sender.
    pub identity: u32,
    /// Ports as they stand in the packet; 0 where there are none or nobody listens.
    pub ports: u32,
}

impl Seen {
    /// Nothing yet.
    pub const EMPTY: Self = Self {
        packet: Packet::EMPTY,
        identity: 0,
        ports: 0,
    };

    /// Reads the packet's ports if flow records are wanted.
    #[inline(always)]
    pub fn read_ports(&mut self, config: &NodeConfig, frame: Frame) {
        if config.flags & CONFIG_FLOWS != 0
            && !self.packet.later_fragment
            && matches!(self.packet.protocol, PROTOCOL_TCP | PROTOCOL_UDP)
        {
            // A packet without its ports is forwarded like any other; its record shows none.
            let _ = frame.load(self.packet.transport_offset, &mut self.ports);
        }
    }
}

/// The node's settings.
///
/// # Errors
/// `NotConfigured` until user space has written them (cluster id 0 is none).
#[inline(always)]
pub fn config() -> Result<&'static NodeConfig, DropReason> {
    let config = CONFIG.get(0).ok_or(DropReason::NotConfigured)?;
    if config.cluster_id == 0 {
        return Err(DropReason::NotConfigured);
    }
    Ok(config)
}

/// Counts, records and translates a program's outcome.
#[inline(always)]
pub fn conclude(hook: u8, seen: &Seen, outcome: Result<Action, DropReason>) -> i32 {
    match outcome {
        Ok(Action::Pass) => TC_ACT_OK,
        Ok(Action::Ignore) => TC_ACT_SHOT,
        Ok(Action::Forward(path)) => {
            count_traffic(path as u32, seen.packet.length_bytes);
            record(hook, seen, VERDICT_FORWARDED, path as u32);
            TC_ACT_REDIRECT
        }
        Ok(Action::Answer(reason)) => {
            count_drop(reason);
            record(hook, seen, VERDICT_DROPPED, reason as u32);
            TC_ACT_REDIRECT
        }
        Err(reason) => {
            count_drop(reason);
            record(hook, seen, VERDICT_DROPPED, reason as u32);
            TC_ACT_SHOT
        }
    }
}

/// Counts a packet between this node and another as it went over the wire.
#[inline(always)]
pub fn count_wire(kind: WireTraffic, bytes: u32) {
    count_traffic(kind as u32, bytes);
}

#[inline(always)]
fn count_traffic(slot: u32, bytes: u32) {
    if let Some(value) = TRAFFIC.get_ptr_mut(slot) {
        // SAFETY: this CPU's slot; programs on one CPU do not interrupt each other here.
        unsafe {
            (*value).packets += 1;
            (*value).bytes += u64::from(bytes);
        }
    }
}

#[inline(always)]
fn count_drop(reason: DropReason) {
    if let Some(value) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: as above.
        unsafe { *value += 1 };
    }
}

#[inline(always)]
fn record(hook: u8, seen: &Seen, verdict: u8, path_or_reason: u32) {
    let Some(config) = CONFIG.get(0) else { return };
    if config.flags & CONFIG_FLOWS == 0 {
        return;
    }
    // A full ring loses records, never packets; readers see it from the counters.
    let Some(mut entry) = FLOWS.reserve::<FlowRecord>(0) else {
        return;
    };
    let ports = seen.ports.to_ne_bytes();
    entry.write(FlowRecord {
        // SAFETY: takes nothing.
        time_ns: unsafe { bpf_ktime_get_ns() },
        source: *seen.packet.source.as_key(),
        destination: *seen.packet.destination.as_key(),
        source_identity: seen.identity,
        path_or_reason,
        length_bytes: seen.packet.length_bytes,
        source_port_be: [ports[0], ports[1]],
        destination_port_be: [ports[2], ports[3]],
        protocol: seen.packet.protocol,
        hook,
        verdict,
        reserved: 0,
        reserved2: 0,
    });
    entry.submit(0);
}
