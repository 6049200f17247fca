//! Locks for code that runs on Linux and on the bare machine.

use spin::relax::RelaxStrategy;

static YIELD: spin::Once<fn()> = spin::Once::new();

/// Tells how this host gives up the processor while a lock is held elsewhere (Linux: `sched_yield`). Without
/// it, waiting spins. Only the first call counts.
pub fn set_yield(how: fn()) {
    YIELD.call_once(|| how);
}

/// Waits by the host's way of giving up the processor.
pub struct HostRelax;

impl RelaxStrategy for HostRelax {
    fn relax() {
        core::hint::spin_loop();
        give_way();
    }
}

/// Lets other threads have the processor, if the host can.
pub fn give_way() {
    if let Some(give_up) = YIELD.get() {
        give_up();
    }
}

/// A mutual exclusion lock. Hold it briefly: never across a wait for the host.
pub type Mutex<T> = spin::mutex::SpinMutex<T, HostRelax>;

/// Waits, giving up the processor, until something holds that another thread brings about soon.
pub fn wait_until(mut holds: impl FnMut() -> bool) {
    while !holds() {
        HostRelax::relax();
    }
}
