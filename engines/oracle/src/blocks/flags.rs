//! Which flags are undefined where, so that no sequence reads any, and none are compared.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};

use super::code::Item;
use crate::compare::undefined_flags;
use crate::layout::CODE;
use crate::mode::Mode;
use bivisor_x86::registers::Rflags;

/// The arithmetic flags, as iced-x86 numbers them.
const ALL: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What an instruction does to flags. Masks are of RFLAGS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effect {
    /// Those that it reads. Where it may go elsewhere, all: nobody knows what is read there.
    pub read: u64,
    /// Those that it certainly gives a value, undefined or not.
    pub written: u64,
    /// Those that it may leave undefined.
    pub undefined: u64,
}

fn mask(bits: u32) -> u64 {
    let pairs = [
        (RflagsBits::OF, Rflags::OF),
        (RflagsBits::SF, Rflags::SF),
        (RflagsBits::ZF, Rflags::ZF),
        (RflagsBits::AF, Rflags::AF),
        (RflagsBits::CF, Rflags::CF),
        (RflagsBits::PF, Rflags::PF),
    ];
    pairs.into_iter().filter(|(bit, _)| bits & bit != 0).fold(0, |mask, (_, flag)| mask | flag.bits())
}

/// The effect of an instruction.
pub fn effect(instruction: &Instruction) -> Effect {
    let everything = Rflags::ARITHMETIC.bits();
    let goes_elsewhere = instruction.flow_control() != FlowControl::Next;
    let is_word_double_shift = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && instruction.op1_kind() == OpKind::Register
        && instruction.op1_register().size() == 2;
    // iced-x86 takes rotations through CF by 9 bits of 8, or 17 of 16, for none at all.
    let by_more = matches!(instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr)
        && instruction.op_kind(1) == OpKind::Immediate8
        && instruction.immediate8() & 0x1f > 1;
    let also = if by_more { Rflags::OF.bits() } else { 0 };
    Effect {
        read: if goes_elsewhere { everything } else { mask(instruction.rflags_read() & ALL) },
        written: if is_conditional(instruction) { 0 } else { mask(instruction.rflags_modified() & ALL) },
        undefined: if is_word_double_shift { everything } else { undefined_flags(instruction) | also },
    }
}

/// Whether the instruction changes no flags for some counts: shifts, rotations and repeated comparisons.
fn is_conditional(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let last = instruction.op_count().saturating_sub(1);
    let counted = match instruction.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd => {
            match instruction.op_kind(last) {
                OpKind::Register => instruction.op_register(last) == Register::CL,
                _ => instruction.immediate(last) & 0x1f == 0,
            }
        }
        _ => false,
    };
    counted || instruction.has_rep_prefix() || instruction.has_repne_prefix()
}

/// Flags undefined after an instruction, when these were before.
pub fn after(effect: Effect, before: u64) -> u64 {
    before & !effect.written | effect.undefined
}

/// Flags that are undefined before each item and at the end, or `None` if some item reads such a flag.
///
/// Only the order in memory is followed: wherever a jump may come from or go to, no flag may be undefined.
pub fn undefined_before(items: &[Item], entries: &[usize], mode: Mode) -> Option<Vec<u64>> {
    let mut is_target = vec![false; items.len() + 1];
    let targets = items.iter().filter_map(Item::target).chain(entries.iter().copied());
    targets.for_each(|target| is_target[target.min(items.len())] = true);
    let mut undefined = 0;
    let mut all = Vec::with_capacity(items.len() + 1);
    for (item, is_target) in items.iter().zip(is_target) {
        if is_target && undefined != 0 {
            return None;
        }
        all.push(undefined);
        let Item::Instruction { bytes, .. } = item else {
            // INT3 is executed here.
            if undefined != 0 {
                return None;
            }
            continue;
        };
        let effect = effect(&mode.decoder(bytes, CODE).decode());
        if effect.read & undefined != 0 {
            return None;
        }
        undefined = after(effect, undefined);
    }
    all.push(undefined);
    (undefined == 0).then_some(all)
}

