//! Output of a console: a bounded queue between the guest's serial port, which never waits, and a thread that
//! writes to the far end, which may.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bivisor_machine::host::ByteStream;

use crate::thread::{Role, spawn};

/// Bytes kept for a far end that does not take them now. What goes beyond is lost, as on a serial line without
/// flow control: a guest must not be able to fill the host's memory.
const QUEUE_LIMIT: usize = 4 << 20;

/// Where output goes. Called from the writer thread only.
pub(super) trait FarEnd: Send {
    /// Writes bytes, waiting if it must. An error ends the output for good.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
}

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// Bytes handed to the far end and not yet confirmed.
    in_flight: usize,
    written: u64,
    lost: u64,
    broken: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to write.
    filled: Condvar,
    /// Something was written.
    drained: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The output side of a console.
#[derive(Clone)]
pub struct Output {
    shared: Arc<Shared>,
}

impl Output {
    /// Starts the writer thread. `lost` is called once if the far end fails.
    pub(super) fn start(
        mut far_end: impl FarEnd + 'static,
        lost: impl FnOnce(io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let output = Self { shared: shared.clone() };
        spawn(Role::ConsoleOut, "console-out", move || {
            if let Err(error) = write_loop(&shared, &mut far_end) {
                let mut queue = shared.lock();
                queue.broken = true;
                queue.in_flight = 0;
                queue.bytes = VecDeque::new();
                shared.drained.notify_all();
                drop(queue);
                lost(error);
            }
        })?;
        Ok(output)
    }

    /// Waits until everything is written, as long as the far end takes some of it within every `patience`.
    /// Returns the number of bytes lost since the start.
    pub fn flush(&self, patience: Duration) -> u64 {
        let mut queue = self.shared.lock();
        let (mut written, mut last_progress) = (queue.written, Instant::now());
        while !queue.bytes.is_empty() || queue.in_flight != 0 {
            if queue.written != written {
                (written, last_progress) = (queue.written, Instant::now());
            }
            let left = patience.saturating_sub(last_progress.elapsed());
            if left.is_zero() {
                return queue.lost + (queue.bytes.len() + queue.in_flight) as u64;
            }
            queue = self
                .shared
                .drained
                .wait_timeout(queue, left)
                .map(|(queue, _)| queue)
                .unwrap_or_else(|poisoned| poisoned.into_inner().0);
        }
        queue.lost
    }
}

impl ByteStream for Output {
    fn write(&self, bytes: &[u8]) {
        let mut queue = self.shared.lock();
        let room = if queue.broken { 0 } else { QUEUE_LIMIT.saturating_sub(queue.bytes.len()) };
        let taken = &bytes[..room.min(bytes.len())];
        queue.lost += (bytes.len() - taken.len()) as u64;
        let was_empty = queue.bytes.is_empty();
        queue.bytes.extend(taken);
        if was_empty && !taken.is_empty() {
            self.shared.filled.notify_one();
        }
    }
}

fn write_loop(shared: &Shared, far_end: &mut dyn FarEnd) -> io::Result<()> {
    // Small pieces, so that progress is seen by `flush` even at a slow far end.
    const PIECE: usize = 4096;
    let mut piece = Vec::with_capacity(PIECE);
    loop {
        let mut queue = shared.lock();
        queue.written += queue.in_flight as u64;
        queue.in_flight = 0;
        shared.drained.notify_all();
        while queue.bytes.is_empty() {
            queue = shared.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let count = queue.bytes.len().min(PIECE);
        piece.clear();
        piece.extend(queue.bytes.drain(..count));
        queue.in_flight = count;
        drop(queue);
        far_end.write_all(&piece)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    struct Slow(Sender<Vec<u8>>, Receiver<()>);
    impl FarEnd for Slow {
        fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.1.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe.into())
        }
    }

    fn slow(lost: impl FnOnce(io::Error) + Send + 'static) -> (Output, Receiver<Vec<u8>>, Sender<()>) {
        let (bytes_in, bytes_out) = channel();
        let (go, gate) = channel();
        (Output::start(Slow(bytes_in, gate), lost).unwrap(), bytes_out, go)
    }

    #[test]
    fn writes_in_order_and_flushes() {
        let (output, bytes, go) = slow(|_| ());
        for _ in 0..8 {
            go.send(()).unwrap();
        }
        output.write(b"one ");
        output.write(b"two");
        assert_eq!(output.flush(Duration::from_secs(5)), 0);
        assert_eq!(bytes.try_iter().flatten().collect::<Vec<_>>(), b"one two");
    }

    #[test]
    fn a_stuck_far_end_neither_blocks_nor_fills_memory() {
        let (output, _bytes, _go) = slow(|_| ());
        let chunk = vec![b'x'; 1 << 20];
        for _ in 0..6 {
            output.write(&chunk);
        }
        assert!(output.shared.lock().bytes.len() <= QUEUE_LIMIT);
        let lost = output.flush(Duration::from_millis(20));
        assert_eq!(lost, 6 << 20);
    }

    #[test]
    fn a_broken_far_end_is_reported_once_and_flush_ends() {
        let (told, hear) = channel();
        let (output, _bytes, go) = slow(move |error| told.send(error.kind()).unwrap());
        drop(go);
        output.write(b"x");
        assert_eq!(hear.recv_timeout(Duration::from_secs(5)), Ok(io::ErrorKind::BrokenPipe));
        output.write(b"y");
        assert_eq!(output.flush(Duration::from_secs(5)), 1);
    }
}
