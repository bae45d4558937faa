//! Users, roles and tokens as the services use them, and on whose behalf a handle asks.

use clustermesh_api::etcd::rpc::{
    AuthStatusResponse, AuthenticateRequest, AuthenticateResponse, ResponseHeader,
};
use clustermesh_core::auth::Actor;
use clustermesh_core::pb::{
    AuthChange, AuthSeed, AuthToken, Proposal, auth_change::Change, proposal::Command,
};
use clustermesh_core::{KvError, Outcome, State};
use openraft_rt_tokio::TokioRuntime;
use tonic::Status;

use super::Store;
use crate::auth::{Credentials, new_token, password, token_digest};
use crate::status::{kv_status, mixed_up};

/// Times that a password is checked anew because users changed meanwhile.
const MAX_AUTHENTICATE_ATTEMPTS: usize = 10;

/// Wakes up when users, roles or whether permissions are checked change.
pub type AuthChanges = clustermesh_raft::AuthChanges<TokioRuntime>;

impl Store {
    /// A handle that asks on behalf of the request's user.
    ///
    /// # Errors
    /// `Unauthenticated` when the request did not come through the client port.
    pub fn asked_by<T>(&self, request: &tonic::Request<T>) -> Result<Self, Status> {
        Ok(Self {
            credentials: Credentials::of(request)?.into(),
            ..self.clone()
        })
    }

    /// A handle for the user that asks now, even when his token ends: for what goes on for long.
    #[must_use]
    pub fn for_user_now(&self) -> Self {
        let user = match &*self.credentials {
            Credentials::Token(_) => self.read(|state| {
                let found = self.credentials.actor(state, &self.shared.token_uses);
                found.ok().flatten().map(|actor| actor.user.to_owned())
            }),
            _ => None,
        };
        let mut handle = self.clone();
        if let Some(user) = user {
            handle.credentials = Credentials::User(user).into();
        }
        handle
    }

    /// Grows with every change of users, roles or of whether permissions are checked.
    #[must_use]
    pub fn auth_version(&self) -> u64 {
        self.replica.auth_version()
    }

    /// Wakes up when users, roles or whether permissions are checked change.
    #[must_use]
    pub fn auth_changes(&self) -> AuthChanges {
        self.replica.auth_changes()
    }

