//! KVM's hypercalls (Linux, Documentation/virt/kvm/x86/hypercalls.rst): number in RAX, arguments in RBX, RCX, RDX
//! and RSI, answer in RAX. A machine with test devices takes them, since test kernels call without asking CPUID.

use bivisor_x86::registers::gpr::{RAX, RBX, RCX, RDX, RSI};
use bivisor_x86::state::{CpuState, Mode};

use crate::devices::message::{Delivery, Message};
use crate::irq::Interrupts;

/// Sends an interrupt to up to 128 processors: a bitmap in two words, the APIC ID of its first bit, the low half
/// of an ICR. Answers to how many it went.
const SEND_IPI: u64 = 10;

/// There is no such hypercall.
const ENOSYS: u64 = -1000i64 as u64;
/// An argument is wrong.
const EINVAL: u64 = -22i64 as u64;
/// Only the kernel may.
const EPERM: u64 = -1i64 as u64;

/// Carries out the hypercall that these registers ask for; its answer.
pub fn hypercall(state: &CpuState, interrupts: &Interrupts) -> u64 {
    let wide = state.mode() == Mode::Long64;
    let argument = |register: usize| {
        if wide { state.gpr[register] } else { state.gpr[register] & 0xffff_ffff }
    };
    if state.cpl != 0 {
        return EPERM;
    }
    match argument(RAX) {
        SEND_IPI => {
            let word_bits = if wide { 64 } else { 32 };
            let bitmap = u128::from(argument(RBX)) | u128::from(argument(RCX)) << word_bits;
            send_ipi(interrupts, bitmap, argument(RDX) as u32, argument(RSI) as u32)
        }
        _ => ENOSYS,
    }
}

fn send_ipi(interrupts: &Interrupts, bitmap: u128, first: u32, icr: u32) -> u64 {
    let delivery = match Delivery::from_bits(icr >> 8) {
        Some(delivery @ (Delivery::Fixed | Delivery::Nmi)) => delivery,
        _ => return EINVAL,
    };
    let mut count = 0;
    for (id, apic) in (0u32..).zip(interrupts.apics()) {
        let named = id.checked_sub(first).is_some_and(|bit| bit < 128 && bitmap >> bit & 1 != 0);
        if named {
            let message =
                Message { destination: id, logical: false, delivery, vector: icr as u8, level: false };
            apic.accept(&message);
            count += 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::{Host, Time};
    use crate::host::Clock;
    use crate::timer::TimerHub;
    use alloc::sync::Arc;
    use bivisor_x86::env::Event;

    /// Three processors, and the answer to a hypercall from real mode.
    fn call(arguments: [u64; 5], cpl: u8) -> (u64, [Option<Event>; 3]) {
        let clock: Arc<dyn Clock> = Time::new();
        let interrupts = Interrupts::new(3, 40, &clock, &TimerHub::new(Host::new()));
        let cpus = [0, 1, 2].map(|i| interrupts.vcpu(i).unwrap());
        for cpu in &cpus {
            cpu.mmio_write(0xfee0_00f0, 4, 0x1ff);
        }
        let mut state = CpuState { cpl, ..CpuState::default() };
        for (register, value) in [RAX, RBX, RCX, RDX, RSI].into_iter().zip(arguments) {
            state.gpr[register] = value;
        }
        let answer = hypercall(&state, &interrupts);
        (answer, cpus.map(|cpu| cpu.take_event(true, true)))
    }

    #[test]
    fn interrupts_go_to_the_bitmap() {
        let got = Some(Event::Interrupt(0x40));
        assert_eq!(call([SEND_IPI, 0b101, 0, 0, 0x40], 0), (2, [got, None, got]));
        assert_eq!(call([SEND_IPI, 0b101, 0, 1, 0x40], 0), (1, [None, got, None]));
        assert_eq!(call([SEND_IPI, 0b10, 0, 0, 0x400], 0), (1, [None, Some(Event::Nmi), None]));
    }

    #[test]
    fn processors_that_do_not_exist_are_not_counted() {
        assert_eq!(call([SEND_IPI, 0xffff_ffff, 0, 0xffff_ffff, 0], 0), (0, [None; 3]));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        assert_eq!(call([SEND_IPI, 1, 0, 0, 0x640], 0).0, EINVAL);
        assert_eq!(call([SEND_IPI, 1, 0, 0, 0x40], 3).0, EPERM);
        assert_eq!(call([77, 0, 0, 0, 0], 0).0, ENOSYS);
    }
}
