//! The image that starts a bare machine with BIOS or UEFI, from a disk, a stick or a CD: one file is all of it.
//!
//! | bytes | what |
//! |---|---|
//! | 0 | boot sector with a partition table, for BIOS: `type1/src/entry/bios.rs` |
//! | 2048 | what it loads; a CD's boot image too (El Torito 1.0) |
//! | 32 KiB | a CD's descriptors (ECMA-119), boot catalog and root directory |
//! | 1 MiB | the EFI system partition: FAT, with the hypervisor as `EFI/BOOT/BOOTX64.EFI` and the machines as `bivisor/machines` |

use std::io::{self, Cursor, Write};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use super::hypervisor::{BASE, Hypervisor};

const SECTOR: usize = 512;
/// Bytes of a CD's sector.
const CD_SECTOR: usize = 2048;
/// Where the loader is, behind the boot sector.
const LOADER: usize = 2048;
/// Where a CD's descriptors begin.
const DESCRIPTORS: usize = 16 * CD_SECTOR;
/// Where the partition is.
const PARTITION: usize = 1 << 20;
/// Bytes of it that its file system may need for itself, and at the disk's end, where the loader reads too far.
const SPARE: usize = 1 << 20;
/// Type of an EFI system partition in a partition table of MBR's (UEFI Specification, 5.2.2).
const EFI_PARTITION: u8 = 0xef;
/// Machines begin in memory at a multiple of this.
const LARGE_PAGE: u64 = 2 << 20;
/// The loader's open places, from its begin: see `type1/src/entry/bios.rs`.
mod place {
    pub(super) const PIECES: usize = 4;
    pub(super) const CLEAR: usize = 28;
    pub(super) const ENTRY: usize = 36;
    pub(super) const MODULE: usize = 40 + 56;
}

/// Makes the image.
///
/// # Errors
/// The file system can't be made.
pub fn image(hypervisor: &Hypervisor, machines: &[u8]) -> io::Result<Vec<u8>> {
    let application = hypervisor.pe();
    let partition = partition(&application, machines)?;
    let mut disk = vec![0; PARTITION];
    disk.extend(&partition);
    disk.resize((disk.len() + SPARE).next_multiple_of(1 << 20), 0);

    let (sector, loader) = hypervisor.bios.split_at(SECTOR);
    disk[..SECTOR].copy_from_slice(sector);
    put(&mut disk, 446, &partition_entry(partition.len()));
    put(&mut disk, LOADER, loader);
    let place_of = |content: &[u8]| {
        find(&partition, content)
            .map(|at| (PARTITION + at) as u64)
            .ok_or_else(|| io::Error::other("a file of the EFI partition lies in pieces"))
    };
    let in_memory = hypervisor.memory().len() as u64;
    let module = hypervisor.end().next_multiple_of(LARGE_PAGE);
    // The application's first page is headers, which memory has no use for.
    let image = place_of(&application)? + 4096;
    let pieces = [
        [image / SECTOR as u64, in_memory, BASE],
        [place_of(machines)? / SECTOR as u64, machines.len() as u64, module],
    ];
    let words = pieces.as_flattened().iter().map(|word| *word as u32).collect::<Vec<_>>();
    put_u32s(&mut disk, LOADER + place::PIECES, &words);
    let clear = BASE + in_memory.next_multiple_of(4);
    put_u32s(&mut disk, LOADER + place::CLEAR, &[clear as u32, (hypervisor.end() - clear) as u32]);
    put_u32s(&mut disk, LOADER + place::ENTRY, &[hypervisor.pvh_entry]);
    put_u32s(&mut disk, LOADER + place::MODULE, &[module as u32, 0, machines.len() as u32, 0]);
    describe_cd(&mut disk, loader.len(), partition.len());
    Ok(disk)
}

