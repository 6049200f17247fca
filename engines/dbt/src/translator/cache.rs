//! Translated blocks: where they stand, how they are found, linked and dropped.

use rustc_hash::FxHashMap;

use super::block::{SharedCode, Translation};
use super::block_index::BlockIndex;
use super::context::{Context, JUMP_PAGES, JumpEntry, LINKS, jump_index};
use super::key::Key;
use super::shared_code::{self, Parts};
use super::site::{FaultPoint, Site, SiteKind};
use crate::code_memory::CodeMemory;
use crate::code_tracker;

/// Bytes of host code at most; when they are used up, everything is dropped.
const CODE_SIZE: usize = 128 << 20;
/// Blocks at most.
const MAX_BLOCKS: usize = BlockIndex::CAPACITY;
/// Entries of the lists of jumps at most: jumps whose targets change with the address space are listed again and again.
const MAX_INCOMING: usize = MAX_BLOCKS * 8;
/// No block, or nothing that follows in a list.
const NONE: u32 = u32::MAX;
/// More than one place.
const MANY: u32 = u32::MAX - 1;
/// Blocks that there is room for from the start. Memory that is never used costs nothing; tables that grow would leave
/// holes behind, and take their time.
const ROOM_BLOCKS: usize = MAX_BLOCKS / 2;
/// The same of sites.
const ROOM_SITES: usize = ROOM_BLOCKS * 8;

/// A translated block.
pub struct Block {
    /// Offset in RAM of its first byte.
    pub offset: u64,
    /// Its mode.
    pub key: Key,
    /// Where direct jumps backwards enter: offset in the code memory.
    pub loop_entry: u32,
    /// Where direct jumps forwards enter.
    pub entry: u32,
    /// Where lookups enter.
    pub lookup_entry: u32,
    /// Where links enter.
    link_entry: u32,
    /// Vector registers are used.
    pub vectors: bool,
    /// x87 registers are used.
    pub x87: bool,
    /// Number of the second page of RAM, if its one instruction crosses into it; else [`NONE`].
    second: u32,
    /// Lines of its page that it depends on.
    lines: u64,
    start: u32,
    /// First and number of its fault points.
    fault_points: (u32, u32),
    /// First of the list of jumps that are linked to this block, in [`Cache::incoming`].
    incoming: u32,
    /// Where the jump cache may have it: [`NONE`], a place, or [`MANY`].
    remembered: u32,
}

impl Block {
    /// Offset in RAM of the second page, if its one instruction crosses into it.
    pub fn second(&self) -> Option<u64> {
        (self.second != NONE).then_some(u64::from(self.second) << 12)
    }
}

/// A jump that is linked to a block, in the list of that block's.
struct Incoming {
    site: u32,
    next: u32,
}

/// A page that blocks were translated from.
#[derive(Default)]
struct Page {
    blocks: Vec<u32>,
}

/// The translated blocks of one virtual processor.
pub struct Cache {
    code: CodeMemory,
    parts: Parts,
    /// End of the shared code.
    first_block_at: usize,
    blocks: Vec<Block>,
    sites: Vec<Site>,
    fault_points: Vec<FaultPoint>,
    index: BlockIndex,
    incoming: Vec<Incoming>,
    pages: FxHashMap<u64, Page>,
    links: u32,
    /// The block that each link was last set to: its list has the link.
    link_targets: Vec<u32>,
    /// Offset in RAM of the instruction that each slot is for.
    slots: Vec<u64>,
}

fn index_key(offset: u64, key: Key) -> u64 {
    offset | u64::from(key.bits()) << 48
}

impl Cache {
    /// An empty cache.
    ///
    /// # Errors
    /// The host gives no memory for code.
    pub fn new() -> std::io::Result<Self> {
        let mut code = CodeMemory::new(CODE_SIZE)?;
        let (shared, parts) = shared_code::emit();
        code.append(&shared).ok_or_else(|| std::io::Error::other("no room for the shared code"))?;
        let first_block_at = code.next_offset();
        Ok(Self {
            code,
            parts,
            first_block_at,
            blocks: Vec::with_capacity(ROOM_BLOCKS),
            sites: Vec::with_capacity(ROOM_SITES),
            fault_points: Vec::with_capacity(ROOM_BLOCKS * 4),
            index: BlockIndex::new(),
            incoming: Vec::with_capacity(MAX_INCOMING),
            pages: FxHashMap::default(),
            links: 0,
            link_targets: Vec::with_capacity(LINKS),
            slots: Vec::new(),
        })
    }

