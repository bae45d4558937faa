//! A disk with a volatile cache, as a model without I/O: files and folders, what a sync makes durable, and what a power
//! cut leaves.
//!
//! The strict reading of POSIX holds: a file's data is durable after a sync of that file, a name after a sync of the
//! folder that it is in, and nothing else is. A sector is written whole or not at all.

mod file;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
};

use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};

use self::file::File;
pub use self::file::SECTOR_BYTES;

/// The folder that holds all others.
pub const ROOT: u64 = 1;

/// How a cut treats what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Nothing of it is there.
    None,
    /// All of it is there.
    All,
    /// What was done before this moment is there: a cache that keeps the order.
    Before(u64),
    /// Each change by itself is there, missing or torn: a cache that does not.
    Each,
    /// Each sector by itself is there or missing.
    EachSector,
}

impl Mode {
    fn keeps(self, at: u64, rng: &mut impl Rng) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Before(moment) => at < moment,
            Self::Each | Self::EachSector => rng.random(),
        }
    }

    fn is_unordered(self) -> bool {
        matches!(self, Self::Each | Self::EachSector)
    }
}

#[derive(Debug)]
enum NameChange {
    Set { name: OsString, node: u64 },
    Remove { name: OsString },
    Rename { from: OsString, to: OsString },
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<OsString, u64>, renamed: Option<u64>) {
        match self {
            Self::Set { name, node } => drop(names.insert(name.clone(), *node)),
            Self::Remove { name } => drop(names.remove(name)),
            Self::Rename { from, to } => {
                let moved = names.remove(from).or(renamed);
                if let Some(node) = moved {
                    names.insert(to.clone(), node);
                }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Folder {
    current: BTreeMap<OsString, u64>,
    durable: BTreeMap<OsString, u64>,
    /// With the moment of each change and, for a rename, what was renamed.
    pending: Vec<(u64, NameChange, Option<u64>)>,
}

impl Folder {
    fn change(&mut self, at: u64, change: NameChange) {
        let renamed = match &change {
            NameChange::Rename { from, .. } => self.current.get(from).copied(),
            _ => None,
        };
        change.apply(&mut self.current, renamed);
        self.pending.push((at, change, renamed));
    }

    fn sync(&mut self) {
        for (_, change, renamed) in self.pending.drain(..) {
            change.apply(&mut self.durable, renamed);
        }
    }

    fn cut(&self, mode: Mode, rng: &mut impl Rng) -> Self {
        let mut names = self.durable.clone();
        for (at, change, renamed) in &self.pending {
            if mode.keeps(*at, rng) {
                change.apply(&mut names, *renamed);
            }
        }
        Self {
            current: names.clone(),
            durable: names,
            pending: Vec::new(),
        }
    }
}

#[derive(Debug)]
enum Node {
    Folder(Folder),
    File(File),
}

/// Why the disk refused something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No such file or folder.
    Missing,
    /// The name is taken.
    Exists,
    /// It is not a folder.
    NotAFolder,
    /// It is a folder.
    IsAFolder,
    /// The folder holds something.
    NotEmpty,
    /// No room for more data.
    Full,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Its number.
    pub node: u64,
    /// Whether it is a folder.
    pub is_folder: bool,
    /// Its length, bytes; 0 for a folder.
    pub bytes: u64,
}

/// The disk.
#[derive(Debug)]
pub struct Disk {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    /// Changes so far.
    moment: u64,
    /// Most that its files may hold together, bytes.
    capacity_bytes: u64,
    /// Most that one file had written without a sync, bytes.
    most_volatile_bytes: u64,
}

impl Default for Disk {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::from([(ROOT, Node::Folder(Folder::default()))]),
            next: ROOT + 1,
            moment: 0,
            capacity_bytes: u64::MAX,
            most_volatile_bytes: 0,
        }
    }
}

