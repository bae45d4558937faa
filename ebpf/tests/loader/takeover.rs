//! What survives the end of a process, and what the next one finds.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{TcpStream, UdpSocket};
use std::process::{Command, Stdio};

use aya::maps::Array;
use clustermesh_ebpf::abi::LAYOUT_VERSION;
use clustermesh_ebpf::{Datapath, Error, Options, Takeover};

use crate::node::{TCP, UDP, in_node, ip, set_service, tcp_server, udp_server};
use crate::sockets::connect;

const V4: &str = "10.96.0.1:80";
/// How the test passes a node on to its child process.
const CHILD_BPFFS: &str = "CLUSTERMESH_TEST_BPFFS";
const CHILD_CGROUP: &str = "CLUSTERMESH_TEST_CGROUP";
const CHILD_INTERFACE: &str = "CLUSTERMESH_TEST_INTERFACE";

fn renamed_to_version(node: &crate::node::Node, version: u32) {
    let own = format!("_v{LAYOUT_VERSION}");
    for entry in fs::read_dir(node.pins()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if let Some(map) = name.strip_suffix(&own) {
            fs::rename(&path, node.pins().join(format!("{map}_v{version}"))).unwrap();
        }
    }
}

#[test]
fn a_dropped_datapath_keeps_working_and_is_adopted() {
    in_node(|node| {
        let server = tcp_server("127.0.0.1:0");
        let datapath = node.active();
        set_service(datapath.maps(), V4, TCP, 1, &[server]);
        let frontends = datapath.maps().frontends.entries().unwrap();
        drop(datapath);
        assert_eq!(connect(V4).unwrap().1, server);

        let (mut next, takeover) = node.open();
        assert_eq!(takeover, Takeover::Adopted);
        assert_eq!(next.maps().frontends.entries().unwrap(), frontends);
        assert_eq!(connect(V4).unwrap().1, server);
        next.activate(node.cm_net, &[]).unwrap();
        drop(next);
        assert_eq!(connect(V4).unwrap().1, server);
    });
}

#[test]
fn connections_never_fail_while_programs_are_switched() {
    in_node(|node| {
        let server = tcp_server("127.0.0.1:0");
        let mut one = node.active();
        let (mut other, _) = node.open();
        set_service(one.maps(), V4, TCP, 1, &[server]);
        std::thread::scope(|scope| {
            let switcher = scope.spawn(|| {
                for _ in 0..50 {
                    other.activate(node.cm_net, &[]).unwrap();
                    one.activate(node.cm_net, &[]).unwrap();
                }
            });
            let mut connections = 0;
            while !switcher.is_finished() {
                let stream = TcpStream::connect(V4);
                let stream = stream.unwrap_or_else(|e| panic!("connection {connections}: {e}"));
                assert_eq!(stream.peer_addr().unwrap(), V4.parse().unwrap());
                connections += 1;
            }
            assert!(connections > 20, "only {connections} connections");
        });
    });
}

#[test]
fn a_new_layout_is_filled_beside_the_old_one_and_then_switched_to() {
    in_node(|node| {
        let (old_server, new_server) = (tcp_server("127.0.0.1:0"), tcp_server("127.0.0.1:0"));
        let datagrams = udp_server("127.0.0.1:0");
        let mut datapath = node.active();
        ip("link add pod1 type veth peer name eth1");
        datapath.attach_pod(crate::node::ifindex("pod1")).unwrap();
        set_service(datapath.maps(), V4, TCP, 1, &[old_server]);
        set_service(datapath.maps(), V4, UDP, 2, &[datagrams]);
        drop(datapath);
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(V4).unwrap();
        renamed_to_version(node, 0);

        let (next, takeover) = node.open();
        assert_eq!(takeover, Takeover::LayoutChanged { from: vec![0] });
        assert!(next.maps().frontends.is_empty().unwrap());
        assert_eq!(
            connect(V4).unwrap().1,
            old_server,
            "the old programs run on"
        );
        drop(next);

        // Cut off before it was over: the same again.
        let (mut next, takeover) = node.open();
        assert_eq!(takeover, Takeover::LayoutChanged { from: vec![0] });
        set_service(next.maps(), V4, TCP, 1, &[new_server]);
        assert_eq!(connect(V4).unwrap().1, old_server);
        next.activate(node.cm_net, &[]).unwrap();
        assert_eq!(connect(V4).unwrap().1, new_server);
        assert_eq!(
            socket.peer_addr().unwrap(),
            V4.parse().unwrap(),
            "sockets keep what they remember"
        );
        assert_eq!(next.attached_pods().unwrap().len(), 1);
        next.finish_takeover().unwrap();
        drop(next);
        assert_eq!(connect(V4).unwrap().1, new_server);
        let (_next, takeover) = node.open();
        assert_eq!(takeover, Takeover::Adopted);
    });
}

