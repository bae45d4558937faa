//! A stream of answers, with errors that name the endpoint.

use tonic::Streaming;

use crate::{Client, ClientError};

/// Messages from the server, in order.
#[derive(Debug)]
pub struct Messages<T> {
    client: Client,
    stream: Streaming<T>,
}

impl<T> Messages<T> {
    pub(crate) fn new(client: &Client, stream: Streaming<T>) -> Self {
        Self {
            client: client.clone(),
            stream,
        }
    }

    /// The next message; `None` when the server ended the stream. Safe to drop while waiting.
    ///
    /// # Errors
    /// The stream broke.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        self.stream
            .message()
            .await
            .map_err(|status| self.client.fault(status))
    }

    /// The endpoint, for messages of the caller's own.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.client.endpoint()
    }
}
