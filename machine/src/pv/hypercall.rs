//! KVM's hypercalls (Linux, Documentation/virt/kvm/x86/hypercalls.rst): number in RAX, arguments in RBX, RCX, RDX
//! and RSI, answer in RAX. A machine with test devices takes them too, since test kernels call without asking CPUID.

use bivisor_x86::registers::gpr::{RAX, RBX, RCX, RDX, RSI};
use bivisor_x86::state::{CpuState, Mode};

use super::Processor;
use crate::devices::local_apic::LocalApic;
use crate::devices::message::{Delivery, Message};
use crate::irq::Interrupts;
use crate::sync::give_way;

/// Does nothing: what a hypercall costs.
const POLL: u64 = 1;
/// Ends the HLT of the processor whose APIC ID is the second argument. The first is reserved.
const KICK_CPU: u64 = 5;
/// Writes the wall-clock time and the time-stamp counter of one moment to an address. The second argument is the clock.
const CLOCK_PAIRING: u64 = 9;
/// Sends an interrupt to up to 128 processors: a bitmap in two words, the APIC ID of its first bit, the low half
/// of an ICR. Answers to how many it went.
const SEND_IPI: u64 = 10;
/// The caller waits for the processor with this APIC ID, which doesn't execute.
const SCHED_YIELD: u64 = 11;

/// The one clock of [`CLOCK_PAIRING`].
const WALL_CLOCK: u64 = 0;
/// Bytes that it writes.
const PAIRING_SIZE: u64 = 64;

/// There is no such hypercall.
const ENOSYS: u64 = -1000i64 as u64;
/// An argument is wrong.
const EINVAL: u64 = -22i64 as u64;
/// Only the kernel may.
const EPERM: u64 = -1i64 as u64;

/// There is no such clock.
const EOPNOTSUPP: u64 = -95i64 as u64;
/// The address does not lie in RAM.
const EFAULT: u64 = -14i64 as u64;

/// Who calls.
pub struct Caller<'a> {
    /// Interrupt controllers of the machine.
    pub interrupts: &'a Interrupts,
    /// The processor's side of the interface, if the machine offers it.
    pub pv: Option<&'a Processor>,
}

/// Carries out the hypercall that these registers ask for; its answer.
pub fn hypercall(state: &CpuState, caller: &Caller<'_>) -> u64 {
    let wide = state.mode() == Mode::Long64;
    let argument = |register: usize| {
        if wide { state.gpr[register] } else { state.gpr[register] & 0xffff_ffff }
    };
    if state.cpl != 0 {
        return EPERM;
    }
    match argument(RAX) {
        POLL => 0,
        KICK_CPU => {
            // Processors that don't exist need no kick.
            if let Some(apic) = apic(caller.interrupts, argument(RCX)) {
                apic.unhalt();
            }
            0
        }
        CLOCK_PAIRING => match caller.pv {
            Some(pv) => pair_clocks(pv, argument(RBX), argument(RCX)),
            None => ENOSYS,
        },
        SCHED_YIELD => {
            if apic(caller.interrupts, argument(RBX)).is_some() {
                give_way();
            }
            0
        }
        SEND_IPI => {
            let word_bits = if wide { 64 } else { 32 };
            let bitmap = u128::from(argument(RBX)) | u128::from(argument(RCX)) << word_bits;
            send_ipi(caller.interrupts, bitmap, argument(RDX) as u32, argument(RSI) as u32)
        }
        _ => ENOSYS,
    }
}

/// The local APIC with this ID.
fn apic(interrupts: &Interrupts, id: u64) -> Option<&LocalApic> {
    interrupts.apics().get(usize::try_from(id).ok()?).map(|apic| &**apic)
}

