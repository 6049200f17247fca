//! The report of a guest: one line for each check, and a verdict that the harness compares.
use crate::{Trap, machine, println, user};
use core::fmt::Debug;

/// Counts the checks of one guest.
pub struct Suite {
    name: &'static str,
    group: &'static str,
    passed: u32,
    failed: u32,
    skipped: u32,
}

impl Suite {
    /// Starts a report.
    pub fn new(name: &'static str) -> Self {
        println!("{name}: begin");
        Self { name, group: "", passed: 0, failed: 0, skipped: 0 }
    }

    /// Puts a name, such as `"x2APIC: "`, before those of the following checks. A group whose name was given to
    /// [`Suite::skip`] is skipped as a whole.
    pub fn group(&mut self, name: &'static str) {
        self.group = name;
    }

    /// Reports one check: passed if `got` equals `want`.
    pub fn check<T: PartialEq + Debug>(&mut self, what: &str, got: T, want: T) {
        if got == want {
            self.passed += 1;
            println!("{}{what}: ok", self.group);
        } else {
            self.failed += 1;
            println!("{}{what}: FAILED, got {got:x?}, expected {want:x?}", self.group);
        }
    }

    /// Reports a check of the trap that ended a piece of code: its vector, error code and place
    /// ("at", "after" or "elsewhere"; see [`Trap::place`]).
    pub fn trap(&mut self, what: &str, got: Option<Trap>, vector: u8, error: u64, place: &str) {
        match got {
            Some(trap) if (trap.vector, trap.error, trap.place) == (vector, error, place) => {
                self.passed += 1;
                println!("{}{what}: ok", self.group);
            }
            _ => {
                self.failed += 1;
                println!(
                    "{}{what}: FAILED, got {got:?}, expected vector {vector} error {error:#x} ({place})",
                    self.group
                );
            }
        }
    }

    /// As [`Suite::trap`], for code of [`crate::user::Space`]: `place` is the offset of RIP in its code page.
    pub fn user_trap(&mut self, what: &str, got: Option<Trap>, vector: u8, error: u64, place: u64) {
        let got = got.map(|trap| (trap.vector, trap.error, trap.frame.rip.wrapping_sub(user::CODE)));
        self.check(what, got, Some((vector, error, place)));
    }

    /// Reports a check that this machine cannot run; the harness decides whether it may.
    pub fn skip(&mut self, what: &str, why: &str) {
        self.skipped += 1;
        println!("{}{what}: skipped, {why}", self.group);
    }

    /// Prints the verdict and ends the machine.
    pub fn finish(self) -> ! {
        self.verdict();
        machine::end(self.failed == 0)
    }

    /// Prints the verdict and switches the machine off.
    pub fn power_off(self) -> ! {
        self.verdict();
        machine::power_off()
    }

    fn verdict(&self) {
        println!(
            "{}: end, {} passed, {} failed, {} skipped",
            self.name, self.passed, self.failed, self.skipped
        );
    }
}
