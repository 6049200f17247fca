//! A virtual processor of the engine `dbt`: 64-bit code and 32-bit code in flat segments are translated, everything else is
//! interpreted.
#![allow(unsafe_code)]

use std::mem::transmute;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bivisor_machine::engine::{CodeMap, DebugControl, EngineError, Exit, Tracer, Vcpu};
use bivisor_machine::host::Waker;
use bivisor_x86::cpu::{Access, Cpu};
use bivisor_x86::env::Env;
use bivisor_x86::paging::Place;
use bivisor_x86::registers::{Cr4, Rflags};
use bivisor_x86::state::{CpuState, Mode, TableRegister};
use rustc_hash::{FxHashMap, FxHashSet};

use super::analysis;
use super::biases::Biases;
use super::block::{self, OVERHANG, PAGE, Request, Translation};
use super::cache::Cache;
use super::context::{
    Context, EVENT_BIT, JumpEntry, NO_STACK_PAGE, SLOTS, VECTORS_IN_CONTEXT, VECTORS_IN_STATE, jump_index,
};
use super::exits::Next;
use super::fault::{self, FAULT_SITE, Running};
use super::key::{Key, USER};
use super::known_code::FILTER_WORDS;
use super::names::Names;
use super::pause::Spinning;
use super::site::{Site, SiteKind};
use super::spaces::{SharedTlbs, Spaces};
use super::statistics::Statistics;
use super::windows::Windows;
use super::written_pages::WrittenPages;
use crate::code_tracker::{self, CodeWrite};
use crate::env::VcpuEnv;
use crate::host_cpu;
use crate::host_thread::HostThread;
use crate::interp_vcpu::{self, ended};
use crate::peers::Peer;
use crate::trace::Trace;

pub(super) const PAGE_MASK: u64 = !0xfff;
/// Instructions that are interpreted at a time where nothing can be translated.
const INTERPRETED: u64 = 64;
/// Number of the address space of all global pages; the processor's own numbers are smaller.
pub(super) const GLOBAL_SPACE: u16 = u16::MAX;
/// So often supervisor code is found to be global, or not, until all of it is taken to be.
const OTHERWISE: u32 = 200;
/// Host time stamps between two looks at what the guest is executing: about a millisecond.
const SAMPLING_PERIOD: u64 = 2_000_000;
/// Log2 of the bytes of a region of code.
const SEEN_SHIFT: u32 = 8;
/// A region that is found executing this often, before another is, is hot.
const SEEN_OFTEN: u32 = 3;
/// Slots that a block takes at most.
const SLOTS_OF_A_BLOCK: usize = 64;
/// Bytes before and behind an instruction that is found executing that are taken to be hot, too.
const HOT_BEFORE: u64 = 256;
/// See [`HOT_BEFORE`].
const HOT_BEHIND: u64 = 512;
/// Misses of a slot between two ticks of the guest from which on it is not worth its while.
const ROAMING_MISSES: u64 = 20_000;
/// So often a window may lie where the inline TLB can't be used, until its accesses are checked one by one.
const FAILURES: u32 = 200;

