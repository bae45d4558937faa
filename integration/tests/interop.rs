//! The tunnel speaks to others: one node is the kernel's own VXLAN device, without any program of ours.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clustermesh_ebpf_abi::TUNNEL_MAC_DESTINATION;
use clustermesh_integration::lab::host::{command_in, ip_batch, netns_path, run, sh};
use clustermesh_integration::lab::node::Node;
use clustermesh_integration::lab::pod::Pod;
use clustermesh_integration::lab::process::Process;
use clustermesh_integration::lab::tap::in_netns;
use clustermesh_integration::lab::{Lab, LabConfig};
use clustermesh_integration::scenario::{NAMESPACE, until, workload};
use nix::sys::signal::Signal;
use serde_json::json;

/// Bytes of the long transfers: one each way, one in each family.
const LONG_BYTES: u64 = 200_000_000;
/// Bytes of the other way in each family.
const SHORT_BYTES: u64 = 20_000_000;
/// Bytes of each captured frame that are kept: all headers.
const CAPTURED_BYTES: &str = "160";
/// Largest IP packet on the underlay, bytes.
const IP_BYTES_MAX: u64 = 1_500;
/// Pod addresses behind the foreign node.
const FOREIGN_V4: &str = "10.1.200.";
const FOREIGN_V6: &str = "fd0c:1:0:c8::";
/// Largest packet of the foreign pod: 1,500 less 50 of the tunnel over IPv4.
const POD_MTU: u32 = 1_450;
/// Port of the transfers.
const PORT: u16 = 9_000;
/// Longest that a peer of a transfer may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Registers the foreign node and its pod in the store, as their owner's tools would.
async fn register(lab: &Lab, identity: u64) {
    let store = lab.cluster(0).store().unwrap();
    let (underlay, _) = lab.cluster(0).node(1).underlay_addresses();
    let node = json!({
        "Name": "foreign", "Cluster": "a", "ClusterID": 1, "Source": "custom-resource",
        "IPAddresses": [{"Type": "InternalIP", "IP": underlay}],
        "IPv4AllocCIDR": {"IP": format!("{FOREIGN_V4}0"), "Mask": "////AA=="},
        "IPv6AllocCIDR": {"IP": FOREIGN_V6, "Mask": "//////////8AAAAAAAAAAA=="},
    });
    store
        .put("cilium/state/nodes/v1/a/foreign", node.to_string())
        .await
        .unwrap();
    for address in foreign_addresses() {
        let pair = json!({
            "IP": address, "Mask": null, "HostIP": underlay, "ID": identity, "Key": 0, "Metadata": "",
            "K8sNamespace": NAMESPACE, "K8sPodName": "foreign",
        });
        store
            .put(
                &format!("cilium/state/ip/v1/default/{address}"),
                pair.to_string(),
            )
            .await
            .unwrap();
    }
}

fn foreign_addresses() -> [IpAddr; 2] {
    [format!("{FOREIGN_V4}4"), format!("{FOREIGN_V6}4")].map(|text| text.parse().unwrap())
}

