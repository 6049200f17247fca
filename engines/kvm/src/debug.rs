//! What a debugger wants, as KVM does it: by the processor's breakpoint registers, or else step by step.

use bivisor_machine::engine::DebugControl;
use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug};

/// Breakpoints that a processor has registers for.
const REGISTERS: usize = 4;
/// DR7, bit 10: always one.
const DR7_FIXED: u64 = 1 << 10;

/// The debugger's wishes, and where their fulfilment stands.
#[derive(Default)]
pub struct Debug {
    wanted: DebugControl,
    /// The instruction at hand stands at a breakpoint, and is executed without regard to it.
    passing: bool,
}

impl Debug {
    /// What the debugger wants from now on.
    pub fn set(&mut self, wanted: &DebugControl) {
        self.wanted.clone_from(wanted);
        self.passing = false;
    }

    /// Whether the debugger wants anything.
    pub fn is_on(&self) -> bool {
        self.wanted.single_step || !self.wanted.breakpoints.is_empty()
    }

    /// A run begins at this linear address.
    pub fn begin(&mut self, linear: u64) {
        self.passing = self.at_breakpoint(linear);
    }

    /// KVM has left after a step, or at a breakpoint, before this linear address; whether that is what is wanted.
    pub fn stops_at(&mut self, linear: u64) -> bool {
        self.passing = false;
        self.wanted.single_step || self.at_breakpoint(linear)
    }

    /// The settings for the next entry.
    pub fn settings(&self) -> kvm_guest_debug {
        let mut settings = kvm_guest_debug::default();
        if !self.is_on() {
            return settings;
        }
        settings.control = KVM_GUESTDBG_ENABLE;
        if self.wanted.single_step || self.passing || self.wanted.breakpoints.len() > REGISTERS {
            settings.control |= KVM_GUESTDBG_SINGLESTEP;
            return settings;
        }
        settings.control |= KVM_GUESTDBG_USE_HW_BP;
        settings.arch.debugreg[7] = DR7_FIXED;
        for (number, &linear) in self.wanted.breakpoints.iter().enumerate() {
            settings.arch.debugreg[number] = linear;
            settings.arch.debugreg[7] |= 2 << (2 * number);
        }
        settings
    }

    fn at_breakpoint(&self, linear: u64) -> bool {
        self.wanted.breakpoints.contains(&linear)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanting(single_step: bool, breakpoints: &[u64]) -> Debug {
        let mut debug = Debug::default();
        debug.set(&DebugControl { single_step, breakpoints: breakpoints.to_vec() });
        debug
    }

    #[test]
    fn few_breakpoints_are_the_processors_and_many_are_looked_for() {
        let few = wanting(false, &[0x1000, 0x2000]).settings();
        assert_eq!(few.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!((few.arch.debugreg[1], few.arch.debugreg[7]), (0x2000, 0x40a));
        let many = wanting(false, &[1, 2, 3, 4, 5]);
        assert_eq!(many.settings().control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
        assert_eq!(wanting(false, &[]).settings().control, 0);
    }

    #[test]
    fn a_run_passes_the_breakpoint_that_it_begins_at() {
        let mut debug = wanting(false, &[0x1000]);
        debug.begin(0x1000);
        assert_ne!(debug.settings().control & KVM_GUESTDBG_SINGLESTEP, 0);
        assert!(!debug.stops_at(0x1001));
        assert_eq!(debug.settings().control & KVM_GUESTDBG_SINGLESTEP, 0);
        assert!(debug.stops_at(0x1000));
        assert!(wanting(true, &[]).stops_at(7));
    }
}
