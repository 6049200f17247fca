//! What a guest writes in `snapshot` mode: kept in a file without a name, gone at the end.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

use super::content::{Content, read_cached};

/// The piece of the disk that is either in the overlay or not.
const UNIT: u64 = 4096;
/// Units whose bits are kept together, and only once one of them is there: a disk may seem far larger than it is.
const CHUNK: u64 = 64 * 4096;

/// A content that is never written, under a file that takes all changes.
pub(super) struct Overlay {
    below: Box<dyn Content>,
    file: File,
    /// A bit for each unit that is in `file`, by chunks.
    present: Vec<OnceLock<Box<[AtomicU64]>>>,
}

impl Overlay {
    /// An overlay in an empty file.
    pub(super) fn new(below: Box<dyn Content>, file: File) -> io::Result<Self> {
        let size = below.size();
        file.set_len(size)?;
        let present = (0..size.div_ceil(UNIT * CHUNK)).map(|_| OnceLock::new()).collect();
        Ok(Self { below, file, present })
    }

    fn is_present(&self, unit: u64) -> bool {
        // Changes of one unit don't run at once with anything else there; the store's lock orders them.
        self.present[(unit / CHUNK) as usize].get().is_some_and(|words| {
            words[(unit % CHUNK / 64) as usize].load(Ordering::Relaxed) & 1 << (unit % 64) != 0
        })
    }

    fn set_present(&self, unit: u64) {
        let words = self.present[(unit / CHUNK) as usize]
            .get_or_init(|| (0..CHUNK / 64).map(|_| AtomicU64::new(0)).collect());
        words[(unit % CHUNK / 64) as usize].fetch_or(1 << (unit % 64), Ordering::Relaxed);
    }

    /// Copies a unit from below that is about to be changed in part.
    fn copy_up(&self, unit: u64) -> io::Result<()> {
        if self.is_present(unit) {
            return Ok(());
        }
        let start = unit * UNIT;
        let mut bytes = vec![0; UNIT.min(self.size() - start) as usize];
        self.below.read(start, &mut bytes)?;
        self.file.write_all_at(&bytes, start)?;
        self.set_present(unit);
        Ok(())
    }

    /// Copies up the units at the range's ends that it covers in part; returns the units that it covers.
    fn prepare(&self, offset: u64, length: u64) -> io::Result<std::ops::Range<u64>> {
        let end = offset + length;
        if !offset.is_multiple_of(UNIT) {
            self.copy_up(offset / UNIT)?;
        }
        if !end.is_multiple_of(UNIT) && end != self.size() {
            self.copy_up(end / UNIT)?;
        }
        Ok(offset / UNIT..end.div_ceil(UNIT))
    }
}

impl Content for Overlay {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        let (mut at, mut rest) = (offset, buffer);
        while at < end {
            let present = self.is_present(at / UNIT);
            let mut stop = (at / UNIT + 1) * UNIT;
            while stop < end && self.is_present(stop / UNIT) == present {
                stop += UNIT;
            }
            let (piece, after) = rest.split_at_mut((stop.min(end) - at) as usize);
            if present {
                self.file.read_exact_at(piece, at)?;
            } else {
                self.below.read(at, piece)?;
            }
            (at, rest) = (stop, after);
        }
        Ok(())
    }

    fn read_at_once(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let mut units = offset / UNIT..(offset + buffer.len() as u64).div_ceil(UNIT);
        let present = self.is_present(units.start);
        if units.any(|unit| self.is_present(unit) != present) {
            return false;
        }
        if present {
            read_cached(&self.file, offset, buffer)
        } else {
            self.below.read_at_once(offset, buffer)
        }
    }

    fn write(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        let units = self.prepare(offset, buffer.len() as u64)?;
        self.file.write_all_at(buffer, offset)?;
        units.for_each(|unit| self.set_present(unit));
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        // Nothing of this survives the machine.
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, true)
    }

    fn write_zeroes(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        let units = self.prepare(offset, length)?;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, hole, offset, length).is_err() {
            return super::content::write_zeroes_slowly(self, offset, length);
        }
        units.for_each(|unit| self.set_present(unit));
        Ok(())
    }

    fn granularity(&self) -> u64 {
        UNIT.max(self.below.granularity())
    }
}
