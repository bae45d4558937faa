//! Random calls about users and roles, and what a seed ends with: permissions that are checked.

use clustermesh_api::etcd::auth::{Permission, UserAddOptions};
use clustermesh_api::etcd::rpc::{
    AuthRoleAddRequest, AuthRoleDeleteRequest, AuthRoleGetRequest, AuthRoleGrantPermissionRequest,
    AuthRoleRevokePermissionRequest, AuthUserAddRequest, AuthUserChangePasswordRequest,
    AuthUserDeleteRequest, AuthUserGetRequest, AuthUserGrantRoleRequest, AuthUserRevokeRoleRequest,
    AuthenticateRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, WatchCreateRequest,
};
use rand::RngExt;

use super::{Generator, Op};
use crate::judges::differential::access::AccessOp;
use crate::judges::differential::watching::WatchOp;

/// Names that operations are about; the empty one and the last one are never there.
const USERS: [&str; 4] = ["alice", "bob", "", "nobody"];
const ROLES: [&str; 4] = ["reader", "writer", "", "nothing"];
/// Who has rights in the end, by token.
const ADMIN: &str = "root";
const MEMBER: &str = "member";
const MEMBER_ROLES: [&str; 2] = ["member-1", "member-2"];
const PASSWORD: &str = "correct";
/// Ranges that the member may read, write or both.
const MEMBER_PERMISSIONS: usize = 4;
/// Operations while permissions are checked.
const CHECKED_OPS: usize = 90;

impl Generator {
    fn user(&mut self) -> String {
        // Mostly one that may be there.
        let count = if self.chance(0.9) { 2 } else { USERS.len() };
        USERS[self.rng.random_range(0..count)].to_owned()
    }

    fn role(&mut self) -> String {
        let count = if self.chance(0.9) { 2 } else { ROLES.len() };
        ROLES[self.rng.random_range(0..count)].to_owned()
    }

    fn permission(&mut self) -> Permission {
        let (key, range_end) = self.key_range();
        Permission {
            perm_type: self.rng.random_range(0..3),
            key,
            range_end,
        }
    }

    pub(super) fn access(&mut self) -> AccessOp {
        match self.rng.random_range(0..16) {
            0 | 1 => {
                // Passwords are hashed slowly on purpose.
                let no_password = self.chance(0.95);
                AccessOp::UserAdd(AuthUserAddRequest {
                    name: self.user(),
                    password: if no_password {
                        String::new()
                    } else {
                        PASSWORD.to_owned()
                    },
                    options: Some(UserAddOptions { no_password }),
                    ..AuthUserAddRequest::default()
                })
            }
            2 => AccessOp::UserGet(AuthUserGetRequest { name: self.user() }),
            3 => AccessOp::UserList,
            4 => AccessOp::UserDelete(AuthUserDeleteRequest { name: self.user() }),
            5 if self.chance(0.2) => AccessOp::UserChangePassword(AuthUserChangePasswordRequest {
                name: self.user(),
                password: PASSWORD.to_owned(),
                ..AuthUserChangePasswordRequest::default()
            }),
            5 | 6 => AccessOp::UserGrantRole(AuthUserGrantRoleRequest {
                user: self.user(),
                role: self.role(),
            }),
            7 => AccessOp::UserRevokeRole(AuthUserRevokeRoleRequest {
                name: self.user(),
                role: self.role(),
            }),
            8 | 9 => AccessOp::RoleAdd(AuthRoleAddRequest { name: self.role() }),
            10 => AccessOp::RoleGet(AuthRoleGetRequest { role: self.role() }),
            11 => AccessOp::RoleList,
            12 => AccessOp::RoleDelete(AuthRoleDeleteRequest { role: self.role() }),
            13 => AccessOp::RoleGrantPermission(AuthRoleGrantPermissionRequest {
                name: self.role(),
                perm: (!self.chance(0.05)).then(|| self.permission()),
            }),
            14 => {
                let (key, range_end) = self.key_range();
                AccessOp::RoleRevokePermission(AuthRoleRevokePermissionRequest {
                    role: self.role(),
                    key,
                    range_end,
                })
            }
            _ => AccessOp::Status,
        }
    }

