//! Bivisor's own ssh key, one for each user: images that are built with `--ssh` let it in, `bivisor ssh` has it.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use bivisor_backends::runtime;

use super::{ImageError, io_error};

const FOLDER: &str = "ssh";
const KEY: &str = "id_ed25519";

/// Where the private key is, or will be.
///
/// # Errors
/// The user has no data folder.
pub fn path() -> Result<PathBuf, ImageError> {
    Ok(super::data_folder()?.join(FOLDER).join(KEY))
}

/// The public key, made now if there is none.
pub(super) fn public() -> Result<String, ImageError> {
    let data = super::data_folder()?;
    let public = data.join(FOLDER).join(format!("{KEY}.pub"));
    if !public.is_file() {
        fs::create_dir_all(&data).map_err(io_error("making folder", &data))?;
        make(data.join(FOLDER))?;
    }
    let key = fs::read_to_string(&public).map_err(io_error("reading", &public))?;
    Ok(key.trim().to_owned())
}

/// Makes the folder beside and renames it, so that there is never half of a key.
fn make(folder: PathBuf) -> Result<(), ImageError> {
    let new = folder.with_file_name(format!(".{FOLDER}-{}", std::process::id()));
    runtime::private(&new).map_err(io_error("making folder", &new))?;
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "bivisor", "-f"])
        .arg(new.join(KEY))
        .stdin(Stdio::null())
        .output();
    let made = match made {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(ImageError::Program {
            what: "making an ssh key (ssh-keygen)".into(),
            detail: String::from_utf8_lossy(&output.stderr).trim().replace('\n', ", "),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ImageError::MissingTool {
            program: "ssh-keygen",
            package: "openssh-client",
            purpose: "it makes the key for `bivisor ssh`",
        }),
        Err(error) => Err(io_error("starting", "ssh-keygen".as_ref())(error)),
    };
    let placed = made.and_then(|()| match fs::rename(&new, &folder) {
        // Somebody else has just made one.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => other.map_err(io_error("making", &folder)),
    });
    // It is gone already if it has got its name.
    let _ = fs::remove_dir_all(&new);
    placed
}
