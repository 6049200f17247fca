//! The virtual machine control block (APM Vol. 2, appendix B), and how the architecture's state is laid out in it.

use bitflags::bitflags;
use bivisor_x86::registers::{Cr0, Efer, gpr};
use bivisor_x86::state::{CpuState, SegReg, Segment};
use core::mem::offset_of;

bitflags! {
    /// Intercepts of vector 3, at offset 00Ch.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Intercepts1: u32 {
        const INTR = 1 << 0;
        const NMI = 1 << 1;
        const SMI = 1 << 2;
        const INIT = 1 << 3;
        const VINTR = 1 << 4;
        const RDPMC = 1 << 15;
        const CPUID = 1 << 18;
        const RSM = 1 << 19;
        const IRET = 1 << 20;
        const INVD = 1 << 22;
        const HLT = 1 << 24;
        const INVLPGA = 1 << 26;
        const IOIO_PROT = 1 << 27;
        const MSR_PROT = 1 << 28;
        const SHUTDOWN = 1 << 31;
    }
    /// Intercepts of vector 4, at offset 010h.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Intercepts2: u32 {
        const VMRUN = 1 << 0;
        const VMMCALL = 1 << 1;
        const VMLOAD = 1 << 2;
        const VMSAVE = 1 << 3;
        const STGI = 1 << 4;
        const CLGI = 1 << 5;
        const SKINIT = 1 << 6;
        const WBINVD = 1 << 9;
        const MONITOR = 1 << 10;
        const MWAIT = 1 << 11;
        const XSETBV = 1 << 13;
    }
}

/// Bits of [`Control::virtual_interrupt`].
pub mod virtual_interrupt {
    /// A virtual interrupt waits.
    pub const V_IRQ: u64 = 1 << 8;
    /// Its priority, the highest.
    pub const V_INTR_PRIORITY: u64 = 0xf << 16;
    /// The guest's task priority doesn't hold it back.
    pub const V_IGN_TPR: u64 = 1 << 20;
    /// RFLAGS.IF of the guest masks virtual interrupts only; that of the host masks physical ones.
    pub const V_INTR_MASKING: u64 = 1 << 24;
}

/// Values of [`Control::tlb_control`].
pub mod tlb_control {
    /// Flush everything of all address spaces.
    pub const FLUSH_ALL: u8 = 1;
    /// Flush everything of this guest's.
    pub const FLUSH_GUEST: u8 = 3;
}

/// Bytes that stay zero.
#[repr(transparent)]
struct Reserved<const N: usize>([u8; N]);

impl<const N: usize> Default for Reserved<N> {
    fn default() -> Self {
        Self([0; N])
    }
}

/// The control area.
#[repr(C)]
#[derive(Default)]
#[allow(missing_docs)]
pub struct Control {
    pub cr_reads: u16,
    pub cr_writes: u16,
    pub dr_reads: u16,
    pub dr_writes: u16,
    pub exceptions: u32,
    pub intercepts1: u32,
    pub intercepts2: u32,
    pub intercepts3: u32,
    reserved_18: Reserved<{ 0x3c - 0x18 }>,
    pub pause_filter_threshold: u16,
    pub pause_filter_count: u16,
    pub iopm_base_pa: u64,
    pub msrpm_base_pa: u64,
    pub tsc_offset: u64,
    pub asid: u32,
    pub tlb_control: u8,
    reserved_5d: Reserved<3>,
    pub virtual_interrupt: u64,
    /// Bit 0: the guest is in an interrupt shadow.
    pub interrupt_shadow: u64,
    pub exit_code: u64,
    pub exit_info1: u64,
    pub exit_info2: u64,
    pub exit_interrupt_info: u64,
    /// Bit 0: nested paging.
    pub nested_paging: u64,
    reserved_98: Reserved<{ 0xa8 - 0x98 }>,
    pub event_injection: u64,
    pub nested_cr3: u64,
    pub lbr_virtualization: u64,
    pub clean: u64,
    pub next_rip: u64,
    reserved_d0: Reserved<{ 0x400 - 0xd0 }>,
}

/// A segment register.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmcbSegment {
    /// Selector.
    pub selector: u16,
    /// Descriptor bits 40 to 47 and 52 to 55.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

