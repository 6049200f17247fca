//! The user-mode network.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bivisor_backends::net::{Forward, Transport, UserConfig, UserNetwork};
use bivisor_machine::packet::Offload;
use smoltcp::socket::{icmp, tcp};
use smoltcp::wire::{IpAddress, IpProtocol, Ipv4Address, Ipv4Cidr, Ipv4Packet, UdpPacket};

use crate::guest::{Guest, MAC, forward, forwarded};

const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
const DNS: Ipv4Address = Ipv4Address::new(10, 0, 2, 3);

fn loopback() -> UserConfig {
    UserConfig { host_loopback: true, ..UserConfig::default() }
}

fn guest(config: UserConfig) -> Guest {
    Guest::new(Arc::new(UserNetwork::new(config).unwrap())).configured()
}

/// A server that sends back what it gets, until its peer closes.
fn echo_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut bytes = [0; 65536];
                while let Ok(count @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    port
}

/// Bytes that differ from place to place.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|at| (at.wrapping_mul(2654435761) >> 13) as u8).collect()
}

#[test]
fn dhcp_gives_address_router_and_name_server() {
    let mut guest = Guest::new(Arc::new(UserNetwork::new(UserConfig::default()).unwrap()));
    let config = guest.dhcp();
    assert_eq!(config.address, Ipv4Cidr::new(Ipv4Address::new(10, 0, 2, 15), 24));
    assert_eq!(config.router, Some(GATEWAY));
    assert_eq!(config.dns_servers[..], [DNS]);
}

#[test]
fn dhcp_in_another_network() {
    let config = UserConfig { network: Ipv4Addr::new(192, 168, 76, 0), ..UserConfig::default() };
    let mut guest = Guest::new(Arc::new(UserNetwork::new(config).unwrap()));
    assert_eq!(guest.dhcp().address, Ipv4Cidr::new(Ipv4Address::new(192, 168, 76, 15), 24));
}

#[test]
fn tcp_echo_both_ways() {
    let port = echo_server();
    let mut guest = guest(loopback());
    let handle = guest.tcp(65536);
    assert!(guest.connect(handle, (GATEWAY, port), 40000));
    let data = pattern(1 << 20);
    let (mut sent, mut back) = (0, Vec::new());
    guest.until("echo", |guest| {
        let socket = guest.tcp_socket(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
        }
        back.len() == data.len()
    });
    assert!(back == data, "the bytes that came back differ");
    guest.tcp_socket(handle).close();
    guest.until("close", |guest| {
        matches!(guest.tcp_socket(handle).state(), tcp::State::TimeWait | tcp::State::Closed)
    });
}

#[test]
fn refused_connections_are_refused() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = guest(loopback());
    let handle = guest.tcp(4096);
    let began = Instant::now();
    assert!(!guest.connect(handle, (GATEWAY, free), 40001));
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn loopback_is_closed_unless_allowed() {
    let port = echo_server();
    let mut guest = guest(UserConfig::default());
    for (number, address) in
        [GATEWAY, Ipv4Address::LOCALHOST, Ipv4Address::new(169, 254, 169, 254)].into_iter().enumerate()
    {
        let handle = guest.tcp(4096);
        // smoltcp itself sends nothing to a loopback address.
        if !address.is_loopback() {
            assert!(!guest.connect(handle, (address, port), 41000 + number as u16), "{address}");
        }
    }
}

#[test]
fn forwarded_tcp_reaches_the_guest() {
    let (mut guest, address) = forwarded(Transport::Tcp, 22);
    let handle = guest.tcp(65536);
    guest.tcp_socket(handle).listen(22).unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"who is there?").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let mut asked = Vec::new();
    guest.until("the question", |guest| {
        let socket = guest.tcp_socket(handle);
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), asked.extend_from_slice(bytes))).unwrap();
        }
        // Half closed: everything has come, and the answer may still go.
        socket.state() == tcp::State::CloseWait && !socket.can_recv()
    });
    assert_eq!(asked, b"who is there?");
    guest.tcp_socket(handle).send_slice(b"the guest").unwrap();
    guest.tcp_socket(handle).close();
    guest.until("the end", |_| client.is_finished());
    assert_eq!(client.join().unwrap(), "the guest");
}

#[test]
fn udp_and_back() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut bytes = [0; 2000];
        while let Ok((count, from)) = server.recv_from(&mut bytes) {
            bytes[..count].reverse();
            server.send_to(&bytes[..count], from).unwrap();
        }
    });
    let mut guest = guest(loopback());
    let handle = guest.udp(5000);
    guest.udp_socket(handle).send_slice(b"stressed", (GATEWAY, port)).unwrap();
    let mut answer = Vec::new();
    guest.until("an answer", |guest| match guest.udp_socket(handle).recv() {
        Ok((bytes, from)) => {
            assert_eq!(from.endpoint, (GATEWAY, port).into());
            answer.extend_from_slice(bytes);
            true
        }
        Err(_) => false,
    });
    assert_eq!(answer, b"desserts");
}

