//! `bpf(2)`: map elements and batches, pins, links. Layouts are those of `linux/bpf.h`.
#![expect(unsafe_code, reason = "wraps bpf(2)")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::plain::{Plain, zeroed};

/// The kernel's own "operation not supported", which libc does not name.
const ENOTSUPP: i32 = 524;

/// `enum bpf_cmd`.
#[repr(u32)]
#[derive(Clone, Copy)]
pub(super) enum Command {
    #[cfg(test)]
    MapCreate = 0,
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    MapNextKey = 4,
    ProgramLoad = 5,
    Pin = 6,
    Get = 7,
    ProgramRun = 10,
    Info = 15,
    ProgramQuery = 16,
    MapLookupBatch = 24,
    MapUpdateBatch = 26,
    MapDeleteBatch = 27,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// `enum bpf_attach_type`, the ones in use.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttachType {
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    SocketRelease = 34,
    TcxIngress = 46,
    TcxEgress = 47,
}

#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length_bytes: u32,
    info: u64,
}

#[repr(C)]
struct QueryAttr {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    padding: u32,
    /// Three more arrays and the revision. The kernel writes the revision whatever the length given.
    rest: [u64; 4],
}

#[repr(C)]
struct LinkCreateAttr {
    program_fd: u32,
    /// A cgroup's descriptor or an interface index.
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    program_fd: u32,
    flags: u32,
    old_program_fd: u32,
}

/// First fields of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub(crate) map_type: u32,
    pub(crate) id: u32,
    pub(crate) key_size_bytes: u32,
    pub(crate) value_size_bytes: u32,
    pub(crate) entries_max: u32,
    pub(crate) flags: u32,
}

/// First fields of `struct bpf_link_info` for a cgroup's link or a tcx link.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    pub(crate) link_type: u32,
    pub(crate) id: u32,
    pub(crate) program_id: u32,
    padding: u32,
    target: [u32; 2],
}

impl LinkInfo {
    /// The interface of a tcx link.
    pub(crate) fn ifindex(&self) -> u32 {
        // The attach type stands behind it.
        self.target[0]
    }

    /// The cgroup of a cgroup's link.
    pub(crate) fn cgroup_id(&self) -> u64 {
        let [first, second] = self.target.map(u32::to_ne_bytes);
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&first);
        bytes[4..].copy_from_slice(&second);
        u64::from_ne_bytes(bytes)
    }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    // A borrowed descriptor is never negative.
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

