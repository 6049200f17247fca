//! Segment descriptors and the loading of segment registers (SDM Vol. 3A, chapters 3 and 5; APM Vol. 2,
//! chapter 4).

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::{Exception, vector};
use crate::memory::is_canonical;
use crate::registers::Rflags;
use crate::state::{Mode, SegReg, Segment};
use crate::tlb::Privilege;

/// Types of system descriptors (SDM Vol. 3A, table 3-2).
#[allow(missing_docs)]
pub(crate) mod system_type {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    /// In long mode: a 64-bit TSS.
    pub const TSS32: u8 = 9;
    pub const TSS32_BUSY: u8 = 11;
    /// In long mode: a 64-bit gate, like the next two.
    pub const CALL_GATE32: u8 = 12;
    pub const INTERRUPT_GATE32: u8 = 14;
    pub const TRAP_GATE32: u8 = 15;
}

/// The type bit that makes a TSS busy.
const BUSY: u64 = 2;

/// A descriptor from the GDT, the LDT or the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// The first eight bytes.
    pub low: u64,
    /// The next eight, of a 16-byte system descriptor or gate of long mode.
    pub high: u64,
}

impl Descriptor {
    /// Type, bits 40 to 43.
    pub fn kind(&self) -> u8 {
        (self.low >> 40 & 0xf) as u8
    }
    /// Whether it describes a system segment or gate, not code or data.
    pub fn is_system(&self) -> bool {
        self.low >> 44 & 1 == 0
    }
    pub fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }
    pub fn is_conforming_code(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }
    pub fn is_writable_data(&self) -> bool {
        !self.is_system() && self.kind() & 0xa == 2
    }
    pub fn is_readable(&self) -> bool {
        !self.is_system() && self.kind() & 0xa != 8
    }
    pub fn dpl(&self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
    pub fn present(&self) -> bool {
        self.low >> 47 & 1 != 0
    }
    /// 64-bit code (L).
    pub fn is_long(&self) -> bool {
        self.low >> 53 & 1 != 0
    }
    /// 32-bit code or stack (D/B).
    pub fn is_big(&self) -> bool {
        self.low >> 54 & 1 != 0
    }
    fn base(&self) -> u64 {
        self.low >> 16 & 0xff_ffff | self.low >> 56 << 24 | self.high << 32
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let raw = (self.low & 0xffff | self.low >> 32 & 0xf_0000) as u32;
        if self.low >> 55 & 1 != 0 { raw << 12 | 0xfff } else { raw }
    }
    /// The segment register content that it describes.
    pub fn segment(&self, selector: u16) -> Segment {
        let attributes = (self.low >> 40) as u16 & 0xf0ff;
        Segment { base: self.base(), limit: self.limit(), selector, attributes }
    }
    /// Of a gate: the selector it leads to.
    pub fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }
    /// Of a gate: the offset it leads to; `wide`: more than 16 bits.
    pub fn gate_offset(&self, wide: bool) -> u64 {
        if wide {
            self.low & 0xffff | self.low >> 32 & 0xffff_0000 | self.high << 32
        } else {
            self.low & 0xffff
        }
    }
    /// Of a call gate: words or doublewords to copy.
    pub fn gate_count(&self) -> usize {
        (self.low >> 32 & 0x1f) as usize
    }
    /// Of an interrupt or trap gate of long mode: interrupt stack table index, 0 for none.
    pub fn gate_ist(&self) -> u64 {
        self.low >> 32 & 7
    }
    /// Of a 16-byte descriptor: whether the type field of its upper half is zero, as it must be.
    pub fn upper_type_is_zero(&self) -> bool {
        self.high >> 40 & 0x1f == 0
    }
}

/// Whether a selector is null.
pub(crate) const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Requested privilege level of a selector.
pub(crate) const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A segment register that a null selector was loaded into.
pub(crate) const fn null_segment(selector: u16) -> Segment {
    Segment { base: 0, limit: 0, selector, attributes: Segment::UNUSABLE }
}

