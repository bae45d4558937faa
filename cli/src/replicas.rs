//! The replicas of the cluster's own store, each asked by itself.

use std::time::Duration;

use anyhow::Result;
use clustermesh_api::etcd::rpc::{AlarmMember, Member, StatusResponse};
use clustermesh_client::{Client, ClientConfig, ClientError};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::timeout};

use crate::{
    alarm,
    args::GlobalArgs,
    connect,
    output::{NONE, Table},
};

/// A replica that does not answer by then is shown as unreachable.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// What only a quorum can answer is waited for so long.
const QUORUM_PATIENCE: Duration = Duration::from_secs(2);

/// One replica, and what it says of itself.
#[derive(Debug)]
pub struct Replica {
    member: Member,
    answer: Result<StatusResponse, String>,
    alarms: Vec<&'static str>,
}

/// What a quorum answers; `None` where there is none.
async fn of_quorum<T>(
    answer: impl Future<Output = Result<T, ClientError>>,
) -> Result<Option<T>, ClientError> {
    match timeout(QUORUM_PATIENCE, answer).await {
        Ok(Err(error)) if error.is_transient() => Ok(None),
        Ok(answered) => answered.map(Some),
        Err(_) => Ok(None),
    }
}

/// All replicas of the group that `client` is connected to, and whether they have a quorum; without one as the connected
/// replica knows them.
pub async fn ask(global: &GlobalArgs, client: &Client) -> Result<(Vec<Replica>, bool)> {
    let own = client.store_status().await?;
    let (members, alarms) =
        tokio::try_join!(of_quorum(client.members()), of_quorum(client.alarms()))?;
    let quorum = members.is_some();
    let members = match members {
        Some(members) => members,
        None => client.known_members().await?,
    };
    let alarms = alarms.unwrap_or_default();
    let mut asking = JoinSet::new();
    for (index, member) in members.iter().enumerate() {
        let config = ClientConfig {
            endpoints: member.client_ur_ls.clone(),
            ..connect::config(global)?
        };
        let own_id = own.header.as_ref().map(|header| header.member_id);
        let known = (own_id == Some(member.id)).then(|| own.clone());
        asking.spawn(async move {
            match known {
                Some(own) => (index, Ok(own)),
                None => (index, ask_one(config).await),
            }
        });
    }
    let mut answers: Vec<_> = asking.join_all().await;
    answers.sort_by_key(|(index, _)| *index);
    let replica = |(member, (_, answer)): (Member, (usize, Result<StatusResponse, String>))| {
        let raised = |found: &&AlarmMember| found.member_id == member.id;
        Replica {
            alarms: alarms
                .iter()
                .filter(raised)
                .map(|found| alarm::kind(found.alarm()))
                .collect(),
            member,
            answer,
        }
    };
    let replicas = members.into_iter().zip(answers).map(replica).collect();
    Ok((replicas, quorum))
}

async fn ask_one(config: ClientConfig) -> Result<StatusResponse, String> {
    if config.endpoints.is_empty() {
        return Err("it has not told where clients reach it (replica.client_urls)".to_owned());
    }
    let asking = async {
        let client = Client::connect(&config).await?;
        client.store_status().await
    };
    match timeout(ANSWER_TIMEOUT, asking).await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())),
    }
}

impl Replica {
    fn leads(&self) -> bool {
        self.answer
            .as_ref()
            .is_ok_and(|status| status.leader == self.member.id)
    }

    fn state(&self) -> &'static str {
        match (&self.answer, self.member.is_learner) {
            (Err(_), _) => "unreachable",
            (Ok(_), true) => "learner",
            (Ok(_), false) if self.leads() => "leader",
            (Ok(_), false) => "follower",
        }
    }

    /// Entries behind the one that has applied most.
    fn lag(&self, replicas: &[Replica]) -> Option<u64> {
        let applied = |replica: &Replica| {
            let answer = replica.answer.as_ref().ok();
            answer.map(|status| status.raft_applied_index)
        };
        let most = replicas.iter().filter_map(applied).max()?;
        applied(self).map(|applied| most.saturating_sub(applied))
    }
}

