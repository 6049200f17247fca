//! Waiting awake for a moment when a vCPU halts: to wake a sleeping thread on another processor of the host takes some
//! 20 µs, and processors of a guest that work together, or with a device's thread, halt for less. The model is KVM's
//! (Linux' Documentation/virt/kvm/halt-polling.rst): the time grows while halts are short, and is nothing while they are
//! long.

use bivisor_machine::host::Nanos;

/// The longest time.
const LONGEST: Nanos = 50_000;
/// The first time.
const FIRST: Nanos = 10_000;

/// How long one vCPU waits awake.
pub struct HaltPoll {
    longest: Nanos,
    time: Nanos,
}

impl HaltPoll {
    /// For a machine with this many vCPUs, on a host where the process may use this many processors at once. A vCPU
    /// must not wait awake where another one, or the device's thread that would wake it, may need the processor.
    pub fn new(vcpus: usize, processors: usize) -> Self {
        Self { longest: if processors > 1 && vcpus <= processors { LONGEST } else { 0 }, time: 0 }
    }

    /// How long to wait awake now.
    pub fn time(&self) -> Nanos {
        self.time
    }

    /// The vCPU was halted for so long.
    pub fn halted(&mut self, time: Nanos) {
        if time > self.longest {
            self.time = 0;
        } else if time > self.time {
            self.time = (self.time * 2).clamp(FIRST, self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_halts_are_waited_for_and_long_ones_are_not() {
        let mut poll = HaltPoll::new(2, 2);
        assert_eq!(poll.time(), 0);
        for expected in [10_000, 20_000, 40_000, 40_000] {
            poll.halted(35_000);
            assert_eq!(poll.time(), expected);
        }
        poll.halted(3_000);
        assert_eq!(poll.time(), 40_000);
        poll.halted(1_000_000);
        assert_eq!(poll.time(), 0);
    }

    #[test]
    fn not_where_nobody_wakes_it_or_others_need_the_processor() {
        for (vcpus, processors) in [(1, 1), (3, 2)] {
            let mut poll = HaltPoll::new(vcpus, processors);
            poll.halted(5_000);
            assert_eq!(poll.time(), 0);
        }
    }
}