/// Where machines end in memory if a BIOS loads them.
pub fn end_in_memory(hypervisor: &Hypervisor, machines: &[u8]) -> u64 {
    hypervisor.end().next_multiple_of(LARGE_PAGE) + machines.len() as u64
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put_u32s(disk: &mut [u8], at: usize, words: &[u32]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(disk, at, &bytes);
}

/// The file system of the EFI partition.
fn partition(application: &[u8], machines: &[u8]) -> io::Result<Vec<u8>> {
    let size = application.len() + machines.len();
    // FAT has up to 4 bytes for each cluster of 512 bytes or more, twice.
    let mut disk = Cursor::new(vec![0; (size + size / 32 + 2 * SPARE).next_multiple_of(1 << 20)]);
    fatfs::format_volume(&mut disk, FormatVolumeOptions::new().volume_label(*b"BIVISOR    "))?;
    let system = FileSystem::new(&mut disk, FsOptions::new())?;
    {
        let root = system.root_dir();
        root.create_dir("EFI")?.create_dir("BOOT")?;
        root.create_dir("bivisor")?;
        for (name, content) in [("EFI/BOOT/BOOTX64.EFI", application), ("bivisor/machines", machines)] {
            let mut file = root.create_file(name)?;
            file.write_all(content)?;
            file.flush()?;
        }
    }
    system.unmount()?;
    Ok(disk.into_inner())
}

/// Where a file lies, in one piece: as it was written to an empty file system, its bytes say so.
fn find(disk: &[u8], content: &[u8]) -> Option<usize> {
    (0..disk.len()).step_by(SECTOR).find(|at| disk[*at..].starts_with(content))
}

/// An entry of a partition table: active, of the EFI's type, with addresses by sector only.
fn partition_entry(size: usize) -> [u8; 16] {
    let mut entry = [0x80, 0xfe, 0xff, 0xff, EFI_PARTITION, 0xfe, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
    put_u32s(&mut entry, 8, &[(PARTITION / SECTOR) as u32, (size / SECTOR) as u32]);
    entry
}

/// A number as CDs have them, in both byte orders.
fn both(number: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// A directory's entry (ECMA-119, 9.1). The date is none.
fn directory_entry(name: &[u8], sector: u32, size: u32, is_directory: bool) -> Vec<u8> {
    let mut entry = vec![0, 0];
    entry.extend(both(sector));
    entry.extend(both(size));
    entry.extend([0; 7]);
    entry.extend([if is_directory { 2 } else { 0 }, 0, 0, 1, 0, 0, 1, name.len() as u8]);
    entry.extend(name);
    entry.resize(entry.len().next_multiple_of(2), 0);
    entry[0] = entry.len() as u8;
    entry
}

/// What makes it a CD, too.
fn describe_cd(disk: &mut [u8], loader: usize, partition: usize) {
    const CATALOG: u32 = 19;
    const PATHS: [u32; 2] = [20, 21];
    const ROOT: u32 = 22;
    let at = |sector: u32| sector as usize * CD_SECTOR;
    let root = directory_entry(&[0], ROOT, CD_SECTOR as u32, true);

    let first = DESCRIPTORS;
    put(disk, first, b"\x01CD001\x01\0");
    disk[first + 8..first + 72].fill(b' ');
    put(disk, first + 40, b"BIVISOR");
    let sectors = (disk.len() / CD_SECTOR) as u32;
    put(disk, first + 80, &both(sectors));
    put(disk, first + 120, &[1, 0, 0, 1, 1, 0, 0, 1, 0, 8, 8, 0]);
    put(disk, first + 132, &both(10));
    put(disk, first + 140, &PATHS[0].to_le_bytes());
    put(disk, first + 148, &PATHS[1].to_be_bytes());
    put(disk, first + 156, &root);
    disk[first + 190..first + 813].fill(b' ');
    for date in 0..4 {
        disk[first + 813 + 17 * date..][..16].fill(b'0');
    }
    disk[first + 881] = 1;

    let boot = first + CD_SECTOR;
    put(disk, boot, b"\0CD001\x01EL TORITO SPECIFICATION");
    put(disk, boot + 71, &CATALOG.to_le_bytes());
    put(disk, boot + CD_SECTOR, b"\xffCD001\x01");

    // Validation entry, whose words sum up to zero; the BIOS's entry; the head of a section for UEFI, and its entry.
    let catalog = at(CATALOG);
    let validation = [0x0001, 0, 0x55aau16.swap_bytes()];
    let sum = 0u16.wrapping_sub(validation.iter().fold(0, |sum: u16, word| sum.wrapping_add(*word)));
    put(disk, catalog, &[1]);
    put(disk, catalog + 28, &sum.to_le_bytes());
    put(disk, catalog + 30, &[0x55, 0xaa]);
    let entry = |segment: u16, sectors: u16, start: usize| {
        let mut entry = vec![0x88, 0];
        entry.extend(segment.to_le_bytes());
        entry.extend([0, 0]);
        entry.extend(sectors.to_le_bytes());
        entry.extend(((start / CD_SECTOR) as u32).to_le_bytes());
        entry
    };
    put(disk, catalog + 32, &entry(0x7e0, loader.div_ceil(SECTOR) as u16, LOADER));
    put(disk, catalog + 64, &[0x91, EFI_PARTITION, 1, 0]);
    // No sectors: up to the end of the disk (UEFI Specification, 13.3.2.1).
    put(disk, catalog + 96, &entry(0, 0, PARTITION));

    put(disk, at(PATHS[0]), &[1, 0, ROOT as u8, 0, 0, 0, 1, 0, 0, 0]);
    put(disk, at(PATHS[1]), &[1, 0, 0, 0, 0, ROOT as u8, 0, 1, 0, 0]);
    let entries = [
        root,
        directory_entry(&[1], ROOT, CD_SECTOR as u32, true),
        directory_entry(b"EFI.IMG;1", (PARTITION / CD_SECTOR) as u32, partition as u32, false),
    ];
    put(disk, at(ROOT), &entries.concat());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metal::hypervisor::tests::linked;
    use std::io::Read;

    fn u32_at(disk: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(disk[at..at + 4].try_into().unwrap())
    }

    fn made() -> (Hypervisor, Vec<u8>, Vec<u8>) {
        let hypervisor = Hypervisor::parse(linked()).unwrap();
        let machines: Vec<u8> =
            (0..200_000u32).map(|number| (number.wrapping_mul(number) >> 3) as u8).collect();
        let disk = image(&hypervisor, &machines).unwrap();
        (hypervisor, machines, disk)
    }

    #[test]
    fn both_kinds_of_firmware_find_the_same_files() {
        let (hypervisor, machines, disk) = made();
        assert_eq!((disk[450], disk[446]), (EFI_PARTITION, 0x80));
        let (start, sectors) = (u32_at(&disk, 454) as usize * SECTOR, u32_at(&disk, 458) as usize);
        let partition = Cursor::new(disk[start..start + sectors * SECTOR].to_vec());
        let system = FileSystem::new(partition, FsOptions::new()).unwrap();
        let read = |name| {
            let mut content = Vec::new();
            system.root_dir().open_file(name).unwrap().read_to_end(&mut content).unwrap();
            content
        };
        assert!(read("EFI/BOOT/BOOTX64.EFI") == hypervisor.pe() && read("bivisor/machines") == machines);

        let piece =
            |index: usize| [0, 4, 8].map(|at| u32_at(&disk, LOADER + place::PIECES + 12 * index + at));
        let content = |piece: [u32; 3]| &disk[piece[0] as usize * SECTOR..][..piece[1] as usize];
        assert!(content(piece(0)) == hypervisor.memory() && content(piece(1)) == machines);
        assert_eq!((piece(0)[2], piece(1)[2]), (BASE as u32, 0x40_0000));
        assert_eq!(u32_at(&disk, LOADER + place::CLEAR), 0x20_2100);
        assert_eq!(u32_at(&disk, LOADER + place::CLEAR + 4), 0x2f00);
        assert_eq!(u32_at(&disk, LOADER + place::ENTRY), 0x20_5678);
        assert_eq!(u32_at(&disk, LOADER + place::MODULE), 0x40_0000);
        assert_eq!(u32_at(&disk, LOADER + place::MODULE + 8), machines.len() as u32);
        assert_eq!(end_in_memory(&hypervisor, &machines), 0x40_0000 + machines.len() as u64);
    }

    #[test]
    fn it_is_a_cd_that_starts() {
        let (_, _, disk) = made();
        let sector = |number: u32| &disk[number as usize * CD_SECTOR..][..CD_SECTOR];
        assert!(sector(16).starts_with(b"\x01CD001") && sector(18).starts_with(b"\xffCD001"));
        let catalog = sector(u32_at(sector(17), 71));
        let sum = catalog[..32]
            .chunks(2)
            .fold(0u16, |sum, word| sum.wrapping_add(u16::from_le_bytes([word[0], word[1]])));
        assert_eq!(sum, 0);
        let loader = sector(u32_at(catalog, 40));
        assert_eq!((u32_at(catalog, 34) & 0xffff, loader), (0x7e0, &disk[LOADER..LOADER + CD_SECTOR]));
        assert_eq!((catalog[65], u32_at(catalog, 104) as usize * CD_SECTOR), (EFI_PARTITION, PARTITION));
    }
}