impl Disk {
    fn folder(&self, node: u64) -> Result<&Folder, Refusal> {
        match self.nodes.get(&node) {
            Some(Node::Folder(folder)) => Ok(folder),
            Some(Node::File(_)) => Err(Refusal::NotAFolder),
            None => Err(Refusal::Missing),
        }
    }

    fn folder_mut(&mut self, node: u64) -> Result<&mut Folder, Refusal> {
        match self.nodes.get_mut(&node) {
            Some(Node::Folder(folder)) => Ok(folder),
            Some(Node::File(_)) => Err(Refusal::NotAFolder),
            None => Err(Refusal::Missing),
        }
    }

    fn file_mut(&mut self, node: u64) -> Result<&mut File, Refusal> {
        match self.nodes.get_mut(&node) {
            Some(Node::File(file)) => Ok(file),
            Some(Node::Folder(_)) => Err(Refusal::IsAFolder),
            None => Err(Refusal::Missing),
        }
    }

    fn now(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// What `node` is.
    ///
    /// # Errors
    /// [`Refusal::Missing`].
    pub fn stat(&self, node: u64) -> Result<Stat, Refusal> {
        let (is_folder, bytes) = match self.nodes.get(&node).ok_or(Refusal::Missing)? {
            Node::Folder(_) => (true, 0),
            Node::File(file) => (false, file.len() as u64),
        };
        Ok(Stat {
            node,
            is_folder,
            bytes,
        })
    }

    /// What has this name in `folder`.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn lookup(&self, folder: u64, name: &OsStr) -> Result<Stat, Refusal> {
        let node = self.folder(folder)?.current.get(name);
        self.stat(*node.ok_or(Refusal::Missing)?)
    }

