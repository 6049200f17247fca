//! x87, MMX, SSE and AVX instructions: the checks before them and their memory operands. What they compute is left
//! to the host's own units ([`Env::execute_on_host`]); what moves state or addresses several memory elements is in
//! `vector_memory.rs` and `fpu_state.rs`.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpCodeTableKind, OpKind};

use crate::cpu::{Access, Cpu};
use crate::cpuid::Vendor;
use crate::env::{Env, HostExecution, HostInstruction};
use crate::exception::Exception;
use crate::interp::op::Op;
use crate::registers::{Cr0, Cr4};
use crate::state::{Mode, SegReg, XCR0_AVX, XCR0_SSE};

/// Offsets in the XSAVE area (SDM Vol. 1, section 10.5.1, table 10-2).
pub mod area {
    /// x87 control word.
    pub const FCW: usize = 0;
    /// x87 status word.
    pub const FSW: usize = 2;
    /// x87 tags, one bit per physical register in use.
    pub const FTW: usize = 4;
    /// x87 opcode of the last instruction (11 bits).
    pub const FOP: usize = 6;
    /// x87 instruction pointer, 64 bits.
    pub const FIP: usize = 8;
    /// x87 operand pointer, 64 bits.
    pub const FDP: usize = 16;
    /// MXCSR.
    pub const MXCSR: usize = 24;
    /// XMM registers, 16 bytes each.
    pub const XMM: usize = 160;
    /// Upper halves of the YMM registers, 16 bytes each, in the standard format and, being the only further component, in the
    /// compacted one.
    pub const YMM_HIGH: usize = 576;
}

/// The unit that an instruction belongs to: selects the checks before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    X87,
    Mmx,
    Sse,
    Avx,
}

/// Whether the instruction is encoded in the x87 opcodes D8 to DF.
pub fn is_x87(code: Code) -> bool {
    let info = code.op_code();
    let first_byte = if info.op_code() > 0xff { info.op_code() >> 8 } else { info.op_code() };
    info.encoding() == EncodingKind::Legacy
        && info.table() == OpCodeTableKind::Normal
        && (0xd8..=0xdf).contains(&first_byte)
}

/// Whether any operand is an MMX register.
pub fn uses_mmx_register(instruction: &Instruction) -> bool {
    (0..instruction.op_count())
        .any(|i| instruction.op_kind(i) == OpKind::Register && instruction.op_register(i).is_mm())
}

/// The unit that executes this instruction, if it is one of these.
fn unit(instruction: &Instruction) -> Option<Unit> {
    use CpuidFeature as F;
    let code = instruction.code();
    match code.encoding() {
        EncodingKind::VEX => {
            let general = code.cpuid_features().iter().any(|set| matches!(set, F::BMI1 | F::BMI2));
            (!general).then_some(Unit::Avx)
        }
        EncodingKind::Legacy if is_x87(code) || code == Code::Wait => Some(Unit::X87),
        EncodingKind::Legacy => {
            let vector = code.cpuid_features().iter().any(|feature| {
                matches!(
                    feature,
                    F::MMX
                        | F::SSE
                        | F::SSE2
                        | F::SSE3
                        | F::SSSE3
                        | F::SSE4_1
                        | F::SSE4_2
                        | F::SSE4A
                        | F::AES
                        | F::PCLMULQDQ
                        | F::SHA
                )
            });
            let other = matches!(
                instruction.mnemonic(),
                Mnemonic::Crc32
                    | Mnemonic::Pause
                    | Mnemonic::Sfence
                    | Mnemonic::Lfence
                    | Mnemonic::Mfence
                    | Mnemonic::Clflush
                    | Mnemonic::Prefetchnta
                    | Mnemonic::Prefetcht0
                    | Mnemonic::Prefetcht1
                    | Mnemonic::Prefetcht2
                    | Mnemonic::Movnti
                    | Mnemonic::Monitor
                    | Mnemonic::Mwait
            );
            if !vector || other {
                None
            } else if uses_mmx_register(instruction) || code == Code::Emms {
                Some(Unit::Mmx)
            } else {
                Some(Unit::Sse)
            }
        }
        _ => None,
    }
}

