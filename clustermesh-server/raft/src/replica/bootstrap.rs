//! How a group begins, and how a replica comes into one.

use std::{collections::BTreeMap, time::Duration};

use clustermesh_core::{KvError, pb, pb::proposal::Command};
use clustermesh_store::{Node, ReplicaId, wire as stored};
use openraft::async_runtime::{AsyncRuntime, Instant};

use super::Replica;
use crate::{
    config::{
        BOOTSTRAP_POLL, InitialMember, READ_INDEX_TIMEOUT, ROUTE_RETRY_PAUSE, ReplicaConfig, Start,
    },
    error::{ProposeError, ReadError, StartError},
    identity::random_id,
    peer::{Target, Transport},
    wire::{
        CallRequest, Header, Hello, HelloAnswer, Join, call_request::Call, call_response::Answer,
        refusal::Reason,
    },
};

/// A replica that has been up before serves what it has after this long without a leader.
const RESTART_PATIENCE: Duration = Duration::from_secs(5);
/// How often the wait for the other first replicas is logged.
const WAIT_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Asks a group for the id of a new replica: (replica id, cluster id). Tried at every address until the start's time is over.
pub(super) async fn ask_to_join<R: AsyncRuntime>(
    config: &ReplicaConfig,
    transport: &dyn Transport,
    urls: &[String],
) -> Result<(ReplicaId, u64), StartError> {
    let node = Node {
        join_as_voter: true,
        ..config.node.clone()
    };
    let deadline = R::Instant::now() + config.start_timeout;
    let mut last = "no address is given".to_owned();
    loop {
        for url in urls {
            let target = Target {
                id: 0,
                peer_url: url.clone(),
            };
            let request = CallRequest {
                header: Some(Header::default()),
                call: Some(Call::Join(Join {
                    node: Some(stored::node_to_pb(&node)),
                    feature_level: config.feature_level,
                })),
            };
            let answered =
                R::timeout(config.request_timeout, transport.call(target, request)).await;
            match answered {
                Ok(Ok(response)) => match response.answer {
                    Some(Answer::Join(answer)) if answer.cluster_id != 0 => {
                        return Ok((answer.replica_id, answer.cluster_id));
                    }
                    Some(Answer::Refusal(refusal)) if refusal.reason() == Reason::MemberExists => {
                        return Err(StartError::Join(format!(
                            "a replica at {} is a member already, but this data folder is empty: an emptied replica must not come back under its old id; remove that member first (clustermesh member remove)",
                            node.peer_url
                        )));
                    }
                    Some(Answer::Refusal(refusal))
                        if refusal.reason() == Reason::TooManyMembers =>
                    {
                        return Err(StartError::Join(refusal.message));
                    }
                    Some(Answer::Refusal(refusal)) => last = format!("{url}: {}", refusal.message),
                    _ => last = format!("{url}: the answer makes no sense"),
                },
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = format!("{url}: no answer"),
            }
        }
        if R::Instant::now() >= deadline {
            return Err(StartError::Join(last));
        }
        R::sleep(BOOTSTRAP_POLL).await;
    }
}

fn fatal(error: impl std::fmt::Display) -> StartError {
    StartError::Raft(error.to_string())
}

impl<R: AsyncRuntime> Replica<R> {
    /// Begins the group if it never began, and waits until this replica is up to date.
    pub(super) async fn enter_group(&self, config: &ReplicaConfig) -> Result<(), StartError> {
        let raft = &self.inner.raft;
        let begun = raft.is_initialized().await.map_err(fatal)?;
        self.check_not_removed()?;
        let alone = [self.inner.replica_id].into_iter();
        if begun && raft.voter_ids().eq(alone) {
            // Nobody else can lead: no need to wait for an election timeout.
            raft.trigger().elect(false).await.map_err(fatal)?;
        } else if begun {
            // When all were down, nobody has to wait for an election timeout either: whoever hears a leader refuses this.
            raft.trigger().elect(true).await.map_err(fatal)?;
        }
        match &config.start {
            _ if begun => {}
            Start::Static(members) => self.begin_with(members, config).await?,
            Start::Join(_) => {}
            Start::NewGroup | Start::Existing | Start::NewOrExisting => {
                self.begin_alone(config).await?;
            }
        }
        let known = self.read(|state| state.cluster_id());
        let several = raft.voter_ids().count() > 1;
        if known != 0 && several {
            let patience = config.start_timeout.min(RESTART_PATIENCE);
            if R::timeout(patience, self.catch_up(config)).await.is_err() {
                tracing::warn!(
                    "no leader yet: only serializable reads are served until there is one"
                );
            }
            return self.check_not_removed();
        }
        R::timeout(config.start_timeout, self.catch_up(config))
            .await
            .unwrap_or(Err(StartError::NoLeader {
                seconds: config.start_timeout.as_secs(),
            }))
    }

