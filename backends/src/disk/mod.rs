//! Disk images and block devices of the host as block stores.

mod content;
mod error;
mod lock;
mod offline;
mod overlay;
mod qcow2;
mod raw;
mod spec;
mod store;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bivisor_machine::block::BlockStore;
use rustix::fs::OFlags;

use content::Content;
use lock::Locked;
use overlay::Overlay;
use qcow2::Qcow2;
use raw::Raw;
use store::{Policy, Store};

pub use error::DiskError;
pub use offline::{Reader, Unused, check_unused, format_of, grow};
pub use spec::{Backing, CacheMode, DiskSpec, Format, OnFull};
pub use store::{DiskEvent, DiskEvents};

/// First bytes of a qcow2 image (QEMU, docs/interop/qcow2.txt).
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Opens a disk: checks its image, locks it against other users, and starts its threads. `events` is told what a
/// user must know later.
///
/// # Errors
/// In one sentence each: see [`DiskError`].
pub fn open(spec: &DiskSpec, events: DiskEvents) -> Result<Arc<dyn BlockStore>, DiskError> {
    let writes = !spec.read_only && !spec.snapshot;
    let mut content = open_content(spec, writes)?;
    if spec.snapshot {
        let file =
            overlay_file().map_err(|source| host_error("make a temporary file", &spec.path, source))?;
        let overlay = Overlay::new(content, file)
            .map_err(|source| host_error("make a temporary file", &spec.path, source))?;
        content = Box::new(overlay);
    }
    let policy = Policy {
        read_only: spec.read_only,
        can_discard: spec.discard && !spec.read_only,
        cache: if spec.snapshot { CacheMode::Unsafe } else { spec.cache },
        on_full: spec.on_full,
        limit: spec.limit,
    };
    let store = Store::start(content, policy, events)
        .map_err(|source| host_error("start a thread", &spec.path, source))?;
    Ok(Arc::new(store))
}

fn host_error(what: &'static str, path: &Path, source: io::Error) -> DiskError {
    DiskError::Host { what, path: path.to_owned(), source }
}

/// A file without a name in `$TMPDIR`, or in /var/tmp: /tmp is in memory on many systems.
fn overlay_file() -> io::Result<File> {
    let folder = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    tempfile::tempfile_in(folder)
}

fn open_content(spec: &DiskSpec, writes: bool) -> Result<Box<dyn Content>, DiskError> {
    let path = &spec.path;
    let (file, size) = open_file(path, writes)?;
    let file = Locked::new(file, path, writes)?;
    match spec.format.map_or_else(|| probe(&file, path), Ok)? {
        Format::Raw => {
            if size == 0 || !size.is_multiple_of(512) {
                return Err(DiskError::Size { path: path.clone(), size });
            }
            let direct = (spec.cache == CacheMode::None).then(|| open_direct(path, &file, writes)).flatten();
            Ok(Box::new(Raw::new(file, size, direct)))
        }
        Format::Qcow2 => {
            let direct = (spec.cache == CacheMode::None).then(|| open_direct(path, &file, writes)).flatten();
            Ok(Box::new(Qcow2::open(path, file, size, direct, writes, &spec.backing)?))
        }
    }
}

/// Opens a file or block device; returns its size too.
fn open_file(path: &Path, writes: bool) -> Result<(File, u64), DiskError> {
    // Not blocking: somebody's pipe without a writer must not hold the program.
    let options = || {
        let mut options = OpenOptions::new();
        options.read(true).write(writes).custom_flags(OFlags::NONBLOCK.bits() as i32);
        options
    };
    let mut file = options().open(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DiskError::Missing(path.to_owned()),
        io::ErrorKind::IsADirectory => DiskError::NotADisk(path.to_owned()),
        _ => DiskError::Open { path: path.to_owned(), source },
    })?;
    let read_error = |source| DiskError::Read { path: path.to_owned(), source };
    let kind = file.metadata().map_err(read_error)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::NotADisk(path.to_owned()));
    }
    let size = file.seek(SeekFrom::End(0)).map_err(read_error)?;
    Ok((file, size))
}

/// Opens the same file once more, around the page cache; `None` where that is impossible.
fn open_direct(path: &Path, file: &File, writes: bool) -> Option<File> {
    use std::os::unix::fs::MetadataExt;
    let direct = OpenOptions::new()
        .read(true)
        .write(writes)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)
        .ok()?;
    let (one, other) = (file.metadata().ok()?, direct.metadata().ok()?);
    ((one.dev(), one.ino()) == (other.dev(), other.ino())).then_some(direct)
}

/// Finds out the format by the first bytes.
fn probe(file: &File, path: &Path) -> Result<Format, DiskError> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == QCOW2_MAGIC => Ok(Format::Qcow2),
        Ok(()) => Ok(Format::Raw),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Format::Raw),
        Err(source) => Err(DiskError::Read { path: path.to_owned(), source }),
    }
}
