//! Instructions that move whole x87, SSE and AVX states: FXSAVE, XSAVE, FNSAVE, FNSTENV and what restores from them.

use iced_x86::{Code, Mnemonic};

use crate::cpu::{Access, Cpu};
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::Op;
use crate::interp::operand::{sign_extend, truncate};
use crate::interp::vector::area::{self, XMM, YMM_HIGH};
use crate::registers::{Cr0, Cr4, gpr};
use crate::state::{MXCSR_MASK, MXCSR_RESET, Mode, SegReg, XCR0_AVX, XCR0_SSE, XCR0_X87};

/// Bytes of the legacy region of an XSAVE area, which FXSAVE writes alone.
const LEGACY_SIZE: usize = 512;
/// Bytes of the legacy region and the header.
const HEADER_END: usize = 576;
/// Offset of ST(0) in the legacy region; the others follow every 16 bytes.
const ST: usize = 32;
/// Offset behind XMM15.
const XMM_END: usize = 416;
/// Bytes of AVX state.
const YMM_SIZE: usize = 256;
/// XCOMP_BV bit of the compacted format.
const COMPACTED: u64 = 1 << 63;
/// FCW after FNINIT.
const FCW_INIT: u16 = 0x37f;

/// Which of the XSAVE instructions: they differ in what is written when a component is in its initial state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Save {
    Standard,
    Optimised,
    Compacted,
}

/// The environment that FNSTENV stores (SDM Vol. 1, figures 8-9 to 8-12).
#[derive(Clone, Copy)]
struct Environment {
    control: u16,
    status: u16,
    tags: u16,
    opcode: u16,
    instruction: u64,
    operand: u64,
}

/// How an environment lies in memory.
#[derive(Clone, Copy)]
struct EnvironmentFormat {
    /// 28 bytes instead of 14.
    is_wide: bool,
    /// Real-address and virtual-8086 mode: linear addresses, not selectors and offsets.
    is_real: bool,
}

impl EnvironmentFormat {
    fn size(self) -> usize {
        if self.is_wide { 28 } else { 14 }
    }

    /// The seven words or double words.
    fn fields(self, environment: &Environment) -> [u32; 7] {
        let Environment { control, status, tags, opcode, instruction, operand } = *environment;
        let (instruction, operand) = (instruction as u32, operand as u32);
        let reserved = 0xffff_0000;
        let words = [control, status, tags].map(|word| u32::from(word) | reserved);
        let opcode = u32::from(opcode & 0x7ff);
        let pointers = match (self.is_real, self.is_wide) {
            (false, true) => [instruction, opcode << 16, operand, reserved],
            (false, false) => [instruction, 0, operand, 0],
            (true, _) => [
                instruction & 0xffff | reserved,
                instruction >> 16 << 12 | opcode,
                operand & 0xffff | reserved,
                operand >> 16 << 12,
            ],
        };
        [words[0], words[1], words[2], pointers[0], pointers[1], pointers[2], pointers[3]]
    }

    /// As it is stored; the first `size()` bytes count.
    fn encode(self, environment: &Environment) -> [u8; 28] {
        let mut bytes = [0; 28];
        let width = self.size() / 7;
        for (place, field) in bytes.chunks_exact_mut(width).zip(self.fields(environment)) {
            place.copy_from_slice(&field.to_le_bytes()[..width]);
        }
        bytes
    }

    fn decode(self, bytes: &[u8]) -> Environment {
        let width = self.size() / 7;
        let field = |number: usize| {
            let mut field = [0; 4];
            field[..width].copy_from_slice(&bytes[number * width..(number + 1) * width]);
            u32::from_le_bytes(field)
        };
        let (opcode, instruction, operand) = match (self.is_real, self.is_wide) {
            (false, true) => (field(4) >> 16, field(3), field(5)),
            (false, false) => (0, field(3), field(5)),
            (true, _) => {
                (field(4), field(3) & 0xffff | field(4) >> 12 << 16, field(5) & 0xffff | field(6) >> 12 << 16)
            }
        };
        Environment {
            control: field(0) as u16,
            status: field(1) as u16,
            tags: field(2) as u16,
            opcode: opcode as u16 & 0x7ff,
            instruction: instruction.into(),
            operand: operand.into(),
        }
    }
}