    fn check_not_removed(&self) -> Result<(), StartError> {
        let id = self.inner.replica_id;
        let removed = self.read(|state| state.is_removed_member(id));
        if removed || self.inner.bound.links.is_removed() {
            return Err(StartError::Removed { id });
        }
        Ok(())
    }

    async fn begin_alone(&self, config: &ReplicaConfig) -> Result<(), StartError> {
        self.choose_cluster_id()?;
        let members: BTreeMap<ReplicaId, Node> =
            [(self.inner.replica_id, config.node.clone())].into();
        let begun = self.inner.raft.initialize(members).await;
        begun.map_err(fatal)
    }

    fn choose_cluster_id(&self) -> Result<(), StartError> {
        let identity = &self.inner.bound.identity;
        if identity.cluster_id() == 0 {
            identity.set(random_id::<R>())?;
        }
        Ok(())
    }

    /// Waits for the other first replicas; the one with the lowest name makes the group of them.
    async fn begin_with(
        &self,
        members: &[InitialMember],
        config: &ReplicaConfig,
    ) -> Result<(), StartError> {
        let own_name = &config.node.name;
        let mut names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() != members.len() || !names.contains(&own_name.as_str()) {
            return Err(StartError::InitialCluster(format!(
                "it must name each replica once, and this one, {own_name:?}, among them"
            )));
        }
        let makes_group = names.first().is_some_and(|lowest| lowest == own_name);
        let mut logged = None;
        loop {
            let raft = &self.inner.raft;
            if raft.is_initialized().await.map_err(fatal)? {
                return Ok(());
            }
            let mut nodes = BTreeMap::from([(self.inner.replica_id, config.node.clone())]);
            let mut missing = Vec::new();
            for member in members.iter().filter(|member| member.name != *own_name) {
                match self.greet(member, config).await? {
                    Some((id, node)) => drop(nodes.insert(id, node)),
                    None => missing.push(member.name.as_str()),
                }
            }
            if makes_group && missing.is_empty() {
                self.choose_cluster_id()?;
                tracing::info!(replicas = nodes.len(), "the group begins");
                return raft.initialize(nodes).await.map_err(fatal);
            }
            if logged.is_none_or(|at: R::Instant| at.elapsed() >= WAIT_LOG_INTERVAL) {
                logged = Some(R::Instant::now());
                tracing::info!(?missing, "waiting for the other replicas of the new group");
            }
            R::sleep(BOOTSTRAP_POLL).await;
        }
    }

    /// Another first replica, if it is up and waits too.
    async fn greet(
        &self,
        member: &InitialMember,
        config: &ReplicaConfig,
    ) -> Result<Option<(ReplicaId, Node)>, StartError> {
        let target = Target {
            id: 0,
            peer_url: member.peer_url.clone(),
        };
        let links = &self.inner.bound.links;
        let hello = links.call(&target, Call::Hello(Hello {}), READ_INDEX_TIMEOUT);
        let answer = match hello.await {
            Ok(Answer::Hello(answer)) => answer,
            Ok(_) => return Ok(None),
            Err(error) => {
                tracing::debug!(member = member.name, %error, "not there yet");
                return Ok(None);
            }
        };
        self.check_answer(member, &answer, config)?;
        if answer.initialized {
            // It will send this replica what the group has.
            return Ok(None);
        }
        let node = answer.node.as_ref().map(stored::node_from_pb);
        Ok(Some((answer.replica_id, node.unwrap_or_default())))
    }

