//! The machine as gdb sees it: every vCPU is a thread, numbered from 1.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use bivisor_machine::engine::{DebugControl, EngineError, Vcpu};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps, outputln};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::{Connection, Shared, Stop, registers};
use crate::vm::Session;
use crate::vm::gate;
use crate::vm::inspect;
use crate::vm::vcpu::lock;

/// How long a byte of the debugger may wait while the machine runs.
const POLL: Duration = Duration::from_millis(10);

/// A machine with a debugger.
pub struct Target {
    shared: Arc<Shared>,
    stops: Receiver<Stop>,
    breakpoints: BTreeSet<u64>,
    /// vCPUs that are to make one step at the next resume, or are making it.
    stepping: BTreeSet<u32>,
    /// vCPUs that are to go on at the next resume, as bits; the others do so too unless the next is true.
    continuing: u64,
    /// vCPUs without an order stand still at the next resume.
    locked: bool,
    /// Stops that came with another one and are not told yet.
    pending: VecDeque<Stop>,
    /// The vCPU that gdb heard of last.
    current: u32,
}

fn tid(cpu: u32) -> Tid {
    // Never zero, and no machine has usize::MAX vCPUs.
    Tid::new(cpu as usize + 1).unwrap_or(Tid::MIN)
}

fn cpu(tid: Tid) -> u32 {
    u32::try_from(tid.get() - 1).unwrap_or(u32::MAX)
}

fn bit(cpu: u32) -> u64 {
    1u64.checked_shl(cpu).unwrap_or(0)
}

fn gone() -> EngineError {
    EngineError("the machine has ended".into())
}

impl Target {
    pub(super) fn new(shared: Arc<Shared>, stops: Receiver<Stop>) -> Self {
        Self {
            shared,
            stops,
            breakpoints: BTreeSet::new(),
            stepping: BTreeSet::new(),
            continuing: 0,
            locked: false,
            pending: VecDeque::new(),
            current: 0,
        }
    }

    /// A debugger connected: the machine stands still from now on.
    pub(super) fn attach(&mut self) {
        self.shared.attached.store(true, Ordering::SeqCst);
        self.pause();
        self.forget_stops();
    }

    /// The debugger is gone, and so is all that it wanted.
    pub(super) fn detach(&mut self) {
        self.shared.attached.store(false, Ordering::SeqCst);
        self.breakpoints.clear();
        self.forget_orders();
        self.forget_stops();
    }

    /// Lets the machine run without a debugger.
    pub(super) fn resume_freely(&mut self) {
        // A machine that has ended stays so.
        let _ = self.resume_machine();
    }

    fn forget_orders(&mut self) {
        self.stepping.clear();
        self.continuing = 0;
        self.locked = false;
    }

    fn forget_stops(&mut self) {
        self.pending.clear();
        while self.stops.try_recv().is_ok() {}
    }

    fn session(&self) -> Option<Arc<Session>> {
        self.shared.session().clone()
    }

    fn pause(&self) {
        self.shared.running.store(false, Ordering::SeqCst);
        if let Some(session) = self.session() {
            session.pause();
        }
    }

    fn resume_machine(&mut self) -> Result<(), EngineError> {
        let session = self.session().ok_or_else(gone)?;
        let breakpoints: Vec<_> = self.breakpoints.iter().copied().collect();
        self.shared.breakpoints.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&breakpoints);
        session.set_debug(|index| DebugControl {
            single_step: self.stepping.contains(&index),
            breakpoints: breakpoints.clone(),
        })?;
        self.shared.running.store(true, Ordering::SeqCst);
        let ordered = self.stepping.iter().fold(self.continuing, |cpus, index| cpus | bit(*index));
        session.resume_some(if self.locked { ordered } else { gate::ALL });
        Ok(())
    }

    /// Does something with a vCPU, which stands still.
    fn with_vcpu<R>(
        &mut self,
        tid: Tid,
        access: impl FnOnce(&Session, &mut MutexGuard<'_, Box<dyn Vcpu>>) -> Result<R, EngineError>,
    ) -> Result<R, TargetError<EngineError>> {
        let session = self.session().ok_or(TargetError::NonFatal)?;
        let vcpu = session.vcpus().get(cpu(tid) as usize).ok_or(TargetError::NonFatal)?;
        access(&session, &mut lock(vcpu)).map_err(TargetError::Fatal)
    }

    /// What gdb is told of a stop; nothing if there is no reason for it any more.
    fn reason(&mut self, stop: Stop) -> Option<MultiThreadStopReason<u64>> {
        let index = match stop {
            Stop::Exited(status) => return Some(MultiThreadStopReason::Exited(status)),
            Stop::Crash(index) => {
                self.current = index;
                let signal = Signal::SIGSEGV;
                return Some(MultiThreadStopReason::SignalWithThread { tid: tid(index), signal });
            }
            Stop::Debug(index) => index,
        };
        let state = self.with_vcpu(tid(index), |_, vcpu| vcpu.state()).ok()?;
        self.current = index;
        if self.breakpoints.contains(&inspect::linear_rip(&state)) {
            return Some(MultiThreadStopReason::SwBreak(tid(index)));
        }
        let signal = Signal::SIGTRAP;
        self.stepping
            .contains(&index)
            .then_some(MultiThreadStopReason::SignalWithThread { tid: tid(index), signal })
    }

    /// The next stop that came with another one.
    fn next_pending(&mut self) -> Option<MultiThreadStopReason<u64>> {
        while let Some(stop) = self.pending.pop_front() {
            if let Some(reason) = self.reason(stop) {
                return Some(reason);
            }
        }
        None
    }

    /// A vCPU stopped: all others do too, and what stopped them meanwhile is kept for later.
    fn handle(&mut self, stop: Stop) -> Option<MultiThreadStopReason<u64>> {
        self.pause();
        self.pending.extend(self.stops.try_iter());
        self.reason(stop)
    }
}

