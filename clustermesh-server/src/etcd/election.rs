//! `v3electionpb.Election`: one leader at a time, for as long as its lease lives.

use clustermesh_api::etcd::election::election_server::Election;
use clustermesh_api::etcd::election::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
    ProclaimResponse, ResignRequest, ResignResponse,
};
use clustermesh_api::etcd::mvcc::KeyValue;
use clustermesh_api::etcd::rpc::{PutRequest, ResponseHeader, TxnRequest, request_op};
use clustermesh_core::{EventKind, KeyRange};
use clustermesh_mesh::prefix_end;
use clustermesh_process::Drain;
use clustermesh_raft::WatchItem;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::etcd::recipe::{self, Withdrawal};
use crate::store::Store;

/// Answers made ahead for one observer.
const OBSERVE_QUEUE_MESSAGES: usize = 4;

/// The service.
#[derive(Debug)]
pub struct ElectionService {
    store: Store,
    drain: Drain,
}

impl ElectionService {
    /// Over `store`; waiting candidates and observers are sent away when `drain` begins.
    pub fn new(store: Store, drain: Drain) -> Self {
        Self { store, drain }
    }

    /// The same on behalf of the request's user.
    fn asked_by<T>(&self, request: &Request<T>) -> Result<Self, Status> {
        Ok(Self {
            store: self.store.asked_by(request)?,
            drain: self.drain.clone(),
        })
    }

    /// Writes a value under a leader's key, while it is the leader's.
    async fn announce(
        &self,
        leader: LeaderKey,
        value: bytes::Bytes,
    ) -> Result<ResponseHeader, Status> {
        let put = PutRequest {
            key: leader.key.clone(),
            value,
            lease: leader.lease,
            ..PutRequest::default()
        };
        let response = self
            .store
            .txn(TxnRequest {
                compare: vec![recipe::created_at(&leader.key, leader.rev)],
                success: vec![recipe::op(request_op::Request::RequestPut(put))],
                failure: Vec::new(),
            })
            .await?;
        if !response.succeeded {
            return Err(Status::unknown("election: not leader"));
        }
        Ok(response.header.unwrap_or_default())
    }
}

fn leader_of(leader: Option<LeaderKey>) -> Result<LeaderKey, Status> {
    leader.ok_or_else(|| Status::unknown("\"leader\" field must be provided"))
}

#[tonic::async_trait]
impl Election for ElectionService {
    type ObserveStream = ReceiverStream<Result<LeaderResponse, Status>>;

    async fn campaign(
        &self,
        request: Request<CampaignRequest>,
    ) -> Result<Response<CampaignResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let this = self.asked_by(&request)?;
        let CampaignRequest { name, lease, value } = request.into_inner();
        let contender = recipe::enter(&this.store, &name, lease, value.clone()).await?;
        let withdrawal = Withdrawal::of(&this.store, &contender);
        let leader = LeaderKey {
            name: name.clone(),
            key: contender.key.clone(),
            rev: contender.revision,
            lease: contender.lease,
        };
        // etcd answers with it even when a value is announced after it.
        let header = contender.header;
        if contender.before.is_some_and(|kv| kv.value != value) {
            this.announce(leader.clone(), value).await?;
        }
        recipe::wait_for_turn(&this.store, &name, contender.revision, &this.drain).await?;
        withdrawal.disarm();
        Ok(Response::new(CampaignResponse {
            header: Some(header),
            leader: Some(leader),
        }))
    }

    async fn proclaim(
        &self,
        request: Request<ProclaimRequest>,
    ) -> Result<Response<ProclaimResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let this = self.asked_by(&request)?;
        let ProclaimRequest { leader, value } = request.into_inner();
        let header = this.announce(leader_of(leader)?, value).await?;
        Ok(Response::new(ProclaimResponse {
            header: Some(header),
        }))
    }

    async fn leader(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<LeaderResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let this = self.asked_by(&request)?;
        let prefix = recipe::prefix(&request.into_inner().name);
        let (kv, header) = recipe::holder(&this.store, &prefix).await?;
        let kv = kv.ok_or_else(|| Status::unknown("election: no leader"))?;
        Ok(Response::new(response(kv, header)))
    }

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        Caller::of(&request)?.check_operator()?;
        let this = self.asked_by(&request)?;
        let (answers, stream) = mpsc::channel(OBSERVE_QUEUE_MESSAGES);
        let observer = Observer {
            store: this.store.clone(),
            drain: this.drain.clone(),
            prefix: recipe::prefix(&request.into_inner().name),
            answers,
        };
        tokio::spawn(observer.run());
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn resign(
        &self,
        request: Request<ResignRequest>,
    ) -> Result<Response<ResignResponse>, Status> {
        Caller::of(&request)?.check_operator()?;
        let this = self.asked_by(&request)?;
        let leader = leader_of(request.into_inner().leader)?;
        let header = recipe::withdraw(&this.store, leader.key, leader.rev).await?;
        Ok(Response::new(ResignResponse {
            header: Some(header),
        }))
    }
}

