//! Users, roles, tokens and alarms over the real port.

use clustermesh_api::etcd::auth::{Permission, UserAddOptions, permission::Type};
use clustermesh_api::etcd::rpc::alarm_request::AlarmAction;
use clustermesh_api::etcd::rpc::auth_client::AuthClient;
use clustermesh_api::etcd::rpc::cluster_client::ClusterClient;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_api::etcd::rpc::maintenance_client::MaintenanceClient;
use clustermesh_api::etcd::rpc::watch_client::WatchClient;
use clustermesh_api::etcd::rpc::watch_request::RequestUnion;
use clustermesh_api::etcd::rpc::{
    AlarmRequest, AlarmType, AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest,
    AuthStatusRequest, AuthUserAddRequest, AuthUserDeleteRequest, AuthUserGrantRoleRequest,
    AuthUserListRequest, AuthUserRevokeRoleRequest, AuthenticateRequest, CompactionRequest,
    HashKvRequest, LeaseGrantRequest, MemberListRequest, RangeRequest, WatchCreateRequest,
    WatchRequest, lease_client::LeaseClient,
};
use clustermesh_client::Client;
use tonic::{Code, Request};

use crate::support::{Cluster, Pki, client, put, soon};

fn with_token<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("token", token.parse().unwrap());
    request
}

fn user(name: &str, password: &str) -> AuthUserAddRequest {
    AuthUserAddRequest {
        name: name.into(),
        password: password.into(),
        options: Some(UserAddOptions {
            no_password: password.is_empty(),
        }),
        ..Default::default()
    }
}

fn grant(user: &str, role: &str) -> AuthUserGrantRoleRequest {
    AuthUserGrantRoleRequest {
        user: user.into(),
        role: role.into(),
    }
}

/// `root`, and `alice` with all of `app/`; auth is on.
async fn enabled(pki: &Pki, cluster: &Cluster) -> Client {
    let admin = client(
        cluster.server().client_address(),
        pki.issue("operator", "c1", "admin-c1"),
    );
    let mut auth = AuthClient::new(admin.channel());
    auth.user_add(user("root", "secret")).await.unwrap();
    auth.user_grant_role(grant("root", "root")).await.unwrap();
    auth.user_add(user("alice", "wonder")).await.unwrap();
    auth.role_add(AuthRoleAddRequest { name: "app".into() })
        .await
        .unwrap();
    auth.role_grant_permission(AuthRoleGrantPermissionRequest {
        name: "app".into(),
        perm: Some(Permission {
            perm_type: Type::Readwrite.into(),
            key: "app/".into(),
            range_end: "app0".into(),
        }),
    })
    .await
    .unwrap();
    auth.user_grant_role(grant("alice", "app")).await.unwrap();
    auth.auth_enable(AuthEnableRequest {}).await.unwrap();
    admin
}

async fn authenticate(
    client: &Client,
    name: &str,
    password: &str,
) -> Result<String, tonic::Status> {
    let request = AuthenticateRequest {
        name: name.into(),
        password: password.into(),
    };
    let answer = AuthClient::new(client.channel())
        .authenticate(request)
        .await?;
    Ok(answer.into_inner().token)
}

