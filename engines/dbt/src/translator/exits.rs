//! What is done where translated code left.

use std::sync::atomic::Ordering;

use bivisor_machine::engine::{EngineError, Exit};
use bivisor_machine::exits::Kind;
use bivisor_x86::cpu::Access;
use bivisor_x86::env::Env;
use bivisor_x86::exception::{Exception, vector};
use bivisor_x86::memory::is_canonical;
use bivisor_x86::paging::Place;
use bivisor_x86::registers::Rflags;
use bivisor_x86::state::{SegReg, Segment};
use iced_x86::{Code, Decoder, DecoderOptions};

use super::block::PAGE;
use super::code32;
use super::context::{CPUID_ENTRIES, CpuidEntry};
use super::key::Key;
use super::site::{Site, SiteKind, Undo};
use super::spaces::Filling;
use super::vcpu::{DbtVcpu, Load, PAGE_MASK};

/// What to do next.
pub(super) enum Next {
    /// Look for a block at the processor's instruction pointer.
    Dispatch,
    /// Enter translated code at this offset in the code memory, with this loaded.
    Resume(u32, Load),
    /// Return to the caller.
    Leave(Result<Exit, EngineError>),
}

impl DbtVcpu {
    /// Where translated code left.
    pub(super) fn left(&mut self, site: Option<Site>) -> Next {
        let Some(site) = site else {
            self.statistics.host_fault += 1;
            return self.host_fault();
        };
        self.statistics.left(site.kind);
        let asked = self.env.asked();
        let next = self.handle(site);
        // The machine counts what it was asked for, and halts.
        if self.env.asked() == asked && !matches!(next, Next::Leave(Ok(Exit::Halt))) {
            self.count(site.kind);
        }
        next
    }

    /// Counts an exit that the machine has not heard of.
    fn count(&self, kind: SiteKind) {
        match kind {
            SiteKind::Access { .. }
            | SiteKind::Window { .. }
            | SiteKind::String { .. }
            | SiteKind::Stack { .. } => self.env.count(Kind::Memory),
            SiteKind::Interpret { .. }
            | SiteKind::Invlpg { .. }
            | SiteKind::Cpuid { .. }
            | SiteKind::InterpretLast => self.env.count(Kind::Instruction),
            _ => {}
        }
    }

