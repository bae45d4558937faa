//! One version of a key and the events that watchers get, each encoded once.

use bytes::{BufMut, Bytes};
use clustermesh_api::etcd::mvcc::{Event, KeyValue, event::EventType};
use prost::encoding::{self, WireType};
use smallvec::SmallVec;
use triomphe::ThinArc;

use crate::limits::VERSION_OVERHEAD_BYTES;

/// Fields of `mvccpb.Event`.
mod event_tag {
    pub(super) const TYPE: u32 = 1;
    pub(super) const KV: u32 = 2;
    pub(super) const PREV_KV: u32 = 3;
}

/// Fields of `mvccpb.KeyValue`.
mod kv_tag {
    pub(super) const KEY: u32 = 1;
    pub(super) const CREATE_REVISION: u32 = 2;
    pub(super) const MOD_REVISION: u32 = 3;
    pub(super) const VERSION: u32 = 4;
    pub(super) const VALUE: u32 = 5;
    pub(super) const LEASE: u32 = 6;
}

/// The longest that comes before an event's key and value: its type, their tag and length.
const MAX_EVENT_HEADER_BYTES: usize = 13;

/// What an event did to its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// The key was created or changed.
    Put,
    /// The key was deleted.
    Delete,
}

/// A key as one change left it: a value, or a tombstone.
///
/// One allocation holds it, as the encoded event that watchers get: of very many keys each further one would cost more than
/// what it saves. Clones share it. Key and value are copies, so that no version keeps a whole log entry in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(ThinArc<Revision, u8>);

/// etcd's full revision of a change. No two changes have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Revision {
    /// What clients call the revision.
    pub(crate) main: i64,
    /// Number among the changes of the same main revision, from 0.
    pub(crate) sub: u32,
}

/// Numbers of a new version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VersionNumbers {
    pub(crate) revision: Revision,
    pub(crate) create_revision: i64,
    pub(crate) version: i64,
    pub(crate) lease: i64,
}

/// What an encoded `mvccpb.KeyValue` says.
struct Fields<'a> {
    key: &'a [u8],
    create_revision: i64,
    version: i64,
    value: &'a [u8],
    lease: i64,
}

/// An encoded event as the owner of buffers that are parts of it.
struct Shared(Version);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        self.0.encoded()
    }
}

impl Version {
    pub(crate) fn put(key: &[u8], value: &[u8], numbers: VersionNumbers) -> Self {
        Self::new(EventKind::Put, key, value, numbers)
    }

    pub(crate) fn tombstone(key: &[u8], revision: Revision) -> Self {
        let numbers = VersionNumbers {
            revision,
            create_revision: 0,
            version: 0,
            lease: 0,
        };
        Self::new(EventKind::Delete, key, &[], numbers)
    }

    fn new(kind: EventKind, key: &[u8], value: &[u8], numbers: VersionNumbers) -> Self {
        let before = [
            (kv_tag::CREATE_REVISION, numbers.create_revision),
            (kv_tag::MOD_REVISION, numbers.revision.main),
            (kv_tag::VERSION, numbers.version),
        ];
        let after = (kv_tag::LEASE, numbers.lease);
        let numbers_len: usize = before.iter().chain([&after]).map(number_len).sum();
        let kv_len = slice_len(key) + slice_len(value) + numbers_len;
        let mut event = Vec::with_capacity(MAX_EVENT_HEADER_BYTES + kv_len);
        if kind == EventKind::Delete {
            encoding::int32::encode(event_tag::TYPE, &EventType::Delete.into(), &mut event);
        }
        encoding::encode_key(event_tag::KV, WireType::LengthDelimited, &mut event);
        encoding::encode_varint(kv_len as u64, &mut event);
        put_slice(kv_tag::KEY, key, &mut event);
        for (tag, number) in before {
            put_number(tag, number, &mut event);
        }
        put_slice(kv_tag::VALUE, value, &mut event);
        put_number(after.0, after.1, &mut event);
        Self(ThinArc::from_header_and_slice(numbers.revision, &event))
    }

