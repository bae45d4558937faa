//! Which user of the store asks: by token, by certificate, or none.

use bytes::Bytes;
use clustermesh_core::{KvError, State, auth::Actor};
use tonic::Status;

use super::{Caller, Role, TokenUses, token_digest};
use crate::status::kv_status;

/// etcd's text for a token that is not valid, or not any more.
const INVALID_TOKEN: &str = "etcdserver: invalid auth token";

/// What a call says about its user. Looked up where it is needed: users come and go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// The server itself: bound by no user's permissions.
    System,
    /// An agent: bound by its certificate's role alone.
    Agent,
    /// A token, by its SHA-256.
    Token(Bytes),
    /// A user by name: the common name of a certificate.
    User(String),
    /// None of it.
    Nobody,
}

impl Credentials {
    /// Those of a request: the token that it brings, else the certificate of its connection.
    ///
    /// # Errors
    /// `Unauthenticated` when the request did not come through the client port.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        let caller = Caller::of(request)?;
        let metadata = request.metadata();
        // etcd's clients send the one, its gateway's clients the other.
        let token = metadata
            .get("token")
            .or_else(|| metadata.get("authorization"));
        if let Some(token) = token {
            let token = token.as_bytes();
            let token = token.strip_prefix(b"Bearer ").unwrap_or(token);
            return Ok(Self::Token(token_digest(token)));
        }
        Ok(match (&caller.role, &caller.common_name) {
            (Role::Node { .. }, _) => Self::Agent,
            (_, Some(name)) => Self::User(name.clone()),
            (_, None) => Self::Nobody,
        })
    }

    /// The user as of now; `None` for who is bound by no user's permissions.
    ///
    /// # Errors
    /// `Unauthenticated` for a token that is not valid.
    pub fn actor<'a>(
        &'a self,
        state: &'a State,
        uses: &TokenUses,
    ) -> Result<Option<Actor<'a>>, Status> {
        let auth_revision = state.auth().revision();
        let user = match self {
            Self::System | Self::Agent => return Ok(None),
            Self::Nobody => return Ok(Some(Actor::NOBODY)),
            Self::User(name) => name.as_str(),
            Self::Token(digest) => state
                .auth()
                .token(digest)
                .filter(|token| uses.is_alive(digest, token.issued_unix_ms))
                .map(|token| token.user.as_str())
                .ok_or_else(|| Status::unauthenticated(INVALID_TOKEN))?,
        };
        Ok(Some(Actor {
            user,
            auth_revision,
        }))
    }

    /// Whether the check holds for the user as of now; always where permissions are not checked.
    ///
    /// # Errors
    /// `Unauthenticated` for a token that is not valid, else those of `check`.
    pub fn check(
        &self,
        state: &State,
        uses: &TokenUses,
        check: impl FnOnce(Actor<'_>) -> Result<(), KvError>,
    ) -> Result<(), Status> {
        if !state.auth().is_enabled() {
            return Ok(());
        }
        match self.actor(state, uses)? {
            Some(actor) => check(actor).map_err(|error| kv_status(&error)),
            None => Ok(()),
        }
    }
}
