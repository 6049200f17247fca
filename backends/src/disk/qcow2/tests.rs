//! qcow2 images: random operations against a vector of bytes, QEMU's tools as the judge, and images that lie.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bivisor_machine::block::{BlockOperation, BlockStore};
use imago::FormatCreateBuilder;

use crate::disk::tests::{check_against_model, error_of, open_text, submit, write};
use crate::disk::{self, DiskEvents};

type Builder = imago::qcow2::Qcow2CreateBuilder<imago::file::File>;

fn create(path: &Path, size: u64, set: impl FnOnce(Builder) -> Builder) {
    let file = fs::File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    let file = imago::file::File::try_from(file).unwrap();
    set(Builder::new(file).size(size)).create().unwrap();
}

fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        println!("skipped: qemu-img is not installed (Debian: apt-get install qemu-utils)");
    }
    found
}

/// Runs `qemu-img` with these words in a folder; it must succeed.
fn qemu_img(folder: &Path, words: &str) -> String {
    let output =
        Command::new("qemu-img").args(words.split_whitespace()).current_dir(folder).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {words}: {text}");
    text
}

/// The image passes QEMU's check and holds these bytes.
fn qemu_agrees(folder: &Path, name: &str, model: &[u8]) {
    qemu_img(folder, &format!("check {name}"));
    qemu_img(folder, &format!("convert -O raw {name} out.raw"));
    assert!(fs::read(folder.join("out.raw")).unwrap() == model, "{name} is not what QEMU reads");
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i / 512 % 251) as u8 ^ (i % 3) as u8).collect()
}

#[test]
fn a_qcow2_disk_behaves_and_is_found_right_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let judge = has_qemu_img();
    let shapes = [(512, 16), (4096, 1), (4096, 64), (65_536, 16), (65_536, 8), (1 << 21, 32)];
    for (seed, (cluster, width)) in (0..).zip(shapes) {
        let size = 3 << 19;
        create(&path, size, |image| image.cluster_size(cluster).refcount_width(width));
        let mut model = vec![0; size as usize];
        for (round, options) in (0..).zip(["", ",cache=none", ",cache=writethrough,discard=off"]) {
            let disk = open_text(&format!("{}{options}", path.display())).unwrap();
            check_against_model(&*disk, &mut model, seed * 10 + round, 60);
            disk.drain();
        }
        if judge {
            qemu_agrees(folder.path(), "disk.qcow2", &model);
        }
    }
}

#[test]
fn a_disk_grows_and_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    for qcow2 in [true, false] {
        if qcow2 {
            create(&path, 64 << 10, |image| image.cluster_size(512));
        } else {
            fs::write(&path, vec![0; 64 << 10]).unwrap();
        }
        let spec: disk::DiskSpec = path.to_str().unwrap().parse().unwrap();
        let mut model = vec![0; 64 << 10];
        check_against_model(&*open_text(path.to_str().unwrap()).unwrap(), &mut model, 2, 20);
        assert!(disk::grow(&spec, 512).unwrap_err().to_string().contains("smaller"));
        disk::grow(&spec, 2 << 20).unwrap();
        model.resize(2 << 20, 0);
        check_against_model(&*open_text(path.to_str().unwrap()).unwrap(), &mut model, 3, 40);
        let reader = disk::Reader::open(&spec).unwrap();
        let mut bytes = vec![0; 2 << 20];
        reader.read(0, &mut bytes).unwrap();
        assert!(bytes == model && reader.read(1, &mut bytes).is_err());
        assert!(disk::check_unused(&spec).is_err());
        drop(reader);
        drop(disk::check_unused(&spec).unwrap());
    }
}

#[test]
fn a_flush_leaves_a_whole_image_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    create(&path, 1 << 20, |image| image.cluster_size(4096));
    let disk = open_text(path.to_str().unwrap()).unwrap();
    let mut model = vec![0; 1 << 20];
    check_against_model(&*disk, &mut model, 5, 50);
    let flushed = submit(&*disk, BlockOperation::Flush).recv().unwrap();
    assert_eq!(flushed.0, Ok(()));
    // As if the host had crashed here.
    let copy = folder.path().join("copy.qcow2");
    fs::copy(&path, &copy).unwrap();
    let again = open_text(&format!("{},readonly", copy.display())).unwrap();
    check_equal(&*again, &model);
}

fn check_equal(disk: &dyn BlockStore, model: &[u8]) {
    let operation = BlockOperation::Read { offset: 0, buffer: vec![1; model.len()] };
    let (result, bytes) = submit(disk, operation).recv().unwrap();
    assert_eq!(result, Ok(()));
    assert!(bytes == model);
}

