//! Input of a console: bytes from a reader thread to the guest's serial port, no faster than it takes them.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The guest's side of the line: takes what its FIFO has room for.
pub trait InputSink: Send + Sync {
    /// Takes some of the bytes and returns how many.
    fn receive(&self, bytes: &[u8]) -> usize;
}

/// The place where a guest's serial port is plugged in, and replaced when the machine is reset.
#[derive(Clone, Default)]
pub struct Input {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    sink: Option<Arc<dyn InputSink>>,
    /// The guest has said that it has room, since it was last asked.
    room: bool,
}

/// How often a reader that waits for the guest checks whether it should still wait.
const CHECK: Duration = Duration::from_millis(50);

impl Input {
    /// Connects the guest.
    pub fn connect(&self, sink: Arc<dyn InputSink>) {
        self.lock().sink = Some(sink);
        self.ready();
    }

    /// Disconnects the guest, whose machine is let go.
    pub fn disconnect(&self) {
        let sink = self.lock().sink.take();
        // What it is part of may end with it, so not under the lock.
        drop(sink);
    }

    /// The guest has room after it had none.
    pub fn ready(&self) {
        self.lock().room = true;
        self.shared.changed.notify_all();
    }

    /// Delivers all bytes, waiting while the guest takes none; gives up, and returns false, once `go_on` is false.
    pub(super) fn deliver(&self, mut bytes: &[u8], go_on: &dyn Fn() -> bool) -> bool {
        while !bytes.is_empty() {
            let sink = {
                let mut state = self.lock();
                state.room = false;
                state.sink.clone()
            };
            let taken = sink.map_or(0, |sink| sink.receive(bytes)).min(bytes.len());
            bytes = &bytes[taken..];
            if taken == 0 && !self.wait_for_room(go_on) {
                return false;
            }
        }
        true
    }

    fn wait_for_room(&self, go_on: &dyn Fn() -> bool) -> bool {
        if !go_on() {
            return false;
        }
        let state = self.lock();
        // The time-out also covers a guest that makes room without saying so, by a reset of its UART.
        let waited = self.shared.changed.wait_timeout_while(state, CHECK, |state| !state.room);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A FIFO of four bytes that is emptied, and says so, by another thread.
    struct Fifo(Mutex<(Vec<u8>, usize)>);
    impl InputSink for Fifo {
        fn receive(&self, bytes: &[u8]) -> usize {
            let (taken, level) = &mut *self.0.lock().unwrap();
            let count = bytes.len().min(4 - *level);
            taken.extend(&bytes[..count]);
            *level += count;
            count
        }
    }

    #[test]
    fn nothing_is_lost_when_the_guest_is_slow() {
        let (input, fifo) = (Input::default(), Arc::new(Fifo(Mutex::default())));
        input.connect(fifo.clone());
        let text: Vec<u8> = (0..200).collect();
        let (guest, guest_input, length) = (fifo.clone(), input.clone(), text.len());
        let reader = std::thread::spawn(move || {
            while guest.0.lock().unwrap().0.len() < length {
                guest.0.lock().unwrap().1 = 0;
                guest_input.ready();
                std::thread::yield_now();
            }
        });
        assert!(input.deliver(&text, &|| true));
        reader.join().unwrap();
        assert_eq!(fifo.0.lock().unwrap().0, text);
    }

    #[test]
    fn a_guest_that_is_disconnected_is_let_go() {
        let (input, fifo) = (Input::default(), Arc::new(Fifo(Mutex::default())));
        input.connect(fifo.clone());
        input.disconnect();
        assert_eq!(Arc::strong_count(&fifo), 1);
        assert!(!input.deliver(b"x", &|| false), "nobody takes it");
    }

    #[test]
    fn waiting_for_a_guest_can_be_given_up() {
        assert!(!Input::default().deliver(b"x", &|| false));
    }
}
