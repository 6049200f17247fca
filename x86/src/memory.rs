//! Virtual memory as instructions use it: segment:offset to linear to RAM or device, with the checks of every
//! step in the order of the manuals (SDM Vol. 3A, sections 5.3 to 5.5 and 6.15).
//!
//! An access that crosses a page is checked as a whole before its first byte is written. A *locked* access is
//! atomic when it lies in RAM and does not cross into a page that stands elsewhere in RAM; one that does, or
//! that reaches a device, is a read followed by a write, as if the bus lock of old were missing.

use crate::cpu::{Access, Cpu};
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::operand::truncate;
use crate::paging::Place;
use crate::registers::{Cr0, Efer, Rflags, gpr};
use crate::state::{SegReg, Segment};
use crate::tlb::{Privilege, permission};

const PAGE: u64 = 0x1000;

/// Whether bits 47 to 63 of an address are equal (4-level paging).
#[inline(always)]
pub const fn is_canonical(linear: u64) -> bool {
    linear.wrapping_add(1 << 47) >> 48 == 0
}

#[inline(always)]
pub(crate) fn load<E: Env>(env: &E, offset: u64, size: usize) -> u64 {
    match size {
        1 => env.load8(offset).into(),
        2 => env.load16(offset).into(),
        4 => env.load32(offset).into(),
        _ => env.load64(offset),
    }
}

#[inline(always)]
fn store<E: Env>(env: &E, offset: u64, size: usize, value: u64) {
    match size {
        1 => env.store8(offset, value as u8),
        2 => env.store16(offset, value as u16),
        4 => env.store32(offset, value as u32),
        _ => env.store64(offset, value),
    }
}

/// Loads bytes that do not cross a page. Of a device, in the largest aligned pieces.
fn load_bytes<E: Env>(env: &mut E, place: Place, to: &mut [u8]) {
    match place {
        Place::Ram(offset) => env.load_bytes(offset, to),
        Place::Mmio(mut gpa) => {
            let mut rest = to;
            while !rest.is_empty() {
                let size = piece(gpa, rest.len());
                let (now, later) = rest.split_at_mut(size);
                now.copy_from_slice(&env.mmio_read(gpa, size).to_le_bytes()[..size]);
                gpa = gpa.wrapping_add(size as u64);
                rest = later;
            }
        }
    }
}

/// Stores bytes that do not cross a page.
fn store_bytes<E: Env>(env: &mut E, place: Place, from: &[u8]) {
    match place {
        Place::Ram(offset) => env.store_bytes(offset, from),
        Place::Mmio(mut gpa) => {
            let mut rest = from;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(piece(gpa, rest.len()));
                let mut value = [0; 8];
                value[..now.len()].copy_from_slice(now);
                env.mmio_write(gpa, now.len(), u64::from_le_bytes(value));
                gpa = gpa.wrapping_add(now.len() as u64);
                rest = later;
            }
        }
    }
}

/// Size of the next access to a device: the largest power of two up to 8 that fits and is aligned.
fn piece(gpa: u64, left: usize) -> usize {
    let mut size = 8;
    while size > left || !gpa.is_multiple_of(size as u64) {
        size /= 2;
    }
    size
}

/// The places of an access that may cross a page: the first has `first` bytes.
struct Span {
    places: [Place; 2],
    first: usize,
}

impl Span {
    fn load<E: Env>(&self, env: &mut E, to: &mut [u8]) {
        let (low, high) = to.split_at_mut(self.first.min(to.len()));
        load_bytes(env, self.places[0], low);
        if !high.is_empty() {
            load_bytes(env, self.places[1], high);
        }
    }
    fn store<E: Env>(&self, env: &mut E, from: &[u8]) {
        let (low, high) = from.split_at(self.first.min(from.len()));
        store_bytes(env, self.places[0], low);
        if !high.is_empty() {
            store_bytes(env, self.places[1], high);
        }
    }
    /// Offset in RAM, if all bytes are contiguous there.
    fn contiguous(&self, size: usize) -> Option<u64> {
        match self.places {
            [Place::Ram(low), _] if size <= self.first => Some(low),
            [Place::Ram(low), Place::Ram(high)] if low + self.first as u64 == high => Some(low),
            _ => None,
        }
    }
}

impl Cpu {
    /// Whether the processor is in 64-bit mode.
    #[inline(always)]
    pub fn in_64bit_mode(&self) -> bool {
        self.state.msr.efer & Efer::LMA.bits() != 0
            && self.state.seg[SegReg::Cs as usize].attributes & Segment::L != 0
    }

