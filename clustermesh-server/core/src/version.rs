//! One version of a key and the events that watchers get, each encoded once.

use std::sync::Arc;

use bytes::{BufMut, Bytes};
use clustermesh_api::etcd::mvcc::{Event, KeyValue, event::EventType};
use prost::{
    Message,
    encoding::{self, WireType},
};

use crate::limits::VERSION_OVERHEAD_BYTES;

/// `prev_kv` in `mvccpb.Event`.
const PREV_KV_TAG: u32 = 3;

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
/// The value is a slice of the encoded event: one allocation holds both, and it is a copy, so that no version keeps a whole log entry in memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Version {
    key: Bytes,
    encoded: Bytes,
    value_start: usize,
    value_len: usize,
    mod_revision: i64,
    create_revision: i64,
    version: i64,
    lease: i64,
    sub: u32,
}

/// Numbers of a new version.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VersionNumbers {
    pub(crate) mod_revision: i64,
    pub(crate) sub: u32,
    pub(crate) create_revision: i64,
    pub(crate) version: i64,
    pub(crate) lease: i64,
}

impl Version {
    pub(crate) fn put(key: Bytes, value: &Bytes, numbers: VersionNumbers) -> Self {
        let event = Event {
            r#type: EventType::Put.into(),
            kv: Some(KeyValue {
                key: key.clone(),
                create_revision: numbers.create_revision,
                mod_revision: numbers.mod_revision,
                version: numbers.version,
                value: value.clone(),
                lease: numbers.lease,
            }),
            prev_kv: None,
        };
        let encoded = Bytes::from(event.encode_to_vec());
        // In tag order only the lease follows the value.
        let lease_len = if numbers.lease == 0 {
            0
        } else {
            prost::encoding::int64::encoded_len(6, &numbers.lease)
        };
        Self {
            key,
            value_start: encoded.len() - lease_len - value.len(),
            value_len: value.len(),
            encoded,
            mod_revision: numbers.mod_revision,
            create_revision: numbers.create_revision,
            version: numbers.version,
            lease: numbers.lease,
            sub: numbers.sub,
        }
    }

    pub(crate) fn tombstone(key: Bytes, mod_revision: i64, sub: u32) -> Self {
        let event = Event {
            r#type: EventType::Delete.into(),
            kv: Some(KeyValue {
                key: key.clone(),
                mod_revision,
                ..KeyValue::default()
            }),
            prev_kv: None,
        };
        Self {
            key,
            encoded: Bytes::from(event.encode_to_vec()),
            value_start: 0,
            value_len: 0,
            mod_revision,
            create_revision: 0,
            version: 0,
            lease: 0,
            sub,
        }
    }

    /// `mvccpb.KeyValue` in protobuf; that of a tombstone has key and revision only.
    pub(crate) fn encoded_key_value(&self) -> &[u8] {
        // The event's type comes before its key and value; 0, for a put, is left out.
        let kv_len = prost::encoding::decode_varint(&mut self.after_tag())
            .ok()
            .and_then(|len| usize::try_from(len).ok())
            .unwrap_or_default();
        let start = self.encoded.len().saturating_sub(kv_len);
        self.encoded.get(start..).unwrap_or_default()
    }

    /// The encoded event from the length of its `kv` on.
    fn after_tag(&self) -> &[u8] {
        let skipped = if self.is_tombstone() { 3 } else { 1 };
        self.encoded.get(skipped..).unwrap_or_default()
    }

    /// Whether this is a deletion.
    #[must_use]
    pub const fn is_tombstone(&self) -> bool {
        self.version == 0
    }

    /// The key.
    #[must_use]
    pub const fn key(&self) -> &Bytes {
        &self.key
    }

    /// The value, shared; empty for a tombstone.
    #[must_use]
    pub fn value(&self) -> Bytes {
        if self.value_len == 0 {
            return Bytes::new();
        }
        self.encoded
            .slice(self.value_start..self.value_start + self.value_len)
    }

