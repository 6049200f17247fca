//! Paging: every bit of protection at every level, the accessed and dirty bits, what a fault reports, what
//! invalidates a translation; 4-level, PAE and 2-level tables (Intel SDM volume 3, chapter 4).
#![no_std]
#![no_main]

mod faults;
mod legacy;
mod protection;
mod tlb;

use kit::{Suite, Trap, catch, cpu, memory::bit, trap::vector, trapping, user::Space};

/// The rights of an ordinary page.
const ALL: u64 = bit::P | bit::W | bit::U;

/// A page far away from the one to one mapping.
const FAR: u64 = 0x1234_5678_9000;

/// Vector, error code and CR2 of a trap.
type Fault = Option<(u8, u64, u64)>;

fn fault(trap: Option<Trap>) -> Fault {
    trap.map(|trap| (trap.vector, trap.error, trap.cr2))
}

/// The page fault that should come.
const fn page_fault(error: u64, address: u64) -> Fault {
    Some((vector::PF, error, address))
}

fn read(address: u64) -> Option<Trap> {
    trapping!(=> "mov rax, [{0}]"; in(reg) address)
}

fn write(address: u64) -> Option<Trap> {
    trapping!(=> "mov byte ptr [{0}], 1"; in(reg) address)
}

/// Calls an address where a RET is; the fault it may bring points there.
fn fetch(address: u64) -> Option<Trap> {
    catch(|| {
        // SAFETY: there is a RET, or no code at all and a fault.
        unsafe { core::arch::asm!("call {0}", in(reg) address, clobber_abi("C")) }
    })
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let mut suite = Suite::new("paging");
    let s = &mut suite;
    let space = Space::new();
    protection::all(s, &space);
    faults::all(s, &space);
    tlb::all(s, &space);
    cpu::write_cr3(kit::memory::boot_root());
    legacy::all(s);
    suite.finish()
}
