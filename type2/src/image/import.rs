//! Images from disks that others made, such as the cloud images of distributions.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bivisor_backends::disk::{self, Backing, DiskSpec, Format, Reader};
use clap::Args;
use rustix::fs::SeekFrom;

use super::kernel_finder::{self, Found};
use super::seed::Personality;
use super::work::{Work, byte_bar, step, write_file};
use super::{Image, ImageError, Manifest, Store, check_new_name, io_error};
use crate::config::MemorySize;

const SEED: &str = "seed.img";

/// `bivisor image import`.
#[derive(Clone, Debug, Default, Args)]
pub struct ImportRequest {
    /// A disk image, raw or qcow2
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Name of the new image
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Make the new disk larger; most cloud images then make their file system larger when they start
    #[arg(long, value_name = "SIZE")]
    pub size: Option<MemorySize>,
    /// Kernel to boot, if not the newest one in an ext4 file system of the disk
    #[arg(long, value_name = "PATH", requires = "initrd", requires = "append")]
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Its command line [default: root=UUID=… console=ttyS0]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Who the machine is
    #[command(flatten)]
    pub personality: Personality,
}

/// Copies a disk and makes it bootable here.
///
/// # Errors
/// In one sentence each; then nothing is left of it.
pub fn import(request: &ImportRequest) -> Result<Image, ImageError> {
    check_new_name(&request.name)?;
    let who = &request.personality;
    let wants_seed = who.has_cloud_init() || who.wants_ssh() || who.host_name.is_some();
    let seed = wants_seed.then(|| who.seed(&request.name)).transpose()?;
    let format = disk::format_of(&request.file)?;
    let spec = DiskSpec { backing: Backing::Off, format: Some(format), ..DiskSpec::new(&request.file) };
    // Looked at first: it is checked thereby, and locked against writers while it is copied.
    let reader = Reader::open(&spec)?;

    let work = Work::start(Store::Data.folder()?)?;
    let image = work.image()?;
    let boot = find_boot(request, Reader::open(&spec)?)?;
    let file_name = if format == Format::Qcow2 { "disk.qcow2" } else { "disk.raw" };
    let copy = image.join(file_name);
    copy_sparse(&request.file, &copy)?;
    drop(reader);
    if let Some(size) = request.size {
        disk::grow(&DiskSpec { path: copy.clone(), ..spec }, size.0)?;
    }
    write_file(&image.join("vmlinuz"), |file| file.write_all(&boot.kernel))?;
    write_file(&image.join("initrd.img"), |file| file.write_all(&boot.initrd))?;
    if let Some(seed) = &seed {
        write_file(&image.join(SEED), |file| file.write_all(seed))?;
    }
    let source = request.file.file_name().unwrap_or_default().to_string_lossy();
    let manifest = Manifest {
        description: format!("{source} with kernel {}", boot.version),
        append: request.append.clone().unwrap_or_else(|| format!("root=UUID={} console=ttyS0", boot.root)),
        packages: Vec::new(),
        disk: Some(file_name.into()),
        seed: seed.map(|_| SEED.into()),
    };
    manifest.write(&image)?;
    work.finish(&request.name)?;
    Image::open_in(Store::Data, &request.name)
}

fn find_boot(request: &ImportRequest, disk: Reader) -> Result<Found, ImageError> {
    let (Some(kernel), Some(initrd)) = (&request.kernel, &request.initrd) else {
        let bar = step("looking for the kernel");
        let found = kernel_finder::find(disk);
        bar.finish_and_clear();
        return found;
    };
    let read = |path: &Path| fs::read(path).map_err(io_error("reading", path));
    let version = kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Found { version, kernel: read(kernel)?, initrd: read(initrd)?, root: String::new() })
}

/// Copies a file and leaves its holes out.
fn copy_sparse(from: &Path, to: &Path) -> Result<(), ImageError> {
    const PIECE: u64 = 4 << 20;
    let source = File::open(from).map_err(io_error("reading", from))?;
    let target = File::create_new(to).map_err(io_error("making", to))?;
    let length =
        rustix::fs::seek(&source, SeekFrom::End(0)).map_err(|e| io_error("reading", from)(e.into()))?;
    target.set_len(length).map_err(io_error("making", to))?;
    let bar = byte_bar("copying the disk", length);
    let mut buffer = vec![0; PIECE as usize];
    let mut at = 0;
    while at < length {
        // A block device knows no holes, and says so by an error.
        at = match rustix::fs::seek(&source, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => at,
        };
        let count = PIECE.min(length - at) as usize;
        source.read_exact_at(&mut buffer[..count], at).map_err(io_error("reading", from))?;
        write_unless_zero(&target, &buffer[..count], at).map_err(io_error("writing", to))?;
        at += count as u64;
        bar.set_position(at);
    }
    bar.finish_and_clear();
    target.sync_all().map_err(io_error("writing", to))
}

fn write_unless_zero(target: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    const BLOCK: usize = 64 << 10;
    for (block, at) in bytes.chunks(BLOCK).zip((at..).step_by(BLOCK)) {
        if block.iter().any(|&byte| byte != 0) {
            target.write_all_at(block, at)?;
        }
    }
    Ok(())
}
