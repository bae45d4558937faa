//! Permission: may this user do that. Rules and their order are those of etcd's `auth` store and applier.

use bytes::Bytes;
use clustermesh_api::etcd::rpc::{
    DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, request_op::Request,
};

use super::{Access, Actor, Auth, Permissions};
use crate::{error::KvError, lease::LeaseTable};

impl Auth {
    /// Reading or writing a range; everything goes while auth is disabled.
    ///
    /// # Errors
    /// [`KvError::UserEmpty`] for nobody, [`KvError::AuthOldRevision`] where users or roles have changed since, [`KvError::PermissionDenied`].
    pub fn check_range(
        &self,
        actor: Actor<'_>,
        key: &[u8],
        range_end: &[u8],
        access: Access,
    ) -> Result<(), KvError> {
        if !self.enabled {
            return Ok(());
        }
        if actor.auth_revision == 0 {
            return Err(KvError::UserEmpty);
        }
        if actor.auth_revision < self.revision {
            return Err(KvError::AuthOldRevision);
        }
        let user = self.user(actor.user).ok_or(KvError::PermissionDenied)?;
        if user.is_root() {
            return Ok(());
        }
        let permissions = user.permissions.get_or_init(|| {
            let granted = user.roles.iter().filter_map(|role| self.roles.get(role));
            Permissions::new(granted.flatten())
        });
        if permissions.cover(key, range_end, access) {
            Ok(())
        } else {
            Err(KvError::PermissionDenied)
        }
    }

    /// Users, roles, alarms, compaction and the like: role `root`.
    ///
    /// # Errors
    /// [`KvError::UserEmpty`], [`KvError::UserNotFound`], [`KvError::PermissionDenied`].
    pub fn check_admin(&self, actor: Actor<'_>) -> Result<(), KvError> {
        if !self.enabled {
            return Ok(());
        }
        if actor.user.is_empty() {
            return Err(KvError::UserEmpty);
        }
        let user = self.user(actor.user).ok_or(KvError::UserNotFound)?;
        if user.is_root() {
            Ok(())
        } else {
            Err(KvError::PermissionDenied)
        }
    }

    /// Calls that need a user, but none of his roles.
    ///
    /// # Errors
    /// [`KvError::UserEmpty`].
    pub const fn check_named(&self, actor: Actor<'_>) -> Result<(), KvError> {
        if self.enabled && actor.auth_revision == 0 {
            return Err(KvError::UserEmpty);
        }
        Ok(())
    }

    /// Seeing the roles of a user: oneself or `root`.
    ///
    /// # Errors
    /// As [`Auth::check_admin`].
    pub fn check_user_get(&self, actor: Actor<'_>, user: &str) -> Result<(), KvError> {
        match self.check_admin(actor) {
            Err(error) if user != actor.user => Err(error),
            _ => Ok(()),
        }
    }

    /// Seeing the permissions of a role: whoever has it, or `root`.
    ///
    /// # Errors
    /// As [`Auth::check_admin`].
    pub fn check_role_get(&self, actor: Actor<'_>, role: &str) -> Result<(), KvError> {
        match self.check_admin(actor) {
            Err(error)
                if !self
                    .user(actor.user)
                    .is_some_and(|user| user.has_role(role)) =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// All keys of a lease, for `access`; `root` always.
    ///
    /// # Errors
    /// As [`Auth::check_range`].
    pub(crate) fn check_lease_keys<'a>(
        &self,
        actor: Actor<'_>,
        mut keys: impl Iterator<Item = &'a Bytes>,
        access: Access,
    ) -> Result<(), KvError> {
        if self.check_admin(actor).is_ok() {
            return Ok(());
        }
        keys.try_for_each(|key| self.check_range(actor, key, &[], access))
    }

    pub(crate) fn check_put(
        &self,
        actor: Actor<'_>,
        leases: &LeaseTable,
        request: &PutRequest,
    ) -> Result<(), KvError> {
        self.check_range(actor, &request.key, &[], Access::Write)?;
        // Who may not write all keys of a lease cannot revoke it, so adding one to it would take it from those who may.
        self.check_lease_keys(actor, leases.keys(request.lease), Access::Write)?;
        if request.prev_kv {
            self.check_range(actor, &request.key, &[], Access::Read)?;
        }
        Ok(())
    }

    pub(crate) fn check_delete(
        &self,
        actor: Actor<'_>,
        request: &DeleteRangeRequest,
    ) -> Result<(), KvError> {
        self.check_range(actor, &request.key, &request.range_end, Access::Write)?;
        if request.prev_kv {
            self.check_range(actor, &request.key, &request.range_end, Access::Read)?;
        }
        Ok(())
    }

    pub(crate) fn check_txn(
        &self,
        actor: Actor<'_>,
        leases: &LeaseTable,
        request: &TxnRequest,
    ) -> Result<(), KvError> {
        if !self.enabled {
            return Ok(());
        }
        for compare in &request.compare {
            self.check_range(actor, &compare.key, &compare.range_end, Access::Read)?;
        }
        for RequestOp { request } in request.success.iter().chain(&request.failure) {
            match request {
                Some(Request::RequestRange(range)) => {
                    self.check_range(actor, &range.key, &range.range_end, Access::Read)?;
                }
                Some(Request::RequestPut(put)) => self.check_put(actor, leases, put)?,
                Some(Request::RequestDeleteRange(delete)) => self.check_delete(actor, delete)?,
                // As deep as the decoder lets it be.
                Some(Request::RequestTxn(nested)) => self.check_txn(actor, leases, nested)?,
                None => {}
            }
        }
        Ok(())
    }
}