    fn handle(&mut self, site: Site) -> Next {
        let number = self.context().site;
        let base = self.context().page_base;
        let rip = base.wrapping_add(site.guest.into());
        self.cpu.state.rip = rip;
        self.use_flags(site.flags_aside);
        match site.kind {
            SiteKind::Access { write, size, retry, next, next_host } => {
                let linear = self.context().address;
                match self.fill_or_fault(linear, size, write) {
                    Ok(true) => return self.resume(retry, &site),
                    // Of what must be aligned the interpreter knows whether another fault comes first.
                    Err(exception)
                        if exception.vector == vector::PF
                            && !site.vector
                            && size <= 8
                            && !self.cpu.state.has_flags(Rflags::AC) =>
                    {
                        return self.deliver(exception);
                    }
                    _ => {}
                }
                self.statistics.access_slow += 1;
                self.step(base.wrapping_add(next.into()), next_host, &site)
            }
            SiteKind::Window { write, size, retry, .. } => {
                let first = self.context().address;
                let last = first.wrapping_add(u64::from(size)).wrapping_sub(1);
                let crosses = first & PAGE_MASK != last & PAGE_MASK;
                if !crosses && self.fill(first, 1, write) {
                    return self.resume(retry, &site);
                }
                let then = self.enter_variant(&site, crosses);
                if !crosses {
                    self.window_failed(&site);
                }
                then
            }
            SiteKind::String { is_move, next, retry, next_host } => {
                if self.fill_for_string(is_move) {
                    return self.resume(retry, &site);
                }
                self.step(base.wrapping_add(next.into()), next_host, &site)
            }
            SiteKind::Stack { low, size, retry, .. } => self.stack_miss(low, size, retry, &site),
            SiteKind::Interpret { next, next_host } => {
                self.step(base.wrapping_add(next.into()), next_host, &site)
            }
            SiteKind::Invlpg { next, next_host } => {
                self.invalidate(base.wrapping_add(next.into()), next_host, &site)
            }
            SiteKind::Cpuid { next, next_host } => {
                let next = base.wrapping_add(next.into());
                let asked = (self.cpu.state.gpr[0] as u32, self.cpu.state.gpr[1] as u32);
                let then = self.step(next, next_host, &site);
                if self.cpu.state.rip == next {
                    self.remember_cpuid(asked);
                }
                then
            }
            SiteKind::InterpretLast => self.step(rip, None, &site),
            SiteKind::InterruptReturn => self.return_from_interrupt(rip, &site),
            SiteKind::Jump { target, .. } => {
                self.cpu.state.rip = base.wrapping_add(target.into());
                self.link_jump(number, &site);
                Next::Dispatch
            }
            SiteKind::Link { target, .. } => {
                self.cpu.state.rip = self.wrapped(base.wrapping_add(target as i64 as u64));
                self.link_jump(number, &site);
                Next::Dispatch
            }
            SiteKind::Lookup(undo) => {
                let target = self.context().address;
                if undo != Undo::Never && !is_canonical(target) {
                    self.undo(undo);
                    return self.step(rip, None, &site);
                }
                self.cpu.state.rip = target;
                if self.context().event.load(Ordering::SeqCst) != 0 {
                    self.found_hot();
                }
                Next::Dispatch
            }
            SiteKind::Event { target } => {
                self.cpu.state.rip = self.wrapped(base.wrapping_add(target as i64 as u64));
                self.found_hot();
                Next::Dispatch
            }
            SiteKind::Pause { resume } => {
                self.spun();
                // The event comes before the PAUSE, which is executed again then.
                if self.env.has_event() { Next::Dispatch } else { self.resume(resume, &site) }
            }
            SiteKind::LoadVectors => {
                self.cache.block(site.block).map_or(Next::Dispatch, |block| self.resume(block.entry, &site))
            }
        }
    }

    /// To go on within the site's block, with what it needs loaded.
    fn resume(&self, host: u32, site: &Site) -> Next {
        Next::Resume(host, self.loaded_within(site.block))
    }

    /// Takes back what a jump to an address that isn't canonical has done.
    fn undo(&mut self, undo: Undo) {
        let overwritten = self.context().overwritten;
        let rsp = &mut self.cpu.state.gpr[4];
        match undo {
            Undo::Never | Undo::Jump => {}
            Undo::Return(size) => *rsp = rsp.wrapping_sub(size.into()),
            Undo::Call => {
                let place = *rsp;
                *rsp = rsp.wrapping_add(8);
                // It lies in RAM and in one page: translated code has written it just now.
                if let Ok(Place::Ram(offset)) = self.cpu.probe(&mut self.env, place, Access::Write) {
                    self.env.store64(offset, overwritten);
                }
            }
        }
    }

    /// Whether the code that was translated is 64-bit code, not 32-bit code.
    fn is_long(&self) -> bool {
        self.cpu.state.seg[SegReg::Cs as usize].attributes & Segment::L != 0
    }

    /// A linear address as translated code sees it: 32-bit code has no upper half.
    fn wrapped(&self, linear: u64) -> u64 {
        if self.is_long() { linear } else { linear & u64::from(u32::MAX) }
    }

    /// Takes the arithmetic flags from where the block had put them.
    fn use_flags(&mut self, aside: bool) {
        if aside {
            let word = self.context().block_flags;
            self.set_flags(word);
        }
    }

