//! What, besides its bytes, decides how a block is translated.

use bivisor_x86::cpu::Cpu;
use bivisor_x86::registers::{Cr0, Cr4, Rflags};
use bivisor_x86::state::{CpuState, Mode, SegReg, Segment, XCR0_AVX, XCR0_SSE};

use super::code32;

/// The mode of a block: part of its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key(u16);

/// Class of user mode, see [`Key::class`].
pub const USER: u8 = 0;
/// Class of supervisor mode with RFLAGS.AC clear.
pub const SUPERVISOR: u8 = 1;
/// Class of supervisor mode with RFLAGS.AC set.
pub const SUPERVISOR_AC: u8 = 2;

const SSE: u16 = 1 << 2;
const AVX: u16 = 1 << 3;
const X87: u16 = 1 << 4;
const TSC: u16 = 1 << 5;
const NO_STACK: u16 = 1 << 6;
const CODE32: u16 = 1 << 7;
const FS: u16 = 1 << 8;
const GS: u16 = 1 << 9;

/// Exception masks of MXCSR.
const MXCSR_MASKS: u32 = 0x1f80;
/// Exception masks of the x87 control word.
const FCW_MASKS: u16 = 0x3f;

impl Key {
    /// The key of code in the processor's current mode, if it is 64-bit code or [`Key::code32`]; else nothing that may be
    /// translated.
    pub fn of(cpu: &Cpu) -> Self {
        let state = &cpu.state;
        let class = match (state.cpl, state.has_flags(Rflags::AC)) {
            (3, _) => USER,
            (_, false) => SUPERVISOR,
            (_, true) => SUPERVISOR_AC,
        };
        let mut bits = u16::from(class) | segments(state);
        let area = &state.xsave.bytes;
        if !state.cr0_has(Cr0::TS) && !state.cr0_has(Cr0::EM) {
            let fcw = u16::from_le_bytes([area[0], area[1]]);
            let fsw_error = area[2] & 0x80 != 0;
            if fcw & FCW_MASKS == FCW_MASKS && !fsw_error {
                bits |= X87;
            }
            let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
            if mxcsr & MXCSR_MASKS == MXCSR_MASKS {
                if state.cr4_has(Cr4::OSFXSR) {
                    bits |= SSE;
                }
                if state.cr4_has(Cr4::OSXSAVE) && state.xcr0 & (XCR0_SSE | XCR0_AVX) == XCR0_SSE | XCR0_AVX {
                    bits |= AVX;
                }
            }
        }
        if !state.cr4_has(Cr4::TSD) {
            bits |= TSC;
        }
        Self(bits)
    }

    /// Privilege class: number of the TLB.
    pub fn class(self) -> u8 {
        (self.0 & 3) as u8
    }
    /// The same with another privilege class.
    pub fn with_class(self, class: u8) -> Self {
        Self(self.0 & !3 | u16::from(class & 3))
    }
    /// Legacy SSE instructions execute without a fault of the mode, and without unmasked exceptions.
    pub fn sse(self) -> bool {
        self.0 & SSE != 0
    }
    /// The same for VEX-encoded vector instructions.
    pub fn avx(self) -> bool {
        self.0 & AVX != 0
    }
    /// The same for x87.
    pub fn x87(self) -> bool {
        self.0 & X87 != 0
    }
    /// The code is 32-bit code in flat segments.
    pub fn code32(self) -> bool {
        self.0 & CODE32 != 0
    }
    /// Bytes that the stack moves by.
    pub fn stack_step(self) -> i32 {
        if self.code32() { code32::STACK_STEP } else { 8 }
    }
    /// In 32-bit code: FS reaches all addresses and may be written.
    pub fn fs(self) -> bool {
        self.0 & FS != 0
    }
    /// In 32-bit code: GS reaches all addresses and may be written.
    pub fn gs(self) -> bool {
        self.0 & GS != 0
    }
    /// RDTSC is allowed at every privilege level.
    pub fn tsc(self) -> bool {
        self.0 & TSC != 0
    }
    /// Whether stack accesses are each checked by themselves.
    pub fn no_stack(self) -> bool {
        self.0 & NO_STACK != 0
    }
    /// The same mode, with every stack access checked by itself: for a block whose stack range crosses a page.
    pub fn with_no_stack(self) -> Self {
        Self(self.0 | NO_STACK)
    }
    /// The bits.
    pub fn bits(self) -> u16 {
        self.0
    }
}

