//! What must be equal after a run of sequences.

use std::cell::OnceCell;

use bivisor_x86::registers::Rflags;
use bivisor_x86::state::MXCSR_MASK;
use iced_x86::Instruction;

use super::code::{Assembled, Field, Item, To};
use super::flags;
use super::layout::{CONTROL, Code, Outcome, PANIC};
use super::monitor::SYSTEM_NAMES;
use super::trial::Trial;
use crate::compare::{
    MISALIGNED_SSE, Rules, compares_strings, is_state_operand, same_mxcsr, state_differences, undefined_flags,
};
use crate::layout::{CODE, CODE_SIZE, DATA};

/// Words of memory that are told at most.
const TOLD: usize = 8;

/// Compares the two sides of the runs of a trial.
pub struct Comparison<'a> {
    trial: &'a Trial,
    assembled: &'a Assembled,
    /// The code pages before the first run, without the operands that sequences mean to overwrite.
    fixed: Box<Code>,
    /// Which bytes these are.
    meant: Vec<usize>,
    /// Undefined flags before each item.
    undefined: Vec<u64>,
    /// Names of the two sides.
    names: [&'static str; 2],
    /// Arithmetic flags that a fault saves where they are dead are not compared.
    dead_flags_ignored: bool,
    /// Dead flags before each item, once they were asked for.
    dead: OnceCell<Vec<u64>>,
}

impl<'a> Comparison<'a> {
    /// For the runs of this trial; `None` if it reads undefined flags.
    pub fn new(
        trial: &'a Trial,
        assembled: &'a Assembled,
        names: [&'static str; 2],
        dead_flags_ignored: bool,
    ) -> Option<Self> {
        let undefined = flags::undefined_before(&trial.items, &trial.entries, trial.mode)?;
        let meant: Vec<usize> = trial.items.iter().flat_map(|item| written_code(item, assembled)).collect();
        let mut fixed = assembled.code.clone();
        meant.iter().for_each(|&at| fixed[at] = 0);
        let dead = OnceCell::new();
        Some(Self { trial, dead, assembled, fixed, meant, undefined, names, dead_flags_ignored })
    }

    /// The instruction that execution ended at, as it stands there by now.
    fn ended_at(&self, outcome: &Outcome) -> Option<Instruction> {
        let rip = outcome.state.rip;
        let code = outcome.code.get(rip.checked_sub(CODE)? as usize..)?;
        Some(self.trial.mode.decoder(code, rip).decode())
    }

    fn rules(&self, one: &Outcome, other: &Outcome) -> Rules {
        let instruction = self.ended_at(one);
        let (one, other) = (&one.state, &other.state);
        let is_fault = !matches!(one.vector, 1 | 3);
        let mut rules = Rules {
            names: self.names,
            any_exception: false,
            fault_slack: 0,
            hidden_error: 0,
            ignored_flags: 0,
            any_mxcsr: false,
            any_pointers: self.names[1] == "dbt",
        };
        if let Some(item) = self.assembled.item_at(one.rip) {
            rules.ignored_flags = self.undefined[item];
            let differ = (one.rflags ^ other.rflags) & Rflags::ARITHMETIC.bits() != 0;
            if differ && self.dead_flags_ignored && is_fault {
                let dead = self.dead.get_or_init(|| flags::dead_before(&self.trial.items, self.trial.mode));
                rules.ignored_flags |= dead.get(item).copied().unwrap_or(0);
            }
        } else if self.dead_flags_ignored && is_fault {
            // Whatever is executed there may overwrite them.
            rules.ignored_flags = Rflags::ARITHMETIC.bits();
        }
        let Some(instruction) = instruction else { return rules };
        if one.vector == 0 {
            rules.ignored_flags |= undefined_flags(&instruction);
        }
        // Which byte of a large operand faults first, or which of two operands, is the processor's own affair.
        let is_operand_fault = |vector| matches!(vector, 12 | 13 | 14 | 17);
        let are_faults = is_operand_fault(one.vector) && is_operand_fault(other.vector);
        if is_state_operand(&instruction) {
            // Where 32-bit addresses end, a page may come before the segment's limit.
            rules.any_exception = self.trial.mode.is_32bit && are_faults;
            (rules.fault_slack, rules.hidden_error) = (0x400, 1);
        } else if compares_strings(&instruction) {
            (rules.fault_slack, rules.hidden_error) = (u64::MAX, 1);
            rules.any_exception = are_faults;
        }
        rules.any_mxcsr = same_mxcsr(&one.xsave, &instruction, one, other);
        rules
    }

    /// Whether a run has overwritten more than operands of its instructions: then other instructions are executed,
    /// which may read flags that were dead.
    pub fn is_overwritten(&self, outcome: &Outcome) -> bool {
        let mut code = outcome.code;
        self.meant.iter().for_each(|&at| code[at] = 0);
        self.dead_flags_ignored && code != *self.fixed
    }

    /// The differences between the outcomes of a run, a line each; empty if there are none.
    pub fn differences(&self, one: &Outcome, other: &Outcome) -> Vec<String> {
        if other.state.vector >= PANIC {
            let [_, name] = self.names;
            return vec![format!("{name}: {}", ending(other.state.vector))];
        }
        let mut lines = state_differences(&one.state, &other.state, &self.rules(one, other));
        for (i, name) in SYSTEM_NAMES.iter().enumerate() {
            let (one, other) = (one.system[i], other.system[i]);
            if one != other {
                let [first, second] = self.names;
                lines.push(format!("{name:>12}  {first} {one:#x}  {second} {other:#x}"));
            }
        }
        let pages: [(u64, &[u8], &[u8]); 3] = [
            (DATA, &one.data, &other.data),
            (CONTROL, &one.control, &other.control),
            (CODE, &one.code, &other.code),
        ];
        for (address, one, other) in pages {
            if one != other {
                self.memory_differences(address, one, other, &mut lines);
            }
        }
        lines
    }

    fn memory_differences(&self, address: u64, one: &[u8], other: &[u8], lines: &mut Vec<String>) {
        let [first, second] = self.names;
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        let pairs = one.chunks_exact(4).zip(other.chunks_exact(4)).enumerate();
        let different = pairs
            .map(|(i, (one, other))| (address + 4 * i as u64, word(one), word(other)))
            .filter(|(_, one, other)| one != other && !is_mask(*one, *other));
        for (at, one, other) in different.take(TOLD) {
            lines.push(format!("{:>12}  {first} {one:#010x}  {second} {other:#010x}", format!("[{at:#x}]")));
        }
    }
}

/// Offsets in the code pages of what an item stores to code.
fn written_code(item: &Item, assembled: &Assembled) -> Vec<usize> {
    match item {
        Item::Instruction { field: Some(Field { to: To::Item(target, offset @ 1..), .. }), .. } => {
            let at = (assembled.address(*target) - CODE) as usize + usize::from(*offset);
            (at..(at + 4).min(CODE_SIZE)).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether it is a stored MXCSR_MASK: the guest has no misaligned SSE mode.
fn is_mask(one: u32, other: u32) -> bool {
    one ^ other == MISALIGNED_SSE && one & other == MXCSR_MASK
}

/// What a run came to that did not end as it should.
pub fn ending(vector: u64) -> &'static str {
    use super::layout::{ENGINE_ERROR, SHUTDOWN, SKIPPED, TIMEOUT};
    match vector {
        PANIC => "panicked",
        TIMEOUT => "did not end",
        SHUTDOWN => "shut down",
        ENGINE_ERROR => "gave up",
        SKIPPED => "was not run",
        _ => "ended",
    }
}
