//! qcow2 images, by the crate imago. Images are checked by us first: imago trusts the tables that it reads.

mod check;
mod header;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2 as Image;
use imago::raw::Raw as RawImage;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, StorageOpenOptions};

use super::content::{Content, read_cached, write_zeroes_slowly};
use super::error::DiskError;
use super::lock::{self, Locked};
use super::open_file;
use super::spec::{Backing, Format};
use header::{BackingName, Header};

/// Images that refer to one another, at most.
const MAX_CHAIN: usize = 16;

type Access = FormatAccess<imago::file::File>;

/// A qcow2 image.
pub(super) struct Qcow2 {
    image: Access,
    /// The same file, for what imago would do holding a lock. Its own locks end after the image.
    file: Locked,
    cluster_size: u64,
    /// All data is in this file, and the page cache may have it.
    cached: bool,
}

impl Qcow2 {
    /// The image in an open and locked file. `direct` is the same file opened with `O_DIRECT`.
    pub(super) fn open(
        path: &Path,
        file: Locked,
        size: u64,
        direct: Option<File>,
        writes: bool,
        backing: &Backing,
    ) -> Result<Self, DiskError> {
        let header = checked(path, &file, size, writes)?;
        let backing = match &header.backing {
            Some(name) => Some(Chain { backing, depth: 1 }.open(path, name)?),
            None => None,
        };
        let cached = backing.is_none() && direct.is_none();
        let data = match direct {
            Some(file) => Ok(file),
            None => file.try_clone(),
        };
        let image = data
            .and_then(|data| access(data, writes, backing))
            .map_err(|source| DiskError::Read { path: path.to_owned(), source })?;
        Ok(Self { image, file, cluster_size: header.cluster_size(), cached })
    }
}

impl Qcow2 {
    /// The part of a range that is whole clusters, the disk's last one counted as whole; empty if there is none.
    fn whole_clusters(&self, offset: u64, length: u64) -> Range<u64> {
        let end = offset + length;
        let last = if end == self.size() { end } else { end - end % self.cluster_size };
        offset.next_multiple_of(self.cluster_size)..last
    }
}

fn image_error(path: &Path, cause: impl Into<String>) -> DiskError {
    DiskError::Image { path: path.to_owned(), cause: cause.into() }
}

/// The header of an image whose tables were found to be right.
fn checked(path: &Path, file: &File, size: u64, writes: bool) -> Result<Header, DiskError> {
    let header = Header::read(file, size, writes).map_err(|cause| image_error(path, cause))?;
    check::check(file, size, &header, writes).map_err(|cause| image_error(path, cause))?;
    Ok(header)
}

fn access(file: File, writes: bool, backing: Option<Access>) -> io::Result<Access> {
    let direct = rustix::fs::fcntl_getfl(&file)?.contains(rustix::fs::OFlags::DIRECT);
    let options = StorageOpenOptions::new().write(writes).direct(direct);
    let file = imago::file::File::from_open_file(file, options)?;
    let image = Image::<imago::file::File>::builder(file).write(writes).backing(backing).data_file(None);
    Ok(FormatAccess::new(image.open(DenyImplicitOpenGate::default())?))
}

/// Backing files on the way down.
struct Chain<'a> {
    backing: &'a Backing,
    depth: usize,
}

