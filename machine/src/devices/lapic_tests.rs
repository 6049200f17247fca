use super::*;

/// A time in periods of the timer's input clock; the time-stamp counter has twice its frequency.
fn at(time: u64) -> Moment {
    Moment { now: time * INPUT_PERIOD, tsc: time * 2, tsc_hz: APIC_BUS_HZ * 2 }
}
/// The deadline in the same unit.
fn deadline(lapic: &Lapic, time: u64) -> Option<u64> {
    Some(lapic.deadline(&at(time))?.div_ceil(INPUT_PERIOD))
}
fn lapic() -> Lapic {
    let mut lapic = Lapic::new(1, false, 40);
    write(&mut lapic, reg::SVR, 0x1ff);
    lapic
}
fn x2apic() -> Lapic {
    let mut lapic = lapic();
    lapic.set_base(DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC).unwrap();
    lapic
}
fn write_at(lapic: &mut Lapic, register: u32, value: u32, now: Nanos) -> Effect {
    lapic.mmio_write(u64::from(register) << 4, 4, value.into(), &at(now))
}
fn write(lapic: &mut Lapic, register: u32, value: u32) -> Effect {
    write_at(lapic, register, value, 0)
}
fn read_at(lapic: &mut Lapic, register: u32, now: Nanos) -> u32 {
    lapic.mmio_read(u64::from(register) << 4, 4, &at(now)) as u32
}
fn read(lapic: &mut Lapic, register: u32) -> u32 {
    read_at(lapic, register, 0)
}
fn message(destination: u32, logical: bool) -> Message {
    Message { destination, logical, delivery: Delivery::Fixed, vector: 0x40, level: false }
}

mod interrupts {
    use super::*;

    #[test]
    fn go_from_request_to_service_to_end() {
        let mut l = lapic();
        l.accept(0x41, false);
        assert_eq!(read(&mut l, reg::IRR + 2), 1 << 1);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0x41)));
        assert_eq!((read(&mut l, reg::IRR + 2), read(&mut l, reg::ISR + 2)), (0, 1 << 1));
        assert_eq!(read(&mut l, reg::PPR), 0x40);
        assert_eq!(write(&mut l, reg::EOI, 0), Effect::None);
        assert_eq!((read(&mut l, reg::ISR + 2), read(&mut l, reg::PPR)), (0, 0));
    }

    #[test]
    fn nest_by_priority_class() {
        let mut l = lapic();
        l.accept(0x45, false);
        l.acknowledge();
        l.accept(0x4f, false);
        assert_eq!(l.pending(), None);
        l.accept(0x50, false);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0x50)));
        write(&mut l, reg::EOI, 0);
        write(&mut l, reg::EOI, 0);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0x4f)));
    }

    #[test]
    fn wait_for_the_task_priority() {
        let mut l = lapic();
        l.set_cr8(4);
        assert_eq!(read(&mut l, reg::TPR), 0x40);
        l.accept(0x4f, false);
        assert_eq!(l.pending(), None);
        write(&mut l, reg::TPR, 0x3f);
        assert_eq!((l.cr8(), l.pending()), (3, Some(Pending::Vector(0x4f))));
    }

    #[test]
    fn tell_the_io_apic_when_level_triggered() {
        let mut l = lapic();
        l.accept(0x60, true);
        assert_eq!(read(&mut l, reg::TMR + 3), 1);
        l.acknowledge();
        assert_eq!(write(&mut l, reg::EOI, 0), Effect::EndOfInterrupt(0x60));
        assert_eq!(write(&mut l, reg::EOI, 0), Effect::None);
        l.accept(0x60, false);
        assert_eq!(read(&mut l, reg::TMR + 3), 0);
        write(&mut l, reg::SVR, 0x1ff | SVR_SUPPRESS_EOI_BROADCAST);
        l.acknowledge();
        l.accept(0x60, true);
        assert_eq!(write(&mut l, reg::EOI, 0), Effect::None);
    }

    #[test]
    fn are_refused_while_disabled_by_software() {
        let mut l = Lapic::new(0, true, 40);
        l.accept(0x40, false);
        assert_eq!(l.pending(), None);
        write(&mut l, reg::LVT_TIMER, 0x40);
        assert_eq!(read(&mut l, reg::LVT_TIMER), 0x40 | LVT_MASKED);
        write(&mut l, reg::SVR, 0x1ff);
        assert_eq!(read(&mut l, reg::LVT_TIMER), 0x40 | LVT_MASKED);
    }

    #[test]
    fn with_illegal_vectors_are_errors() {
        let mut l = lapic();
        write(&mut l, reg::LVT_ERROR, 0xfe);
        l.accept(0x0f, false);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0xfe)));
        assert_eq!(read(&mut l, reg::ESR), 0);
        write(&mut l, reg::ESR, 0);
        assert_eq!(read(&mut l, reg::ESR), ESR_RECEIVE_ILLEGAL_VECTOR);
        write(&mut l, reg::ESR, 0);
        assert_eq!(read(&mut l, reg::ESR), 0);
        write(&mut l, reg::LVT_ERROR, 3);
        assert_eq!(write(&mut l, reg::ICR, 5), Effect::None);
        write(&mut l, reg::ESR, 0);
        assert_eq!(read(&mut l, reg::ESR), ESR_SEND_ILLEGAL_VECTOR | ESR_RECEIVE_ILLEGAL_VECTOR);
    }
}

