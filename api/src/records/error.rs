//! Why a value could not be read.

use crate::limits::MAX_IDENTITY_LABELS_BYTES;

/// Text that is no label set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Longer than [`MAX_IDENTITY_LABELS_BYTES`].
    #[error("label string of {0} bytes is longer than {MAX_IDENTITY_LABELS_BYTES}")]
    TooLong(usize),
    /// A label without source, or the last one without its `;`.
    #[error("{0:?} is not a label, expected source:key=value;")]
    Label(String),
    /// The same key twice.
    #[error("label {0:?} occurs twice")]
    Duplicate(String),
    /// No label at all.
    #[error("the label set is empty")]
    Empty,
}

/// Why one value could not be read; [`RecordError`](crate::record::RecordError) adds which.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not the JSON that was expected.
    #[error("not a valid record: {0}")]
    Json(#[from] serde_json::Error),
    /// Not a label string.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Not a zstd frame, or one that grows beyond the limit.
    #[error("not a zstd frame of at most {limit} bytes once decoded: {source}", limit = crate::limits::MAX_ENDPOINT_SLICE_DECODED_BYTES)]
    Zstd {
        /// What zstd said.
        source: std::io::Error,
    },
    /// Not the protobuf that was expected.
    #[error("not a valid protobuf message: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// Not UTF-8.
    #[error("not UTF-8 text")]
    NotUtf8,
}
