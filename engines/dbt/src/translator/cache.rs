//! Translated blocks: where they stand, how they are found, linked and dropped.

use rustc_hash::FxHashMap;

use super::block::{SharedCode, Translation};
use super::block_index::BlockIndex;
use super::context::{Context, JUMP_PAGES, JumpEntry, LINKS, jump_index};
use super::key::Key;
use super::shared_code::{self, Parts};
use super::site::{Base, FaultPoint, Packed, Site, SiteKind};
use crate::code_memory::CodeMemory;
use crate::code_tracker;

/// Bytes of host code at most; when they are used up, everything is dropped. A compiler of C alone needs some 80 MiB: with half
/// of that it is translated again and again.
const CODE_SIZE: usize = 96 << 20;
/// Bytes of that for what is often executed: as much as goes with the rest.
const HOT_SIZE: usize = CODE_SIZE / 32 * 23;
/// Blocks at most.
const MAX_BLOCKS: usize = BlockIndex::CAPACITY;
/// Entries of the lists of jumps at most.
const MAX_JUMPS: usize = MAX_BLOCKS * 4;
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
    /// Where its code begins: lookups enter there.
    pub lookup_entry: u32,
    /// Where its code that is rarely executed begins.
    cold: u32,
    /// Where links enter, from [`Block::lookup_entry`].
    link_entry: u16,
    /// Number of its fault points.
    fault_points: u16,
    /// The first of them.
    first_fault_point: u32,
    /// Number of its first link.
    first_link: u32,
    /// Vector registers are used.
    pub vectors: bool,
    /// x87 registers are used.
    pub x87: bool,
    /// Number of the second page of RAM, if its one instruction crosses into it; else [`NONE`].
    second: u32,
    /// Lines of its page that it depends on.
    lines: u64,
    /// First of the list of jumps within the page that lead to this block, in [`Cache::jumps`].
    jumps: u32,
    /// First of the list of links that were last set to this block, in [`Cache::links`].
    links: u32,
    /// Where the jump cache may have it: [`NONE`], a place, or [`MANY`].
    remembered: u32,
}

impl Block {
    /// Offset in RAM of the second page, if its one instruction crosses into it.
    pub fn second(&self) -> Option<u64> {
        (self.second != NONE).then_some(u64::from(self.second) << 12)
    }

    fn base(&self) -> Base {
        let guest = (self.offset & 0xfff) as u16;
        Base { guest, start: self.lookup_entry, cold: self.cold, first_link: self.first_link }
    }
}

const _: () = assert!(size_of::<Block>() == 64);

/// A jump that leads to a block, in the list of that block's or of those that are free.
struct Jump {
    site: u32,
    next: u32,
}

/// A jump between pages.
struct Link {
    /// The code that leaves.
    stub: u32,
    /// The block that it was last set to, whose list it is in.
    target: u32,
    previous: u32,
    next: u32,
}

