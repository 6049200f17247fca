//! The user's folder for what lives as long as a login: sockets and locks.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::geteuid;

/// How often a lock that somebody else has is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// Our folder in `$XDG_RUNTIME_DIR`, or where there is none in the folder for temporary files. It exists, and is the
/// user's alone.
///
/// # Errors
/// The folder can't be made, or belongs to somebody else.
pub fn folder() -> io::Result<PathBuf> {
    let path = match env::var_os("XDG_RUNTIME_DIR") {
        Some(base) if Path::new(&base).is_absolute() => Path::new(&base).join("bivisor"),
        _ => env::temp_dir().join(format!("bivisor-{}", geteuid().as_raw())),
    };
    private(&path)?;
    Ok(path)
}

/// Makes a folder that only its owner may enter, if it isn't there.
///
/// # Errors
/// It can't be made, or what is there is not such a folder.
pub fn private(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(path)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o077 != 0 {
        let text = format!("{} is not a folder that is yours alone", path.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(())
}

/// Takes a lock, which is held until the file is closed by all who have it open. None: somebody else has had it all this
/// time.
///
/// # Errors
/// The file can't be made, or not be locked.
pub fn lock(path: &Path, patience: Duration) -> io::Result<Option<File>> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let end = Instant::now() + patience;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => thread::sleep(TRY_AGAIN),
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Closes what whoever started this process has left open to it by mistake, all but the three standard streams: a
/// process that stays would keep, say, somebody's pipe open for ever. To be called before anything else is opened.
///
/// # Errors
/// The host does not say what is open.
pub fn close_inherited() -> io::Result<()> {
    let open = fs::read_dir("/proc/self/fd")?;
    let numbers: Vec<i32> = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // Among them is the one by which the list was read, which is closed already.
        let _ = nix::unistd::close(number);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_private_folder_will_do() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("ours");
        private(&path).unwrap();
        private(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        assert!(private(&path).unwrap_err().to_string().ends_with("is not a folder that is yours alone"));
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).unwrap();
        assert!(private(&link).is_err());
    }

    #[test]
    fn a_lock_has_one_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = lock(&path, Duration::ZERO).unwrap().unwrap();
        assert!(lock(&path, Duration::from_millis(20)).unwrap().is_none());
        let waiting = thread::spawn(move || lock(&path, Duration::from_secs(30)).unwrap());
        drop(held);
        assert!(waiting.join().unwrap().is_some());
    }
}