/// x87 instructions that do not look at pending exceptions before they execute (SDM Vol. 1, section 8.3.11).
fn is_non_waiting(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Fninit
            | Mnemonic::Fnclex
            | Mnemonic::Fnstcw
            | Mnemonic::Fnstsw
            | Mnemonic::Fnstenv
            | Mnemonic::Fnsave
            | Mnemonic::Fneni
            | Mnemonic::Fndisi
            | Mnemonic::Fnsetpm
    )
}

/// x87 instructions that leave the last instruction and operand pointers alone (SDM Vol. 1, section 8.1.8).
fn keeps_fpu_pointers(mnemonic: Mnemonic) -> bool {
    is_non_waiting(mnemonic)
        || matches!(mnemonic, Mnemonic::Fldcw | Mnemonic::Fldenv | Mnemonic::Frstor | Mnemonic::Wait)
}

/// x87 instructions that store to their memory operand.
fn is_x87_store(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Fst
            | Mnemonic::Fstp
            | Mnemonic::Fist
            | Mnemonic::Fistp
            | Mnemonic::Fisttp
            | Mnemonic::Fbstp
            | Mnemonic::Fnstcw
            | Mnemonic::Fnstsw
    )
}

/// Legacy SSE instructions whose 16-byte memory operand need not be aligned (SDM Vol. 1, table 14-22).
fn allows_unaligned(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpestrm64
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    )
}

/// VEX-encoded instructions whose memory operand must be aligned to its size.
fn requires_alignment(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Vmovaps
            | Mnemonic::Vmovapd
            | Mnemonic::Vmovdqa
            | Mnemonic::Vmovntps
            | Mnemonic::Vmovntpd
            | Mnemonic::Vmovntdq
            | Mnemonic::Vmovntdqa
    )
}

/// The memory operand of an instruction that the host executes.
struct MemoryOperand {
    segment: SegReg,
    offset: u64,
    size: usize,
    is_store: bool,
    is_aligned: bool,
}