    /// The ways in.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }
    /// The code that blocks refer to.
    pub fn shared(&self) -> SharedCode {
        self.parts.blocks
    }
    /// Address of an offset in the code memory.
    pub fn address(&self, offset: u32) -> u64 {
        self.code.address(offset as usize)
    }
    /// First address of blocks, and the address behind the last.
    pub fn range(&self) -> (u64, u64) {
        (self.code.address(self.first_block_at), self.code.address(CODE_SIZE))
    }
    /// Address and size of the code that all blocks share.
    pub fn shared_range(&self) -> (u64, u64) {
        (self.code.address(0), self.first_block_at as u64)
    }
    /// Where the next block's code will stand.
    pub fn next_start(&self) -> usize {
        self.code.next_offset()
    }
    /// Where the code of the next block that is rarely executed will stand.
    pub fn next_cold_start(&self) -> usize {
        self.code.next_apart()
    }
    /// Number of the next site.
    pub fn next_site(&self) -> u32 {
        self.sites.len() as u32
    }
    /// Number of the next block.
    pub fn next_block(&self) -> u32 {
        self.blocks.len() as u32
    }
    /// Number of the next link.
    pub fn next_link(&self) -> u32 {
        self.links
    }
    /// Offsets in RAM of the instructions that slots are for.
    pub fn slots(&self) -> &[u64] {
        &self.slots
    }
    /// A site by its number.
    pub fn site(&self, number: u32) -> Option<Site> {
        self.sites.get(number as usize).copied()
    }
    /// A block by its number.
    pub fn block(&self, number: u32) -> Option<&Block> {
        self.blocks.get(number as usize)
    }
    /// Whether another block may not fit.
    pub fn is_full(&self) -> bool {
        // The largest block by far is smaller.
        self.code.free() < 64 << 10
            || self.blocks.len() >= MAX_BLOCKS
            || self.links as usize + 64 > LINKS
            || self.incoming.len() >= MAX_INCOMING
    }
    /// The block at this place.
    pub fn find(&self, offset: u64, key: Key) -> Option<u32> {
        self.index.find(index_key(offset, key), |number| {
            self.blocks.get(number as usize).is_some_and(|block| block.offset == offset && block.key == key)
        })
    }

    /// Takes in a translation made for [`Cache::next_start`], [`Cache::next_site`], [`Cache::next_block`] and
    /// [`Cache::next_link`].
    pub fn insert(
        &mut self,
        offset: u64,
        key: Key,
        second: Option<u64>,
        translation: Translation,
        context: &mut Context,
    ) -> Option<u32> {
        let start = self.code.next_offset() as u32;
        let (hot, cold) = translation.code.split_at(translation.hot);
        self.code.append(hot)?;
        if !self.code.append_apart(cold) {
            return None;
        }
        let number = self.blocks.len() as u32;
        self.blocks.push(Block {
            offset,
            key,
            loop_entry: start + translation.entries.backwards as u32,
            entry: start + translation.entries.forwards as u32,
            lookup_entry: start + translation.entries.lookup as u32,
            link_entry: start + translation.entries.link as u32,
            vectors: translation.vectors,
            x87: translation.x87,
            second: second.map_or(NONE, |page| (page >> 12) as u32),
            lines: translation.lines,
            start,
            fault_points: (self.fault_points.len() as u32, translation.fault_points.len() as u32),
            incoming: NONE,
            remembered: NONE,
        });
        for site in &translation.sites {
            if let SiteKind::Link { link, stub, .. } = site.kind {
                context.links[link as usize % LINKS] = self.code.address(stub as usize);
            }
        }
        self.links += translation.links;
        self.link_targets.resize(self.links as usize, NONE);
        self.slots.extend(translation.slots.iter().map(|&place| (offset & !0xfff) + u64::from(place)));
        self.sites.extend(translation.sites);
        self.fault_points.extend(translation.fault_points);
        if let Some(other) = self.find(offset, key) {
            self.index.remove(index_key(offset, key), other);
        }
        self.index.insert(index_key(offset, key), number);
        for page in std::iter::once(offset & !0xfff).chain(second) {
            self.pages.entry(page).or_default().blocks.push(number);
        }
        Some(number)
    }

    /// Makes the jump at a site go to a block.
    pub fn link(&mut self, site: u32, target: u32, context: &mut Context) {
        let Some(kind) = self.sites.get(site as usize).map(|site| site.kind) else { return };
        let Some(block) = self.blocks.get_mut(target as usize) else { return };
        let listed = match kind {
            SiteKind::Link { link, .. } => {
                let last = self.link_targets.get_mut(link as usize);
                last.is_some_and(|last| std::mem::replace(last, target) == target)
            }
            _ => false,
        };
        if !listed {
            self.incoming.push(Incoming { site, next: block.incoming });
            block.incoming = self.incoming.len() as u32 - 1;
        }
        match kind {
            SiteKind::Jump { patch, backwards, .. } => {
                let entry = if backwards { block.loop_entry } else { block.entry };
                self.patch(patch, entry);
            }
            SiteKind::Stack { patch, .. } | SiteKind::Window { patch, .. } => {
                let entry = block.entry;
                self.patch(patch, entry);
            }
            SiteKind::Link { link, .. } => {
                context.links[link as usize % LINKS] = self.code.address(block.link_entry as usize);
            }
            _ => {}
        }
    }

