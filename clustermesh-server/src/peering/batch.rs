//! Responses of the watch stream that are written together.

use bytes::Bytes;
use clustermesh_api::etcd::mvcc::event::EventType;
use clustermesh_api::etcd::rpc::WatchResponse;

use super::error::LinkError;

/// Responses that are ready join one write, up to so many events.
const MAX_EVENTS_PER_WRITE: usize = 4_096;
/// And so many bytes of values.
const MAX_BYTES_PER_WRITE: usize = 4 << 20;

/// Watch ids on the one stream.
pub(super) const WATCH_RECORDS: i64 = 1;
pub(super) const WATCH_CANARIES: i64 = 2;
pub(super) const WATCH_CONFIG: i64 = 3;
pub(super) const WATCH_HEARTBEAT: i64 = 4;

/// What arrived together.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) events: Vec<(Bytes, Option<Bytes>)>,
    bytes: usize,
    pub(super) config: Option<Bytes>,
    /// The records are complete up to here.
    pub(super) revision: i64,
    pub(super) changed: bool,
    /// The peer said that it has sent everything up to its present revision.
    pub(super) progressed: bool,
    pub(super) relist: bool,
}

impl Batch {
    /// What arrives when everything up to `revision` has arrived.
    pub(super) fn after(revision: i64) -> Self {
        Self {
            revision,
            ..Self::default()
        }
    }

    /// Whether it is written before more is taken.
    pub(super) fn is_full(&self) -> bool {
        self.events.len() >= MAX_EVENTS_PER_WRITE
            || self.bytes >= MAX_BYTES_PER_WRITE
            || self.relist
    }

    pub(super) fn add(&mut self, response: WatchResponse) -> Result<(), LinkError> {
        if response.compact_revision != 0 {
            self.relist = true;
            return Ok(());
        }
        if response.canceled {
            return Err(LinkError::Protocol(format!(
                "the peer refused a watch: {}",
                response.cancel_reason
            )));
        }
        let is_progress = !response.created && response.events.is_empty();
        if is_progress {
            self.progressed = true;
            // All watches of the stream have come as far as this.
            let revision = response.header.map_or(0, |header| header.revision);
            self.revision = self.revision.max(revision);
        }
        for event in response.events {
            let is_delete = event.r#type == i32::from(EventType::Delete);
            let Some(kv) = event.kv else { continue };
            self.bytes += kv.key.len() + kv.value.len();
            match response.watch_id {
                WATCH_RECORDS => {
                    self.changed = true;
                    // The header may be ahead of what a server that catches up has sent; the events are not.
                    self.revision = self.revision.max(kv.mod_revision);
                    self.events.push((kv.key, (!is_delete).then_some(kv.value)));
                }
                WATCH_CANARIES => self.events.push((kv.key, (!is_delete).then_some(kv.value))),
                WATCH_CONFIG if !is_delete => self.config = Some(kv.value),
                // That there was a heartbeat is all that it says.
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_api::etcd::mvcc::{Event, KeyValue};
    use clustermesh_api::etcd::rpc::ResponseHeader;

    use super::*;

    fn response(watch_id: i64, header_revision: i64, mod_revision: i64) -> WatchResponse {
        WatchResponse {
            header: Some(ResponseHeader {
                revision: header_revision,
                ..ResponseHeader::default()
            }),
            watch_id,
            events: vec![Event {
                kv: Some(KeyValue {
                    key: Bytes::from_static(b"k"),
                    value: Bytes::from_static(b"v"),
                    mod_revision,
                    ..KeyValue::default()
                }),
                ..Event::default()
            }],
            ..WatchResponse::default()
        }
    }

    #[test]
    fn events_move_the_cursor_by_their_own_revision_and_progress_by_the_headers() {
        let mut batch = Batch::after(5);
        batch.add(response(WATCH_RECORDS, 20, 9)).unwrap();
        // Canaries and heartbeats are no part of the records' order.
        batch.add(response(WATCH_CANARIES, 20, 12)).unwrap();
        batch.add(response(WATCH_HEARTBEAT, 20, 13)).unwrap();
        assert_eq!((batch.revision, batch.events.len()), (9, 2));
        assert!(batch.changed && !batch.progressed);
        batch
            .add(WatchResponse {
                header: response(0, 20, 0).header,
                ..WatchResponse::default()
            })
            .unwrap();
        assert!(batch.progressed);
        assert_eq!(batch.revision, 20);
    }

    #[test]
    fn compacted_history_asks_for_a_listing_and_a_refused_watch_is_an_error() {
        let mut batch = Batch::after(5);
        let compacted = WatchResponse {
            canceled: true,
            compact_revision: 9,
            ..WatchResponse::default()
        };
        batch.add(compacted).unwrap();
        assert!(batch.relist && batch.is_full());
        let refused = WatchResponse {
            canceled: true,
            cancel_reason: "no".to_owned(),
            ..WatchResponse::default()
        };
        assert!(batch.add(refused).is_err());
    }
}
