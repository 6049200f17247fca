//! A virtual processor of the engine `dbt`: 64-bit code is translated, everything else is interpreted.
#![allow(unsafe_code)]

use std::mem::transmute;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use bivisor_machine::engine::{DebugControl, EngineError, Exit, Vcpu};
use bivisor_machine::host::Waker;
use bivisor_x86::cpu::{Access, Cpu};
use bivisor_x86::env::Env;
use bivisor_x86::paging::Place;
use bivisor_x86::registers::Rflags;
use bivisor_x86::state::{CpuState, Mode};
use rustc_hash::FxHashMap;

use super::analysis;
use super::block::{self, Request};
use super::cache::Cache;
use super::context::{Context, EVENT_BIT, TLB_EMPTY, TLB_ENTRIES, jump_index};
use super::context_memory::ContextMemory;
use super::fault::{self, FAULT_SITE, Running};
use super::key::Key;
use super::site::{Site, SiteKind};
use crate::env::VcpuEnv;
use crate::interp_vcpu::{self, ended};

const PAGE_MASK: u64 = !0xfff;
/// Biases of the jump cache are counted in this.
const BIAS_UNIT: u64 = 1 << 48;
/// The largest bias: bit 63 is [`EVENT_BIT`].
const LAST_BIAS: u64 = 0x7fff * BIAS_UNIT;
/// Instructions that are interpreted at a time where nothing can be translated.
const INTERPRETED: u64 = 64;
/// A page whose code was written this often is interpreted for a while.
const VOLATILE_WRITES: u32 = 16;
/// So many times code of such a page is entered before translating it is tried again.
const VOLATILE_ENTRIES: u32 = 20_000;

/// How often the code of a page was written.
#[derive(Clone, Copy, Default)]
struct Volatility {
    writes: u32,
    entries_left: u32,
}

/// A virtual processor.
pub struct DbtVcpu {
    // Boxed: the context points to its state.
    cpu: Box<Cpu>,
    env: VcpuEnv,
    ram: NonNull<u8>,
    context: ContextMemory,
    cache: Cache,
    single_step: bool,
    native_tsc: bool,
    epoch: u64,
    /// Bias of the jump cache for each address space and mode.
    biases: FxHashMap<(u16, u8), u64>,
    last_bias: u64,
    volatile: FxHashMap<u64, Volatility>,
    fault_address: Box<u64>,
    /// How often the inline TLB was emptied.
    flushes: u64,
}

// SAFETY: the raw pointers lead to RAM, which is shared by design, and to memory owned by this value.
unsafe impl Send for DbtVcpu {}

/// Tells a running processor of an event, from another thread.
struct Observer {
    bias: *const AtomicU64,
    event: *const AtomicU8,
    // Keeps the two alive.
    _memory: Arc<dyn std::any::Any + Send + Sync>,
}

// SAFETY: the pointers lead to atomics that the kept memory holds.
unsafe impl Send for Observer {}
// SAFETY: as above.
unsafe impl Sync for Observer {}

impl Waker for Observer {
    fn wake(&self) {
        // SAFETY: the memory is kept alive; both are atomics, which everybody may access.
        unsafe {
            (*self.event).store(1, Ordering::SeqCst);
            (*self.bias).fetch_or(EVENT_BIT, Ordering::SeqCst);
        }
    }
}

/// What to do next.
enum Next {
    /// Look for a block at the processor's instruction pointer.
    Dispatch,
    /// Enter translated code at this offset in the code memory, in the middle of this block.
    Resume(u32, u32),
    /// Return to the caller.
    Leave(Result<Exit, EngineError>),
}

impl DbtVcpu {
    /// A processor over `cpu` and its surroundings. `ram`: where RAM is mapped.
    pub fn new(cpu: Cpu, env: VcpuEnv, ram: NonNull<u8>) -> Result<Self, EngineError> {
        let no_memory = |error| EngineError(format!("the host gives no memory for translated code: {error}"));
        if !analysis::host_can_translate() {
            return Err(EngineError(
                "the engine dbt needs a host CPU with BMI2 and AVX: say --engine interp".into(),
            ));
        }
        fault::install();
        let mut cpu = Box::new(cpu);
        let mut context = ContextMemory::new().map_err(no_memory)?;
        context.get().reset(&raw mut cpu.state);
        let native_tsc = env.tsc_offset() == 0;
        let memory = context.keep_alive();
        let place = context.get();
        let observer =
            Observer { bias: &raw const place.jump_bias, event: &raw const place.event, _memory: memory };
        env.set_observer(Arc::new(observer));
        Ok(Self {
            cpu,
            env,
            ram,
            context,
            cache: Cache::new().map_err(no_memory)?,
            single_step: false,
            native_tsc,
            epoch: 0,
            biases: FxHashMap::default(),
            last_bias: 0,
            volatile: FxHashMap::default(),
            fault_address: Box::new(0),
            flushes: 0,
        })
    }

