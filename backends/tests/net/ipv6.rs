//! IPv6 in the user-mode network, and echo requests.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bivisor_backends::net::{UserConfig, UserNetwork};
use bivisor_machine::packet::Offload;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{icmp, tcp};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr,
    IpAddress, IpCidr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscRepr,
};

use crate::guest::{Guest, MAC};

const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x6976, 0x6973, 0x6f72, 0, 0, 0, 0);
const GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x6976, 0x6973, 0x6f72, 0, 0, 0, 2);
const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xfd62, 0x6976, 0x6973, 0x6f72, 0, 0, 0, 0x15);

fn guest() -> Guest {
    let config = UserConfig { host_loopback: true, ..UserConfig::default() };
    let mut guest = Guest::new(Arc::new(UserNetwork::new(config).unwrap())).configured();
    guest.interface.update_ip_addrs(|addresses| {
        addresses.push(IpCidr::new(IpAddress::Ipv6(ADDRESS), 64)).unwrap();
    });
    guest
}

/// A frame with an ICMPv6 message.
fn frame(from: Ipv6Addr, to: Ipv6Addr, message: &Icmpv6Repr<'_>) -> Vec<u8> {
    let mut bytes = vec![0; 14 + 40 + message.buffer_len()];
    let mut frame = EthernetFrame::new_unchecked(&mut bytes[..]);
    frame.set_src_addr(EthernetAddress(MAC));
    frame.set_dst_addr(EthernetAddress([0x33, 0x33, 0, 0, 0, 2]));
    frame.set_ethertype(EthernetProtocol::Ipv6);
    let header = Ipv6Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: message.buffer_len(),
        hop_limit: 255,
    };
    header.emit(&mut Ipv6Packet::new_unchecked(&mut bytes[14..]));
    let mut packet = Icmpv6Packet::new_unchecked(&mut bytes[54..]);
    message.emit(&from, &to, &mut packet, &ChecksumCapabilities::default());
    bytes
}

#[test]
fn the_router_advertises_prefix_and_name_server() {
    let guest = guest();
    let solicitation =
        Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { lladdr: Some(EthernetAddress(MAC).into()) });
    let all_routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    let own = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x15);
    guest.wire.port.send(&frame(own, all_routers, &solicitation), &Offload::default());
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        assert!(Instant::now() < end, "no advertisement");
        guest.wire.queue.wait(Duration::from_millis(10));
        let Some(bytes) = guest.wire.queue.pop(&*guest.wire.port) else { continue };
        if bytes[20] != 58 || bytes[54] != 134 {
            continue;
        }
        let ip = Ipv6Packet::new_checked(&bytes[14..]).unwrap();
        assert_eq!((ip.src_addr().segments()[0], ip.hop_limit()), (0xfe80, 255));
        let packet = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        let message =
            Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &packet, &ChecksumCapabilities::default());
        let Ok(Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert { prefix_info: Some(prefix), mtu, .. })) = message
        else {
            panic!("{message:?}");
        };
        assert!(prefix.is_valid_prefix_info());
        assert_eq!((prefix.prefix, prefix.prefix_len, mtu), (PREFIX, 64, Some(1500)));
        // RFC 8106, section 5.1: type 25, three times eight bytes, the address in the last sixteen.
        let option = &ip.payload()[ip.payload().len() - 24..];
        assert_eq!(option[..2], [25, 3]);
        assert_eq!(option[8..], Ipv6Addr::from_bits(PREFIX.to_bits() | 3).octets());
        return;
    }
}

#[test]
fn tcp_over_ipv6() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut text = String::new();
        peer.read_to_string(&mut text).unwrap();
        peer.write_all(text.to_uppercase().as_bytes()).unwrap();
    });
    let mut guest = guest();
    let handle = guest.tcp(4096);
    guest
        .sockets
        .get_mut::<tcp::Socket<'_>>(handle)
        .connect(guest.interface.context(), (GATEWAY, port), 40000)
        .unwrap();
    guest.until("connect", |guest| guest.tcp_socket(handle).may_send());
    guest.tcp_socket(handle).send_slice(b"six").unwrap();
    guest.tcp_socket(handle).close();
    let mut answer = Vec::new();
    guest.until("an answer", |guest| {
        let socket = guest.tcp_socket(handle);
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
        }
        answer.len() == 3
    });
    assert_eq!(answer, b"SIX");
}

