//! Executes sequences on a software engine: a guest of one processor, whose supervisor ([`super::monitor`]) enters
//! them in user mode. All runs of a batch happen in one run of the engine; the host is asked for the next by a port.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use bivisor_dbt::SoftwareEngine;
use bivisor_machine::engine::{DebugControl, Engine, EngineError, Exit, Vcpu, VcpuBus, VcpuSetup};
use bivisor_machine::host::Waker;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::env::Event;
use bivisor_x86::registers::gpr;
use bivisor_x86::state::{CpuState, SegReg, Segment};

use super::layout::{
    Batch, CONTROL, CONTROL_SIZE, ENGINE_ERROR, INTERRUPT_NUDGE, Image, NUDGE, Outcome, PANIC, SHUTDOWN,
    SKIPPED, TIMEOUT,
};
use super::monitor;
use crate::layout::{CODE, CODE_SIZE, DATA, DATA_SIZE, IMAGE_SIZE, PAGE, State, USER_SS};
use crate::system::{
    self, INTERRUPT, KERNEL_CS, NO_EXECUTE, PRESENT, PageTables, SYSTEM_PAGE, USED, USER, WRITABLE, pages,
};

/// Physical addresses.
const TABLES: u64 = 0x1000;
const SYSTEM: u64 = 0x1_0000;
const MAILBOX: u64 = SYSTEM + monitor::MAILBOX - SYSTEM_PAGE;
const DATA_PAGES: u64 = 0x2_0000;
const CONTROL_PAGE: u64 = 0x2_8000;
/// Where no RAM is.
const NUDGE_PAGE: u64 = 0xe000_0000;
/// Code pages: every exchange takes new ones, so that none are written behind the engine's back that it knows.
const CODE_PAGES: u64 = 0x10_0000;
/// How many exchanges a guest lives for.
const EXCHANGES: u64 = 1024;
const RAM_SIZE: usize = CODE_PAGES as usize + EXCHANGES as usize * CODE_SIZE;
/// A run that takes longer than one of these, or two, does not end.
const PATIENCE: Duration = Duration::from_secs(2);

/// What executes a guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// The translator.
    Dbt,
    /// The translator, all code being hot.
    DbtHot,
    /// The interpreter.
    Interp,
    /// The interpreter, stepping: it counts instructions.
    Counter,
}

impl EngineKind {
    /// A new engine: each serves one machine.
    pub fn engine(self) -> SoftwareEngine {
        match self {
            Self::Dbt => SoftwareEngine::translator(),
            Self::DbtHot => SoftwareEngine::translator().with_hot_code(),
            Self::Interp | Self::Counter => SoftwareEngine::interpreter(),
        }
    }
}

/// What the guest's port leads to: the batch, and how far it is.
struct Session {
    memory: Arc<GuestMemory>,
    images: Arc<[Image]>,
    /// Where the page-table entries of the code pages are.
    code_entries: [u64; CODE_SIZE / PAGE as usize],
    /// Where those of the other pages are, and what they are.
    entries: Vec<(u64, u64)>,
    batch: Arc<Batch>,
    outcomes: Vec<Outcome>,
    /// The code pages that are mapped are these of the batch's.
    current: Option<u32>,
    exchanges: u64,
    /// The next run, and whether the one before it is running.
    next: usize,
    running: bool,
    /// When the run began, in steps.
    started: u64,
    /// The monitor has asked for its first run.
    asked: bool,
}

/// The bus: nothing but the port, and a way to end the engine's run.
struct Port {
    session: Mutex<Session>,
    observer: OnceLock<Arc<dyn Waker>>,
    kicked: AtomicBool,
    /// An interrupt waits.
    interrupted: AtomicBool,
    cr8: AtomicU8,
    /// Instructions executed, where they are counted.
    steps: AtomicU64,
    /// Grows with every run.
    progress: AtomicU64,
    /// What the last look saw of it.
    seen: AtomicU64,
    /// The engine runs.
    active: AtomicBool,
}

impl Session {
    /// Bits of the page-table entry of a code page.
    fn code_bits(&self, page: u64) -> u64 {
        PRESENT | USER | USED | if page == 0 { WRITABLE } else { 0 }
    }