    fn context(&mut self) -> &mut Context {
        self.context.get()
    }

    // ---- the interpreter ----

    /// Lets the interpreter execute, at most `budget` instructions, and takes note of what it changed.
    fn interpret(&mut self, budget: u64) -> Option<Exit> {
        let exit = self.cpu.run(&mut self.env, budget);
        self.follow_changes();
        ended(exit)
    }

    /// Drops what the guest has made invalid.
    fn follow_changes(&mut self) {
        let changes = self.cpu.take_tlb_changes();
        if changes.flushed {
            self.flush_tlb();
            self.forget_biases();
        } else {
            if changes.switched {
                self.flush_tlb();
            }
            if let Some(linear) = changes.page {
                self.flush_page(linear);
                self.forget_biases();
            }
        }
        for page in self.env.take_newly_marked() {
            self.protect(page);
        }
        if self.env.code_epoch() != self.epoch {
            self.drop_written_pages();
        }
        let native_tsc = self.env.tsc_offset() == 0;
        if native_tsc != self.native_tsc {
            self.native_tsc = native_tsc;
        }
    }

    fn flush_tlb(&mut self) {
        self.flushes = self.flushes.wrapping_add(1);
        for class in 0..3 {
            self.context().flush_tlb(class);
        }
    }

    fn flush_page(&mut self, linear: u64) {
        let index = (linear >> 12) as usize % TLB_ENTRIES;
        for tlb in &mut self.context().tlb {
            tlb.read[index] = TLB_EMPTY;
            tlb.write[index] = TLB_EMPTY;
        }
    }

    /// No address space's entries of the jump cache are valid any more.
    fn forget_biases(&mut self) {
        self.biases.clear();
    }

    /// Pages whose code was written: their blocks go.
    fn drop_written_pages(&mut self) {
        let (epoch, pages) = self.env.written_since(self.epoch);
        self.epoch = epoch;
        let Some(pages) = pages else {
            self.cache.clear();
            self.forget_biases();
            return;
        };
        for page in pages {
            if self.cache.has_page(page) {
                self.cache.drop_page(page);
                let volatility = self.volatile.entry(page).or_default();
                volatility.writes += 1;
                if volatility.writes >= VOLATILE_WRITES {
                    *volatility = Volatility { writes: VOLATILE_WRITES / 2, entries_left: VOLATILE_ENTRIES };
                }
                // The jump cache may lead into them.
                self.forget_biases();
            }
        }
    }

    // ---- translated code ----

    /// The block for the processor's instruction pointer, translated now if need be; `None` where it must be
    /// interpreted.
    fn block(&mut self) -> Option<u32> {
        let rip = self.cpu.state.rip;
        let Ok(Place::Ram(offset)) = self.cpu.probe(&mut self.env, rip, Access::Execute) else { return None };
        let key = Key::of(&self.cpu, self.native_tsc);
        match self.cache.find(offset, key) {
            Some(block) => Some(block),
            None => self.translate(offset, key),
        }
    }

    fn translate(&mut self, offset: u64, key: Key) -> Option<u32> {
        let page = offset & PAGE_MASK;
        if let Some(volatility) = self.volatile.get_mut(&page)
            && volatility.entries_left > 0
        {
            volatility.entries_left -= 1;
            return None;
        }
        if self.cache.is_full() {
            self.cache.clear();
            self.forget_biases();
        }
        // Marked before the bytes are read: a later write is noticed.
        self.env.mark_code(page);
        self.follow_changes();
        let mut bytes = [0; 4096];
        self.env.load_bytes(page, &mut bytes);
        let request = Request {
            page: &bytes,
            offset: (offset & !PAGE_MASK) as usize,
            key,
            model: &self.cpu.model,
            start: self.cache.next_start(),
            first_site: self.cache.next_site(),
            block: self.cache.next_block(),
            shared: self.cache.shared(),
        };
        let translation = block::translate(&request)?;
        self.cache.insert(offset, key, translation)
    }

