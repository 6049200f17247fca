//! A host for tests of adapters: time that stands still, and records of what was asked of it.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::device::IrqLine;
use crate::host::{Alarm, ByteStream, Clock, EventSink, MachineEvent, Nanos, Waker};
use crate::sync::Mutex;

/// A clock that moves when told; its time-stamp counter runs at 2 GHz.
pub struct Time(AtomicU64);

impl Time {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(1_000_000_000)))
    }
    pub fn advance(&self, by: Nanos) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }
}

impl Clock for Time {
    fn now(&self) -> Nanos {
        self.0.load(Ordering::Relaxed)
    }
    fn wall_seconds(&self) -> u64 {
        1_000_000_000
    }
    fn tsc(&self) -> u64 {
        self.now() * 2
    }
    fn tsc_hz(&self) -> u64 {
        2_000_000_000
    }
}

/// Records what devices tell the host.
#[derive(Default)]
pub struct Host {
    events: Mutex<Vec<MachineEvent>>,
    lines: Mutex<Vec<String>>,
    bytes: Mutex<Vec<u8>>,
    deadline: Mutex<Option<Nanos>>,
    wakes: AtomicU64,
    ready_calls: AtomicU64,
    levels: Mutex<Vec<bool>>,
}

impl Host {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
    pub fn events(&self) -> Vec<MachineEvent> {
        self.events.lock().clone()
    }
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().clone()
    }
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }
    pub fn deadline(&self) -> Option<Nanos> {
        *self.deadline.lock()
    }
    pub fn wakes(&self) -> u64 {
        self.wakes.load(Ordering::Relaxed)
    }
    pub fn ready_calls(&self) -> u64 {
        self.ready_calls.load(Ordering::Relaxed)
    }
    /// What was driven on the line that this stands for.
    pub fn levels(&self) -> Vec<bool> {
        self.levels.lock().clone()
    }
}

impl EventSink for Host {
    fn event(&self, event: MachineEvent) {
        self.events.lock().push(event);
    }
    fn log(&self, line: core::fmt::Arguments<'_>) {
        self.lines.lock().push(line.to_string());
    }
}
impl ByteStream for Host {
    fn write(&self, bytes: &[u8]) {
        self.bytes.lock().extend_from_slice(bytes);
    }
    fn ready(&self) {
        self.ready_calls.fetch_add(1, Ordering::Relaxed);
    }
}
impl Alarm for Host {
    fn set(&self, deadline: Option<Nanos>) {
        *self.deadline.lock() = deadline;
    }
}
impl Waker for Host {
    fn wake(&self) {
        self.wakes.fetch_add(1, Ordering::Relaxed);
    }
}
impl IrqLine for Host {
    fn set(&self, high: bool) {
        self.levels.lock().push(high);
    }
}
