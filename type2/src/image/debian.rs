//! The default guest: Debian's cloud kernel, unmodified, and a small initramfs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::host::signals;
use crate::status;

use super::apt::{Apt, Package};
use super::initramfs::{self, Module};
use super::{DEFAULT_IMAGE, Image, ImageError, MANIFEST, Manifest, deb, images_folder, io_error};

/// Debian's package that depends on the newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";
/// What the names of folders begin with in which images are made.
const WORK_PREFIX: &str = ".build-";
const BUSYBOX: &str = "busybox-static";
/// The power button, and the devices that a machine may have.
const MODULES: &[&str] = &[
    "button",
    "evdev",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
];
const APPEND: &str = "console=ttyS0 quiet";
/// A module grows at most this large; a larger one is a damaged package.
const MODULE_LIMIT: u64 = 64 << 20;

/// Makes the image anew from Debian packages, with progress on standard error, and replaces an older one.
pub fn build_debian() -> Result<Image, ImageError> {
    let images = images_folder()?;
    fs::create_dir_all(&images).map_err(io_error("making folder", &images))?;
    let lock_file = images.join(".lock");
    let lock = File::create(&lock_file).map_err(io_error("opening", &lock_file))?;
    lock.lock().map_err(io_error("locking", &lock_file))?;
    // On every way out, the temporary folder goes; SIGKILL's goes here, as nobody else holds the lock.
    remove_leftovers(&images);
    let work = tempfile::Builder::new()
        .prefix(WORK_PREFIX)
        .tempdir_in(&images)
        .map_err(io_error("making a folder in", &images))?;
    let leftover = work.path().to_owned();
    let _watch = signals::watch(move |signal| {
        // Our death is the better part of what is left to do.
        let _ = fs::remove_dir_all(&leftover);
        std::process::exit(status::of_signal(signal).into());
    })
    .map_err(io_error("watching for signals while making", &images))?;

    let (kernel, busybox) = fetch(work.path())?;
    let image = work.path().join("image");
    fs::create_dir(&image).map_err(io_error("making folder", &image))?;
    assemble(&kernel, &busybox, &image)?;
    replace(&image, &images.join(DEFAULT_IMAGE), work.path())?;
    Image::open(DEFAULT_IMAGE)
}

/// Removes what builds left behind that were killed.
fn remove_leftovers(images: &Path) {
    for entry in fs::read_dir(images).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(WORK_PREFIX) {
            // It costs space only.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn step(message: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message);
    bar.set_style(style("{spinner} {msg} {elapsed}"));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants; a wrong one shows as indicatif's default.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn fetch(work: &Path) -> Result<(Package, Package), ImageError> {
    eprintln!(
        "Making the guest image \"{DEFAULT_IMAGE}\" from Debian packages (once; about 40 MB to download)."
    );
    let mut apt = Apt::new(work);
    // The host's own lists first: they cost nothing, but they may be missing or outdated.
    if let Ok(packages) = download(&apt, &work.join("host-lists")) {
        return Ok(packages);
    }
    let bar = step("package lists");
    apt.update()?;
    bar.finish();
    download(&apt, &work.join("own-lists"))
}

fn download(apt: &Apt, folder: &Path) -> Result<(Package, Package), ImageError> {
    let kernel = apt.first_dependency(KERNEL)?;
    let get = |package: &str| {
        let bar = ProgressBar::new(0).with_message(package.to_owned());
        bar.set_style(style("{msg:36!} {bar:30} {bytes:>10} / {total_bytes} {bytes_per_sec}"));
        apt.download(package, &folder.join(package), &bar)
    };
    Ok((get(&kernel)?, get(BUSYBOX)?))
}

fn assemble(kernel: &Package, busybox: &Package, image: &Path) -> Result<(), ImageError> {
    let bar = step("unpacking the kernel");
    let mut vmlinuz = None;
    let mut modules = BTreeMap::new();
    let wanted = |path: &str| {
        path.starts_with("boot/vmlinuz-") || deb::module_name(path).is_some_and(|name| useful(&name))
    };
    deb::read_files(kernel, wanted, |path, contents| match deb::module_name(path) {
        Some(name) => {
            if let Some(plain) = decompress(path, contents) {
                modules.insert(name, plain);
            }
        }
        None => vmlinuz = Some(contents),
    })?;
    bar.finish();

    let bar = step("packing the initramfs");
    let mut program = None;
    deb::read_files(busybox, |path| path.ends_with("bin/busybox"), |_, contents| program = Some(contents))?;
    let missing = |package: &Package, file: &str| ImageError::MissingFile {
        package: package.name.clone(),
        file: file.into(),
    };
    let vmlinuz = vmlinuz.ok_or_else(|| missing(kernel, "boot/vmlinuz"))?;
    let program = program.ok_or_else(|| missing(busybox, "bin/busybox"))?;
    let order = initramfs::with_dependencies(MODULES, &mut modules);

    write_file(&image.join("vmlinuz"), |file| file.write_all(&vmlinuz))?;
    write_file(&image.join("initrd.img"), |file| initramfs::pack(&program, &order, file))?;
    let manifest = Manifest {
        description: describe(kernel, &order),
        append: APPEND.to_owned(),
        packages: vec![kernel.label.clone(), busybox.label.clone()],
    };
    let text = toml::to_string(&manifest)
        .map_err(|e| ImageError::Damaged { name: DEFAULT_IMAGE.to_owned(), detail: e.to_string() })?;
    write_file(&image.join(MANIFEST), |file| file.write_all(text.as_bytes()))?;
    bar.finish();
    Ok(())
}

fn describe(kernel: &Package, modules: &[Module]) -> String {
    let release = kernel.name.strip_prefix("linux-image-").unwrap_or(&kernel.name);
    format!("Debian's kernel {release} and a busybox shell, {} modules", modules.len())
}

/// Whether a module may be one of [`MODULES`] or something they need: others are not even unpacked.
fn useful(name: &str) -> bool {
    MODULES.contains(&name) || name.starts_with("virtio") || name.starts_with("net_") || name == "failover"
}

/// A module's plain bytes, or `None` if it is damaged.
fn decompress(path: &str, contents: Vec<u8>) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    let limited =
        |reader: &mut dyn Read, plain: &mut Vec<u8>| reader.take(MODULE_LIMIT).read_to_end(plain).ok();
    if path.ends_with(".xz") {
        limited(&mut lzma_rust2::XzReader::new(contents.as_slice(), true), &mut plain)?;
    } else if path.ends_with(".zst") {
        limited(&mut ruzstd::decoding::StreamingDecoder::new(contents.as_slice()).ok()?, &mut plain)?;
    } else {
        return Some(contents);
    }
    Some(plain)
}

fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), ImageError> {
    let write = || {
        let mut writer = BufWriter::new(File::create(path)?);
        fill(&mut writer)?;
        writer.flush()?;
        writer.get_ref().sync_all()
    };
    write().map_err(io_error("writing", path))
}

/// Puts the finished folder in place; the older one, if any, goes with the work folder.
fn replace(new: &Path, place: &Path, work: &Path) -> Result<(), ImageError> {
    if place.exists() {
        let old = work.join("old");
        fs::rename(place, &old).map_err(io_error("moving away", place))?;
        return fs::rename(new, place).map_err(|source| {
            // Better the older image than none; the first error is the one to tell.
            let _ = fs::rename(&old, place);
            io_error("putting in place", place)(source)
        });
    }
    fs::rename(new, place).map_err(io_error("putting in place", place))
}