#[tokio::test(flavor = "multi_thread")]
async fn users_do_what_their_roles_permit() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let admin = enabled(&pki, &cluster).await;
    // The certificate's name is a user with role root.
    admin.put(put("other", "1")).await.unwrap();
    let mut auth = AuthClient::new(admin.channel());
    let users = auth.user_list(AuthUserListRequest {}).await.unwrap();
    assert_eq!(
        users.into_inner().users,
        ["admin-c1", "alice", "local-c1", "remote", "root"]
    );
    let status = auth.auth_status(AuthStatusRequest {}).await.unwrap();
    assert!(status.into_inner().enabled);

    // A certificate whose name is no user.
    let operator = client(
        cluster.server().client_address(),
        pki.issue("operator", "c1", "somebody"),
    );
    let error = operator.put(put("app/a", "1")).await.unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");

    let error = authenticate(&operator, "alice", "wrong").await.unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (
            Code::InvalidArgument,
            "etcdserver: authentication failed, invalid user ID or password"
        )
    );
    let token = authenticate(&operator, "alice", "wonder").await.unwrap();
    let mut kv = KvClient::new(operator.channel());
    kv.put(with_token(&token, put("app/a", "1"))).await.unwrap();
    let error = kv
        .put(with_token(&token, put("other", "2")))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    let range = |key: &str, end: &str| RangeRequest {
        key: key.to_owned().into(),
        range_end: end.to_owned().into(),
        ..Default::default()
    };
    let found = kv
        .range(with_token(&token, range("app/", "app0")))
        .await
        .unwrap();
    assert_eq!(found.into_inner().count, 1);
    for (key, end) in [("other", ""), ("app/", "app1"), ("app/", "\0")] {
        let error = kv
            .range(with_token(&token, range(key, end)))
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied, "{key}");
    }
    let error = kv
        .compact(with_token(
            &token,
            CompactionRequest {
                revision: 1,
                physical: false,
            },
        ))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    let error = kv
        .put(with_token("no-such-token", put("app/a", "2")))
        .await
        .unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (Code::Unauthenticated, "etcdserver: invalid auth token")
    );
    let mut members = ClusterClient::new(operator.channel());
    let list = MemberListRequest::default();
    let error = members
        .member_list(with_token("no-such-token", list))
        .await
        .unwrap_err();
    assert_eq!(error.message(), "etcdserver: invalid auth token");
    members.member_list(with_token(&token, list)).await.unwrap();
    // As gateways send it.
    let mut request = Request::new(put("app/b", "1"));
    let bearer = format!("Bearer {token}");
    request
        .metadata_mut()
        .insert("authorization", bearer.parse().unwrap());
    kv.put(request).await.unwrap();

    let mut auth = AuthClient::new(operator.channel());
    let error = auth
        .user_add(with_token(&token, user("mallory", "x")))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied);
    let error = AuthClient::new(admin.channel())
        .user_delete(AuthUserDeleteRequest {
            name: "root".into(),
        })
        .await
        .unwrap_err();
    assert_eq!(error.message(), "etcdserver: invalid auth management");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_ends_when_its_user_loses_the_role() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let admin = enabled(&pki, &cluster).await;
    let token = authenticate(&admin, "alice", "wonder").await.unwrap();
    let create = |key: &str, end: &str| WatchRequest {
        request_union: Some(RequestUnion::CreateRequest(WatchCreateRequest {
            key: key.to_owned().into(),
            range_end: end.to_owned().into(),
            ..Default::default()
        })),
    };
    let (sender, requests) = tokio::sync::mpsc::channel(4);
    sender.send(create("app/", "app0")).await.unwrap();
    sender.send(create("other", "")).await.unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let mut stream = WatchClient::new(admin.channel())
        .watch(with_token(&token, requests))
        .await
        .unwrap()
        .into_inner();
    let created = soon("created", stream.message()).await.unwrap().unwrap();
    assert!(created.created && !created.canceled, "{created:?}");
    let refused = soon("refused", stream.message()).await.unwrap().unwrap();
    assert_eq!(
        (refused.canceled, refused.cancel_reason.as_str()),
        (
            true,
            "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
        )
    );
    admin.put(put("app/a", "1")).await.unwrap();
    let event = soon("an event", stream.message()).await.unwrap().unwrap();
    assert_eq!(event.events.len(), 1);

    let mut auth = AuthClient::new(admin.channel());
    // Changes that leave the permission as it is leave the watch, too.
    auth.user_add(user("bob", "")).await.unwrap();
    admin.put(put("app/a", "2")).await.unwrap();
    let event = soon("an event", stream.message()).await.unwrap().unwrap();
    assert_eq!(event.events.len(), 1);

    auth.user_revoke_role(AuthUserRevokeRoleRequest {
        name: "alice".into(),
        role: "app".into(),
    })
    .await
    .unwrap();
    admin.put(put("app/a", "3")).await.unwrap();
    let ended = soon("the end", stream.message()).await.unwrap().unwrap();
    assert!(ended.canceled && ended.events.is_empty(), "{ended:?}");
    assert_eq!(ended.watch_id, created.watch_id);
    assert!(ended.cancel_reason.contains("permission denied"));
}

