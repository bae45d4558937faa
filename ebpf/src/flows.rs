//! Reader of the flow records that the programs write.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use aya::maps::{Map, MapData, RingBuf};
use clustermesh_ebpf_abi::FlowRecord;

use crate::Error;
use crate::sys::plain;

/// Takes flow records out of the ring buffer.
///
/// The descriptor becomes readable when records arrive (epoll; tokio's `AsyncFd`). There is
/// one ring for the node: two readers at once would share its records between them.
/// Programs write while [`CONFIG_FLOWS`](clustermesh_ebpf_abi::CONFIG_FLOWS) is set.
pub struct FlowReader(RingBuf<MapData>);

impl std::fmt::Debug for FlowReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("FlowReader")
            .field(&self.as_raw_fd())
            .finish()
    }
}

impl FlowReader {
    pub(crate) fn new(map: MapData) -> Result<Self, Error> {
        let ring = Map::from_map_data(map).and_then(RingBuf::try_from);
        ring.map(Self)
            .map_err(|error| Error::Flows(Box::new(error)))
    }

    /// The oldest record that is waiting; `None` when there is none.
    pub fn next_record(&mut self) -> Option<FlowRecord> {
        while let Some(item) = self.0.next() {
            if let Some(record) = plain::from_bytes(&item) {
                return Some(record);
            }
        }
        None
    }
}

impl AsFd for FlowReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for FlowReader {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
