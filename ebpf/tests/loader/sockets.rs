//! Socket load-balancing as applications see it.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use clustermesh_ebpf::Features;

use crate::node::{
    Node, PATIENCE, TCP, UDP, delete_list, in_node, set_service, tcp_server, udp_server,
};

const V4: &str = "10.96.0.1:80";
const V6: &str = "[fd00:96::1]:80";
const MAPPED: &str = "[::ffff:10.96.0.1]:80";

/// Connects, and says who answered.
pub fn connect(to: &str) -> std::io::Result<(TcpStream, SocketAddr)> {
    let to: SocketAddr = to.parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = String::new();
    stream.read_to_string(&mut greeting)?;
    Ok((stream, greeting.parse().unwrap()))
}

/// How a call ends that finds no backend.
fn refusal() -> ErrorKind {
    if Features::probe().socket_errors {
        ErrorKind::ConnectionRefused
    } else {
        ErrorKind::PermissionDenied
    }
}

fn socket(local: &str) -> UdpSocket {
    let socket = UdpSocket::bind(local).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// One question on an unconnected socket: who answered, and where the answer came from.
fn ask(socket: &UdpSocket, to: &str) -> (SocketAddr, SocketAddr) {
    socket.send_to(b"?", to).unwrap();
    answer(socket)
}

fn answer(socket: &UdpSocket) -> (SocketAddr, SocketAddr) {
    let mut buffer = [0; 64];
    let (len, source) = socket.recv_from(&mut buffer).unwrap();
    let text = std::str::from_utf8(&buffer[..len]).unwrap();
    (text.parse().unwrap(), source)
}

fn tcp_reaches(virtual_address: &str, named: &str, backend: &str) {
    in_node(|node| {
        let datapath = node.active();
        let server = tcp_server(backend);
        set_service(datapath.maps(), virtual_address, TCP, 1, &[server]);
        let (stream, who) = connect(named).unwrap();
        assert_eq!(who, server);
        assert_eq!(stream.peer_addr().unwrap(), named.parse().unwrap());
    });
}

#[test]
fn tcp_v4_reaches_the_backend_and_names_the_virtual_address() {
    tcp_reaches(V4, V4, "127.0.0.7:0");
}

#[test]
fn tcp_v6_reaches_the_backend_and_names_the_virtual_address() {
    tcp_reaches(V6, V6, "[::1]:0");
}

#[test]
fn tcp_on_a_v6_socket_with_a_mapped_address_reaches_the_v4_backend() {
    tcp_reaches(V4, MAPPED, "127.0.0.7:0");
}

#[test]
fn every_backend_of_a_list_is_chosen() {
    in_node(|node| {
        let datapath = node.active();
        let servers: Vec<_> = (0..4).map(|_| tcp_server("127.0.0.1:0")).collect();
        set_service(datapath.maps(), V4, TCP, 1, &servers);
        let seen: BTreeSet<_> = (0..200).map(|_| connect(V4).unwrap().1).collect();
        assert_eq!(seen, servers.into_iter().collect());
    });
}

#[test]
fn what_is_no_service_is_left_alone() {
    in_node(|node| {
        let datapath = node.active();
        let server = tcp_server("127.0.0.1:0");
        // Another protocol and another port of the same address are other frontends.
        let name = server.to_string();
        set_service(datapath.maps(), &name, UDP, 1, &[]);
        set_service(datapath.maps(), "127.0.0.1:1", TCP, 2, &[]);
        let (stream, who) = connect(&name).unwrap();
        assert_eq!((stream.peer_addr().unwrap(), who), (server, server));
    });
}

#[test]
fn no_backends_means_connection_refused() {
    in_node(|node| {
        let datapath = node.active();
        for (virtual_address, local) in [(V4, "0.0.0.0:0"), (V6, "[::]:0")] {
            set_service(datapath.maps(), virtual_address, TCP, 0, &[]);
            set_service(datapath.maps(), virtual_address, UDP, 0, &[]);
            let tcp = connect(virtual_address).unwrap_err();
            let udp_connected = socket(local).connect(virtual_address).unwrap_err();
            let udp = socket(local).send_to(b"?", virtual_address).unwrap_err();
            for error in [tcp, udp_connected, udp] {
                assert_eq!(error.kind(), refusal(), "{error}");
            }
        }
    });
}

#[test]
fn a_list_that_is_gone_refuses_instead_of_leaking_the_virtual_address() {
    in_node(|node| {
        let datapath = node.active();
        let server = tcp_server("127.0.0.1:0");
        set_service(datapath.maps(), V4, TCP, 1, &[server]);
        delete_list(datapath.maps(), 1, 1);
        let error = connect(V4).unwrap_err();
        assert_eq!(error.kind(), refusal());
    });
}

#[test]
fn connected_udp_names_the_virtual_address_everywhere() {
    in_node(|node| {
        let datapath = node.active();
        for (named, virtual_address, local, backend) in [
            (V4, V4, "0.0.0.0:0", "127.0.0.7:0"),
            (V6, V6, "[::]:0", "[::1]:0"),
            (MAPPED, V4, "[::]:0", "127.0.0.8:0"),
        ] {
            let server = udp_server(backend);
            set_service(datapath.maps(), virtual_address, UDP, 1, &[server]);
            let socket = socket(local);
            socket.connect(named).unwrap();
            socket.send(b"?").unwrap();
            let named: SocketAddr = named.parse().unwrap();
            assert_eq!(answer(&socket), (server, named));
            assert_eq!(socket.peer_addr().unwrap(), named);
        }
    });
}

#[test]
fn a_socket_that_is_connected_elsewhere_forgets_its_service() {
    in_node(|node| {
        let datapath = node.active();
        let server = udp_server("127.0.0.1:0");
        set_service(datapath.maps(), V4, UDP, 1, &[server]);
        let socket = socket("0.0.0.0:0");
        socket.connect(V4).unwrap();
        socket.connect(server).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), server);
    });
}