    /// Whether the check holds for whoever asks, on the state as applied here; always where permissions are not checked.
    ///
    /// # Errors
    /// etcd's.
    pub fn permit(
        &self,
        check: impl FnOnce(&State, Actor<'_>) -> Result<(), KvError>,
    ) -> Result<(), Status> {
        if !self.replica.is_auth_enabled() {
            return Ok(());
        }
        self.read(|state| self.permit_on(state, check))
    }

    /// The same on a state that is being read.
    pub(super) fn permit_on(
        &self,
        state: &State,
        check: impl FnOnce(&State, Actor<'_>) -> Result<(), KvError>,
    ) -> Result<(), Status> {
        self.credentials
            .check(state, &self.shared.token_uses, |actor| check(state, actor))
    }

    /// Whoever asks has role `root`.
    ///
    /// # Errors
    /// etcd's.
    pub fn permit_admin(&self) -> Result<(), Status> {
        self.permit(|state, actor| state.auth().check_admin(actor))
    }

    /// Whoever asks is a user.
    ///
    /// # Errors
    /// etcd's.
    pub fn permit_named(&self) -> Result<(), Status> {
        self.permit(|state, actor| state.auth().check_named(actor))
    }

    /// The command with the user that apply checks.
    pub(super) fn proposal(&self, command: Command) -> Result<Proposal, Status> {
        if *self.credentials == Credentials::System {
            return Ok(Proposal::system(command));
        }
        let mut proposal = Proposal::from(command);
        if self.replica.is_auth_enabled() {
            self.read(|state| {
                let found = self.credentials.actor(state, &self.shared.token_uses)?;
                if let Some(actor) = found {
                    actor.user.clone_into(&mut proposal.user);
                    proposal.auth_revision = actor.auth_revision;
                }
                Ok::<_, Status>(())
            })?;
        }
        Ok(proposal)
    }

    /// Changes users or roles.
    ///
    /// # Errors
    /// etcd's.
    pub async fn change_auth(&self, change: Change) -> Result<ResponseHeader, Status> {
        let command = Command::Auth(AuthChange {
            change: Some(change),
        });
        match self.propose(command).await? {
            (Outcome::Auth, header) => Ok(header),
            _ => Err(mixed_up()),
        }
    }

    /// Writes the roles and users that a cluster's server comes with, unless they were written before.
    ///
    /// # Errors
    /// No leader.
    pub async fn seed_auth(&self, seed: AuthSeed) -> Result<(), Status> {
        if self.read(|state| state.auth().is_seeded() || state.feature_level() == 0) {
            return Ok(());
        }
        self.change_auth(Change::Seed(seed)).await.map(drop)
    }

    /// Reads of users and roles: linearizable and by permission, as in etcd.
    ///
    /// # Errors
    /// etcd's.
    pub async fn read_auth<T>(
        &self,
        check: impl FnOnce(&State, Actor<'_>) -> Result<(), KvError>,
        read: impl FnOnce(&State) -> Result<T, KvError>,
    ) -> Result<(T, ResponseHeader), Status> {
        self.linearize().await?;
        let (found, revision) = self.read(|state| {
            self.permit_on(state, check)?;
            let found = read(state).map_err(|error| kv_status(&error))?;
            Ok::<_, Status>((found, state.revision()))
        })?;
        Ok((found, self.header(revision)))
    }

    /// `Auth.AuthStatus`.
    ///
    /// # Errors
    /// A token that is not valid, or no leader.
    pub async fn auth_status(&self) -> Result<AuthStatusResponse, Status> {
        let ((enabled, auth_revision), header) = self
            .read_auth(
                |_, _| Ok(()),
                |state| Ok((state.auth().is_enabled(), state.auth().revision())),
            )
            .await?;
        Ok(AuthStatusResponse {
            header: Some(header),
            enabled,
            auth_revision,
        })
    }

    /// `Auth.Authenticate`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn authenticate(
        &self,
        request: AuthenticateRequest,
    ) -> Result<AuthenticateResponse, Status> {
        self.linearize().await?;
        for _ in 0..MAX_AUTHENTICATE_ATTEMPTS {
            let (hash, checked_at) = self.read(|state| password_of(state, &request.name))?;
            if !password::verify(request.password.clone(), hash).await? {
                tracing::info!(user = request.name, "wrong password");
                return Err(kv_status(&KvError::AuthFailed));
            }
            let token = new_token();
            let issued = Self {
                credentials: Credentials::System.into(),
                ..self.clone()
            };
            let header = issued
                .change_auth(Change::Token(AuthToken {
                    user: request.name.clone(),
                    token_sha256: token_digest(token.as_bytes()),
                }))
                .await?;
            // The password may have been changed while it was checked.
            if self.read(|state| state.auth().revision()) == checked_at {
                return Ok(AuthenticateResponse {
                    header: Some(header),
                    token,
                });
            }
        }
        Err(kv_status(&KvError::AuthOldRevision))
    }
}

fn password_of(state: &State, name: &str) -> Result<(bytes::Bytes, u64), Status> {
    if !state.auth().is_enabled() {
        return Err(kv_status(&KvError::AuthNotEnabled));
    }
    let user = state
        .auth()
        .user(name)
        .ok_or_else(|| kv_status(&KvError::AuthFailed))?;
    if user.no_password {
        // etcd knows no code for it.
        return Err(Status::unknown(
            "auth: authentication failed, password was given for no password user",
        ));
    }
    Ok((user.password_hash.clone(), state.auth().revision()))
}
