//! A network in user space, without privilege: a router with DHCP and a name server, behind which the guest's
//! connections are sockets of this process.
//!
//! A frame of the guest's is dealt with by whoever brings it, under the network's lock: what it carries goes from the
//! frame into a socket at once. Everything for the guest is put together and delivered by the network's own thread,
//! which waits for sockets and timers by epoll. Nothing is delivered under the lock.

mod config;
mod core;
mod dhcp;
mod dns;
mod forward;
mod fragments;
mod frame;
mod icmp;
mod neighbour;
mod ping;
mod table;
mod tcp;
mod udp;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet};

use self::core::{Core, Target};
use super::NetError;
use super::outlet::Outlet;
use crate::thread::{Role, spawn};
use forward::Listener;
use fragments::{Fragments, Key};
use frame::Frame;
use ping::Ping;
use tcp::Tcp;
use udp::Udp;

pub use config::{Forward, IPV6_PREFIX, Transport, UserConfig};

/// Events taken from epoll at once.
const EVENTS: usize = 256;

/// A user-mode network with one guest. Dropping it ends all connections.
pub struct UserNetwork {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    outlet: Outlet,
}

struct State {
    core: Core,
    tcp: Tcp,
    udp: Udp,
    ping: Ping,
    fragments: Fragments,
    listeners: Vec<Listener>,
    /// Frames that were made before are not for the receiver of now.
    renewed: bool,
    /// The thread sleeps, or is about to.
    asleep: bool,
    ended: bool,
}

impl UserNetwork {
    /// Starts a network: opens its forwarded ports and starts its thread.
    ///
    /// # Errors
    /// A port that can't be had, or a host without descriptors or threads.
    pub fn new(config: UserConfig) -> Result<Self, NetError> {
        let listeners = config
            .forwards
            .iter()
            .map(|forward| Listener::open(&config, *forward))
            .collect::<Result<Vec<_>, _>>()?;
        let core = Core::new(config).map_err(NetError::Start)?;
        let outlet = Outlet::new().map_err(NetError::Start)?;
        core.watch(&outlet, Target::Wake).map_err(|error| NetError::Start(error.into()))?;
        for (index, listener) in listeners.iter().enumerate() {
            listener.watch(&core, index).map_err(NetError::Start)?;
        }
        let epoll = core.epoll().map_err(NetError::Start)?;
        let state = State {
            core,
            tcp: Tcp::default(),
            udp: Udp::default(),
            ping: Ping::default(),
            fragments: Fragments::default(),
            listeners,
            renewed: false,
            asleep: false,
            ended: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), outlet });
        let thread = shared.clone();
        spawn(Role::NetUser, "net-user", move || thread.run(&epoll)).map_err(NetError::Start)?;
        Ok(Self { shared })
    }

    /// Where the forwarded ports are, in the order of the configuration: the port is the real one where 0 was asked.
    pub fn forwarded(&self) -> Vec<SocketAddr> {
        self.shared.lock().listeners.iter().filter_map(Listener::address).collect()
    }
}

impl Drop for UserNetwork {
    fn drop(&mut self) {
        // The ports are free when this returns; the thread ends by itself, for it may be the one that drops us.
        let mut state = self.shared.lock();
        state.ended = true;
        state.listeners.clear();
        state.udp.clear();
        state.ping.clear();
        let State { core, tcp, .. } = &mut *state;
        tcp.clear(core);
        drop(state);
        self.shared.outlet.wake();
    }
}

