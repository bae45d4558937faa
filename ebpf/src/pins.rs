//! Names and folders of everything pinned: `<bpffs>/clustermesh/{<map>_v<N>, links/, filters/}`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clustermesh_ebpf_abi::LAYOUT_VERSION;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::Error;
use crate::layout::Spec;

/// The folder with our pins.
#[derive(Clone, Debug)]
pub(crate) struct Pins {
    root: PathBuf,
}

impl Pins {
    /// The folder below `bpffs`, which must be a BPF file system.
    pub(crate) fn below(bpffs: &Path) -> Result<Self, Error> {
        match statfs(bpffs) {
            Ok(fs) if fs.filesystem_type() == BPF_FS_MAGIC => Ok(Self {
                root: bpffs.join("clustermesh"),
            }),
            _ => Err(Error::BpffsNotMounted {
                path: bpffs.to_owned(),
            }),
        }
    }

    /// Makes the folders.
    pub(crate) fn create(&self) -> Result<(), Error> {
        for dir in [self.links(), self.filters()] {
            fs::create_dir_all(&dir).map_err(|e| failed("create the folder", &dir, e))?;
        }
        Ok(())
    }

    /// Where a map of this layout is pinned.
    pub(crate) fn map(&self, spec: &Spec) -> PathBuf {
        self.map_of(spec, LAYOUT_VERSION)
    }

    /// Where a map of some layout is pinned.
    pub(crate) fn map_of(&self, spec: &Spec, version: u32) -> PathBuf {
        self.root.join(format!("{}_v{version}", spec.name))
    }

    /// Links (tcx, cgroup).
    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Programs that filters on clsact run: filters cannot be pinned themselves.
    pub(crate) fn filters(&self) -> PathBuf {
        self.root.join("filters")
    }

    /// Versions of which maps are pinned, ascending, this one among them.
    pub(crate) fn versions(&self) -> Result<Vec<u32>, Error> {
        let mut versions: Vec<u32> = names(&self.root)?
            .iter()
            .filter_map(|name| version_of(name))
            .collect();
        versions.sort_unstable();
        versions.dedup();
        Ok(versions)
    }

    /// Removes the pins of all maps of other layouts.
    pub(crate) fn remove_other_versions(&self) -> Result<(), Error> {
        for name in names(&self.root)? {
            if version_of(&name).is_some_and(|version| version != LAYOUT_VERSION) {
                remove(&self.root.join(name))?;
            }
        }
        Ok(())
    }

    /// Removes every map and the folders, whose links must be gone already.
    pub(crate) fn remove_all(&self) -> Result<(), Error> {
        for name in names(&self.root)? {
            if version_of(&name).is_some() {
                remove(&self.root.join(name))?;
            }
        }
        for dir in [self.links(), self.filters(), self.root.clone()] {
            match fs::remove_dir(&dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove the folder", &dir, e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Names in `dir`, sorted; none if it does not exist.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed("list", dir, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| failed("list", dir, e))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// Removes a pin; one that is gone already is fine.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove the pin", path, e)),
        _ => Ok(()),
    }
}

pub(crate) fn failed(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Pin {
        action,
        path: path.to_owned(),
        source,
    }
}

/// The layout version in a map pin's name; maps of other builds are known by the form of their names.
fn version_of(name: &str) -> Option<u32> {
    name.rsplit_once("_v")?.1.parse().ok()
}
