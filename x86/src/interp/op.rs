//! A decoded instruction.

use iced_x86::Instruction;

/// One decoded instruction, independent of the linear address it is executed at.
#[derive(Clone, Debug)]
pub struct Op {
    /// As iced-x86 decoded it, at the instruction pointer `decode_ip`.
    pub instruction: Instruction,
    /// The instruction's bytes; the first `instruction.len()` count.
    pub bytes: [u8; 15],
}

impl Op {
    /// What to add to addresses that iced-x86 computed from the instruction pointer at decoding (branch targets,
    /// RIP-relative operands), when the instruction is executed at `rip`.
    pub fn ip_delta(&self, rip: u64) -> u64 {
        rip.wrapping_sub(self.instruction.ip())
    }
}
