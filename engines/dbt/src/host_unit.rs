//! Executes single x87, MMX, SSE and AVX instructions of the guest by the host's own units.
//!
//! For every distinct instruction a *stub* is generated: it loads the vector registers that the instruction names,
//! executes the instruction with its memory operand replaced by a buffer and its general register by RAX, and
//! stores what it wrote. All exceptions are masked while it executes; what the guest's masks make of the flags raised is
//! decided afterwards, and nothing is stored if that is an exception.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::mem::{offset_of, transmute};
use std::ptr::NonNull;

use bivisor_x86::env::{HostExecution, HostInstruction};
use bivisor_x86::interp::vector::{is_x87, uses_mmx_register};
use bivisor_x86::registers::{Rflags, gpr};
use bivisor_x86::state::{CpuState, XSAVE_AREA_SIZE};
use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use crate::code_memory::CodeMemory;

/// MXCSR as Rust code expects it.
const HOST_MXCSR: u32 = 0x1f80;
/// MXCSR's exception flags.
const FLAGS: u32 = 0x3f;
/// MXCSR's flags of exceptions that are found before an operation: invalid, denormal operand, division by zero.
const BEFORE_FLAGS: u32 = 0x07;
/// MXCSR's underflow flag.
const UNDERFLOW: u32 = 0x10;
/// MXCSR's exception masks.
const MASKS: u32 = 0x1f80;
/// MXCSR's flush-to-zero control.
const FLUSH_TO_ZERO: u32 = 0x8000;
/// Bit of [`Context::force`] and [`Context::unmasked`] that keeps a stub from storing.
const KEEP: u32 = 1 << 31;
/// Bytes of generated stubs kept before all are forgotten.
const STUB_MEMORY: usize = 1 << 20;
/// Offset of the 16-byte registers in the XSAVE area.
const XMM_OFFSET: u32 = 160;
/// Offset of the upper halves of the 32-byte registers in the XSAVE area.
const YMM_HIGH_OFFSET: u32 = 576;
/// Bytes of the XSAVE area that FXSAVE knows.
const LEGACY_SIZE: usize = 512;
/// Offset of MXCSR in the XSAVE area.
const MXCSR_OFFSET: usize = 24;
/// The parts of the image that belong to the stub, not the guest: x87 opcode and pointers, MXCSR_MASK.
const NOT_GUESTS: [std::ops::Range<usize>; 2] = [6..24, 28..32];

/// What a stub works on besides the XSAVE area. Addressed by the stubs.
#[repr(C, align(64))]
struct Context {
    /// The memory operand.
    memory: [u8; 64],
    /// FXSAVE image that x87 and MMX stubs load from and store to.
    area: [u8; LEGACY_SIZE],
    /// RFLAGS in and out.
    flags: u64,
    /// RAX, RCX, RDX in and out.
    registers: [u64; 3],
    /// MXCSR to execute with.
    mxcsr_in: u32,
    /// MXCSR after.
    mxcsr_out: u32,
    /// Flags of MXCSR that are exceptions for the guest.
    unmasked: u32,
    /// Flags to assume raised.
    force: u32,
    /// MXCSR to return with.
    mxcsr_host: u32,
}

/// RDI: XSAVE area or FXSAVE image, RSI: memory operand, RDX: context.
type StubFunction = unsafe extern "sysv64" fn(*mut u8, *mut u8, *mut Context);

/// A generated stub.
#[derive(Clone, Copy)]
struct Stub {
    code: NonNull<u8>,
    /// Works on the x87 state as a whole.
    is_x87: bool,
    /// Refuses to execute with an x87 exception pending.
    waits: bool,
    /// Writes its general register operand.
    writes_register: bool,
    /// Writes RCX (PCMPESTRI, PCMPISTRI).
    writes_rcx: bool,
    /// Writes flags.
    writes_flags: bool,
}

/// The host's vector units, as one virtual processor uses them.
pub struct HostUnit {
    code: CodeMemory,
    stubs: HashMap<u64, Stub>,
    context: Box<Context>,
    info: InstructionInfoFactory,
    has_avx: bool,
}