mod local_lines {
    use super::*;

    #[test]
    fn the_pic_is_seen_through_lint0() {
        let mut l = lapic();
        assert!(!l.set_lint0(true));
        assert_eq!(l.pending(), None);
        write(&mut l, reg::LVT_TIMER + 3, 0x700);
        assert_eq!(l.acknowledge(), Some(Pending::ExtInt));
        l.set_lint0(false);
        assert_eq!(l.pending(), None);
        l.accept_ext_int();
        assert_eq!(l.acknowledge(), Some(Pending::ExtInt));
        assert_eq!(l.acknowledge(), None);
    }

    #[test]
    fn a_disabled_apic_leaves_the_pic_on_the_interrupt_pin() {
        let mut l = lapic();
        l.set_base(DEFAULT_BASE).unwrap();
        l.set_lint0(true);
        assert_eq!(l.pending(), Some(Pending::ExtInt));
    }

    #[test]
    fn nmi_comes_with_the_edge() {
        let mut l = lapic();
        write(&mut l, reg::LVT_TIMER + 4, 0x400);
        assert!(l.set_lint1(true));
        assert!(!l.set_lint1(true));
        l.set_lint1(false);
        write(&mut l, reg::LVT_TIMER + 4, 0x400 | LVT_MASKED);
        assert!(!l.set_lint1(true));
    }

    #[test]
    fn a_fixed_level_is_requested_again_after_its_eoi() {
        let mut l = lapic();
        write(&mut l, reg::LVT_TIMER + 3, 0x50 | LVT_LEVEL);
        l.set_lint0(true);
        assert_ne!(read(&mut l, reg::LVT_TIMER + 3) & LVT_REMOTE_IRR, 0);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0x50)));
        assert_eq!(l.pending(), None);
        write(&mut l, reg::EOI, 0);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0x50)));
        l.set_lint0(false);
        write(&mut l, reg::EOI, 0);
        assert_eq!(l.pending(), None);
    }

    #[test]
    fn a_fixed_edge_is_requested_once() {
        let mut l = lapic();
        write(&mut l, reg::LVT_TIMER + 4, 0x51);
        l.set_lint1(true);
        l.set_lint1(true);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0x51)));
        assert_eq!(l.pending(), None);
    }
}

mod timer {
    use super::*;

    fn start(mode: u32, divide: u32, count: u32) -> Lapic {
        let mut l = lapic();
        write(&mut l, reg::LVT_TIMER, 0xee | mode << 17);
        write(&mut l, reg::DIVIDE, divide);
        write_at(&mut l, reg::INITIAL_COUNT, count, 1000);
        l
    }

