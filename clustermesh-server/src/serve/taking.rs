//! Clients that take nothing: a write that waits for one fails when it has acknowledged nothing for long enough. That the
//! kernel takes no more bytes says little: what it holds may be on its way over a link that has become slow.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_rustls::server::TlsStream;

use crate::tcp;

/// What goes over TCP.
pub(super) trait OverTcp {
    /// Bytes that the other end has not acknowledged; `None` where the kernel does not say.
    fn unacknowledged_bytes(&self) -> Option<u32>;
}

impl OverTcp for TcpStream {
    fn unacknowledged_bytes(&self) -> Option<u32> {
        tcp::unacknowledged_bytes(self).ok()
    }
}

impl OverTcp for TlsStream<TcpStream> {
    fn unacknowledged_bytes(&self) -> Option<u32> {
        self.get_ref().0.unacknowledged_bytes()
    }
}

/// Passes a connection through; its writes fail when the client takes nothing for `within`, twice that at most.
#[derive(Debug)]
pub(super) struct Taking<S> {
    stream: S,
    within: Duration,
    given_up: Counter,
    /// Since when a write waits.
    since: Option<Instant>,
    /// What was unacknowledged when that was looked at last, while the same write waited.
    seen: Option<Option<u32>>,
    /// When it is looked at; made for the first write that waits, and not for every one set anew.
    look: Option<Pin<Box<Sleep>>>,
}

impl<S> Taking<S> {
    pub(super) fn new(stream: S, within: Duration, given_up: Counter) -> Self {
        Self {
            stream,
            within,
            given_up,
            since: None,
            seen: None,
            look: None,
        }
    }
}

impl<S: OverTcp> Taking<S> {
    fn judge<T>(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.since = None;
            self.seen = None;
            return polled;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let look = self
            .look
            .get_or_insert_with(|| Box::pin(sleep_until(since + self.within)));
        loop {
            ready!(look.as_mut().poll(context));
            let now = Instant::now();
            if now < since + self.within {
                // Set for a write that has ended.
                look.as_mut().reset(since + self.within);
                continue;
            }
            let unacknowledged = self.stream.unacknowledged_bytes();
            if self.seen == Some(unacknowledged) {
                self.given_up.inc();
                return Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the client took nothing for {:?}", self.within),
                )));
            }
            self.seen = Some(unacknowledged);
            look.as_mut().reset(now + self.within);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Taking<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + OverTcp + Unpin> AsyncWrite for Taking<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.judge(context, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(context);
        self.judge(context, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(context);
        self.judge(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, bufs);
        self.judge(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::io::AsyncWriteExt;

    use super::*;

    const WITHIN: Duration = Duration::from_millis(100);

    /// Takes nothing from us; the kernel gets rid of `taken` bytes between two looks.
    struct Full {
        unacknowledged: Arc<AtomicU32>,
        taken: u32,
        looks: Arc<AtomicU32>,
    }

    impl OverTcp for Full {
        fn unacknowledged_bytes(&self) -> Option<u32> {
            self.looks.fetch_add(1, Ordering::Relaxed);
            Some(self.unacknowledged.fetch_sub(self.taken, Ordering::Relaxed))
        }
    }

    impl AsyncWrite for Full {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    fn full(taken: u32) -> (Taking<Full>, Arc<AtomicU32>, Counter) {
        let (looks, given_up) = (Arc::default(), Counter::default());
        let stream = Full {
            unacknowledged: Arc::new(AtomicU32::new(1 << 20)),
            taken,
            looks: Arc::clone(&looks),
        };
        (
            Taking::new(stream, WITHIN, given_up.clone()),
            looks,
            given_up,
        )
    }

    #[tokio::test]
    async fn a_write_fails_when_nothing_is_acknowledged_and_so_does_an_end() {
        let (mut stream, _, given_up) = full(0);
        for attempt in 1..=2 {
            let begun = Instant::now();
            let error = match attempt {
                1 => stream.write(b"x").await.unwrap_err(),
                _ => stream.shutdown().await.unwrap_err(),
            };
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(given_up.get(), attempt);
            if attempt == 1 {
                assert!(begun.elapsed() >= 2 * WITHIN);
            }
        }
    }

    #[tokio::test]
    async fn a_write_waits_as_long_as_something_is_acknowledged() {
        let (mut stream, looks, given_up) = full(1);
        let looked = async {
            while looks.load(Ordering::Relaxed) < 5 {
                tokio::time::sleep(WITHIN / 4).await;
            }
        };
        tokio::select! {
            written = stream.write(b"x") => panic!("{written:?}"),
            () = looked => {}
        }
        assert_eq!(given_up.get(), 0);
    }

    #[tokio::test]
    async fn what_waited_before_does_not_count_for_the_next_write() {
        let (mut stream, looks, _) = full(0);
        let looked = async {
            while looks.load(Ordering::Relaxed) == 0 {
                tokio::time::sleep(WITHIN / 4).await;
            }
        };
        tokio::select! {
            written = stream.write(b"x") => panic!("{written:?}"),
            () = looked => {}
        }
        // A flush that ends is an end of the waiting.
        stream.flush().await.unwrap();
        let begun = Instant::now();
        stream.write(b"x").await.unwrap_err();
        assert!(begun.elapsed() >= 2 * WITHIN);
    }
}
