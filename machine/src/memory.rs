//! Guest-physical memory: one host mapping, cut in two by the hole below 4 GiB.
#![allow(unsafe_code)]

/// First address of the hole for devices below 4 GiB, when RAM is that large.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// The RAM of one machine. Shared by all vCPUs and devices; every access is a plain machine access, as
/// between the processors of a real machine.
pub struct GuestMemory {
    base: *mut u8,
    size: u64,
}