    #[test]
    fn one_shot_counts_down_once() {
        let mut l = start(0, 0xb, 100);
        assert_eq!(deadline(&l, 1000), Some(1100));
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 1040), 60);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 1100), 0);
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0xee)));
        assert_eq!((deadline(&l, 1100), read_at(&mut l, reg::CURRENT_COUNT, 5000)), (None, 0));
        assert_eq!(read(&mut l, reg::INITIAL_COUNT), 100);
    }

    #[test]
    fn the_divisors() {
        for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            let l = start(0, code, 1000);
            assert_eq!(deadline(&l, 1000), Some(1000 + 1000 * divisor));
        }
    }

    #[test]
    fn changing_the_divisor_keeps_the_count() {
        let mut l = start(0, 0xb, 1000);
        write_at(&mut l, reg::DIVIDE, 0, 1400);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 1400), 600);
        assert_eq!(deadline(&l, 1400), Some(1400 + 1200));
    }

    #[test]
    fn periodic_goes_on_and_late_polls_give_one_interrupt() {
        let mut l = start(1, 0xb, 100_000);
        l.advance(&at(101_000));
        assert_eq!((l.acknowledge(), deadline(&l, 101_000)), (Some(Pending::Vector(0xee)), Some(201_000)));
        write(&mut l, reg::EOI, 0);
        l.advance(&at(551_000));
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 551_000), 50_000);
        assert_eq!((l.acknowledge(), l.acknowledge()), (Some(Pending::Vector(0xee)), None));
    }

    /// The shortest period, in periods of the input clock.
    const SHORTEST: u64 = SHORTEST_PERIOD / INPUT_PERIOD;

    #[test]
    fn a_tiny_period_floods_neither_host_nor_guest() {
        let mut l = start(1, 0xb, 1);
        assert_eq!(deadline(&l, 1000), Some(1000 + SHORTEST));
        let mut interrupts = 0;
        // A guest that does nothing but end its interrupts, an access every 10 periods of the clock.
        for now in (1000..1000 + 10 * SHORTEST).step_by(10) {
            interrupts += u32::from(l.acknowledge().is_some());
            write_at(&mut l, reg::EOI, 0, now);
        }
        assert_eq!(interrupts, 9);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 1000 + 10 * SHORTEST), 1);
        assert_eq!(deadline(&l, 1000 + 10 * SHORTEST), Some(1000 + 11 * SHORTEST));
    }

    #[test]
    fn only_the_periodic_mode_has_a_shortest_time() {
        let mut l = start(0, 0xb, 1);
        assert_eq!(deadline(&l, 1000), Some(1001));
        l.advance(&at(1001));
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0xee)));
        let l = start(1, 0xb, SHORTEST as u32 + 1);
        assert_eq!(deadline(&l, 1000), Some(1001 + SHORTEST));
    }

    #[test]
    fn changes_of_mode_keep_the_count() {
        let mut l = start(0, 0xb, 100_000);
        write_at(&mut l, reg::LVT_TIMER, 0xee | 1 << 17, 61_000);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 61_000), 40_000);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 111_000), 90_000);
        write_at(&mut l, reg::LVT_TIMER, 0xee, 151_000);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 151_000), 50_000);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 201_000), 0);
        write_at(&mut l, reg::LVT_TIMER, 0xee | 1 << 17, 201_001);
        assert_eq!(read_at(&mut l, reg::CURRENT_COUNT, 251_000), 0);
    }

    #[test]
    fn a_masked_timer_counts_without_interrupting() {
        let mut l = start(0, 0xb, 100);
        write_at(&mut l, reg::LVT_TIMER, 0xee | LVT_MASKED, 1010);
        assert_eq!((deadline(&l, 1010), read_at(&mut l, reg::CURRENT_COUNT, 1010)), (None, 90));
        write_at(&mut l, reg::LVT_TIMER, 0xee, 2000);
        assert_eq!(l.pending(), None);
    }

    #[test]
    fn a_count_of_zero_stops() {
        let mut l = start(1, 0xb, 100);
        write_at(&mut l, reg::INITIAL_COUNT, 0, 1050);
        assert_eq!((deadline(&l, 1050), read_at(&mut l, reg::CURRENT_COUNT, 1050)), (None, 0));
    }

    #[test]
    fn tsc_deadline() {
        let mut l = start(2, 0, 0);
        l.set_tsc_deadline(3001, &at(1000));
        assert_eq!(l.tsc_deadline(&at(1000)), 3001);
        assert_eq!(deadline(&l, 1000), Some(1501));
        l.advance(&at(1500));
        assert_eq!(l.pending(), None);
        l.advance(&at(1501));
        assert_eq!((l.pending(), l.tsc_deadline(&at(1501))), (Some(Pending::Vector(0xee)), 0));
    }

    #[test]
    fn a_tsc_deadline_in_the_past_is_due_at_once() {
        let mut l = start(2, 0, 0);
        l.set_tsc_deadline(1, &at(1000));
        assert_eq!((l.pending(), l.tsc_deadline(&at(1000))), (Some(Pending::Vector(0xee)), 0));
    }

    #[test]
    fn the_far_future_does_not_overflow() {
        let mut l = start(2, 0, 0);
        l.set_tsc_deadline(u64::MAX, &at(1000));
        let moment = Moment { tsc_hz: 1, ..at(1000) };
        assert_eq!(l.deadline(&moment), Some(u64::MAX));
    }

    #[test]
    fn modes_keep_to_their_registers() {
        let mut l = start(2, 0xb, 0);
        write(&mut l, reg::INITIAL_COUNT, 50);
        assert_eq!((read(&mut l, reg::INITIAL_COUNT), read(&mut l, reg::CURRENT_COUNT)), (0, 0));
        l.set_tsc_deadline(1 << 40, &at(0));
        write(&mut l, reg::LVT_TIMER, 0xee);
        assert_eq!(l.tsc_deadline(&at(0)), 0);
        l.set_tsc_deadline(1 << 40, &at(0));
        assert_eq!(l.tsc_deadline(&at(0)), 0);
    }
}