    /// Stores to the page go the slow way from now on.
    fn protect(&mut self, page: u64) {
        let host = self.ram.as_ptr() as u64 + page;
        for tlb in &mut self.context().tlb {
            for index in 0..TLB_ENTRIES {
                let tag = tlb.write[index];
                if tag != TLB_EMPTY && tlb.addend[index].wrapping_add(tag << 12) == host {
                    tlb.write[index] = TLB_EMPTY;
                }
            }
        }
    }

    /// The bias of the jump cache in the current address space and mode.
    fn bias(&mut self, key: Key) -> u64 {
        let space = (self.cpu.address_space(), key.bits());
        if let Some(&bias) = self.biases.get(&space) {
            return bias;
        }
        if self.last_bias >= LAST_BIAS {
            self.biases.clear();
            self.context().flush_jumps();
            self.last_bias = 0;
        }
        self.last_bias += BIAS_UNIT;
        self.biases.insert(space, self.last_bias);
        self.last_bias
    }

    /// Executes translated code from an offset in the code memory on, until it leaves. `block` is the block there.
    fn enter(&mut self, target: u32, block: u32, direct: bool) -> Option<Site> {
        let (vectors, x87) =
            self.cache.block(block).map_or((false, false), |block| (block.vectors, block.x87));
        let parts = self.cache.parts();
        // Entering a block from its start, it loads its vector registers itself.
        let way = match (x87, vectors) {
            (true, _) => parts.enter_with_x87,
            (false, true) if !direct => parts.enter_with_vectors,
            _ => parts.enter,
        };
        let way = self.cache.address(way as u32);
        let target = self.cache.address(target);
        let (start, end) = self.cache.range();
        let exit = self.cache.address(self.cache.shared().exit as u32);
        let flags = flags_word(self.cpu.state.rflags);
        let fs_base = self.cpu.state.seg[4].base;
        let gs_base = self.cpu.state.seg[5].base;
        let fault_address = &raw mut *self.fault_address;
        let context = self.context();
        context.flags = flags;
        context.block_flags = flags;
        context.fs_base = fs_base;
        context.gs_base = gs_base;
        let site = &raw mut context.site;
        let pointer = &raw mut *context;
        fault::set_running(Some(Running { start, end, exit, site, fault_address }));
        // SAFETY: the shared code has this signature; it was emitted for this context, preserves what a function
        // must, and executes only code made by the translator, which touches nothing but the context, the state
        // and guest RAM that the inline TLB allows.
        unsafe {
            let enter: extern "sysv64" fn(*mut Context, u64) = transmute(way);
            enter(pointer, target);
        }
        fault::set_running(None);
        let context = self.context();
        let number = context.site;
        let flags = context.flags;
        self.set_flags(flags);
        if number == FAULT_SITE { None } else { self.cache.site(number) }
    }

    fn set_flags(&mut self, word: u64) {
        let arithmetic = Rflags::ARITHMETIC.bits();
        let overflow = if word & 0xff != 0 { Rflags::OF.bits() } else { 0 };
        let low = word >> 8 & 0xff & arithmetic;
        self.cpu.state.rflags = self.cpu.state.rflags & !arithmetic | low | overflow;
    }

    /// Where translated code left.
    fn left(&mut self, site: Option<Site>) -> Next {
        let Some(site) = site else { return self.host_fault() };
        let base = self.context().page_base;
        let rip = base.wrapping_add(site.guest.into());
        match site.kind {
            SiteKind::Access { write, size, flags_aside, retry, next, next_host } => {
                self.cpu.state.rip = rip;
                self.use_flags(flags_aside);
                let linear = self.context().address;
                if self.fill(linear, size, write) {
                    return Next::Resume(retry, site.block);
                }
                self.step(base.wrapping_add(next.into()), Some(next_host), site.block)
            }
            SiteKind::Stack { low, high, write, flags_aside, .. } => {
                self.cpu.state.rip = rip;
                self.use_flags(flags_aside);
                self.stack_miss(low, high, write, site.block)
            }
            SiteKind::Interpret { next, next_host } => {
                self.cpu.state.rip = rip;
                self.step(base.wrapping_add(next.into()), Some(next_host), site.block)
            }
            SiteKind::InterpretLast => {
                self.cpu.state.rip = rip;
                self.step(rip, None, site.block)
            }
            SiteKind::Jump { target, .. } => {
                self.cpu.state.rip = base.wrapping_add(target.into());
                self.link_jump()
            }
            SiteKind::Lookup => {
                self.cpu.state.rip = self.context().address;
                Next::Dispatch
            }
            SiteKind::Event { target } => {
                self.cpu.state.rip = base.wrapping_add(target.into());
                Next::Dispatch
            }
            SiteKind::LoadX87 => {
                self.cpu.state.rip = rip;
                Next::Dispatch
            }
        }
    }