impl Link {
    const UNSET: Self = Self { stub: NONE, target: NONE, previous: NONE, next: NONE };
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
    sites: Vec<Packed>,
    fault_points: Vec<FaultPoint>,
    index: BlockIndex,
    jumps: Vec<Jump>,
    /// First of the list of those that are free.
    free_jumps: u32,
    links: Vec<Link>,
    pages: FxHashMap<u64, Page>,
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
        let mut code = CodeMemory::new(CODE_SIZE, HOT_SIZE)?;
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
            jumps: Vec::with_capacity(MAX_JUMPS),
            free_jumps: NONE,
            links: Vec::with_capacity(LINKS),
            pages: FxHashMap::default(),
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
        self.links.len() as u32
    }
    /// Offsets in RAM of the instructions that slots are for.
    pub fn slots(&self) -> &[u64] {
        &self.slots
    }
    /// A site by its number.
    pub fn site(&self, number: u32) -> Option<Site> {
        let site = self.sites.get(number as usize)?;
        Some(site.unpack(self.blocks.get(site.block() as usize)?.base()))
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
            || self.links.len() + 64 > LINKS
            || self.jumps.len() >= MAX_JUMPS
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
        let (start, cold_start) = (self.code.next_offset() as u32, self.code.next_apart() as u32);
        let entries = &translation.entries;
        let block = Block {
            offset,
            key,
            loop_entry: start + entries.backwards as u32,
            entry: start + entries.forwards as u32,
            lookup_entry: start,
            cold: cold_start,
            link_entry: entries.link as u16,
            fault_points: u16::try_from(translation.fault_points.len()).ok()?,
            first_fault_point: self.fault_points.len() as u32,
            first_link: self.links.len() as u32,
            vectors: translation.vectors,
            x87: translation.x87,
            second: second.map_or(NONE, |page| (page >> 12) as u32),
            lines: translation.lines,
            jumps: NONE,
            links: NONE,
            remembered: NONE,
        };
        let first_site = self.sites.len();
        let base = block.base();
        self.sites.extend(translation.sites.iter().map_while(|site| Packed::new(site, base)));
        let (hot, cold) = translation.code.split_at(translation.hot);
        let packed = self.sites.len() - first_site == translation.sites.len();
        if !packed || self.code.append(hot).is_none() || !self.code.append_apart(cold) {
            self.sites.truncate(first_site);
            return None;
        }
        let number = self.blocks.len() as u32;
        self.blocks.push(block);
        let links = self.links.len() + translation.links as usize;
        self.links.resize_with(links, || Link::UNSET);
        for site in &translation.sites {
            if let SiteKind::Link { link, stub, .. } = site.kind
                && let Some(entry) = self.links.get_mut(link as usize)
            {
                context.links[link as usize % LINKS] = self.code.address(stub as usize);
                entry.stub = stub;
            }
        }
        self.slots.extend(translation.slots.iter().map(|&place| (offset & !0xfff) + u64::from(place)));
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
        let Some(kind) = self.site(site).map(|site| site.kind) else { return };
        let Some(block) = self.blocks.get_mut(target as usize) else { return };
        let (place, entry) = match kind {
            SiteKind::Jump { patch, backwards: true, .. } => (patch, block.loop_entry),
            SiteKind::Jump { patch, .. } | SiteKind::Stack { patch, .. } | SiteKind::Window { patch, .. } => {
                (patch, block.entry)
            }
            SiteKind::Link { link, .. } => {
                let entry = block.lookup_entry + u32::from(block.link_entry);
                context.links[link as usize % LINKS] = self.code.address(entry as usize);
                self.list_link(link, target);
                return;
            }
            _ => return,
        };
        let entry_of_list = Jump { site, next: block.jumps };
        match self.jumps.get_mut(self.free_jumps as usize) {
            Some(free) => {
                block.jumps = std::mem::replace(&mut self.free_jumps, free.next);
                *free = entry_of_list;
            }
            None => {
                block.jumps = self.jumps.len() as u32;
                self.jumps.push(entry_of_list);
            }
        }
        self.patch(place, entry);
    }

    /// Puts a link into the list of a block's, and takes it out of the one where it is.
    fn list_link(&mut self, number: u32, target: u32) {
        let Some(&Link { target: last, previous, next, .. }) = self.links.get(number as usize) else {
            return;
        };
        if last == target {
            return;
        }
        if let Some(link) = self.links.get_mut(next as usize) {
            link.previous = previous;
        }
        if let Some(link) = self.links.get_mut(previous as usize) {
            link.next = next;
        } else if let Some(block) = self.blocks.get_mut(last as usize) {
            block.links = next;
        }
        let Some(block) = self.blocks.get_mut(target as usize) else { return };
        let next = std::mem::replace(&mut block.links, number);
        if let Some(link) = self.links.get_mut(next as usize) {
            link.previous = number;
        }
        let link = &mut self.links[number as usize];
        (link.target, link.previous, link.next) = (target, NONE, next);
    }

    /// Makes a link leave again.
    pub fn unlink(&self, link: u32, context: &mut Context) {
        if let Some(Link { stub, .. }) = self.links.get(link as usize) {
            context.links[link as usize % LINKS] = self.code.address(*stub as usize);
        }
    }

    /// Makes the jump at a site leave again.
    fn unlink_jump(&mut self, site: u32) {
        if let Some(
            SiteKind::Jump { patch, stub, .. }
            | SiteKind::Stack { patch, stub, .. }
            | SiteKind::Window { patch, stub, .. },
        ) = self.site(site).map(|site| site.kind)
        {
            self.patch(patch, stub);
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
        let mut jump = self.jumps.get(block.jumps as usize);
        while let Some(&Jump { site, next }) = jump {
            if matches!(self.site(site).map(|site| site.kind), Some(SiteKind::Jump { backwards: true, .. })) {
                return true;
            }
            jump = self.jumps.get(next as usize);
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
        let mut jump = std::mem::replace(&mut block.jumps, NONE);
        let mut link = std::mem::replace(&mut block.links, NONE);
        while let Some(Jump { site, next }) = self.jumps.get_mut(jump as usize) {
            let site = *site;
            let free = std::mem::replace(&mut self.free_jumps, jump);
            jump = std::mem::replace(next, free);
            self.unlink_jump(site);
        }
        while let Some(entry) = self.links.get_mut(link as usize) {
            let Link { stub, next, .. } = *entry;
            *entry = Link { stub, ..Link::UNSET };
            context.links[link as usize % LINKS] = self.code.address(stub as usize);
            link = next;
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
        self.jumps.clear();
        self.free_jumps = NONE;
        self.links.clear();
        self.pages.clear();
        self.slots.clear();
    }

    /// The block and the guest's instruction that the host was executing at an address.
    pub fn fault_point(&self, address: u64) -> Option<(u32, FaultPoint)> {
        let offset = self.code.offset_of(address)? as u32;
        let number = self.blocks.partition_point(|block| block.lookup_entry <= offset).checked_sub(1)?;
        let block = &self.blocks[number];
        let first = block.first_fault_point as usize;
        let points = self.fault_points.get(first..first + usize::from(block.fault_points))?;
        let point = points.iter().find(|point| block.lookup_entry + u32::from(point.host) == offset)?;
        Some((number as u32, *point))
    }
}
