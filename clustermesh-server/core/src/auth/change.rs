//! Changes of users, roles and tokens, with etcd's rules and errors.

use std::sync::OnceLock;

use bytes::Bytes;
use clustermesh_api::etcd::auth;

use super::{Auth, ROOT, Token, User};
use crate::{
    error::KvError,
    limits::{MAX_AUTH_ROLES, MAX_AUTH_USERS, MAX_ROLE_PERMISSIONS},
    pb::{self, auth_change::Change},
};

impl Auth {
    /// Applies one change; a refused one changes nothing.
    pub(crate) fn apply(
        &mut self,
        change: &Change,
        leader_time_unix_ms: i64,
    ) -> Result<(), KvError> {
        match change {
            Change::Enable(_) => self.enable(),
            Change::Disable(_) => {
                self.disable();
                Ok(())
            }
            Change::UserAdd(request) => self.add_user(request),
            Change::UserDelete(request) => self.delete_user(&request.name),
            Change::UserChangePassword(request) => self.change_password(request),
            Change::UserGrantRole(request) => self.grant_role(request),
            Change::UserRevokeRole(request) => self.revoke_role(request),
            Change::RoleAdd(request) => self.add_role(&request.name),
            Change::RoleDelete(request) => self.delete_role(&request.name),
            Change::RoleGrantPermission(request) => self.grant_permission(request),
            Change::RoleRevokePermission(request) => self.revoke_permission(request),
            Change::Token(request) => self.add_token(request, leader_time_unix_ms),
            Change::Seed(request) => {
                self.seed(request);
                Ok(())
            }
        }
    }

    /// Does not move the auth revision, as in etcd.
    fn enable(&mut self) -> Result<(), KvError> {
        if self.enabled {
            return Ok(());
        }
        let root = self.users.get(ROOT).ok_or(KvError::RootUserNotExist)?;
        if !root.is_root() {
            return Err(KvError::RootRoleNotExist);
        }
        self.enabled = true;
        Ok(())
    }

    fn disable(&mut self) {
        if self.enabled {
            self.enabled = false;
            self.tokens.clear();
            self.touched();
        }
    }

    fn add_user(&mut self, request: &pb::AuthUserAdd) -> Result<(), KvError> {
        if request.name.is_empty() {
            return Err(KvError::UserEmpty);
        }
        if self.users.contains_key(&request.name) {
            return Err(KvError::UserAlreadyExist);
        }
        check_room("users", self.users.len(), MAX_AUTH_USERS)?;
        let user = User {
            password_hash: if request.no_password {
                Bytes::new()
            } else {
                owned(&request.password_hash)
            },
            no_password: request.no_password,
            ..User::default()
        };
        self.users.insert(request.name.clone(), user);
        self.touched();
        Ok(())
    }

    fn delete_user(&mut self, name: &str) -> Result<(), KvError> {
        if self.enabled && name == ROOT {
            return Err(KvError::InvalidAuthMgmt);
        }
        self.users.remove(name).ok_or(KvError::UserNotFound)?;
        self.tokens.remove_user(name);
        self.touched();
        Ok(())
    }

    fn change_password(&mut self, request: &pb::AuthUserChangePassword) -> Result<(), KvError> {
        let user = self.user_mut(&request.name)?;
        if !user.no_password {
            user.password_hash = owned(&request.password_hash);
        }
        self.tokens.remove_user(&request.name);
        self.touched();
        Ok(())
    }

    fn grant_role(&mut self, request: &pb::AuthUserGrantRole) -> Result<(), KvError> {
        if !self.users.contains_key(&request.user) {
            return Err(KvError::UserNotFound);
        }
        // The role root need not exist.
        if request.role != ROOT && !self.roles.contains_key(&request.role) {
            return Err(KvError::RoleNotFound);
        }
        let user = self.user_mut(&request.user)?;
        if let Err(place) = user.roles.binary_search(&request.role) {
            user.roles.insert(place, request.role.clone());
            self.touched();
        }
        Ok(())
    }

    fn revoke_role(&mut self, request: &pb::AuthUserRevokeRole) -> Result<(), KvError> {
        if self.enabled && request.user == ROOT && request.role == ROOT {
            return Err(KvError::InvalidAuthMgmt);
        }
        let user = self.user_mut(&request.user)?;
        let place = user
            .roles
            .binary_search(&request.role)
            .map_err(|_| KvError::RoleNotGranted)?;
        user.roles.remove(place);
        self.touched();
        Ok(())
    }

    fn add_role(&mut self, name: &str) -> Result<(), KvError> {
        if name.is_empty() {
            return Err(KvError::RoleEmpty);
        }
        if self.roles.contains_key(name) {
            return Err(KvError::RoleAlreadyExist);
        }
        check_room("roles", self.roles.len(), MAX_AUTH_ROLES)?;
        self.roles.insert(name.to_owned(), Vec::new());
        self.touched();
        Ok(())
    }

