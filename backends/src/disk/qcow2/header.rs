//! The header of a qcow2 image (QEMU, docs/interop/qcow2.txt), read as what somebody hostile may have written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of version 2's header.
const V2_LENGTH: usize = 72;
/// Bytes of version 3's header at least.
const V3_LENGTH: usize = 104;
/// QEMU's limits, in bytes: `QCOW_MAX_L1_SIZE`, `QCOW_MAX_REFTABLE_SIZE`.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_DISK: u64 = 64 << 40;
const MAX_NAME: usize = 1023;

/// Incompatible features that the specification knows, by bit.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Header extensions.
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const FEATURE_NAME_LENGTH: usize = 48;

/// The file that an image refers to for what it does not contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BackingName {
    pub(super) name: String,
    /// `raw` or `qcow2`, if it says.
    pub(super) format: Option<String>,
}

/// What the header says, found to be possible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u64,
    /// A reference count has 2 to this power bits.
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) backing: Option<BackingName>,
}

/// Words of numbers in big-endian order, at offsets that the caller has checked.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}

impl Header {
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries that the L1 table needs for a disk of this size.
    pub(super) fn needed_l1_entries(&self) -> u64 {
        self.size.div_ceil(self.cluster_size() * (self.cluster_size() / 8))
    }

    /// Reads and checks the header of an image in a file of so many bytes. `writes`: the image is to be changed.
    ///
    /// # Errors
    /// What is wrong and what to do, to follow "the disk … can't be used: ".
    pub(super) fn read(file: &File, file_size: u64, writes: bool) -> Result<Self, String> {
        let mut bytes = read_up_to(file, V3_LENGTH)?;
        if bytes.len() < V2_LENGTH {
            return Err(format!("its header is cut off after {} bytes: copy the image again", bytes.len()));
        }
        let version = u32_at(&bytes, 4);
        if version != 2 && version != 3 {
            return Err(format!(
                "it has version {version} of the qcow2 format, and Bivisor knows 2 and 3: convert it with `qemu-img convert -O qcow2`"
            ));
        }
        if version == 3 && bytes.len() < V3_LENGTH {
            return Err("its header is cut off: copy the image again".into());
        }
        let cluster_bits = u32_at(&bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(&format!("its clusters would have 2^{cluster_bits} bytes")));
        }
        bytes = read_up_to(file, 1 << cluster_bits)?;
        if bytes.len() < V3_LENGTH {
            bytes.resize(V3_LENGTH, 0);
        }
        let header = Self::parse(&bytes, version, cluster_bits)?;
        header.refuse_features(&bytes, writes)?;
        header.check_places(file_size)?;
        Ok(header)
    }

    fn parse(bytes: &[u8], version: u32, cluster_bits: u32) -> Result<Self, String> {
        let refcount_order = if version == 2 { 4 } else { u32_at(bytes, 96) };
        let length = if version == 2 { V2_LENGTH } else { u32_at(bytes, 100) as usize };
        if refcount_order > 6 {
            return Err(damaged(&format!("its reference counts would have 2^{refcount_order} bits")));
        }
        if length > bytes.len() || !length.is_multiple_of(8) || (version == 3 && length < V3_LENGTH) {
            return Err(damaged(&format!("its header would have {length} bytes")));
        }
        let name = backing_name(bytes)?;
        let format = backing_format(bytes, length)?;
        Ok(Self {
            version,
            cluster_bits,
            size: u64_at(bytes, 24),
            l1_offset: u64_at(bytes, 40),
            l1_entries: u32_at(bytes, 36).into(),
            refcount_table_offset: u64_at(bytes, 48),
            refcount_table_clusters: u32_at(bytes, 56).into(),
            refcount_order,
            snapshots: u32_at(bytes, 60),
            snapshots_offset: u64_at(bytes, 64),
            backing: name.map(|name| BackingName { name, format }),
        })
    }

    fn refuse_features(&self, bytes: &[u8], writes: bool) -> Result<(), String> {
        if u32_at(bytes, 32) != 0 {
            return Err("it is encrypted, which Bivisor does not read: make a copy without encryption with `qemu-img convert`".into());
        }
        let features = if self.version == 2 { 0 } else { u64_at(bytes, 72) };
        let refusals = [
            (CORRUPT, "it is marked as corrupt: `qemu-img check -r all` may repair it"),
            (
                DATA_FILE,
                "its data is in another file, which Bivisor does not read: make one image with `qemu-img convert -O qcow2`",
            ),
            (
                COMPRESSION,
                "it is compressed by a method other than zlib: convert it with `qemu-img convert -O qcow2`",
            ),
            (
                EXTENDED_L2,
                "it has subclusters, which Bivisor does not know: convert it with `qemu-img convert -O qcow2`",
            ),
            (
                DIRTY,
                "it was not closed in order, and its reference counts are not true: `qemu-img check -r all` repairs it",
            ),
        ];
        for (feature, sentence) in refusals {
            // imago refuses a dirty image even where it is only read.
            if features & feature != 0 {
                return Err(sentence.into());
            }
        }
        if features != 0 {
            return Err(format!(
                "it needs feature {} of the format, which Bivisor does not know: convert it with `qemu-img convert -O qcow2 -o compat=1.1`",
                features.trailing_zeros()
            ));
        }
        if writes && self.version == 3 && u64_at(bytes, 88) & 1 != 0 {
            return Err("it keeps bitmaps of what changed, which Bivisor would make untrue: remove them with `qemu-img bitmap --remove`, or say `readonly` or `snapshot`".into());
        }
        Ok(())
    }

    /// Checks sizes and places against limits and the file's size.
    fn check_places(&self, file_size: u64) -> Result<(), String> {
        if self.size == 0 || !self.size.is_multiple_of(512) {
            return Err(format!(
                "its disk has {} bytes, which is no whole number of 512-byte sectors: `qemu-img resize` makes it one",
                self.size
            ));
        }
        if self.size > MAX_DISK {
            return Err(format!(
                "its disk would have {} TiB, and Bivisor's limit is 64 TiB",
                self.size >> 40
            ));
        }
        if self.l1_entries * 8 > MAX_L1_BYTES {
            return Err(damaged(&format!("its L1 table would have {} entries", self.l1_entries)));
        }
        if self.l1_entries < self.needed_l1_entries() {
            return Err(damaged("its L1 table is too small for its disk"));
        }
        let table = self.refcount_table_clusters << self.cluster_bits;
        if table == 0 || table > MAX_REFCOUNT_TABLE_BYTES {
            return Err(damaged(&format!("its table of reference counts would have {table} bytes")));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(damaged(&format!("it would have {} snapshots", self.snapshots)));
        }
        for (what, offset, length) in [
            ("L1 table", self.l1_offset, self.l1_entries * 8),
            ("table of reference counts", self.refcount_table_offset, table),
            ("list of snapshots", self.snapshots_offset, u64::from(self.snapshots) * 40),
        ] {
            let end = offset.checked_add(length);
            if length > 0 && end.is_none_or(|end| end > file_size.next_multiple_of(self.cluster_size())) {
                return Err(format!(
                    "its {what} lies behind its end: the image was perhaps not copied to its end"
                ));
            }
            if length > 0 && (offset == 0 || !offset.is_multiple_of(self.cluster_size())) {
                return Err(damaged(&format!("its {what} is not at the start of a cluster")));
            }
        }
        Ok(())
    }
}

