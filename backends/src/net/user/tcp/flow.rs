//! One TCP connection: the guest's end of it is ours, the other end is a socket of the host's.
//!
//! What the guest sends goes into the socket at once and is acknowledged when the host's kernel has taken it; only
//! what a full socket leaves over is kept here, and never more than the window that was offered. What the socket
//! gives is kept until the guest has acknowledged it. The wire does not lose or reorder frames, but the guest may
//! drop some: the oldest segment is sent again by timer or after three duplicate acknowledgements (RFC 9293, RFC 6298,
//! RFC 6582).

use std::collections::VecDeque;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};

use super::super::core::{Core, LARGEST, TCP_BUDGET, Target};
use super::super::frame::{self, HEADROOM, TcpFields};
use super::super::neighbour;
use super::Input;
use super::seq::Seq;

/// The window that the guest is offered, and the bytes in flight towards it, at most.
pub const WINDOW: usize = 1 << 20;

/// What our window is shifted by where the guest knows of window scaling (RFC 7323).
pub const WINDOW_SHIFT: u8 = 7;

/// Segments in flight towards the guest, at most: they have a cost of their own, however short they are.
const SEGMENTS: usize = 256;

/// A read that fills less than this share of a buffer is copied to a smaller one.
const SHARE: usize = 2;

/// First and longest time-out until a segment is sent again, and how often it is.
const RTO: Duration = Duration::from_millis(300);
const RTO_MAX: Duration = Duration::from_secs(60);
const RETRIES: u32 = 15;

/// How long timers rest, at least, while the guest takes no frames at all.
const STALLED: Duration = Duration::from_secs(1);

/// How often a connection request is sent to the guest.
const SYN_RETRIES: u32 = 6;

/// How long the host may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// The guest's end and the other end as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub guest: SocketAddr,
    pub peer: SocketAddr,
}

/// How far the opening has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The host is connecting; the guest hears of it when that has succeeded or failed.
    Connecting,
    /// A connection from the host's side: the guest was sent a SYN.
    SynSent,
    /// The guest was sent a SYN with an ACK of its own.
    SynReceived,
    /// Open, or half closed.
    Open,
}

/// How a flow ends, if it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Alive,
    /// Both sides have closed.
    Done,
    /// The host's side broke, or the guest doesn't answer: both sides hear of it.
    Reset,
    /// The guest broke it: the host's peer hears of it.
    Broken,
}

struct Segment {
    seq: Seq,
    length: usize,
    frame: frame::Frame,
    /// What it counts for in [`Core::held`].
    cost: usize,
}

/// See the module.
pub struct Flow {
    pub key: Key,
    pub target: Target,
    pub socket: OwnedFd,
    pub stage: Stage,
    /// The guest's next byte.
    pub received: Seq,
    /// The guest's SYN said that it scales windows.
    pub scaled: bool,
    /// What the host's socket has not taken yet.
    pending: VecDeque<u8>,
    guest_closed: bool,
    host_told: bool,
    /// The window's right edge, as last told.
    edge: Seq,
    /// The oldest byte that the guest has not acknowledged, and the next one to send.
    pub unacked: Seq,
    pub next: Seq,
    pub window: usize,
    pub shift: u8,
    /// The guest's, and the wire's.
    pub mss: usize,
    segments: VecDeque<Segment>,
    host_closed: bool,
    /// The socket may have something to read, or room.
    pub readable: bool,
    pub writable: bool,
    pub ack_due: bool,
    duplicates: u32,
    /// Losses up to here are being mended.
    recover: Option<Seq>,
    retries: u32,
    rto: Duration,
    pub deadline: Option<Instant>,
    armed: Option<Instant>,
    pub last_used: Instant,
}

