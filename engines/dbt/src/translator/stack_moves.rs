//! Moves of guest RSP that are put off: several PUSH and POP in a row move it once, the last one.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::analysis::{Class, Decoded, Unit, has_memory, unit};
use super::block::Builder;
use super::context::GUEST_RSP;
use super::emit::at;

impl Builder<'_> {
    /// Gives guest RSP its value.
    pub fn move_stack(&mut self) {
        let moved = std::mem::take(&mut self.stack_moved);
        if moved != 0 {
            self.e.lea(self.width(), GUEST_RSP, at(GUEST_RSP, moved));
        }
    }
}

/// Whether a move of RSP may wait until after the instruction: that neither uses RSP nor may leave the block, or is a tracked
/// access to the stack, which allows for the move, or makes it where it leaves.
pub fn may_wait(decoded: &Decoded) -> bool {
    let instruction = &decoded.instruction;
    let tracked = decoded.stack_delta.is_some();
    match decoded.class {
        Class::Nothing => true,
        Class::Push => tracked && instruction.op0_kind() != OpKind::Memory && !names_stack(instruction),
        Class::Pop => tracked && !names_stack(instruction),
        Class::Call | Class::Return => tracked,
        Class::Copy => {
            let accesses_memory = instruction.mnemonic() != Mnemonic::Lea && has_memory(instruction);
            unit(instruction) == Unit::General
                && !accesses_memory
                && !names_stack(instruction)
                && !matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv)
        }
        _ => false,
    }
}

/// Whether RSP or a part of it is an operand, or part of one.
fn names_stack(instruction: &Instruction) -> bool {
    let is_stack = |register: Register| register.full_register() == Register::RSP;
    is_stack(instruction.memory_base())
        || (0..instruction.op_count()).any(|operand| {
            instruction.op_kind(operand) == OpKind::Register && is_stack(instruction.op_register(operand))
        })
}
