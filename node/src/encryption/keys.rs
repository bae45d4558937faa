//! Private keys of this node in its state folder: made once, for the owner only, never shown.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clustermesh_encryption_core::key::PrivateKey;
use zeroize::Zeroizing;

use crate::state::write_durably;

/// The key that others encrypt to.
pub const KEY_FILE: &str = "wireguard.key";
/// The key that comes next, while keys change.
pub const NEXT_KEY_FILE: &str = "wireguard-next.key";
/// Longest key file, bytes.
const FILE_BYTES_MAX: u64 = 256;
/// What stands before the epoch in the second line.
const EPOCH_WORD: &str = "epoch ";

/// A private key and its place among the node's keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// The key.
    pub private: PrivateKey,
    /// Counts keys in step with all other nodes.
    pub epoch: u32,
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// A call failed.
    #[error("cannot {action} the WireGuard key {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others may read or write it.
    #[error(
        "the WireGuard key {path} has mode {mode:o}: others may have read it; remove it, so that a new key is made, or \
         `chmod 600` it if you know that nobody has"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It holds something else.
    #[error("the WireGuard key {path} is damaged: remove it, so that a new key is made")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyFileError {
    let path = path.to_owned();
    move |source| KeyFileError::Io {
        action,
        path,
        source,
    }
}

/// Reads a key; `None` where there is no file.
///
/// # Errors
/// It cannot be read, others may read it, or it is damaged.
pub fn read(path: &Path) -> Result<Option<StoredKey>, KeyFileError> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed("open", path))?,
    };
    let mode = file.metadata().map_err(failed("look at", path))?.mode() & 0o777;
    if mode & 0o077 != 0 {
        let path = path.to_owned();
        return Err(KeyFileError::Exposed { path, mode });
    }
    let mut text = Zeroizing::new(String::with_capacity(
        usize::try_from(FILE_BYTES_MAX).unwrap_or(0),
    ));
    let damaged = || KeyFileError::Damaged {
        path: path.to_owned(),
    };
    match file.take(FILE_BYTES_MAX).read_to_string(&mut text) {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(damaged()),
        other => other.map_err(failed("read", path))?,
    };
    let mut lines = text.lines();
    let key = lines.next().map(PrivateKey::from_base64);
    let epoch = lines
        .next()
        .and_then(|line| line.strip_prefix(EPOCH_WORD)?.parse().ok());
    match (key, epoch, lines.next()) {
        (Some(Ok(private)), Some(epoch), None) => Ok(Some(StoredKey { private, epoch })),
        _ => Err(damaged()),
    }
}

/// Makes a key and stores it durably, for the owner only.
///
/// # Errors
/// The folder cannot be written.
pub fn make(path: &Path, epoch: u32) -> Result<StoredKey, KeyFileError> {
    let mut bytes = Zeroizing::new([0_u8; 32]);
    rand::fill(&mut bytes[..]);
    let private = PrivateKey::from_bytes(*bytes);
    let encoded = Zeroizing::new(STANDARD.encode(private.bytes()));
    let text = Zeroizing::new(format!("{}\n{EPOCH_WORD}{epoch}\n", *encoded));
    // One that a crash left has perhaps another mode.
    remove(&path.with_extension("new"))?;
    write_durably(path, text.as_bytes()).map_err(failed("write", path))?;
    Ok(StoredKey { private, epoch })
}

/// Removes a key; none there is fine.
///
/// # Errors
/// The folder cannot be written.
pub fn remove(path: &Path) -> Result<(), KeyFileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Reads the node's key, or makes its first one.
///
/// # Errors
/// As [`read`] and [`make`].
pub fn read_or_make(dir: &Path) -> Result<StoredKey, KeyFileError> {
    let path = dir.join(KEY_FILE);
    match read(&path)? {
        Some(key) => Ok(key),
        None => make(&path, 0),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_for_the_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let first = read_or_make(dir.path()).unwrap();
        let path = dir.path().join(KEY_FILE);
        let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
        assert_eq!(read_or_make(dir.path()).unwrap(), first);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(read_or_make(other.path()).unwrap().private, first.private);
        let stored = fs::read_to_string(&path).unwrap();
        let secret = stored.lines().next().unwrap();
        assert!(!format!("{first:?}").contains(secret), "a key is not shown");
    }

    #[test]
    fn a_key_that_cannot_be_used_is_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        let whole = {
            read_or_make(dir.path()).unwrap();
            fs::read(&path).unwrap()
        };
        for damaged in [
            &whole[..whole.len() - 4],
            &whole[..20],
            b"",
            b"\xff\xff\n",
            &[&whole[..], b"x\n"].concat(),
        ] {
            fs::write(&path, damaged).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()), "{error}");
            assert!(error.contains("remove it"), "{error}");
        }
        fs::write(&path, &whole).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(
            error.contains("640") && error.contains("remove it"),
            "{error}"
        );
        // Not followed: a link could lead out of the folder.
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(read(&path).is_err());
    }
}