mod base {
    use super::*;

    const OFF: u64 = DEFAULT_BASE;
    const XAPIC: u64 = DEFAULT_BASE | BASE_ENABLED;
    const X2APIC: u64 = XAPIC | BASE_X2APIC;
    const INVALID: u64 = DEFAULT_BASE | BASE_X2APIC;

    #[test]
    fn only_some_changes_of_mode_are_allowed() {
        for (from, to, allowed) in [
            (vec![], INVALID, false),
            (vec![], X2APIC, true),
            (vec![X2APIC], X2APIC, true),
            (vec![X2APIC], XAPIC, false),
            (vec![X2APIC], INVALID, false),
            (vec![X2APIC], OFF, true),
            (vec![OFF], INVALID, false),
            (vec![OFF], X2APIC, false),
            (vec![OFF], XAPIC, true),
        ] {
            let mut l = lapic();
            from.iter().for_each(|&base| l.set_base(base).unwrap());
            assert_eq!(l.set_base(to).is_ok(), allowed, "{from:x?} {to:x}");
        }
    }
    use alloc::vec;

    #[test]
    fn reserved_bits_are_refused_and_the_address_moves() {
        let mut l = lapic();
        assert!(l.set_base(XAPIC | 1).is_err());
        assert!(l.set_base(XAPIC | 1 << 40).is_err());
        l.set_base(0xfed4_0000 | BASE_ENABLED | BASE_BSP).unwrap();
        assert_eq!((l.mmio_base(), l.base()), (Some(0xfed4_0000), 0xfed4_0900));
        l.set_base(X2APIC).unwrap();
        assert_eq!(l.mmio_base(), None);
    }

    #[test]
    fn switching_off_resets_all_but_cr8() {
        let mut l = lapic();
        write(&mut l, reg::ID, 7 << 24);
        l.set_cr8(9);
        l.accept(0x40, false);
        l.set_base(OFF).unwrap();
        l.set_base(XAPIC).unwrap();
        assert_eq!((l.id(), l.cr8(), l.pending(), read(&mut l, reg::SVR)), (1, 9, None, 0xff));
    }

    #[test]
    fn init_keeps_mode_and_id() {
        let mut l = lapic();
        write(&mut l, reg::ID, 7 << 24);
        l.accept(0xf0, false);
        l.init();
        assert_eq!((l.id(), l.base(), l.pending()), (7, XAPIC, None));
        let mut l = x2apic();
        l.init();
        assert_eq!(l.base(), X2APIC);
    }
}

mod destinations {
    use super::*;

    #[test]
    fn physical() {
        let mut l = lapic();
        write(&mut l, reg::ID, 5 << 24);
        assert!(l.matches(&message(5, false)) && !l.matches(&message(1, false)));
        assert!(l.matches(&message(BROADCAST, false)) && !l.matches(&message(0x105, false)));
        let l = x2apic();
        assert!(l.matches(&message(1, false)) && !l.matches(&message(0xff, false)));
        assert!(l.matches(&message(BROADCAST, false)) && l.matches(&message(BROADCAST, true)));
    }

