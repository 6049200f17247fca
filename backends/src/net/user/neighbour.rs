//! Who is on the wire: ARP (RFC 826), neighbour discovery and router advertisements (RFC 4861, RFC 4862).

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol, Icmpv6Repr, NdiscNeighborFlags,
    NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags,
};

use super::config::IPV6_PREFIX;
use super::core::{Core, Target};
use super::frame::{self, HEADROOM};
use super::icmp;

/// All nodes of the link (RFC 4291, section 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// How long the router and its prefix are good for without another advertisement, and how often there is one.
const ROUTER_LIFETIME: Duration = Duration::from_secs(9000);
const PREFIX_LIFETIME: Duration = Duration::from_secs(86400);
const ADVERTISE_EVERY: Duration = Duration::from_secs(600);

/// The type of the option that tells of a name server (RFC 8106, section 5.1), and its length in units of 8 bytes.
const RDNSS: u8 = 25;
const RDNSS_LENGTH: u8 = 3;

/// An ARP packet from the guest: the gateway and the name server are here, nobody else.
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
    let ours = target_protocol_addr == core.config.gateway() || target_protocol_addr == core.config.dns();
    if operation == ArpOperation::Request && ours {
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: core.link.ours,
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        send_arp(core, answer);
    }
}

/// Asks for the guest's Ethernet address, so that it says something.
pub fn ask_for_guest(core: &mut Core, guest: Ipv4Addr) {
    let question = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: core.link.ours,
        source_protocol_addr: core.config.gateway(),
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: guest,
    };
    send_arp(core, question);
}

fn send_arp(core: &mut Core, message: ArpRepr) {
    let mut buffer = frame::buffer(message.buffer_len());
    buffer.resize(HEADROOM + message.buffer_len(), 0);
    message.emit(&mut ArpPacket::new_unchecked(&mut buffer[HEADROOM..]));
    // Before the guest has spoken its address is everybody's.
    let dest = core.link.guest;
    core.offer(core.link.ethernet(dest, EthernetProtocol::Arp, buffer));
}

/// The address is one of the network's own.
pub fn is_ours(core: &Core, address: Ipv6Addr) -> bool {
    let config = &core.config;
    [config.gateway6(), config.router6(), config.dns6()].contains(&address)
}

/// A message of neighbour discovery from the guest.
pub fn input(core: &mut Core, source: Ipv6Addr, message: &NdiscRepr<'_>) {
    match *message {
        NdiscRepr::RouterSolicit { .. } => {
            advertise(core);
            if !core.advertising {
                core.advertising = true;
                core.arm(core.now + ADVERTISE_EVERY, Target::Advertise);
            }
        }
        NdiscRepr::NeighborSolicit { target_addr, .. } if is_ours(core, target_addr) => {
            // Who looks whether an address is taken has none to answer to (RFC 4861, section 7.2.4).
            let (dest, solicited) = if source.is_unspecified() {
                (ALL_NODES, NdiscNeighborFlags::empty())
            } else {
                (source, NdiscNeighborFlags::SOLICITED)
            };
            let answer = NdiscRepr::NeighborAdvert {
                flags: NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE | solicited,
                target_addr,
                lladdr: Some(core.link.ours.into()),
            };
            icmp::send_v6(core, target_addr, dest, &Icmpv6Repr::Ndisc(answer), &[]);
        }
        _ => {}
    }
}

/// The timer of advertisements has gone off.
pub fn advertise_again(core: &mut Core) {
    advertise(core);
    core.arm(core.now + ADVERTISE_EVERY, Target::Advertise);
}

/// Tells the link of its router, prefix, MTU and name server.
fn advertise(core: &mut Core) {
    let advertisement = NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: ROUTER_LIFETIME.into(),
        reachable_time: Duration::ZERO.into(),
        retrans_time: Duration::ZERO.into(),
        lladdr: Some(core.link.ours.into()),
        mtu: Some(core.config.mtu.into()),
        prefix_info: Some(NdiscPrefixInformation {
            prefix_len: 64,
            flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
            valid_lifetime: PREFIX_LIFETIME.into(),
            preferred_lifetime: PREFIX_LIFETIME.into(),
            prefix: IPV6_PREFIX,
        }),
    };
    let mut rdnss = vec![RDNSS, RDNSS_LENGTH, 0, 0];
    rdnss.extend((ROUTER_LIFETIME.as_secs() as u32).to_be_bytes());
    rdnss.extend(core.config.dns6().octets());
    icmp::send_v6(core, core.config.router6(), ALL_NODES, &Icmpv6Repr::Ndisc(advertisement), &rdnss);
}
