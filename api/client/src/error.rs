//! What can go wrong with a call, always with the endpoint's name.

use std::error::Error;

use clustermesh_process::TlsError;
use tonic::{Code, Status};

use crate::ConfigError;

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The configuration is unusable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Certificates cannot be read.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No endpoint takes a connection; says of each one why.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The server, or the way to it, answered with an error.
    #[error("{endpoint}: {message}")]
    Status {
        /// The endpoint.
        endpoint: String,
        /// What it said.
        message: String,
        /// All of it.
        status: Box<Status>,
    },
    /// The server broke the protocol.
    #[error("{endpoint}: unexpected answer: {reason}")]
    Protocol {
        /// The endpoint.
        endpoint: String,
        /// In which way.
        reason: String,
    },
    /// The stream that the message should have gone on has ended.
    #[error("{endpoint}: the stream has ended")]
    Closed {
        /// The endpoint.
        endpoint: String,
    },
    /// More was found than the caller allows.
    #[error("{endpoint}: more than {limit} keys in the range")]
    TooMany {
        /// The endpoint.
        endpoint: String,
        /// The caller's limit.
        limit: usize,
    },
}

impl ClientError {
    pub(crate) fn from_status(endpoint: String, status: Status) -> Self {
        // A failed connection is hidden in the sources, below the words "transport error".
        let message = match status.source() {
            Some(source) => format!("{}: {}", code_text(status.code()), chain(source)),
            None if status.message().is_empty() => code_text(status.code()).to_owned(),
            None => format!("{}: {}", code_text(status.code()), status.message()),
        };
        Self::Status {
            endpoint,
            message,
            status: Box::new(status),
        }
    }

    /// The gRPC code, where there is one.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Status { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// Trying again later can help. It says nothing about whether the call was carried out.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Closed { .. } => true,
            Self::Status { status, .. } => matches!(
                status.code(),
                Code::Unavailable
                    | Code::DeadlineExceeded
                    | Code::Aborted
                    | Code::Cancelled
                    | Code::ResourceExhausted
                    | Code::Unknown
            ),
            Self::Config(_) | Self::Tls(_) | Self::Protocol { .. } | Self::TooMany { .. } => false,
        }
    }

    /// The server takes the certificate, but not for this call.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        self.code() == Some(Code::PermissionDenied)
    }

    /// The server does not have this call: a plain store knows nothing of a mesh.
    #[must_use]
    pub fn is_unimplemented(&self) -> bool {
        self.code() == Some(Code::Unimplemented)
    }

    /// The server's history does not reach back to the wanted revision.
    #[must_use]
    pub fn is_compacted(&self) -> bool {
        self.code() == Some(Code::OutOfRange)
    }
}

/// Codes as gRPC's own documents spell them.
fn code_text(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown error",
        Code::InvalidArgument => "invalid argument",
        Code::DeadlineExceeded => "no answer in time",
        Code::NotFound => "not found",
        Code::AlreadyExists => "already exists",
        Code::PermissionDenied => "permission denied",
        Code::ResourceExhausted => "resource exhausted",
        Code::FailedPrecondition => "failed precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out of range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal error",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

/// The innermost messages of an error, each once.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        // Outer errors often repeat what they wrap.
        if let Some(last) = parts.last_mut()
            && last.contains(&text)
        {
            if text.len() > last.len() / 2 {
                *last = text;
            }
        } else {
            parts.push(text);
        }
        next = error.source();
    }
    parts.retain(|part| part != "transport error");
    parts.join(": ")
}
