//! gRPC's framing: one byte "compressed", four bytes length, the message.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tonic::Status;

const HEAD_BYTES: usize = 5;

/// A message with its frame.
pub(super) fn frame(message: &Bytes) -> Bytes {
    let mut framed = BytesMut::with_capacity(HEAD_BYTES + message.len());
    framed.put_u8(0);
    // Requests are bounded far below it.
    framed.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    framed.put_slice(message);
    framed.freeze()
}

/// Messages out of a body's bytes.
#[derive(Debug, Default)]
pub(super) struct Frames(BytesMut);

impl Frames {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next whole message; `None` until more bytes come.
    ///
    /// # Errors
    /// `Internal` for a compressed one, which was not asked for.
    pub(super) fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let Some((head, _)) = self.0.split_at_checked(HEAD_BYTES) else {
            return Ok(None);
        };
        let mut head = head;
        if head.get_u8() != 0 {
            return Err(Status::internal("clustermesh: a compressed answer"));
        }
        let length = usize::try_from(head.get_u32()).unwrap_or(usize::MAX);
        if self.0.len() - HEAD_BYTES < length {
            return Ok(None);
        }
        self.0.advance(HEAD_BYTES);
        Ok(Some(self.0.split_to(length).freeze()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_wherever_the_bytes_are_cut() {
        let messages = [&b"one"[..], b"", b"three"].map(Bytes::copy_from_slice);
        let bytes: Vec<u8> = messages.iter().flat_map(frame).collect();
        for cut in 1..bytes.len() {
            let mut frames = Frames::default();
            let mut found = Vec::new();
            for part in bytes.chunks(cut) {
                frames.push(part);
                while let Some(message) = frames.next().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, messages, "{cut}");
        }
    }
}
