//! What an operator does: certificates replaced while the server runs, history dropped by rule, data looked through.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use clustermesh_api::etcd::rpc::RangeRequest;
use clustermesh_client::{Client, ClientConfig};
use clustermesh_process::TlsPaths;
use serde_json::Value;

use crate::support::{Pki, binary, client, put, soon};

/// A plain store as a process, with its log at hand.
struct Store {
    child: Child,
    address: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Store {
    fn start(config: &Path) -> Self {
        let mut child = Command::new(binary())
            .args(["--config".as_ref(), config.as_os_str()])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        let address = loop {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).unwrap() > 0, "it ended:\n{seen}");
            seen += &line;
            if line.contains("server is ready") {
                let (_, rest) = line.split_once("client=").unwrap();
                break rest.split_whitespace().next().unwrap().parse().unwrap();
            }
        };
        let log = Arc::new(Mutex::new(seen));
        let sink = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                *sink.lock().unwrap() += &format!("{line}\n");
            }
        });
        Self {
            child,
            address,
            log,
        }
    }

    async fn logged(&self, wanted: &str) {
        soon(&format!("{wanted:?} in the log"), async {
            while !self.log.lock().unwrap().contains(wanted) {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// SIGTERM, and waits for the end.
    fn stop(mut self) {
        let pid = self.child.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

/// A configuration whose certificates are `tls`, with `more` at its end.
fn configure(dir: &Path, tls: &TlsPaths, more: &str) -> PathBuf {
    let text = format!(
        "data_dir = \"data\"\nlisten_client = \"127.0.0.1:0\"\nlisten_admin = \"127.0.0.1:0\"\ndrain_seconds = 1\n\
         [tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n{more}",
        tls.ca, tls.cert, tls.key
    );
    let path = dir.join("server.toml");
    std::fs::write(&path, text).unwrap();
    path
}

fn copy(from: &TlsPaths, to: &TlsPaths) {
    for (from, to) in [
        (&from.ca, &to.ca),
        (&from.cert, &to.cert),
        (&from.key, &to.key),
    ] {
        std::fs::copy(from, to).unwrap();
    }
}

async fn connect(address: SocketAddr, tls: &TlsPaths) -> Result<Client, String> {
    let config = ClientConfig {
        endpoints: vec![format!("https://{address}")],
        tls: Some(tls.clone()),
        server_name: None,
    };
    let client = Client::connect(&config)
        .await
        .map_err(|error| error.to_string())?;
    // With TLS 1.3 a client learns of its refusal only now.
    client.get("a").await.map_err(|error| error.to_string())?;
    Ok(client)
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_replaced_under_a_running_server() {
    let (old, new) = (Pki::new(), Pki::new());
    let dir = tempfile::tempdir().unwrap();
    let used = TlsPaths {
        ca: dir.path().join("ca.crt"),
        cert: dir.path().join("server.crt"),
        key: dir.path().join("server.key"),
    };
    copy(&old.issue("server", "", "server"), &used);
    let config = configure(dir.path(), &used, "");
    let server = Store::start(&config);
    let old_operator = old.issue("operator", "", "admin");
    let new_operator = new.issue("operator", "", "admin");
    let before = connect(server.address, &old_operator).await.unwrap();
    before.put(put("a", "1")).await.unwrap();
    assert!(connect(server.address, &new_operator).await.is_err());

    copy(&new.issue("server", "", "server"), &used);
    let after = soon("the new certificates are used", async {
        loop {
            if let Ok(client) = connect(server.address, &new_operator).await {
                return client;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
    server.logged("TLS material read again").await;
    after.put(put("b", "2")).await.unwrap();
    // The connection that was there before goes on, a new one of the old authority is refused.
    before.put(put("c", "3")).await.unwrap();
    assert!(connect(server.address, &old_operator).await.is_err());
    server.logged("does not accept our certificate").await;
    let of_the_old = TlsPaths {
        ca: new_operator.ca.clone(),
        ..old_operator.clone()
    };
    assert!(connect(server.address, &of_the_old).await.is_err());
    server.logged("certificate is not accepted").await;

    // Half a replacement, and then nonsense: what works is kept.
    std::fs::write(&used.cert, "nothing").unwrap();
    tokio::time::sleep(clustermesh_process::tls::RELOAD_CHECK_INTERVAL).await;
    connect(server.address, &new_operator).await.unwrap();
    server.logged("keeping the old").await;
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn all_but_the_newest_revisions_are_dropped_where_the_configuration_says_so() {
    let pki = Pki::new();
    let dir = tempfile::tempdir().unwrap();
    let tls = pki.issue("server", "", "server");
    let more = "[compaction]\nmode = \"revision\"\nretention = 10\n";
    let server = Store::start(&configure(dir.path(), &tls, more));
    let operator = client(server.address, pki.issue("operator", "", "admin"));
    let mut newest = 0;
    for n in 0..50 {
        let answer = operator.put(put("a", n.to_string())).await.unwrap();
        newest = answer.header.unwrap().revision;
    }
    let at = |revision| RangeRequest {
        key: "a".into(),
        revision,
        ..RangeRequest::default()
    };
    soon("the compaction", async {
        while operator.range(at(newest - 11)).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
    for kept in newest - 10..=newest {
        assert_eq!(operator.range(at(kept)).await.unwrap().kvs.len(), 1);
    }
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_older_than_the_retention_is_dropped() {
    let pki = Pki::new();
    let dir = tempfile::tempdir().unwrap();
    let tls = pki.issue("server", "", "server");
    let more = "[compaction]\nmode = \"periodic\"\nretention = \"1s\"\n";
    let server = Store::start(&configure(dir.path(), &tls, more));
    let operator = client(server.address, pki.issue("operator", "", "admin"));
    let first = operator.put(put("a", "1")).await.unwrap();
    operator.put(put("a", "2")).await.unwrap();
    let old = RangeRequest {
        key: "a".into(),
        revision: first.header.unwrap().revision,
        ..RangeRequest::default()
    };
    soon("the compaction", async {
        while operator.range(old.clone()).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    })
    .await;
    assert_eq!(operator.get("a").await.unwrap().unwrap().value, "2");
    server.stop();
}

fn check_data(arguments: &[&Path]) -> (Option<i32>, Value) {
    let output = Command::new(binary())
        .args(["check-data", "-o", "json"])
        .args(arguments)
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), report)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_of_a_stopped_server_is_looked_through() {
    let pki = Pki::new();
    let dir = tempfile::tempdir().unwrap();
    let tls = pki.issue("server", "", "server");
    let config = configure(dir.path(), &tls, "");
    let server = Store::start(&config);
    let operator = client(server.address, pki.issue("operator", "", "admin"));
    for n in 0..30 {
        operator
            .put(put(format!("k{n}"), "x".repeat(3000)))
            .await
            .unwrap();
    }
    let mut backup = operator.snapshot().await.unwrap();
    while backup.next().await.unwrap().is_some() {}
    operator.put(put("after", "1")).await.unwrap();
    let status = operator.store_status().await.unwrap();
    let revision = status.header.unwrap().revision;

    let flag = |flag: &'static str| Path::new(flag);
    let by_config = [flag("--config"), config.as_path()];
    let (code, report) = check_data(&by_config);
    assert_eq!(code, Some(1), "it runs: {report}");
    assert!(
        report["findings"][0]["text"]
            .as_str()
            .unwrap()
            .contains("in use")
    );
    server.stop();
    let (code, report) = check_data(&by_config);
    assert_eq!(code, Some(0), "{report}");
    assert_eq!(
        (&report["good"], &report["revision"]),
        (&true.into(), &revision.into())
    );
    assert_eq!(report["keys"], 31);

    // A server of a cluster pointed at it.
    let other = dir.path().join("other.toml");
    let text = std::fs::read_to_string(&config).unwrap() + "[cluster]\nname = \"c9\"\nid = 9\n";
    std::fs::write(&other, text).unwrap();
    let (code, report) = check_data(&[flag("--config"), &other]);
    assert_eq!(code, Some(1));
    assert!(
        report["findings"][0]["text"]
            .as_str()
            .unwrap()
            .contains("c9"),
        "{report}"
    );

    // The end of the log cut off, as by a disk that lied.
    let data = dir.path().join("data");
    let database = data.join("log/db");
    let whole = std::fs::read(&database).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    std::fs::write(&database, &whole[..used - 4000]).unwrap();
    let (_, report) = check_data(&[flag("--data-dir"), &data]);
    assert_ne!(report["revision"], revision, "{report}");
    std::fs::write(&database, &whole).unwrap();

    let snapshot = report["snapshots"][0]["path"].as_str().unwrap().to_owned();
    let mut bytes = std::fs::read(&snapshot).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&snapshot, bytes).unwrap();
    let (code, report) = check_data(&[flag("--data-dir"), &data]);
    assert_eq!(code, Some(1), "{report}");
    assert_eq!(report["findings"][0]["object"], snapshot.as_str());
    let text = Command::new(binary())
        .args([flag("check-data"), flag("--data-dir"), &data])
        .output()
        .unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("ERROR: ") && text.contains("NOT GOOD"),
        "{text}"
    );
}
