//! A backup under load, and what is made of it: content, new ids, and watchers that learn to begin anew.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clustermesh_api::etcd::rpc::{PutRequest, WatchCreateRequest};
use clustermesh_client::{Client, ClientConfig, TlsPaths};
use clustermesh_integration::lab::binaries_folder;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// What `snapshot restore` adds to the revision.
const BUMP: i64 = 1_000_000_000;

struct Desk {
    folder: tempfile::TempDir,
    servers: Vec<Child>,
}

impl Drop for Desk {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, future).await;
    waited.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

impl Desk {
    fn new() -> Self {
        let desk = Self {
            folder: tempfile::tempdir().unwrap(),
            servers: Vec::new(),
        };
        let pki = desk.path("pki");
        let dir = pki.to_str().unwrap();
        desk.done(&["dev-ca", "init", "--dir", dir]);
        let issue = ["dev-ca", "issue", "--cluster", "c1", "--dir", dir];
        desk.done(&[&issue[..], &["server", "server", "--san", "127.0.0.1"]].concat());
        desk.done(&[&issue[..], &["operator", "admin"]].concat());
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn operator(&self) -> TlsPaths {
        TlsPaths {
            ca: self.path("pki/ca.crt"),
            cert: self.path("pki/admin.crt"),
            key: self.path("pki/admin.key"),
        }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(binaries_folder().unwrap().join("clustermesh"))
            .args(arguments)
            .output()
            .unwrap()
    }

    /// Its standard output; it must succeed.
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// The same against a server.
    fn ask(&self, address: SocketAddr, arguments: &[&str]) -> String {
        let tls = self.operator();
        let endpoint = format!("https://{address}");
        let global = [
            "--endpoint",
            &endpoint,
            "--ca",
            tls.ca.to_str().unwrap(),
            "--cert",
            tls.cert.to_str().unwrap(),
            "--key",
            tls.key.to_str().unwrap(),
        ];
        self.done(&[&global[..], arguments].concat())
    }

    /// A plain store with its data in `data`; `replica` is that section of its configuration.
    fn serve(&mut self, data: &str, replica: &str) -> SocketAddr {
        let address = free_address();
        let pki = self.path("pki");
        let text = format!(
            "data_dir = \"{data}\"\nlisten_client = \"{address}\"\nlisten_admin = \"127.0.0.1:0\"\n\
             [tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n{replica}",
            pki.join("ca.crt"),
            pki.join("server.crt"),
            pki.join("server.key")
        );
        let config = self.path(&format!("{data}.toml"));
        std::fs::write(&config, text).unwrap();
        let server = Command::new(binaries_folder().unwrap().join("clustermesh-server"))
            .args([Path::new("--config"), &config])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.servers.push(server);
        address
    }

    async fn client(&self, address: SocketAddr) -> Client {
        let config = ClientConfig {
            endpoints: vec![format!("https://{address}")],
            tls: Some(self.operator()),
            server_name: None,
        };
        let client = Client::new(&config).unwrap();
        within("the server answers", async {
            while client.get("a").await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        client
    }
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..PutRequest::default()
    }
}

/// Writes keys of its own until it is told to end: (key, revision) of what was acknowledged.
async fn write(client: Client, name: usize, stop: Arc<AtomicBool>) -> Vec<(String, i64)> {
    let mut written = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let key = format!("w{name}-{}", written.len());
        let answer = client.put(put(&key, &key)).await.unwrap();
        written.push((key, answer.header.unwrap().revision));
    }
    written
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_becomes_a_new_store_with_all_of_its_content() {
    let mut desk = Desk::new();
    let address = desk.serve("old", "");
    let client = desk.client(address).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..8)
        .map(|name| tokio::spawn(write(client.clone(), name, Arc::clone(&stop))))
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let file = desk.path("backup");
    let backup = file.to_str().unwrap();
    let saved: Value =
        serde_json::from_str(&desk.ask(address, &["snapshot", "save", backup, "-o", "json"]))
            .unwrap();
    stop.store(true, Ordering::Relaxed);
    let mut written = Vec::new();
    for writer in writers {
        written.extend(writer.await.unwrap());
    }
    let status: Value =
        serde_json::from_str(&desk.done(&["snapshot", "status", backup, "-o", "json"])).unwrap();
    let revision = status["revision"].as_i64().unwrap();
    assert_eq!(status["sha256"], saved["sha256"]);
    let (inside, after): (Vec<_>, Vec<_>) = written
        .iter()
        .partition(|(_, written)| *written <= revision);
    assert!(
        !inside.is_empty() && !after.is_empty(),
        "writes went on meanwhile"
    );
    assert_eq!(status["keys"], inside.len());

    let new = desk.path("new");
    let restore = ["snapshot", "restore", backup, "--data-dir"];
    desk.done(&[&restore[..], &[new.to_str().unwrap()]].concat());
    let again = desk.refused(&[&restore[..], &[new.to_str().unwrap()]].concat());
    assert!(again.contains("not empty"), "{again}");
    let address = desk.serve("new", "");
    let client = desk.client(address).await;
    for (key, _) in &inside {
        let found = client.get(key.clone()).await.unwrap().unwrap();
        assert_eq!(found.value, key.as_bytes());
    }
    for (key, _) in &after {
        assert!(client.get(key.clone()).await.unwrap().is_none(), "{key}");
    }
    let bumped = revision + BUMP;
    let watch = WatchCreateRequest {
        key: "a".into(),
        start_revision: revision + 1,
        ..WatchCreateRequest::default()
    };
    let mut watch = client.watch([watch]).await.unwrap();
    let ended = within("the watch ends", async {
        loop {
            let response = watch.next().await.unwrap().unwrap();
            if response.canceled {
                return response;
            }
        }
    })
    .await;
    assert_eq!(ended.compact_revision, bumped);
    let next = client.put(put("next", "1")).await.unwrap().header.unwrap();
    assert_eq!(next.revision, bumped + 1);
    assert_ne!(format!("{:016x}", next.cluster_id), status["clusterID"]);

    let shown: Value = serde_json::from_str(&desk.ask(address, &["status", "-o", "json"])).unwrap();
    assert_eq!(shown["replicas"][0]["state"], "leader");
    assert_eq!(shown["replicas"][0]["revision"], bumped + 1);
    assert_eq!(desk.ask(address, &["alarm", "list"]), "no alarms\n");
    let members: Value =
        serde_json::from_str(&desk.ask(address, &["member", "list", "-o", "json"])).unwrap();
    assert_eq!(members[0]["kind"], "voter");

    // A file that was touched, or cut off, is refused by name.
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[600] ^= 1;
    let touched = desk.path("touched");
    std::fs::write(&touched, &bytes).unwrap();
    std::fs::write(desk.path("cut"), &bytes[..bytes.len() - 40]).unwrap();
    for (name, told) in [("touched", "SHA-256"), ("cut", "cut off")] {
        let path = desk.path(name);
        let error = desk.refused(&["snapshot", "status", path.to_str().unwrap()]);
        assert!(error.contains(told) && error.contains(name), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_are_restored_from_one_backup() {
    let mut desk = Desk::new();
    let address = desk.serve("old", "");
    desk.client(address).await.put(put("a", "1")).await.unwrap();
    let file = desk.path("backup");
    let backup = file.to_str().unwrap();
    desk.ask(address, &["snapshot", "save", backup]);
    let peers: Vec<SocketAddr> = (0..3).map(|_| free_address()).collect();
    let list: Vec<String> = (1..=3)
        .zip(&peers)
        .map(|(number, peer)| format!("r{number}=https://{peer}"))
        .collect();
    let members = list.join(",");
    let mut token = String::new();
    let mut clients = Vec::new();
    for (number, peer) in (1..=3).zip(&peers) {
        let name = format!("r{number}");
        let data = desk.path(&name);
        let mut arguments = vec!["snapshot", "restore", backup, "--data-dir"];
        arguments.extend([data.to_str().unwrap(), "--name", &name, "-o", "json"]);
        arguments.extend(["--initial-cluster", &members]);
        if !token.is_empty() {
            arguments.extend(["--token", &token]);
        }
        let restored: Value = serde_json::from_str(&desk.done(&arguments)).unwrap();
        token = restored["token"].as_str().unwrap().to_owned();
        let replica = format!(
            "[replica]\nname = \"{name}\"\nlisten_peer = \"{peer}\"\ninitial_cluster = {list:?}\n"
        );
        clients.push(desk.serve(&name, &replica));
    }
    for address in &clients {
        let client = desk.client(*address).await;
        let found = client.get("a").await.unwrap().unwrap();
        assert_eq!(found.value, "1");
        client.put(put(&address.to_string(), "x")).await.unwrap();
    }
    let shown: Value =
        serde_json::from_str(&desk.ask(clients[0], &["status", "-o", "json"])).unwrap();
    let states: Vec<&str> = shown["replicas"]
        .as_array()
        .unwrap()
        .iter()
        .map(|replica| replica["state"].as_str().unwrap())
        .collect();
    assert_eq!(states.len(), 3);
    assert_eq!(
        states.iter().filter(|state| **state == "leader").count(),
        1,
        "{shown}"
    );
}
