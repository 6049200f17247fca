//! Guest images: made from packages or brought by the user.
//!
//! An image is a folder with a kernel, an initramfs, perhaps a disk and a seed for cloud-init, and a manifest. It
//! appears under its name only when it is complete: it is made in a temporary folder beside and renamed. What can be
//! made again lies in the user's cache folder; what has a disk lies in the data folder, since a guest writes to it.

mod apt;
mod deb;
mod debian;
mod debian_disk;
mod import;
mod initramfs;
mod kernel_finder;
pub mod own_key;
mod partitions;
mod root_files;
mod seed;
mod work;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bivisor_backends::disk::{self, DiskError, DiskSpec};
use serde::{Deserialize, Serialize};

pub use debian::build_debian;
pub use debian_disk::{DiskRecipe, build_debian_disk};
pub use import::{ImportRequest, import};

/// Name of the image that `bivisor run` boots when it is told nothing.
pub const DEFAULT_IMAGE: &str = "debian";
const MANIFEST: &str = "image.toml";

/// Why an image can't be made, listed or opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no place for images.
    #[error(
        "no folder for images: set HOME, or XDG_CACHE_HOME and XDG_DATA_HOME, to folders you can write to"
    )]
    NoFolder,
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
    /// A program that a disk's making needs is missing.
    #[error("{program} was not found, and {purpose}: install it with `sudo apt-get install {package}`")]
    MissingTool {
        /// Its name.
        program: &'static str,
        /// Debian's package of it.
        package: &'static str,
        /// What it is for, as the end of a sentence.
        purpose: &'static str,
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
    /// What the user gave can't be used.
    #[error("{0}")]
    Refused(String),
    /// The image's disk can't be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
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
            "; make room, or point XDG_CACHE_HOME and XDG_DATA_HOME to folders on another disk"
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
    #[serde(default)]
    pub packages: Vec<String>,
    /// The file of its disk, if it has one, in its folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// The file of its seed for cloud-init, a small disk too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<String>,
}

impl Manifest {
    /// Writes the manifest into an image's folder.
    fn write(&self, image: &Path) -> Result<(), ImageError> {
        let text = toml::to_string(self).map_err(|e| ImageError::Refused(e.to_string()))?;
        work::write_file(&image.join(MANIFEST), |file| file.write_all(text.as_bytes()))
    }
}

/// Where images lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// What has a disk.
    Data,
    /// What can be made again without loss.
    Cache,
}

impl Store {
    /// In the order in which a name is looked up.
    const ALL: [Self; 2] = [Self::Data, Self::Cache];

    /// The folder: `bivisor/images` in `$XDG_DATA_HOME` or `$XDG_CACHE_HOME`, by default `~/.local/share` and
    /// `~/.cache` (XDG Base Directory Specification: relative values are ignored).
    fn folder(self) -> Result<PathBuf, ImageError> {
        Ok(self.base()?.join("images"))
    }

    fn base(self) -> Result<PathBuf, ImageError> {
        let (variable, default) = match self {
            Self::Data => ("XDG_DATA_HOME", ".local/share"),
            Self::Cache => ("XDG_CACHE_HOME", ".cache"),
        };
        let absolute =
            |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute(variable).or_else(|| Some(absolute("HOME")?.join(default)));
        Ok(base.ok_or(ImageError::NoFolder)?.join("bivisor"))
    }

    /// Names of what looks like images, in order.
    fn names(self) -> Result<Vec<String>, ImageError> {
        let folder = self.folder()?;
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
        Ok(names)
    }
}

/// Whether an image may have this name.
fn is_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']) && !name.ends_with(".toml")
}

