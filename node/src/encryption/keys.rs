//! Private keys of this node in its state folder: made once, for the owner only, never shown.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clustermesh_ebpf::abi::WIREGUARD_DEVICES_MAX;
use clustermesh_encryption_core::key::PrivateKey;
use zeroize::Zeroizing;

use crate::state_files::write_durably;

/// The key that others encrypt to.
pub const KEY_FILE: &str = "wireguard.key";
/// The key that comes next, while keys change.
pub const NEXT_KEY_FILE: &str = "wireguard-next.key";
/// Longest key file, bytes.
const FILE_BYTES_MAX: u64 = 256;

/// A private key and its place among the node's keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredKey {
    /// The key.
    pub private: PrivateKey,
    /// Counts keys in step with all other nodes.
    pub epoch: u32,
    /// Which of the two devices has it: 0 or 1.
    pub slot: usize,
}

/// The second line of a file: what belongs to the key.
fn second_line(epoch: u32, slot: usize) -> String {
    format!("epoch {epoch} device {slot}")
}

fn read_second_line(line: &str) -> Option<(u32, usize)> {
    let (epoch, slot) = line.strip_prefix("epoch ")?.split_once(" device ")?;
    let slot = slot
        .parse()
        .ok()
        .filter(|slot| *slot < WIREGUARD_DEVICES_MAX)?;
    Some((epoch.parse().ok()?, slot))
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
    let place = lines.next().and_then(read_second_line);
    match (key, place, lines.next()) {
        (Some(Ok(private)), Some((epoch, slot)), None) => Ok(Some(StoredKey {
            private,
            epoch,
            slot,
        })),
        _ => Err(damaged()),
    }
}

/// Makes a key and stores it durably, for the owner only.
///
/// # Errors
/// The folder cannot be written.
pub fn make(path: &Path, epoch: u32, slot: usize) -> Result<StoredKey, KeyFileError> {
    let mut bytes = Zeroizing::new([0_u8; 32]);
    rand::fill(&mut bytes[..]);
    let private = PrivateKey::from_bytes(*bytes);
    let encoded = Zeroizing::new(STANDARD.encode(private.bytes()));
    let text = Zeroizing::new(format!("{}\n{}\n", *encoded, second_line(epoch, slot)));
    // One that a crash left has perhaps another mode.
    remove(&path.with_extension("new"))?;
    write_durably(path, text.as_bytes()).map_err(failed("write", path))?;
    Ok(StoredKey {
        private,
        epoch,
        slot,
    })
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
        None => make(&path, 0, 0),
    }
}

/// The key that comes next, if keys were changing when the last run ended.
///
/// # Errors
/// As [`read`].
pub fn read_next(dir: &Path, current: &StoredKey) -> Result<Option<StoredKey>, KeyFileError> {
    let next = read(&dir.join(NEXT_KEY_FILE))?;
    // One that has become the present one, or belongs to another, is not next.
    Ok(next.filter(|next| next.epoch > current.epoch && next.slot != current.slot))
}

/// Whether this key is stored as the one that comes next.
///
/// # Errors
/// As [`read`].
pub fn is_next(dir: &Path, key: &StoredKey) -> Result<bool, KeyFileError> {
    Ok(read(&dir.join(NEXT_KEY_FILE))?.as_ref() == Some(key))
}

/// The next key becomes the present one, in one step.
///
/// # Errors
/// The folder cannot be written.
pub fn promote(dir: &Path) -> Result<(), KeyFileError> {
    let path = dir.join(KEY_FILE);
    fs::rename(dir.join(NEXT_KEY_FILE), &path)
        .and_then(|()| fs::File::open(dir)?.sync_all())
        .map_err(failed("replace", &path))
}

/// How long ago the present key was made.
///
/// # Errors
/// The file is gone.
pub fn age(dir: &Path) -> Result<Duration, KeyFileError> {
    let path = dir.join(KEY_FILE);
    let made = fs::metadata(&path).and_then(|facts| facts.modified());
    let made = made.map_err(failed("look at", &path))?;
    // A clock that was set back makes it new.
    Ok(SystemTime::now().duration_since(made).unwrap_or_default())
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
    fn the_next_key_takes_the_place_of_the_present_one_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let first = read_or_make(dir.path()).unwrap();
        assert_eq!(read_next(dir.path(), &first).unwrap(), None);
        let next = make(&dir.path().join(NEXT_KEY_FILE), 7, 1).unwrap();
        assert_eq!(read_next(dir.path(), &first).unwrap(), Some(next.clone()));
        promote(dir.path()).unwrap();
        assert_eq!(read_or_make(dir.path()).unwrap(), next);
        assert_eq!(read_next(dir.path(), &next).unwrap(), None);
        assert!(age(dir.path()).unwrap() < Duration::from_secs(60));
        // Left over from another key: it has the same place.
        make(&dir.path().join(NEXT_KEY_FILE), 8, 1).unwrap();
        assert_eq!(read_next(dir.path(), &next).unwrap(), None);
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