impl Flow {
    pub fn new(key: Key, target: Target, socket: OwnedFd, stage: Stage, iss: Seq, core: &Core) -> Self {
        Self {
            key,
            target,
            socket,
            stage,
            received: Seq::default(),
            scaled: false,
            pending: VecDeque::new(),
            guest_closed: false,
            host_told: false,
            edge: Seq::default(),
            unacked: iss,
            next: iss,
            window: 0,
            shift: 0,
            mss: core.mss(key.guest.ip()),
            segments: VecDeque::new(),
            host_closed: false,
            readable: false,
            writable: false,
            ack_due: false,
            duplicates: 0,
            recover: None,
            retries: 0,
            rto: RTO,
            deadline: None,
            armed: None,
            last_used: core.now,
        }
    }

    fn in_flight(&self) -> usize {
        self.next.since(self.unacked)
    }

    fn arm(&mut self, core: &mut Core, after: Duration) {
        let at = core.now + after;
        self.deadline = Some(at);
        if self.armed.is_none_or(|armed| armed > at) {
            self.armed = Some(at);
            core.arm(at, self.target);
        }
    }

    /// The host has this long to connect.
    pub fn arm_connect(&mut self, core: &mut Core) {
        self.arm(core, CONNECT_TIMEOUT);
    }

    /// The window to tell the guest, on the wire.
    fn told_window(&mut self) -> u16 {
        let free = WINDOW - self.pending.len();
        let shift = if self.scaled { WINDOW_SHIFT } else { 0 };
        let told = (free >> shift).min(0xffff);
        self.edge = self.received + (told << shift);
        told as u16
    }

    fn fields(&mut self) -> TcpFields {
        self.ack_due = false;
        let window = self.told_window();
        TcpFields {
            seq: self.next.into(),
            ack: Some(self.received.into()),
            window,
            mss: self.mss,
            ..TcpFields::default()
        }
    }

    /// Sends our SYN: the first, or again.
    pub fn send_syn(&mut self, core: &mut Core) {
        if let (false, IpAddr::V4(guest)) = (core.guest_known, self.key.guest.ip()) {
            neighbour::ask_for_guest(core, guest);
        }
        let mss = core.mss(self.key.guest.ip()) as u16;
        let answer = self.stage == Stage::SynReceived;
        let mut options = [2, 4, 0, 0, 1, 3, 3, WINDOW_SHIFT];
        options[2..4].copy_from_slice(&mss.to_be_bytes());
        let options = if answer && !self.scaled { &options[..4] } else { &options[..] };
        // The window of a SYN is never scaled (RFC 7323, section 2.2).
        let fields = TcpFields {
            seq: self.unacked.into(),
            ack: answer.then(|| self.received.into()),
            window: 0xffff,
            syn: true,
            options: options.len(),
            mss: self.mss,
            ..TcpFields::default()
        };
        self.edge = self.received + 0xffff;
        self.next = self.unacked + 1;
        let frame = core.link.tcp(
            self.key.peer,
            self.key.guest,
            &fields,
            (frame::buffer_with(options), options.len()),
            core.accepted,
        );
        core.offer(frame);
        let rto = self.rto;
        self.arm(core, rto);
    }

    /// The guest has answered our SYN with its own.
    pub fn answered(&mut self, segment: &Input<'_>) {
        self.received = segment.seq + 1;
        self.edge = self.received + 0xffff;
        self.unacked = self.next;
        // The window of a SYN is not scaled; the flow learns the real one with the next segment.
        self.window = usize::from(segment.window);
        self.stage = Stage::Open;
        self.deadline = None;
        self.retries = 0;
        self.rto = RTO;
        self.ack_due = true;
    }