    fn code_place(&self) -> u64 {
        CODE_PAGES + (self.exchanges - 1) * CODE_SIZE as u64
    }

    /// Reads what the monitor has laid down.
    fn save(&mut self, steps: u64) {
        let memory = &self.memory;
        let word = |at: u64| memory.load64(MAILBOX + at);
        let code = self.code_place();
        let Some(outcome) = self.outcomes.get_mut(self.next - 1) else { return };
        let State { xsave, gpr, rflags, rip, vector, error, cr2 } = &mut outcome.state;
        for (i, register) in gpr.iter_mut().enumerate() {
            *register = word(monitor::REGISTERS_AFTER + 8 * i as u64);
        }
        let frame = |i: u64| word(monitor::EXCEPTION + 8 * i);
        (*vector, *error, *rip, *rflags) = (frame(0), frame(1), frame(2), frame(4));
        gpr[gpr::RSP] = frame(5);
        *cr2 = if *vector == 14 { frame(7) } else { 0 };
        memory.load_bytes(MAILBOX + monitor::VECTORS_AFTER, xsave);
        memory.load_bytes(DATA_PAGES, &mut outcome.data);
        memory.load_bytes(CONTROL_PAGE, &mut outcome.control);
        memory.load_bytes(code, &mut outcome.code);
        let mut own = monitor::INSTRUCTIONS;
        if self.batch.inputs[self.next - 1].privileged != 0 {
            own += monitor::PRIVILEGED_INSTRUCTIONS;
            for (i, register) in outcome.system.iter_mut().enumerate() {
                *register = word(monitor::SYSTEM_AFTER + 8 * i as u64);
            }
        }
        outcome.count = (steps - self.started).saturating_sub(own);
    }

    /// Hands the next run over to the monitor; false if there is none.
    fn load(&mut self, steps: u64) -> bool {
        while self.outcomes.get(self.next).is_some_and(|outcome| outcome.state.vector == SKIPPED) {
            self.next += 1;
        }
        let Some(input) = self.batch.inputs.get(self.next) else { return false };
        let memory = &self.memory;
        let image = &self.images[input.image as usize % self.images.len()];
        let mut exchanged = self.current != Some(input.code);
        if exchanged {
            self.current = Some(input.code);
            self.exchanges += 1;
            let place = CODE_PAGES + (self.exchanges - 1) * CODE_SIZE as u64;
            memory.store_bytes(place, &self.batch.codes[input.code as usize]);
            for (entry, page) in self.code_entries.iter().zip(pages(CODE_SIZE)) {
                memory.store64(*entry, self.code_bits(page) | place + page);
            }
        }
        memory.store_bytes(DATA_PAGES, &image.data[..DATA_SIZE]);
        memory.store_bytes(CONTROL_PAGE, &image.control);
        for (i, word) in input.control.iter().enumerate() {
            memory.store64(CONTROL_PAGE + 8 * i as u64, *word);
        }
        if input.privileged != 0 {
            // Page-table entries may have been changed.
            exchanged = true;
            self.entries.iter().for_each(|(place, entry)| memory.store64(*place, *entry));
            memory.store_bytes(DATA_PAGES + DATA_SIZE as u64, &image.data[DATA_SIZE..]);
            for (i, word) in input.system.iter().enumerate() {
                memory.store64(MAILBOX + monitor::SYSTEM + 8 * i as u64, *word);
            }
        }
        memory.store32(MAILBOX + monitor::PRIVILEGED, input.privileged);
        let (cs, ss) = if input.supervisor != 0 { (KERNEL_CS, 0) } else { (input.cs.into(), USER_SS.into()) };
        let frame = [input.rip, cs, input.rflags, input.gpr[gpr::RSP], ss];
        for (i, word) in frame.into_iter().enumerate() {
            memory.store64(MAILBOX + monitor::FRAME + 8 * i as u64, word);
        }
        for (i, word) in input.gpr.iter().enumerate() {
            memory.store64(MAILBOX + monitor::REGISTERS + 8 * i as u64, *word);
        }
        memory.store_bytes(MAILBOX + monitor::VECTORS, &input.xsave);
        // XSTATE_BV: all components.
        memory.store64(MAILBOX + monitor::VECTORS + 512, 7);
        memory.store32(MAILBOX + monitor::EXCHANGED, exchanged.into());
        self.next += 1;
        self.running = true;
        self.started = steps;
        true
    }