/// A sentence for what no program writes.
pub(super) fn damaged(what: &str) -> String {
    format!("it is damaged ({what}): `qemu-img check` tells more, and a backup is the way out")
}

fn read_up_to(file: &File, count: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; count];
    let mut filled = 0;
    while filled < count {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(format!("its header can't be read: {error}")),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

fn backing_name(bytes: &[u8]) -> Result<Option<String>, String> {
    let (offset, length) = (u64_at(bytes, 8), u32_at(bytes, 16) as usize);
    if offset == 0 {
        return Ok(None);
    }
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let name = start.checked_add(length).and_then(|end| bytes.get(start..end));
    let name = name.filter(|name| !name.is_empty() && name.len() <= MAX_NAME);
    let name = name.ok_or_else(|| damaged("the name of its backing file lies outside its header"))?;
    let name = std::str::from_utf8(name).map_err(|_| damaged("the name of its backing file is no text"))?;
    if name.contains('\0') {
        return Err(damaged("the name of its backing file is no text"));
    }
    Ok(Some(name.to_owned()))
}

/// Goes through the header's extensions; returns the backing file's format.
fn backing_format(bytes: &[u8], header_length: usize) -> Result<Option<String>, String> {
    let mut format = None;
    let mut at = header_length;
    loop {
        let Some(head) = bytes.get(at..at + 8) else {
            return Err(damaged("its header's extensions don't end"));
        };
        let (kind, length) = (u32_at(head, 0), u32_at(head, 4) as usize);
        if kind == EXTENSION_END {
            return Ok(format);
        }
        let Some(data) = bytes.get(at + 8..).and_then(|rest| rest.get(..length)) else {
            return Err(damaged("an extension of its header is longer than the header"));
        };
        match kind {
            EXTENSION_BACKING_FORMAT => {
                let text = std::str::from_utf8(data);
                format = Some(text.map_err(|_| damaged("its backing format is no text"))?.to_owned());
            }
            EXTENSION_FEATURE_NAMES if !length.is_multiple_of(FEATURE_NAME_LENGTH) => {
                return Err(damaged("its table of feature names is cut off"));
            }
            _ => {}
        }
        at += 8 + length.next_multiple_of(8);
    }
}
