//! What the bare machine gives to a virtual one.

use alloc::sync::Arc;
use core::fmt::Arguments;
use core::sync::atomic::{AtomicU64, Ordering};

use alloc::string::String;
use bivisor_machine::host::{Alarm, EventSink, MachineEvent, Nanos, Waker};
use bivisor_machine::sync::Mutex;

use crate::console::println;
use crate::vm::Host;

/// No deadline.
const NEVER: Nanos = Nanos::MAX;
/// Lines that one machine may write into the log.
const LOG_LINES: u64 = 50;

/// A machine's earliest deadline. Whoever schedules asks for it; the timer is set for what comes up meanwhile.
pub(crate) struct VmAlarm {
    deadline: AtomicU64,
    host: Arc<Host>,
}

impl VmAlarm {
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { deadline: AtomicU64::new(NEVER), host })
    }

    /// The deadline; the far future if there is none.
    pub(crate) fn deadline(&self) -> Nanos {
        self.deadline.load(Ordering::Relaxed)
    }
}

impl Alarm for VmAlarm {
    fn set(&self, deadline: Option<Nanos>) {
        self.deadline.store(deadline.unwrap_or(NEVER), Ordering::Relaxed);
        if let Some(deadline) = deadline {
            self.host.processor.arm_by(deadline);
        }
    }
}

/// Ends whoever executes, so that a virtual processor with something to do gets its turn.
pub(crate) struct VcpuWaker {
    host: Arc<Host>,
    /// Who it is for.
    number: u64,
}

impl VcpuWaker {
    pub(crate) fn new(host: Arc<Host>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self { host, number: NEXT.fetch_add(1, Ordering::Relaxed) })
    }

    /// It is this one who executes from now on.
    pub(crate) fn runs(&self) {
        self.host.running.store(self.number, Ordering::Relaxed);
    }
}

impl Waker for VcpuWaker {
    fn wake(&self) {
        // Whoever executes looks at his own events anyway.
        if self.host.running.load(Ordering::Relaxed) != self.number {
            self.host.processor.arm_by(0);
        }
    }
}

/// What a guest asks of its machine.
pub(crate) struct VmEvents {
    name: String,
    asked: Mutex<Option<MachineEvent>>,
    lines: AtomicU64,
}

impl VmEvents {
    pub(crate) fn new(name: &str) -> Arc<Self> {
        Arc::new(Self { name: name.into(), asked: Mutex::new(None), lines: AtomicU64::new(0) })
    }

    /// What was asked first since the last call.
    pub(crate) fn take(&self) -> Option<MachineEvent> {
        self.asked.lock().take()
    }
}

impl EventSink for VmEvents {
    fn event(&self, event: MachineEvent) {
        self.asked.lock().get_or_insert(event);
    }
    fn log(&self, line: Arguments<'_>) {
        // A guest can cause as many as it likes.
        if self.lines.fetch_add(1, Ordering::Relaxed) < LOG_LINES {
            println!("bivisor: {}: {line}", self.name);
        }
    }
}
