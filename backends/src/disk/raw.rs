//! Raw images and block devices: the disk's bytes as they are.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::content::{Content, read_cached, write_zeroes_slowly};
use super::lock::Locked;

/// A raw image.
pub(super) struct Raw {
    file: Locked,
    direct: Option<Direct>,
    size: u64,
}

/// The same file, opened with `O_DIRECT`.
struct Direct {
    file: File,
    /// Bytes to which offsets, lengths and addresses must be aligned.
    alignment: usize,
}

impl Raw {
    /// An image of so many bytes in an open file. `direct` is the same file opened with `O_DIRECT`; where the file
    /// system won't have it, the page cache is used.
    pub(super) fn new(file: Locked, size: u64, direct: Option<File>) -> Self {
        let direct = direct.and_then(|file| {
            let alignment = direct_alignment(&file)?;
            Some(Direct { file, alignment })
        });
        Self { file, direct, size }
    }

    fn direct(&self, offset: u64, length: usize) -> Option<&Direct> {
        self.direct.as_ref().filter(|direct| {
            let alignment = direct.alignment;
            offset.is_multiple_of(alignment as u64) && length.is_multiple_of(alignment)
        })
    }
}

thread_local! {
    static BOUNCE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Hands `act` an aligned buffer of this thread's.
fn with_aligned<R>(length: usize, alignment: usize, act: impl FnOnce(&mut [u8]) -> R) -> R {
    BOUNCE.with_borrow_mut(|bounce| {
        if bounce.len() < length + alignment {
            bounce.resize(length + alignment, 0);
        }
        let start = bounce.as_ptr().align_offset(alignment);
        act(&mut bounce[start..start + length])
    })
}

/// The alignment that direct I/O on this file needs, found by trying; `None` if none that is usual serves.
fn direct_alignment(file: &File) -> Option<usize> {
    [512, 4096]
        .into_iter()
        .find(|&alignment| with_aligned(alignment, alignment, |buffer| file.read_at(buffer, 0)).is_ok())
}

impl Content for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.direct(offset, buffer.len()) {
            Some(direct) => with_aligned(buffer.len(), direct.alignment, |aligned| {
                direct.file.read_exact_at(aligned, offset)?;
                buffer.copy_from_slice(aligned);
                Ok(())
            }),
            None => self.file.read_exact_at(buffer, offset),
        }
    }

    fn read_at_once(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.direct.is_none() && read_cached(&self.file, offset, buffer)
    }

    fn write(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        match self.direct(offset, buffer.len()) {
            Some(direct) => with_aligned(buffer.len(), direct.alignment, |aligned| {
                aligned.copy_from_slice(buffer);
                direct.file.write_all_at(aligned, offset)
            }),
            None => self.file.write_all_at(buffer, offset),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match punch_hole(&self.file, offset, length) {
            Err(error) if !is_unsupported(error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let zero_range =
            || fallocate(&*self.file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, offset, length);
        let first = if unmap { punch_hole(&self.file, offset, length) } else { zero_range() };
        match first.or_else(|error| if unmap { zero_range() } else { Err(error) }) {
            Err(error) if is_unsupported(error) => write_zeroes_slowly(self, offset, length),
            result => Ok(result?),
        }
    }
}

fn punch_hole(file: &File, offset: u64, length: u64) -> rustix::io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)
}

/// fallocate(2): the file system, or the kind of file, can't do this.
fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL)
}
