//! The instructions of a block: which way they are followed, and what is known of each before any is emitted.
//!
//! A block goes on over conditional jumps that aren't taken. Hot code is followed further: through jumps within the page, and
//! around a loop several times, so that what its rounds access in memory may share checks.

use bivisor_x86::interp::decode::{decoder_options, is_peculiar};
use iced_x86::{Decoder, Instruction, InstructionInfoFactory};

use super::analysis::{self, Class, Decoded};
use super::block::{PAGE, Request};
use super::checks::Check;
use super::code32::{self, Widened};
use super::key::Key;
use crate::code_tracker;

/// Instructions of a block at most.
const MAX_INSTRUCTIONS: usize = 48;
/// Instructions of a block that goes around a loop at most.
const MAX_LOOPED: usize = 64;
/// Conditional jumps of a block at most, without those that are followed.
const MAX_BRANCHES: usize = 4;
/// Rounds of a loop in a block at most.
const MAX_ROUNDS: usize = 4;
/// Instructions looked at behind a jump, to find which flags are live there.
const LOOK_AHEAD: usize = 8;

/// A block's instructions, in the order of their execution.
pub struct Decoding {
    /// At least one.
    pub block: Vec<Decoded>,
    /// Lines of the page, of 64 bytes, that the block depends on.
    pub lines: u64,
    /// Flags that may be read behind the block.
    pub live_out: u32,
    /// Offset in the page of what is executed behind the block, if it doesn't end with a jump.
    pub next: usize,
    /// It follows jumps backwards.
    pub winds: bool,
    /// A jump backwards leads to its start.
    pub loop_head: bool,
}

/// Decodes the block at the requested place, or `None` if its first instruction can't be decoded.
pub fn decode(request: &Request<'_>) -> Option<Decoding> {
    let mut walk =
        Walk { request, block: Vec::with_capacity(16), lines: 0, next: request.offset, winds: false };
    walk.follow();
    let Walk { block, mut lines, next, winds, .. } = walk;
    let last = block.last()?;
    for Decoded { instruction, .. } in &block {
        lines |= code_tracker::lines(instruction.ip(), instruction.len() as u64);
    }
    let live_out = live_out(request, last, next, &mut lines);
    let leads_to_start = |decoded: &Decoded| {
        matches!(decoded.class, Class::JumpIf | Class::Jump)
            && decoded.instruction.near_branch64() as usize == request.offset
    };
    let loop_head = request.loop_head || block.iter().any(leads_to_start);
    Some(Decoding { block, lines, live_out, next, winds, loop_head })
}

/// What is being decoded.
struct Walk<'a> {
    request: &'a Request<'a>,
    block: Vec<Decoded>,
    lines: u64,
    next: usize,
    winds: bool,
}

impl Walk<'_> {
    fn follow(&mut self) {
        let request = self.request;
        let options = decoder_options(request.model);
        let mut decoder = Decoder::with_ip(code_bits(request.key), request.page, 0, options);
        let mut factory = InstructionInfoFactory::new();
        let mut branches = 0;
        let limit = |walk: &Self| if walk.winds { MAX_LOOPED } else { MAX_INSTRUCTIONS };
        while self.block.len() < limit(self) && self.next < PAGE {
            decoder.set_ip(self.next as u64);
            if decoder.set_position(self.next).is_err() || !decoder.can_decode() {
                break;
            }
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                // Cut off by the page's end, or no instruction at all: the interpreter decides.
                break;
            }
            self.next = instruction.next_ip() as usize;
            let mut decoded = self.one(instruction, &mut factory);
            let mut elsewhere = decoded.instruction.near_branch64() as usize;
            if let Some(target) = self.target_to_follow(&decoded) {
                decoded.followed = true;
                self.winds |= target <= instruction.ip() as usize;
                (elsewhere, self.next) = (self.next, target);
            }
            match decoded.class {
                Class::JumpIf => {
                    decoded.live_taken = live_at(request, elsewhere, &mut self.lines);
                    branches += usize::from(!decoded.followed);
                }
                Class::Jump if decoded.followed => decoded.class = Class::Nothing,
                _ => {}
            }
            // Where RSP gets another value, the next block begins with a check of the stack there.
            // An instruction that crosses into the next page stands alone.
            let last = decoded.class.is_last() || analysis::changes_stack(&decoded);
            self.block.push(decoded);
            if last || branches == MAX_BRANCHES || request.page.len() > PAGE {
                break;
            }
        }
    }

    fn one(&self, mut instruction: Instruction, factory: &mut InstructionInfoFactory) -> Decoded {
        let request = self.request;
        let bytes = &request.page[instruction.ip() as usize..instruction.next_ip() as usize];
        let class = if is_peculiar(&instruction, bytes, request.model) {
            Class::Interpret
        } else {
            classify(&mut instruction, request)
        };
        let (access, written) = analysis::accesses(factory, &instruction);
        Decoded {
            instruction,
            class,
            live_before: 0,
            live_taken: 0,
            followed: false,
            stack_delta: None,
            access,
            stack_step: request.key.stack_step(),
            written,
            check: Check::Own,
        }
    }

    /// The target of a jump in hot code, if the block should go on there.
    fn target_to_follow(&self, jump: &Decoded) -> Option<usize> {
        let request = self.request;
        let target = jump.instruction.near_branch64() as usize;
        let hot = request.first_slot.is_some() && !request.key.no_stack() && !request.all_flags;
        if !hot
            || request.page.len() > PAGE
            || !matches!(jump.class, Class::Jump | Class::JumpIf)
            || target >= PAGE
        {
            return None;
        }
        let is_target = |decoded: &Decoded| decoded.instruction.ip() as usize == target;
        let Some(start) = self.block.iter().rposition(is_target) else {
            return (jump.class == Class::Jump).then_some(target);
        };
        let rounds = self.block.iter().filter(|decoded| is_target(decoded)).count();
        let round = self.block.len() + 1 - start;
        (rounds < MAX_ROUNDS && self.block.len() + 1 + round <= MAX_LOOPED).then_some(target)
    }
}