// SAFETY: the pointers in `stubs` point into `code`, which is owned by the same value.
unsafe impl Send for HostUnit {}

/// Emits the few instructions that surround the guest's.
#[derive(Default)]
struct Emitter {
    bytes: Vec<u8>,
}

impl Emitter {
    fn emit(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// An instruction with a ModRM byte: opcode, register number (0 to 7), and [base + displacement].
    fn emit_memory(&mut self, opcode: &[u8], register: u8, base: u8, displacement: u32) {
        self.emit(opcode);
        self.emit(&[0x80 | (register & 7) << 3 | base & 7]);
        self.emit(&displacement.to_le_bytes());
    }

    /// An instruction on a field of the context, whose address is in R8. `opcode` follows a REX prefix.
    fn emit_context(&mut self, wide: bool, opcode: &[u8], register: u8, offset: usize) {
        self.emit(&[0x41 | u8::from(wide) << 3]);
        self.emit_memory(opcode, register, 0, offset as u32);
    }

    /// MOVUPS between a 16-byte register and [RDI + displacement].
    fn move_xmm(&mut self, number: u8, store: bool) {
        self.emit(&[0x40 | number >> 3 << 2]);
        self.emit_memory(&[0x0f, 0x10 | u8::from(store)], number, 7, XMM_OFFSET + 16 * u32::from(number));
    }

    /// VMOVUPS and VINSERTF128 or VEXTRACTF128 between a 32-byte register and the area at RDI.
    fn move_ymm(&mut self, number: u8, store: bool) {
        let rex_r = if number < 8 { 0x80 } else { 0 };
        let (low, high) = (16 * u32::from(number) + XMM_OFFSET, 16 * u32::from(number) + YMM_HIGH_OFFSET);
        // VEX.128.0F.WIG 10/11.
        self.emit_memory(&[0xc5, rex_r | 0x78, 0x10 | u8::from(store)], number, 7, low);
        // VEX.256.66.0F3A.W0 18/19 ib; the first source of VINSERTF128 is the register itself.
        let source = if store { 0x78 } else { (!number & 15) << 3 };
        let opcode = [0xc4, rex_r | 0x63, source | 0x05, 0x18 | u8::from(store)];
        self.emit_memory(&opcode, number, 7, high);
        self.emit(&[1]);
    }

    /// Loads RAX, RCX and RDX from the context, or stores them.
    fn move_registers(&mut self, store: bool) {
        let opcode = if store { 0x89 } else { 0x8b };
        for (i, register) in [gpr::RAX, gpr::RCX, gpr::RDX].into_iter().enumerate() {
            self.emit_context(true, &[opcode], register as u8, offset_of!(Context, registers) + 8 * i);
        }
    }

    /// PUSH [flags], POPFQ.
    fn load_flags(&mut self) {
        self.emit_context(false, &[0xff], 6, offset_of!(Context, flags));
        self.emit(&[0x9d]);
    }

    /// PUSHFQ, POP [flags].
    fn store_flags(&mut self) {
        self.emit(&[0x9c]);
        self.emit_context(false, &[0x8f], 0, offset_of!(Context, flags));
    }

    fn load_mxcsr(&mut self, offset: usize) {
        self.emit_context(false, &[0x0f, 0xae], 2, offset);
    }

    fn store_mxcsr(&mut self, offset: usize) {
        self.emit_context(false, &[0x0f, 0xae], 3, offset);
    }
}

/// Whether the instruction must execute with the guest's whole x87 state.
fn needs_x87(instruction: &Instruction) -> bool {
    is_x87(instruction.code()) || instruction.code() == Code::Emms || uses_mmx_register(instruction)
}

/// The general register that the instruction names, if any.
fn general_register(instruction: &Instruction) -> Option<usize> {
    (0..instruction.op_count())
        .filter(|&i| instruction.op_kind(i) == OpKind::Register)
        .map(|i| instruction.op_register(i))
        .find(|register| register.is_gpr())
        .map(|register| register.full_register().number())
}

/// RAX in the size of another general register.
fn accumulator(like: Register) -> Register {
    match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ => Register::AL,
    }
}

