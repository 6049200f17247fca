use super::*;
use crate::devices::testing::{Host, Time};

/// The first nanosecond of a tick, counted from one second.
fn at(tick: Ticks) -> Nanos {
    nanos(ticks(1_000_000_000) + tick)
}

/// Counter 0 in this mode, loaded at tick 0 (so counting from tick 1).
fn loaded(mode: u8, count: u16) -> Pit {
    let mut pit = Pit::default();
    pit.write(3, 0x30 | mode << 1, at(0));
    let [low, high] = count.to_le_bytes();
    pit.write(0, low, at(0));
    pit.write(0, high, at(0));
    pit
}
fn count(pit: &mut Pit, tick: Ticks) -> u16 {
    pit.write(3, 0, at(tick));
    u16::from_le_bytes([pit.read(0, at(tick)), pit.read(0, at(tick))])
}

#[test]
fn ticks_and_nanoseconds_agree() {
    for tick in [0, 1, 104, 105, 1_193_182, 1 << 40] {
        assert_eq!(ticks(nanos(tick)), tick);
    }
    assert_eq!(ticks(88_000_000), 105_000);
}

#[test]
fn mode_0_rises_at_the_end_and_counts_on() {
    let mut pit = loaded(0, 100);
    assert!(!pit.out0(at(0)) && !pit.out0(at(100)));
    assert!(pit.out0(at(101)) && pit.out0(at(100_000)));
    assert_eq!((count(&mut pit, 1), count(&mut pit, 51), count(&mut pit, 103)), (100, 50, 0xfffe));
    assert_eq!(pit.next_rise0(at(0)), Some(at(101)));
    assert_eq!(pit.next_rise0(at(101)), None);
}

#[test]
fn mode_0_stops_at_the_first_byte_of_a_new_count() {
    let mut pit = loaded(0, 100);
    pit.write(0, 50, at(200));
    assert!(!pit.out0(at(200)) && !pit.out0(at(9000)));
    pit.write(0, 0, at(9000));
    assert_eq!(pit.next_rise0(at(9000)), Some(at(9051)));
}

#[test]
fn mode_2_is_low_in_the_last_tick_of_each_period() {
    let mut pit = loaded(2, 10);
    assert!(pit.out0(at(9)) && !pit.out0(at(10)) && pit.out0(at(11)) && !pit.out0(at(20)));
    assert_eq!((count(&mut pit, 1), count(&mut pit, 10), count(&mut pit, 11)), (10, 1, 10));
    assert_eq!((pit.next_rise0(at(5)), pit.next_rise0(at(11))), (Some(at(11)), Some(at(21))));
}

#[test]
fn mode_3_is_a_square_wave_that_counts_by_two() {
    let mut pit = loaded(3, 8);
    let wave: [bool; 8] = core::array::from_fn(|i| pit.out0(at(1 + i as u64)));
    assert_eq!(wave, [true, true, true, true, false, false, false, false]);
    let counts: [u16; 5] = core::array::from_fn(|i| count(&mut pit, 1 + i as u64));
    assert_eq!(counts, [8, 6, 4, 2, 8]);
    let mut odd = loaded(3, 5);
    let wave: [bool; 5] = core::array::from_fn(|i| odd.out0(at(1 + i as u64)));
    assert_eq!(wave, [true, true, true, false, false]);
}

#[test]
fn a_new_count_in_mode_2_starts_with_the_next_period() {
    let mut pit = loaded(2, 100);
    pit.write(0, 10, at(50));
    pit.write(0, 0, at(50));
    assert_eq!(count(&mut pit, 60), 41);
    assert_eq!(pit.next_rise0(at(60)), Some(at(101)));
    assert_eq!(count(&mut pit, 102), 9);
    assert_eq!(pit.next_rise0(at(101)), Some(at(111)));
}

#[test]
fn mode_4_strobes_for_one_tick() {
    let mut pit = loaded(4, 10);
    assert!(pit.out0(at(10)) && !pit.out0(at(11)) && pit.out0(at(12)));
    assert_eq!(pit.next_rise0(at(0)), Some(at(12)));
}

#[test]
fn modes_1_and_5_wait_for_the_gate() {
    for (mode, in_the_middle) in [(1u8, false), (5, true)] {
        let mut pit = Pit::default();
        pit.write(3, 0xb0 | mode << 1, at(0));
        pit.write(2, 10, at(0));
        pit.write(2, 0, at(0));
        let out = |pit: &mut Pit, tick| pit.read_port_b(at(tick)) & PORT_B_OUT2 != 0;
        assert!(out(&mut pit, 100));
        pit.write_port_b(PORT_B_GATE, at(100));
        assert_eq!(out(&mut pit, 105), in_the_middle);
        assert_eq!(out(&mut pit, 111), !in_the_middle);
        assert!(out(&mut pit, 112));
        pit.write_port_b(0, at(200));
        pit.write_port_b(PORT_B_GATE, at(200));
        assert_eq!(out(&mut pit, 205), in_the_middle);
    }
}