#[test]
fn a_killed_process_leaves_everything_working() {
    in_node(|node| {
        let server = tcp_server("127.0.0.1:0");
        let options = node.options();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "takeover::child_activates_and_waits"])
            .args(["--ignored", "--nocapture"])
            .env(CHILD_BPFFS, &options.bpffs)
            .env(CHILD_CGROUP, options.cgroup.unwrap())
            .env(CHILD_INTERFACE, node.cm_net.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut lines = stdout.lines().map(Result::unwrap);
        assert!(
            lines.any(|line| line.ends_with("active")),
            "no word from the child"
        );

        let (datapath, takeover) = node.open();
        assert_eq!(takeover, Takeover::Adopted);
        set_service(datapath.maps(), V4, TCP, 1, &[server]);
        drop(datapath);
        assert_eq!(connect(V4).unwrap().1, server);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(connect(V4).unwrap().1, server);
        assert_eq!(node.open().1, Takeover::Adopted);
    });
}

#[test]
#[ignore = "the child process of the test above"]
fn child_activates_and_waits() {
    let variable = |name| std::env::var(name).unwrap();
    let options = Options {
        bpffs: variable(CHILD_BPFFS).into(),
        attach_mode: clustermesh_ebpf::AttachMode::detect(),
        cgroup: Some(variable(CHILD_CGROUP).into()),
    };
    let (mut datapath, takeover) = Datapath::open(&options).unwrap();
    assert_eq!(takeover, Takeover::Fresh);
    let interface = variable(CHILD_INTERFACE).parse().unwrap();
    datapath.activate(interface, &[]).unwrap();
    println!("active");
    // Until the parent kills it, or is gone itself.
    let _ = std::io::stdin().read_line(&mut String::new());
}

#[test]
fn a_pinned_map_of_another_shape_is_refused_by_name() {
    in_node(|node| {
        drop(node.open());
        let path = node.pins().join(format!("nodes_v{LAYOUT_VERSION}"));
        fs::remove_file(&path).unwrap();
        let foreign = Array::<_, u32>::create(4, 0).unwrap();
        foreign.pin(&path).unwrap();
        let error = Datapath::open(&node.options()).unwrap_err();
        assert!(
            matches!(error, Error::PinnedMapMismatch { map: "nodes", .. }),
            "{error}"
        );
        assert!(error.to_string().contains("4 entries"), "{error}");
        assert!(path.exists(), "nothing is removed without being asked");
    });
}

#[test]
fn a_folder_that_is_no_bpf_file_system_is_refused_by_name() {
    in_node(|node| {
        let folder = tempfile::tempdir().unwrap();
        for bpffs in [folder.path().to_owned(), folder.path().join("absent")] {
            let options = Options {
                bpffs: bpffs.clone(),
                ..node.options()
            };
            match Datapath::open(&options) {
                Err(Error::BpffsNotMounted { path }) => assert_eq!(path, bpffs),
                other => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn a_folder_that_is_no_cgroup_is_refused_by_name() {
    in_node(|node| {
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            cgroup: Some(folder.path().to_owned()),
            ..node.options()
        };
        let (mut datapath, _) = Datapath::open(&options).unwrap();
        let error = datapath.activate(node.cm_net, &[]).unwrap_err().to_string();
        assert!(error.contains("cgroup2"), "{error}");
        assert!(error.contains(folder.path().to_str().unwrap()), "{error}");
    });
}

#[test]
fn uninstall_removes_every_trace_of_every_layout() {
    in_node(|node| {
        let server = tcp_server("127.0.0.1:0");
        let datapath = node.active();
        set_service(datapath.maps(), V4, TCP, 1, &[server]);
        drop(datapath);
        renamed_to_version(node, 0);
        drop(node.open());
        connect(V4).unwrap();
        Datapath::uninstall(&node.options()).unwrap();
        connect(V4).unwrap_err();
        assert!(!node.pins().exists());
        Datapath::uninstall(&node.options()).unwrap();
        assert_eq!(node.open().1, Takeover::Fresh);
    });
}

#[test]
fn links_of_hooks_that_only_another_build_knows_are_detached() {
    in_node(|node| {
        let server = tcp_server("127.0.0.1:0");
        let mut datapath = node.active();
        set_service(datapath.maps(), V4, TCP, 1, &[server]);
        let links = node.pins().join("links");
        let unknown = links.join("socket_bind4");
        fs::rename(links.join("socket_connect4"), &unknown).unwrap();
        datapath.activate(node.cm_net, &[]).unwrap();
        assert!(!unknown.exists());
        fs::rename(links.join("socket_connect4"), &unknown).unwrap();
        connect(V4).unwrap();
        Datapath::uninstall(&node.options()).unwrap();
        connect(V4).unwrap_err();
    });
}
