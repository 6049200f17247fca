//! The decode cache: runs of decoded instructions ("blocks"), keyed by where their bytes stand in RAM and by the size of
//! code, so that every address space shares them.
//!
//! A block goes on behind a conditional jump that is not taken. It ends with its page, with every other
//! transfer, and with what may change how the next instruction is to be executed. Blocks remember which blocks
//! followed them.

use alloc::vec::Vec;
use core::mem::size_of;
use core::ops::Range;

use crate::cpuid::CpuModel;
use crate::env::Env;
use crate::interp::decode::InstructionDecoder;
use crate::interp::op::{MAX_INSTRUCTION_LENGTH, Op};

const PAGE: u64 = 0x1000;
/// Bytes of decoded instructions kept; when they are used up, everything is dropped.
const CAPACITY_BYTES: usize = 32 << 20;
const CAPACITY: usize = CAPACITY_BYTES / size_of::<Op>();
/// Entries of the table of blocks, a power of two; at most half of them are used.
const ENTRIES: usize = 1 << 18;
/// Most instructions of a block.
const BLOCK_LENGTH: usize = 32;
/// Number of the block that is none: its key fits nothing.
const NO_BLOCK: u32 = 0;
/// A key that no block has: code has no size of 3 × 32 bits.
const NO_KEY: u64 = 3;

/// A run of decoded instructions within one page.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Offset in RAM of the first byte, shifted left by two, and a number for the code size.
    key: u64,
    /// The count of all changes of code when it was last found valid.
    epoch: u64,
    /// The page's generation when it was decoded.
    generation: u32,
    /// Index of the first instruction.
    first: u32,
    /// Instructions; none: the first one crosses into the next page.
    count: u16,
    /// Bytes of all instructions.
    length: u16,
    /// The last two blocks that were executed after it.
    followers: [u32; 2],
}

/// What [`NO_BLOCK`] stands for.
const EMPTY: Block =
    Block { key: NO_KEY, epoch: 0, generation: 0, first: 0, count: 0, length: 0, followers: [NO_BLOCK; 2] };

impl Block {
    #[inline(always)]
    fn range(&self) -> Range<usize> {
        self.first as usize..self.first as usize + usize::from(self.count)
    }
}

/// What a lookup is made with, beside the place.
#[derive(Clone, Copy)]
pub(crate) struct Lookup<'a> {
    /// [`Env::code_epoch`], read before.
    pub(crate) epoch: u64,
    /// Size of code: 16, 32 or 64.
    pub(crate) bits: u32,
    pub(crate) decoder: InstructionDecoder,
    pub(crate) model: &'a CpuModel,
}

/// Decoded code of one processor.
#[derive(Default)]
pub(crate) struct DecodeCache {
    ops: Vec<Op>,
    blocks: Vec<Block>,
    /// Open-addressed hash table of block numbers.
    table: Vec<u32>,
    /// The block looked up last.
    current: u32,
}

impl DecodeCache {
    /// The instructions, and how many bytes they have, of the block that starts at this offset in RAM, decoded
    /// anew if its page has been written.
    #[inline(always)]
    pub(crate) fn block<E: Env>(&mut self, env: &E, offset: u64, lookup: &Lookup<'_>) -> (&[Op], u16) {
        let key = offset << 2 | u64::from(lookup.bits >> 5);
        let followers = self.blocks.get(self.current as usize).map_or([NO_BLOCK; 2], |block| block.followers);
        for number in followers {
            if let Some(block) = self.blocks.get(number as usize)
                && block.key == key
                && block.epoch == lookup.epoch
            {
                self.current = number;
                let (range, length) = (block.range(), block.length);
                return (self.ops.get(range).unwrap_or_default(), length);
            }
        }
        self.find_block(env, key, lookup)
    }

    /// Finds a block in the table, or decodes it, and notes that it follows the current one.
    #[inline(never)]
    fn find_block<E: Env>(&mut self, env: &E, key: u64, lookup: &Lookup<'_>) -> (&[Op], u16) {
        if self.blocks.is_empty()
            || self.ops.len() + BLOCK_LENGTH > CAPACITY
            || self.blocks.len() > ENTRIES / 2
        {
            self.clear();
        }
        let mut slot = hash(key);
        let mut number = NO_BLOCK;
        while let Some(&found) = self.table.get(slot)
            && found != NO_BLOCK
        {
            if self.blocks.get(found as usize).is_some_and(|block| block.key == key) {
                number = found;
                break;
            }
            slot = (slot + 1) & (ENTRIES - 1);
        }
        let known = self.blocks.get_mut(number as usize).filter(|_| number != NO_BLOCK);
        match known {
            Some(block) if block.generation == env.code_generation(key >> 2) => block.epoch = lookup.epoch,
            Some(_) => {
                let block = self.decode_block(env, key, lookup);
                if let Some(entry) = self.blocks.get_mut(number as usize) {
                    *entry = block;
                }
            }
            None => {
                let block = self.decode_block(env, key, lookup);
                number = self.blocks.len() as u32;
                self.blocks.push(block);
                if let Some(entry) = self.table.get_mut(slot) {
                    *entry = number;
                }
            }
        }
        if let Some(block) = self.blocks.get_mut(self.current as usize)
            && !block.followers.contains(&number)
        {
            block.followers = [number, block.followers[0]];
        }
        self.current = number;
        let Some(block) = self.blocks.get(number as usize) else { return Default::default() };
        (self.ops.get(block.range()).unwrap_or_default(), block.length)
    }

