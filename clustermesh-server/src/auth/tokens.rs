//! Tokens of users: how they are made, and how long one lasts without use.

use std::collections::HashMap;

use bytes::Bytes;
use clustermesh_core::limits::MAX_AUTH_TOKENS;
use parking_lot::Mutex;
use rand::RngExt;
use rand::distr::Alphabetic;
use sha2::{Digest, Sha256};

/// Letters of a token: 182 bits that nobody guesses.
const TOKEN_LETTERS: usize = 32;

/// A new random token.
#[must_use]
pub fn new_token() -> String {
    rand::rng()
        .sample_iter(Alphabetic)
        .take(TOKEN_LETTERS)
        .map(char::from)
        .collect()
}

/// What log, snapshots and memory hold of a token.
#[must_use]
pub fn token_digest(token: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&Sha256::digest(token))
}

/// When tokens were last used at this replica; one that was never counts from its issue.
#[derive(Debug)]
pub struct TokenUses {
    /// A token that was not used for so long is not valid any more (etcd's `--auth-token-ttl`).
    ttl_ms: i64,
    last_unix_ms: Mutex<HashMap<Bytes, i64>>,
}

impl TokenUses {
    /// No uses yet; a token ends after `ttl_seconds` without one.
    #[must_use]
    pub fn new(ttl_seconds: u32) -> Self {
        Self {
            ttl_ms: i64::from(ttl_seconds) * 1_000,
            last_unix_ms: Mutex::default(),
        }
    }

    /// Whether a token that is there is still valid; it is used by that.
    pub fn is_alive(&self, digest: &Bytes, issued_unix_ms: i64) -> bool {
        self.is_alive_at(digest, issued_unix_ms, clustermesh_raft::wall_clock())
    }

    fn is_alive_at(&self, digest: &Bytes, issued_unix_ms: i64, now_unix_ms: i64) -> bool {
        let is_recent = |last: i64| now_unix_ms.saturating_sub(last) < self.ttl_ms;
        let mut uses = self.last_unix_ms.lock();
        if !is_recent(uses.get(digest).copied().unwrap_or(issued_unix_ms)) {
            uses.remove(digest);
            return false;
        }
        if uses.len() >= MAX_AUTH_TOKENS && !uses.contains_key(digest) {
            uses.retain(|_, last| is_recent(*last));
        }
        // Full of what is in use: this one counts from its issue.
        if uses.len() < MAX_AUTH_TOKENS || uses.contains_key(digest) {
            uses.insert(digest.clone(), now_unix_ms);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_lasts_as_long_as_it_is_used() {
        const TTL_MS: i64 = 2_000;
        let uses = TokenUses::new(2);
        let digest = token_digest(b"token");
        assert!(uses.is_alive_at(&digest, 0, TTL_MS - 1));
        assert!(uses.is_alive_at(&digest, 0, 2 * TTL_MS - 2));
        assert!(!uses.is_alive_at(&digest, 0, 3 * TTL_MS));
        assert!(!uses.is_alive_at(&token_digest(b"idle"), 0, TTL_MS));
        assert_ne!(new_token(), new_token());
    }
}
