//! The entropy device (section 5.4): random bytes of the host's.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::device::{Kind, VirtioDevice};
use super::queue::Virtqueue;

/// Bytes that a request gets at most.
const MAX_BYTES: u32 = 4096;

/// Where randomness comes from.
pub trait EntropySource: Send + Sync {
    /// Fills a buffer; returns how many bytes it could.
    fn fill(&self, to: &mut [u8]) -> usize;
}

/// The device.
pub struct Entropy(Arc<dyn EntropySource>);

impl Entropy {
    /// A device with this source.
    pub fn new(source: Arc<dyn EntropySource>) -> Arc<Self> {
        Arc::new(Self(source))
    }
}

impl VirtioDevice for Entropy {
    fn kind(&self) -> Kind {
        Kind { id: 4, class: 0x10_80_00, name: "entropy" }
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![8]
    }
    fn config_read(&self, _offset: usize, _to: &mut [u8]) {}
    fn notify(&self, queue: &Arc<Virtqueue>) {
        queue.run(|| {
            while let Some(chain) = queue.pop() {
                let mut bytes = [0; MAX_BYTES as usize];
                let wanted = chain.writable().min(MAX_BYTES) as usize;
                let room = bytes.get_mut(..wanted).unwrap_or_default();
                let filled = self.0.fill(room).min(wanted);
                let written = chain.writer(queue.dma()).write(bytes.get(..filled).unwrap_or_default());
                queue.complete(chain.token, written as u32);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Bench;

    /// Gives at most ten bytes at a time.
    struct Counter;

    impl EntropySource for Counter {
        fn fill(&self, to: &mut [u8]) -> usize {
            let count = to.len().min(10);
            to.iter_mut().zip(1..).take(count).for_each(|(byte, value)| *byte = value);
            count
        }
    }

    #[test]
    fn requests_get_what_the_source_gives() {
        for bench in Bench::all_kinds(0) {
            let (queue, mut driver) = bench.queue(0, 8);
            let device = Entropy::new(Arc::new(Counter));
            driver.offer(&[], &[4, 3]);
            driver.offer(&[], &[100_000]);
            driver.offer(&[b"no room"], &[]);
            device.notify(&queue);
            let first = driver.expect();
            assert_eq!((first.written, first.data.as_slice()), (7, [1, 2, 3, 4, 5, 6, 7].as_slice()));
            let second = driver.expect();
            assert_eq!((second.written, second.data[9], second.data[10]), (10, 10, 0xee));
            assert_eq!(driver.expect().written, 0);
        }
    }
}