    /// The event in protobuf, without `prev_kv`.
    fn encoded(&self) -> &[u8] {
        &self.0.slice
    }

    /// `mvccpb.KeyValue` in protobuf; that of a tombstone has key and revision only.
    pub(crate) fn encoded_key_value(&self) -> &[u8] {
        // The event's type comes before its key and value; 0, for a put, is left out.
        let skipped = if self.is_tombstone() { 3 } else { 1 };
        let mut rest = self.encoded().get(skipped..).unwrap_or_default();
        take_varint(&mut rest);
        rest
    }

    fn fields(&self) -> Fields<'_> {
        let mut rest = self.encoded_key_value();
        let key = take_slice(kv_tag::KEY, &mut rest);
        let create_revision = take_number(kv_tag::CREATE_REVISION, &mut rest);
        take_number(kv_tag::MOD_REVISION, &mut rest);
        Fields {
            key,
            create_revision,
            version: take_number(kv_tag::VERSION, &mut rest),
            value: take_slice(kv_tag::VALUE, &mut rest),
            lease: take_number(kv_tag::LEASE, &mut rest),
        }
    }

    /// Whether this is a deletion.
    #[must_use]
    pub fn is_tombstone(&self) -> bool {
        self.encoded().first() == Some(&tag_byte(event_tag::TYPE, WireType::Varint))
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        take_slice(kv_tag::KEY, &mut self.encoded_key_value())
    }

    /// The value, shared; empty for a tombstone.
    #[must_use]
    pub fn value(&self) -> Bytes {
        self.shared().slice_ref(self.value_bytes())
    }

    /// The value's bytes; empty for a tombstone.
    #[must_use]
    pub fn value_bytes(&self) -> &[u8] {
        self.fields().value
    }

    /// Revision of the change.
    #[must_use]
    pub fn mod_revision(&self) -> i64 {
        self.revision().main
    }

    /// Revision at which the key was created; 0 for a tombstone.
    #[must_use]
    pub fn create_revision(&self) -> i64 {
        self.fields().create_revision
    }

    /// Number of changes since the creation, from 1; 0 for a tombstone.
    #[must_use]
    pub fn version(&self) -> i64 {
        self.fields().version
    }

    /// Id of the attached lease; 0 for none.
    #[must_use]
    pub fn lease(&self) -> i64 {
        self.fields().lease
    }

    /// Place among the changes of the same revision, from 0.
    #[must_use]
    pub fn sub(&self) -> u32 {
        self.revision().sub
    }

    pub(crate) fn revision(&self) -> Revision {
        self.0.header.header
    }

    /// The event as a buffer that shares this version's memory.
    fn shared(&self) -> Bytes {
        Bytes::from_owner(Shared(self.clone()))
    }

    /// The protobuf form; key and value are shared. A tombstone has key and `mod_revision` only, as in etcd's events.
    #[must_use]
    pub fn to_key_value(&self) -> KeyValue {
        let shared = self.shared();
        let fields = self.fields();
        KeyValue {
            key: shared.slice_ref(fields.key),
            create_revision: fields.create_revision,
            mod_revision: self.mod_revision(),
            version: fields.version,
            value: shared.slice_ref(fields.value),
            lease: fields.lease,
        }
    }

    /// What this version counts in the size of the state.
    pub(crate) fn approximate_bytes(&self) -> u64 {
        let fields = self.fields();
        fields.key.len() as u64 + fields.value.len() as u64 + VERSION_OVERHEAD_BYTES
    }
}

/// A field's tag as it is encoded: those of these messages are single bytes.
#[expect(clippy::cast_possible_truncation, reason = "tags here are below 16")]
const fn tag_byte(tag: u32, kind: WireType) -> u8 {
    (tag << 3) as u8 | kind as u8
}

/// What a number takes; 0 is left out.
fn number_len((tag, number): &(u32, i64)) -> usize {
    if *number == 0 {
        0
    } else {
        encoding::int64::encoded_len(*tag, number)
    }
}

fn put_number(tag: u32, number: i64, buffer: &mut Vec<u8>) {
    if number != 0 {
        encoding::int64::encode(tag, &number, buffer);
    }
}

