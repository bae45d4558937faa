//! Memory that the allocator holds and nobody uses, given back to the system.
#![expect(unsafe_code, reason = "malloc_trim has no safe wrapper")]

/// Gives back what is free; whether there was any. For a start, which has read a snapshot and the log after it.
///
/// glibc does so by itself only at the end of its heaps: what was freed between versions that stay it keeps. Not for a
/// replica that serves: with a million keys it holds the allocator's lock for 30 to 190 ms.
pub fn give_back() -> bool {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes the allocator's own locks and touches free memory only (malloc_trim(3)); safe to call from any thread.
        let freed = unsafe { libc::malloc_trim(0) };
        freed == 1
    }
    #[cfg(not(target_env = "gnu"))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECES: usize = 100_000;
    const PIECE_BYTES: usize = 1_000;

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.unwrap().split_whitespace().next().unwrap();
        number.parse().unwrap()
    }

    #[test]
    #[cfg_attr(not(target_env = "gnu"), ignore = "only glibc has malloc_trim")]
    fn what_was_freed_below_something_that_stays_is_given_back() {
        let pieces: Vec<Vec<u8>> = (0..PIECES).map(|_| vec![1; PIECE_BYTES]).collect();
        // At the end of the heap: without it glibc would give all back by itself.
        let stays = vec![1_u8; PIECE_BYTES];
        drop(pieces);
        let before = resident_kib();
        assert!(give_back());
        let freed = before.saturating_sub(resident_kib());
        assert!(freed > 50 << 10, "{freed} KiB were given back");
        assert_eq!(stays.len(), PIECE_BYTES);
    }
}