    /// Interprets one instruction for translated code, and goes on behind it if nothing has changed that matters.
    pub(super) fn step(&mut self, next: u64, next_host: Option<u32>, site: &Site) -> Next {
        let key = Key::of(&self.cpu);
        let space = self.cpu.address_space();
        let (epoch, flushes) = (self.epoch, self.flushes);
        if self.statistics.by_kind {
            let code = self.code();
            self.statistics.interpreted(code);
        }
        let exit = self.interpret(1, site.vector);
        if let Some(exit) = exit {
            return Next::Leave(Ok(exit));
        }
        let Some(next_host) = next_host else {
            // What ends a block may change what CPUID tells.
            self.context().forget_cpuid();
            return Next::Dispatch;
        };
        let same = self.cpu.state.rip == next
            && self.epoch == epoch
            && self.flushes == flushes
            && self.cpu.address_space() == space
            && Key::of(&self.cpu) == key
            && self.cpu.runs_plainly()
            && !self.env.has_event();
        if same { self.resume(next_host, site) } else { Next::Dispatch }
    }

    /// INVLPG of the address that translated code has left behind.
    fn invalidate(&mut self, next: u64, next_host: Option<u32>, site: &Site) -> Next {
        if self.cpu.state.cpl != 0 {
            return self.step(next, next_host, site);
        }
        let linear = self.context().address;
        let (flushes, code) = (self.flushes, self.may_hold_code(linear));
        self.cpu.flush_tlb_page(linear);
        self.cpu.state.rip = next;
        self.cpu.state.interrupt_shadow = false;
        self.follow_changes();
        let same = self.flushes == flushes && !code && !self.env.has_event();
        match next_host.filter(|_| same) {
            Some(host) => self.resume(host, site),
            None => Next::Dispatch,
        }
    }

    /// What stands at the instruction pointer, as far as it lies in one page.
    fn code(&mut self) -> Code {
        let rip = self.cpu.state.rip;
        let Ok(Place::Ram(offset)) = self.cpu.probe(&mut self.env, rip, Access::Execute) else {
            return Code::INVALID;
        };
        let mut bytes = [0; 15];
        let length = bytes.len().min(PAGE - offset as usize % PAGE);
        self.env.load_bytes(offset, &mut bytes[..length]);
        let bits = self.cpu.state.code_bits();
        Decoder::new(bits, &bytes[..length], DecoderOptions::NONE).decode().code()
    }

    fn remember_cpuid(&mut self, (leaf, subleaf): (u32, u32)) {
        let gpr = &self.cpu.state.gpr;
        let result = [gpr[0] as u32, gpr[3] as u32, gpr[1] as u32, gpr[2] as u32];
        let index = leaf.wrapping_add(subleaf) as usize % CPUID_ENTRIES;
        let key = u64::from(leaf) | u64::from(subleaf) << 32;
        if key != super::context::CPUID_EMPTY {
            self.context().cpuid[index] = CpuidEntry { key, result, padding: 0 };
        }
    }

    /// The host raised a signal in an instruction of the guest's.
    fn host_fault(&mut self) -> Next {
        let base = self.context().page_base;
        let address = self.fault_address();
        match self.cache.fault_point(address) {
            Some((block, point)) => {
                self.use_flags(point.flags_aside());
                self.cpu.state.rip = base.wrapping_add(point.guest().into());
                let site = Site {
                    block,
                    guest: point.guest(),
                    flags_aside: false,
                    vector: true,
                    kind: SiteKind::InterpretLast,
                };
                self.step(base, None, &site)
            }
            None => Next::Leave(Err(EngineError(format!(
                "translated code faulted at {address:#x}, where no instruction of the guest's stands"
            )))),
        }
    }

    fn stack_miss(&mut self, low: i32, size: u16, retry: u32, site: &Site) -> Next {
        let first = self.cpu.state.gpr[4].wrapping_add(low as i64 as u64);
        let last = first.wrapping_add(u64::from(size)).wrapping_sub(1);
        // In 32-bit code nothing on the stack may wrap.
        let inside = self.is_long() || first < code32::LAST_PAGE;
        if inside && first & PAGE_MASK == last & PAGE_MASK && self.fill(first, 1, true) {
            let addend = self.addend(first);
            let context = self.context();
            context.stack_page.store(first & PAGE_MASK, Ordering::SeqCst);
            context.stack_addend.store(addend, Ordering::SeqCst);
            return self.resume(retry, site);
        }
        self.enter_variant(site, first & PAGE_MASK != last & PAGE_MASK)
    }

