//! What docs/store.md tells an operator to do, by the commands that it names.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use clustermesh_api::etcd::rpc::CompactionRequest;
use clustermesh_api::etcd::rpc::kv_client::KvClient;
use clustermesh_integration::lab::cluster::Cluster;
use clustermesh_integration::scenario::until;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{ALL, GAP_MAX, leader, load, logged, other, others, scenario};

/// By how much the revision grows in a group that is made of a lost one's data.
const REVISION_BUMP: i64 = 1_000_000_000;
/// A store that is soon full.
const QUOTA_BYTES: usize = 3 << 20;
/// What fills it.
const FILLER_BYTES: usize = 300_000;

/// Names of the voters, by the operator's command.
async fn voters(cluster: &Cluster) -> Result<Vec<String>> {
    let text = cluster.run_cli(&["member", "list", "-o", "json"]).await?;
    let members: Vec<Value> = serde_json::from_str(&text)?;
    let voters = members.iter().filter(|member| member["kind"] == "voter");
    let mut names: Vec<String> = voters
        .filter_map(|member| Some(member["name"].as_str()?.to_owned()))
        .collect();
    names.sort_unstable();
    Ok(names)
}

async fn until_voters(cluster: &Cluster, wanted: &[&str]) -> Result<()> {
    until(&format!("the voters {wanted:?}"), || async {
        Ok((voters(cluster).await? == wanted).then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn replace_a_replica_that_lives_by_the_operators_command() -> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        // The one that leads is the hardest.
        let old = leader(cluster, &ALL).await?;
        let old_name = cluster.replica(old).name().to_owned();
        let new = cluster.add_joining_replica().await?;
        let new_url = cluster.replica(new).peer_url();
        let mut replace = cluster.cli(&["member", "replace", &old_name, &new_url])?;
        let replacing = tokio::spawn(async move { replace.output().await });
        cluster.replica_mut(new).start().await?;
        let output = replacing.await??;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "member replace: {said}");
        // The old one learns of it and ends, telling what to do with its folder.
        cluster.replica_mut(old).ended().await?;
        logged(
            cluster,
            old,
            &["removed from its group", "empty its data folder"],
        )
        .await?;
        load.goes_on(&others(old)).await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("replace")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        ensure!(
            voters(cluster).await?.len() == 3,
            "{:?}",
            voters(cluster).await?
        );
        // Its old data does not bring it back.
        cluster.replica_mut(old).launch()?;
        let status = cluster.replica_mut(old).ended().await?;
        ensure!(!status.success(), "a removed replica ended with {status}");
        Ok(())
    })
    .await
}

