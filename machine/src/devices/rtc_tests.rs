use super::*;
use crate::devices::testing::{Host, Time};

/// 2024-02-29 23:59:58 UTC, a Thursday.
const LEAP_DAY: u64 = 1_709_251_198;
const START: Nanos = 5 * SECOND;

fn rtc() -> Rtc {
    Rtc::new(START, LEAP_DAY)
}
fn get(rtc: &mut Rtc, register: u8, after: Nanos) -> u8 {
    rtc.write_index(register);
    rtc.read_data(START + after)
}
fn put(rtc: &mut Rtc, register: u8, value: u8, after: Nanos) {
    rtc.write_index(register);
    rtc.write_data(value, START + after);
}
fn date(rtc: &mut Rtc, after: Nanos) -> [u8; 5] {
    [CENTURY, reg::YEAR, reg::MONTH, reg::DAY_OF_MONTH, reg::DAY_OF_WEEK].map(|r| get(rtc, r, after))
}
fn time(rtc: &mut Rtc, after: Nanos) -> [u8; 3] {
    [reg::HOURS, reg::MINUTES, reg::SECONDS].map(|r| get(rtc, r, after))
}

#[test]
fn time_goes_on_over_a_leap_day() {
    let mut rtc = rtc();
    assert_eq!((date(&mut rtc, 0), time(&mut rtc, 0)), ([0x20, 0x24, 2, 0x29, 5], [0x23, 0x59, 0x58]));
    let after = 2 * SECOND;
    assert_eq!((date(&mut rtc, after), time(&mut rtc, after)), ([0x20, 0x24, 3, 1, 6], [0, 0, 0]));
}

#[test]
fn dates_and_days_agree() {
    for day in (-800_000..800_000).step_by(61) {
        let (year, month, date) = date_from_days(day);
        assert_eq!(days_from_date(year, month.into(), date.into()), day);
    }
    assert_eq!(date_from_days(0), (1970, 1, 1));
    assert_eq!(date_from_days(11_016), (2000, 2, 29));
}

#[test]
fn binary_and_twelve_hour_forms() {
    let mut rtc = rtc();
    put(&mut rtc, reg::B, B_BINARY, 0);
    assert_eq!(time(&mut rtc, 0), [11 | PM, 59, 58]);
    assert_eq!(time(&mut rtc, 2 * SECOND), [12, 0, 0]);
    put(&mut rtc, reg::HOURS, 12 | PM, 2 * SECOND);
    put(&mut rtc, reg::B, B_24_HOURS, 2 * SECOND);
    assert_eq!(time(&mut rtc, 2 * SECOND), [0x12, 0, 0]);
}

#[test]
fn setting_stops_updates_and_takes_effect_as_a_whole() {
    let mut rtc = rtc();
    put(&mut rtc, reg::B, B_SET | B_24_HOURS | UPDATE, SECOND / 2);
    assert_eq!(get(&mut rtc, reg::B, SECOND), B_SET | B_24_HOURS);
    for (register, value) in [
        (reg::DAY_OF_MONTH, 0x31),
        (reg::MONTH, 0x12),
        (reg::YEAR, 0x99),
        (CENTURY, 0x19),
        (reg::HOURS, 0x23),
        (reg::MINUTES, 0x59),
        (reg::SECONDS, 0x59),
        (reg::DAY_OF_WEEK, 6),
    ] {
        put(&mut rtc, register, value, SECOND);
    }
    assert_eq!(time(&mut rtc, 90 * SECOND), [0x23, 0x59, 0x59]);
    put(&mut rtc, reg::B, B_24_HOURS, 90 * SECOND + SECOND / 2);
    assert_eq!(date(&mut rtc, 90 * SECOND + SECOND * 9 / 10), [0x19, 0x99, 0x12, 0x31, 6]);
    assert_eq!(date(&mut rtc, 91 * SECOND), [0x20, 0x00, 1, 1, 7]);
}

#[test]
fn the_divider_reset_fixes_the_phase() {
    let mut rtc = rtc();
    put(&mut rtc, reg::A, 0x76, SECOND / 10);
    assert_eq!(time(&mut rtc, 3 * SECOND), [0x23, 0x59, 0x58]);
    put(&mut rtc, reg::A, 0x26, 3 * SECOND);
    assert_eq!(time(&mut rtc, 3 * SECOND + SECOND / 2 - 1), [0x23, 0x59, 0x58]);
    assert_eq!(time(&mut rtc, 3 * SECOND + SECOND / 2), [0x23, 0x59, 0x59]);
}

#[test]
fn update_in_progress_comes_before_the_update() {
    let mut rtc = rtc();
    assert_eq!(get(&mut rtc, reg::A, SECOND - UPDATE_IN_PROGRESS - 1) & A_UIP, 0);
    assert_eq!(get(&mut rtc, reg::A, SECOND - UPDATE_IN_PROGRESS), 0x26 | A_UIP);
    assert_eq!(get(&mut rtc, reg::A, SECOND) & A_UIP, 0);
    put(&mut rtc, reg::A, 0xff, SECOND);
    assert_eq!(get(&mut rtc, reg::A, SECOND), 0x7f);
}

