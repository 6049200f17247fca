//! The parts of a disk that may hold file systems: GPT (UEFI Specification, chapter 5) and MBR partitions.

use std::io;

use bivisor_backends::disk::Reader;

const SECTOR: u64 = 512;
/// Entries of a table at most; 128 are usual.
const MAX_ENTRIES: u32 = 1024;

/// A range of a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) start: u64,
    pub(super) length: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// All partitions that lie on the disk, or the whole disk if it has none.
pub(super) fn parts(disk: &Reader) -> io::Result<Vec<Part>> {
    let mut first = [0; 2 * SECTOR as usize];
    disk.read(0, &mut first)?;
    let whole = Part { start: 0, length: disk.size() };
    let mut parts = if &first[512..520] == b"EFI PART" {
        gpt(disk, &first[512..])?
    } else if first[510..512] == [0x55, 0xaa] {
        (0..4).filter_map(|index| mbr_entry(&first[446 + index * 16..])).collect()
    } else {
        Vec::new()
    };
    parts.retain(|part: &Part| part.start.checked_add(part.length).is_some_and(|end| end <= disk.size()));
    if parts.is_empty() {
        parts.push(whole);
    }
    Ok(parts)
}

fn gpt(disk: &Reader, header: &[u8]) -> io::Result<Vec<Part>> {
    let (table, count, size) = (u64_at(header, 72), u32_at(header, 80), u32_at(header, 84));
    let mut parts = Vec::new();
    if !(128..=4096).contains(&size) {
        return Ok(parts);
    }
    let mut entry = vec![0; size as usize];
    for index in 0..count.min(MAX_ENTRIES) {
        let at = table.checked_mul(SECTOR).and_then(|at| at.checked_add(u64::from(index * size)));
        // Behind a table that is cut off there is nothing to find.
        if at.is_none_or(|at| disk.read(at, &mut entry).is_err()) {
            break;
        }
        let (first, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
        if entry[..16].iter().any(|&byte| byte != 0) && first <= last {
            let sectors = (last - first).checked_add(1);
            let bytes = first.checked_mul(SECTOR).zip(sectors.and_then(|count| count.checked_mul(SECTOR)));
            parts.extend(bytes.map(|(start, length)| Part { start, length }));
        }
    }
    Ok(parts)
}

fn mbr_entry(entry: &[u8]) -> Option<Part> {
    let (kind, first, count) = (entry[4], u32_at(entry, 8), u32_at(entry, 12));
    let part = Part { start: u64::from(first) * SECTOR, length: u64::from(count) * SECTOR };
    (kind != 0 && count != 0).then_some(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_backends::disk::DiskSpec;

    fn parts_of(bytes: &[u8]) -> Vec<Part> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        parts(&Reader::open(&DiskSpec::new(file.path())).unwrap()).unwrap()
    }

    #[test]
    fn tables_are_read_and_lies_passed_over() {
        let mut disk = vec![0; 1 << 20];
        let whole = [Part { start: 0, length: 1 << 20 }];
        assert_eq!(parts_of(&disk), whole);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(parts_of(&disk), whole);
        disk[450] = 0x83;
        disk[454] = 8;
        disk[458] = 16;
        assert_eq!(parts_of(&disk), [Part { start: 4096, length: 8192 }]);
        disk[461] = 0xff;
        assert_eq!(parts_of(&disk), whole);

        disk[512..520].copy_from_slice(b"EFI PART");
        assert_eq!(parts_of(&disk), whole);
        disk[512 + 72] = 2;
        disk[512 + 80..512 + 84].fill(0xff);
        disk[512 + 84] = 128;
        for (index, first, last) in [(0, 8u64, 15u64), (1, 9, 8), (2, 100, 199), (3, 0, u64::MAX)] {
            let entry = &mut disk[1024 + index * 128..][..128];
            entry[0] = 1;
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        }
        assert_eq!(
            parts_of(&disk),
            [Part { start: 4096, length: 4096 }, Part { start: 51_200, length: 51_200 }]
        );
        disk[512 + 72..512 + 80].fill(0xff);
        assert_eq!(parts_of(&disk), whole);
    }
}
