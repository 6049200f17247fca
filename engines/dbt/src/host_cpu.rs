//! What the host processor and system tell: time stamps and random numbers.
#![allow(unsafe_code)]

/// The host's time-stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A random number from the host's system.
pub fn random() -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: the buffer is valid for eight bytes. Requests this small are never cut short; should the call fail,
    // the bytes stay zero, which a guest must expect of a broken source, too.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    u64::from_ne_bytes(bytes)
}
