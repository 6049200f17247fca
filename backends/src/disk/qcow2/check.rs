//! A walk through all tables of a qcow2 image before it is used: nothing may lie where something else lies, and what
//! is used must be counted. A guest that writes to an image so checked can change its own data only, however the image
//! was made.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use super::header::{Header, damaged, u32_at, u64_at};

/// Clusters of a file at most: a byte is kept for each while the image is checked.
const MAX_CLUSTERS: u64 = 1 << 28;
/// Bytes of all snapshots' L1 tables together, at most.
const MAX_SNAPSHOT_L1_BYTES: u64 = 256 << 20;
/// Bytes of a snapshot's variable parts, at most.
const MAX_SNAPSHOT_RECORD: u64 = 1 << 20;

/// Table entries: the cluster is used once, so that it may be written in place.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What a cluster of the file is used for.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Use {
    Free,
    /// Header and tables with one user.
    Table,
    /// An L2 table that snapshots may use too.
    SharedTable,
    /// The guest's data, written in place.
    Owned,
    /// Data that is not written in place: of a snapshot's, or compressed.
    Shared,
}

/// A walk through an image's tables.
struct Walk<'a> {
    file: &'a File,
    header: &'a Header,
    uses: Vec<Use>,
    refcount_table: Vec<u64>,
}

/// Checks all that the image in a file of so many bytes refers to. `repair`: counts that a crash of the host left at
/// zero are set right.
///
/// # Errors
/// What is wrong and what to do, to follow "the disk … can't be used: ".
pub(super) fn check(file: &File, file_size: u64, header: &Header, repair: bool) -> Result<(), String> {
    let clusters = file_size.div_ceil(header.cluster_size());
    if clusters > MAX_CLUSTERS {
        return Err(format!(
            "its file has {clusters} clusters, more than Bivisor can check: convert it with `qemu-img convert -O qcow2 -o cluster_size=2M`"
        ));
    }
    let mut walk =
        Walk { file, header, uses: vec![Use::Free; clusters as usize], refcount_table: Vec::new() };
    walk.mark_fixed_tables()?;
    walk.mark_active()?;
    walk.mark_snapshots()?;
    walk.check_counts(repair)
}