    fn delete_role(&mut self, name: &str) -> Result<(), KvError> {
        if self.enabled && name == ROOT {
            return Err(KvError::InvalidAuthMgmt);
        }
        self.roles.remove(name).ok_or(KvError::RoleNotFound)?;
        for user in self.users.values_mut() {
            user.roles.retain(|role| role != name);
        }
        self.touched();
        Ok(())
    }

    fn grant_permission(&mut self, request: &pb::AuthRoleGrantPermission) -> Result<(), KvError> {
        let wanted = request
            .permission
            .as_ref()
            .ok_or(KvError::PermissionNotGiven)?;
        if !is_valid_range(&wanted.key, &wanted.range_end) {
            return Err(KvError::InvalidAuthMgmt);
        }
        let role = self
            .roles
            .get_mut(&request.role)
            .ok_or(KvError::RoleNotFound)?;
        // etcd looks only at the first permission of that key before it adds another one.
        let place = role.partition_point(|permission| permission.key < wanted.key);
        let same = role.get_mut(place).filter(|permission| {
            permission.key == wanted.key && permission.range_end == wanted.range_end
        });
        if let Some(permission) = same {
            permission.perm_type = wanted.perm_type;
        } else {
            check_room("permissions of one role", role.len(), MAX_ROLE_PERMISSIONS)?;
            let after = role.partition_point(|permission| permission.key <= wanted.key);
            role.insert(after, owned_permission(wanted));
        }
        self.touched();
        Ok(())
    }

    fn revoke_permission(&mut self, request: &pb::AuthRoleRevokePermission) -> Result<(), KvError> {
        let role = self
            .roles
            .get_mut(&request.role)
            .ok_or(KvError::RoleNotFound)?;
        let before = role.len();
        role.retain(|permission| {
            permission.key != request.key || permission.range_end != request.range_end
        });
        if role.len() == before {
            return Err(KvError::PermissionNotGranted);
        }
        self.touched();
        Ok(())
    }

    /// The proposer has checked the password.
    fn add_token(
        &mut self,
        request: &pb::AuthToken,
        leader_time_unix_ms: i64,
    ) -> Result<(), KvError> {
        if !self.enabled {
            return Err(KvError::AuthNotEnabled);
        }
        let user = self.users.get(&request.user).ok_or(KvError::AuthFailed)?;
        if user.no_password || request.token_sha256.is_empty() {
            return Err(KvError::AuthFailed);
        }
        let token = Token {
            user: request.user.clone(),
            issued_unix_ms: leader_time_unix_ms,
        };
        self.tokens.insert(owned(&request.token_sha256), token);
        Ok(())
    }

    fn seed(&mut self, request: &pb::AuthSeed) {
        if self.seeded {
            return;
        }
        self.seeded = true;
        for role in &request.roles {
            let name = String::from_utf8_lossy(&role.name).into_owned();
            self.roles.entry(name).or_insert_with(|| {
                let mut permissions: Vec<_> =
                    role.key_permission.iter().map(owned_permission).collect();
                permissions.sort_by(|a, b| a.key.cmp(&b.key));
                permissions
            });
        }
        for user in &request.users {
            let name = String::from_utf8_lossy(&user.name).into_owned();
            self.users.entry(name).or_insert_with(|| user_from_pb(user));
        }
        self.touched();
    }

    fn user_mut(&mut self, name: &str) -> Result<&mut User, KvError> {
        self.users.get_mut(name).ok_or(KvError::UserNotFound)
    }
}

/// A user as stored in a snapshot or an entry.
pub(crate) fn user_from_pb(user: &auth::User) -> User {
    let mut roles = user.roles.clone();
    roles.sort_unstable();
    roles.dedup();
    User {
        password_hash: owned(&user.password),
        no_password: user.options.is_some_and(|options| options.no_password),
        roles,
        permissions: OnceLock::new(),
    }
}

pub(crate) fn owned_permission(permission: &auth::Permission) -> auth::Permission {
    auth::Permission {
        perm_type: permission.perm_type,
        key: owned(&permission.key),
        range_end: owned(&permission.range_end),
    }
}

/// A copy: a slice would keep the whole log entry in memory.
fn owned(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn is_valid_range(key: &[u8], range_end: &[u8]) -> bool {
    !key.is_empty() && (range_end.is_empty() || range_end == [0] || key < range_end)
}

const fn check_room(what: &'static str, count: usize, limit: usize) -> Result<(), KvError> {
    if count >= limit {
        return Err(KvError::ListFull { what, limit });
    }
    Ok(())
}
