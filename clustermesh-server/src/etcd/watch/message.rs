//! What a watch sends, and its way into gRPC: events are copied as apply has encoded them, for each watcher alike.

use bytes::BufMut;
use clustermesh_api::etcd::mvcc::Event;
use clustermesh_api::etcd::rpc::watch_create_request::FilterType;
use clustermesh_api::etcd::rpc::{WatchCreateRequest, WatchRequest, WatchResponse};
use clustermesh_core::{EventKind, StoredEvent};
use clustermesh_raft::WatchEvents;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, EncodeBuf, Encoder};
use tonic_prost::ProstDecoder;

/// `events` in `etcdserverpb.WatchResponse`.
const EVENTS_TAG: u32 = 11;
/// A stream's buffers at first: most streams of very many are quiet.
const BUFFER_BYTES: usize = 512;
/// Messages that are ready go to the connection in pieces of about so many bytes.
const YIELD_BYTES: usize = 64 << 10;

/// What a watch wants of an event.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wanted {
    no_put: bool,
    no_delete: bool,
    prev_kv: bool,
}

impl Wanted {
    pub(super) fn of(request: &WatchCreateRequest) -> Self {
        let without = |filter| request.filters().any(|other| other == filter);
        Self {
            no_put: without(FilterType::Noput),
            no_delete: without(FilterType::Nodelete),
            prev_kv: request.prev_kv,
        }
    }

    fn passes(self, event: &StoredEvent) -> bool {
        match event.kind() {
            EventKind::Put => !self.no_put,
            EventKind::Delete => !self.no_delete,
        }
    }

    fn events(self, group: &WatchEvents) -> impl Iterator<Item = &StoredEvent> {
        group.events().filter(move |event| self.passes(event))
    }
}

/// Events of one message, those of one revision together.
#[derive(Debug)]
pub struct Batch {
    groups: Vec<WatchEvents>,
    wanted: Wanted,
    count: usize,
    bytes: usize,
}

impl Batch {
    pub(super) const fn new(wanted: Wanted) -> Self {
        Self {
            groups: Vec::new(),
            wanted,
            count: 0,
            bytes: 0,
        }
    }

    /// Adds what is wanted of a revision.
    pub(super) fn push(&mut self, group: WatchEvents) {
        let before = self.count;
        for event in self.wanted.events(&group) {
            let size = event.encoded_len(self.wanted.prev_kv);
            self.count += 1;
            self.bytes += key_len(EVENTS_TAG) + encoded_len_varint(size as u64) + size;
        }
        if self.count > before {
            self.groups.push(group);
        }
    }

    /// Number of events.
    pub(super) const fn len(&self) -> usize {
        self.count
    }

    /// Encoded events with their tags and lengths.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    fn events(&self) -> impl Iterator<Item = &StoredEvent> {
        let wanted = self.wanted;
        self.groups
            .iter()
            .flat_map(move |group| wanted.events(group))
    }

    /// The events as messages of their own.
    pub(super) fn to_events(&self) -> Vec<Event> {
        let prev_kv = self.wanted.prev_kv;
        self.events().map(|event| event.to_event(prev_kv)).collect()
    }

    fn encode(&self, buffer: &mut impl BufMut) {
        let prev_kv = self.wanted.prev_kv;
        for event in self.events() {
            encode_key(EVENTS_TAG, WireType::LengthDelimited, buffer);
            encode_varint(event.encoded_len(prev_kv) as u64, buffer);
            event.encode(prev_kv, buffer);
        }
    }
}

/// One message of a stream.
#[derive(Debug)]
pub struct WatchMessage {
    /// All but the events of `batch`, which come last on the wire.
    head: WatchResponse,
    batch: Option<Batch>,
}

impl WatchMessage {
    /// `head` with these events.
    pub(super) const fn new(head: WatchResponse, batch: Batch) -> Self {
        Self {
            head,
            batch: Some(batch),
        }
    }
}

impl From<WatchResponse> for WatchMessage {
    fn from(head: WatchResponse) -> Self {
        Self { head, batch: None }
    }
}

/// etcd's `Watch` on the server's side.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct WatchCodec;

/// Writes a stream's messages.
#[derive(Debug)]
pub(super) struct WatchEncoder;

impl Codec for WatchCodec {
    type Encode = WatchMessage;
    type Decode = WatchRequest;
    type Encoder = WatchEncoder;
    type Decoder = ProstDecoder<WatchRequest>;

    fn encoder(&mut self) -> Self::Encoder {
        WatchEncoder
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }
}

impl Encoder for WatchEncoder {
    type Item = WatchMessage;
    type Error = Status;

    fn encode(&mut self, message: WatchMessage, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let events = message.batch.as_ref().map_or(0, Batch::bytes);
        buffer.reserve(message.head.encoded_len() + events);
        let encoded = message.head.encode(buffer);
        encoded.map_err(|error| Status::internal(error.to_string()))?;
        if let Some(batch) = &message.batch {
            batch.encode(buffer);
        }
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}