    /// The last run has ended, or there was none: on to the next.
    fn turn(&mut self, steps: u64) -> bool {
        self.asked = true;
        if self.running {
            self.running = false;
            self.save(steps);
        }
        let ready = self.load(steps);
        self.memory.store32(MAILBOX + monitor::READY, ready.into());
        ready
    }

    /// The engine ended the run in a way that it should not have: that is its outcome, and the following runs of
    /// the same code pages are skipped.
    fn abandon(&mut self, vector: u64) {
        if !self.running {
            return;
        }
        self.running = false;
        self.outcomes[self.next - 1].state.vector = vector;
        let code = self.batch.inputs[self.next - 1].code;
        let rest = self.batch.inputs.iter().zip(&mut self.outcomes).skip(self.next);
        for (_, outcome) in rest.take_while(|(input, _)| input.code == code) {
            outcome.state.vector = SKIPPED;
        }
    }
}

impl Port {
    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a run that has not ended since the last look.
    fn look(&self) {
        let progress = self.progress.load(Ordering::Relaxed);
        if self.active.load(Ordering::SeqCst) && self.seen.swap(progress, Ordering::Relaxed) == progress {
            self.kick();
        }
    }

    /// Makes the engine return.
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if let Some(observer) = self.observer.get() {
            observer.wake();
        }
    }
}

impl VcpuBus for Port {
    fn mmio_read(&self, _gpa: u64, _size: usize) -> u64 {
        u64::MAX
    }
    fn mmio_write(&self, _gpa: u64, _size: usize, value: u64) {
        if value & INTERRUPT_NUDGE != 0 {
            self.interrupted.store(true, Ordering::SeqCst);
        }
        self.wake();
    }
    fn port_in(&self, _port: u16, _size: usize) -> u32 {
        u32::MAX
    }
    fn port_out(&self, port: u16, _size: usize, _value: u32) {
        if port != monitor::PORT {
            return;
        }
        self.progress.fetch_add(1, Ordering::Relaxed);
        if !self.session().turn(self.steps.load(Ordering::Relaxed)) {
            self.kick();
        }
    }
    fn has_event(&self) -> bool {
        self.kicked.load(Ordering::Relaxed) || self.interrupted.load(Ordering::Relaxed)
    }
    fn set_observer(&self, observer: Arc<dyn Waker>) {
        // The engine calls it once.
        let _ = self.observer.set(observer);
    }
    fn take_event(&self, interrupts: bool, _nmis: bool) -> Option<Event> {
        if self.kicked.swap(false, Ordering::SeqCst) {
            return Some(Event::Kick);
        }
        let interrupt = interrupts && self.interrupted.swap(false, Ordering::SeqCst);
        interrupt.then_some(Event::Interrupt(INTERRUPT))
    }
    fn cr8(&self) -> u8 {
        self.cr8.load(Ordering::Relaxed)
    }
    fn set_cr8(&self, value: u8) {
        self.cr8.store(value, Ordering::Relaxed);
    }
    fn read_msr(&self, _msr: u32) -> Option<u64> {
        None
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> bool {
        false
    }
    fn on_init(&self) {}
    fn tsc_offset(&self) -> u64 {
        0
    }
    fn set_tsc(&self, _value: u64) {}
    fn hypercall(&self, _state: &CpuState) -> Option<u64> {
        None
    }
}

/// A virtual machine that lives until its pages for code are used up, or until something went wrong.
struct Machine {
    vcpu: Box<dyn Vcpu>,
    port: Arc<Port>,
}

impl Machine {
    fn new(kind: EngineKind, model: &Arc<CpuModel>, images: &Arc<[Image]>) -> Result<Self, EngineError> {
        let memory = Arc::new(GuestMemory::on_heap(RAM_SIZE));
        let (code_entries, entries) = build_page_tables(&memory);
        let handlers = monitor::MONITOR;
        system::write_tables(&memory, SYSTEM, handlers, monitor::STACK_END, true);
        memory.store_bytes(SYSTEM + PAGE, monitor::code());
        memory.store_bytes(DATA_PAGES, &images[0].data);
        let session = Session {
            memory: Arc::clone(&memory),
            images: Arc::clone(images),
            code_entries,
            entries,
            batch: Arc::default(),
            outcomes: Vec::new(),
            current: None,
            exchanges: 0,
            next: 0,
            running: false,
            started: 0,
            asked: false,
        };
        let port = Arc::new(Port {
            session: Mutex::new(session),
            observer: OnceLock::new(),
            kicked: AtomicBool::new(false),
            interrupted: AtomicBool::new(false),
            cr8: AtomicU8::new(0),
            steps: AtomicU64::new(0),
            progress: AtomicU64::new(0),
            seen: AtomicU64::new(u64::MAX),
            active: AtomicBool::new(false),
        });
        let bus: Arc<dyn VcpuBus> = Arc::<Port>::clone(&port);
        let setup = VcpuSetup { memory, bus, model: Arc::clone(model) };
        let mut vcpu = kind.engine().create_vcpu(0, setup)?;
        vcpu.set_state(&initial_state())?;
        if kind == EngineKind::Counter {
            vcpu.set_debug(&DebugControl { single_step: true, ..DebugControl::default() })?;
        }
        watch(Arc::downgrade(&port));
        Ok(Self { vcpu, port })
    }