/// The instruction with [RSI] for its memory operand and RAX for its general register.
fn normalised(instruction: &Instruction) -> Instruction {
    let mut result = *instruction;
    result.set_code_size(CodeSize::Code64);
    result.set_segment_prefix(Register::None);
    result.set_has_lock_prefix(false);
    result.set_has_rep_prefix(false);
    result.set_has_repne_prefix(false);
    for i in 0..result.op_count() {
        match result.op_kind(i) {
            OpKind::Register if result.op_register(i).is_gpr() => {
                result.set_op_register(i, accumulator(result.op_register(i)));
            }
            OpKind::Memory => {
                result.set_memory_base(Register::RSI);
                result.set_memory_index(Register::None);
                result.set_memory_index_scale(1);
                result.set_memory_displacement64(0);
                result.set_memory_displ_size(0);
            }
            _ => {}
        }
    }
    result
}

/// What tells stubs apart: the code, the registers and the immediate of a normalised instruction.
fn key(instruction: &Instruction) -> u64 {
    let mut key = instruction.code() as u64;
    for i in 0..4 {
        let part = match i < instruction.op_count() {
            true if instruction.op_kind(i) == OpKind::Register => instruction.op_register(i) as u64,
            _ => 0,
        };
        key = key << 9 | part;
    }
    key << 8 | u64::from(instruction.immediate8())
}

impl HostUnit {
    /// The units of this host.
    ///
    /// # Errors
    /// The host gives no memory for the stubs.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            code: CodeMemory::new(STUB_MEMORY, STUB_MEMORY)?,
            stubs: HashMap::new(),
            context: Box::new(Context {
                memory: [0; 64],
                area: [0; LEGACY_SIZE],
                flags: 0,
                registers: [0; 3],
                mxcsr_in: HOST_MXCSR,
                mxcsr_out: HOST_MXCSR,
                unmasked: 0,
                force: 0,
                mxcsr_host: HOST_MXCSR,
            }),
            info: InstructionInfoFactory::new(),
            has_avx: std::arch::is_x86_feature_detected!("avx"),
        })
    }

    /// Executes one instruction; see [`bivisor_x86::env::Env::execute_on_host`].
    pub fn execute(
        &mut self,
        host: &HostInstruction<'_>,
        state: &mut CpuState,
        memory: &mut [u8; 64],
    ) -> HostExecution {
        let instruction = normalised(host.instruction);
        let key = key(&instruction);
        let stub = match self.stubs.get(&key) {
            Some(stub) => *stub,
            None => match self.generate(&instruction) {
                Some(stub) => {
                    self.stubs.insert(key, stub);
                    stub
                }
                None => return HostExecution::Undefined,
            },
        };
        let arithmetic = Rflags::ARITHMETIC.bits();
        let named = general_register(host.instruction).unwrap_or(gpr::RAX);
        let context = &mut *self.context;
        context.memory = *memory;
        context.flags = state.rflags & arithmetic | Rflags::FIXED.bits();
        context.registers = [state.gpr[named], state.gpr[gpr::RCX], state.gpr[gpr::RDX]];
        let result =
            if stub.is_x87 { execute_x87(&stub, state, context) } else { execute_sse(&stub, state, context) };
        if result != HostExecution::Done {
            return result;
        }
        *memory = context.memory;
        if stub.writes_register {
            state.gpr[named] = context.registers[0];
        }
        if stub.writes_rcx {
            state.gpr[gpr::RCX] = context.registers[1];
        }
        if stub.writes_flags {
            state.rflags = state.rflags & !arithmetic | context.flags & arithmetic;
        }
        HostExecution::Done
    }

    /// Generates the stub of a normalised instruction.
    fn generate(&mut self, instruction: &Instruction) -> Option<Stub> {
        let is_vex = instruction.code().encoding() == EncodingKind::VEX;
        if is_vex && !self.has_avx {
            return None;
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(instruction, 0).ok()?;
        let encoded = encoder.take_buffer();
        let is_x87 = needs_x87(instruction);
        let uses_flags = instruction.rflags_read() | instruction.rflags_modified() != 0;
        let writes_register = (0..instruction.op_count()).any(|i| {
            instruction.op_kind(i) == OpKind::Register
                && instruction.op_register(i).is_gpr()
                && matches!(
                    self.info.info(instruction).op_access(i),
                    OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite
                )
        });
        let code = if is_x87 {
            x87_stub(&encoded, uses_flags)
        } else {
            let vectors = self.vector_registers(instruction);
            sse_stub(&encoded, &vectors, is_vex, uses_flags)
        };
        let code = match self.code.append(&code) {
            Some(code) => code,
            None => {
                self.stubs.clear();
                self.code.clear();
                self.code.append(&code)?
            }
        };
        Some(Stub {
            code,
            is_x87,
            waits: !matches!(instruction.mnemonic(), Mnemonic::Fninit | Mnemonic::Fnclex),
            writes_register,
            writes_rcx: matches!(
                instruction.mnemonic(),
                Mnemonic::Pcmpestri
                    | Mnemonic::Pcmpestri64
                    | Mnemonic::Pcmpistri
                    | Mnemonic::Vpcmpestri
                    | Mnemonic::Vpcmpestri64
                    | Mnemonic::Vpcmpistri
            ),
            writes_flags: instruction.rflags_modified() != 0,
        })
    }

    /// Numbers of the vector registers that the instruction uses, and whether it writes them.
    fn vector_registers(&mut self, instruction: &Instruction) -> Vec<(u8, bool)> {
        let mut registers: Vec<(u8, bool)> = Vec::new();
        for used in self.info.info(instruction).used_registers() {
            if !used.register().is_vector_register() {
                continue;
            }
            let number = used.register().number() as u8;
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            match registers.iter_mut().find(|(other, _)| *other == number) {
                Some((_, already)) => *already |= written,
                None => registers.push((number, written)),
            }
        }
        registers
    }
}

