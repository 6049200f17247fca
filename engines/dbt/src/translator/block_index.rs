//! Finding blocks: a table of eight bytes for each, in one piece of memory that doesn't move. A lookup touches one line of it;
//! whether the block is the right one the block itself tells, which is needed anyway.

/// Slots; a power of two, and more than there may be blocks.
const SLOTS: usize = 1 << SLOTS_SHIFT;
const SLOTS_SHIFT: u32 = 19;
/// Bytes of a page of code that have a slot of their own.
const GRANULE_SHIFT: u32 = 3;
/// An empty slot. No block has the number that it would stand for.
const EMPTY: Slot = Slot { hash: 0, block: u32::MAX };

#[derive(Clone, Copy)]
struct Slot {
    hash: u32,
    block: u32,
}

/// Numbers of blocks by what identifies them.
pub struct BlockIndex {
    slots: Vec<Slot>,
}

/// Blocks of a page have their homes close together, since they are looked for one after the other.
fn hash(identity: u64) -> u32 {
    let (page, in_page) = (identity & !0xfff, identity & 0xfff);
    let page = (page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
    page.wrapping_add((in_page as u32) << (u32::BITS - SLOTS_SHIFT - GRANULE_SHIFT))
}

fn home(hash: u32) -> usize {
    (hash >> (u32::BITS - SLOTS_SHIFT)) as usize
}

impl BlockIndex {
    /// Blocks at most.
    pub const CAPACITY: usize = SLOTS / 4 * 3;

    /// Nothing.
    pub fn new() -> Self {
        Self { slots: vec![EMPTY; SLOTS] }
    }

    /// The slots that a hash may be in, in order, to the first empty one.
    fn chain(&self, hash: u32) -> impl Iterator<Item = (usize, Slot)> {
        let places = (0..SLOTS).map(move |step| (home(hash) + step) % SLOTS);
        places.map(|place| (place, self.slots[place])).take_while(|(_, slot)| slot.block != EMPTY.block)
    }

    /// The block with this identity, of those for which `is_it` says so.
    pub fn find(&self, identity: u64, mut is_it: impl FnMut(u32) -> bool) -> Option<u32> {
        let hash = hash(identity);
        let same = self.chain(hash).filter(|(_, slot)| slot.hash == hash);
        same.map(|(_, slot)| slot.block).find(|&block| is_it(block))
    }

    /// Enters a block. There must be room.
    pub fn insert(&mut self, identity: u64, block: u32) {
        let hash = hash(identity);
        let free = self.chain(hash).last().map_or(home(hash), |(place, _)| (place + 1) % SLOTS);
        self.slots[free] = Slot { hash, block };
    }

    /// Takes a block out.
    pub fn remove(&mut self, identity: u64, block: u32) {
        let hash = hash(identity);
        let Some((mut hole, _)) = self.chain(hash).find(|(_, slot)| slot.block == block) else { return };
        // What stands behind moves up, unless it would come to stand before its home.
        let mut place = hole;
        loop {
            place = (place + 1) % SLOTS;
            let slot = self.slots[place];
            if slot.block == EMPTY.block {
                break;
            }
            let from_home = place.wrapping_sub(home(slot.hash)) % SLOTS;
            if from_home >= place.wrapping_sub(hole) % SLOTS {
                self.slots[hole] = slot;
                hole = place;
            }
        }
        self.slots[hole] = EMPTY;
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.slots.fill(EMPTY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_found_until_it_is_taken_out() {
        let mut index = BlockIndex::new();
        let count = BlockIndex::CAPACITY as u32;
        // Identities that have the same hash, by fours.
        let identity = |number: u32| u64::from(number / 4) << 12 | u64::from(number / 4);
        (0..count).for_each(|number| index.insert(identity(number), number));
        (0..count).filter(|number| number % 3 == 0).for_each(|number| index.remove(identity(number), number));
        for number in 0..count {
            let found = index.find(identity(number), |block| block == number);
            assert_eq!(found, (number % 3 != 0).then_some(number));
        }
        index.clear();
        assert_eq!(index.find(identity(1), |_| true), None);
    }
}
