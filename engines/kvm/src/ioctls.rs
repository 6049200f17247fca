//! The requests that the engine makes of KVM (Linux, include/uapi/linux/kvm.h), for whoever confines its threads, and those
//! of a vCPU for which the crate kvm-ioctls has no function on x86.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_enable_cap,
    kvm_guest_debug, kvm_interrupt, kvm_msr_filter, kvm_msrs, kvm_regs, kvm_sregs, kvm_translation,
    kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

/// The request of this number without an argument in memory (Linux, include/uapi/asm-generic/ioctl.h: `_IO`).
const fn io(number: u32) -> u32 {
    0xae << 8 | number
}
/// The kernel reads the argument, a `T` (`_IOW`).
const fn iow<T>(number: u32) -> u32 {
    1 << 30 | (size_of::<T>() as u32) << 16 | io(number)
}
/// The kernel writes it (`_IOR`).
const fn ior<T>(number: u32) -> u32 {
    2 << 30 | (size_of::<T>() as u32) << 16 | io(number)
}
/// It does both (`_IOWR`).
const fn iowr<T>(number: u32) -> u32 {
    iow::<T>(number) | ior::<T>(number)
}

const KVM_INTERRUPT: u32 = iow::<kvm_interrupt>(0x86);
const KVM_SET_DEVICE_ATTR: u32 = iow::<kvm_device_attr>(0xe1);

/// What makes a virtual machine and its vCPUs.
pub const MAKING: [u32; 10] = [
    io(0x01),                                 // KVM_CREATE_VM
    io(0x04),                                 // KVM_GET_VCPU_MMAP_SIZE
    iowr::<kvm_cpuid2>(0x05),                 // KVM_GET_SUPPORTED_CPUID
    io(0x41),                                 // KVM_CREATE_VCPU
    iow::<kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
    io(0x47),                                 // KVM_SET_TSS_ADDR
    iow::<u64>(0x48),                         // KVM_SET_IDENTITY_MAP_ADDR
    iow::<kvm_cpuid2>(0x90),                  // KVM_SET_CPUID2
    iow::<kvm_enable_cap>(0xa3),              // KVM_ENABLE_CAP
    iow::<kvm_msr_filter>(0xc6),              // KVM_X86_SET_MSR_FILTER
];

/// What reads and replaces a vCPU's state, which a debugger does too. An instruction that KVM has begun is only completed by
/// KVM_RUN.
pub const STATE: [u32; 18] = [
    io(0x80),                      // KVM_RUN
    ior::<kvm_regs>(0x81),         // KVM_GET_REGS
    iow::<kvm_regs>(0x82),         // KVM_SET_REGS
    ior::<kvm_sregs>(0x83),        // KVM_GET_SREGS
    iow::<kvm_sregs>(0x84),        // KVM_SET_SREGS
    iowr::<kvm_translation>(0x85), // KVM_TRANSLATE
    iowr::<kvm_msrs>(0x88),        // KVM_GET_MSRS
    iow::<kvm_msrs>(0x89),         // KVM_SET_MSRS
    iow::<kvm_guest_debug>(0x9b),  // KVM_SET_GUEST_DEBUG
    ior::<kvm_vcpu_events>(0x9f),  // KVM_GET_VCPU_EVENTS
    iow::<kvm_vcpu_events>(0xa0),  // KVM_SET_VCPU_EVENTS
    ior::<kvm_debugregs>(0xa1),    // KVM_GET_DEBUGREGS
    iow::<kvm_debugregs>(0xa2),    // KVM_SET_DEBUGREGS
    ior::<kvm_xsave>(0xa4),        // KVM_GET_XSAVE
    iow::<kvm_xsave>(0xa5),        // KVM_SET_XSAVE
    ior::<kvm_xcrs>(0xa6),         // KVM_GET_XCRS
    iow::<kvm_xcrs>(0xa7),         // KVM_SET_XCRS
    KVM_SET_DEVICE_ATTR,
];

/// What else a vCPU's thread does: interrupts and NMIs.
pub const EVENTS: [u32; 2] = [KVM_INTERRUPT, io(0x9a)];

/// Injects an interrupt, which the guest must be able to take.
pub fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let argument = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's, and the kernel only reads the argument, which is of the type that it expects.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT.into(), &raw const argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets what the guest's time-stamp counter is ahead of the host's. Linux has it since 5.16.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: &raw const offset as u64,
    };
    // SAFETY: the descriptor is a vCPU's; the kernel reads the attribute, and through its address eight bytes, which live
    // until the call is over.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR.into(), &raw const attribute) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel's own header has them.
    #[test]
    fn requests_have_the_numbers_of_the_kernels_header() {
        let making = [
            0xae01,
            0xae04,
            0xc008_ae05,
            0xae41,
            0x4020_ae46,
            0xae47,
            0x4008_ae48,
            0x4008_ae90,
            0x4068_aea3,
            0x4188_aec6,
        ];
        assert_eq!(MAKING, making);
        let state = [
            0xae80,
            0x8090_ae81,
            0x4090_ae82,
            0x8138_ae83,
            0x4138_ae84,
            0xc018_ae85,
            0xc008_ae88,
            0x4008_ae89,
            0x4048_ae9b,
            0x8040_ae9f,
            0x4040_aea0,
            0x8080_aea1,
            0x4080_aea2,
            0x9000_aea4,
            0x5000_aea5,
            0x8188_aea6,
            0x4188_aea7,
            0x4018_aee1,
        ];
        assert_eq!(STATE, state);
        assert_eq!(EVENTS, [0x4004_ae86, 0xae9a]);
    }
}