/// A stub that loads and stores single vector registers.
fn sse_stub(encoded: &[u8], registers: &[(u8, bool)], is_vex: bool, uses_flags: bool) -> Vec<u8> {
    let mut code = Emitter::default();
    let move_register = if is_vex { Emitter::move_ymm } else { Emitter::move_xmm };
    // MOV R8, RDX
    code.emit(&[0x49, 0x89, 0xd0]);
    code.load_mxcsr(offset_of!(Context, mxcsr_in));
    for (number, _) in registers {
        move_register(&mut code, *number, false);
    }
    if uses_flags {
        code.load_flags();
    }
    code.move_registers(false);
    code.emit(encoded);
    if uses_flags {
        code.store_flags();
    }
    code.move_registers(true);
    code.store_mxcsr(offset_of!(Context, mxcsr_out));
    // MOV ECX, [mxcsr_out]; OR ECX, [force]; TEST [unmasked], ECX; JNZ over the stores
    code.emit_context(false, &[0x8b], 1, offset_of!(Context, mxcsr_out));
    code.emit_context(false, &[0x0b], 1, offset_of!(Context, force));
    code.emit_context(false, &[0x85], 1, offset_of!(Context, unmasked));
    let mut stores = Emitter::default();
    for (number, _) in registers.iter().filter(|(_, written)| *written) {
        move_register(&mut stores, *number, true);
    }
    code.emit(&[0x0f, 0x85]);
    code.emit(&(stores.bytes.len() as u32).to_le_bytes());
    code.emit(&stores.bytes);
    code.load_mxcsr(offset_of!(Context, mxcsr_host));
    if is_vex {
        // VZEROUPPER
        code.emit(&[0xc5, 0xf8, 0x77]);
    }
    code.emit(&[0xc3]);
    code.bytes
}

/// A stub that loads and stores the x87 state as a whole, and with it the SSE registers.
fn x87_stub(encoded: &[u8], uses_flags: bool) -> Vec<u8> {
    let mut code = Emitter::default();
    // MOV R8, RDX; FXRSTOR64 [RDI]
    code.emit(&[0x49, 0x89, 0xd0, 0x48, 0x0f, 0xae, 0x0f]);
    code.load_mxcsr(offset_of!(Context, mxcsr_in));
    if uses_flags {
        code.load_flags();
    }
    code.move_registers(false);
    code.emit(encoded);
    if uses_flags {
        code.store_flags();
    }
    code.move_registers(true);
    code.store_mxcsr(offset_of!(Context, mxcsr_out));
    // FXSAVE64 [RDI]; FNINIT
    code.emit(&[0x48, 0x0f, 0xae, 0x07, 0xdb, 0xe3]);
    code.load_mxcsr(offset_of!(Context, mxcsr_host));
    code.emit(&[0xc3]);
    code.bytes
}