#[test]
fn images_of_qemu_are_read_and_written_and_snapshots_stay() {
    if !has_qemu_img() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let bytes = pattern(2 << 20);
    fs::write(folder.path().join("in.raw"), &bytes).unwrap();
    for (seed, options) in (0..).zip([
        "-o compat=0.10",
        "-o compat=1.1",
        "-c -o compat=1.1",
        "-c -o compat=0.10,cluster_size=4096",
        "-o compat=1.1,lazy_refcounts=on,cluster_size=2M",
        "-o compat=1.1,refcount_bits=1,cluster_size=512",
    ]) {
        qemu_img(folder.path(), &format!("convert -f raw -O qcow2 {options} in.raw disk"));
        let snapshots = !options.contains("refcount_bits=1");
        if snapshots {
            qemu_img(folder.path(), "snapshot -c before disk");
        }
        let mut model = bytes.clone();
        let disk = open_text(folder.path().join("disk").to_str().unwrap()).unwrap();
        check_against_model(&*disk, &mut model, 100 + seed, 60);
        let discard = BlockOperation::Discard { offset: 1 << 20, length: 1 << 20 };
        assert_eq!(submit(&*disk, discard).recv().unwrap().0, Ok(()), "{options}");
        write(&*disk, 1 << 20, model[1 << 20..].to_vec());
        disk.drain();
        drop(disk);
        qemu_agrees(folder.path(), "disk", &model);
        if snapshots {
            qemu_img(folder.path(), "snapshot -a before disk");
            qemu_agrees(folder.path(), "disk", &bytes);
        }
    }
}

#[test]
fn an_image_leads_to_another_only_where_that_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let (inner, outer) = (folder.path().join("inner"), folder.path().join("outer"));
    fs::create_dir(&inner).unwrap();
    fs::create_dir(&outer).unwrap();
    let bytes = pattern(1 << 20);
    fs::write(inner.join("base.raw"), &bytes).unwrap();
    fs::write(outer.join("secret.raw"), &bytes).unwrap();
    let with_backing = |name: &str, file: &str, format: &str| {
        let path = inner.join(name);
        create(&path, 1 << 20, |image| image.backing(file.to_owned(), format.to_owned()));
        path.to_str().unwrap().to_owned()
    };
    let middle = with_backing("middle", "base.raw", "raw");
    let top = with_backing("top", "middle", "qcow2");
    assert!(error_of(&top).contains("refers to the backing file middle"), "{}", error_of(&top));
    let mut model = bytes.clone();
    let disk = open_text(&format!("{top},backing=on")).unwrap();
    check_against_model(&*disk, &mut model, 9, 80);
    disk.drain();
    drop(disk);
    let named = format!("{top},backing={}", inner.display());
    check_equal(&*open_text(&named).unwrap(), &model);
    check_equal(&*open_text(&format!("{middle},backing=on,readonly")).unwrap(), &bytes);
    assert!(fs::read(inner.join("base.raw")).unwrap() == bytes);

    for target in ["/etc/shadow", "../outer/secret.raw"] {
        let bad = with_backing("bad", target, "raw");
        let error = error_of(&format!("{bad},backing=on"));
        assert!(error.contains("is not in the folder") || error.contains("can't be found"), "{error}");
        assert!(error_of(&bad).contains("backing=on"));
    }
    std::os::unix::fs::symlink(outer.join("secret.raw"), inner.join("link")).unwrap();
    let bad = with_backing("bad", "link", "raw");
    assert!(error_of(&format!("{bad},backing=on")).contains("is not in the folder"));
    let circle = with_backing("circle", "circle", "qcow2");
    let error = error_of(&format!("{circle},backing=on,readonly"));
    assert!(error.contains("too many"), "{error}");
    let unnamed = with_backing("unnamed", "base.raw", "vmdk");
    assert!(error_of(&format!("{unnamed},backing=on")).contains("the format vmdk"));
}