#[test]
fn unconnected_udp_is_answered_from_the_virtual_address() {
    in_node(|node| {
        let datapath = node.active();
        for (named, virtual_address, local, backend) in [
            (V4, V4, "0.0.0.0:0", "127.0.0.7:0"),
            (V6, V6, "[::]:0", "[::1]:0"),
            (MAPPED, V4, "[::]:0", "127.0.0.8:0"),
        ] {
            let server = udp_server(backend);
            set_service(datapath.maps(), virtual_address, UDP, 1, &[server]);
            let answer = ask(&socket(local), named);
            assert_eq!(answer, (server, named.parse().unwrap()));
        }
    });
}

#[test]
fn unconnected_udp_keeps_one_backend_for_each_virtual_address() {
    in_node(|node| {
        let datapath = node.active();
        let servers: Vec<_> = (0..8).map(|_| udp_server("127.0.0.1:0")).collect();
        let names: Vec<String> = (1..=8).map(|i| format!("10.96.0.{i}:53")).collect();
        for (list, name) in (1..).zip(&names) {
            set_service(datapath.maps(), name, UDP, list, &servers);
        }
        let socket = socket("0.0.0.0:0");
        let first: Vec<_> = names.iter().map(|name| ask(&socket, name).0).collect();
        for _ in 0..20 {
            let again: Vec<_> = names.iter().map(|name| ask(&socket, name).0).collect();
            assert_eq!(again, first);
        }
        let others: BTreeSet<_> = (0..50)
            .map(|_| ask(&crate::sockets::socket("0.0.0.0:0"), &names[0]).0)
            .collect();
        assert!(others.len() > 1, "other sockets choose for themselves");
    });
}

