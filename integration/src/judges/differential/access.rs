//! Calls about users and roles.

use std::collections::BTreeMap;

use anyhow::Result;
use clustermesh_api::etcd::rpc::auth_client::AuthClient;
use clustermesh_api::etcd::rpc::{
    AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleDeleteRequest,
    AuthRoleGetRequest, AuthRoleGrantPermissionRequest, AuthRoleListRequest,
    AuthRoleRevokePermissionRequest, AuthStatusRequest, AuthUserAddRequest,
    AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGetRequest,
    AuthUserGrantRoleRequest, AuthUserListRequest, AuthUserRevokeRoleRequest, AuthenticateRequest,
};
use tonic::Request;
use tonic::transport::Channel;

use super::answer::Answer;

/// An operation about users and roles.
#[derive(Clone, Debug)]
pub enum AccessOp {
    Enable,
    Disable,
    Status,
    /// The token is kept for what is then asked as this user.
    Authenticate(AuthenticateRequest),
    UserAdd(AuthUserAddRequest),
    UserGet(AuthUserGetRequest),
    UserList,
    UserDelete(AuthUserDeleteRequest),
    UserChangePassword(AuthUserChangePasswordRequest),
    UserGrantRole(AuthUserGrantRoleRequest),
    UserRevokeRole(AuthUserRevokeRoleRequest),
    RoleAdd(AuthRoleAddRequest),
    RoleGet(AuthRoleGetRequest),
    RoleList,
    RoleDelete(AuthRoleDeleteRequest),
    RoleGrantPermission(AuthRoleGrantPermissionRequest),
    RoleRevokePermission(AuthRoleRevokePermissionRequest),
}

impl AccessOp {
    /// Whether it leaves both servers as they were.
    #[must_use]
    pub const fn only_reads(&self) -> bool {
        matches!(
            self,
            Self::Status | Self::UserGet(_) | Self::UserList | Self::RoleGet(_) | Self::RoleList
        )
    }

    /// Name in reports.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Enable => "auth-enable",
            Self::Disable => "auth-disable",
            Self::Status => "auth-status",
            Self::Authenticate(_) => "authenticate",
            Self::UserAdd(_) => "user-add",
            Self::UserGet(_) => "user-get",
            Self::UserList => "user-list",
            Self::UserDelete(_) => "user-delete",
            Self::UserChangePassword(_) => "user-change-password",
            Self::UserGrantRole(_) => "user-grant-role",
            Self::UserRevokeRole(_) => "user-revoke-role",
            Self::RoleAdd(_) => "role-add",
            Self::RoleGet(_) => "role-get",
            Self::RoleList => "role-list",
            Self::RoleDelete(_) => "role-delete",
            Self::RoleGrantPermission(_) => "role-grant-permission",
            Self::RoleRevokePermission(_) => "role-revoke-permission",
        }
    }

    pub(super) async fn perform(
        &self,
        auth: &mut AuthClient<Channel>,
        tokens: &mut Tokens,
        user: Option<&str>,
    ) -> Result<Answer> {
        macro_rules! ask {
            ($method:ident, $request:expr) => {
                Answer::of(auth.$method(tokens.asked_by(user, $request)?).await)
            };
        }
        Ok(match self {
            Self::Enable => ask!(auth_enable, AuthEnableRequest {}),
            Self::Disable => ask!(auth_disable, AuthDisableRequest {}),
            Self::Status => ask!(auth_status, AuthStatusRequest {}),
            Self::Authenticate(request) => {
                let mut answer = auth.authenticate(request.clone()).await;
                if let Ok(answer) = &mut answer {
                    let token = std::mem::take(&mut answer.get_mut().token);
                    tokens.keep(&request.name, token);
                }
                Answer::of(answer)
            }
            Self::UserAdd(request) => ask!(user_add, request.clone()),
            Self::UserGet(request) => ask!(user_get, request.clone()),
            Self::UserList => ask!(user_list, AuthUserListRequest {}),
            Self::UserDelete(request) => ask!(user_delete, request.clone()),
            Self::UserChangePassword(request) => ask!(user_change_password, request.clone()),
            Self::UserGrantRole(request) => ask!(user_grant_role, request.clone()),
            Self::UserRevokeRole(request) => ask!(user_revoke_role, request.clone()),
            Self::RoleAdd(request) => ask!(role_add, request.clone()),
            Self::RoleGet(request) => ask!(role_get, request.clone()),
            Self::RoleList => ask!(role_list, AuthRoleListRequest {}),
            Self::RoleDelete(request) => ask!(role_delete, request.clone()),
            Self::RoleGrantPermission(request) => ask!(role_grant_permission, request.clone()),
            Self::RoleRevokePermission(request) => ask!(role_revoke_permission, request.clone()),
        })
    }
}

/// Tokens of users, by name.
#[derive(Default)]
pub(super) struct Tokens(BTreeMap<String, String>);

impl Tokens {
    pub(super) fn keep(&mut self, user: &str, token: String) {
        self.0.insert(user.to_owned(), token);
    }

    /// A request with the token of `user`, where there is one.
    pub(super) fn asked_by<T>(&self, user: Option<&str>, message: T) -> Result<Request<T>> {
        let mut request = Request::new(message);
        if let Some(token) = user.and_then(|user| self.0.get(user)) {
            request.metadata_mut().insert("token", token.parse()?);
        }
        Ok(request)
    }
}
