//! ICMP: the gateway's echo, and what the guest is told of datagrams that went nowhere.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetProtocol, Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr,
    IpProtocol, Ipv4Repr, UDP_HEADER_LEN, UdpPacket,
};

use super::core::Core;
use super::frame::{self, HEADROOM};

/// Why a datagram went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    Network,
    Host,
    Port,
    Prohibited,
}

/// Tells the guest that its datagram for `peer` went nowhere (RFC 792, RFC 1122 section 3.2.2: never of what was
/// sent to many).
pub fn send_unreachable(core: &mut Core, guest: SocketAddr, peer: SocketAddr, reason: Unreachable) {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (guest.ip(), peer.ip()) else { return };
    if to.is_broadcast() || to.is_multicast() || core.config.is_broadcast(to) {
        return;
    }
    let mut head = [0; UDP_HEADER_LEN];
    let mut udp = UdpPacket::new_unchecked(&mut head[..]);
    udp.set_src_port(guest.port());
    udp.set_dst_port(peer.port());
    udp.set_len(UDP_HEADER_LEN as u16);
    let header = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Udp,
        payload_len: UDP_HEADER_LEN,
        hop_limit: 64,
    };
    let reason = match reason {
        Unreachable::Network => Icmpv4DstUnreachable::NetUnreachable,
        Unreachable::Host => Icmpv4DstUnreachable::HostUnreachable,
        Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
        Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
    };
    // A port's own machine says that nobody listens; anything else is the router's to say.
    let source = if reason == Icmpv4DstUnreachable::PortUnreachable { to } else { core.config.gateway() };
    send_v4(core, source, from, &Icmpv4Repr::DstUnreachable { reason, header, data: &head });
}

fn send_v4(core: &mut Core, source: Ipv4Addr, dest: Ipv4Addr, message: &Icmpv4Repr<'_>) {
    let length = message.buffer_len();
    let mut buffer = frame::buffer(length);
    buffer.resize(HEADROOM + length, 0);
    message.emit(&mut Icmpv4Packet::new_unchecked(&mut buffer[HEADROOM..]), &ChecksumCapabilities::default());
    core.offer(core.link.packet(source.into(), dest.into(), IpProtocol::Icmp, buffer));
}

/// An ICMP message from the guest.
pub fn input(core: &mut Core, source: Ipv4Addr, dest: Ipv4Addr, bytes: &[u8]) {
    let Ok(packet) = Icmpv4Packet::new_checked(bytes) else { return };
    let Ok(message) = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()) else { return };
    let Icmpv4Repr::EchoRequest { ident, seq_no, data } = message else { return };
    if dest == core.config.gateway() || dest == core.config.dns() {
        send_v4(core, dest, source, &Icmpv4Repr::EchoReply { ident, seq_no, data });
    }
}

/// An ARP packet from the guest (RFC 826): the gateway and the name server are here, nobody else.
pub fn arp(core: &mut Core, bytes: &[u8]) {
    let Ok(packet) = ArpPacket::new_checked(bytes) else { return };
    let Ok(ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = ArpRepr::parse(&packet)
    else {
        return;
    };
    let asked = target_protocol_addr == core.config.gateway() || target_protocol_addr == core.config.dns();
    if operation != ArpOperation::Request || !asked {
        return;
    }
    send_arp(
        core,
        ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: core.link.ours,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        },
    );
}

/// Asks for the guest's Ethernet address, so that it says something.
pub fn ask_for_guest(core: &mut Core, guest: Ipv4Addr) {
    send_arp(
        core,
        ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: core.link.ours,
            source_protocol_addr: core.config.gateway(),
            target_hardware_addr: smoltcp::wire::EthernetAddress([0; 6]),
            target_protocol_addr: guest,
        },
    );
}

fn send_arp(core: &mut Core, message: ArpRepr) {
    let mut buffer = frame::buffer(message.buffer_len());
    buffer.resize(HEADROOM + message.buffer_len(), 0);
    message.emit(&mut ArpPacket::new_unchecked(&mut buffer[HEADROOM..]));
    // Before the guest has spoken its address is everybody's.
    let dest = core.link.guest;
    core.offer(core.link.ethernet(dest, EthernetProtocol::Arp, buffer));
}