    /// Names in `folder`.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn list(&self, folder: u64) -> Result<Vec<(OsString, Stat)>, Refusal> {
        self.folder(folder)?
            .current
            .iter()
            .map(|(name, node)| Ok((name.clone(), self.stat(*node)?)))
            .collect()
    }

    /// Makes a file or folder.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn create(&mut self, folder: u64, name: &OsStr, is_folder: bool) -> Result<Stat, Refusal> {
        if self.folder(folder)?.current.contains_key(name) {
            return Err(Refusal::Exists);
        }
        let node = self.next;
        self.next += 1;
        let made = if is_folder {
            Node::Folder(Folder::default())
        } else {
            Node::File(File::default())
        };
        self.nodes.insert(node, made);
        let at = self.now();
        let name = name.to_owned();
        self.folder_mut(folder)?
            .change(at, NameChange::Set { name, node });
        self.stat(node)
    }

    /// Removes a name.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn remove(&mut self, folder: u64, name: &OsStr) -> Result<(), Refusal> {
        let found = self.lookup(folder, name)?;
        if found.is_folder && !self.folder(found.node)?.current.is_empty() {
            return Err(Refusal::NotEmpty);
        }
        let at = self.now();
        let name = name.to_owned();
        self.folder_mut(folder)?
            .change(at, NameChange::Remove { name });
        Ok(())
    }

    /// Gives another name within the folder, at once, also when it was taken.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn rename(&mut self, folder: u64, from: &OsStr, to: &OsStr) -> Result<(), Refusal> {
        self.lookup(folder, from)?;
        let at = self.now();
        let (from, to) = (from.to_owned(), to.to_owned());
        self.folder_mut(folder)?
            .change(at, NameChange::Rename { from, to });
        Ok(())
    }

    /// Bytes of a file.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn read(&self, node: u64, offset: usize, bytes: usize) -> Result<&[u8], Refusal> {
        match self.nodes.get(&node) {
            Some(Node::File(file)) => Ok(file.read(offset, bytes)),
            Some(Node::Folder(_)) => Err(Refusal::IsAFolder),
            None => Err(Refusal::Missing),
        }
    }

    fn used_bytes(&self) -> u64 {
        self.nodes
            .values()
            .map(|node| match node {
                Node::File(file) => file.len() as u64,
                Node::Folder(_) => 0,
            })
            .sum()
    }

    /// Writes to a file's cache.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn write(&mut self, node: u64, offset: usize, data: &[u8]) -> Result<(), Refusal> {
        let grows = (offset + data.len()).saturating_sub(self.file_mut(node)?.len()) as u64;
        if grows > 0 && self.used_bytes().saturating_add(grows) > self.capacity_bytes {
            return Err(Refusal::Full);
        }
        let at = self.now();
        let file = self.file_mut(node)?;
        file.write(at, offset, data);
        let volatile_bytes = file.volatile_bytes;
        self.most_volatile_bytes = self.most_volatile_bytes.max(volatile_bytes);
        Ok(())
    }

    /// Cuts or extends a file, in its cache.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn resize(&mut self, node: u64, bytes: usize) -> Result<(), Refusal> {
        let at = self.now();
        self.file_mut(node)?.resize(at, bytes);
        Ok(())
    }

    /// Makes a file's data, or a folder's names, durable.
    ///
    /// # Errors
    /// [`Refusal::Missing`].
    pub fn sync(&mut self, node: u64) -> Result<(), Refusal> {
        match self.nodes.get_mut(&node).ok_or(Refusal::Missing)? {
            Node::File(file) => file.sync(),
            Node::Folder(folder) => folder.sync(),
        }
        Ok(())
    }

    /// A sync that the disk failed: what it would have written is never written.
    ///
    /// # Errors
    /// [`Refusal::Missing`].
    pub fn fail_sync(&mut self, node: u64) -> Result<(), Refusal> {
        match self.nodes.get_mut(&node).ok_or(Refusal::Missing)? {
            Node::File(file) => file.fail_sync(),
            Node::Folder(_) => {}
        }
        Ok(())
    }

    /// Limits what the files may hold together.
    pub fn set_capacity_bytes(&mut self, bytes: u64) {
        self.capacity_bytes = bytes;
    }

    /// Room taken and limit, bytes.
    pub fn usage_bytes(&self) -> (u64, u64) {
        (self.used_bytes(), self.capacity_bytes)
    }

    /// Forgets the most that was written without a sync.
    pub fn measure_volatile_bytes(&mut self) {
        self.most_volatile_bytes = 0;
    }

    /// The most that one file had written without a sync since it is measured, bytes.
    pub fn most_volatile_bytes(&self) -> u64 {
        self.most_volatile_bytes
    }

    /// Drops what has no name. Only a cut does so: before it, a removed file may still be open, or come back.
    fn forget_unnamed(&mut self) {
        let mut named = BTreeSet::from([ROOT]);
        for node in self.nodes.values() {
            if let Node::Folder(folder) = node {
                named.extend(folder.current.values());
            }
        }
        self.nodes.retain(|node, _| named.contains(node));
    }

    /// The disk that is found when power is back after a cut now; the same seed finds the same.
    #[must_use]
    pub fn cut(&self, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mode = match rng.random_range(0..8) {
            0 => Mode::None,
            1 => Mode::All,
            2 => Mode::Before(rng.random_range(0..=self.moment)),
            3..=5 => Mode::Each,
            _ => Mode::EachSector,
        };
        let nodes = self
            .nodes
            .iter()
            .map(|(number, node)| {
                let found = match node {
                    Node::Folder(folder) => Node::Folder(folder.cut(mode, &mut rng)),
                    Node::File(file) => Node::File(file.cut(mode, &mut rng)),
                };
                (*number, found)
            })
            .collect();
        let mut found = Self {
            nodes,
            next: self.next,
            moment: 0,
            capacity_bytes: self.capacity_bytes,
            most_volatile_bytes: self.most_volatile_bytes,
        };
        found.forget_unnamed();
        found
    }
}

#[cfg(test)]
mod tests;
