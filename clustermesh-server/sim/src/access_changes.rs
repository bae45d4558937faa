//! Changes users, roles and permissions while clients work.

use std::sync::Arc;

use clustermesh_api::etcd::auth::{Permission, permission::Type};
use clustermesh_core::pb::{
    AuthChange, AuthEnable, AuthRoleAdd, AuthRoleGrantPermission, AuthRoleRevokePermission,
    AuthUserAdd, AuthUserDelete, AuthUserGrantRole, AuthUserRevokeRole, Proposal,
    auth_change::Change, proposal::Command,
};
use openraft::async_runtime::AsyncRuntime;

use crate::{
    access::{ROOT, USERS},
    member::Member,
    runtime::{SimRuntime, draw, elapsed, spawn_in},
    world::{LIVENESS, PATIENCE, World},
};

fn proposal(change: Change) -> Proposal {
    Proposal::system(Command::Auth(AuthChange {
        change: Some(change),
    }))
}

fn add_user(user: &str) -> Change {
    Change::UserAdd(AuthUserAdd {
        name: user.to_owned(),
        no_password: true,
        ..AuthUserAdd::default()
    })
}

fn grant_role(user: &str, role: &str) -> Change {
    Change::UserGrantRole(AuthUserGrantRole {
        user: user.to_owned(),
        role: role.to_owned(),
    })
}

fn add_role(role: &str) -> Change {
    Change::RoleAdd(AuthRoleAdd {
        name: role.to_owned(),
    })
}

fn grant(role: &str, first: &str, end: &str, kind: Type) -> Change {
    Change::RoleGrantPermission(AuthRoleGrantPermission {
        role: role.to_owned(),
        permission: Some(Permission {
            perm_type: kind.into(),
            key: first.to_owned().into(),
            range_end: end.to_owned().into(),
        }),
    })
}

/// Through any replica; false when nobody said that it was done, or cannot be.
async fn change(world: &World, change: Change) -> bool {
    let alive: Vec<_> = world.members.iter().filter_map(Member::alive).collect();
    let Some((life, replica)) = alive.get(draw(|random| random.place(alive.len()))).cloned() else {
        return false;
    };
    let told = spawn_in(life, async move { replica.propose(proposal(change)).await });
    matches!(
        SimRuntime::timeout(PATIENCE, told).await,
        Ok(Ok(Ok(committed))) if committed.outcome.is_ok()
    )
}

/// Users and roles that the run begins with, then permissions are checked.
pub async fn set_up(world: &World) {
    let mut changes = vec![add_user(ROOT), add_role(ROOT), grant_role(ROOT, ROOT)];
    for number in 0..USERS {
        let (user, role) = (format!("u{number}"), format!("role{number}"));
        changes.push(add_user(&user));
        changes.push(add_role(&role));
        changes.push(grant(&role, "k0", "k9", Type::Readwrite));
        changes.push(grant_role(&user, &role));
    }
    changes.push(Change::Enable(AuthEnable {}));
    let begun = elapsed();
    for wanted in changes {
        // Once it may have been done without a word, it is refused the second time.
        for _ in 0..3 {
            if change(world, wanted.clone()).await {
                break;
            }
        }
        if elapsed() > begun + LIVENESS {
            world
                .history
                .fault("users and roles could not be made".to_owned());
            return;
        }
    }
}

fn some_change() -> Change {
    let (user, role) = (
        format!("u{}", draw(|random| random.below(USERS))),
        format!("role{}", draw(|random| random.below(USERS))),
    );
    let first = draw(|random| random.below(4));
    let end = first + 1 + draw(|random| random.below(3));
    let (first, end) = (format!("k{first}"), format!("k{end}"));
    match draw(|random| random.below(100)) {
        0..25 => {
            let kinds = [Type::Read, Type::Write, Type::Readwrite];
            let kind = kinds.get(draw(|random| random.place(kinds.len())));
            grant(&role, &first, &end, kind.copied().unwrap_or(Type::Read))
        }
        25..60 => {
            let whole = draw(|random| random.chance(50));
            let (first, end) = if whole {
                ("k0".to_owned(), "k9".to_owned())
            } else {
                (first, end)
            };
            Change::RoleRevokePermission(AuthRoleRevokePermission {
                role,
                key: first.into(),
                range_end: end.into(),
            })
        }
        60..75 => grant_role(&user, &role),
        75..92 => Change::UserRevokeRole(AuthUserRevokeRole { user, role }),
        92..96 => Change::UserDelete(AuthUserDelete { name: user }),
        _ => add_user(&user),
    }
}

/// Changes permissions until the world ends.
pub async fn run(world: Arc<World>) {
    while !world.has_ended() {
        SimRuntime::sleep(draw(|random| random.time_ms(100..1500))).await;
        let _told = change(&world, some_change()).await;
    }
}
