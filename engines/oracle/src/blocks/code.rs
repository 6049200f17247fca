//! Sequences of instructions as they can be put together anew: with references to each other by number.

use super::layout::Code;
use crate::layout::{CODE, CODE_SIZE};

/// What fills the code pages between and behind sequences: INT3.
pub const FILLER: u8 = 0xcc;

/// Where a field of an instruction leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// A linear address.
    Address(u64),
    /// So many bytes behind the start of this item.
    Item(usize, u8),
}

/// How a field tells its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Relative to the instruction's end.
    Relative,
    /// As it is.
    Absolute,
}

/// A field of an instruction that depends on where it stands, or on where others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Offset in the instruction.
    pub at: u8,
    /// Bytes.
    pub size: u8,
    /// How it is written.
    pub form: Form,
    /// Its target.
    pub to: To,
}

/// An instruction, or room between two sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// An instruction.
    Instruction {
        /// Its bytes.
        bytes: Vec<u8>,
        /// The field in it that depends on places.
        field: Option<Field>,
    },
    /// So many bytes of [`FILLER`].
    Room(usize),
}

impl Item {
    /// Its length.
    pub fn length(&self) -> usize {
        match self {
            Self::Instruction { bytes, .. } => bytes.len(),
            Self::Room(length) => *length,
        }
    }

    /// The item whose start it refers to: it may jump there.
    pub fn target(&self) -> Option<usize> {
        match self {
            Self::Instruction { field: Some(Field { to: To::Item(item, 0), .. }), .. } => Some(*item),
            _ => None,
        }
    }
}

/// Items as they stand in memory.
pub struct Assembled {
    /// The code pages.
    pub code: Box<Code>,
    /// Offset of each item, and of the end.
    pub places: Vec<usize>,
}

impl Assembled {
    /// Linear address of an item.
    pub fn address(&self, item: usize) -> u64 {
        CODE + self.places[item.min(self.places.len() - 1)] as u64
    }

    /// The item that stands at this linear address.
    pub fn item_at(&self, address: u64) -> Option<usize> {
        let offset = address.checked_sub(CODE)? as usize;
        self.places.iter().rposition(|&place| place == offset)
    }
}

/// Puts items together from an offset in the code pages on. A reference that a field is too small for becomes one
/// to the following instruction; what does not fit into the code pages is cut off.
pub fn assemble(items: &[Item], origin: usize) -> Assembled {
    let mut places = Vec::with_capacity(items.len() + 1);
    let mut place = origin;
    for item in items {
        places.push(place);
        place += item.length();
    }
    places.push(place);
    let mut assembled = Assembled { code: Box::new([FILLER; CODE_SIZE]), places };
    for (number, item) in items.iter().enumerate() {
        let Item::Instruction { bytes, field } = item else { continue };
        let start = assembled.places[number];
        let end = start + bytes.len();
        if end > CODE_SIZE {
            break;
        }
        let value = field.map(|field| assembled.value(field, CODE + end as u64));
        let place = &mut assembled.code[start..end];
        place.copy_from_slice(bytes);
        if let (Some(Field { at, size, .. }), Some(value)) = (field, value) {
            let (at, size) = (usize::from(*at), usize::from(*size));
            place[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }
    assembled
}

/// Makes short references that don't reach their items lead to the following instruction.
pub fn shorten(items: &mut [Item]) {
    let assembled = assemble(items, 0);
    for (number, item) in items.iter_mut().enumerate() {
        let end = assembled.address(number + 1);
        if let Item::Instruction { field: Some(Field { size: 1, to: To::Item(target, _), .. }), .. } = item
            && i8::try_from(assembled.address(*target).wrapping_sub(end) as i64).is_err()
        {
            *target = number + 1;
        }
    }
}

impl Assembled {
    fn value(&self, field: Field, end: u64) -> u64 {
        let target = match field.to {
            To::Address(address) => address,
            To::Item(item, offset) => self.address(item) + u64::from(offset),
        };
        let value = match field.form {
            Form::Relative => target.wrapping_sub(end),
            Form::Absolute => target,
        };
        let fits = field.size > 1 || i8::try_from(value as i64).is_ok();
        if fits { value } else { 0 }
    }
}

/// The items without those for which `keep` says no. References to them lead to what follows.
pub fn without(items: &[Item], keep: impl Fn(usize) -> bool) -> (Vec<Item>, Vec<usize>) {
    let mut numbers = Vec::with_capacity(items.len() + 1);
    let mut count = 0;
    for number in 0..items.len() {
        numbers.push(count);
        count += usize::from(keep(number));
    }
    numbers.push(count);
    let renumber = |item: &Item| match item {
        Item::Instruction { bytes, field: Some(field) } => {
            let mut field = *field;
            if let To::Item(target, offset) = field.to {
                field.to = To::Item(numbers[target.min(items.len())], offset);
            }
            Item::Instruction { bytes: bytes.clone(), field: Some(field) }
        }
        other => other.clone(),
    };
    let kept = items.iter().enumerate().filter(|(number, _)| keep(*number)).map(|(_, item)| renumber(item));
    (kept.collect(), numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(bytes: &[u8]) -> Item {
        Item::Instruction { bytes: bytes.to_vec(), field: None }
    }

    fn jump(target: usize) -> Item {
        let field = Field { at: 1, size: 1, form: Form::Relative, to: To::Item(target, 0) };
        Item::Instruction { bytes: vec![0xeb, 0], field: Some(field) }
    }

    #[test]
    fn references_follow_their_items() {
        let items = [jump(2), plain(&[0x90]), plain(&[0xf4]), jump(0)];
        let assembled = assemble(&items, 0x10);
        assert_eq!(assembled.code[0x10..0x16], [0xeb, 1, 0x90, 0xf4, 0xeb, 0xfa]);
        let (items, numbers) = without(&items, |number| number != 2);
        assert_eq!(numbers, [0, 1, 2, 2, 3]);
        assert_eq!(assemble(&items, 0x10).code[0x10..0x15], [0xeb, 1, 0x90, 0xeb, 0xfb]);
    }

    #[test]
    fn a_reference_too_far_leads_to_the_next_instruction() {
        let items = [jump(2), Item::Room(200), plain(&[0xf4])];
        let assembled = assemble(&items, 0);
        assert_eq!(assembled.code[..3], [0xeb, 0, FILLER]);
        assert_eq!(assembled.item_at(CODE + 202), Some(2));
    }
}