/// A virtual processor.
pub struct DbtVcpu {
    // Boxed: the context points to its state.
    pub(super) cpu: Box<Cpu>,
    pub(super) env: VcpuEnv,
    pub(super) ram: NonNull<u8>,
    pub(super) windows: Windows,
    pub(super) spaces: Spaces,
    pub(super) cache: Cache,
    single_step: bool,
    pub(super) epoch: u64,
    /// Biases of the jump cache for address spaces and modes.
    pub(super) biases: Biases,
    /// Address space, mode without its class, and number of [`DbtVcpu::forgotten`] that the context's biases are for.
    biases_for: (u16, u16, u64),
    /// How often all biases were forgotten.
    pub(super) forgotten: u64,
    /// Links to other pages that hold in the current address space.
    linked: Vec<u32>,
    /// Links that hold in every address space.
    linked_globally: Vec<u32>,
    /// Linear pages that jumps may lead to without a look at the page tables, in the address space they were found in.
    pub(super) code_filter: Box<[u64; FILTER_WORDS]>,
    /// The same of global pages.
    pub(super) global_code_filter: Box<[u64; FILTER_WORDS]>,
    /// While supervisor code lies in global pages: the linear pages of it that jumps may lead to, and where in RAM they were
    /// then, or [`super::known_code::ELSEWHERE`].
    pub(super) kernel_pages: FxHashMap<u64, u64>,
    written: WrittenPages,
    fault_address: Box<u64>,
    /// How often the inline TLB was emptied or switched.
    pub(super) flushes: u64,
    /// [`SharedTlbs::resets`] when translated code was last entered at a block's start.
    resets: u64,
    /// Instruction pointer, count and destination of the last string instruction whose pages were entered into the inline
    /// TLB.
    pub(super) last_string: (u64, u64, u64),
    /// Host time stamp when the guest was last looked at for hot code.
    sampled: u64,
    /// How often the guest was found executing in these regions of RAM lately.
    seen: FxHashMap<u64, u32>,
    /// Lines of 64 bytes of code, by page of RAM, that the guest was found executing.
    hot: FxHashMap<u64, u64>,
    /// Offsets in RAM of hot code that jumps backwards lead to.
    loop_heads: FxHashSet<u64>,
    /// All code of user mode is hot.
    always_hot: bool,
    /// Instructions, by offset in RAM, that access too many pages for a slot.
    roaming: FxHashSet<u64>,
    /// Instructions, by offset in RAM, whose window lies where the inline TLB can't be used: a device, or written code.
    alone: FxHashSet<u64>,
    /// How often that was so, of others.
    failures: FxHashMap<u64, u32>,
    pub(super) statistics: Statistics,
    pub(super) thread: Arc<HostThread>,
    pub(super) spinning: Spinning,
    /// While it is on, every block is entered by the dispatcher, which tells it.
    trace: Trace,
    names: Names,
    /// Supervisor code is taken to lie in global pages.
    pub(super) global_kernel: bool,
    /// How often it didn't, or did where it is taken not to.
    otherwise: u32,
    /// STAR, EFER and CR0 that the context's system calls are for.
    system_calls_for: Option<(u64, u64, u64)>,
    /// GDTR that the remembered IRETQs are for.
    pub(super) returns_for: TableRegister,
    /// CR4 and XCR0 that the remembered results of CPUID are for.
    cpuid_for: (u64, u64),
}

// SAFETY: the raw pointers lead to RAM, which is shared by design, and to memory owned by this value.
unsafe impl Send for DbtVcpu {}

/// Tells a running processor of an event, or takes quick stores from it, from another thread.
struct Observer {
    /// Host address of RAM.
    ram: u64,
    tlbs: Arc<SharedTlbs>,
    thread: Arc<HostThread>,
}

impl Waker for Observer {
    fn wake(&self) {
        let mapping = self.tlbs.mapping();
        mapping.event().store(1, Ordering::SeqCst);
        mapping.jump_bias().fetch_or(EVENT_BIT, Ordering::SeqCst);
    }
}

impl Peer for Observer {
    fn forget_writes(&self, page: u64) -> bool {
        self.tlbs.forget_writes(self.ram + page)
    }
    fn forget_windows(&self) {
        self.tlbs.forget_windows();
    }
    fn passages(&self) -> &AtomicU64 {
        self.tlbs.mapping().passages()
    }
    fn thread(&self) -> &HostThread {
        &self.thread
    }
    fn waker(&self) -> &dyn Waker {
        self
    }
}

/// What must be loaded on entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// What the mode asks for.
    Mode,
    /// Vector registers.
    Vectors,
    /// x87 and vector registers.
    X87,
}

