//! PAUSE: a guest that waits by spinning gives its host processor to the processors of the same machine that have none.
//!
//! The model is the filtering of PAUSE in hardware (APM Vol. 2, "Pause Intercept Filtering"; SDM Vol. 3C, "PLE_Gap"):
//! a count is decremented by each PAUSE, and once it is used up in a short time, the hypervisor looks.

use std::thread;
use std::time::Duration;

use bivisor_x86::env::Env;

use super::analysis::Decoded;
use super::block::{Addend, Builder};
use super::context;
use super::emit::condition;
use super::site::SiteKind;
use super::vcpu::DbtVcpu;
use crate::host_cpu;

/// PAUSE until translated code leaves.
pub const PAUSES: u64 = 64;
/// Host time stamps per PAUSE up to which they are taken for one wait.
const GAP: u64 = 1_000;
/// Host time stamps of a wait between two looks for processors that have no host processor: some ten microseconds.
const WINDOW: u64 = 30_000;
/// The same right after a sleep.
const WINDOW_AFTER_NAP: u64 = 5_000;
/// The first sleep; each one of a wait is twice as long as that before.
const FIRST_NAP: Duration = Duration::from_micros(5);
/// How often the time is doubled.
const DOUBLINGS: u32 = 3;

/// What is known of the guest's spinning.
#[derive(Default)]
pub struct Spinning {
    /// Host time stamp when translated code left last.
    left: u64,
    /// Host time stamp at which the next look is due, if the wait goes on.
    look_at: u64,
    /// Sleeps during this wait.
    naps: u32,
}

impl Builder<'_> {
    /// PAUSE, which leaves when the count of them is used up.
    pub fn pause(&mut self, decoded: &Decoded) {
        if decoded.live_before != 0 {
            self.put_flags_aside();
        }
        self.e.pause();
        self.e.decrement(context::pauses());
        let used_up = self.e.jump_if(condition::E);
        let resume = (self.request.start + self.e.position()) as u32;
        self.leave_from(used_up, SiteKind::Pause { resume });
        // Who comes back has changed it.
        self.addend = Addend::Anything;
    }
}

impl DbtVcpu {
    /// The guest has executed many PAUSE. If it seems to wait, and another processor of the machine wants to execute
    /// but isn't executing, sleeps for a moment in favour of that.
    pub(super) fn spun(&mut self) {
        self.context().pauses = PAUSES;
        let now = host_cpu::tsc();
        let is_new = now.wrapping_sub(self.spinning.left) > PAUSES * GAP;
        self.spinning.left = now;
        if is_new {
            self.spinning.naps = 0;
            self.spinning.look_at = now.wrapping_add(WINDOW);
        } else if now >= self.spinning.look_at {
            self.look_for_starving(now);
        }
    }

    fn look_for_starving(&mut self, now: u64) {
        if !self.env.others_starve() {
            self.spinning.naps = 0;
            self.spinning.look_at = now.wrapping_add(WINDOW);
            return;
        }
        self.statistics.naps += 1;
        let doublings = self.spinning.naps.min(DOUBLINGS);
        self.nap(FIRST_NAP * (1 << doublings));
        let woken = host_cpu::tsc();
        self.spinning =
            Spinning { left: woken, look_at: woken.wrapping_add(WINDOW_AFTER_NAP), naps: doublings + 1 };
    }

    /// Sleeps until an event comes, at most for this time.
    fn nap(&mut self, time: Duration) {
        self.thread.end();
        // Who raises an event after this look unparks the thread.
        if !self.env.has_event() {
            thread::park_timeout(time);
        }
        self.thread.begin();
    }
}