fn response(kv: KeyValue, header: ResponseHeader) -> LeaderResponse {
    LeaderResponse {
        header: Some(header),
        kv: Some(kv),
    }
}

/// Tells one client of every leader and of what it announces.
struct Observer {
    store: Store,
    drain: Drain,
    prefix: bytes::Bytes,
    answers: mpsc::Sender<Result<LeaderResponse, Status>>,
}

impl Observer {
    async fn run(self) {
        tokio::select! {
            ended = self.follow() => {
                if let Err(status) = ended {
                    // The client may be gone already.
                    let _ = self.answers.send(Err(status)).await;
                }
            }
            () = self.answers.closed() => {}
        }
    }

    async fn follow(&self) -> Result<(), Status> {
        loop {
            let (found, header) = recipe::holder(&self.store, &self.prefix).await?;
            let leader = match found {
                Some(kv) => Some((kv, header)),
                None => self.first_put(header).await?,
            };
            // None: the history that was needed is compacted; look again.
            if let Some((kv, header)) = leader {
                self.announcements(kv, header).await?;
            }
        }
    }

    /// The first put below the prefix after the read that found nothing.
    async fn first_put(
        &self,
        read: ResponseHeader,
    ) -> Result<Option<(KeyValue, ResponseHeader)>, Status> {
        let range = KeyRange::Between(self.prefix.clone(), prefix_end(&self.prefix));
        let mut watcher = recipe::watch(&self.store, range, read.revision + 1);
        while let Some(item) = recipe::next(&mut watcher, &self.drain).await? {
            let WatchItem::Events(events) = item else {
                continue;
            };
            let put = events
                .events()
                .find(|event| event.kind() == EventKind::Put)
                .and_then(|event| event.to_event(false).kv);
            if let Some(kv) = put {
                let header = self.store.header(kv.mod_revision);
                return Ok(Some((kv, header)));
            }
        }
        Ok(None)
    }

    /// Sends a leader and what it announces until its key is gone.
    async fn announcements(&self, kv: KeyValue, header: ResponseHeader) -> Result<(), Status> {
        let range = KeyRange::Single(kv.key.clone());
        let mut watcher = recipe::watch(&self.store, range, header.revision + 1);
        self.tell(response(kv, header)).await;
        while let Some(item) = recipe::next(&mut watcher, &self.drain).await? {
            let WatchItem::Events(events) = item else {
                continue;
            };
            for event in events.events() {
                if event.kind() == EventKind::Delete {
                    return Ok(());
                }
                if let Some(kv) = event.to_event(false).kv {
                    let header = self.store.header(events.revision());
                    self.tell(response(kv, header)).await;
                }
            }
        }
        Ok(())
    }

    async fn tell(&self, response: LeaderResponse) {
        // A client that is gone ends the task by itself.
        let _ = self.answers.send(Ok(response)).await;
    }
}
