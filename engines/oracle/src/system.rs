//! What a guest of the oracle needs beside code and data: page tables, descriptor tables, and the state in which Linux
//! runs a program.

use bivisor_machine::memory::GuestMemory;
use bivisor_x86::registers::{Cr0, Cr4, Efer};
use bivisor_x86::state::{CpuState, SegReg, Segment};

use crate::layout::{FS_BASE, GS_BASE, PAGE, USER_CS, USER_SS};

/// Linear address of the page with IDT, GDT and TSS. What lies behind belongs to the supervisor, too.
pub const SYSTEM_PAGE: u64 = 0xffff_8000_0000_0000;
/// Selector of the supervisor's code segment.
pub const KERNEL_CS: u64 = 0x10;
/// Vector of the one interrupt there may be.
pub const INTERRUPT: u8 = 32;
const IDT: u64 = 0;
const GDT: u64 = 0x400;
const TSS: u64 = 0x500;
/// Exceptions that push an error code.
pub const WITH_ERROR_CODE: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17;

/// Bits of page-table entries.
pub const PRESENT: u64 = 1;
/// May be written.
pub const WRITABLE: u64 = 2;
/// User mode may access it.
pub const USER: u64 = 4;
/// Accessed and dirty.
pub const USED: u64 = 0x60;
/// May not be executed.
pub const NO_EXECUTE: u64 = 1 << 63;

/// Offsets of the pages of so many bytes.
pub fn pages(size: usize) -> impl Iterator<Item = u64> {
    (0..size as u64).step_by(PAGE as usize)
}

/// Four levels of page tables under construction, one page after the other from the root on.
pub struct PageTables<'a> {
    memory: &'a GuestMemory,
    root: u64,
    next: u64,
}

impl<'a> PageTables<'a> {
    /// Empty tables with this root. The memory is zero.
    pub fn new(memory: &'a GuestMemory, root: u64) -> Self {
        Self { memory, root, next: root + PAGE }
    }

    /// Maps a page with these bits, beside those for present, accessed and dirty. Returns where its entry is.
    pub fn map(&mut self, linear: u64, physical: u64, bits: u64) -> u64 {
        let mut table = self.root;
        for level in [3, 2, 1] {
            let entry = table + 8 * (linear >> (12 + 9 * level) & 0x1ff);
            if self.memory.load64(entry) == 0 {
                self.memory.store64(entry, self.next | PRESENT | WRITABLE | USER | USED);
                self.next += PAGE;
            }
            table = self.memory.load64(entry) & !0xfff;
        }
        let entry = table + 8 * (linear >> 12 & 0x1ff);
        self.memory.store64(entry, physical | PRESENT | USED | bits);
        entry
    }
}

/// Bytes 0 to 7 of a segment descriptor of 4 GiB with these access rights, and L or D/B set.
pub fn descriptor(access: u64, long: bool) -> u64 {
    0x000f_0000_0000_ffff | access << 40 | if long { 0xa0 << 48 } else { 0xc0 << 48 }
}

/// Writes IDT, GDT and TSS to the physical page `place`. `handlers`: linear address of the first handler, the others
/// follow every 16 bytes. `stack_end`: of the supervisor; `always`: that it is taken even if it is in use.
pub fn write_tables(memory: &GuestMemory, place: u64, handlers: u64, stack_end: u64, always: bool) {
    for vector in 0..=u64::from(INTERRUPT) {
        let handler = handlers + 16 * vector;
        // An interrupt gate, which user mode may call for INT3 and INTO.
        let access = if matches!(vector, 3 | 4) { 0xee00 } else { 0x8e00 } | u64::from(always);
        let low = handler & 0xffff | KERNEL_CS << 16 | access << 32 | (handler >> 16 & 0xffff) << 48;
        memory.store64(place + IDT + 16 * vector, low);
        memory.store64(place + IDT + 16 * vector + 8, handler >> 32);
    }
    memory.store64(place + GDT + KERNEL_CS, descriptor(0x9b, true));
    memory.store64(place + GDT + KERNEL_CS + 8, descriptor(0x93, false));
    // 32-bit code of user mode.
    memory.store64(place + GDT + 0x20, descriptor(0xfb, false));
    memory.store64(place + GDT + u64::from(USER_SS & !3), descriptor(0xf3, false));
    memory.store64(place + GDT + u64::from(USER_CS & !3), descriptor(0xfb, true));
    memory.store64(place + TSS + 4, stack_end);
    memory.store64(place + TSS + 0x24, stack_end);
    // No I/O permission bitmap.
    memory.store16(place + TSS + 0x66, 0xffff);
}

/// The state of a program in user mode, as Linux sets it up, with these page tables.
pub fn initial_state(page_tables: u64) -> CpuState {
    let cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
    let mut state = CpuState { cr0: cr0.bits(), cr3: page_tables, xcr0: 7, cpl: 3, ..CpuState::default() };
    state.cr4 = (Cr4::PAE
        | Cr4::PGE
        | Cr4::OSFXSR
        | Cr4::OSXMMEXCPT
        | Cr4::UMIP
        | Cr4::FSGSBASE
        | Cr4::OSXSAVE
        | Cr4::SMEP
        | Cr4::SMAP)
        .bits();
    state.msr.efer = (Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE).bits();
    let null = Segment { attributes: Segment::UNUSABLE, ..Segment::default() };
    state.seg = [null; 6];
    state.ldtr = null;
    let user = |selector, attributes| Segment { base: 0, limit: u32::MAX, selector, attributes };
    state.seg[SegReg::Cs as usize] = user(USER_CS, 0xa0fb);
    state.seg[SegReg::Ss as usize] = user(USER_SS, 0xc0f3);
    state.seg[SegReg::Fs as usize].base = FS_BASE;
    state.seg[SegReg::Gs as usize].base = GS_BASE;
    state.gdtr.base = SYSTEM_PAGE + GDT;
    state.gdtr.limit = 0x3f;
    state.idtr.base = SYSTEM_PAGE + IDT;
    state.idtr.limit = 16 * (u16::from(INTERRUPT) + 1) - 1;
    state.tr = Segment { base: SYSTEM_PAGE + TSS, limit: 0x67, selector: 0x40, attributes: 0x8b };
    state
}
