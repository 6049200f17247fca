//! Code in ring 3: an address space with a code page, a data page and a stack, and the way there and back.
use crate::{
    Trap, catch, cpu,
    memory::{self, Tables, bit},
    segments,
};
use core::arch::asm;

/// Where the code page lies; below 4 GiB, so that compatibility mode reaches it.
pub const CODE: u64 = 0xb000_0000;
/// Where the data page lies.
pub const DATA: u64 = CODE + 0x1000;
/// Top of the stack, two pages.
pub const STACK: u64 = CODE + 0x4000;

/// An address space with pages for ring 3.
#[derive(Clone, Copy)]
pub struct Space {
    /// Its page tables.
    pub tables: Tables,
    /// Physical address of the code page.
    pub code: u64,
    /// Physical address of the data page.
    pub data: u64,
}

impl Space {
    /// Makes and loads an address space with fresh pages, all of them open to ring 3 for everything.
    pub fn new() -> Self {
        let tables = Tables::new();
        let pages = memory::pages(4);
        for offset in (0..4 * 4096).step_by(4096) {
            tables.map(CODE + offset, pages + offset, bit::P | bit::W | bit::U);
        }
        tables.load();
        Self { tables, code: pages, data: pages + 0x1000 }
    }

    /// Puts code, given as a function without a frame of its own, into the code page.
    pub fn place(&self, code: unsafe extern "C" fn()) {
        const LONGEST: u64 = 512;
        for offset in 0..LONGEST {
            memory::write(self.code + offset, memory::read::<u8>(code as *const () as u64 + offset));
        }
    }

    /// Runs code in ring 3, in 64-bit mode, and returns what ended it.
    pub fn run(&self, code: unsafe extern "C" fn()) -> Option<Trap> {
        self.run_as(segments::USER_CODE, code, 2)
    }

    /// Runs code in the given ring 3 code segment and with the given flags.
    pub fn run_as(&self, cs: u16, code: unsafe extern "C" fn(), rflags: u64) -> Option<Trap> {
        self.place(code);
        enter(cs, CODE, STACK, rflags)
    }
}

impl Default for Space {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs code in ring 3 at `rip` with the stack `rsp` and flags, in the code segment `cs`; returns what ended it.
pub fn enter(cs: u16, rip: u64, rsp: u64, rflags: u64) -> Option<Trap> {
    catch(|| {
        cpu::cli();
        // SAFETY: every way out of ring 3 is a trap, and that ends in `catch`.
        unsafe {
            asm!(
                "mov ds, {data:e}",
                "mov es, {data:e}",
                "push {data}",
                "push {rsp}",
                "push {rflags}",
                "push {cs}",
                "push {rip}",
                "iretq",
                data = in(reg) u64::from(segments::USER_DATA),
                rsp = in(reg) rsp,
                rflags = in(reg) rflags,
                cs = in(reg) u64::from(cs),
                rip = in(reg) rip,
                options(noreturn)
            )
        }
    })
}

/// Runs instructions in ring 3 of a [`Space`]; they end with the software interrupt [`crate::trap::LEAVE_USER`]
/// unless something else ends them.
#[macro_export]
macro_rules! ring3 {
    ($space:expr, $($instruction:literal),+ $(,)?) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn code() {
            core::arch::naked_asm!($($instruction,)+ "int 0x80")
        }
        $space.run(code)
    }};
}
