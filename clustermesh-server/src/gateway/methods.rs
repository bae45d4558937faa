//! Which path is which method, and its messages: the bindings of etcd's HTTP annotations, types from the protobuf descriptors.

use std::collections::HashMap;

use bytes::Bytes;
use clustermesh_api::FILE_DESCRIPTOR_SET;
use prost_reflect::{DescriptorPool, MethodDescriptor};
use tonic::Status;

use super::json;

/// Below `/v3/`: the path and its method.
const BINDINGS: [(&str, &str); 51] = [
    ("kv/range", "etcdserverpb.KV/Range"),
    ("kv/put", "etcdserverpb.KV/Put"),
    ("kv/deleterange", "etcdserverpb.KV/DeleteRange"),
    ("kv/txn", "etcdserverpb.KV/Txn"),
    ("kv/compaction", "etcdserverpb.KV/Compact"),
    ("watch", "etcdserverpb.Watch/Watch"),
    ("lease/grant", "etcdserverpb.Lease/LeaseGrant"),
    ("lease/revoke", "etcdserverpb.Lease/LeaseRevoke"),
    ("kv/lease/revoke", "etcdserverpb.Lease/LeaseRevoke"),
    ("lease/keepalive", "etcdserverpb.Lease/LeaseKeepAlive"),
    ("lease/timetolive", "etcdserverpb.Lease/LeaseTimeToLive"),
    ("kv/lease/timetolive", "etcdserverpb.Lease/LeaseTimeToLive"),
    ("lease/leases", "etcdserverpb.Lease/LeaseLeases"),
    ("kv/lease/leases", "etcdserverpb.Lease/LeaseLeases"),
    ("cluster/member/add", "etcdserverpb.Cluster/MemberAdd"),
    ("cluster/member/remove", "etcdserverpb.Cluster/MemberRemove"),
    ("cluster/member/update", "etcdserverpb.Cluster/MemberUpdate"),
    ("cluster/member/list", "etcdserverpb.Cluster/MemberList"),
    (
        "cluster/member/promote",
        "etcdserverpb.Cluster/MemberPromote",
    ),
    ("maintenance/alarm", "etcdserverpb.Maintenance/Alarm"),
    ("maintenance/status", "etcdserverpb.Maintenance/Status"),
    (
        "maintenance/defragment",
        "etcdserverpb.Maintenance/Defragment",
    ),
    ("maintenance/hash", "etcdserverpb.Maintenance/Hash"),
    ("maintenance/hashkv", "etcdserverpb.Maintenance/HashKV"),
    ("maintenance/snapshot", "etcdserverpb.Maintenance/Snapshot"),
    (
        "maintenance/transfer-leadership",
        "etcdserverpb.Maintenance/MoveLeader",
    ),
    (
        "maintenance/downgrade",
        "etcdserverpb.Maintenance/Downgrade",
    ),
    ("auth/enable", "etcdserverpb.Auth/AuthEnable"),
    ("auth/disable", "etcdserverpb.Auth/AuthDisable"),
    ("auth/status", "etcdserverpb.Auth/AuthStatus"),
    ("auth/authenticate", "etcdserverpb.Auth/Authenticate"),
    ("auth/user/add", "etcdserverpb.Auth/UserAdd"),
    ("auth/user/get", "etcdserverpb.Auth/UserGet"),
    ("auth/user/list", "etcdserverpb.Auth/UserList"),
    ("auth/user/delete", "etcdserverpb.Auth/UserDelete"),
    ("auth/user/changepw", "etcdserverpb.Auth/UserChangePassword"),
    ("auth/user/grant", "etcdserverpb.Auth/UserGrantRole"),
    ("auth/user/revoke", "etcdserverpb.Auth/UserRevokeRole"),
    ("auth/role/add", "etcdserverpb.Auth/RoleAdd"),
    ("auth/role/get", "etcdserverpb.Auth/RoleGet"),
    ("auth/role/list", "etcdserverpb.Auth/RoleList"),
    ("auth/role/delete", "etcdserverpb.Auth/RoleDelete"),
    ("auth/role/grant", "etcdserverpb.Auth/RoleGrantPermission"),
    ("auth/role/revoke", "etcdserverpb.Auth/RoleRevokePermission"),
    ("lock/lock", "v3lockpb.Lock/Lock"),
    ("lock/unlock", "v3lockpb.Lock/Unlock"),
    ("election/campaign", "v3electionpb.Election/Campaign"),
    ("election/proclaim", "v3electionpb.Election/Proclaim"),
    ("election/leader", "v3electionpb.Election/Leader"),
    ("election/observe", "v3electionpb.Election/Observe"),
    ("election/resign", "v3electionpb.Election/Resign"),
];

/// All methods by their path below `/v3/`.
#[derive(Debug)]
pub struct Methods(HashMap<&'static str, Method>);

/// A method as the gateway calls it.
#[derive(Debug, Clone)]
pub struct Method {
    /// `/package.Service/Method`.
    pub(super) path: String,
    pub(super) descriptor: MethodDescriptor,
}

impl Methods {
    /// Reads the descriptors.
    ///
    /// # Errors
    /// When a binding names a method that the contract does not have.
    pub fn load() -> anyhow::Result<Self> {
        let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET)?;
        let mut methods = HashMap::new();
        for (path, name) in BINDINGS {
            let descriptor = find(&pool, name)
                .ok_or_else(|| anyhow::anyhow!("the contract has no method {name}"))?;
            let method = Method {
                path: format!("/{name}"),
                descriptor,
            };
            methods.insert(path, method);
        }
        Ok(Self(methods))
    }

    /// The method behind a path.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Method> {
        self.0.get(path)
    }
}

impl Method {
    /// A request's JSON as its protobuf.
    ///
    /// # Errors
    /// `InvalidArgument` when it is not a request of this method.
    pub fn request(&self, json: &[u8]) -> Result<Bytes, Status> {
        json::to_protobuf(&self.descriptor.input(), json)
    }
}

fn find(pool: &DescriptorPool, name: &str) -> Option<MethodDescriptor> {
    let (service, method) = name.split_once('/')?;
    pool.get_service_by_name(service)?
        .methods()
        .find(|descriptor| descriptor.name() == method)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_binding_is_a_method_of_the_contract() {
        let methods = Methods::load().unwrap();
        assert_eq!(methods.0.len(), BINDINGS.len());
        assert!(
            methods
                .get("watch")
                .unwrap()
                .descriptor
                .is_client_streaming()
        );
    }
}
