//! JSON as etcd's gateway writes it: protobuf field names, 64-bit numbers as strings, bytes in base64, defaults left out.

use bytes::{Bytes, BytesMut};
use prost::Message;
use prost_reflect::{DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde::Serialize;
use tonic::{Code, Status};

/// Encodes one JSON value as a message of `descriptor`; nothing at all is the empty message. Unknown fields are ignored.
///
/// # Errors
/// `InvalidArgument` when the text is not such a message.
pub(super) fn to_protobuf(descriptor: &MessageDescriptor, json: &[u8]) -> Result<Bytes, Status> {
    if json.trim_ascii().is_empty() {
        return Ok(Bytes::new());
    }
    let invalid = |error: serde_json::Error| Status::invalid_argument(error.to_string());
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let message =
        DynamicMessage::deserialize_with_options(descriptor.clone(), &mut deserializer, &options)
            .map_err(invalid)?;
    deserializer.end().map_err(invalid)?;
    Ok(message.encode_to_vec().into())
}

/// A message of `descriptor` as JSON, as `{"result": …}` when `wrapped`.
///
/// # Errors
/// `Internal` when the bytes are not such a message.
pub(super) fn from_protobuf(
    descriptor: &MessageDescriptor,
    message: Bytes,
    wrapped: bool,
) -> Result<Vec<u8>, Status> {
    let internal =
        |error: &dyn std::fmt::Display| Status::internal(format!("clustermesh: {error}"));
    let message =
        DynamicMessage::decode(descriptor.clone(), message).map_err(|error| internal(&error))?;
    let options = SerializeOptions::new().use_proto_field_name(true);
    let mut json = Vec::new();
    if wrapped {
        json.extend_from_slice(b"{\"result\":");
    }
    message
        .serialize_with_options(&mut serde_json::Serializer::new(&mut json), &options)
        .map_err(|error| internal(&error))?;
    if wrapped {
        json.extend_from_slice(b"}\n");
    }
    Ok(json)
}

/// An error as the gateway shows it.
#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
    code: i32,
    message: &'a str,
}

/// The body of an error; within a stream, `{"error": …}` on a line.
pub(super) fn error(status: &Status, in_stream: bool) -> Vec<u8> {
    #[derive(Serialize)]
    struct Wrapped<'a> {
        error: ErrorBody<'a>,
    }
    let body = ErrorBody {
        error: status.message(),
        code: i32::from(status.code()),
        message: status.message(),
    };
    let json = if in_stream {
        serde_json::to_vec(&Wrapped { error: body })
    } else {
        serde_json::to_vec(&body)
    };
    let mut json = json.unwrap_or_default();
    if in_stream {
        json.push(b'\n');
    }
    json
}

/// HTTP's status for a gRPC code, as grpc-gateway maps it.
pub(super) fn http_status(code: Code) -> u16 {
    match code {
        Code::Ok => 200,
        Code::Cancelled => 499,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => 400,
        Code::DeadlineExceeded => 504,
        Code::NotFound => 404,
        Code::AlreadyExists | Code::Aborted => 409,
        Code::PermissionDenied => 403,
        Code::Unauthenticated => 401,
        Code::ResourceExhausted => 429,
        Code::Unimplemented => 501,
        Code::Unavailable => 503,
        Code::Unknown | Code::Internal | Code::DataLoss => 500,
    }
}

