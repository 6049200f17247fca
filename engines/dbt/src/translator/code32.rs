//! 32-bit code as the 64-bit code that does the same, for everything behind the decoder.
//!
//! In flat segments the two differ in little (SDM Vol. 1, section 3.4.1.1 and Vol. 2A, section 2.2.1.7): addresses and
//! the stack pointer wrap at 32 bits, the stack moves by four bytes, and some encodings exist in one of them only.
//! Widened instructions name 64-bit registers in addresses and on the stack; that the upper halves don't count is left
//! to those who emit code, which ask [`super::key::Key::code32`].

use iced_x86::{Code, CodeSize, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::key::Key;

/// Bytes that the stack moves by in 32-bit code.
pub const STACK_STEP: i32 = 4;
/// Stack accesses that are checked together lie below this page, so that ESP does not wrap between them.
pub const LAST_PAGE: u64 = 0xffff_f000;

/// How an instruction of 32-bit code is to be decoded further.
pub enum Widened {
    /// As this 64-bit instruction, which does the same.
    As(Instruction),
    /// It is left to the interpreter.
    Interpreted,
    /// It is left to the interpreter, and the block ends.
    InterpretedLast,
}

/// What an instruction of 32-bit code is for the translator.
pub fn widened(instruction: &Instruction, key: Key) -> Widened {
    let by_short_segment = match instruction.segment_prefix() {
        Register::FS => !key.fs(),
        Register::GS => !key.gs(),
        _ => false,
    };
    match widen(instruction) {
        Some(wide) if !by_short_segment => Widened::As(wide),
        Some(_) if instruction.flow_control() == FlowControl::Next => Widened::Interpreted,
        _ => Widened::InterpretedLast,
    }
}

/// The 64-bit instruction that does what this 32-bit one does; `None` if it is left to the interpreter.
fn widen(instruction: &Instruction) -> Option<Instruction> {
    let mut wide = *instruction;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::Memory => widen_address(&mut wide)?,
            OpKind::MemoryESEDI => wide.set_op_kind(operand, OpKind::MemoryESRDI),
            // By CS memory is read, but not written: this and 16-bit addresses are rare.
            OpKind::MemorySegESI if instruction.segment_prefix() == Register::CS => return None,
            OpKind::MemorySegESI => wide.set_op_kind(operand, OpKind::MemorySegRSI),
            OpKind::NearBranch32 => {
                wide.set_op_kind(operand, OpKind::NearBranch64);
                wide.set_near_branch64(instruction.near_branch32() as i32 as i64 as u64);
            }
            OpKind::NearBranch16 => return None,
            _ => {}
        }
    }
    if let Some(code) = code(instruction) {
        wide.set_code(code);
        if names_whole_register(code) && instruction.op0_kind() == OpKind::Register {
            wide.set_op0_register(instruction.op0_register().full_register());
        }
    }
    wide.set_code_size(CodeSize::Code64);
    Some(wide)
}

/// Makes a memory operand of 32-bit addresses one of 64 bits.
fn widen_address(wide: &mut Instruction) -> Option<()> {
    let (base, index) = (wide.memory_base(), wide.memory_index());
    let absolute = base == Register::None && index == Register::None;
    // Long NOPs have a prefix for CS.
    let by_code = wide.segment_prefix() == Register::CS && wide.mnemonic() != Mnemonic::Nop;
    if by_code || base.is_gpr16() || index.is_gpr16() || absolute && wide.memory_displ_size() == 2 {
        return None;
    }
    if !absolute {
        wide.set_memory_base(base.full_register());
        wide.set_memory_index(index.full_register());
        wide.set_memory_displacement64(wide.memory_displacement32() as i32 as i64 as u64);
    }
    Some(())
}

/// The code of the same instruction in 64-bit mode, where it is another one.
fn code(instruction: &Instruction) -> Option<Code> {
    if instruction.is_jcc_short_or_near() {
        // Each condition's codes are numbered by operand size: 16, 32, 64.
        return Code::try_from(instruction.code() as usize + 1).ok();
    }
    Some(match instruction.code() {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Push_r32 => Code::Push_r64,
        Code::Push_rm32 => Code::Push_rm64,
        Code::Pushd_imm8 => Code::Pushq_imm8,
        Code::Pushd_imm32 => Code::Pushq_imm32,
        Code::Pushfd => Code::Pushfq,
        Code::Pop_r32 => Code::Pop_r64,
        Code::Leaved => Code::Leaveq,
        Code::Call_rel32_32 => Code::Call_rel32_64,
        Code::Call_rm32 => Code::Call_rm64,
        Code::Jmp_rel8_32 => Code::Jmp_rel8_64,
        Code::Jmp_rel32_32 => Code::Jmp_rel32_64,
        Code::Jmp_rm32 => Code::Jmp_rm64,
        Code::Jecxz_rel8_32 => Code::Jecxz_rel8_64,
        Code::Retnd => Code::Retnq,
        Code::Retnd_imm16 => Code::Retnq_imm16,
        _ => return None,
    })
}

/// Whether the first operand, if a register, is one of 64 bits in 64-bit mode.
fn names_whole_register(code: Code) -> bool {
    matches!(code, Code::Push_r64 | Code::Push_rm64 | Code::Pop_r64 | Code::Call_rm64 | Code::Jmp_rm64)
}

/// What an addition to or subtraction from ESP adds or subtracts, if that is constant.
pub fn stack_constant(instruction: &Instruction) -> Option<i64> {
    let constant = matches!(instruction.op1_kind(), OpKind::Immediate8to32 | OpKind::Immediate32);
    let is_stack = instruction.op0_kind() == OpKind::Register && instruction.op0_register() == Register::ESP;
    (constant && is_stack).then(|| i64::from(instruction.immediate(1) as i32))
}
