//! Paging: 2-level, PAE and 4-level translation with accessed and dirty flags (SDM Vol. 3A, chapter 4; APM
//! Vol. 2, chapter 5).

use crate::cpu::{Access, Cpu};
use crate::env::Env;
use crate::exception::Exception;
use crate::memory::is_canonical;
use crate::registers::{Cr0, Cr4, Efer, Rflags};
use crate::tlb::{self, Privilege, TlbChanges, permission};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 12 to 51: the address in an 8-byte entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of the page-fault error code (SDM Vol. 3A, section 4.7).
mod fault_code {
    pub const PROTECTION: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
}

/// Where a byte of guest-physical memory stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In RAM, at this offset.
    Ram(u64),
    /// Elsewhere: a device or nothing, at this guest-physical address.
    Mmio(u64),
}

/// Why a walk found no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WalkFault {
    NotPresent,
    ReservedBit,
}

/// One paging-structure entry that a walk has used.
#[derive(Clone, Copy, Default)]
struct Step {
    /// Offset in RAM, or `None` where the entry is not in RAM (then it can't be updated).
    offset: Option<u64>,
    value: u64,
}

/// A page that a walk has found.
struct Walk {
    /// Guest-physical address of the 4 KiB that hold the linear address.
    gpa: u64,
    user: bool,
    writable: bool,
    no_execute: bool,
    global: bool,
    /// [`tlb::LARGE`], [`tlb::GIANT`] or nothing.
    size_flag: u64,
    /// Bytes per entry.
    entry_size: usize,
    steps: [Step; 4],
    depth: usize,
}

impl Walk {
    fn new(entry_size: usize) -> Self {
        Self {
            gpa: 0,
            user: true,
            writable: true,
            no_execute: false,
            global: false,
            size_flag: 0,
            entry_size,
            steps: [Step::default(); 4],
            depth: 0,
        }
    }

    /// Loads the entry at this guest-physical address and takes its rights into account. Where no RAM is, all
    /// ones are read.
    fn step<E: Env>(&mut self, env: &E, gpa: u64) -> Result<u64, WalkFault> {
        let offset = env.ram_page(gpa & !0xfff).map(|page| page | gpa & 0xfff);
        let value = match offset {
            Some(offset) if self.entry_size == 8 => env.load64(offset),
            Some(offset) => env.load32(offset).into(),
            None if self.entry_size == 8 => u64::MAX,
            None => u32::MAX.into(),
        };
        if value & PRESENT == 0 {
            return Err(WalkFault::NotPresent);
        }
        self.user &= value & USER != 0;
        self.writable &= value & WRITABLE != 0;
        self.no_execute |= value & NO_EXECUTE != 0;
        if let Some(step) = self.steps.get_mut(self.depth) {
            *step = Step { offset, value };
        }
        self.depth += 1;
        Ok(value)
    }

    /// The entry with value `entry` maps the page.
    fn finish(mut self, entry: u64, gpa: u64, size_flag: u64) -> Self {
        self.gpa = gpa & !0xfff;
        self.global = entry & GLOBAL != 0;
        self.size_flag = size_flag;
        self
    }

    /// Sets accessed flags, and the dirty flag for a write. False if an entry was changed by somebody else
    /// meanwhile: walk again.
    fn update_flags<E: Env>(&mut self, env: &E, write: bool) -> bool {
        let leaf = self.depth.wrapping_sub(1);
        let entry_size = self.entry_size;
        for (level, step) in self.steps.iter_mut().enumerate().take(self.depth) {
            let flags = ACCESSED | if write && level == leaf { DIRTY } else { 0 };
            let new = step.value | flags;
            let Some(offset) = step.offset else { continue };
            if new != step.value {
                if env.compare_exchange(offset, entry_size, step.value, new) != step.value {
                    return false;
                }
                step.value = new;
            }
        }
        true
    }