    /// Lets the engine run until the batch is done (`Ok`), or until something else happens.
    fn run(&mut self) -> Result<(), u64> {
        self.port.active.store(true, Ordering::SeqCst);
        let ended = loop {
            match catch_unwind(AssertUnwindSafe(|| self.vcpu.run())) {
                Ok(Ok(Exit::Debug)) => {
                    self.port.steps.fetch_add(1, Ordering::Relaxed);
                }
                Ok(Ok(Exit::Kicked)) if self.port.session().running => break Err(TIMEOUT),
                Ok(Ok(Exit::Kicked)) => break Ok(()),
                Ok(Ok(Exit::Halt | Exit::Shutdown)) => break Err(SHUTDOWN),
                Ok(Err(error)) => {
                    eprintln!("\rengine: {error}");
                    break Err(ENGINE_ERROR);
                }
                Err(_) => break Err(PANIC),
            }
        };
        self.port.active.store(false, Ordering::SeqCst);
        ended
    }
}

/// Ports to be watched.
static WATCHED: Mutex<Vec<Weak<Port>>> = Mutex::new(Vec::new());

/// Watches, on a thread for all, that runs end.
fn watch(port: Weak<Port>) {
    static THREAD: Once = Once::new();
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner).push(port);
    THREAD.call_once(|| {
        thread::spawn(|| {
            loop {
                thread::sleep(PATIENCE);
                let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
                watched.retain(|port| port.upgrade().inspect(|port| port.look()).is_some());
            }
        });
    });
}

type CodeEntries = [u64; CODE_SIZE / PAGE as usize];

/// Maps everything. Returns where the entries of the code pages are, and the other pages' entries.
fn build_page_tables(memory: &GuestMemory) -> (CodeEntries, Vec<(u64, u64)>) {
    let mut tables = PageTables::new(memory, TABLES);
    let mut others = Vec::new();
    let mut entries = CodeEntries::default();
    for (entry, page) in entries.iter_mut().zip(pages(CODE_SIZE)) {
        let writable = if page == 0 { WRITABLE } else { 0 };
        *entry = tables.map(CODE + page, CODE_PAGES + page, USER | writable);
    }
    for page in pages(IMAGE_SIZE) {
        let writable = if page < DATA_SIZE as u64 { WRITABLE } else { 0 };
        others.push(tables.map(DATA + page, DATA_PAGES + page, USER | writable | NO_EXECUTE));
    }
    for page in pages(CONTROL_SIZE) {
        others.push(tables.map(CONTROL + page, CONTROL_PAGE + page, USER | WRITABLE | NO_EXECUTE));
    }
    tables.map(NUDGE, NUDGE_PAGE, USER | WRITABLE | NO_EXECUTE);
    for page in pages(5 * PAGE as usize) {
        tables.map(SYSTEM_PAGE + page, SYSTEM + page, WRITABLE);
    }
    tables.map(monitor::PAGE_TABLE, entries[0] & !(PAGE - 1), WRITABLE);
    (entries, others.into_iter().map(|place| (place, memory.load64(place))).collect())
}