    fn check_answer(
        &self,
        member: &InitialMember,
        answer: &HelloAnswer,
        config: &ReplicaConfig,
    ) -> Result<(), StartError> {
        let refused = |reason: String| Err(StartError::InitialCluster(reason));
        if answer.cluster_name != config.cluster_name {
            return refused(format!(
                "{} is of cluster {:?}, this replica of {:?}",
                member.peer_url, answer.cluster_name, config.cluster_name
            ));
        }
        let name = answer.node.as_ref().map_or("", |node| node.name.as_str());
        if name != member.name {
            return refused(format!(
                "{} is {name:?}, not {:?}; the list must be the same everywhere",
                member.peer_url, member.name
            ));
        }
        if !answer.initialized && answer.feature_level != config.feature_level {
            return refused(format!(
                "{} is of another release, with feature level {} where this one has {}; a new group begins with replicas of one release",
                member.peer_url, answer.feature_level, config.feature_level
            ));
        }
        let Some(membership) = answer.membership.as_ref().filter(|_| answer.initialized) else {
            return Ok(());
        };
        if membership.nodes.is_empty() || membership.nodes.contains_key(&self.inner.replica_id) {
            return Ok(());
        }
        let known = membership.nodes.iter().find(|(_, node)| {
            node.name == config.node.name || node.peer_url == config.node.peer_url
        });
        match known {
            Some((known, _)) => Err(StartError::Emptied {
                name: config.node.name.clone(),
                peer_url: config.node.peer_url.clone(),
                known: *known,
            }),
            None => refused(format!(
                "the group has begun without {:?}; start it with `join` instead",
                config.node.name
            )),
        }
    }

    /// Until there is a leader, the group has its id, and everything committed so far is applied.
    async fn catch_up(&self, config: &ReplicaConfig) -> Result<(), StartError> {
        loop {
            self.check_not_removed()?;
            let stepped = self.catch_up_once().await;
            match stepped {
                Ok(true) => break,
                Ok(false) => self.ask_whether_removed(config).await,
                Err(ReadError::Stopped) => {
                    self.check_not_removed()?;
                    return Err(StartError::Raft("raft has stopped".into()));
                }
                Err(error) => tracing::debug!(%error, "not up to date yet"),
            }
            if self.inner.router.leads() && self.read(|state| state.cluster_id()) == 0 {
                self.name_group(config.feature_level).await?;
                continue;
            }
            R::sleep(ROUTE_RETRY_PAUSE).await;
        }
        let identity = &self.inner.bound.identity;
        let cluster_id = self.read(|state| state.cluster_id());
        if identity.cluster_id() != cluster_id {
            // Data of a release that did not keep it, or of a group that was given another id.
            identity.set(cluster_id)?;
        }
        tracing::debug!(cluster = config.cluster_name, "up to date");
        self.raise_feature_level(config.feature_level).await
    }

    /// A group of one replica can do what that one can.
    async fn raise_feature_level(&self, known: u32) -> Result<(), StartError> {
        let level = self.read(|state| state.feature_level());
        if level >= known || self.status().members.len() > 1 {
            return Ok(());
        }
        let command = Command::FeatureLevel(pb::FeatureLevel { level: known });
        self.propose(pb::Proposal::system(command))
            .await
            .map_err(|error| StartError::Bootstrap(error.to_string()))?;
        Ok(())
    }

    /// No leader speaks to a replica that was removed; one that had not heard of its group's members before would wait for ever.
    async fn ask_whether_removed(&self, config: &ReplicaConfig) {
        let Start::Join(urls) = &config.start else {
            return;
        };
        if self.inner.raft.voter_ids().next().is_some() {
            return;
        }
        for peer_url in urls.iter().cloned() {
            let target = Target { id: 0, peer_url };
            let links = &self.inner.bound.links;
            // It heeds a refusal; nothing else counts here.
            let _heeded = links
                .call(&target, Call::Hello(Hello {}), READ_INDEX_TIMEOUT)
                .await;
        }
        R::sleep(BOOTSTRAP_POLL).await;
    }

    async fn catch_up_once(&self) -> Result<bool, ReadError> {
        if self.inner.router.leader().is_none() {
            return Ok(false);
        }
        self.linearize().await?;
        Ok(self.read(|state| state.cluster_id()) != 0)
    }

    /// The group's id is its first committed entry.
    async fn name_group(&self, feature_level: u32) -> Result<(), StartError> {
        self.choose_cluster_id()?;
        let command = Command::Bootstrap(pb::Bootstrap {
            cluster_id: self.inner.bound.identity.cluster_id(),
            feature_level,
        });
        let refused = |reason: String| StartError::Bootstrap(reason);
        match self.propose(pb::Proposal::system(command)).await {
            Ok(committed) => match committed.outcome {
                Ok(_) | Err(KvError::ClusterIdAlreadySet) => Ok(()),
                Err(error) => Err(refused(error.to_string())),
            },
            // Another replica may lead by now, and have done it.
            Err(ProposeError::NotLeader { .. } | ProposeError::Unknown | ProposeError::Timeout) => {
                Ok(())
            }
            Err(error) => Err(refused(error.to_string())),
        }
    }
}
