//! The default guest: Debian's cloud kernel, unmodified, and a small initramfs.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;

use super::apt::{Apt, Package};
use super::initramfs::{self, Module};
use super::work::{Work, byte_bar, step, write_file};
use super::{DEFAULT_IMAGE, Image, ImageError, Manifest, Store, deb};

/// Debian's package that depends on the newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";
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
    let work = Work::start(Store::Cache.folder()?)?;
    let (kernel, busybox) = fetch(work.path())?;
    assemble(&kernel, &busybox, &work.image()?)?;
    work.finish(DEFAULT_IMAGE)?;
    Image::open_in(Store::Cache, DEFAULT_IMAGE)
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
        let bar = byte_bar(package, 0);
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
        disk: None,
        seed: None,
    };
    manifest.write(image)?;
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