/// The state save area.
#[repr(C)]
#[derive(Default)]
#[allow(missing_docs)]
pub struct SaveArea {
    pub es: VmcbSegment,
    pub cs: VmcbSegment,
    pub ss: VmcbSegment,
    pub ds: VmcbSegment,
    pub fs: VmcbSegment,
    pub gs: VmcbSegment,
    pub gdtr: VmcbSegment,
    pub ldtr: VmcbSegment,
    pub idtr: VmcbSegment,
    pub tr: VmcbSegment,
    reserved_a0: Reserved<{ 0xcb - 0xa0 }>,
    pub cpl: u8,
    reserved_cc: Reserved<4>,
    pub efer: u64,
    reserved_d8: Reserved<{ 0x148 - 0xd8 }>,
    pub cr4: u64,
    pub cr3: u64,
    pub cr0: u64,
    pub dr7: u64,
    pub dr6: u64,
    pub rflags: u64,
    pub rip: u64,
    reserved_180: Reserved<{ 0x1d8 - 0x180 }>,
    pub rsp: u64,
    reserved_1e0: Reserved<{ 0x1f8 - 0x1e0 }>,
    pub rax: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub cr2: u64,
    reserved_248: Reserved<{ 0x268 - 0x248 }>,
    pub pat: u64,
    pub debugctl: u64,
    reserved_278: Reserved<{ 0xc00 - 0x278 }>,
}

/// The whole block.
#[repr(C, align(4096))]
#[derive(Default)]
pub struct Vmcb {
    /// What the hypervisor asks for, and why the guest was left.
    pub control: Control,
    /// The guest's registers.
    pub save: SaveArea,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096 && offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Control, exceptions) == 0x8 && offset_of!(Control, iopm_base_pa) == 0x40);
    assert!(offset_of!(Control, asid) == 0x58 && offset_of!(Control, virtual_interrupt) == 0x60);
    assert!(offset_of!(Control, exit_code) == 0x70 && offset_of!(Control, nested_paging) == 0x90);
    assert!(offset_of!(Control, event_injection) == 0xa8 && offset_of!(Control, next_rip) == 0xc8);
    assert!(offset_of!(SaveArea, cpl) == 0xcb && offset_of!(SaveArea, efer) == 0xd0);
    assert!(offset_of!(SaveArea, cr4) == 0x148 && offset_of!(SaveArea, rip) == 0x178);
    assert!(offset_of!(SaveArea, rsp) == 0x1d8 && offset_of!(SaveArea, rax) == 0x1f8);
    assert!(offset_of!(SaveArea, cr2) == 0x240 && offset_of!(SaveArea, pat) == 0x268);
};

impl Vmcb {
    /// A block of zeros.
    pub fn zeroed() -> alloc::boxed::Box<Self> {
        alloc::boxed::Box::default()
    }
}

/// Descriptor bits 52 to 55 in [`Segment::attributes`].
const UPPER: u16 = 0xf000;
/// CR0 bits of the guest that are kept from the hardware, where they would switch off the caches of real memory.
const KEPT_CR0: u64 = Cr0::CD.bits() | Cr0::NW.bits();

fn to_vmcb(segment: &Segment) -> VmcbSegment {
    let present = if segment.usable() { segment.attributes } else { segment.attributes & !Segment::P };
    VmcbSegment {
        selector: segment.selector,
        attributes: present & 0xff | (present & UPPER) >> 4,
        limit: segment.limit,
        base: segment.base,
    }
}

fn from_vmcb(segment: &VmcbSegment) -> Segment {
    let attributes = segment.attributes & 0xff | segment.attributes << 4 & UPPER;
    // What is not present was loaded with a null selector: a descriptor that is not present can't be loaded.
    let unusable = if attributes & Segment::P == 0 { Segment::UNUSABLE } else { 0 };
    Segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        attributes: attributes | unusable,
    }
}

impl SaveArea {
    /// Takes the registers of a state that the block keeps. RAX and RSP are two of them, the other general ones, the x87,
    /// SSE and AVX state, and DR0 to DR3 are not.
    pub fn load(&mut self, state: &CpuState) {
        let segment = |register: SegReg| to_vmcb(&state.seg[register as usize]);
        self.es = segment(SegReg::Es);
        self.cs = segment(SegReg::Cs);
        self.ss = segment(SegReg::Ss);
        // The DPL of SS is the CPL, whatever was loaded: some implementations take it from there.
        self.ss.attributes = self.ss.attributes & !(3 << 5) | u16::from(state.cpl) << 5;
        self.ds = segment(SegReg::Ds);
        self.fs = segment(SegReg::Fs);
        self.gs = segment(SegReg::Gs);
        self.ldtr = to_vmcb(&state.ldtr);
        self.tr = to_vmcb(&state.tr);
        for (table, register) in [(&mut self.gdtr, &state.gdtr), (&mut self.idtr, &state.idtr)] {
            *table =
                VmcbSegment { base: register.base, limit: register.limit.into(), ..VmcbSegment::default() };
        }
        self.cpl = state.cpl;
        // A guest without it is refused (APM Vol. 2, section 15.5.1).
        self.efer = state.msr.efer | Efer::SVME.bits();
        self.cr0 = state.cr0 & !KEPT_CR0;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.dr6 = state.dr[6];
        self.dr7 = state.dr[7];
        self.rflags = state.rflags;
        self.rip = state.rip;
        self.rsp = state.gpr[gpr::RSP];
        self.rax = state.gpr[gpr::RAX];
        let msr = &state.msr;
        self.star = msr.star;
        self.lstar = msr.lstar;
        self.cstar = msr.cstar;
        self.sfmask = msr.sfmask;
        self.kernel_gs_base = msr.kernel_gs_base;
        self.sysenter_cs = msr.sysenter_cs;
        self.sysenter_esp = msr.sysenter_esp;
        self.sysenter_eip = msr.sysenter_eip;
        self.pat = msr.pat;
    }