    #[test]
    fn logical_flat() {
        let mut l = lapic();
        assert!(!l.matches(&message(BROADCAST, true)));
        write(&mut l, reg::LDR, 0x04ff_ffff);
        assert_eq!(read(&mut l, reg::LDR), 0x0400_0000);
        assert!(l.matches(&message(0x04, true)) && l.matches(&message(0xfe, true)));
        assert!(!l.matches(&message(0xfb, true)) && l.matches(&message(BROADCAST, true)));
    }

    #[test]
    fn logical_cluster() {
        let mut l = lapic();
        write(&mut l, reg::DFR, 0);
        assert_eq!(read(&mut l, reg::DFR), 0x0fff_ffff);
        write(&mut l, reg::LDR, 0x3200_0000);
        assert!(l.matches(&message(0x32, true)) && l.matches(&message(0x3f, true)));
        assert!(!l.matches(&message(0x3d, true)) && !l.matches(&message(0x22, true)));
        assert!(l.matches(&message(BROADCAST, true)));
    }

    #[test]
    fn x2apic_cluster() {
        let mut l = Lapic::new(0x23, false, 40);
        l.set_base(DEFAULT_BASE | BASE_ENABLED | BASE_X2APIC).unwrap();
        assert_eq!(l.msr_read(MSR_X2APIC + reg::LDR, &at(0)), Ok(0x0002_0008));
        assert!(l.matches(&message(0x0002_000c, true)));
        assert!(!l.matches(&message(0x0002_0004, true)) && !l.matches(&message(0x0003_0008, true)));
    }

    #[test]
    fn a_disabled_apic_takes_nothing() {
        let mut l = lapic();
        l.set_base(DEFAULT_BASE).unwrap();
        assert!(!l.matches(&message(1, false)));
    }
}

mod sending {
    use super::*;

    #[test]
    fn xapic_destination_and_shorthands() {
        let mut l = lapic();
        write(&mut l, reg::ICR_HIGH, 0x0300_0000);
        let Effect::Send(Target::Destination, sent) = write(&mut l, reg::ICR, 0x4840) else { panic!() };
        assert_eq!(sent, message(3, true));
        write(&mut l, reg::ICR_HIGH, 0xff00_0000);
        let Effect::Send(Target::Destination, sent) = write(&mut l, reg::ICR, 0x40) else { panic!() };
        assert_eq!(sent.destination, BROADCAST);
        for (bits, target) in [(1, Target::Myself), (2, Target::All), (3, Target::Others)] {
            let Effect::Send(to, _) = write(&mut l, reg::ICR, 0x40 | bits << 18) else { panic!() };
            assert_eq!(to, target);
        }
        assert_eq!(read(&mut l, reg::ICR) & ICR_DELIVERY_STATUS as u32, 0);
    }

    #[test]
    fn start_up_of_a_processor() {
        let mut l = lapic();
        let Effect::Send(_, init) = write(&mut l, reg::ICR, 0xc500) else { panic!() };
        assert_eq!(init.delivery, Delivery::Init);
        assert_eq!(write(&mut l, reg::ICR, 0x8500), Effect::None);
        let Effect::Send(_, sipi) = write(&mut l, reg::ICR, 0x0699) else { panic!() };
        assert_eq!((sipi.delivery, sipi.vector), (Delivery::Sipi, 0x99));
    }

    #[test]
    fn x2apic_sends_in_one_write() {
        let mut l = x2apic();
        let icr = 0x0000_00ff_0000_4040;
        let Ok(Effect::Send(_, sent)) = l.msr_write(MSR_X2APIC + reg::ICR, icr, &at(0)) else { panic!() };
        assert_eq!(sent, message(0xff, false));
        assert_eq!(l.msr_read(MSR_X2APIC + reg::ICR, &at(0)), Ok(icr));
        assert_eq!(l.msr_write(MSR_X2APIC + reg::SELF_IPI, 0x33, &at(0)), Ok(Effect::None));
        assert_eq!(l.acknowledge(), Some(Pending::Vector(0x33)));
    }
}

mod access {
    use super::*;

