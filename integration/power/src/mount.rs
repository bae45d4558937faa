//! The volatile disk, mounted with FUSE: every write and sync of a real process reaches the model.
//!
//! Files are opened for direct I/O, so the kernel keeps no pages of its own: `write` is a request, `fsync` and
//! `fdatasync` are requests, and `sync_file_range` finds nothing to write and never arrives here.

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use parking_lot::{Condvar, Mutex};

use crate::disk::{Disk, ROOT, Refusal, SECTOR_BYTES, Stat};

/// The kernel remembers nothing: names and lengths change when power is cut.
const NO_CACHING: Duration = Duration::ZERO;
const NAME_MAX_BYTES: u32 = 255;
const BLOCK_BYTES: u32 = 512;

/// What the disk does wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every sync fails with `EIO`.
    pub sync_fails: bool,
    /// Every write fails with `EIO`.
    pub write_fails: bool,
    /// Each sync takes this much longer.
    pub sync_delay: Duration,
}

/// What was asked of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Writes, syncs and changes of names and lengths.
    pub changes: u64,
    /// Syncs among them.
    pub syncs: u64,
}

#[derive(Debug, Default)]
struct State {
    disk: Disk,
    faults: Faults,
    counts: Counts,
    /// Power fails at this change, which does not happen.
    cut_at: Option<u64>,
    is_off: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    went_off: Condvar,
}

/// A mounted disk; unmounted when dropped.
#[derive(Debug)]
pub struct PowerDisk {
    shared: Arc<Shared>,
    path: PathBuf,
    _session: fuser::BackgroundSession,
}

impl PowerDisk {
    /// Mounts an empty disk at folder `path`. Needs root and `/dev/fuse`.
    ///
    /// # Errors
    /// The system's reason why it cannot be mounted.
    pub fn mount(path: &Path) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut config = fuser::Config::default();
        config.mount_options = vec![MountOption::FSName("clustermesh-power".into())];
        let session = fuser::Session::new(Mounted(shared.clone()), path, &config)?.spawn()?;
        Ok(Self {
            shared,
            path: path.to_owned(),
            _session: session,
        })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it does wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.shared.state.lock().faults = faults;
    }

    /// How much its files may hold together from now on.
    pub fn set_capacity_bytes(&self, bytes: u64) {
        self.shared.state.lock().disk.set_capacity_bytes(bytes);
    }

    /// Room taken, bytes.
    pub fn used_bytes(&self) -> u64 {
        self.shared.state.lock().disk.usage_bytes().0
    }

    /// What was asked of it since power came on.
    pub fn counts(&self) -> Counts {
        self.shared.state.lock().counts
    }

    /// Forgets how much was ever written without a sync.
    pub fn measure_volatile_bytes(&self) {
        self.shared.state.lock().disk.measure_volatile_bytes();
    }

    /// The most that one file had written without a sync since it is measured, bytes.
    pub fn most_volatile_bytes(&self) -> u64 {
        self.shared.state.lock().disk.most_volatile_bytes()
    }

    /// Lets power fail at the change with this number, counted from when power came on.
    pub fn cut_at(&self, change: u64) {
        self.shared.state.lock().cut_at = Some(change);
    }

    /// Waits until power has failed; false when it has not within `timeout`.
    #[must_use]
    pub fn wait_until_off(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        while !state.is_off {
            if self
                .shared
                .went_off
                .wait_until(&mut state, deadline)
                .timed_out()
            {
                return state.is_off;
            }
        }
        true
    }

    /// Power fails now, unless it has, and comes back: what was not synced is lost, kept or torn as `seed` decides.
    /// Whoever used the disk must be dead.
    pub fn power_cycle(&self, seed: u64) {
        let mut state = self.shared.state.lock();
        state.disk = state.disk.cut(seed);
        state.faults = Faults::default();
        state.counts = Counts::default();
        state.cut_at = None;
        state.is_off = false;
    }

    /// An empty disk in place of this one.
    pub fn replace(&self) {
        *self.shared.state.lock() = State::default();
    }
}

struct Mounted(Arc<Shared>);

impl From<Refusal> for Errno {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Missing => Self::ENOENT,
            Refusal::Exists => Self::EEXIST,
            Refusal::NotAFolder => Self::ENOTDIR,
            Refusal::IsAFolder => Self::EISDIR,
            Refusal::NotEmpty => Self::ENOTEMPTY,
            Refusal::Full => Self::ENOSPC,
        }
    }
}