/// A segment of virtual-8086 mode (SDM Vol. 3A, section 20.2).
pub(crate) const fn virtual_8086_segment(selector: u16) -> Segment {
    Segment { base: (selector as u64) << 4, limit: 0xffff, selector, attributes: 0xf3 }
}

impl Cpu {
    /// A segment register.
    pub(crate) fn segment(&self, seg: SegReg) -> &Segment {
        &self.state.seg[seg as usize]
    }

    pub(crate) fn set_segment(&mut self, seg: SegReg, segment: Segment) {
        self.state.seg[seg as usize] = segment;
    }

    /// Linear address of a descriptor of `size` bytes, if the selector's table reaches that far.
    fn descriptor_address(&self, selector: u16, size: u64) -> Option<u64> {
        let index = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 == 0 {
            (self.state.gdtr.base, u64::from(self.state.gdtr.limit))
        } else if self.state.ldtr.usable() {
            (self.state.ldtr.base, u64::from(self.state.ldtr.limit))
        } else {
            return None;
        };
        (index + size - 1 <= limit).then(|| base.wrapping_add(index))
    }

    /// Reads an 8-byte descriptor; `outside` is raised if it lies beyond the table's limit.
    pub(crate) fn read_descriptor<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        outside: Exception,
    ) -> Result<Descriptor, Exception> {
        let address = self.descriptor_address(selector, 8).ok_or(outside)?;
        Ok(Descriptor { low: self.read_system(env, address, 8)?, high: 0 })
    }

    /// Reads the descriptor of an LDT, TSS or call gate, which has 16 bytes in long mode.
    pub(crate) fn read_system_descriptor<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        outside: Exception,
    ) -> Result<Descriptor, Exception> {
        if !self.in_long_mode() {
            return self.read_descriptor(env, selector, outside);
        }
        let address = self.descriptor_address(selector, 16).ok_or(outside)?;
        let low = self.read_system(env, address, 8)?;
        let high = self.read_system(env, address.wrapping_add(8), 8)?;
        Ok(Descriptor { low, high })
    }

    /// Sets and clears bits of the type field of a descriptor in memory, as one locked operation.
    fn update_type<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        set: u64,
        clear: u64,
    ) -> Result<(), Exception> {
        let Some(address) = self.descriptor_address(selector, 8) else { return Ok(()) };
        let address = self.mask_linear(address.wrapping_add(5));
        let mut update = |byte| byte & !clear | set;
        self.read_modify_write_linear(env, address, 1, true, Privilege::Supervisor, &mut update).map(|_| ())
    }

    /// Marks a code or data descriptor as accessed, in memory and in `descriptor`.
    pub(crate) fn set_accessed<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        descriptor: &mut Descriptor,
    ) -> Result<(), Exception> {
        if descriptor.kind() & 1 == 0 {
            self.update_type(env, selector, 1, 0)?;
            descriptor.low |= 1 << 40;
        }
        Ok(())
    }

    /// Marks a TSS descriptor in memory as busy or available.
    pub(crate) fn set_tss_busy<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        busy: bool,
    ) -> Result<(), Exception> {
        if busy { self.update_type(env, selector, BUSY, 0) } else { self.update_type(env, selector, 0, BUSY) }
    }

    /// Loads a segment register other than CS as MOV does, with all checks.
    pub fn load_segment<E: Env>(&mut self, env: &mut E, seg: SegReg, selector: u16) -> Result<(), Exception> {
        let segment = match self.state.mode() {
            Mode::Real => self.real_segment(seg, selector),
            Mode::Virtual8086 => virtual_8086_segment(selector),
            _ if seg == SegReg::Ss => {
                self.checked_stack_segment(env, selector, self.state.cpl, vector::GP)?
            }
            _ => self.checked_data_segment(env, selector, vector::GP)?,
        };
        self.set_segment(seg, segment);
        Ok(())
    }

    /// A segment register after a load in real mode: limit and rights stay as they were.
    pub(crate) fn real_segment(&self, seg: SegReg, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        let old = self.segment(seg);
        if old.usable() {
            Segment { base, selector, ..*old }
        } else {
            Segment { base, selector, limit: 0xffff, attributes: 0x93 }
        }
    }

    /// The segment that `selector` selects for SS at privilege level `cpl`, or the fault of trying: `fault` is
    /// the vector of the type and privilege faults (#GP, or #TS when the selector comes from a TSS).
    pub(crate) fn checked_stack_segment<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        cpl: u8,
        fault: u8,
    ) -> Result<Segment, Exception> {
        let failed = Exception::selector(fault, selector);
        if is_null(selector) {
            let allowed = self.in_64bit_mode() && cpl < 3 && rpl(selector) == cpl && fault == vector::GP;
            return if allowed { Ok(null_stack_segment(selector, cpl)) } else { Err(failed) };
        }
        let mut descriptor = self.read_descriptor(env, selector, failed)?;
        if rpl(selector) != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::SS, selector));
        }
        self.set_accessed(env, selector, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The segment that `selector` selects for DS, ES, FS or GS.
    pub(crate) fn checked_data_segment<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        fault: u8,
    ) -> Result<Segment, Exception> {
        if is_null(selector) {
            return Ok(null_segment(selector));
        }
        let failed = Exception::selector(fault, selector);
        let mut descriptor = self.read_descriptor(env, selector, failed)?;
        if !descriptor.is_readable() || !self.may_use(&descriptor, selector) {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        self.set_accessed(env, selector, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Whether CPL and RPL are privileged enough for a segment; conforming code is open to all.
    fn may_use(&self, descriptor: &Descriptor, selector: u16) -> bool {
        descriptor.is_conforming_code()
            || (descriptor.dpl() >= self.state.cpl && descriptor.dpl() >= rpl(selector))
    }

    /// Loads LDTR (LLDT; SDM Vol. 2A). `fault` is #GP, or #TS in a task switch, where a segment that is not
    /// present raises #TS too.
    pub(crate) fn load_ldtr<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        fault: u8,
    ) -> Result<(), Exception> {
        if is_null(selector) {
            self.state.ldtr = null_segment(selector);
            return Ok(());
        }
        let failed = Exception::selector(fault, selector);
        if selector & 4 != 0 {
            return Err(failed);
        }
        let descriptor = self.read_system_descriptor(env, selector, failed)?;
        let valid = descriptor.is_system()
            && descriptor.kind() == system_type::LDT
            && descriptor.upper_type_is_zero();
        if !valid {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(if fault == vector::TS { fault } else { vector::NP }, selector));
        }
        if !is_canonical(descriptor.base()) {
            return Err(failed);
        }
        self.state.ldtr = descriptor.segment(selector);
        Ok(())
    }

    /// LTR (SDM Vol. 2A).
    pub(crate) fn load_tr<E: Env>(&mut self, env: &mut E, selector: u16) -> Result<(), Exception> {
        if is_null(selector) {
            return Err(Exception::GP0);
        }
        let failed = Exception::selector(vector::GP, selector);
        if selector & 4 != 0 {
            return Err(failed);
        }
        let mut descriptor = self.read_system_descriptor(env, selector, failed)?;
        let available = match descriptor.kind() {
            system_type::TSS32 => true,
            system_type::TSS16 => !self.in_long_mode(),
            _ => false,
        };
        if !descriptor.is_system() || !available || !descriptor.upper_type_is_zero() {
            return Err(failed);
        }
        if !descriptor.present() {
            return Err(Exception::selector(vector::NP, selector));
        }
        if !is_canonical(descriptor.base()) {
            return Err(failed);
        }
        self.set_tss_busy(env, selector, true)?;
        descriptor.low |= BUSY << 40;
        self.state.tr = descriptor.segment(selector);
        Ok(())
    }

    /// LAR, LSL, VERR and VERW: the descriptor, if `selector` selects one that is visible at CPL and RPL.
    fn visible_descriptor<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
    ) -> Result<Option<Descriptor>, Exception> {
        let Some(address) = self.descriptor_address(selector, 8).filter(|_| !is_null(selector)) else {
            return Ok(None);
        };
        let descriptor = Descriptor { low: self.read_system(env, address, 8)?, high: 0 };
        Ok(self.may_use(&descriptor, selector).then_some(descriptor))
    }

    /// LAR: access rights, as bits 8 to 23 of a doubleword.
    pub(crate) fn access_rights<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
    ) -> Result<Option<u32>, Exception> {
        use system_type::{CALL_GATE16, CALL_GATE32, LDT, TASK_GATE, TSS16, TSS16_BUSY, TSS32, TSS32_BUSY};
        let Some(descriptor) = self.visible_descriptor(env, selector)? else { return Ok(None) };
        let valid = !descriptor.is_system()
            || match descriptor.kind() {
                LDT | TSS32 | TSS32_BUSY | CALL_GATE32 => true,
                TSS16 | TSS16_BUSY | CALL_GATE16 | TASK_GATE => !self.in_long_mode(),
                _ => false,
            };
        Ok(valid.then_some((descriptor.low >> 32) as u32 & 0x00ff_ff00))
    }

    /// LSL: limit in bytes.
    pub(crate) fn segment_limit<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
    ) -> Result<Option<u32>, Exception> {
        use system_type::{LDT, TSS16, TSS16_BUSY, TSS32, TSS32_BUSY};
        let Some(descriptor) = self.visible_descriptor(env, selector)? else { return Ok(None) };
        let valid = !descriptor.is_system()
            || match descriptor.kind() {
                LDT | TSS32 | TSS32_BUSY => true,
                TSS16 | TSS16_BUSY => !self.in_long_mode(),
                _ => false,
            };
        Ok(valid.then_some(descriptor.limit()))
    }

    /// VERR (`write` false) and VERW.
    pub(crate) fn verify_segment<E: Env>(
        &mut self,
        env: &mut E,
        selector: u16,
        write: bool,
    ) -> Result<bool, Exception> {
        let descriptor = self.visible_descriptor(env, selector)?;
        Ok(descriptor.is_some_and(|d| if write { d.is_writable_data() } else { d.is_readable() }))
    }

    /// After a return to an outer privilege level: segment registers that this level may not hold become null.
    pub(crate) fn drop_inner_segments(&mut self) {
        for seg in [SegReg::Es, SegReg::Fs, SegReg::Gs, SegReg::Ds] {
            let cpl = self.state.cpl;
            let segment = &mut self.state.seg[seg as usize];
            let conforming = segment.attributes & 0xc == 0xc;
            if is_null(segment.selector) || (!conforming && segment.dpl() < cpl) {
                // Base and limit stay: those of FS and GS count in 64-bit mode whatever the selector.
                segment.selector = 0;
                segment.attributes |= Segment::UNUSABLE;
            }
        }
    }

    /// Sets CS, with the given CPL as its RPL, and CPL.
    pub(crate) fn set_code_segment(&mut self, segment: Segment, cpl: u8) {
        self.state.cpl = cpl;
        let selector = segment.selector & !3 | u16::from(cpl);
        self.set_segment(SegReg::Cs, Segment { selector, ..segment });
    }

    /// I/O privilege level.
    pub(crate) fn iopl(&self) -> u8 {
        ((self.state.rflags & Rflags::IOPL.bits()) >> 12) as u8
    }
}

/// SS holding a null selector, as 64-bit mode allows below CPL 3. Its DPL is the CPL.
pub(crate) const fn null_stack_segment(selector: u16, cpl: u8) -> Segment {
    let segment = null_segment(selector);
    Segment { attributes: segment.attributes | (cpl as u16) << 5, ..segment }
}
