//! What all protocols of a user-mode network share: the wire, the frames that wait for the guest, timers, epoll.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use bivisor_machine::packet::PortFeatures;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smoltcp::wire::EthernetAddress;

use super::config::UserConfig;
use super::dns::Resolvers;
use super::frame::{Frame, HEADROOM, Link};
use super::table::{GENERATIONS, Id};

/// Frames that may wait for the guest; beyond it, hosts' sockets are not read, and answers are dropped.
const OUTBOX_FRAMES: usize = 512;

/// Bytes that may wait for the guest likewise. As long as they take to read, a guest that sends has to wait.
const OUTBOX_BYTES: usize = 1 << 20;

/// The largest TCP payload: what the length field of an IP packet leaves beside headers.
pub const LARGEST: usize = 65535 - 40 - 20;

/// The largest UDP datagram, with its header.
const LARGEST_DATAGRAM: usize = 65535;

/// Buffers kept for the next reads.
const POOL: usize = 32;

/// Bytes that TCP may hold for all connections of a guest, both ways together.
pub const TCP_BUDGET: usize = 64 << 20;

/// Descriptors that a network asks the host for, and those that it leaves to the rest of the process.
const DESCRIPTORS: u64 = 8192;
const SPARED: u64 = 128;

/// Whom an event or a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// The thread itself.
    Wake,
    /// A listening socket, by its place in the list.
    Listener(u32),
    Tcp(Id),
    Udp(Id),
    Ping(Id),
    /// The router advertisements.
    Advertise,
}

impl Target {
    const CLASS: u32 = 61;

    fn encode(self) -> EventData {
        let flow = |class: u64, id: Id| {
            class << Self::CLASS | u64::from(id.generation & GENERATIONS) << 32 | u64::from(id.index)
        };
        EventData::new_u64(match self {
            Self::Wake => 0,
            Self::Listener(index) => 1 << Self::CLASS | u64::from(index),
            Self::Tcp(id) => flow(2, id),
            Self::Udp(id) => flow(3, id),
            Self::Ping(id) => flow(4, id),
            Self::Advertise => 5 << Self::CLASS,
        })
    }

    pub fn decode(data: EventData) -> Self {
        let data = data.u64();
        let id = Id { index: data as u32, generation: (data >> 32) as u32 & GENERATIONS };
        match data >> Self::CLASS {
            0 => Self::Wake,
            1 => Self::Listener(id.index),
            2 => Self::Tcp(id),
            3 => Self::Udp(id),
            4 => Self::Ping(id),
            _ => Self::Advertise,
        }
    }
}

/// Where a packet of the guest's may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The network's name server.
    Dns,
    /// An address of the host's side.
    Host(SocketAddr),
    /// Nowhere.
    Refused,
}

/// See the module.
pub struct Core {
    pub config: UserConfig,
    pub link: Link,
    /// The guest has sent something, so its Ethernet address is known.
    pub guest_known: bool,
    pub accepted: PortFeatures,
    pub outbox: VecDeque<Frame>,
    outbox_bytes: usize,
    /// Sockets that the network may have.
    pub sockets: usize,
    /// Bytes held by TCP: see [`TCP_BUDGET`].
    pub held: usize,
    /// The last datagram that was sent to the guest.
    ident: u32,
    pub now: Instant,
    timers: BinaryHeap<Reverse<(Instant, Target)>>,
    /// A timer has come before all others since the thread last looked.
    pub hurry: bool,
    pub resolvers: Resolvers,
    /// The router advertises itself from time to time.
    pub advertising: bool,
    epoll: OwnedFd,
    pool: Vec<Vec<u8>>,
}