    /// Something that the guest sent.
    pub fn input(&mut self, core: &mut Core, segment: &Input<'_>) -> Verdict {
        self.last_used = core.now;
        if segment.rst {
            let inside = segment.seq >= self.received && segment.seq <= self.edge;
            return if inside { Verdict::Broken } else { Verdict::Alive };
        }
        if segment.syn {
            // A SYN sent again, or one that a guest sent that has forgotten the connection: it answers our ACK
            // with a reset (RFC 9293, section 3.5.1).
            match self.stage {
                Stage::SynReceived => self.send_syn(core),
                Stage::Connecting => {}
                _ => self.ack_due = true,
            }
            return Verdict::Alive;
        }
        let Some(ack) = segment.ack else { return Verdict::Alive };
        if ack > self.next || self.stage == Stage::Connecting {
            self.ack_due = self.stage == Stage::Open;
            return Verdict::Alive;
        }
        if self.stage != Stage::Open {
            if ack != self.next {
                return Verdict::Alive;
            }
            self.stage = Stage::Open;
        }
        self.acknowledge(core, ack, segment);
        // Asks whether we are there, or for the window (RFC 9293, sections 3.8.4 and 3.8.6.1).
        self.ack_due |= segment.seq < self.received;
        if (!segment.payload.is_empty() || segment.fin)
            && let Err(verdict) = self.take(core, segment)
        {
            return verdict;
        }
        self.verdict()
    }

    /// Frees what the guest has, and looks for losses.
    fn acknowledge(&mut self, core: &mut Core, ack: Seq, segment: &Input<'_>) {
        let window = usize::from(segment.window) << self.shift;
        if ack > self.unacked {
            self.unacked = ack;
            while self.segments.front().is_some_and(|first| first.seq + first.length <= ack) {
                if let Some(first) = self.segments.pop_front() {
                    core.held -= first.cost;
                    if let Some(buffer) = first.frame.into_buffer() {
                        core.recycle(buffer);
                    }
                }
            }
            self.duplicates = 0;
            self.retries = 0;
            self.rto = RTO;
            self.deadline = None;
            if self.in_flight() > 0 {
                self.arm(core, RTO);
            }
            match self.recover {
                Some(until) if ack < until => self.send_again(core),
                _ => self.recover = None,
            }
        } else if ack == self.unacked
            && self.in_flight() > 0
            && segment.payload.is_empty()
            && !segment.fin
            && window == self.window
        {
            self.duplicates += 1;
            if self.duplicates == 3 && self.recover.is_none() {
                self.recover = Some(self.next);
                self.send_again(core);
            }
        }
        if ack >= self.unacked {
            if self.in_flight() == 0 {
                // The guest is there, if its window is closed.
                self.retries = 0;
            }
            self.window = window;
        }
    }

    /// Takes data and the guest's FIN, where they are next in order.
    fn take(&mut self, core: &mut Core, segment: &Input<'_>) -> Result<(), Verdict> {
        if segment.seq > self.received {
            // At once, and for each: that is how the guest sees what was lost (RFC 5681, section 4.2).
            let fields = self.fields();
            core.offer(self.empty(core, &fields));
            return Ok(());
        }
        self.ack_due = true;
        if self.guest_closed {
            return Ok(());
        }
        let known = self.received.since(segment.seq);
        let Some(mut payload) = segment.payload.get(known..) else { return Ok(()) };
        let mut fin = segment.fin;
        let offered = self.edge.since(self.received);
        if payload.len() > offered {
            payload = &payload[..offered];
            fin = false;
        }
        let mut taken = 0;
        if self.pending.is_empty() && !payload.is_empty() {
            taken = self.send_to_host(payload)?;
        }
        let rest = &payload[taken..];
        if core.held + rest.len() <= TCP_BUDGET {
            self.pending.extend(rest);
            core.held += rest.len();
            taken = payload.len();
        }
        self.received += taken;
        if fin && taken == payload.len() {
            self.received += 1;
            self.guest_closed = true;
            self.tell_host()?;
        }
        Ok(())
    }

