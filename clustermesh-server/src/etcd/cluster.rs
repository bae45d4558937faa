//! `etcdserverpb.Cluster`.

use clustermesh_api::etcd::rpc::cluster_server::Cluster;
use clustermesh_api::etcd::rpc::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse, ResponseHeader,
};
use clustermesh_raft::{MemberError, Node};
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::store::Store;

/// The service.
#[derive(Debug)]
pub struct ClusterService {
    store: Store,
}

impl ClusterService {
    /// Over `store`.
    pub fn new(store: Store) -> Self {
        Self { store }
    }

    fn header(&self) -> Option<ResponseHeader> {
        Some(self.store.group_header())
    }

    fn members(&self) -> Vec<Member> {
        self.store.members()
    }
}

/// etcd's code and text.
fn status_of(error: &MemberError) -> Status {
    let refused = |text: &str| Status::failed_precondition(text);
    match error {
        MemberError::NotFound => Status::not_found("etcdserver: member not found"),
        MemberError::Exists => refused("etcdserver: Peer URLs already exists"),
        MemberError::NotReady => {
            refused("etcdserver: can only promote a learner member which is in sync with leader")
        }
        MemberError::NotLearner => refused("etcdserver: can only promote a learner member"),
        MemberError::TooMany => refused("etcdserver: too many learner members in cluster"),
        MemberError::NoQuorum => {
            refused("etcdserver: re-configuration failed due to not enough started members")
        }
        MemberError::NoPeerPort => refused(&format!("clustermesh: {error}")),
        MemberError::InProgress => Status::unavailable("etcdserver: unhealthy cluster"),
        MemberError::NoLeader => Status::unavailable("etcdserver: no leader"),
        MemberError::Unknown => Status::unavailable("etcdserver: request timed out"),
        MemberError::Stopped => Status::unavailable("etcdserver: server stopped"),
    }
}

/// The one address of a replica, as etcd checks it.
fn peer_url(urls: Vec<String>) -> Result<String, Status> {
    let invalid = || Status::invalid_argument("etcdserver: given member URLs are invalid");
    let mut urls = urls.into_iter();
    let url = urls.next().ok_or_else(invalid)?;
    let uri: http::Uri = url.parse().map_err(|_| invalid())?;
    // One is all that replicas use: a second would be dropped silently.
    let usable = matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.port_u16().is_some()
        && urls.next().is_none();
    if usable { Ok(url) } else { Err(invalid()) }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        let request = request.into_inner();
        let node = Node {
            peer_url: peer_url(request.peer_ur_ls)?,
            // A voter joins as learner too, and votes once it has caught up.
            join_as_voter: !request.is_learner,
            ..Node::default()
        };
        let id = self
            .store
            .replica()
            .add_member(node)
            .await
            .map_err(|error| status_of(&error))?;
        let members = self.members();
        Ok(Response::new(MemberAddResponse {
            header: self.header(),
            member: members.iter().find(|member| member.id == id).cloned(),
            members,
        }))
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        self.store
            .replica()
            .remove_member(request.get_ref().id)
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(MemberRemoveResponse {
            header: self.header(),
            members: self.members(),
        }))
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        let request = request.into_inner();
        let peer_url = peer_url(request.peer_ur_ls)?;
        let replica = self.store.replica();
        let known = replica
            .status()
            .members
            .into_iter()
            .find(|member| member.id == request.id)
            .ok_or_else(|| status_of(&MemberError::NotFound))?;
        let node = Node {
            peer_url,
            ..known.node
        };
        replica
            .update_member(request.id, node)
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(MemberUpdateResponse {
            header: self.header(),
            members: self.members(),
        }))
    }

    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        Caller::of(&request)?.check_known()?;
        let store = self.store.asked_by(&request)?;
        let listed = store.member_list(request.into_inner().linearizable).await?;
        store.permit_named()?;
        Ok(Response::new(listed))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        self.store.asked_by(&request)?.permit_admin()?;
        self.store
            .replica()
            .promote_member(request.get_ref().id)
            .await
            .map_err(|error| status_of(&error))?;
        Ok(Response::new(MemberPromoteResponse {
            header: self.header(),
            members: self.members(),
        }))
    }
}
