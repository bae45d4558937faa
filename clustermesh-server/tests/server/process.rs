//! The binary: its start, kill -9, bad configurations.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};

use crate::support::{Cluster, Pki, binary, client, put, soon, until};

/// A running binary; killed when dropped.
struct Binary {
    child: Child,
    address: SocketAddr,
}

impl Drop for Binary {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the binary and reads its address from its log.
fn start(config: &std::path::Path) -> Binary {
    let mut child = Command::new(binary())
        .args(["--config".as_ref(), config.as_os_str()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    let address = loop {
        let mut line = String::new();
        assert!(
            log.read_line(&mut line).unwrap() > 0,
            "ended before it was ready:\n{seen}"
        );
        seen += &line;
        if line.contains("server is ready") {
            let (_, rest) = line.split_once("client=").unwrap();
            break rest.split_whitespace().next().unwrap().parse().unwrap();
        }
    };
    // The pipe must not fill up.
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    Binary { child, address }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_loses_nothing_that_was_acknowledged() {
    let pki = Pki::new();
    let mut cluster = Cluster::start(&pki, 1, &[]).await;
    // Only its folder and configuration are wanted: the binary runs on them.
    cluster.stop().await;
    let config = cluster.configure(&pki);
    let tls = pki.issue("operator", "c1", "admin-c1");
    let mut acknowledged = 0_u32;
    for round in 0..3 {
        let mut server = start(&config);
        let operator = client(server.address, tls.clone());
        for index in 0..acknowledged {
            assert!(
                operator.get(format!("k{index}")).await.unwrap().is_some(),
                "round {round}: k{index}"
            );
        }
        let target = acknowledged + 40;
        let writer = tokio::spawn(async move {
            let mut next = acknowledged;
            while operator.put(put(format!("k{next}"), "x")).await.is_ok() {
                next += 1;
            }
            next
        });
        let probe = client(server.address, tls.clone());
        until(&probe, &format!("k{target}"), |value| value.is_some()).await;
        server.child.kill().unwrap();
        server.child.wait().unwrap();
        acknowledged = soon("the writer's end", writer).await.unwrap();
        // The target was seen; whether its answer came before the kill is open.
        assert!(acknowledged >= target);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_open_streams_and_exits_0() {
    let pki = Pki::new();
    let mut cluster = Cluster::start(&pki, 1, &[]).await;
    cluster.stop().await;
    let config = cluster.configure(&pki);
    let mut server = start(&config);
    let agent = client(server.address, pki.issue("node", "c1", "w1"));
    let mut watch = agent.agent_watch(0, 0).await.unwrap();
    soon("the stream's start", watch.next()).await.unwrap();
    let pid = server.child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    let ended = soon("the stream's end", async {
        loop {
            match watch.next().await {
                Ok(Some(_)) => {}
                ended => return ended,
            }
        }
    })
    .await;
    assert!(ended.is_err(), "the agent is told to go elsewhere");
    let status = tokio::task::spawn_blocking(move || server.child.wait().unwrap());
    assert!(soon("the exit", status).await.unwrap().success());
}

#[test]
fn a_bad_configuration_is_named_and_exits_64() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("server.toml");
    std::fs::write(&path, "[tls]\nca='a'\ncert='b'\nkey='c'\nextra=1\n").unwrap();
    let run = |arguments: &[&str]| {
        let mut child = Command::new(binary())
            .args(arguments)
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut text = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        (child.wait().unwrap().code(), text)
    };
    let file = path.to_str().unwrap();
    let (code, text) = run(&["--config", file]);
    assert_eq!(code, Some(64));
    assert!(text.contains("extra"), "{text}");
    std::fs::write(&path, "[tls]\nca='a'\ncert='b'\nkey='c'\n").unwrap();
    let (code, text) = run(&["--config", file, "--check-config"]);
    assert_eq!(code, Some(64), "missing certificates");
    assert!(text.contains("/a"), "{text}");
}
