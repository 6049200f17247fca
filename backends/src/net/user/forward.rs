//! Ports of the host that lead to the guest.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags, recvfrom};

use super::super::NetError;
use super::config::{Forward, Transport, UserConfig};
use super::core::{Core, Target};
use super::frame::HEADROOM;
use super::neighbour;
use super::tcp::{self, Tcp};
use super::udp::{self, Udp};

/// Connections or datagrams taken at once.
const BURST: usize = 64;

/// How long a port rests when the host has no descriptor for one more connection.
const REST: Duration = Duration::from_millis(200);

/// Ports that are tried, one after the other, to tell two peers apart that look the same to the guest.
const TRIES: u16 = 256;

/// A listening socket.
pub struct Listener {
    forward: Forward,
    socket: OwnedFd,
    /// Stands in for the guest's address.
    guest: IpAddr,
    ready: bool,
}

impl Listener {
    /// Listens.
    pub fn open(config: &UserConfig, forward: Forward) -> Result<Self, NetError> {
        let open = || -> io::Result<OwnedFd> {
            match forward.transport {
                Transport::Tcp => {
                    let socket = TcpListener::bind(forward.host)?;
                    socket.set_nonblocking(true)?;
                    Ok(socket.into())
                }
                Transport::Udp => {
                    let socket = UdpSocket::bind(forward.host)?;
                    socket.set_nonblocking(true)?;
                    Ok(socket.into())
                }
            }
        };
        let socket = open().map_err(|error| NetError::listen(forward.transport, forward.host, error))?;
        let guest = forward.guest.unwrap_or_else(|| config.guest().into());
        Ok(Self { forward, socket, guest, ready: false })
    }

    /// Its events go to the thread.
    pub fn watch(&self, core: &Core, index: usize) -> io::Result<()> {
        Ok(core.watch_input(&self.socket, Target::Listener(index as u32))?)
    }

    /// The host's address that it listens at, as the kernel has it.
    pub fn address(&self) -> Option<SocketAddr> {
        rustix::net::getsockname(&self.socket).ok()?.try_into().ok()
    }

    /// Something happened, or the rest is over.
    pub fn event(&mut self) {
        self.ready = true;
    }

    /// Somebody waits.
    pub fn is_busy(&self) -> bool {
        self.ready
    }

    /// Takes those who wait.
    pub fn work(&mut self, core: &mut Core, index: usize, tcp: &mut Tcp, udp: &mut Udp) {
        for _ in 0..BURST {
            if !self.ready || !core.has_room() {
                return;
            }
            let result = match self.forward.transport {
                Transport::Tcp => self.accept(core, tcp),
                Transport::Udp => self.receive(core, udp),
            };
            match result {
                Ok(()) => {}
                Err(Errno::AGAIN) => self.ready = false,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    self.ready = false;
                    core.arm(core.now + REST, Target::Listener(index as u32));
                }
                // The peer is gone already, or an earlier answer met with an error.
                Err(_) => {}
            }
        }
    }

    fn accept(&self, core: &mut Core, tcp: &mut Tcp) -> rustix::io::Result<()> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, peer) = rustix::net::acceptfrom_with(&self.socket, flags)?;
        let Some(peer) = peer.and_then(|peer| SocketAddr::try_from(peer).ok()) else { return Ok(()) };
        let guest = SocketAddr::new(self.guest, self.forward.port);
        let seen = self.seen_as(core, peer);
        for offset in 0..TRIES {
            let peer = SocketAddr::new(seen.ip(), other_port(seen.port(), offset));
            let key = tcp::Key { guest, peer };
            if !tcp.has(&key) {
                tcp.accept(core, key, socket);
                return Ok(());
            }
        }
        Ok(())
    }

    fn receive(&self, core: &mut Core, udp: &mut Udp) -> rustix::io::Result<()> {
        let mut buffer = core.buffer();
        let result = recvfrom(&self.socket, &mut buffer[HEADROOM..], RecvFlags::DONTWAIT);
        if let Ok((count, _, Some(peer))) = &result
            && let Ok(peer) = SocketAddr::try_from(peer.clone())
        {
            self.hand_on(core, udp, peer, &buffer[HEADROOM..HEADROOM + count]);
        }
        core.recycle(buffer);
        result.map(|_| ())
    }

    fn hand_on(&self, core: &mut Core, udp: &mut Udp, peer: SocketAddr, payload: &[u8]) {
        let guest = SocketAddr::new(self.guest, self.forward.port);
        let seen = self.seen_as(core, peer);
        for offset in 0..TRIES {
            let key = udp::Key { guest, peer: SocketAddr::new(seen.ip(), other_port(seen.port(), offset)) };
            if udp.is_free_for(&key, peer) {
                if let (false, IpAddr::V4(guest)) = (core.guest_known, self.guest) {
                    neighbour::ask_for_guest(core, guest);
                }
                udp.forward(core, key, peer, self.socket.as_fd(), payload);
                return;
            }
        }
    }

    /// The peer's address for the guest, of the guest's family.
    fn seen_as(&self, core: &Core, peer: SocketAddr) -> SocketAddr {
        let seen = core.seen_as(peer);
        match (self.guest, seen.ip()) {
            (IpAddr::V4(_), IpAddr::V6(_)) => SocketAddr::new(core.config.gateway().into(), peer.port()),
            (IpAddr::V6(_), IpAddr::V4(_)) => SocketAddr::new(core.config.gateway6().into(), peer.port()),
            _ => seen,
        }
    }
}

/// Ports from 1024 on, one after the other, beginning with this one as it is.
fn other_port(port: u16, offset: u16) -> u16 {
    if offset == 0 { port } else { port.wrapping_add(offset).max(1024) }
}