impl DbtVcpu {
    /// A processor over `cpu` and its surroundings. `ram`: where RAM is mapped.
    /// `always_hot`: all code of user mode is.
    pub fn new(cpu: Cpu, env: VcpuEnv, ram: NonNull<u8>, always_hot: bool) -> Result<Self, EngineError> {
        let no_memory = |error| EngineError(format!("the host gives no memory for translated code: {error}"));
        if !analysis::host_can_translate() {
            return Err(EngineError(
                "the engine dbt needs a host CPU with BMI2 and AVX: say --engine interp".into(),
            ));
        }
        fault::install();
        let mut cpu = Box::new(cpu);
        let mut windows = Windows::new().map_err(no_memory)?;
        windows.context().reset(&raw mut cpu.state);
        let spaces = Spaces::new(Arc::clone(windows.mapping()), cpu.address_space());
        let thread = Arc::new(HostThread::default());
        let tlbs = Arc::clone(spaces.shared());
        let observer = Arc::new(Observer { ram: ram.as_ptr() as u64, tlbs, thread: thread.clone() });
        env.set_observer(observer.clone());
        env.add_peer(observer);
        Ok(Self {
            cpu,
            env,
            ram,
            windows,
            spaces,
            cache: Cache::new().map_err(no_memory)?,
            single_step: false,
            epoch: 0,
            biases: Biases::default(),
            biases_for: (0, 0, 0),
            forgotten: 1,
            linked: Vec::new(),
            linked_globally: Vec::new(),
            code_filter: Box::new([0; FILTER_WORDS]),
            global_code_filter: Box::new([0; FILTER_WORDS]),
            kernel_pages: FxHashMap::default(),
            written: WrittenPages::default(),
            fault_address: Box::new(0),
            flushes: 0,
            resets: 0,
            last_string: (0, 0, 0),
            sampled: 0,
            seen: FxHashMap::default(),
            hot: FxHashMap::default(),
            loop_heads: FxHashSet::default(),
            always_hot,
            roaming: FxHashSet::default(),
            alone: FxHashSet::default(),
            failures: FxHashMap::default(),
            global_kernel: false,
            otherwise: 0,
            statistics: Statistics::default(),
            thread,
            spinning: Spinning::default(),
            trace: Trace::default(),
            names: Names::default(),
            system_calls_for: None,
            returns_for: TableRegister::default(),
            cpuid_for: (0, 0),
        })
    }

    pub(super) fn context(&mut self) -> &mut Context {
        self.windows.context()
    }

    // ---- the interpreter ----

    /// Lets the interpreter execute, at most `budget` instructions, and takes note of what it changed. `vector`: it may
    /// work on vector registers.
    pub(super) fn interpret(&mut self, budget: u64, vector: bool) -> Option<Exit> {
        if vector {
            self.sync_vectors();
        }
        let exit = self.cpu.run(&mut self.env, budget);
        self.follow_changes();
        ended(exit)
    }

    /// Lets the interpreter execute what there is no block for.
    fn interpret_untranslated(&mut self, translatable: bool) -> Option<Exit> {
        let budget = if self.trace.is_on() { 1 } else { INTERPRETED };
        if !translatable {
            return self.interpret(budget, true);
        }
        let rip = self.cpu.state.rip;
        let place = self.cpu.probe(&mut self.env, rip, Access::Execute);
        let is_written =
            matches!(place, Ok(Place::Ram(offset)) if self.written.is_interpreted(offset & PAGE_MASK));
        if !is_written || !self.cpu.runs_plainly() {
            return self.interpret(1, true);
        }
        self.sync_vectors();
        self.cpu.execute_written(&mut self.env, budget);
        self.follow_changes();
        None
    }

    /// Brings vector registers that the context holds to the state.
    fn sync_vectors(&mut self) {
        let context = self.windows.context();
        if context.vectors != VECTORS_IN_CONTEXT {
            return;
        }
        context.vectors = VECTORS_IN_STATE;
        let area = &mut self.cpu.state.xsave.bytes;
        area[24..28].copy_from_slice(&context.mxcsr.to_le_bytes());
        for (number, ymm) in context.ymm.iter().enumerate() {
            area[160 + number * 16..][..16].copy_from_slice(&ymm[..16]);
            area[576 + number * 16..][..16].copy_from_slice(&ymm[16..]);
        }
    }

