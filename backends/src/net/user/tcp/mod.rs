//! TCP: each connection of the guest's ends here and goes on as a socket of the host's.

mod flow;
mod seq;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};
use smoltcp::wire::TcpPacket;

use super::core::{Core, Route, Target};
use super::frame::{self, TcpFields};
use super::table::{Id, Table};
use flow::{Flow, Stage, Verdict};
use seq::{Initial, Seq};

pub use flow::Key;

/// Connections of one guest, at most.
const FLOWS: usize = 4096;

/// Connections that the host is still opening, at most: a flood of SYNs stops here.
const CONNECTING: usize = 512;

/// Turns of flows between two looks at anything else.
const TURNS: usize = 256;

/// What a flow is told of a segment of the guest's.
pub struct Input<'a> {
    pub seq: Seq,
    pub ack: Option<Seq>,
    pub window: u16,
    pub syn: bool,
    pub fin: bool,
    pub rst: bool,
    pub payload: &'a [u8],
}

/// All connections.
#[derive(Default)]
pub struct Tcp {
    flows: Table<Key, Flow>,
    connecting: usize,
    initial: Initial,
}

impl Tcp {
    /// A TCP segment from the guest; `bytes` begin with its header.
    pub fn input(&mut self, core: &mut Core, source: IpAddr, dest: IpAddr, bytes: &[u8]) {
        let Ok(packet) = TcpPacket::new_checked(bytes) else { return };
        let key = Key {
            guest: SocketAddr::new(source, packet.src_port()),
            peer: SocketAddr::new(dest, packet.dst_port()),
        };
        let input = Input {
            seq: packet.seq_number().into(),
            ack: packet.ack().then(|| packet.ack_number().into()),
            window: packet.window_len(),
            syn: packet.syn(),
            fin: packet.fin(),
            rst: packet.rst(),
            payload: packet.payload(),
        };
        match self.flows.find(&key) {
            Some(id) => self.flow_input(core, id, &packet, &input),
            None if input.rst => {}
            None if input.syn && input.ack.is_none() => self.open(core, key, &packet),
            None => refuse(core, key, &input),
        }
    }