/// A register's tag (SDM Vol. 1, section 8.1.7): valid, zero or special.
fn tag(register: &[u8]) -> u16 {
    let exponent = u16::from_le_bytes([register[8], register[9]]) & 0x7fff;
    let is_zero = register[..8].iter().all(|&byte| byte == 0);
    match exponent {
        0 if is_zero => 1,
        0 | 0x7fff => 2,
        _ if register[7] & 0x80 == 0 => 2,
        _ => 0,
    }
}

impl Cpu {
    /// Executes FXSAVE, XSAVE, FNSAVE, FNSTENV or one of their counterparts. False if it is none of these.
    pub(super) fn exec_fpu_state_op<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        use Mnemonic as M;
        match op.instruction.mnemonic() {
            M::Fxsave | M::Fxsave64 => self.fxsave(env, op)?,
            M::Fxrstor | M::Fxrstor64 => self.fxrstor(env, op)?,
            M::Xsave | M::Xsave64 => self.xsave(env, op, Save::Standard)?,
            M::Xsaveopt | M::Xsaveopt64 => self.xsave(env, op, Save::Optimised)?,
            M::Xsavec | M::Xsavec64 => self.xsave(env, op, Save::Compacted)?,
            M::Xrstor | M::Xrstor64 => self.xrstor(env, op)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Executes FNSAVE, FRSTOR, FNSTENV or FLDENV, after the checks of x87 instructions. False if it is none of these.
    pub(super) fn exec_environment_op<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Fnstenv => {
                self.store_environment(env, op, false)?;
                // All exceptions are masked then (SDM Vol. 2A, FSTENV).
                let control = self.fpu_word(area::FCW) | 0x3f;
                self.set_fpu_bytes(area::FCW, &control.to_le_bytes());
                self.update_exception_summary();
            }
            Mnemonic::Fnsave => {
                self.store_environment(env, op, true)?;
                self.init_x87_control();
            }
            Mnemonic::Fldenv => self.load_environment(env, op, false)?,
            Mnemonic::Frstor => self.load_environment(env, op, true)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Sets TOP. The state holds the registers from ST(0) on, so that they turn with it.
    fn set_top(&mut self, top: usize) {
        let status = self.fpu_word(area::FSW);
        let turn = top.wrapping_sub(usize::from(status >> 11 & 7)) & 7;
        self.state.xsave.bytes[ST..XMM].rotate_left(16 * turn);
        let status = status & !0x3800 | (top as u16 & 7) << 11;
        self.set_fpu_bytes(area::FSW, &status.to_le_bytes());
    }

    /// What every MMX instruction except EMMS does to the x87 state: TOP is zero and all registers are in use.
    pub(super) fn enter_mmx(&mut self) {
        self.set_top(0);
        self.set_fpu_bytes(area::FTW, &[0xff]);
    }

    /// What FNINIT does: registers keep their contents but are empty.
    pub(super) fn init_x87_control(&mut self) {
        self.set_top(0);
        self.set_fpu_bytes(area::FCW, &[0; area::MXCSR]);
        self.set_fpu_bytes(area::FCW, &FCW_INIT.to_le_bytes());
    }

    /// FSW.ES and FSW.B follow from the exception flags and masks.
    fn update_exception_summary(&mut self) {
        let summary = if self.x87_exception_pending() { 0x8080 } else { 0 };
        let status = self.fpu_word(area::FSW) & !0x8080 | summary;
        self.set_fpu_bytes(area::FSW, &status.to_le_bytes());
    }

    /// Sets the control word, whose reserved bits read as fixed values.
    fn set_control_word(&mut self, value: u16) {
        self.set_fpu_bytes(area::FCW, &(value & 0x1f3f | 0x40).to_le_bytes());
    }

    // ---- environment ----

    fn environment_format(&self, op: &Op) -> EnvironmentFormat {
        let is_wide = matches!(
            op.instruction.code(),
            Code::Fnstenv_m28byte | Code::Fldenv_m28byte | Code::Fnsave_m108byte | Code::Frstor_m108byte
        );
        EnvironmentFormat { is_wide, is_real: matches!(self.state.mode(), Mode::Real | Mode::Virtual8086) }
    }

    /// The full tag word, two bits per physical register.
    fn tag_word(&self) -> u16 {
        let top = usize::from(self.fpu_word(area::FSW) >> 11 & 7);
        let in_use = self.state.xsave.bytes[area::FTW];
        (0..8usize).fold(0, |tags, number| {
            let at = ST + 16 * (number.wrapping_sub(top) & 7);
            let tag = if in_use >> number & 1 == 0 { 3 } else { tag(&self.state.xsave.bytes[at..at + 10]) };
            tags | tag << (2 * number)
        })
    }

    fn store_environment<E: Env>(&mut self, env: &mut E, op: &Op, registers: bool) -> Result<(), Exception> {
        let format = self.environment_format(op);
        let pointer = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.state.xsave.bytes[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let environment = Environment {
            control: self.fpu_word(area::FCW),
            status: self.fpu_word(area::FSW),
            tags: self.tag_word(),
            opcode: self.fpu_word(area::FOP),
            instruction: pointer(area::FIP),
            operand: pointer(area::FDP),
        };
        let mut image = [0; 108];
        image[..28].copy_from_slice(&format.encode(&environment));
        let mut size = format.size();
        if registers {
            for number in 0..8 {
                let at = ST + 16 * number;
                image[size..size + 10].copy_from_slice(&self.state.xsave.bytes[at..at + 10]);
                size += 10;
            }
        }
        let (segment, offset) = self.effective_address(op);
        let linear = self.checked_address(segment, offset, size, Access::Write)?;
        self.check_alignment(linear, format.size() / 7)?;
        self.write_bytes(env, segment, offset, &image[..size])
    }

    fn load_environment<E: Env>(&mut self, env: &mut E, op: &Op, registers: bool) -> Result<(), Exception> {
        let format = self.environment_format(op);
        let size = format.size() + if registers { 80 } else { 0 };
        let mut image = [0; 108];
        let (segment, offset) = self.effective_address(op);
        let linear = self.checked_address(segment, offset, size, Access::Read)?;
        self.check_alignment(linear, format.size() / 7)?;
        self.read_bytes(env, segment, offset, &mut image[..size])?;
        let environment = format.decode(&image);
        self.set_control_word(environment.control);
        self.set_top(usize::from(environment.status >> 11 & 7));
        self.set_fpu_bytes(area::FSW, &environment.status.to_le_bytes());
        let in_use =
            (0..8).fold(0, |bits, i| if environment.tags >> (2 * i) & 3 == 3 { bits } else { bits | 1 << i });
        self.set_fpu_bytes(area::FTW, &[in_use, 0]);
        self.set_fpu_bytes(area::FOP, &environment.opcode.to_le_bytes());
        self.set_fpu_bytes(area::FIP, &environment.instruction.to_le_bytes());
        self.set_fpu_bytes(area::FDP, &environment.operand.to_le_bytes());
        if registers {
            for (number, register) in image[format.size()..size].chunks_exact(10).enumerate() {
                self.set_fpu_bytes(ST + 16 * number, register);
            }
        }
        self.update_exception_summary();
        Ok(())
    }

    // ---- FXSAVE and XSAVE ----

    /// Address of an area, which must be aligned.
    fn area_address(&self, op: &Op, alignment: u64) -> Result<(SegReg, u64), Exception> {
        let (segment, offset) = self.effective_address(op);
        if self.address_of(segment, offset) & (alignment - 1) != 0 {
            return Err(Exception::GP0);
        }
        Ok((segment, offset))
    }

    /// Address of the area of FXSAVE and FXRSTOR. #AC comes before #GP here, but on Zen it asks for four bytes only.
    fn fxsave_address(&self, op: &Op) -> Result<(SegReg, u64), Exception> {
        let (segment, offset) = self.effective_address(op);
        let linear = self.checked_address(segment, offset, 1, Access::Read)?;
        self.check_alignment(linear, 4)?;
        self.area_address(op, 16)
    }

    /// Outside 64-bit mode only eight vector registers are moved.
    fn vector_registers(&self) -> usize {
        if self.in_64bit_mode() { 16 } else { 8 }
    }

    /// x87 state as the operand size of the instruction wants it: 64-bit pointers, or 32-bit ones and selectors.
    fn x87_image(&self, op: &Op) -> [u8; XMM] {
        let mut image = [0; XMM];
        image.copy_from_slice(&self.state.xsave.bytes[..XMM]);
        if !is_wide(op) {
            // FCS and FDS are no longer recorded (CPUID.(7,0):EBX[13]).
            image[area::FIP + 4..area::FDP].fill(0);
            image[area::FDP + 4..area::MXCSR].fill(0);
        }
        image
    }

    /// Loads x87 state from an image.
    fn set_x87(&mut self, op: &Op, image: &[u8]) {
        self.set_fpu_bytes(0, &image[..area::MXCSR]);
        for at in [area::FIP, area::FDP] {
            let mut pointer = [0; 8];
            pointer.copy_from_slice(&image[at..at + 8]);
            let pointer = u64::from_le_bytes(pointer);
            // 64-bit pointers are made canonical.
            let pointer = if is_wide(op) { sign_extend(pointer, 6) } else { truncate(pointer, 4) };
            self.set_fpu_bytes(at, &pointer.to_le_bytes());
        }
        self.set_fpu_bytes(area::FTW + 1, &[0]);
        let opcode = self.fpu_word(area::FOP) & 0x7ff;
        self.set_fpu_bytes(area::FOP, &opcode.to_le_bytes());
        for at in (ST..XMM).step_by(16) {
            self.set_fpu_bytes(at, &image[at..at + 10]);
        }
        self.set_control_word(u16::from_le_bytes([image[area::FCW], image[area::FCW + 1]]));
        self.update_exception_summary();
    }

    fn init_x87(&mut self) {
        self.init_x87_control();
        self.set_fpu_bytes(ST, &[0; XMM - ST]);
    }

    /// CR0.EM and CR0.TS raise #NM.
    fn check_fxsave(&self) -> Result<(), Exception> {
        if self.state.cr0 & (Cr0::EM | Cr0::TS).bits() != 0 { Err(Exception::NM) } else { Ok(()) }
    }

    fn fxsave<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        self.check_fxsave()?;
        let (segment, offset) = self.fxsave_address(op)?;
        let mut image = [0; XMM_END];
        image.copy_from_slice(&self.state.xsave.bytes[..XMM_END]);
        image[..XMM].copy_from_slice(&self.x87_image(op));
        self.check_write(env, segment, offset, LEGACY_SIZE)?;
        let end = XMM + 16 * self.vector_registers();
        self.write_bytes(env, segment, offset, &image[..end])
    }

    fn fxrstor<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        self.check_fxsave()?;
        let (segment, offset) = self.fxsave_address(op)?;
        let mut image = [0; LEGACY_SIZE];
        self.read_bytes(env, segment, offset, &mut image)?;
        let mxcsr = checked_mxcsr(&image)?;
        self.set_x87(op, &image);
        self.set_fpu_bytes(area::MXCSR, &mxcsr.to_le_bytes());
        self.set_fpu_bytes(XMM, &image[XMM..XMM + 16 * self.vector_registers()]);
        Ok(())
    }

