//! Streams a backup into a file that appears whole or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clustermesh_client::Client;
use sha2::{Digest, Sha256};

use crate::output;

/// Length of the checksum that ends the stream.
const DIGEST_BYTES: usize = 32;
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// A backup has password hashes and everything that the cluster keeps secret.
const FILE_MODE: u32 = 0o600;

/// What was saved.
#[derive(Debug, PartialEq, Eq)]
pub struct Saved {
    pub bytes: u64,
    pub sha256: [u8; DIGEST_BYTES],
}

pub async fn run(client: &Client, file: &Path) -> Result<Saved> {
    let mut partial = Partial::create(file)?;
    output::note("the server writes the backup");
    let mut pieces = client.snapshot().await?;
    let mut progress = Progress::default();
    while let Some(piece) = pieces.next().await? {
        partial.write(&piece.blob)?;
        progress.tell(partial.bytes, piece.remaining_bytes);
        progress.left = piece.remaining_bytes;
    }
    ensure!(
        progress.left == 0,
        "{} ended its answer {} bytes early; nothing was saved, try again",
        pieces.endpoint(),
        progress.left
    );
    partial.finish()
}

#[derive(Default)]
struct Progress {
    told: Option<Instant>,
    left: u64,
}

impl Progress {
    fn tell(&mut self, done: u64, left: u64) {
        let due = self
            .told
            .is_none_or(|told| told.elapsed() >= PROGRESS_INTERVAL);
        if due {
            self.told = Some(Instant::now());
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            output::note(&format!(
                "{} of {} MiB",
                mib(done),
                mib(done.saturating_add(left))
            ));
        }
    }
}

/// The file under a name of its own; removed unless it is finished.
struct Partial {
    wanted: PathBuf,
    path: PathBuf,
    file: File,
    bytes: u64,
    digest: Sha256,
    /// The newest bytes, which are the checksum if nothing follows.
    last: Vec<u8>,
    finished: bool,
}

impl Partial {
    fn create(wanted: &Path) -> Result<Self> {
        let name = wanted
            .file_name()
            .with_context(|| format!("{} is no file name", wanted.display()))?;
        let mut partial = name.to_owned();
        partial.push(".part");
        let path = wanted.with_file_name(partial);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(FILE_MODE)
            .open(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self {
            wanted: wanted.to_owned(),
            path,
            file,
            bytes: 0,
            digest: Sha256::new(),
            last: Vec::new(),
            finished: false,
        })
    }

    fn write(&mut self, piece: &[u8]) -> Result<()> {
        self.file
            .write_all(piece)
            .with_context(|| format!("cannot write {}", self.path.display()))?;
        self.bytes += piece.len() as u64;
        self.last.extend_from_slice(piece);
        let content = self.last.len().saturating_sub(DIGEST_BYTES);
        self.digest.update(self.last.drain(..content).as_slice());
        Ok(())
    }

    fn finish(mut self) -> Result<Saved> {
        let digest = self.digest.clone().finalize();
        ensure!(
            digest.as_slice() == self.last,
            "the backup does not have the SHA-256 that the server sent with it: it was altered on its way; nothing was saved, try again"
        );
        let named = || -> io::Result<()> {
            self.file.sync_all()?;
            fs::rename(&self.path, &self.wanted)?;
            let folder = self.wanted.parent().filter(|path| *path != Path::new(""));
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        };
        named().with_context(|| format!("cannot write {}", self.wanted.display()))?;
        self.finished = true;
        Ok(Saved {
            bytes: self.bytes,
            sha256: digest.into(),
        })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = fs::remove_file(&self.path)
        {
            output::note(&format!("{} was not removed: {error}", self.path.display()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(content: &[u8]) -> Vec<u8> {
        [content, Sha256::digest(content).as_slice()].concat()
    }

    #[test]
    fn a_file_appears_when_all_of_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup");
        let stream = sealed(&[7; 1000]);
        let mut partial = Partial::create(&path).unwrap();
        // The checksum may be cut anywhere.
        for piece in [&stream[..990], &stream[990..1010], &stream[1010..]] {
            assert!(!path.exists());
            partial.write(piece).unwrap();
        }
        let saved = partial.finish().unwrap();
        assert_eq!(saved.bytes, 1032);
        assert_eq!(fs::read(&path).unwrap(), stream);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_altered_stream_leaves_nothing_and_the_old_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("backup");
        fs::write(&path, "old").unwrap();
        let mut stream = sealed(&[7; 1000]);
        stream[5] = 8;
        for sent in [stream.as_slice(), &stream[..20], &[]] {
            let mut partial = Partial::create(&path).unwrap();
            partial.write(sent).unwrap();
            let error = partial.finish().unwrap_err().to_string();
            assert!(error.contains("SHA-256"), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
