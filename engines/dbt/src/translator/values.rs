//! What general registers hold, as far as it is another one's value at the block's start plus a constant.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::analysis::{Class, Decoded};

/// Constants larger than this are not followed.
const LIMIT: i32 = 1 << 20;

/// Each register's value, by its number: a register at the block's start, and what is added to it (modulo 2^32 in 32-bit
/// code).
pub struct Values([Option<(u8, i32)>; 16]);

fn number(register: Register) -> usize {
    register.full_register() as usize - Register::RAX as usize
}

impl Values {
    /// The values at the block's start.
    pub fn at_start() -> Self {
        Self(std::array::from_fn(|number| Some((number as u8, 0))))
    }

    /// The value of a 64-bit register, if it is known.
    pub fn of(&self, register: Register) -> Option<(u8, i32)> {
        self.0[number(register)]
    }

    /// Goes on to after the instruction.
    pub fn follow(&mut self, decoded: &Decoded, factory: &mut InstructionInfoFactory) {
        let instruction = &decoded.instruction;
        let next = match decoded.class {
            Class::Copy => self.moved(instruction, decoded.stack_step as usize),
            Class::Nothing | Class::Pause | Class::JumpIf | Class::Jump => return,
            Class::Push | Class::Pushf | Class::Pop => {
                self.0[number(Register::RSP)] = None;
                None
            }
            _ => {
                self.0.fill(None);
                return;
            }
        };
        for used in factory.info(instruction).used_registers() {
            if used.register().is_gpr() && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead) {
                self.0[number(used.register())] = None;
            }
        }
        if let Some((number, value)) = next {
            self.0[number] = Some(value);
        }
    }

    /// Where an instruction gives a register of this size another one's value plus a constant: the register, and the value.
    fn moved(&self, instruction: &Instruction, size: usize) -> Option<(usize, (u8, i32))> {
        let whole = |register: Register| register.is_gpr() && register.size() == size;
        if instruction.op0_kind() != OpKind::Register || !whole(instruction.op0_register()) {
            return None;
        }
        let target = instruction.op0_register();
        let constant = match instruction.op1_kind() {
            OpKind::Immediate8to64 | OpKind::Immediate32to64 | OpKind::Immediate8to32 => {
                Some(instruction.immediate(1) as i64)
            }
            OpKind::Immediate32 => Some((instruction.immediate(1) as i32).into()),
            _ => None,
        };
        let (from, moved) = match instruction.mnemonic() {
            Mnemonic::Add => (target, constant?),
            Mnemonic::Sub => (target, constant?.checked_neg()?),
            Mnemonic::Inc => (target, 1),
            Mnemonic::Dec => (target, -1),
            Mnemonic::Mov
                if instruction.op1_kind() == OpKind::Register && whole(instruction.op1_register()) =>
            {
                (instruction.op1_register(), 0)
            }
            Mnemonic::Lea
                if instruction.memory_base().is_gpr64() && instruction.memory_index() == Register::None =>
            {
                (instruction.memory_base(), instruction.memory_displacement64() as i64)
            }
            _ => return None,
        };
        let (root, delta) = self.of(from)?;
        let delta = i32::try_from(i64::from(delta).checked_add(moved)?).ok()?;
        (delta.abs() < LIMIT).then_some((number(target), (root, delta)))
    }
}
