//! Random changes against a naive model: relations in lists, and permission decided key by key.

use clustermesh_api::etcd::auth::{Permission, permission::Type};
use proptest::prelude::*;

use super::{change, grant_role, permit, revoke_role, role_add, user_add};
use crate::{
    KvError, SnapshotLoader, State,
    auth::{Access, Actor},
    pb::{self, auth_change::Change},
    test_support::group,
};

const NAMES: [&str; 3] = ["root", "alice", "bob"];
const KEYS: [&str; 7] = ["a", "aa", "ab", "b", "ba", "c", "\0"];

#[derive(Default)]
struct Model {
    enabled: bool,
    users: Vec<String>,
    roles: Vec<String>,
    granted: Vec<(String, String)>,
    permissions: Vec<(String, Permission)>,
}

impl Model {
    fn has(list: &[String], name: &str) -> bool {
        list.iter().any(|other| other == name)
    }

    /// The change's outcome, and whether it moves the auth revision.
    fn apply(&mut self, wanted: &Change) -> Result<bool, KvError> {
        match wanted {
            Change::UserAdd(request) => {
                if Self::has(&self.users, &request.name) {
                    return Err(KvError::UserAlreadyExist);
                }
                self.users.push(request.name.clone());
            }
            Change::UserDelete(request) => {
                if self.enabled && request.name == "root" {
                    return Err(KvError::InvalidAuthMgmt);
                }
                if !Self::has(&self.users, &request.name) {
                    return Err(KvError::UserNotFound);
                }
                self.users.retain(|user| *user != request.name);
                self.granted.retain(|(user, _)| *user != request.name);
            }
            Change::RoleAdd(request) => {
                if Self::has(&self.roles, &request.name) {
                    return Err(KvError::RoleAlreadyExist);
                }
                self.roles.push(request.name.clone());
            }
            Change::RoleDelete(request) => {
                if self.enabled && request.name == "root" {
                    return Err(KvError::InvalidAuthMgmt);
                }
                if !Self::has(&self.roles, &request.name) {
                    return Err(KvError::RoleNotFound);
                }
                self.roles.retain(|role| *role != request.name);
                self.granted.retain(|(_, role)| *role != request.name);
                self.permissions.retain(|(role, _)| *role != request.name);
            }
            Change::UserGrantRole(request) => {
                if !Self::has(&self.users, &request.user) {
                    return Err(KvError::UserNotFound);
                }
                if request.role != "root" && !Self::has(&self.roles, &request.role) {
                    return Err(KvError::RoleNotFound);
                }
                let pair = (request.user.clone(), request.role.clone());
                if self.granted.contains(&pair) {
                    return Ok(false);
                }
                self.granted.push(pair);
            }
            Change::UserRevokeRole(request) => {
                if self.enabled && request.user == "root" && request.role == "root" {
                    return Err(KvError::InvalidAuthMgmt);
                }
                if !Self::has(&self.users, &request.user) {
                    return Err(KvError::UserNotFound);
                }
                let pair = (request.user.clone(), request.role.clone());
                if !self.granted.contains(&pair) {
                    return Err(KvError::RoleNotGranted);
                }
                self.granted.retain(|other| *other != pair);
            }
            Change::RoleGrantPermission(request) => {
                let permission = request.permission.clone().unwrap_or_default();
                let (key, end) = (&permission.key, &permission.range_end);
                let possible = end.is_empty() || end.as_ref() == [0] || key < end;
                if key.is_empty() || !possible {
                    return Err(KvError::InvalidAuthMgmt);
                }
                if !Self::has(&self.roles, &request.role) {
                    return Err(KvError::RoleNotFound);
                }
                // In the order of granting, of one key the first one counts.
                let first = self
                    .permissions
                    .iter_mut()
                    .find(|(role, other)| *role == request.role && other.key == *key);
                match first {
                    Some((_, other)) if other.range_end == *end => {
                        other.perm_type = permission.perm_type;
                    }
                    _ => self.permissions.push((request.role.clone(), permission)),
                }
            }
            Change::Enable(_) => {
                if !self.enabled {
                    if !Self::has(&self.users, "root") {
                        return Err(KvError::RootUserNotExist);
                    }
                    if !self.is_root("root") {
                        return Err(KvError::RootRoleNotExist);
                    }
                    self.enabled = true;
                }
                return Ok(false);
            }
            Change::Disable(_) => return Ok(std::mem::take(&mut self.enabled)),
            other => panic!("not generated: {other:?}"),
        }
        Ok(true)
    }

