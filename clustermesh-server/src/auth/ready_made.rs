//! Roles and users that a cluster's server comes with, as Cilium's ClusterMesh names them.

use bytes::Bytes;
use clustermesh_api::etcd::auth::{Permission, Role, User, UserAddOptions, permission::Type};
use clustermesh_core::{auth::ROOT, pb::AuthSeed};

/// Role of other clusters' servers: what this cluster exports.
const REMOTE: &str = "remote";
/// Role of this cluster's own readers: what it copied.
const LOCAL: &str = "local";

/// What is written once into the state of cluster `cluster`. Its users come by certificate; `root` is the operator's to add.
#[must_use]
pub fn seed(cluster: &str) -> AuthSeed {
    AuthSeed {
        roles: vec![
            role(
                LOCAL,
                vec![
                    prefix("cilium/.heartbeat"),
                    prefix("cilium/cache/"),
                    prefix("cilium/cluster-config/"),
                    prefix("cilium/synced/"),
                ],
            ),
            role(
                REMOTE,
                vec![
                    prefix("cilium/.heartbeat"),
                    key(format!("cilium/cluster-config/{cluster}")),
                    prefix("cilium/state/"),
                    prefix(format!("cilium/synced/{cluster}/")),
                ],
            ),
        ],
        users: vec![
            user(format!("admin-{cluster}"), ROOT),
            user(format!("local-{cluster}"), LOCAL),
            user(REMOTE.to_owned(), REMOTE),
        ],
    }
}

fn role(name: &'static str, key_permission: Vec<Permission>) -> Role {
    Role {
        name: Bytes::from_static(name.as_bytes()),
        key_permission,
    }
}

fn user(name: String, role: &str) -> User {
    User {
        name: name.into(),
        password: Bytes::new(),
        roles: vec![role.to_owned()],
        options: Some(UserAddOptions { no_password: true }),
    }
}

fn prefix(prefix: impl Into<Bytes>) -> Permission {
    let key = prefix.into();
    Permission {
        perm_type: Type::Read.into(),
        range_end: clustermesh_mesh::prefix_end(&key),
        key,
    }
}

fn key(key: impl Into<Bytes>) -> Permission {
    Permission {
        perm_type: Type::Read.into(),
        key: key.into(),
        range_end: Bytes::new(),
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_core::{
        State,
        auth::{Access, Actor},
        pb::{AuthChange, AuthEnable, AuthUserAdd, AuthUserGrantRole, Batch, Leader, Proposal},
        pb::{FeatureLevel, auth_change::Change, proposal::Command},
    };

    use super::*;

    #[test]
    fn peers_and_own_readers_see_what_is_theirs_and_nothing_else() {
        let mut state = State::new();
        let auth = |change| {
            Command::Auth(AuthChange {
                change: Some(change),
            })
        };
        let commands = [
            Command::FeatureLevel(FeatureLevel { level: 1 }),
            auth(Change::Seed(seed("c1"))),
            auth(Change::UserAdd(AuthUserAdd {
                name: ROOT.into(),
                ..Default::default()
            })),
            auth(Change::UserGrantRole(AuthUserGrantRole {
                user: ROOT.into(),
                role: ROOT.into(),
            })),
            auth(Change::Enable(AuthEnable {})),
        ];
        let proposals = commands.map(Proposal::system).into();
        let batch = Batch::new(Leader::default(), proposals);
        let applied = state.apply(&batch, 1).unwrap();
        assert!(applied.outcomes.iter().all(|done| done.result.is_ok()));

        let may = |user, key: &str, end: &str, access| {
            let actor = Actor {
                user,
                auth_revision: state.auth().revision(),
            };
            state
                .auth()
                .check_range(actor, key.as_bytes(), end.as_bytes(), access)
                .is_ok()
        };
        for (key, end) in [
            ("cilium/.heartbeat", ""),
            ("cilium/state/", "cilium/state0"),
            ("cilium/cluster-config/c1", ""),
            ("cilium/synced/c1/x", ""),
        ] {
            assert!(may("remote", key, end, Access::Read), "{key}");
            assert!(!may("remote", key, end, Access::Write), "{key}");
        }
        for (key, end) in [
            ("cilium/cache/", "cilium/cache0"),
            ("cilium/cluster-config/c2", ""),
            ("cilium/synced/c2/x", ""),
            ("clustermesh.io/services/v1/a/b", ""),
        ] {
            assert!(!may("remote", key, end, Access::Read), "{key}");
        }
        assert!(may(
            "local-c1",
            "cilium/cache/",
            "cilium/cache0",
            Access::Read
        ));
        assert!(!may("local-c1", "cilium/state/x", "", Access::Read));
        assert!(may("admin-c1", "\0", "\0", Access::Write));
    }
}
