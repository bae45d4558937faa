//! What each user may have been allowed while users, roles and permissions changed.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use clustermesh_api::etcd::auth::permission::Type;
use clustermesh_core::{State, pb::Proposal};
use clustermesh_raft::Replica;
use parking_lot::Mutex;

use crate::runtime::{SimRuntime, draw};

/// The user that may do everything.
pub const ROOT: &str = "root";
/// Users beside it.
pub(crate) const USERS: u64 = 3;

/// A key, and whether it is written.
pub type Need = (Bytes, bool);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Range {
    first: Bytes,
    end: Bytes,
    reads: bool,
    writes: bool,
}

impl Range {
    fn covers(&self, (key, writes): &Need) -> bool {
        let within = if self.end.is_empty() {
            *key == self.first
        } else {
            *key >= self.first && *key < self.end
        };
        within && if *writes { self.writes } else { self.reads }
    }
}

/// Who may do what; `None` may do everything.
type Grants = BTreeMap<String, Option<Vec<Range>>>;

#[derive(Debug)]
struct Dump {
    grants: Grants,
    /// In force at this revision of the keys at the latest.
    since: i64,
}

impl Dump {
    fn permits(&self, user: &str, needs: &[Need]) -> bool {
        match self.grants.get(user) {
            None => false,
            Some(None) => true,
            Some(Some(ranges)) => needs
                .iter()
                .all(|need| ranges.iter().any(|range| range.covers(need))),
        }
    }
}

/// All permissions that ever were, by auth revision.
#[derive(Clone, Default)]
pub struct Access(Arc<Mutex<BTreeMap<u64, Dump>>>);

/// On whose behalf something is asked for.
#[derive(Debug, Clone)]
pub struct Asker {
    /// The user.
    pub user: String,
    /// When the user was found out.
    pub auth_revision: u64,
    /// Some replica was here already.
    floor: u64,
}

/// What was said to an asker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// It was done, by what the whole group had decided before.
    Done,
    /// It was done by what one replica knew.
    DoneHere,
    /// It is not permitted.
    Denied,
}

fn dump(state: &State) -> Grants {
    let auth = state.auth();
    let grants = |name: &str| {
        let roles = &auth.user(name)?.roles;
        if roles.iter().any(|role| role == ROOT) {
            return None;
        }
        let permissions = roles.iter().flat_map(|role| auth.role(role)).flatten();
        let ranges = permissions.map(|permission| Range {
            reads: permission.perm_type() != Type::Write,
            writes: permission.perm_type() != Type::Read,
            first: permission.key,
            end: permission.range_end,
        });
        Some(ranges.collect())
    };
    auth.users()
        .map(|name| (name.to_owned(), grants(name)))
        .collect()
}

impl Access {
    /// Looks at what a replica has applied: at one auth revision all have the same.
    ///
    /// # Errors
    /// What differs.
    pub fn note(&self, state: &State) -> Result<(), String> {
        if !state.auth().is_enabled() {
            return Ok(());
        }
        let (revision, since, grants) = (state.auth().revision(), state.revision(), dump(state));
        let mut dumps = self.0.lock();
        let known = dumps.entry(revision).or_insert_with(|| Dump {
            grants: grants.clone(),
            since,
        });
        known.since = known.since.min(since);
        if known.grants != grants {
            return Err(format!(
                "at auth revision {revision} permissions are {grants:?}, another replica had {:?}",
                known.grants
            ));
        }
        Ok(())
    }

    /// Finds a user out at a replica.
    ///
    /// # Errors
    /// As [`Access::note`].
    pub fn resolve(&self, replica: &Replica<SimRuntime>, user: &str) -> Result<Asker, String> {
        let floor = self.floor();
        let auth_revision = replica.read(|state| {
            self.note(state)?;
            Ok::<u64, String>(state.auth().revision())
        })?;
        Ok(Asker {
            user: user.to_owned(),
            auth_revision,
            floor,
        })
    }

    /// The newest auth revision that was seen.
    pub fn floor(&self) -> u64 {
        let dumps = self.0.lock();
        dumps.last_key_value().map_or(0, |(newest, _)| *newest)
    }

    /// Some user.
    pub fn some_user() -> String {
        if draw(|random| random.chance(40)) {
            return ROOT.to_owned();
        }
        format!("u{}", draw(|random| random.below(USERS)))
    }

    /// Judges what an asker was told.
    ///
    /// # Errors
    /// Why that must not be.
    pub fn check(&self, asker: &Asker, needs: &[Need], said: Said) -> Result<(), String> {
        let dumps = self.0.lock();
        let Some(dump) = dumps.get(&asker.auth_revision) else {
            if asker.floor == 0 || said == Said::DoneHere {
                // That replica did not check permissions yet.
                return Ok(());
            }
            return Err(format!("{asker:?}: nobody had that auth revision"));
        };
        let permitted = dump.permits(&asker.user, needs);
        if permitted == (said == Said::Denied) {
            return Err(format!(
                "{asker:?} was told {said:?} of {needs:?} where the user may {:?}",
                dump.grants.get(&asker.user)
            ));
        }
        if said == Said::Done && asker.auth_revision < asker.floor {
            return Err(format!(
                "{asker:?} was told {said:?} of {needs:?} by permissions that were known to be outdated"
            ));
        }
        Ok(())
    }

    /// Judges events that a watcher got: the user was permitted to see them when they happened, or at some time since.
    ///
    /// # Errors
    /// Why that must not be.
    pub fn check_seen(&self, user: &str, revision: i64, keys: &[Bytes]) -> Result<(), String> {
        let needs: Vec<Need> = keys.iter().map(|key| (key.clone(), false)).collect();
        let dumps = self.0.lock();
        let in_force = dumps
            .iter()
            .rev()
            .find(|(_, dump)| dump.since < revision)
            .map_or(0, |(auth_revision, _)| *auth_revision);
        let permitted = |dump: &Dump| dump.permits(user, &needs);
        // At first permissions were not checked.
        if in_force == 0 || dumps.range(in_force..).any(|(_, dump)| permitted(dump)) {
            return Ok(());
        }
        Err(format!(
            "a watcher of user {user} got revision {revision} of {keys:?}, which it might not see from auth revision {in_force} on"
        ))
    }
}

/// Signs a proposal where permissions are checked.
pub fn sign(proposal: &mut Proposal, asker: Option<&Asker>) {
    if let Some(asker) = asker {
        proposal.user.clone_from(&asker.user);
        proposal.auth_revision = asker.auth_revision;
    }
}

#[cfg(test)]
mod tests;