    /// Whether the processor is in long mode (64-bit or compatibility).
    #[inline(always)]
    pub fn in_long_mode(&self) -> bool {
        self.state.msr.efer & Efer::LMA.bits() != 0
    }

    /// Linear address of `size` bytes at segment:offset, with limit, type and canonicality checks: #GP(0), or
    /// #SS(0) for the stack segment.
    #[inline(always)]
    pub fn checked_address(
        &self,
        seg: SegReg,
        offset: u64,
        size: usize,
        access: Access,
    ) -> Result<u64, Exception> {
        if !self.in_64bit_mode() {
            return self.checked_address_legacy(seg, offset, size, access);
        }
        let linear = match seg {
            SegReg::Fs | SegReg::Gs => offset.wrapping_add(self.state.seg[seg as usize].base),
            _ => offset,
        };
        if is_canonical(linear) && is_canonical(linear.wrapping_add(size as u64).wrapping_sub(1)) {
            Ok(linear)
        } else {
            Err(Self::segment_fault(seg))
        }
    }

    fn segment_fault(seg: SegReg) -> Exception {
        if seg == SegReg::Ss { Exception::SS0 } else { Exception::GP0 }
    }

    fn checked_address_legacy(
        &self,
        seg: SegReg,
        offset: u64,
        size: usize,
        access: Access,
    ) -> Result<u64, Exception> {
        let segment = &self.state.seg[seg as usize];
        if segment_allows(segment, offset, size, access, self.is_protected()) {
            Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(Self::segment_fault(seg))
        }
    }

    /// Whether segment types count: protected mode, not virtual-8086.
    #[inline(always)]
    pub fn is_protected(&self) -> bool {
        self.state.cr0_has(Cr0::PE) && !self.state.has_flags(Rflags::VM)
    }

    #[inline(always)]
    pub(crate) fn alignment_checked(&self) -> bool {
        self.state.cpl == 3 && self.state.has_flags(Rflags::AC) && self.state.cr0_has(Cr0::AM)
    }

    /// #AC(0) if an access of this size must be aligned and is not.
    #[inline(always)]
    pub(crate) fn check_alignment(&self, linear: u64, size: usize) -> Result<(), Exception> {
        if linear & (size as u64 - 1) != 0 && self.alignment_checked() {
            return Err(Exception::AC0);
        }
        Ok(())
    }

