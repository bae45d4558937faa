//! Whether a client has begun to speak HTTP at all: before that no timeout of the HTTP library runs.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes after which the HTTP version is known, and HTTP's own timeouts and pings take over: HTTP/2's preface.
const PREFACE_BYTES: usize = 24;

/// Passes a connection through and counts what the client sent.
#[derive(Debug)]
pub(super) struct Counted<S> {
    stream: S,
    read: Arc<AtomicUsize>,
}

/// The count of one connection.
#[derive(Debug)]
pub(super) struct Preface(Arc<AtomicUsize>);

impl Preface {
    /// Whether enough came to know the HTTP version.
    pub(super) fn is_complete(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= PREFACE_BYTES
    }
}

/// Counts the bytes read from `stream`.
pub(super) fn counted<S>(stream: S) -> (Counted<S>, Preface) {
    let read = Arc::new(AtomicUsize::new(0));
    let counted = Counted {
        stream,
        read: Arc::clone(&read),
    };
    (counted, Preface(read))
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let read = buffer.filled().len() - before;
        if read > 0 && self.read.load(Ordering::Relaxed) < PREFACE_BYTES {
            self.read.fetch_add(read, Ordering::Relaxed);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