    /// #UD without CR4.OSXSAVE, #NM with CR0.TS.
    fn check_xsave(&self) -> Result<(), Exception> {
        if !self.state.cr4_has(Cr4::OSXSAVE) {
            Err(Exception::UD)
        } else if self.state.cr0_has(Cr0::TS) {
            Err(Exception::NM)
        } else {
            Ok(())
        }
    }

    /// The state components that the instruction asks for: EDX:EAX and XCR0.
    fn requested_components(&self) -> u64 {
        let low = self.state.gpr[gpr::RAX] & 0xffff_ffff;
        (self.state.gpr[gpr::RDX] << 32 | low) & self.state.xcr0
    }

    /// XINUSE: the components that are not in their initial state (SDM Vol. 1, section 13.6).
    fn components_in_use(&self) -> u64 {
        let bytes = &self.state.xsave.bytes;
        let any = |from: usize, to: usize| bytes[from..to].iter().any(|&byte| byte != 0);
        let mut in_use = 0;
        if self.fpu_word(area::FCW) != FCW_INIT || any(area::FSW, area::MXCSR) || any(ST, XMM) {
            in_use |= XCR0_X87;
        }
        if any(XMM, XMM_END) {
            in_use |= XCR0_SSE;
        }
        if any(YMM_HIGH, YMM_HIGH + YMM_SIZE) {
            in_use |= XCR0_AVX;
        }
        in_use
    }