/// Makes the configuration of a replica one of a member that joins the group of `of`.
fn configure_join(cluster: &Cluster, replica: usize, of: usize) -> Result<()> {
    let own = cluster.replica(replica).peer_url();
    let of = cluster.replica(of).peer_url();
    cluster.replica(replica).edit_config(|text| {
        let lines = text.lines().map(|line| match line.split_once(" = ") {
            Some(("initial_cluster", _)) => {
                format!("peer_url = {own:?}\njoin = [{of:?}]")
            }
            _ => line.to_owned(),
        });
        lines.collect::<Vec<_>>().join("\n")
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn replace_a_replica_whose_folder_is_lost() -> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        let lost = other(leader(cluster, &ALL).await?);
        let name = cluster.replica(lost).name().to_owned();
        cluster.replica_mut(lost).stop(Signal::SIGKILL).await?;
        std::fs::remove_dir_all(cluster.replica(lost).data())?;
        // It does not come back as if nothing had happened.
        cluster.replica_mut(lost).launch()?;
        let status = cluster.replica_mut(lost).ended().await?;
        ensure!(!status.success(), "an emptied replica ended with {status}");
        logged(
            cluster,
            lost,
            &["must not come back under its old id", "member remove"],
        )
        .await?;

        cluster.run_cli(&["member", "remove", &name]).await?;
        let url = cluster.replica(lost).peer_url();
        cluster.run_cli(&["member", "add", &url]).await?;
        configure_join(cluster, lost, leader(cluster, &others(lost)).await?)?;
        cluster.replica_mut(lost).start().await?;
        until_voters(cluster, &["r1", "r2", "r3"]).await?;
        load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("lost_folder")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_quorum_is_mended_by_a_new_group_of_the_best_replicas_data() -> Result<()> {
    scenario(async |cluster| {
        // All of them through the one that is kept: what it has acknowledged it has applied, and has in its log.
        let kept = leader(cluster, &ALL).await?;
        for number in 0..50 {
            let store = cluster.store_at(kept)?;
            store.put(&format!("k{number}"), "x").await?;
        }
        let before = cluster.store_at(kept)?.revision().await?;
        for index in ALL {
            cluster.replica_mut(index).stop(Signal::SIGKILL).await?;
        }
        for index in others(kept) {
            std::fs::remove_dir_all(cluster.replica(index).data())?;
        }
        let new_group = ["--force-new-cluster"];
        cluster.replica_mut(kept).start_with(&new_group).await?;
        let store = cluster.store_at(kept)?;
        let after = store.revision().await?;
        ensure!(
            after >= before + REVISION_BUMP,
            "revision {before} before, {after} after"
        );
        for number in 0..50 {
            let key = format!("k{number}");
            ensure!(store.get(&key).await?.is_some(), "{key} is lost");
        }
        for index in others(kept) {
            configure_join(cluster, index, kept)?;
            cluster.replica_mut(index).start().await?;
        }
        until_voters(cluster, &["r1", "r2", "r3"]).await?;
        // A group like any other: the one that it began with may go, and comes back without that flag.
        cluster.replica_mut(kept).stop(Signal::SIGTERM).await?;
        let led = leader(cluster, &others(kept)).await?;
        cluster.store_at(led)?.put("later", "y").await?;
        cluster.replica_mut(kept).start().await?;
        let value = until("what was written meanwhile", || async {
            cluster.store_at(kept)?.get("later").await
        })
        .await?;
        ensure!(value == b"y");
        for index in ALL {
            let records = cluster.store_at(index)?.list("k").await?;
            ensure!(records.len() == 50, "{} records", records.len());
        }
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn nospace_is_raised_at_the_quota_and_disarmed_when_there_is_room() -> Result<()> {
    scenario(async |cluster| {
        cluster.stop_server(Signal::SIGTERM).await?;
        cluster.edit_server_config(|text| format!("quota_bytes = {QUOTA_BYTES}\n{text}"))?;
        cluster.restart_server().await?;
        leader(cluster, &ALL).await?;
        let store = cluster.store()?;
        let mut fillers = 0;
        let refused = loop {
            let filler = vec![b'x'; FILLER_BYTES];
            match store.put(&format!("filler/{fillers}"), filler).await {
                Ok(_) => fillers += 1,
                Err(refused) => break refused.to_string(),
            }
            ensure!(fillers * FILLER_BYTES < 2 * QUOTA_BYTES, "no quota");
        };
        ensure!(
            refused.contains("etcdserver: mvcc: database space exceeded"),
            "{refused}"
        );
        let alarms = cluster.run_cli(&["alarm", "list"]).await?;
        ensure!(
            alarms.contains("NOSPACE") && alarms.contains("disarm"),
            "{alarms}"
        );
        for index in ALL {
            let store = cluster.store_at(index)?;
            let small = store.put("small", "x").await;
            ensure!(small.is_err(), "a write while the alarm stands");
            ensure!(store.get("filler/0").await?.is_some(), "reads go on");
        }
        // To disarm before there is room does not help for long.
        for number in 0..fillers {
            store.delete(&format!("filler/{number}")).await?;
        }
        let revision = store.revision().await?;
        store
            .call(move |client| async move {
                let request = CompactionRequest {
                    revision,
                    physical: true,
                };
                KvClient::new(client.channel()).compact(request).await?;
                Ok(())
            })
            .await?;
        ensure!(
            store.put("small", "x").await.is_err(),
            "the alarm stands still"
        );
        cluster.run_cli(&["alarm", "disarm"]).await?;
        let alarms = cluster.run_cli(&["alarm", "list", "-o", "json"]).await?;
        ensure!(!alarms.contains("NOSPACE"), "{alarms}");
        for index in ALL {
            cluster.store_at(index)?.put("small", "x").await?;
        }
        Ok(())
    })
    .await
}

/// Puts a file in place of another one in one step, as a tool that renews certificates does.
fn replace_file(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    std::fs::copy(from, &new).with_context(|| from.display().to_string())?;
    std::fs::rename(&new, to)?;
    Ok(())
}

/// Waits until a replica has read certificates again more than `before` times. It looks at them for new connections.
async fn until_reloaded(cluster: &Cluster, replica: usize, before: usize) -> Result<()> {
    until("the files are read again", || async {
        // It may be refused: by the old certificates.
        let _connected = cluster.store_at(replica)?.revision().await;
        Ok((reloads(cluster, replica)? > before).then_some(()))
    })
    .await
}

/// How often a replica has read certificates again.
fn reloads(cluster: &Cluster, replica: usize) -> Result<usize> {
    let log = cluster.replica(replica).log_text()?;
    Ok(log.matches("TLS material read again").count())
}

/// Breaks every connection between one replica and the others, so that new ones are made.
async fn reconnect(cluster: &Cluster, replica: usize) -> Result<()> {
    let mut command = clustermesh_integration::lab::host::command_in(
        cluster.replica(replica).netns(),
        None,
        Path::new("ss"),
    );
    command.args(["-K", "( sport = :2380 or dport = :2380 )"]);
    clustermesh_integration::lab::host::run(&mut command).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificate_rotation_to_a_new_authority_needs_no_restart() -> Result<()> {
    scenario(async |cluster| {
        let load = load(cluster).await?;
        let pki = cluster.authority()?;
        let renewed = pki.with_file_name("pki-new");
        cluster.make_authority(&renewed).await?;
        // Both authorities on all sides; the files are shared by everybody in the lab.
        let (old_ca, new_ca) = (pki.join("ca.crt"), renewed.join("ca.crt"));
        let only_old = pki.join("old-ca.crt");
        std::fs::copy(&old_ca, &only_old)?;
        let both = pki.join("both.crt");
        let text = [std::fs::read(&old_ca)?, std::fs::read(&new_ca)?].concat();
        std::fs::write(&both, text)?;
        replace_file(&both, &old_ca)?;
        for index in ALL {
            until_reloaded(cluster, index, 0).await?;
        }
        // One replica after the other shows a certificate of the new one.
        for index in ALL {
            let name = cluster.replica(index).certificate().to_owned();
            let before = reloads(cluster, index)?;
            cluster
                .issue_server_certificate_from(&renewed, cluster.replica(index))
                .await?;
            for end in ["crt", "key"] {
                let file = format!("{name}.{end}");
                let folder = |root: &Path| root.join(cluster.name()).join(&file);
                replace_file(&folder(&renewed), &folder(&pki))?;
            }
            until_reloaded(cluster, index, before).await?;
            reconnect(cluster, index).await?;
            load.goes_on_everywhere().await?;
        }
        cluster.issue_operator_certificate_from(&renewed).await?;
        for end in ["crt", "key"] {
            let file = format!("{}/admin.{end}", cluster.name());
            replace_file(&renewed.join(&file), &pki.join(&file))?;
        }
        // The old authority goes.
        let before: Vec<usize> = ALL
            .into_iter()
            .map(|index| reloads(cluster, index))
            .collect::<Result<_>>()?;
        replace_file(&new_ca, &old_ca)?;
        for index in ALL {
            until_reloaded(cluster, index, before[index]).await?;
            reconnect(cluster, index).await?;
        }
        load.goes_on_everywhere().await?;
        let verdict = load.finish(cluster).await?;
        verdict.check("certificate_rotation")?;
        ensure!(verdict.longest_gap < GAP_MAX, "{verdict}");
        for index in ALL {
            ensure!(cluster.store_at(index)?.revision().await? > 0);
            let log = cluster.replica(index).log_text()?;
            ensure!(!log.contains("keeping the old"), "{log}");
        }
        // Who knows only the old authority takes none of the replicas for one of the cluster.
        replace_file(&only_old, &old_ca)?;
        let refused = cluster.store()?.revision().await;
        ensure!(refused.is_err(), "a replica still shows an old certificate");
        Ok(())
    })
    .await
}
