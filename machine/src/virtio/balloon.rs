//! The memory balloon (section 5.5): pages that the guest does without, and free pages that it tells of, go back to the
//! host.
//!
//! Queues that belong to features which are not offered are left out of the numbering, as Linux and QEMU have it, so
//! that free page reporting is queue 2.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering};

use super::chain::Chain;
use super::device::{Kind, SavedDevice, VirtioDevice, read_config};
use super::queue::{Signal, Virtqueue};
use crate::sync::Mutex;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const REPORTING: u16 = 2;
/// Bytes of a page, which is what the balloon counts in.
pub const PAGE: u64 = 4096;

mod feature {
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

/// Who takes memory back.
pub trait MemoryHost: Send + Sync {
    /// The content of these bytes of RAM, by offset, matters no more: whole pages. They stay usable, and read as
    /// anything until they are written.
    fn discard(&self, offset: u64, length: u64);
}

/// The device.
pub struct Balloon {
    host: Arc<dyn MemoryHost>,
    /// Pages that the guest is to do without.
    target: AtomicU32,
    /// Pages that it says it does without.
    actual: AtomicU32,
    signal: Mutex<Option<Arc<dyn Signal>>>,
}

impl Balloon {
    /// A balloon without any pages.
    pub fn new(host: Arc<dyn MemoryHost>) -> Arc<Self> {
        let (target, actual) = (AtomicU32::new(0), AtomicU32::new(0));
        Arc::new(Self { host, target, actual, signal: Mutex::default() })
    }

    /// Asks the guest to do without so many pages of [`PAGE`] bytes.
    pub fn set_target(&self, pages: u32) {
        if self.target.swap(pages, Ordering::SeqCst) != pages
            && let Some(signal) = &*self.signal.lock()
        {
            signal.config_changed();
        }
    }

    /// How many pages the guest says it does without.
    pub fn actual(&self) -> u32 {
        self.actual.load(Ordering::SeqCst)
    }

    /// Gives the pages back whose numbers a request lists.
    fn inflate(&self, queue: &Virtqueue, chain: &Chain) {
        let mut reader = chain.reader(queue.dma());
        let mut run: Option<(u64, u64)> = None;
        while let Some(number) = reader.array().map(u32::from_le_bytes) {
            // What is no RAM can't be given back, and does no harm.
            let Ok(offset) = queue.dma().range(u64::from(number) * PAGE, PAGE) else { continue };
            run = match run {
                Some((start, end)) if end == offset => Some((start, end + PAGE)),
                Some((start, end)) if offset + PAGE == start => Some((offset, end)),
                Some((start, end)) => {
                    self.discard(queue, start, end);
                    Some((offset, offset + PAGE))
                }
                None => Some((offset, offset + PAGE)),
            };
        }
        if let Some((start, end)) = run {
            self.discard(queue, start, end);
        }
    }

    /// Gives the whole pages of a reported request back.
    fn report(&self, queue: &Virtqueue, chain: &Chain) {
        for segment in chain.writable_segments() {
            let start = segment.offset.next_multiple_of(PAGE);
            let end = (segment.offset + u64::from(segment.length)) & !(PAGE - 1);
            if start < end {
                self.discard(queue, start, end);
            }
        }
    }

