//! Which memory accesses of a block share a check: those whose addresses differ by small constants. The first of them checks
//! the page that all of them lie in, so that no other instruction has to.

use iced_x86::{Mnemonic, Register};

use super::analysis::{Class, Decoded, has_memory, stack_access, writes_memory};
use super::values::{Value, Values};

/// Bytes that share a check at most.
const WINDOW_LIMIT: i32 = 512;
/// Windows of a block at most.
pub const MAX_WINDOWS: usize = 16;

/// How an instruction's memory operand is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// By itself.
    Own,
    /// Together with others, which come later.
    First(Window),
    /// It was checked with the first access of the window of this number; it lies so many bytes behind the window's start.
    Again(u8, i32),
}

/// Bytes around a memory operand which several accesses touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its number in the block.
    pub number: u8,
    /// Its first byte, from the first access's operand.
    pub low: i32,
    /// Its size in bytes.
    pub size: i32,
    /// Whether any is written.
    pub write: bool,
    /// Other accesses come between, which need the scratch registers.
    pub interrupted: bool,
}

/// What differs between accesses that can't share a check: base, index and scale.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    base: Option<u32>,
    index: Option<(u32, u32)>,
}

/// The number that stands for the linear address of the page.
const PAGE_BASE: u32 = u32::MAX;

struct Candidate {
    place: Place,
    low: i32,
    high: i32,
    write: bool,
    /// Nothing else may have been executed since its first access but what follows it in any case.
    certain: bool,
    /// Numbers of the instructions, and their offsets.
    members: Vec<(usize, i32)>,
}

/// Finds out which accesses share a check. `alone`: offsets in the page of instructions that can't be the first of a window.
pub fn share(block: &mut [Decoded], alone: impl Fn(u64) -> bool) {
    let mut values = Values::at_start();
    let mut windows: Vec<Candidate> = Vec::new();
    // Windows before this one are over.
    let mut open = 0;
    for (number, decoded) in block.iter().enumerate() {
        if let Some((place, offset, size)) = operand(decoded, &values) {
            let write = writes_memory(decoded);
            let window = windows[open..].iter_mut().rev().find(|window| {
                let (low, high) = (window.low.min(offset), window.high.max(offset + size));
                window.place == place
                    && high - low <= WINDOW_LIMIT
                    && (!write || window.write || window.certain)
            });
            if let Some(window) = window {
                window.low = window.low.min(offset);
                window.high = window.high.max(offset + size);
                window.write |= write;
                window.members.push((number, offset));
            } else if !alone(decoded.instruction.ip()) {
                let members = vec![(number, offset)];
                let high = offset + size;
                windows.push(Candidate { place, low: offset, high, write, certain: true, members });
            }
        }
        if decoded.class == Class::JumpIf {
            windows.iter_mut().for_each(|window| window.certain = false);
        }
        if !values.follow(decoded) {
            open = windows.len();
        }
    }
    windows.retain(|window| window.members.len() > 1);
    windows.truncate(MAX_WINDOWS);
    for (number, window) in windows.iter().enumerate() {
        mark(block, number as u8, window);
    }
}

fn mark(block: &mut [Decoded], number: u8, window: &Candidate) {
    let (Some(&(first, offset)), Some(&(last, _))) = (window.members.first(), window.members.last()) else {
        return;
    };
    let is_member = |place: usize| window.members.iter().any(|&(member, _)| member == place);
    let interrupted = (first + 1..last).any(|place| !is_member(place) && needs_scratch(&block[place]));
    block[first].check = Check::First(Window {
        number,
        low: window.low - offset,
        size: window.high - window.low,
        write: window.write,
        interrupted,
    });
    for &(member, offset) in &window.members[1..] {
        block[member].check = Check::Again(number, offset - window.low);
    }
}

fn needs_scratch(decoded: &Decoded) -> bool {
    match decoded.class {
        Class::Nothing | Class::JumpIf => false,
        Class::Copy => stack_access(decoded).is_some() || has_memory(&decoded.instruction),
        _ => true,
    }
}

/// Place, offset and size of a memory operand that may share a check.
fn operand(decoded: &Decoded, values: &Values) -> Option<(Place, i32, i32)> {
    let instruction = &decoded.instruction;
    let tracked_stack = decoded.stack_delta.is_some() && stack_access(decoded).is_some();
    if decoded.class != Class::Copy
        || instruction.mnemonic() == Mnemonic::Lea
        || !has_memory(instruction)
        || tracked_stack
        || matches!(instruction.memory_segment(), Register::FS | Register::GS)
    {
        return None;
    }
    let displacement = i32::try_from(instruction.memory_displacement64() as i64).ok()?;
    let base = register_value(instruction.memory_base(), values)?;
    let index = register_value(instruction.memory_index(), values)?;
    let scale = instruction.memory_index_scale();
    if base.is_none() && index.is_none() {
        return None;
    }
    let mut offset = displacement;
    if let Some((_, delta)) = base {
        offset = offset.checked_add(delta)?;
    }
    if let Some((_, delta)) = index {
        offset = offset.checked_add(delta.checked_mul(scale as i32)?)?;
    }
    let place = Place { base: base.map(|(root, _)| root), index: index.map(|(root, _)| (root, scale)) };
    let size = instruction.memory_size().size() as i32;
    (offset.abs() < 1 << 30).then_some((place, offset, size))
}

/// The value of a base or index; `None` inside where there is none, `None` where it isn't followed.
fn register_value(register: Register, values: &Values) -> Option<Option<Value>> {
    match register {
        Register::None => Some(None),
        Register::RIP => Some(Some((PAGE_BASE, 0))),
        _ if register.is_gpr64() => Some(Some(values.of(register))),
        _ => None,
    }
}