/// # Safety
///
/// All pointers in `attr` must be valid for what `command` reads and writes through them.
pub(super) unsafe fn call<T>(command: Command, attr: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attr` is a live `repr(C)` prefix of `union bpf_attr` of the length given; the kernel takes
    // the rest as zeros. Its pointers are the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as u32,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    RawFd::try_from(result).map_err(io::Error::other)
}

pub(super) fn new_fd(result: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just created this descriptor for us.
    unsafe { OwnedFd::from_raw_fd(result) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// True if the kernel, or this type of map, has no batch calls.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP)
    )
}

/// The value of `key`, `N` values for a per-CPU map.
fn lookup_raw<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: &K,
    values: &mut [V],
) -> io::Result<bool> {
    let mut attr = ElementAttr {
        map_fd: raw(map),
        padding: 0,
        key: address(key),
        value: values.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the caller has room for what the map returns; see the two callers.
    match unsafe { call(Command::MapLookup, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The value of `key`. The sizes of `K` and `V` must be the map's: `Table` checks that when it is made.
pub(crate) fn lookup<K: Plain, V: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = [zeroed::<V>()];
    let found = lookup_raw(map, key, &mut value)?;
    Ok(found.then_some(value[0]))
}

/// The values of `index` in a per-CPU array, one for each of `cpus` possible CPUs. `V` is a multiple of 8 bytes.
pub(crate) fn lookup_per_cpu<V: Plain>(
    map: BorrowedFd<'_>,
    index: u32,
    cpus: usize,
) -> io::Result<Vec<V>> {
    let mut values = vec![zeroed::<V>(); cpus];
    lookup_raw(map, &index, &mut values)?;
    Ok(values)
}

/// Writes `key`, new or not.
pub(crate) fn update<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: raw(map),
        padding: 0,
        key: address(key),
        value: address(value),
        flags: 0,
    };
    // SAFETY: key and value outlive the call; their sizes are the map's.
    unsafe { call(Command::MapUpdate, &mut attr) }.map(drop)
}

/// Deletes `key`; an absent one is `ENOENT`.
pub(crate) fn delete<K: Plain>(map: BorrowedFd<'_>, key: &K) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: raw(map),
        padding: 0,
        key: address(key),
        value: 0,
        flags: 0,
    };
    // SAFETY: the key outlives the call; its size is the map's.
    unsafe { call(Command::MapDelete, &mut attr) }.map(drop)
}

/// The key after `previous`, or the first one.
pub(crate) fn next_key<K: Plain>(
    map: BorrowedFd<'_>,
    previous: Option<&K>,
) -> io::Result<Option<K>> {
    let mut next = zeroed::<K>();
    let mut attr = ElementAttr {
        map_fd: raw(map),
        padding: 0,
        key: previous.map_or(0, address),
        value: std::ptr::from_mut(&mut next) as u64,
        flags: 0,
    };
    // SAFETY: both keys outlive the call; their size is the map's.
    match unsafe { call(Command::MapNextKey, &mut attr) } {
        Ok(_) => Ok(Some(next)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes all pairs; on an error, also how many were written.
pub(crate) fn update_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    let mut attr = batch(map, keys.len().min(values.len()));
    attr.keys = keys.as_ptr() as u64;
    attr.values = values.as_ptr() as u64;
    // SAFETY: `count` is within both slices, which the kernel only reads; element sizes are the map's.
    unsafe { call(Command::MapUpdateBatch, &mut attr) }
        .map(drop)
        .map_err(|error| (attr.count as usize, error))
}

/// Deletes all keys; on an error, `ENOENT` for an absent key, also how many were deleted.
pub(crate) fn delete_batch<K: Plain>(
    map: BorrowedFd<'_>,
    keys: &[K],
) -> Result<(), (usize, io::Error)> {
    let mut attr = batch(map, keys.len());
    attr.keys = keys.as_ptr() as u64;
    // SAFETY: `count` is the slice's length, which the kernel only reads; the element size is the map's.
    unsafe { call(Command::MapDeleteBatch, &mut attr) }
        .map(drop)
        .map_err(|error| (attr.count as usize, error))
}

/// Where a batched walk stands; the kernel's own, as large as the largest key of ours.
pub(crate) type Cursor = [u64; 8];

/// What one call of [`lookup_batch`] found.
pub(crate) struct Page {
    /// Entries written to the front of both slices.
    pub(crate) count: usize,
    /// Where to go on; `None` after the last one.
    pub(crate) next: Option<Cursor>,
}

/// Reads as many entries as `keys` and `values` hold. `ENOSPC`: one bucket holds more than that.
pub(crate) fn lookup_batch<K: Plain, V: Plain>(
    map: BorrowedFd<'_>,
    cursor: Option<&Cursor>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<Page> {
    const { assert!(size_of::<K>() <= size_of::<Cursor>()) };
    let mut out: Cursor = [0; 8];
    let mut attr = batch(map, keys.len().min(values.len()));
    attr.in_batch = cursor.map_or(0, address);
    attr.out_batch = std::ptr::from_mut(&mut out) as u64;
    attr.keys = keys.as_mut_ptr() as u64;
    attr.values = values.as_mut_ptr() as u64;
    // SAFETY: `count` is within both slices, whose element sizes are the map's; the cursor has room for a key,
    // and the kernel writes a key or a u32 there.
    match unsafe { call(Command::MapLookupBatch, &mut attr) } {
        Ok(_) => Ok(Page {
            count: attr.count as usize,
            next: Some(out),
        }),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Page {
            count: attr.count as usize,
            next: None,
        }),
        Err(error) => Err(error),
    }
}

fn batch(map: BorrowedFd<'_>, count: usize) -> BatchAttr {
    BatchAttr {
        in_batch: 0,
        out_batch: 0,
        keys: 0,
        values: 0,
        count: u32::try_from(count).unwrap_or(u32::MAX),
        map_fd: raw(map),
        element_flags: 0,
        flags: 0,
    }
}

/// Opens what is pinned at `path`.
pub(crate) fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = PathAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the path is a C string that outlives the call.
    unsafe { call(Command::Get, &mut attr) }.map(new_fd)
}

/// Pins a map, program or link at `path`.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = PathAttr {
        path: path.as_ptr() as u64,
        fd: raw(object),
        flags: 0,
    };
    // SAFETY: the path is a C string that outlives the call.
    unsafe { call(Command::Pin, &mut attr) }.map(drop)
}

/// # Safety
///
/// `T` must be a `repr(C)` prefix of what the kernel writes for this kind of object, of integers only.
unsafe fn info<T: Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = InfoAttr {
        fd: raw(object),
        length_bytes: u32::try_from(size_of::<T>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: the kernel writes at most `length_bytes` into `info`, which lives here.
    unsafe { call(Command::Info, &mut attr) }?;
    Ok(info)
}

/// What the kernel says about a map.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // SAFETY: the first six fields of `struct bpf_map_info`.
    unsafe { info(map) }
}

/// What the kernel says about a link.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: the first fields of `struct bpf_link_info`; for the links in use the union starts with
    // a u64 (cgroup) or two u32 (tcx).
    unsafe { info(link) }
}

/// True if the kernel knows tcx (6.6): asks what is attached to the loopback device.
pub(crate) fn tcx_supported() -> bool {
    const LOOPBACK_IFINDEX: u32 = 1;
    let mut attr = QueryAttr {
        ifindex: LOOPBACK_IFINDEX,
        attach_type: AttachType::TcxIngress as u32,
        query_flags: 0,
        attach_flags: 0,
        program_ids: 0,
        count: 0,
        padding: 0,
        rest: [0; 4],
    };
    // SAFETY: no pointers; with a count of 0 the kernel writes only into `attr`.
    match unsafe { call(Command::ProgramQuery, &mut attr) } {
        Ok(_) => true,
        // No room for the ids of programs that are attached: it knows tcx.
        Err(error) => error.raw_os_error() == Some(libc::ENOSPC),
    }
}

/// A new link of `program` at an interface, with tcx.
pub(crate) fn link_tcx(
    program: BorrowedFd<'_>,
    ifindex: u32,
    direction: AttachType,
) -> io::Result<OwnedFd> {
    link(program, ifindex, direction)
}

/// A new link of `program` at a cgroup.
pub(crate) fn link_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    link(program, raw(cgroup), attach_type)
}

fn link(program: BorrowedFd<'_>, target: u32, attach_type: AttachType) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program_fd: raw(program),
        target,
        attach_type: attach_type as u32,
        flags: 0,
    };
    // SAFETY: no pointers.
    unsafe { call(Command::LinkCreate, &mut attr) }.map(new_fd)
}

/// Makes `link` run `program` from now on; no packet meets neither. `ENOLINK`: what it was attached to is gone.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: raw(link),
        program_fd: raw(program),
        flags: 0,
        old_program_fd: 0,
    };
    // SAFETY: no pointers.
    unsafe { call(Command::LinkUpdate, &mut attr) }.map(drop)
}

/// Detaches `link` whoever else holds it.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = raw(link);
    // SAFETY: no pointers.
    unsafe { call(Command::LinkDetach, &mut attr) }.map(drop)
}

/// A new map without BTF.
#[cfg(test)]
pub(crate) fn map_create(
    map_type: u32,
    key_size_bytes: usize,
    value_size_bytes: usize,
    entries_max: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let size = |bytes| u32::try_from(bytes).map_err(io::Error::other);
    let mut attr = [
        map_type,
        size(key_size_bytes)?,
        size(value_size_bytes)?,
        entries_max,
        flags,
    ];
    // SAFETY: no pointers.
    unsafe { call(Command::MapCreate, &mut attr) }.map(new_fd)
}
