//! The network device (section 5.1), with one pair of queues.
//!
//! Frames of the guest are sent by the thread that notifies the queue: a port never waits. Frames for the guest are put
//! into its buffers by the port's thread.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use super::chain::{Chain, Token};
use super::device::{Kind, VirtioDevice, read_config};
use super::queue::Virtqueue;
use crate::dma::Dma;
use crate::packet::{Offload, PacketPort, PacketReceiver, PortFeatures, Segment, SegmentKind};
use crate::sync::Mutex;

const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const QUEUE_SIZE: u16 = 256;
/// Bytes of the header in front of each frame (section 5.1.6).
const HEADER: usize = 12;
/// The largest frame: a segment of 64 KiB with its headers.
const MAX_FRAME: usize = (64 << 10) + 128;
/// Sent frames are given back in groups of this many.
const GROUP: usize = 32;

mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;

    pub const GUEST_SEGMENTS: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
    pub const HOST_SEGMENTS: u64 = HOST_TSO4 | HOST_TSO6 | HOST_ECN;
}

const NEEDS_CHECKSUM: u8 = 1;
const CHECKSUM_VALID: u8 = 2;
const SEGMENT_NONE: u8 = 0;
const SEGMENT_TCP4: u8 = 1;
const SEGMENT_TCP6: u8 = 4;
const SEGMENT_ECN: u8 = 0x80;
/// Status: the link is up.
const LINK_UP: u8 = 1;

/// The device.
pub struct Net {
    port: Arc<dyn PacketPort>,
    mac: [u8; 6],
    mtu: Option<u16>,
    receiver: Arc<Receiver>,
    /// The frame that is being sent: by one thread at a time.
    frame: Mutex<Vec<u8>>,
}

/// The way into the guest.
#[derive(Default)]
struct Receiver {
    queue: Mutex<Option<Arc<Virtqueue>>>,
    /// A frame found no room: the port is to hear of some.
    starved: AtomicBool,
    /// The machine stands still.
    paused: AtomicBool,
}

impl Net {
    /// A network interface with this Ethernet address at a port. `mtu`: the largest packet, without its Ethernet header,
    /// if the guest is to be told.
    pub fn new(port: Arc<dyn PacketPort>, mac: [u8; 6], mtu: Option<u16>) -> Arc<Self> {
        Arc::new(Self { port, mac, mtu, receiver: Arc::default(), frame: Mutex::default() })
    }

    fn send_all(&self, queue: &Arc<Virtqueue>) {
        queue.run(|| {
            let mut frame = self.frame.lock();
            let mut sent = Vec::with_capacity(GROUP);
            while let Some(chain) = queue.pop() {
                if let Some(offload) = read_frame(queue, &chain, &mut frame) {
                    self.port.send(&frame, &offload);
                }
                sent.push((chain.token, 0));
                if sent.len() == GROUP {
                    queue.complete_all(&sent);
                    sent.clear();
                }
            }
            if !sent.is_empty() {
                queue.complete_all(&sent);
            }
        });
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind { id: 1, class: 0x02_00_00, name: "network" }
    }
    fn features(&self) -> u64 {
        let port = self.port.features();
        let when = |condition: bool, features: u64| if condition { features } else { 0 };
        feature::MAC
            | feature::STATUS
            | feature::MRG_RXBUF
            | when(self.mtu.is_some(), feature::MTU)
            | when(port.checksum, feature::CSUM)
            | when(port.checksum && port.segments, feature::HOST_SEGMENTS)
            | when(port.gives_partial_checksums, feature::GUEST_CSUM)
            | when(port.gives_partial_checksums && port.gives_segments, feature::GUEST_SEGMENTS)
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE; 2]
    }
    fn config_read(&self, offset: usize, to: &mut [u8]) {
        let [a, b, c, d, e, f] = self.mac;
        let [low, high] = self.mtu.unwrap_or_default().to_le_bytes();
        // Address, status, pairs of queues, MTU.
        read_config(&[a, b, c, d, e, f, LINK_UP, 0, 1, 0, low, high], offset, to);
    }
    fn activate(&self, features: u64, queues: &[Option<Arc<Virtqueue>>]) {
        *self.receiver.queue.lock() = queues.get(usize::from(RECEIVE)).cloned().flatten();
        let all = |wanted: u64| features & wanted == wanted;
        let accepted = PortFeatures {
            checksum: all(feature::CSUM),
            segments: all(feature::HOST_TSO4 | feature::HOST_TSO6),
            gives_partial_checksums: all(feature::GUEST_CSUM),
            gives_segments: all(feature::GUEST_TSO4 | feature::GUEST_TSO6),
        };
        self.port.attach(Some(self.receiver.clone()), accepted);
    }
    fn notify(&self, queue: &Arc<Virtqueue>) {
        match queue.index() {
            SEND => self.send_all(queue),
            _ => self.tell_of_room(),
        }
    }
    fn reset(&self) {
        self.port.attach(None, PortFeatures::default());
        *self.receiver.queue.lock() = None;
        self.receiver.starved.store(false, Ordering::SeqCst);
    }
    fn drain(&self) {
        // With the lock: no frame is on its way in afterwards.
        let _queue = self.receiver.queue.lock();
        self.receiver.paused.store(true, Ordering::SeqCst);
    }
    fn resume(&self) {
        self.receiver.paused.store(false, Ordering::SeqCst);
        self.tell_of_room();
    }
}

