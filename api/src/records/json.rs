//! JSON as Go's `encoding/json` writes and reads it.

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

use super::error::DecodeError;

/// Compact JSON with Go's HTML escapes, so that equal records are equal bytes.
#[expect(
    clippy::expect_used,
    reason = "serde_json fails on maps whose keys are no strings and on failing writers; records have neither"
)]
pub(crate) fn encode<T: Serialize>(record: &T) -> Bytes {
    let text = serde_json::to_string(record).expect("a record is JSON");
    if text.contains(['<', '>', '&', '\u{2028}', '\u{2029}']) {
        Bytes::from(escape_as_go(&text))
    } else {
        Bytes::from(text)
    }
}

/// Go escapes `<`, `>`, `&`, U+2028 and U+2029; they occur in strings only.
fn escape_as_go(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        match character {
            '<' => escaped.push_str("\\u003c"),
            '>' => escaped.push_str("\\u003e"),
            '&' => escaped.push_str("\\u0026"),
            '\u{2028}' => escaped.push_str("\\u2028"),
            '\u{2029}' => escaped.push_str("\\u2029"),
            other => escaped.push(other),
        }
    }
    escaped
}

pub(crate) fn decode<T: DeserializeOwned>(value: &[u8]) -> Result<T, DecodeError> {
    Ok(serde_json::from_slice(value)?)
}

/// Go reads `null` as "leave the zero value".
pub(crate) fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Go writes a nil slice or map as `null`; we have no nil, so an empty one is it.
pub(crate) fn empty_is_null<S, T>(collection: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    S: Serializer,
    T: Serialize,
    for<'a> &'a T: IntoIterator,
{
    if collection.into_iter().next().is_none() {
        serializer.serialize_none()
    } else {
        collection.serialize(serializer)
    }
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
