//! Time of the host: CLOCK_MONOTONIC, the wall clock, and the time-stamp counter with its frequency.
#![allow(unsafe_code)]

use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};
use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bivisor_machine::host::{Clock, Nanos};
use rustix::time::{ClockId, clock_gettime};

/// How long the frequency is measured: the two ends are known to a few ns, so this gives some 0.1 in a million, by which a
/// guest's clock is wrong by less than 0.1 ms after ten minutes.
const CALIBRATION: Duration = Duration::from_millis(20);

/// The host's clocks; the machine's time begins when this is made.
pub struct LinuxClock {
    start: Instant,
    tsc_hz: u64,
}

impl LinuxClock {
    /// Starts the clock. Takes 20 ms, for the frequency of the time-stamp counter.
    pub fn start() -> Self {
        Self { start: Instant::now(), tsc_hz: tsc_frequency() }
    }

    /// Ticks per second of the time-stamp counter.
    pub fn frequency(&self) -> u64 {
        self.tsc_hz
    }

    /// Time until a deadline; zero if it has come.
    pub fn until(&self, deadline: Nanos) -> Duration {
        Duration::from_nanos(deadline.saturating_sub(self.now()))
    }
}

impl Clock for LinuxClock {
    fn now(&self) -> Nanos {
        // 584 years.
        self.start.elapsed().as_nanos() as Nanos
    }
    fn wall_seconds(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
    }
    fn wall(&self) -> Nanos {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as Nanos)
    }
    fn stolen(&self) -> Nanos {
        // The kernel tells it too (proc(5), /proc/pid/schedstat), but a confined thread opens no files.
        let (began, before) = BEGAN.with(|&began| began);
        let used = (executed() + ASLEEP.get()).saturating_sub(before);
        let stolen = began.elapsed().saturating_sub(used).as_nanos() as Nanos;
        // The clocks are read one after another: it must not seem to go back.
        STOLEN.set(STOLEN.get().max(stolen));
        STOLEN.get()
    }
    fn tsc(&self) -> u64 {
        read_tsc()
    }
    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }
}

thread_local! {
    /// When the thread first asked for [`Clock::stolen`], and how long it had executed or slept by then.
    static BEGAN: (Instant, Duration) = (Instant::now(), executed() + ASLEEP.get());
    /// What was last told of it.
    static STOLEN: Cell<Nanos> = const { Cell::new(0) };
    /// How long the thread has slept since it began.
    static ASLEEP: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Waits by this function, in which the thread has nothing to execute: the time isn't stolen from it.
pub fn asleep<T>(wait: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = wait();
    ASLEEP.set(ASLEEP.get() + start.elapsed());
    result
}

/// Time that the current thread has executed.
fn executed() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

fn read_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC; where Linux forbids it (PR_SET_TSC) it faults, and no state is harmed.
    unsafe { _rdtsc() }
}

/// Ticks per second of the time-stamp counter: as the CPU states it where that agrees with the measurement to one
/// in a thousand, else as measured.
fn tsc_frequency() -> u64 {
    let measured = measure_frequency(CALIBRATION);
    match stated_frequency() {
        Some(stated) if stated.abs_diff(measured) < measured / 1000 => stated,
        _ => measured,
    }
}

/// CPUID leaf 15h: crystal frequency × ratio (SDM Vol. 2A, CPUID). Zero where not stated; AMD has no such leaf.
fn stated_frequency() -> Option<u64> {
    if __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    if leaf.eax == 0 || leaf.ebx == 0 || leaf.ecx == 0 {
        return None;
    }
    u64::from(leaf.ecx).checked_mul(leaf.ebx.into()).map(|product| product / u64::from(leaf.eax))
}

/// The host's CPUID: EAX, EBX, ECX, EDX of a leaf and sub-leaf.
pub fn host_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let answer = __cpuid_count(leaf, subleaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// Whether the counter ticks at a constant rate in all power states (CPUID 80000007h EDX bit 8).
pub fn tsc_is_invariant() -> bool {
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
}

/// Readings of both clocks, of which the best is taken: the more there are, the better is known what a reading itself takes.
const READINGS: u32 = 128;

/// Counts ticks against CLOCK_MONOTONIC_RAW, which NTP does not bend.
pub fn measure_frequency(length: Duration) -> u64 {
    let (tsc0, time0) = sample();
    std::thread::sleep(length);
    let (tsc1, time1) = sample();
    let (ticks, nanos) = (tsc1.wrapping_sub(tsc0), time1.wrapping_sub(time0).max(1));
    (u128::from(ticks) * 1_000_000_000 / u128::from(nanos)) as u64
}

/// Both clocks at one moment: of several readings the one that was disturbed least.
fn sample() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..READINGS {
        let before = read_tsc();
        let time = clock_gettime(ClockId::MonotonicRaw);
        let width = read_tsc().wrapping_sub(before);
        if width < best.0 {
            let nanos = (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec as u64);
            best = (width, before.wrapping_add(width / 2), nanos);
        }
    }
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (short, long) = (measure_frequency(CALIBRATION), measure_frequency(CALIBRATION * 3));
        // Loose: a busy machine may disturb every reading of a sample.
        assert!(short.abs_diff(long) < long / 500, "{short} {long}");
        assert!(long > 100_000_000);
    }

    #[test]
    fn time_goes_on() {
        let clock = LinuxClock::start();
        let (now, tsc) = (clock.now(), clock.tsc());
        assert!(clock.until(now + 1_000_000_000) <= Duration::from_secs(1));
        assert!(clock.now() >= now && clock.tsc() > tsc);
        assert!(clock.wall_seconds() > 1_700_000_000);
        assert!(clock.wall() / 1_000_000_000 >= clock.wall_seconds() - 1);
    }

    #[test]
    fn a_thread_waits_while_another_has_its_processor() {
        let mut set = rustix::thread::CpuSet::new();
        set.set(0);
        let busy = move || {
            rustix::thread::sched_setaffinity(None, &set).unwrap();
            let clock = LinuxClock { start: Instant::now(), tsc_hz: 1 };
            let before = clock.stolen();
            while clock.now() < 200_000_000 {}
            clock.stolen() - before
        };
        let waited: Nanos =
            [0; 2].map(|_| std::thread::spawn(busy)).map(|thread| thread.join().unwrap()).iter().sum();
        // Half of the time.
        assert!(waited > 100_000_000, "{waited}");
    }

    #[test]
    fn sleep_is_not_stolen() {
        let slept = std::thread::spawn(|| {
            let clock = LinuxClock { start: Instant::now(), tsc_hz: 1 };
            let before = clock.stolen();
            asleep(|| std::thread::sleep(Duration::from_millis(300)));
            clock.stolen() - before
        });
        assert!(slept.join().unwrap() < 200_000_000);
    }
}
