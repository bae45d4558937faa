//! Users, roles and tokens as etcd keeps them: what apply checks permission by. Changes move the auth revision, never that of the keys.

mod change;
mod check;
mod permissions;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::OnceLock,
};

use bytes::Bytes;
use clustermesh_api::etcd::auth;

pub(crate) use change::{owned_permission, user_from_pb};
pub use permissions::Access;
use permissions::Permissions;

use crate::{error::KvError, hash::Fnv64, limits::MAX_AUTH_TOKENS};

/// Name of the user that may not go, and of the role that may do everything.
pub const ROOT: &str = "root";

/// On whose behalf something is asked for. The empty user is nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Actor<'a> {
    /// Name of the user.
    pub user: &'a str,
    /// Auth revision at which the user was found out; 0 for nobody.
    pub auth_revision: u64,
}

impl Actor<'_> {
    /// No user was named.
    pub const NOBODY: Actor<'static> = Actor {
        user: "",
        auth_revision: 0,
    };
}

/// One user.
#[derive(Clone, Debug, Default)]
pub struct User {
    /// bcrypt in its text form; empty for a user without password.
    pub password_hash: Bytes,
    /// Comes by certificate only.
    pub no_password: bool,
    /// Names of the granted roles, sorted.
    pub roles: Vec<String>,
    /// What the roles add up to, once somebody asked.
    permissions: OnceLock<Permissions>,
}

impl User {
    fn has_role(&self, role: &str) -> bool {
        self.roles
            .binary_search_by(|granted| granted.as_str().cmp(role))
            .is_ok()
    }

    fn is_root(&self) -> bool {
        self.has_role(ROOT)
    }
}

/// A token that a user got, by its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Whose it is.
    pub user: String,
    /// The issuing leader's clock, ms since 1970.
    pub issued_unix_ms: i64,
}

/// Users, roles and tokens. Part of [`crate::State`].
#[derive(Debug)]
pub struct Auth {
    pub(crate) enabled: bool,
    pub(crate) revision: u64,
    /// The roles and users that a cluster's server comes with were written.
    pub(crate) seeded: bool,
    pub(crate) users: BTreeMap<String, User>,
    pub(crate) roles: BTreeMap<String, Vec<auth::Permission>>,
    pub(crate) tokens: Tokens,
}

impl Default for Auth {
    /// Nobody and nothing; the revision starts at 1, as in etcd.
    fn default() -> Self {
        Self {
            enabled: false,
            revision: 1,
            seeded: false,
            users: BTreeMap::new(),
            roles: BTreeMap::new(),
            tokens: Tokens::default(),
        }
    }
}

impl Auth {
    /// Whether permissions are checked.
    #[must_use]
    pub const fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Grows with every change of users, roles and of whether permissions are checked.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether the roles and users that a cluster's server comes with were written.
    #[must_use]
    pub const fn is_seeded(&self) -> bool {
        self.seeded
    }

    /// A user.
    #[must_use]
    pub fn user(&self, name: &str) -> Option<&User> {
        self.users.get(name)
    }

    /// Names of all users, sorted.
    pub fn users(&self) -> impl Iterator<Item = &str> + '_ {
        self.users.keys().map(String::as_str)
    }

    /// Permissions of a role as etcd shows them: those of `root` are everything.
    ///
    /// # Errors
    /// [`KvError::RoleNotFound`].
    pub fn role(&self, name: &str) -> Result<Vec<auth::Permission>, KvError> {
        let permissions = self.roles.get(name).ok_or(KvError::RoleNotFound)?;
        if name == ROOT {
            return Ok(vec![auth::Permission {
                perm_type: auth::permission::Type::Readwrite.into(),
                key: Bytes::new(),
                range_end: Bytes::from_static(&[0]),
            }]);
        }
        Ok(permissions.clone())
    }

    /// Names of all roles, sorted.
    pub fn roles(&self) -> impl Iterator<Item = &str> + '_ {
        self.roles.keys().map(String::as_str)
    }

    /// Whose token this is, by its SHA-256. How long it lasts without use is the caller's affair.
    #[must_use]
    pub fn token(&self, token_sha256: &[u8]) -> Option<&Token> {
        self.tokens.by_digest.get(token_sha256)
    }

    pub(crate) fn hash(&self, hash: &mut Fnv64) {
        hash.u64(u64::from(self.enabled));
        hash.u64(self.revision);
        hash.u64(u64::from(self.seeded));
        for (name, user) in &self.users {
            hash.bytes(name.as_bytes());
            hash.bytes(&user.password_hash);
            hash.u64(u64::from(user.no_password));
            hash.u64(user.roles.len() as u64);
            for role in &user.roles {
                hash.bytes(role.as_bytes());
            }
        }
        for (name, permissions) in &self.roles {
            hash.bytes(name.as_bytes());
            hash.u64(permissions.len() as u64);
            for permission in permissions {
                hash.i64(permission.perm_type.into());
                hash.bytes(&permission.key);
                hash.bytes(&permission.range_end);
            }
        }
        for (digest, token) in self.tokens.iter() {
            hash.bytes(digest);
            hash.bytes(token.user.as_bytes());
            hash.i64(token.issued_unix_ms);
        }
    }

    /// Nothing of it was ever used.
    pub(crate) fn is_untouched(&self) -> bool {
        !self.enabled
            && !self.seeded
            && self.revision == Self::default().revision
            && self.users.is_empty()
            && self.roles.is_empty()
    }

    fn touched(&mut self) {
        self.revision += 1;
        for user in self.users.values_mut() {
            user.permissions = OnceLock::new();
        }
    }
}

/// Tokens by digest, the oldest going first where there are too many.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    by_digest: HashMap<Bytes, Token>,
    /// Each digest of `by_digest` once, by age.
    order: VecDeque<Bytes>,
}

impl Tokens {
    pub(crate) fn insert(&mut self, digest: Bytes, token: Token) {
        if self.by_digest.insert(digest.clone(), token).is_some() {
            self.order.retain(|other| *other != digest);
        }
        self.order.push_back(digest);
        while self.order.len() > MAX_AUTH_TOKENS {
            if let Some(oldest) = self.order.pop_front() {
                self.by_digest.remove(&oldest);
            }
        }
    }

    fn remove_user(&mut self, user: &str) {
        let tokens = &mut self.by_digest;
        self.order.retain(|digest| {
            let stays = tokens.get(digest).is_some_and(|token| token.user != user);
            if !stays {
                tokens.remove(digest);
            }
            stays
        });
    }

    pub(crate) fn clear(&mut self) {
        self.by_digest.clear();
        self.order.clear();
    }

    /// Digests and tokens, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Bytes, &Token)> + '_ {
        self.order
            .iter()
            .filter_map(|digest| Some((digest, self.by_digest.get(digest)?)))
    }
}

#[cfg(test)]
mod tests;