impl PacketPort for UserNetwork {
    fn features(&self) -> PortFeatures {
        PortFeatures { checksum: true, segments: true, gives_partial_checksums: true, gives_segments: true }
    }

    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures) {
        let mut state = self.shared.lock();
        // Large segments go with partial checksums (virtio 1.2, 5.1.3.1).
        let segments = accepted.gives_segments && accepted.gives_partial_checksums;
        state.core.accepted = PortFeatures { gives_segments: segments, ..accepted };
        state.core.outbox.clear();
        state.renewed = true;
        drop(state);
        self.shared.outlet.attach(receiver);
    }

    fn send(&self, frame: &[u8], _offload: &Offload) {
        let mut state = self.shared.lock();
        state.core.now = Instant::now();
        state.input(frame);
        let stalled = self.shared.outlet.is_stalled();
        let wake = state.asleep && (state.core.hurry || (state.is_busy() && !stalled));
        if wake {
            state.asleep = false;
        }
        drop(state);
        if wake {
            self.shared.outlet.wake();
        }
    }

    fn ready(&self) {
        self.shared.outlet.ready();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn run(&self, epoll: &OwnedFd) {
        let mut events = Vec::with_capacity(EVENTS);
        let mut frames = VecDeque::new();
        while let Some(timeout) = self.turn(&mut events, &mut frames) {
            let timeout = timeout.map(|timeout| Timespec {
                tv_sec: timeout.as_secs() as i64,
                tv_nsec: timeout.subsec_nanos().into(),
            });
            // An interruption is an empty answer.
            let _ = epoll::wait(epoll, spare_capacity(&mut events), timeout.as_ref());
        }
    }

    /// One look at everything. The answer: how long there is nothing to do; none: the network has ended.
    fn turn(&self, events: &mut Vec<epoll::Event>, frames: &mut VecDeque<Frame>) -> Option<Option<Duration>> {
        let mut state = self.lock();
        if state.ended {
            return None;
        }
        state.core.now = Instant::now();
        for event in events.drain(..) {
            match Target::decode(event.data) {
                Target::Wake => self.outlet.woken(),
                target => state.event(target),
            }
        }
        if state.renewed {
            state.renewed = false;
            frames.clear();
        }
        let stalled = self.outlet.is_stalled();
        state.timers(stalled);
        if !stalled && frames.is_empty() {
            state.work();
            state.core.take_outbox(frames);
        }
        let busy = !stalled && (!frames.is_empty() || state.is_busy());
        state.asleep = !busy;
        state.core.hurry = false;
        let timeout = if busy { Some(Duration::ZERO) } else { state.core.until_timer() };
        drop(state);
        if !stalled {
            self.deliver(frames);
        }
        Some(timeout)
    }

    /// Hands frames to the guest, as far as it takes them.
    fn deliver(&self, frames: &mut VecDeque<Frame>) {
        let Some(receiver) = self.outlet.receiver() else {
            frames.clear();
            return;
        };
        while let Some(frame) = frames.front() {
            if !self.outlet.deliver(&*receiver, frame.bytes(), frame.offload()) {
                return;
            }
            frames.pop_front();
        }
    }
}

impl State {
    /// There is something to do that needs no event.
    fn is_busy(&self) -> bool {
        self.tcp.is_busy()
            || self.udp.is_busy()
            || !self.core.outbox.is_empty()
            || self.listeners.iter().any(Listener::is_busy)
    }

    fn event(&mut self, target: Target) {
        match target {
            Target::Wake | Target::Advertise => {}
            Target::Listener(index) => {
                if let Some(listener) = self.listeners.get_mut(index as usize) {
                    listener.event();
                }
            }
            Target::Tcp(id) => self.tcp.event(&mut self.core, id),
            Target::Udp(id) => self.udp.event(id),
            Target::Ping(id) => self.ping.event(&mut self.core, id),
        }
    }

    fn timers(&mut self, stalled: bool) {
        while let Some(target) = self.core.due() {
            match target {
                Target::Tcp(id) => self.tcp.timeout(&mut self.core, id, stalled),
                Target::Udp(id) => self.udp.timeout(&mut self.core, id),
                Target::Ping(id) => self.ping.timeout(&mut self.core, id),
                Target::Advertise => neighbour::advertise_again(&mut self.core),
                target => self.event(target),
            }
        }
    }

    fn work(&mut self) {
        self.tcp.work(&mut self.core);
        self.udp.work(&mut self.core);
        for (index, listener) in self.listeners.iter_mut().enumerate() {
            listener.work(&mut self.core, index, &mut self.tcp, &mut self.udp);
        }
    }

