//! The thread that executes a virtual processor, as the host's scheduler treats it.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// What others may know of a virtual processor's thread.
#[derive(Default)]
pub struct HostThread {
    /// The clock of its CPU time; 0 before it has executed anything.
    clock: AtomicI32,
    /// It has something to execute.
    busy: AtomicBool,
}

impl HostThread {
    /// The current thread is the one, and has something to execute.
    pub fn begin(&self) {
        // SAFETY: takes nothing and can't fail.
        let thread = unsafe { libc::gettid() };
        // The clock of a thread by its number, and of what it was scheduled for: clock_getcpuclockid(3) and Linux'
        // posix-timers.h.
        self.clock.store(!thread << 3 | 0b110, Ordering::Relaxed);
        self.busy.store(true, Ordering::Release);
    }

    /// It has nothing to execute, or doesn't want to for the moment.
    pub fn end(&self) {
        self.busy.store(false, Ordering::Release);
    }

    /// It wants to execute, and the host lets it wait: its CPU time stands still.
    pub fn is_starved(&self) -> bool {
        self.busy.load(Ordering::Acquire) && self.cpu_time() == self.cpu_time()
    }

    /// Nanoseconds; zero if it can't be told.
    fn cpu_time(&self) -> u64 {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the time is a valid place; a clock that isn't there is refused.
        unsafe { libc::clock_gettime(self.clock.load(Ordering::Relaxed), &raw mut time) };
        (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    /// Whether the condition comes true within ten seconds.
    fn soon(mut condition: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            if condition() {
                return true;
            }
        }
        false
    }

    #[test]
    fn a_thread_that_sleeps_while_busy_is_starved_and_one_that_runs_is_not() {
        let (thread, spin, done) = <(Arc<HostThread>, Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        assert!(!thread.is_starved());
        let other = std::thread::spawn({
            let (thread, spin, done) = (thread.clone(), spin.clone(), done.clone());
            move || {
                thread.begin();
                while !spin.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
                thread.end();
            }
        });
        assert!(soon(|| thread.is_starved()));
        spin.store(true, Ordering::Relaxed);
        assert!(soon(|| thread.busy.load(Ordering::Relaxed) && !thread.is_starved()));
        done.store(true, Ordering::Relaxed);
        other.join().unwrap();
        assert!(!thread.is_starved());
    }
}