impl gdbstub::target::Target for Target {
    type Arch = X86_64_SSE;
    type Error = EngineError;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }
    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, to: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        self.with_vcpu(tid, |_, vcpu| {
            registers::from_state(&vcpu.state()?, to);
            Ok(())
        })
    }

    fn write_registers(&mut self, from: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        self.with_vcpu(tid, |_, vcpu| {
            let mut state = vcpu.state()?;
            registers::to_state(from, &mut state);
            vcpu.set_state(&state)
        })
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        match self
            .with_vcpu(tid, |session, vcpu| Ok(inspect::read(&mut ***vcpu, session.memory(), start, data)))?
        {
            0 => Err(TargetError::NonFatal),
            count => Ok(count),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let written = self.with_vcpu(tid, |session, vcpu| {
            let written = inspect::write(&mut ***vcpu, session.memory(), start, data);
            Ok(written)
        })?;
        if let Some(session) = self.session() {
            // The engine may hold the old bytes as decoded instructions.
            session.refresh().map_err(TargetError::Fatal)?;
        }
        if written == data.len() { Ok(()) } else { Err(TargetError::NonFatal) }
    }

    fn list_active_threads(&mut self, report: &mut dyn FnMut(Tid)) -> Result<(), Self::Error> {
        // gdb asks even when the machine has just ended, and needs one thread.
        let count = self.session().map_or(1, |session| session.vcpus().len() as u32);
        (0..count).for_each(|index| report(tid(index)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Target {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Self::Error> {
        let text = format!("CPU {}", cpu(tid));
        let length = text.len().min(buffer.len());
        buffer[..length].copy_from_slice(&text.as_bytes()[..length]);
        Ok(length)
    }
}

impl MultiThreadResume for Target {
    fn resume(&mut self) -> Result<(), Self::Error> {
        // Another vCPU's stop is told first: it must not run past its breakpoint.
        self.pending.extend(self.stops.try_iter());
        if self.pending.is_empty() { self.resume_machine() } else { Ok(()) }
    }
    fn clear_resume_actions(&mut self) -> Result<(), Self::Error> {
        self.forget_orders();
        Ok(())
    }
    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.continuing |= bit(cpu(tid));
        Ok(())
    }
    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Target {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Self::Error> {
        self.locked = true;
        Ok(())
    }
}

impl MultiThreadSingleStep for Target {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Self::Error> {
        self.stepping.insert(cpu(tid));
        Ok(())
    }
}

impl Breakpoints for Target {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Target {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.breakpoints.insert(address);
        Ok(true)
    }
    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(&address))
    }
}

/// Ours change no guest memory, so all breakpoints are of one kind.
impl HwBreakpoint for Target {
    fn add_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.add_sw_breakpoint(address, kind)
    }
    fn remove_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.remove_sw_breakpoint(address, kind)
    }
}

impl MonitorCmd for Target {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Self::Error> {
        if command != b"registers" {
            outputln!(out, "monitor registers: all registers of the CPU that stopped last");
            return Ok(());
        }
        let dump = self.with_vcpu(tid(self.current), |session, vcpu| {
            let state = vcpu.state()?;
            let code = inspect::code(&mut ***vcpu, session.memory(), &state);
            Ok(inspect::dump(&state, &code))
        });
        match dump {
            Ok(dump) => outputln!(out, "CPU {}\n{dump}", self.current),
            Err(_) => outputln!(out, "The machine has ended."),
        }
        Ok(())
    }
}

/// Waits for the machine or the debugger, whichever has something to say.
pub(super) enum EventLoop {}

impl BlockingEventLoop for EventLoop {
    type Target = Target;
    type Connection = Connection;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Target,
        connection: &mut Connection,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<EngineError, io::Error>> {
        loop {
            if let Some(reason) = target.next_pending() {
                return Ok(Event::TargetStopped(reason));
            }
            if connection.peek().map_err(WaitForStopReasonError::Connection)?.is_some() {
                let byte = connection.read().map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
            match target.stops.recv_timeout(POLL) {
                Ok(stop) => match target.handle(stop) {
                    Some(reason) => return Ok(Event::TargetStopped(reason)),
                    None => target.resume_machine().map_err(WaitForStopReasonError::Target)?,
                },
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(WaitForStopReasonError::Target(gone()));
                }
            }
        }
    }

    fn on_interrupt(target: &mut Target) -> Result<Option<Self::StopReason>, EngineError> {
        target.pause();
        let (tid, signal) = (tid(target.current), Signal::SIGINT);
        Ok(Some(MultiThreadStopReason::SignalWithThread { tid, signal }))
    }
}