#[tokio::test(flavor = "multi_thread")]
async fn users_and_tokens_outlive_a_restart_and_agents_need_none() {
    let pki = Pki::new();
    let mut cluster = Cluster::start(&pki, 1, &[]).await;
    let admin = enabled(&pki, &cluster).await;
    let token = authenticate(&admin, "alice", "wonder").await.unwrap();
    cluster.stop().await;
    cluster.restart(&pki).await;
    let operator = client(
        cluster.server().client_address(),
        pki.issue("operator", "c1", "somebody"),
    );
    KvClient::new(operator.channel())
        .put(with_token(&token, put("app/a", "1")))
        .await
        .unwrap();
    let node = client(
        cluster.server().client_address(),
        pki.issue("node", "c1", "w1"),
    );
    let range = RangeRequest {
        key: "cilium/".into(),
        range_end: "cilium0".into(),
        ..Default::default()
    };
    assert!(node.range(range).await.unwrap().count > 0);
    assert!(node.put(put("cilium/a", "1")).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn alarms_stop_writes_until_they_are_taken_back() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    operator.put(put("a", "1")).await.unwrap();
    let alarm = |action: AlarmAction| AlarmRequest {
        action: action.into(),
        member_id: 7,
        alarm: AlarmType::Nospace.into(),
    };
    let mut maintenance = MaintenanceClient::new(operator.channel());
    maintenance
        .alarm(alarm(AlarmAction::Activate))
        .await
        .unwrap();
    let mut kv = KvClient::new(operator.channel());
    let error = kv.put(put("a", "2")).await.unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (
            Code::ResourceExhausted,
            "etcdserver: mvcc: database space exceeded"
        )
    );
    let grant = LeaseGrantRequest { ttl: 60, id: 0 };
    let error = LeaseClient::new(operator.channel())
        .lease_grant(grant)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted);
    let listed = maintenance.alarm(alarm(AlarmAction::Get)).await.unwrap();
    assert_eq!(listed.into_inner().alarms[0].member_id, 7);
    let status = maintenance
        .status(clustermesh_api::etcd::rpc::StatusRequest {})
        .await
        .unwrap();
    assert_eq!(status.into_inner().errors, ["memberID:7 alarm:NOSPACE "]);
    let taken = maintenance
        .alarm(alarm(AlarmAction::Deactivate))
        .await
        .unwrap();
    assert_eq!(taken.into_inner().alarms.len(), 1);
    kv.put(put("a", "2")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn hash_kv_is_the_same_for_the_same_history() {
    let pki = Pki::new();
    let cluster = Cluster::start(&pki, 1, &[]).await;
    let operator = cluster.operator(&pki);
    let last = operator.put(put("a", "1")).await.unwrap().header.unwrap();
    let mut maintenance = MaintenanceClient::new(operator.channel());
    let hash = async |maintenance: &mut MaintenanceClient<_>, revision| {
        let answer = maintenance.hash_kv(HashKvRequest { revision }).await;
        answer.map(tonic::Response::into_inner)
    };
    let before = hash(&mut maintenance, last.revision).await.unwrap();
    assert_eq!(
        (before.compact_revision, before.hash_revision),
        (-1, last.revision)
    );
    operator.put(put("a", "2")).await.unwrap();
    let again = hash(&mut maintenance, last.revision).await.unwrap();
    assert_eq!(again.hash, before.hash);
    let error = hash(&mut maintenance, last.revision + 1_000_000)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange);
}