/// Calls a stub with its area: the guest's, or for `None` the image in the context.
fn call(stub: &Stub, area: Option<&mut [u8; XSAVE_AREA_SIZE]>, context: &mut Context) {
    let context: *mut Context = context;
    let area = match area {
        Some(area) => area.as_mut_ptr(),
        // SAFETY: `context` points to a live value.
        None => unsafe { (&raw mut (*context).area).cast() },
    };
    // SAFETY: `stub.code` was generated by `HostUnit::generate` with this signature and lies in the executable view
    // until the stubs are cleared, which forgets it.
    let function: StubFunction = unsafe { transmute(stub.code) };
    // SAFETY: the stub accesses the area (an XSAVE area or a 512-byte image) and the context, which are live and
    // not otherwise used here, changes caller-saved registers only, and restores MXCSR and the x87 state that
    // Rust code expects.
    unsafe { function(area, (&raw mut (*context).memory).cast(), context) }
}

fn mxcsr(state: &CpuState) -> u32 {
    let bytes = &state.xsave.bytes;
    u32::from_le_bytes([
        bytes[MXCSR_OFFSET],
        bytes[MXCSR_OFFSET + 1],
        bytes[MXCSR_OFFSET + 2],
        bytes[MXCSR_OFFSET + 3],
    ])
}

/// Sets up MXCSR for the stub.
fn prepare(context: &mut Context, guest: u32) {
    let unmasked = !guest >> 7 & FLAGS;
    context.unmasked = unmasked | KEEP;
    context.force = 0;
    context.mxcsr_in = guest & !FLAGS | MASKS;
    if unmasked & UNDERFLOW != 0 {
        // An unmasked underflow is any tiny result, a masked one only if it is inexact too, unless flushed to
        // zero (SDM Vol. 1, section 4.9.1.5). Without tiny results flushing changes nothing.
        context.mxcsr_in |= FLUSH_TO_ZERO;
    }
}

/// The flags that the guest sees, given those raised with all exceptions masked. With an unmasked overflow or
/// underflow the precision flag may differ from the processor's own, which would not round to the limits of the format.
fn reported(raised: u32, unmasked: u32) -> u32 {
    if raised & unmasked & BEFORE_FLAGS != 0 { raised & BEFORE_FLAGS } else { raised }
}

fn execute_sse(stub: &Stub, state: &mut CpuState, context: &mut Context) -> HostExecution {
    let guest = mxcsr(state);
    prepare(context, guest);
    call(stub, Some(&mut state.xsave.bytes), context);
    let mut raised = context.mxcsr_out & FLAGS;
    let unmasked = !guest >> 7 & FLAGS;
    if raised & unmasked & UNDERFLOW != 0 && guest & FLUSH_TO_ZERO == 0 {
        // Once more without flushing, for the other flags.
        context.mxcsr_in &= !FLUSH_TO_ZERO;
        context.force = KEEP;
        call(stub, Some(&mut state.xsave.bytes), context);
        raised = context.mxcsr_out & FLAGS | UNDERFLOW;
    }
    finish_mxcsr(state, guest, raised)
}

/// Merges the flags raised into the guest's MXCSR, and tells whether they are an exception.
fn finish_mxcsr(state: &mut CpuState, guest: u32, raised: u32) -> HostExecution {
    let unmasked = !guest >> 7 & FLAGS;
    let merged = guest | reported(raised, unmasked);
    state.xsave.bytes[MXCSR_OFFSET..MXCSR_OFFSET + 4].copy_from_slice(&merged.to_le_bytes());
    if raised & unmasked != 0 { HostExecution::SimdException } else { HostExecution::Done }
}