    /// Permissions are turned on, asked for by several users, and turned off.
    pub(super) fn checked_ops(&mut self) -> Vec<Op> {
        let authenticate = |name: &str, password: &str| {
            AccessOp::Authenticate(AuthenticateRequest {
                name: name.to_owned(),
                password: password.to_owned(),
            })
        };
        let add = |name: &str| {
            AccessOp::UserAdd(AuthUserAddRequest {
                name: name.to_owned(),
                password: PASSWORD.to_owned(),
                options: None,
                ..AuthUserAddRequest::default()
            })
        };
        let grant = |user: &str, role: &str| {
            AccessOp::UserGrantRole(AuthUserGrantRoleRequest {
                user: user.to_owned(),
                role: role.to_owned(),
            })
        };
        let mut prepared = vec![
            AccessOp::Disable,
            authenticate(ADMIN, PASSWORD),
            AccessOp::Enable,
            add(ADMIN),
            AccessOp::Enable,
            grant(ADMIN, ADMIN),
            add(MEMBER),
        ];
        for role in MEMBER_ROLES {
            prepared.push(AccessOp::RoleAdd(AuthRoleAddRequest {
                name: role.to_owned(),
            }));
            prepared.push(grant(MEMBER, role));
        }
        for number in 0..MEMBER_PERMISSIONS {
            prepared.push(AccessOp::RoleGrantPermission(
                AuthRoleGrantPermissionRequest {
                    name: MEMBER_ROLES[number % MEMBER_ROLES.len()].to_owned(),
                    perm: Some(self.permission()),
                },
            ));
        }
        prepared.extend([
            AccessOp::Enable,
            AccessOp::Status,
            authenticate(MEMBER, "wrong"),
            authenticate("nobody", PASSWORD),
            authenticate(ADMIN, PASSWORD),
            authenticate(MEMBER, PASSWORD),
        ]);
        self.no_backward_ranges = true;
        let mut ops: Vec<Op> = prepared.into_iter().map(Op::Access).collect();
        for _ in 0..CHECKED_OPS {
            let user = match self.rng.random_range(0..10) {
                0..7 => Some(MEMBER),
                7 | 8 => Some(ADMIN),
                // By certificate: a name that no user has.
                _ => None,
            };
            let op = Box::new(self.checked_op());
            ops.push(Op::As { user, op });
        }
        ops.push(Op::Access(AccessOp::Disable));
        ops.push(Op::As {
            user: Some(MEMBER),
            op: Box::new(Op::Access(AccessOp::Disable)),
        });
        ops.push(Op::As {
            user: Some(ADMIN),
            op: Box::new(Op::Access(AccessOp::Disable)),
        });
        ops
    }

    /// A watch that has nothing to tell yet.
    fn tried_watch(&mut self) -> WatchCreateRequest {
        let (key, range_end) = self.key_range();
        WatchCreateRequest {
            key,
            range_end,
            prev_kv: self.chance(0.3),
            ..WatchCreateRequest::default()
        }
    }

    fn checked_op(&mut self) -> Op {
        match self.rng.random_range(0..28) {
            20 | 21 => Op::Watch(WatchOp::Try(self.tried_watch())),
            22 | 23 => Op::LeaseGrant(self.lease_grant()),
            24 | 25 => Op::LeaseRevoke(LeaseRevokeRequest { id: self.lease() }),
            26 | 27 => Op::LeaseKeepAlive(LeaseKeepAliveRequest { id: self.lease() }),
            0..6 => Op::Range(self.range()),
            6..10 => Op::Put(self.put()),
            10..12 => Op::DeleteRange(self.delete_range()),
            12..15 => Op::Txn(self.txn()),
            15 => Op::RangeStream(self.streamed_range()),
            16 => Op::LeaseTimeToLive(LeaseTimeToLiveRequest {
                id: self.lease(),
                keys: self.chance(0.7),
            }),
            17 => Op::LeaseLeases(LeaseLeasesRequest {}),
            18 => Op::Access(match self.access() {
                // What others of these operations need stays there.
                AccessOp::UserDelete(_) | AccessOp::RoleDelete(_) => AccessOp::UserList,
                op => op,
            }),
            _ => self.hash_kv(),
        }
    }
}
