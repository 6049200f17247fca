//! The log of what guests do that devices refuse. A guest can cause as many lines as it likes, so their rate is
//! limited and the vCPU that causes one never waits for it to be written.

use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bivisor_backends::terminal;
use bivisor_backends::thread::{Role, spawn};

/// Lines that may come at once.
const BURST: u32 = 30;
/// After a burst, one line per this.
const INTERVAL: Duration = Duration::from_millis(200);

/// Lets a burst through, then a steady trickle; counts the rest.
struct RateLimit {
    credit: u32,
    since: Instant,
    dropped: u64,
}

impl RateLimit {
    fn new(now: Instant) -> Self {
        Self { credit: BURST, since: now, dropped: 0 }
    }

    /// Whether a line may pass now; with it, how many did not before it.
    fn pass(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_nanos() / INTERVAL.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX).min(BURST);
        if earned > 0 {
            self.credit = (self.credit + earned).min(BURST);
            self.since = now;
        }
        match self.credit.checked_sub(1) {
            Some(credit) => {
                self.credit = credit;
                Some(std::mem::take(&mut self.dropped))
            }
            None => {
                self.dropped += 1;
                None
            }
        }
    }
}

/// The log.
pub struct Log {
    limit: Mutex<RateLimit>,
    lines: Option<SyncSender<String>>,
}

impl Log {
    /// A log to standard error, or to nowhere.
    pub fn start(wanted: bool) -> std::io::Result<Self> {
        let mut lines = None;
        if wanted {
            let (sender, receiver): (_, Receiver<String>) = sync_channel(BURST as usize);
            spawn(Role::Log, "log", move || {
                for line in receiver {
                    terminal::message(&line);
                }
            })?;
            lines = Some(sender);
        }
        Ok(Self { limit: Mutex::new(RateLimit::new(Instant::now())), lines })
    }

    /// Adds a line, or counts it as dropped.
    pub fn line(&self, text: fmt::Arguments<'_>) {
        let Some(lines) = &self.lines else { return };
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(dropped) = limit.pass(Instant::now()) else { return };
        let note = if dropped > 0 { format!(" (and {dropped} lines before it)") } else { String::new() };
        if let Err(TrySendError::Full(_)) = lines.try_send(format!("bivisor: guest: {text}{note}\n")) {
            limit.dropped += dropped + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_trickle() {
        let start = Instant::now();
        let mut limit = RateLimit::new(start);
        let passed = (0..10_000).filter(|_| limit.pass(start).is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(limit.pass(start + INTERVAL), Some(10_000 - u64::from(BURST)));
        assert_eq!(limit.pass(start + INTERVAL), None);
        assert_eq!(limit.pass(start + INTERVAL * 1000), Some(1));
    }
}