    /// The places of `size` bytes (at most a page) at a linear address.
    fn span<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
        access: Access,
        privilege: Privilege,
    ) -> Result<Span, Exception> {
        self.note_data_access(linear, size, access);
        let low = self.place(env, linear, access, privilege)?;
        let first = (PAGE - (linear & (PAGE - 1))) as usize;
        if size <= first {
            return Ok(Span { places: [low; 2], first });
        }
        let next = self.mask_linear(linear.wrapping_add(first as u64));
        let high = self.place(env, next, access, privilege)?;
        Ok(Span { places: [low, high], first })
    }

    /// Outside long mode a linear address has 32 bits.
    #[inline(always)]
    pub(crate) fn mask_linear(&self, linear: u64) -> u64 {
        if self.in_long_mode() { linear } else { linear & 0xffff_ffff }
    }

    /// Offset in RAM of an access in 64-bit mode that needs no further check: within a page that the TLB knows with
    /// this permission (so its address is canonical), and aligned if it must be.
    #[inline(always)]
    fn quick_offset(&self, seg: SegReg, offset: u64, size: usize, access: Access) -> Option<u64> {
        if !self.in_64bit_mode() {
            return None;
        }
        let linear = match seg {
            SegReg::Fs | SegReg::Gs => offset.wrapping_add(self.state.seg[seg as usize].base),
            _ => offset,
        };
        let unaligned = linear & (size as u64 - 1) != 0;
        if unaligned && (linear & (PAGE - 1) > PAGE - size as u64 || self.alignment_checked()) {
            return None;
        }
        self.tlb.lookup(linear, permission(access, self.privilege()))
    }

    /// Reads `size` (1, 2, 4, 8) bytes at segment:offset, with limit, canonicality, alignment and page checks.
    #[inline(always)]
    pub fn read<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        match self.quick_offset(seg, offset, size, Access::Read) {
            Some(ram) => Ok(load(env, ram, size)),
            None => self.read_checked(env, seg, offset, size),
        }
    }

    #[inline(never)]
    fn read_checked<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let linear = self.checked_address(seg, offset, size, Access::Read)?;
        self.check_alignment(linear, size)?;
        self.read_linear(env, linear, size, self.privilege())
    }

    /// Reads `size` (1, 2, 4, 8) bytes at a linear address.
    #[inline]
    pub(crate) fn read_linear<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<u64, Exception> {
        if linear & (PAGE - 1) <= PAGE - size as u64
            && let Some(offset) = self.tlb.lookup(linear, permission(Access::Read, privilege))
        {
            return Ok(load(env, offset, size));
        }
        self.read_linear_slow(env, linear, size, privilege)
    }

    #[cold]
    #[inline(never)]
    fn read_linear_slow<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<u64, Exception> {
        let span = self.span(env, linear, size, Access::Read, privilege)?;
        match span.places[0] {
            Place::Mmio(gpa) if size <= span.first => return Ok(env.mmio_read(gpa, size)),
            Place::Ram(offset) if size <= span.first => return Ok(load(env, offset, size)),
            _ => {}
        }
        let mut value = [0; 8];
        span.load(env, &mut value[..size.min(8)]);
        Ok(u64::from_le_bytes(value))
    }

    /// Writes `size` bytes at segment:offset. Nothing is written if any byte faults.
    #[inline(always)]
    pub fn write<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        size: usize,
        value: u64,
    ) -> Result<(), Exception> {
        match self.quick_offset(seg, offset, size, Access::Write) {
            Some(ram) => {
                store(env, ram, size, value);
                Ok(())
            }
            None => self.write_checked(env, seg, offset, size, value),
        }
    }

    #[inline(never)]
    fn write_checked<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        size: usize,
        value: u64,
    ) -> Result<(), Exception> {
        let linear = self.checked_address(seg, offset, size, Access::Write)?;
        self.check_alignment(linear, size)?;
        self.write_linear(env, linear, size, value, self.privilege())
    }

    /// Writes `size` (1, 2, 4, 8) bytes at a linear address.
    #[inline]
    pub(crate) fn write_linear<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
        value: u64,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        if linear & (PAGE - 1) <= PAGE - size as u64
            && let Some(offset) = self.tlb.lookup(linear, permission(Access::Write, privilege))
        {
            store(env, offset, size, value);
            return Ok(());
        }
        self.write_linear_slow(env, linear, size, value, privilege)
    }

    #[cold]
    #[inline(never)]
    fn write_linear_slow<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
        value: u64,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        let span = self.span(env, linear, size, Access::Write, privilege)?;
        match span.places[0] {
            Place::Mmio(gpa) if size <= span.first => env.mmio_write(gpa, size, truncate(value, size)),
            Place::Ram(offset) if size <= span.first => store(env, offset, size, value),
            _ => span.store(env, &value.to_le_bytes()[..size.min(8)]),
        }
        Ok(())
    }

    /// Reads bytes (up to a page) at segment:offset. Without an alignment check: instructions with operands of
    /// more than 8 bytes have rules of their own.
    pub fn read_bytes<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        to: &mut [u8],
    ) -> Result<(), Exception> {
        if to.is_empty() {
            return Ok(());
        }
        let linear = self.checked_address(seg, offset, to.len(), Access::Read)?;
        let span = self.span(env, linear, to.len(), Access::Read, self.privilege())?;
        span.load(env, to);
        Ok(())
    }

    /// Writes bytes (up to a page). Nothing is written if any byte faults.
    pub fn write_bytes<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        from: &[u8],
    ) -> Result<(), Exception> {
        if from.is_empty() {
            return Ok(());
        }
        let linear = self.checked_address(seg, offset, from.len(), Access::Write)?;
        let span = self.span(env, linear, from.len(), Access::Write, self.privilege())?;
        span.store(env, from);
        Ok(())
    }

    /// Does all checks of a write of `size` bytes (up to a page) without writing.
    pub fn check_write<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        size: usize,
    ) -> Result<(), Exception> {
        let linear = self.checked_address(seg, offset, size, Access::Write)?;
        self.span(env, linear, size, Access::Write, self.privilege()).map(|_| ())
    }

    /// Atomic or plain read-modify-write of `size` bytes: `update` maps the old value to the new; returns
    /// the old one. With `locked` it is one atomic operation (`update` may then be called again). The write
    /// permission is checked before the read.
    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    pub fn read_modify_write<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        size: usize,
        locked: bool,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        if let Some(ram) = self.quick_offset(seg, offset, size, Access::Write)
            && !locked
        {
            let old = load(env, ram, size);
            store(env, ram, size, update(old));
            return Ok(old);
        }
        self.read_modify_write_checked(env, seg, offset, size, locked, update)
    }

    #[inline(never)]
    fn read_modify_write_checked<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        size: usize,
        locked: bool,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        // A segment that may be written may be read.
        let linear = self.checked_address(seg, offset, size, Access::Write)?;
        self.check_alignment(linear, size)?;
        self.read_modify_write_linear(env, linear, size, locked, self.privilege(), update)
    }

    /// The same at a linear address.
    pub(crate) fn read_modify_write_linear<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
        locked: bool,
        privilege: Privilege,
        update: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        let span = self.span(env, linear, size, Access::Write, privilege)?;
        match span.contiguous(size) {
            Some(offset) if locked => {
                let mut old = [0; 8];
                span.load(env, &mut old[..size.min(8)]);
                let mut old = u64::from_le_bytes(old);
                loop {
                    let seen = env.compare_exchange(offset, size, old, update(old));
                    if seen == old {
                        return Ok(old);
                    }
                    old = seen;
                }
            }
            Some(offset) if size <= span.first => {
                let old = load(env, offset, size);
                store(env, offset, size, update(old));
                Ok(old)
            }
            _ => {
                let mut old = [0; 8];
                span.load(env, &mut old[..size.min(8)]);
                let old = u64::from_le_bytes(old);
                span.store(env, &update(old).to_le_bytes()[..size.min(8)]);
                Ok(old)
            }
        }
    }

    /// The same for 16 bytes (CMPXCHG16B): #GP(0) if not aligned.
    pub fn read_modify_write128<E: Env>(
        &mut self,
        env: &mut E,
        seg: SegReg,
        offset: u64,
        update: &mut dyn FnMut(u128) -> u128,
    ) -> Result<u128, Exception> {
        let linear = self.checked_address(seg, offset, 16, Access::Write)?;
        if linear & 15 != 0 {
            return Err(Exception::GP0);
        }
        self.note_data_access(linear, 16, Access::Write);
        let place = self.place(env, linear, Access::Write, self.privilege())?;
        let mut old = [0; 16];
        load_bytes(env, place, &mut old);
        let mut old = u128::from_le_bytes(old);
        let Place::Ram(offset) = place else {
            store_bytes(env, place, &update(old).to_le_bytes());
            return Ok(old);
        };
        loop {
            let seen = env.compare_exchange128(offset, old, update(old));
            if seen == old {
                return Ok(old);
            }
            old = seen;
        }
    }

    // ---- the stack ----

    /// The bits of RSP that stack operations use: 16, 32 or 64 (SDM Vol. 1, section 6.2.3).
    #[inline(always)]
    pub fn stack_mask(&self) -> u64 {
        if self.in_64bit_mode() {
            u64::MAX
        } else if self.state.seg[SegReg::Ss as usize].attributes & Segment::DB != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the part of RSP that stack operations use.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let rsp = &mut self.state.gpr[gpr::RSP];
        *rsp = if mask == 0xffff { *rsp & !mask | value & mask } else { value & mask };
    }

    /// Pushes `size` (2, 4, 8) bytes on the stack; RSP changes only on success.
    #[inline]
    pub fn push<E: Env>(&mut self, env: &mut E, size: usize, value: u64) -> Result<(), Exception> {
        let sp = self.state.gpr[gpr::RSP].wrapping_sub(size as u64) & self.stack_mask();
        self.write(env, SegReg::Ss, sp, size, value)?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// Pops `size` bytes; RSP changes only on success.
    #[inline]
    pub fn pop<E: Env>(&mut self, env: &mut E, size: usize) -> Result<u64, Exception> {
        let sp = self.state.gpr[gpr::RSP] & self.stack_mask();
        let value = self.read(env, SegReg::Ss, sp, size)?;
        self.set_stack_pointer(sp.wrapping_add(size as u64));
        Ok(value)
    }

    // ---- implicit accesses to descriptor tables and task-state segments ----

    /// Reads 1, 2, 4 or 8 bytes of a system structure: a supervisor access whatever the CPL, never excused from
    /// SMAP by RFLAGS.AC (SDM Vol. 3A, section 4.6.1).
    pub(crate) fn read_system<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let linear = self.mask_linear(linear);
        self.read_linear(env, linear, size, Privilege::Supervisor)
    }

    /// Writes 1, 2, 4 or 8 bytes of a system structure.
    pub(crate) fn write_system<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        size: usize,
        value: u64,
    ) -> Result<(), Exception> {
        let linear = self.mask_linear(linear);
        self.write_linear(env, linear, size, value, Privilege::Supervisor)
    }

    // ---- instruction fetch ----

    /// Linear address of the instruction at `rip` in the current code segment, without checks.
    #[inline(always)]
    pub fn code_address(&self, rip: u64) -> u64 {
        if self.in_64bit_mode() {
            rip
        } else {
            self.state.seg[SegReg::Cs as usize].base.wrapping_add(rip) & 0xffff_ffff
        }
    }

    /// Where the instruction byte at a linear address ([`Cpu::code_address`]) stands: #PF, or #GP(0) if the
    /// address is not canonical. The limit of CS is not checked.
    #[inline]
    pub fn translate_fetch<E: Env>(&mut self, env: &mut E, linear: u64) -> Result<Place, Exception> {
        if !is_canonical(linear) {
            return Err(Exception::GP0);
        }
        self.place(env, linear, Access::Execute, self.privilege())
    }

    /// How many bytes, up to 15, lie between `rip` and the end of the code segment.
    pub fn fetch_limit(&self, rip: u64) -> usize {
        if self.in_64bit_mode() {
            return 15;
        }
        match u64::from(self.state.seg[SegReg::Cs as usize].limit).checked_sub(rip) {
            Some(left) => (left as usize).saturating_add(1).min(15),
            None => 0,
        }
    }

    /// Fetches up to 15 bytes of the instruction at `rip`, across a page boundary or from a device. Returns how
    /// many there are, and if those are fewer than 15, what to raise should the instruction need more.
    pub fn fetch<E: Env>(&mut self, env: &mut E, rip: u64, to: &mut [u8; 15]) -> (usize, Option<Exception>) {
        let limit = self.fetch_limit(rip);
        let mut count = 0;
        while count < limit {
            let linear = self.code_address(rip.wrapping_add(count as u64));
            let place = match self.translate_fetch(env, linear) {
                Ok(place) => place,
                Err(exception) => return (count, Some(exception)),
            };
            let end = limit.min(count + (PAGE - (linear & (PAGE - 1))) as usize);
            load_bytes(env, place, &mut to[count..end]);
            count = end;
        }
        (count, if count < 15 { Some(Exception::GP0) } else { None })
    }
}