#[test]
fn forwarded_udp_reaches_the_guest() {
    let (mut guest, address) = forwarded(Transport::Udp, 53);
    let handle = guest.udp(53);
    guest.poll();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.connect(address).unwrap();
    // The guest's Ethernet address is asked for first; a datagram that comes before it is known may be lost.
    let mut from = None;
    for _ in 0..3 {
        client.send(b"ping").unwrap();
        let end = Instant::now() + Duration::from_millis(300);
        while from.is_none() && Instant::now() < end {
            guest.poll();
            if let Ok((bytes, meta)) = guest.udp_socket(handle).recv() {
                assert_eq!(bytes, b"ping");
                from = Some(meta.endpoint);
            }
            guest.wire.queue.wait(Duration::from_millis(1));
        }
    }
    guest.udp_socket(handle).send_slice(b"pong", from.expect("the datagram")).unwrap();
    guest.poll();
    let mut bytes = [0; 16];
    let count = client.recv(&mut bytes).unwrap();
    assert_eq!(&bytes[..count], b"pong");
}

/// A query for an A record.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut bytes = id.to_be_bytes().to_vec();
    bytes.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// A name server that knows one answer.
fn name_server(answer: [u8; 4]) -> SocketAddr {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    thread::spawn(move || {
        let mut bytes = [0; 2000];
        while let Ok((count, from)) = server.recv_from(&mut bytes) {
            let mut reply = bytes[..count].to_vec();
            reply[2] |= 0x80;
            reply[7] = 1;
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            reply.extend(answer);
            server.send_to(&reply, from).unwrap();
        }
    });
    address
}

fn ask(guest: &mut Guest, port: u16, name: &str) -> Vec<u8> {
    let handle = guest.udp(port);
    guest.udp_socket(handle).send_slice(&query(port, name), (DNS, 53)).unwrap();
    let mut answer = Vec::new();
    guest.until("a name's address", |guest| match guest.udp_socket(handle).recv() {
        Ok((bytes, _)) => {
            answer.extend_from_slice(bytes);
            true
        }
        Err(_) => false,
    });
    assert_eq!(answer[..2], port.to_be_bytes());
    answer
}

#[test]
fn names_are_looked_up() {
    let server = name_server([192, 0, 2, 7]);
    let mut guest = guest(UserConfig { resolvers: vec![server], ..UserConfig::default() });
    let answer = ask(&mut guest, 6000, "www.example.com");
    assert_eq!(answer[answer.len() - 4..], [192, 0, 2, 7]);
    let answer = ask(&mut guest, 6001, "Host.Internal");
    assert_eq!(answer[answer.len() - 4..], [10, 0, 2, 2]);
}

/// One that never answers, one where nobody is, and one that answers: the guest asks again, as resolvers do.
#[test]
fn the_next_name_server_takes_over() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let resolvers = vec![silent.local_addr().unwrap(), closed, name_server([192, 0, 2, 7])];
    let mut guest = guest(UserConfig { resolvers, ..UserConfig::default() });
    let handle = guest.udp(6000);
    let mut asked: Option<Instant> = None;
    let mut answer = Vec::new();
    guest.until("an answer", |guest| {
        let socket = guest.udp_socket(handle);
        if asked.is_none_or(|asked| asked.elapsed() > Duration::from_secs(1)) {
            socket.send_slice(&query(6000, "www.example.com"), (DNS, 53)).unwrap();
            asked = Some(Instant::now());
        }
        if let Ok((bytes, _)) = socket.recv() {
            answer.extend_from_slice(bytes);
        }
        !answer.is_empty()
    });
    assert_eq!(answer[answer.len() - 4..], [192, 0, 2, 7]);
}

#[test]
fn a_restricted_guest_resolves_nothing() {
    let server = name_server([192, 0, 2, 7]);
    let config =
        UserConfig { resolvers: vec![server], restrict: true, host_loopback: true, ..UserConfig::default() };
    let mut guest = guest(config);
    let answer = ask(&mut guest, 6000, "www.example.com");
    assert_eq!(answer[3] & 15, 5, "refused");
    let handle = guest.tcp(4096);
    assert!(!guest.connect(handle, (GATEWAY, echo_server()), 42000));
}