/// Offsets of fields in the header.
const FIELDS: [(u64, &[u8], &str); 20] = [
    (4, &[0, 0, 0, 1], "version 1"),
    (4, &[0, 0, 0, 4], "version 4"),
    (20, &[0, 0, 0, 8], "2^8 bytes"),
    (20, &[0, 0, 0, 22], "2^22 bytes"),
    (24, &[0x7f, 0, 0, 0, 0, 0, 0, 0], "limit is 64 TiB"),
    (24, &[0, 0, 0, 0, 0, 0x10, 0, 1], "no whole number of 512-byte sectors"),
    (24, &[0, 0, 0, 0xff, 0, 0, 0, 0], "L1 table is too small"),
    (32, &[0, 0, 0, 1], "encrypted"),
    (36, &[0xff, 0xff, 0xff, 0xff], "entries"),
    (40, &[0, 0, 0, 0, 0xff, 0, 0, 0], "not copied to its end"),
    (40, &[0, 0, 0, 0, 0, 0, 0, 0], "not at the start of a cluster"),
    (48, &[0, 0, 0, 0, 0, 0, 0x02, 0], "not at the start of a cluster"),
    (56, &[0xff, 0xff, 0xff, 0xff], "table of reference counts would have"),
    (60, &[0xff, 0, 0, 0], "snapshots"),
    (72, &[0, 0, 0, 0, 0, 0, 0, 1], "not closed in order"),
    (72, &[0, 0, 0, 0, 0, 0, 0, 2], "corrupt"),
    (72, &[0, 0, 0, 0, 0, 0, 0, 4], "in another file"),
    (72, &[0, 0, 0, 0x80, 0, 0, 0, 0], "needs feature 39"),
    (96, &[0, 0, 0, 7], "2^7 bits"),
    (100, &[0, 0, 0, 96], "header would have 96 bytes"),
];

#[test]
fn headers_that_cannot_be_are_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let text = path.to_str().unwrap().to_owned();
    for (at, bytes, part) in FIELDS {
        create(&path, 1 << 20, |image| image.cluster_size(4096));
        fs::File::options().write(true).open(&path).unwrap().write_all_at(bytes, at).unwrap();
        let error = error_of(&text);
        assert!(error.contains(part) && error.contains("disk.qcow2"), "{at}: {error}");
    }
    fs::write(&path, b"QFI\xfb\0\0\0\x03").unwrap();
    assert!(error_of(&text).contains("cut off"));
}

/// The tables' places in a fresh image with an allocated cluster at the disk's start.
fn with_data(path: &Path) -> (u64, u64, u64) {
    create(path, 1 << 20, |image| image.cluster_size(4096));
    let disk = open_text(path.to_str().unwrap()).unwrap();
    write(&*disk, 0, vec![7; 8192]);
    disk.drain();
    drop(disk);
    let bytes = fs::read(path).unwrap();
    let l1 = super::header::u64_at(&bytes, 40);
    let l2 = super::header::u64_at(&bytes, l1 as usize) & 0x00ff_ffff_ffff_fe00;
    let counts = super::header::u64_at(&bytes, super::header::u64_at(&bytes, 48) as usize);
    (l1, l2, counts)
}

#[test]
fn tables_that_lie_on_something_else_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let text = path.to_str().unwrap().to_owned();
    const COPIED: u64 = 1 << 63;
    let (l1, l2, counts) = with_data(&path);
    let cases = [
        (l1, COPIED | l1, "L2 table lies where something else"),
        (l1, COPIED | counts, "L2 table lies where something else"),
        (l1, COPIED | 0x4000_0000, "not copied to its end"),
        (l1, COPIED | (l2 + 512), "L1 table means nothing"),
        (l2, COPIED, ""),
        (l2, COPIED | l2, "data lies where something else"),
        (l2, COPIED | counts, "data lies where something else"),
        (l2 + 16, COPIED | counts, "data lies where something else"),
        (l2 + 16, COPIED | 0x00ff_ffff_ffff_f000, "not copied to its end"),
        (l2 + 16, COPIED | 0x200, "L2 table means nothing"),
        (l2 + 16, 1 << 62, "compressed data means nothing"),
        (l2 + 16, 1 << 62 | l2, "compressed data lies where something else"),
    ];
    for (at, entry, part) in cases {
        with_data(&path);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&entry.to_be_bytes(), at).unwrap();
        match disk::open(&text.parse().unwrap(), Arc::new(|_| {})) {
            Ok(_) => assert_eq!(part, "", "{at:#x} {entry:#x} was accepted"),
            Err(error) => {
                assert!(!part.is_empty() && error.to_string().contains(part), "{entry:#x}: {error}")
            }
        }
    }
}

#[test]
fn a_count_that_a_crash_lost_is_set_right() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let (_, l2, counts) = with_data(&path);
    let bytes = fs::read(&path).unwrap();
    let data = super::header::u64_at(&bytes, l2 as usize) & 0x00ff_ffff_ffff_fe00;
    let file = fs::File::options().write(true).open(&path).unwrap();
    let place = counts + data / 4096 * 2;
    file.write_all_at(&[0, 0], place).unwrap();
    let disk = open_text(path.to_str().unwrap()).unwrap();
    let mut model = vec![0; 1 << 20];
    model[..8192].fill(7);
    check_against_model(&*disk, &mut model, 3, 50);
    disk.drain();
    drop(disk);
    assert_eq!(fs::read(&path).unwrap()[place as usize..][..2], [0, 1]);
    if has_qemu_img() {
        qemu_agrees(folder.path(), "disk.qcow2", &model);
    }
    file.write_all_at(&[0, 2], place).unwrap();
    assert!(error_of(path.to_str().unwrap()).contains("counts as shared"));
}

