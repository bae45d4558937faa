//! Requests that never end: a call of one message must have arrived whole in time, as it holds a stream and memory until then.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use crate::gateway::REQUEST_TIMEOUT;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A body that fails when it is late.
#[derive(Debug)]
struct Arriving {
    body: Incoming,
    /// Runs from the first moment that something was missing: most requests come in one piece.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// The body of a call that has one message, to be there within [`REQUEST_TIMEOUT`].
pub(super) fn in_time(body: Incoming) -> tonic::body::Body {
    let arriving = Arriving {
        body,
        deadline: None,
    };
    tonic::body::Body::new(arriving.map_err(Status::from_error))
}

impl Body for Arriving {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let deadline = self
            .deadline
            .get_or_insert_with(|| Box::pin(sleep(REQUEST_TIMEOUT)));
        ready!(deadline.as_mut().poll(context));
        let late = Status::deadline_exceeded(format!(
            "clustermesh: the request did not arrive within {} s",
            REQUEST_TIMEOUT.as_secs()
        ));
        Poll::Ready(Some(Err(late.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