#[test]
fn unconnected_udp_keeps_its_backend_through_new_lists_until_it_is_gone() {
    in_node(|node| {
        let datapath = node.active();
        let servers: Vec<_> = (0..9).map(|_| udp_server("127.0.0.1:0")).collect();
        let maps = datapath.maps();
        set_service(maps, V4, UDP, 1, &servers);
        let socket = socket("0.0.0.0:0");
        let (kept, _) = ask(&socket, V4);
        let mut list = 1;
        // Every list without one of the others: the backend's place in it changes.
        for gone in servers.iter().filter(|server| **server != kept) {
            let rest: Vec<_> = servers.iter().copied().filter(|s| s != gone).collect();
            list += 1;
            set_service(maps, V4, UDP, list, &rest);
            delete_list(maps, list - 1, 9);
            assert_eq!(ask(&socket, V4), (kept, V4.parse().unwrap()));
        }
        let rest: Vec<_> = servers.iter().copied().filter(|s| *s != kept).collect();
        set_service(maps, V4, UDP, list + 1, &rest);
        let (next, source) = ask(&socket, V4);
        assert_ne!(next, kept);
        assert_eq!(source, V4.parse().unwrap());
        assert_eq!(ask(&socket, V4).0, next);
    });
}

#[test]
fn more_virtual_addresses_than_a_socket_remembers_are_still_answered() {
    in_node(|node| {
        let datapath = node.active();
        let server = udp_server("127.0.0.1:0");
        // One server for each: with one for all, its answers could not be told apart.
        let names: Vec<String> = (1..=20).map(|i| format!("10.96.1.{i}:53")).collect();
        let servers: Vec<_> = names.iter().map(|_| udp_server("127.0.0.1:0")).collect();
        for (list, (name, server)) in (1..).zip(names.iter().zip(&servers)) {
            set_service(datapath.maps(), name, UDP, list, &[*server]);
        }
        let socket = socket("0.0.0.0:0");
        for (name, server) in names.iter().zip(&servers).chain(names.iter().zip(&servers)) {
            assert_eq!(ask(&socket, name), (*server, name.parse().unwrap()));
        }
        // Strangers are shown as they are.
        assert_eq!(ask(&socket, &server.to_string()), (server, server));
    });
}

#[test]
fn connections_never_fail_while_lists_are_switched() {
    in_node(|node| {
        let datapath = node.active();
        let servers: Vec<_> = (0..6).map(|_| tcp_server("127.0.0.1:0")).collect();
        let maps = datapath.maps();
        set_service(maps, V4, TCP, 1, &servers[..3]);
        let done = AtomicBool::new(false);
        let switches = std::thread::scope(|scope| {
            let switcher = scope.spawn(|| {
                let mut list = 1;
                while !done.load(Ordering::Relaxed) {
                    list += 1;
                    let half = if list % 2 == 0 { 3..6 } else { 0..3 };
                    set_service(maps, V4, TCP, list, &servers[half]);
                    delete_list(maps, list - 1, 3);
                }
                list
            });
            for i in 0..3_000 {
                let stream = TcpStream::connect(V4);
                if let Err(error) = stream {
                    done.store(true, Ordering::Relaxed);
                    panic!("connection {i}: {error}");
                }
            }
            done.store(true, Ordering::Relaxed);
            switcher.join().unwrap()
        });
        assert!(switches > 1_000, "only {switches} switches");
    });
}