/// What bytes take with a tag of one byte; none are left out.
fn slice_len(bytes: &[u8]) -> usize {
    if bytes.is_empty() {
        0
    } else {
        1 + encoding::encoded_len_varint(bytes.len() as u64) + bytes.len()
    }
}

fn put_slice(tag: u32, bytes: &[u8], buffer: &mut Vec<u8>) {
    if !bytes.is_empty() {
        encoding::encode_key(tag, WireType::LengthDelimited, buffer);
        encoding::encode_varint(bytes.len() as u64, buffer);
        buffer.extend_from_slice(bytes);
    }
}

/// Takes a varint from the front; 0 where there is none, which what is encoded here never shows.
fn take_varint(rest: &mut &[u8]) -> u64 {
    encoding::decode_varint(rest).unwrap_or_default()
}

/// Takes a field of type `int64` from the front, where it is next.
fn take_number(tag: u32, rest: &mut &[u8]) -> i64 {
    let Some((_, after)) = rest
        .split_first()
        .filter(|(first, _)| **first == tag_byte(tag, WireType::Varint))
    else {
        return 0;
    };
    *rest = after;
    take_varint(rest).cast_signed()
}

/// Takes a field of type `bytes` from the front, where it is next.
fn take_slice<'a>(tag: u32, rest: &mut &'a [u8]) -> &'a [u8] {
    let Some((_, mut after)) = rest
        .split_first()
        .filter(|(first, _)| **first == tag_byte(tag, WireType::LengthDelimited))
    else {
        return &[];
    };
    let len = usize::try_from(take_varint(&mut after)).unwrap_or(usize::MAX);
    let (bytes, after) = after.split_at_checked(len).unwrap_or_default();
    *rest = after;
    bytes
}

/// One change as watchers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEvent {
    kv: Version,
    prev: Option<Version>,
}

impl StoredEvent {
    /// `prev` is the key before the revision. As in etcd, an event that creates the key has none, also where the
    /// same revision deleted it.
    pub(crate) fn new(kv: Version, prev: Option<Version>) -> Self {
        let creates = kv.create_revision() == kv.mod_revision();
        Self {
            kv,
            prev: prev.filter(|_| !creates),
        }
    }

    /// Put or delete.
    #[must_use]
    pub fn kind(&self) -> EventKind {
        if self.kv.is_tombstone() {
            EventKind::Delete
        } else {
            EventKind::Put
        }
    }

    /// The changed key.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        self.kv.key()
    }

    /// The key after the change.
    #[must_use]
    pub const fn kv(&self) -> &Version {
        &self.kv
    }

    /// The key before the event's revision; `None` where it did not exist or that revision is compacted.
    #[must_use]
    pub const fn prev(&self) -> Option<&Version> {
        self.prev.as_ref()
    }

    /// `mvccpb.Event` without `prev_kv` in protobuf: made once at apply, shared by all watchers.
    #[must_use]
    pub fn encoded(&self) -> &[u8] {
        self.kv.encoded()
    }

    /// The version before, where it is wanted and there is one.
    fn prev_if(&self, with_prev: bool) -> Option<&[u8]> {
        let prev = self.prev.as_ref().filter(|_| with_prev)?;
        Some(prev.encoded_key_value())
    }

    /// Bytes that [`StoredEvent::encode`] writes.
    #[must_use]
    pub fn encoded_len(&self, with_prev: bool) -> usize {
        let prev = self.prev_if(with_prev).map_or(0, |prev| {
            encoding::key_len(event_tag::PREV_KV)
                + encoding::encoded_len_varint(prev.len() as u64)
                + prev.len()
        });
        self.encoded().len() + prev
    }

    /// Writes what [`StoredEvent::to_event`] encodes to, from what is encoded already.
    pub fn encode(&self, with_prev: bool, buffer: &mut impl BufMut) {
        buffer.put_slice(self.encoded());
        if let Some(prev) = self.prev_if(with_prev) {
            encoding::encode_key(event_tag::PREV_KV, WireType::LengthDelimited, buffer);
            encoding::encode_varint(prev.len() as u64, buffer);
            buffer.put_slice(prev);
        }
    }

    /// The protobuf message; values are shared.
    #[must_use]
    pub fn to_event(&self, with_prev: bool) -> Event {
        let kind = match self.kind() {
            EventKind::Put => EventType::Put,
            EventKind::Delete => EventType::Delete,
        };
        Event {
            r#type: kind.into(),
            kv: Some(self.kv.to_key_value()),
            prev_kv: self
                .prev
                .as_ref()
                .filter(|_| with_prev)
                .map(|prev| prev.to_key_value()),
        }
    }
}