#[test]
fn the_update_ended_interrupt() {
    let mut rtc = rtc();
    assert_eq!(rtc.deadline(START), None);
    put(&mut rtc, reg::B, B_24_HOURS | UPDATE, SECOND / 4);
    assert_eq!(rtc.deadline(START + SECOND / 4), Some(START + SECOND));
    rtc.poll(START + SECOND);
    assert!(rtc.irq());
    assert_eq!(rtc.deadline(START + SECOND), None);
    assert_eq!(get(&mut rtc, reg::C, SECOND), C_IRQF | UPDATE | PERIODIC);
    assert!(!rtc.irq());
    assert_eq!(get(&mut rtc, reg::C, SECOND), 0);
}

#[test]
fn the_alarm_matches_with_wild_cards() {
    let mut rtc = rtc();
    put(&mut rtc, reg::HOURS_ALARM, 0xff, 0);
    put(&mut rtc, reg::MINUTES_ALARM, 0xc0, 0);
    put(&mut rtc, reg::SECONDS_ALARM, 0x01, 0);
    put(&mut rtc, reg::B, B_24_HOURS | ALARM, 0);
    rtc.poll(START + 2 * SECOND);
    assert!(!rtc.irq());
    rtc.poll(START + 3 * SECOND);
    assert!(rtc.irq());
    assert_eq!(get(&mut rtc, reg::C, 3 * SECOND) & (C_IRQF | ALARM), C_IRQF | ALARM);
    rtc.poll(START + 62 * SECOND);
    assert!(!rtc.irq());
    rtc.poll(START + 9_999_999 * SECOND);
    assert!(rtc.irq());
}

#[test]
fn the_periodic_interrupt_has_the_rate_of_register_a() {
    let mut rtc = rtc();
    put(&mut rtc, reg::B, B_24_HOURS | PERIODIC, 0);
    let mut count = 0;
    let mut now = START;
    while now < START + SECOND {
        now = rtc.deadline(now).unwrap();
        rtc.poll(now);
        assert!(rtc.irq());
        get(&mut rtc, reg::C, now - START);
        count += 1;
    }
    assert_eq!(count, 1024);
    put(&mut rtc, reg::A, 0x20, SECOND);
    assert_eq!(rtc.deadline(now), None);
    put(&mut rtc, reg::A, 0x21, SECOND);
    assert_eq!(rtc.period_ticks(), Some(128));
}

#[test]
fn cmos_ram_tells_the_memory_size() {
    let mut rtc = rtc();
    rtc.set_memory(512 << 20, 3 << 30);
    let cells = [0x15, 0x16, 0x17, 0x18, 0x34, 0x35, 0x5b, 0x5c, 0x5d].map(|r| get(&mut rtc, r, 0));
    assert_eq!(cells, [0x80, 0x02, 0xff, 0xff, 0x00, 0x1f, 0x00, 0xc0, 0x00]);
    put(&mut rtc, 0x40 | 0x80, 0x5a, 0);
    assert!(rtc.nmi_masked());
    assert_eq!(get(&mut rtc, 0x40, 0), 0x5a);
    assert!(!rtc.nmi_masked());
}

#[test]
fn odd_values_do_not_panic() {
    for value in (0..=255u8).step_by(15) {
        let mut rtc = rtc();
        for register in (0..=255).rev() {
            put(&mut rtc, register, value, SECOND);
        }
        for register in 0..128 {
            get(&mut rtc, register, Nanos::MAX - START);
        }
        rtc.deadline(Nanos::MAX);
    }
}

#[test]
fn the_adapter_interrupts() {
    let (host, time) = (Host::new(), Time::new());
    let hub = TimerHub::new(host.clone());
    let clock = RealTimeClock::new(host.clone(), time.clone(), &hub, 1 << 30, 0);
    clock.port_write(0x70, 1, reg::B.into());
    clock.port_write(0x71, 1, u32::from(B_24_HOURS | UPDATE));
    let deadline = host.deadline().unwrap();
    time.advance(deadline - time.now());
    hub.expired(deadline);
    assert_eq!(host.levels().last(), Some(&true));
    assert_eq!(clock.port_read(0x70, 1) & 0xff, 0xff);
    clock.port_write(0x70, 1, reg::C.into());
    clock.port_read(0x71, 1);
    assert_eq!(host.levels().last(), Some(&false));
    assert_eq!(host.deadline(), Some(deadline + SECOND));
}

#[test]
fn save_and_restore() {
    let mut rtc = rtc();
    put(&mut rtc, 0x40, 7, 0);
    let mut other = Rtc::new(0, 0);
    other.restore(&rtc.save()).unwrap();
    assert_eq!(time(&mut other, SECOND), time(&mut rtc, SECOND));
    let mut saved = rtc.save();
    saved.registers.seconds = i64::MAX;
    assert_eq!(other.restore(&saved), Err(RestoreError::Invalid));
}