/// Does what a guest may do; errors are fine, panics and waiting for ever are not.
fn exercise(disk: &dyn BlockStore, random: &mut fastrand::Rng) {
    let sectors = disk.size() / 512;
    let mut pending = Vec::new();
    for _ in 0..12 {
        let offset = random.u64(..sectors) * 512;
        let length = (1 + random.u64(..64)).min(sectors - offset / 512) * 512;
        let operation = match random.u8(..5) {
            0 | 1 => BlockOperation::Read { offset, buffer: vec![0; length as usize] },
            2 => BlockOperation::Write { offset, buffer: vec![0x99; length as usize] },
            3 => BlockOperation::WriteZeroes { offset, length, unmap: true },
            _ => BlockOperation::Discard { offset, length },
        };
        pending.push(submit(disk, operation));
    }
    pending.push(submit(disk, BlockOperation::Flush));
    for outcome in pending {
        // What it says matters not.
        let _ = outcome.recv_timeout(Duration::from_secs(20)).expect("the request ends");
    }
}

/// Where a mutation does most: header, tables, then anywhere.
fn mutate(bytes: &mut [u8], random: &mut fastrand::Rng, tables: &[u64]) {
    for _ in 0..random.usize(1..6) {
        let at = match random.u8(..10) {
            0..4 => random.usize(..120),
            4..9 => tables[random.usize(..tables.len())] as usize + random.usize(..64),
            _ => random.usize(..bytes.len()),
        };
        let Some(byte) = bytes.get_mut(at) else { continue };
        *byte = match random.u8(..4) {
            0 => random.u8(..),
            1 => *byte ^ 1 << random.u8(..8),
            2 => 0,
            _ => 0xff,
        };
    }
}

#[test]
fn mutated_images_neither_panic_nor_hang_nor_grow() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    let mut originals = Vec::new();
    let (l1, l2, counts) = with_data(&path);
    originals.push((fs::read(&path).unwrap(), vec![l1, l2, counts, 4096, 8192]));
    if has_qemu_img() {
        fs::write(folder.path().join("in.raw"), pattern(256 << 10)).unwrap();
        qemu_img(folder.path(), "convert -c -f raw -O qcow2 -o cluster_size=4096 in.raw disk.qcow2");
        qemu_img(folder.path(), "snapshot -c one disk.qcow2");
        let bytes = fs::read(&path).unwrap();
        let tables = [40, 48, 64].map(|at| super::header::u64_at(&bytes, at));
        let l2 = super::header::u64_at(&bytes, tables[0] as usize) & 0x00ff_ffff_ffff_fe00;
        originals.push((bytes, [&tables[..], &[l2]].concat()));
    }
    let events: DiskEvents = Arc::new(|_| {});
    let start = Instant::now();
    let (mut opened, mut refused) = (0, 0);
    for seed in 0..1500 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (bytes, tables) = &originals[seed as usize % originals.len()];
        let mut bytes = bytes.clone();
        mutate(&mut bytes, &mut random, tables);
        fs::write(&path, &bytes).unwrap();
        let spec = format!("{},format=qcow2,cache=unsafe", path.display()).parse().unwrap();
        match disk::open(&spec, events.clone()) {
            Ok(store) => {
                exercise(&*store, &mut random);
                opened += 1;
            }
            Err(_) => refused += 1,
        }
        assert!(fs::metadata(&path).unwrap().len() < 64 << 20, "seed {seed}");
    }
    println!("{opened} opened, {refused} refused in {:?}", start.elapsed());
    assert!(opened > 50 && refused > 500, "{opened} {refused}");
}

#[test]
fn a_sparse_image_with_huge_tables_is_done_with_quickly() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("disk.qcow2");
    create(&path, 512, |image| image.cluster_size(65_536));
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    // 64 TiB of disk, each L2 table in a hole of the file.
    let entries = (64u64 << 40) / (65_536 * 8192);
    file.set_len((1 << 30) + entries * 65_536).unwrap();
    let l1: Vec<u8> = (0..entries).flat_map(|i| (1 << 63 | (1 << 30) + i * 65_536).to_be_bytes()).collect();
    file.write_all_at(&(64u64 << 40).to_be_bytes(), 24).unwrap();
    file.write_all_at(&(entries as u32).to_be_bytes(), 36).unwrap();
    file.write_all_at(&(16u64 << 20).to_be_bytes(), 40).unwrap();
    file.write_all_at(&l1, 16 << 20).unwrap();
    let start = Instant::now();
    let error = error_of(path.to_str().unwrap());
    assert!(error.contains("doesn't count"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}