/// Refuses a name that no image can have or that one with a disk has already.
fn check_new_name(name: &str) -> Result<(), ImageError> {
    if !is_name(name) {
        return Err(ImageError::Refused(format!(
            "'{name}' is no name for an image: leave slashes, a dot at the start and .toml away"
        )));
    }
    if Store::Data.folder()?.join(name).exists() {
        return Err(ImageError::Refused(format!(
            "there is an image {name} with a disk already: remove it with `bivisor image rm {name}`, or say --name OTHER"
        )));
    }
    Ok(())
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
        match Self::open_in(Store::Data, name) {
            Err(ImageError::Unknown { .. }) => Self::open_in(Store::Cache, name),
            other => other,
        }
    }

    /// Opens the image of this name that lies there.
    fn open_in(store: Store, name: &str) -> Result<Self, ImageError> {
        let unknown = || ImageError::Unknown { name: name.to_owned() };
        if !is_name(name) {
            return Err(unknown());
        }
        let folder = store.folder()?.join(name);
        if !folder.is_dir() {
            return Err(unknown());
        }
        let damaged = |detail: String| ImageError::Damaged { name: name.to_owned(), detail };
        let text =
            fs::read_to_string(folder.join(MANIFEST)).map_err(|e| damaged(format!("{MANIFEST}: {e}")))?;
        let manifest: Manifest =
            toml::from_str(&text).map_err(|e| damaged(format!("{MANIFEST}: {}", e.message())))?;
        if manifest.disk.iter().chain(&manifest.seed).any(|file| !is_name(file)) {
            return Err(damaged(format!("{MANIFEST} names a disk outside the image")));
        }
        let image = Self { name: name.to_owned(), folder, manifest };
        for file in image.files() {
            if !file.is_file() {
                return Err(damaged(format!("{} is missing", file.display())));
            }
        }
        Ok(image)
    }

    /// Its disks, in the order in which the guest sees them.
    pub fn disks(&self) -> Vec<DiskSpec> {
        let disk = self.manifest.disk.iter().map(|file| DiskSpec::new(self.folder.join(file)));
        let seed = self.manifest.seed.iter().map(|file| {
            let mut seed = DiskSpec::new(self.folder.join(file));
            (seed.read_only, seed.format) = (true, Some(disk::Format::Raw));
            seed
        });
        disk.chain(seed).collect()
    }

    fn files(&self) -> impl Iterator<Item = PathBuf> {
        let disks = self.disks().into_iter().map(|disk| disk.path);
        [self.kernel(), self.initrd()].into_iter().chain(disks)
    }

    /// Bytes that it takes on the host's disk.
    pub fn size(&self) -> u64 {
        self.files().filter_map(|file| fs::metadata(file).ok()).map(|m| m.blocks() * 512).sum()
    }
}

/// All images, by name. Damaged ones are given as their error.
pub fn list() -> Result<Vec<Result<Image, ImageError>>, ImageError> {
    let mut images = Vec::new();
    for store in Store::ALL {
        images.extend(store.names()?.iter().map(|name| Image::open_in(store, name)));
    }
    Ok(images)
}

/// Removes the image of this name: the one with a disk, if there are two.
///
/// # Errors
/// If there is none, or a machine uses its disk.
pub fn remove(name: &str) -> Result<(), ImageError> {
    let unknown = || ImageError::Unknown { name: name.to_owned() };
    if !is_name(name) {
        return Err(unknown());
    }
    for store in Store::ALL {
        let folder = store.folder()?.join(name);
        if !folder.is_dir() {
            continue;
        }
        // A damaged one may go too.
        let disks = Image::open_in(store, name).map(|image| image.disks()).unwrap_or_default();
        let _locks = disks.iter().map(disk::check_unused).collect::<Result<Vec<_>, _>>()?;
        // Under a name that is none, so that half of it is never taken for an image.
        let gone = store.folder()?.join(format!(".removed-{name}-{}", std::process::id()));
        fs::rename(&folder, &gone).map_err(io_error("removing", &folder))?;
        return fs::remove_dir_all(&gone).map_err(io_error("removing", &gone));
    }
    Err(unknown())
}

/// The default image, made now if it isn't there yet.
pub fn default_image() -> Result<Image, ImageError> {
    match Image::open_in(Store::Cache, DEFAULT_IMAGE) {
        Err(ImageError::Unknown { .. } | ImageError::Damaged { .. }) => build_debian(),
        other => other,
    }
}

/// Our folder in the user's data folder.
pub fn data_folder() -> Result<PathBuf, ImageError> {
    Store::Data.base()
}

/// The folder of the images that can be made again.
pub fn cache_folder() -> Result<PathBuf, ImageError> {
    Store::Cache.folder()
}