    fn flow_input(&mut self, core: &mut Core, id: Id, packet: &TcpPacket<&[u8]>, input: &Input<'_>) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        if flow.stage == Stage::SynSent {
            self.answered(core, id, packet, input);
            return;
        }
        let verdict = flow.input(core, input);
        self.settle(core, id, verdict);
        self.flows.enqueue(id);
    }

    /// What came in answer to our SYN (RFC 9293, section 3.10.7.3).
    fn answered(&mut self, core: &mut Core, id: Id, packet: &TcpPacket<&[u8]>, input: &Input<'_>) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        if input.ack != Some(flow.next) {
            if input.ack.is_some() && !input.rst {
                // Of an earlier connection between the same two ends, which the guest has not forgotten yet.
                refuse(core, flow.key, input);
                flow.send_syn(core);
            }
            return;
        }
        if input.rst {
            self.settle(core, id, Verdict::Broken);
            return;
        }
        if input.syn {
            take_options(flow, packet);
            flow.answered(input);
            self.flows.enqueue(id);
        }
    }

    /// The guest wants a connection.
    fn open(&mut self, core: &mut Core, key: Key, packet: &TcpPacket<&[u8]>) {
        let input = Input {
            seq: packet.seq_number().into(),
            ack: None,
            window: packet.window_len(),
            syn: true,
            fin: false,
            rst: false,
            payload: &[],
        };
        let Some(target) = (match core.route(key.peer) {
            Route::Dns => core.name_server(),
            Route::Host(target) => Some(target),
            Route::Refused => None,
        }) else {
            return refuse(core, key, &input);
        };
        if self.connecting >= CONNECTING {
            return;
        }
        self.make_room(core);
        let Ok(socket) = dial(target) else { return refuse(core, key, &input) };
        let id = self.flows.next_id();
        if core.watch(&socket, Target::Tcp(id)).is_err() {
            return refuse(core, key, &input);
        }
        let iss = self.initial.number(&key, core.now);
        let mut flow = Flow::new(key, Target::Tcp(id), socket, Stage::Connecting, iss, core);
        flow.received = input.seq + 1;
        flow.window = usize::from(input.window);
        take_options(&mut flow, packet);
        flow.arm_connect(core);
        self.connecting += 1;
        self.flows.insert(key, flow);
    }

    /// A connection from the host's side, to be opened towards the guest.
    pub fn accept(&mut self, core: &mut Core, key: Key, socket: OwnedFd) {
        // A socket that cannot be served is closed, which its peer sees; what the guest has open is left alone.
        if self.is_full(core) || sockopt::set_tcp_nodelay(&socket, true).is_err() {
            return;
        }
        let id = self.flows.next_id();
        if core.watch(&socket, Target::Tcp(id)).is_err() {
            return;
        }
        let iss = self.initial.number(&key, core.now);
        let mut flow = Flow::new(key, Target::Tcp(id), socket, Stage::SynSent, iss, core);
        flow.send_syn(core);
        self.flows.insert(key, flow);
    }

    /// The flow exists already.
    pub fn has(&self, key: &Key) -> bool {
        self.flows.find(key).is_some()
    }

    /// Something happened at a flow's socket.
    pub fn event(&mut self, core: &mut Core, id: Id) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.readable = true;
        flow.writable = true;
        if flow.stage == Stage::Connecting {
            match sockopt::socket_error(&flow.socket) {
                Ok(Ok(())) if is_connected(&flow.socket) => {
                    self.connecting -= 1;
                    flow.stage = Stage::SynReceived;
                    flow.send_syn(core);
                }
                Ok(Ok(())) => {}
                _ => self.settle(core, id, Verdict::Reset),
            }
        }
        self.flows.enqueue(id);
    }

    /// A flow's timer has gone off.
    pub fn timeout(&mut self, core: &mut Core, id: Id, stalled: bool) {
        if let Some(flow) = self.flows.get_mut(id) {
            let verdict = flow.timeout(core, stalled);
            self.settle(core, id, verdict);
        }
    }

    /// Some flow has something to do.
    pub fn is_busy(&self) -> bool {
        self.flows.is_busy()
    }

    /// Gives flows that have something to do their turns, as far as the guest takes frames.
    pub fn work(&mut self, core: &mut Core) {
        for _ in 0..TURNS {
            if !core.has_room() {
                return;
            }
            let Some(id) = self.flows.next_queued() else { return };
            let Some(flow) = self.flows.get_mut(id) else { continue };
            let (verdict, more) = flow.work(core);
            self.settle(core, id, verdict);
            if more {
                self.flows.enqueue(id);
            }
        }
    }

    fn settle(&mut self, core: &mut Core, id: Id, verdict: Verdict) {
        if verdict == Verdict::Alive {
            return;
        }
        let Some(flow) = self.flows.get_mut(id) else { return };
        let key = flow.key;
        let Some(mut flow) = self.flows.remove(&key) else { return };
        self.connecting -= usize::from(flow.stage == Stage::Connecting);
        match verdict {
            Verdict::Reset => flow.send_reset(core),
            Verdict::Done => flow.send_last(core),
            Verdict::Broken | Verdict::Alive => {}
        }
        flow.release(core, verdict != Verdict::Done);
    }

    fn is_full(&self, core: &Core) -> bool {
        // A quarter of the sockets is for UDP.
        self.flows.len() >= FLOWS.min(core.sockets * 3 / 4)
    }

    /// Where there are too many connections, the one that was idle for longest makes way.
    fn make_room(&mut self, core: &mut Core) {
        if !self.is_full(core) {
            return;
        }
        let oldest = self.flows.iter().min_by_key(|flow| flow.last_used).map(|flow| flow.key);
        if let Some(id) = oldest.and_then(|key| self.flows.find(&key)) {
            self.settle(core, id, Verdict::Reset);
        }
    }

    /// Ends all connections.
    pub fn clear(&mut self, core: &mut Core) {
        for flow in self.flows.drain() {
            flow.release(core, true);
        }
        self.connecting = 0;
    }
}

/// Begins to connect to an address of the host's side.
fn dial(target: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let family = if target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    // The guest has its own Nagle.
    sockopt::set_tcp_nodelay(&socket, true)?;
    match connect(&socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

fn is_connected(socket: &OwnedFd) -> bool {
    rustix::net::getpeername(socket).is_ok()
}

fn take_options(flow: &mut Flow, packet: &TcpPacket<&[u8]>) {
    let Ok(options) = packet.options_summary() else { return };
    // 536 is what everybody must take (RFC 9293, section 3.7.1); less would only cost.
    flow.mss = usize::from(options.max_segment_size.unwrap_or(536)).clamp(536, flow.mss);
    flow.scaled = options.window_scale.is_some();
    // RFC 7323, section 2.3.
    flow.shift = options.window_scale.unwrap_or(0).min(14);
}

/// Answers what belongs to no connection with a reset (RFC 9293, section 3.10.7.1).
fn refuse(core: &mut Core, key: Key, input: &Input<'_>) {
    let length = input.payload.len() + usize::from(input.syn) + usize::from(input.fin);
    let fields = match input.ack {
        Some(ack) => TcpFields { seq: ack.into(), rst: true, ..TcpFields::default() },
        None => TcpFields { ack: Some((input.seq + length).into()), rst: true, ..TcpFields::default() },
    };
    let frame = core.link.tcp(key.peer, key.guest, &fields, (frame::buffer(0), 0), core.accepted);
    core.offer(frame);
}
