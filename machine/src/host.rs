//! What the machine asks of its host. Linux and the bare machine implement the same traits.

/// Nanoseconds since the machine's clock began.
pub type Nanos = u64;

/// Time.
pub trait Clock: Send + Sync {
    /// Monotonic time.
    fn now(&self) -> Nanos;
    /// Wall-clock time: seconds since 1970-01-01 UTC, for the CMOS clock.
    fn wall_seconds(&self) -> u64;
    /// Wall-clock time in nanoseconds since 1970-01-01 UTC. A host may know it by seconds only.
    fn wall(&self) -> Nanos {
        self.wall_seconds().saturating_mul(1_000_000_000)
    }
    /// How long the calling thread has been ready to execute since it began, but had no processor. Nothing where the
    /// host doesn't tell.
    fn stolen(&self) -> Nanos {
        0
    }
    /// The host's time-stamp counter, as RDTSC gives it.
    fn tsc(&self) -> u64;
    /// Ticks of [`Clock::tsc`] per second.
    fn tsc_hz(&self) -> u64;
}

/// The far end of a serial line: a terminal, a file, a socket.
pub trait ByteStream: Send + Sync {
    /// Sends bytes; the machine does not wait and nothing is returned: what the far end can't take is lost.
    fn write(&self, bytes: &[u8]);
    /// The machine's end has room for bytes again after it had none. Called by a vCPU's thread.
    fn ready(&self) {}
}

/// Somebody who must hear when the earliest deadline of the machine changes ([`crate::timer`]).
pub trait Alarm: Send + Sync {
    /// The earliest deadline is now this, or there is none.
    fn set(&self, deadline: Option<Nanos>);
}

/// Wakes a vCPU's thread, whether it waits in HLT or executes guest code. Implemented by the host with the
/// engine's help.
pub trait Waker: Send + Sync {
    /// Makes the vCPU look at its events soon. Cheap and idempotent; called with locks held.
    fn wake(&self);
}

/// What the guest asks of the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// ACPI S5.
    PowerOff,
    /// Reset by i8042, port CF9h or the ACPI reset register.
    Reset,
    /// `--testdev`: isa-debug-exit was written; the status is (value << 1) | 1 as QEMU's.
    TestExit(u32),
}

/// Hears [`MachineEvent`]s. The vCPU that caused it returns from its engine at its next event check.
pub trait EventSink: Send + Sync {
    /// The guest asked for this.
    fn event(&self, event: MachineEvent);
    /// A line for the log: a guest did something that a device refuses.
    fn log(&self, line: core::fmt::Arguments<'_>);
}
