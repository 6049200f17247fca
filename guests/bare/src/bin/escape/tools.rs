//! What the stages share: random numbers, a watchdog, places at the edge of memory.
use kit::{
    Trap,
    apic::{self, register},
    catch, cpu,
    memory::{pages, read, write},
    start::START_INFO,
    trap::{self, Frame, Gate},
};

/// A page far away from the one to one mapping.
pub const FAR: u64 = 0x1234_5678_9000;
/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Marsaglia's xorshift: the same numbers in every run.
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed ^ 0x2545_f491_4f6c_dd1d)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// A number from 0 up to but not including `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 16) % limit
    }
    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Vector and error code of a trap.
pub fn short(trap: Option<Trap>) -> Option<(u8, u64)> {
    trap.map(|trap| (trap.vector, trap.error))
}

/// Vector, error code and CR2 of a trap.
pub fn fault(trap: Option<Trap>) -> Option<(u8, u64, u64)> {
    trap.map(|trap| (trap.vector, trap.error, trap.cr2))
}

/// Where RAM below 4 GiB ends: the end of the last entry of the loader's memory map below the devices (PVH boot
/// ABI: 40 is the map's address, 48 the number of its entries of 24 bytes).
pub fn ram_end() -> u64 {
    const DEVICES: u64 = 0xc000_0000;
    let info = u64::from(START_INFO.get());
    let (map, entries): (u64, u32) = (read(info + 40), read(info + 48));
    let ends = (0..u64::from(entries)).map(|entry| {
        let at = map + entry * 24;
        read::<u64>(at).saturating_add(read::<u64>(at + 8))
    });
    ends.filter(|&end| end <= DEVICES).max().unwrap_or(0)
}

/// Whether what nobody answers reads as ones. On QEMU it reads as zeros, which as code or stack lead anywhere.
pub fn holes_are_ones() -> bool {
    read::<u64>(ram_end() + PAGE) == u64::MAX
}

/// The last page of RAM, which others may use: it is put back by [`LastPage::restore`].
pub struct LastPage {
    copy: u64,
    /// Where the page begins.
    pub start: u64,
    /// Where RAM ends.
    pub end: u64,
}

impl LastPage {
    pub fn borrow() -> Self {
        let end = ram_end();
        let page = Self { copy: pages(1), start: end - PAGE, end };
        copy(page.start, page.copy, PAGE);
        page
    }
    pub fn restore(self) {
        copy(self.copy, self.start, PAGE);
    }
}

/// Copies bytes, eight at a time.
pub fn copy(from: u64, to: u64, bytes: u64) {
    for offset in (0..bytes).step_by(8) {
        write(to + offset, read::<u64>(from + offset));
    }
}

/// Vector of the watchdog's interrupt; the highest class, so that nothing holds it off.
pub const WATCHDOG: u8 = 0xfd;

/// Lets an interrupt come soon, in about a millisecond.
pub fn arm() {
    trap::handle(WATCHDOG, None);
    apic::set(register::DIVIDE, 3);
    apic::set(register::TIMER, WATCHDOG.into());
    apic::set(register::INITIAL_COUNT, 10_000);
}

/// Calls that interrupt off, or ends it if it was what came.
pub fn disarm(came: Option<Trap>) {
    fn end(_: &mut Frame) {
        apic::end_of_interrupt();
    }
    apic::set(register::TIMER, apic::MASKED);
    apic::set(register::INITIAL_COUNT, 0);
    if came.is_some_and(|trap| trap.vector == WATCHDOG) {
        apic::end_of_interrupt();
    }
    trap::handle(WATCHDOG, Some(end));
    cpu::interrupt_window();
    trap::handle(WATCHDOG, None);
}

/// Runs code with interrupts on until it ends or the watchdog ends it; says which trap it was.
pub fn limited(mut body: impl FnMut()) -> Option<Trap> {
    arm();
    let got = catch(|| {
        cpu::sti();
        body();
        cpu::cli();
    });
    disarm(got);
    got
}

/// A gate as the CPU reads it.
pub fn gate(target: u64, selector: u16, ist: u8, access: u8) -> Gate {
    let low = target & 0xffff
        | u64::from(selector) << 16
        | u64::from(ist) << 32
        | u64::from(access) << 40
        | (target >> 16 & 0xffff) << 48;
    Gate { low, high: target >> 32 }
}

/// Vector by which [`recover`] comes back.
pub const RECOVERED: u8 = 0x93;

core::arch::global_asm!(
    r#"
    .section .bss
    .balign 16
    .fill 0x1000, 1, 0
recover_stack:
    .section .text
    .global recover
recover:
    lea rsp, [rip + recover_stack]
    int 0x93
    .global fault_again
fault_again:
    ud2
    "#
);

unsafe extern "C" {
    /// A handler that trusts nothing of its stack: ends in `catch` with [`RECOVERED`].
    pub fn recover();
    /// A handler that raises #UD.
    pub fn fault_again();
}

/// Address of code.
pub fn address(code: unsafe extern "C" fn()) -> u64 {
    code as *const () as u64
}