    fn xsave<E: Env>(&mut self, env: &mut E, op: &Op, save: Save) -> Result<(), Exception> {
        self.check_xsave()?;
        let (segment, offset) = self.area_address(op, 64)?;
        let requested = self.requested_components();
        let mut in_use = self.components_in_use();
        if save == Save::Compacted && self.mxcsr() != MXCSR_RESET {
            in_use |= XCR0_SSE;
        }
        let written = if save == Save::Standard { requested } else { requested & in_use };
        let size = HEADER_END + if requested & XCR0_AVX != 0 { YMM_SIZE } else { 0 };
        self.check_write(env, segment, offset, size)?;
        let header = offset.wrapping_add(LEGACY_SIZE as u64);
        let old = if save == Save::Compacted { 0 } else { self.read(env, segment, header, 8)? };

        let x87 = self.x87_image(op);
        if written & XCR0_X87 != 0 {
            self.write_bytes(env, segment, offset, &x87[..area::MXCSR])?;
            self.write_bytes(env, segment, offset.wrapping_add(ST as u64), &x87[ST..])?;
        }
        let mxcsr_with =
            if save == Save::Compacted { written & XCR0_SSE } else { requested & (XCR0_SSE | XCR0_AVX) };
        if mxcsr_with != 0 {
            self.write_bytes(env, segment, offset.wrapping_add(area::MXCSR as u64), &x87[area::MXCSR..ST])?;
        }
        let count = self.vector_registers();
        for (component, at) in [(XCR0_SSE, XMM), (XCR0_AVX, YMM_HIGH)] {
            if written & component != 0 {
                let state = self.state.xsave;
                let bytes = &state.bytes[at..at + 16 * count];
                self.write_bytes(env, segment, offset.wrapping_add(at as u64), bytes)?;
            }
        }
        self.write(env, segment, header, 8, old & !requested | requested & in_use)?;
        if save == Save::Compacted {
            self.write(env, segment, header.wrapping_add(8), 8, COMPACTED | requested)?;
        }
        Ok(())
    }

