//! Typed maps: batched writes and reads, element by element where the kernel has no batches.

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Error;
use crate::sys::bpf::{self, Page};
use crate::sys::plain::{self, Plain};

/// Entries in one batch call.
const BATCH_ENTRIES_MAX: usize = 4_096;
/// How often a read is repeated that the kernel interrupted.
const INTERRUPTED_READS_MAX: u32 = 16;

/// A map's descriptor and what is said about it in errors; shared by clones of a table.
#[derive(Debug)]
struct Handle {
    fd: OwnedFd,
    name: &'static str,
    capacity: u32,
    /// Cleared when the kernel refuses a batch call for this map.
    batches: AtomicBool,
}

/// A hash map or trie. Clones are the same map.
#[derive(Debug)]
pub struct Table<K, V> {
    handle: Arc<Handle>,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self {
            handle: Arc::clone(&self.handle),
            types: PhantomData,
        }
    }
}

impl<K: Plain, V: Plain> Table<K, V> {
    /// `fd` must be a map with keys of `K`'s size and values of `V`'s: the caller has checked it.
    pub(crate) fn new(fd: OwnedFd, name: &'static str, capacity: u32) -> Self {
        Self {
            handle: Arc::new(Handle {
                fd,
                name,
                capacity,
                batches: AtomicBool::new(true),
            }),
            types: PhantomData,
        }
    }

    /// Writes all pairs, in their order; present keys get the new value.
    ///
    /// # Errors
    ///
    /// [`Error::MapFull`] or [`Error::Map`]; the pairs before the one that failed are written.
    pub fn upsert(&self, pairs: &[(K, V)]) -> Result<(), Error> {
        let map = self.handle.fd.as_fd();
        let mut keys = Vec::with_capacity(pairs.len().min(BATCH_ENTRIES_MAX));
        let mut values = Vec::with_capacity(keys.capacity());
        for chunk in pairs.chunks(BATCH_ENTRIES_MAX) {
            if let [(key, value)] = chunk {
                bpf::update(map, key, value).map_err(|e| self.write_error("write", 1, e))?;
                continue;
            }
            if self.uses_batches() {
                keys.clear();
                values.clear();
                keys.extend(chunk.iter().map(|pair| pair.0));
                values.extend(chunk.iter().map(|pair| pair.1));
                match bpf::update_batch(map, &keys, &values) {
                    Ok(()) => continue,
                    Err((_, error)) if bpf::is_unsupported(&error) => self.forgo_batches(),
                    Err((_, error)) => {
                        return Err(self.write_error("write", chunk.len(), error));
                    }
                }
            }
            for (key, value) in chunk {
                bpf::update(map, key, value)
                    .map_err(|e| self.write_error("write", chunk.len(), e))?;
            }
        }
        Ok(())
    }

    /// Deletes all keys; absent ones are passed over.
    ///
    /// # Errors
    ///
    /// [`Error::Map`]; the keys before the one that failed are deleted.
    pub fn delete(&self, keys: &[K]) -> Result<(), Error> {
        let map = self.handle.fd.as_fd();
        for chunk in keys.chunks(BATCH_ENTRIES_MAX) {
            let mut rest = chunk;
            while self.uses_batches() && rest.len() > 1 {
                match bpf::delete_batch(map, rest) {
                    Ok(()) => rest = &[],
                    // The batch stops at an absent key: go on behind it.
                    Err((deleted, error)) if error.raw_os_error() == Some(libc::ENOENT) => {
                        rest = rest.get(deleted + 1..).unwrap_or_default();
                    }
                    Err((_, error)) if bpf::is_unsupported(&error) => self.forgo_batches(),
                    Err((_, error)) => return Err(self.error("delete", rest.len(), error)),
                }
            }
            for key in rest {
                match bpf::delete(map, key) {
                    Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                        return Err(self.error("delete", rest.len(), error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Makes the map hold `wanted` and nothing else: what is wanted is there before the rest goes.
    ///
    /// # Errors
    ///
    /// Those of [`upsert`](Self::upsert), [`entries`](Self::entries) and [`delete`](Self::delete).
    pub fn replace_all(&self, wanted: &BTreeMap<K, V>) -> Result<(), Error>
    where
        K: Ord,
    {
        let pairs: Vec<_> = wanted.iter().map(|(key, value)| (*key, *value)).collect();
        self.upsert(&pairs)?;
        let mut held = self.entries()?;
        held.retain(|(key, _)| !wanted.contains_key(key));
        let rest: Vec<_> = held.into_iter().map(|(key, _)| key).collect();
        self.delete(&rest)
    }

    /// The value of `key`; of a trie, of the longest prefix that covers it.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn get(&self, key: &K) -> Result<Option<V>, Error> {
        bpf::lookup(self.handle.fd.as_fd(), key).map_err(|e| self.error("read", 1, e))
    }

    /// Everything in the map, in no order.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn entries(&self) -> Result<Vec<(K, V)>, Error> {
        let mut entries = Vec::new();
        self.walk(|keys, values| {
            entries.extend(keys.iter().copied().zip(values.iter().copied()));
        })?;
        Ok(entries)
    }

    /// Number of entries; walks the map.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn len(&self) -> Result<usize, Error> {
        let mut len = 0;
        self.walk(|keys, _| len += keys.len())?;
        Ok(len)
    }

    /// True if the map has no entry.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn is_empty(&self) -> Result<bool, Error> {
        let first = bpf::next_key::<K>(self.handle.fd.as_fd(), None);
        Ok(first.map_err(|e| self.error("read", 1, e))?.is_none())
    }

    /// Entries that fit.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.handle.capacity
    }

    /// Name of the map, as errors and pins have it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.handle.name
    }