impl Chain<'_> {
    /// Opens the file that an image names, to be read only.
    fn open(&self, image: &Path, named: &BackingName) -> Result<Access, DiskError> {
        let path = self.allowed(image, &named.name)?;
        if self.depth >= MAX_CHAIN {
            return Err(image_error(
                image,
                format!(
                    "it is the last of {MAX_CHAIN} images that refer to one another, which is too many: `qemu-img convert` makes one of them"
                ),
            ));
        }
        let format = match named.format.as_deref() {
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            other => {
                return Err(image_error(
                    image,
                    format!(
                        "it refers to the backing file {} of {}: say which with `qemu-img rebase -u -F raw|qcow2`",
                        named.name,
                        other.map_or("a format that it doesn't name".into(), |format| format!(
                            "the format {format}"
                        )),
                    ),
                ));
            }
        };
        let (file, size) = open_file(&path, false)?;
        lock::lock(&file, &path, false)?;
        let read_error = |source| DiskError::Read { path: path.clone(), source };
        if format == Format::Raw {
            let file =
                imago::file::File::from_open_file(file, StorageOpenOptions::new()).map_err(read_error)?;
            let raw = RawImage::builder(file).open(DenyImplicitOpenGate::default()).map_err(read_error)?;
            return Ok(FormatAccess::new(raw));
        }
        let header = checked(&path, &file, size, false)?;
        let next = Self { backing: self.backing, depth: self.depth + 1 };
        let below = header.backing.as_ref().map(|name| next.open(&path, name)).transpose()?;
        access(file, false, below).map_err(read_error)
    }

    /// The path of a backing file, if the user allows it.
    fn allowed(&self, image: &Path, name: &str) -> Result<PathBuf, DiskError> {
        let beside = image.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = match self.backing {
            Backing::Off => {
                return Err(image_error(
                    image,
                    format!(
                        "it refers to the backing file {name}, and images may not lead to other files: say `backing=on` or `backing=FOLDER` if you trust it"
                    ),
                ));
            }
            Backing::Beside => beside,
            Backing::In(folder) => folder,
        };
        let found = |path: &Path| {
            path.canonicalize().map_err(|error| {
                image_error(image, format!("its backing file {name} can't be found ({error}): put it there, or name it anew with `qemu-img rebase -u -b`"))
            })
        };
        let (path, folder) = (found(&beside.join(name))?, found(folder)?);
        if !path.starts_with(&folder) {
            return Err(image_error(
                image,
                format!(
                    "its backing file {name} is not in the folder {}: say `backing=FOLDER` with the one that it is in, if you trust it",
                    folder.display()
                ),
            ));
        }
        Ok(path)
    }
}

impl Content for Qcow2 {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.image.read(buffer, offset)
    }

    fn read_at_once(&self, offset: u64, buffer: &mut [u8]) -> bool {
        if !self.cached {
            return false;
        }
        match self.image.get_mapping(offset, buffer.len() as u64) {
            Ok((Mapping::Raw { offset, .. }, length)) if length == buffer.len() as u64 => {
                read_cached(&self.file, offset, buffer)
            }
            Ok((Mapping::Zero { .. }, length)) if length == buffer.len() as u64 => {
                buffer.fill(0);
                true
            }
            _ => false,
        }
    }

    fn write(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.image.write(buffer, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()?;
        self.file.sync_data()
    }

    #[allow(unsafe_code, reason = "imago has no safe call for images that several threads use")]
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let whole = self.whole_clusters(offset, length);
        if whole.is_empty() {
            return Ok(());
        }
        // SAFETY: the store runs nothing else within the clusters of a range that is discarded (`granularity`).
        match unsafe { self.image.discard_to_any_unsafe(whole.start, whole.end - whole.start) } {
            // Version 2 has no way to say so.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// Only whole clusters are left to imago: its way with parts of them overflows near a small disk's end.
    fn write_zeroes(&self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        let (whole, end) = (self.whole_clusters(offset, length), offset + length);
        if whole.is_empty() {
            return write_zeroes_slowly(self, offset, length);
        }
        write_zeroes_slowly(self, offset, whole.start - offset)?;
        match self.image.write_zeroes(whole.start, whole.end - whole.start) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                write_zeroes_slowly(self, whole.start, whole.end - whole.start)?;
            }
            result => result?,
        }
        write_zeroes_slowly(self, whole.end, end - whole.end)
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        self.image.resize_grow(size, imago::format::PreallocateMode::None)
    }

    fn granularity(&self) -> u64 {
        self.cluster_size
    }
}
