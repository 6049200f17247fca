//! Locks that keep two programs from writing one image.
//!
//! Open file description locks (fcntl(2)) at the bytes that QEMU uses for the same purpose (its block/file-posix.c):
//! byte 100+n is held by who uses right n, byte 200+n by who bears no other user of right n; right 1 is to write.

use std::fs::{self, File};
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, flock};

use super::error::DiskError;

const USES: i64 = 100;
const FORBIDS: i64 = 200;
const WRITE: i64 = 1;
/// Rights that QEMU knows: consistent read, write, write unchanged, resize.
const RIGHTS: i64 = 4;

fn range(kind: i32, start: i64, length: i64) -> flock {
    flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

/// A file whose locks end with this value. Closing it would not be enough: a child that another thread has just forked
/// holds it open until it executes its program.
pub(super) struct Locked(File);

impl Locked {
    /// See [`lock`].
    pub fn new(file: File, path: &Path, writer: bool) -> Result<Self, DiskError> {
        let locked = Self(file);
        lock(&locked, path, writer)?;
        Ok(locked)
    }
}

impl Deref for Locked {
    type Target = File;
    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // There is nobody to tell that it failed, and closing the file does the same sooner or later.
        let _ = fcntl(&self.0, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, USES, FORBIDS + RIGHTS - USES)));
    }
}

/// Takes the locks of a writer (nobody else may use the file) or of a reader (nobody may write). They last as long
/// as the file is open anywhere.
pub(super) fn lock(file: &File, path: &Path, writer: bool) -> Result<(), DiskError> {
    let taken = if writer { lock_writer(file) } else { lock_reader(file) };
    match taken {
        Ok(()) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(DiskError::InUse {
            path: path.to_owned(),
            user: user_of(file),
            advice: if writer {
                "end that first, or add `snapshot` or `readonly` if it only reads"
            } else {
                "end that first, as it writes to the disk"
            },
        }),
        Err(errno) => {
            Err(DiskError::Host { what: "lock the file", path: path.to_owned(), source: errno.into() })
        }
    }
}

fn lock_writer(file: &File) -> nix::Result<()> {
    let all = range(libc::F_WRLCK, USES, FORBIDS + RIGHTS - USES);
    fcntl(file, FcntlArg::F_OFD_SETLK(&all)).map(drop)
}

fn lock_reader(file: &File) -> nix::Result<()> {
    for byte in [USES, FORBIDS + WRITE] {
        fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte, 1)))?;
    }
    // Asks whether anybody's lock is in the way of ours; ours is not taken.
    let mut writer = range(libc::F_WRLCK, USES + WRITE, 1);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut writer))?;
    if i32::from(writer.l_type) == libc::F_UNLCK { Ok(()) } else { Err(Errno::EAGAIN) }
}

/// The first other process of this user's that has the file open; Linux does not tell who holds such a lock.
fn user_of(file: &File) -> String {
    let found = || {
        let target = file.metadata().ok()?;
        for process in fs::read_dir("/proc").ok()?.filter_map(Result::ok) {
            let id: u32 = process.file_name().to_str().and_then(|name| name.parse().ok()).unwrap_or(0);
            if id == 0 || id == std::process::id() {
                continue;
            }
            let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
            let mut open = files.filter_map(|entry| fs::metadata(entry.ok()?.path()).ok());
            if open.any(|other| (other.dev(), other.ino()) == (target.dev(), target.ino())) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(format!("{} (process {id})", name.trim_end()));
            }
        }
        None
    };
    found().unwrap_or_else(|| "another disk of this machine or another user's program".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_exclude_all_and_readers_exclude_writers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        fs::write(&path, [0; 512]).unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let first = open();
        lock(&first, &path, true).unwrap();
        for writer in [true, false] {
            let error = lock(&open(), &path, writer).unwrap_err().to_string();
            assert!(error.contains("is in use by") && error.contains("disk"), "{error}");
        }
        drop(first);
        let (reader, other) = (open(), open());
        lock(&reader, &path, false).unwrap();
        lock(&other, &path, false).unwrap();
        assert!(lock(&open(), &path, true).is_err());
        drop((reader, other));
        lock(&open(), &path, true).unwrap();
    }
}