fn execute_x87(stub: &Stub, state: &mut CpuState, context: &mut Context) -> HostExecution {
    let word = |at: usize| u16::from_le_bytes([state.xsave.bytes[at], state.xsave.bytes[at + 1]]);
    if stub.waits && word(2) & !word(0) & 0x3f != 0 {
        return HostExecution::X87Exception;
    }
    let guest = mxcsr(state);
    prepare(context, guest);
    context.area.copy_from_slice(&state.xsave.bytes[..LEGACY_SIZE]);
    context.area[MXCSR_OFFSET..MXCSR_OFFSET + 4].copy_from_slice(&HOST_MXCSR.to_le_bytes());
    call(stub, None, context);
    let raised = context.mxcsr_out & FLAGS;
    let result = finish_mxcsr(state, guest, raised);
    if result == HostExecution::Done {
        let merged = mxcsr(state);
        for range in NOT_GUESTS {
            context.area[range.clone()].copy_from_slice(&state.xsave.bytes[range]);
        }
        context.area[MXCSR_OFFSET..MXCSR_OFFSET + 4].copy_from_slice(&merged.to_le_bytes());
        state.xsave.bytes[..LEGACY_SIZE].copy_from_slice(&context.area);
    }
    result
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    /// Executes one instruction.
    fn run(unit: &mut HostUnit, state: &mut CpuState, bytes: &[u8], memory: &mut [u8; 64]) -> HostExecution {
        let instruction = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid() && instruction.len() == bytes.len());
        unit.execute(&HostInstruction { instruction: &instruction, bytes }, state, memory)
    }

    fn set_xmm(state: &mut CpuState, number: usize, value: [f32; 4]) {
        for (i, lane) in value.iter().enumerate() {
            let at = XMM_OFFSET as usize + 16 * number + 4 * i;
            state.xsave.bytes[at..at + 4].copy_from_slice(&lane.to_le_bytes());
        }
    }

    fn xmm(state: &CpuState, number: usize) -> [f32; 4] {
        std::array::from_fn(|i| {
            let at = XMM_OFFSET as usize + 16 * number + 4 * i;
            f32::from_le_bytes(state.xsave.bytes[at..at + 4].try_into().unwrap())
        })
    }

    fn high_half(state: &mut CpuState, number: usize) -> &mut [u8] {
        let at = YMM_HIGH_OFFSET as usize + 16 * number;
        &mut state.xsave.bytes[at..at + 16]
    }

    #[test]
    fn adds_packed_floats_and_keeps_the_upper_half() {
        let (mut unit, mut state, mut memory) = (HostUnit::new().unwrap(), CpuState::default(), [0; 64]);
        set_xmm(&mut state, 9, [1.0, 2.0, 3.0, 4.0]);
        high_half(&mut state, 9).fill(7);
        for (lane, value) in memory.chunks_exact_mut(4).zip([10.0f32, 20.0, 30.0, 40.0]) {
            lane.copy_from_slice(&value.to_le_bytes());
        }
        // ADDPS XMM9, [R12 + 100h]
        let bytes = [0x45, 0x0f, 0x58, 0x8c, 0x24, 0, 1, 0, 0];
        assert_eq!(run(&mut unit, &mut state, &bytes, &mut memory), HostExecution::Done);
        assert_eq!(xmm(&state, 9), [11.0, 22.0, 33.0, 44.0]);
        assert_eq!(high_half(&mut state, 9), [7; 16]);
        // VADDPS XMM9, XMM9, XMM9
        assert_eq!(
            run(&mut unit, &mut state, &[0xc4, 0x41, 0x30, 0x58, 0xc9], &mut memory),
            HostExecution::Done
        );
        assert_eq!(xmm(&state, 9), [22.0, 44.0, 66.0, 88.0]);
        assert_eq!(high_half(&mut state, 9), [0; 16], "VEX clears it");
    }

    #[test]
    fn converts_from_and_to_any_general_register() {
        let (mut unit, mut state, mut memory) = (HostUnit::new().unwrap(), CpuState::default(), [0; 64]);
        state.gpr[gpr::RSP] = 0x1_0000_0005;
        // CVTSI2SS XMM0, ESP; CVTTSS2SI RDI, XMM0
        assert_eq!(run(&mut unit, &mut state, &[0xf3, 0x0f, 0x2a, 0xc4], &mut memory), HostExecution::Done);
        assert_eq!(xmm(&state, 0)[0], 5.0);
        assert_eq!(
            run(&mut unit, &mut state, &[0xf3, 0x48, 0x0f, 0x2c, 0xf8], &mut memory),
            HostExecution::Done
        );
        assert_eq!(state.gpr[gpr::RDI], 5);
        assert_eq!(state.gpr[gpr::RSP], 0x1_0000_0005);
    }

    #[test]
    fn an_unmasked_exception_changes_only_mxcsr() {
        let (mut unit, mut state, mut memory) = (HostUnit::new().unwrap(), CpuState::default(), [0; 64]);
        set_xmm(&mut state, 0, [1.0, 1.0, 1.0, 1.0]);
        set_xmm(&mut state, 1, [0.0, 3.0, 1.0, 1.0]);
        let unmask_zero_divide: u32 = 0x1f80 & !0x200;
        state.xsave.bytes[24..28].copy_from_slice(&unmask_zero_divide.to_le_bytes());
        let before = state.clone();
        // DIVPS XMM0, XMM1: division by zero in one lane, inexact in another
        let divide = [0x0f, 0x5e, 0xc1];
        assert_eq!(run(&mut unit, &mut state, &divide, &mut memory), HostExecution::SimdException);
        assert_eq!(mxcsr(&state), unmask_zero_divide | 4, "the inexact lane is not reported");
        state.xsave.bytes[24..28].copy_from_slice(&unmask_zero_divide.to_le_bytes());
        assert_eq!(state, before);
        state.xsave.bytes[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        assert_eq!(run(&mut unit, &mut state, &divide, &mut memory), HostExecution::Done);
        assert_eq!(mxcsr(&state), 0x1f80 | 0x24);
    }

    #[test]
    fn x87_leaves_the_host_clean_and_never_traps() {
        let (mut unit, mut state, mut memory) = (HostUnit::new().unwrap(), CpuState::default(), [0; 64]);
        // FLD1; FLDZ; with division by zero unmasked FDIVP
        for bytes in [[0xd9, 0xe8], [0xd9, 0xee]] {
            assert_eq!(run(&mut unit, &mut state, &bytes, &mut memory), HostExecution::Done);
        }
        state.xsave.bytes[0] = 0x7b;
        assert_eq!(run(&mut unit, &mut state, &[0xde, 0xf9], &mut memory), HostExecution::Done);
        assert_eq!(state.xsave.bytes[2] & 0x84, 0x84, "ZE and the summary");
        assert_eq!(run(&mut unit, &mut state, &[0xd9, 0xe8], &mut memory), HostExecution::X87Exception);
        assert_eq!(run(&mut unit, &mut state, &[0xdb, 0xe2], &mut memory), HostExecution::Done);
        assert_eq!(state.xsave.bytes[2] & 0x84, 0, "cleared by FNCLEX");
        let mut host_control = 0u16;
        // SAFETY: FNSTCW stores two bytes to the variable.
        unsafe { std::arch::asm!("fnstcw [{}]", in(reg) &raw mut host_control) };
        assert_eq!(host_control, 0x37f);
    }

    #[test]
    fn flags_and_implicit_registers() {
        let (mut unit, mut state, mut memory) = (HostUnit::new().unwrap(), CpuState::default(), [0; 64]);
        state.gpr[gpr::RAX] = 3;
        state.gpr[gpr::RDX] = 3;
        state.rflags |= 0x200;
        // PCMPESTRI XMM0, [memory], 0: equal any, of two strings of zeros
        let bytes = [0x66, 0x0f, 0x3a, 0x61, 0x06, 0x00];
        assert_eq!(run(&mut unit, &mut state, &bytes, &mut memory), HostExecution::Done);
        assert_eq!(state.gpr[gpr::RCX], 0);
        assert_eq!(state.rflags, 0x200 | 2 | 1 | 0x40 | 0x80 | 0x800);
    }
}
