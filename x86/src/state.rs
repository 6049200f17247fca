//! The architectural state of one logical processor: plain data, copied in and out of every engine.

use core::ops::Range;

use crate::registers::{Cr0, Cr4, Efer, Rflags, gpr};

/// Segment register numbers, in the order of their instruction encoding (SDM Vol. 2A, table 2-3 "sreg").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum SegReg {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register with its hidden part.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied: the last valid offset of an expand-up segment.
    pub limit: u32,
    /// The visible selector.
    pub selector: u16,
    /// Access rights, laid out as descriptor bits 40 to 55 with the limit bits zero: type in bits 0–3, S 4,
    /// DPL 5–6, P 7, AVL 12, L 13, D/B 14, G 15; bit 11 set: unusable (loaded with a null selector).
    pub attributes: u16,
}

impl Segment {
    /// Bit of `attributes`: code or data segment (descriptor type flag S).
    pub const S: u16 = 1 << 4;
    /// Bit of `attributes`: present.
    pub const P: u16 = 1 << 7;
    /// Bit of `attributes`: our own mark of a register loaded with a null selector.
    pub const UNUSABLE: u16 = 1 << 11;
    /// Bit of `attributes`: 64-bit code.
    pub const L: u16 = 1 << 13;
    /// Bit of `attributes`: 32-bit default size.
    pub const DB: u16 = 1 << 14;
    /// Bit of `attributes`: limit counted in pages.
    pub const G: u16 = 1 << 15;

    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// Whether the register holds a usable segment.
    pub const fn usable(&self) -> bool {
        self.attributes & Self::UNUSABLE == 0
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Limit: size in bytes minus one.
    pub limit: u16,
}

/// x87, SSE and AVX state in the standard format of XSAVE (SDM Vol. 1, section 13.4): legacy area, header,
/// then AVX's upper halves at byte 576. XSTATE_BV in the header is kept at all components the guest has.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveArea {
    /// The bytes, as XSAVE writes them.
    pub bytes: [u8; XSAVE_AREA_SIZE],
}

/// Bytes of [`XsaveArea`]: legacy 512, header 64, AVX 256.
pub const XSAVE_AREA_SIZE: usize = 832;
/// Where XSTATE_BV stands in [`XsaveArea`]: the components that are not in their initial state.
pub const XSTATE_BV: Range<usize> = 512..520;
/// XCR0 bit of x87 state.
pub const XCR0_X87: u64 = 1;
/// XCR0 bit of SSE state.
pub const XCR0_SSE: u64 = 2;
/// XCR0 bit of AVX state.
pub const XCR0_AVX: u64 = 4;
/// The bits of MXCSR that the guest may set; what FXSAVE reports as MXCSR_MASK.
pub const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after reset: all exceptions masked.
pub const MXCSR_RESET: u32 = 0x1f80;

impl Default for XsaveArea {
    /// State after reset with FCW as FNINIT leaves it.
    fn default() -> Self {
        let mut bytes = [0; XSAVE_AREA_SIZE];
        bytes[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        bytes[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        bytes[XSTATE_BV].copy_from_slice(&(XCR0_X87 | XCR0_SSE | XCR0_AVX).to_le_bytes());
        Self { bytes }
    }
}

/// Whether the processor executes, and if not, what it waits for (SDM Vol. 3A, section 9.4.4 and Vol. 3C, 24.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Running = 0,
    /// In HLT, until an interrupt, NMI or INIT.
    Halted = 1,
    /// An application processor after INIT, until a SIPI.
    WaitForSipi = 2,
    /// Shut down by a triple fault.
    Shutdown = 3,
}

/// Everything architectural that one logical processor holds, except its local APIC (CR8 and IA32_APIC_BASE
/// belong to that). `repr(C)`: a translator addresses the fields by offset.
#[repr(C)]
#[derive(Clone, Debug, PartialEq)]
pub struct CpuState {
    /// General registers in encoding order, see [`crate::registers::gpr`].
    pub gpr: [u64; 16],
    /// Instruction pointer, without the base of CS.
    pub rip: u64,
    /// Flags; bit 1 is always set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: index by [`SegReg`].
    pub seg: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// Current privilege level, 0 to 3.
    pub cpl: u8,
    /// Interrupts are inhibited for one instruction (after STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// The inhibition came from MOV SS or POP SS, which hold back debug traps too.
    pub ss_shadow: bool,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    /// Running, halted, …
    pub activity: Activity,
    /// CR0.
    pub cr0: u64,
    /// CR2: linear address of the last page fault.
    pub cr2: u64,
    /// CR3: page-table root and PCID.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The four page-directory-pointer entries cached by PAE paging (SDM Vol. 3A, section 4.4.1).
    pub pdpte: [u64; 4],
    /// Debug registers; 4 and 5 are unused.
    pub dr: [u64; 8],
    /// XCR0.
    pub xcr0: u64,
    /// Model-specific registers of the processor itself.
    pub msr: Msrs,
    /// x87, SSE, AVX.
    pub xsave: XsaveArea,
}

/// Model-specific registers that belong to the processor (those of the APIC, of the paravirtual interface and
/// of the machine are asked from the environment).
#[repr(C)]
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    pub mcg_status: u64,
    pub mcg_ctl: u64,
    /// CTL, STATUS, ADDR and MISC of each bank.
    pub mc_banks: [[u64; 4]; MC_BANKS],
    pub spec_ctrl: u64,
    /// AMD's HWCR.
    pub hwcr: u64,
}

