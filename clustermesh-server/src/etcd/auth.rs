//! `etcdserverpb.Auth`.

use clustermesh_api::etcd::rpc::auth_server::Auth;
use clustermesh_api::etcd::rpc::{
    AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse,
    AuthRoleAddRequest, AuthRoleAddResponse, AuthRoleDeleteRequest, AuthRoleDeleteResponse,
    AuthRoleGetRequest, AuthRoleGetResponse, AuthRoleGrantPermissionRequest,
    AuthRoleGrantPermissionResponse, AuthRoleListRequest, AuthRoleListResponse,
    AuthRoleRevokePermissionRequest, AuthRoleRevokePermissionResponse, AuthStatusRequest,
    AuthStatusResponse, AuthUserAddRequest, AuthUserAddResponse, AuthUserChangePasswordRequest,
    AuthUserChangePasswordResponse, AuthUserDeleteRequest, AuthUserDeleteResponse,
    AuthUserGetRequest, AuthUserGetResponse, AuthUserGrantRoleRequest, AuthUserGrantRoleResponse,
    AuthUserListRequest, AuthUserListResponse, AuthUserRevokeRoleRequest,
    AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse, ResponseHeader,
};
use clustermesh_core::KvError;
use clustermesh_core::pb::{self, auth_change::Change};
use tonic::{Request, Response, Status};

use crate::auth::{Caller, password};
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct AuthService {
    store: Store,
}

impl AuthService {
    /// Over `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    /// A handle for the caller, whose certificate must be an operator's: others have no users to look after.
    fn operator<T>(&self, request: &Request<T>) -> Result<Store, Status> {
        Caller::of(request)?.check_operator()?;
        self.store.asked_by(request)
    }

    async fn change<T>(
        &self,
        request: &Request<T>,
        change: Change,
    ) -> Result<Option<ResponseHeader>, Status> {
        let header = self.operator(request)?.change_auth(change).await?;
        Ok(Some(header))
    }
}

