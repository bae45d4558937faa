//! Frames of a snapshot: length, checksum, body; read and written in order.

use std::{
    io::{self, ErrorKind, Read, Write},
    path::PathBuf,
};

use bytes::Bytes;
use prost::Message;

use super::MAX_CHUNK_BYTES;
use crate::{
    codec::{self, CodecError},
    error::StoreError,
    pb::{self, snapshot_frame},
    types::SnapshotMeta,
};

/// Newest format of snapshots that this release reads and writes.
pub(super) const FORMAT: u32 = 1;
/// A frame around the largest chunk, bytes.
const MAX_FRAME_BYTES: usize = MAX_CHUNK_BYTES + 1024;

pub(super) enum Frame {
    Chunk(Bytes),
    End,
}

/// What the trailer must say.
#[derive(Debug, Default, Clone, Copy)]
struct Totals {
    chunks: u64,
    bytes: u64,
    crc32c: u32,
}

impl Totals {
    fn add(&mut self, chunk: &[u8]) {
        self.chunks += 1;
        self.bytes += chunk.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, chunk);
    }
}

pub(super) struct FrameWriter<W> {
    sink: W,
    totals: Totals,
}

impl<W: Write> FrameWriter<W> {
    pub(super) fn new(sink: W, meta: &SnapshotMeta) -> io::Result<Self> {
        let header = pb::SnapshotHeader {
            format: FORMAT,
            last_log_id: meta.last_log_id.as_ref().map(codec::log_id_to_pb),
            membership_log_id: meta
                .last_membership
                .log_id()
                .as_ref()
                .map(codec::log_id_to_pb),
            membership: Some(codec::membership_to_pb(meta.last_membership.membership())),
        };
        let mut writer = Self {
            sink,
            totals: Totals::default(),
        };
        writer.write(snapshot_frame::Frame::Header(header))?;
        Ok(writer)
    }

    fn write(&mut self, frame: snapshot_frame::Frame) -> io::Result<()> {
        let body = pb::SnapshotFrame { frame: Some(frame) }.encode_to_vec();
        let length = u32::try_from(body.len()).map_err(io::Error::other)?;
        self.sink.write_all(&length.to_le_bytes())?;
        self.sink.write_all(&crc32c::crc32c(&body).to_le_bytes())?;
        self.sink.write_all(&body)
    }

    pub(super) fn chunk(&mut self, chunk: Bytes) -> io::Result<()> {
        self.totals.add(&chunk);
        self.write(snapshot_frame::Frame::Chunk(chunk))
    }

    pub(super) fn finish(mut self) -> io::Result<W> {
        let Totals {
            chunks,
            bytes,
            crc32c,
        } = self.totals;
        self.write(snapshot_frame::Frame::Trailer(pb::SnapshotTrailer {
            chunks,
            bytes,
            crc32c,
        }))?;
        self.sink.flush()?;
        Ok(self.sink)
    }
}

pub(super) struct FrameReader<S> {
    source: S,
    name: PathBuf,
    totals: Totals,
    /// Format of the snapshot, once the header is read.
    pub(super) format: u32,
}

impl<S: Read> FrameReader<S> {
    pub(super) fn new(source: S, name: PathBuf) -> Self {
        Self {
            source,
            name,
            totals: Totals::default(),
            format: 0,
        }
    }

    fn damaged(&self, reason: impl ToString) -> StoreError {
        StoreError::Damaged {
            what: "the snapshot".into(),
            path: self.name.clone(),
            reason: reason.to_string(),
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), StoreError> {
        self.source
            .read_exact(buffer)
            .map_err(|source| match source.kind() {
                ErrorKind::UnexpectedEof => self.damaged("it ends early"),
                _ => StoreError::Io {
                    action: "read",
                    path: self.name.clone(),
                    source,
                },
            })
    }

    fn frame(&mut self) -> Result<snapshot_frame::Frame, StoreError> {
        let mut prefix = [0; 8];
        self.fill(&mut prefix)?;
        let [l0, l1, l2, l3, c0, c1, c2, c3] = prefix;
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > MAX_FRAME_BYTES {
            return Err(self.damaged(format!("a frame claims {length} bytes")));
        }
        let mut body = vec![0; length];
        self.fill(&mut body)?;
        if crc32c::crc32c(&body) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(self.damaged(CodecError::Checksum));
        }
        let frame =
            pb::SnapshotFrame::decode(Bytes::from(body)).map_err(|error| self.damaged(error))?;
        frame.frame.ok_or_else(|| self.damaged("a frame is empty"))
    }

    /// The first frame.
    pub(super) fn header(&mut self) -> Result<SnapshotMeta, StoreError> {
        let snapshot_frame::Frame::Header(header) = self.frame()? else {
            return Err(self.damaged("it does not begin with a header"));
        };
        if header.format > FORMAT {
            return Err(StoreError::NewerFormat {
                what: "the snapshot",
                found: header.format,
                known: FORMAT,
            });
        }
        self.format = header.format;
        let last_membership = codec::stored_membership_from_pb(
            header.membership_log_id.as_ref(),
            header.membership.as_ref(),
        )
        .map_err(|error| self.damaged(error))?;
        Ok(SnapshotMeta {
            last_log_id: header.last_log_id.as_ref().map(codec::log_id_from_pb),
            last_membership,
        })
    }

    /// A frame after the header.
    pub(super) fn next(&mut self) -> Result<Frame, StoreError> {
        match self.frame()? {
            snapshot_frame::Frame::Chunk(chunk) => {
                self.totals.add(&chunk);
                Ok(Frame::Chunk(chunk))
            }
            snapshot_frame::Frame::Trailer(trailer) => {
                let Totals {
                    chunks,
                    bytes,
                    crc32c,
                } = self.totals;
                if (trailer.chunks, trailer.bytes, trailer.crc32c) != (chunks, bytes, crc32c) {
                    return Err(self.damaged("its trailer tells of other chunks"));
                }
                Ok(Frame::End)
            }
            snapshot_frame::Frame::Header(_) => Err(self.damaged("it has a second header")),
        }
    }
}
