//! Translating one block: from guest bytes to host code.
//!
//! A block starts where a jump leads and goes on over conditional jumps, whose other way leaves it, to an unconditional
//! one. What stands here is the frame; [`super::operand`] emits ordinary instructions, [`super::flow`] jumps,
//! [`super::sensitive`] what would trap or tell of the host.

use bivisor_x86::cpuid::CpuModel;
use iced_x86::Encoder;

use rustc_hash::FxHashSet;

use super::analysis::{self, Class, Decoded, StackRange, Unit};
use super::checks::{self, Check, MAX_WINDOWS};
use super::code32;
use super::context::{
    self, ADDEND, ADDRESS, GUEST_RSP, TEMPORARY, block_flags, page_base, saved, stack_page,
};
use super::decode::{self, Decoding};
use super::emit::{Emitter, Fixup, Mem, Reg, Width, at, condition, reg};
use super::key::{Key, USER};
use super::site::{FaultPoint, Site, SiteKind, Undo};
use super::stack_moves;

/// Size of a page.
pub const PAGE: usize = 4096;
/// Bytes of the next page that are looked at, for an instruction that crosses into it.
pub const OVERHANG: usize = 15;

/// Offsets in the code memory of the code that all blocks share.
#[derive(Clone, Copy, Debug, Default)]
pub struct SharedCode {
    /// Leaves translated code; the site's number is on the stack.
    pub exit: usize,
    /// Called: loads the guest's SSE and AVX registers from the context.
    pub load_vectors: usize,
    /// Called: looks for another page for the stack window, by privilege class.
    pub stack_window: [usize; 3],
    /// Called: looks for another page for a slot, by privilege class, and whether it is written.
    pub slot: [[usize; 2]; 3],
    /// Called: REP MOVS, by code of 64 or 32 bits, privilege class, and log2 of the element's size.
    pub repeat_movs: [[[usize; 4]; 3]; 2],
    /// Called: REP STOS, likewise.
    pub repeat_stos: [[[usize; 4]; 3]; 2],
}

/// Where a block comes from and goes to.
pub struct Request<'a> {
    /// The page's bytes, and the first ones of the next page if the block's first instruction crosses into it.
    pub page: &'a [u8],
    /// Offset of the first instruction in the page.
    pub offset: usize,
    /// The mode.
    pub key: Key,
    /// What the guest's processor offers.
    pub model: &'a CpuModel,
    /// Offset in the code memory that the code will have.
    pub start: usize,
    /// Offset, behind all such code, of the code that is rarely executed: what is hot stands close together.
    pub cold_start: usize,
    /// Number of the first new site.
    pub first_site: u32,
    /// Number of the new block.
    pub block: u32,
    /// Number of the first free link.
    pub first_link: u32,
    /// The shared code.
    pub shared: SharedCode,
    /// The first free slot, if the code is hot.
    pub first_slot: Option<u32>,
    /// Every flag is kept all the time, read or not: for a trace.
    pub all_flags: bool,
    /// Offset in RAM of the page.
    pub page_offset: u64,
    /// Instructions, by offset in RAM, that access too many pages for a slot.
    pub roaming: &'a FxHashSet<u64>,
    /// Instructions, by offset in RAM, that share no check with those behind them.
    pub alone: &'a FxHashSet<u64>,
    /// A jump backwards leads here.
    pub loop_head: bool,
}

/// Offsets in a block's code of its entries.
pub struct Entries {
    /// For jumps by the jump cache: [`ADDRESS`] holds the linear address, the guest's flags are aside.
    pub lookup: usize,
    /// For jumps from other pages by a link: [`ADDRESS`] holds the linear address.
    pub link: usize,
    /// For jumps backwards in the page: events are looked for.
    pub backwards: usize,
    /// For jumps forwards in the page.
    pub forwards: usize,
}

