//! A guest's disk: its content came with the machine, and what the guest writes is kept in memory until the end.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::DerefMut;

use bivisor_machine::block::{BlockDone, BlockError, BlockOperation, BlockStore};
use bivisor_machine::sync::Mutex;

use crate::bundle::{DiskConfig, Extent};

/// What is written to a piece of this size, in bytes, makes a copy of the piece.
const CHUNK: usize = 16 << 10;
/// Memory for copies is taken in pieces of this size, in bytes.
pub(crate) const SLAB: usize = 2 << 20;
const CHUNKS: usize = SLAB / CHUNK;

/// Memory for copies.
pub(crate) type Slab = Box<dyn DerefMut<Target = [u8]> + Send>;
/// Gives [`SLAB`] bytes of zeros, if there are any.
pub(crate) type Source = fn() -> Option<Slab>;

/// What was written, by the number of the piece.
#[derive(Default)]
struct Copies {
    places: BTreeMap<u64, usize>,
    slabs: Vec<Slab>,
}

impl Copies {
    fn chunk(&mut self, place: usize) -> Option<&mut [u8]> {
        let start = place % CHUNKS * CHUNK;
        self.slabs.get_mut(place / CHUNKS)?.get_mut(start..start + CHUNK)
    }
}

/// A disk.
pub(crate) struct Disk {
    size: u64,
    read_only: bool,
    /// Ascending, and apart from each other.
    extents: Vec<Extent<'static>>,
    copies: Mutex<Copies>,
    source: Source,
}

impl Disk {
    pub(crate) fn new(config: &DiskConfig<'static>, source: Source) -> Self {
        Self {
            size: config.size,
            read_only: config.read_only,
            extents: config.extents.clone(),
            copies: Mutex::default(),
            source,
        }
    }

    /// Reads what came with the machine.
    fn read_base(&self, offset: u64, to: &mut [u8]) {
        to.fill(0);
        let end = offset + to.len() as u64;
        let first = self.extents.partition_point(|extent| extent.end() <= offset);
        for extent in self.extents[first..].iter().take_while(|extent| extent.offset < end) {
            let (start, stop) = (extent.offset.max(offset), extent.end().min(end));
            let from = &extent.bytes[(start - extent.offset) as usize..(stop - extent.offset) as usize];
            to[(start - offset) as usize..(stop - offset) as usize].copy_from_slice(from);
        }
    }

    /// Whether nothing of a piece came with the machine.
    fn is_empty(&self, start: u64) -> bool {
        let first = self.extents.partition_point(|extent| extent.end() <= start);
        self.extents.get(first).is_none_or(|extent| extent.offset >= start + CHUNK as u64)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) {
        let mut copies = self.copies.lock();
        for (at, part) in parts(offset, buffer.len()) {
            let to = &mut buffer[part];
            let (number, within) = (at / CHUNK as u64, (at % CHUNK as u64) as usize);
            let place = copies.places.get(&number).copied();
            match place.and_then(|place| copies.chunk(place)) {
                Some(chunk) => to.copy_from_slice(&chunk[within..within + to.len()]),
                None => self.read_base(at, to),
            }
        }
    }

    /// Writes bytes, or zeros.
    fn write(&self, offset: u64, length: usize, bytes: Option<&[u8]>) -> Result<(), BlockError> {
        let mut copies = self.copies.lock();
        for (at, part) in parts(offset, length) {
            let (number, within) = (at / CHUNK as u64, (at % CHUNK as u64) as usize);
            let known = copies.places.get(&number).copied();
            if known.is_none() && bytes.is_none() && self.is_empty(number * CHUNK as u64) {
                continue;
            }
            let place = known.unwrap_or(copies.places.len());
            if place / CHUNKS == copies.slabs.len() {
                copies.slabs.push((self.source)().ok_or(BlockError::NoSpace)?);
            }
            let chunk = copies.chunk(place).ok_or(BlockError::NoSpace)?;
            if known.is_none() {
                self.read_base(number * CHUNK as u64, chunk);
            }
            let to = &mut chunk[within..within + part.len()];
            match bytes {
                Some(bytes) => to.copy_from_slice(&bytes[part]),
                None => to.fill(0),
            }
            copies.places.insert(number, place);
        }
        Ok(())
    }

    fn check(&self, offset: u64, length: u64, writes: bool) -> Result<(), BlockError> {
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(BlockError::OutOfRange);
        }
        if writes && self.read_only { Err(BlockError::ReadOnly) } else { Ok(()) }
    }
}

/// Cuts a range at the borders of pieces: where each part is on the disk, and where in a buffer.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, core::ops::Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        let at = offset + done as u64;
        let room = CHUNK - (at % CHUNK as u64) as usize;
        let end = done + room.min(length - done);
        let part = done..end;
        done = end;
        (!part.is_empty()).then_some((at, part))
    })
}

