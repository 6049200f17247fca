//! What is asked of the host's processor, by the engine and by whoever owns the machine.
#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

use bivisor_x86::registers::Cr4;
use bivisor_x86::state::CpuState;

/// CPUID: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = __cpuid_count(leaf, subleaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// RDMSR.
///
/// # Safety
/// At privilege level 0; the register exists.
pub unsafe fn read_msr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise; reading changes nothing.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR.
///
/// # Safety
/// At privilege level 0; the register exists, takes the value, and nothing of the host's goes wrong with it.
pub unsafe fn write_msr(msr: u32, value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "wrmsr",
            in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack, preserves_flags)
        );
    }
}

/// MXCSR as Rust code expects it.
pub(crate) static HOST_MXCSR: u32 = 0x1f80;

/// Lets the host's interrupts in.
///
/// # Safety
/// At privilege level 0, with an interrupt table whose handlers leave all registers but those that a call may change.
pub(crate) unsafe fn take_interrupts() {
    // SAFETY: the caller's promise. STI holds interrupts back for one instruction more.
    unsafe { asm!("sti", "nop", "cli", clobber_abi("sysv64")) };
}

/// Loads DR0 to DR3.
///
/// # Safety
/// At privilege level 0; the host uses no breakpoints.
pub(crate) unsafe fn load_debug_addresses(state: &CpuState) {
    // SAFETY: the caller's promise; with DR7 clear they have no effect.
    unsafe {
        asm!("mov dr0, {}", in(reg) state.dr[0], options(nomem, nostack, preserves_flags));
        asm!("mov dr1, {}", in(reg) state.dr[1], options(nomem, nostack, preserves_flags));
        asm!("mov dr2, {}", in(reg) state.dr[2], options(nomem, nostack, preserves_flags));
        asm!("mov dr3, {}", in(reg) state.dr[3], options(nomem, nostack, preserves_flags));
    }
}

/// Runs the handler of NMIs, as the processor would have: its IRET lets the next one in.
///
/// # Safety
/// As [`take_interrupts`].
pub(crate) unsafe fn handle_nmi() {
    // SAFETY: the caller's promise.
    unsafe { asm!("int 2", clobber_abi("sysv64")) };
}

/// Switches XSAVE on, for these components.
///
/// # Safety
/// At privilege level 0, on behalf of whoever owns the processor, which has XSAVE and the components.
pub(crate) unsafe fn enable_xsave(components: u64) {
    // SAFETY: the caller's promise; CR4.OSXSAVE and XCR0 only make instructions available.
    unsafe {
        let cr4: u64;
        asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags));
        asm!("mov cr4, {}", in(reg) cr4 | Cr4::OSXSAVE.bits(), options(nomem, nostack, preserves_flags));
        asm!(
            "xsetbv",
            in("ecx") 0, in("eax") components as u32, in("edx") (components >> 32) as u32,
            options(nomem, nostack, preserves_flags)
        );
    }
}