    /// Gives what [`SaveArea::load`] took, as the guest has changed it.
    pub fn store(&self, state: &mut CpuState) {
        let segments = [&self.es, &self.cs, &self.ss, &self.ds, &self.fs, &self.gs];
        for (to, from) in state.seg.iter_mut().zip(segments) {
            *to = from_vmcb(from);
        }
        state.ldtr = from_vmcb(&self.ldtr);
        state.tr = from_vmcb(&self.tr);
        for (register, table) in [(&mut state.gdtr, &self.gdtr), (&mut state.idtr, &self.idtr)] {
            (register.base, register.limit) = (table.base, table.limit as u16);
        }
        state.cpl = self.cpl & 3;
        state.msr.efer = self.efer & !Efer::SVME.bits();
        state.cr0 = self.cr0 & !KEPT_CR0 | state.cr0 & KEPT_CR0;
        state.cr2 = self.cr2;
        state.cr3 = self.cr3;
        state.cr4 = self.cr4;
        state.dr[6] = self.dr6;
        state.dr[7] = self.dr7;
        state.rflags = self.rflags;
        state.rip = self.rip;
        state.gpr[gpr::RSP] = self.rsp;
        state.gpr[gpr::RAX] = self.rax;
        let msr = &mut state.msr;
        msr.star = self.star;
        msr.lstar = self.lstar;
        msr.cstar = self.cstar;
        msr.sfmask = self.sfmask;
        msr.kernel_gs_base = self.kernel_gs_base;
        msr.sysenter_cs = self.sysenter_cs;
        msr.sysenter_esp = self.sysenter_esp;
        msr.sysenter_eip = self.sysenter_eip;
        msr.pat = self.pat;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_loaded_is_stored() {
        let mut state = CpuState { cpl: 3, cr2: 0x1234, ..CpuState::default() };
        state.gpr = core::array::from_fn(|number| 0x1000 + number as u64);
        state.seg[SegReg::Cs as usize] =
            Segment { base: 0, limit: 0xffff_ffff, selector: 0x33, attributes: 0xa0fb };
        state.seg[SegReg::Ss as usize] =
            Segment { base: 0, limit: 0xffff_ffff, selector: 0x2b, attributes: 0xc0f3 };
        state.seg[SegReg::Fs as usize] =
            Segment { base: 0x7fff_0000_0000, limit: 0, selector: 0, attributes: Segment::UNUSABLE };
        state.msr.lstar = 0xffff_8000_0000_0000;
        state.msr.efer = 0xd01;
        let mut vmcb = Vmcb::zeroed();
        vmcb.save.load(&state);
        assert_eq!((vmcb.save.cs.attributes, vmcb.save.ss.attributes), (0xafb, 0xcf3));
        assert_eq!((vmcb.save.efer, vmcb.save.cr0 & KEPT_CR0), (0x1d01, 0));
        let mut back = state.clone();
        back.seg = [Segment::default(); 6];
        (back.rip, back.cr2, back.msr.lstar) = (0, 0, 0);
        vmcb.save.store(&mut back);
        assert_eq!(back, state);
    }

    #[test]
    fn a_null_stack_segment_tells_the_privilege_level() {
        let mut state = CpuState { cpl: 2, ..CpuState::default() };
        state.seg[SegReg::Ss as usize] = Segment { attributes: Segment::UNUSABLE, ..Segment::default() };
        let mut vmcb = Vmcb::zeroed();
        vmcb.save.load(&state);
        assert_eq!(vmcb.save.ss.attributes, 2 << 5);
        vmcb.save.store(&mut state);
        assert_eq!((state.seg[SegReg::Ss as usize].usable(), state.cpl), (false, 2));
    }
}
