//! Our WireGuard device between two machines, and with other makers' devices: handshake, data, rekey, roaming.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clustermesh_encryption_core::key::{PrivateKey, PublicKey};
use clustermesh_encryption_core::mac::Stamper;
use clustermesh_encryption_core::noise::Initiator;
use clustermesh_integration::encryption::device::{Device, Maker, run_in};
use clustermesh_integration::encryption::{Pair, SIDES, Tunnel, Version};
use clustermesh_integration::lab::host::{command_in, ip_batch, netns_path, run, sh};
use clustermesh_integration::lab::process::Process;
use clustermesh_integration::lab::tap::in_netns;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use zeroize::Zeroizing;

/// Longest wait for anything, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a file that is sent through a tunnel.
const FILE_BYTES: usize = 24 << 20;

/// Five a second, for some seconds longer than keys live.
const REKEY_ECHOES: &str = "640";

/// Waits until `check` is true.
async fn eventually<F: Future<Output = Result<bool>>>(
    what: &str,
    mut check: impl FnMut() -> F,
) -> Result<()> {
    let begun = tokio::time::Instant::now();
    while !check().await? {
        anyhow::ensure!(
            begun.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Sends a file from a side to the other and checks that it arrives as it was.
async fn send_file(pair: &Pair, tunnel: &Tunnel, from: usize, version: Version) -> Result<()> {
    let (sent, received) = (pair.folder().join("sent"), pair.folder().join("received"));
    let mut state = 1_u32;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(FILE_BYTES)
    .collect();
    std::fs::write(&sent, &bytes)?;
    let _ = std::fs::remove_file(&received);
    let receive = format!(
        "import socket,sys\ns=socket.create_server(('{}',7000),family=socket.{})\nprint('ready',flush=True)\nc,_=s.accept()\n\
         f=open('{}','wb')\nwhile True:\n d=c.recv(1<<20)\n if not d: break\n f.write(d)\nf.close()",
        tunnel.address(1 - from, version),
        if version == Version::V4 {
            "AF_INET"
        } else {
            "AF_INET6"
        },
        received.display()
    );
    let log = pair
        .folder()
        .join(format!("receiver-{from}-{version:?}.log"));
    let _ = std::fs::remove_file(&log);
    let mut command = command_in(&pair.netns(1 - from), None, Path::new("python3"));
    let receiver = Process::start("receiver", command.args(["-c", &receive]), &log)?;
    eventually("receiver", || async {
        Ok(std::fs::read_to_string(&log)?.contains("ready"))
    })
    .await?;
    let send = format!(
        "import socket\ns=socket.create_connection(('{}',7000))\ns.sendall(open('{}','rb').read())\ns.close()",
        tunnel.address(1 - from, version),
        sent.display()
    );
    run_in(&pair.netns(from), "python3", &["-c", &send]).await?;
    receiver.wait().await?;
    anyhow::ensure!(
        std::fs::read(&received)? == bytes,
        "the file changed on its way"
    );
    Ok(())
}

/// Answers to ten echo requests in both directions and both versions.
async fn all_answer(pair: &Pair, tunnel: &Tunnel) -> Result<()> {
    for version in [Version::V4, Version::V6] {
        for from in SIDES {
            let to = tunnel.address(1 - from, version);
            let answered = pair.ping(from, &to, 10).await?;
            let logs = tunnel
                .devices
                .iter()
                .map(|device| device.log_tail())
                .collect::<Vec<_>>();
            anyhow::ensure!(
                answered == 10,
                "{to} answered {answered} of 10; logs: {logs:?}"
            );
        }
    }
    Ok(())
}

/// A tunnel between two of our devices, over which all answer.
async fn two_of_ours() -> Result<(Pair, Tunnel)> {
    let pair = Pair::new().await?;
    let tunnel = pair.tunnel([Maker::Ours, Maker::Ours], Version::V4).await?;
    all_answer(&pair, &tunnel).await?;
    Ok((pair, tunnel))
}

async fn end(pair: Pair, tunnel: Tunnel) -> Result<()> {
    tunnel.stop().await?;
    pair.remove().await
}

async fn works_between(makers: [Maker; 2]) -> Result<()> {
    let pair = Pair::new().await?;
    for outer in [Version::V4, Version::V6] {
        let tunnel = pair.tunnel(makers, outer).await?;
        // Side 1 learns from the first handshake where side 0 is.
        all_answer(&pair, &tunnel).await?;
        for version in [Version::V4, Version::V6] {
            for from in SIDES {
                send_file(&pair, &tunnel, from, version).await?;
            }
        }
        tunnel.stop().await?;
    }
    pair.remove().await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_ours_carry_both_versions_over_both_versions() {
    works_between([Maker::Ours, Maker::Ours]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ours_works_with_wireguard_go_whoever_begins() {
    works_between([Maker::Ours, Maker::WireguardGo])
        .await
        .unwrap();
    works_between([Maker::WireguardGo, Maker::Ours])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ours_works_with_boringtun_whoever_begins() {
    works_between([Maker::Ours, Maker::Boringtun(1)])
        .await
        .unwrap();
    works_between([Maker::Boringtun(1), Maker::Ours])
        .await
        .unwrap();
}

/// The other machine gets another address and port while a connection lives; both go on.
async fn roams(maker: Maker) -> Result<()> {
    let pair = Pair::new().await?;
    let tunnel = pair.tunnel([Maker::Ours, maker], Version::V4).await?;
    all_answer(&pair, &tunnel).await?;
    let moved = &tunnel.devices[1];
    ip_batch(
        Some(&pair.netns(1)),
        "addr del 192.0.2.2/24 dev eth0\naddr add 192.0.2.77/24 dev eth0\n",
    )
    .await?;
    moved.wg(&["listen-port", "31999"]).await?;
    // The one that moved speaks first; ours must follow it.
    let to = tunnel.address(0, Version::V4);
    eventually("echo from the new place", || async {
        Ok(pair.ping(1, &to, 1).await? == 1)
    })
    .await?;
    let endpoint = tunnel.devices[0].show("endpoints").await?;
    anyhow::ensure!(endpoint == "192.0.2.77:31999", "endpoint is {endpoint}");
    all_answer(&pair, &tunnel).await?;
    end(pair, tunnel).await
}

#[tokio::test(flavor = "multi_thread")]
async fn ours_follows_a_peer_that_moves() {
    for maker in [Maker::Ours, Maker::WireguardGo, Maker::Boringtun(1)] {
        roams(maker)
            .await
            .with_context(|| format!("{maker:?}"))
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_handshake_and_a_wrong_source_get_nowhere() {
    let (pair, tunnel) = two_of_ours().await.unwrap();
    // Side 1 no longer allows side 0's IPv4 address.
    let (one, other) = (&tunnel.devices[0], &tunnel.devices[1]);
    let only_v6 = format!("{}/128", tunnel.address(0, Version::V6));
    other
        .wg(&["peer", one.public_key(), "allowed-ips", &only_v6])
        .await
        .unwrap();
    let to = tunnel.address(1, Version::V6);
    assert_eq!(pair.ping(0, &to, 3).await.unwrap(), 3);
    let mut command = command_in(&pair.netns(0), None, Path::new("ping"));
    let to = tunnel.address(1, Version::V4);
    let output = command
        .args(["-n", "-c", "1", "-W", "1", &to])
        .output()
        .await
        .unwrap();
    assert!(!output.status.success());
    // Without the peer nothing is answered any more.
    other
        .wg(&["peer", one.public_key(), "remove"])
        .await
        .unwrap();
    one.wg(&["peer", other.public_key(), "remove"])
        .await
        .unwrap();
    let endpoint = format!("192.0.2.2:{}", other.port());
    let arguments = [
        "peer",
        other.public_key(),
        "endpoint",
        &endpoint,
        "allowed-ips",
        &only_v6,
    ];
    one.wg(&arguments).await.unwrap();
    assert_eq!(one.show("latest-handshakes").await.unwrap(), "0");
    end(pair, tunnel).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_takes_no_long_datagrams_is_still_a_path() {
    let (pair, tunnel) = two_of_ours().await.unwrap();
    // The underlay's MTU is below that of a full segment: the kernel will not cut runs, only fragments pass.
    for side in SIDES {
        ip_batch(Some(&pair.netns(side)), "link set eth0 mtu 1400\n")
            .await
            .unwrap();
    }
    send_file(&pair, &tunnel, 0, Version::V4).await.unwrap();
    // Neither does a link without segmentation stop it.
    for side in SIDES {
        ip_batch(Some(&pair.netns(side)), "link set eth0 mtu 1500\n")
            .await
            .unwrap();
    }
    pair.set_feature("tx-udp-segmentation", "off")
        .await
        .unwrap();
    pair.set_feature("tx-checksum-ip-generic", "off")
        .await
        .unwrap();
    send_file(&pair, &tunnel, 1, Version::V6).await.unwrap();
    end(pair, tunnel).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_device_at_the_same_port_is_refused() {
    let pair = Pair::new().await.unwrap();
    let first = pair
        .tunnel([Maker::Ours, Maker::Ours], Version::V4)
        .await
        .unwrap();
    let second = pair
        .tunnel([Maker::Ours, Maker::Ours], Version::V4)
        .await
        .unwrap();
    let taken = first.devices[0].port().to_string();
    let refused = second.devices[0]
        .wg(&["listen-port", &taken])
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("Address already in use"),
        "{refused:#}"
    );
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    pair.remove().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_removed_under_it_ends_the_process_with_its_name() {
    let (pair, tunnel) = two_of_ours().await.unwrap();
    let name = tunnel.devices[0].name().to_owned();
    let mut command = command_in(&pair.netns(0), None, Path::new("ip"));
    run(command.args(["link", "del", &name])).await.unwrap();
    eventually("the process ends", || async {
        Ok(tunnel.devices[0]
            .log_tail()
            .contains(&format!("device {name}")))
    })
    .await
    .unwrap();
    assert!(sh("wg", &["show", &name]).await.is_err());
    end(pair, tunnel).await.unwrap();
}

/// Echo requests for longer than two minutes, the age at which keys are replaced, while nothing may be lost.
async fn rekeys(makers: [Maker; 2]) -> Result<()> {
    let pair = Pair::new().await?;
    let tunnel = pair.tunnel(makers, Version::V4).await?;
    all_answer(&pair, &tunnel).await?;
    // boringtun tells how long ago it was, the others when.
    let ours = usize::from(makers[0] != Maker::Ours);
    let handshake = || async {
        let text = tunnel.devices[ours].show("latest-handshakes").await?;
        anyhow::Ok(text.parse::<u64>()?)
    };
    let before = handshake().await?;
    let to = tunnel.address(1, Version::V4);
    let mut command = command_in(&pair.netns(0), None, Path::new("ping"));
    let log = pair.folder().join("echoes.log");
    command.args(["-n", "-i", "0.2", "-c", REKEY_ECHOES, "-W", "10", &to]);
    Process::start("ping", &mut command, &log)?.wait().await?;
    let text = std::fs::read_to_string(&log)?;
    anyhow::ensure!(text.contains(" 0% packet loss"), "{text}");
    let after = handshake().await?;
    anyhow::ensure!(
        after >= before + 119,
        "no new handshake: {before}, then {after}"
    );
    end(pair, tunnel).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_replaced_after_two_minutes_without_loss_whoever_began() {
    let rounds = [
        [Maker::Ours, Maker::Ours],
        [Maker::Ours, Maker::WireguardGo],
        [Maker::WireguardGo, Maker::Ours],
        [Maker::Ours, Maker::Boringtun(1)],
        [Maker::Boringtun(1), Maker::Ours],
    ];
    let all = rounds
        .map(|makers| async move { rekeys(makers).await.with_context(|| format!("{makers:?}")) });
    for result in futures_util::future::join_all(all).await {
        result.unwrap();
    }
}

/// Addresses that a flood comes from.
const FLOOD_SOURCES: u16 = 1_000;

/// Sends initiations of strangers, correct but for who they are, thousands a second from a thousand addresses of
/// 198.18.0.0/16, until told to stop.
fn flood(
    netns: &str,
    to: std::net::SocketAddr,
    public_key: &str,
    stop: &Arc<AtomicBool>,
) -> Result<std::thread::JoinHandle<Result<u64>>> {
    let peer = PublicKey::from_base64(public_key)?;
    let messages: Vec<_> = (1..=64_u8)
        .map(|number| {
            let private = PrivateKey::from_bytes([number; 32]);
            let seed = Zeroizing::new([number; 32]);
            let begun =
                Initiator::begin(&private, &peer, None, number.into(), &[number; 12], seed)?;
            let mut message = begun.1;
            Stamper::new(&peer).stamp(&mut message, Duration::ZERO);
            Ok(message)
        })
        .collect::<Result<_>>()?;
    let (netns, stop) = (netns_path(netns), Arc::clone(stop));
    Ok(std::thread::spawn(move || {
        in_netns(&netns, move || {
            let sockets: Vec<std::net::UdpSocket> = (0..FLOOD_SOURCES)
                .map(|number| {
                    let [high, low] = number.to_be_bytes();
                    let socket = std::net::UdpSocket::bind(std::net::SocketAddr::from((
                        [198, 18, high, low],
                        0,
                    )))?;
                    socket.set_read_timeout(Some(Duration::from_millis(1)))?;
                    Ok(socket)
                })
                .collect::<std::io::Result<_>>()?;
            let (mut cookies, mut room) = (0, [0; 256]);
            for turn in 0.. {
                // 64 in a row, then a pause, in which cookies come.
                for (place, message) in messages.iter().enumerate() {
                    let source = (turn * messages.len() + place) % sockets.len();
                    sockets[source].send_to(message, to)?;
                }
                let waits = &sockets[turn * messages.len() % sockets.len()];
                while let Ok(length) = waits.recv(&mut room) {
                    cookies += u64::from(length == 64);
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            Ok(cookies)
        })
    }))
}

#[tokio::test(flavor = "multi_thread")]
async fn under_a_flood_of_handshakes_packets_pass_and_a_peer_gets_in_by_its_cookie() {
    let (pair, tunnel) = two_of_ours().await.unwrap();
    // All of the range is side 0's own.
    let own = "route add local 198.18.0.0/16 dev lo\n";
    ip_batch(Some(&pair.netns(0)), own).await.unwrap();
    let way = "route add 198.18.0.0/16 via 192.0.2.1\n";
    ip_batch(Some(&pair.netns(1)), way).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let target = &tunnel.devices[1];
    let to = format!("192.0.2.2:{}", target.port()).parse().unwrap();
    let flood = flood(&pair.netns(0), to, target.public_key(), &stop).unwrap();
    // A new key ends the sessions of side 0: it has to get in again while the flood goes on.
    let key = pair.folder().join("another.key");
    std::fs::write(&key, sh("wg", &["genkey"]).await.unwrap()).unwrap();
    let key = key.display().to_string();
    let one = &tunnel.devices[0];
    one.wg(&["private-key", &key]).await.unwrap();
    let public_key = sh("wg", &["show", one.name(), "public-key"]).await.unwrap();
    let address = format!("{}/32", tunnel.address(0, Version::V4));
    target
        .wg(&["peer", public_key.trim(), "allowed-ips", &address])
        .await
        .unwrap();
    let echo = tunnel.address(1, Version::V4);
    eventually("an echo under the flood", || async {
        Ok(pair.ping(0, &echo, 1).await? == 1)
    })
    .await
    .unwrap();
    let answered = pair.ping(0, &echo, 100).await.unwrap();
    assert!(answered >= 99, "{answered} of 100");
    stop.store(true, Ordering::Relaxed);
    let cookies = flood.join().unwrap().unwrap();
    assert!(cookies > 0, "no cookie was asked for");
    end(pair, tunnel).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_moves_every_moment_is_followed() {
    let (pair, tunnel) = two_of_ours().await.unwrap();
    let to = tunnel.address(0, Version::V4);
    for host in 80..90 {
        let change = format!(
            "addr flush dev eth0 scope global\naddr add 192.0.2.{host}/24 dev eth0\naddr add 2001:db8::2/64 dev eth0 nodad\n"
        );
        ip_batch(Some(&pair.netns(1)), &change).await.unwrap();
        eventually("an echo from the new place", || async {
            Ok(pair.ping(1, &to, 1).await? == 1)
        })
        .await
        .unwrap();
        let endpoint = tunnel.devices[0].show("endpoints").await.unwrap();
        let expected = format!("192.0.2.{host}:{}", tunnel.devices[1].port());
        assert_eq!(endpoint, expected);
    }
    all_answer(&pair, &tunnel).await.unwrap();
    end(pair, tunnel).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_of_every_length_is_counted_and_hinders_nobody() {
    let (pair, tunnel) = two_of_ours().await.unwrap();
    let to = format!("192.0.2.2:{}", tunnel.devices[1].port());
    let to: std::net::SocketAddr = to.parse().unwrap();
    let netns = netns_path(&pair.netns(0));
    let sent = std::thread::spawn(move || {
        in_netns(&netns, move || {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            // Every kind of message in every length up to the largest datagram, most of them cut short or too long.
            for length in (0..300).chain((300..65_507).step_by(977)).chain([65_507]) {
                for kind in 0..6 {
                    let mut datagram = vec![0x5a; length];
                    datagram
                        .iter_mut()
                        .zip([kind, 0, 0, 0])
                        .for_each(|(to, from)| *to = from);
                    socket.send_to(&datagram, to)?;
                }
            }
            Ok(())
        })
    });
    sent.join().unwrap().unwrap();
    all_answer(&pair, &tunnel).await.unwrap();
    let log = tunnel.devices[1].log_tail();
    assert!(!log.contains("panicked"), "{log}");
    end(pair, tunnel).await.unwrap();
}

/// Collects so many datagrams of one length that leave for a port, then sends them again twice, the last one first; each
/// time a file has to be there.
const REPEATER: &str = "import os,socket,sys,time\ncount,length,port=map(int,sys.argv[1:4])\n\
     s=socket.socket(socket.AF_PACKET,socket.SOCK_RAW,socket.htons(3))\ns.bind(('eth0',0))\nprint('ready',flush=True)\n\
     seen=[]\nwhile len(seen)<count:\n f,a=s.recvfrom(65535)\n word=lambda at: int.from_bytes(f[at:at+2],'big')\n \
     if a[2]==4 and word(12)==0x800 and f[23]==17 and word(36)==port and word(38)==length+8:\n  \
     seen.append(f[:40]+bytes(2)+f[42:])\nprint('collected',flush=True)\nfor file in sys.argv[4:]:\n \
     while not os.path.exists(file): time.sleep(0.02)\n for f in reversed(seen): s.send(f)";
/// Bytes of a sealed echo request as ping sends it: 84 filled up to 96, header and tag.
const SEALED_ECHO_BYTES: &str = "128";

/// A counter of one of our devices.
async fn counter(device: &Device, name: &str) -> Result<u64> {
    let mut stream = tokio::net::UnixStream::connect(device.socket()).await?;
    stream.write_all(b"get=1\n\n").await?;
    stream.shutdown().await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let line = text.lines().find_map(|line| {
        let (key, value) = line.strip_prefix("counter.")?.split_once('=')?;
        (key == name).then_some(value)
    });
    Ok(line.with_context(|| text.clone())?.parse()?)
}

/// Packets that the device has given its machine.
async fn delivered(pair: &Pair, side: usize, device: &Device) -> Result<u64> {
    let mut command = command_in(&pair.netns(side), None, Path::new("ip"));
    let output = run(command.args(["-s", "-j", "link", "show", device.name()])).await?;
    let links: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packets = links[0]["stats64"]["rx"]["packets"].as_u64();
    packets.with_context(|| links.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_that_come_late_and_in_disorder_are_taken_and_none_is_taken_twice() {
    let (pair, tunnel) = two_of_ours().await.unwrap();
    let target = &tunnel.devices[1];
    let nft = async |rules: &str| {
        let mut command = command_in(&pair.netns(1), None, Path::new("nft"));
        run(command.arg(rules)).await.map(drop)
    };
    let port = target.port().to_string();
    let (late, again) = (pair.folder().join("late"), pair.folder().join("again"));
    let mut command = command_in(&pair.netns(0), None, Path::new("python3"));
    command.args(["-c", REPEATER, "20", SEALED_ECHO_BYTES, &port]);
    command.args([&late, &again]);
    let log = pair.folder().join("repeater.log");
    let repeater = Process::start("repeater", &mut command, &log).unwrap();
    let says = |word: &'static str| {
        let log = &log;
        eventually(word, move || async move {
            Ok(std::fs::read_to_string(log)?.contains(word))
        })
    };
    says("ready").await.unwrap();
    nft(&format!(
        "add table inet cut; add chain inet cut in {{ type filter hook input priority 0; }}; \
         add rule inet cut in udp dport {port} drop"
    ))
    .await
    .unwrap();
    let before = delivered(&pair, 1, target).await.unwrap();
    let mut ping = command_in(&pair.netns(0), None, Path::new("ping"));
    let to = tunnel.address(1, Version::V4);
    ping.args(["-n", "-c", "20", "-i", "0.01", "-W", "1", &to]);
    assert!(run(&mut ping).await.is_err(), "nothing arrives yet");
    says("collected").await.unwrap();
    nft("delete table inet cut").await.unwrap();
    assert_eq!(delivered(&pair, 1, target).await.unwrap(), before);
    let replayed = counter(target, "replayed").await.unwrap();
    std::fs::write(&late, b"").unwrap();
    eventually("all of them, the last one first", || async {
        Ok(delivered(&pair, 1, target).await? == before + 20)
    })
    .await
    .unwrap();
    assert_eq!(counter(target, "replayed").await.unwrap(), replayed);
    std::fs::write(&again, b"").unwrap();
    eventually("each of them a second time", || async {
        Ok(counter(target, "replayed").await? == replayed + 20)
    })
    .await
    .unwrap();
    assert_eq!(delivered(&pair, 1, target).await.unwrap(), before + 20);
    repeater.wait().await.unwrap();
    all_answer(&pair, &tunnel).await.unwrap();
    end(pair, tunnel).await.unwrap();
}
