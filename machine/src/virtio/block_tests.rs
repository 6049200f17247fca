//! The block device, driven through rings of every format.

use alloc::vec;

use super::*;
use crate::block::BlockDone;
use crate::virtio::feature::{EVENT_IDX, RING_PACKED};
use crate::virtio::testing::{Bench, Driver};

/// A disk in memory, whose requests end when told.
struct Disk {
    content: Mutex<Vec<u8>>,
    waiting: Mutex<Vec<(BlockOperation, BlockDone)>>,
    log: Mutex<Vec<&'static str>>,
    waits: bool,
    read_only: bool,
    discards: bool,
}

impl Disk {
    fn new(waits: bool) -> Self {
        Self {
            content: Mutex::new(vec![0; 1 << 20]),
            waiting: Mutex::default(),
            log: Mutex::default(),
            waits,
            read_only: false,
            discards: true,
        }
    }

    fn execute(&self, operation: BlockOperation, done: BlockDone) {
        let mut content = self.content.lock();
        let (name, result, buffer) = match operation {
            BlockOperation::Read { offset, mut buffer } => {
                let length = buffer.len();
                buffer.copy_from_slice(&content[offset as usize..][..length]);
                ("read", Ok(()), buffer)
            }
            BlockOperation::Write { buffer, .. } if self.read_only => {
                ("write", Err(BlockError::ReadOnly), buffer)
            }
            BlockOperation::Write { offset, buffer } => {
                content[offset as usize..][..buffer.len()].copy_from_slice(&buffer);
                ("write", Ok(()), buffer)
            }
            BlockOperation::Flush => ("flush", Ok(()), Vec::new()),
            BlockOperation::Discard { .. } => ("discard", Ok(()), Vec::new()),
            BlockOperation::WriteZeroes { offset, length, unmap } => {
                content[offset as usize..][..length as usize].fill(0);
                (if unmap { "zero and unmap" } else { "zero" }, Ok(()), Vec::new())
            }
        };
        drop(content);
        self.log.lock().push(name);
        done(result, buffer);
    }
    fn end_one(&self, which: usize) {
        let (operation, done) = self.waiting.lock().remove(which);
        self.execute(operation, done);
    }
}

