use super::*;

fn address(socket: &Socket, is_v6: bool) -> SocketAddr {
    let ip: IpAddr = if is_v6 {
        Ipv6Addr::LOCALHOST.into()
    } else {
        Ipv4Addr::LOCALHOST.into()
    };
    SocketAddr::new(ip, socket.port().unwrap())
}

/// Receives until `bytes` have come.
fn receive(receiver: &mut Receiver, socket: &Socket, bytes: usize) -> Vec<(Received, Vec<u8>)> {
    let mut all = Vec::new();
    let mut got = 0;
    while got < bytes {
        let mut polled = [nix::poll::PollFd::new(
            socket.as_fd(),
            nix::poll::PollFlags::POLLIN,
        )];
        assert!(nix::poll::poll(&mut polled, 30_000_u16).unwrap() > 0);
        for index in 0..receiver.receive(socket, MESSAGES_MAX).unwrap() {
            let message = receiver.message(index).unwrap();
            let data = receiver.buffer()[message.range.clone()].to_vec();
            got += data.len();
            all.push((message, data));
        }
    }
    all
}

#[test]
fn a_run_of_datagrams_goes_in_one_call_and_comes_with_its_size_source_and_tos() {
    for is_v6 in [false, true] {
        let (one, other) = (
            Socket::open(is_v6, 0, 0).unwrap(),
            Socket::open(is_v6, 0, 0).unwrap(),
        );
        let data: Vec<u8> = (0..2_500_u32)
            .map(|number| u8::try_from(number % 251).unwrap())
            .collect();
        one.send(address(&other, is_v6), 2, &data, 1_000).unwrap();
        let runs = receive(&mut Receiver::default(), &other, data.len());
        let together: Vec<u8> = runs.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert_eq!(together, data);
        for (run, _) in &runs {
            assert_eq!((run.from, run.tos), (address(&one, is_v6), 2));
            assert!(run.segment <= 1_000);
        }
    }
}

#[test]
fn sockets_of_one_port_share_it() {
    let first = Socket::open(false, 0, 0).unwrap();
    let second = Socket::open(false, first.port().unwrap(), 0).unwrap();
    assert_eq!(first.port().unwrap(), second.port().unwrap());
    assert!(!first.is_v6());
}

#[test]
fn control_messages_with_wrong_lengths_end_the_reading() {
    for length in [0_usize, 8, 15, 17, 64, usize::MAX] {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&length.to_ne_bytes());
        let mut seen = 0;
        each_control(&bytes, |_, _, data| seen += data.len());
        assert!(seen <= 32);
    }
}

#[test]
fn a_call_holds_what_fits() {
    assert_eq!(segments_per_call(1_420), 45);
    assert_eq!(segments_per_call(65_535), 1);
    assert_eq!(segments_per_call(100), 64);
}
