//! UDP: each pair of addresses has a flow, with a connected socket of the host's, until it was quiet for a while.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, sendto, socket_with,
};
use smoltcp::wire::{DHCP_SERVER_PORT, UdpPacket};

use super::core::{Core, Route, Target};
use super::frame::{self, HEADROOM};
use super::icmp::{self, Quote, Unreachable};
use super::table::{Id, Table};
use super::{dhcp, dns};

/// Flows of one guest, at most; beyond it the one that was quiet for longest makes way.
const FLOWS: usize = 1024;

/// How long a flow lasts after its last datagram: where nothing came back, where something did, and for a query of
/// a name server.
const UNANSWERED: Duration = Duration::from_secs(30);
const ANSWERED: Duration = Duration::from_secs(180);
const QUERY: Duration = Duration::from_secs(6);

/// How long a name server may take before a query that is repeated goes to the next one.
const SILENCE: Duration = Duration::from_millis(900);

/// Turns of flows between two looks at anything else, and datagrams of each.
const TURNS: usize = 256;
const BURST: usize = 32;

/// The guest's end and the other end as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub guest: SocketAddr,
    pub peer: SocketAddr,
}

enum Way {
    /// The guest began.
    Out(OwnedFd),
    /// The guest asks a name server.
    Query(OwnedFd, SocketAddr),
    /// A peer began, at a port that is forwarded.
    Forward { listener: OwnedFd, peer: SocketAddr },
}

struct Flow {
    key: Key,
    way: Way,
    last_used: Instant,
    /// Something was sent; something has come back since.
    asked: bool,
    answered: bool,
}

impl Flow {
    fn lasts(&self) -> Duration {
        match self.way {
            Way::Query(..) => QUERY,
            _ if self.answered => ANSWERED,
            _ => UNANSWERED,
        }
    }

    fn send(&self, payload: &[u8]) -> rustix::io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match &self.way {
            Way::Out(socket) | Way::Query(socket, _) => match send(socket, payload, flags) {
                // What an earlier datagram met with; this one was not sent for it.
                Err(Errno::CONNREFUSED) => send(socket, payload, flags),
                result => result,
            },
            Way::Forward { listener, peer } => sendto(listener, payload, flags, peer),
        }
    }
}

/// All flows.
#[derive(Default)]
pub struct Udp {
    flows: Table<Key, Flow>,
}

impl Udp {
    /// A UDP datagram from the guest; `bytes` begin with its header.
    pub fn input(&mut self, core: &mut Core, source: IpAddr, dest: IpAddr, bytes: &[u8]) {
        let Ok(packet) = UdpPacket::new_checked(bytes) else { return };
        let payload = packet.payload();
        if packet.dst_port() == DHCP_SERVER_PORT && dest.is_ipv4() {
            let all = dest == Ipv4Addr::BROADCAST;
            if all || dest == core.config.gateway() {
                dhcp::input(core, payload);
            }
            return;
        }
        if source.is_unspecified() {
            return;
        }
        let key = Key {
            guest: SocketAddr::new(source, packet.src_port()),
            peer: SocketAddr::new(dest, packet.dst_port()),
        };
        if let Some(id) = self.flows.find(&key) {
            self.send(core, id, payload);
            return;
        }
        match core.route(key.peer) {
            Route::Dns => self.query(core, key, payload),
            Route::Host(target) => self.open(core, key, target, payload, false),
            Route::Refused => refuse(core, key, Unreachable::Port),
        }
    }

