//! The DHCP server (RFC 2131): one lease, the guest's.

use std::net::Ipv4Addr;

use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress,
};

use super::config::UserConfig;
use super::core::Core;
use super::frame;

/// How long a lease holds, in seconds.
const LEASE: u32 = 86400;

/// Options by number (RFC 2132): host name, and the interface's MTU.
const HOST_NAME: u8 = 12;
const INTERFACE_MTU: u8 = 26;

/// A datagram from the guest to the server's port.
pub fn input(core: &mut Core, bytes: &[u8]) {
    let Ok(packet) = DhcpPacket::new_checked(bytes) else { return };
    let Ok(request) = DhcpRepr::parse(&packet) else { return };
    let Some(reply) = reply(&core.config, &request) else { return };
    // A client without an address hears only what goes to everybody.
    let direct = reply.message_type == DhcpMessageType::Ack && !request.client_ip.is_unspecified();
    let dest = if direct { request.client_ip } else { Ipv4Addr::BROADCAST };
    let mtu = core.config.mtu.to_be_bytes();
    let mut options = Vec::new();
    if reply.message_type != DhcpMessageType::Nak {
        if core.config.mtu != 1500 {
            options.push(DhcpOption { kind: INTERFACE_MTU, data: &mtu });
        }
        if let Some(name) = &core.config.hostname {
            options.push(DhcpOption { kind: HOST_NAME, data: name.as_bytes() });
        }
    }
    let reply = DhcpRepr { additional_options: &options, ..reply };
    let mut buffer = frame::buffer(reply.buffer_len());
    buffer.resize(frame::HEADROOM + reply.buffer_len(), 0);
    if reply.emit(&mut DhcpPacket::new_unchecked(&mut buffer[frame::HEADROOM..])).is_err() {
        return;
    }
    let mut link = core.link;
    if !direct {
        link.guest = EthernetAddress::BROADCAST;
    }
    let source = (core.config.gateway(), DHCP_SERVER_PORT).into();
    core.offer(link.udp(source, (dest, DHCP_CLIENT_PORT).into(), buffer));
}

fn reply<'a>(config: &UserConfig, request: &DhcpRepr<'a>) -> Option<DhcpRepr<'a>> {
    let ours = config.gateway();
    let other_server = request.server_identifier.is_some_and(|server| server != ours);
    let kind = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if other_server => return None,
        DhcpMessageType::Request => {
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == config.guest() { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let mut reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: request.client_ip,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: ours,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(ours),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    if kind == DhcpMessageType::Nak {
        reply.client_ip = Ipv4Addr::UNSPECIFIED;
        reply.server_ip = Ipv4Addr::UNSPECIFIED;
        return Some(reply);
    }
    reply.subnet_mask = Some(config.mask());
    reply.router = Some(ours);
    reply.dns_servers = Some([config.dns()].into_iter().collect());
    // Who asks only for parameters has an address already (RFC 2131, section 4.3.5).
    if request.message_type != DhcpMessageType::Inform {
        reply.your_ip = config.guest();
        reply.lease_duration = Some(LEASE);
    }
    Some(reply)
}