impl BlockStore for Disk {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn can_discard(&self) -> bool {
        false
    }
    fn submit(&self, operation: BlockOperation, done: BlockDone) {
        match operation {
            BlockOperation::Read { offset, mut buffer } => {
                let result = self.check(offset, buffer.len() as u64, false);
                if result.is_ok() {
                    self.read(offset, &mut buffer);
                }
                done(result, buffer);
            }
            BlockOperation::Write { offset, buffer } => {
                let result = self.check(offset, buffer.len() as u64, true);
                done(result.and_then(|()| self.write(offset, buffer.len(), Some(&buffer))), buffer);
            }
            BlockOperation::WriteZeroes { offset, length, .. } => {
                let result = self.check(offset, length, true);
                done(result.and_then(|()| self.write(offset, length as usize, None)), Vec::new());
            }
            BlockOperation::Flush => done(Ok(()), Vec::new()),
            BlockOperation::Discard { .. } => done(Err(BlockError::Unsupported), Vec::new()),
        }
    }
    fn drain(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::borrow::Cow;
    use alloc::string::String;
    use alloc::sync::Arc;
    use alloc::vec;

    fn memory() -> Option<Slab> {
        Some(Box::new(vec![0; SLAB]))
    }

    fn disk(source: Source, read_only: bool) -> Disk {
        let extent = |offset, bytes: &'static [u8]| Extent { offset, bytes: Cow::Borrowed(bytes) };
        let extents = vec![extent(512, &[1; 1024]), extent(CHUNK as u64 - 512, &[2; 1024])];
        Disk::new(&DiskConfig { size: 64 << 20, read_only, serial: String::new(), extents }, source)
    }

    fn ask(disk: &Disk, operation: BlockOperation) -> (Result<(), BlockError>, Vec<u8>) {
        let answer = Arc::new(Mutex::new(None));
        let place = answer.clone();
        disk.submit(operation, Box::new(move |result, buffer| *place.lock() = Some((result, buffer))));
        answer.lock().take().unwrap()
    }
    fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
        let (result, buffer) = ask(disk, BlockOperation::Read { offset, buffer: vec![9; length] });
        assert_eq!(result, Ok(()));
        buffer
    }
    fn write(disk: &Disk, offset: u64, buffer: Vec<u8>) -> Result<(), BlockError> {
        ask(disk, BlockOperation::Write { offset, buffer }).0
    }

    #[test]
    fn what_came_along_is_read_until_it_is_written() {
        let disk = disk(memory, false);
        let before = read(&disk, 0, 2 * CHUNK);
        assert_eq!((&before[..512], &before[512..1536]), (&[0; 512][..], &[1; 1024][..]));
        assert!(before[CHUNK - 512..CHUNK + 512].iter().all(|byte| *byte == 2));
        assert!(before[1536..CHUNK - 512].iter().chain(&before[CHUNK + 512..]).all(|byte| *byte == 0));
        write(&disk, 1024, vec![7; CHUNK]).unwrap();
        let mut expected = before.clone();
        expected[1024..1024 + CHUNK].fill(7);
        assert_eq!(read(&disk, 0, 2 * CHUNK), expected);
        let zeros = BlockOperation::WriteZeroes { offset: 512, length: 1024, unmap: true };
        ask(&disk, zeros).0.unwrap();
        expected[512..1536].fill(0);
        assert_eq!(read(&disk, 512, CHUNK), expected[512..512 + CHUNK]);
    }

    #[test]
    fn zeros_where_nothing_is_cost_nothing() {
        let disk = disk(|| None, false);
        let zeros = |offset, length| BlockOperation::WriteZeroes { offset, length, unmap: false };
        assert_eq!(ask(&disk, zeros(2 * CHUNK as u64, 32 << 20)).0, Ok(()));
        assert_eq!(ask(&disk, zeros(0, 512)).0, Err(BlockError::NoSpace));
        assert_eq!(read(&disk, 512, 512), [1; 512]);
    }

    #[test]
    fn many_pieces_stay_apart() {
        let disk = disk(memory, false);
        for number in 0..300u64 {
            write(&disk, number * CHUNK as u64, vec![number as u8; 512]).unwrap();
        }
        assert!((0..300u64).all(|number| read(&disk, number * CHUNK as u64, 512) == [number as u8; 512]));
        assert_eq!(disk.copies.lock().slabs.len(), 300usize.div_ceil(CHUNKS));
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let small = disk(memory, true);
        assert_eq!(write(&small, 0, vec![0; 512]), Err(BlockError::ReadOnly));
        assert_eq!(write(&disk(memory, false), (64 << 20) - 512, vec![0; 1024]), Err(BlockError::OutOfRange));
        let (result, _) = ask(&small, BlockOperation::Read { offset: u64::MAX - 511, buffer: vec![0; 512] });
        assert_eq!(result, Err(BlockError::OutOfRange));
    }
}