    /// Brings vector registers that the state holds to the context.
    fn fetch_vectors(&mut self) {
        let context = self.windows.context();
        if context.vectors != VECTORS_IN_STATE {
            return;
        }
        context.vectors = VECTORS_IN_CONTEXT;
        let area = &self.cpu.state.xsave.bytes;
        context.mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]);
        for (number, ymm) in context.ymm.iter_mut().enumerate() {
            ymm[..16].copy_from_slice(&area[160 + number * 16..][..16]);
            ymm[16..].copy_from_slice(&area[576 + number * 16..][..16]);
        }
    }

    /// Drops what the guest has made invalid.
    pub(super) fn follow_changes(&mut self) {
        let changes = self.cpu.take_tlb_changes();
        if changes.flushed {
            self.flushes += 1;
            self.statistics.tlb_flushes += 1;
            self.spaces.flush_all(self.cpu.address_space(), self.cpu.pcid());
            if self.kernel_stays() {
                self.forget_local_jumps();
            } else {
                self.forget_jumps();
            }
        } else {
            if let Some(linear) = changes.page {
                self.statistics.page_flushes += 1;
                self.spaces.flush_page(linear);
                self.forget_jumps_to(linear);
            }
            if changes.switched {
                self.flushes += 1;
                self.statistics.switches += 1;
                self.spaces.select(self.cpu.address_space(), self.cpu.pcid());
                self.unlink(false);
            }
        }
        for page in self.env.take_newly_marked() {
            self.protect(page);
        }
        if self.env.code_epoch() != self.epoch {
            self.drop_written_pages();
        }
        let cpuid_for = (self.cpu.state.cr4, self.cpu.state.xcr0);
        if cpuid_for != self.cpuid_for {
            self.cpuid_for = cpuid_for;
            self.windows.context().forget_cpuid();
        }
    }

    /// Stores to the page of RAM go the slow way from now on.
    fn protect(&mut self, page: u64) {
        self.spaces.protect(self.ram.as_ptr() as u64 + page);
    }

    /// Links between pages end: those that hold in the current address space, or all.
    pub(super) fn unlink(&mut self, globally: bool) {
        let context = self.windows.context();
        for link in self.linked.drain(..) {
            self.cache.unlink(link, context);
        }
        if globally {
            for link in self.linked_globally.drain(..) {
                self.cache.unlink(link, context);
            }
        }
    }

    /// All translations go.
    fn clear_cache(&mut self) {
        self.statistics.cleared += 1;
        self.names.cleared();
        // Other code will use the slots.
        self.spaces.forget_windows();
        self.cache.clear();
        self.linked.clear();
        self.linked_globally.clear();
        self.forget_jumps();
    }

    /// Pages whose code was written: their blocks go.
    fn drop_written_pages(&mut self) {
        let (epoch, pages) = self.env.written_since(self.epoch);
        self.epoch = epoch;
        let Some(pages) = pages else {
            self.clear_cache();
            return;
        };
        for CodeWrite { page, lines } in pages {
            if !self.cache.drop_lines(page, lines, self.windows.context()) {
                continue;
            }
            self.statistics.dropped += 1;
            if self.written.dropped(page) {
                self.env.release_code(page);
            }
        }
    }

    // ---- translated code ----

    /// The block for the processor's instruction pointer, translated now if need be; `None` where it must be
    /// interpreted. `loop_head`: a jump backwards leads there.
    pub(super) fn block(&mut self, key: Key, loop_head: bool) -> Option<u32> {
        let rip = self.cpu.state.rip;
        let Ok(Place::Ram(offset)) = self.cpu.probe(&mut self.env, rip, Access::Execute) else { return None };
        match self.cache.find(offset, key) {
            Some(number) => {
                let expected = self.cache.block(number)?.second();
                if expected.is_some() && self.second_page(rip) != expected {
                    return self.translate(offset, key, loop_head);
                }
                Some(number)
            }
            None => self.translate(offset, key, loop_head),
        }
    }

    /// Offset in RAM of the page behind that of an instruction pointer, if it may be executed.
    fn second_page(&mut self, rip: u64) -> Option<u64> {
        let next = following_page(rip);
        if next > u64::from(u32::MAX) && self.cpu.state.mode() != Mode::Long64 {
            return None;
        }
        match self.cpu.probe(&mut self.env, next, Access::Execute) {
            Ok(Place::Ram(offset)) => Some(offset & PAGE_MASK),
            _ => None,
        }
    }

    pub(super) fn translate(&mut self, offset: u64, key: Key, loop_head: bool) -> Option<u32> {
        let page = offset & PAGE_MASK;
        if self.written.entered(page) {
            return None;
        }
        let slots_used_up = self.cache.slots().len() + SLOTS_OF_A_BLOCK >= SLOTS;
        if self.cache.is_full() || self.always_hot && slots_used_up {
            self.clear_cache();
        }
        // Marked before the bytes are read: a later write is noticed.
        self.env.mark_code(page);
        self.follow_changes();
        let mut bytes = [0; PAGE + OVERHANG];
        self.env.load_bytes(page, &mut bytes[..PAGE]);
        if let Some(translation) = block::translate(&self.request(&bytes[..PAGE], offset, key, loop_head)) {
            return self.insert(offset, key, None, translation);
        }
        // The first instruction may cross into the next page.
        if (offset as usize & 0xfff) + OVERHANG <= PAGE {
            return None;
        }
        let second = self.second_page(self.cpu.state.rip)?;
        self.env.mark_code(second);
        self.follow_changes();
        self.env.load_bytes(second, &mut bytes[PAGE..]);
        let translation = block::translate(&self.request(&bytes, offset, key, loop_head))?;
        self.insert(offset, key, Some(second), translation)
    }

    fn insert(
        &mut self,
        offset: u64,
        key: Key,
        second: Option<u64>,
        translation: Translation,
    ) -> Option<u32> {
        self.statistics.translated += 1;
        self.statistics.guest_bytes += translation.length as u64;
        self.statistics.host_bytes += translation.code.len() as u64;
        let address = self.cache.address(self.cache.next_start() as u32);
        // The page is that of the instruction pointer, wherever in a block that stands.
        let linear = self.cpu.state.rip & PAGE_MASK | offset & !PAGE_MASK;
        self.names.made(address, translation.hot as u64, linear, key);
        self.cache.insert(offset, key, second, translation, self.windows.context())
    }

    fn request<'a>(&'a self, page: &'a [u8], offset: u64, key: Key, loop_head: bool) -> Request<'a> {
        Request {
            page,
            offset: (offset & !PAGE_MASK) as usize,
            key,
            model: &self.cpu.model,
            start: self.cache.next_start(),
            cold_start: self.cache.next_cold_start(),
            first_site: self.cache.next_site(),
            block: self.cache.next_block(),
            first_link: self.cache.next_link(),
            shared: self.cache.shared(),
            all_flags: self.trace.is_on(),
            first_slot: self.is_hot(offset, key).then(|| self.cache.slots().len() as u32),
            page_offset: offset & PAGE_MASK,
            roaming: &self.roaming,
            alone: &self.alone,
            loop_head: loop_head || self.loop_heads.contains(&offset),
        }
    }

    /// Whether a block that begins here is worth slots: hot code of user mode.
    fn is_hot(&self, offset: u64, key: Key) -> bool {
        let lines = self.hot.get(&(offset & PAGE_MASK)).copied().unwrap_or(0);
        key.class() == USER
            && (self.always_hot || lines & code_tracker::lines(offset, 1) != 0)
            && self.cache.slots().len() + SLOTS_OF_A_BLOCK < SLOTS
    }

    /// The guest was found executing here: the code around is translated anew, when it is next executed, with slots.
    pub(super) fn found_hot(&mut self) {
        let now = host_cpu::tsc();
        if now.wrapping_sub(self.sampled) < SAMPLING_PERIOD {
            return;
        }
        self.sampled = now;
        let rip = self.cpu.state.rip;
        let Ok(Place::Ram(offset)) = self.cpu.probe(&mut self.env, rip, Access::Execute) else { return };
        self.look_for_roaming();
        if Key::of(&self.cpu).class() != USER {
            return;
        }
        let seen = self.seen.entry(offset >> SEEN_SHIFT).or_default();
        *seen += 1;
        if *seen < SEEN_OFTEN {
            return;
        }
        self.seen.clear();
        if self.cache.slots().len() + SLOTS_OF_A_BLOCK >= SLOTS {
            self.start_hot_code_anew();
        }
        let page = offset & PAGE_MASK;
        let first = (offset & !PAGE_MASK).saturating_sub(HOT_BEFORE);
        let around = code_tracker::lines(first, (offset & !PAGE_MASK) - first + HOT_BEHIND);
        let lines = self.hot.entry(page).or_default();
        let new = around & !*lines;
        *lines |= new;
        if new != 0 {
            self.statistics.hot += u64::from(new.count_ones());
            self.loop_heads.extend(self.cache.loop_heads(page, new));
            self.cache.drop_lines(page, new, self.windows.context());
        }
    }

    /// The slots are used up: what is hot now gets them.
    fn start_hot_code_anew(&mut self) {
        self.loop_heads.clear();
        for (page, lines) in std::mem::take(&mut self.hot) {
            self.cache.drop_lines(page, lines, self.windows.context());
        }
        self.spaces.forget_windows();
        self.cache.free_slots();
    }

    /// The window that begins with a site's instruction can't be used. If that is so often, there will be none.
    pub(super) fn window_failed(&mut self, site: &Site) {
        let Some(start) = self.cache.block(site.block).map(|block| block.offset) else { return };
        let place = start & PAGE_MASK | u64::from(site.guest);
        let failures = self.failures.entry(place).or_default();
        *failures += 1;
        if *failures < FAILURES {
            return;
        }
        self.failures.remove(&place);
        self.alone.insert(place);
        let lines = code_tracker::lines(start, 1);
        self.cache.drop_lines(start & PAGE_MASK, lines, self.windows.context());
    }

    /// Instructions that miss their slots too often get none from now on.
    fn look_for_roaming(&mut self) {
        let mut pages = Vec::new();
        for (slot, &place) in self.windows.mapping().slots().iter().zip(self.cache.slots()) {
            if slot.misses.load(Ordering::Relaxed) > ROAMING_MISSES && self.roaming.insert(place) {
                pages.push(place);
            }
            slot.misses.store(0, Ordering::Relaxed);
        }
        for place in pages {
            let lines = code_tracker::lines(place, 1);
            self.cache.drop_lines(place & PAGE_MASK, lines, self.windows.context());
        }
    }

    /// The bias of the jump cache in the current address space and a mode.
    fn bias(&mut self, space: u16, key: Key) -> u64 {
        loop {
            if let Some(bias) = self.biases.get(space, key.bits(), host_cpu::random) {
                return bias;
            }
            self.forget_jumps();
            self.context().flush_jumps();
            self.biases.start_anew();
        }
    }

    /// Works out the biases of all classes of the current mode, unless the context has them.
    fn update_biases(&mut self, key: Key) {
        let space = self.cpu.address_space();
        let kernel = if self.global_kernel { GLOBAL_SPACE } else { space };
        let mode = key.with_class(0);
        while self.biases_for != (space, mode.bits(), self.forgotten) {
            let forgotten = self.forgotten;
            for class in 0..3 {
                let bias = self.bias(if class == USER { space } else { kernel }, mode.with_class(class));
                self.context().class_bias[usize::from(class)] = bias;
            }
            // Running out of biases makes those before invalid.
            self.biases_for = (space, mode.bits(), forgotten);
        }
    }

    /// Works out what SYSCALL and SYSRET do, unless the context has it.
    fn update_system_calls(&mut self) {
        let state = &self.cpu.state;
        let now = (state.msr.star, state.msr.efer, state.cr0);
        if self.system_calls_for == Some(now) {
            return;
        }
        self.system_calls_for = Some(now);
        let fast = self.cpu.fast_system_calls();
        let context = self.windows.context();
        context.fast_system_calls = fast.is_some().into();
        if let Some([syscall, sysret]) = fast {
            context.syscall.cs = syscall[0];
            context.syscall.ss = syscall[1];
            context.sysret.cs = sysret[0];
            context.sysret.ss = sysret[1];
        }
    }

    /// What the signal handler must know.
    fn running(&mut self) -> Running {
        let (start, end) = self.cache.range();
        let exit = self.cache.address(self.cache.parts().fault_exit as u32);
        let fault_address = &raw mut *self.fault_address;
        let site = &raw mut self.windows.context().site;
        Running { start, end, exit, site, fault_address }
    }

    /// Sets what translated code needs of the state, and announces that it runs.
    fn prepare(&mut self, key: Key) {
        self.update_biases(key);
        let flags = flags_word(self.cpu.state.rflags);
        let pending = self.env.has_event();
        let tsc_offset = self.env.tsc_offset();
        self.update_system_calls();
        self.update_returns();
        let bases = self.cpu.state.cr4_has(Cr4::FSGSBASE);
        let (fs, gs) = (self.cpu.state.seg[4].base, self.cpu.state.seg[5].base);
        let context = self.windows.context();
        context.flags = flags;
        context.block_flags = flags;
        context.fs_base = fs;
        context.gs_base = gs;
        context.pending = pending.into();
        context.tsc_offset = tsc_offset;
        context.base_instructions = bases.into();
        let bias = context.class_bias[usize::from(key.class())];
        // An event that comes from here on makes the first lookup miss.
        if context.jump_bias.load(Ordering::Relaxed) != bias {
            context.jump_bias.store(bias, Ordering::SeqCst);
            // The stack window may be another privilege class's, or another mode's.
            context.stack_page.store(NO_STACK_PAGE, Ordering::SeqCst);
        }
        if context.event.load(Ordering::SeqCst) != 0 {
            context.jump_bias.fetch_or(EVENT_BIT, Ordering::SeqCst);
        }
    }

    /// Executes translated code from an offset in the code memory on, until it leaves.
    fn enter(&mut self, target: u32, load: Load) -> Option<Site> {
        self.statistics.entered += 1;
        let key = Key::of(&self.cpu);
        self.prepare(key);
        let with_vectors = load != Load::Mode || key.class() == USER;
        if with_vectors {
            self.fetch_vectors();
        }
        let parts = self.cache.parts();
        let way = match load {
            Load::X87 => parts.enter_with_x87,
            _ if with_vectors => parts.enter_with_vectors,
            _ => parts.enter,
        };
        let way = self.cache.address(way as u32);
        let target = self.cache.address(target);
        let pointer = self.windows.mapping().context(self.spaces.current());
        let context = self.windows.context();
        // Plain stores: whoever looks at it makes a barrier on this thread first.
        let passages = context.passages.load(Ordering::Relaxed);
        context.passages.store(passages.wrapping_add(1), Ordering::Release);
        // SAFETY: the shared code has this signature; it was emitted for this context, preserves what a function
        // must, and executes only code made by the translator, which touches nothing but the context, the state
        // and guest RAM that the inline TLB allows.
        unsafe {
            let enter: extern "sysv64" fn(*mut Context, u64) = transmute(way);
            enter(pointer, target);
        }
        let context = self.windows.context();
        context.passages.store(passages.wrapping_add(2), Ordering::Release);
        let number = context.site;
        let flags = context.flags;
        self.set_flags(flags);
        if number == FAULT_SITE { None } else { self.cache.site(number) }
    }

    pub(super) fn set_flags(&mut self, word: u64) {
        let arithmetic = Rflags::ARITHMETIC.bits();
        let overflow = if word & 0xff != 0 { Rflags::OF.bits() } else { 0 };
        let low = word >> 8 & 0xff & arithmetic;
        self.cpu.state.rflags = self.cpu.state.rflags & !arithmetic | low | overflow;
    }

    /// Address of the host's instruction that raised a signal.
    pub(super) fn fault_address(&self) -> u64 {
        *self.fault_address
    }

    /// Takes an event, if one waits.
    fn take_event(&mut self) -> Option<Exit> {
        if self.context().event.load(Ordering::SeqCst) != 0 {
            // Cleared first: what comes later is noticed again. The interpreter takes what may be taken.
            self.context().event.store(0, Ordering::SeqCst);
            self.statistics.events += 1;
            if let Some(exit) = self.interpret(0, false) {
                return Some(exit);
            }
        }
        if self.env.has_event() && self.cpu.state.has_flags(Rflags::IF) {
            self.interpret(0, false)
        } else {
            None
        }
    }

    /// One round: an event, the interpreter, or translated code.
    fn turn(&mut self) -> Result<Option<Exit>, EngineError> {
        if let Some(exit) = self.take_event() {
            return Ok(Some(exit));
        }
        self.statistics.dispatched += 1;
        self.trace.note(&mut self.cpu, &mut self.env);
        self.cpu.drop_idle_resume_flag();
        let key = Key::of(&self.cpu);
        let translatable = key.code32() || self.cpu.state.mode() == Mode::Long64;
        let number = if translatable && self.cpu.runs_plainly() { self.block(key, false) } else { None };
        let found = number.and_then(|number| Some((number, self.cache.block(number)?)));
        let Some((number, block)) = found else {
            let statistics = &mut self.statistics;
            *(if translatable { &mut statistics.not_translated } else { &mut statistics.other_modes }) += 1;
            self.windows.context().forget_cpuid();
            return Ok(self.interpret_untranslated(translatable));
        };
        let (entry, lookup_entry, crosses) = (block.entry, block.lookup_entry, block.second().is_some());
        let rip = self.cpu.state.rip;
        let host = self.cache.address(lookup_entry);
        let remember = !self.trace.is_on() && self.may_remember(rip, key);
        self.update_biases(key);
        self.note_code(rip, number);
        let context = self.windows.context();
        let bias = context.class_bias[usize::from(key.class())];
        context.page_base = rip & PAGE_MASK;
        context.address = rip;
        if remember {
            context.jumps[jump_index(rip)] = JumpEntry { tag: rip ^ bias, host };
            self.cache.remembered(number, jump_index(rip));
        }
        self.resets = self.spaces.shared().resets();
        self.spaces.shared().enter_block();
        let mut place = if crosses { lookup_entry } else { entry };
        let mut load = Load::Mode;
        loop {
            let site = self.enter(place, load);
            match self.left(site) {
                Next::Dispatch => return Ok(None),
                Next::Leave(exit) => return exit.map(Some),
                // What the block has checked must still hold.
                Next::Resume(..) if self.spaces.shared().resets() != self.resets => return Ok(None),
                Next::Resume(host, what) => (place, load) = (host, what),
            }
        }
    }

    /// Whether the jump cache may hold this instruction pointer. Supervisor code of guests that map it as global pages
    /// has one bias for all address spaces; what isn't global can't be remembered then.
    fn may_remember(&mut self, rip: u64, key: Key) -> bool {
        if key.class() == USER {
            return true;
        }
        let global = self.cpu.is_global(rip);
        if global == self.global_kernel {
            return true;
        }
        self.otherwise += 1;
        if self.otherwise > OTHERWISE {
            self.otherwise = 0;
            self.global_kernel = global;
            self.forget_jumps();
            return true;
        }
        !self.global_kernel
    }

    /// What a block that is entered in its middle must find loaded.
    pub(super) fn loaded_within(&self, block: u32) -> Load {
        match self.cache.block(block) {
            Some(block) if block.x87 => Load::X87,
            Some(block) if block.vectors => Load::Vectors,
            _ => Load::Mode,
        }
    }

    /// A jump that isn't linked: linked to its target, unless something else must happen there first.
    pub(super) fn link_jump(&mut self, number: u32, site: &Site) {
        let has_event = self.context().event.load(Ordering::SeqCst) != 0;
        if has_event || self.trace.is_on() || !self.cpu.runs_plainly() {
            return;
        }
        let key = Key::of(&self.cpu);
        let generation = self.cache.next_site();
        let loop_head = matches!(site.kind, SiteKind::Jump { backwards: true, .. });
        let Some(block) = self.block(key, loop_head) else { return };
        // Not if all blocks were dropped to make room for this one.
        if self.cache.next_site() < generation || self.cache.block(site.block).is_none() {
            return;
        }
        self.cache.link(number, block, self.windows.context());
        if let SiteKind::Link { link, .. } = site.kind {
            let rip = self.cpu.state.rip;
            let crosses = self.cache.block(block).is_some_and(|block| block.second().is_some());
            self.note_code(rip, block);
            // User code is global in no guest that is known: only what the kernel has is looked after.
            if key.class() != USER
                && self.cpu.is_global(rip)
                && (!crosses || self.cpu.is_global(following_page(rip)))
            {
                self.linked_globally.push(link);
            } else {
                self.linked.push(link);
            }
        }
    }
}

