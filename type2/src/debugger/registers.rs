//! The registers as gdb names and orders them.

use bivisor_x86::registers::Rflags;
use bivisor_x86::state::{CpuState, SegReg};
use gdbstub_arch::x86::reg::X86_64CoreRegs;

/// gdb counts RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8 …; the processor numbers them so.
const ORDER: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];

/// Offsets in the legacy area of XSAVE (SDM Vol. 1, table 10-2).
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FCS: usize = 12;
const FDP: usize = 16;
const FDS: usize = 20;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;

/// Flags that are not the debugger's to change.
const FIXED_FLAGS: u64 = Rflags::FIXED.bits() | Rflags::VM.bits();

fn le16(bytes: &[u8], at: usize) -> u32 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]]).into()
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    le16(bytes, at) | le16(bytes, at + 2) << 16
}

/// gdb's registers of a vCPU.
pub fn from_state(state: &CpuState, registers: &mut X86_64CoreRegs) {
    for (gdb, number) in registers.regs.iter_mut().zip(ORDER) {
        *gdb = state.gpr[number];
    }
    registers.rip = state.rip;
    registers.eflags = state.rflags as u32;
    let selector = |register: SegReg| u32::from(state.seg[register as usize].selector);
    let segments = &mut registers.segments;
    (segments.cs, segments.ss, segments.ds) =
        (selector(SegReg::Cs), selector(SegReg::Ss), selector(SegReg::Ds));
    (segments.es, segments.fs, segments.gs) =
        (selector(SegReg::Es), selector(SegReg::Fs), selector(SegReg::Gs));

    let area = &state.xsave.bytes;
    for (index, st) in registers.st.iter_mut().enumerate() {
        let at = ST + 16 * index;
        st.copy_from_slice(&area[at..at + 10]);
    }
    for (index, xmm) in registers.xmm.iter_mut().enumerate() {
        let at = XMM + 16 * index;
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&area[at..at + 16]);
        *xmm = u128::from_le_bytes(bytes);
    }
    let fpu = &mut registers.fpu;
    (fpu.fctrl, fpu.fstat, fpu.fop) = (le16(area, FCW), le16(area, FSW), le16(area, FOP));
    fpu.ftag = full_tags(area);
    (fpu.fioff, fpu.fiseg) = (le32(area, FIP), le16(area, FCS));
    (fpu.fooff, fpu.foseg) = (le32(area, FDP), le16(area, FDS));
    registers.mxcsr = le32(area, MXCSR);
}

/// The x87 tag word with two bits per register, from the one bit that FXSAVE keeps (SDM Vol. 1, section 10.5.1).
fn full_tags(area: &[u8]) -> u32 {
    let top = le16(area, FSW) >> 11 & 7;
    (0..8).fold(0, |tags, register: u32| {
        if area[FTW] >> register & 1 == 0 {
            return tags | 3 << (2 * register);
        }
        let at = ST + 16 * (register.wrapping_sub(top) & 7) as usize;
        let exponent = le16(area, at + 8) & 0x7fff;
        let integer_bit = area[at + 7] & 0x80 != 0;
        let tag = match exponent {
            0 if area[at..at + 8].iter().all(|byte| *byte == 0) => 1,
            0 | 0x7fff => 2,
            _ if integer_bit => 0,
            _ => 2,
        };
        tags | tag << (2 * register)
    })
}

/// Changes a vCPU to what the debugger wrote. Segment selectors stay: loading one is more than its number. So do the
/// x87's tags and pointers.
pub fn to_state(registers: &X86_64CoreRegs, state: &mut CpuState) {
    for (gdb, number) in registers.regs.iter().zip(ORDER) {
        state.gpr[number] = *gdb;
    }
    state.rip = registers.rip;
    state.rflags = state.rflags & (FIXED_FLAGS | !0xffff_ffff) | u64::from(registers.eflags) & !FIXED_FLAGS;
    let area = &mut state.xsave.bytes;
    for (index, st) in registers.st.iter().enumerate() {
        let at = ST + 16 * index;
        area[at..at + 10].copy_from_slice(st);
    }
    for (index, xmm) in registers.xmm.iter().enumerate() {
        let at = XMM + 16 * index;
        area[at..at + 16].copy_from_slice(&xmm.to_le_bytes());
    }
    // Bits 16 to 31 are reserved; a one there would fault at the next restore.
    area[MXCSR..MXCSR + 2].copy_from_slice(&(registers.mxcsr as u16).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn general_registers_change_places() {
        let mut state = CpuState::default();
        for (number, value) in state.gpr.iter_mut().enumerate() {
            *value = 100 + number as u64;
        }
        let mut registers = X86_64CoreRegs::default();
        from_state(&state, &mut registers);
        // RBX, RSP, R8.
        assert_eq!((registers.regs[1], registers.regs[7], registers.regs[8]), (103, 104, 108));
        assert_eq!(registers.rip, 0xfff0);
        assert_eq!(registers.segments.cs, 0xf000);
        assert_eq!(registers.mxcsr, 0x1f80);
    }

    #[test]
    fn writing_back_what_was_read_changes_nothing() {
        let mut state = CpuState::default();
        state.xsave.bytes[ST..XMM + 256].iter_mut().enumerate().for_each(|(i, byte)| {
            // The gaps between x87 registers are reserved.
            *byte = if i < 128 && i % 16 >= 10 { 0 } else { i as u8 };
        });
        let before = state.clone();
        let mut registers = X86_64CoreRegs::default();
        from_state(&state, &mut registers);
        to_state(&registers, &mut state);
        assert!(state == before);
    }

    #[test]
    fn tags_tell_empty_zero_valid_and_special() {
        let mut state = CpuState::default();
        let mut registers = X86_64CoreRegs::default();
        from_state(&state, &mut registers);
        assert_eq!(registers.fpu.ftag, 0xffff, "all are empty after reset");
        // Registers 0 to 2 with TOP 0: zero, 1.0, infinity.
        state.xsave.bytes[FTW] = 0b111;
        state.xsave.bytes[ST + 16 + 7..ST + 16 + 10].copy_from_slice(&[0x80, 0xff, 0x3f]);
        state.xsave.bytes[ST + 32 + 7..ST + 32 + 10].copy_from_slice(&[0x80, 0xff, 0x7f]);
        from_state(&state, &mut registers);
        assert_eq!(registers.fpu.ftag, 0xffc0 | 0b10_00_01);
    }
}