    fn clear(&mut self) {
        self.ops.clear();
        // All at once: growing by doubling would end above the capacity.
        self.ops.reserve_exact(CAPACITY);
        self.blocks.clear();
        self.blocks.push(EMPTY);
        self.table.clear();
        self.table.resize(ENTRIES, NO_BLOCK);
        self.current = NO_BLOCK;
    }

    #[cold]
    #[inline(never)]
    fn decode_block<E: Env>(&mut self, env: &E, key: u64, lookup: &Lookup<'_>) -> Block {
        let start = key >> 2;
        // Marked before its bytes are read, so that no write is missed.
        let generation = env.mark_code(start);
        let first = self.ops.len();
        let mut length = 0;
        while self.ops.len() - first < BLOCK_LENGTH {
            let mut bytes = [0; MAX_INSTRUCTION_LENGTH];
            let available = (PAGE - (start & (PAGE - 1)) - length).min(MAX_INSTRUCTION_LENGTH as u64);
            let bytes = &mut bytes[..available as usize];
            if bytes.is_empty() {
                break;
            }
            env.load_bytes(start + length, bytes);
            let Some(op) = lookup.decoder.decode(bytes, lookup.bits, lookup.model) else { break };
            length += u64::from(op.length);
            let ends = op.then.ends_block();
            self.ops.push(op);
            if ends {
                break;
            }
        }
        Block {
            key,
            epoch: lookup.epoch,
            generation,
            first: first as u32,
            count: (self.ops.len() - first) as u16,
            length: length as u16,
            followers: [NO_BLOCK; 2],
        }
    }
}

/// Where in the table the search for a block begins.
#[inline(always)]
const fn hash(key: u64) -> usize {
    /// The golden ratio's fraction in 64 bits.
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    (key.wrapping_mul(MULTIPLIER) >> (64 - ENTRIES.trailing_zeros())) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::CpuModel;
    use crate::testing::TestEnv;

    #[test]
    fn blocks_end_with_transfers_and_pages_but_not_with_conditional_jumps() {
        let env = TestEnv::new(0x3000);
        let model = CpuModel::reference(1);
        let decoder = InstructionDecoder::new(&model);
        let mut cache = DecodeCache::default();
        let mut count = |offset| {
            let lookup = Lookup { epoch: env.code_epoch(), bits: 64, decoder, model: &model };
            cache.block(&env, offset, &lookup).0.len()
        };
        // je +0; nop; ret; nop
        env.put(0x1000, &[0x74, 0, 0x90, 0xc3, 0x90]);
        assert_eq!(count(0x1000), 3);
        assert_eq!(count(0x1002), 2);
        // nop; mov eax, imm32 across the end of the page
        env.put(0x1ffd, &[0x90, 0xb8, 1, 2, 3, 4]);
        assert_eq!(count(0x1ffd), 1);
        assert_eq!(count(0x1ffe), 0);
        // The same place, written: hlt; nop.
        env.put(0x1000, &[0xf4, 0x90]);
        assert_eq!(count(0x1000), 1);
        assert_eq!(count(0x1001), 3);
    }

    #[test]
    fn a_full_cache_starts_anew() {
        let env = TestEnv::new(0x2000);
        let model = CpuModel::reference(1);
        let decoder = InstructionDecoder::new(&model);
        let mut cache = DecodeCache::default();
        for _ in 0..CAPACITY / BLOCK_LENGTH + 2 {
            // Each store makes the block decoded before invalid, which leaves its instructions unused.
            env.put(0x1000, &[0x90]);
            let lookup = Lookup { epoch: env.code_epoch(), bits: 64, decoder, model: &model };
            cache.block(&env, 0x1000, &lookup);
            assert!(cache.ops.len() <= CAPACITY);
        }
        assert!(cache.ops.len() < CAPACITY / 2);
    }
}