/// At the start of the monitor.
fn initial_state() -> CpuState {
    let mut state = system::initial_state(TABLES);
    state.cpl = 0;
    state.rip = monitor::START;
    state.gpr[gpr::RSP] = monitor::STACK_END;
    (state.msr.star, state.msr.sfmask) = (monitor::STAR, monitor::SFMASK);
    state.seg[SegReg::Cs as usize] =
        Segment { base: 0, limit: u32::MAX, selector: KERNEL_CS as u16, attributes: 0xa09b };
    state.seg[SegReg::Ss as usize] = Segment { attributes: Segment::UNUSABLE, ..Segment::default() };
    // What 32-bit code needs.
    let data = Segment { base: 0, limit: u32::MAX, selector: USER_SS, attributes: 0xc0f3 };
    state.seg[SegReg::Ds as usize] = data;
    state.seg[SegReg::Es as usize] = data;
    state
}

/// A guest that executes batches.
pub struct Guest {
    kind: EngineKind,
    model: Arc<CpuModel>,
    images: Arc<[Image]>,
    machine: Machine,
}

impl Guest {
    /// A guest on this engine.
    ///
    /// # Errors
    /// The engine can't be had.
    pub fn new(kind: EngineKind, model: Arc<CpuModel>, images: Arc<[Image]>) -> Result<Self, EngineError> {
        let machine = Machine::new(kind, &model, &images)?;
        Ok(Self { kind, model, images, machine })
    }

    /// Executes a batch. What is marked as skipped in `outcomes` is not executed; the others are filled in.
    ///
    /// # Errors
    /// The engine can't be had again after it failed.
    pub fn execute(
        &mut self,
        batch: &Arc<Batch>,
        outcomes: Vec<Outcome>,
    ) -> Result<Vec<Outcome>, EngineError> {
        if self.machine.port.session().exchanges + batch.codes.len() as u64 > EXCHANGES {
            self.machine = Machine::new(self.kind, &self.model, &self.images)?;
        }
        self.hand_over(batch, outcomes, 0);
        while let Err(vector) = self.machine.run() {
            let (outcomes, next) = {
                let mut session = self.machine.port.session();
                session.abandon(vector);
                (std::mem::take(&mut session.outcomes), session.next)
            };
            self.machine = Machine::new(self.kind, &self.model, &self.images)?;
            self.hand_over(batch, outcomes, next);
        }
        Ok(std::mem::take(&mut self.machine.port.session().outcomes))
    }

    /// Gives the monitor the batch from a run on.
    fn hand_over(&self, batch: &Arc<Batch>, outcomes: Vec<Outcome>, next: usize) {
        let port = &self.machine.port;
        let mut session = port.session();
        session.batch = Arc::clone(batch);
        session.outcomes = outcomes;
        session.next = next;
        session.current = None;
        // The monitor asks for its first run by itself, and waits for the first of all later batches.
        if session.asked && !session.turn(port.steps.load(Ordering::Relaxed)) {
            port.kick();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::code::FILLER;
    use crate::blocks::layout::images;
    use crate::blocks::trial::trial;

    #[test]
    fn instructions_are_counted_without_those_of_the_supervisor() {
        let model = Arc::new(crate::host_model());
        let (_, inputs) = trial(1, 0, &model, false).assemble(0);
        let count = |code: &[u8]| {
            let mut page = [FILLER; CODE_SIZE];
            page[..code.len()].copy_from_slice(code);
            let input = crate::blocks::layout::Input { rip: CODE, rflags: 2, ..inputs[0].clone() };
            let batch = Arc::new(Batch { codes: vec![page], inputs: vec![input; 3] });
            let guest = Guest::new(EngineKind::Counter, Arc::clone(&model), images().into());
            let outcomes = guest.expect("a guest").execute(&batch, vec![Outcome::empty(); 3]);
            outcomes.expect("outcomes").iter().map(|outcome| outcome.count).collect::<Vec<_>>()
        };
        // INT3; the first run of a batch is entered over a loop of more instructions.
        assert_eq!(count(&[])[1..], [1, 1]);
        // mov ecx, 3; loop .
        assert_eq!(count(&[0xb9, 3, 0, 0, 0, 0xe2, 0xfe])[1..], [5, 5]);
    }
}