impl Walk<'_> {
    fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; length as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match self.file.read_at(&mut bytes[filled..], offset + filled as u64) {
                // The file's last cluster need not be whole.
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("its tables can't be read: {error}")),
            }
        }
        Ok(bytes)
    }

    fn words(&self, offset: u64, count: u64) -> Result<Vec<u64>, String> {
        let bytes = self.read(offset, count * 8)?;
        Ok(bytes.chunks_exact(8).map(|word| u64_at(word, 0)).collect())
    }

    /// Notes a use of the clusters at a range of the file.
    fn mark(&mut self, what: &str, offset: u64, length: u64, new: Use) -> Result<(), String> {
        let size = self.header.cluster_size();
        let end = offset.checked_add(length).map(|end| end.div_ceil(size));
        let Some(range) = end.and_then(|end| self.uses.get_mut((offset / size) as usize..end as usize))
        else {
            return Err(format!(
                "its {what} lies behind its end: the image was perhaps not copied to its end"
            ));
        };
        for old in range {
            let may_share =
                matches!((*old, new), (Use::Shared, Use::Shared) | (Use::SharedTable, Use::SharedTable));
            if *old != Use::Free && !may_share {
                return Err(damaged(&format!("its {what} lies where something else lies")));
            }
            *old = new;
        }
        Ok(())
    }

    /// Whether the file has only a hole there, which reads as zeroes: a hostile image may have many.
    fn is_hole(&self, offset: u64, length: u64) -> bool {
        match rustix::fs::seek(self.file, SeekFrom::Data(offset)) {
            Ok(data) => data >= offset + length,
            Err(error) => error == rustix::io::Errno::NXIO,
        }
    }

    fn mark_fixed_tables(&mut self) -> Result<(), String> {
        let header = self.header;
        let size = header.cluster_size();
        self.mark("header", 0, size, Use::Table)?;
        self.mark("L1 table", header.l1_offset, header.l1_entries * 8, Use::Table)?;
        let length = header.refcount_table_clusters * size;
        self.mark("table of reference counts", header.refcount_table_offset, length, Use::Table)?;
        self.refcount_table = self.words(header.refcount_table_offset, length / 8)?;
        for index in 0..self.refcount_table.len() {
            let block = self.refcount_table[index];
            if block == 0 {
                continue;
            }
            if !block.is_multiple_of(size) {
                return Err(damaged("a block of reference counts is not at the start of a cluster"));
            }
            self.mark("block of reference counts", block, size, Use::Table)?;
        }
        Ok(())
    }

    fn mark_active(&mut self) -> Result<(), String> {
        let entries = self.words(self.header.l1_offset, self.header.l1_entries)?;
        let (used, unused) = entries.split_at(self.header.needed_l1_entries() as usize);
        if unused.iter().any(|&entry| entry != 0) {
            return Err(damaged("it has data behind the end of its disk"));
        }
        for &entry in used.iter().filter(|&&entry| entry & OFFSET != 0) {
            let table = self.table_offset(entry)?;
            let kind = if entry & COPIED != 0 { Use::Table } else { Use::SharedTable };
            if self.uses.get((table >> self.header.cluster_bits) as usize) == Some(&Use::SharedTable) {
                return Err(damaged("two parts of its disk have one L2 table"));
            }
            self.mark("L2 table", table, self.header.cluster_size(), kind)?;
            self.mark_data(table, entry & COPIED != 0)?;
        }
        Ok(())
    }

    fn table_offset(&self, entry: u64) -> Result<u64, String> {
        let offset = entry & OFFSET;
        if entry & !(OFFSET | COPIED) != 0 || !offset.is_multiple_of(self.header.cluster_size()) {
            return Err(damaged("an entry of its L1 table means nothing"));
        }
        Ok(offset)
    }

    /// Notes what an L2 table refers to. `own`: entries may be for writing in place.
    fn mark_data(&mut self, table: u64, own: bool) -> Result<(), String> {
        let size = self.header.cluster_size();
        if self.is_hole(table, size) {
            return Ok(());
        }
        for entry in self.words(table, size / 8)? {
            if entry & COMPRESSED != 0 {
                self.mark_compressed(entry)?;
                continue;
            }
            let offset = entry & OFFSET;
            // Version 3: bit 0 makes the cluster read as zeroes.
            let zero = u64::from(self.header.version == 3);
            if entry & !(OFFSET | COPIED | zero) != 0 || !offset.is_multiple_of(size) {
                return Err(damaged("an entry of an L2 table means nothing"));
            }
            if offset != 0 {
                let kind = if own && entry & COPIED != 0 { Use::Owned } else { Use::Shared };
                // The last cluster of a file may be there in part, but must begin.
                self.mark("data", offset, size, kind)?;
            }
        }
        Ok(())
    }

    /// Compressed data begins anywhere and ends in a sector: the entry has the offset in its lower bits and the
    /// number of sectors, less one, above.
    fn mark_compressed(&mut self, entry: u64) -> Result<(), String> {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        if entry & COPIED != 0 || offset == 0 {
            return Err(damaged("an entry for compressed data means nothing"));
        }
        let end = (offset & !511) + (sectors + 1) * 512;
        // What is behind the file's end is never reached: the sector count is rounded up.
        let end = end.min((self.uses.len() as u64) << self.header.cluster_bits).max(offset + 1);
        self.mark("compressed data", offset, end - offset, Use::Shared)
    }

    fn mark_snapshots(&mut self) -> Result<(), String> {
        let mut at = self.header.snapshots_offset;
        let mut bytes_left = MAX_SNAPSHOT_L1_BYTES;
        let start = at;
        let mut tables = Vec::new();
        for _ in 0..self.header.snapshots {
            let record = self.read(at, 40)?;
            let variable = u64::from(u32_at(&record, 36))
                + u64::from(u32_at(&record, 12) >> 16)
                + u64::from(u32_at(&record, 12) & 0xffff);
            let (offset, length) = (u64_at(&record, 0), u64::from(u32_at(&record, 8)) * 8);
            if variable > MAX_SNAPSHOT_RECORD || length > bytes_left {
                return Err(damaged("a snapshot of it is larger than can be"));
            }
            bytes_left -= length;
            tables.push((offset, length));
            at = at + 40 + variable;
            at = at.next_multiple_of(8);
        }
        if at > start {
            self.mark("list of snapshots", start, at - start, Use::Table)?;
        }
        for (offset, length) in tables {
            if !offset.is_multiple_of(self.header.cluster_size()) {
                return Err(damaged("the L1 table of a snapshot is not at the start of a cluster"));
            }
            self.mark("L1 table of a snapshot", offset, length, Use::Table)?;
            self.mark_snapshot(offset, length / 8)?;
        }
        Ok(())
    }

    fn mark_snapshot(&mut self, l1_offset: u64, entries: u64) -> Result<(), String> {
        for entry in self.words(l1_offset, entries)? {
            if entry & OFFSET == 0 {
                continue;
            }
            let table = self.table_offset(entry)?;
            // Walked before, for another snapshot or the disk itself.
            if self.uses.get((table >> self.header.cluster_bits) as usize) == Some(&Use::SharedTable) {
                continue;
            }
            self.mark("L2 table of a snapshot", table, self.header.cluster_size(), Use::SharedTable)?;
            self.mark_data(table, false)?;
        }
        Ok(())
    }

    /// Compares the reference counts with the uses.
    fn check_counts(&self, repair: bool) -> Result<(), String> {
        let per_block = (self.header.cluster_size() * 8) >> self.header.refcount_order;
        for (number, uses) in self.uses.chunks(per_block as usize).enumerate() {
            if uses.iter().all(|&used| used == Use::Free) {
                continue;
            }
            let block = self.refcount_table.get(number).copied().unwrap_or(0);
            if block == 0 {
                return Err(
                    "it uses clusters that it doesn't count: `qemu-img check -r all` repairs it".into()
                );
            }
            let bytes = self.read(block, self.header.cluster_size())?;
            self.check_block(uses, &bytes, block, repair)?;
        }
        Ok(())
    }

    fn check_block(&self, uses: &[Use], bytes: &[u8], block: u64, repair: bool) -> Result<(), String> {
        for (index, &used) in uses.iter().enumerate() {
            let count = refcount(bytes, index, self.header.refcount_order);
            match used {
                Use::Free => {}
                // A crash of the host may keep a use and lose its count; the use is then the only one.
                Use::Owned | Use::Table if count == 0 && repair => self.set_to_one(block, index)?,
                // Only who writes asks the counts.
                _ if count == 0 && repair => {
                    return Err(
                        "it uses clusters that it doesn't count: `qemu-img check -r all` repairs it".into()
                    );
                }
                Use::Owned if count > 1 && repair => {
                    return Err("it would write to clusters that it counts as shared: `qemu-img check -r all` repairs it".into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn set_to_one(&self, block: u64, index: usize) -> Result<(), String> {
        let order = self.header.refcount_order;
        let bit = index << order;
        let (at, bytes) = match order {
            0..3 => {
                let at = block + bit as u64 / 8;
                let old = self.read(at, 1)?;
                (at, vec![old[0] | 1 << (bit % 8)])
            }
            _ => {
                let mut bytes = vec![0; 1 << (order - 3)];
                if let Some(last) = bytes.last_mut() {
                    *last = 1;
                }
                (block + bit as u64 / 8, bytes)
            }
        };
        self.file
            .write_all_at(&bytes, at)
            .map_err(|error| format!("its reference counts can't be repaired: {error}"))
    }
}

/// A count in a block: fields below a byte's size lie in it from the lowest bit up.
fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    let bit = index << order;
    match order {
        0..3 => u64::from(block[bit / 8] >> (bit % 8)) & ((1 << (1 << order)) - 1),
        _ => block[bit / 8..bit / 8 + (1 << (order - 3))]
            .iter()
            .fold(0, |count, &byte| count << 8 | u64::from(byte)),
    }
}
