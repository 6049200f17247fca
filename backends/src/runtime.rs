//! The user's folder for what lives as long as a login: sockets and locks.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

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
}
