//! A tap: an interface of the host's kernel whose other end is the guest's. For those who may make one
//! (CAP_NET_ADMIN), or were given one (`ip tuntap add NAME mode tap user …`).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bivisor_machine::packet::{Offload, PacketPort, PacketReceiver, PortFeatures};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl};

use super::NetError;
use super::outlet::Outlet;
use super::vnet;
use crate::thread::{Role, spawn};

const DEVICE: &str = "/dev/net/tun";

/// Requests of the driver (Linux, include/uapi/linux/if_tun.h).
const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETOFFLOAD: Opcode = 0x4004_54d0;
const TUNSETVNETLE: Opcode = 0x4004_54dc;

/// A tap, without the driver's own header, with virtio's.
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// What the reader takes.
const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const TUN_F_TSO6: usize = 4;
const TUN_F_TSO_ECN: usize = 8;

/// The longest name of an interface, in bytes.
pub const NAME: usize = 15;

/// The largest frame with its header.
const LARGEST: usize = vnet::HEADER + 14 + 65536;

/// Frames taken between two looks at anything else.
const BURST: usize = 64;

/// `struct ifreq`, as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; NAME + 1],
    flags: u16,
    rest: [u8; 22],
}

/// A tap. Dropping it closes it: the interface goes with it, unless it was made to stay.
pub struct Tap {
    shared: Arc<Shared>,
}

struct Shared {
    tap: File,
    outlet: Outlet,
    /// Serialises changes of what the reader takes.
    attaching: Mutex<()>,
    ended: AtomicBool,
}

impl Tap {
    /// Opens a tap: one that is there, or a new one.
    ///
    /// # Errors
    /// The host doesn't have taps, or doesn't let us.
    pub fn open(name: &str) -> Result<Self, NetError> {
        let failed = |error: io::Error| NetError::tap(name, error);
        let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
        let tap = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(DEVICE)
            .map_err(|error| NetError::TapDevice(name.into(), error))?;
        let mut request =
            Request { name: [0; NAME + 1], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
        let bytes = name.as_bytes().get(..NAME).unwrap_or(name.as_bytes());
        request.name[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: TUNSETIFF reads a `struct ifreq`, 40 bytes, of which the name and the flags matter.
        unsafe { ioctl(&tap, Setter::<TUNSETIFF, Request>::new(request)) }
            .map_err(|error| failed(error.into()))?;
        // SAFETY: TUNSETVNETLE reads an integer: virtio's header is in little-endian order, as we have it.
        unsafe { ioctl(&tap, Setter::<TUNSETVNETLE, i32>::new(1)) }.map_err(|error| failed(error.into()))?;
        let shared = Arc::new(Shared {
            tap,
            outlet: Outlet::new().map_err(failed)?,
            attaching: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let thread = shared.clone();
        spawn(Role::NetTap, "net-tap", move || thread.run()).map_err(failed)?;
        Ok(Self { shared })
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.shared.outlet.wake();
    }
}

impl PacketPort for Tap {
    fn features(&self) -> PortFeatures {
        PortFeatures { checksum: true, segments: true, gives_partial_checksums: true, gives_segments: true }
    }

    fn attach(&self, receiver: Option<Arc<dyn PacketReceiver>>, accepted: PortFeatures) {
        let _one = self.shared.attaching.lock().unwrap_or_else(PoisonError::into_inner);
        let mut offloads = 0;
        if accepted.gives_partial_checksums {
            offloads |= TUN_F_CSUM;
            if accepted.gives_segments {
                offloads |= TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
            }
        }
        // A driver that does not know one of them gives plain frames, which everybody takes.
        // SAFETY: TUNSETOFFLOAD takes an integer, not a pointer.
        let _ = unsafe { ioctl(&self.shared.tap, IntegerSetter::<TUNSETOFFLOAD>::new_usize(offloads)) };
        self.shared.outlet.attach(receiver);
    }

    fn send(&self, frame: &[u8], offload: &Offload) {
        let header = vnet::encode(offload);
        // What an interface that is down, or full, doesn't take is lost.
        let _ = rustix::io::writev(&self.shared.tap, &[IoSlice::new(&header), IoSlice::new(frame)]);
    }

    fn ready(&self) {
        self.shared.outlet.ready();
    }
}

impl Shared {
    /// The thread that takes frames from the kernel.
    fn run(&self) {
        let mut buffer = vec![0; LARGEST];
        // A frame that the guest had no room for stands at the buffer's start.
        let mut held = None;
        while !self.ended.load(Ordering::SeqCst) {
            if !self.outlet.is_stalled() {
                self.pump(&mut buffer, &mut held);
            }
            let tap = if held.is_none() { PollFlags::IN } else { PollFlags::empty() };
            let mut waiting =
                [PollFd::new(&self.tap, tap), PollFd::from_borrowed_fd(self.outlet.as_fd(), PollFlags::IN)];
            match poll(&mut waiting, None) {
                // The interface was deleted: nothing comes any more, but the guest may still be told to stop.
                Ok(_) if waiting[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) => return,
                Ok(_) if !waiting[1].revents().is_empty() => self.outlet.woken(),
                _ => {}
            }
        }
    }

    fn pump(&self, buffer: &mut [u8], held: &mut Option<usize>) {
        let receiver = self.outlet.receiver();
        for _ in 0..BURST {
            let count = match held.take() {
                Some(count) => count,
                None => match (&self.tap).read(buffer) {
                    Ok(count) => count,
                    Err(_) => return,
                },
            };
            let Some((header, frame)) = buffer[..count].split_first_chunk() else { continue };
            let (Some(offload), Some(receiver)) = (vnet::decode(header, frame), &receiver) else { continue };
            if !self.outlet.deliver(&**receiver, frame, &offload) {
                *held = Some(count);
                return;
            }
        }
    }
}

impl NetError {
    fn tap(name: &str, error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(Errno::PERM | Errno::ACCESS) => Self::TapDenied(name.into()),
            Some(Errno::BUSY) => Self::TapBusy(name.into()),
            Some(Errno::INVAL) => Self::TapKind(name.into()),
            _ => Self::Tap(name.into(), error),
        }
    }
}
