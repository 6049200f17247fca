//! Instructions of the CPU as functions (Intel SDM volume 2), with no more meaning than they have there.
use crate::catch;
use core::arch::{asm, x86_64};

pub use core::arch::x86_64::CpuidResult;

/// CR0 bits (Intel SDM volume 3, section 2.5).
pub mod cr0 {
    #![allow(missing_docs)]
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM volume 3, section 2.5).
pub mod cr4 {
    #![allow(missing_docs)]
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// Model-specific registers.
pub mod msr {
    #![allow(missing_docs)]
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

macro_rules! port {
    ($read:ident, $write:ident, $ty:ty, $reg:tt) => {
        /// Reads the port.
        pub fn $read(port: u16) -> $ty {
            let value: $ty;
            // SAFETY: touches no memory; a fault ends in the trap handler.
            unsafe { asm!(concat!("in ", $reg, ", dx"), out($reg) value, in("dx") port, options(nomem, nostack)) };
            value
        }

        /// Writes the port.
        pub fn $write(port: u16, value: $ty) {
            // SAFETY: no device here writes memory on a port write; a fault ends in the trap handler.
            unsafe { asm!(concat!("out dx, ", $reg), in($reg) value, in("dx") port, options(nostack)) };
        }
    };
}
port!(inb, outb, u8, "al");
port!(inw, outw, u16, "ax");
port!(inl, outl, u32, "eax");

macro_rules! register {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        pub fn $read() -> u64 {
            let value: u64;
            // SAFETY: reads a register.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack)) };
            value
        }

        #[doc = concat!("Loads ", $name, ".")]
        pub fn $write(value: u64) {
            // SAFETY: one to one mapped tables stay in force by the callers' care; a bad value faults.
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack)) };
        }
    };
}
register!(read_cr0, write_cr0, "cr0");
register!(read_cr2, write_cr2, "cr2");
register!(read_cr3, write_cr3, "cr3");
register!(read_cr4, write_cr4, "cr4");
register!(read_cr8, write_cr8, "cr8");
register!(read_dr0, write_dr0, "dr0");
register!(read_dr1, write_dr1, "dr1");
register!(read_dr6, write_dr6, "dr6");
register!(read_dr7, write_dr7, "dr7");

/// Reads a model-specific register.
pub fn rdmsr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register; an unknown one faults.
    unsafe { asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
pub fn wrmsr(number: u32, value: u64) {
    // SAFETY: writes a register; a bad value faults.
    unsafe {
        asm!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

/// Asks CPUID for a leaf and subleaf.
pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    x86_64::__cpuid_count(leaf, subleaf)
}

/// Whether CPUID leaf 1 has this bit in ECX.
pub fn feature_1_ecx(bit: u32) -> bool {
    cpuid(1, 0).ecx >> bit & 1 == 1
}

/// Whether CPUID leaf 7 has this bit in EBX.
pub fn feature_7_ebx(bit: u32) -> bool {
    cpuid(0, 0).eax >= 7 && cpuid(7, 0).ebx >> bit & 1 == 1
}

/// Reads the time stamp counter after all earlier loads.
pub fn rdtsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe {
        x86_64::_mm_lfence();
        x86_64::_rdtsc()
    }
}

/// Reads RFLAGS.
pub fn rflags() -> u64 {
    let value: u64;
    // SAFETY: pushes and pops one word.
    unsafe { asm!("pushfq", "pop {}", out(reg) value) };
    value
}

/// Switches interrupts on.
pub fn sti() {
    // SAFETY: every vector has a gate.
    unsafe { asm!("sti", options(nostack)) };
}

/// Switches interrupts off.
pub fn cli() {
    // SAFETY: changes one flag.
    unsafe { asm!("cli", options(nostack)) };
}

/// Switches interrupts on and waits for one, with no gap in between; they are off again on return.
pub fn wait_for_interrupt() {
    // SAFETY: every vector has a gate; STI holds interrupts off until HLT has begun.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Lets pending interrupts in, and switches them off again.
pub fn interrupt_window() {
    // SAFETY: every vector has a gate.
    unsafe { asm!("sti", "nop", "nop", "cli", options(nostack)) };
}

/// Drops the translation of one address.
pub fn invlpg(address: u64) {
    // SAFETY: drops a cached translation; the tables are what they are.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack)) };
}

/// Writes an extended control register.
pub fn xsetbv(number: u32, value: u64) {
    // SAFETY: a bad value faults.
    unsafe {
        asm!("xsetbv", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

/// Whether the CPU offers XSAVE (and CR4.OSXSAVE was therefore set at the start).
pub fn has_xsave() -> bool {
    feature_1_ecx(26)
}

/// Switches on XSAVE and all of x87, SSE and AVX that the CPU offers, so that guests may use them.
pub(crate) fn enable_xsave() {
    if !has_xsave() {
        return;
    }
    write_cr4(read_cr4() | cr4::OSXSAVE);
    let mask = u64::from(cpuid(0xd, 0).eax) & 7;
    if catch(|| xsetbv(0, mask)).is_some() {
        crate::println!("XSETBV refused the components that CPUID offers: {mask:#x}");
    }
}
