//! Why a disk can't be used, each in one sentence that names the file, the cause and what to do.

use std::io;
use std::path::PathBuf;

/// Why a disk can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The option's text means nothing.
    #[error("{0}")]
    Option(String),
    /// There is no such file.
    #[error("there is no disk {path}: check the path", path = .0.display())]
    Missing(PathBuf),
    /// It can't be opened.
    #[error("cannot open the disk {path}: {source}{hint}", path = .path.display(), hint = permission_hint(source))]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It can't be read.
    #[error("cannot read the disk {path}: {source}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a folder, a terminal or the like.
    #[error("the disk {path} is neither a file nor a block device", path = .0.display())]
    NotADisk(PathBuf),
    /// Its size is no whole number of sectors.
    #[error(
        "the disk {path} has {size} bytes, which is no whole number of 512-byte sectors: it was perhaps not copied to its end (`truncate -s %512` makes it whole)",
        path = .path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// Somebody else uses it.
    #[error("the disk {path} is in use by {user}: {advice}", path = .path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// The program and its process, as far as they can be told.
        user: String,
        /// What to do.
        advice: &'static str,
    },
    /// The image's content can't be used.
    #[error("the disk {path} can't be used: {cause}", path = .path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        cause: String,
    },
    /// The host lacks what a disk needs besides its file.
    #[error("cannot {what} for the disk {path}: {source}", path = .path.display())]
    Host {
        /// What was tried, as a verb phrase.
        what: &'static str,
        /// The disk's file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn permission_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            " (`readonly` or `snapshot` need no right to write)"
        }
        _ => "",
    }
}