/// A translated block.
pub struct Translation {
    /// Host code.
    pub code: Vec<u8>,
    /// Bytes of it for [`Request::start`]; the rest is for [`Request::cold_start`].
    pub hot: usize,
    /// Where it is entered.
    pub entries: Entries,
    /// The places where the code may leave.
    pub sites: Vec<Site>,
    /// Where host faults may happen.
    pub fault_points: Vec<FaultPoint>,
    /// Bytes of guest code.
    pub length: usize,
    /// Vector registers are used.
    pub vectors: bool,
    /// x87 registers are used.
    pub x87: bool,
    /// Links used.
    pub links: u32,
    /// Offsets in the page of the instructions that the slots used are for.
    pub slots: Vec<u16>,
    /// Lines of the page, of 64 bytes, that the block depends on: its own, and those at jumps' targets that were looked
    /// at for flags.
    pub lines: u64,
}

/// Code to be put behind the block: reached by a jump from within.
struct Stub {
    from: Fixup,
    site: u32,
    /// The memory operand whose address is to be worked out first.
    address: Option<Mem>,
    /// What the shared code tries first.
    retry: Option<Retry>,
}

/// What the shared code tries for a slot before the stub leaves.
#[derive(Clone, Copy)]
pub(super) struct Retry {
    pub routine: usize,
    pub slot: u32,
    pub size: i32,
    /// Position in the block's code to go on at.
    pub back: usize,
}

/// The taken side of a conditional jump, to be put behind the block.
pub(super) struct Tail {
    pub from: Fixup,
    pub target: i64,
    /// Offset in the page of the jump.
    pub guest: usize,
    pub live: u32,
}

pub(super) struct Builder<'a> {
    pub request: &'a Request<'a>,
    pub e: Emitter,
    pub encoder: Encoder,
    pub sites: Vec<Site>,
    stubs: Vec<Stub>,
    /// Stubs that first try the shared code for another stack window.
    stack_stub: Option<(Fixup, u32)>,
    pub tails: Vec<Tail>,
    pub fault_points: Vec<FaultPoint>,
    /// The guest's flags are in `block_flags`, the host's are anything.
    pub flags_aside: bool,
    /// What ADDEND is known to hold.
    pub addend: Addend,
    /// What ADDRESS is known to hold: so many bytes behind the start of a window.
    pub address: Option<(u8, i32)>,
    /// What it held before the current instruction.
    pub held: Option<(u8, i32)>,
    /// Windows that were checked.
    pub windows: [Option<Kept>; MAX_WINDOWS],
    /// Offsets in the page of the instructions that slots were taken for.
    pub slots: Vec<u16>,
    /// What guest RSP is to be moved by before anything sees it.
    pub stack_moved: i32,
    /// The last instruction was STI.
    pub in_shadow: bool,
    stack: Option<StackRange>,
    /// Host code offset of the current instruction, and its offset in the page.
    pub instruction_start: usize,
    pub guest: usize,
    pub next_guest: usize,
    /// The current instruction works on vectors.
    vector: bool,
    pub links: u32,
    /// The block follows jumps backwards: wherever it leads, that may be a way back.
    pub winds: bool,
    /// See [`Request::loop_head`].
    loop_head: bool,
}

/// What the scratch register for addends holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addend {
    Anything,
    Stack,
    Window(u8),
}

/// Where a window's addend is, beside ADDEND.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    Slot(u32),
    Context,
    Nowhere,
}

/// The operands of an instruction can't be renamed: it is interpreted.
pub(super) struct NotRenamed;