/// Machine-check banks.
pub const MC_BANKS: usize = 4;

/// IA32_PAT after reset (SDM Vol. 3A, section 12.12.4).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

impl Default for Msrs {
    fn default() -> Self {
        Self {
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            pat: PAT_RESET,
            misc_enable: 1,
            debugctl: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            mcg_status: 0,
            mcg_ctl: 0,
            mc_banks: [[0; 4]; MC_BANKS],
            spec_ctrl: 0,
            hwcr: 0,
        }
    }
}

impl Default for CpuState {
    /// The state after power-up or RESET (SDM Vol. 3A, table 9-1): real mode at F000:FFF0.
    fn default() -> Self {
        let data = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x93 };
        let mut seg = [data; 6];
        seg[SegReg::Cs as usize] =
            Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attributes: 0x9b };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: Rflags::FIXED.bits(),
            seg,
            ldtr: Segment { attributes: 0x82, limit: 0xffff, ..Segment::default() },
            tr: Segment { attributes: 0x8b, limit: 0xffff, ..Segment::default() },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cpl: 0,
            interrupt_shadow: false,
            ss_shadow: false,
            nmi_blocked: false,
            activity: Activity::Running,
            cr0: (Cr0::CD | Cr0::NW | Cr0::ET).bits(),
            cr2: 0,
            cr3: 0,
            cr4: 0,
            pdpte: [0; 4],
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xcr0: XCR0_X87,
            msr: Msrs::default(),
            xsave: XsaveArea::default(),
        }
    }
}

/// The execution mode that CR0, EFER, RFLAGS.VM and CS select (SDM Vol. 3A, section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    Virtual8086,
    /// Protected mode with EFER.LMA clear.
    Protected,
    /// Long mode, code segment with L clear.
    Compatibility,
    /// 64-bit mode.
    Long64,
}

impl CpuState {
    /// INIT (SDM Vol. 3A, table 9-1): most of a reset, but x87, SSE, AVX, MSRs and the caches' control bits stay.
    /// `signature`: CPUID 1 EAX. The bootstrap processor then executes, the others wait for a SIPI.
    pub fn init(&mut self, signature: u32, bootstrap: bool) {
        let caching = self.cr0 & (Cr0::CD | Cr0::NW).bits();
        let msr = Msrs { efer: 0, ..self.msr.clone() };
        *self = Self { xcr0: self.xcr0, xsave: self.xsave, msr, ..Self::default() };
        self.cr0 = caching | Cr0::ET.bits();
        self.gpr[gpr::RDX] = signature.into();
        self.activity = if bootstrap { Activity::Running } else { Activity::WaitForSipi };
    }

    /// A SIPI (SDM Vol. 3A, section 8.4.4): execution starts at `page` × 4 KiB, if one was waited for; whether it was.
    pub fn start(&mut self, page: u8) -> bool {
        let waited = self.activity == Activity::WaitForSipi;
        if waited {
            let cs = &mut self.seg[SegReg::Cs as usize];
            (cs.base, cs.selector) = (u64::from(page) << 12, u16::from(page) << 8);
            self.rip = 0;
            self.activity = Activity::Running;
        }
        waited
    }

    /// The current execution mode.
    pub fn mode(&self) -> Mode {
        if self.cr0 & Cr0::PE.bits() == 0 {
            Mode::Real
        } else if self.msr.efer & Efer::LMA.bits() != 0 {
            if self.seg[SegReg::Cs as usize].attributes & Segment::L != 0 {
                Mode::Long64
            } else {
                Mode::Compatibility
            }
        } else if self.rflags & Rflags::VM.bits() != 0 {
            Mode::Virtual8086
        } else {
            Mode::Protected
        }
    }
    /// Size of code in bits (16, 32 or 64), for the decoder.
    pub fn code_bits(&self) -> u32 {
        match self.mode() {
            Mode::Long64 => 64,
            Mode::Virtual8086 => 16,
            // In real mode the hidden D bit still counts, until a far transfer reloads it.
            _ if self.seg[SegReg::Cs as usize].attributes & Segment::DB != 0 => 32,
            _ => 16,
        }
    }
    /// Whether all the given bits of CR0 are set.
    pub fn cr0_has(&self, bits: Cr0) -> bool {
        self.cr0 & bits.bits() == bits.bits()
    }
    /// Whether all the given bits of CR4 are set.
    pub fn cr4_has(&self, bits: Cr4) -> bool {
        self.cr4 & bits.bits() == bits.bits()
    }
    /// Whether all the given flags are set.
    pub fn has_flags(&self, flags: Rflags) -> bool {
        self.rflags & flags.bits() == flags.bits()
    }
}