/// Makes the kernel's device and a routed pod behind it; gives the pod's namespace.
async fn foreign_node(node: &Node, ours: &Node, our_cidrs: &[String], identity: u64) -> String {
    let host = node.netns();
    let pod = format!("{host}-foreign");
    sh("ip", &["netns", "add", &pod]).await.unwrap();
    for setting in ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"] {
        let mut command = command_in(host, None, Path::new("sysctl"));
        run(command.args(["-qw", setting])).await.unwrap();
    }
    let mut lines = format!(
        "link add pod0 type veth peer name eth0 netns {pod}\n\
         link set pod0 address 02:00:00:00:00:01 mtu {POD_MTU} up\n\
         addr add {FOREIGN_V4}1/32 dev pod0\naddr add {FOREIGN_V6}1/128 dev pod0 nodad\n\
         route add {FOREIGN_V4}4 dev pod0\nroute add {FOREIGN_V6}4 dev pod0\n"
    );
    // Our programs answer to one hardware address inside the tunnel; nobody asks for it.
    let mac = TUNNEL_MAC_DESTINATION.map(|byte| format!("{byte:02x}"));
    let (local, remote) = (node.underlay_addresses().0, ours.underlay_addresses().0);
    lines.push_str(&format!(
        "link add vx0 type vxlan id {identity} local {local} remote {remote} dstport 8472 dev eth0\n\
         link set vx0 address {} mtu {POD_MTU} arp off up\n",
        mac.join(":")
    ));
    for cidr in our_cidrs {
        let source = if cidr.contains(':') {
            FOREIGN_V6
        } else {
            FOREIGN_V4
        };
        lines.push_str(&format!("route add {cidr} dev vx0 src {source}1\n"));
    }
    ip_batch(Some(host), &lines).await.unwrap();
    let lines = format!(
        "link set lo up\nlink set eth0 address 02:00:00:00:00:04 mtu {POD_MTU} up\n\
         addr add {FOREIGN_V4}4/32 dev eth0\naddr add {FOREIGN_V6}4/128 dev eth0 nodad\n\
         route add {FOREIGN_V4}1 dev eth0\nroute add default via {FOREIGN_V4}1 dev eth0\n\
         route add {FOREIGN_V6}1 dev eth0\nroute add default via {FOREIGN_V6}1 dev eth0\n"
    );
    ip_batch(Some(&pod), &lines).await.unwrap();
    pod
}

/// Every frame is cut and has its checksums before it leaves the device.
async fn without_offloads(netns: &str, device: &str) {
    let features = [
        "tso",
        "off",
        "gso",
        "off",
        "gro",
        "off",
        "tx-udp_tnl-segmentation",
        "off",
    ];
    let mut command = command_in(netns, None, Path::new("ethtool"));
    run(command.args(["-K", device]).args(features))
        .await
        .unwrap();
}

