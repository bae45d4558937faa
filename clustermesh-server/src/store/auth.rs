//! Users, roles, tokens and alarms as the services use them, and on whose behalf a handle asks.

use clustermesh_api::etcd::rpc::{
    AlarmMember, AlarmRequest, AlarmResponse, AuthStatusResponse, AuthenticateRequest,
    AuthenticateResponse, HashKvResponse, ResponseHeader, alarm_request::AlarmAction,
};
use clustermesh_core::auth::Actor;
use clustermesh_core::pb::{
    self, AlarmChange, AuthChange, AuthSeed, AuthToken, MemberAlarm, Proposal, auth_change::Change,
    proposal::Command,
};
use clustermesh_core::{KvError, Outcome, State};
use openraft_rt_tokio::TokioRuntime;
use tonic::Status;

use super::{Store, kv_status, mixed_up, read_status};
use crate::auth::{Credentials, new_token, password, token_digest};

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

    /// `Maintenance.Alarm`.
    ///
    /// # Errors
    /// etcd's.
    pub async fn alarm(&self, request: AlarmRequest) -> Result<AlarmResponse, Status> {
        let wanted = request.alarm;
        let active = match request.action() {
            AlarmAction::Get => {
                self.linearize().await?;
                let (alarms, revision) = self.read(|state| {
                    self.permit_on(state, |state, actor| state.auth().check_named(actor))?;
                    let alarms = state
                        .alarms()
                        .filter(|alarm| wanted == 0 || alarm.kind == wanted)
                        .map(member)
                        .collect();
                    Ok::<_, Status>((alarms, state.revision()))
                })?;
                return Ok(AlarmResponse {
                    header: Some(self.header(revision)),
                    alarms,
                });
            }
            AlarmAction::Activate => true,
            AlarmAction::Deactivate => false,
        };
        let command = Command::Alarm(AlarmChange {
            active,
            alarm: Some(MemberAlarm {
                member_id: request.member_id,
                kind: wanted,
            }),
        });
        match self.propose(command).await? {
            (Outcome::Alarm { alarms }, header) => Ok(AlarmResponse {
                header: Some(header),
                alarms: alarms.into_iter().map(member).collect(),
            }),
            _ => Err(mixed_up()),
        }
    }

    /// `Maintenance.HashKV`: etcd's own value.
    ///
    /// # Errors
    /// etcd's.
    pub async fn hash_kv(&self, revision: i64) -> Result<HashKvResponse, Status> {
        let (hash, newest) = self
            .replica
            .hash_kv(revision)
            .await
            .map_err(|error| read_status(&error))?
            .map_err(|error| kv_status(&error))?;
        Ok(HashKvResponse {
            header: Some(self.header(newest)),
            hash: hash.hash,
            compact_revision: hash.compact_revision,
            hash_revision: hash.revision,
        })
    }

    /// Hash over everything that replicas must have in common, with its revision.
    ///
    /// # Errors
    /// The replica stops.
    pub async fn hash(&self) -> Result<(u32, i64), Status> {
        let keys = self.hash_kv(0).await?;
        let rest = self.read(State::hash_group);
        Ok((keys.hash.rotate_left(1) ^ rest, keys.hash_revision))
    }
}

fn member(alarm: MemberAlarm) -> AlarmMember {
    AlarmMember {
        member_id: alarm.member_id,
        alarm: alarm.kind,
    }
}

/// etcd's text of an alarm in the errors of a status.
pub(super) fn alarm_text(alarm: &MemberAlarm) -> String {
    let kind = match alarm.kind() {
        pb::AlarmKind::None => "NONE",
        pb::AlarmKind::Nospace => "NOSPACE",
        pb::AlarmKind::Corrupt => "CORRUPT",
    };
    format!("memberID:{} alarm:{kind} ", alarm.member_id)
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