    /// A jump within a page: linked to its target, unless something else must happen there first.
    fn link_jump(&mut self) -> Next {
        let site = self.context().site;
        let key = Key::of(&self.cpu, self.native_tsc);
        let generation = self.cache.next_site();
        if let Some(block) = self.block() {
            // Not if all blocks were dropped to make room for this one.
            let kept = self.cache.next_site() >= generation;
            let same_key = self.cache.site(site).is_some_and(|site| {
                self.cache.block(site.block).is_some_and(|from| from.key.without_no_stack() == key)
            });
            if kept && same_key {
                self.cache.link(site, block);
            }
        }
        Next::Dispatch
    }

    /// Takes the arithmetic flags from where the block had put them.
    fn use_flags(&mut self, aside: bool) {
        if aside {
            let word = self.context().block_flags;
            self.set_flags(word);
        }
    }

    /// Interprets one instruction for translated code, and goes on behind it if nothing has changed that matters.
    fn step(&mut self, next: u64, next_host: Option<u32>, block: u32) -> Next {
        let key = Key::of(&self.cpu, self.native_tsc);
        let space = self.cpu.address_space();
        let epoch = self.epoch;
        let flushes = self.flushes;
        let exit = self.interpret(1);
        if let Some(exit) = exit {
            return Next::Leave(Ok(exit));
        }
        let Some(next_host) = next_host else { return Next::Dispatch };
        let same = self.cpu.state.rip == next
            && self.epoch == epoch
            && self.flushes == flushes
            && self.cpu.address_space() == space
            && Key::of(&self.cpu, self.native_tsc) == key
            && self.cpu.runs_plainly()
            && !self.env.has_event();
        if same { Next::Resume(next_host, block) } else { Next::Dispatch }
    }

    /// The host raised a signal in an instruction of the guest's.
    fn host_fault(&mut self) -> Next {
        let base = self.context().page_base;
        match self.cache.fault_point(*self.fault_address) {
            Some((block, point)) => {
                self.use_flags(point.flags_aside);
                self.cpu.state.rip = base.wrapping_add(point.guest.into());
                self.step(base, None, block)
            }
            None => Next::Leave(Err(EngineError(format!(
                "translated code faulted at {:#x}, where no instruction of the guest's stands",
                *self.fault_address
            )))),
        }
    }

    fn stack_miss(&mut self, low: i32, high: i32, write: bool, block: u32) -> Next {
        let rsp = self.cpu.state.gpr[4];
        let first = rsp.wrapping_add(low as i64 as u64);
        let last = rsp.wrapping_add(high as i64 as u64).wrapping_sub(1);
        if first & PAGE_MASK == last & PAGE_MASK && self.fill(first, 1, write) {
            return Next::Dispatch;
        }
        // The same block, with each stack access by itself.
        let Some((offset, key)) = self.cache.block(block).map(|block| (block.offset, block.key)) else {
            return Next::Dispatch;
        };
        let key = key.with_no_stack();
        let variant = match self.cache.find(offset, key) {
            Some(variant) => Some(variant),
            None => self.translate(offset, key),
        };
        match variant.and_then(|number| Some((number, self.cache.block(number)?.entry))) {
            Some((number, entry)) => Next::Resume(entry, number),
            None => match self.interpret(1) {
                Some(exit) => Next::Leave(Ok(exit)),
                None => Next::Dispatch,
            },
        }
    }

