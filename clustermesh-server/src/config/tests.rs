use super::*;

const GOOD: &str = r#"
[cluster]
name = "c1"
id = 1
pod_cidr_v4 = "10.1.0.0/16"
pod_cidr_v6 = "fd00:1::/48"
service_cidr_v4 = "10.101.0.0/16"

[tls]
ca = "ca.pem"
cert = "/etc/cert.pem"
key = "key.pem"

[[peers]]
name = "c2"
endpoints = ["192.0.2.2:2379"]
cert = "remote.pem"
key = "remote.key"
"#;

fn load(text: &str) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("server.toml");
    std::fs::write(&path, text).unwrap();
    let mut config = Config::load(&path)?;
    for file in [&mut config.tls.ca, &mut config.tls.key] {
        *file = file.strip_prefix(dir.path()).unwrap_or(file).to_path_buf();
    }
    Ok(config)
}

fn refused(from: &str, to: &str) -> String {
    assert!(GOOD.contains(from), "{from}");
    load(&GOOD.replace(from, to)).unwrap_err().to_string()
}

#[test]
fn a_small_file_gets_the_defaults() {
    let config = load(GOOD).unwrap();
    assert_eq!(config.listen_client.port(), 2379);
    assert_eq!(config.listen_admin, "127.0.0.1:9962".parse().unwrap());
    assert_eq!(config.tls.ca, PathBuf::from("ca.pem"));
    assert_eq!(config.tls.cert, PathBuf::from("/etc/cert.pem"));
    assert_eq!(
        config.compaction.policy(),
        Ok(clustermesh_raft::AutoCompaction::Age {
            keep: std::time::Duration::from_secs(3_600)
        })
    );
    assert_eq!(config.cluster.as_ref().unwrap().max_connected_clusters, 255);
    let peer = config.peer_tls_paths(&config.peers[0]);
    assert!(peer.cert.ends_with("remote.pem") && peer.ca.ends_with("ca.pem"));
}

#[test]
fn unknown_keys_are_refused_with_their_line() {
    let error = refused("id = 1", "id = 1\nidd = 2");
    assert!(error.contains("idd") && error.contains("line 5"), "{error}");
}

#[test]
fn impossible_values_are_refused_with_their_key() {
    for (from, to, key) in [
        (
            "[cluster]",
            "listen_client = \"localhost:2379\"\n[cluster]",
            "\"localhost:2379\" is not ADDRESS:PORT",
        ),
        (
            "[cluster]",
            "listen_client_clear = \"2379\"\n[cluster]",
            "\"2379\" is not ADDRESS:PORT",
        ),
        ("id = 1", "id = 256", "cluster.id"),
        ("id = 1", "id = 0", "cluster.id"),
        ("name = \"c1\"", "name = \"C1\"", "cluster.name"),
        ("name = \"c1\"", "name = \"default\"", "cluster.name"),
        ("name = \"c2\"", "name = \"c1\"", "peers[0].name"),
        (
            "id = 1",
            "id = 1\nmax_connected_clusters = 300",
            "cluster.max_connected_clusters",
        ),
        ("10.101.0.0/16", "10.1.7.0/24", "cluster.service_cidr"),
        (
            "id = 1",
            "id = 1\nnode_mask_size_v4 = 8",
            "cluster.node_mask_size_v4",
        ),
        ("192.0.2.2:2379", "192.0.2.2", "peers[0].endpoints"),
        ("key = \"remote.key\"", "", "peers[0].cert"),
        (
            "[cluster]",
            "listen_admin = \"0.0.0.0:9962\"\n[cluster]",
            "listen_admin",
        ),
        (
            "[cluster]",
            "listen_client_clear = \"192.0.2.1:2379\"\n[cluster]",
            "listen_client_clear",
        ),
        (
            "[cluster]",
            "auth_token_ttl_seconds = 0\n[cluster]",
            "auth_token_ttl_seconds",
        ),
        (
            "[cluster]",
            "watch_progress_notify_interval_ms = 10\n[cluster]",
            "watch_progress_notify_interval_ms",
        ),
        (
            "[cluster]",
            "snapshot_log_bytes = 1000\n[cluster]",
            "snapshot_log_bytes",
        ),
        (
            "[cluster]",
            "drain_seconds = 4000\n[cluster]",
            "drain_seconds",
        ),
        ("[tls]", "[log]\nformat = \"xml\"\n[tls]", "log.format"),
    ] {
        let error = refused(from, to);
        assert!(error.contains(key), "{to}: {error}");
    }
}

#[test]
fn a_plain_store_has_no_peers() {
    let without = "[tls]\nca='a'\ncert='b'\nkey='c'\n";
    assert!(load(without).unwrap().cluster.is_none());
    let error = load(&format!(
        "{without}[[peers]]\nname='c2'\nendpoints=['h:1']\n"
    ))
    .unwrap_err();
    assert!(error.to_string().contains("plain store"), "{error}");
}