    fn is_root(&self, user: &str) -> bool {
        self.granted
            .iter()
            .any(|(other, role)| other == user && role == "root")
    }

    fn may(&self, user: &str, key: &[u8], range_end: &[u8], access: Access) -> bool {
        if !self.enabled {
            return true;
        }
        if !Self::has(&self.users, user) {
            return false;
        }
        self.is_root(user)
            || points()
                .filter(|point| {
                    point == key
                        || (point.as_slice() >= key
                            && (range_end == [0] || point.as_slice() < range_end))
                })
                .all(|point| self.may_point(user, &point, access))
                && (range_end != [0] || self.may_point(user, &[0xff; 8], access))
    }

    fn may_point(&self, user: &str, point: &[u8], access: Access) -> bool {
        self.permissions.iter().any(|(role, permission)| {
            let granted = self
                .granted
                .iter()
                .any(|(other, name)| other == user && name == role);
            let kind = match access {
                Access::Read => permission.perm_type != i32::from(Type::Write),
                Access::Write => permission.perm_type != i32::from(Type::Read),
            };
            let within = match permission.range_end.as_ref() {
                [] => permission.key == point,
                [0] => point >= permission.key.as_ref(),
                end => point >= permission.key.as_ref() && point < end,
            };
            granted && kind && within
        })
    }
}

/// Every key at which a permission of these tests may begin or end: between two of them nothing changes.
fn points() -> impl Iterator<Item = Vec<u8>> {
    KEYS.into_iter()
        .flat_map(|key| [key.as_bytes().to_vec(), [key.as_bytes(), &[0]].concat()])
}

fn name() -> impl Strategy<Value = &'static str> {
    prop::sample::select(NAMES.to_vec())
}

fn key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(KEYS[..6].to_vec())
}

fn range_end() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        1 => Just(""),
        3 => prop::sample::select(KEYS.to_vec()),
    ]
}

fn any_change() -> impl Strategy<Value = Change> {
    let kind = prop::sample::select(vec![Type::Read, Type::Write, Type::Readwrite]);
    prop_oneof![
        3 => name().prop_map(user_add),
        1 => name().prop_map(|name| Change::UserDelete(pb::AuthUserDelete { name: name.into() })),
        3 => name().prop_map(role_add),
        1 => name().prop_map(|name| Change::RoleDelete(pb::AuthRoleDelete { name: name.into() })),
        4 => (name(), name()).prop_map(|(user, role)| grant_role(user, role)),
        1 => (name(), name()).prop_map(|(user, role)| revoke_role(user, role)),
        6 => (name(), kind, key(), range_end())
            .prop_map(|(role, kind, key, end)| permit(role, kind, key, end)),
        2 => Just(Change::Enable(pb::AuthEnable {})),
        1 => Just(Change::Disable(pb::AuthDisable {})),
    ]
}

fn through_a_snapshot(state: &mut State) -> State {
    let mut cursor = state.snapshot();
    let mut loader = SnapshotLoader::new();
    while let Some(chunk) = cursor.next_chunk(state, 40).unwrap() {
        loader.push(chunk).unwrap();
    }
    loader.finish().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn permission_is_that_of_the_model(
        changes in prop::collection::vec(any_change(), 1..40),
        asked in prop::collection::vec((name(), key(), range_end(), any::<bool>()), 12),
    ) {
        let mut state = group();
        let mut model = Model::default();
        for wanted in changes {
            let (revision, hash) = (state.auth().revision(), state.hash());
            let expected = model.apply(&wanted);
            let found = change(&mut state, wanted.clone());
            prop_assert_eq!(&found, &expected.clone().map(|_| ()), "{:?}", wanted);
            prop_assert_eq!(state.auth().revision(), revision + u64::from(expected == Ok(true)));
            if found.is_err() {
                prop_assert_eq!(state.hash(), hash);
            }
            prop_assert_eq!(state.revision(), 1);
        }
        let loaded = through_a_snapshot(&mut state);
        prop_assert_eq!(loaded.hash(), state.hash());
        for (user, key, end, write) in asked {
            let access = if write { Access::Write } else { Access::Read };
            let actor = Actor { user, auth_revision: state.auth().revision() };
            for state in [&state, &loaded] {
                prop_assert_eq!(
                    state.auth().check_range(actor, key.as_bytes(), end.as_bytes(), access).is_ok(),
                    model.may(user, key.as_bytes(), end.as_bytes(), access),
                    "{} {:?} {:?} {:?}", user, key, end, access
                );
            }
        }
    }
}
