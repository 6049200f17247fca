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
    // They zero eight registers, not sixteen.
    if matches!(instruction.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
        return None;
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_x86::cpuid::CpuModel;
    use iced_x86::{Decoder, DecoderOptions, Encoder};

    use super::super::analysis::{Class, classify, has_memory};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(32, bytes, 0x100, DecoderOptions::NONE).decode()
    }

    fn wide(bytes: &[u8]) -> Option<Instruction> {
        widen(&decode(bytes))
    }

    /// The classes of instructions in a plain 32-bit mode, without FS and GS.
    fn class(bytes: &[u8]) -> Option<Class> {
        Some(classify(&wide(bytes)?, &CpuModel::reference(1), Key::plain_code32()))
    }

    #[test]
    fn jumps_keep_condition_and_target() {
        for condition in 0..16 {
            let wide = wide(&[0x70 | condition, 0xfe]).expect("a jump");
            let long = Decoder::with_ip(64, &[0x70 | condition, 0xfe], 0x100, DecoderOptions::NONE).decode();
            assert_eq!((wide.code(), wide.near_branch64()), (long.code(), 0x100));
            let wide = self::wide(&[0x0f, 0x80 | condition, 0, 0, 0, 0x80]).expect("a jump");
            assert!(wide.is_jcc_near() && wide.condition_code() == long.condition_code());
            assert_eq!((wide.op0_kind(), wide.near_branch64() as i32), (OpKind::NearBranch64, -0x7fff_fefa));
        }
        assert_eq!(class(&[0xe8, 0, 0xff, 0xff, 0xff]), Some(Class::Call));
        assert_eq!(class(&[0x66, 0xe8, 0, 0]), None);
        // JECXZ, but JCXZ has no equivalent.
        assert_eq!(class(&[0xe3, 0]), Some(Class::JumpIfRcxZero));
        assert_eq!(class(&[0x67, 0xe3, 0]), Some(Class::InterpretLast));
    }

    #[test]
    fn the_stack_takes_words_of_32_bits_only() {
        assert_eq!(class(&[0x50]), Some(Class::Push));
        assert_eq!(class(&[0x66, 0x50]), Some(Class::Interpret));
        assert_eq!(class(&[0x6a, 0xff]), Some(Class::Push));
        assert_eq!(class(&[0xff, 0x33]), Some(Class::Push));
        assert_eq!(class(&[0x66, 0xff, 0x33]), Some(Class::Interpret));
        assert_eq!(class(&[0x5c]), Some(Class::Pop));
        assert_eq!(class(&[0x8f, 0x00]), Some(Class::Interpret));
        assert_eq!(class(&[0x60]), Some(Class::Interpret));
        assert_eq!(class(&[0x06]), Some(Class::Interpret));
        assert_eq!(class(&[0x9c]), Some(Class::Pushf));
        assert_eq!(class(&[0xc9]), Some(Class::Leave));
        assert_eq!(class(&[0xc2, 8, 0]), Some(Class::Return));
        assert_eq!(class(&[0x66, 0xc3]), Some(Class::InterpretLast));
        let add = decode(&[0x81, 0xc4, 0, 0xff, 0xff, 0xff]);
        assert_eq!(stack_constant(&add), Some(-0x100));
        assert_eq!(stack_constant(&decode(&[0x66, 0x83, 0xc4, 8])), None);
    }

    #[test]
    fn addresses_are_widened_with_their_sign() {
        // mov eax, [esi*4 - 4000h]
        let scaled = wide(&[0x8b, 0x04, 0xb5, 0x00, 0xc0, 0xff, 0xff]).expect("32-bit addresses");
        assert_eq!(scaled.memory_index(), Register::RSI);
        assert_eq!(scaled.memory_displacement64() as i64, -0x4000);
        // mov eax, [0xffff0000]
        let absolute = wide(&[0xa1, 0, 0, 0xff, 0xff]).expect("a 32-bit address");
        assert_eq!((absolute.code(), absolute.memory_displacement64()), (Code::Mov_r32_rm32, 0xffff_0000));
        // mov eax, [bx+si]; mov eax, [1234h]; mov eax, cs:[eax]; nopw cs:[eax+eax]
        assert_eq!(wide(&[0x67, 0x8b, 0x00]), None);
        assert_eq!(wide(&[0x67, 0xa1, 0x34, 0x12]), None);
        assert_eq!(wide(&[0x2e, 0x8b, 0x00]), None);
        assert_eq!(class(&[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0]), Some(Class::Nothing));
        assert_eq!(class(&[0xf3, 0xa5]), Some(Class::RepeatString));
        assert_eq!(class(&[0x67, 0xf3, 0xa5]), Some(Class::Interpret));
    }

    #[test]
    fn segments_without_all_addresses_are_left_to_the_interpreter() {
        let read = decode(&[0x65, 0x8b, 0x00]);
        assert!(matches!(widened(&read, Key::plain_code32()), Widened::Interpreted));
        let call = decode(&[0x65, 0xff, 0x15, 0x10, 0, 0, 0]);
        assert!(matches!(widened(&call, Key::plain_code32()), Widened::InterpretedLast));
    }

    /// Whatever is copied, of all opcodes with registers, is the same instruction when 64-bit code decodes it.
    #[test]
    fn what_is_copied_means_the_same_in_64_bit_code() {
        let mut copied = 0;
        for prefix in [None, Some(0x66), Some(0xf3), Some(0xf2)] {
            for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                for (opcode, modrm) in (0..=0xff).flat_map(|opcode| (0xc0..=0xff).map(move |m| (opcode, m))) {
                    let mut bytes: Vec<u8> = prefix.into_iter().collect();
                    bytes.extend(map);
                    bytes.extend([opcode, modrm, 0x12, 0x34, 0x56, 0x78]);
                    copied += u32::from(same_in_both(&bytes));
                }
            }
        }
        assert!(copied > 10_000, "{copied}");
    }

    /// Compares a copied instruction without an operand in memory; false if it isn't copied.
    fn same_in_both(bytes: &[u8]) -> bool {
        if class(bytes) != Some(Class::Copy) {
            return false;
        }
        let (narrow, wide) = (decode(bytes), wide(bytes).expect("a class"));
        if has_memory(&wide) {
            return false;
        }
        let mut encoder = Encoder::new(64);
        if encoder.encode(&wide, 0).is_err() {
            // Left to the interpreter when it can't be encoded: another opcode for what 80h does.
            assert_eq!(narrow.op_code().op_code(), 0x82, "{bytes:x?}");
            return false;
        }
        let code = encoder.take_buffer();
        let again = Decoder::new(64, &code, DecoderOptions::NONE).decode();
        assert_eq!(again.mnemonic(), narrow.mnemonic(), "{bytes:x?}");
        for operand in 0..narrow.op_count() {
            assert_eq!(again.op_kind(operand), narrow.op_kind(operand), "{bytes:x?}");
            assert_eq!(again.op_register(operand), narrow.op_register(operand), "{bytes:x?}");
        }
        true
    }
}