fn attr(stat: Stat) -> FileAttr {
    let (kind, perm) = if stat.is_folder {
        (FileType::Directory, 0o755)
    } else {
        (FileType::RegularFile, 0o644)
    };
    FileAttr {
        ino: INodeNo(stat.node),
        size: stat.bytes,
        blocks: stat.bytes.div_ceil(SECTOR_BYTES as u64),
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn position(offset: u64) -> Result<usize, Errno> {
    usize::try_from(offset).map_err(|_| Errno::EFBIG)
}

impl Mounted {
    /// Looks at the disk, unless it is off.
    fn look<T>(&self, at: impl FnOnce(&Disk) -> Result<T, Errno>) -> Result<T, Errno> {
        let state = self.0.state.lock();
        if state.is_off {
            return Err(Errno::EIO);
        }
        at(&state.disk)
    }

    /// Changes the disk, unless power fails at this change.
    fn change<T>(
        &self,
        make: impl FnOnce(&mut Disk, Faults) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut state = self.0.state.lock();
        if state.is_off {
            return Err(Errno::EIO);
        }
        state.counts.changes += 1;
        if state.cut_at.is_some_and(|at| state.counts.changes >= at) {
            state.is_off = true;
            self.0.went_off.notify_all();
            return Err(Errno::EIO);
        }
        let faults = state.faults;
        make(&mut state.disk, faults)
    }

    fn sync(&self, node: u64) -> Result<(), Errno> {
        let delay = {
            let mut state = self.0.state.lock();
            state.counts.syncs += 1;
            state.faults.sync_delay
        };
        // The slow disk itself. Nobody unparks this thread, but the call may return early.
        let slow_until = Instant::now() + delay;
        while let Some(left) = slow_until.checked_duration_since(Instant::now()) {
            std::thread::park_timeout(left);
        }
        self.change(|disk, faults| {
            if faults.sync_fails {
                disk.fail_sync(node)?;
                return Err(Errno::EIO);
            }
            Ok(disk.sync(node)?)
        })
    }
}

fn entry(found: Result<Stat, Errno>, reply: ReplyEntry) {
    match found {
        Ok(stat) => reply.entry(&NO_CACHING, &attr(stat), Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn empty(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Mounted {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(self.look(|disk| Ok(disk.lookup(parent.0, name)?)), reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.look(|disk| Ok(disk.stat(ino.0)?)) {
            Ok(stat) => reply.attr(&NO_CACHING, &attr(stat)),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let result = match size {
            Some(bytes) => position(bytes)
                .and_then(|bytes| self.change(|disk, _| Ok(disk.resize(ino.0, bytes)?))),
            None => Ok(()),
        };
        match result.and_then(|()| self.look(|disk| Ok(disk.stat(ino.0)?))) {
            Ok(stat) => reply.attr(&NO_CACHING, &attr(stat)),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        entry(
            self.change(|disk, _| Ok(disk.create(parent.0, name, true)?)),
            reply,
        );
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(
            self.change(|disk, _| Ok(disk.remove(parent.0, name)?)),
            reply,
        );
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(
            self.change(|disk, _| Ok(disk.remove(parent.0, name)?)),
            reply,
        );
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let result = if parent != newparent {
            Err(Errno::EXDEV)
        } else if !flags.is_empty() {
            Err(Errno::EINVAL)
        } else {
            self.change(|disk, _| Ok(disk.rename(parent.0, name, newname)?))
        };
        empty(result, reply);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        match self.change(|disk, _| Ok(disk.create(parent.0, name, false)?)) {
            Ok(stat) => reply.created(
                &NO_CACHING,
                &attr(stat),
                Generation(0),
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO,
            ),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let bytes = size as usize;
        let read = position(offset)
            .and_then(|at| self.look(|disk| Ok(disk.read(ino.0, at, bytes)?.to_vec())));
        match read {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = position(offset).and_then(|at| {
            self.change(|disk, faults| {
                if faults.write_fails {
                    return Err(Errno::EIO);
                }
                disk.write(ino.0, at, data)?;
                u32::try_from(data.len()).map_err(|_| Errno::EFBIG)
            })
        });
        match written {
            Ok(bytes) => reply.written(bytes),
            Err(error) => reply.error(error),
        }
    }

    /// Closing makes nothing durable.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _data: bool, reply: ReplyEmpty) {
        empty(self.sync(ino.0), reply);
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _data: bool, reply: ReplyEmpty) {
        empty(self.sync(ino.0), reply);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let names = match self.look(|disk| Ok(disk.list(ino.0)?)) {
            Ok(names) => names,
            Err(error) => return reply.error(error),
        };
        // The root stands for its parent, which the kernel knows better.
        let dots = [(".", ino.0), ("..", ROOT)].map(|(name, node)| {
            let stat = Stat {
                node,
                is_folder: true,
                bytes: 0,
            };
            (name.into(), stat)
        });
        for ((name, stat), next) in dots.into_iter().chain(names).zip(1_u64..) {
            if next > offset && reply.add(INodeNo(stat.node), next, attr(stat).kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let (used, capacity) = self.0.state.lock().disk.usage_bytes();
        let block = u64::from(BLOCK_BYTES);
        let free = capacity.saturating_sub(used) / block;
        reply.statfs(
            capacity / block,
            free,
            free,
            u64::MAX,
            u64::MAX,
            BLOCK_BYTES,
            NAME_MAX_BYTES,
            0,
        );
    }
}