#[tonic::async_trait]
impl Auth for AuthService {
    async fn auth_enable(
        &self,
        request: Request<AuthEnableRequest>,
    ) -> Result<Response<AuthEnableResponse>, Status> {
        let change = Change::Enable(pb::AuthEnable {});
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthEnableResponse { header }))
    }

    async fn auth_disable(
        &self,
        request: Request<AuthDisableRequest>,
    ) -> Result<Response<AuthDisableResponse>, Status> {
        let change = Change::Disable(pb::AuthDisable {});
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthDisableResponse { header }))
    }

    async fn auth_status(
        &self,
        request: Request<AuthStatusRequest>,
    ) -> Result<Response<AuthStatusResponse>, Status> {
        let store = self.operator(&request)?;
        Ok(Response::new(store.auth_status().await?))
    }

    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        // Whoever asks for a token may have an old one: the password is what counts.
        let answer = self.store.authenticate(request.into_inner()).await?;
        Ok(Response::new(answer))
    }

    async fn user_add(
        &self,
        request: Request<AuthUserAddRequest>,
    ) -> Result<Response<AuthUserAddResponse>, Status> {
        let store = self.operator(&request)?;
        store.permit_admin()?;
        let request = request.into_inner();
        let no_password = request.options.is_some_and(|options| options.no_password);
        let change = Change::UserAdd(pb::AuthUserAdd {
            name: request.name,
            no_password,
            password_hash: if no_password {
                bytes::Bytes::new()
            } else {
                password::hash(request.password).await?
            },
        });
        let header = Some(store.change_auth(change).await?);
        Ok(Response::new(AuthUserAddResponse { header }))
    }

    async fn user_get(
        &self,
        request: Request<AuthUserGetRequest>,
    ) -> Result<Response<AuthUserGetResponse>, Status> {
        let store = self.operator(&request)?;
        let name = request.into_inner().name;
        let (roles, header) = store
            .read_auth(
                |state, actor| state.auth().check_user_get(actor, &name),
                |state| {
                    let user = state.auth().user(&name).ok_or(KvError::UserNotFound)?;
                    Ok(user.roles.clone())
                },
            )
            .await?;
        Ok(Response::new(AuthUserGetResponse {
            header: Some(header),
            roles,
        }))
    }

    async fn user_list(
        &self,
        request: Request<AuthUserListRequest>,
    ) -> Result<Response<AuthUserListResponse>, Status> {
        let (users, header) = self
            .operator(&request)?
            .read_auth(
                |state, actor| state.auth().check_admin(actor),
                |state| Ok(state.auth().users().map(str::to_owned).collect()),
            )
            .await?;
        Ok(Response::new(AuthUserListResponse {
            header: Some(header),
            users,
        }))
    }

    async fn user_delete(
        &self,
        request: Request<AuthUserDeleteRequest>,
    ) -> Result<Response<AuthUserDeleteResponse>, Status> {
        let change = Change::UserDelete(pb::AuthUserDelete {
            name: request.get_ref().name.clone(),
        });
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthUserDeleteResponse { header }))
    }

    async fn user_change_password(
        &self,
        request: Request<AuthUserChangePasswordRequest>,
    ) -> Result<Response<AuthUserChangePasswordResponse>, Status> {
        let store = self.operator(&request)?;
        store.permit_admin()?;
        let request = request.into_inner();
        // etcd stores an empty password as none that could be given.
        let password_hash = if request.password.is_empty() {
            bytes::Bytes::new()
        } else {
            password::hash(request.password).await?
        };
        let change = Change::UserChangePassword(pb::AuthUserChangePassword {
            name: request.name,
            password_hash,
        });
        let header = Some(store.change_auth(change).await?);
        Ok(Response::new(AuthUserChangePasswordResponse { header }))
    }

    async fn user_grant_role(
        &self,
        request: Request<AuthUserGrantRoleRequest>,
    ) -> Result<Response<AuthUserGrantRoleResponse>, Status> {
        let change = Change::UserGrantRole(pb::AuthUserGrantRole {
            user: request.get_ref().user.clone(),
            role: request.get_ref().role.clone(),
        });
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthUserGrantRoleResponse { header }))
    }

    async fn user_revoke_role(
        &self,
        request: Request<AuthUserRevokeRoleRequest>,
    ) -> Result<Response<AuthUserRevokeRoleResponse>, Status> {
        let change = Change::UserRevokeRole(pb::AuthUserRevokeRole {
            user: request.get_ref().name.clone(),
            role: request.get_ref().role.clone(),
        });
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthUserRevokeRoleResponse { header }))
    }

    async fn role_add(
        &self,
        request: Request<AuthRoleAddRequest>,
    ) -> Result<Response<AuthRoleAddResponse>, Status> {
        let change = Change::RoleAdd(pb::AuthRoleAdd {
            name: request.get_ref().name.clone(),
        });
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthRoleAddResponse { header }))
    }

    async fn role_get(
        &self,
        request: Request<AuthRoleGetRequest>,
    ) -> Result<Response<AuthRoleGetResponse>, Status> {
        let store = self.operator(&request)?;
        let role = request.into_inner().role;
        let (perm, header) = store
            .read_auth(
                |state, actor| state.auth().check_role_get(actor, &role),
                |state| state.auth().role(&role),
            )
            .await?;
        Ok(Response::new(AuthRoleGetResponse {
            header: Some(header),
            perm,
        }))
    }

    async fn role_list(
        &self,
        request: Request<AuthRoleListRequest>,
    ) -> Result<Response<AuthRoleListResponse>, Status> {
        let (roles, header) = self
            .operator(&request)?
            .read_auth(
                |state, actor| state.auth().check_admin(actor),
                |state| Ok(state.auth().roles().map(str::to_owned).collect()),
            )
            .await?;
        Ok(Response::new(AuthRoleListResponse {
            header: Some(header),
            roles,
        }))
    }

    async fn role_delete(
        &self,
        request: Request<AuthRoleDeleteRequest>,
    ) -> Result<Response<AuthRoleDeleteResponse>, Status> {
        let change = Change::RoleDelete(pb::AuthRoleDelete {
            name: request.get_ref().role.clone(),
        });
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthRoleDeleteResponse { header }))
    }

    async fn role_grant_permission(
        &self,
        request: Request<AuthRoleGrantPermissionRequest>,
    ) -> Result<Response<AuthRoleGrantPermissionResponse>, Status> {
        let change = Change::RoleGrantPermission(pb::AuthRoleGrantPermission {
            role: request.get_ref().name.clone(),
            permission: request.get_ref().perm.clone(),
        });
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthRoleGrantPermissionResponse { header }))
    }

    async fn role_revoke_permission(
        &self,
        request: Request<AuthRoleRevokePermissionRequest>,
    ) -> Result<Response<AuthRoleRevokePermissionResponse>, Status> {
        let asked = request.get_ref();
        let change = Change::RoleRevokePermission(pb::AuthRoleRevokePermission {
            role: asked.role.clone(),
            key: asked.key.clone(),
            range_end: asked.range_end.clone(),
        });
        let header = self.change(&request, change).await?;
        Ok(Response::new(AuthRoleRevokePermissionResponse { header }))
    }
}
