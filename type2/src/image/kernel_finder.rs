//! Kernels inside disks: cloud images keep theirs in an ext4 file system, and a machine here boots one directly.

use std::cmp::Ordering;
use std::error::Error;
use std::sync::Arc;

use bivisor_backends::disk::Reader;
use ext4_view::{Ext4, Ext4Read};

use super::ImageError;
use super::partitions::{Part, parts};

/// Bytes of a kernel or initramfs at most.
const MAX_FILE: u64 = 512 << 20;

/// What a disk boots.
#[derive(Debug)]
pub(super) struct Found {
    /// Version of the kernel.
    pub(super) version: String,
    pub(super) kernel: Vec<u8>,
    pub(super) initrd: Vec<u8>,
    /// UUID of the root file system.
    pub(super) root: String,
}

/// A part of a disk, for reading a file system.
struct PartReader {
    disk: Arc<Reader>,
    part: Part,
}

impl Ext4Read for PartReader {
    fn read(&mut self, start: u64, buffer: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let end = start.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.part.length) {
            return Err("outside the file system".into());
        }
        Ok(self.disk.read(self.part.start + start, buffer)?)
    }
}

/// A kernel with its initramfs, not read yet.
struct Candidate {
    system: Ext4,
    folder: &'static str,
    version: String,
    initrd: String,
}

/// Finds the newest kernel on a disk that has an initramfs, and the root file system.
///
/// # Errors
/// In one sentence with what to do.
pub(super) fn find(disk: Reader) -> Result<Found, ImageError> {
    let refused = |what: &str| {
        ImageError::Refused(format!(
            "{what}: give them with --kernel, --initrd and --append \"root=… console=ttyS0\""
        ))
    };
    let parts =
        parts(&disk).map_err(|error| refused(&format!("the disk's partitions can't be read ({error})")))?;
    let disk = Arc::new(disk);
    let (mut root, mut best) = (None, None::<Candidate>);
    for part in parts {
        let reader = PartReader { disk: disk.clone(), part };
        let Ok(system) = Ext4::load(Box::new(reader)) else { continue };
        if root.is_none() && exists(&system, "/etc/os-release") {
            root = Some(system.uuid().to_string());
        }
        for folder in ["/boot", "/"] {
            if let Some(candidate) = newest(&system, folder)
                && best.as_ref().is_none_or(|best| version_order(&candidate.version, &best.version).is_gt())
            {
                best = Some(candidate);
            }
        }
    }
    let best =
        best.ok_or_else(|| refused("no kernel with an initramfs is in an ext4 file system of the disk"))?;
    let root = root.ok_or_else(|| refused("no root file system of type ext4 is on the disk"))?;
    let read = |name: &str| {
        let path = join(best.folder, name);
        let size = best.system.metadata(path.as_str()).map(|metadata| metadata.len());
        let bytes = size
            .map(|size| size <= MAX_FILE)
            .and_then(|fits| if fits { best.system.read(path.as_str()) } else { Ok(Vec::new()) });
        match bytes {
            Ok(bytes) if !bytes.is_empty() => Ok(bytes),
            Ok(_) => Err(refused(&format!("{path} on the disk is empty or larger than a kernel can be"))),
            Err(error) => Err(refused(&format!("{path} on the disk can't be read ({error})"))),
        }
    };
    let kernel = read(&format!("vmlinuz-{}", best.version))?;
    Ok(Found { kernel, initrd: read(&best.initrd)?, version: best.version.clone(), root })
}

fn join(folder: &str, name: &str) -> String {
    format!("{}/{name}", folder.trim_end_matches('/'))
}

fn exists(system: &Ext4, path: &str) -> bool {
    // A link to usr/lib, mostly.
    system.metadata(path).is_ok()
}

fn newest(system: &Ext4, folder: &'static str) -> Option<Candidate> {
    let entries = system.read_dir(folder).ok()?.filter_map(Result::ok);
    let names: Vec<String> =
        entries.filter_map(|entry| Some(entry.file_name().as_str().ok()?.to_owned())).collect();
    let versions = names.iter().filter_map(|name| name.strip_prefix("vmlinuz-"));
    let pair = versions.filter_map(|version| {
        let initrds = [
            format!("initrd.img-{version}"),
            format!("initramfs-{version}.img"),
            format!("initrd-{version}"),
        ];
        let initrd = initrds.into_iter().find(|initrd| names.contains(initrd))?;
        Some((version, initrd))
    });
    let (version, initrd) = pair.max_by(|(a, _), (b, _)| version_order(a, b))?;
    Some(Candidate { system: system.clone(), folder, version: version.to_owned(), initrd })
}

/// Orders versions by their numbers where both have one, and else by characters.
pub(super) fn version_order(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    while !a.is_empty() && !b.is_empty() {
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (length_a, length_b) = (digits(a), digits(b));
        if length_a > 0 && length_b > 0 {
            let (number_a, number_b) =
                (a[..length_a].trim_start_matches('0'), b[..length_b].trim_start_matches('0'));
            let order = number_a.len().cmp(&number_b.len()).then(number_a.cmp(number_b));
            if order.is_ne() {
                return order;
            }
            (a, b) = (&a[length_a..], &b[length_b..]);
            continue;
        }
        let (mut rest_a, mut rest_b) = (a.chars(), b.chars());
        let order = rest_a.next().cmp(&rest_b.next());
        if order.is_ne() {
            return order;
        }
        (a, b) = (rest_a.as_str(), rest_b.as_str());
    }
    a.len().cmp(&b.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number() {
        let ascending =
            ["5.10.0-30-amd64", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-10-cloud-amd64", "6.12", "6.12.1"];
        for pair in ascending.windows(2) {
            assert_eq!(version_order(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(version_order(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(version_order("6.01", "6.1"), Ordering::Equal);
    }
}