    fn xrstor<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        self.check_xsave()?;
        let (segment, offset) = self.area_address(op, 64)?;
        let requested = self.requested_components();
        let mut image = [0; YMM_HIGH + YMM_SIZE];
        self.read_bytes(env, segment, offset, &mut image[..HEADER_END])?;
        let (present, is_compacted) = checked_header(&image[LEGACY_SIZE..HEADER_END], self.state.xcr0)?;
        if requested & present & XCR0_AVX != 0 {
            let at = offset.wrapping_add(YMM_HIGH as u64);
            self.read_bytes(env, segment, at, &mut image[YMM_HIGH..])?;
        }
        let mxcsr = if is_compacted {
            match (requested & XCR0_SSE != 0, present & XCR0_SSE != 0) {
                (true, true) => Some(checked_mxcsr(&image)?),
                (true, false) => Some(MXCSR_RESET),
                (false, _) => None,
            }
        } else if requested & (XCR0_SSE | XCR0_AVX) != 0 {
            Some(checked_mxcsr(&image)?)
        } else {
            None
        };
        if requested & XCR0_X87 != 0 {
            if present & XCR0_X87 != 0 {
                self.set_x87(op, &image);
            } else {
                self.init_x87();
            }
        }
        if let Some(mxcsr) = mxcsr {
            self.set_fpu_bytes(area::MXCSR, &mxcsr.to_le_bytes());
        }
        let size = 16 * self.vector_registers();
        for (component, at) in [(XCR0_SSE, XMM), (XCR0_AVX, YMM_HIGH)] {
            if requested & component != 0 {
                let zero = [0; YMM_SIZE];
                let bytes = if present & component != 0 { &image[at..at + size] } else { &zero[..size] };
                self.set_fpu_bytes(at, bytes);
            }
        }
        Ok(())
    }
}

