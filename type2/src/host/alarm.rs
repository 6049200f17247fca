//! The machine's earliest deadline, and the thread that calls when it has come.
//!
//! A vCPU that sleeps in HLT waits for the deadline itself, which spares the guest a change of threads per timer
//! tick; the thread here is for the time when all vCPUs are busy.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bivisor_backends::thread::{Role, spawn};
use bivisor_machine::host::{Alarm, Clock, Nanos};

use super::clock::LinuxClock;

/// No deadline.
const NEVER: Nanos = Nanos::MAX;
/// How much later than a vCPU that sleeps until the same deadline the thread looks.
const GRACE: Nanos = 60_000;

/// The machine's alarm clock.
pub struct HostAlarm {
    clock: Arc<LinuxClock>,
    deadline: AtomicU64,
    /// The deadline that a sleeping vCPU waits for itself; 0 if none does.
    attended: AtomicU64,
    /// Guards against a deadline that changes between the thread's look and its sleep.
    thread: Mutex<ThreadState>,
    changed: Condvar,
}

#[derive(Default)]
struct ThreadState {
    /// Until when the thread sleeps; 0 while it does not.
    until: Nanos,
    ended: bool,
}

impl HostAlarm {
    /// An alarm with no deadline and no thread yet.
    pub fn new(clock: Arc<LinuxClock>) -> Arc<Self> {
        Arc::new(Self {
            clock,
            deadline: AtomicU64::new(NEVER),
            attended: AtomicU64::new(0),
            thread: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// The earliest deadline.
    pub fn deadline(&self) -> Option<Nanos> {
        Some(self.deadline.load(Ordering::Acquire)).filter(|deadline| *deadline != NEVER)
    }

    /// Waits on the current thread until it is unparked or the deadline has come.
    pub fn park(&self) {
        match self.deadline() {
            Some(deadline) => {
                self.attended.store(deadline, Ordering::Relaxed);
                thread::park_timeout(self.clock.until(deadline));
                self.attended.store(0, Ordering::Relaxed);
            }
            None => thread::park(),
        }
    }

    /// Starts the thread, which calls `expired` whenever a deadline has come, until the returned value is dropped.
    pub fn start(self: &Arc<Self>, expired: impl Fn(Nanos) + Send + 'static) -> std::io::Result<AlarmThread> {
        let alarm = self.clone();
        let handle = spawn(Role::Timer, "timer", move || alarm.run(&expired))?;
        Ok(AlarmThread { alarm: self.clone(), handle: Some(handle) })
    }

    fn run(&self, expired: &dyn Fn(Nanos)) {
        // Wake-ups exact to the nanosecond instead of 50 µs; a kernel that refuses leaves the default.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let mut state = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.ended {
            let deadline = self.deadline.load(Ordering::SeqCst);
            let now = self.clock.now();
            let grace = if self.attended.load(Ordering::Relaxed) == deadline { GRACE } else { 0 };
            let until = deadline.saturating_add(grace);
            if until <= now {
                state.until = 0;
                drop(state);
                expired(now);
                state = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.until = until;
            // A deadline set before `until` was stored is seen here; one set after is told by `set`.
            if self.deadline.load(Ordering::SeqCst) < deadline {
                continue;
            }
            let wait = Duration::from_nanos(until - now).min(Duration::from_secs(3600));
            state = self
                .changed
                .wait_timeout(state, wait)
                .map(|(state, _)| state)
                .unwrap_or_else(|poisoned| poisoned.into_inner().0);
        }
    }
}

impl Alarm for HostAlarm {
    fn set(&self, deadline: Option<Nanos>) {
        let deadline = deadline.unwrap_or(NEVER);
        self.deadline.store(deadline, Ordering::SeqCst);
        // A later deadline needs no wake-up: the thread looks again when the old one has come.
        let state = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if deadline < state.until {
            self.changed.notify_one();
        }
    }
}

/// The thread of an alarm, ended when dropped.
pub struct AlarmThread {
    alarm: Arc<HostAlarm>,
    handle: Option<JoinHandle<()>>,
}

impl Drop for AlarmThread {
    fn drop(&mut self) {
        self.alarm.thread.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.alarm.changed.notify_one();
        if let Some(handle) = self.handle.take() {
            // A panic there has already been reported.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn started() -> (Arc<LinuxClock>, Arc<HostAlarm>, AlarmThread, Receiver<Nanos>) {
        let clock = Arc::new(LinuxClock::start());
        let alarm = HostAlarm::new(clock.clone());
        let (tell, hear) = channel();
        let again = alarm.clone();
        let thread = alarm
            .start(move |now| {
                again.set(None);
                tell.send(now).unwrap();
            })
            .unwrap();
        (clock, alarm, thread, hear)
    }

    #[test]
    fn calls_at_the_deadline_and_not_before() {
        let (clock, alarm, _thread, hear) = started();
        let deadline = clock.now() + 5_000_000;
        alarm.set(Some(deadline));
        assert!(hear.recv_timeout(Duration::from_secs(5)).unwrap() >= deadline);
        assert!(hear.recv_timeout(Duration::from_millis(10)).is_err(), "it has no deadline any more");
    }

    #[test]
    fn an_earlier_deadline_wins() {
        let (clock, alarm, _thread, hear) = started();
        alarm.set(Some(clock.now() + 60_000_000_000));
        thread::sleep(Duration::from_millis(5));
        alarm.set(Some(clock.now() + 1_000_000));
        assert!(hear.recv_timeout(Duration::from_secs(5)).is_ok());
    }

    #[test]
    fn a_parked_thread_wakes_at_the_deadline() {
        let clock = Arc::new(LinuxClock::start());
        let alarm = HostAlarm::new(clock.clone());
        let deadline = clock.now() + 3_000_000;
        alarm.set(Some(deadline));
        while clock.now() < deadline {
            alarm.park();
        }
        assert!(clock.now() - deadline < 5_000_000_000);
    }
}
