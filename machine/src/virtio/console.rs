//! The console device (section 5.3) with one port.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use super::device::{Kind, VirtioDevice};
use super::queue::Virtqueue;
use crate::host::ByteStream;
use crate::sync::Mutex;

const RECEIVE: u16 = 0;
const SEND: u16 = 1;
/// Bytes that go to the far end at once.
const PIECE: usize = 4096;

/// The device.
pub struct Console {
    stream: Arc<dyn ByteStream>,
    input: Mutex<Input>,
    /// Bytes found no room: the far end is to hear of some.
    starved: AtomicBool,
}

#[derive(Default)]
struct Input {
    queue: Option<Arc<Virtqueue>>,
    paused: bool,
}

impl Console {
    /// A console whose output goes to a stream. What the stream's far end sends goes to [`Console::receive`].
    pub fn new(stream: Arc<dyn ByteStream>) -> Arc<Self> {
        Arc::new(Self { stream, input: Mutex::default(), starved: AtomicBool::new(false) })
    }

    /// Bytes from the far end; says how many it took. The rest is to be offered again when the stream hears that the
    /// console is ready.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        let input = self.input.lock();
        self.starved.store(true, Ordering::SeqCst);
        let Some(queue) = input.queue.as_ref().filter(|_| !input.paused) else { return 0 };
        let Some(_lease) = queue.lease() else { return 0 };
        let mut taken = 0;
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            let Some(chain) = queue.pop() else { return taken };
            let written = chain.writer(queue.dma()).write(rest);
            queue.complete(chain.token, written as u32);
            taken += written;
        }
        self.starved.store(false, Ordering::SeqCst);
        taken
    }

    fn tell_of_room(&self) {
        if self.starved.swap(false, Ordering::SeqCst) {
            self.stream.ready();
        }
    }

    fn send_all(&self, queue: &Arc<Virtqueue>) {
        queue.run(|| {
            while let Some(chain) = queue.pop() {
                let mut reader = chain.reader(queue.dma());
                let mut bytes = [0; PIECE];
                while reader.left() > 0 {
                    let count = reader.read(&mut bytes);
                    self.stream.write(bytes.get(..count).unwrap_or_default());
                }
                queue.complete(chain.token, 0);
            }
        });
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        Kind { id: 3, class: 0x07_80_00, name: "console" }
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![64; 2]
    }
    fn config_read(&self, _offset: usize, _to: &mut [u8]) {}
    fn activate(&self, _features: u64, queues: &[Option<Arc<Virtqueue>>]) {
        self.input.lock().queue = queues.get(usize::from(RECEIVE)).cloned().flatten();
    }
    fn notify(&self, queue: &Arc<Virtqueue>) {
        match queue.index() {
            SEND => self.send_all(queue),
            _ => self.tell_of_room(),
        }
    }
    fn reset(&self) {
        self.input.lock().queue = None;
    }
    fn drain(&self) {
        self.input.lock().paused = true;
    }
    fn resume(&self) {
        self.input.lock().paused = false;
        self.tell_of_room();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Host;
    use crate::virtio::testing::Bench;

    #[test]
    fn output_goes_to_the_stream() {
        for bench in Bench::all_kinds(0) {
            let (queue, mut driver) = bench.queue(SEND, 8);
            let host = Host::new();
            let console = Console::new(host.clone());
            driver.offer(&[b"hello, ", b"world"], &[]);
            driver.offer(&[&[b'.'; 2 * PIECE]], &[]);
            console.notify(&queue);
            assert_eq!(host.bytes().len(), 12 + 2 * PIECE);
            assert!(host.bytes().starts_with(b"hello, world."));
            assert_eq!((driver.expect().written, driver.expect().written), (0, 0));
        }
    }

    #[test]
    fn input_waits_for_room_and_for_a_driver() {
        for bench in Bench::all_kinds(0) {
            let (queue, mut driver) = bench.queue(RECEIVE, 8);
            let host = Host::new();
            let console = Console::new(host.clone());
            assert_eq!(console.receive(b"early"), 0);
            console.activate(0, &[Some(queue.clone()), None]);
            driver.offer(&[], &[3]);
            console.notify(&queue);
            assert_eq!(host.ready_calls(), 1);
            assert_eq!(console.receive(b"abcde"), 3);
            assert_eq!((driver.expect().data.as_slice(), bench.signals.used(0)), (b"abc".as_slice(), 1));
            driver.offer(&[], &[3]);
            console.drain();
            assert_eq!(console.receive(b"de"), 0);
            console.resume();
            assert_eq!(host.ready_calls(), 2);
            assert_eq!(console.receive(b"de"), 2);
            assert_eq!(driver.expect().written, 2);
            queue.close();
            console.reset();
            assert_eq!(console.receive(b"late"), 0);
        }
    }
}
