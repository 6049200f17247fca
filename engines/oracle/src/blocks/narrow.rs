//! Makes of 64-bit instructions the 32-bit ones that do the same: what sequences are put together from is written once.

use std::collections::HashMap;
use std::sync::LazyLock;

use iced_x86::{Code, Instruction, OpKind, Register};

/// Codes by their names.
static CODES: LazyLock<HashMap<String, Code>> =
    LazyLock::new(|| Code::values().map(|code| (format!("{code:?}"), code)).collect());

/// Names that do not follow from the others.
const NAMES: [(&str, &str); 11] = [
    ("Pushq_imm32", "Pushd_imm32"),
    ("Pushq_imm8", "Pushd_imm8"),
    ("Pushfq", "Pushfd"),
    ("Popfq", "Popfd"),
    ("Enterq_imm16_imm8", "Enterd_imm16_imm8"),
    ("Leaveq", "Leaved"),
    ("Cqo", "Cdq"),
    ("Jrcxz_rel8_64", "Jecxz_rel8_32"),
    ("Fxsave64_m512byte", "Fxsave_m512byte"),
    ("Fxrstor64_m512byte", "Fxrstor_m512byte"),
    ("Xsave64_mem", "Xsave_mem"),
];

/// The code of 32-bit instructions that stands for this one; itself if there is no other.
pub fn code(code: Code) -> Code {
    let name = format!("{code:?}");
    let narrow = match NAMES.iter().find(|(wide, _)| *wide == name) {
        Some((_, narrow)) => (*narrow).to_string(),
        None => {
            let name = name.replace("rm64", "rm32").replace("r64", "r32").replace("imm64", "imm32");
            name.replace("_64_RCX", "_32_ECX").replace("_64_ECX", "_32_ECX").replace("_64", "_32")
        }
    };
    CODES.get(&narrow).copied().unwrap_or(code)
}

/// The register of 32-bit code that stands for this one. There are eight of each kind.
fn register(register: Register) -> Register {
    let nth = |first: Register| {
        Register::try_from(first as usize + (register.number() & 7)).unwrap_or(Register::None)
    };
    match register {
        Register::RIP | Register::EIP => Register::None,
        _ if register.is_gpr64() || register.is_gpr32() => nth(Register::EAX),
        _ if register.is_gpr16() => nth(Register::AX),
        _ if register.is_xmm() => nth(Register::XMM0),
        _ if register.is_ymm() => nth(Register::YMM0),
        // AL to BL: the other four have other names.
        _ if register.is_gpr8() => {
            Register::try_from(Register::AL as usize + (register.number() & 3)).unwrap_or(Register::None)
        }
        other => other,
    }
}

/// The instruction for 32-bit code.
pub fn instruction(wide: &Instruction) -> Instruction {
    let mut narrow = *wide;
    narrow.set_code(code(wide.code()));
    for operand in 0..wide.op_count() {
        match wide.op_kind(operand) {
            OpKind::Register => narrow.set_op_register(operand, register(wide.op_register(operand))),
            OpKind::Immediate32to64 => narrow.set_op_kind(operand, OpKind::Immediate32),
            OpKind::Immediate8to64 => narrow.set_op_kind(operand, OpKind::Immediate8to32),
            OpKind::Immediate64 => {
                let value = wide.immediate64() as u32;
                narrow.set_op_kind(operand, OpKind::Immediate32);
                narrow.set_immediate32(value);
            }
            OpKind::NearBranch64 => {
                narrow.set_op_kind(operand, OpKind::NearBranch32);
                narrow.set_near_branch32(wide.near_branch64() as u32);
            }
            OpKind::Memory => {
                narrow.set_memory_base(register(wide.memory_base()));
                narrow.set_memory_index(register(wide.memory_index()));
                narrow.set_memory_displacement64(wide.memory_displacement64() & 0xffff_ffff);
                if wide.memory_displ_size() == 8 || narrow.memory_base() == Register::None {
                    narrow.set_memory_displ_size(4);
                }
            }
            _ => {}
        }
    }
    narrow
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Encoder, MemoryOperand};

    fn bytes(wide: Result<Instruction, iced_x86::IcedError>) -> Vec<u8> {
        let narrow = instruction(&wide.expect("a 64-bit instruction"));
        let mut encoder = Encoder::new(32);
        encoder.encode(&narrow, 0x1000).expect("a 32-bit instruction");
        encoder.take_buffer()
    }

    #[test]
    fn instructions_become_those_of_32_bits() {
        let there = MemoryOperand::with_base_displ(Register::RIP, 0x1234);
        assert_eq!(
            bytes(Instruction::with2(Code::Mov_r64_rm64, Register::R9, there)),
            [0x8b, 0x0d, 0x34, 0x12, 0, 0]
        );
        let near = MemoryOperand::with_base_displ(Register::RBX, -1);
        assert_eq!(bytes(Instruction::with2(Code::Lea_r64_m, Register::RCX, near)), [0x8d, 0x4b, 0xff]);
        assert_eq!(bytes(Instruction::with2(Code::Sub_rm64_imm8, Register::RSP, 8)), [0x83, 0xec, 8]);
        assert_eq!(bytes(Instruction::with1(Code::Pushq_imm8, -2)), [0x6a, 0xfe]);
        assert_eq!(bytes(Instruction::with_branch(Code::Jne_rel8_64, 0x1000)), [0x75, 0xfe]);
        assert_eq!(bytes(Instruction::with_branch(Code::Loop_rel8_64_RCX, 0x1000)), [0xe2, 0xfe]);
        assert_eq!(bytes(Ok(Instruction::with(Code::Leaveq))), [0xc9]);
    }
}