    /// Enters a page into the inline TLB. False if the access must be made by the interpreter: it faults, crosses
    /// a page, goes to a device, or writes a page that holds translated code.
    fn fill(&mut self, linear: u64, size: u8, write: bool) -> bool {
        let last = linear.wrapping_add(u64::from(size) - 1);
        if (linear ^ last) & PAGE_MASK != 0 {
            return false;
        }
        let access = if write { Access::Write } else { Access::Read };
        let Ok(Place::Ram(offset)) = self.cpu.probe(&mut self.env, linear, access) else {
            self.follow_changes();
            return false;
        };
        if write && self.env.is_code(offset) {
            return false;
        }
        let class = usize::from(Key::of(&self.cpu, self.native_tsc).class());
        let addend =
            (self.ram.as_ptr() as u64).wrapping_add(offset & PAGE_MASK).wrapping_sub(linear & PAGE_MASK);
        let page = linear >> 12;
        let index = page as usize % TLB_ENTRIES;
        let tlb = &mut self.context().tlb[class];
        if tlb.addend[index] != addend || tlb.read[index] != page {
            tlb.write[index] = TLB_EMPTY;
        }
        tlb.addend[index] = addend;
        // What may be written may be read (there is no write-only page).
        tlb.read[index] = page;
        if write {
            tlb.write[index] = page;
        }
        true
    }

    /// One round: an event, the interpreter, or translated code.
    fn turn(&mut self) -> Result<Option<Exit>, EngineError> {
        if self.context().event.load(Ordering::SeqCst) != 0 {
            // Cleared first: what comes later is noticed again. The interpreter takes what may be taken.
            self.context().event.store(0, Ordering::SeqCst);
            if let Some(exit) = self.interpret(1) {
                return Ok(Some(exit));
            }
        }
        if self.env.has_event()
            && self.cpu.state.has_flags(Rflags::IF)
            && let Some(exit) = self.interpret(1)
        {
            return Ok(Some(exit));
        }
        let translatable = self.cpu.runs_plainly() && self.cpu.state.mode() == Mode::Long64;
        let block = if translatable { self.block() } else { None };
        let Some(number) = block else {
            let budget = if translatable { 1 } else { INTERPRETED };
            return Ok(self.interpret(budget));
        };
        let Some((entry, lookup_entry)) =
            self.cache.block(number).map(|block| (block.entry, block.lookup_entry))
        else {
            return Ok(None);
        };
        let rip = self.cpu.state.rip;
        let key = Key::of(&self.cpu, self.native_tsc);
        let bias = self.bias(key);
        let host = self.cache.address(lookup_entry);
        let context = self.context.get();
        context.page_base = rip & PAGE_MASK;
        let index = jump_index(rip);
        context.jumps.complement[index] = rip.wrapping_add(bias).wrapping_neg();
        context.jumps.host[index] = host;
        // An event that comes from here on makes the first lookup miss.
        context.jump_bias.store(bias, Ordering::SeqCst);
        if context.event.load(Ordering::SeqCst) != 0 {
            context.jump_bias.fetch_or(EVENT_BIT, Ordering::SeqCst);
        }
        let mut site = self.enter(entry, number, true);
        loop {
            match self.left(site) {
                Next::Dispatch => return Ok(None),
                Next::Leave(exit) => return exit.map(Some),
                Next::Resume(host, block) => site = self.enter(host, block, false),
            }
        }
    }
}

/// The arithmetic flags in the form of LAHF and SETO AL.
fn flags_word(rflags: u64) -> u64 {
    (rflags & 0xff) << 8 | rflags >> 11 & 1
}

impl Vcpu for DbtVcpu {
    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.cpu.state.clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.cpu.state = state.clone();
        self.cpu.state_changed();
        self.follow_changes();
        // RAM may have been loaded anew, past the record of cached code.
        self.cache.clear();
        Ok(())
    }

    fn run(&mut self) -> Result<Exit, EngineError> {
        if self.single_step || !self.cpu.breakpoints.is_empty() {
            let exit = interp_vcpu::run(&mut self.cpu, &mut self.env, self.single_step);
            self.follow_changes();
            return Ok(exit);
        }
        loop {
            if let Some(exit) = self.turn()? {
                return Ok(exit);
            }
        }
    }

    fn set_debug(&mut self, debug: &DebugControl) -> Result<(), EngineError> {
        self.single_step = debug.single_step;
        self.cpu.breakpoints.clone_from(&debug.breakpoints);
        Ok(())
    }

    fn translate(&mut self, linear: u64) -> Option<u64> {
        self.cpu.translate(&self.env, linear)
    }
}
