//! Jumps, calls and returns.

use iced_x86::OpKind;

use super::analysis::{self, Decoded};
use super::block::{Builder, NotRenamed, PAGE, Tail};
use super::context::{self, ADDEND, ADDRESS, JUMP_MASK, TEMPORARY, jump_host, jump_tag, page_base};
use super::emit::{Emitter, Fixup, Width, at, condition, indexed};
use super::operand::{host_register, lives_in_memory, number};
use super::site::{SiteKind, Undo};

impl Builder<'_> {
    /// Reads the target of an indirect jump or call into ADDRESS.
    pub fn read_target(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        let instruction = &decoded.instruction;
        if instruction.op0_kind() == OpKind::Register {
            let guest = number(instruction.op0_register()).ok_or(NotRenamed)?;
            if lives_in_memory(guest) {
                self.e.load(Width::W64, ADDRESS, context::spilled(guest));
            } else {
                self.e.copy(self.width(), ADDRESS, host_register(guest));
            }
            return Ok(());
        }
        self.address(instruction)?;
        self.check(self.stack_step(), false, decoded.live_before);
        self.e.load(self.width(), ADDRESS, indexed(ADDRESS, ADDEND, 0, 0));
        Ok(())
    }

    pub fn call_indirect(&mut self, decoded: &Decoded) -> Result<(), NotRenamed> {
        self.read_target(decoded)?;
        if decoded.stack_delta.is_some() {
            self.push_return_address(decoded);
        } else {
            self.e.store(Width::W64, context::call_target(), ADDRESS);
            // Once the stack's page is there, this goes on here: the page of the target must not be needed again, since
            // the two may have to take turns in one entry of the TLB.
            self.instruction_start = self.e.position();
            self.push_return_address(decoded);
            self.e.load(Width::W64, ADDRESS, context::call_target());
        }
        self.look_up(Undo::Call);
        Ok(())
    }

    pub fn ret(&mut self, decoded: &Decoded) {
        let place = self.stack_operand(decoded, 0, false);
        self.e.load(self.width(), ADDRESS, place);
        let extra =
            if decoded.instruction.op_count() > 0 { decoded.instruction.immediate16().into() } else { 0 };
        let popped = self.stack_step() + extra;
        self.stack_moved += popped;
        self.move_stack();
        self.look_up(Undo::Return(popped as u32));
    }

    /// Goes on at the linear address in ADDRESS, by the jump cache, with the guest's flags aside.
    pub fn look_up(&mut self, undo: Undo) {
        self.put_flags_aside();
        self.e.copy(Width::W32, TEMPORARY, ADDRESS);
        self.e.and_imm(Width::W32, TEMPORARY, JUMP_MASK);
        self.e.load(Width::W64, ADDEND, jump_tag(TEMPORARY));
        self.e.xor(Width::W64, ADDEND, ADDRESS);
        self.e.compare(Width::W64, ADDEND, context::jump_bias());
        let other = self.e.jump_if(condition::NE);
        self.e.jump_mem(jump_host(TEMPORARY));
        self.leave_from(other, SiteKind::Lookup(undo));
    }

    /// Goes on at a fixed offset from the page's start. `live`: flags live there.
    pub fn jump_to(&mut self, target: i64, live: u32) {
        self.bring_flags_back();
        // The displacement of a near jump has 32 bits.
        let target = target as i32;
        if (0..PAGE as i32).contains(&target) {
            let fixup = self.e.jump();
            self.link(fixup, target as u16);
            return;
        }
        if self.winds || target <= self.guest as i32 {
            self.check_event(target, live);
        }
        self.e.load(Width::W64, ADDRESS, page_base());
        self.e.lea(self.width(), ADDRESS, at(ADDRESS, target));
        let link = self.request.first_link + self.links;
        self.links += 1;
        self.new_site(SiteKind::Link { target, link, stub: 0 });
        self.e.jump_mem(context::link(link));
    }

    fn link(&mut self, fixup: Fixup, target: u16) {
        let patch = (self.request.start + Emitter::displacement_position(fixup)) as u32;
        // Events are looked for once in every loop: where a jump backwards arrives.
        let backwards = self.winds || usize::from(target) <= self.guest;
        self.leave_from(fixup, SiteKind::Jump { target, backwards, patch, stub: 0 });
    }

    /// Leaves if an event waits: once in every loop.
    pub fn check_event(&mut self, target: i32, live: u32) {
        let fixup = if live == 0 {
            self.e.compare_zero8(context::event());
            self.e.jump_if(condition::NE)
        } else {
            self.unless_zero(context::event())
        };
        self.leave_from(fixup, SiteKind::Event { target });
    }

    /// A conditional jump: the block goes on where it isn't taken, or, if it is followed, where it is.
    pub fn jump_if(&mut self, decoded: &Decoded) {
        self.bring_flags_back();
        let mut condition = encoding(decoded.instruction.condition_code() as u8);
        let mut target = decoded.instruction.near_branch64() as i64;
        if decoded.followed {
            // Each condition's opposite differs in the lowest bit.
            condition ^= 1;
            target = decoded.instruction.next_ip() as i64;
        }
        let taken = self.e.jump_if(condition);
        if (0..PAGE as i64).contains(&target) {
            self.link(taken, target as u16);
        } else {
            self.tails.push(Tail { from: taken, target, guest: self.guest, live: decoded.live_taken });
        }
    }

    /// JRCXZ and JECXZ.
    pub fn jump_if_rcx_zero(&mut self, decoded: &Decoded) {
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
