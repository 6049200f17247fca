//! A switch between machines of one host and user, without a process of its own: each member has a connection to each
//! other one (Unix sockets that keep messages apart), and sends frames straight to where their receiver is. So the end
//! of any member, however sudden, is nothing to the others.

mod meeting;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bivisor_machine::net_switch::{Destination, NetSwitch, PortId};
use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, accept_with, recv, sendmsg, sockopt,
};
use rustix::process::geteuid;

use super::NetError;
use super::outlet::Outlet;
use super::{segment, vnet};
use crate::runtime;
use crate::thread::{Role, spawn};

/// The guest's own port of the switch; the others are members.
const GUEST: PortId = 0;

/// Events with a meaning of their own; the others are members' ports.
const WAKE: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

const EVENTS: usize = 64;

/// Frames taken from one member before the next one's turn.
const BURST: usize = 32;

/// Members of a switch, at most.
const MEMBERS: usize = 256;

/// The largest message: a header, and a frame with a segment of 64 KiB.
const LARGEST: usize = vnet::HEADER + 14 + 65536;

/// A machine's port of a switch. Dropping it leaves the switch.
pub struct SwitchPort {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    outlet: Outlet,
    epoll: OwnedFd,
    listener: OwnedFd,
    began: Instant,
}

struct State {
    switch: NetSwitch,
    members: BTreeMap<PortId, Arc<OwnedFd>>,
    next: PortId,
    accepted: PortFeatures,
    file: PathBuf,
    ended: bool,
}

impl SwitchPort {
    /// Joins the user's switch of this name, which comes into being with its first member.
    ///
    /// # Errors
    /// The user's runtime folder does not let us.
    pub fn join(name: &str) -> Result<Self, NetError> {
        let folder = Self::folder(name).map_err(|error| NetError::Switch(name.into(), error))?;
        Self::join_in(&folder, name)
    }

    /// Where the members of a switch of this name meet. The folder may not be there yet.
    ///
    /// # Errors
    /// The user's runtime folder does not let us.
    pub fn folder(name: &str) -> io::Result<PathBuf> {
        Ok(runtime::folder()?.join(format!("net-{name}")))
    }

    /// Joins those who meet in this folder.
    ///
    /// # Errors
    /// The folder does not let us.
    pub fn join_in(folder: &Path, name: &str) -> Result<Self, NetError> {
        let failed = |error: std::io::Error| NetError::Switch(name.into(), error);
        let meeting = meeting::join(folder).map_err(failed)?;
        let outlet = Outlet::new().map_err(failed)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        for (socket, data) in [(outlet.wake_fd(), WAKE), (&meeting.listener, LISTENER)] {
            epoll::add(&epoll, socket, EventData::new_u64(data), EventFlags::IN | EventFlags::ET)
                .map_err(|error| failed(error.into()))?;
        }
        let state = State {
            switch: NetSwitch::new(),
            members: BTreeMap::new(),
            next: GUEST + 1,
            accepted: PortFeatures::default(),
            file: meeting.file,
            ended: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            outlet,
            epoll,
            listener: meeting.listener,
            began: Instant::now(),
        };
        for member in meeting.members {
            shared.add(member);
        }
        let shared = Arc::new(shared);
        let thread = shared.clone();
        spawn(Role::NetSwitch, "net-switch", move || Reader::new(&thread).run()).map_err(failed)?;
        Ok(Self { shared })
    }

    /// How many other members there are.
    pub fn others(&self) -> usize {
        self.shared.lock().members.len()
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        // Nothing is lost by a socket that stays: who joins next removes it.
        let _ = fs::remove_file(&state.file);
        state.members.clear();
        drop(state);
        self.shared.outlet.wake();
    }
}

impl PacketPort for SwitchPort {
    fn features(&self) -> PortFeatures {
        PortFeatures { checksum: true, segments: true, gives_partial_checksums: true, gives_segments: true }
    }

    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures) {
        let segments = accepted.gives_segments && accepted.gives_partial_checksums;
        self.shared.lock().accepted = PortFeatures { gives_segments: segments, ..accepted };
        self.shared.outlet.attach(receiver);
    }

    fn send(&self, frame: &[u8], offload: &Offload) {
        if frame.len() + vnet::HEADER > LARGEST {
            return;
        }
        let now = self.shared.now();
        let mut state = self.shared.lock();
        match state.switch.forward(GUEST, frame, now) {
            Destination::Port(port) => {
                if let Some(member) = state.members.get(&port) {
                    send(member, frame, offload);
                }
            }
            Destination::All => state.members.values().for_each(|member| send(member, frame, offload)),
            Destination::Nowhere => {}
        }
    }

    fn ready(&self) {
        self.shared.outlet.ready();
    }
}

