//! The decode cache: straight-line runs of decoded instructions ("blocks"), keyed by where their bytes stand in RAM
//! and by the size of code, so that every address space shares them.

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
/// Entries of the table of blocks, a power of two.
const ENTRIES: usize = 1 << 16;
/// Most instructions of a block.
const BLOCK_LENGTH: usize = 32;
/// A key that no block has: code has no size of 4 × 32 bits.
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
}

const NO_BLOCK: Block = Block { key: NO_KEY, epoch: 0, generation: 0, first: 0, count: 0, length: 0 };

impl Block {
    #[inline(always)]
    fn range(&self) -> Range<usize> {
        self.first as usize..self.first as usize + usize::from(self.count)
    }
}

/// Decoded code of one processor.
#[derive(Default)]
pub(crate) struct DecodeCache {
    ops: Vec<Op>,
    blocks: Vec<Block>,
}

impl DecodeCache {
    /// The instructions, and how many bytes they have, of the block that starts at this offset in RAM, as code of `bits`, decoded anew if its page has been written.
    /// `epoch`: [`Env::code_epoch`], read before.
    #[inline(always)]
    pub(crate) fn block<E: Env>(
        &mut self,
        env: &E,
        epoch: u64,
        offset: u64,
        bits: u32,
        decoder: InstructionDecoder,
        model: &CpuModel,
    ) -> (&[Op], u16) {
        let key = offset << 2 | u64::from(bits >> 5);
        if let Some(block) = self.blocks.get_mut(slot(key))
            && block.key == key
        {
            let unchanged = block.epoch == epoch || block.generation == env.code_generation(offset);
            if unchanged {
                block.epoch = epoch;
                let (range, length) = (block.range(), block.length);
                return (self.ops.get(range).unwrap_or_default(), length);
            }
        }
        let block = self.decode_block(env, epoch, key, bits, decoder, model);
        (self.ops.get(block.range()).unwrap_or_default(), block.length)
    }

    #[cold]
    #[inline(never)]
    fn decode_block<E: Env>(
        &mut self,
        env: &E,
        epoch: u64,
        key: u64,
        bits: u32,
        decoder: InstructionDecoder,
        model: &CpuModel,
    ) -> Block {
        if self.blocks.is_empty() || self.ops.len() + BLOCK_LENGTH > CAPACITY {
            self.ops.clear();
            self.blocks.clear();
            self.blocks.resize(ENTRIES, NO_BLOCK);
        }
        let start = key >> 2;
        // Marked before its bytes are read, so that no write is missed.
        let generation = env.mark_code(start);
        let first = self.ops.len();
        let mut length = 0;
        while self.ops.len() - first < BLOCK_LENGTH {
            let offset = start + length;
            let mut bytes = [0; MAX_INSTRUCTION_LENGTH];
            let available = (PAGE - (start & (PAGE - 1)) - length).min(MAX_INSTRUCTION_LENGTH as u64);
            let bytes = &mut bytes[..available as usize];
            if bytes.is_empty() {
                break;
            }
            env.load_bytes(offset, bytes);
            let Some(op) = decoder.decode(bytes, bits, model) else { break };
            length += u64::from(op.length);
            let ends = op.ends_block;
            self.ops.push(op);
            if ends {
                break;
            }
        }
        let block = Block {
            key,
            epoch,
            generation,
            first: first as u32,
            count: (self.ops.len() - first) as u16,
            length: length as u16,
        };
        if let Some(entry) = self.blocks.get_mut(slot(key)) {
            *entry = block;
        }
        block
    }
}

/// Where in the table a block is kept.
#[inline(always)]
const fn slot(key: u64) -> usize {
    (key ^ key >> 16 ^ key >> 31) as usize & (ENTRIES - 1)
}