impl BlockStore for Disk {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn can_discard(&self) -> bool {
        self.discards
    }
    fn submit(&self, operation: BlockOperation, done: BlockDone) {
        if self.waits {
            self.waiting.lock().push((operation, done));
        } else {
            self.execute(operation, done);
        }
    }
    fn drain(&self) {
        while !self.waiting.lock().is_empty() {
            self.end_one(0);
        }
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

struct Rig {
    bench: Bench,
    disk: Arc<Disk>,
    device: Arc<Block>,
    queue: Arc<Virtqueue>,
    driver: Driver,
}

fn rigs(disk: impl Fn() -> Disk) -> Vec<Rig> {
    Bench::all_kinds(feature::FLUSH).map(|bench| rig(bench, disk())).into()
}

fn rig(bench: Bench, disk: Disk) -> Rig {
    let disk = Arc::new(disk);
    let device = Block::new(disk.clone(), "serial-7", 2);
    let (queue, driver) = bench.queue(0, 64);
    Rig { bench, disk, device, queue, driver }
}

impl Rig {
    /// Does a request; its status, and what was written in front of that.
    fn request(&mut self, readable: &[&[u8]], writable: &[usize]) -> (u8, Vec<u8>, u32) {
        self.driver.offer(readable, writable);
        self.device.notify(&self.queue);
        let mut returned = self.driver.expect();
        (returned.data.pop().unwrap(), returned.data, returned.written)
    }
}

#[test]
fn what_is_written_is_read_however_it_is_cut() {
    for mut rig in rigs(|| Disk::new(false)) {
        let data: Vec<u8> = (0..1024).map(|i| (i % 251) as u8).collect();
        let head = header(request::OUT, 3);
        // Header and data in pieces that mean nothing; the status by itself.
        let (status, _, written) =
            rig.request(&[&head[..5], &head[5..], &data[..100], &data[100..1000], &data[1000..]], &[1]);
        assert_eq!((status, written), (OK, 1));
        let (status, read, written) = rig.request(&[&header(request::IN, 3)], &[700, 325]);
        assert_eq!((status, read, written), (OK, data.clone(), 1025));
        let one = [header(request::OUT, 7), data[..512].to_vec()].concat();
        assert_eq!(rig.request(&[&one], &[1]).0, OK);
        assert_eq!(rig.disk.content.lock()[7 * 512..][..512], data[..512]);
        assert_eq!(rig.bench.signals.broken(), None);
    }
}

#[test]
fn requests_that_make_no_sense_fail_and_the_device_goes_on() {
    for mut rig in rigs(|| Disk::new(false)) {
        for (readable, writable, expected) in [
            (vec![header(request::IN, 2048)], 513, IO_ERROR),
            (vec![header(request::IN, 2047)], 1025, IO_ERROR),
            (vec![header(request::IN, u64::MAX)], 513, IO_ERROR),
            (vec![header(request::IN, 0)], 101, IO_ERROR),
            (vec![header(request::OUT, 2048), vec![0; 512]], 1, IO_ERROR),
            (vec![header(request::OUT, 0), vec![0; 511]], 1, IO_ERROR),
            (vec![header(99, 0)], 1, UNSUPPORTED),
            (vec![header(request::DISCARD, 0), range(2048, 1, 0)], 1, IO_ERROR),
            (vec![header(request::DISCARD, 0), range(0, 1, 1)], 1, UNSUPPORTED),
            (vec![header(request::DISCARD, 0), range(0, 1, 0)[..15].to_vec()], 1, IO_ERROR),
            (vec![header(request::WRITE_ZEROES, 0), range(u64::MAX, 1, 0)], 1, IO_ERROR),
            (vec![header(request::WRITE_ZEROES, 0), range(0, u32::MAX, 0)], 1, IO_ERROR),
            (vec![header(request::WRITE_ZEROES, 0), range(0, 1, 2)], 1, UNSUPPORTED),
            (vec![header(request::IN, 0)], 1, OK),
        ] {
            let pieces: Vec<&[u8]> = readable.iter().map(Vec::as_slice).collect();
            let (status, ..) = rig.request(&pieces, &[writable]);
            assert_eq!(status, expected, "{readable:?}");
        }
        assert_eq!(rig.request(&[&header(request::IN, 0)], &[513]).0, OK);
        assert_eq!(*rig.disk.log.lock(), ["read"]);
    }
}

#[test]
fn a_request_without_header_or_status_stops_the_device() {
    for (readable, writable) in [(15, 1), (16, 0)] {
        for mut rig in rigs(|| Disk::new(false)) {
            rig.driver.offer(&[&[0; 16][..readable]], if writable == 0 { &[] } else { &[1] });
            rig.device.notify(&rig.queue);
            assert!(rig.bench.signals.broken().unwrap().contains("request has no"));
            assert_eq!(rig.driver.returned(), None);
        }
    }
}

#[test]
fn other_commands() {
    for mut rig in rigs(|| Disk::new(false)) {
        let (status, id, _) = rig.request(&[&header(request::GET_ID, 0)], &[20, 1]);
        assert_eq!((status, id.as_slice()), (OK, b"serial-7\0\0\0\0\0\0\0\0\0\0\0\0".as_slice()));
        assert_eq!(rig.request(&[&header(request::GET_ID, 0)], &[5]).1, b"seri");
        rig.disk.content.lock().fill(7);
        assert_eq!(rig.request(&[&header(request::FLUSH, 0)], &[1]).0, OK);
        assert_eq!(rig.request(&[&header(request::DISCARD, 0), &range(8, 8, 0)], &[1]).0, OK);
        assert_eq!(rig.request(&[&header(request::WRITE_ZEROES, 0), &range(1, 2, 0)], &[1]).0, OK);
        assert_eq!(rig.request(&[&header(request::WRITE_ZEROES, 0), &range(4, 1, 1)], &[1]).0, OK);
        assert_eq!(*rig.disk.log.lock(), ["flush", "discard", "zero", "zero and unmap"]);
        let content = rig.disk.content.lock();
        assert_eq!(
            [content[511], content[512], content[1535], content[1536], content[2048]],
            [7, 0, 0, 7, 0]
        );
    }
}

#[test]
fn requests_end_in_any_order_and_interrupt() {
    for mut rig in rigs(|| Disk::new(true)) {
        let ids: Vec<u16> =
            (0..3).map(|sector| rig.driver.offer(&[&header(request::IN, sector)], &[513])).collect();
        rig.device.notify(&rig.queue);
        assert_eq!((rig.disk.waiting.lock().len(), rig.driver.returned()), (3, None));
        rig.disk.end_one(2);
        assert_eq!((rig.driver.expect().id, rig.bench.signals.used(0)), (ids[2], 1));
        rig.device.drain();
        assert_eq!([rig.driver.expect().id, rig.driver.expect().id], [ids[0], ids[1]]);
    }
}

#[test]
fn a_reset_waits_for_what_is_under_way_and_leaves_memory_alone() {
    for mut rig in rigs(|| Disk::new(true)) {
        rig.disk.content.lock().fill(7);
        rig.driver.offer(&[&header(request::IN, 0)], &[513]);
        rig.device.notify(&rig.queue);
        rig.queue.close();
        rig.device.reset();
        assert!(rig.disk.waiting.lock().is_empty());
        assert_eq!((rig.driver.returned(), rig.bench.signals.used(0)), (None, 0));
    }
}

#[test]
fn writes_are_flushed_for_a_driver_that_does_not() {
    let mut rig = rig(Bench::new(0), Disk::new(false));
    assert_eq!(rig.request(&[&header(request::OUT, 0), &[1; 512]], &[1]).0, OK);
    assert_eq!(*rig.disk.log.lock(), ["write", "flush"]);
}

#[test]
fn too_much_under_way_waits() {
    let bench = Bench::new(feature::FLUSH | EVENT_IDX | RING_PACKED);
    let mut rig = rig(bench, Disk::new(true));
    // One piece of RAM, again and again: 1 MiB each.
    let at = rig.driver.allocate(16);
    rig.bench.memory.write(at, &header(request::IN, 0)).unwrap();
    for _ in 0..8 {
        rig.driver.offer_raw(&[(at, 16, 0), (0x40_0000, 1 << 20, 2), (at, 1, 2)]);
        rig.device.notify(&rig.queue);
    }
    // As if the rest were under way elsewhere.
    rig.device.0.bytes.fetch_add(UNDER_WAY - (9 << 20) + 1, Ordering::SeqCst);
    for _ in 0..4 {
        rig.driver.offer_raw(&[(at, 16, 0), (0x40_0000, 1 << 20, 2), (at, 1, 2)]);
        rig.device.notify(&rig.queue);
    }
    assert_eq!(rig.disk.waiting.lock().len(), 9);
    rig.disk.end_one(0);
    assert_eq!(rig.disk.waiting.lock().len(), 9);
    rig.device.drain();
    let mut returned = 0;
    while rig.driver.returned().is_some() {
        returned += 1;
    }
    assert_eq!(returned, 12);
}

#[test]
fn what_the_disk_can_do_is_what_it_offers() {
    let device =
        |read_only, discards| Block::new(Arc::new(Disk { read_only, discards, ..Disk::new(false) }), "", 1);
    let full = device(false, true);
    assert_eq!(full.features() & feature::MQ, 0);
    assert_ne!(full.features() & feature::DISCARD, 0);
    assert_eq!(device(false, false).features() & (feature::DISCARD | feature::RO), 0);
    let read_only = device(true, true).features();
    assert_eq!(read_only & (feature::RO | feature::FLUSH | feature::DISCARD), feature::RO);
    let mut capacity = [0; 8];
    full.config_read(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
    let mut end = [0xff; 8];
    full.config_read(56, &mut end);
    assert_eq!(end, [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
}