    /// The same code from the site's instruction on, with each access checked by itself. `link`: the site is to lead there
    /// from now on.
    fn enter_variant(&mut self, site: &Site, link: bool) -> Next {
        let Some(block) = self.cache.block(site.block) else { return Next::Dispatch };
        let (start, key) = (block.offset, block.key.with_no_stack());
        let offset = start & PAGE_MASK | u64::from(site.guest);
        let variant = match self.cache.find(offset, key) {
            // Its one instruction crosses into another page: only the jump cache may enter such a block, and it knows
            // the one that led here.
            _ if block.second().is_some() => None,
            Some(variant) => Some(variant),
            None => self.translate(offset, key, false),
        };
        match variant.and_then(|number| Some((number, self.cache.block(number)?.entry))) {
            Some((number, entry)) => {
                let kept = self.cache.block(site.block).is_some_and(|block| block.offset == start);
                if kept && link {
                    let own = self.context().site;
                    self.cache.link(own, number, self.windows.context());
                }
                Next::Resume(entry, Load::Mode)
            }
            None => match self.interpret(1, true) {
                Some(exit) => Next::Leave(Ok(exit)),
                None => Next::Dispatch,
            },
        }
    }

    /// Enters the pages of a string instruction into the inline TLB. False if that was just done and didn't help, or
    /// can't be done.
    fn fill_for_string(&mut self, is_move: bool) -> bool {
        let gpr = &self.cpu.state.gpr;
        let here = (self.cpu.state.rip, gpr[1], gpr[7]);
        let (source, destination) = (self.wrapped(gpr[6]), self.wrapped(gpr[7]));
        if here.1 == 0 || self.last_string == here {
            self.last_string = (0, 0, 0);
            return false;
        }
        self.last_string = here;
        (!is_move || self.fill(source, 1, false)) && self.fill(destination, 1, true)
    }

    /// What the inline TLB adds to addresses in the page.
    fn addend(&self, linear: u64) -> u64 {
        let class = usize::from(Key::of(&self.cpu).class());
        let tlbs = self.windows.mapping().tlbs(self.spaces.current());
        tlbs.class[class].entry(linear).addend.load(Ordering::Relaxed)
    }

    /// Raises an exception of the current instruction.
    fn deliver(&mut self, exception: Exception) -> Next {
        self.statistics.page_faults += 1;
        self.cpu.deliver_exception(&mut self.env, exception);
        self.follow_changes();
        Next::Dispatch
    }

    /// [`DbtVcpu::fill_or_fault`] where the interpreter raises what the access raises.
    pub(super) fn fill(&mut self, linear: u64, size: u8, write: bool) -> bool {
        self.fill_or_fault(linear, size, write).unwrap_or(false)
    }

    /// Enters a page into the inline TLB. False if the access must be made by the interpreter: it crosses a page, goes to
    /// a device, or writes a page that holds translated code.
    fn fill_or_fault(&mut self, linear: u64, size: u8, write: bool) -> Result<bool, Exception> {
        let last = linear.wrapping_add(u64::from(size) - 1);
        if (linear ^ last) & PAGE_MASK != 0 {
            return Ok(false);
        }
        let access = if write { Access::Write } else { Access::Read };
        let place = self.cpu.probe(&mut self.env, linear, access);
        let Ok(Place::Ram(offset)) = place else {
            self.follow_changes();
            return place.map(|_| false);
        };
        if write && self.env.is_code(offset) {
            return Ok(false);
        }
        let class = Key::of(&self.cpu).class();
        let addend =
            (self.ram.as_ptr() as u64).wrapping_add(offset & PAGE_MASK).wrapping_sub(linear & PAGE_MASK);
        let global = self.cpu.is_global(linear);
        // What is read is often written next.
        let writable = write || self.cpu.may_write(linear) && !self.env.is_code(offset);
        self.spaces.insert(&Filling { class, linear, addend, write: writable, global });
        // Marked meanwhile by another processor's thread: it may not have seen the new entry.
        if writable && self.env.is_code(offset) {
            self.spaces.forbid_write(class, linear);
            return Ok(!write);
        }
        Ok(true)
    }
}
