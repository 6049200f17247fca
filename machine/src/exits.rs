//! How often, and why, a processor's guest code was left, always counted.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// An instruction that the engine had to emulate, and that is none of those below.
    Instruction,
    /// An access to memory for which the engine had to look into the guest's page tables.
    Memory,
    /// IN and OUT, an element of a string each.
    Port,
    /// An access to a device's registers in memory space.
    Mmio,
    /// RDMSR and WRMSR of what is the machine's, the local APIC's among others.
    Msr,
    /// An interrupt was taken.
    Interrupt,
    /// An NMI was taken.
    Nmi,
    /// The processor halted with nothing to do.
    Halt,
}

/// All kinds, with words for each.
const KINDS: [(Kind, &str); 8] = [
    (Kind::Instruction, "instructions emulated"),
    (Kind::Memory, "page faults handled by the engine"),
    (Kind::Port, "port I/O"),
    (Kind::Mmio, "MMIO"),
    (Kind::Msr, "MSRs"),
    (Kind::Interrupt, "interrupts injected"),
    (Kind::Nmi, "NMIs injected"),
    (Kind::Halt, "halts"),
];

impl Kind {
    /// One word for it, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Instruction => "instruction",
            Self::Memory => "memory",
            Self::Port => "port",
            Self::Mmio => "mmio",
            Self::Msr => "msr",
            Self::Interrupt => "interrupt",
            Self::Nmi => "nmi",
            Self::Halt => "halt",
        }
    }

    /// The guest did something that had to be caught; otherwise something came to it, or it had nothing to do.
    pub fn is_trap(self) -> bool {
        matches!(self, Self::Instruction | Self::Memory | Self::Port | Self::Mmio | Self::Msr)
    }

    /// All kinds.
    pub fn all() -> impl Iterator<Item = Self> {
        KINDS.iter().map(|&(kind, _)| kind)
    }
}

/// Hypercalls with numbers from here on are counted together.
const HYPERCALLS: usize = 16;

/// One processor's counters. Only its own thread counts; anybody may look.
#[derive(Debug, Default)]
pub struct Exits {
    kinds: [AtomicU64; KINDS.len()],
    /// By number, and those beyond.
    hypercalls: [AtomicU64; HYPERCALLS + 1],
}

fn increment(counter: &AtomicU64) {
    // There is one writer, so this loses nothing, and costs no bus lock.
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

impl Exits {
    /// Counts one.
    pub fn count(&self, kind: Kind) {
        increment(&self.kinds[kind as usize]);
    }
    /// Counts a hypercall.
    pub fn count_hypercall(&self, number: u64) {
        increment(&self.hypercalls[number.min(HYPERCALLS as u64) as usize]);
    }
    /// How many there were of a kind.
    pub fn of(&self, kind: Kind) -> u64 {
        self.kinds[kind as usize].load(Ordering::Relaxed)
    }
    /// Hypercalls by number; the last is for all from there on.
    pub fn hypercalls(&self) -> impl Iterator<Item = (u64, u64)> {
        (0..).zip(self.hypercalls.iter().map(|counter| counter.load(Ordering::Relaxed)))
    }
    /// All counters, with words for each.
    pub fn list(&self) -> Vec<(String, u64)> {
        let kinds = KINDS.iter().map(|&(kind, words)| (words.to_string(), self.of(kind)));
        let hypercalls = self.hypercalls.iter().enumerate().map(|(number, counter)| {
            let words = match number {
                HYPERCALLS => format!("hypercalls, number {HYPERCALLS} and above"),
                _ => format!("hypercalls, number {number}"),
            };
            (words, counter.load(Ordering::Relaxed))
        });
        kinds.chain(hypercalls).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exit_is_counted_by_its_kind() {
        let exits = Exits::default();
        for (times, &(kind, _)) in (1..).zip(&KINDS) {
            (0..times).for_each(|_| exits.count(kind));
        }
        for number in [0, 5, 5, 15, 16, u64::MAX] {
            exits.count_hypercall(number);
        }
        assert_eq!(KINDS.map(|(kind, _)| exits.of(kind)), [1, 2, 3, 4, 5, 6, 7, 8]);
        let traps = Kind::all().filter(|kind| kind.is_trap()).map(|kind| exits.of(kind));
        assert_eq!(traps.sum::<u64>(), 1 + 2 + 3 + 4 + 5);
        let called: Vec<_> = exits.hypercalls().filter(|&(_, count)| count != 0).collect();
        assert_eq!(called, [(0, 1), (5, 2), (15, 1), (16, 2)]);
        let list = exits.list();
        let of = |words: &str| list.iter().find(|(name, _)| name.starts_with(words)).unwrap().1;
        assert_eq!((of("port"), of("hypercalls, number 5"), of("hypercalls, number 16 and")), (3, 2, 2));
        let hypercalls = list.iter().filter(|(name, _)| name.starts_with("hypercalls"));
        assert_eq!(hypercalls.map(|(_, count)| count).sum::<u64>(), 6);
    }
}