    fn send_to_host(&mut self, bytes: &[u8]) -> Result<usize, Verdict> {
        loop {
            match send(&self.socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.writable = sent == bytes.len();
                    return Ok(sent);
                }
                Err(Errno::AGAIN) => {
                    self.writable = false;
                    return Ok(0);
                }
                Err(Errno::INTR) => {}
                Err(_) => return Err(Verdict::Reset),
            }
        }
    }

    /// Hands the guest's FIN on when everything before it is gone.
    fn tell_host(&mut self) -> Result<(), Verdict> {
        if self.guest_closed && !self.host_told && self.pending.is_empty() {
            self.host_told = true;
            shutdown(&self.socket, Shutdown::Write).map_err(|_| Verdict::Reset)?;
        }
        Ok(())
    }

    fn verdict(&self) -> Verdict {
        let done = self.host_told && self.host_closed && self.unacked == self.next;
        if done { Verdict::Done } else { Verdict::Alive }
    }

    /// Does what can be done now. True in the answer: there is more, as soon as the guest takes frames.
    pub fn work(&mut self, core: &mut Core) -> (Verdict, bool) {
        match self.try_work(core) {
            Ok(more) => (self.verdict(), more),
            Err(verdict) => (verdict, false),
        }
    }

    fn try_work(&mut self, core: &mut Core) -> Result<bool, Verdict> {
        if self.stage != Stage::Open {
            return Ok(false);
        }
        self.flush(core)?;
        let more = self.readable && !self.host_closed && self.read(core)?;
        if self.ack_due {
            if !core.has_room() {
                return Ok(true);
            }
            self.send_empty(core, false);
        }
        Ok(more)
    }

    /// Hands the host what it had no room for.
    fn flush(&mut self, core: &mut Core) -> Result<(), Verdict> {
        while self.writable && !self.pending.is_empty() {
            let pending = mem::take(&mut self.pending);
            let sent = self.send_to_host(pending.as_slices().0);
            self.pending = pending;
            let sent = sent?;
            self.pending.drain(..sent);
            core.held -= sent;
            if self.pending.is_empty() {
                self.pending = VecDeque::new();
            }
        }
        self.tell_host()?;
        // Tells of a window that has opened (RFC 9293, section 3.8.6.2.2).
        let largest = if self.scaled { WINDOW } else { 0xffff };
        let free = (WINDOW - self.pending.len()).min(largest);
        if free >= self.edge.since(self.received) + largest / 2 {
            self.ack_due = true;
        }
        Ok(())
    }

    /// A segment without data.
    fn empty(&self, core: &Core, fields: &TcpFields) -> frame::Frame {
        core.link.tcp(self.key.peer, self.key.guest, fields, (frame::buffer(0), 0), core.accepted)
    }

    /// Sends a segment without data.
    fn send_empty(&mut self, core: &mut Core, fin: bool) {
        let fields = TcpFields { fin, ..self.fields() };
        core.push(self.empty(core, &fields));
    }

    /// Reads once from the host and sends it on. True: there may be more.
    fn read(&mut self, core: &mut Core) -> Result<bool, Verdict> {
        if !core.has_room() {
            return Ok(true);
        }
        let window = self.window.min(WINDOW).saturating_sub(self.in_flight());
        let silly = window < self.mss && self.in_flight() > 0;
        let dear = core.held >= TCP_BUDGET && self.in_flight() > 0;
        if window == 0 || silly || dear || self.segments.len() >= SEGMENTS {
            if self.in_flight() == 0 && self.deadline.is_none() {
                let rto = self.rto;
                self.arm(core, rto);
            }
            // An acknowledgement brings the flow back here.
            return Ok(false);
        }
        let mut limit = window.min(LARGEST);
        if core.held >= TCP_BUDGET {
            limit = limit.min(self.mss);
        }
        if limit > self.mss {
            limit -= limit % self.mss;
        }
        let mut buffer = core.buffer();
        let count = match recv(&self.socket, &mut buffer[HEADROOM..HEADROOM + limit], RecvFlags::DONTWAIT) {
            Ok((count, _)) => count,
            Err(Errno::AGAIN | Errno::INTR) => {
                self.readable = false;
                core.recycle(buffer);
                return Ok(false);
            }
            Err(_) => return Err(Verdict::Reset),
        };
        if count == 0 {
            core.recycle(buffer);
            self.host_closed = true;
            self.send_empty(core, true);
            self.next += 1;
            let rto = self.rto;
            self.arm(core, rto);
            return Ok(false);
        }
        self.send_data(core, buffer, count);
        Ok(true)
    }

    /// Sends what was read: as it is, or in pieces where the guest doesn't take large segments.
    fn send_data(&mut self, core: &mut Core, buffer: Vec<u8>, count: usize) {
        let first = self.in_flight() == 0;
        let piece = if core.accepted.gives_segments { count } else { self.mss };
        if piece >= count && count * SHARE >= LARGEST {
            self.send_segment(core, buffer, count, true);
        } else {
            let pieces = count.div_ceil(piece);
            for (number, bytes) in buffer[HEADROOM..HEADROOM + count].chunks(piece).enumerate() {
                self.send_segment(core, frame::buffer_with(bytes), bytes.len(), number + 1 == pieces);
            }
            core.recycle(buffer);
        }
        if first {
            self.rto = RTO;
            self.arm(core, RTO);
        }
    }

    fn send_segment(&mut self, core: &mut Core, buffer: Vec<u8>, length: usize, psh: bool) {
        let (seq, cost) = (self.next, buffer.capacity());
        let fields = TcpFields { psh, ..self.fields() };
        let frame = core.link.tcp(self.key.peer, self.key.guest, &fields, (buffer, length), core.accepted);
        core.held += cost;
        self.segments.push_back(Segment { seq, length, frame: frame.clone(), cost });
        self.next += length;
        core.push(frame);
    }

    /// Sends the oldest segment again.
    fn send_again(&mut self, core: &mut Core) {
        match self.segments.front() {
            Some(first) => core.offer(first.frame.clone()),
            None if self.host_closed => {
                let fields = TcpFields { fin: true, seq: self.unacked.into(), ..self.fields() };
                core.offer(self.empty(core, &fields));
            }
            None => {}
        }
    }

    /// The flow's timer has gone off. `stalled`: the guest takes no frames at all now.
    pub fn timeout(&mut self, core: &mut Core, stalled: bool) -> Verdict {
        self.armed = None;
        let Some(deadline) = self.deadline else { return Verdict::Alive };
        if deadline > core.now {
            self.arm(core, deadline - core.now);
            return Verdict::Alive;
        }
        if stalled {
            let rest = self.rto.max(STALLED);
            self.arm(core, rest);
            return Verdict::Alive;
        }
        self.deadline = None;
        self.retries += 1;
        let limit = if self.stage == Stage::Open { RETRIES } else { SYN_RETRIES };
        if self.stage == Stage::Connecting || self.retries > limit {
            return Verdict::Reset;
        }
        self.rto = (self.rto * 2).min(RTO_MAX);
        match self.stage {
            Stage::SynSent | Stage::SynReceived => {
                self.send_syn(core);
                return Verdict::Alive;
            }
            _ if self.in_flight() > 0 => {
                self.recover = Some(self.next);
                self.send_again(core);
            }
            _ => self.probe(core),
        }
        let rto = self.rto;
        if self.in_flight() > 0 || (self.readable && !self.host_closed) {
            self.arm(core, rto);
        }
        Verdict::Alive
    }

    /// Asks for the window: a byte that the guest has makes it say so (RFC 9293, section 3.8.6.1).
    fn probe(&mut self, core: &mut Core) {
        let fields = TcpFields { seq: (self.next - 1).into(), ..self.fields() };
        core.offer(self.empty(core, &fields));
    }

    /// Tells the guest that the connection broke, or never came about.
    pub fn send_reset(&mut self, core: &mut Core) {
        // A guest that has not answered our SYN has no connection to break.
        if self.stage != Stage::SynSent {
            let fields = TcpFields { rst: true, ..self.fields() };
            core.offer(self.empty(core, &fields));
        }
    }

    /// Acknowledges the guest's FIN when both sides have closed.
    pub fn send_last(&mut self, core: &mut Core) {
        if self.ack_due {
            self.send_empty(core, false);
        }
    }

    /// Lets go of what the flow holds. `reset`: the host's peer is told that it broke.
    pub fn release(self, core: &mut Core, reset: bool) {
        core.held -= self.pending.len() + self.segments.iter().map(|segment| segment.cost).sum::<usize>();
        if reset {
            // Fails only for a socket that is broken already.
            let _ = sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
        }
    }
}