/// Translates the block at the requested place, or `None` if its first instruction can't be translated.
pub fn translate(request: &Request<'_>) -> Option<Translation> {
    let Decoding { mut block, lines, live_out, next, winds, loop_head } = decode::decode(request)?;
    let length = block.iter().map(|decoded| decoded.instruction.len()).sum();
    let uses_vectors = block.iter().any(|d| d.class == Class::Copy && is_vector(d));
    let uses_x87 =
        block.iter().any(|d| d.class == Class::Copy && analysis::unit(&d.instruction) == Unit::X87);
    analysis::mark_live_flags(&mut block, live_out);
    if request.all_flags {
        block.iter_mut().for_each(|decoded| decoded.live_before = analysis::ALL_FLAGS);
    }
    let stack = if request.key.no_stack() { None } else { analysis::track_stack(&mut block) };
    if stack.is_none() {
        block.iter_mut().for_each(|decoded| decoded.stack_delta = None);
    }
    if !request.key.no_stack() {
        checks::share(&mut block, |place| request.alone.contains(&(request.page_offset + place)));
    }
    let mut builder = Builder {
        request,
        e: Emitter::with_capacity(block.len() * 80),
        encoder: Encoder::new(64),
        sites: Vec::with_capacity(block.len() * 2),
        stubs: Vec::with_capacity(block.len() * 2),
        stack_stub: None,
        tails: Vec::new(),
        fault_points: Vec::with_capacity(block.len()),
        flags_aside: false,
        addend: Addend::Anything,
        address: None,
        held: None,
        windows: [None; MAX_WINDOWS],
        slots: Vec::new(),
        stack_moved: 0,
        in_shadow: false,
        stack,
        instruction_start: 0,
        guest: request.offset,
        next_guest: request.offset,
        vector: false,
        links: 0,
        winds,
        loop_head,
    };
    // An instruction that crosses into the next page stands alone.
    let crosses = next > PAGE;
    let mut entries = builder.prologue(&block, uses_vectors, uses_x87, crosses);
    for decoded in &block {
        builder.instruction(decoded);
    }
    builder.move_stack();
    if !block.last().is_some_and(|last| last.class.is_last()) {
        builder.jump_to(next as i64, live_out);
    }
    builder.finish_tails();
    builder.e.split(request.cold_start - request.start - builder.e.position());
    if !crosses && !loop_head {
        let live = block.first().map_or(analysis::ALL_FLAGS, |first| first.live_before);
        entries.backwards = builder.loop_entry(entries.forwards, live);
    }
    builder.finish();
    let hot = builder.e.before_split();
    Some(Translation {
        code: builder.e.code,
        hot,
        entries,
        sites: builder.sites,
        fault_points: builder.fault_points,
        length,
        vectors: uses_vectors,
        x87: uses_x87,
        links: builder.links,
        slots: builder.slots,
        lines,
    })
}

fn is_vector(decoded: &Decoded) -> bool {
    analysis::unit(&decoded.instruction) != Unit::General
}

