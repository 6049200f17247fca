//! Input of a console: bytes from a reader thread to the guest's serial port, no faster than it takes them.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// The guest's side of the line: takes what its FIFO has room for.
pub trait InputSink: Send + Sync {
    /// Takes some of the bytes and returns how many.
    fn receive(&self, bytes: &[u8]) -> usize;
}

/// The place where a guest's serial port is plugged in, and replaced when the machine is reset.
#[derive(Clone, Default)]
pub struct Input {
    sink: Arc<Mutex<Option<Arc<dyn InputSink>>>>,
}

/// How long to wait for a guest that has no room: about four characters at 38400 baud.
const RETRY: Duration = Duration::from_millis(1);
/// How long at most, for a guest that takes nothing for long.
const RETRY_MAX: Duration = Duration::from_millis(20);

impl Input {
    /// Connects the guest.
    pub fn connect(&self, sink: Arc<dyn InputSink>) {
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = Some(sink);
    }

    /// Delivers all bytes, waiting while the guest takes none; gives up, and returns false, once `go_on` is false.
    pub(super) fn deliver(&self, mut bytes: &[u8], go_on: &dyn Fn() -> bool) -> bool {
        let mut wait = RETRY;
        while !bytes.is_empty() {
            let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let taken = sink.map_or(0, |sink| sink.receive(bytes)).min(bytes.len());
            bytes = &bytes[taken..];
            if taken > 0 {
                wait = RETRY;
            } else if !go_on() {
                return false;
            } else {
                thread::sleep(wait);
                wait = (wait * 2).min(RETRY_MAX);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A FIFO that takes four bytes every other time it is asked.
    #[derive(Default)]
    struct Fifo(Mutex<(Vec<u8>, bool)>);
    impl InputSink for Fifo {
        fn receive(&self, bytes: &[u8]) -> usize {
            let (taken, full) = &mut *self.0.lock().unwrap();
            *full = !*full;
            let count = if *full { 0 } else { bytes.len().min(4) };
            taken.extend(&bytes[..count]);
            count
        }
    }

    #[test]
    fn nothing_is_lost_when_the_guest_is_slow() {
        let (input, fifo) = (Input::default(), Arc::new(Fifo::default()));
        input.connect(fifo.clone());
        let text: Vec<u8> = (0..200).collect();
        assert!(input.deliver(&text, &|| true));
        assert_eq!(fifo.0.lock().unwrap().0, text);
    }

    #[test]
    fn waiting_for_a_guest_can_be_given_up() {
        assert!(!Input::default().deliver(b"x", &|| false));
    }
}