impl Core {
    pub fn new(config: UserConfig) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let link = Link { ours: EthernetAddress(config.mac()), guest: EthernetAddress::BROADCAST };
        let resolvers = config.resolvers.clone();
        Ok(Self {
            config,
            link,
            guest_known: false,
            accepted: PortFeatures::default(),
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            sockets: raise_descriptor_limit(),
            held: 0,
            ident: 0,
            now: Instant::now(),
            timers: BinaryHeap::new(),
            hurry: false,
            resolvers: Resolvers::new(resolvers),
            advertising: false,
            epoll,
            pool: Vec::new(),
        })
    }

    /// A second name for the epoll descriptor, to wait on without the lock.
    pub fn epoll(&self) -> io::Result<OwnedFd> {
        self.epoll.try_clone()
    }

    /// Events of a connection are reported once each time they arise.
    pub fn watch(&self, socket: impl AsFd, target: Target) -> rustix::io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, socket, target.encode(), flags)
    }

    /// That there is something to read is reported once each time it arises. Of anything but a connection, room to
    /// write would be told of after each write.
    pub fn watch_input(&self, socket: impl AsFd, target: Target) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, socket, target.encode(), EventFlags::IN | EventFlags::ET)
    }

    /// Wakes this target at or soon after a time.
    pub fn arm(&mut self, at: Instant, target: Target) {
        self.hurry |= self.timers.peek().is_none_or(|Reverse((first, _))| at < *first);
        self.timers.push(Reverse((at, target)));
    }

    /// How long until the next timer.
    pub fn until_timer(&self) -> Option<Duration> {
        self.timers.peek().map(|Reverse((at, _))| at.saturating_duration_since(Instant::now()))
    }

    /// The next timer that is due.
    pub fn due(&mut self) -> Option<Target> {
        let Reverse((at, _)) = self.timers.peek()?;
        if *at > self.now {
            return None;
        }
        self.timers.pop().map(|Reverse((_, target))| target)
    }

    /// The outbox takes more.
    pub fn has_room(&self) -> bool {
        self.outbox.len() < OUTBOX_FRAMES && self.outbox_bytes < OUTBOX_BYTES
    }

    /// A frame for the guest.
    pub fn push(&mut self, frame: Frame) {
        self.outbox_bytes += frame.bytes().len();
        self.outbox.push_back(frame);
    }

    /// A frame for the guest, lost where too many wait already.
    pub fn offer(&mut self, frame: Frame) {
        if self.has_room() {
            self.push(frame);
        }
    }

    /// A UDP datagram for the guest; the payload begins at [`HEADROOM`]. Lost where too many frames wait already.
    pub fn offer_datagram(&mut self, source: SocketAddr, dest: SocketAddr, buffer: Vec<u8>) {
        if self.has_room() {
            self.ident = self.ident.wrapping_add(1);
            let mtu = self.config.mtu.into();
            for frame in self.link.datagram(source, dest, buffer, mtu, self.ident) {
                self.push(frame);
            }
        }
    }

    /// Takes all waiting frames.
    pub fn take_outbox(&mut self, into: &mut VecDeque<Frame>) {
        self.outbox_bytes = 0;
        into.append(&mut self.outbox);
    }

    /// A buffer of the largest datagram, behind [`HEADROOM`] bytes for headers; what it holds does not matter.
    pub fn buffer(&mut self) -> Vec<u8> {
        self.pool.pop().unwrap_or_else(|| vec![0; HEADROOM + LARGEST_DATAGRAM])
    }

    /// Gives a buffer back.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if buffer.len() == HEADROOM + LARGEST_DATAGRAM && self.pool.len() < POOL {
            self.pool.push(buffer);
        }
    }

    /// The largest TCP payload of one packet on the wire to or from this address, in bytes.
    pub fn mss(&self, address: IpAddr) -> usize {
        usize::from(self.config.mtu) - if address.is_ipv4() { 40 } else { 60 }
    }

    /// The host's name server, if it has one and the guest may use it.
    pub fn name_server(&mut self) -> Option<SocketAddr> {
        if self.config.restrict { None } else { self.resolvers.current(self.now) }
    }

    /// Where a packet of the guest's for `dest` goes.
    pub fn route(&self, dest: SocketAddr) -> Route {
        let config = &self.config;
        let ip = dest.ip();
        if ip == config.dns() || ip == config.dns6() {
            return if dest.port() == 53 { Route::Dns } else { Route::Refused };
        }
        if ip == config.gateway() || ip == config.gateway6() {
            let loopback = match ip {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            };
            let open = config.host_loopback && !config.restrict;
            return if open { Route::Host(SocketAddr::new(loopback, dest.port())) } else { Route::Refused };
        }
        if config.restrict || config.is_local(ip) || dest.port() == 0 || !is_global(ip) {
            return Route::Refused;
        }
        Route::Host(dest)
    }

    /// The address by which the guest sees a peer on the host's side: itself where it can tell it apart, else the
    /// gateway.
    pub fn seen_as(&self, peer: SocketAddr) -> SocketAddr {
        let ip = peer.ip().to_canonical();
        if is_global(ip) && !self.config.is_local(ip) {
            return SocketAddr::new(ip, peer.port());
        }
        let gateway = match ip {
            IpAddr::V4(_) => IpAddr::V4(self.config.gateway()),
            IpAddr::V6(_) => IpAddr::V6(self.config.gateway6()),
        };
        SocketAddr::new(gateway, peer.port())
    }
}

/// The address is neither the host's loopback interface under one of its names nor one that no router may pass on
/// (RFC 1122, section 3.2.1.3; RFC 3927, section 2.7; RFC 4291, section 2.5). Clouds keep their machines' secrets at
/// a link-local address.
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let first = address.octets()[0];
            first != 0 && first < 224 && !address.is_loopback() && !address.is_link_local()
        }
        IpAddr::V6(address) => {
            let first = address.segments()[0];
            let embeds_ipv4 = address.segments()[..5] == [0; 5];
            first & 0xffc0 != 0xfe80 && first & 0xff00 != 0xff00 && !embeds_ipv4
        }
    }
}

/// Asks for more descriptors than the 1024 that a process usually begins with, as far as its own upper limit goes.
/// Says how many sockets fit.
fn raise_descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let current = limit.current.unwrap_or(DESCRIPTORS);
    let wanted = DESCRIPTORS.min(limit.maximum.unwrap_or(DESCRIPTORS));
    let raised = wanted > current
        && setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum }).is_ok();
    let descriptors = if raised { wanted } else { current };
    descriptors.saturating_sub(SPARED).clamp(16, DESCRIPTORS) as usize
}
