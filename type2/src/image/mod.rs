//! Guest images made from packages and kept in the user's cache folder.
//!
//! An image is a folder with a kernel, an initramfs and a manifest. It appears under its name only when it is
//! complete: it is made in a temporary folder beside and renamed.

mod apt;
mod deb;
mod debian;
mod initramfs;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use debian::build_debian;

/// Name of the image that `bivisor run` boots when it is told nothing.
pub const DEFAULT_IMAGE: &str = "debian";
const MANIFEST: &str = "image.toml";

/// Why an image can't be made, listed or opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no place for images.
    #[error("no folder for images: set HOME or XDG_CACHE_HOME to a folder you can write to")]
    NoCacheFolder,
    /// A file operation failed.
    #[error("{action} {path}: {source}{hint}", path = path.display(), hint = disk_full_hint(source))]
    Io {
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program that the build needs is missing.
    #[error(
        "{program} was not found: images are made from Debian packages and need a Debian (or derived) system with {program}"
    )]
    MissingProgram {
        /// Its name.
        program: &'static str,
    },
    /// A program that the build needs failed.
    #[error("{what} failed: {detail}")]
    Program {
        /// What was tried.
        what: String,
        /// The last line it wrote.
        detail: String,
    },
    /// No package of this name can be had.
    #[error(
        "package {package} can't be had: {detail}. Check the network and the sources in /etc/apt, then run `bivisor image build debian`"
    )]
    NoPackage {
        /// Its name.
        package: String,
        /// What apt said.
        detail: String,
    },
    /// A package lacks a file that the image needs.
    #[error("package {package} holds no {file}; this Debian release is not known to Bivisor")]
    MissingFile {
        /// The package.
        package: String,
        /// What was looked for.
        file: String,
    },
    /// The folder of an image is damaged.
    #[error("image {name} is damaged ({detail}): run `bivisor image build {name}` to make it anew")]
    Damaged {
        /// The image's name.
        name: String,
        /// What is wrong.
        detail: String,
    },
    /// No image has this name.
    #[error("there is no image {name}; `bivisor image ls` lists those there are")]
    Unknown {
        /// The name asked for.
        name: String,
    },
}

fn disk_full_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free about 100 MB, or point XDG_CACHE_HOME to a folder on another disk"
        }
        _ => "",
    }
}

/// Adds what was tried with which file to an I/O error.
fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { action, path, source }
}

/// What the manifest of an image says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What is in the image, for people.
    pub description: String,
    /// Parameters for the kernel.
    pub append: String,
    /// The packages it was made from, with versions.
    pub packages: Vec<String>,
}

/// An image ready to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// What its manifest says.
    pub manifest: Manifest,
}

impl Image {
    /// The kernel, a bzImage.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd.img")
    }

    /// Opens the image of this name.
    pub fn open(name: &str) -> Result<Self, ImageError> {
        let unknown = || ImageError::Unknown { name: name.to_owned() };
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
            return Err(unknown());
        }
        let folder = images_folder()?.join(name);
        if !folder.is_dir() {
            return Err(unknown());
        }
        let damaged = |detail: String| ImageError::Damaged { name: name.to_owned(), detail };
        let text =
            fs::read_to_string(folder.join(MANIFEST)).map_err(|e| damaged(format!("{MANIFEST}: {e}")))?;
        let manifest = toml::from_str(&text).map_err(|e| damaged(format!("{MANIFEST}: {}", e.message())))?;
        let image = Self { name: name.to_owned(), folder, manifest };
        for file in [image.kernel(), image.initrd()] {
            if !file.is_file() {
                return Err(damaged(format!("{} is missing", file.display())));
            }
        }
        Ok(image)
    }

    /// Bytes on disk.
    pub fn size(&self) -> u64 {
        [self.kernel(), self.initrd()].iter().filter_map(|f| fs::metadata(f).ok()).map(|m| m.len()).sum()
    }
}

/// All images, by name. Damaged ones are given as their error.
pub fn list() -> Result<Vec<Result<Image, ImageError>>, ImageError> {
    let folder = images_folder()?;
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io_error("reading", &folder)(e)),
    };
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    Ok(names.iter().map(|name| Image::open(name)).collect())
}

/// The default image, made now if it isn't there yet.
pub fn default_image() -> Result<Image, ImageError> {
    match Image::open(DEFAULT_IMAGE) {
        Err(ImageError::Unknown { .. } | ImageError::Damaged { .. }) => build_debian(),
        other => other,
    }
}

/// The folder that holds the images: `$XDG_CACHE_HOME/bivisor/images`, by default `~/.cache/bivisor/images`
/// (XDG Base Directory Specification: relative values are ignored).
pub fn images_folder() -> Result<PathBuf, ImageError> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    Ok(cache.ok_or(ImageError::NoCacheFolder)?.join("bivisor").join("images"))
}
