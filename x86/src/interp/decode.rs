//! From bytes to an [`Op`].

use iced_x86::{Code, CodeSize, CpuidFeature, Decoder, DecoderError, DecoderOptions, Instruction, OpKind};

use crate::cpuid::{CpuModel, Vendor};
use crate::interp::op::{Handler, MAX_INSTRUCTION_LENGTH, Op, Then};

/// Decodes for one CPU model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InstructionDecoder {
    options: u32,
}

impl InstructionDecoder {
    /// With what the model's vendor and features make of some opcodes.
    pub(crate) fn new(model: &CpuModel) -> Self {
        Self { options: decoder_options(model) }
    }

    /// Decodes the instruction at the start of `bytes` as code of `bits` (16, 32 or 64); `None` if more bytes are
    /// needed. Instructions that the model does not offer, and invalid ones, come out as #UD; those longer
    /// than 15 bytes as #GP(0) (SDM Vol. 3A, section 6.15, interrupt 13).
    pub(crate) fn decode(&self, bytes: &[u8], bits: u32, model: &CpuModel) -> Option<Op> {
        let mut decoder = Decoder::with_ip(bits, bytes, 0, self.options);
        let mut instruction = decoder.decode();
        if instruction.code() == Code::Pause && is_exchange(bytes.get(..instruction.len())?) {
            instruction = decode_exchange(bytes.get(..instruction.len())?, self.options);
        }
        let invalid = instruction.code() == Code::INVALID;
        if invalid && decoder.last_error() == DecoderError::NoMoreBytes {
            return None;
        }
        let mut own = [0; MAX_INSTRUCTION_LENGTH];
        for (to, from) in own.iter_mut().zip(bytes) {
            *to = *from;
        }
        let mut op = Op::new(instruction, own);
        if invalid && instruction.len() >= MAX_INSTRUCTION_LENGTH {
            op.handler = Handler::TooLong;
        } else if is_quadword_move(&instruction, bytes)
            || (is_prefetch_of_register(&instruction) && model.vendor == Vendor::Amd)
        {
            op.handler = Handler::Undefined;
            op.then = Then::Anything;
        } else if op.handler != Handler::Nop && !model.offers_instruction(&instruction) {
            // Hints are no-operations where they are unknown.
            op.handler = Handler::Undefined;
            op.then = Then::Anything;
        }
        Some(op)
    }
}

/// What iced-x86 must be told to decode as processors of this model do, but for [`is_peculiar`].
pub fn decoder_options(model: &CpuModel) -> u32 {
    let unless = |set: CpuidFeature, option: u32| if model.offers(set) { 0 } else { option };
    let vendor = if model.vendor == Vendor::Amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
    vendor
        | unless(CpuidFeature::BMI1, DecoderOptions::NO_MPFX_0FBC)
        | unless(CpuidFeature::LZCNT, DecoderOptions::NO_MPFX_0FBD)
        | unless(CpuidFeature::WBNOINVD, DecoderOptions::NO_WBNOINVD)
}

/// Whether processors of this model see another instruction in these bytes than iced-x86 does.
pub fn is_peculiar(instruction: &Instruction, bytes: &[u8], model: &CpuModel) -> bool {
    (instruction.code() == Code::Pause && is_exchange(bytes))
        || (is_prefetch_of_register(instruction) && model.vendor == Vendor::Amd)
        || is_quadword_move(instruction, bytes)
}

/// Whether what iced-x86 takes for PAUSE has REX.B: then it is XCHG R8, RAX, and F3 means nothing.
fn is_exchange(bytes: &[u8]) -> bool {
    matches!(bytes, [.., rex, 0x90] if rex & 0xf1 == 0x41)
}

/// Decodes that XCHG: a segment prefix without meaning takes the place of F3.
fn decode_exchange(bytes: &[u8], options: u32) -> Instruction {
    let mut own = [0; MAX_INSTRUCTION_LENGTH];
    for (to, from) in own.iter_mut().zip(bytes) {
        *to = if *from == 0xf3 { 0x3e } else { *from };
    }
    Decoder::with_ip(64, own.get(..bytes.len()).unwrap_or(&own), 0, options).decode()
}

/// Whether these are VPINSRQ or VPEXTRQ outside of 64-bit mode, where they are undefined (SDM Vol. 2B, PINSRB/PINSRD/PINSRQ).
fn is_quadword_move(instruction: &Instruction, bytes: &[u8]) -> bool {
    let is_prefix = |byte: &&u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67);
    // W of the VEX prefix's third byte, which iced-x86 does not look at there.
    instruction.code_size() != CodeSize::Code64
        && matches!(instruction.code(), Code::VEX_Vpinsrd_xmm_xmm_rm32_imm8 | Code::VEX_Vpextrd_rm32_xmm_imm8)
        && bytes.iter().skip_while(is_prefix).nth(2).is_some_and(|byte| byte & 0x80 != 0)
}

/// Whether this is PREFETCH with a register operand, a hint for Intel and undefined for AMD.
fn is_prefetch_of_register(instruction: &Instruction) -> bool {
    matches!(
        instruction.code(),
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    ) && instruction.op0_kind() == OpKind::Register
}