/// Sends a file from one namespace to an address in another and returns where it was written.
async fn transfer(
    (from, to): (&str, &str),
    address: IpAddr,
    sent: &Path,
    received: PathBuf,
) -> PathBuf {
    let (from, to) = (netns_path(from), netns_path(to));
    let at = SocketAddr::new(address, PORT);
    let (sent, written) = (sent.to_owned(), received.clone());
    tokio::task::spawn_blocking(move || {
        // The listener is there before the sender connects.
        let listener = in_netns(&to, move || Ok(TcpListener::bind(at)?)).unwrap();
        let receiver = std::thread::spawn(move || -> std::io::Result<u64> {
            let (stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            std::io::copy(&mut stream.take(u64::MAX), &mut File::create(written)?)
        });
        in_netns(&from, move || {
            let mut stream = TcpStream::connect_timeout(&at, SILENCE_MAX)?;
            stream.set_write_timeout(Some(SILENCE_MAX))?;
            std::io::copy(&mut File::open(sent)?, &mut stream)?;
            stream.flush()?;
            Ok(())
        })
        .unwrap();
        receiver.join().unwrap().unwrap();
    })
    .await
    .unwrap();
    received
}

/// A file of random bytes.
fn random_file(lab: &Lab, bytes: u64) -> PathBuf {
    let path = lab.folder().join(format!("random-{bytes}"));
    let mut random = File::open("/dev/urandom").unwrap().take(bytes);
    std::io::copy(&mut random, &mut File::create(&path).unwrap()).unwrap();
    path
}

async fn sha256(path: &Path) -> String {
    let line = sh("sha256sum", &[path.to_str().unwrap()]).await.unwrap();
    line.split(' ').next().unwrap().to_owned()
}

/// Starts a capture on the router's port of a node.
async fn capture(lab: &Lab, port: &str, file: &Path) -> Process {
    let router = lab.cluster(0).router_netns();
    let mut command = command_in(router, None, Path::new("tcpdump"));
    command
        .args(["-Z", "root", "-n", "-U", "-B", "65536", "-s"])
        .args([CAPTURED_BYTES, "-i", port, "-w"])
        .arg(file)
        .arg("udp port 8472");
    let log = lab.folder().join("tcpdump.log");
    let process = Process::start("tcpdump", &mut command, &log).unwrap();
    until("tcpdump listens", || async {
        Ok(process.log_tail().contains("listening on").then_some(()))
    })
    .await
    .unwrap();
    process
}

/// Outer length and VNI of every frame of a capture, as tshark decodes them.
async fn decoded(file: &Path) -> Vec<(u64, u64)> {
    let arguments = [
        "-r",
        file.to_str().unwrap(),
        "-d",
        "udp.port==8472,vxlan",
        "-T",
        "fields",
        "-E",
        "occurrence=f",
        "-e",
        "ip.len",
        "-e",
        "vxlan.vni",
    ];
    let text = sh("tshark", &arguments).await.unwrap();
    text.lines()
        .map(|line| {
            let (length, vni) = line.split_once('\t').unwrap();
            (length.parse().unwrap(), vni.parse().unwrap())
        })
        .collect()
}

async fn our_pod(lab: &Lab) -> (Pod, u64) {
    let cluster = lab.cluster(0);
    cluster.apply(&workload("ours", "shared")).await.unwrap();
    let pod = cluster.node(0).add_pod(NAMESPACE, "ours").await.unwrap();
    let identity = until("the pod's record", || async {
        Ok(cluster.workload_identity(NAMESPACE, "ours").await.ok())
    })
    .await
    .unwrap();
    (pod, identity)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_vxlan_device_is_a_node_like_any_other() {
    let config = LabConfig {
        clusters: vec!["a".to_owned()],
        agents_per_cluster: 1,
        ..LabConfig::two_by_two().unwrap()
    };
    let mut lab = Lab::build(config).await.unwrap();
    lab.start().await.unwrap();
    let (pod, identity) = our_pod(&lab).await;
    let (ours, other) = (lab.cluster(0).node(0), lab.cluster(0).node(1));
    let status = lab.cluster(0).status().await.unwrap();
    let cidrs: Vec<String> =
        serde_json::from_value(status["nodes"][0]["podCIDRs"].clone()).unwrap();
    assert_eq!(cidrs.len(), 2, "{status}");
    let foreign = foreign_node(other, ours, &cidrs, identity).await;
    for netns in [ours.netns(), other.netns()] {
        without_offloads(netns, "eth0").await;
    }
    for port in ["n1", "n2"] {
        without_offloads(lab.cluster(0).router_netns(), port).await;
    }
    register(&lab, identity).await;
    until("the way to the foreign pod", || async {
        Ok(pod.ping(&format!("{FOREIGN_V4}4")).await.ok())
    })
    .await
    .unwrap();

    let long = random_file(&lab, LONG_BYTES);
    let short = random_file(&lab, SHORT_BYTES);
    let file = lab.folder().join("wire.pcap");
    let tcpdump = capture(&lab, "n2", &file).await;
    let [foreign_v4, foreign_v6] = foreign_addresses();
    let (our_v4, our_v6) = (
        pod.address(false).unwrap().parse().unwrap(),
        pod.address(true).unwrap().parse().unwrap(),
    );
    let (out, back) = (
        (pod.netns(), foreign.as_str()),
        (foreign.as_str(), pod.netns()),
    );
    for (netns, address, sent) in [
        (out, foreign_v4, &long),
        (back, our_v4, &short),
        (out, foreign_v6, &short),
        (back, our_v6, &long),
    ] {
        let received = transfer(netns, address, sent, lab.folder().join("received")).await;
        assert_eq!(sha256(&received).await, sha256(sent).await, "to {address}");
    }
    tcpdump.stop(Signal::SIGTERM).await.unwrap();
    let frames = decoded(&file).await;
    let least = 2 * (LONG_BYTES + SHORT_BYTES) / IP_BYTES_MAX;
    assert!(
        frames.len() as u64 > least,
        "{} frames for {least}",
        frames.len()
    );
    let longest = frames.iter().map(|(length, _)| *length).max().unwrap();
    assert!(
        (1_400..=IP_BYTES_MAX).contains(&longest),
        "{longest} bytes of IP"
    );
    let other_vni = frames.iter().find(|(_, vni)| *vni != identity);
    assert_eq!(other_vni, None, "every frame has identity {identity}");
    assert_eq!(ours.drops("tunnel-malformed").await.unwrap(), 0);
    assert_eq!(lab.remove().await, Vec::<String>::new());
}
