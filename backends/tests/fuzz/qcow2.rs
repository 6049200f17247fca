//! qcow2 images with damage: opening one ends in a sentence or in a disk, and such a disk answers every request.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use bivisor_backends::disk::{self, DiskSpec, Format};
use bivisor_machine::block::{BlockOperation, BlockStore};
use fastrand::Rng;
use imago::FormatCreateBuilder;

use crate::budget::rounds;

/// Bytes of the disks.
const SIZE: u64 = 1 << 20;
/// Bytes of an image that are damaged: its tables lie in front.
const TABLES: usize = 96 << 10;

type Builder = imago::qcow2::Qcow2CreateBuilder<imago::file::File>;

fn create(path: &Path, cluster: usize, width: usize) {
    let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    let file = imago::file::File::try_from(file).unwrap();
    Builder::new(file).size(SIZE).cluster_size(cluster).refcount_width(width).create().unwrap();
}

fn open(path: &Path, writes: bool, backing: bool) -> Result<Arc<dyn BlockStore>, String> {
    let mut spec = DiskSpec { format: Some(Format::Qcow2), read_only: !writes, ..DiskSpec::new(path) };
    if backing {
        spec.backing = disk::Backing::Beside;
    }
    disk::open(&spec, Arc::new(|_| {})).map_err(|error| error.to_string())
}

fn ask(disk: &dyn BlockStore, operation: BlockOperation) {
    let (done, ended) = channel();
    disk.submit(
        operation,
        Box::new(move |result, _| {
            let _ = done.send(result);
        }),
    );
    // What it says doesn't matter: an image may be damaged where nobody looks before.
    let _ = ended.recv_timeout(Duration::from_secs(30)).expect("a request is answered");
}

/// Whole images of different shapes, with data in them.
fn seeds(folder: &Path) -> Vec<Vec<u8>> {
    let shapes = [(512, 16), (4096, 1), (4096, 64), (65_536, 16)];
    let images = shapes.map(|(cluster, width)| {
        let path = folder.join("seed.qcow2");
        create(&path, cluster, width);
        let disk = open(&path, true, false).unwrap();
        for place in [0u64, 77, 300, 2047] {
            let buffer = vec![place as u8 | 1; 512];
            ask(&*disk, BlockOperation::Write { offset: place * 512, buffer });
        }
        ask(&*disk, BlockOperation::Discard { offset: 64 << 10, length: 64 << 10 });
        ask(&*disk, BlockOperation::Flush);
        disk.drain();
        drop(disk);
        fs::read(path).unwrap()
    });
    images.to_vec()
}

/// Changes some bytes: single ones, big-endian numbers that mean something, and pieces copied from elsewhere.
fn damage(bytes: &mut Vec<u8>, random: &mut Rng) {
    let tables = bytes.len().min(TABLES);
    for _ in 0..random.usize(1..8) {
        // The header is where most is decided.
        let at = if random.bool() { random.usize(..112) } else { random.usize(..tables - 8) };
        match random.u8(..5) {
            0 => bytes[at] = random.u8(..),
            1 => bytes[at] ^= 1 << random.u8(..8),
            2 => {
                let interesting =
                    [0, 1, 511, 512, 1 << 16, SIZE, 1 << 31, 1 << 47, 1 << 56, 1 << 62, 1 << 63, u64::MAX];
                let number = interesting[random.usize(..interesting.len())].wrapping_add(random.u64(..3));
                bytes[at & !7..][..8].copy_from_slice(&number.to_be_bytes());
            }
            3 => {
                let number = [0u32, 1, 9, 16, 31, 63, 1 << 20, u32::MAX][random.usize(..8)];
                bytes[at & !3..][..4].copy_from_slice(&number.to_be_bytes());
            }
            _ => {
                // An entry of a table that leads where another one leads, or back to a table.
                let from = random.usize(..tables / 8 - 1) * 8;
                bytes.copy_within(from..from + 8, at & !7);
            }
        }
    }
    if random.u8(..16) == 0 {
        bytes.truncate(random.usize(..bytes.len()));
    }
}

fn try_image(path: &Path, random: &mut Rng) {
    let writes = random.bool();
    let Ok(disk) = open(path, writes, random.u8(..4) == 0) else { return };
    let sectors = disk.size() / 512;
    for _ in 0..random.usize(1..12) {
        let offset = random.u64(..sectors.max(1)) * 512;
        let length = (random.u64(1..64) * 512).min(disk.size().saturating_sub(offset));
        let buffer = vec![random.u8(..); length as usize];
        let operation = match random.u8(..6) {
            0 | 1 => BlockOperation::Read { offset, buffer },
            2 | 3 => BlockOperation::Write { offset, buffer },
            4 => BlockOperation::WriteZeroes { offset, length, unmap: random.bool() },
            _ => BlockOperation::Flush,
        };
        ask(&*disk, operation);
    }
    disk.drain();
}

#[test]
fn fuzz_qcow2_opening() {
    let folder = tempfile::tempdir().unwrap();
    let seeds = seeds(folder.path());
    let path = folder.path().join("disk.qcow2");
    rounds("qcow2", |random| {
        let mut bytes = seeds[random.usize(..seeds.len())].clone();
        damage(&mut bytes, random);
        fs::write(&path, &bytes).unwrap();
        try_image(&path, random);
        // A sparse image may have become far larger than its disk is.
        let size = fs::metadata(&path).unwrap().len();
        assert!(size <= (bytes.len() as u64 + SIZE) * 4 + (64 << 20), "the image grew to {size} bytes");
    });
}