fn code_bits(key: Key) -> u32 {
    if key.code32() { 32 } else { 64 }
}

/// The instruction's class; one of 32-bit code becomes its 64-bit equivalent.
fn classify(instruction: &mut Instruction, request: &Request<'_>) -> Class {
    if request.key.code32() {
        match code32::widened(instruction, request.key) {
            Widened::As(wide) => *instruction = wide,
            Widened::Interpreted => return Class::Interpret,
            Widened::InterpretedLast => return Class::InterpretLast,
        }
    }
    analysis::classify(instruction, request.model, request.key)
}

/// Flags that may be read after the block.
fn live_out(request: &Request<'_>, last: &Decoded, next: usize, looked_at: &mut u64) -> u32 {
    let target = last.instruction.near_branch64() as usize;
    match last.class {
        Class::JumpIfRcxZero => live_at(request, target, looked_at) | live_at(request, next, looked_at),
        Class::Jump | Class::Call => live_at(request, target, looked_at),
        class if class.is_last() => analysis::ALL_FLAGS,
        _ => live_at(request, next, looked_at),
    }
}

/// Flags live at an offset of the page; all of them where that isn't in this page.
fn live_at(request: &Request<'_>, offset: usize, looked_at: &mut u64) -> u32 {
    let page = request.page.get(..PAGE).unwrap_or_default();
    let Some(bytes) = page.get(offset..).filter(|_| !request.all_flags) else { return analysis::ALL_FLAGS };
    let bits = code_bits(request.key);
    let mut decoder = Decoder::with_ip(bits, bytes, offset as u64, decoder_options(request.model));
    let ahead = std::iter::from_fn(|| decoder.can_decode().then(|| decoder.decode())).take(LOOK_AHEAD);
    let live = analysis::live_at_start(ahead);
    *looked_at |= code_tracker::lines(offset as u64, decoder.ip() - offset as u64);
    live
}

#[cfg(test)]
mod tests {
    use super::*;

    use bivisor_x86::cpuid::CpuModel;
    use rustc_hash::FxHashSet;

    use super::super::block::SharedCode;
    use super::super::checks;

    /// `mov ecx, [rax + rdx]`, `add rax, 8`, `dec esi`, `jne` back, `ret`.
    const LOOP: [u8; 12] = [0x8b, 0x0c, 0x10, 0x48, 0x83, 0xc0, 8, 0xff, 0xce, 0x75, 0xf5, 0xc3];
    const START: usize = 0x100;

    /// The block at [`START`] of a page that has this code there.
    fn decoded(code: &[u8], hot: bool) -> Decoding {
        let mut page = [0x90; PAGE];
        page[START..][..code.len()].copy_from_slice(code);
        let (none, model) = (FxHashSet::default(), CpuModel::reference(1));
        decode(&Request {
            page: &page,
            offset: START,
            key: Key::plain_code64(),
            model: &model,
            start: 0,
            cold_start: 0,
            first_site: 0,
            block: 0,
            first_link: 0,
            shared: SharedCode::default(),
            first_slot: hot.then_some(0),
            all_flags: false,
            page_offset: 0,
            roaming: &none,
            alone: &none,
            loop_head: false,
        })
        .expect("a block")
    }

    fn followed(decoding: &Decoding) -> usize {
        decoding.block.iter().filter(|decoded| decoded.followed).count()
    }

    #[test]
    fn a_hot_loop_goes_round_several_times_and_shares_one_check() {
        let mut decoding = decoded(&LOOP, true);
        assert_eq!((decoding.block.len(), followed(&decoding)), (4 * MAX_ROUNDS + 1, MAX_ROUNDS - 1));
        assert!(decoding.winds && decoding.loop_head);
        checks::share(&mut decoding.block, |_| false);
        let window = checks::Window { number: 0, low: 0, size: 28, write: false, interrupted: false };
        assert_eq!(decoding.block[0].check, Check::First(window));
        assert_eq!(decoding.block[12].check, Check::Again(0, 24));
    }

    #[test]
    fn other_code_goes_on_where_jumps_are_not_taken() {
        let decoding = decoded(&LOOP, false);
        assert_eq!((decoding.block.len(), followed(&decoding)), (5, 0));
        assert!(!decoding.winds && decoding.loop_head);
    }

    #[test]
    fn a_hot_jump_is_followed_wherever_it_leads_in_the_page() {
        // jmp to START + 0x10, where one NOP stands before the jump back to START.
        let mut code = [0x90; 0x14];
        code[..2].copy_from_slice(&[0xeb, 0x0e]);
        code[0x11..0x13].copy_from_slice(&[0xeb, 0xed]);
        let decoding = decoded(&code, true);
        assert!(decoding.winds && decoding.loop_head);
        assert_eq!((decoding.block.len(), followed(&decoding)), (3 * MAX_ROUNDS, 2 * MAX_ROUNDS - 1));
        // The last jump isn't followed: it ends the block.
        assert_eq!(decoding.block.last().map(|last| last.class), Some(Class::Jump));
    }
}