    /// The value's bytes; empty for a tombstone.
    #[must_use]
    pub fn value_bytes(&self) -> &[u8] {
        self.encoded
            .get(self.value_start..self.value_start + self.value_len)
            .unwrap_or_default()
    }

    /// Revision of the change.
    #[must_use]
    pub const fn mod_revision(&self) -> i64 {
        self.mod_revision
    }

    /// Revision at which the key was created; 0 for a tombstone.
    #[must_use]
    pub const fn create_revision(&self) -> i64 {
        self.create_revision
    }

    /// Number of changes since the creation, from 1; 0 for a tombstone.
    #[must_use]
    pub const fn version(&self) -> i64 {
        self.version
    }

    /// Id of the attached lease; 0 for none.
    #[must_use]
    pub const fn lease(&self) -> i64 {
        self.lease
    }

    /// Place among the changes of the same revision, from 0.
    #[must_use]
    pub const fn sub(&self) -> u32 {
        self.sub
    }

    /// The protobuf form; values are shared. A tombstone has key and `mod_revision` only, as in etcd's events.
    #[must_use]
    pub fn to_key_value(&self) -> KeyValue {
        KeyValue {
            key: self.key.clone(),
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            version: self.version,
            value: self.value(),
            lease: self.lease,
        }
    }

    /// What this version counts in the size of the state.
    pub(crate) const fn approximate_bytes(&self) -> u64 {
        self.key.len() as u64 + self.value_len as u64 + VERSION_OVERHEAD_BYTES
    }
}

/// One change as watchers see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredEvent {
    kv: Arc<Version>,
    prev: Option<Arc<Version>>,
}

impl StoredEvent {
    pub(crate) const fn new(kv: Arc<Version>, prev: Option<Arc<Version>>) -> Self {
        Self { kv, prev }
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
    pub fn key(&self) -> &Bytes {
        self.kv.key()
    }

    /// The key after the change.
    #[must_use]
    pub const fn kv(&self) -> &Arc<Version> {
        &self.kv
    }

    /// The key before the event's revision; `None` where it did not exist or that revision is compacted.
    #[must_use]
    pub const fn prev(&self) -> Option<&Arc<Version>> {
        self.prev.as_ref()
    }

    /// `mvccpb.Event` without `prev_kv` in protobuf: made once at apply, shared by all watchers.
    #[must_use]
    pub fn encoded(&self) -> &Bytes {
        &self.kv.encoded
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
            encoding::key_len(PREV_KV_TAG)
                + encoding::encoded_len_varint(prev.len() as u64)
                + prev.len()
        });
        self.encoded().len() + prev
    }

    /// Writes what [`StoredEvent::to_event`] encodes to, from what is encoded already.
    pub fn encode(&self, with_prev: bool, buffer: &mut impl BufMut) {
        buffer.put_slice(self.encoded());
        if let Some(prev) = self.prev_if(with_prev) {
            encoding::encode_key(PREV_KV_TAG, WireType::LengthDelimited, buffer);
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
    pub events: Vec<StoredEvent>,
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
                .map(|event| StoredEvent::new(Arc::clone(&event.kv), None))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn version(key: &Bytes) -> impl Strategy<Value = Arc<Version>> + use<> {
        let key = key.clone();
        let value = proptest::collection::vec(any::<u8>(), 0..300);
        let numbers = (
            1_i64..i64::MAX,
            any::<u32>(),
            1_i64..400,
            0_i64..400,
            any::<i64>(),
        );
        (value, numbers).prop_map(
            move |(value, (mod_revision, sub, create, version, lease))| {
                if version == 0 {
                    return Arc::new(Version::tombstone(key.clone(), mod_revision, sub));
                }
                let numbers = VersionNumbers {
                    mod_revision,
                    sub,
                    create_revision: create,
                    version,
                    lease,
                };
                Arc::new(Version::put(key.clone(), &value.into(), numbers))
            },
        )
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
            prop_assert_eq!(encoded, event.to_event(with_prev).encode_to_vec());
        }
    }
}
