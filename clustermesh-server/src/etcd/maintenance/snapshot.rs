//! `Maintenance.Snapshot`: a snapshot file in pieces, then its SHA-256.

use std::io::{self, Read};
use std::time::Duration;

use bytes::Bytes;
use clustermesh_api::etcd::rpc::SnapshotResponse;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::status::read_status;
use crate::store::Store;
use crate::version::ETCD_CLUSTER_VERSION;

/// Content of one message.
const PIECE_BYTES: usize = 256 << 10;
/// A piece takes this long, 125 MiB a second: digest and TLS of a large snapshot must leave writers their share of the CPUs.
const PIECE_TIME_MIN: Duration = Duration::from_millis(2);
/// Messages made ahead of what the connection takes.
const QUEUE_MESSAGES: usize = 2;
/// What one stream holds in memory.
pub(super) const HELD_BYTES: usize = (QUEUE_MESSAGES + 2) * PIECE_BYTES;
/// etcd's tools tell a file with a checksum by its length: a multiple of this, and 32 bytes.
const SECTOR_BYTES: u64 = 512;

/// Takes a snapshot that covers everything applied now, and streams it.
///
/// # Errors
/// `Unavailable` when the replica has stopped; `Internal` when the file cannot be read.
pub(super) async fn stream(
    store: Store,
) -> Result<ReceiverStream<Result<SnapshotResponse, Status>>, Status> {
    let file = store
        .replica()
        .backup()
        .await
        .map_err(|error| read_status(&error))?;
    let size = file.size_bytes();
    let content = file
        .bytes()
        .map_err(|error| Status::internal(format!("clustermesh: {error}")))?;
    let (sender, receiver) = mpsc::channel(QUEUE_MESSAGES);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let mut pieces = Pieces::new(content, size);
        loop {
            let due = Instant::now() + PIECE_TIME_MIN;
            let piece = pieces.next().map_err(|error| {
                Status::internal(format!("clustermesh: reading the snapshot: {error}"))
            });
            let last = !matches!(piece, Ok(Some(_)));
            let message = match piece {
                Ok(Some((blob, remaining_bytes))) => Ok(SnapshotResponse {
                    // etcd sends none here.
                    header: None,
                    remaining_bytes,
                    blob,
                    version: ETCD_CLUSTER_VERSION.to_owned(),
                }),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            if sender.blocking_send(message).is_err() || last {
                return;
            }
            runtime.block_on(tokio::time::sleep_until(due));
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// The content, zeros up to a full sector, and the digest of both.
struct Pieces<S> {
    source: io::Chain<S, io::Take<io::Repeat>>,
    left: u64,
    digest: Option<Sha256>,
}

impl<S: Read> Pieces<S> {
    fn new(source: S, size: u64) -> Self {
        let padded = size.next_multiple_of(SECTOR_BYTES);
        Self {
            source: source.chain(io::repeat(0).take(padded - size)),
            left: padded,
            digest: Some(Sha256::new()),
        }
    }

    /// The next piece and the bytes that are left after it; the last one is the digest.
    fn next(&mut self) -> io::Result<Option<(Bytes, u64)>> {
        if self.left == 0 {
            let digest = self.digest.take();
            return Ok(digest.map(|digest| (Bytes::copy_from_slice(&digest.finalize()), 0)));
        }
        let size = usize::try_from(self.left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let mut piece = vec![0; size];
        self.source.read_exact(&mut piece)?;
        self.left -= size as u64;
        if let Some(digest) = &mut self.digest {
            digest.update(&piece);
        }
        Ok(Some((piece.into(), self.left)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_whole_sectors_and_their_digest() {
        let content: Vec<u8> = (0..PIECE_BYTES + 1000)
            .map(|i| i.to_le_bytes()[0])
            .collect();
        let mut pieces = Pieces::new(&content[..], content.len() as u64);
        let mut all = Vec::new();
        while let Some((piece, left)) = pieces.next().unwrap() {
            assert!(piece.len() <= PIECE_BYTES);
            all.extend_from_slice(&piece);
            assert!(left > 0 || all.len() >= content.len());
        }
        assert_eq!(all.len() % 512, 32);
        assert!(all.starts_with(&content));
        let (body, digest) = all.split_at(all.len() - 32);
        assert_eq!(digest, Sha256::digest(body).as_slice());
    }

    #[test]
    fn a_file_that_is_shorter_than_it_says_is_an_error() {
        let mut pieces = Pieces::new(&[1; 100][..], 5000);
        assert!(pieces.next().is_err());
    }
}