    /// Makes the jump at a site leave again.
    pub fn unlink(&mut self, site: u32, context: &mut Context) {
        match self.sites.get(site as usize).map(|site| site.kind) {
            Some(
                SiteKind::Jump { patch, stub, .. }
                | SiteKind::Stack { patch, stub, .. }
                | SiteKind::Window { patch, stub, .. },
            ) => self.patch(patch, stub),
            Some(SiteKind::Link { link, stub, .. }) => {
                context.links[link as usize % LINKS] = self.code.address(stub as usize);
            }
            _ => {}
        }
    }

    fn patch(&mut self, place: u32, target: u32) {
        let relative = target.wrapping_sub(place).wrapping_sub(4);
        self.code.patch(place as usize, relative.to_le_bytes());
    }

    /// Drops the blocks of a page that depend on these lines of it, see [`Translation::lines`]. Whoever is inside of one
    /// may run to its end. Whether there were any.
    pub fn drop_lines(&mut self, page: u64, lines: u64, context: &mut Context) -> bool {
        let Some(entry) = self.pages.get_mut(&page) else { return false };
        let mut dropped = Vec::new();
        entry.blocks.retain(|&number| {
            let touched = self.blocks.get(number as usize).is_none_or(|block| {
                // In the second page it depends on the first bytes only.
                let own = if block.offset & !0xfff == page { block.lines } else { 1 };
                own & lines != 0
            });
            if touched {
                dropped.push(number);
            }
            !touched
        });
        if entry.blocks.is_empty() {
            self.pages.remove(&page);
        }
        for &number in &dropped {
            self.drop_block(number, context);
        }
        !dropped.is_empty()
    }

    /// Offsets in RAM of the blocks that begin in these lines of a page and that jumps backwards lead to.
    pub fn loop_heads(&self, page: u64, lines: u64) -> impl Iterator<Item = u64> {
        let blocks = self.pages.get(&page).map_or(&[][..], |page| &page.blocks);
        let blocks = blocks.iter().filter_map(|&number| self.blocks.get(number as usize));
        let inside = move |block: &&Block| {
            block.offset & !0xfff == page && code_tracker::lines(block.offset, 1) & lines != 0
        };
        blocks.filter(inside).filter(|block| self.is_loop_head(block)).map(|block| block.offset)
    }

    fn is_loop_head(&self, block: &Block) -> bool {
        let mut incoming = self.incoming.get(block.incoming as usize);
        while let Some(&Incoming { site, next }) = incoming {
            let kind = self.sites.get(site as usize).map(|site| site.kind);
            if matches!(kind, Some(SiteKind::Jump { backwards: true, .. })) {
                return true;
            }
            incoming = self.incoming.get(next as usize);
        }
        false
    }

    /// Notes that the jump cache has a block at this place.
    pub fn remembered(&mut self, number: u32, place: usize) {
        let Some(block) = self.blocks.get_mut(number as usize) else { return };
        block.remembered = match block.remembered {
            NONE => place as u32,
            known if known == place as u32 => known,
            _ => MANY,
        };
    }

    fn drop_block(&mut self, number: u32, context: &mut Context) {
        let Some(block) = self.blocks.get_mut(number as usize) else { return };
        let key = index_key(block.offset, block.key);
        // The jump cache is indexed by more bits of the linear address than lie within a page.
        let host = self.code.address(block.lookup_entry as usize);
        let in_page = block.offset & 0xfff;
        let mut forget = |place: usize| {
            if context.jumps[place].host == host {
                context.jumps[place] = JumpEntry::EMPTY;
            }
        };
        match block.remembered {
            NONE => {}
            MANY => (0..JUMP_PAGES).for_each(|page| forget(jump_index(in_page | page << 12))),
            place => forget(place as usize),
        }
        let mut next = std::mem::replace(&mut block.incoming, NONE);
        while let Some(&Incoming { site, next: behind }) = self.incoming.get(next as usize) {
            self.unlink(site, context);
            if let Some(&SiteKind::Link { link, .. }) = self.sites.get(site as usize).map(|site| &site.kind)
                && let Some(target) = self.link_targets.get_mut(link as usize)
                && *target == number
            {
                *target = NONE;
            }
            next = behind;
        }
        self.index.remove(key, number);
    }

    /// All slots are free again. The blocks that use some must have been dropped.
    pub fn free_slots(&mut self) {
        self.slots.clear();
    }

    /// Drops everything. No code may be executing.
    pub fn clear(&mut self) {
        self.code.truncate(self.first_block_at);
        self.blocks.clear();
        self.sites.clear();
        self.fault_points.clear();
        self.index.clear();
        self.incoming.clear();
        self.pages.clear();
        self.links = 0;
        self.link_targets.clear();
        self.slots.clear();
    }

    /// The block and the guest's instruction that the host was executing at an address.
    pub fn fault_point(&self, address: u64) -> Option<(u32, FaultPoint)> {
        let offset = self.code.offset_of(address)? as u32;
        let number = self.blocks.partition_point(|block| block.start <= offset).checked_sub(1)?;
        let block = &self.blocks[number];
        let (first, count) = (block.fault_points.0 as usize, block.fault_points.1 as usize);
        let points = self.fault_points.get(first..first + count)?;
        let point = points.iter().find(|point| block.start + point.host == offset)?;
        Some((number as u32, *point))
    }
}
