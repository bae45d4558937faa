//! Bad input at a node: each mistake is named with its remedy, and nothing else notices.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::path::Path;
use std::time::{Duration, Instant};

use clustermesh_api::v1::refused::Reason;
use clustermesh_api::v1::session_request::Message as Asked;
use clustermesh_api::v1::session_response::Message as Answer;
use clustermesh_api::v1::{Hello, UpsertEndpoint};
use clustermesh_client::Client;
use clustermesh_integration::lab::Lab;
use clustermesh_integration::lab::host::{command_in, run, sh};
use clustermesh_integration::lab::process::Process;
use clustermesh_integration::scenario::{NAMESPACE, one_cluster, until, workload};
use nix::sys::signal::Signal;

const CONVERGED_SECONDS_MAX: u32 = 20;

async fn metric(lab: &Lab, line_start: &str) -> f64 {
    let mut command = command_in(lab.cluster(0).server_netns(), None, Path::new("curl"));
    let output = run(command.args(["-sf", "http://127.0.0.1:9962/metrics"]))
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines()
        .filter(|line| line.starts_with(line_start))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// The first answer to a Hello, then the first answer to a claim of `addresses`.
async fn claim(
    client: Client,
    hello: Hello,
    addresses: Vec<String>,
) -> anyhow::Result<(Option<Answer>, Option<Answer>)> {
    let mut session = client.node_session(hello).await?;
    let first = session.responses.next().await?.and_then(|r| r.message);
    if !matches!(first, Some(Answer::Welcome(_))) {
        return Ok((first, None));
    }
    session
        .sender
        .send(Asked::UpsertEndpoint(UpsertEndpoint {
            request_id: 1,
            namespace: NAMESPACE.to_owned(),
            name: "web".to_owned(),
            addresses,
        }))
        .await?;
    let second = session.responses.next().await?.and_then(|r| r.message);
    Ok((first, second))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_no_address_that_is_not_its_own() {
    let lab = one_cluster(1).await.unwrap();
    let a = lab.cluster(0);
    a.apply(&workload("web", "web")).await.unwrap();
    a.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    let (n1_v4, _) = a.node(0).underlay_addresses();
    let (n2_v4, _) = a.node(1).underlay_addresses();
    let hello = |underlay: &str| Hello {
        node: "n2".to_owned(),
        instance_id: "test".to_owned(),
        underlay_addresses: vec![underlay.to_owned()],
        ..Hello::default()
    };
    let as_n2 = a.store_as("n2").unwrap();
    let before = metric(
        &lab,
        "clustermesh_server_node_sessions_claims_refused_total",
    )
    .await;

    // The underlay address of its neighbour.
    let stolen = hello(&n1_v4);
    let (answer, _) = as_n2
        .call(move |client| claim(client, stolen, vec![]))
        .await
        .unwrap();
    let Some(Answer::Refused(refused)) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(refused.reason(), Reason::Conflict, "{refused:?}");
    for part in ["n2", n1_v4.as_str(), "n1"] {
        assert!(refused.message.contains(part), "{refused:?}");
    }

    // Another node's name.
    let mut other = hello(&n2_v4);
    other.node = "n1".to_owned();
    let (answer, _) = as_n2
        .call(move |client| claim(client, other, vec![]))
        .await
        .unwrap();
    let Some(Answer::Refused(refused)) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(refused.reason(), Reason::NotOwned, "{refused:?}");

    // A pod address in its neighbour's range.
    let status = a.status().await.unwrap();
    let cidr = status["nodes"][0]["podCIDRs"][0].as_str().unwrap();
    let stolen_pod = cidr.replace(".0/24", ".77");
    let (honest, wanted) = (hello(&n2_v4), vec![stolen_pod.clone()]);
    let (_, answer) = as_n2
        .call(move |client| claim(client, honest, wanted))
        .await
        .unwrap();
    let Some(Answer::Refused(refused)) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(refused.reason(), Reason::NotOwned, "{refused:?}");
    assert!(refused.message.contains(&stolen_pod), "{refused:?}");
    let record = format!("cilium/state/ip/v1/default/{stolen_pod}");
    let at_a = a.store().unwrap();
    assert_eq!(at_a.get(&record).await.unwrap(), None);
    assert!(
        metric(
            &lab,
            "clustermesh_server_node_sessions_claims_refused_total"
        )
        .await
            >= before + 3.0
    );

    // The agent itself finds out before it asks.
    let config = a.node(1).config_text().replace(&n2_v4, &n1_v4);
    let (code, log) = a.node(1).failing_agent("liar", &config).await.unwrap();
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains(&format!(
            "underlay_addresses: no underlay device has {n1_v4}"
        )),
        "{log}"
    );
    // The neighbour is as before.
    let status = a.status().await.unwrap();
    assert_eq!(status["nodes"][0]["state"], "connected", "{status}");
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_of_a_node_gives_way_to_the_first() {
    let lab = one_cluster(1).await.unwrap();
    let a = lab.cluster(0);
    let node = a.node(0);
    a.apply(&workload("web", "web")).await.unwrap();
    let pod = node.add_pod(NAMESPACE, "web").await.unwrap();

    let (code, log) = node
        .failing_agent("second", node.config_text())
        .await
        .unwrap();
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("another clustermesh-node uses the state folder") && log.contains("stop it"),
        "{log}"
    );

    // A copy of the machine: its own folders, the same name and certificate.
    let folder = node.folder().display().to_string();
    let bpffs = lab.folder().join("copy-bpf");
    std::fs::create_dir_all(&bpffs).unwrap();
    let bpffs = bpffs.display().to_string();
    sh("mount", &["-t", "bpf", "none", &bpffs]).await.unwrap();
    let config = node
        .config_text()
        .replace(&format!("{folder}/bpf"), &bpffs)
        .replace(&folder, &format!("{folder}/copy"))
        .replace("127.0.0.1:9964", "127.0.0.1:9974")
        // It is another machine: it has the address of the second node.
        .replace(
            &node.underlay_addresses().0,
            &a.node(1).underlay_addresses().0,
        )
        .replace(
            &node.underlay_addresses().1,
            &a.node(1).underlay_addresses().1,
        );
    let path = lab.folder().join("copy.toml");
    std::fs::create_dir_all(format!("{folder}/copy/run")).unwrap();
    std::fs::write(&path, config).unwrap();
    let mut command = a.node(1).command(&node.binaries().join("clustermesh-node"));
    command.arg("--config").arg(&path);
    let log = lab.folder().join("copy.log");
    let copy = Process::start("copy", &mut command, &log).unwrap();
    until("the copy is refused", || async {
        let log = std::fs::read_to_string(copy.log())?;
        Ok((log.contains("the server refuses this node")
            && log.contains("stop that agent, or give this machine its own node name"))
        .then_some(()))
    })
    .await
    .unwrap();
    // The first one goes on, with what it holds.
    let status = node.agent_status().await.unwrap();
    assert_eq!(status["server_connected"], true, "{status}");
    a.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    let status = a.status().await.unwrap();
    assert_eq!(status["nodes"].as_array().unwrap().len(), 1, "{status}");
    assert_eq!(
        status["nodes"][0]["underlayAddresses"][0],
        node.underlay_addresses().0,
        "{status}"
    );
    let router = pod.address(false).unwrap().rsplit_once('.').unwrap().0;
    pod.ping(&format!("{router}.1")).await.unwrap();
    copy.stop(Signal::SIGTERM).await.unwrap();
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_a_bpffs_or_with_foreign_pins_says_so_and_touches_nothing() {
    let lab = one_cluster(0).await.unwrap();
    let node = lab.cluster(0).node(0);
    let bpffs = node.bpffs().display().to_string();
    let elsewhere = node.folder().join("no-bpffs").display().to_string();
    let config = node.config_text().replace(&bpffs, &elsewhere);
    let (code, log) = node.failing_agent("no-bpffs", &config).await.unwrap();
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("no BPF file system is mounted at") && log.contains("mount -t bpf"),
        "{log}"
    );

    // A map under one of our names that is none of ours.
    std::fs::create_dir_all(format!("{bpffs}/clustermesh")).unwrap();
    let layout = clustermesh_ebpf_abi::LAYOUT_VERSION;
    let pin = format!("{bpffs}/clustermesh/ipcache_v{layout}");
    let create = [
        "map", "create", &pin, "type", "hash", "key", "4", "value", "4", "entries", "16", "name",
        "other",
    ];
    sh("bpftool", &create).await.unwrap();
    let (code, log) = node
        .failing_agent("foreign-pin", node.config_text())
        .await
        .unwrap();
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("the pinned map ipcache has type 1, keys of 4 B")
            && log.contains("clustermesh-node uninstall"),
        "{log}"
    );
    let links = sh("ip", &["-n", node.netns(), "-o", "link"]).await.unwrap();
    assert!(!links.contains("cm_host"), "{links}");
    let nodes = lab.cluster(0).get("nodes").await.unwrap();
    assert!(nodes.is_empty(), "{nodes:?}");
    // The remedy helps.
    let config = node.folder().join("foreign-pin.toml");
    let mut command = node.command(&node.binaries().join("clustermesh-node"));
    run(command.arg("--config").arg(config).arg("uninstall"))
        .await
        .unwrap();
    assert!(!Path::new(&pin).exists());
    let mut lab = lab;
    lab.cluster_mut(0).node_mut(0).start_agent().await.unwrap();
    lab.cluster(0)
        .wait_converged(CONVERGED_SECONDS_MAX)
        .await
        .unwrap();
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_vanishes_in_the_middle_of_add_is_named_and_leaves_nothing_behind() {
    let lab = one_cluster(1).await.unwrap();
    let a = lab.cluster(0);
    let node = a.node(0);
    a.apply(&workload("steady", "web")).await.unwrap();
    let steady = node.add_pod(NAMESPACE, "steady").await.unwrap();

    // The namespace goes while ADD waits for its workload.
    let mut late = node.prepare_pod(NAMESPACE, "late").await.unwrap();
    let (answer, ()) = tokio::join!(late.call_cni("ADD", serde_json::json!({})), async {
        sh("ip", &["netns", "del", late.netns()]).await.unwrap();
        a.apply(&workload("late", "web")).await.unwrap();
    });
    let error = answer.unwrap().unwrap_err();
    assert_eq!(error["code"], 102, "{error}");
    assert!(
        error["details"].as_str().unwrap().contains(late.netns()),
        "{error}"
    );
    let status = node.agent_status().await.unwrap();
    assert_eq!(status["endpoints"].as_array().unwrap().len(), 1, "{status}");
    // The runtime cleans up after itself, and tries again.
    late.cni("DEL").await.unwrap();
    sh("ip", &["netns", "add", late.netns()]).await.unwrap();
    let result = late.attach().await.unwrap();
    steady.ping(late.address(false).unwrap()).await.unwrap();

    // The interface goes while, or just after, ADD makes it.
    let interface = result["interfaces"][0]["name"].as_str().unwrap().to_owned();
    let mut failures = 0;
    for round in 0..10 {
        late.cni("DEL").await.unwrap();
        let mut command = command_in(node.netns(), None, Path::new("sh"));
        command.arg("-c").arg(format!(
            "i=0; until ip link del {interface} 2>/dev/null; do i=$((i+1)); [ $i -lt 2000 ] || exit 1; done"
        ));
        let log = lab.folder().join("thief.log");
        let thief = Process::start("thief", &mut command, &log).unwrap();
        let answer = late.call_cni("ADD", serde_json::json!({})).await.unwrap();
        assert!(thief.wait().await.unwrap().success(), "round {round}");
        match answer {
            Err(error) => {
                failures += 1;
                assert_eq!(error["code"], 102, "{error}");
                assert!(!error["details"].as_str().unwrap().is_empty(), "{error}");
            }
            Ok(result) => {
                let check = serde_json::json!({ "prevResult": result });
                let error = late.call_cni("CHECK", check).await.unwrap().unwrap_err();
                assert_eq!(error["code"], 101, "{error}");
                let details = error["details"].as_str().unwrap();
                assert!(details.contains(&interface), "{error}");
            }
        }
        // The same pod once more, undisturbed.
        late.cni("DEL").await.unwrap();
        late.attach().await.unwrap();
        steady.ping(late.address(false).unwrap()).await.unwrap();
    }
    println!("{failures} of 10 rounds met the interface in the middle");
    let status = node.agent_status().await.unwrap();
    assert_eq!(status["endpoints"].as_array().unwrap().len(), 2, "{status}");
    let links = sh("ip", &["-n", node.netns(), "-o", "link"]).await.unwrap();
    let names = links.lines().filter_map(|line| line.split(": ").nth(1));
    let pods = names
        .filter(|name| name.starts_with("cm") && !name.starts_with("cm_"))
        .count();
    assert_eq!(pods, 2, "{links}");
    assert_eq!(lab.remove().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cni_plugin_answers_in_the_specifications_form_whatever_is_down() {
    let mut lab = one_cluster(1).await.unwrap();
    let none = serde_json::json!({});
    let a = lab.cluster(0);
    a.apply(&(workload("web", "web") + &workload("cached", "web")))
        .await
        .unwrap();
    a.wait_converged(CONVERGED_SECONDS_MAX).await.unwrap();
    let mut pod = a.node(0).prepare_pod(NAMESPACE, "web").await.unwrap();
    let version = pod.cni("VERSION").await.unwrap();
    assert_eq!(
        version["supportedVersions"],
        serde_json::json!(["0.4.0", "1.0.0", "1.1.0"])
    );
    pod.cni("STATUS").await.unwrap();

    // Twice the same: the same answer.
    let result = pod.attach().await.unwrap();
    assert_eq!(result["cniVersion"], "1.1.0");
    assert_eq!(pod.attach().await.unwrap(), result);
    let prev = serde_json::json!({ "prevResult": result });
    pod.call_cni("CHECK", prev.clone()).await.unwrap().unwrap();
    let lost = ["-n", pod.netns(), "link", "set", "eth0", "down"];
    sh("ip", &lost).await.unwrap();
    let error = pod.call_cni("CHECK", prev).await.unwrap().unwrap_err();
    assert_eq!(error["code"], 101, "{error}");
    assert!(error["details"].as_str().unwrap().contains("eth0 is down"));

    // What the runtime got wrong.
    for (verb, more, code) in [
        ("ADD", serde_json::json!({ "cniVersion": "9.9.9" }), 1),
        ("ADD", serde_json::json!({ "cniVersion": 7 }), 6),
        ("JUMP", none.clone(), 4),
        ("GC", none.clone(), 7),
    ] {
        let error = pod.call_cni(verb, more).await.unwrap().unwrap_err();
        assert_eq!(error["code"], code, "{verb}: {error}");
        assert!(!error["msg"].as_str().unwrap().is_empty(), "{error}");
    }

    // A workload that nobody declared is waited for, then refused for now.
    let nobody = a.node(0).prepare_pod(NAMESPACE, "nobody").await.unwrap();
    let begun = Instant::now();
    let error = nobody
        .call_cni("ADD", none.clone())
        .await
        .unwrap()
        .unwrap_err();
    let waited = begun.elapsed();
    assert_eq!(
        (&error["code"], &error["cniVersion"]),
        (&11.into(), &"1.1.0".into())
    );
    assert!(
        error["msg"].as_str().unwrap().contains("shop/nobody"),
        "{error}"
    );
    assert!(
        (Duration::from_secs(5)..Duration::from_millis(6_500)).contains(&waited),
        "{waited:?}"
    );

    // The server is down: what is cached can be attached, the rest not yet.
    lab.cluster_mut(0)
        .stop_server(Signal::SIGKILL)
        .await
        .unwrap();
    let cached = lab.cluster(0).node(0).add_pod(NAMESPACE, "cached").await;
    let cached = cached.unwrap();
    let error = nobody.call_cni("ADD", none.clone()).await.unwrap();
    assert_eq!(error.unwrap_err()["code"], 11);
    lab.cluster_mut(0).restart_server().await.unwrap();

    // GC keeps what it is told to keep.
    let valid = serde_json::json!({
        "cni.dev/valid-attachments": [{ "containerID": cached.container_id(), "ifname": "eth0" }]
    });
    pod.call_cni("GC", valid).await.unwrap().unwrap();
    let node = lab.cluster(0).node(0);
    let names = |status: &serde_json::Value| -> Vec<String> {
        let endpoints = status["endpoints"].as_array().unwrap().iter();
        endpoints
            .map(|endpoint| endpoint["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(&node.agent_status().await.unwrap()), ["cached"]);

    // The agent is down: DEL is kept for it, everything else waits.
    lab.cluster_mut(0)
        .node_mut(0)
        .stop_agent(Signal::SIGKILL)
        .await
        .unwrap();
    let error = pod.call_cni("STATUS", none.clone()).await.unwrap();
    assert_eq!(error.unwrap_err()["code"], 50);
    let error = pod.call_cni("ADD", none).await.unwrap();
    assert_eq!(error.unwrap_err()["code"], 11);
    cached.cni("DEL").await.unwrap();
    let queued = || std::fs::read_dir(cached.queue_dir()).unwrap().count();
    assert_eq!(queued(), 1);
    lab.cluster_mut(0).node_mut(0).start_agent().await.unwrap();
    let node = lab.cluster(0).node(0);
    until("the queued DEL", || async {
        let status = node.agent_status().await?;
        Ok((names(&status).is_empty() && queued() == 0).then_some(()))
    })
    .await
    .unwrap();
    let cluster = lab.cluster(0);
    until("the record goes", || async {
        Ok((cluster.endpoint_count().await? == 0).then_some(()))
    })
    .await
    .unwrap();
    assert_eq!(lab.remove().await, Vec::<String>::new());
}