/// All changes of one main revision, in order.
#[derive(Debug, PartialEq, Eq)]
pub struct EventGroup {
    /// The main revision.
    pub revision: i64,
    /// At least one.
    pub events: SmallVec<[StoredEvent; 1]>,
}

impl EventGroup {
    /// Sum of the encoded events, bytes.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        self.events.iter().map(|event| event.encoded().len()).sum()
    }

    /// The same without previous values, for the group at the compact revision (etcd cannot read those either).
    pub(crate) fn without_prev(&self) -> Self {
        Self {
            revision: self.revision,
            events: self
                .events
                .iter()
                .map(|event| StoredEvent::new(event.kv.clone(), None))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn version(key: &Bytes) -> impl Strategy<Value = Version> + use<> {
        let key = key.clone();
        let value = proptest::collection::vec(any::<u8>(), 0..300);
        let numbers = (
            1_i64..i64::MAX,
            any::<u32>(),
            1_i64..400,
            0_i64..400,
            any::<i64>(),
        );
        (value, numbers).prop_map(move |(value, (main, sub, create, version, lease))| {
            let revision = Revision { main, sub };
            if version == 0 {
                return Version::tombstone(&key, revision);
            }
            let numbers = VersionNumbers {
                revision,
                create_revision: create,
                version,
                lease,
            };
            Version::put(&key, &value, numbers)
        })
    }

    fn event() -> impl Strategy<Value = StoredEvent> {
        proptest::collection::vec(any::<u8>(), 1..200).prop_flat_map(|key| {
            let key = Bytes::from(key);
            let prev = proptest::option::of(version(&key));
            (version(&key), prev).prop_map(|(kv, prev)| StoredEvent::new(kv, prev))
        })
    }

    proptest! {
        #[test]
        fn what_is_stored_encodes_as_the_message_does(event in event(), with_prev: bool) {
            let mut encoded = Vec::new();
            event.encode(with_prev, &mut encoded);
            prop_assert_eq!(encoded.len(), event.encoded_len(with_prev));
            let message = event.to_event(with_prev);
            prop_assert_eq!(&encoded, &message.encode_to_vec());
            prop_assert_eq!(Event::decode(encoded.as_slice()), Ok(message));
        }

        #[test]
        fn what_was_put_is_read(
            key in proptest::collection::vec(any::<u8>(), 1..200),
            value in proptest::collection::vec(any::<u8>(), 0..20_000),
            numbers in (1_i64.., any::<u32>(), 1_i64.., 1_i64.., any::<i64>()),
        ) {
            let (main, sub, create_revision, version, lease) = numbers;
            let revision = Revision { main, sub };
            let numbers = VersionNumbers { revision, create_revision, version, lease };
            let put = Version::put(&key, &value, numbers);
            prop_assert!(!put.is_tombstone());
            prop_assert_eq!(put.key(), &key);
            prop_assert_eq!(put.value_bytes(), &value);
            prop_assert_eq!(&put.value(), &value);
            prop_assert_eq!((put.revision(), put.mod_revision(), put.sub()), (revision, main, sub));
            prop_assert_eq!(put.create_revision(), create_revision);
            prop_assert_eq!(put.version(), version);
            prop_assert_eq!(put.lease(), lease);
            let deleted = Version::tombstone(&key, revision);
            prop_assert!(deleted.is_tombstone());
            prop_assert_eq!((deleted.key(), deleted.revision()), (key.as_slice(), revision));
            prop_assert_eq!((deleted.version(), deleted.value().len()), (0, 0));
        }
    }
}