    #[test]
    fn identification() {
        let mut l = lapic();
        assert_eq!((read(&mut l, reg::ID), read(&mut l, reg::VERSION)), (1 << 24, VERSION));
        write(&mut l, reg::VERSION, 0);
        assert_eq!(read(&mut l, reg::VERSION), VERSION);
        assert_eq!(x2apic().msr_read(MSR_X2APIC + reg::ID, &at(0)), Ok(1));
    }

    #[test]
    fn sizes_and_alignment_in_memory_space() {
        let mut l = lapic();
        assert_eq!(l.mmio_read(0x32, 1, &at(0)), 0x05);
        assert_eq!(l.mmio_read(0x30, 8, &at(0)), u64::from(VERSION));
        assert_eq!(l.mmio_read(0x34, 4, &at(0)), 0);
        l.mmio_write(0x80, 8, 0x50, &at(0));
        l.mmio_write(0x84, 4, 0x50, &at(0));
        l.mmio_write(0x80, 1, 0x50, &at(0));
        assert_eq!(read(&mut l, reg::TPR), 0);
    }

    #[test]
    fn unknown_registers_are_errors_in_memory_space() {
        let mut l = lapic();
        assert_eq!(read(&mut l, 0x00), 0);
        write(&mut l, reg::ESR, 0);
        assert_eq!(read(&mut l, reg::ESR), ESR_ILLEGAL_REGISTER);
        write(&mut l, reg::SELF_IPI, 0x40);
        assert_eq!(l.pending(), None);
        write(&mut l, reg::ESR, 0);
        assert_eq!(read(&mut l, reg::ESR), ESR_ILLEGAL_REGISTER);
    }

    /// Reads and writes (of zero) that the table of section 11.12.1.2 allows.
    #[test]
    fn x2apic_registers() {
        for register in 0..0x100u32 {
            let (readable, writable) = match register {
                0x02 | 0x03 | 0x0a | 0x0d | 0x10..=0x27 | 0x39 => (true, false),
                0x08 | 0x0f | 0x28 | 0x30 | 0x32..=0x38 | 0x3e => (true, true),
                0x0b | 0x3f => (false, true),
                _ => (false, false),
            };
            let msr = MSR_X2APIC + register;
            assert_eq!(x2apic().msr_read(msr, &at(0)).is_ok(), readable, "read {register:#x}");
            assert_eq!(x2apic().msr_write(msr, 0, &at(0)).is_ok(), writable, "write {register:#x}");
            let high = if register == 0x30 { 1 << 20 } else { 1 << 32 };
            assert!(x2apic().msr_write(msr, high, &at(0)).is_err(), "reserved {register:#x}");
            assert!(lapic().msr_read(msr, &at(0)).is_err());
            assert!(lapic().msr_write(msr, 0, &at(0)).is_err());
        }
    }

    #[test]
    fn x2apic_reserved_bits() {
        let mut l = x2apic();
        for (register, good, bad) in
            [(reg::SELF_IPI, 0xff, 0x100), (reg::TPR, 0xff, 0x100), (reg::EOI, 0, 1), (reg::ESR, 0, 1)]
        {
            assert!(l.msr_write(MSR_X2APIC + register, good, &at(0)).is_ok());
            assert!(l.msr_write(MSR_X2APIC + register, bad, &at(0)).is_err());
        }
    }

    #[test]
    fn any_write_is_survived() {
        const FAR: u64 = u64::MAX / INPUT_PERIOD / 2;
        for register in 0..0x100 {
            for value in [0, 1, 0x40, 0xff, 0x7_0000, 0x2_0000, u32::MAX] {
                let mut l = lapic();
                write_at(&mut l, reg::INITIAL_COUNT, u32::MAX, FAR);
                write_at(&mut l, register, value, FAR);
                write_at(&mut l, register, value, FAR * 2);
                read_at(&mut l, register, FAR * 2);
                deadline(&l, 0);
            }
        }
    }
}

#[test]
fn save_and_restore() {
    let mut l = lapic();
    l.accept(0x77, true);
    let mut other = Lapic::new(0, true, 36);
    other.restore(&l.save()).unwrap();
    assert_eq!((other.id(), other.acknowledge()), (1, Some(Pending::Vector(0x77))));
}