    fn accessed(&self) -> bool {
        self.steps.iter().take(self.depth).all(|step| step.value & ACCESSED != 0)
    }

    fn dirty(&self) -> bool {
        self.depth.checked_sub(1).and_then(|leaf| self.steps.get(leaf)).is_some_and(|s| s.value & DIRTY != 0)
    }
}

impl Cpu {
    /// The PCID in use: 0 unless CR4.PCIDE is set.
    pub fn pcid(&self) -> u16 {
        if self.state.cr4_has(Cr4::PCIDE) { (self.state.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Drops all cached translations, global ones too. To be called after every change of CR0.PG or WP, of
    /// CR4's paging bits, and of EFER.NXE or LMA.
    pub fn flush_tlb(&mut self) {
        let pcid = self.pcid();
        self.tlb.flush_all(pcid);
    }

    /// Drops the cached translations of the current PCID, except global ones.
    pub(crate) fn flush_tlb_non_global(&mut self) {
        let pcid = self.pcid();
        self.tlb.flush_pcid(pcid, pcid);
    }

    /// Drops the translations of a linear address, as INVLPG does.
    pub fn flush_tlb_page(&mut self, linear: u64) {
        self.tlb.flush_page(linear);
    }

    /// INVPCID (SDM Vol. 2A) of a type and descriptor that have been checked: 0 one address of a PCID, 1 a PCID,
    /// 2 everything, 3 everything but global translations.
    pub fn invalidate_pcid(&mut self, kind: u64, pcid: u16, linear: u64) {
        let current = self.pcid();
        match kind {
            0 => self.tlb.flush_page(linear),
            1 => self.tlb.flush_pcid(pcid, current),
            2 => self.tlb.flush_all(current),
            _ => self.tlb.flush_non_global(current),
        }
    }

    /// Loads CR3 as MOV does: #GP(0) for reserved bits or bad PDPTEs (PAE), then the translations of the PCID
    /// are dropped, unless bit 63 of the value asks to keep them (with CR4.PCIDE).
    pub fn load_cr3<E: Env>(&mut self, env: &mut E, value: u64) -> Result<(), Exception> {
        let pcide = self.state.cr4_has(Cr4::PCIDE);
        let keep = pcide && value >> 63 != 0;
        let value = if pcide { value & !(1 << 63) } else { value };
        if value & !self.physical_mask() & !0xfff != 0 {
            return Err(Exception::GP0);
        }
        if self.state.cr0_has(Cr0::PG) && self.uses_pdptes(self.state.cr4) {
            self.state.pdpte = self.read_pdptes(env, value)?;
        }
        self.state.cr3 = value;
        if keep {
            self.tlb.select(self.pcid());
        } else {
            self.flush_tlb_non_global();
        }
        Ok(())
    }

    /// Whether, with this CR4 and paging on, translation starts from the four PDPTEs kept in the processor.
    pub fn uses_pdptes(&self, cr4: u64) -> bool {
        cr4 & Cr4::PAE.bits() != 0 && self.state.msr.efer & Efer::LMA.bits() == 0
    }

    /// Reads the four page-directory-pointer entries of PAE paging (SDM Vol. 3A, section 4.4.1); #GP(0) if a
    /// present one has a reserved bit set. For writes to CR0 and CR4; [`Cpu::load_cr3`] does it by itself.
    pub fn read_pdptes<E: Env>(&self, env: &E, cr3: u64) -> Result<[u64; 4], Exception> {
        let base = cr3 & 0xffff_ffe0;
        let Some(page) = env.ram_page(base & !0xfff) else { return Err(Exception::GP0) };
        // Bits 1, 2, 5 to 8 and those above the physical address.
        let reserved = 0x1e6 | !(self.physical_mask() | 0xfff);
        let mut pdptes = [0; 4];
        for (offset, pdpte) in (page | base & 0xfff..).step_by(8).zip(&mut pdptes) {
            *pdpte = env.load64(offset);
            if *pdpte & PRESENT != 0 && *pdpte & reserved != 0 {
                return Err(Exception::GP0);
            }
        }
        Ok(pdptes)
    }

    /// For whom an explicit access of the current instruction is made.
    #[inline(always)]
    pub(crate) fn privilege(&self) -> Privilege {
        if self.state.cpl == 3 {
            Privilege::User
        } else if self.state.rflags & Rflags::AC.bits() != 0 {
            Privilege::SupervisorAc
        } else {
            Privilege::Supervisor
        }
    }

    /// Where the byte at a linear address stands, with permission checks.
    #[inline(always)]
    pub(crate) fn place<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Place, Exception> {
        match self.tlb.lookup(linear, permission(access, privilege)) {
            Some(offset) => Ok(Place::Ram(offset)),
            None => self.place_slow(env, linear, access, privilege),
        }
    }

    /// [`Cpu::place`] past the TLB.
    #[cold]
    #[inline(never)]
    pub(crate) fn place_slow<E: Env>(
        &mut self,
        env: &mut E,
        linear: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Place, Exception> {
        self.went_past_tlb = true;
        let wanted = permission(access, privilege);
        if let Some(offset) = self.tlb.lookup_global(linear, wanted) {
            return Ok(Place::Ram(offset));
        }
        if self.in_long_mode() && !is_canonical(linear) {
            // Segment-relative addresses are checked before: this one lies in a descriptor table or TSS that
            // reaches beyond. No such address may enter the TLB, since a hit counts as canonical.
            return Err(Exception::GP0);
        }
        if !self.state.cr0_has(Cr0::PG) {
            let linear = linear & 0xffff_ffff;
            return Ok(self.enter(env, linear, linear & !0xfff, 0x1ff));
        }
        loop {
            let mut walk = match self.walk(env, linear) {
                Ok(walk) => walk,
                Err(fault) => return Err(self.page_fault(linear, access, privilege, Some(fault))),
            };
            let mut permissions = self.permissions(&walk);
            if permissions & wanted == 0 {
                return Err(self.page_fault(linear, access, privilege, None));
            }
            if !walk.update_flags(env, access == Access::Write) {
                continue;
            }
            if !walk.dirty() {
                // The first write must come here again to set the flag.
                permissions &= !(permission(Access::Write, Privilege::User) * 7);
                if access == Access::Write {
                    // The leaf is not in RAM: its dirty flag can't be set.
                    return Ok(self.locate(env, walk.gpa, linear));
                }
            }
            if walk.global && self.state.cr4_has(Cr4::PGE) {
                permissions |= tlb::GLOBAL;
            }
            permissions |= walk.size_flag;
            return Ok(self.enter(env, linear, walk.gpa, permissions));
        }
    }

    /// Where the byte at a linear address stands for an access of the current privilege, with the faults and the
    /// accessed and dirty flags of that access: for an engine that caches translations of its own.
    pub fn probe<E: Env>(&mut self, env: &mut E, linear: u64, access: Access) -> Result<Place, Exception> {
        let privilege = self.privilege();
        self.place(env, linear, access, privilege)
    }

    /// What happened to the TLB since the last call.
    pub fn take_tlb_changes(&mut self) -> TlbChanges {
        self.tlb.take_changes()
    }

    /// Whether the page of a linear address was last found to be global (SDM Vol. 3A, section 4.10.2.4).
    pub fn is_global(&self, linear: u64) -> bool {
        self.tlb.is_global(linear)
    }

    /// Whether a store of the current privilege to the address is known to be allowed, and to have no flag to set in the page
    /// tables.
    pub fn may_write(&self, linear: u64) -> bool {
        self.tlb.lookup(linear, permission(Access::Write, self.privilege())).is_some()
    }

    /// A number that stands for the current address space: another one after each change of PCID or root, and after
    /// each flush of all its translations but global ones. Numbers are used again only after [`TlbChanges::flushed`].
    pub fn address_space(&self) -> u16 {
        self.tlb.context()
    }

    /// Caches a translation if it leads to RAM that no data breakpoint watches, and says where the byte stands.
    fn enter<E: Env>(&mut self, env: &E, linear: u64, gpa: u64, data: u64) -> Place {
        if let Some(page) = env.ram_page(gpa)
            && !self.is_watched_page(linear)
        {
            self.tlb.insert(linear, page & !0xfff | data);
        }
        self.locate(env, gpa, linear)
    }

    fn locate<E: Env>(&self, env: &E, gpa: u64, linear: u64) -> Place {
        match env.ram_page(gpa) {
            Some(page) => Place::Ram(page | linear & 0xfff),
            None => Place::Mmio(gpa | linear & 0xfff),
        }
    }

    /// Guest-physical address of a linear address by the current page tables, without permission checks and
    /// without any side effect: for debuggers.
    pub fn translate<E: Env>(&self, env: &E, linear: u64) -> Option<u64> {
        if !self.state.cr0_has(Cr0::PG) {
            return Some(linear & 0xffff_ffff);
        }
        self.walk(env, linear).ok().map(|walk| walk.gpa | linear & 0xfff)
    }

    /// Offset in RAM of the byte at a linear address, if it lies in a global page that supervisor code is executed from, by
    /// the current page tables; without any side effect, so not where an accessed flag had to be set. For an engine that asks
    /// after a flush whether what it knows of code still holds.
    pub fn global_code<E: Env>(&self, env: &E, linear: u64) -> Option<u64> {
        if !self.state.cr0_has(Cr0::PG) || !self.state.cr4_has(Cr4::PGE) {
            return None;
        }
        let walk = self.walk(env, linear).ok()?;
        let executable = self.permissions(&walk) & permission(Access::Execute, Privilege::Supervisor) != 0;
        let page = env.ram_page(walk.gpa)?;
        (walk.global && executable && walk.accessed()).then_some(page | linear & 0xfff)
    }

    /// The permission bits of a page for all classes of access (SDM Vol. 3A, section 4.6.1).
    fn permissions(&self, walk: &Walk) -> u64 {
        let smap = self.state.cr4_has(Cr4::SMAP) && walk.user;
        let supervisor_write = walk.writable || !self.state.cr0_has(Cr0::WP);
        let executable = !(walk.no_execute && self.state.msr.efer & Efer::NXE.bits() != 0);
        let supervisor_execute = executable && !(walk.user && self.state.cr4_has(Cr4::SMEP));
        [
            (Access::Read, Privilege::User, walk.user),
            (Access::Read, Privilege::Supervisor, !smap),
            (Access::Read, Privilege::SupervisorAc, true),
            (Access::Write, Privilege::User, walk.user && walk.writable),
            (Access::Write, Privilege::Supervisor, !smap && supervisor_write),
            (Access::Write, Privilege::SupervisorAc, supervisor_write),
            (Access::Execute, Privilege::User, walk.user && executable),
            (Access::Execute, Privilege::Supervisor, supervisor_execute),
            (Access::Execute, Privilege::SupervisorAc, supervisor_execute),
        ]
        .into_iter()
        .filter(|&(.., allowed)| allowed)
        .fold(0, |bits, (access, privilege, _)| bits | permission(access, privilege))
    }

    /// The page fault of an access; `fault`: why no page was found, or `None` for lack of permission.
    fn page_fault(
        &self,
        linear: u64,
        access: Access,
        privilege: Privilege,
        fault: Option<WalkFault>,
    ) -> Exception {
        let mut code = match fault {
            None => fault_code::PROTECTION,
            Some(WalkFault::NotPresent) => 0,
            Some(WalkFault::ReservedBit) => fault_code::PROTECTION | fault_code::RESERVED,
        };
        if access == Access::Write {
            code |= fault_code::WRITE;
        }
        if privilege == Privilege::User {
            code |= fault_code::USER;
        }
        let nx = self.state.msr.efer & Efer::NXE.bits() != 0 && self.state.cr4_has(Cr4::PAE);
        if access == Access::Execute && (nx || self.state.cr4_has(Cr4::SMEP)) {
            code |= fault_code::FETCH;
        }
        Exception::page_fault(linear, code)
    }

    fn walk<E: Env>(&self, env: &E, linear: u64) -> Result<Walk, WalkFault> {
        if self.state.msr.efer & Efer::LMA.bits() != 0 {
            self.walk_long(env, linear)
        } else if self.state.cr4_has(Cr4::PAE) {
            self.walk_pae(env, linear)
        } else {
            self.walk_2level(env, linear)
        }
    }

    /// Bits that must be zero in every 8-byte entry.
    fn reserved_bits(&self) -> u64 {
        let execute_disable = if self.state.msr.efer & Efer::NXE.bits() != 0 { 0 } else { NO_EXECUTE };
        ADDRESS & !self.physical_mask() | execute_disable
    }

    fn walk_long<E: Env>(&self, env: &E, linear: u64) -> Result<Walk, WalkFault> {
        let index = |shift: u32| (linear >> shift & 0x1ff) * 8;
        let reserved = self.reserved_bits();
        let checked = |entry: u64, reserved: u64| {
            if entry & reserved == 0 { Ok(entry) } else { Err(WalkFault::ReservedBit) }
        };
        let mut walk = Walk::new(8);
        let pml4e = walk.step(env, self.state.cr3 & self.physical_mask() & ADDRESS | index(39))?;
        checked(pml4e, reserved | PAGE_SIZE)?;
        let pdpte = walk.step(env, pml4e & ADDRESS | index(30))?;
        if pdpte & PAGE_SIZE != 0 {
            let unused = if self.gigabyte_pages { 0x3fff_e000 } else { PAGE_SIZE };
            checked(pdpte, reserved | unused)?;
            let gpa = pdpte & ADDRESS & !0x3fff_ffff | linear & 0x3fff_ffff;
            return Ok(walk.finish(pdpte, gpa, tlb::GIANT));
        }
        checked(pdpte, reserved)?;
        self.walk_directory(env, walk, pdpte, linear, reserved)
    }

    fn walk_pae<E: Env>(&self, env: &E, linear: u64) -> Result<Walk, WalkFault> {
        let pdpte = self.state.pdpte[(linear >> 30 & 3) as usize];
        if pdpte & PRESENT == 0 {
            return Err(WalkFault::NotPresent);
        }
        // Unlike in 4-level paging, bits 52 to 62 are reserved.
        let reserved = self.reserved_bits() | 0x7ff0_0000_0000_0000;
        self.walk_directory(env, Walk::new(8), pdpte, linear, reserved)
    }

    /// The two lower levels with 8-byte entries. `above`: the entry that refers to the page directory.
    fn walk_directory<E: Env>(
        &self,
        env: &E,
        mut walk: Walk,
        above: u64,
        linear: u64,
        reserved: u64,
    ) -> Result<Walk, WalkFault> {
        let pde = walk.step(env, above & ADDRESS | ((linear >> 21 & 0x1ff) * 8))?;
        if pde & PAGE_SIZE != 0 {
            if pde & (reserved | 0x001f_e000) != 0 {
                return Err(WalkFault::ReservedBit);
            }
            let gpa = pde & ADDRESS & !0x1f_ffff | linear & 0x1f_ffff;
            return Ok(walk.finish(pde, gpa, tlb::LARGE));
        }
        if pde & reserved != 0 {
            return Err(WalkFault::ReservedBit);
        }
        let pte = walk.step(env, pde & ADDRESS | ((linear >> 12 & 0x1ff) * 8))?;
        if pte & reserved != 0 {
            return Err(WalkFault::ReservedBit);
        }
        Ok(walk.finish(pte, pte & ADDRESS, 0))
    }

    fn walk_2level<E: Env>(&self, env: &E, linear: u64) -> Result<Walk, WalkFault> {
        let mut walk = Walk::new(4);
        let pde = walk.step(env, self.state.cr3 & 0xffff_f000 | ((linear >> 22 & 0x3ff) * 4))?;
        if pde & PAGE_SIZE != 0 && self.state.cr4_has(Cr4::PSE) {
            // PSE-36: bits 13 to 20 are bits 32 to 39 of the address; bit 21 is reserved, as are those of
            // them that lie above the physical address width.
            let high = (pde >> 13 & 0xff) << 32;
            if pde & (1 << 21) != 0 || high & !self.physical_mask() != 0 {
                return Err(WalkFault::ReservedBit);
            }
            return Ok(walk.finish(pde, pde & 0xffc0_0000 | high | linear & 0x3f_ffff, tlb::LARGE));
        }
        let pte = walk.step(env, pde & 0xffff_f000 | ((linear >> 12 & 0x3ff) * 4))?;
        Ok(walk.finish(pte, pte & 0xffff_f000, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Machine, at};

    const LINEAR: u64 = 0x4020_1234;
    const PTE: u64 = at::PAGES + 0x3000 + 8;

    /// 64-bit mode, LINEAR mapped to 0x9234 through four levels, the upper three with all rights.
    fn machine(pte: u64) -> Machine {
        let mut machine = Machine::long();
        machine.env.store64(at::PAGES + 0x1008, at::PAGES + 0x2000 | 7);
        machine.env.store64(at::PAGES + 0x2008, at::PAGES + 0x3000 | 7);
        machine.env.store64(PTE, 0x9000 | pte);
        machine.cpu.state.cr4 |= (Cr4::SMEP | Cr4::SMAP).bits();
        machine.cpu.state_changed();
        machine
    }

    fn access(machine: &mut Machine, access: Access, cpl: u8) -> Result<Place, u32> {
        machine.cpu.state.cpl = cpl;
        let privilege = machine.cpu.privilege();
        // The second time around the TLB may answer: it must be of the same opinion.
        let first = machine.cpu.place(&mut machine.env, LINEAR, access, privilege);
        assert_eq!(first, machine.cpu.place(&mut machine.env, LINEAR, access, privilege));
        first.map_err(|fault| {
            assert_eq!(fault.cr2, LINEAR);
            fault.error_code.unwrap()
        })
    }

    #[test]
    fn rights_of_every_kind_of_page() {
        use Access::{Execute, Read, Write};
        let ok = Ok(Place::Ram(0x9234));
        const NX: u64 = NO_EXECUTE;
        /// Entry, access, CPL, RFLAGS.AC, CR0.WP, answer.
        type Case = (u64, Access, u8, bool, bool, Result<Place, u32>);
        let cases: &[Case] = &[
            (1, Read, 0, false, true, ok),
            (1, Write, 0, false, true, Err(0x3)),
            (1, Write, 0, false, false, ok),
            (1, Execute, 0, false, true, ok),
            (1, Read, 3, false, true, Err(0x5)),
            (1, Write, 3, false, true, Err(0x7)),
            (1, Execute, 3, false, true, Err(0x15)),
            (3, Write, 0, false, true, ok),
            (3 | NX, Execute, 0, false, true, Err(0x11)),
            (7, Read, 3, false, true, ok),
            (7, Write, 3, false, true, ok),
            (7, Execute, 3, false, true, ok),
            (7 | NX, Execute, 3, false, true, Err(0x15)),
            (5, Write, 3, false, false, Err(0x7)),
            (7, Read, 0, false, true, Err(0x1)),
            (7, Write, 0, false, true, Err(0x3)),
            (7, Read, 0, true, true, ok),
            (7, Write, 0, true, true, ok),
            (5, Write, 0, true, true, Err(0x3)),
            (7, Execute, 0, true, true, Err(0x11)),
            (7, Read, 1, false, true, Err(0x1)),
            (0, Read, 0, false, true, Err(0x0)),
            (0, Write, 3, false, true, Err(0x6)),
            (0, Execute, 3, false, true, Err(0x14)),
            (1 << 51, Read, 0, false, true, Err(0x0)),
            (7 | 1 << 51, Read, 3, false, true, Err(0xd)),
            (7 | 1 << 51, Execute, 0, false, true, Err(0x19)),
        ];
        for &(pte, kind, cpl, ac, wp, expected) in cases {
            let mut machine = machine(pte);
            if ac {
                machine.cpu.state.rflags |= Rflags::AC.bits();
            }
            if !wp {
                machine.cpu.state.cr0 &= !Cr0::WP.bits();
            }
            let answer = access(&mut machine, kind, cpl);
            assert_eq!(answer, expected, "entry {pte:#x} {kind:?} CPL {cpl} AC {ac} WP {wp}");
        }
    }

    #[test]
    fn one_entry_serves_all_privileges_rightly() {
        let mut machine = machine(7);
        assert!(access(&mut machine, Access::Write, 3).is_ok());
        assert_eq!(access(&mut machine, Access::Write, 0), Err(3));
        machine.cpu.state.rflags |= Rflags::AC.bits();
        assert!(access(&mut machine, Access::Write, 0).is_ok());
    }

    #[test]
    fn tables_may_reach_beyond_canonical_addresses() {
        let mut machine = machine(7);
        let read = machine.cpu.read_system(&mut machine.env, 0x8000_0000_0000, 1);
        assert_eq!(read, Err(Exception::GP0));
        let cross = machine.cpu.read_system(&mut machine.env, 0x7fff_ffff_fffc, 8);
        assert!(cross.is_err());
    }

    #[test]
    fn rights_of_upper_levels_count() {
        let mut machine = machine(7);
        machine.env.store64(at::PAGES + 0x1008, at::PAGES + 0x2000 | 5);
        assert_eq!(access(&mut machine, Access::Write, 3), Err(7));
        machine.env.store64(at::PAGES + 0x1008, at::PAGES + 0x2000 | 7 | NO_EXECUTE);
        assert_eq!(access(&mut machine, Access::Execute, 3), Err(0x15));
        machine.env.store64(at::PAGES + 0x1008, at::PAGES + 0x2000 | 3);
        assert_eq!(access(&mut machine, Access::Read, 3), Err(5));
    }

    #[test]
    fn accessed_and_dirty_flags() {
        let mut machine = machine(7);
        assert_eq!(machine.cpu.translate(&machine.env, LINEAR), Some(0x9234));
        assert_eq!(machine.env.load64(PTE), 0x9007, "a debugger's look changes nothing");
        access(&mut machine, Access::Read, 3).unwrap();
        assert_eq!(machine.env.load64(PTE), 0x9027);
        machine.cpu.state.cpl = 3;
        assert!(!machine.cpu.may_write(LINEAR), "a store has the dirty flag to set");
        assert_eq!(machine.env.load64(at::PAGES + 0x1008) & 0xfff, 0x27);
        access(&mut machine, Access::Write, 3).unwrap();
        assert_eq!(machine.env.load64(PTE), 0x9067);
        assert_eq!(machine.env.load64(at::PAGES + 0x1008) & 0xfff, 0x27, "only the leaf gets dirty");
        machine.cpu.state.cpl = 3;
        assert!(machine.cpu.may_write(LINEAR));
        machine.cpu.state.cpl = 0;
        assert!(!machine.cpu.may_write(LINEAR), "a store of the supervisor's faults");
    }

    #[test]
    fn a_fault_sets_no_flags() {
        let mut machine = machine(5);
        assert_eq!(access(&mut machine, Access::Write, 3), Err(7));
        assert_eq!(machine.env.load64(PTE), 0x9005);
    }

    #[test]
    fn large_pages() {
        let mut machine = machine(7);
        machine.env.store64(at::PAGES + 0x2008, 0x20_0087);
        machine.env.ram.borrow_mut().resize(0x40_0000, 0);
        assert_eq!(access(&mut machine, Access::Read, 3), Ok(Place::Ram(0x20_1234)));
        machine.cpu.flush_tlb_page(LINEAR + 0x10_0000);
        machine.env.store64(at::PAGES + 0x2008, 0x20_2087);
        assert_eq!(access(&mut machine, Access::Read, 3), Err(0xd), "bits 13 to 20 are reserved");
        machine.env.store64(at::PAGES + 0x1008, 0x4000_0087);
        assert_eq!(access(&mut machine, Access::Read, 3), Ok(Place::Mmio(0x4020_1234)));
        machine.env.store64(at::PAGES, at::PAGES + 0x1000 | 0x87);
        assert_eq!(access(&mut machine, Access::Read, 3), Err(0xd), "PS is reserved in a PML4E");
    }

    #[test]
    fn two_levels_and_pse36() {
        let mut machine = Machine::protected();
        let directory = at::PAGES;
        machine.env.store32(directory + 4 * 0x100, (at::PAGES + 0x1000) as u32 | 7);
        machine.env.store32(at::PAGES + 0x1000 + 4 * 0x201, 0x9007);
        machine.cpu.state.cr0 |= Cr0::PG.bits();
        machine.cpu.load_cr3(&mut machine.env, directory).unwrap();
        machine.cpu.flush_tlb();
        assert_eq!(access(&mut machine, Access::Write, 3), Ok(Place::Ram(0x9234)));
        assert_eq!(machine.env.load32(at::PAGES + 0x1000 + 4 * 0x201), 0x9067);
        machine.env.store32(directory + 4 * 0x100, 0x0040_0087 | 0x1234 << 13 & 0x1f_e000);
        machine.cpu.state.cr4 |= Cr4::PSE.bits();
        machine.cpu.flush_tlb();
        let expected = Place::Mmio(0x34_0040_0000 | LINEAR & 0x3f_ffff);
        assert_eq!(access(&mut machine, Access::Read, 3), Ok(expected));
        machine.env.store32(directory + 4 * 0x100, 0x0060_0087);
        assert_eq!(access(&mut machine, Access::Execute, 3), Err(0xd), "no I/D bit without NX and SMEP");
    }

    #[test]
    fn pae_takes_its_root_from_the_processor() {
        let mut machine = Machine::protected();
        machine.cpu.state.cr4 |= Cr4::PAE.bits();
        machine.cpu.state.cr0 |= Cr0::PG.bits();
        machine.env.store64(at::PAGES + 0x20 + 8, at::PAGES + 0x2000 | 1);
        machine.env.store64(at::PAGES + 0x2008, at::PAGES + 0x3000 | 7);
        machine.env.store64(PTE, 0x9007);
        machine.cpu.load_cr3(&mut machine.env, at::PAGES + 0x20).unwrap();
        machine.env.store64(at::PAGES + 0x20 + 8, 0);
        assert_eq!(access(&mut machine, Access::Read, 3), Ok(Place::Ram(0x9234)));
        machine.env.store64(PTE, 0x9007 | NO_EXECUTE);
        machine.cpu.flush_tlb();
        assert_eq!(access(&mut machine, Access::Read, 3), Err(0xd), "NX is reserved while EFER.NXE is clear");
        machine.env.store64(at::PAGES + 0x20, 3);
        let error = machine.cpu.load_cr3(&mut machine.env, at::PAGES + 0x20).unwrap_err();
        assert_eq!(error, Exception::GP0);
        assert_eq!(machine.cpu.state.pdpte[1], at::PAGES + 0x2000 | 1);
    }
}