#[test]
fn ports_that_cannot_be_had_are_told_of() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let _held = TcpListener::bind(taken).unwrap();
    for (host, tells) in [
        (
            taken.to_string(),
            format!("cannot forward tcp {taken}: another program has that port; choose another one"),
        ),
        (
            "203.0.113.77:8080".into(),
            "cannot forward tcp 203.0.113.77:8080: the host has no such address".into(),
        ),
    ] {
        let forward = Forward { host: host.parse().unwrap(), ..forward(Transport::Tcp, 22) };
        let config = UserConfig { forwards: vec![forward], ..UserConfig::default() };
        let Err(error) = UserNetwork::new(config) else { panic!("{host} was had") };
        assert!(error.to_string().starts_with(&tells), "{error}");
    }
}

#[test]
fn a_port_is_free_again_when_the_network_ends() {
    let host = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let forward = Forward { host, ..forward(Transport::Tcp, 22) };
    for _ in 0..20 {
        drop(UserNetwork::new(UserConfig { forwards: vec![forward], ..UserConfig::default() }).unwrap());
    }
}

/// A guest that refuses what is forwarded to it: the peer is told.
#[test]
fn the_guest_may_refuse() {
    let (mut guest, address) = forwarded(Transport::Tcp, 22);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.read(&mut [0; 16])
    });
    guest.until("the refusal", |_| client.is_finished());
    let error = client.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// A datagram to a port where nobody listens comes back as an ICMP message.
#[test]
fn a_closed_udp_port_is_told_of() {
    let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = guest(loopback());
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut listener = icmp::Socket::new(buffer(), buffer());
    listener.bind(icmp::Endpoint::Udp(5000.into())).unwrap();
    let listener = guest.sockets.add(listener);
    let handle = guest.udp(5000);
    guest.udp_socket(handle).send_slice(b"anybody?", (GATEWAY, free)).unwrap();
    guest.until("a message", |guest| match guest.sockets.get_mut::<icmp::Socket<'_>>(listener).recv() {
        Ok((bytes, _)) => {
            assert_eq!(bytes[..2], [3, 3], "port unreachable");
            true
        }
        Err(_) => false,
    });
}

/// Frames of a large datagram in pieces of IPv4, as Linux would send it.
fn pieces(payload: &[u8], from: u16, to: u16) -> Vec<Vec<u8>> {
    let mut datagram = vec![0; 8];
    let mut udp = UdpPacket::new_unchecked(&mut datagram[..]);
    udp.set_src_port(from);
    udp.set_dst_port(to);
    udp.set_len((8 + payload.len()) as u16);
    datagram.extend_from_slice(payload);
    let count = datagram.len().div_ceil(1480);
    let frames = datagram.chunks(1480).enumerate().map(|(number, bytes)| {
        let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
        frame.extend(MAC);
        frame.extend([8, 0]);
        frame.resize(34, 0);
        frame.extend_from_slice(bytes);
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len((20 + bytes.len()) as u16);
        ip.set_ident(77);
        ip.set_more_frags(number + 1 < count);
        ip.set_frag_offset((number * 1480) as u16);
        ip.set_hop_limit(64);
        ip.set_next_header(IpProtocol::Udp);
        ip.set_src_addr(Ipv4Address::new(10, 0, 2, 15));
        ip.set_dst_addr(GATEWAY);
        ip.fill_checksum();
        frame
    });
    frames.collect()
}

/// A datagram that needs pieces on the way there and on the way back.
#[test]
fn large_datagrams_go_in_pieces() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut bytes = vec![0; 65536];
        let (count, from) = server.recv_from(&mut bytes).unwrap();
        bytes[..count].reverse();
        server.send_to(&bytes[..count], from).unwrap();
    });
    let guest = guest(loopback());
    let payload = pattern(20_000);
    for frame in pieces(&payload, 5000, port).into_iter().rev() {
        guest.wire.port.send(&frame, &Offload::default());
    }
    let (mut got, end) = (BTreeMap::new(), Instant::now() + Duration::from_secs(5));
    while got.values().map(Vec::len).sum::<usize>() < payload.len() + 8 {
        assert!(Instant::now() < end, "not all pieces came back");
        guest.wire.queue.wait(Duration::from_millis(10));
        let Some(frame) = guest.wire.queue.pop(&*guest.wire.port) else { continue };
        assert!(frame.len() <= 1514);
        let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        assert!(ip.verify_checksum());
        got.insert(ip.frag_offset(), ip.payload().to_vec());
    }
    let mut answer: Vec<u8> = got.into_values().flatten().collect();
    let udp = UdpPacket::new_checked(&answer[..]).unwrap();
    let addresses = [GATEWAY, Ipv4Address::new(10, 0, 2, 15)].map(IpAddress::Ipv4);
    assert!(udp.verify_checksum(&addresses[0], &addresses[1]));
    answer.drain(..8);
    answer.reverse();
    assert!(answer == payload, "the bytes that came back differ");
}
