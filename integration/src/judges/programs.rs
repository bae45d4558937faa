//! Where the programs of others are, once `make peers` has built them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The etcd release that ours is compared with.
pub const ETCD_VERSION: &str = "3.7.3";
/// What the folder with Debian's begins with, before the version.
const DEBIAN_ETCD: &str = "debian-etcd-";

/// Programs that take part in a comparison.
#[derive(Clone, Debug)]
pub struct Programs {
    etcd_server: PathBuf,
    etcd: PathBuf,
    ours: PathBuf,
}

impl Programs {
    /// Finds etcd in the cache folder; ours are in `ours`.
    ///
    /// # Errors
    /// When one is missing; the message says what makes it.
    pub fn find(ours: &Path) -> Result<Self> {
        let etcd = cache_folder()?.join(format!("etcd-{ETCD_VERSION}"));
        let programs = Self {
            etcd_server: etcd.join("etcd"),
            etcd,
            ours: ours.to_owned(),
        };
        for program in [programs.etcd(), programs.etcdctl(), programs.etcdutl()] {
            if !program.is_file() {
                bail!("{} is missing: run `make peers`", program.display());
            }
        }
        for program in [programs.server(), programs.cli()] {
            if !program.is_file() {
                bail!("{} is missing: run `make build`", program.display());
            }
        }
        Ok(programs)
    }

    /// The same with Debian's etcd, and its version, where `integration/peers/debian.sh` has put it.
    ///
    /// # Errors
    /// When the cache folder cannot be found.
    pub fn debian(&self) -> Result<Option<(String, Self)>> {
        let Ok(found) = std::fs::read_dir(cache_folder()?) else {
            return Ok(None);
        };
        for folder in found.filter_map(Result::ok) {
            let name = folder.file_name().to_string_lossy().into_owned();
            if let Some(version) = name.strip_prefix(DEBIAN_ETCD) {
                let programs = Self {
                    etcd_server: folder.path().join("etcd"),
                    ..self.clone()
                };
                return Ok(Some((version.to_owned(), programs)));
            }
        }
        Ok(None)
    }

    /// etcd.
    #[must_use]
    pub fn etcd(&self) -> PathBuf {
        self.etcd_server.clone()
    }

    /// etcd's command-line client.
    #[must_use]
    pub fn etcdctl(&self) -> PathBuf {
        self.etcd.join("etcdctl")
    }

    /// etcd's tool for data files.
    #[must_use]
    pub fn etcdutl(&self) -> PathBuf {
        self.etcd.join("etcdutl")
    }

    /// Our server.
    #[must_use]
    pub fn server(&self) -> PathBuf {
        self.ours.join("clustermesh-server")
    }

    /// Our operator's command.
    #[must_use]
    pub fn cli(&self) -> PathBuf {
        self.ours.join("clustermesh")
    }
}

/// The folder that `integration/peers/build.sh` fills.
///
/// # Errors
/// When there is neither `XDG_CACHE_HOME` nor `HOME`.
pub fn cache_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("CLUSTERMESH_PEERS") {
        return Ok(folder.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .context("HOME is not set: the folder of built programs cannot be found")?;
    Ok(cache.join("clustermesh/peers"))
}