#[test]
fn a_replica_names_the_group_that_it_begins_or_joins() {
    let section = |rest: &str| format!("{GOOD}\n[replica]\nname = \"r1\"\n{rest}");
    let list =
        r#"initial_cluster = ["r1=https://s1:2380", "r2=https://s2:2380", "r3=https://s3:2380"]"#;
    let replica = load(&section(list)).unwrap().replica.unwrap();
    assert_eq!(replica.own_peer_url(), "https://s1:2380");
    assert!(
        matches!(replica.start(), clustermesh_raft::Start::Static(members) if members.len() == 3)
    );
    let join = "peer_url = \"https://s4:2380\"\njoin = [\"https://s1:2380\"]";
    let replica = load(&section(join)).unwrap().replica.unwrap();
    assert!(matches!(replica.start(), clustermesh_raft::Start::Join(_)));
    for (wrong, key) in [
        ("", "replica.initial_cluster"),
        ("join = [\"https://s1:2380\"]", "replica.peer_url"),
        (
            "peer_url = \"s4:2380\"\njoin = [\"https://s1:2380\"]",
            "replica.peer_url",
        ),
        (
            "client_urls = [\"s1\"]\ninitial_cluster = [\"r1=https://s1:2380\"]",
            "replica.client_urls",
        ),
        (
            "initial_cluster = [\"r2=https://s2:2380\"]",
            "replica.peer_url",
        ),
        (
            "initial_cluster = [\"r1=http://s1:2380\"]",
            "https://HOST:PORT",
        ),
        (
            "initial_cluster = [\"r1=https://s1:2380\", \"r2=https://s2:2380\"]",
            "1, 3 or 5",
        ),
        (
            "election_timeout_ms = 100\ninitial_cluster = [\"r1=https://s1:2380\"]",
            "replica.election_timeout_ms",
        ),
    ] {
        let reason = load(&section(wrong)).unwrap_err().to_string();
        assert!(reason.contains(key), "{wrong}: {reason}");
    }
}

/// Key, default and meaning, as `docs/server.md` lists them.
fn documented() -> Vec<(String, String)> {
    let cell = |text: &str| text.trim().trim_matches('`').to_owned();
    include_str!("../../../docs/server.md")
        .lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split('|');
            Some((cell(cells.next()?), cell(cells.next()?)))
        })
        .collect()
}

/// What a section may hold, as its refusal of another key says it.
fn keys_of<T: serde::de::DeserializeOwned + std::fmt::Debug>(section: &str) -> Vec<String> {
    let error = toml::from_str::<T>("unheard_of = 0").unwrap_err();
    let expected = error.message().split("expected").nth(1).unwrap_or_default();
    let keys = expected.split('`').skip(1).step_by(2);
    keys.map(|key| format!("{section}{key}")).collect()
}

#[test]
fn the_reference_lists_every_key_and_no_other() {
    let sections = [
        "cluster",
        "tls",
        "replica",
        "peers",
        "limits",
        "compaction",
        "log",
    ];
    let mut keys = keys_of::<Config>("");
    keys.retain(|key| !sections.contains(&key.as_str()));
    keys.extend(keys_of::<ClusterConfig>("cluster."));
    keys.extend(keys_of::<TlsConfig>("tls."));
    keys.extend(keys_of::<ReplicaSection>("replica."));
    keys.extend(keys_of::<PeerConfig>("peers."));
    keys.extend(keys_of::<LimitsConfig>("limits."));
    keys.extend(keys_of::<CompactionConfig>("compaction."));
    keys.extend(keys_of::<LogConfig>("log."));
    keys.sort();
    let mut listed: Vec<_> = documented().into_iter().map(|(key, _)| key).collect();
    listed.sort();
    assert_eq!(listed, keys);
}

#[test]
fn the_reference_tells_the_defaults() {
    let base = format!(
        "{GOOD}\n[replica]\nname = \"r1\"\npeer_url = \"https://a:1\"\njoin = [\"https://b:1\"]\n"
    );
    let read = |table: &toml::Table| {
        let text = toml::to_string(table).unwrap();
        Config::parse(&text, Path::new("server.toml")).unwrap()
    };
    let base: toml::Table = base.parse().unwrap();
    let mut told = 0;
    for (key, default) in documented() {
        if ["none", "required"].contains(&default.as_str()) {
            continue;
        }
        told += 1;
        let value: toml::Table = format!("default = {default}").parse().unwrap();
        let mut said = base.clone();
        let (table, name) = match key.split_once('.') {
            Some((section, name)) => (
                said.entry(section)
                    .or_insert_with(|| toml::Table::new().into())
                    .as_table_mut()
                    .unwrap(),
                name,
            ),
            None => (&mut said, key.as_str()),
        };
        let before = table.insert(name.to_owned(), value["default"].clone());
        // `join` stands there for want of what the group begins with.
        if before.is_none() {
            assert_eq!(read(&said), read(&base), "{key} = {default}");
        }
    }
    assert!(told > 20, "{told}");
}
