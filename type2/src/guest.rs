//! The guest to boot: its kernel, its initial RAM disk and its command line, ready to be read again at every reset.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};

use bivisor_backends::disk::DiskSpec;
use bivisor_backends::terminal;
use bivisor_guests::HELLO;

use crate::config::{Boot, VmConfig};
use crate::image::{self, DiskRecipe, Image, ImageError};

/// Why a guest's file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// There is no such file.
    #[error("there is no {what} {path}: check the path", path = .path.display())]
    Missing {
        /// Kernel or initrd.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// It can't be read.
    #[error("cannot read the {what} {path}: {source}", path = .path.display())]
    Unreadable {
        /// Kernel or initrd.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is a directory, a device or the like.
    #[error("the {what} {path} is not a file", path = .path.display())]
    NotAFile {
        /// Kernel or initrd.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// It has no bytes.
    #[error("the {what} {path} is empty: it was perhaps not copied to its end", path = .path.display())]
    Empty {
        /// Kernel or initrd.
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// It is larger than all of the machine's RAM.
    #[error("the {what} {path} of {size} MiB does not fit into {memory} MiB of memory; give the machine more", path = .path.display())]
    TooBig {
        /// Kernel or initrd.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// MiB of the file.
        size: u64,
        /// MiB of RAM.
        memory: u64,
    },
    /// No image of this name.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// A file of a guest that was found to be usable.
#[derive(Debug)]
pub struct GuestFile {
    what: &'static str,
    path: PathBuf,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// Kept open, so that a reset finds the same file.
    File(File),
    BuiltIn(&'static [u8]),
}

impl GuestFile {
    fn open(what: &'static str, path: &Path, memory: u64) -> Result<Self, GuestError> {
        let path = path.to_owned();
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(GuestError::Missing { what, path });
            }
            Err(source) => return Err(GuestError::Unreadable { what, path, source }),
        };
        // A pipe or a device may never come to an end.
        if !metadata.is_file() {
            return Err(GuestError::NotAFile { what, path });
        }
        if metadata.len() == 0 {
            return Err(GuestError::Empty { what, path });
        }
        if metadata.len() > memory {
            let (size, memory) = (metadata.len().div_ceil(1 << 20), memory >> 20);
            return Err(GuestError::TooBig { what, path, size, memory });
        }
        match File::open(&path) {
            Ok(file) => Ok(Self { what, path, content: Content::File(file) }),
            Err(source) => Err(GuestError::Unreadable { what, path, source }),
        }
    }

    /// The bytes of the file.
    pub fn read(&self) -> Result<Cow<'static, [u8]>, GuestError> {
        let mut file = match &self.content {
            Content::BuiltIn(bytes) => return Ok(Cow::Borrowed(bytes)),
            Content::File(file) => file,
        };
        let mut bytes = Vec::new();
        match file.rewind().and_then(|()| file.read_to_end(&mut bytes)) {
            Ok(_) => Ok(bytes.into()),
            Err(source) => Err(GuestError::Unreadable { what: self.what, path: self.path.clone(), source }),
        }
    }

    /// The file's path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A guest.
#[derive(Debug)]
pub struct Guest {
    /// The kernel.
    pub kernel: GuestFile,
    /// The initial RAM disk.
    pub initrd: Option<GuestFile>,
    /// The kernel's command line.
    pub command_line: String,
    /// Disks that belong to it, before those of the configuration.
    pub disks: Vec<DiskSpec>,
}

/// Makes the image of a machine if it is not there and the configuration says how.
///
/// # Errors
/// It can't be made.
pub fn make_missing_image(config: &VmConfig) -> Result<(), ImageError> {
    match (&config.boot, &config.build) {
        (Boot::Image(name), Some(recipe)) => match Image::open(name) {
            Err(ImageError::Unknown { .. }) => {
                let recipe = DiskRecipe { name: Some(name.clone()), ..recipe.clone() };
                image::build_debian_disk(&recipe).map(drop)
            }
            other => other.map(drop),
        },
        _ => Ok(()),
    }
}

impl Guest {
    /// Finds what the configuration names; the default guest is made if it is not there yet.
    pub fn find(config: &VmConfig) -> Result<Self, GuestError> {
        let memory = config.memory.0;
        match &config.boot {
            Boot::Kernel { kernel, initrd } => Ok(Self {
                kernel: GuestFile::open("kernel", kernel, memory)?,
                initrd: initrd.as_ref().map(|path| GuestFile::open("initrd", path, memory)).transpose()?,
                command_line: config.append.clone().unwrap_or_default(),
                disks: Vec::new(),
            }),
            Boot::Image(name) => match Image::open(name) {
                Ok(image) => Self::of_image(&image, config),
                Err(ImageError::Unknown { .. }) if name == HELLO.name => Ok(Self::built_in(config)),
                Err(error) => Err(error.into()),
            },
            Boot::Default => match image::default_image() {
                Ok(image) => Self::of_image(&image, config),
                Err(error) => {
                    terminal::message(&format!(
                        "bivisor: the default guest can't be had, so the built-in one starts: {error}\n"
                    ));
                    Ok(Self::built_in(config))
                }
            },
        }
    }

    /// The guest that is part of this program.
    fn built_in(config: &VmConfig) -> Self {
        let kernel =
            GuestFile { what: "kernel", path: HELLO.name.into(), content: Content::BuiltIn(HELLO.image) };
        let command_line = config.append.clone().unwrap_or_default();
        Self { kernel, initrd: None, command_line, disks: Vec::new() }
    }

    fn of_image(image: &Image, config: &VmConfig) -> Result<Self, GuestError> {
        let own = &image.manifest.append;
        Ok(Self {
            kernel: GuestFile::open("kernel", &image.kernel(), config.memory.0)?,
            initrd: Some(GuestFile::open("initrd", &image.initrd(), config.memory.0)?),
            // What the user adds stands behind, where it wins.
            command_line: match &config.append {
                Some(more) => format!("{own} {more}"),
                None => own.clone(),
            },
            disks: image.disks(),
        })
    }
}