    /// Makes this table call the kernel once per element, as on a kernel without batches.
    pub(crate) fn forgo_batches(&self) {
        self.handle.batches.store(false, Ordering::Relaxed);
    }

    fn uses_batches(&self) -> bool {
        self.handle.batches.load(Ordering::Relaxed)
    }

    fn walk(&self, mut visit: impl FnMut(&[K], &[V])) -> Result<(), Error> {
        if self.uses_batches() {
            match self.walk_batches(&mut visit) {
                // Refused before anything was visited.
                Err(error) if bpf::is_unsupported(&error) => self.forgo_batches(),
                result => return result.map_err(|e| self.error("read", 0, e)),
            }
        }
        self.walk_elements(&mut visit)
            .map_err(|e| self.error("read", 0, e))
    }

    fn walk_batches(&self, visit: &mut impl FnMut(&[K], &[V])) -> io::Result<()> {
        let map = self.handle.fd.as_fd();
        let mut keys = vec![plain::zeroed::<K>(); BATCH_ENTRIES_MAX];
        let mut values = vec![plain::zeroed::<V>(); BATCH_ENTRIES_MAX];
        let mut cursor = None;
        let mut interrupted = 0;
        let mut left = self.visits_max();
        loop {
            match bpf::lookup_batch(map, cursor.as_ref(), &mut keys, &mut values) {
                Ok(Page { count, next }) => {
                    visit(
                        keys.get(..count).unwrap_or_default(),
                        values.get(..count).unwrap_or_default(),
                    );
                    left = left.checked_sub(count).ok_or_else(restless)?;
                    if next.is_none() {
                        return Ok(());
                    }
                    cursor = next;
                }
                // One bucket holds more than the buffers do.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && keys.len() < left => {
                    keys.resize(keys.len() * 2, plain::zeroed());
                    values.resize(values.len() * 2, plain::zeroed());
                }
                Err(error)
                    if error.kind() == io::ErrorKind::Interrupted
                        && interrupted < INTERRUPTED_READS_MAX =>
                {
                    interrupted += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn walk_elements(&self, visit: &mut impl FnMut(&[K], &[V])) -> io::Result<()> {
        let map = self.handle.fd.as_fd();
        let mut previous = None;
        for _ in 0..=self.visits_max() {
            let Some(key) = bpf::next_key(map, previous.as_ref())? else {
                return Ok(());
            };
            if let Some(value) = bpf::lookup(map, &key)? {
                visit(&[key], &[value]);
            }
            previous = Some(key);
        }
        Err(restless())
    }

    /// A walk restarts when the key it stands at is deleted; past this it is not going to end.
    fn visits_max(&self) -> usize {
        2 * self.handle.capacity as usize + BATCH_ENTRIES_MAX
    }

    fn write_error(&self, action: &'static str, keys: usize, source: io::Error) -> Error {
        // Hash maps say E2BIG, tries ENOSPC.
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Error::MapFull {
                map: self.handle.name,
                capacity: self.handle.capacity,
            },
            _ => self.error(action, keys, source),
        }
    }

    fn error(&self, action: &'static str, keys: usize, source: io::Error) -> Error {
        Error::Map {
            map: self.handle.name,
            action,
            keys,
            source,
        }
    }
}

fn restless() -> io::Error {
    io::Error::other("the map changes faster than it can be read")
}

/// An array: every index has a value, zeros until it is written. Clones are the same map.
#[derive(Debug)]
pub struct ArrayTable<V>(Table<u32, V>);

impl<V> Clone for ArrayTable<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<V: Plain> ArrayTable<V> {
    /// See [`Table::new`].
    pub(crate) fn new(fd: OwnedFd, name: &'static str, capacity: u32) -> Self {
        Self(Table::new(fd, name, capacity))
    }

    /// Writes all pairs of index and value.
    ///
    /// # Errors
    ///
    /// [`Error::MapFull`] for an index at or past [`capacity`](Self::capacity); else [`Error::Map`].
    pub fn upsert(&self, pairs: &[(u32, V)]) -> Result<(), Error> {
        self.0.upsert(pairs)
    }

    /// Overwrites all indexes with zeros.
    ///
    /// # Errors
    ///
    /// Those of [`upsert`](Self::upsert).
    pub fn clear(&self, indexes: &[u32]) -> Result<(), Error> {
        let pairs: Vec<_> = indexes.iter().map(|i| (*i, plain::zeroed())).collect();
        self.0.upsert(&pairs)
    }

    /// The value at `index`; `None` for zeros or past the end.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn get(&self, index: u32) -> Result<Option<V>, Error> {
        Ok(self.0.get(&index)?.filter(|value| !plain::is_zero(value)))
    }

    /// All values that are not zeros, with their indexes.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn entries(&self) -> Result<Vec<(u32, V)>, Error> {
        let mut entries = Vec::new();
        self.0.walk(|indexes, values| {
            entries.extend(
                indexes
                    .iter()
                    .copied()
                    .zip(values.iter().copied())
                    .filter(|(_, value)| !plain::is_zero(value)),
            );
        })?;
        Ok(entries)
    }

    /// Number of values that are not zeros; walks the map.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn len(&self) -> Result<usize, Error> {
        Ok(self.entries()?.len())
    }

    /// True if every value is zeros; walks the map.
    ///
    /// # Errors
    ///
    /// [`Error::Map`].
    pub fn is_empty(&self) -> Result<bool, Error> {
        Ok(self.entries()?.is_empty())
    }

    /// Number of indexes.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.0.capacity()
    }
}

#[cfg(test)]
mod tests;
