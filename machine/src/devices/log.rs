//! A log that a guest can't flood.

use alloc::sync::Arc;
use core::fmt::Arguments;

use crate::host::{Clock, EventSink, Nanos};
use crate::sync::Mutex;

/// Lines a [`WINDOW`] at most.
const LINES: u32 = 10;
/// Length of the window that lines are counted in.
const WINDOW: Nanos = 1_000_000_000;

#[derive(Default)]
struct State {
    window: Nanos,
    lines: u32,
    suppressed: u64,
}

/// Passes lines on to the machine's log, but only so many a second, and says how many were left out.
pub struct GuestLog {
    sink: Arc<dyn EventSink>,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

impl GuestLog {
    /// A log that writes to `sink`.
    pub fn new(sink: Arc<dyn EventSink>, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { sink, clock, state: Mutex::default() })
    }

    /// Logs a line, or drops it.
    pub fn log(&self, line: Arguments<'_>) {
        let now = self.clock.now();
        let mut state = self.state.lock();
        if now.saturating_sub(state.window) >= WINDOW {
            let suppressed = core::mem::take(&mut state.suppressed);
            *state = State { window: now, lines: 0, suppressed: 0 };
            if suppressed != 0 {
                self.sink.log(format_args!("{suppressed} lines about the guest were left out"));
            }
        }
        if state.lines < LINES {
            state.lines += 1;
            self.sink.log(line);
        } else {
            state.suppressed += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Host, Time};

    #[test]
    fn a_flood_is_cut_and_counted() {
        let (host, time) = (Host::new(), Time::new());
        let log = GuestLog::new(host.clone(), time.clone());
        for i in 0..25 {
            log.log(format_args!("line {i}"));
        }
        assert_eq!(host.lines().len(), 10);
        time.advance(WINDOW);
        log.log(format_args!("again"));
        assert_eq!(host.lines()[10..], ["15 lines about the guest were left out", "again"]);
    }
}