#[test]
fn an_unconnected_socket_stays_with_its_backend_while_lists_are_switched() {
    in_node(|node| {
        let datapath = node.active();
        let servers: Vec<_> = (0..3).map(|_| udp_server("127.0.0.1:0")).collect();
        let maps = datapath.maps();
        set_service(maps, V4, UDP, 1, &servers);
        let socket = socket("0.0.0.0:0");
        let (kept, _) = ask(&socket, V4);
        let others: Vec<_> = servers.into_iter().filter(|s| *s != kept).collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let switcher = scope.spawn(|| {
                let mut list = 1;
                while !done.load(Ordering::Relaxed) {
                    list += 1;
                    // Another service's list takes the place of the deleted one at once.
                    let other = others[list as usize % others.len()];
                    set_service(maps, V4, UDP, list, &[kept, other]);
                    delete_list(maps, list - 1, 3);
                    set_service(maps, "10.96.0.2:80", UDP, list + (1 << 31), &others);
                    delete_list(maps, list - 1 + (1 << 31), 3);
                }
                list
            });
            for i in 0..5_000 {
                let (who, _) = ask(&socket, V4);
                if who != kept {
                    done.store(true, Ordering::Relaxed);
                    panic!("datagram {i} went to {who} instead of {kept}");
                }
            }
            done.store(true, Ordering::Relaxed);
            let switches = switcher.join().unwrap();
            assert!(switches > 100, "only {switches} switches");
        });
    });
}

#[test]
fn what_a_tcp_socket_remembers_goes_with_it_and_with_its_next_connection() {
    in_node(|node| {
        let datapath = node.active();
        let server = tcp_server("127.0.0.1:0");
        let maps = datapath.maps();
        set_service(maps, V4, TCP, 1, &[server]);
        let held = || maps.tcp_choices.len().unwrap();
        let streams: Vec<_> = (0..5).map(|_| connect(V4).unwrap().0).collect();
        assert_eq!(held(), 5);
        drop(streams);
        assert_eq!(held(), 0);
        connect(&server.to_string()).unwrap();
        assert_eq!(held(), 0);
        // One socket, first to the service, then straight to its backend.
        let socket = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Stream,
            nix::sys::socket::SockFlag::empty(),
            None,
        )
        .unwrap();
        let connect_to = |to: &str| {
            let to: std::net::SocketAddrV4 = to.parse().unwrap();
            let to = nix::sys::socket::SockaddrIn::from(to);
            nix::sys::socket::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &to)
        };
        set_service(
            maps,
            "10.96.0.2:80",
            TCP,
            2,
            &["127.0.0.1:9".parse().unwrap()],
        );
        connect_to("10.96.0.2:80").unwrap_err();
        assert_eq!(held(), 1);
        connect_to(&server.to_string()).unwrap();
        assert_eq!(held(), 0);
        let stream = TcpStream::from(socket);
        assert_eq!(stream.peer_addr().unwrap(), server);
    });
}

#[test]
fn sockets_outside_the_cgroup_are_left_alone() {
    in_node(|node: &Node| {
        let mut options = node.options();
        options.cgroup = None;
        let (mut without, _) = clustermesh_ebpf::Datapath::open(&options).unwrap();
        without.activate(node.cm_net, &[]).unwrap();
        let server = tcp_server("127.0.0.1:0");
        set_service(without.maps(), V4, TCP, 1, &[server]);
        let error = connect(V4).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{error}");
        // Switched on, and off again.
        let (mut with, _) = node.open();
        with.activate(node.cm_net, &[]).unwrap();
        connect(V4).unwrap();
        without.activate(node.cm_net, &[]).unwrap();
        connect(V4).unwrap_err();
    });
}

#[test]
fn another_cgroup_takes_the_place_of_the_first() {
    in_node(|node| {
        let datapath = node.active();
        let server = tcp_server("127.0.0.1:0");
        set_service(datapath.maps(), V4, TCP, 1, &[server]);
        connect(V4).unwrap();
        let mut options = node.options();
        let below = options.cgroup.unwrap().join("below");
        std::fs::create_dir(&below).unwrap();
        options.cgroup = Some(below.clone());
        let (mut moved, _) = clustermesh_ebpf::Datapath::open(&options).unwrap();
        moved.activate(node.cm_net, &[]).unwrap();
        connect(V4).unwrap_err();
        std::fs::remove_dir(&below).unwrap();
    });
}
