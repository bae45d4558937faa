//! The agent without a server, on a machine made of namespaces: CNI calls, restarts, two agents. Needs root.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write as _;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

const START_WAIT: Duration = Duration::from_secs(10);
/// Every machine has loopback to itself.
const ADMIN_PORT: u16 = 9964;

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {error}");
}

/// Namespaces `host` and `pod`, a BPF file system and an agent; removed at the end.
struct Machine {
    dir: tempfile::TempDir,
    host: String,
    pod: String,
    agent: Option<Child>,
}

impl Machine {
    fn new() -> Self {
        static MACHINES: AtomicU32 = AtomicU32::new(0);
        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{number}", std::process::id());
        let machine = Self {
            dir: tempfile::tempdir().unwrap(),
            host: format!("cmn{id}-host"),
            pod: format!("cmn{id}-pod"),
            agent: None,
        };
        for folder in ["bpf", "state", "run"] {
            fs::create_dir(machine.path(folder)).unwrap();
        }
        let bpffs = machine.path("bpf");
        mount(
            Some("bpf"),
            &bpffs,
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let (host, pod) = (&machine.host, &machine.pod);
        ip(&format!("netns add {host}"));
        ip(&format!("netns add {pod}"));
        ip(&format!(
            "link add u0 netns {host} type veth peer name u1 netns {pod}"
        ));
        ip(&format!("-n {host} addr add 192.0.2.1/24 dev u0"));
        ip(&format!("-n {host} link set u0 up"));
        ip(&format!("-n {host} link set lo up"));
        let dir = machine.dir.path().display();
        let config = format!(
            "node = \"e1\"\ncluster = \"east\"\nstate_dir = \"{dir}/state\"\nrun_dir = \"{dir}/run\"\n\
             bpffs = \"{dir}/bpf\"\ncgroup = \"\"\nunderlay_devices = [\"u0\"]\nadmin = \"127.0.0.1:{ADMIN_PORT}\"\n\
             [server]\nendpoints = [\"http://127.0.0.1:1\"]\n"
        );
        fs::write(machine.path("node.toml"), config).unwrap();
        // What an earlier run learnt from its server.
        let facts = r#"{"cluster_id":1,"max_connected_clusters":255,"pod_cidr_v4":"10.1.0.0/24",
            "pod_cidr_v6":"fd00:1::/64","cluster_pod_cidrs":["10.1.0.0/16"]}"#;
        fs::write(machine.path("state/node.json"), facts).unwrap();
        let workloads =
            r#"[{"namespace":"shop","name":"web-0","labels":{"app":"web"},"identity":65836}]"#;
        fs::write(machine.path("state/workloads.json"), workloads).unwrap();
        machine
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn node(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.host))
            .arg(env!("CARGO_BIN_EXE_clustermesh-node"))
            .arg("--config")
            .arg(self.path("node.toml"))
            .args(arguments)
            .stderr(Stdio::piped());
        command
    }

    fn start(&mut self) {
        let agent = self.node(&[]).stderr(Stdio::inherit()).spawn().unwrap();
        self.agent = Some(agent);
        let deadline = Instant::now() + START_WAIT;
        while !self.node(&["status"]).output().unwrap().status.success() {
            assert!(Instant::now() < deadline, "the agent does not answer");
        }
    }

    fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    fn cni(&self, command: &str, container: &str, netns: &str) -> (bool, serde_json::Value) {
        let dir = self.dir.path().display();
        let config = format!(
            r#"{{"cniVersion":"1.1.0","name":"m","type":"clustermesh-cni","socket":"{dir}/run/agent.sock","queueDir":"{dir}/state/cni-queue"}}"#
        );
        let mut plugin = Command::new(env!("CARGO_BIN_EXE_clustermesh-cni"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", container)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        plugin
            .stdin
            .take()
            .unwrap()
            .write_all(config.as_bytes())
            .unwrap();
        let output = plugin.wait_with_output().unwrap();
        let json = serde_json::from_slice(&output.stdout).unwrap_or(serde_json::Value::Null);
        (output.status.success(), json)
    }

    /// Code and body of an admin page.
    fn page(&self, path: &str) -> (String, String) {
        let url = format!("http://127.0.0.1:{ADMIN_PORT}{path}");
        let output = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.host))
            .args(["curl", "-s", "-w", "\n%{http_code}", &url])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, code) = text.rsplit_once('\n').unwrap();
        (code.to_owned(), body.to_owned())
    }

    fn ping(&self, target: &str) -> Output {
        Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.host))
            .args(["ping", "-c1", "-W1", target])
            .output()
            .unwrap()
    }

    fn pod_netns(&self) -> String {
        Path::new("/run/netns")
            .join(&self.pod)
            .display()
            .to_string()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        for netns in [&self.host, &self.pod] {
            let _ = Command::new("ip").args(["netns", "delete", netns]).status();
        }
        let _ = umount2(&self.path("bpf"), MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_pod_is_attached_without_a_server_outlives_the_agent_and_leaves_by_a_queued_del() {
    let mut machine = Machine::new();
    machine.start();
    let netns = machine.pod_netns();

    let (ok, result) = machine.cni("ADD", "c1", &netns);
    assert!(ok, "{result}");
    assert_eq!(result["ips"][0]["address"], "10.1.0.4/32");
    assert_eq!(
        machine.cni("ADD", "c1", &netns).1,
        result,
        "ADD is idempotent"
    );
    assert!(machine.cni("CHECK", "c1", &netns).0);
    for target in ["10.1.0.4", "fd00:1::4"] {
        assert!(machine.ping(target).status.success(), "{target}");
    }

    // A namespace that is gone: a clean error, and the address is free again.
    let (ok, error) = machine.cni("ADD", "c2", "/run/netns/cmn-none");
    assert!(!ok);
    assert_eq!(error["code"], 102, "{error}");
    // The interface name is taken inside: another clean error.
    let (ok, error) = machine.cni("ADD", "c3", &netns);
    assert!(!ok, "{error}");
    assert!(machine.ping("10.1.0.4").status.success());

    // A second agent on the same state says so and changes nothing.
    let second = machine.node(&["run"]).output().unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("another clustermesh-node"), "{text}");

    machine.kill();
    assert!(machine.ping("10.1.0.4").status.success(), "traffic goes on");
    assert!(machine.cni("DEL", "c1", &netns).0, "DEL is queued");

    machine.start();
    let deadline = Instant::now() + START_WAIT;
    while machine.ping("10.1.0.4").status.success() {
        assert!(
            Instant::now() < deadline,
            "the queued DEL is not carried out"
        );
    }
    assert!(machine.cni("DEL", "c1", &netns).0, "DEL is idempotent");
    let status = machine.node(&["status", "-o", "json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["endpoints"], serde_json::json!([]));
    assert_eq!(status["map_entries"]["interfaces"], 0);
}

/// Packets that entered the host's stack on a pod's interface itself: the kernel programs let none.
fn unprogrammed(machine: &Machine) -> u64 {
    let counted = ["iptables", "ip6tables"].map(|tables| {
        let output = Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", machine.host))
            .args([tables, "-t", "raw", "-nvxL", "PREROUTING"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let rule = text.lines().find(|line| line.contains("cm+")).unwrap();
        let packets = rule.split_whitespace().next().unwrap();
        packets.parse::<u64>().unwrap()
    });
    counted.iter().sum()
}

#[test]
fn nothing_of_a_pod_passes_before_its_program_is_attached() {
    let mut machine = Machine::new();
    machine.start();
    for tables in ["iptables", "ip6tables"] {
        for rule in ["-i cm_host -j ACCEPT", "-i cm+"] {
            let status = Command::new("nsenter")
                .arg(format!("--net=/run/netns/{}", machine.host))
                .args([tables, "-t", "raw", "-A", "PREROUTING"])
                .args(rule.split(' '))
                .status();
            assert!(status.unwrap().success());
        }
    }
    // The pod sends as soon as, and as fast as, it can.
    let netns = machine.pod_netns();
    let is_over = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let (netns, is_over) = (&netns, &is_over);
        let sender = scope.spawn(move || {
            setns(fs::File::open(netns).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            let sockets = [
                ("0.0.0.0:0", "203.0.113.9:9"),
                ("[::]:0", "[2001:db8::9]:9"),
            ]
            .map(|(own, to)| (UdpSocket::bind(own).unwrap(), to));
            let mut sent = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                for (socket, to) in &sockets {
                    sent += u64::from(socket.send_to(b"early", to).is_ok());
                }
            }
            sent
        });
        for container in ["c1", "c2", "c3"] {
            let (ok, result) = machine.cni("ADD", container, netns);
            assert!(ok, "{result}");
            let router = Command::new("nsenter")
                .args([&format!("--net={netns}"), "ping", "-c1", "-W1", "10.1.0.1"])
                .output()
                .unwrap();
            assert!(
                router.status.success(),
                "the pod reaches its router at once"
            );
            assert!(machine.cni("DEL", container, netns).0);
        }
        is_over.store(true, Ordering::Relaxed);
        sender.join().unwrap()
    });
    assert!(sent > 100, "{sent} datagrams are too few to tell");
    assert_eq!(unprogrammed(&machine), 0);
}

#[test]
fn a_restart_without_a_server_keeps_the_hosts_routes_to_peers_pods() {
    let mut machine = Machine::new();
    machine.start();
    machine.kill();
    // As an agent that had listed a peer's nodes left it.
    let host = machine.host.clone();
    ip(&format!(
        "-n {host} route add 10.2.0.0/24 dev cm_host proto 88 scope link"
    ));
    ip(&format!(
        "-n {host} route change 10.1.0.0/16 dev cm_host proto 88 scope link mtu 1300"
    ));
    machine.start();
    let routes = Command::new("ip")
        .args(["-n", &host, "route", "show", "dev", "cm_host"])
        .output()
        .unwrap();
    let routes = String::from_utf8_lossy(&routes.stdout).into_owned();
    assert!(routes.contains("10.2.0.0/24"), "{routes}");
    let renewed = routes
        .lines()
        .find(|route| route.starts_with("10.1.0.0/16"))
        .unwrap();
    assert!(renewed.contains("mtu 1450"), "{routes}");
}

/// Asks until the answer is as it should be.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + 3 * START_WAIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
    }
}

#[test]
fn a_del_queued_while_the_agent_runs_is_carried_out_and_one_before_an_add_is_dropped() {
    let mut machine = Machine::new();
    machine.start();
    let netns = machine.pod_netns();
    let queued = || fs::read_dir(machine.path("state/cni-queue")).map_or(0, Iterator::count);
    // A plugin that does not reach the agent, which is there.
    let unreached = |container: &str| {
        let socket = machine.path("run/agent.sock");
        let aside = machine.path("run/aside");
        fs::rename(&socket, &aside).unwrap();
        let ok = machine.cni("DEL", container, &netns).0;
        fs::rename(&aside, &socket).unwrap();
        assert!(ok, "DEL is queued");
    };
    unreached("c1");
    let (ok, result) = machine.cni("ADD", "c1", &netns);
    assert!(ok, "{result}");
    assert_eq!(queued(), 0);
    assert!(machine.ping("10.1.0.4").status.success());
    unreached("c1");
    until("the queued DEL is not carried out", || {
        queued() == 0 && !machine.ping("10.1.0.4").status.success()
    });
}

#[test]
fn the_service_manager_hears_of_the_local_api_and_the_page_of_what_is_missing() {
    let mut machine = Machine::new();
    let manager = std::os::unix::net::UnixDatagram::bind(machine.path("notify")).unwrap();
    manager.set_read_timeout(Some(START_WAIT)).unwrap();
    let agent = machine
        .node(&[])
        .env("NOTIFY_SOCKET", machine.path("notify"))
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    machine.agent = Some(agent);
    let mut message = [0; 64];
    let length = manager.recv(&mut message).unwrap();
    assert_eq!(&message[..length], b"READY=1\n");
    // No server has been reached: pods come and go all the same.
    assert!(machine.node(&["status"]).output().unwrap().status.success());
    assert!(machine.cni("ADD", "c1", &machine.pod_netns()).0);
    let (code, body) = machine.page("/readyz");
    assert_eq!(
        (code.as_str(), body.trim()),
        ("503", "waiting for: first complete listing in the kernel")
    );
    assert_eq!(machine.page("/livez").0, "200");
}

#[test]
fn a_changed_underlay_is_followed_and_one_that_cannot_be_used_is_reported() {
    let mut machine = Machine::new();
    machine.start();
    let host = machine.host.clone();
    let metric = |line: &str| {
        let (_, text) = machine.page("/metrics");
        text.lines()
            .any(|held| held == format!("clustermesh_node_{line}"))
    };
    let routes = || {
        let output = Command::new("ip")
            .args(["-n", &host, "route", "show", "dev", "cm_host"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(metric("underlay_unusable 0"));
    ip(&format!("-n {host} link set u0 mtu 1400"));
    until("routes do not follow the MTU", || {
        routes().contains("mtu 1350")
    });
    until("the change is not counted", || {
        metric("underlay_changes_total 1")
    });

    ip(&format!("-n {host} link delete u0"));
    until("nobody says that the device is gone", || {
        metric("underlay_unusable 1")
    });
    ip(&format!("-n {host} link add u0 type veth peer name u2"));
    ip(&format!("-n {host} addr add 192.0.2.7/24 dev u0"));
    ip(&format!("-n {host} link set u0 up"));
    until("the new device is not followed", || {
        metric("underlay_unusable 0") && metric("underlay_changes_total 2")
    });
    let status = machine.node(&["status", "-o", "json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(
        status["underlay_addresses"],
        serde_json::json!(["192.0.2.7"])
    );
    let links: Vec<String> = ["links", "filters"]
        .iter()
        .flat_map(|kind| fs::read_dir(machine.path("bpf/clustermesh").join(kind)).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("from_network"))
        .collect();
    let show = Command::new("ip")
        .args(["-n", &host, "-o", "link", "show", "u0"])
        .output()
        .unwrap();
    let show = String::from_utf8_lossy(&show.stdout).into_owned();
    let index = show.split(':').next().unwrap();
    assert_eq!(links, [format!("from_network-{index}")]);
}

#[test]
fn an_underlay_device_without_an_ethernet_header_is_refused_by_name() {
    let machine = Machine::new();
    let host = machine.host.clone();
    ip(&format!("-n {host} link delete u0"));
    ip(&format!("-n {host} tuntap add dev u0 mode tun"));
    ip(&format!("-n {host} addr add 192.0.2.7/24 dev u0"));
    ip(&format!("-n {host} link set u0 up"));
    let output = machine.node(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("u0 has no Ethernet header") && said.contains("underlay_devices"),
        "{said}"
    );
}
