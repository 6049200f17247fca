//! What is done with disks that no machine uses.

use std::io;
use std::path::Path;

use super::content::Content;
use super::error::DiskError;
use super::lock::Locked;
use super::spec::{DiskSpec, Format};
use super::{open_content, open_file, probe};

/// Keeps a disk from being used by anybody until dropped.
#[must_use]
pub struct Unused {
    _file: Locked,
}

/// Makes sure that nobody uses a disk.
///
/// # Errors
/// If somebody does, or the file can't be opened for writing.
pub fn check_unused(spec: &DiskSpec) -> Result<Unused, DiskError> {
    let (file, _) = open_file(&spec.path, true)?;
    Ok(Unused { _file: Locked::new(file, &spec.path, true)? })
}

/// The format that a file seems to have.
///
/// # Errors
/// If it can't be opened.
pub fn format_of(path: &Path) -> Result<Format, DiskError> {
    let (file, _) = open_file(path, false)?;
    probe(&file, path)
}

/// A disk's content, to be read by this program itself.
pub struct Reader {
    content: Box<dyn Content>,
}

impl Reader {
    /// Opens a disk as for a machine that only reads.
    ///
    /// # Errors
    /// As for a machine's disk.
    pub fn open(spec: &DiskSpec) -> Result<Self, DiskError> {
        Ok(Self { content: open_content(spec, false)? })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.content.size()
    }

    /// Fills a buffer from anywhere on the disk.
    ///
    /// # Errors
    /// If the range does not lie on the disk, or the host can't read it.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.content.read(offset, buffer)
    }
}

/// Makes a disk larger; its new part reads as zeroes.
///
/// # Errors
/// If it would become smaller, is in use, or has no room.
pub fn grow(spec: &DiskSpec, size: u64) -> Result<(), DiskError> {
    let content = open_content(spec, true)?;
    let image_error = |cause| DiskError::Image { path: spec.path.clone(), cause };
    if size < content.size() {
        return Err(image_error(format!(
            "it has {} bytes and can't be made smaller: ask for a larger size",
            content.size()
        )));
    }
    content
        .grow(size.next_multiple_of(512))
        .and_then(|()| content.flush())
        .map_err(|error| image_error(format!("it can't be made larger: {error}")))
}