/// What the key says of the segments: nothing unless the code is 32-bit code in flat segments.
fn segments(state: &CpuState) -> u16 {
    let segment = |register: SegReg| &state.seg[register as usize];
    let code = segment(SegReg::Cs);
    if code.attributes & (Segment::L | Segment::DB) != Segment::DB
        || !matches!(state.mode(), Mode::Protected | Mode::Compatibility)
        || !matches!(state.cpl, 0 | 3)
    {
        return 0;
    }
    // Type bits 3 and 1: readable code (SDM Vol. 3A, section 3.4.5.1).
    let readable = code.attributes & (Segment::UNUSABLE | Segment::S | 0b1010) == Segment::S | 0b1010;
    let wide_stack = segment(SegReg::Ss).attributes & Segment::DB != 0;
    let flat = [SegReg::Ss, SegReg::Ds, SegReg::Es]
        .into_iter()
        .all(|register| segment(register).base == 0 && reaches_all(segment(register)));
    if !readable || code.base != 0 || code.limit != u32::MAX || !wide_stack || !flat {
        return 0;
    }
    let mut bits = CODE32;
    if reaches_all(segment(SegReg::Fs)) {
        bits |= FS;
    }
    if reaches_all(segment(SegReg::Gs)) {
        bits |= GS;
    }
    bits
}

/// Whether every offset of a data segment may be read and written.
fn reaches_all(segment: &Segment) -> bool {
    // Type bits 3, 2, 1: data that expands up and may be written (SDM Vol. 3A, section 3.4.5.1).
    segment.limit == u32::MAX
        && segment.attributes & (Segment::UNUSABLE | Segment::S | 0b1110) == Segment::S | 0b0010
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use bivisor_x86::cpuid::CpuModel;

    impl Key {
        /// 32-bit user code, all vector instructions allowed, FS and GS unusable.
        pub fn plain_code32() -> Self {
            Self(USER.into()).with(CODE32 | SSE | AVX | X87 | TSC)
        }
        /// 64-bit user code, likewise.
        pub fn plain_code64() -> Self {
            Self(USER.into()).with(SSE | AVX | X87 | TSC)
        }
        fn with(self, bits: u16) -> Self {
            Self(self.0 | bits)
        }
    }

    /// A processor in protected mode with flat segments.
    fn flat() -> Cpu {
        let mut cpu = Cpu::new(Arc::new(CpuModel::reference(1)));
        cpu.state.cr0 |= Cr0::PE.bits();
        let data = Segment { base: 0, limit: u32::MAX, selector: 0x10, attributes: 0xc093 };
        cpu.state.seg = [data; 6];
        cpu.state.seg[SegReg::Cs as usize].attributes = 0xc09b;
        cpu
    }

    /// Whether the code is translated after a change of one segment.
    fn with(register: SegReg, change: impl FnOnce(&mut Segment)) -> Key {
        let mut cpu = flat();
        change(&mut cpu.state.seg[register as usize]);
        Key::of(&cpu)
    }

    #[test]
    fn code_in_flat_segments_is_known() {
        let key = Key::of(&flat());
        assert!(key.code32() && key.fs() && key.gs() && key.stack_step() == 4);
        let mut real = flat();
        real.state.cr0 &= !Cr0::PE.bits();
        assert!(!Key::of(&real).code32());
        let mut virtual8086 = flat();
        virtual8086.state.rflags |= Rflags::VM.bits();
        assert!(!Key::of(&virtual8086).code32());
        let mut ring1 = flat();
        ring1.state.cpl = 1;
        assert!(!Key::of(&ring1).code32());
    }

    #[test]
    fn other_segments_are_not_flat() {
        for register in [SegReg::Cs, SegReg::Ss, SegReg::Ds, SegReg::Es] {
            assert!(!with(register, |segment| segment.base = 0x1000).code32(), "{register:?}");
            assert!(!with(register, |segment| segment.limit = 0xffff_efff).code32(), "{register:?}");
            assert!(
                !with(register, |segment| segment.attributes |= Segment::UNUSABLE).code32(),
                "{register:?}"
            );
            // Read-only data, or code that can't be read.
            assert!(!with(register, |segment| segment.attributes &= !2).code32(), "{register:?}");
        }
        // 16-bit code, 64-bit code, a 16-bit stack, data that expands down.
        assert!(!with(SegReg::Cs, |segment| segment.attributes &= !Segment::DB).code32());
        assert!(!with(SegReg::Cs, |segment| segment.attributes |= Segment::L).code32());
        assert!(!with(SegReg::Ss, |segment| segment.attributes &= !Segment::DB).code32());
        assert!(!with(SegReg::Ds, |segment| segment.attributes |= 4).code32());
    }

    #[test]
    fn fs_and_gs_may_have_a_base_but_no_limit() {
        let key = with(SegReg::Fs, |segment| segment.base = 0xffff_0000);
        assert!(key.code32() && key.fs());
        let key = with(SegReg::Gs, |segment| segment.limit = 0x17);
        assert!(key.code32() && key.fs() && !key.gs());
        let key =
            with(SegReg::Fs, |segment| *segment = Segment { attributes: Segment::UNUSABLE, ..*segment });
        assert!(key.code32() && !key.fs());
    }
}
