//! `[replica]`: this server as one of the replicas of its cluster's store.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clustermesh_process::TlsPaths;
use clustermesh_raft::{InitialMember, Start};
use serde::Deserialize;

use super::{TlsConfig, address, fault};

/// Replicas that a group may begin with.
const INITIAL_CLUSTER_SIZES: [usize; 3] = [1, 3, 5];
/// Addresses of the group that a replica joins.
const MAX_JOIN_URLS: usize = 16;
/// Longest name of a replica, bytes.
const MAX_NAME_BYTES: usize = 253;

/// `[replica]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaSection {
    /// Name, unique in the group.
    pub name: String,
    /// Where other replicas reach this one: gRPC over mutual TLS.
    #[serde(
        default = "default_listen_peer",
        deserialize_with = "address::deserialize"
    )]
    pub listen_peer: SocketAddr,
    /// How they reach it, `https://HOST:PORT`; default: its entry in `initial_cluster`.
    pub peer_url: Option<String>,
    /// How clients reach it; default: `listen_client`, if that is one address.
    #[serde(default)]
    pub client_urls: Vec<String>,
    /// The replicas that a new group begins with, `NAME=https://HOST:PORT`: the same list everywhere.
    #[serde(default)]
    pub initial_cluster: Vec<String>,
    /// Instead: addresses of replicas of a group to join.
    #[serde(default)]
    pub join: Vec<String>,
    /// Time between the leader's heartbeats, in ms.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// A follower stands for election after about this long without the leader (0.9 to 1.0 of it, at random), in ms.
    #[serde(default = "default_election_timeout_ms")]
    pub election_timeout_ms: u64,
    /// Certificate shown to other replicas, and their CA; default: `[tls]`.
    pub tls: Option<TlsConfig>,
}

fn default_listen_peer() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 2380))
}

fn default_heartbeat_ms() -> u64 {
    100
}

fn default_election_timeout_ms() -> u64 {
    1000
}

impl ReplicaSection {
    /// How the replica begins when its folder is empty.
    #[must_use]
    pub fn start(&self) -> Start {
        if self.join.is_empty() {
            Start::Static(self.members().unwrap_or_default())
        } else {
            Start::Join(self.join.clone())
        }
    }

    /// How other replicas reach it.
    #[must_use]
    pub fn own_peer_url(&self) -> String {
        let listed = || {
            let members = self.members().unwrap_or_default();
            let own = members.into_iter().find(|member| member.name == self.name);
            own.map_or_else(String::new, |member| member.peer_url)
        };
        self.peer_url.clone().unwrap_or_else(listed)
    }

    /// Time between heartbeats.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// Time without a leader before an election.
    #[must_use]
    pub fn election_timeout(&self) -> Duration {
        Duration::from_millis(self.election_timeout_ms)
    }

    /// TLS files towards other replicas.
    #[must_use]
    pub fn tls_paths(&self, default: &TlsConfig) -> TlsPaths {
        let tls = self.tls.as_ref().unwrap_or(default);
        TlsPaths {
            ca: tls.ca.clone(),
            cert: tls.cert.clone(),
            key: tls.key.clone(),
        }
    }

    pub(super) fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        self.tls
            .iter_mut()
            .flat_map(|tls| [&mut tls.ca, &mut tls.cert, &mut tls.key])
    }

    fn members(&self) -> Result<Vec<InitialMember>, String> {
        self.initial_cluster
            .iter()
            .map(|entry| {
                let (name, peer_url) = entry
                    .split_once('=')
                    .ok_or_else(|| format!("{entry:?} is not NAME=https://HOST:PORT"))?;
                check_url(peer_url)?;
                Ok(InitialMember {
                    name: name.to_owned(),
                    peer_url: peer_url.to_owned(),
                })
            })
            .collect()
    }

    pub(super) fn check(&self) -> Result<(), (String, String)> {
        let name_fits = (1..=MAX_NAME_BYTES).contains(&self.name.len()) && !self.name.contains('=');
        if !name_fits {
            return Err(fault(
                "replica.name",
                format!("give 1 to {MAX_NAME_BYTES} bytes without ="),
            ));
        }
        let initial = |reason: String| fault("replica.initial_cluster", reason);
        let members = self.members().map_err(initial)?;
        if members.is_empty() == self.join.is_empty() {
            return Err(initial(
                "give either the first replicas of a new group here, or replicas of the group to join in replica.join".to_owned(),
            ));
        }
        if self.join.len() > MAX_JOIN_URLS {
            return Err(fault(
                "replica.join",
                format!(
                    "{} addresses; the limit is {MAX_JOIN_URLS}",
                    self.join.len()
                ),
            ));
        }
        for (key, url) in (self.join.iter().map(|url| ("replica.join", url)))
            .chain(self.peer_url.iter().map(|url| ("replica.peer_url", url)))
        {
            check_url(url).map_err(|reason| fault(key, reason))?;
        }
        for url in &self.client_urls {
            check_client_url(url).map_err(|reason| fault("replica.client_urls", reason))?;
        }
        if self.own_peer_url().is_empty() {
            return Err(fault(
                "replica.peer_url",
                "say how other replicas reach this one, as in \"https://s1.example.net:2380\"",
            ));
        }
        if members.is_empty() {
            return self.check_times();
        }
        if !INITIAL_CLUSTER_SIZES.contains(&members.len()) {
            return Err(initial(format!(
                "{} replicas; a group begins with 1, 3 or 5",
                members.len()
            )));
        }
        let names: BTreeSet<_> = members.iter().map(|member| &member.name).collect();
        let urls: BTreeSet<_> = members.iter().map(|member| &member.peer_url).collect();
        if names.len() != members.len() || urls.len() != members.len() {
            return Err(initial("a name or an address is listed twice".to_owned()));
        }
        if !names.contains(&self.name) {
            return Err(initial(format!(
                "this replica, {:?}, is not in the list",
                self.name
            )));
        }
        self.check_times()
    }

    fn check_times(&self) -> Result<(), (String, String)> {
        if !(10..=10_000).contains(&self.heartbeat_ms) {
            return Err(fault("replica.heartbeat_ms", "give 10 to 10000"));
        }
        // Fewer heartbeats in an election timeout, and one lost packet starts an election.
        if self.election_timeout_ms < 3 * self.heartbeat_ms || self.election_timeout_ms > 60_000 {
            return Err(fault(
                "replica.election_timeout_ms",
                "give at least three times heartbeat_ms, and at most 60000",
            ));
        }
        Ok(())
    }
}

fn check_url(url: &str) -> Result<(), String> {
    if scheme_of(url).is_some_and(|scheme| scheme == "https") {
        return Ok(());
    }
    Err(format!("{url:?} is not https://HOST:PORT"))
}

/// Clients of this machine may come in clear.
fn check_client_url(url: &str) -> Result<(), String> {
    if scheme_of(url).is_some_and(|scheme| scheme == "https" || scheme == "http") {
        return Ok(());
    }
    Err(format!("{url:?} is not https://HOST:PORT"))
}

/// The scheme of an address that has a host and a port, and nothing else.
fn scheme_of(url: &str) -> Option<String> {
    let uri: http::Uri = url.parse().ok()?;
    let is_root = uri.path() == "/" || uri.path().is_empty();
    (uri.port_u16().is_some() && is_root && !url.ends_with('/'))
        .then(|| uri.scheme_str().map(str::to_owned))
        .flatten()
}