/// Whether the instruction has REX.W: pointers of 64 bits.
fn is_wide(op: &Op) -> bool {
    matches!(
        op.instruction.mnemonic(),
        Mnemonic::Fxsave64
            | Mnemonic::Fxrstor64
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor64
    )
}

/// MXCSR of an image; reserved bits raise #GP.
fn checked_mxcsr(image: &[u8]) -> Result<u32, Exception> {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&image[area::MXCSR..area::MXCSR + 4]);
    let mxcsr = u32::from_le_bytes(bytes);
    if mxcsr & !MXCSR_MASK != 0 { Err(Exception::GP0) } else { Ok(mxcsr) }
}

/// The components present by an XSAVE header, and whether the area is compacted (SDM Vol. 1, section 13.8).
fn checked_header(header: &[u8], xcr0: u64) -> Result<(u64, bool), Exception> {
    let word = |number: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[8 * number..8 * number + 8]);
        u64::from_le_bytes(bytes)
    };
    let (present, compaction) = (word(0), word(1));
    let is_compacted = compaction & COMPACTED != 0;
    let (allowed, first_reserved) = if is_compacted { (compaction & !COMPACTED, 2) } else { (xcr0, 1) };
    let last_reserved = if is_compacted { 8 } else { 3 };
    let reserved = (first_reserved..last_reserved).any(|number| word(number) != 0);
    if reserved || allowed & !xcr0 != 0 || present & !allowed != 0 {
        return Err(Exception::GP0);
    }
    Ok((present, is_compacted))
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::cpu::RunExit;
    use crate::cpuid::Vendor;
    use crate::interp::tests::{CODE, machine};
    use crate::registers::gpr::{RAX, RDX, RSI};
    use crate::state::XsaveArea;
    use crate::testing::{TestEnv, test_cpu};

    /// Where the states are stored.
    const AREA: u64 = 0x4000;

    /// A processor in 64-bit mode with XSAVE enabled, RSI at the area and RAX asking for all components.
    fn with_xsave(code: &[u8]) -> (Cpu, TestEnv) {
        let (mut cpu, env) = machine(code);
        cpu.state.cr4 |= (Cr4::OSXSAVE | Cr4::OSFXSR).bits();
        cpu.state.xcr0 = 7;
        cpu.state.gpr[RSI] = AREA;
        cpu.state.gpr[RAX] = 7;
        cpu.state.gpr[RDX] = 0;
        (cpu, env)
    }

    /// A state with something in every component.
    fn full() -> XsaveArea {
        let mut area = XsaveArea::default();
        area.bytes[area::FOP] = 0x12;
        area.bytes[area::FIP..area::FIP + 4].copy_from_slice(&0x12345u32.to_le_bytes());
        area.bytes[area::FDP..area::FDP + 4].copy_from_slice(&0x6789au32.to_le_bytes());
        area.bytes[ST..ST + 10].fill(0x77);
        area.bytes[XMM..XMM_END].fill(0x5a);
        area.bytes[YMM_HIGH..].fill(0xa5);
        area
    }

    fn word(env: &TestEnv, address: u64) -> u64 {
        u64::from_le_bytes(env.get(address))
    }

    #[test]
    fn compacted_area_round_trip() {
        // XSAVEC [RSI]; XRSTOR [RSI]; HLT
        let (mut cpu, mut env) = with_xsave(&[0x0f, 0xc7, 0x26, 0x0f, 0xae, 0x2e, 0xf4]);
        cpu.state.xsave = full();
        cpu.run(&mut env, 1);
        assert_eq!(word(&env, AREA + 512), 7, "XSTATE_BV");
        assert_eq!(word(&env, AREA + 520), COMPACTED | 7, "XCOMP_BV");
        cpu.state.xsave = XsaveArea::default();
        assert_eq!(cpu.run(&mut env, 10), RunExit::Halted);
        assert_eq!(cpu.state.xsave, full());
    }

    #[test]
    fn components_in_their_initial_state_are_not_present() {
        // XSAVEOPT [RSI]; HLT
        let (mut cpu, mut env) = with_xsave(&[0x0f, 0xae, 0x36, 0xf4]);
        cpu.state.xsave.bytes[XMM] = 1;
        env.put(AREA, &[0xee; HEADER_END]);
        env.put(AREA + 512, &[0; 64]);
        assert_eq!(cpu.run(&mut env, 10), RunExit::Halted);
        assert_eq!(word(&env, AREA + 512), XCR0_SSE);
        assert_eq!(env.get::<1>(AREA), [0xee], "x87 state is left out");
        assert_eq!(env.get::<1>(AREA + XMM as u64), [1]);
    }

    #[test]
    fn restores_missing_components_to_their_initial_state() {
        // XRSTOR [RSI]; HLT
        let (mut cpu, mut env) = with_xsave(&[0x0f, 0xae, 0x2e, 0xf4]);
        cpu.state.xsave = full();
        env.put(AREA + area::MXCSR as u64, &0x1fbfu32.to_le_bytes());
        assert_eq!(cpu.run(&mut env, 10), RunExit::Halted);
        let mut expected = XsaveArea::default();
        expected.bytes[area::MXCSR..area::MXCSR + 4].copy_from_slice(&0x1fbfu32.to_le_bytes());
        assert_eq!(cpu.state.xsave, expected);
    }

    #[test]
    fn headers_are_checked() {
        let header = |words: &[(usize, u64)]| {
            let mut header = [0; 64];
            for (number, word) in words {
                header[8 * number..8 * number + 8].copy_from_slice(&word.to_le_bytes());
            }
            checked_header(&header, 7)
        };
        assert_eq!(header(&[(0, 7)]), Ok((7, false)));
        assert_eq!(header(&[(0, 3), (1, COMPACTED | 7)]), Ok((3, true)));
        assert_eq!(header(&[(0, 8)]), Err(Exception::GP0), "a component that XCR0 lacks");
        assert_eq!(header(&[(1, 1)]), Err(Exception::GP0), "XCOMP_BV without its top bit");
        assert_eq!(header(&[(2, 1)]), Err(Exception::GP0), "reserved");
        assert_eq!(header(&[(0, 7), (1, COMPACTED | 3)]), Err(Exception::GP0), "not in the layout");
        assert_eq!(header(&[(0, 1), (1, COMPACTED | 7), (7, 1)]), Err(Exception::GP0), "reserved");
        assert_eq!(header(&[(0, 7), (7, 1)]), Ok((7, false)), "reserved, but not checked");
    }

    #[test]
    fn environments_of_real_mode_hold_linear_addresses() {
        let mut cpu = test_cpu(Vendor::Amd);
        let mut env = TestEnv::new(0x10000);
        // FNSTENV [4000h]; FLDENV [4000h]
        env.put(CODE, &[0xd9, 0x36, 0x00, 0x40, 0xd9, 0x26, 0x00, 0x40]);
        cpu.state.seg[SegReg::Cs as usize].base = 0;
        cpu.state.rip = CODE;
        cpu.state.xsave = full();
        let before = cpu.state.xsave;
        cpu.run(&mut env, 1);
        let fields: [u8; 14] = env.get(AREA);
        let words = fields.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        assert_eq!(words.collect::<Vec<_>>(), [0x37f, 0, 0xffff, 0x2345, 0x1012, 0x789a, 0x6000]);
        cpu.run(&mut env, 1);
        assert_eq!(cpu.state.xsave, before);
    }

    #[test]
    fn registers_keep_their_places_when_top_changes() {
        // FNINIT; HLT
        let (mut cpu, mut env) = machine(&[0xdb, 0xe3, 0xf4]);
        cpu.state.xsave.bytes[area::FSW + 1] = 3 << 3;
        cpu.state.xsave.bytes[area::FTW] = 0xff;
        cpu.state.xsave.bytes[ST] = 0x42;
        assert_eq!(cpu.run(&mut env, 10), RunExit::Halted);
        assert_eq!(cpu.state.xsave.bytes[ST + 3 * 16], 0x42, "ST(0) was R3, which is ST(3) with TOP at zero");
        assert_eq!(cpu.state.xsave.bytes[area::FTW], 0);
    }
}
