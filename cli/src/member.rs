//! `member`: the replicas of a cluster's store.

use std::time::Duration;

use anyhow::{Context as _, Error, Result, anyhow, bail};
use clustermesh_api::etcd::rpc::Member;
use clustermesh_client::{Client, ClientError};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::{
    args::{GlobalArgs, MemberArgs, MemberCommand, Output},
    connect::connect,
    output::{self, Table},
};

/// How often `replace` looks whether the new replica votes.
const REPLACE_POLL: Duration = Duration::from_millis(500);

pub async fn run(global: &GlobalArgs, args: &MemberArgs) -> Result<()> {
    let client = connect(global).await?;
    match &args.command {
        MemberCommand::List => list(&client, global.output).await,
        MemberCommand::Add { peer_url, learner } => {
            let id = client
                .add_member(peer_url.clone(), *learner)
                .await
                .map_err(|error| refused("add", peer_url, error))?;
            report(global.output, "added", id)
        }
        MemberCommand::Promote { member } => {
            let id = find(&client, member).await?.id;
            client
                .promote_member(id)
                .await
                .map_err(|error| refused("promote", member, error))?;
            report(global.output, "promoted", id)
        }
        MemberCommand::Remove { member } => {
            let id = find(&client, member).await?.id;
            client
                .remove_member(id)
                .await
                .map_err(|error| refused("remove", member, error))?;
            report(global.output, "removed", id)
        }
        MemberCommand::Replace {
            member,
            peer_url,
            timeout,
        } => {
            let old = find(&client, member).await?.id;
            let new = added(&client, old, peer_url).await?;
            let deadline = Instant::now() + *timeout;
            while !votes(&client, new).await? {
                if Instant::now() >= deadline {
                    bail!(
                        "replica {new:016x} at {peer_url} does not vote yet, {old:016x} stays; start it with this address as `peer_url` and with `join`, then remove the old one"
                    );
                }
                sleep(REPLACE_POLL).await;
            }
            client
                .remove_member(old)
                .await
                .with_context(|| format!("replica {new:016x} votes, {old:016x} was not removed"))?;
            report(global.output, "replaced", new)
        }
    }
}

async fn list(client: &Client, form: Output) -> Result<()> {
    let members = client.members().await?;
    let kind = |member: &Member| {
        if member.is_learner {
            "learner"
        } else {
            "voter"
        }
    };
    match form {
        Output::Table => {
            let mut table = Table::new(&["ID", "NAME", "KIND", "PEER URL", "CLIENT URLS"]);
            for member in &members {
                table.row(vec![
                    format!("{:016x}", member.id),
                    member.name.clone(),
                    kind(member).to_owned(),
                    member.peer_ur_ls.join(","),
                    member.client_ur_ls.join(","),
                ]);
            }
            output::print(&table.render())
        }
        Output::Json => {
            let members: Vec<_> = members
                .iter()
                .map(|member| {
                    json!({
                        "id": format!("{:016x}", member.id),
                        "name": member.name,
                        "kind": kind(member),
                        "peerUrls": member.peer_ur_ls,
                        "clientUrls": member.client_ur_ls,
                    })
                })
                .collect();
            output::json(&members)
        }
    }
}

fn report(form: Output, action: &str, id: u64) -> Result<()> {
    match form {
        Output::Table => output::print(&format!("replica {id:016x} {action}\n")),
        Output::Json => output::json(&json!({"id": format!("{id:016x}"), "action": action})),
    }
}

/// The replica at `peer_url`, which may be in the group already: it joined by itself, or the command is run again.
async fn added(client: &Client, old: u64, peer_url: &String) -> Result<u64> {
    let refused = match client.add_member(peer_url.clone(), false).await {
        Ok(id) => return Ok(id),
        Err(refused) => refused,
    };
    let members = client.members().await?;
    let there = members
        .iter()
        .find(|member| member.id != old && member.peer_ur_ls.contains(peer_url));
    there
        .map(|member| member.id)
        .ok_or_else(|| self::refused("add", peer_url, refused))
}

/// A change that the group refuses, with the replica that it was about; etcd's texts name neither it nor a remedy.
fn refused(action: &str, member: &str, error: ClientError) -> Error {
    let text = error.to_string();
    let remedies = [
        (
            "in sync with leader",
            "it has not caught up yet: `clustermesh status` shows how far it is behind",
        ),
        (
            "can only promote a learner",
            "it votes already: see `clustermesh member list`",
        ),
        (
            "not enough started members",
            "the rest would be no majority that runs: start the other replicas, or add one first",
        ),
        (
            "Peer URLs already exists",
            "a replica has this address: see `clustermesh member list`",
        ),
        (
            "too many learner members",
            "promote or remove the learner that is there first",
        ),
        (
            "unhealthy cluster",
            "another change of the group is under way: try again when it is through",
        ),
    ];
    let remedy = remedies.iter().find(|(said, _)| text.contains(said));
    let about = format!("cannot {action} replica {member}");
    match remedy {
        Some((_, remedy)) => anyhow!("{about}: {text}; {remedy}"),
        None => Error::new(error).context(about),
    }
}

async fn votes(client: &Client, id: u64) -> Result<bool> {
    let members = client.members().await?;
    match members.iter().find(|member| member.id == id) {
        Some(member) => Ok(!member.is_learner),
        None => bail!("replica {id:016x} was removed meanwhile"),
    }
}

/// The replica of this name, or of this id in hexadecimal digits.
pub async fn find(client: &Client, wanted: &str) -> Result<Member> {
    let members = client.members().await?;
    let id = u64::from_str_radix(wanted, 16).ok();
    let mut named = members.iter().filter(|member| member.name == wanted);
    let found = match (named.next(), named.next()) {
        (Some(member), None) => Some(member),
        (Some(_), Some(_)) => bail!("several replicas are named {wanted:?}; give the id"),
        (None, _) => members.iter().find(|member| Some(member.id) == id),
    };
    found
        .cloned()
        .with_context(|| format!("no replica has the name or id {wanted:?}; see `member list`"))
}