/// Linear address of the page behind that of an instruction pointer.
pub(super) const fn following_page(rip: u64) -> u64 {
    (rip & PAGE_MASK).wrapping_add(PAGE as u64)
}

/// The arithmetic flags in the form of LAHF and SETO AL.
fn flags_word(rflags: u64) -> u64 {
    (rflags & 0xff) << 8 | rflags >> 11 & 1
}

impl Vcpu for DbtVcpu {
    fn state(&mut self) -> Result<CpuState, EngineError> {
        self.sync_vectors();
        Ok(self.cpu.state.clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.sync_vectors();
        self.cpu.state = state.clone();
        self.cpu.state_changed();
        self.follow_changes();
        // RAM may have been loaded anew, past the record of cached code.
        self.clear_cache();
        Ok(())
    }

    fn run(&mut self) -> Result<Exit, EngineError> {
        if self.single_step || !self.cpu.breakpoints.is_empty() {
            self.sync_vectors();
            let exit = interp_vcpu::run(&mut self.cpu, &mut self.env, self.single_step, &mut self.trace);
            self.follow_changes();
            return Ok(exit);
        }
        fault::set_running(Some(self.running()));
        self.thread.begin();
        let exit = loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(exit)) => break Ok(exit),
                Err(error) => break Err(error),
            }
        };
        self.thread.end();
        fault::set_running(None);
        exit
    }

    fn set_debug(&mut self, debug: &DebugControl) -> Result<(), EngineError> {
        self.single_step = debug.single_step;
        self.cpu.breakpoints.clone_from(&debug.breakpoints);
        Ok(())
    }

    fn count_all(&mut self) {
        self.statistics.by_kind = true;
    }

    fn statistics(&self) -> Vec<(String, u64)> {
        self.statistics.list()
    }

    fn set_tracer(&mut self, tracer: Box<dyn Tracer>) {
        self.trace.set(tracer);
        // What was translated so far is linked.
        self.clear_cache();
    }

    fn set_code_map(&mut self, map: Box<dyn CodeMap>) {
        self.names.set(map, self.cache.shared_range());
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        self.cpu.translate(&self.env, linear)
    }
}
