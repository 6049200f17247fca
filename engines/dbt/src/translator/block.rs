//! Translating one block: from guest bytes to host code.

use bivisor_x86::cpuid::CpuModel;
use iced_x86::{Decoder, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, OpKind, Register};

use super::analysis::{self, Class, Decoded, StackRange, Unit};
use super::context::{
    self, ADDEND, ADDRESS, GUEST_RSP, TEMPORARY, block_flags, jump_complement, jump_host, page_base, saved,
    site, stack_addend,
};
use super::emit::{Emitter, Fixup, Mem, Reg, Width, at, condition, indexed, reg};
use super::key::Key;
use super::site::{FaultPoint, Site, SiteKind};

/// Instructions of a block at most.
const MAX_INSTRUCTIONS: usize = 48;
/// Instructions looked at behind a jump, to find which flags are live there.
const LOOK_AHEAD: usize = 8;
const PAGE: usize = 4096;

/// Offsets in the code memory of the code that all blocks share.
#[derive(Clone, Copy, Debug, Default)]
pub struct SharedCode {
    /// Leaves translated code; the site's number is in the context.
    pub exit: usize,
    /// Called: loads the guest's SSE and AVX registers.
    pub load_vectors: usize,
}

/// Where a block comes from and goes to.
pub struct Request<'a> {
    /// The page's bytes.
    pub page: &'a [u8; PAGE],
    /// Offset of the first instruction in the page.
    pub offset: usize,
    /// The mode.
    pub key: Key,
    /// What the guest's processor offers.
    pub model: &'a CpuModel,
    /// Offset in the code memory that the code will have.
    pub start: usize,
    /// Number of the first new site.
    pub first_site: u32,
    /// Number of the new block.
    pub block: u32,
    /// The shared code.
    pub shared: SharedCode,
}

/// A translated block.
pub struct Translation {
    /// Host code.
    pub code: Vec<u8>,
    /// Offset in `code` of the entry for jumps that know the linear address only ([`ADDRESS`] holds it).
    pub lookup_entry: usize,
    /// Offset in `code` of the entry for direct jumps.
    pub entry: usize,
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
}

/// Code to be put behind the block: reached by a jump from within.
struct Stub {
    from: Fixup,
    site: u32,
}

struct Builder<'a> {
    request: &'a Request<'a>,
    e: Emitter,
    encoder: Encoder,
    sites: Vec<Site>,
    stubs: Vec<Stub>,
    fault_points: Vec<FaultPoint>,
    /// The guest's flags are in `block_flags`, the host's are anything.
    flags_aside: bool,
    stack: Option<StackRange>,
    /// Host code offset of the current instruction, and its offset in the page.
    instruction_start: usize,
    guest: usize,
    next_guest: usize,
}

/// The operands of an instruction can't be renamed: it is interpreted.
struct NotRenamed;

/// Translates the block at the requested place, or `None` if its first instruction can't be translated.
pub fn translate(request: &Request<'_>) -> Option<Translation> {
    let mut block = decode(request);
    let last = block.last()?;
    let length = last.instruction.next_ip() as usize - request.offset;
    let live_out = live_out(request, last);
    let vectors = |d: &Decoded| d.class == Class::Copy && analysis::unit(&d.instruction) != Unit::General;
    let uses_vectors = block.iter().any(vectors);
    let uses_x87 =
        block.iter().any(|d| d.class == Class::Copy && analysis::unit(&d.instruction) == Unit::X87);
    analysis::mark_live_flags(&mut block, live_out);
    let stack = if request.key.no_stack() { None } else { analysis::track_stack(&mut block) };
    if stack.is_none() {
        block.iter_mut().for_each(|decoded| decoded.stack_delta = None);
    }
    let mut builder = Builder {
        request,
        e: Emitter { code: Vec::with_capacity(block.len() * 40) },
        encoder: Encoder::new(64),
        sites: Vec::new(),
        stubs: Vec::new(),
        fault_points: Vec::new(),
        flags_aside: false,
        stack,
        instruction_start: 0,
        guest: request.offset,
        next_guest: request.offset,
    };
    let entry = builder.prologue(&block, uses_vectors, uses_x87);
    for decoded in &block {
        builder.instruction(decoded);
    }
    if !block.last().is_some_and(|last| last.class.is_last()) {
        builder.jump_to(builder.next_guest as i64, analysis::ALL_FLAGS);
    }
    builder.finish_stubs();
    Some(Translation {
        code: builder.e.code,
        lookup_entry: 0,
        entry,
        sites: builder.sites,
        fault_points: builder.fault_points,
        length,
        vectors: uses_vectors,
        x87: uses_x87,
    })
}