#[test]
fn udp_over_ipv6() {
    let server = UdpSocket::bind("[::1]:0").unwrap();
    let port = server.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut bytes = [0; 100];
        let (count, from) = server.recv_from(&mut bytes).unwrap();
        server.send_to(&bytes[1..count], from).unwrap();
    });
    let mut guest = guest();
    let handle = guest.udp(5000);
    guest.udp_socket(handle).send_slice(b"slaughter", (GATEWAY, port)).unwrap();
    guest.until("an answer", |guest| matches!(guest.udp_socket(handle).recv(), Ok((b"laughter", _))));
}

/// Sends an echo request; what comes back, if anything does.
fn echo(guest: &mut Guest, to: IpAddress, patience: Duration) -> Option<Vec<u8>> {
    const IDENT: u16 = 0x1234;
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(IDENT)).unwrap();
    let handle = guest.sockets.add(socket);
    let data = b"are you there?";
    let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
    match to {
        IpAddress::Ipv4(_) => {
            let request = Icmpv4Repr::EchoRequest { ident: IDENT, seq_no: 7, data };
            let bytes = socket.send(request.buffer_len(), to).unwrap();
            request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &ChecksumCapabilities::default());
        }
        IpAddress::Ipv6(to6) => {
            let request = Icmpv6Repr::EchoRequest { ident: IDENT, seq_no: 7, data };
            let bytes = socket.send(request.buffer_len(), to).unwrap();
            let mut packet = Icmpv6Packet::new_unchecked(bytes);
            request.emit(&ADDRESS, &to6, &mut packet, &ChecksumCapabilities::default());
        }
    }
    let end = Instant::now() + patience;
    while Instant::now() < end {
        guest.poll();
        if let Ok((bytes, from)) = guest.sockets.get_mut::<icmp::Socket<'_>>(handle).recv() {
            assert_eq!(from, to);
            return Some(bytes.to_vec());
        }
        guest.wire.queue.wait(Duration::from_millis(1));
    }
    None
}

#[test]
fn the_gateway_answers_echo_requests() {
    let mut guest = guest();
    for (to, kind) in [(IpAddress::v4(10, 0, 2, 2), 0), (IpAddress::Ipv6(GATEWAY), 129)] {
        let answer = echo(&mut guest, to, Duration::from_secs(5)).expect("an answer");
        assert_eq!((answer[0], &answer[6..8], &answer[8..]), (kind, &[0, 7][..], &b"are you there?"[..]));
    }
}

/// The host's own address outside the loopback interface, if it has one.
fn own_address() -> Option<std::net::Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    match socket.local_addr().ok()?.ip() {
        std::net::IpAddr::V4(address) if !address.is_loopback() => Some(address),
        _ => None,
    }
}

/// Linux allows echo requests without privilege to the groups that it is told of; elsewhere the guest hears that it
/// is prohibited.
#[test]
fn echo_requests_go_out_where_the_host_allows_it() {
    let Some(address) = own_address() else {
        println!("this host has no address to ping");
        return;
    };
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap();
    let range: Vec<u32> = range.split_whitespace().map(|group| group.parse().unwrap()).collect();
    let own = rustix::process::getegid().as_raw();
    let allowed = range[0] <= own && own <= range[1];
    let mut guest = guest();
    let answer = echo(&mut guest, IpAddress::Ipv4(address), Duration::from_secs(2));
    match answer {
        Some(bytes) if allowed => assert_eq!((bytes[0], &bytes[6..8]), (0, &[0, 7][..])),
        // smoltcp hands an error on only where it quotes a datagram of its own: type 3, code 13.
        Some(bytes) => assert_eq!(bytes[..2], [3, 13]),
        None => assert!(!allowed, "no answer"),
    }
}