fn mib(bytes: i64) -> String {
    let bytes = u64::try_from(bytes).unwrap_or(0);
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

pub fn table(replicas: &[Replica]) -> Table {
    let mut table = Table::new(&[
        "NAME", "ID", "STATE", "TERM", "APPLIED", "BEHIND", "REVISION", "DATA", "ON DISK",
        "ALARMS", "ERRORS",
    ]);
    for replica in replicas {
        let number = |of: &dyn Fn(&StatusResponse) -> String| match &replica.answer {
            Ok(status) => of(status),
            Err(_) => NONE.to_owned(),
        };
        let errors = match &replica.answer {
            // Alarms have their own column.
            Ok(status) => {
                let errors = status.errors.iter();
                errors
                    .filter(|error| !error.starts_with("memberID:"))
                    .cloned()
                    .collect::<Vec<_>>()
                    .join("; ")
            }
            Err(reason) => reason.clone(),
        };
        table.row(vec![
            replica.member.name.clone(),
            format!("{:016x}", replica.member.id),
            replica.state().to_owned(),
            number(&|status| status.raft_term.to_string()),
            number(&|status| status.raft_applied_index.to_string()),
            replica
                .lag(replicas)
                .map_or_else(String::new, |lag| lag.to_string()),
            number(&|status| {
                let header = status.header.as_ref();
                header.map_or_else(String::new, |header| header.revision.to_string())
            }),
            number(&|status| mib(status.db_size_in_use)),
            number(&|status| mib(status.db_size)),
            replica.alarms.join(","),
            errors,
        ]);
    }
    table
}

pub fn to_json(replicas: &[Replica]) -> Vec<Value> {
    let one = |replica: &Replica| {
        let mut value = json!({
            "name": replica.member.name,
            "id": format!("{:016x}", replica.member.id),
            "state": replica.state(),
            "clientUrls": replica.member.client_ur_ls,
            "peerUrls": replica.member.peer_ur_ls,
            "alarms": replica.alarms,
            "behind": replica.lag(replicas),
        });
        let more = match &replica.answer {
            Ok(status) => json!({
                "term": status.raft_term,
                "appliedIndex": status.raft_applied_index,
                "lastIndex": status.raft_index,
                "revision": status.header.as_ref().map(|header| header.revision),
                "dataBytes": status.db_size_in_use,
                "diskBytes": status.db_size,
                "quotaBytes": status.db_size_quota,
                "etcdVersion": status.version,
                "errors": status.errors,
            }),
            Err(reason) => json!({ "errors": [reason] }),
        };
        if let (Some(value), Value::Object(more)) = (value.as_object_mut(), more) {
            value.extend(more);
        }
        value
    };
    replicas.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use clustermesh_api::etcd::rpc::ResponseHeader;

    use super::*;

    fn replica(id: u64, applied: u64) -> Replica {
        Replica {
            member: Member {
                id,
                name: format!("r{id}"),
                ..Member::default()
            },
            answer: Ok(StatusResponse {
                header: Some(ResponseHeader {
                    revision: 40,
                    ..ResponseHeader::default()
                }),
                leader: 2,
                raft_term: 3,
                raft_applied_index: applied,
                db_size: 3 << 20,
                db_size_in_use: 1 << 19,
                errors: vec!["memberID:1 alarm:NOSPACE ".to_owned()],
                ..StatusResponse::default()
            }),
            alarms: Vec::new(),
        }
    }

    #[test]
    fn the_table_says_who_leads_who_is_behind_and_who_is_silent() {
        let mut replicas = vec![replica(1, 90), replica(2, 100), replica(3, 0)];
        replicas[0].alarms.push("NOSPACE");
        replicas[2].answer = Err("connection refused".to_owned());
        assert_eq!(
            table(&replicas).render(),
            "\
NAME  ID                STATE        TERM  APPLIED  BEHIND  REVISION  DATA     ON DISK  ALARMS   ERRORS
r1    0000000000000001  follower     3     90       10      40        0.5 MiB  3.0 MiB  NOSPACE  -
r2    0000000000000002  leader       3     100      0       40        0.5 MiB  3.0 MiB  -        -
r3    0000000000000003  unreachable  -     -        -       -         -        -        -        connection refused
"
        );
        let json = to_json(&replicas);
        assert_eq!(json[0]["behind"], 10);
        assert_eq!(json[2]["errors"][0], "connection refused");
    }
}