fn decode(request: &Request<'_>) -> Vec<Decoded> {
    let mut decoder =
        Decoder::with_ip(64, &request.page[request.offset..], request.offset as u64, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    let mut block = Vec::with_capacity(16);
    while block.len() < MAX_INSTRUCTIONS && decoder.can_decode() {
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            // Cut off by the page's end, or no instruction at all: the interpreter decides.
            break;
        }
        let class = analysis::classify(&instruction, request.model, request.key);
        let access = analysis::operand_accesses(&mut factory, &instruction);
        block.push(Decoded { instruction, class, live_before: 0, stack_delta: None, access });
        if class.is_last() {
            break;
        }
    }
    block
}

/// Flags that may be read after the block.
fn live_out(request: &Request<'_>, last: &Decoded) -> u32 {
    let next = last.instruction.next_ip() as usize;
    let target = last.instruction.near_branch64() as usize;
    match last.class {
        Class::JumpIf | Class::JumpIfRcxZero => live_at(request, target) | live_at(request, next),
        Class::Jump | Class::Call => live_at(request, target),
        class if class.is_last() => analysis::ALL_FLAGS,
        _ => live_at(request, next),
    }
}

/// Flags live at an offset of the page; all of them where that isn't in this page.
fn live_at(request: &Request<'_>, offset: usize) -> u32 {
    let Some(bytes) = request.page.get(offset..) else { return analysis::ALL_FLAGS };
    let mut decoder = Decoder::with_ip(64, bytes, offset as u64, DecoderOptions::NONE);
    let ahead = std::iter::from_fn(|| decoder.can_decode().then(|| decoder.decode())).take(LOOK_AHEAD);
    analysis::live_at_start(ahead)
}

/// Number of a general register, if it is one.
fn number(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register() as u8 - Register::RAX as u8)
}

