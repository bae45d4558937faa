//! Requests that never end: a message must have arrived whole in time, as its call holds a stream and memory until then.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use prometheus_client::metrics::counter::Counter;
use tokio::time::{Sleep, sleep};
use tonic::Status;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// gRPC's prefix of a message: compressed or not, and its length.
const PREFIX_BYTES: usize = 5;

/// A body that fails when it is late.
#[derive(Debug)]
struct Arriving<B> {
    body: B,
    within: Duration,
    late: Counter,
    /// Of a stream, the message under way; `None` for a call of one message, which is owed whole.
    message: Option<Message>,
    /// Runs from the first moment that something was missing: most requests come in one piece.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// Where in a gRPC message a stream is.
#[derive(Debug, Default)]
struct Message {
    prefix: [u8; PREFIX_BYTES],
    /// Bytes of the prefix that are there.
    begun: usize,
    /// Bytes of the message that are not.
    missing: usize,
}

impl Message {
    /// Follows bytes of the stream; whether a message became whole.
    fn follow(&mut self, mut bytes: &[u8]) -> bool {
        let mut whole = false;
        while !bytes.is_empty() {
            if self.missing > 0 {
                let taken = self.missing.min(bytes.len());
                self.missing -= taken;
                bytes.advance(taken);
                whole |= self.missing == 0;
                continue;
            }
            if let Some(place) = self.prefix.get_mut(self.begun) {
                *place = bytes.get_u8();
                self.begun += 1;
            }
            if self.begun == PREFIX_BYTES {
                let [_, length @ ..] = self.prefix;
                self.missing = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                self.begun = 0;
                whole |= self.missing == 0;
            }
        }
        whole
    }

    /// Whether its rest is to come.
    fn is_begun(&self) -> bool {
        self.begun > 0 || self.missing > 0
    }
}

/// How long messages may take, and who counts those that took longer.
#[derive(Debug, Clone)]
pub(super) struct Arrivals {
    /// From the moment that something was missing.
    pub(super) within: Duration,
    /// Requests that were given up.
    pub(super) late: Counter,
}

impl Arrivals {
    /// The body of a call: of one message, which must come, or of a stream, which may be quiet between messages.
    pub(super) fn body(&self, body: Incoming, one_message: bool) -> tonic::body::Body {
        tonic::body::Body::new(self.arriving(body, one_message).map_err(Status::from_error))
    }

    fn arriving<B>(&self, body: B, one_message: bool) -> Arriving<B> {
        Arriving {
            body,
            within: self.within,
            late: self.late.clone(),
            message: (!one_message).then(Message::default),
            deadline: None,
        }
    }
}

impl<B> Body for Arriving<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            if let Some(message) = &mut self.message
                && let Some(bytes) = frame
                    .as_ref()
                    .and_then(|frame| frame.as_ref().ok()?.data_ref())
            {
                // What has begun behind a whole message has its own time.
                if message.follow(bytes) {
                    self.deadline = None;
                }
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        if self
            .message
            .as_ref()
            .is_some_and(|message| !message.is_begun())
        {
            return Poll::Pending;
        }
        let within = self.within;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(within)));
        ready!(deadline.as_mut().poll(context));
        self.late.inc();
        let late = Status::deadline_exceeded(format!(
            "clustermesh: the request did not arrive within {within:?}"
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

#[cfg(test)]
mod tests {
    use http_body_util::StreamBody;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    #[tokio::test]
    async fn a_stream_may_be_quiet_between_messages_and_not_within_one() {
        const WITHIN: Duration = Duration::from_millis(100);
        let late = Counter::default();
        let arrivals = Arrivals {
            within: WITHIN,
            late: late.clone(),
        };
        let (sender, frames) = mpsc::channel::<Result<Frame<Bytes>, BoxError>>(8);
        let mut body = arrivals.arriving(StreamBody::new(ReceiverStream::new(frames)), false);
        let send = async |bytes: &'static [u8]| {
            let frame = Frame::data(Bytes::from_static(bytes));
            sender.send(Ok(frame)).await.unwrap();
        };
        // Two messages in three pieces.
        for piece in [&[0, 0, 0, 0, 2, 7][..], &[8, 0, 0, 0], &[0, 0]] {
            send(piece).await;
            assert!(body.frame().await.unwrap().is_ok());
        }
        tokio::select! {
            frame = body.frame() => panic!("{frame:?}"),
            () = sleep(3 * WITHIN) => {}
        }
        // A byte now and then does not help.
        let begun = tokio::time::Instant::now();
        let dripping = async {
            send(&[0, 0, 0, 1, 0]).await;
            loop {
                send(&[7]).await;
                sleep(WITHIN / 5).await;
            }
        };
        let ended = async {
            loop {
                if let Err(error) = body.frame().await.unwrap() {
                    return error.to_string();
                }
            }
        };
        let error = tokio::select! {
            () = dripping => unreachable!(),
            error = ended => error,
        };
        assert!(error.contains("did not arrive within 100ms"), "{error}");
        assert!(begun.elapsed() >= WITHIN);
        assert_eq!(late.get(), 1);
    }

    #[tokio::test]
    async fn each_message_of_a_stream_has_its_own_time() {
        const WITHIN: Duration = Duration::from_secs(2);
        let late = Counter::default();
        let arrivals = Arrivals {
            within: WITHIN,
            late: late.clone(),
        };
        // Every piece ends one message and begins the next.
        let first = Bytes::from_static(&[0, 0, 0, 0, 2, 7]);
        let later = Bytes::from_static(&[8, 0, 0, 0, 0, 2, 7]);
        let pieces = futures_util::stream::unfold(None, move |before| {
            let piece = before.map_or_else(|| first.clone(), |()| later.clone());
            async move {
                sleep(WITHIN / 8).await;
                Some((Ok::<_, BoxError>(Frame::data(piece)), Some(())))
            }
        });
        let mut body = arrivals.arriving(StreamBody::new(Box::pin(pieces)), false);
        let begun = tokio::time::Instant::now();
        while begun.elapsed() < 3 * WITHIN {
            assert!(body.frame().await.unwrap().is_ok());
        }
        assert_eq!(late.get(), 0);
    }

    #[test]
    fn a_message_is_whole_with_its_last_byte() {
        let mut message = Message::default();
        let pieces: [(&[u8], bool); 6] = [
            (&[0, 0, 0, 0], false),
            (&[0], true),
            (&[0, 0, 0, 0, 2, 7], false),
            (&[8], true),
            (&[0, 0, 0, 0, 1, 7, 0], true),
            (&[0, 0, 0, 1], false),
        ];
        for (piece, whole) in pieces {
            assert_eq!(message.follow(piece), whole, "{piece:?}");
        }
    }
}