    /// A frame of the guest's.
    fn input(&mut self, bytes: &[u8]) {
        let Ok(frame) = EthernetFrame::new_checked(bytes) else { return };
        let (source, dest) = (frame.src_addr(), frame.dst_addr());
        if !source.is_unicast() || (dest.is_unicast() && dest != self.core.link.ours) {
            return;
        }
        self.core.link.guest = source;
        self.core.guest_known = true;
        match frame.ethertype() {
            EthernetProtocol::Arp => neighbour::arp(&mut self.core, frame.payload()),
            EthernetProtocol::Ipv4 => self.ipv4(frame.payload()),
            EthernetProtocol::Ipv6 if self.core.config.ipv6 => self.ipv6(frame.payload()),
            _ => {}
        }
    }

    fn ipv4(&mut self, bytes: &[u8]) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        if packet.version() != 4 || !packet.verify_checksum() {
            return;
        }
        let (source, dest) = (packet.src_addr(), packet.dst_addr());
        let (protocol, payload) = (packet.next_header(), packet.payload());
        if packet.more_frags() || packet.frag_offset() != 0 {
            let key =
                Key { source: source.into(), dest: dest.into(), protocol, ident: packet.ident().into() };
            let at = packet.frag_offset().into();
            let whole = self.fragments.add(self.core.now, key, at, packet.more_frags(), payload);
            if let Some(whole) = whole {
                self.ipv4_payload(source, dest, protocol, &whole);
            }
            return;
        }
        self.ipv4_payload(source, dest, protocol, payload);
    }

    fn ipv4_payload(&mut self, source: Ipv4Addr, dest: Ipv4Addr, protocol: IpProtocol, bytes: &[u8]) {
        let core = &mut self.core;
        match protocol {
            IpProtocol::Tcp if !source.is_unspecified() => {
                self.tcp.input(core, source.into(), dest.into(), bytes)
            }
            IpProtocol::Udp => self.udp.input(core, source.into(), dest.into(), bytes),
            IpProtocol::Icmp => icmp::input_v4(core, &mut self.ping, source, dest, bytes),
            _ => {}
        }
    }

    fn ipv6(&mut self, bytes: &[u8]) {
        let Ok(packet) = Ipv6Packet::new_checked(bytes) else { return };
        if packet.version() != 6 {
            return;
        }
        let (source, dest, hop_limit) = (packet.src_addr(), packet.dst_addr(), packet.hop_limit());
        let payload = packet.payload();
        if packet.next_header() != IpProtocol::Ipv6Frag {
            self.ipv6_payload(source, dest, hop_limit, packet.next_header(), payload);
            return;
        }
        let Some((&[protocol, _, high, low, a, b, c, d], bytes)) = payload.split_first_chunk() else {
            return;
        };
        let protocol = IpProtocol::from(protocol);
        let place = u16::from_be_bytes([high, low]);
        let key = Key {
            source: source.into(),
            dest: dest.into(),
            protocol,
            ident: u32::from_be_bytes([a, b, c, d]),
        };
        // The lowest bit says that more follows.
        let whole = self.fragments.add(self.core.now, key, usize::from(place & !7), place & 1 != 0, bytes);
        if let Some(whole) = whole {
            self.ipv6_payload(source, dest, hop_limit, protocol, &whole);
        }
    }

    fn ipv6_payload(
        &mut self,
        source: Ipv6Addr,
        dest: Ipv6Addr,
        hop_limit: u8,
        protocol: IpProtocol,
        bytes: &[u8],
    ) {
        let core = &mut self.core;
        match protocol {
            IpProtocol::Tcp if !source.is_unspecified() => {
                self.tcp.input(core, source.into(), dest.into(), bytes)
            }
            IpProtocol::Udp => self.udp.input(core, source.into(), dest.into(), bytes),
            IpProtocol::Icmpv6 => icmp::input_v6(core, &mut self.ping, source, dest, hop_limit, bytes),
            _ => {}
        }
    }
}