impl Cpu {
    /// Two bytes of the x87 and SSE state.
    pub(super) fn fpu_word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.state.xsave.bytes[at], self.state.xsave.bytes[at + 1]])
    }

    /// MXCSR.
    pub(super) fn mxcsr(&self) -> u32 {
        u32::from(self.fpu_word(area::MXCSR)) | u32::from(self.fpu_word(area::MXCSR + 2)) << 16
    }

    /// Sets bytes of the x87, SSE and AVX state.
    pub(super) fn set_fpu_bytes(&mut self, at: usize, bytes: &[u8]) {
        self.state.xsave.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Whether an unmasked x87 exception waits to be reported: what FSW.ES says.
    pub(super) fn x87_exception_pending(&self) -> bool {
        self.fpu_word(area::FSW) & !self.fpu_word(area::FCW) & 0x3f != 0
    }

    /// #MF where an unmasked x87 exception is pending.
    fn check_x87_pending(&self) -> Result<(), Exception> {
        if self.x87_exception_pending() { Err(Exception::MF) } else { Ok(()) }
    }

    /// What must hold before an instruction of this unit executes (SDM Vol. 3A, sections 2.5 and 13.1; Vol. 2A,
    /// section 2.4).
    fn check_unit(&self, unit: Unit, mnemonic: Mnemonic) -> Result<(), Exception> {
        let state = &self.state;
        let task_switched = state.cr0_has(Cr0::TS);
        match unit {
            Unit::X87 if mnemonic == Mnemonic::Wait => {
                if task_switched && state.cr0_has(Cr0::MP) {
                    return Err(Exception::NM);
                }
                return self.check_x87_pending();
            }
            Unit::X87 => {
                if task_switched || state.cr0_has(Cr0::EM) {
                    return Err(Exception::NM);
                }
                if !is_non_waiting(mnemonic) {
                    return self.check_x87_pending();
                }
            }
            Unit::Mmx | Unit::Sse => {
                if state.cr0_has(Cr0::EM) || (unit == Unit::Sse && !state.cr4_has(Cr4::OSFXSR)) {
                    return Err(Exception::UD);
                }
                if task_switched {
                    return Err(Exception::NM);
                }
                if unit == Unit::Mmx {
                    return self.check_x87_pending();
                }
            }
            Unit::Avx => {
                let enabled = XCR0_SSE | XCR0_AVX;
                if !state.cr4_has(Cr4::OSXSAVE)
                    || state.xcr0 & enabled != enabled
                    || matches!(state.mode(), Mode::Real | Mode::Virtual8086)
                {
                    return Err(Exception::UD);
                }
                if task_switched {
                    return Err(Exception::NM);
                }
            }
        }
        Ok(())
    }

    /// Executes an x87, MMX, SSE or AVX instruction. False if it is none of these.
    pub fn exec_vector_op<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let instruction = &op.instruction;
        let Some(unit) = unit(instruction) else { return self.exec_fpu_state_op(env, op) };
        let mnemonic = instruction.mnemonic();
        self.check_unit(unit, mnemonic)?;
        match mnemonic {
            // The last three mean something to the 8087 and 80287 only.
            Mnemonic::Wait | Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => {}
            Mnemonic::Fninit => self.init_x87_control(),
            Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => self.load_mxcsr(env, op)?,
            Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => {
                let value = self.mxcsr();
                self.write_operand(env, op, 0, value.into())?;
            }
            Mnemonic::Fnstcw => {
                let value = self.fpu_word(area::FCW);
                self.write_operand(env, op, 0, value.into())?;
            }
            Mnemonic::Fnstsw => {
                let value = self.fpu_word(area::FSW);
                self.write_operand(env, op, 0, value.into())?;
            }
            // In 64-bit mode it is all sixteen registers.
            Mnemonic::Vzeroupper | Mnemonic::Vzeroall if !self.in_64bit_mode() => {
                self.zero_eight_registers(mnemonic == Mnemonic::Vzeroall);
            }
            _ if unit == Unit::X87 && self.exec_environment_op(env, op)? => {}
            _ if self.exec_vector_memory_op(env, op)? => {}
            _ => self.execute_on_host(env, op, unit)?,
        }
        Ok(true)
    }

    /// VZEROUPPER outside of 64-bit mode, or VZEROALL.
    fn zero_eight_registers(&mut self, with_lower: bool) {
        const SIZE: usize = 8 * 16;
        self.set_fpu_bytes(area::YMM_HIGH, &[0; SIZE]);
        if with_lower {
            self.set_fpu_bytes(area::XMM, &[0; SIZE]);
        }
    }

    /// LDMXCSR: reserved bits raise #GP (SDM Vol. 1, section 10.2.3).
    fn load_mxcsr<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let value = self.read_operand(env, op, 0)? as u32;
        if value & !crate::state::MXCSR_MASK != 0 {
            return Err(Exception::GP0);
        }
        self.set_fpu_bytes(area::MXCSR, &value.to_le_bytes());
        Ok(())
    }

    /// Whether a 16-byte memory operand of legacy SSE encoding need not be aligned.
    fn allows_unaligned(&self, instruction: &Instruction) -> bool {
        // AMD processors do not ask it of the SHA instructions.
        let sha = instruction.cpuid_features().contains(&CpuidFeature::SHA);
        allows_unaligned(instruction.mnemonic()) || sha && self.model.vendor == Vendor::Amd
    }

    /// #GP(0) if the operand must be aligned and is not, #AC(0) if alignment is checked (SDM Vol. 3A, table 6-7).
    fn check_vector_alignment(&self, memory: &MemoryOperand) -> Result<(), Exception> {
        let linear = self.address_of(memory.segment, memory.offset);
        if memory.is_aligned && linear & (memory.size as u64).wrapping_sub(1) != 0 {
            return Err(Exception::GP0);
        }
        let access = if memory.is_store { Access::Write } else { Access::Read };
        self.checked_address(memory.segment, memory.offset, memory.size, access)?;
        // 80-bit operands must be aligned to 8 bytes; Zen is content with 16 for those of 32.
        self.check_alignment(linear, if memory.size == 10 { 8 } else { memory.size.clamp(1, 16) })
    }

    /// The instruction's memory operand.
    fn host_memory_operand(&self, op: &Op, unit: Unit) -> Option<MemoryOperand> {
        let instruction = &op.instruction;
        let operand = (0..instruction.op_count()).find(|&i| instruction.op_kind(i) == OpKind::Memory)?;
        let mnemonic = instruction.mnemonic();
        let (segment, offset) = self.effective_address(op);
        let size = instruction.memory_size().size().min(64);
        let is_aligned = match unit {
            Unit::Sse | Unit::Mmx => size == 16 && !self.allows_unaligned(instruction),
            Unit::Avx => requires_alignment(mnemonic),
            Unit::X87 => false,
        };
        let is_store = if unit == Unit::X87 { is_x87_store(mnemonic) } else { operand == 0 };
        Some(MemoryOperand { segment, offset, size, is_store, is_aligned })
    }

    /// Has the host execute the instruction, its memory operand read before or written after. Nothing changes
    /// if that faults.
    fn execute_on_host<E: Env>(&mut self, env: &mut E, op: &Op, unit: Unit) -> Result<(), Exception> {
        let instruction = &op.instruction;
        let operand = self.host_memory_operand(op, unit);
        if let Some(memory) = &operand {
            self.check_vector_alignment(memory)?;
        }
        let mut buffer = [0; 64];
        if let Some(memory) = operand.as_ref().filter(|memory| !memory.is_store) {
            self.read_vector(env, memory.segment, memory.offset, &mut buffer[..memory.size])?;
        }
        let store = operand.as_ref().filter(|memory| memory.is_store);
        if let Some(memory) = store {
            self.check_write(env, memory.segment, memory.offset, memory.size)?;
        }
        let host = HostInstruction { instruction, bytes: &op.bytes[..instruction.len()] };
        match env.execute_on_host(&host, &mut self.state, &mut buffer) {
            HostExecution::Done => {}
            HostExecution::SimdException if unit == Unit::Mmx => {
                self.enter_mmx();
                return Err(self.simd_exception());
            }
            HostExecution::SimdException => return Err(self.simd_exception()),
            HostExecution::X87Exception => return Err(Exception::MF),
            HostExecution::Undefined => return Err(Exception::UD),
        }
        // An unmasked x87 exception other than precision keeps the operand as it was (SDM Vol. 1, 8.5).
        let refused = unit == Unit::X87 && self.fpu_word(area::FSW) & !self.fpu_word(area::FCW) & 0x1f != 0;
        if let Some(memory) = store
            && !refused
        {
            self.write_vector(env, memory.segment, memory.offset, &buffer[..memory.size])?;
        }
        if unit == Unit::X87 && !keeps_fpu_pointers(instruction.mnemonic()) {
            self.set_fpu_pointers(op, operand.map(|memory| memory.offset));
        }
        Ok(())
    }

    /// #XM, or #UD where the system has not asked for it (SDM Vol. 3A, section 6.15, interrupt 19).
    fn simd_exception(&self) -> Exception {
        if self.state.cr4_has(Cr4::OSXMMEXCPT) { Exception::XM } else { Exception::UD }
    }

    /// Records the last x87 instruction: its address, its operand's and its opcode (SDM Vol. 1, section 8.1.8).
    fn set_fpu_pointers(&mut self, op: &Op, operand: Option<u64>) {
        let rip = self.state.rip;
        self.set_fpu_bytes(area::FIP, &rip.to_le_bytes());
        if let Some(offset) = operand {
            self.set_fpu_bytes(area::FDP, &offset.to_le_bytes());
        }
        let bytes = &op.bytes[..op.instruction.len().min(op.bytes.len())];
        if let Some(at) = bytes.iter().position(|byte| (0xd8..=0xdf).contains(byte))
            && let Some(modrm) = bytes.get(at + 1)
        {
            let opcode = u16::from(bytes[at] & 7) << 8 | u16::from(*modrm);
            self.set_fpu_bytes(area::FOP, &opcode.to_le_bytes());
        }
    }

    /// Reads a vector operand: as one access where a general register could hold it.
    pub(super) fn read_vector<E: Env>(
        &mut self,
        env: &mut E,
        segment: SegReg,
        offset: u64,
        to: &mut [u8],
    ) -> Result<(), Exception> {
        if let size @ (1 | 2 | 4 | 8) = to.len() {
            let value = self.read(env, segment, offset, size)?;
            to.copy_from_slice(&value.to_le_bytes()[..size]);
            return Ok(());
        }
        self.read_bytes(env, segment, offset, to)
    }

    /// Writes a vector operand likewise.
    pub(super) fn write_vector<E: Env>(
        &mut self,
        env: &mut E,
        segment: SegReg,
        offset: u64,
        from: &[u8],
    ) -> Result<(), Exception> {
        if let size @ (1 | 2 | 4 | 8) = from.len() {
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(from);
            return self.write(env, segment, offset, size, u64::from_le_bytes(bytes));
        }
        self.write_bytes(env, segment, offset, from)
    }
}
