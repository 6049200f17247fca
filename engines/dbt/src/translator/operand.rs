//! Ordinary instructions: memory operands that go through the inline TLB, registers that are elsewhere, the stack.

use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind, Register};

use super::analysis::{self, Class, Decoded};
use super::block::{Addend, Builder, Kept, NotRenamed, PAGE, Retry};
use super::checks::{Check, Window};
use super::context::{self, ADDEND, ADDRESS, GUEST_RSP, HOMES, SPILLED, TEMPORARY, page_base, stack_addend};
use super::emit::{Mem, Reg, Width, at, condition, indexed, reg};
use super::routines::tlb_index;
use super::site::{FaultPoint, SiteKind};

/// Number of a general register, if it is one.
pub(super) fn number(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register() as u8 - Register::RAX as u8)
}

/// Whether the guest register lives in memory.
fn is_spilled(register: Register) -> bool {
    number(register).is_some_and(lives_in_memory)
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
    // ---- checks ----

    /// Checks that `size` bytes from `start` on lie in one page that may be accessed, and leaves that page's addend in
    /// ADDEND. Where they don't, leaves by a site of this kind with the first one's address in ADDRESS. The slot that the
    /// page is kept in, if it is kept in one.
    pub(super) fn check_page(
        &mut self,
        kind: SiteKind,
        start: Mem,
        size: i32,
        write: bool,
        live: u32,
    ) -> Option<u32> {
        if live != 0 {
            self.put_flags_aside();
        }
        self.addend = Addend::Anything;
        let address = (start != at(ADDRESS, 0)).then_some(start);
        if self.takes_slot() {
            self.e.lea(Width::W64, TEMPORARY, start);
            let slot = self.new_slot();
            self.e.sub_mem(Width::W64, TEMPORARY, context::slot_page(slot));
            self.e.compare_imm(Width::W64, TEMPORARY, PAGE as i32 - size);
            let other = self.e.jump_if(condition::A);
            let routine = self.request.shared.slot[usize::from(self.class())][usize::from(write)];
            let back = self.e.position();
            self.leave_from_access(other, kind, address, Some(Retry { routine, slot, size, back }));
            self.e.load(Width::W64, ADDEND, context::slot_addend(slot));
            return Some(slot);
        }
        self.e.lea(Width::W64, TEMPORARY, start.plus(size - 1));
        tlb_index(&mut self.e, ADDEND, start);
        self.e.shr(Width::W64, TEMPORARY, 12);
        self.e.compare(Width::W64, TEMPORARY, context::tlb_tag(self.class(), write, ADDEND));
        let other = self.e.jump_if(condition::NE);
        self.leave_from_access(other, kind, address, None);
        self.e.load(Width::W64, ADDEND, context::tlb_addend(self.class(), ADDEND));
        None
    }

    /// Checks the current instruction's access of `size` bytes from `start` on; afterwards the host's address is that plus
    /// ADDEND.
    fn check_access(&mut self, start: Mem, size: i32, write: bool, live: u32) {
        let (retry, next) = ((self.request.start + self.instruction_start) as u32, self.next_guest as u16);
        let kind = SiteKind::Access { write, size: size as u8, next, retry, next_host: None };
        self.check_page(kind, start, size, write, live);
    }

    /// The same of bytes at ADDRESS.
    pub fn check(&mut self, size: i32, write: bool, live: u32) {
        self.check_access(at(ADDRESS, 0), size, write, live);
    }

    /// Whether the current instruction's page is kept in a slot of its own.
    fn takes_slot(&self) -> bool {
        let place = self.request.page_offset + self.guest as u64;
        self.request.first_slot.is_some() && !self.request.roaming.contains(&place)
    }

    /// Puts the stack's addend into ADDEND.
    fn load_stack_addend(&mut self) {
        if self.addend != Addend::Stack {
            self.e.load(Width::W64, ADDEND, stack_addend());
            self.addend = Addend::Stack;
        }
    }

    /// Checks that all bytes of a window lie in one page, and leaves that page's addend in ADDEND. `start`: its first byte.
    fn check_window(&mut self, window: Window, start: Mem, live: u32) {
        let retry = (self.request.start + self.instruction_start) as u32;
        let Window { number, size, write, .. } = window;
        let kind = SiteKind::Window { write, size: size as u16, retry, patch: 0, stub: 0 };
        let kept = match self.check_page(kind, start, size, write, live) {
            Some(slot) => Kept::Slot(slot),
            None if window.interrupted => {
                self.e.store(Width::W64, context::window_addend(number), ADDEND);
                Kept::Context
            }
            None => Kept::Nowhere,
        };
        self.addend = Addend::Window(number);
        self.windows[usize::from(number)] = Some(kept);
    }

    /// Puts the addend of a window into ADDEND, if it was checked and the addend is still somewhere.
    fn load_window_addend(&mut self, number: u8) -> bool {
        let kept = self.windows[usize::from(number)];
        if self.addend == Addend::Window(number) {
            return kept.is_some();
        }
        let place = match kept {
            Some(Kept::Slot(slot)) => context::slot_addend(slot),
            Some(Kept::Context) => context::window_addend(number),
            Some(Kept::Nowhere) | None => return false,
        };
        self.e.load(Width::W64, ADDEND, place);
        self.addend = Addend::Window(number);
        true
    }

    /// Makes the memory operand `[base + displacement]` one of the host's: ADDEND is added.
    fn rename_based(&self, instruction: &Instruction, renamed: &mut Instruction, base: Reg) {
        let displacement = instruction.memory_displacement64();
        renamed.set_memory_base(sized(base, Register::RAX));
        renamed.set_memory_index(Register::R13);
        renamed.set_memory_displacement64(displacement);
        renamed.set_memory_displ_size(u32::from(displacement != 0));
    }

    // ---- addresses ----

    /// Computes the linear address of the memory operand into ADDRESS. Uses TEMPORARY; leaves the flags alone.
    pub fn address(&mut self, instruction: &Instruction) -> Result<(), NotRenamed> {
        self.offset(instruction)?;
        let base = match instruction.memory_segment() {
            Register::FS => context::fs_base(),
            Register::GS => context::gs_base(),
            _ => return Ok(()),
        };
        self.e.load(Width::W64, TEMPORARY, base);
        self.e.lea(self.width(), ADDRESS, indexed(ADDRESS, TEMPORARY, 0, 0));
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
        let width = if short { Width::W32 } else { self.width() };
        let displacement = displacement as i32;
        let host_base = self.address_register(base, ADDRESS);
        let host_index = self.address_register(index, TEMPORARY);
        let scale = instruction.memory_index_scale().trailing_zeros() as u8;
        match (host_base, host_index) {
            (Some(ADDRESS), None) if displacement == 0 && width == Width::W64 => {}
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
        Some(self.in_register(number(register)?, scratch))
    }

    /// The host register that holds a guest register: `scratch`, into which it is loaded, if it lives in memory.
    pub(super) fn in_register(&mut self, guest: u8, scratch: Reg) -> Reg {
        if !lives_in_memory(guest) {
            return host_register(guest);
        }
        self.e.load(Width::W64, scratch, context::spilled(guest));
        scratch
    }

    // ---- ordinary instructions ----

    /// Copies an instruction with its operands renamed.
    pub fn copy(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        if analysis::is_bit_string(instruction) {
            return Err(NotRenamed);
        }
        if instruction.mnemonic() == Mnemonic::Lea {
            return self.lea(decoded);
        }
        let mut renamed = *instruction;
        let mut free = vec![ADDEND, ADDRESS, TEMPORARY];
        if analysis::has_memory(instruction) {
            self.memory_operand(decoded, &mut renamed, &mut free)?;
        } else {
            self.address = self.held;
        }
        let changed = self.rename_registers(decoded, &mut renamed, &mut free)?;
        let flags_needed = reads_or_keeps_flags(decoded);
        if flags_needed {
            let scratch = [TEMPORARY, ADDRESS].into_iter().find(|host| free.contains(host));
            if self.flags_aside && scratch == Some(ADDRESS) {
                self.address = None;
            }
            self.bring_flags_back_by(scratch);
        }
        let point = FaultPoint::new(self.e.position(), self.guest, self.flags_aside).ok_or(NotRenamed)?;
        // First: if it can't be encoded, another instruction will stand there.
        self.encode(&renamed)?;
        self.fault_points.push(point);
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
            self.load_stack_addend();
            self.address = self.held;
            renamed.set_memory_base(Register::R12);
            renamed.set_memory_index(Register::R13);
            renamed.set_memory_displacement64(offset as i64 as u64);
            renamed.set_memory_displ_size(u32::from(offset != 0));
            free.retain(|&host| host != ADDEND);
            return Ok(());
        }
        if self.windowed_operand(decoded, renamed, free)? {
            return Ok(());
        }
        if let Some((base, displacement)) = self.plain_base(instruction) {
            let size = instruction.memory_size().size() as i32;
            let write = analysis::writes_memory(decoded);
            self.check_access(at(base, displacement), size, write, decoded.live_before);
            self.rename_based(instruction, renamed, base);
            free.retain(|&host| host != ADDEND);
            return Ok(());
        }
        self.address(instruction)?;
        let size = instruction.memory_size().size() as i32;
        self.check(size, analysis::writes_memory(decoded), decoded.live_before);
        self.rename_at_address(instruction, renamed, free, 0);
        Ok(())
    }

    /// A memory operand in a window: of the first, the window is checked; of others, that was done. False if it must be
    /// checked by itself.
    fn windowed_operand(
        &mut self,
        decoded: &Decoded,
        renamed: &mut Instruction,
        free: &mut Vec<Reg>,
    ) -> Result<bool, NotRenamed> {
        let instruction = &decoded.instruction;
        let base = self.plain_base(instruction);
        let (number, offset) = match decoded.check {
            Check::Own => return Ok(false),
            Check::First(window) => {
                match base {
                    Some((base, displacement)) => {
                        self.check_window(window, at(base, displacement + window.low), decoded.live_before);
                        // Where the check fails, ADDRESS is used.
                        self.held = None;
                    }
                    None => {
                        let mut first = *instruction;
                        let displacement =
                            instruction.memory_displacement64().wrapping_add(window.low as i64 as u64);
                        first.set_memory_displacement64(displacement);
                        self.address(&first)?;
                        self.check_window(window, at(ADDRESS, 0), decoded.live_before);
                        self.held = Some((window.number, 0));
                    }
                }
                (window.number, -window.low)
            }
            Check::Again(number, offset) => {
                if !self.load_window_addend(number) {
                    return Ok(false);
                }
                (number, offset)
            }
        };
        if let Some((base, _)) = base {
            self.rename_based(instruction, renamed, base);
            self.address = self.held;
            free.retain(|&host| host != ADDEND);
            return Ok(true);
        }
        let from = match self.held {
            Some((window, from)) if window == number => from,
            _ => {
                self.address(instruction)?;
                offset
            }
        };
        self.address = Some((number, from));
        self.rename_at_address(instruction, renamed, free, offset - from);
        Ok(true)
    }

    /// The base's host register and the displacement of a memory operand that is just that, at its full size.
    fn plain_base(&self, instruction: &Instruction) -> Option<(Reg, i32)> {
        let base = instruction.memory_base();
        if !analysis::is_based(instruction) || is_spilled(base) || self.request.key.code32() {
            return None;
        }
        let displacement = i32::try_from(instruction.memory_displacement64() as i64).ok()?;
        Some((host_register(number(base)?), displacement))
    }

    /// Makes the memory operand one at ADDRESS plus ADDEND plus a displacement.
    fn rename_at_address(
        &mut self,
        instruction: &Instruction,
        renamed: &mut Instruction,
        free: &mut Vec<Reg>,
        displacement: i32,
    ) {
        renamed.set_memory_base(Register::R14);
        renamed.set_memory_index(Register::R13);
        renamed.set_memory_displacement64(displacement as i64 as u64);
        renamed.set_memory_displ_size(u32::from(displacement != 0));
        free.retain(|&host| host == TEMPORARY);
        if spilled_operands(instruction) > 1 {
            self.e.lea(Width::W64, ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
            self.address = None;
            renamed.set_memory_index(Register::None);
            free.push(ADDEND);
        }
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
        let mut needs_rex = analysis::has_memory(renamed);
        let mut high_byte = false;
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = instruction.op_register(operand);
            high_byte |= is_high_byte(register);
            let Some(guest) = number(register) else { continue };
            if !lives_in_memory(guest) {
                let host = host_register(guest);
                if host.0 != guest {
                    renamed.set_op_register(operand, sized(host, register));
                }
                needs_rex |= host.0 >= 8 || register.size() == 8 || is_new_byte(register);
                continue;
            }
            needs_rex = true;
            let access = decoded.access[operand as usize];
            let writes = !matches!(access, OpAccess::Read | OpAccess::None);
            let host = match loaded.iter_mut().find(|(number, _, _)| *number == guest) {
                Some((_, host, written)) => {
                    *written |= writes;
                    *host
                }
                None => {
                    let host = free.pop().ok_or(NotRenamed)?;
                    match host {
                        ADDEND => self.addend = Addend::Anything,
                        ADDRESS => self.address = None,
                        _ => {}
                    }
                    // A full write needs no old value.
                    if access != OpAccess::Write || register.size() < 4 {
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

    pub fn encode(&mut self, instruction: &Instruction) -> Result<(), NotRenamed> {
        let encoded = self.encoder.encode(instruction, 0);
        // In any case: what can't be encoded may leave its first bytes behind.
        let bytes = self.encoder.take_buffer();
        if encoded.is_ok() {
            self.e.code.extend_from_slice(&bytes);
        }
        self.encoder.set_buffer(bytes_cleared(bytes));
        encoded.map(|_| ()).map_err(|_| NotRenamed)
    }

    /// LEA of registers that all live in host registers: whether it was emitted, as itself.
    fn short_lea(&mut self, instruction: &Instruction) -> bool {
        let destination = instruction.op0_register();
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let in_host = |register: Register| register.is_gpr() && !is_spilled(register);
        // What lies above the result's 32 bits does not matter; addresses of 32 bits are not as wide as 64.
        let width = match (destination.size(), base.size(), index.size()) {
            (4, ..) => Width::W32,
            (8, 0 | 8, 0 | 8) => Width::W64,
            _ => return false,
        };
        let usable = |register: Register| register == Register::None || in_host(register);
        if !in_host(destination) || !usable(base) || !usable(index) {
            return false;
        }
        let host = |register: Register| number(register).map(host_register);
        let Some(target) = host(destination) else { return false };
        let displacement = instruction.memory_displacement64() as i32;
        let scale = instruction.memory_index_scale().trailing_zeros() as u8;
        match (host(base), host(index)) {
            (Some(base), None) => self.e.lea(width, target, at(base, displacement)),
            (Some(base), Some(index)) => self.e.lea(width, target, indexed(base, index, scale, displacement)),
            (None, Some(index)) => self.e.lea_index(width, target, index, scale, displacement),
            (None, None) => return false,
        }
        true
    }

    fn lea(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        let destination = instruction.op0_register();
        let guest = number(destination).ok_or(NotRenamed)?;
        if self.short_lea(instruction) {
            return Ok(());
        }
        self.offset(instruction)?;
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
    pub fn stack_operand(&mut self, decoded: &Decoded, offset: i32, write: bool) -> Mem {
        if decoded.stack_delta.is_some() {
            self.load_stack_addend();
            return indexed(GUEST_RSP, ADDEND, 0, offset + self.stack_moved);
        }
        self.e.lea(self.width(), ADDRESS, at(GUEST_RSP, offset));
        self.check(self.stack_step(), write, decoded.live_before);
        indexed(ADDRESS, ADDEND, 0, 0)
    }

    pub fn push(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        let (width, step) = (self.width(), self.stack_step());
        match instruction.op0_kind() {
            OpKind::Register => {
                let place = self.stack_operand(decoded, -step, true);
                let guest = number(instruction.op0_register()).ok_or(NotRenamed)?;
                let host = self.in_register(guest, TEMPORARY);
                self.e.store(width, place, host);
            }
            OpKind::Memory => {
                if decoded.stack_delta.is_none() {
                    return Err(NotRenamed);
                }
                self.address(instruction)?;
                self.check(step, false, decoded.live_before);
                self.e.load(width, TEMPORARY, indexed(ADDRESS, ADDEND, 0, 0));
                let place = self.stack_operand(decoded, -step, true);
                self.e.store(width, place, TEMPORARY);
            }
            _ => {
                let place = self.stack_operand(decoded, -step, true);
                let value = instruction.immediate(0);
                match width {
                    Width::W32 => self.e.store_imm32(place, value as u32),
                    Width::W64 => self.e.store_imm32_as_64(place, value as i32),
                }
            }
        }
        self.stack_moved -= step;
        Ok(())
    }

    pub fn pop(&mut self, decoded: &Decoded) {
        let place = self.stack_operand(decoded, 0, false);
        let guest = number(decoded.instruction.op0_register()).unwrap_or_default();
        let target = if lives_in_memory(guest) { TEMPORARY } else { host_register(guest) };
        self.e.load(self.width(), target, place);
        if lives_in_memory(guest) {
            self.e.store(Width::W64, context::spilled(guest), TEMPORARY);
        }
        // POP RSP gets the popped value, not the incremented one.
        if target != GUEST_RSP {
            self.stack_moved += self.stack_step();
        }
    }

    pub fn leave(&mut self, decoded: &Decoded) {
        let (width, step) = (self.width(), self.stack_step());
        self.e.copy(width, ADDRESS, reg::RBP);
        self.check(step, false, decoded.live_before);
        self.e.load(width, TEMPORARY, indexed(ADDRESS, ADDEND, 0, 0));
        self.e.lea(width, GUEST_RSP, at(reg::RBP, step));
        self.e.copy(width, reg::RBP, TEMPORARY);
    }

    pub fn push_return_address(&mut self, decoded: &Decoded) {
        let (width, step) = (self.width(), self.stack_step());
        let place = self.stack_operand(decoded, -step, true);
        if decoded.class == Class::CallIndirect {
            self.e.load(Width::W64, TEMPORARY, place);
            self.e.store(Width::W64, context::overwritten(), TEMPORARY);
        }
        self.e.load(Width::W64, TEMPORARY, page_base());
        self.e.lea(Width::W64, TEMPORARY, at(TEMPORARY, self.next_guest as i32));
        self.e.store(width, place, TEMPORARY);
        self.stack_moved -= step;
        self.move_stack();
    }
}

/// Host register of a guest register that lives in one.
pub(super) fn host_register(guest: u8) -> Reg {
    HOMES.iter().find(|&&(number, _)| number == guest).map_or(TEMPORARY, |&(_, host)| host)
}

/// Whether a guest register lives in memory.
pub(super) fn lives_in_memory(guest: u8) -> bool {
    SPILLED.contains(&guest)
}

/// SPL, BPL, SIL, DIL: they exist with REX only.
fn is_new_byte(register: Register) -> bool {
    matches!(register, Register::SPL | Register::BPL | Register::SIL | Register::DIL)
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
    decoded.access[first as usize] == OpAccess::Write
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