impl Net {
    fn tell_of_room(&self) {
        if self.receiver.starved.swap(false, Ordering::SeqCst) {
            self.port.ready();
        }
    }
}

/// Reads a frame of the guest's, and what is left to do in it. `None`: it makes no sense, and is dropped.
fn read_frame(queue: &Virtqueue, chain: &Chain, frame: &mut Vec<u8>) -> Option<Offload> {
    let mut reader = chain.reader(queue.dma());
    let header = reader.array::<HEADER>()?;
    let length = reader.left() as usize;
    if length > MAX_FRAME {
        return None;
    }
    frame.resize(length, 0);
    reader.read(frame);
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut offload = Offload::default();
    if header[0] & NEEDS_CHECKSUM != 0 && queue.has(feature::CSUM) {
        let (start, offset) = (half(6), half(8));
        if usize::from(start) + usize::from(offset) + 2 > length {
            return None;
        }
        offload.checksum = Some((start, offset));
    }
    let kind = match header[1] & !SEGMENT_ECN {
        SEGMENT_TCP4 if queue.has(feature::HOST_TSO4) => SegmentKind::Tcp4,
        SEGMENT_TCP6 if queue.has(feature::HOST_TSO6) => SegmentKind::Tcp6,
        SEGMENT_NONE => return Some(offload),
        _ => return None,
    };
    // The driver's length of the headers is only a hint: the TCP header, which the checksum starts with, tells.
    let (start, _) = offload.checksum?;
    let words = *frame.get(usize::from(start) + 12)? >> 4;
    let (size, header_length) = (half(4), start.checked_add(u16::from(words) * 4)?);
    if size == 0 || usize::from(header_length) > length || words < 5 {
        return None;
    }
    let ecn = header[1] & SEGMENT_ECN != 0;
    offload.segment = Some(Segment { kind, size, header: header_length, ecn });
    Some(offload)
}

/// The header of a frame for the guest that takes so many buffers.
fn header(offload: &Offload, buffers: u16) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let mut put = |at: usize, value: u16| header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    let flags = match offload.checksum {
        Some((start, offset)) => {
            put(6, start);
            put(8, offset);
            NEEDS_CHECKSUM
        }
        None if offload.checksum_valid => CHECKSUM_VALID,
        None => 0,
    };
    let mut kind = SEGMENT_NONE;
    if let Some(segment) = offload.segment {
        put(2, segment.header);
        put(4, segment.size);
        kind = match segment.kind {
            SegmentKind::Tcp4 => SEGMENT_TCP4,
            SegmentKind::Tcp6 => SEGMENT_TCP6,
        } | if segment.ecn { SEGMENT_ECN } else { 0 };
    }
    put(10, buffers);
    header[..2].copy_from_slice(&[flags, kind]);
    header
}

impl PacketReceiver for Receiver {
    fn receive(&self, frame: &[u8], offload: &Offload) -> bool {
        let queue = self.queue.lock();
        // Without a driver frames go nowhere.
        let Some(queue) = &*queue else { return true };
        let Some(_lease) = queue.lease() else { return true };
        if self.paused.load(Ordering::SeqCst) {
            self.starved.store(true, Ordering::SeqCst);
            return false;
        }
        // Before looking for room: who makes some looks for it afterwards.
        self.starved.store(true, Ordering::SeqCst);
        let needed = HEADER + frame.len();
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < needed {
            let Some(chain) = queue.pop() else {
                chains.iter().rev().for_each(|chain| queue.unpop(chain));
                return false;
            };
            room += chain.writable() as usize;
            chains.push(chain);
            if !queue.has(feature::MRG_RXBUF) {
                break;
            }
        }
        self.starved.store(false, Ordering::SeqCst);
        if room < needed {
            // The one buffer is too small, and always will be: the frame is lost.
            chains.iter().rev().for_each(|chain| queue.unpop(chain));
            return true;
        }
        let used = fill(queue.dma(), &chains, frame, offload);
        queue.complete_all(&used);
        true
    }
}

/// Writes a frame with its header into buffers that have room for it; says how much went into each.
fn fill(dma: &Dma, chains: &[Chain], frame: &[u8], offload: &Offload) -> Vec<(Token, u32)> {
    let header = header(offload, chains.len() as u16);
    let mut parts = [header.as_slice(), frame];
    let mut used = Vec::with_capacity(chains.len());
    for chain in chains {
        let mut writer = chain.writer(dma);
        for part in &mut parts {
            let written = writer.write(part);
            *part = part.get(written..).unwrap_or_default();
        }
        used.push((chain.token, chain.writable() - writer.left()));
    }
    used
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