/// Linux' `kvm_clock_pairing`: seconds, nanoseconds, counter, and flags that are zero.
fn pair_clocks(pv: &Processor, gpa: u64, clock: u64) -> u64 {
    if clock != WALL_CLOCK {
        return EOPNOTSUPP;
    }
    let Ok(place) = pv.shared().dma().range(gpa, PAIRING_SIZE) else { return EFAULT };
    let (wall, counter) = pv.wall_and_counter();
    let mut bytes = [0; PAIRING_SIZE as usize];
    for (field, value) in bytes.chunks_mut(8).zip([wall / 1_000_000_000, wall % 1_000_000_000, counter]) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    pv.shared().dma().store_bytes(place, &bytes);
    0
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
    use crate::dma::Dma;
    use crate::host::Clock;
    use crate::memory::GuestMemory;
    use crate::pv::Paravirt;
    use crate::timer::TimerHub;
    use alloc::sync::Arc;
    use bivisor_x86::env::Event;

    struct Bench {
        interrupts: Arc<Interrupts>,
        pv: Processor,
        memory: Arc<GuestMemory>,
    }

    /// Three processors and two pages of RAM.
    fn bench() -> Bench {
        let clock: Arc<dyn Clock> = Time::new();
        let interrupts = Interrupts::new(3, 40, &clock, &TimerHub::new(Host::new()));
        for index in 0..3 {
            interrupts.vcpu(index).unwrap().mmio_write(0xfee0_00f0, 4, 0x1ff);
        }
        let memory = Arc::new(GuestMemory::on_heap(0x2000));
        let shared = Paravirt::new(Dma::new(memory.clone()), clock);
        let pv = Processor::new(shared, interrupts.apics()[0].clone());
        Bench { interrupts, pv, memory }
    }

    impl Bench {
        /// The answer to a hypercall from real mode, and the next event of each processor.
        fn call(&self, arguments: [u64; 5], cpl: u8) -> (u64, [Option<Event>; 3]) {
            let mut state = CpuState { cpl, ..CpuState::default() };
            for (register, value) in [RAX, RBX, RCX, RDX, RSI].into_iter().zip(arguments) {
                state.gpr[register] = value;
            }
            let caller = Caller { interrupts: &self.interrupts, pv: Some(&self.pv) };
            let answer = hypercall(&state, &caller);
            (answer, [0, 1, 2].map(|index| self.interrupts.vcpu(index).unwrap().take_event(true, true)))
        }
    }

    fn call(arguments: [u64; 5], cpl: u8) -> (u64, [Option<Event>; 3]) {
        bench().call(arguments, cpl)
    }

    #[test]
    fn interrupts_go_to_the_bitmap() {
        let got = Some(Event::Interrupt(0x40));
        assert_eq!(call([SEND_IPI, 0b101, 0, 0, 0x40], 0), (2, [got, None, got]));
        assert_eq!(call([SEND_IPI, 0b101, 0, 1, 0x40], 0), (1, [None, got, None]));
        assert_eq!(call([SEND_IPI, 0b10, 0, 0, 0x400], 0), (1, [None, Some(Event::Nmi), None]));
    }

    #[test]
    fn a_kick_ends_a_halt() {
        assert_eq!(call([KICK_CPU, 0, 2, 0, 0], 0), (0, [None, None, Some(Event::Unhalt)]));
    }

    #[test]
    fn processors_that_do_not_exist_are_passed_over() {
        assert_eq!(call([SEND_IPI, 0xffff_ffff, 0, 0xffff_ffff, 0], 0), (0, [None; 3]));
        for id in [3, 0xffff_ffff] {
            assert_eq!(call([KICK_CPU, 0, id, 0, 0], 0), (0, [None; 3]));
            assert_eq!(call([SCHED_YIELD, id, 0, 0, 0], 0), (0, [None; 3]));
        }
    }

    #[test]
    fn clocks_are_paired_within_ram() {
        let b = bench();
        assert_eq!(b.call([CLOCK_PAIRING, 0x1fc0, 0, 0, 0], 0).0, 0);
        let word = |at| b.memory.load64(at);
        assert_eq!([word(0x1fc0), word(0x1fc8), word(0x1fd0)], [1_000_000_000, 0, 2_000_000_000]);
        for gpa in [0x1fc1, 0x2000, 0xffff_ffff] {
            assert_eq!(b.call([CLOCK_PAIRING, gpa, 0, 0, 0], 0).0, EFAULT);
        }
        assert_eq!(b.call([CLOCK_PAIRING, 0, 1, 0, 0], 0).0, EOPNOTSUPP);
        assert_eq!(word(0), 0);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        assert_eq!(call([SEND_IPI, 1, 0, 0, 0x640], 0).0, EINVAL);
        for number in [POLL, KICK_CPU, CLOCK_PAIRING, SEND_IPI, SCHED_YIELD] {
            assert_eq!(call([number, 1, 0, 0, 0x40], 3), (EPERM, [None; 3]));
        }
        assert_eq!(call([77, 0, 0, 0, 0], 0).0, ENOSYS);
    }
}