/// Sends a frame to a member; one that takes no more loses it, as at any switch.
fn send(member: &OwnedFd, frame: &[u8], offload: &Offload) {
    let header = vnet::encode(offload);
    let parts = [IoSlice::new(&header), IoSlice::new(frame)];
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let _ = sendmsg(member, &parts, &mut SendAncillaryBuffer::default(), flags);
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    fn add(&self, member: OwnedFd) {
        let mut state = self.lock();
        if state.members.len() >= MEMBERS || state.ended {
            return;
        }
        let port = state.next;
        state.next = state.next.wrapping_add(1).max(GUEST + 1);
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if epoll::add(&self.epoll, &member, EventData::new_u64(port.into()), flags).is_ok() {
            state.members.insert(port, Arc::new(member));
        }
    }

    /// Takes those who have joined after us.
    fn accept(&self) {
        loop {
            match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(member) => {
                    // The folder lets nobody else in; this is the second lock.
                    let ours = sockopt::socket_peercred(&member).is_ok_and(|peer| peer.uid == geteuid());
                    if ours {
                        meeting::tune(&member);
                        self.add(member);
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(_) => return,
            }
        }
    }

    fn remove(&self, port: PortId) {
        let mut state = self.lock();
        state.members.remove(&port);
        state.switch.remove(port);
    }
}

/// The thread that takes frames from the other members.
struct Reader<'a> {
    shared: &'a Shared,
    /// Members that have something to read.
    ready: VecDeque<PortId>,
    /// Frames that the guest had no room for.
    held: VecDeque<(Vec<u8>, Offload)>,
    buffer: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self { shared, ready: VecDeque::new(), held: VecDeque::new(), buffer: vec![0; LARGEST] }
    }

    fn run(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let stalled = self.shared.outlet.is_stalled();
            let waiting = !self.ready.is_empty() || !self.held.is_empty();
            let busy = waiting && !stalled;
            let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            // An interruption is an empty answer.
            let _ = epoll::wait(&self.shared.epoll, spare_capacity(&mut events), busy.then_some(&timeout));
            for event in events.drain(..) {
                match event.data.u64() {
                    WAKE => self.shared.outlet.woken(),
                    LISTENER => self.shared.accept(),
                    port if !self.ready.contains(&(port as PortId)) => self.ready.push_back(port as PortId),
                    _ => {}
                }
            }
            if self.shared.lock().ended {
                return;
            }
            if !self.shared.outlet.is_stalled() {
                self.work();
            }
        }
    }

    /// Delivers what is held, then lets each member that has something have its turn.
    fn work(&mut self) {
        let receiver = self.shared.outlet.receiver();
        while let Some((frame, offload)) = self.held.front() {
            if let Some(receiver) = &receiver
                && !self.shared.outlet.deliver(&**receiver, frame, offload)
            {
                return;
            }
            self.held.pop_front();
        }
        for _ in 0..self.ready.len() {
            let Some(port) = self.ready.pop_front() else { return };
            if self.read(port, receiver.as_deref()) {
                self.ready.push_back(port);
            }
            if !self.held.is_empty() {
                return;
            }
        }
    }

    /// Takes some frames from a member. True: there may be more.
    fn read(&mut self, port: PortId, receiver: Option<&dyn PacketReceiver>) -> bool {
        let Some(member) = self.shared.lock().members.get(&port).cloned() else { return false };
        for _ in 0..BURST {
            match recv(&*member, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    self.shared.remove(port);
                    return false;
                }
                Ok((count, _)) => self.take(port, count, receiver),
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                Err(_) => {
                    self.shared.remove(port);
                    return false;
                }
            }
            if !self.held.is_empty() {
                return true;
            }
        }
        true
    }

    /// A message from a member.
    fn take(&mut self, port: PortId, count: usize, receiver: Option<&dyn PacketReceiver>) {
        let Some((header, frame)) = self.buffer[..count].split_first_chunk() else { return };
        let Some(offload) = vnet::decode(header, frame) else { return };
        let now = self.shared.now();
        let mut state = self.shared.lock();
        let destination = state.switch.forward(port, frame, now);
        let accepted = state.accepted;
        drop(state);
        // What is for another member came here only because its sender did not know better.
        let ours = matches!(destination, Destination::All | Destination::Port(GUEST));
        let (true, Some(receiver)) = (ours, receiver) else { return };
        if segment::fits(&offload, accepted) {
            if !self.shared.outlet.deliver(receiver, frame, &offload) {
                self.held.push_back((frame.to_vec(), offload));
            }
            return;
        }
        for piece in segment::finish(frame, &offload).unwrap_or_default() {
            let full = !self.held.is_empty();
            if full || !self.shared.outlet.deliver(receiver, &piece, &Offload::default()) {
                self.held.push_back((piece, Offload::default()));
            }
        }
    }
}