#[test]
fn the_gate_holds_counter_2() {
    let mut pit = Pit::default();
    pit.write(3, 0xb0, at(0));
    pit.write(2, 100, at(0));
    pit.write(2, 0, at(0));
    let out = |pit: &mut Pit, tick| pit.read_port_b(at(tick)) & PORT_B_OUT2 != 0;
    assert!(!out(&mut pit, 5000));
    pit.write_port_b(PORT_B_GATE, at(5000));
    assert!(!out(&mut pit, 5060));
    pit.write_port_b(0, at(5060));
    pit.write_port_b(PORT_B_GATE, at(9060));
    assert!(!out(&mut pit, 9090));
    assert!(out(&mut pit, 9110));
}

#[test]
fn a_latched_count_stays_until_read() {
    let mut pit = loaded(2, 1000);
    pit.write(3, 0, at(101));
    pit.write(3, 0, at(200));
    assert_eq!((pit.read(0, at(300)), pit.read(0, at(300))), ((900u16 & 0xff) as u8, 3));
    assert_eq!(pit.read(0, at(301)), (700u16 & 0xff) as u8);
}

#[test]
fn read_back_latches_status_then_count() {
    let mut pit = loaded(2, 10);
    pit.write(3, 0xc2, at(3));
    assert_eq!(pit.read(0, at(9)), 0x80 | 0x30 | 2 << 1);
    assert_eq!((pit.read(0, at(9)), pit.read(0, at(9))), (8, 0));
    let mut fresh = Pit::default();
    fresh.write(3, 0x34, at(0));
    fresh.write(3, 0xe2, at(0));
    assert_eq!(fresh.read(0, at(0)) & 0x40, 0x40);
}

#[test]
fn bcd_counts_in_decimal() {
    let mut pit = Pit::default();
    pit.write(3, 0x31, at(0));
    pit.write(0, 0x00, at(0));
    pit.write(0, 0x10, at(0));
    assert_eq!(count(&mut pit, 2), 0x0999);
    assert_eq!(pit.next_rise0(at(0)), Some(at(1001)));
    assert_eq!(count(&mut pit, 1002), 0x9999);
}

#[test]
fn single_byte_orders() {
    let mut pit = Pit::default();
    pit.write(3, 0x10, at(0));
    pit.write(0, 20, at(0));
    assert_eq!((pit.read(0, at(6)), pit.read(0, at(7))), (15, 14));
    pit.write(3, 0x20, at(10));
    pit.write(0, 2, at(10));
    assert_eq!(pit.read(0, at(11)), 2);
}

#[test]
fn a_count_of_zero_is_the_largest() {
    let pit = loaded(2, 0);
    assert_eq!(pit.next_rise0(at(0)), Some(at(0x1_0001)));
}

#[test]
fn refresh_toggles_and_port_b_keeps_four_bits() {
    let mut pit = Pit::default();
    pit.write_port_b(0xff, 0);
    assert_eq!(pit.read_port_b(0) & 0x1f, 0x0f);
    assert_eq!(pit.read_port_b(REFRESH_PERIOD) & 0x1f, 0x1f);
    assert!(pit.speaker());
}

#[test]
fn odd_inputs_do_not_panic() {
    for control in 0..=255u8 {
        for count in [0u8, 1, 0xff] {
            let mut pit = Pit::default();
            pit.write_port_b(control, at(0));
            pit.write(3, control, at(1));
            for port in 0..3 {
                pit.write(port, count, at(2));
                pit.write(port, count, at(2));
                pit.write(port, count, at(2));
                pit.read(port, at(3));
                pit.read(port, Nanos::MAX);
            }
            pit.write_port_b(!control, at(0));
            pit.read_port_b(Nanos::MAX);
            pit.next_rise0(Nanos::MAX);
            pit.write(0, count, Nanos::MAX);
            pit.write(0, count, Nanos::MAX);
            pit.next_rise0(0);
        }
    }
}

#[test]
fn the_adapter_interrupts_every_period() {
    let (host, time) = (Host::new(), Time::new());
    let hub = TimerHub::new(host.clone());
    let pit = IntervalTimer::new(host.clone(), time.clone(), &hub);
    pit.port_write(0x43, 1, 0x34);
    for byte in 11932u16.to_le_bytes() {
        pit.port_write(0x40, 1, byte.into());
    }
    for _ in 0..3 {
        let deadline = host.deadline().unwrap();
        time.advance(deadline - time.now());
        hub.expired(deadline);
    }
    let rises = host.levels().windows(2).filter(|w| !w[0] && w[1]).count();
    assert_eq!(rises, 3);
    assert_eq!(host.levels().last(), Some(&true));
}

#[test]
fn the_adapter_disarms_when_nothing_counts() {
    let (host, time) = (Host::new(), Time::new());
    let hub = TimerHub::new(host.clone());
    let pit = IntervalTimer::new(host.clone(), time.clone(), &hub);
    pit.port_write(0x43, 1, 0x34);
    pit.port_write(0x40, 1, 2);
    pit.port_write(0x40, 1, 0);
    assert!(host.deadline().unwrap() >= time.now() + SHORTEST_PERIOD);
    pit.port_write(0x43, 1, 0x30);
    assert_eq!(host.deadline(), None);
    assert_eq!(host.levels().last(), Some(&false));
}

#[test]
fn save_and_restore() {
    let mut pit = loaded(2, 77);
    let mut other = Pit::default();
    other.restore(&pit.save()).unwrap();
    assert_eq!(count(&mut other, 33), count(&mut pit, 33));
    let mut saved = pit.save();
    saved.registers.counters[1].counting = 0;
    assert_eq!(other.restore(&saved), Err(RestoreError::Invalid));
}
