//! ICMP for both versions of IP: messages from the guest, the gateway's echo, and what the guest is told of datagrams
//! that went nowhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr,
    IpProtocol, Ipv4Repr, Ipv6Repr, UDP_HEADER_LEN, UdpPacket,
};

use super::core::Core;
use super::frame::{self, HEADROOM};
use super::neighbour;
use super::ping::{Key, Ping};

/// Why a datagram went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    Network,
    Host,
    Port,
    Prohibited,
}

/// A packet of the guest's that went nowhere: as much of it as an error quotes.
#[derive(Clone, Copy, Debug)]
pub struct Quote {
    pub from: IpAddr,
    pub to: IpAddr,
    pub protocol: IpProtocol,
    /// What follows the IP header.
    pub head: [u8; 8],
}

impl Quote {
    /// A UDP datagram.
    pub fn udp(from: SocketAddr, to: SocketAddr) -> Self {
        let mut head = [0; UDP_HEADER_LEN];
        let mut udp = UdpPacket::new_unchecked(&mut head[..]);
        udp.set_src_port(from.port());
        udp.set_dst_port(to.port());
        udp.set_len(UDP_HEADER_LEN as u16);
        Self { from: from.ip(), to: to.ip(), protocol: IpProtocol::Udp, head }
    }
}

/// Tells the guest that its packet went nowhere; never of what was sent to many (RFC 1122, section 3.2.2; RFC 4443,
/// section 2.4).
pub fn send_unreachable(core: &mut Core, quote: &Quote, reason: Unreachable) {
    // A port's own machine says that nobody listens; anything else is the router's to say.
    let by_port = reason == Unreachable::Port;
    match (quote.from, quote.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            if to.is_broadcast() || to.is_multicast() || core.config.is_broadcast(to) || from.is_unspecified()
            {
                return;
            }
            let source = if by_port { to } else { core.config.gateway() };
            let reason = match reason {
                Unreachable::Network => Icmpv4DstUnreachable::NetUnreachable,
                Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
                Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            };
            let header = Ipv4Repr {
                src_addr: from,
                dst_addr: to,
                next_header: quote.protocol,
                payload_len: quote.head.len(),
                hop_limit: 64,
            };
            send_v4(core, source, from, &Icmpv4Repr::DstUnreachable { reason, header, data: &quote.head });
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            if to.is_multicast() || from.is_unspecified() {
                return;
            }
            let source = if by_port { to } else { core.config.gateway6() };
            let reason = match reason {
                Unreachable::Network => Icmpv6DstUnreachable::NoRoute,
                Unreachable::Host => Icmpv6DstUnreachable::AddrUnreachable,
                Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
            };
            let header = Ipv6Repr {
                src_addr: from,
                dst_addr: to,
                next_header: quote.protocol,
                payload_len: quote.head.len(),
                hop_limit: 64,
            };
            let message = Icmpv6Repr::DstUnreachable { reason, header, data: &quote.head };
            send_v6(core, source, from, &message, &[]);
        }
        _ => {}
    }
}

fn send_v4(core: &mut Core, source: Ipv4Addr, dest: Ipv4Addr, message: &Icmpv4Repr<'_>) {
    let length = message.buffer_len();
    let mut buffer = frame::buffer(length);
    buffer.resize(HEADROOM + length, 0);
    message.emit(&mut Icmpv4Packet::new_unchecked(&mut buffer[HEADROOM..]), &ChecksumCapabilities::default());
    core.offer(core.link.packet(source.into(), dest.into(), IpProtocol::Icmp, buffer));
}

/// Sends an ICMPv6 message, with options behind it that smoltcp doesn't know.
pub fn send_v6(core: &mut Core, source: Ipv6Addr, dest: Ipv6Addr, message: &Icmpv6Repr<'_>, options: &[u8]) {
    let length = message.buffer_len();
    let mut buffer = frame::buffer(length + options.len());
    buffer.resize(HEADROOM + length, 0);
    let mut packet = Icmpv6Packet::new_unchecked(&mut buffer[HEADROOM..]);
    message.emit(&source, &dest, &mut packet, &ChecksumCapabilities::ignored());
    buffer.extend_from_slice(options);
    Icmpv6Packet::new_unchecked(&mut buffer[HEADROOM..]).fill_checksum(&source, &dest);
    core.offer(core.link.packet(source.into(), dest.into(), IpProtocol::Icmpv6, buffer));
}

/// Answers a guest's echo request.
pub fn send_echo_reply(core: &mut Core, key: &Key, seq_no: u16, data: &[u8]) {
    let ident = key.ident;
    match (key.peer, key.guest) {
        (IpAddr::V4(peer), IpAddr::V4(guest)) => {
            send_v4(core, peer, guest, &Icmpv4Repr::EchoReply { ident, seq_no, data });
        }
        (IpAddr::V6(peer), IpAddr::V6(guest)) => {
            send_v6(core, peer, guest, &Icmpv6Repr::EchoReply { ident, seq_no, data }, &[]);
        }
        _ => {}
    }
}

/// An ICMP message from the guest.
pub fn input_v4(core: &mut Core, ping: &mut Ping, source: Ipv4Addr, dest: Ipv4Addr, bytes: &[u8]) {
    let Ok(packet) = Icmpv4Packet::new_checked(bytes) else { return };
    let Ok(message) = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()) else { return };
    if let Icmpv4Repr::EchoRequest { ident, seq_no, data } = message {
        let key = Key { guest: source.into(), peer: dest.into(), ident };
        if dest == core.config.gateway() || dest == core.config.dns() {
            send_echo_reply(core, &key, seq_no, data);
        } else {
            ping.request(core, key, bytes);
        }
    }
}

/// An ICMPv6 message from the guest. `hop_limit` is the IP header's.
pub fn input_v6(
    core: &mut Core,
    ping: &mut Ping,
    source: Ipv6Addr,
    dest: Ipv6Addr,
    hop_limit: u8,
    bytes: &[u8],
) {
    let Ok(packet) = Icmpv6Packet::new_checked(bytes) else { return };
    let Ok(message) = Icmpv6Repr::parse(&source, &dest, &packet, &ChecksumCapabilities::default()) else {
        return;
    };
    match message {
        Icmpv6Repr::EchoRequest { ident, seq_no, data } => {
            let key = Key { guest: source.into(), peer: dest.into(), ident };
            if neighbour::is_ours(core, dest) {
                send_echo_reply(core, &key, seq_no, data);
            } else {
                ping.request(core, key, bytes);
            }
        }
        // A message that came through a router is none (RFC 4861, section 7.1).
        Icmpv6Repr::Ndisc(message) if hop_limit == 255 => neighbour::input(core, source, &message),
        _ => {}
    }
}