/// Whether a segment outside 64-bit mode allows an access (SDM Vol. 3A, sections 5.3 to 5.5). `protected`: its
/// type counts.
fn segment_allows(segment: &Segment, offset: u64, size: usize, access: Access, protected: bool) -> bool {
    let code = segment.attributes & 8 != 0;
    let second_type_bit = segment.attributes & 2 != 0;
    if protected {
        let typed = match access {
            Access::Read => !code || second_type_bit,
            Access::Write => !code && second_type_bit,
            Access::Execute => code,
        };
        if !typed || !segment.usable() {
            return false;
        }
    }
    let last = offset.wrapping_add(size as u64).wrapping_sub(1);
    let limit = u64::from(segment.limit);
    if !code && segment.attributes & 4 != 0 {
        let top = if segment.attributes & Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exception::vector;
    use crate::registers::Cr4;
    use crate::testing::{Machine, at, sel};

    /// 64-bit mode, where 0x4000_0000 maps RAM 0x9000, the next page maps `next`, in 4 KiB pages.
    fn two_pages(next: u64) -> Machine {
        let machine = Machine::long();
        machine.env.store64(at::PAGES + 0x1008, at::PAGES + 0x2000 | 7);
        machine.env.store64(at::PAGES + 0x2000, at::PAGES + 0x3000 | 7);
        machine.env.store64(at::PAGES + 0x3000, 0x9007);
        machine.env.store64(at::PAGES + 0x3008, next);
        machine
    }

    const END: u64 = 0x4000_0ffc;

    #[test]
    fn an_access_may_cross_into_a_page_elsewhere() {
        let mut machine = two_pages(0xb007);
        let Machine { cpu, env } = &mut machine;
        cpu.write(env, SegReg::Ds, END, 8, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(env.load32(0x9ffc), 0x5566_7788);
        assert_eq!(env.load32(0xb000), 0x1122_3344);
        assert_eq!(cpu.read(env, SegReg::Ds, END, 8), Ok(0x1122_3344_5566_7788));
        let old = cpu.read_modify_write(env, SegReg::Ds, END, 8, true, &mut |v| v + 1).unwrap();
        assert_eq!(old, 0x1122_3344_5566_7788);
        assert_eq!(env.load32(0x9ffc), 0x5566_7789);
    }

    #[test]
    fn nothing_is_written_if_the_second_page_faults() {
        let mut machine = two_pages(0);
        let Machine { cpu, env } = &mut machine;
        let fault = Err(Exception::page_fault(0x4000_1000, 2));
        assert_eq!(cpu.write(env, SegReg::Ds, END, 8, 1), fault);
        assert_eq!(cpu.write_bytes(env, SegReg::Ds, END, &[1; 32]), fault);
        assert_eq!(cpu.read_modify_write(env, SegReg::Ds, END, 8, true, &mut |v| v + 1).map(|_| ()), fault);
        assert_eq!(env.load32(0x9ffc), 0);
        assert_eq!(cpu.check_write(env, SegReg::Ds, END, 4), Ok(()));
        assert_eq!(cpu.check_write(env, SegReg::Ds, END, 5), fault);
    }

    #[test]
    fn devices_see_the_access_as_it_is_made() {
        let mut machine = two_pages(0xfee0_0007);
        let Machine { cpu, env } = &mut machine;
        env.mmio.insert(0xfee0_0020, 0x1234_5678);
        assert_eq!(cpu.read(env, SegReg::Ds, 0x4000_1020, 4), Ok(0x1234_5678));
        cpu.write(env, SegReg::Ds, 0x4000_1030, 2, 0xabcd_ef01).unwrap();
        assert_eq!(env.mmio_writes, [(0xfee0_0030, 2, 0xef01)]);
        env.mmio_writes.clear();
        cpu.write(env, SegReg::Ds, 0x4000_0ffd, 8, 0x8877_6655_4433_2211).unwrap();
        assert_eq!(env.get(0x9ffd), [0x11, 0x22, 0x33]);
        assert_eq!(env.mmio_writes, [(0xfee0_0000, 4, 0x7766_5544), (0xfee0_0004, 1, 0x88)]);
    }

    #[test]
    fn canonical_addresses() {
        let mut machine = two_pages(0xb007);
        let Machine { cpu, env } = &mut machine;
        assert_eq!(cpu.read(env, SegReg::Ds, 0x8000_0000_0000, 1), Err(Exception::GP0));
        assert_eq!(cpu.read(env, SegReg::Ss, 0x7fff_ffff_ffff, 2), Err(Exception::SS0));
        assert_eq!(cpu.read(env, SegReg::Gs, u64::MAX << 47, 1).unwrap_err().vector, vector::PF);
        cpu.state.seg[SegReg::Fs as usize].base = 0x4000_0000;
        cpu.state.seg[SegReg::Ds as usize].base = 0x4000_0000;
        env.store8(0x9010, 7);
        assert_eq!(cpu.read(env, SegReg::Fs, 0x10, 1), Ok(7));
        assert_eq!(cpu.read(env, SegReg::Ds, 0x10, 1), Ok(0), "the base of DS does not count");
    }

    #[test]
    fn limits_and_types_of_segments() {
        let mut machine = Machine::protected();
        let Machine { cpu, env } = &mut machine;
        let segment = |limit, attributes| Segment { base: 0x100, limit, selector: 8, attributes };
        let mut check = |attributes: u16, limit: u32, offset: u64, size: usize, access: Access| {
            cpu.state.seg[SegReg::Ds as usize] = segment(limit, attributes);
            cpu.checked_address(SegReg::Ds, offset, size, access)
        };
        let fault = Err(Exception::GP0);
        assert_eq!(check(0x93, 0xf, 0xc, 4, Access::Read), Ok(0x10c));
        assert_eq!(check(0x93, 0xf, 0xd, 4, Access::Read), fault);
        assert_eq!(check(0x93, 0xf, 0xffff_fffd, 4, Access::Read), fault);
        assert_eq!(check(0x91, 0xf, 0, 4, Access::Write), fault, "read-only");
        assert_eq!(check(0x9b, 0xf, 0, 4, Access::Write), fault, "code");
        assert_eq!(check(0x9b, 0xf, 0, 4, Access::Read), Ok(0x100));
        assert_eq!(check(0x99, 0xf, 0, 4, Access::Read), fault, "execute-only");
        assert_eq!(check(0x97, 0xf, 0xf, 1, Access::Read), fault, "expand-down");
        assert_eq!(check(0x97, 0xf, 0x10, 1, Access::Read), Ok(0x110));
        assert_eq!(check(0x97, 0xf, 0xffff, 2, Access::Read), fault, "16-bit expand-down");
        assert_eq!(check(0x97 | Segment::DB, 0xf, 0xffff, 2, Access::Read), Ok(0x1_00ff));
        assert_eq!(check(Segment::UNUSABLE, 0xf, 0, 1, Access::Read), fault);
        cpu.state.seg[SegReg::Ss as usize].limit = 0;
        assert_eq!(cpu.read(env, SegReg::Ss, 1, 1), Err(Exception::SS0));
    }

    #[test]
    fn alignment_is_checked_in_user_mode_only() {
        let mut machine = two_pages(0xb007);
        machine.cpu.state.cr0 |= Cr0::AM.bits();
        machine.cpu.state.rflags |= Rflags::AC.bits();
        let Machine { cpu, env } = &mut machine;
        assert!(cpu.read(env, SegReg::Ds, 0x4000_0001, 4).is_ok());
        cpu.state.cpl = 3;
        assert_eq!(cpu.read(env, SegReg::Ds, 0x4000_0001, 4), Err(Exception::AC0));
        assert!(cpu.read(env, SegReg::Ds, 0x4000_0002, 2).is_ok());
        assert_eq!(cpu.push(env, 8, 0).map(|()| cpu.state.gpr[gpr::RSP]), Ok(0x6ff8));
    }

    #[test]
    fn implicit_accesses_are_not_excused_from_smap() {
        let mut machine = Machine::long();
        machine.cpu.state.cr4 |= Cr4::SMAP.bits();
        machine.cpu.state.rflags |= Rflags::AC.bits();
        machine.cpu.state_changed();
        let Machine { cpu, env } = &mut machine;
        assert!(cpu.read(env, SegReg::Ds, 0x1000, 1).is_ok());
        assert_eq!(cpu.read_system(env, 0x1000, 1), Err(Exception::page_fault(0x1000, 1)));
    }

    #[test]
    fn the_stack_wraps_at_its_own_size() {
        let mut machine = Machine::protected();
        machine.cpu.state.seg[SegReg::Ss as usize] =
            Segment { base: 0x2_0000, limit: 0xffff, selector: sel::DATA, attributes: 0x93 };
        machine.cpu.state.gpr[gpr::RSP] = 0x1234_0000;
        let Machine { cpu, env } = &mut machine;
        cpu.push(env, 2, 0xabcd).unwrap();
        assert_eq!(cpu.state.gpr[gpr::RSP], 0x1234_fffe);
        assert_eq!(env.load16(0x2_fffe), 0xabcd);
        assert_eq!(cpu.pop(env, 2), Ok(0xabcd));
        assert_eq!(cpu.state.gpr[gpr::RSP], 0x1234_0000);
    }

    #[test]
    fn fetching_stops_at_what_is_not_there() {
        let mut machine = two_pages(0);
        let Machine { cpu, env } = &mut machine;
        env.put(0x9ffc, &[1, 2, 3, 4]);
        let mut bytes = [0; 15];
        let (count, fault) = cpu.fetch(env, END, &mut bytes);
        assert_eq!((count, &bytes[..4]), (4, &[1, 2, 3, 4][..]));
        assert_eq!(fault, Some(Exception::page_fault(0x4000_1000, 0x10)));
        assert_eq!(cpu.fetch(env, 0x8000_0000_0000, &mut bytes), (0, Some(Exception::GP0)));
        assert_eq!(cpu.fetch(env, 0x4000_0ff1, &mut bytes), (15, None));

        let mut machine = Machine::protected();
        let Machine { cpu, env } = &mut machine;
        cpu.state.seg[SegReg::Cs as usize].limit = 0x5003;
        assert_eq!(cpu.fetch(env, 0x5000, &mut bytes), (4, Some(Exception::GP0)));
        assert_eq!(cpu.fetch(env, 0x5004, &mut bytes), (0, Some(Exception::GP0)));
    }
}