/// Cuts a stream of bytes into its JSON objects.
#[derive(Debug, Default)]
pub struct Objects {
    buffer: BytesMut,
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Objects {
    /// Takes more bytes; what is not yet a whole object may be `most` bytes long.
    ///
    /// # Errors
    /// `ResourceExhausted` past that.
    pub fn push(&mut self, bytes: &[u8], most: usize) -> Result<(), Status> {
        if self.buffer.len() + bytes.len() > most {
            return Err(Status::resource_exhausted(format!(
                "clustermesh: a request of more than {most} bytes of JSON; send smaller ones"
            )));
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next whole object; `None` until more bytes come.
    ///
    /// # Errors
    /// `InvalidArgument` when something else than an object begins.
    pub fn next_object(&mut self) -> Result<Option<Bytes>, Status> {
        while let Some(byte) = self.buffer.get(self.scanned).copied() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' if self.depth > 0 => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' if self.depth > 0 || byte == b'{' => self.depth += 1,
                b'}' | b']' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        let object = self.buffer.split_to(self.scanned + 1);
                        self.scanned = 0;
                        return Ok(Some(object.freeze()));
                    }
                }
                byte if self.depth > 0 || byte.is_ascii_whitespace() => {}
                byte => {
                    return Err(Status::invalid_argument(format!(
                        "invalid character {:?} looking for beginning of a JSON object",
                        char::from(byte)
                    )));
                }
            }
            self.scanned += 1;
        }
        Ok(None)
    }

    /// Whether an object was cut off.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.depth > 0
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_api::etcd::mvcc::KeyValue;
    use clustermesh_api::etcd::rpc::{LeaseGrantRequest, PutRequest, RangeRequest, RangeResponse};
    use prost_reflect::DescriptorPool;

    use super::*;

    fn descriptor(name: &str) -> MessageDescriptor {
        DescriptorPool::decode(clustermesh_api::FILE_DESCRIPTOR_SET)
            .unwrap()
            .get_message_by_name(name)
            .unwrap()
    }

    #[test]
    fn requests_are_read_with_numbers_as_strings_and_bytes_in_base64() {
        let put = to_protobuf(
            &descriptor("etcdserverpb.PutRequest"),
            br#"{"key":"Zm9v","value":"YmE=","lease":"7","prev_kv":true,"new_field":1}"#,
        )
        .unwrap();
        let put = PutRequest::decode(put).unwrap();
        assert_eq!((&put.key[..], &put.value[..]), (&b"foo"[..], &b"ba"[..]));
        assert!(put.lease == 7 && put.prev_kv);
        let grant = to_protobuf(
            &descriptor("etcdserverpb.LeaseGrantRequest"),
            br#"{"TTL": 60, "ID": "-9223372036854775808"}"#,
        )
        .unwrap();
        let grant = LeaseGrantRequest::decode(grant).unwrap();
        assert_eq!((grant.ttl, grant.id), (60, i64::MIN));
        let range = to_protobuf(
            &descriptor("etcdserverpb.RangeRequest"),
            br#"{"sort_order":"DESCEND","sortTarget":"MOD"}"#,
        )
        .unwrap();
        let range = RangeRequest::decode(range).unwrap();
        assert_eq!((range.sort_order, range.sort_target), (2, 3));
        assert!(
            to_protobuf(&descriptor("etcdserverpb.PutRequest"), b"  ")
                .unwrap()
                .is_empty()
        );
        for bad in [
            &b"{"[..],
            b"[]",
            b"{} {}",
            br#"{"key":"%"}"#,
            br#"{"lease":"x"}"#,
        ] {
            let error = to_protobuf(&descriptor("etcdserverpb.PutRequest"), bad).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn answers_have_etcds_names_and_no_defaults() {
        let response = RangeResponse {
            kvs: vec![KeyValue {
                key: "foo".into(),
                mod_revision: i64::MAX,
                ..KeyValue::default()
            }],
            count: 1,
            ..RangeResponse::default()
        };
        let json = from_protobuf(
            &descriptor("etcdserverpb.RangeResponse"),
            response.encode_to_vec().into(),
            false,
        )
        .unwrap();
        assert_eq!(
            String::from_utf8(json).unwrap(),
            r#"{"kvs":[{"key":"Zm9v","mod_revision":"9223372036854775807"}],"count":"1"}"#
        );
    }

    #[test]
    fn objects_are_found_wherever_the_bytes_are_cut() {
        let text = br#" {"a":"}\"{"} {"b":[{},"]"]}
            {} "#;
        for cut in 1..text.len() {
            let mut objects = Objects::default();
            let mut found = Vec::new();
            for part in text.chunks(cut) {
                objects.push(part, 100).unwrap();
                while let Some(object) = objects.next_object().unwrap() {
                    found.push(trimmed(&object));
                }
            }
            assert_eq!(
                found,
                [&br#"{"a":"}\"{"}"#[..], br#"{"b":[{},"]"]}"#, b"{}"].map(trimmed),
                "{cut}"
            );
            assert!(!objects.is_open());
        }
        let mut objects = Objects::default();
        objects.push(b"x", 10).unwrap();
        assert!(objects.next_object().is_err());
        assert!(objects.push(&[b' '; 10], 10).is_err());
    }

    fn trimmed(object: &[u8]) -> Bytes {
        Bytes::copy_from_slice(object.trim_ascii())
    }
}
