//! For tests of this crate and of others: split and merge over whole packets, each in memory of its own.

use crate::merge::{Joins, Merger};
use crate::split::Split;
use crate::vnet::VnetHeader;

/// Bytes between two packets in a buffer: in real ones they lie apart, too.
const GAP_BYTES: usize = 7;

/// The first segments of a super-packet, so many at most; `None` if it makes no sense.
#[must_use]
pub fn split(vnet: VnetHeader, packet: &[u8], most: usize) -> Option<Vec<Vec<u8>>> {
    let plan = Split::plan(vnet, packet, packet.len()).ok()?;
    let segment = |index| {
        let mut segment = vec![0; plan.segment_len(index)];
        plan.copy(index, packet, &mut segment).ok()?;
        Some(segment)
    };
    (0..plan.count().min(most)).map(segment).collect()
}

/// What packets of one batch are joined to, for a device that takes everything.
#[must_use]
pub fn merge(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    let mut buffer = Vec::new();
    let mut merger = Merger::new(Joins {
        udp: true,
        tunnels: true,
    });
    for packet in packets {
        let from = buffer.len();
        buffer.extend_from_slice(packet);
        buffer.extend_from_slice(&[0xee; GAP_BYTES]);
        merger.push(&buffer, from..from + packet.len());
    }
    (0..merger.len())
        .map(|index| {
            let vnet = merger.complete(index, &mut buffer);
            let pieces = merger
                .pieces(index)
                .flat_map(|range| buffer.get(range).unwrap_or_default().to_vec());
            (vnet, pieces.collect())
        })
        .collect()
}