impl Builder<'_> {
    /// Code before the first instruction: what a lookup has to set, the vector registers, the check of the stack.
    fn prologue(&mut self, block: &[Decoded], vectors: bool, x87: bool, crosses: bool) -> Entries {
        let live = block.first().map_or(analysis::ALL_FLAGS, |first| first.live_before);
        if live != 0 {
            self.flags_aside = true;
            self.bring_flags_back();
        }
        let link_entry = self.e.position();
        self.e.lea(Width::W64, TEMPORARY, at(ADDRESS, -(self.request.offset as i32)));
        self.e.store(Width::W64, page_base(), TEMPORARY);
        let mut loop_entry = self.e.position();
        let entry;
        if crosses {
            // Only the jump cache knows whether the next page is still the same one.
            let over = self.e.jump();
            (loop_entry, entry) = (self.e.position(), self.e.position());
            self.e.load(Width::W64, ADDRESS, page_base());
            self.e.lea(Width::W64, ADDRESS, at(ADDRESS, self.request.offset as i32));
            self.look_up(Undo::Never);
            self.flags_aside = false;
            self.e.bind(over);
        } else {
            if self.loop_head {
                self.check_event(self.request.offset as i32, live);
            }
            entry = self.e.position();
        }
        if x87 {
            // Loading x87 takes long and is rare: leave, and come back with everything loaded.
            let fixup = self.unless_zero(context::x87_in_memory());
            self.leave_from(fixup, SiteKind::LoadVectors);
        } else if vectors && self.request.key.class() != USER {
            let fixup = self.unless_zero(context::vectors());
            self.leave_from(fixup, SiteKind::LoadVectors);
        }
        if let Some(range) = self.stack {
            self.check_stack(range, live);
        }
        Entries { lookup: 0, link: link_entry, backwards: loop_entry, forwards: entry }
    }

    /// An entry for jumps backwards, of a block where none were expected.
    fn loop_entry(&mut self, forwards: usize, live: u32) -> usize {
        let start = self.e.place(self.e.position());
        (self.guest, self.flags_aside, self.vector) = (self.request.offset, false, false);
        self.check_event(self.request.offset as i32, live);
        let jump = self.e.jump();
        self.e.bind_to(jump, forwards);
        start
    }

    /// A jump taken if the byte is not zero; flags are left alone. Changes TEMPORARY.
    pub fn unless_zero(&mut self, byte: Mem) -> Fixup {
        self.e.copy(Width::W64, TEMPORARY, reg::RCX);
        self.e.load_zx8(reg::RCX, byte);
        let zero = self.e.jump_if_rcx_zero(false);
        self.e.copy(Width::W64, reg::RCX, TEMPORARY);
        let fixup = self.e.jump();
        self.e.bind(zero);
        self.e.copy(Width::W64, reg::RCX, TEMPORARY);
        fixup
    }

    /// One check for all tracked stack accesses: they lie in the page of the stack window.
    fn check_stack(&mut self, range: StackRange, live: u32) {
        if live != 0 {
            self.put_flags_aside();
        }
        let size = range.high - range.low;
        self.e.lea(Width::W64, ADDRESS, at(GUEST_RSP, range.low));
        self.e.sub_mem(Width::W64, ADDRESS, stack_page());
        self.e.compare_imm(Width::W64, ADDRESS, PAGE as i32 - size);
        let fixup = self.e.jump_if(condition::A);
        let retry = (self.request.start + self.e.position()) as u32;
        let site =
            self.new_site(SiteKind::Stack { low: range.low, size: size as u16, retry, patch: 0, stub: 0 });
        self.stack_stub = Some((fixup, site));
    }

    /// A free slot, for the current instruction.
    pub fn new_slot(&mut self) -> u32 {
        self.slots.push(self.guest as u16);
        self.request.first_slot.unwrap_or(0) + self.slots.len() as u32 - 1
    }

    pub fn class(&self) -> u8 {
        self.request.key.class()
    }

    /// Width of addresses, and of what is on the stack.
    pub fn width(&self) -> Width {
        if self.request.key.code32() { Width::W32 } else { Width::W64 }
    }

    /// Bytes that the stack moves by.
    pub fn stack_step(&self) -> i32 {
        self.request.key.stack_step()
    }

    pub fn new_site(&mut self, kind: SiteKind) -> u32 {
        let number = self.request.first_site + self.sites.len() as u32;
        self.sites.push(Site {
            block: self.request.block,
            guest: self.guest as u16,
            flags_aside: self.flags_aside,
            vector: self.vector,
            kind,
        });
        number
    }

    /// Makes a jump lead to code behind the block that leaves by a new site.
    pub fn leave_from(&mut self, from: Fixup, kind: SiteKind) {
        self.leave_from_access(from, kind, None, None);
    }

    /// The same, after the address of a memory operand was worked out, and the shared code has tried.
    pub fn leave_from_access(
        &mut self,
        from: Fixup,
        kind: SiteKind,
        address: Option<Mem>,
        retry: Option<Retry>,
    ) {
        let site = self.new_site(kind);
        self.stubs.push(Stub { from, site, address, retry });
    }

    /// The guest's flags to `block_flags`. Changes TEMPORARY.
    pub fn put_flags_aside(&mut self) {
        if self.flags_aside {
            return;
        }
        self.flags_aside = true;
        self.e.copy(Width::W64, TEMPORARY, reg::RAX);
        self.e.flags_to_ax();
        self.e.store16(block_flags(), reg::RAX);
        self.e.copy(Width::W64, reg::RAX, TEMPORARY);
    }

    /// The guest's flags from `block_flags`. Changes TEMPORARY.
    pub fn bring_flags_back(&mut self) {
        self.bring_flags_back_by(Some(TEMPORARY));
    }

    /// The same with another scratch register, or none.
    pub fn bring_flags_back_by(&mut self, scratch: Option<Reg>) {
        if !self.flags_aside {
            return;
        }
        self.flags_aside = false;
        match scratch {
            Some(scratch) => self.e.copy(Width::W64, scratch, reg::RAX),
            None => self.e.store(Width::W64, saved(), reg::RAX),
        }
        self.e.load_zx16(reg::RAX, block_flags());
        self.e.flags_from_ax();
        match scratch {
            Some(scratch) => self.e.copy(Width::W64, reg::RAX, scratch),
            None => self.e.load(Width::W64, reg::RAX, saved()),
        }
    }

    fn instruction(&mut self, decoded: &Decoded) {
        let instruction = &decoded.instruction;
        self.guest = instruction.ip() as usize;
        self.next_guest = instruction.next_ip() as usize;
        if !stack_moves::may_wait(decoded) {
            self.move_stack();
        }
        self.instruction_start = self.e.position();
        self.vector = is_vector(decoded) || analysis::is_state_image(instruction.mnemonic());
        let slots = self.slots.len();
        self.held = self.address.take();
        let (sites, stubs, tails) = (self.sites.len(), self.stubs.len(), self.tails.len());
        if decoded.live_before == 0 {
            // Nobody reads what was put aside.
            self.flags_aside = false;
        }
        let flags_aside = self.flags_aside;
        let shadowed = self.in_shadow;
        if shadowed && decoded.class.is_jump() {
            self.leave_shadow();
        }
        let interpreted = matches!(decoded.class, Class::Interpret | Class::InterpretLast);
        if self.translated(decoded).is_err() {
            // Whatever was emitted for it only touched scratch registers, but it must not run.
            self.e.code.truncate(self.instruction_start);
            self.sites.truncate(sites);
            self.slots.truncate(slots);
            if let Check::First(window) = decoded.check {
                self.windows[usize::from(window.number)] = None;
            }
            self.addend = Addend::Anything;
            self.address = None;
            self.stubs.truncate(stubs);
            self.tails.truncate(tails);
            self.flags_aside = flags_aside;
            self.move_stack();
            self.interpret(decoded.class.is_last());
        }
        if shadowed && self.in_shadow && !interpreted && decoded.class != Class::Sti {
            self.leave_shadow();
        }
        self.in_shadow &= decoded.class == Class::Sti;
        // Who comes back behind the instruction has made its move of RSP.
        if self.sites.len() > sites {
            self.move_stack();
        }
        // The block has no code behind its last instruction, even if that goes to the next one.
        let goes_on = !decoded.class.is_last();
        let next_host = goes_on.then_some((self.request.start + self.e.position()) as u32);
        let mut comes_back = false;
        for site in &mut self.sites[sites..] {
            if let SiteKind::Access { next_host: place, .. }
            | SiteKind::Cpuid { next_host: place, .. }
            | SiteKind::Invlpg { next_host: place, .. }
            | SiteKind::String { next_host: place, .. }
            | SiteKind::Interpret { next_host: place, .. } = &mut site.kind
            {
                *place = next_host;
                comes_back = true;
            }
        }
        // Whoever comes back has changed the scratch registers.
        if comes_back {
            self.addend = Addend::Anything;
            self.address = None;
        }
    }

    fn translated(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        match decoded.class {
            Class::Copy => self.copy(decoded)?,
            Class::Nothing => self.address = self.held,
            Class::Pause => self.pause(decoded),
            Class::Push => self.push(decoded)?,
            Class::Pop => self.pop(decoded),
            Class::Leave => self.leave(decoded),
            Class::Call => {
                self.push_return_address(decoded);
                self.jump_to(decoded.instruction.near_branch64() as i64, decoded.live_before);
            }
            Class::CallIndirect => self.call_indirect(decoded)?,
            Class::Return => self.ret(decoded),
            Class::Jump => self.jump_to(decoded.instruction.near_branch64() as i64, decoded.live_before),
            Class::JumpIndirect => {
                self.read_target(decoded)?;
                self.look_up(Undo::Jump);
            }
            Class::JumpIf => {
                self.jump_if(decoded);
                self.address = self.held;
            }
            Class::JumpIfRcxZero => self.jump_if_rcx_zero(decoded),
            Class::BitString => self.bit_string(decoded)?,
            Class::RepeatString => self.repeat_string(decoded),
            Class::Syscall => self.syscall(),
            Class::Sysret => self.sysret(),
            Class::InterruptReturn => self.interrupt_return(decoded),
            Class::Invlpg => self.invlpg(decoded)?,
            Class::Swapgs => self.swapgs(),
            Class::Cli => self.change_flag(9, false),
            Class::Cld => self.change_flag(10, false),
            Class::Std => self.change_flag(10, true),
            Class::ReadControl => self.read_control(decoded)?,
            Class::Sti => self.sti(),
            Class::SwitchAc => self.switch_ac(),
            Class::Pushf => self.pushf(decoded),
            Class::Rdtsc => self.rdtsc(false),
            Class::Rdtscp => self.rdtsc(true),
            Class::Cpuid => self.cpuid(decoded),
            Class::ReadSelector => self.read_selector(decoded)?,
            Class::ReadBase | Class::WriteBase => self.segment_base(decoded)?,
            Class::Interpret => self.interpret(false),
            Class::InterpretLast => self.interpret(true),
        }
        Ok(())
    }

    /// Leaves to the interpreter for the current instruction.
    fn interpret(&mut self, last: bool) {
        let kind = if last {
            SiteKind::InterpretLast
        } else {
            SiteKind::Interpret { next: self.next_guest as u16, next_host: None }
        };
        let site = self.new_site(kind);
        self.leave_code(site);
    }

    pub fn leave_code(&mut self, number: u32) {
        self.e.push_imm(number);
        let fixup = self.e.jump();
        self.bind_shared(fixup, self.request.shared.exit);
    }

    /// Makes a jump or call lead to the shared code.
    pub fn bind_shared(&mut self, fixup: Fixup, target: usize) {
        self.e.bind_outside(fixup, self.request.start, target);
    }

    /// What the block's conditional jumps to other pages lead to.
    fn finish_tails(&mut self) {
        for tail in std::mem::take(&mut self.tails) {
            self.e.bind(tail.from);
            self.guest = tail.guest;
            self.flags_aside = false;
            self.jump_to(tail.target, tail.live);
        }
    }

    /// What is rarely executed.
    fn finish(&mut self) {
        if let Some((from, site)) = self.stack_stub.take() {
            self.finish_stack_stub(from, site);
        }
        for Stub { from, site: number, address, retry } in std::mem::take(&mut self.stubs) {
            self.e.bind(from);
            if let Some(address) = address {
                self.e.lea(Width::W64, ADDRESS, address);
            }
            match (retry, *self.kind_of(number)) {
                (Some(retry), _) => self.try_slot(retry, number),
                (None, SiteKind::Window { size, .. }) => self.try_variant(size, number),
                _ => {}
            }
            let stub_at = self.here();
            if let SiteKind::Jump { stub: place, .. } = self.kind_of(number) {
                *place = stub_at;
            }
            self.leave_code(number);
        }
        for number in 0..self.sites.len() {
            let stub_at = self.here();
            if let SiteKind::Link { stub: place, .. } = &mut self.sites[number].kind {
                *place = stub_at;
                self.leave_code(self.request.first_site + number as u32);
            }
        }
    }

    /// Lets the shared code look for another page for a slot.
    fn try_slot(&mut self, retry: Retry, site: u32) {
        self.e.load_immediate(ADDEND, context::slot(retry.slot) as u64);
        self.e.load_immediate(TEMPORARY, retry.size as u64 - 1);
        let call = self.e.call();
        self.bind_shared(call, retry.routine);
        let found = self.e.jump_if(condition::E);
        self.e.bind_to(found, retry.back);
        if let SiteKind::Window { .. } = self.kind_of(site) {
            let crosses = self.e.jump_if(condition::B);
            self.jump_to_variant(site, crosses);
        }
    }

    /// Where the window that begins at ADDRESS lies in two pages, goes to the variant.
    fn try_variant(&mut self, size: u16, site: u32) {
        self.e.lea(Width::W64, TEMPORARY, at(ADDRESS, i32::from(size) - 1));
        self.e.xor(Width::W64, TEMPORARY, ADDRESS);
        self.e.shr(Width::W64, TEMPORARY, 12);
        let crosses = self.e.jump_if(condition::NE);
        self.jump_to_variant(site, crosses);
    }

    /// Where accesses were found to lie in two pages: a jump to the code that checks each, once there is some.
    fn jump_to_variant(&mut self, number: u32, crosses: Fixup) {
        let leave = self.e.jump();
        self.e.bind(crosses);
        // The check was made after the flags were put aside; blocks are entered with the guest's.
        self.flags_aside = self.sites[(number - self.request.first_site) as usize].flags_aside;
        self.bring_flags_back();
        let jump = self.e.jump();
        let place = (self.request.start + self.e.place(Emitter::displacement_position(jump))) as u32;
        self.e.bind(jump);
        self.e.bind(leave);
        let here = self.here();
        if let SiteKind::Window { patch, stub, .. } | SiteKind::Stack { patch, stub, .. } =
            self.kind_of(number)
        {
            *stub = here;
            *patch = place;
        }
    }

    /// Offset in the code memory of what is emitted next.
    fn here(&self) -> u32 {
        (self.request.start + self.e.place(self.e.position())) as u32
    }

    pub fn kind_of(&mut self, number: u32) -> &mut SiteKind {
        &mut self.sites[(number - self.request.first_site) as usize].kind
    }

    fn finish_stack_stub(&mut self, from: Fixup, site: u32) {
        let SiteKind::Stack { low, size, retry, .. } = *self.kind_of(site) else { return };
        self.e.bind(from);
        self.e.lea(Width::W64, ADDRESS, at(GUEST_RSP, low));
        if self.request.key.code32() {
            // Accesses don't truncate ESP plus an offset, so nothing may wrap.
            self.e.copy(Width::W64, TEMPORARY, ADDRESS);
            self.e.shr(Width::W64, TEMPORARY, 12);
            self.e.compare_imm(Width::W64, TEMPORARY, (code32::LAST_PAGE >> 12) as i32 - 1);
            let outside = self.e.jump_if(condition::A);
            self.stubs.push(Stub { from: outside, site, address: None, retry: None });
        }
        self.e.load_immediate(TEMPORARY, u64::from(size) - 1);
        let call = self.e.call();
        self.bind_shared(call, self.request.shared.stack_window[usize::from(self.class())]);
        let found = self.e.jump_if(condition::E);
        self.e.bind_to(found, retry as usize - self.request.start);
        let crosses = self.e.jump_if(condition::B);
        self.jump_to_variant(site, crosses);
        self.leave_code(site);
    }
}
