//! What general registers hold, as far as two of them, or one at two times, differ by a constant.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::analysis::{Class, Decoded};

/// Constants larger than this are not followed.
const LIMIT: i32 = 1 << 20;

/// A register's value: the number of something unknown, and what is added to it (modulo 2^32 in 32-bit code).
pub type Value = (u32, i32);

/// Each register's value, by its number.
pub struct Values {
    registers: [Value; 16],
    next: u32,
    /// Numbers of sums: of what, how often the second is added, and the number.
    sums: Vec<(u32, u32, u32, u32)>,
}

fn number(register: Register) -> usize {
    register.full_register() as usize - Register::RAX as usize
}

impl Values {
    /// The values at the block's start.
    pub fn at_start() -> Self {
        Self { registers: std::array::from_fn(|number| (number as u32, 0)), next: 16, sums: Vec::new() }
    }

    /// The value of a 64-bit register.
    pub fn of(&self, register: Register) -> Value {
        self.registers[number(register)]
    }

    /// Goes on to after the instruction. Whether anything is known of what it did.
    pub fn follow(&mut self, decoded: &Decoded) -> bool {
        let instruction = &decoded.instruction;
        let next = match decoded.class {
            Class::Copy => self.moved(instruction, decoded.stack_step as usize),
            Class::Push | Class::Pushf | Class::Pop => {
                self.change(1 << number(Register::RSP));
                None
            }
            Class::Nothing | Class::JumpIf => return true,
            _ => {
                self.change(u16::MAX);
                return false;
            }
        };
        self.change(decoded.written);
        if let Some((number, value)) = next {
            self.registers[number] = value;
        }
        true
    }

    /// Some registers get values of which nothing is known.
    fn change(&mut self, registers: u16) {
        for (number, value) in self.registers.iter_mut().enumerate() {
            if registers >> number & 1 != 0 {
                *value = (self.next, 0);
                self.next += 1;
            }
        }
    }

    /// Where an instruction gives a register of this size another one's value plus a constant: the register, and the value.
    fn moved(&mut self, instruction: &Instruction, size: usize) -> Option<(usize, Value)> {
        let whole = |register: Register| register.is_gpr() && register.size() == size;
        if instruction.op0_kind() != OpKind::Register || !whole(instruction.op0_register()) {
            return None;
        }
        let target = instruction.op0_register();
        if let Some(sum) = self.sum(instruction, whole) {
            return Some((number(target), sum));
        }
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
        let (root, delta) = self.of(from);
        let delta = limited(i64::from(delta).checked_add(moved)?)?;
        Some((number(target), (root, delta)))
    }

    /// The value of a sum of two registers. The same sum again, as in a loop's next round, has the same number.
    fn sum(&mut self, instruction: &Instruction, whole: impl Fn(Register) -> bool) -> Option<Value> {
        let (one, other, times, constant) = match instruction.mnemonic() {
            Mnemonic::Lea
                if instruction.memory_base().is_gpr64() && instruction.memory_index().is_gpr64() =>
            {
                (
                    instruction.memory_base(),
                    instruction.memory_index(),
                    instruction.memory_index_scale(),
                    instruction.memory_displacement64() as i64,
                )
            }
            Mnemonic::Add
                if instruction.op1_kind() == OpKind::Register && whole(instruction.op1_register()) =>
            {
                (instruction.op0_register(), instruction.op1_register(), 1, 0)
            }
            _ => return None,
        };
        let ((one, first), (other, second)) = (self.of(one), self.of(other));
        let delta = i64::from(second) * i64::from(times) + i64::from(first);
        let delta = limited(delta.checked_add(constant)?)?;
        let (one, other) = if times == 1 { (one.min(other), one.max(other)) } else { (one, other) };
        let known = self.sums.iter().find(|&&(a, b, n, _)| (a, b, n) == (one, other, times));
        let number = known.map_or(self.next, |&(.., number)| number);
        if number == self.next {
            self.sums.push((one, other, times, number));
            self.next += 1;
        }
        Some((number, delta))
    }
}

/// A constant, if it is small enough to be followed.
fn limited(constant: i64) -> Option<i32> {
    i32::try_from(constant).ok().filter(|constant| constant.abs() < LIMIT)
}
