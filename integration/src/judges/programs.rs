//! Where the programs of others are, once `make peers` has built them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The etcd release that ours is compared with.
pub const ETCD_VERSION: &str = "3.7.3";

/// Programs that take part in a comparison.
#[derive(Clone, Debug)]
pub struct Programs {
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

    /// etcd.
    #[must_use]
    pub fn etcd(&self) -> PathBuf {
        self.etcd.join("etcd")
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
