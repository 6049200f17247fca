//! CPUID: a named CPU model, built from what the host has.

use alloc::vec::Vec;

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input, or `None` where the leaf has no sub-leaves.
    pub index: Option<u32>,
    /// EAX, EBX, ECX, EDX on output.
    pub registers: [u32; 4],
}

/// What CPUID says on every processor of a machine. Bits that follow the processor's state (OSXSAVE, APIC ID,
/// the size of the enabled XSAVE state) are filled in when the guest asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// The model's name, for users.
    pub name: &'static str,
    /// All leaves.
    pub leaves: Vec<Leaf>,
}