    fn discard(&self, queue: &Virtqueue, start: u64, end: u64) {
        self.host.discard(start, end - start);
        queue.dma().changed(start, end - start);
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> Kind {
        Kind { id: 5, class: 0x05_80_00, name: "balloon" }
    }
    fn features(&self) -> u64 {
        feature::DEFLATE_ON_OOM | feature::REPORTING
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![128; 3]
    }
    fn config_read(&self, offset: usize, to: &mut [u8]) {
        let words = [&self.target, &self.actual].map(|word| word.load(Ordering::SeqCst).to_le_bytes());
        read_config(words.as_flattened(), offset, to);
    }
    fn config_write(&self, offset: usize, bytes: &[u8]) {
        if let (4, Ok(bytes)) = (offset, bytes.try_into()) {
            self.actual.store(u32::from_le_bytes(bytes), Ordering::SeqCst);
        }
    }
    fn attach(&self, signal: Arc<dyn Signal>) {
        *self.signal.lock() = Some(signal);
    }
    fn notify(&self, queue: &Arc<Virtqueue>) {
        queue.run(|| {
            while let Some(chain) = queue.pop() {
                match queue.index() {
                    INFLATE => self.inflate(queue, &chain),
                    REPORTING => self.report(queue, &chain),
                    // The host gives memory for these when they are touched.
                    DEFLATE => {}
                    _ => return,
                }
                queue.complete(chain.token, 0);
            }
        });
    }
    fn reset(&self) {
        self.actual.store(0, Ordering::SeqCst);
    }
    fn save(&self) -> SavedDevice {
        let words = [&self.target, &self.actual].map(|word| word.load(Ordering::SeqCst).into());
        SavedDevice { version: 1, words: words.to_vec() }
    }
    fn restore(&self, saved: &SavedDevice) -> bool {
        let (1, [target, actual]) = (saved.version, saved.words.as_slice()) else { return false };
        self.target.store(*target as u32, Ordering::SeqCst);
        self.actual.store(*actual as u32, Ordering::SeqCst);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Bench;

    #[derive(Default)]
    struct Discarded(Mutex<Vec<(u64, u64)>>);

    impl MemoryHost for Discarded {
        fn discard(&self, offset: u64, length: u64) {
            self.0.lock().push((offset, length));
        }
    }

    #[test]
    fn pages_go_back_in_runs() {
        for bench in Bench::all_kinds(0) {
            let host = Arc::new(Discarded::default());
            let balloon = Balloon::new(host.clone());
            let (queue, mut driver) = bench.queue(INFLATE, 8);
            let numbers = |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
            driver.offer(&[&numbers(&[700, 701, 702, 720, 719, 5, 0xffff_ffff, 0x8000_0000])], &[]);
            driver.offer(&[&numbers(&[9])[..3]], &[]);
            balloon.notify(&queue);
            assert_eq!(*host.0.lock(), [(700 * PAGE, 3 * PAGE), (719 * PAGE, 2 * PAGE), (5 * PAGE, PAGE)]);
            assert_eq!((driver.expect().written, driver.expect().written), (0, 0));
        }
    }

    #[test]
    fn reported_pages_go_back_as_far_as_they_are_whole() {
        for bench in Bench::all_kinds(0) {
            let host = Arc::new(Discarded::default());
            let balloon = Balloon::new(host.clone());
            let (queue, mut driver) = bench.queue(REPORTING, 8);
            driver.offer_raw(&[(0x40_0000, 0x4000, 2), (0x50_0800, 0x1800, 2), (0x60_0001, 0xfff, 2)]);
            balloon.notify(&queue);
            assert_eq!(*host.0.lock(), [(0x40_0000, 0x4000), (0x50_1000, 0x1000)]);
            driver.expect();
        }
    }

    #[test]
    fn the_guest_hears_of_its_target_and_tells_what_it_has() {
        let bench = Bench::new(0);
        let balloon = Balloon::new(Arc::new(Discarded::default()));
        balloon.attach(bench.signals.clone());
        balloon.set_target(300);
        balloon.set_target(300);
        assert_eq!(bench.signals.config_changes.load(Ordering::SeqCst), 1);
        let mut config = [0; 8];
        balloon.config_read(0, &mut config);
        assert_eq!(config, [44, 1, 0, 0, 0, 0, 0, 0]);
        balloon.config_write(4, &[7, 0, 0, 0]);
        balloon.config_write(0, &[9, 0, 0, 0]);
        balloon.config_write(5, &[9, 9]);
        assert_eq!(balloon.actual(), 7);
        let saved = balloon.save();
        let other = Balloon::new(Arc::new(Discarded::default()));
        assert!(other.restore(&saved) && !other.restore(&SavedDevice::default()));
        assert_eq!((other.actual(), other.save()), (7, saved));
    }
}
