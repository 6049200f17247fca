//! What a format of disk images offers: plain calls that may wait.

use std::fs::File;
use std::io::{self, IoSliceMut};

use rustix::io::{ReadWriteFlags, preadv2};

/// A disk's content. Calls come from several threads at once, but never with overlapping ranges (rounded to
/// [`Content::granularity`]) when one of them changes something. Ranges lie inside the disk.
pub(super) trait Content: Send + Sync {
    /// Bytes, a multiple of 512.
    fn size(&self) -> u64;

    /// Fills the buffer.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Fills the buffer if that needs no waiting for a disk; says whether it did.
    fn read_at_once(&self, _offset: u64, _buffer: &mut [u8]) -> bool {
        false
    }

    /// Writes the buffer.
    fn write(&self, offset: u64, buffer: &[u8]) -> io::Result<()>;

    /// Makes what was written survive a crash of the host.
    fn flush(&self) -> io::Result<()>;

    /// Gives room back where that is possible; what the range reads as then is open.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes the range read as zeroes, giving room back if `unmap`.
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;

    /// Makes the disk larger, while no machine uses it; [`Content::size`] may stay as it was until it is opened anew.
    fn grow(&self, _size: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Changes of ranges within one unit of so many bytes must not run at once.
    fn granularity(&self) -> u64 {
        512
    }
}

/// Fills a buffer from a file if the page cache has all of it.
pub(super) fn read_cached(file: &File, offset: u64, buffer: &mut [u8]) -> bool {
    let length = buffer.len();
    preadv2(file, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT) == Ok(length)
}

/// Writes zeroes in pieces, where the host knows no better way.
pub(super) fn write_zeroes_slowly(content: &dyn Content, offset: u64, length: u64) -> io::Result<()> {
    const PIECE: usize = 256 << 10;
    let zeroes = vec![0; PIECE];
    let end = offset + length;
    let mut at = offset;
    while at < end {
        let count = (end - at).min(PIECE as u64);
        content.write(at, &zeroes[..count as usize])?;
        at += count;
    }
    Ok(())
}
