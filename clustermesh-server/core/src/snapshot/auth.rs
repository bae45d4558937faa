//! Users, roles and tokens in a snapshot.

use std::vec;

use bytes::Bytes;
use clustermesh_api::etcd::auth;
use prost::Message;

use super::ITEM_OVERHEAD_BYTES;
use crate::{
    auth::{Auth, Token, owned_permission, user_from_pb},
    pb,
};

/// What is still to be sent.
#[derive(Debug)]
pub(super) struct AuthPart {
    roles: vec::IntoIter<auth::Role>,
    users: vec::IntoIter<auth::User>,
    tokens: vec::IntoIter<pb::SnapshotToken>,
}

impl AuthPart {
    pub(super) fn new(auth: &Auth) -> Self {
        let roles: Vec<_> = auth
            .roles
            .iter()
            .map(|(name, permissions)| auth::Role {
                name: Bytes::copy_from_slice(name.as_bytes()),
                key_permission: permissions.clone(),
            })
            .collect();
        let users: Vec<_> = auth
            .users
            .iter()
            .map(|(name, user)| auth::User {
                name: Bytes::copy_from_slice(name.as_bytes()),
                password: user.password_hash.clone(),
                roles: user.roles.clone(),
                options: user
                    .no_password
                    .then_some(auth::UserAddOptions { no_password: true }),
            })
            .collect();
        let tokens: Vec<_> = auth
            .tokens
            .iter()
            .map(|(digest, token)| pb::SnapshotToken {
                token_sha256: digest.clone(),
                user: token.user.clone(),
                issued_unix_ms: token.issued_unix_ms,
            })
            .collect();
        Self {
            roles: roles.into_iter(),
            users: users.into_iter(),
            tokens: tokens.into_iter(),
        }
    }

    pub(super) fn is_sent(&self) -> bool {
        self.roles.len() + self.users.len() + self.tokens.len() == 0
    }

    /// Adds at least one item, and about `max_bytes`.
    pub(super) fn fill(&mut self, max_bytes: usize, chunk: &mut pb::SnapshotChunk) {
        let mut bytes = 0;
        while bytes < max_bytes {
            if let Some(role) = self.roles.next() {
                bytes += role.encoded_len();
                chunk.roles.push(role);
            } else if let Some(user) = self.users.next() {
                bytes += user.encoded_len();
                chunk.users.push(user);
            } else if let Some(token) = self.tokens.next() {
                bytes += token.encoded_len();
                chunk.tokens.push(token);
            } else {
                return;
            }
            bytes += ITEM_OVERHEAD_BYTES;
        }
    }
}

/// Takes one chunk's users, roles and tokens.
///
/// # Errors
/// What is wrong with them.
pub(super) fn load(auth: &mut Auth, chunk: &mut pb::SnapshotChunk) -> Result<(), String> {
    for role in chunk.roles.drain(..) {
        let name = text(&role.name)?;
        if auth
            .roles
            .last_key_value()
            .is_some_and(|(last, _)| *last >= name)
        {
            return Err(format!("role {name:?} is out of order"));
        }
        let permissions = role.key_permission.iter().map(owned_permission).collect();
        auth.roles.insert(name, permissions);
    }
    for user in chunk.users.drain(..) {
        let name = text(&user.name)?;
        if auth
            .users
            .last_key_value()
            .is_some_and(|(last, _)| *last >= name)
        {
            return Err(format!("user {name:?} is out of order"));
        }
        auth.users.insert(name, user_from_pb(&user));
    }
    for token in chunk.tokens.drain(..) {
        let digest = Bytes::copy_from_slice(&token.token_sha256);
        if auth.token(&digest).is_some() || !auth.users.contains_key(&token.user) {
            return Err(format!("a token of user {:?} is not possible", token.user));
        }
        let stored = Token {
            user: token.user,
            issued_unix_ms: token.issued_unix_ms,
        };
        auth.tokens.insert(digest, stored);
    }
    Ok(())
}

fn text(name: &[u8]) -> Result<String, String> {
    match std::str::from_utf8(name) {
        Ok(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err(format!(
            "name {:?} is no text",
            name.escape_ascii().to_string()
        )),
    }
}