    fn send(&mut self, core: &mut Core, id: Id, payload: &[u8]) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        if let Way::Query(_, server) = flow.way {
            self.query_again(core, id, server, payload);
            return;
        }
        flow.last_used = core.now;
        if let Err(error) = flow.send(payload)
            && let Some(reason) = reason(error)
        {
            refuse(core, flow.key, reason);
        }
    }

    /// A query from a port that has asked before: to the same server, unless it has failed to answer.
    fn query_again(&mut self, core: &mut Core, id: Id, server: SocketAddr, payload: &[u8]) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let key = flow.key;
        if let dns::Answer::Own(reply) = dns::answer(&core.config, payload) {
            core.offer_datagram(key.peer, key.guest, frame::buffer_with(&reply));
            return;
        }
        let silent = flow.asked && !flow.answered && core.now >= flow.last_used + SILENCE;
        if silent && core.resolvers.failed(server) {
            self.flows.remove(&key);
            self.query(core, key, payload);
            return;
        }
        flow.last_used = core.now;
        flow.asked = true;
        flow.answered = false;
        // A server that refuses is found out when its answer is read.
        let _ = flow.send(payload);
    }

    fn query(&mut self, core: &mut Core, key: Key, payload: &[u8]) {
        match dns::answer(&core.config, payload) {
            dns::Answer::Forward => match core.name_server() {
                Some(target) => self.open(core, key, target, payload, true),
                None => refuse(core, key, Unreachable::Port),
            },
            dns::Answer::Own(reply) => {
                core.offer_datagram(key.peer, key.guest, frame::buffer_with(&reply));
            }
            dns::Answer::Ignore => {}
        }
    }

    fn open(&mut self, core: &mut Core, key: Key, target: SocketAddr, payload: &[u8], query: bool) {
        let id = self.make_room(core);
        let opened =
            dial(target).and_then(|socket| core.watch_input(&socket, Target::Udp(id)).map(|()| socket));
        let socket = match opened {
            Ok(socket) => socket,
            Err(error) => {
                if let Some(reason) = reason(error) {
                    refuse(core, key, reason);
                }
                return;
            }
        };
        let way = if query { Way::Query(socket, target) } else { Way::Out(socket) };
        self.insert(core, key, way);
        self.send(core, id, payload);
    }

    fn insert(&mut self, core: &mut Core, key: Key, way: Way) {
        let flow = Flow { key, way, last_used: core.now, asked: false, answered: false };
        let at = core.now + flow.lasts();
        let id = self.flows.insert(key, flow);
        core.arm(at, Target::Udp(id));
    }

    /// A datagram from a peer at a port that is forwarded. `listener` is the socket that answers go out by.
    pub fn forward(
        &mut self,
        core: &mut Core,
        key: Key,
        peer: SocketAddr,
        listener: BorrowedFd<'_>,
        payload: &[u8],
    ) {
        if self.flows.find(&key).is_none() {
            self.make_room(core);
            let Ok(listener) = listener.try_clone_to_owned() else { return };
            self.insert(core, key, Way::Forward { listener, peer });
        }
        if let Some(flow) = self.flows.find(&key).and_then(|id| self.flows.get_mut(id)) {
            flow.last_used = core.now;
        }
        core.offer_datagram(key.peer, key.guest, frame::buffer_with(payload));
    }

    /// A key under which a peer's datagrams may reach the guest: this one, if no other peer has it.
    pub fn is_free_for(&mut self, key: &Key, from: SocketAddr) -> bool {
        match self.flows.find(key).and_then(|id| self.flows.get_mut(id)) {
            Some(Flow { way: Way::Forward { peer, .. }, .. }) => *peer == from,
            Some(_) => false,
            None => true,
        }
    }

    /// Something happened at a flow's socket.
    pub fn event(&mut self, id: Id) {
        self.flows.enqueue(id);
    }

    /// Some flow has something to read.
    pub fn is_busy(&self) -> bool {
        self.flows.is_busy()
    }

    /// Reads from flows that have something, as far as the guest takes frames.
    pub fn work(&mut self, core: &mut Core) {
        for _ in 0..TURNS {
            if !core.has_room() {
                return;
            }
            let Some(id) = self.flows.next_queued() else { return };
            let Some(flow) = self.flows.get_mut(id) else { continue };
            if read(core, flow) {
                self.flows.enqueue(id);
            }
        }
    }

    /// A flow's timer has gone off.
    pub fn timeout(&mut self, core: &mut Core, id: Id) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        let end = flow.last_used + flow.lasts();
        if end > core.now {
            core.arm(end, Target::Udp(id));
            return;
        }
        if let Way::Query(_, server) = flow.way
            && !flow.answered
        {
            core.resolvers.failed(server);
        }
        let key = flow.key;
        self.flows.remove(&key);
    }

    /// Makes room for one more; its name.
    fn make_room(&mut self, core: &Core) -> Id {
        if self.flows.len() >= FLOWS.min(core.sockets / 4)
            && let Some(key) = self.flows.iter().min_by_key(|flow| flow.last_used).map(|flow| flow.key)
        {
            self.flows.remove(&key);
        }
        self.flows.next_id()
    }

    /// Ends all flows.
    pub fn clear(&mut self) {
        self.flows = Table::default();
    }
}

/// Reads some datagrams. True: there may be more.
fn read(core: &mut Core, flow: &mut Flow) -> bool {
    let (Way::Out(socket) | Way::Query(socket, _)) = &flow.way else { return false };
    for _ in 0..BURST {
        if !core.has_room() {
            return true;
        }
        let mut buffer = core.buffer();
        let result = recv(socket.as_fd(), &mut buffer[HEADROOM..], RecvFlags::DONTWAIT);
        match result {
            Ok((count, _)) => {
                flow.last_used = core.now;
                flow.answered = true;
                let payload = frame::buffer_with(&buffer[HEADROOM..HEADROOM + count]);
                core.offer_datagram(flow.key.peer, flow.key.guest, payload);
            }
            Err(Errno::AGAIN) => {
                core.recycle(buffer);
                return false;
            }
            Err(error) => {
                // The next query goes to another name server, if there is one: the guest need not know.
                let hidden = matches!(flow.way, Way::Query(_, server) if core.resolvers.failed(server));
                if let Some(reason) = reason(error)
                    && !hidden
                {
                    refuse(core, flow.key, reason);
                }
            }
        }
        core.recycle(buffer);
    }
    true
}

fn dial(target: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::DGRAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    connect(&socket, &target)?;
    Ok(socket)
}

/// What to tell the guest of an error; nothing of those that mean that a datagram was lost.
pub fn reason(error: Errno) -> Option<Unreachable> {
    match error {
        Errno::CONNREFUSED => Some(Unreachable::Port),
        Errno::NETUNREACH | Errno::ADDRNOTAVAIL => Some(Unreachable::Network),
        Errno::HOSTUNREACH => Some(Unreachable::Host),
        Errno::ACCESS | Errno::PERM => Some(Unreachable::Prohibited),
        _ => None,
    }
}

fn refuse(core: &mut Core, key: Key, reason: Unreachable) {
    icmp::send_unreachable(core, &Quote::udp(key.guest, key.peer), reason);
}
