//! Whether what a client sends comes forward: before it has begun to speak HTTP no timeout of the HTTP library runs, and
//! one byte of a frame after the other looks to it like a client that is busy.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::openings::Opening;

/// What every HTTP/2 connection begins with. Other versions are known by then, too.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Head of an HTTP/2 frame (RFC 9113, 4.1).
const FRAME_HEAD_BYTES: usize = 9;

/// Passes a connection through and follows it.
#[derive(Debug)]
pub(super) struct Followed<S> {
    stream: S,
    shared: Arc<Shared>,
    frames: Frames,
    /// Until the preface is complete.
    opening: Option<Opening>,
}

/// How far one connection is.
#[derive(Debug)]
pub(super) struct Progress(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    begun: AtomicBool,
    /// Whole frames that came.
    frames: AtomicU64,
    /// A frame came in part, or HEADERS without their end.
    in_frame: AtomicBool,
}

/// Why a connection is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stuck {
    /// It has not begun with HTTP.
    NoHttp,
    /// A frame does not end.
    InFrame,
}

impl Progress {
    /// Resolves when HTTP has not begun within `begin`, or a frame has not come forward for `step`, twice that at most.
    pub(super) async fn stuck(&self, begin: Duration, step: Duration) -> Stuck {
        let Self(shared) = self;
        tokio::time::sleep(begin).await;
        if !shared.begun.load(Ordering::Relaxed) {
            return Stuck::NoHttp;
        }
        let look = || {
            let in_frame = shared.in_frame.load(Ordering::Relaxed);
            in_frame.then(|| shared.frames.load(Ordering::Relaxed))
        };
        let mut before = look();
        loop {
            tokio::time::sleep(step).await;
            let now = look();
            if now.is_some() && now == before {
                return Stuck::InFrame;
            }
            before = now;
        }
    }
}

/// Where in HTTP/2's frames a client is.
#[derive(Debug, Default)]
struct Frames {
    /// Bytes of the preface that came.
    preface: usize,
    is_http2: bool,
    head: [u8; FRAME_HEAD_BYTES],
    /// Bytes of the head that came.
    begun: usize,
    /// Bytes of the payload that did not.
    missing: usize,
    /// HEADERS came without their end.
    open_headers: bool,
    whole: u64,
}

impl Frames {
    fn is_begun(&self) -> bool {
        self.preface >= PREFACE.len()
    }

    fn in_frame(&self) -> bool {
        self.begun > 0 || self.missing > 0 || self.open_headers
    }

    /// Follows bytes of the client.
    fn follow(&mut self, mut bytes: &[u8]) {
        if !self.is_begun() {
            let rest = PREFACE.get(self.preface..).unwrap_or_default();
            let count = rest.len().min(bytes.len());
            let (preface, later) = bytes.split_at(count);
            self.is_http2 = (self.is_http2 || self.preface == 0) && rest.starts_with(preface);
            self.preface += count;
            bytes = later;
        }
        if !self.is_http2 {
            return;
        }
        while let Some((first, later)) = bytes.split_first() {
            if self.missing > 0 {
                let count = self.missing.min(bytes.len());
                self.missing -= count;
                bytes = bytes.get(count..).unwrap_or_default();
            } else {
                if let Some(place) = self.head.get_mut(self.begun) {
                    *place = *first;
                }
                self.begun += 1;
                bytes = later;
                if self.begun < FRAME_HEAD_BYTES {
                    continue;
                }
                self.take_head();
            }
            if self.missing == 0 {
                self.whole += u64::from(!self.open_headers);
            }
        }
    }

    fn take_head(&mut self) {
        const HEADERS: u8 = 1;
        const PUSH_PROMISE: u8 = 5;
        const CONTINUATION: u8 = 9;
        const END_HEADERS: u8 = 4;
        let [high, middle, low, kind, flags, ..] = self.head;
        let length = u32::from_be_bytes([0, high, middle, low]);
        self.missing = usize::try_from(length).unwrap_or(usize::MAX);
        self.begun = 0;
        if matches!(kind, HEADERS | PUSH_PROMISE | CONTINUATION) {
            self.open_headers = flags & END_HEADERS == 0;
        }
    }
}

/// Follows `stream`, which is `opening` until its client has begun with HTTP.
pub(super) fn followed<S>(stream: S, opening: Opening) -> (Followed<S>, Progress) {
    let shared = Arc::<Shared>::default();
    let followed = Followed {
        stream,
        shared: Arc::clone(&shared),
        frames: Frames::default(),
        opening: Some(opening),
    };
    (followed, Progress(shared))
}

impl<S> Followed<S> {
    fn read(&mut self, bytes: &[u8]) {
        self.frames.follow(bytes);
        if self.opening.is_some() && self.frames.is_begun() {
            self.shared.begun.store(true, Ordering::Relaxed);
            self.opening = None;
        }
        self.shared
            .frames
            .store(self.frames.whole, Ordering::Relaxed);
        self.shared
            .in_frame
            .store(self.frames.in_frame(), Ordering::Relaxed);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Followed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Some(bytes @ [_, ..]) = buffer.filled().get(before..) {
            self.read(bytes);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Followed<S> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// In pieces of one byte, of three, and whole.
    fn followed(bytes: &[u8]) -> [(u64, bool); 3] {
        [1, 3, bytes.len().max(1)].map(|piece| {
            let mut frames = Frames::default();
            for bytes in bytes.chunks(piece) {
                frames.follow(bytes);
            }
            (frames.whole, frames.in_frame())
        })
    }

    #[test]
    fn frames_are_whole_with_their_last_byte_and_headers_with_their_end() {
        let after = |frames: &[&[u8]]| {
            let bytes: Vec<u8> = [&PREFACE[..]]
                .iter()
                .chain(frames)
                .copied()
                .flatten()
                .copied()
                .collect();
            followed(&bytes)
        };
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let data = [0, 0, 2, 0, 0, 0, 0, 0, 1, 7, 8];
        let headers = [0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82];
        let more = [0, 0, 1, 9, 0, 0, 0, 0, 1, 0x87];
        let end = [0, 0, 1, 9, 4, 0, 0, 0, 1, 0x87];
        assert_eq!(after(&[]), [(0, false); 3]);
        assert_eq!(after(&[&settings, &data]), [(2, false); 3]);
        assert_eq!(after(&[&settings, &data[..10]]), [(1, true); 3]);
        assert_eq!(after(&[&settings[..4]]), [(0, true); 3]);
        assert_eq!(after(&[&settings, &headers, &more]), [(1, true); 3]);
        assert_eq!(after(&[&settings, &headers, &more, &end]), [(2, false); 3]);
        // Of other versions nothing is said.
        let head = b"GET /version HTTP/1.1\r\nHost: a\r\nAccept: */*";
        assert_eq!(followed(head), [(0, false); 3]);
    }
}
