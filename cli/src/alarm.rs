//! `alarm`: alarms of a cluster's store.

use anyhow::{Context as _, Result};
use clustermesh_api::etcd::rpc::{AlarmMember, AlarmType};
use clustermesh_client::Client;
use serde_json::json;

use crate::{
    args::{AlarmArgs, AlarmCommand, GlobalArgs, Output},
    connect::connect,
    member,
    output::{self, Table},
};

pub async fn run(global: &GlobalArgs, args: &AlarmArgs) -> Result<()> {
    let client = connect(global).await?;
    match &args.command {
        AlarmCommand::List => print(&client, &client.alarms().await?, global.output).await,
        AlarmCommand::Disarm { member } => {
            let only = match member {
                Some(member) => Some(member::find(&client, member).await?.id),
                None => None,
            };
            let mut ended = client.alarms().await?;
            ended.retain(|alarm| only.is_none_or(|id| alarm.member_id == id));
            for alarm in &ended {
                client
                    .disarm(alarm.member_id, alarm.alarm())
                    .await
                    .with_context(|| format!("alarm {} stands", kind(alarm.alarm())))?;
            }
            print(&client, &ended, global.output).await
        }
    }
}

/// As etcd calls it.
pub fn kind(alarm: AlarmType) -> &'static str {
    match alarm {
        AlarmType::None => "NONE",
        AlarmType::Nospace => "NOSPACE",
        AlarmType::Corrupt => "CORRUPT",
    }
}

/// What to do about it.
fn remedy(alarm: AlarmType) -> &'static str {
    match alarm {
        AlarmType::None => "",
        AlarmType::Nospace => "delete keys and compact, or raise quota_bytes; then disarm",
        AlarmType::Corrupt => "replace this replica (member replace), then disarm",
    }
}

async fn print(client: &Client, alarms: &[AlarmMember], form: Output) -> Result<()> {
    let members = client.members().await?;
    let name = |id: u64| {
        let member = members.iter().find(|member| member.id == id);
        member.map_or_else(String::new, |member| member.name.clone())
    };
    match form {
        Output::Table if alarms.is_empty() => output::print("no alarms\n"),
        Output::Table => {
            let mut table = Table::new(&["ALARM", "REPLICA", "ID", "WHAT TO DO"]);
            for alarm in alarms {
                table.row(vec![
                    kind(alarm.alarm()).to_owned(),
                    name(alarm.member_id),
                    format!("{:016x}", alarm.member_id),
                    remedy(alarm.alarm()).to_owned(),
                ]);
            }
            output::print(&table.render())
        }
        Output::Json => {
            let alarms: Vec<_> = alarms
                .iter()
                .map(|alarm| {
                    json!({
                        "alarm": kind(alarm.alarm()),
                        "id": format!("{:016x}", alarm.member_id),
                        "name": name(alarm.member_id),
                    })
                })
                .collect();
            output::json(&alarms)
        }
    }
}