/// Where execution may go on after an item, if that is known.
fn successors(number: usize, item: &Item, instruction: &Instruction) -> Option<Vec<usize>> {
    match instruction.flow_control() {
        FlowControl::Next => Some(vec![number + 1]),
        FlowControl::ConditionalBranch => Some(vec![number + 1, item.target()?]),
        FlowControl::UnconditionalBranch | FlowControl::Call => Some(vec![item.target()?]),
        _ => None,
    }
}

/// Whether the instruction goes elsewhere and takes all flags from there.
fn loads_flags(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Sysret | M::Sysretq | M::Iret | M::Iretd | M::Iretq)
}

/// For each item, the flags that are dead before it: whatever is executed next overwrites them before it reads them.
pub fn dead_before(items: &[Item], mode: Mode) -> Vec<u64> {
    let everything = Rflags::ARITHMETIC.bits();
    let decoded: Vec<Option<Instruction>> = items
        .iter()
        .map(|item| match item {
            Item::Instruction { bytes, .. } => Some(mode.decoder(bytes, CODE).decode()),
            Item::Room(_) => None,
        })
        .collect();
    let mut live = vec![0; items.len()];
    loop {
        let before = live.clone();
        for number in (0..items.len()).rev() {
            let next = decoded[number].as_ref().and_then(|i| successors(number, &items[number], i));
            live[number] = match (&decoded[number], next) {
                (Some(instruction), _) if loads_flags(instruction) => 0,
                (Some(instruction), Some(next)) => {
                    let after = next.iter().fold(0, |live_after, &next| {
                        live_after | live.get(next).copied().unwrap_or(everything)
                    });
                    let read = mask(instruction.rflags_read() & ALL);
                    read | after & !effect(instruction).written
                }
                _ => everything,
            };
        }
        if live == before {
            return live.iter().map(|live| everything & !live).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODE: Mode = Mode { is_32bit: false, options: 0 };

    fn items(code: &[&[u8]]) -> Vec<Item> {
        code.iter().map(|bytes| Item::Instruction { bytes: bytes.to_vec(), field: None }).collect()
    }

    #[test]
    fn dead_flags_are_found_over_jumps() {
        let (cf, all) = (Rflags::CF.bits(), Rflags::ARITHMETIC.bits());
        // jb 0; mov eax,1; add eax,eax; int3
        let mut code = items(&[&[0x72, 0], &[0xb8, 1, 0, 0, 0], &[0x01, 0xc0], &[0xcc]]);
        if let Item::Instruction { field, .. } = &mut code[0] {
            let to = crate::blocks::code::To::Item(0, 0);
            let form = crate::blocks::code::Form::Relative;
            *field = Some(crate::blocks::code::Field { at: 1, size: 1, form, to });
        }
        assert_eq!(dead_before(&code, MODE), [all & !cf, all, all, 0]);
    }

    #[test]
    fn undefined_flags_are_followed() {
        let af = Rflags::AF.bits();
        // test eax,eax; mov eax,1; cmp eax,eax; int3
        let good = items(&[&[0x85, 0xc0], &[0xb8, 1, 0, 0, 0], &[0x39, 0xc0], &[0xcc]]);
        assert_eq!(undefined_before(&good, &[0], MODE), Some(vec![0, af, af, 0, 0]));
        assert_eq!(undefined_before(&good, &[0, 1], MODE), None, "an entry where a flag is undefined");
        // test eax,eax; shl eax,cl; lahf; int3
        let bad = items(&[&[0x85, 0xc0], &[0xd3, 0xe0], &[0x9f], &[0xcc]]);
        assert_eq!(undefined_before(&bad, &[0], MODE), None, "a shift by nothing keeps AF undefined");
    }
}