/// Whether the guest register lives in memory.
fn is_spilled(register: Register) -> bool {
    number(register).is_some_and(|number| number >= 12)
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// The part of the host register `host` that has the size of `like`.
fn sized(host: Reg, like: Register) -> Register {
    let index = u32::from(host.0);
    let from =
        |first: Register| Register::try_from((first as u32 + index) as usize).unwrap_or(Register::None);
    match like.size() {
        1 if index < 4 => from(Register::AL),
        // AH to BH stand between.
        1 => Register::try_from((Register::SPL as u32 + index - 4) as usize).unwrap_or(Register::None),
        2 => from(Register::AX),
        4 => from(Register::EAX),
        _ => from(Register::RAX),
    }
}

impl Builder<'_> {
    /// Code before the first instruction: what a lookup has to set, the vector registers, the check of the stack.
    /// Returns the entry for direct jumps.
    fn prologue(&mut self, block: &[Decoded], vectors: bool, x87: bool) -> usize {
        self.e.lea(Width::W64, TEMPORARY, at(ADDRESS, -(self.request.offset as i32)));
        self.e.store(Width::W64, page_base(), TEMPORARY);
        let entry = self.e.position();
        let live = block.first().map_or(analysis::ALL_FLAGS, |first| first.live_before);
        if x87 {
            // Loading x87 takes long and is rare: leave, and come back with everything loaded.
            let fixup = self.unless_zero(context::x87_in_memory());
            let site = self.new_site(SiteKind::LoadX87);
            self.stubs.push(Stub { from: fixup, site });
        } else if vectors {
            self.e.store(Width::W64, saved(), reg::RCX);
            self.e.load_zx8(reg::RCX, context::vectors_in_memory());
            let loaded = self.e.jump_if_rcx_zero(false);
            let call = self.e.call();
            self.e.bind_outside(call, self.request.start, self.request.shared.load_vectors);
            self.e.bind(loaded);
            self.e.load(Width::W64, reg::RCX, saved());
        }
        if let Some(range) = self.stack {
            self.check_stack(range, live);
        }
        entry
    }

    /// A jump taken if the byte is not zero; flags are left alone.
    fn unless_zero(&mut self, byte: Mem) -> Fixup {
        self.e.store(Width::W64, saved(), reg::RCX);
        self.e.load_zx8(reg::RCX, byte);
        let zero = self.e.jump_if_rcx_zero(false);
        self.e.load(Width::W64, reg::RCX, saved());
        let fixup = self.e.jump();
        self.e.bind(zero);
        self.e.load(Width::W64, reg::RCX, saved());
        fixup
    }

    /// One check for all tracked stack accesses: they lie in one page that is in the TLB.
    fn check_stack(&mut self, range: StackRange, live: u32) {
        if live != 0 {
            self.put_flags_aside();
        }
        self.e.lea(Width::W64, ADDRESS, at(GUEST_RSP, range.low));
        self.e.lea(Width::W64, TEMPORARY, at(GUEST_RSP, range.high - 1));
        let kind = SiteKind::Stack {
            low: range.low,
            high: range.high,
            write: range.write,
            patch: 0,
            stub: 0,
            flags_aside: self.flags_aside,
        };
        let site = self.new_site(kind);
        let fixup = self.compare_tag(range.write);
        let patch = (self.request.start + Emitter::displacement_position(fixup)) as u32;
        if let SiteKind::Stack { patch: place, .. } =
            &mut self.sites[(site - self.request.first_site) as usize].kind
        {
            *place = patch;
        }
        self.stubs.push(Stub { from: fixup, site });
        self.e.load(Width::W64, ADDEND, context::tlb_addend(self.class(), ADDEND));
        self.e.store(Width::W64, stack_addend(), ADDEND);
    }

    fn class(&self) -> usize {
        usize::from(self.request.key.class())
    }

    /// With the first byte's address in ADDRESS and the last one's in TEMPORARY: leaves the TLB entry's number in
    /// ADDEND and jumps if the entry is another page's. Changes the flags.
    fn compare_tag(&mut self, write: bool) -> Fixup {
        self.e.copy(Width::W32, ADDEND, ADDRESS);
        self.e.shr(Width::W32, ADDEND, 12);
        self.e.zero_extend8(ADDEND, ADDEND);
        self.e.shr(Width::W64, TEMPORARY, 12);
        self.e.compare(Width::W64, TEMPORARY, context::tlb_tag(self.class(), write, ADDEND));
        self.e.jump_if(condition::NE)
    }

    /// Checks the access of `size` bytes at ADDRESS; afterwards the host's address is ADDRESS + ADDEND.
    fn check(&mut self, size: i32, write: bool, live: u32) {
        if live != 0 {
            self.put_flags_aside();
        }
        if size > 1 {
            self.e.lea(Width::W64, TEMPORARY, at(ADDRESS, size - 1));
        } else {
            self.e.copy(Width::W64, TEMPORARY, ADDRESS);
        }
        let fixup = self.compare_tag(write);
        let site = self.new_site(SiteKind::Access {
            write,
            size: size as u8,
            flags_aside: self.flags_aside,
            retry: (self.request.start + self.instruction_start) as u32,
            next: self.next_guest as u16,
            next_host: 0,
        });
        self.stubs.push(Stub { from: fixup, site });
        self.e.load(Width::W64, ADDEND, context::tlb_addend(self.class(), ADDEND));
    }

    fn new_site(&mut self, kind: SiteKind) -> u32 {
        let number = self.request.first_site + self.sites.len() as u32;
        self.sites.push(Site { block: self.request.block, guest: self.guest as u16, kind });
        number
    }

    fn put_flags_aside(&mut self) {
        if self.flags_aside {
            return;
        }
        self.flags_aside = true;
        self.e.store(Width::W64, saved(), reg::RAX);
        self.e.flags_to_ax();
        self.e.store16(block_flags(), reg::RAX);
        self.e.load(Width::W64, reg::RAX, saved());
    }

    fn bring_flags_back(&mut self) {
        if !self.flags_aside {
            return;
        }
        self.flags_aside = false;
        self.e.store(Width::W64, saved(), reg::RAX);
        self.e.load_zx16(reg::RAX, block_flags());
        self.e.flags_from_ax();
        self.e.load(Width::W64, reg::RAX, saved());
    }

    fn instruction(&mut self, decoded: &Decoded) {
        let instruction = &decoded.instruction;
        self.guest = instruction.ip() as usize;
        self.next_guest = instruction.next_ip() as usize;
        self.instruction_start = self.e.position();
        let first_site = self.sites.len();
        if decoded.live_before == 0 {
            // Nobody reads what was put aside.
            self.flags_aside = false;
        }
        let flags_aside = self.flags_aside;
        if self.translated(decoded).is_err() {
            // Whatever was emitted for it only touched scratch registers, but it must not run.
            self.take_back(first_site, flags_aside);
            self.interpret(decoded.class.is_last());
        }
        let next_host = (self.request.start + self.e.position()) as u32;
        for site in &mut self.sites[first_site..] {
            if let SiteKind::Access { next_host: place, .. } | SiteKind::Interpret { next_host: place, .. } =
                &mut site.kind
            {
                *place = next_host;
            }
        }
    }

    /// Forgets what was emitted for the current instruction.
    fn take_back(&mut self, first_site: usize, flags_aside: bool) {
        self.e.code.truncate(self.instruction_start);
        self.sites.truncate(first_site);
        let first = self.request.first_site + first_site as u32;
        self.stubs.retain(|stub| stub.site < first);
        self.flags_aside = flags_aside;
    }

    fn translated(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        match decoded.class {
            Class::Copy => self.copy(decoded)?,
            Class::Nothing => {}
            Class::Push => self.push(decoded)?,
            Class::Pop => self.pop(decoded),
            Class::Leave => self.leave(decoded),
            Class::Call => {
                self.push_return_address(decoded);
                self.jump_to(decoded.instruction.near_branch64() as i64, analysis::ALL_FLAGS);
            }
            Class::CallIndirect => self.call_indirect(decoded)?,
            Class::Return => self.ret(decoded),
            Class::Jump => self.jump_to(decoded.instruction.near_branch64() as i64, analysis::ALL_FLAGS),
            Class::JumpIndirect => {
                self.read_target(decoded)?;
                self.look_up();
            }
            Class::JumpIf => self.jump_if(decoded),
            Class::JumpIfRcxZero => self.jump_if_rcx_zero(decoded),
            Class::Interpret => self.interpret(false),
            Class::InterpretLast => self.interpret(true),
        }
        Ok(())
    }

    /// Leaves to the interpreter for the current instruction.
    fn interpret(&mut self, last: bool) {
        self.bring_flags_back();
        let kind = if last {
            SiteKind::InterpretLast
        } else {
            SiteKind::Interpret { next: self.next_guest as u16, next_host: 0 }
        };
        let site = self.new_site(kind);
        self.leave_code(site);
    }

    fn leave_code(&mut self, number: u32) {
        self.e.store_imm32(site(), number);
        let fixup = self.e.jump();
        self.e.bind_outside(fixup, self.request.start, self.request.shared.exit);
    }

    fn finish_stubs(&mut self) {
        for Stub { from, site: number } in std::mem::take(&mut self.stubs) {
            let stub = self.e.position();
            self.e.bind(from);
            let stub_at = (self.request.start + stub) as u32;
            if let SiteKind::Jump { stub: place, .. } | SiteKind::Stack { stub: place, .. } =
                &mut self.sites[(number - self.request.first_site) as usize].kind
            {
                *place = stub_at;
            }
            self.leave_code(number);
        }
    }

    // ---- addresses ----

    /// Computes the linear address of the memory operand into ADDRESS. Uses TEMPORARY; leaves the flags alone.
    fn address(&mut self, instruction: &Instruction) -> Result<(), NotRenamed> {
        self.offset(instruction)?;
        let base = match instruction.memory_segment() {
            Register::FS => context::fs_base(),
            Register::GS => context::gs_base(),
            _ => return Ok(()),
        };
        self.e.load(Width::W64, TEMPORARY, base);
        self.e.lea(Width::W64, ADDRESS, indexed(ADDRESS, TEMPORARY, 0, 0));
        Ok(())
    }

    /// Computes the memory operand's offset in its segment into ADDRESS.
    fn offset(&mut self, instruction: &Instruction) -> Result<(), NotRenamed> {
        let displacement = instruction.memory_displacement64();
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        if base == Register::RIP {
            self.e.load(Width::W64, ADDRESS, page_base());
            self.e.lea(
                Width::W64,
                ADDRESS,
                at(ADDRESS, i32::try_from(displacement as i64).map_err(|_| NotRenamed)?),
            );
            return Ok(());
        }
        if base == Register::EIP {
            return Err(NotRenamed);
        }
        if base == Register::None && index == Register::None {
            self.e.load_immediate(ADDRESS, displacement);
            return Ok(());
        }
        // With a 67h prefix everything wraps at 32 bits.
        let short = base.size() == 4 || index.size() == 4;
        let width = if short { Width::W32 } else { Width::W64 };
        let displacement = displacement as i32;
        let host_base = self.address_register(base, ADDRESS);
        let host_index = self.address_register(index, TEMPORARY);
        let scale = instruction.memory_index_scale().trailing_zeros() as u8;
        match (host_base, host_index) {
            (Some(base), None) => self.e.lea(width, ADDRESS, at(base, displacement)),
            (Some(base), Some(index)) => {
                self.e.lea(width, ADDRESS, indexed(base, index, scale, displacement))
            }
            (None, Some(index)) => self.e.lea_index(width, ADDRESS, index, scale, displacement),
            (None, None) => return Err(NotRenamed),
        }
        Ok(())
    }

    /// The host register of a base or index, loaded into `scratch` if it lives in memory.
    fn address_register(&mut self, register: Register, scratch: Reg) -> Option<Reg> {
        let number = number(register)?;
        if number >= 12 {
            self.e.load(Width::W64, scratch, context::spilled(number));
            return Some(scratch);
        }
        Some(host_register(number))
    }

    // ---- ordinary instructions ----

    /// Copies an instruction with its operands renamed.
    fn copy(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        if analysis::is_bit_string(instruction) {
            return Err(NotRenamed);
        }
        if instruction.mnemonic() == iced_x86::Mnemonic::Lea {
            return self.lea(decoded);
        }
        let mut renamed = *instruction;
        let mut free = vec![TEMPORARY, ADDRESS, ADDEND];
        let has_memory =
            (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
        if has_memory {
            self.memory_operand(decoded, &mut renamed, &mut free)?;
        }
        let changed = self.rename_registers(decoded, &mut renamed, &mut free)?;
        let flags_needed = reads_or_keeps_flags(decoded);
        if flags_needed {
            self.bring_flags_back();
        }
        self.fault_points.push(FaultPoint {
            host: self.e.position() as u32,
            guest: self.guest as u16,
            flags_aside: self.flags_aside,
        });
        self.encode(&renamed)?;
        for (host, number) in changed {
            self.e.store(Width::W64, context::spilled(number), host);
        }
        if writes_flags(decoded) {
            self.flags_aside = false;
        }
        Ok(())
    }

    /// Makes the memory operand point at host memory, after the check that it may.
    fn memory_operand(
        &mut self,
        decoded: &Decoded,
        renamed: &mut Instruction,
        free: &mut Vec<Reg>,
    ) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        renamed.set_segment_prefix(Register::None);
        renamed.set_memory_index_scale(1);
        if let (Some(_), Some((offset, _, _))) = (decoded.stack_delta, analysis::stack_access(decoded)) {
            self.e.load(Width::W64, ADDEND, stack_addend());
            renamed.set_memory_base(Register::R12);
            renamed.set_memory_index(Register::R13);
            renamed.set_memory_displacement64(offset as i64 as u64);
            renamed.set_memory_displ_size(u32::from(offset != 0));
            free.retain(|&host| host != ADDEND);
            return Ok(());
        }
        self.address(instruction)?;
        let size = instruction.memory_size().size() as i32;
        self.check(size, analysis::writes_memory(decoded), decoded.live_before);
        renamed.set_memory_base(Register::R14);
        renamed.set_memory_index(Register::R13);
        renamed.set_memory_displacement64(0);
        renamed.set_memory_displ_size(0);
        free.retain(|&host| host == TEMPORARY);
        if spilled_operands(instruction) > 1 {
            self.e.lea(Width::W64, ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
            renamed.set_memory_index(Register::None);
            free.push(ADDEND);
        }
        Ok(())
    }

    /// Replaces guest registers that are elsewhere. Returns the scratch registers to be stored back, with the guest
    /// registers' numbers.
    fn rename_registers(
        &mut self,
        decoded: &Decoded,
        renamed: &mut Instruction,
        free: &mut Vec<Reg>,
    ) -> Result<Vec<(Reg, u8)>, NotRenamed> {
        let instruction = &decoded.instruction;
        let mut loaded: Vec<(u8, Reg, bool)> = Vec::new();
        let mut needs_rex = has_renamed_memory(renamed);
        let mut high_byte = false;
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = instruction.op_register(operand);
            high_byte |= is_high_byte(register);
            let Some(guest) = number(register) else { continue };
            if guest < 12 {
                let host = host_register(guest);
                if host.0 != guest {
                    renamed.set_op_register(operand, sized(host, register));
                }
                needs_rex |= host.0 >= 8 || register.size() == 8 || is_new_byte(register);
                continue;
            }
            needs_rex = true;
            let access = decoded.access[operand as usize];
            let writes = !matches!(access, iced_x86::OpAccess::Read | iced_x86::OpAccess::None);
            let host = match loaded.iter_mut().find(|(number, _, _)| *number == guest) {
                Some((_, host, written)) => {
                    *written |= writes;
                    *host
                }
                None => {
                    let host = free.pop().ok_or(NotRenamed)?;
                    // A full write needs no old value.
                    if access != iced_x86::OpAccess::Write || register.size() < 4 {
                        self.e.load(Width::W64, host, context::spilled(guest));
                    }
                    loaded.push((guest, host, writes));
                    host
                }
            };
            renamed.set_op_register(operand, sized(host, register));
        }
        if high_byte && needs_rex {
            return Err(NotRenamed);
        }
        // A register that is written by one operand and read by another was loaded by whichever came first.
        for &(guest, host, _) in &loaded {
            if reads_what_was_not_loaded(decoded, guest) {
                self.e.load(Width::W64, host, context::spilled(guest));
            }
        }
        Ok(loaded
            .into_iter()
            .filter(|&(_, _, written)| written)
            .map(|(guest, host, _)| (host, guest))
            .collect())
    }

    fn encode(&mut self, instruction: &Instruction) -> Result<(), NotRenamed> {
        self.encoder.encode(instruction, 0).map_err(|_| NotRenamed)?;
        let bytes = self.encoder.take_buffer();
        self.e.code.extend_from_slice(&bytes);
        self.encoder.set_buffer(bytes_cleared(bytes));
        Ok(())
    }

    fn lea(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        let destination = instruction.op0_register();
        self.offset(instruction)?;
        let guest = number(destination).ok_or(NotRenamed)?;
        if is_spilled(destination) {
            match destination.size() {
                8 => self.e.store(Width::W64, context::spilled(guest), ADDRESS),
                4 => {
                    self.e.copy(Width::W32, ADDRESS, ADDRESS);
                    self.e.store(Width::W64, context::spilled(guest), ADDRESS);
                }
                _ => self.e.store16(context::spilled(guest), ADDRESS),
            }
            return Ok(());
        }
        let host = host_register(guest);
        match destination.size() {
            8 => self.e.copy(Width::W64, host, ADDRESS),
            4 => self.e.copy(Width::W32, host, ADDRESS),
            _ => self.e.copy16(host, ADDRESS),
        }
        Ok(())
    }

    // ---- the stack ----

    /// The memory operand for an access to the stack at `offset` from RSP, checked by itself if it isn't tracked.
    fn stack_operand(&mut self, decoded: &Decoded, offset: i32, write: bool) -> Mem {
        if decoded.stack_delta.is_some() {
            self.e.load(Width::W64, ADDEND, stack_addend());
            return indexed(GUEST_RSP, ADDEND, 0, offset);
        }
        self.e.lea(Width::W64, ADDRESS, at(GUEST_RSP, offset));
        self.check(8, write, decoded.live_before);
        indexed(ADDRESS, ADDEND, 0, 0)
    }

    fn push(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        match instruction.op0_kind() {
            OpKind::Register => {
                let place = self.stack_operand(decoded, -8, true);
                let guest = number(instruction.op0_register()).ok_or(NotRenamed)?;
                let host = if guest >= 12 {
                    self.e.load(Width::W64, TEMPORARY, context::spilled(guest));
                    TEMPORARY
                } else {
                    host_register(guest)
                };
                self.e.store(Width::W64, place, host);
            }
            OpKind::Memory => {
                if decoded.stack_delta.is_none() {
                    return Err(NotRenamed);
                }
                self.address(instruction)?;
                self.check(8, false, decoded.live_before);
                self.e.load(Width::W64, TEMPORARY, indexed(ADDRESS, ADDEND, 0, 0));
                let place = self.stack_operand(decoded, -8, true);
                self.e.store(Width::W64, place, TEMPORARY);
            }
            _ => {
                let place = self.stack_operand(decoded, -8, true);
                self.e.store_imm32_as_64(place, instruction.immediate(0) as i32);
            }
        }
        self.e.lea(Width::W64, GUEST_RSP, at(GUEST_RSP, -8));
        Ok(())
    }

    fn pop(&mut self, decoded: &Decoded) {
        let place = self.stack_operand(decoded, 0, false);
        let guest = number(decoded.instruction.op0_register()).unwrap_or_default();
        self.e.load(Width::W64, TEMPORARY, place);
        self.e.lea(Width::W64, GUEST_RSP, at(GUEST_RSP, 8));
        if guest >= 12 {
            self.e.store(Width::W64, context::spilled(guest), TEMPORARY);
        } else {
            // POP RSP gets the popped value, not the incremented one.
            self.e.copy(Width::W64, host_register(guest), TEMPORARY);
        }
    }

    fn leave(&mut self, decoded: &Decoded) {
        self.e.copy(Width::W64, ADDRESS, reg::RBP);
        self.check(8, false, decoded.live_before);
        self.e.load(Width::W64, TEMPORARY, indexed(ADDRESS, ADDEND, 0, 0));
        self.e.lea(Width::W64, GUEST_RSP, at(reg::RBP, 8));
        self.e.copy(Width::W64, reg::RBP, TEMPORARY);
    }

    fn push_return_address(&mut self, decoded: &Decoded) {
        let place = self.stack_operand(decoded, -8, true);
        self.e.load(Width::W64, TEMPORARY, page_base());
        self.e.lea(Width::W64, TEMPORARY, at(TEMPORARY, self.next_guest as i32));
        self.e.store(Width::W64, place, TEMPORARY);
        self.e.lea(Width::W64, GUEST_RSP, at(GUEST_RSP, -8));
    }

    // ---- control flow ----

    /// Reads the target of an indirect jump or call into ADDRESS.
    fn read_target(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        if instruction.op0_kind() == OpKind::Register {
            let guest = number(instruction.op0_register()).ok_or(NotRenamed)?;
            if guest >= 12 {
                self.e.load(Width::W64, ADDRESS, context::spilled(guest));
            } else {
                self.e.copy(Width::W64, ADDRESS, host_register(guest));
            }
            return Ok(());
        }
        self.address(instruction)?;
        self.check(8, false, decoded.live_before);
        self.e.load(Width::W64, ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
        Ok(())
    }

    fn call_indirect(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        self.read_target(decoded)?;
        if decoded.stack_delta.is_some() {
            self.push_return_address(decoded);
        } else {
            self.e.store(Width::W64, context::target(), ADDRESS);
            self.push_return_address(decoded);
            self.e.load(Width::W64, ADDRESS, context::target());
        }
        self.look_up();
        Ok(())
    }

    fn ret(&mut self, decoded: &Decoded) {
        let place = self.stack_operand(decoded, 0, false);
        self.e.load(Width::W64, ADDRESS, place);
        let extra =
            if decoded.instruction.op_count() > 0 { decoded.instruction.immediate16().into() } else { 0 };
        self.e.lea(Width::W64, GUEST_RSP, at(GUEST_RSP, 8 + extra));
        self.look_up();
    }

    /// Goes on at the linear address in ADDRESS, by the jump cache. Leaves the guest's flags alone.
    fn look_up(&mut self) {
        self.bring_flags_back();
        self.e.pext(TEMPORARY, ADDRESS, context::jump_mask());
        self.e.store(Width::W64, saved(), reg::RCX);
        self.e.load(Width::W64, reg::RCX, context::jump_bias());
        self.e.lea(Width::W64, reg::RCX, indexed(reg::RCX, ADDRESS, 0, 0));
        self.e.load(Width::W64, ADDEND, jump_complement(TEMPORARY));
        self.e.lea(Width::W64, reg::RCX, indexed(reg::RCX, ADDEND, 0, 0));
        let hit = self.e.jump_if_rcx_zero(false);
        self.e.load(Width::W64, reg::RCX, saved());
        let site = self.new_site(SiteKind::Lookup);
        self.leave_code(site);
        self.e.bind(hit);
        self.e.load(Width::W64, reg::RCX, saved());
        self.e.jump_mem(jump_host(TEMPORARY));
    }

    /// Goes on at a fixed offset from the page's start.
    fn jump_to(&mut self, target: i64, live: u32) {
        self.bring_flags_back();
        if !(0..PAGE as i64).contains(&target) {
            self.e.load(Width::W64, ADDRESS, page_base());
            // The displacement of a near jump has 32 bits.
            self.e.lea(Width::W64, ADDRESS, at(ADDRESS, target as i32));
            self.look_up();
            return;
        }
        let live = if live == 0 { 0 } else { live_at(self.request, target as usize) };
        if target <= self.guest as i64 {
            self.check_event(target as u16, live);
        }
        let fixup = self.e.jump();
        self.link(fixup, target as u16);
    }

    fn link(&mut self, fixup: Fixup, target: u16) {
        let patch = (self.request.start + Emitter::displacement_position(fixup)) as u32;
        let site = self.new_site(SiteKind::Jump { target, patch, stub: 0 });
        self.stubs.push(Stub { from: fixup, site });
    }

    /// Leaves if an event waits: once in every loop.
    fn check_event(&mut self, target: u16, live: u32) {
        let fixup = if live == 0 {
            self.e.compare_zero8(context::event());
            self.e.jump_if(condition::NE)
        } else {
            self.unless_zero(context::event())
        };
        let site = self.new_site(SiteKind::Event { target });
        self.stubs.push(Stub { from: fixup, site });
    }

    fn jump_if(&mut self, decoded: &Decoded) {
        self.bring_flags_back();
        let target = decoded.instruction.near_branch64() as i64;
        // Jcc's condition is the low nibble of its opcode.
        let condition = decoded.instruction.condition_code() as u8;
        let taken = self.e.jump_if(encoding(condition));
        if (0..PAGE as i64).contains(&target) && target > self.guest as i64 {
            self.link(taken, target as u16);
            self.jump_to(self.next_guest as i64, analysis::ALL_FLAGS);
            return;
        }
        self.jump_to(self.next_guest as i64, analysis::ALL_FLAGS);
        self.e.bind(taken);
        self.jump_to(target, analysis::ALL_FLAGS);
    }

    fn jump_if_rcx_zero(&mut self, decoded: &Decoded) {
        self.bring_flags_back();
        let short32 = decoded.instruction.code() == iced_x86::Code::Jecxz_rel8_64;
        let zero = self.e.jump_if_rcx_zero(short32);
        // The jump over the other way's code may be longer than 127 bytes: go by a near jump.
        let not_zero = self.e.jump();
        self.e.bind(zero);
        self.jump_to(decoded.instruction.near_branch64() as i64, analysis::ALL_FLAGS);
        self.e.bind(not_zero);
        self.jump_to(self.next_guest as i64, analysis::ALL_FLAGS);
    }
}

/// Encoding of a condition from iced-x86's number of it (which starts at 1, in another order).
fn encoding(condition: u8) -> u8 {
    use iced_x86::ConditionCode as C;
    const ORDER: [(C, u8); 16] = [
        (C::o, 0),
        (C::no, 1),
        (C::b, 2),
        (C::ae, 3),
        (C::e, 4),
        (C::ne, 5),
        (C::be, 6),
        (C::a, 7),
        (C::s, 8),
        (C::ns, 9),
        (C::p, 10),
        (C::np, 11),
        (C::l, 12),
        (C::ge, 13),
        (C::le, 14),
        (C::g, 15),
    ];
    ORDER.iter().find(|(code, _)| *code as u8 == condition).map_or(0, |&(_, encoding)| encoding)
}

/// Host register of a guest register that lives in one.
fn host_register(guest: u8) -> Reg {
    if guest == 4 { GUEST_RSP } else { Reg(guest) }
}

/// SPL, BPL, SIL, DIL: they exist with REX only.
fn is_new_byte(register: Register) -> bool {
    matches!(register, Register::SPL | Register::BPL | Register::SIL | Register::DIL)
}

fn has_renamed_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

/// Different guest registers of the register operands that live in memory.
fn spilled_operands(instruction: &Instruction) -> usize {
    let mut seen = [false; 16];
    for operand in 0..instruction.op_count() {
        if instruction.op_kind(operand) == OpKind::Register && is_spilled(instruction.op_register(operand)) {
            seen[usize::from(number(instruction.op_register(operand)).unwrap_or_default())] = true;
        }
    }
    seen.iter().filter(|&&is| is).count()
}

/// Whether the register is first written without a load, and another operand reads it.
fn reads_what_was_not_loaded(decoded: &Decoded, guest: u8) -> bool {
    let instruction = &decoded.instruction;
    let operands = || {
        (0..instruction.op_count()).filter(|&operand| {
            instruction.op_kind(operand) == OpKind::Register
                && number(instruction.op_register(operand)) == Some(guest)
        })
    };
    let Some(first) = operands().next() else { return false };
    decoded.access[first as usize] == iced_x86::OpAccess::Write
        && instruction.op_register(first).size() >= 4
        && operands().skip(1).count() > 0
}

/// Whether the host's flags must be the guest's when the instruction executes.
fn reads_or_keeps_flags(decoded: &Decoded) -> bool {
    // Live before it: it reads some, or leaves some that are read later.
    decoded.live_before != 0 && (writes_flags(decoded) || decoded.instruction.rflags_read() != 0)
}

fn writes_flags(decoded: &Decoded) -> bool {
    decoded.instruction.rflags_modified() & analysis::ALL_FLAGS != 0
}

fn bytes_cleared(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.clear();
    bytes
}
