//! Echo requests to the outside, by the sockets that Linux has for them (icmp(7)): no privilege, but the host may
//! have closed them (`net.ipv4.ping_group_range`).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
};
use smoltcp::wire::IpProtocol;

use super::core::{Core, Route, Target};
use super::frame::HEADROOM;
use super::icmp::{self, Quote};
use super::table::{Id, Table};
use super::udp;

/// Flows of one guest, at most.
const FLOWS: usize = 64;

/// How long a flow lasts after its last request or answer.
const LASTS: Duration = Duration::from_secs(30);

/// Answers taken at once.
const BURST: usize = 32;

/// Length of an echo message's header.
const HEADER: usize = 8;

/// Types of an echo request and its answer, of ICMP and ICMPv6 (RFC 792, RFC 4443).
const REPLY_V4: u8 = 0;
const REPLY_V6: u8 = 129;

/// What tells one series of echo requests from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub guest: IpAddr,
    pub peer: IpAddr,
    pub ident: u16,
}

struct Flow {
    key: Key,
    socket: OwnedFd,
    last_used: Instant,
}

/// All flows.
#[derive(Default)]
pub struct Ping {
    flows: Table<Key, Flow>,
}

impl Ping {
    /// An echo request; `bytes` begin with the ICMP header.
    pub fn request(&mut self, core: &mut Core, key: Key, bytes: &[u8]) {
        let Some(Ok(head)) = bytes.get(..HEADER).map(<[u8; HEADER]>::try_from) else { return };
        let protocol = if key.peer.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
        let quote = Quote { from: key.guest, to: key.peer, protocol, head };
        if let Err(error) = self.send(core, key, bytes)
            && let Some(reason) = udp::reason(error)
        {
            icmp::send_unreachable(core, &quote, reason);
        }
    }

    fn send(&mut self, core: &mut Core, key: Key, bytes: &[u8]) -> rustix::io::Result<()> {
        let id = match self.flows.find(&key) {
            Some(id) => id,
            None => self.open(core, key)?,
        };
        if let Some(flow) = self.flows.get_mut(id) {
            flow.last_used = core.now;
            // The kernel puts an identifier of its own, and the checksum.
            send(&flow.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    fn open(&mut self, core: &mut Core, key: Key) -> rustix::io::Result<Id> {
        // Ports don't matter, but a route is asked for with one.
        let Route::Host(target) = core.route(SocketAddr::new(key.peer, 1)) else {
            return Err(Errno::HOSTUNREACH);
        };
        if self.flows.len() >= FLOWS
            && let Some(oldest) = self.flows.iter().min_by_key(|flow| flow.last_used).map(|flow| flow.key)
        {
            self.flows.remove(&oldest);
        }
        let (family, protocol) = match key.peer {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
        connect(&socket, &SocketAddr::new(target.ip(), 0))?;
        let target = Target::Ping(self.flows.next_id());
        core.watch_input(&socket, target)?;
        core.arm(core.now + LASTS, target);
        Ok(self.flows.insert(key, Flow { key, socket, last_used: core.now }))
    }

    /// Something happened at a flow's socket.
    pub fn event(&mut self, core: &mut Core, id: Id) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let mut buffer = core.buffer();
        for _ in 0..BURST {
            match recv(&flow.socket, &mut buffer[HEADROOM..], RecvFlags::DONTWAIT) {
                Ok((count, _)) => answer(core, flow, &buffer[HEADROOM..HEADROOM + count]),
                Err(Errno::AGAIN) => break,
                // What an earlier request met with.
                Err(_) => {}
            }
        }
        core.recycle(buffer);
    }

    /// A flow's timer has gone off.
    pub fn timeout(&mut self, core: &mut Core, id: Id) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let end = flow.last_used + LASTS;
        if end > core.now {
            core.arm(end, Target::Ping(id));
        } else {
            let key = flow.key;
            self.flows.remove(&key);
        }
    }

    /// Ends all flows.
    pub fn clear(&mut self) {
        self.flows = Table::default();
    }
}

fn answer(core: &mut Core, flow: &mut Flow, bytes: &[u8]) {
    let wanted = if flow.key.peer.is_ipv4() { REPLY_V4 } else { REPLY_V6 };
    if let [kind, 0, _, _, _, _, high, low, data @ ..] = bytes
        && *kind == wanted
    {
        flow.last_used = core.now;
        icmp::send_echo_reply(core, &flow.key, u16::from_be_bytes([*high, *low]), data);
    }
}
