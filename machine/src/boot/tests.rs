//! Kernels of a few hundred bytes in every format, whole, cut off and damaged.

extern crate std;

use alloc::vec;
use alloc::vec::Vec;
use std::io::Write;

use bivisor_x86::registers::gpr;
use bivisor_x86::state::{CpuState, Mode, SegReg, Segment};

use super::*;

const MIB: u64 = 1 << 20;
const RSDP: u64 = 0xe_0000;
const INITRD: &[u8] = b"an initial RAM disk";
const COMMAND_LINE: &str = "console=ttyS0 answer=42";

fn put(bytes: &mut Vec<u8>, at: usize, field: &[u8]) {
    if bytes.len() < at + field.len() {
        bytes.resize(at + field.len(), 0);
    }
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// A program header with the segment's bytes: type, physical address, size in memory.
struct Part<'a> {
    kind: u32,
    physical: u64,
    bytes: &'a [u8],
    in_memory: u64,
}

fn elf64(entry: u64, parts: &[Part<'_>]) -> Vec<u8> {
    let mut file = Vec::new();
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 0x12, &62u16.to_le_bytes());
    put(&mut file, 0x18, &entry.to_le_bytes());
    put(&mut file, 0x20, &64u64.to_le_bytes());
    put(&mut file, 0x36, &[56, 0, parts.len() as u8, 0]);
    put(&mut file, 0x3f, &[0]);
    let mut data = 64 + 56 * parts.len();
    for (i, part) in parts.iter().enumerate() {
        let header = 64 + 56 * i;
        put(&mut file, header, &part.kind.to_le_bytes());
        put(&mut file, header + 8, &(data as u64).to_le_bytes());
        put(&mut file, header + 0x18, &part.physical.to_le_bytes());
        put(&mut file, header + 0x20, &(part.bytes.len() as u64).to_le_bytes());
        put(&mut file, header + 0x28, &part.in_memory.to_le_bytes());
        put(&mut file, header + 0x30, &[0; 8]);
        put(&mut file, data, part.bytes);
        data += part.bytes.len();
    }
    file
}

fn elf32(entry: u32, physical: u32, bytes: &[u8], in_memory: u32) -> Vec<u8> {
    let mut file = Vec::new();
    put(&mut file, 0, b"\x7fELF\x01\x01\x01");
    put(&mut file, 0x12, &3u16.to_le_bytes());
    put(&mut file, 0x18, &entry.to_le_bytes());
    put(&mut file, 0x1c, &52u32.to_le_bytes());
    put(&mut file, 0x2a, &[32, 0, 1, 0]);
    for (at, value) in [(0, 1), (4, 84), (12, physical), (16, bytes.len() as u32), (20, in_memory)] {
        put(&mut file, 52 + at, &u32::to_le_bytes(value));
    }
    put(&mut file, 84, bytes);
    file
}

/// A note of another owner, then the one with the PVH entry.
fn notes(entry: u64) -> Vec<u8> {
    let mut notes = Vec::new();
    for word in [6u32, 3, 18] {
        notes.extend(word.to_le_bytes());
    }
    notes.extend(b"Other\0\0\0abc\0");
    for word in [4u32, 8, 18] {
        notes.extend(word.to_le_bytes());
    }
    notes.extend(b"Xen\0");
    notes.extend(entry.to_le_bytes());
    notes
}

const CODE: &[u8] = b"\xf4\xeb\xfdthis is code, this is code, this is code";

fn pvh_kernel() -> Vec<u8> {
    let load = Part { kind: 1, physical: MIB, bytes: CODE, in_memory: 0x3000 };
    elf64(MIB, &[load, Part { kind: 4, physical: 0, bytes: &notes(MIB + 0x40), in_memory: 0 }])
}

fn with_size(mut packed: Vec<u8>, unpacked: &[u8]) -> Vec<u8> {
    packed.extend((unpacked.len() as u32).to_le_bytes());
    packed
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut file = b"\x1f\x8b\x08\x1c\0\0\0\0\0\x03".to_vec();
    file.extend(b"\x03\0xyzname\0comment\0");
    file.extend(miniz_oxide::deflate::compress_to_vec(data, 6));
    file.extend(crc32fast::hash(data).to_le_bytes());
    with_size(file, data)
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut options = lzma_rust2::XzOptions::with_preset(1);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    writer.write_all(data).unwrap();
    with_size(writer.finish().unwrap(), data)
}

fn zstd(data: &[u8]) -> Vec<u8> {
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    with_size(compress_to_vec(data, CompressionLevel::Fastest), data)
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let mut file = vec![0x02, 0x21, 0x4c, 0x18];
    for block in data.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        file.extend((packed.len() as u32).to_le_bytes());
        file.extend(packed);
    }
    with_size(file, data)
}

type Packer = fn(&[u8]) -> Vec<u8>;
const PACKERS: [(&str, Packer); 4] = [("gzip", gzip), ("xz", xz), ("zstd", zstd), ("lz4", lz4)];

/// A bzImage for protocol 2.15: one setup sector, the 64-bit entry, its payload 300h bytes into the kernel.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut kernel = vec![0x90; 0x300];
    kernel.extend(payload);
    kernel.resize(kernel.len().next_multiple_of(16), 0);
    let mut file = vec![0; 1024];
    put(&mut file, 0x1f1, &[1]);
    put(&mut file, 0x1f4, &((kernel.len() / 16) as u32).to_le_bytes());
    put(&mut file, 0x1fe, b"\x55\xaa\xeb\x6aHdrS\x0f\x02");
    put(&mut file, 0x211, &[1]);
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x230, &0x1000u32.to_le_bytes());
    put(&mut file, 0x234, &[1, 12, 1, 0]);
    put(&mut file, 0x238, &255u32.to_le_bytes());
    put(&mut file, 0x248, &0x300u32.to_le_bytes());
    put(&mut file, 0x24c, &(payload.len() as u32).to_le_bytes());
    put(&mut file, 0x258, &(MIB + 0x2345).to_le_bytes());
    put(&mut file, 0x260, &0x1_0000u32.to_le_bytes());
    file.extend(kernel);
    file
}

/// A flat Multiboot kernel that wants to be at 1 MiB, its header 20h bytes into the file.
fn multiboot_flat() -> Vec<u8> {
    let mut file = vec![0xcc; 0x20];
    let flags = 0x1_0003u32;
    let base = MIB as u32;
    let end = base + 0x60;
    for word in [
        0x1bad_b002,
        flags,
        0u32.wrapping_sub(0x1bad_b002 + flags),
        base + 0x10,
        base,
        end,
        end + 0x1000,
        base + 0x34,
    ] {
        file.extend(word.to_le_bytes());
    }
    file.resize(0x90, 0xaa);
    file
}

fn multiboot_elf() -> Vec<u8> {
    let mut code = vec![];
    for word in [0x1bad_b002u32, 0, 0u32.wrapping_sub(0x1bad_b002)] {
        code.extend(word.to_le_bytes());
    }
    code.extend(CODE);
    elf32(MIB as u32 + 12, MIB as u32, &code, 0x2000)
}

fn image(kernel: &[u8]) -> BootImage<'_> {
    BootImage { kernel, name: "kernel", initrd: Some(INITRD), command_line: COMMAND_LINE, unpack: true }
}

fn memory() -> GuestMemory {
    let memory = GuestMemory::on_heap(4 * MIB as usize);
    memory.fill(0, memory.size(), 0xdd).unwrap();
    memory
}

fn load_into(memory: &GuestMemory, kernel: &[u8]) -> Result<Loaded, BootError> {
    load(&image(kernel), memory, RSDP)
}

fn bytes(memory: &GuestMemory, gpa: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read(gpa, &mut bytes).unwrap();
    bytes
}

fn u32_at(memory: &GuestMemory, gpa: u64) -> u32 {
    u32::from_le_bytes(bytes(memory, gpa, 4).try_into().unwrap())
}

fn u64_at(memory: &GuestMemory, gpa: u64) -> u64 {
    u64::from_le_bytes(bytes(memory, gpa, 8).try_into().unwrap())
}

fn string(memory: &GuestMemory, gpa: u64) -> alloc::string::String {
    let bytes = bytes(memory, gpa, 100);
    let end = bytes.iter().position(|&b| b == 0).unwrap();
    alloc::string::String::from_utf8(bytes[..end].to_vec()).unwrap()
}

/// The registers and the table in memory say the same of CS and DS.
fn assert_flat(memory: &GuestMemory, state: &CpuState, code: u16, data: u16) {
    for (register, selector, kind) in [(SegReg::Cs, code, 0xb), (SegReg::Ds, data, 3), (SegReg::Ss, data, 3)]
    {
        let segment = state.seg[register as usize];
        assert_eq!((segment.base, segment.limit, segment.selector), (0, u32::MAX, selector));
        assert_eq!(segment.attributes & 0xf, kind);
        let descriptor = u64_at(memory, state.gdtr.base + u64::from(selector));
        assert_eq!(descriptor >> 40 & 0xf0ff, u64::from(segment.attributes));
        assert_eq!(descriptor & 0xff_ffff_ffff, 0xffff);
        assert_eq!(descriptor >> 48 & 0xf, 0xf);
    }
}

fn assert_protected(memory: &GuestMemory, state: &CpuState) {
    assert_eq!(state.mode(), Mode::Protected);
    assert_eq!(state.code_bits(), 32);
    assert_eq!((state.cr0, state.cr4, state.msr.efer, state.rflags), (0x11, 0, 0, 2));
    assert_flat(memory, state, 8, 0x10);
}

fn assert_pvh(memory: &GuestMemory, loaded: &Loaded) {
    let state = &loaded.state;
    assert_eq!(loaded.protocol, Protocol::Pvh);
    assert_protected(memory, state);
    assert_eq!(state.rip, MIB + 0x40);
    assert_eq!(bytes(memory, MIB, CODE.len()), CODE);
    assert!(bytes(memory, MIB + CODE.len() as u64, 0x3000 - CODE.len()).iter().all(|&b| b == 0));
    assert_eq!(bytes(memory, MIB + 0x3000, 1), [0xdd]);

    let info = state.gpr[gpr::RBX];
    assert_eq!([u32_at(memory, info), u32_at(memory, info + 4)], [0x336e_c578, 1]);
    assert_eq!(u32_at(memory, info + 12), 1);
    let module = u64_at(memory, info + 16);
    assert_eq!(bytes(memory, u64_at(memory, module), INITRD.len()), INITRD);
    assert_eq!(u64_at(memory, module + 8), INITRD.len() as u64);
    assert_eq!(string(memory, u64_at(memory, info + 24)), COMMAND_LINE);
    assert_eq!(u64_at(memory, info + 32), RSDP);
    let (map, count) = (u64_at(memory, info + 40), u32_at(memory, info + 48));
    let last_ram = map + 24 * u64::from(count - 2);
    assert_eq!([u64_at(memory, last_ram), u64_at(memory, last_ram + 8)], [MIB, 3 * MIB]);
    assert_eq!(u32_at(memory, last_ram + 16), 1);
}

#[test]
fn pvh() {
    let memory = memory();
    let loaded = load_into(&memory, &pvh_kernel()).unwrap();
    assert_pvh(&memory, &loaded);
}

#[test]
fn the_kernel_inside_a_bzimage_is_entered_by_pvh() {
    for (name, packer) in PACKERS {
        let memory = memory();
        let loaded = load_into(&memory, &bzimage(&packer(&pvh_kernel()))).unwrap();
        assert_eq!(loaded.protocol, Protocol::Pvh, "{name}");
        assert_pvh(&memory, &loaded);
    }
}

#[test]
fn packed_kernels_of_several_blocks() {
    let large: Vec<u8> = (0..(9u32 << 20)).map(|i| (i >> 8 ^ i >> 3) as u8).collect();
    for (name, packer) in PACKERS {
        let packed = packer(&large);
        assert!(unpack::unpack(&packed, 16 << 20).unwrap() == large, "{name}");
        assert_eq!(unpack::unpack(&packed, 8 << 20), Err(UnpackError::TooLarge), "{name}");
    }
}

#[test]
fn what_unpacks_to_more_than_it_says_is_refused() {
    let zeros = vec![0u8; 1 << 20];
    for (name, packer) in PACKERS {
        let mut packed = packer(&zeros);
        let size = packed.len() - 4;
        packed[size..].copy_from_slice(&100u32.to_le_bytes());
        assert!(unpack::unpack(&packed, 1 << 30).is_err(), "{name}");
        packed[size..].copy_from_slice(&((1u32 << 20) + 1).to_le_bytes());
        assert!(unpack::unpack(&packed, 1 << 30).is_err(), "{name}");
    }
}

fn assert_linux(kernel: &[u8], unpack: bool) {
    let memory = memory();
    let loaded = load(&BootImage { unpack, ..image(kernel) }, &memory, RSDP).unwrap();
    let state = &loaded.state;
    assert_eq!(loaded.protocol, Protocol::Linux64);
    assert_eq!(state.mode(), Mode::Long64);
    assert_flat(&memory, state, 0x10, 0x18);
    // The preferred address, aligned, and the protected-mode part from its start.
    assert_eq!(state.rip, MIB + 0x3000 + 0x200);
    assert_eq!(bytes(&memory, MIB + 0x3000, 0x300), [0x90; 0x300]);

    let page = state.gpr[gpr::RSI];
    assert_eq!(bytes(&memory, page + 0x202, 4), b"HdrS");
    assert_eq!(bytes(&memory, page + 0x210, 1), [0xff]);
    assert_eq!(string(&memory, u32_at(&memory, page + 0x228).into()), COMMAND_LINE);
    let initrd = u64::from(u32_at(&memory, page + 0x218));
    assert_eq!(bytes(&memory, initrd, INITRD.len()), INITRD);
    assert!(initrd.is_multiple_of(4096) && initrd + 4096 == 4 * MIB);
    assert_eq!(u32_at(&memory, page + 0x21c), INITRD.len() as u32);
    assert_eq!(u64_at(&memory, page + 0x70), RSDP);
    let entries: Vec<_> = (0..u64::from(bytes(&memory, page + 0x1e8, 1)[0]))
        .map(|i| page + 0x2d0 + i * 20)
        .map(|at| (u64_at(&memory, at), u64_at(&memory, at + 8), u32_at(&memory, at + 16)))
        .collect();
    assert_eq!(entries[0], (0, 0x9_fc00, 1));
    assert!(entries.contains(&(MIB, 3 * MIB, 1)));
    assert!(entries.contains(&(0xe_0000, 0x2_0000, 2)));

    for address in [0u64, 0x1234_5678, 0xffff_ffff] {
        assert_eq!(walk(&memory, state.cr3, address), address);
    }
}

/// Walks 4-level page tables with 2 MiB pages.
fn walk(memory: &GuestMemory, root: u64, address: u64) -> u64 {
    let mut table = root;
    for shift in [39, 30, 21] {
        let entry = u64_at(memory, table + (address >> shift & 0x1ff) * 8);
        assert_eq!(entry & 3, 3);
        table = entry & 0x000f_ffff_ffff_f000;
        if entry & 1 << 7 != 0 {
            return table + (address & 0x1f_ffff);
        }
    }
    panic!("no page");
}

#[test]
fn linux_by_its_64_bit_entry() {
    assert_linux(&bzimage(&lz4(&pvh_kernel())), false);
    // What can't be unpacked here, or has no PVH entry, is left to the guest.
    let no_note = elf64(MIB, &[Part { kind: 1, physical: MIB, bytes: CODE, in_memory: 0x1000 }]);
    assert_linux(&bzimage(&lz4(&no_note)), true);
    assert_linux(&bzimage(b"BZh9 something else"), true);
}

#[test]
fn linux_by_its_32_bit_entry() {
    let memory = memory();
    let mut kernel = bzimage(b"");
    put(&mut kernel, 0x236, &[0, 0]);
    let loaded = load_into(&memory, &kernel).unwrap();
    assert_eq!(loaded.protocol, Protocol::Linux32);
    assert_eq!(loaded.state.mode(), Mode::Protected);
    assert_flat(&memory, &loaded.state, 0x10, 0x18);
    assert_eq!(loaded.state.rip, MIB + 0x3000);
    assert_eq!(bytes(&memory, loaded.state.gpr[gpr::RSI] + 0x202, 4), b"HdrS");
}

fn assert_multiboot(memory: &GuestMemory, loaded: &Loaded, entry: u64) {
    let state = &loaded.state;
    assert_eq!(loaded.protocol, Protocol::Multiboot);
    assert_protected(memory, state);
    assert_eq!(state.rip, entry);
    assert_eq!(state.gpr[gpr::RAX], 0x2bad_b002);
    let info = state.gpr[gpr::RBX];
    assert_eq!(u32_at(memory, info), 0x24d);
    assert_eq!([u32_at(memory, info + 4), u32_at(memory, info + 8)], [639, 3 * 1024]);
    assert_eq!(string(memory, u32_at(memory, info + 16).into()), "kernel console=ttyS0 answer=42");
    assert_eq!(u32_at(memory, info + 20), 1);
    let module = u64::from(u32_at(memory, info + 24));
    let (start, end) = (u32_at(memory, module), u32_at(memory, module + 4));
    assert_eq!(bytes(memory, start.into(), (end - start) as usize), INITRD);
    assert!(start.is_multiple_of(4096));
    let (length, map) = (u32_at(memory, info + 44), u64::from(u32_at(memory, info + 48)));
    assert_eq!(length % 24, 0);
    assert_eq!(u32_at(memory, map), 20);
    assert_eq!([u64_at(memory, map + 4), u64_at(memory, map + 12)], [0, 0x9_fc00]);
}

#[test]
fn multiboot_with_addresses() {
    let memory = memory();
    let file = multiboot_flat();
    let loaded = load_into(&memory, &file).unwrap();
    assert_multiboot(&memory, &loaded, MIB + 0x34);
    assert_eq!(bytes(&memory, MIB, 0x60), file[0x10..0x70]);
    assert!(bytes(&memory, MIB + 0x60, 0x1000).iter().all(|&b| b == 0));
    assert_eq!(bytes(&memory, MIB + 0x1060, 1), [0xdd]);
}

#[test]
fn multiboot_as_elf() {
    let memory = memory();
    let loaded = load_into(&memory, &multiboot_elf()).unwrap();
    assert_multiboot(&memory, &loaded, MIB + 12);
    assert_eq!(bytes(&memory, MIB + 12, CODE.len()), CODE);
}

#[test]
fn a_kernel_in_low_memory_keeps_its_place() {
    let memory = memory();
    let mut file = multiboot_flat();
    for (at, value) in [(0x2c, 0x9010u32), (0x30, 0x9000), (0x34, 0x9060), (0x38, 0x9_0000), (0x3c, 0x9034)] {
        put(&mut file, at, &value.to_le_bytes());
    }
    let loaded = load_into(&memory, &file).unwrap();
    assert_eq!(bytes(&memory, 0x9000, 0x60), file[0x10..0x70]);
    assert!(loaded.state.gpr[gpr::RBX] >= 0x9_0000);
}

#[test]
fn files_that_are_no_kernels_for_us() {
    let memory = memory();
    let error = |file: &[u8]| load_into(&memory, file).unwrap_err();
    assert_eq!(error(b""), BootError::Empty);
    assert_eq!(error(b"MZ"), BootError::NotAKernel);
    assert_eq!(error(&[0; 5000]), BootError::NotAKernel);
    let mut arm = vec![0; 0x40];
    put(&mut arm, 0x38, b"ARM\x64");
    assert_eq!(error(&arm), BootError::Architecture("64-bit ARM".into()));
    let mut elf = pvh_kernel();
    put(&mut elf, 0x12, &183u16.to_le_bytes());
    assert_eq!(error(&elf), BootError::Architecture("64-bit ARM".into()));
    let program = elf64(MIB, &[Part { kind: 1, physical: MIB, bytes: CODE, in_memory: 0x1000 }]);
    assert_eq!(error(&program), BootError::NoEntry);
    let mut old = bzimage(b"");
    put(&mut old, 0x206, &[3, 2]);
    assert_eq!(error(&old), BootError::OldProtocol(2, 3));
    let mut wishful = multiboot_flat();
    put(&mut wishful, 0x24, &0x1_0008u32.to_le_bytes());
    put(&mut wishful, 0x28, &0u32.wrapping_sub(0x1bad_b002 + 0x1_0008).to_le_bytes());
    assert_eq!(error(&wishful), BootError::MultibootFeatures(8));
}

#[test]
fn what_does_not_fit_is_said() {
    let memory = memory();
    let error = |image: &BootImage<'_>| load(image, &memory, RSDP).unwrap_err();
    let kernel = pvh_kernel();
    let initrd = vec![1; 4 * MIB as usize];
    for kernel in [&kernel, &multiboot_flat(), &bzimage(b"")] {
        let too_big = BootError::InitrdTooBig { size: 4 * MIB, ram: 4 * MIB };
        assert_eq!(error(&BootImage { initrd: Some(&initrd), ..image(kernel) }), too_big);
    }
    for physical in [3 * MIB, 100 * MIB] {
        let load = Part { kind: 1, physical, bytes: CODE, in_memory: 2 * MIB };
        let large = elf64(0, &[load, Part { kind: 4, physical: 0, bytes: &notes(0), in_memory: 0 }]);
        let too_big = BootError::KernelTooBig { end: physical + 2 * MIB, ram: 4 * MIB };
        assert_eq!(error(&image(&large)), too_big);
    }
    let load = Part { kind: 1, physical: 0xf_0000, bytes: CODE, in_memory: 0x1000 };
    let in_bios = elf64(0, &[load, Part { kind: 4, physical: 0, bytes: &notes(0), in_memory: 0 }]);
    assert_eq!(error(&image(&in_bios)), BootError::BadAddress { start: 0xf_0000, end: 0xf_1000 });
    let long = "x".repeat(256);
    assert_eq!(
        error(&BootImage { command_line: &long, ..image(&bzimage(b"")) }),
        BootError::CommandLineTooLong { length: 256, limit: 255 }
    );
    assert_eq!(error(&BootImage { command_line: "a\0b", ..image(&kernel) }), BootError::CommandLineZero);
}

fn all_kernels() -> Vec<(&'static str, Vec<u8>)> {
    let mut kernels: Vec<_> =
        PACKERS.iter().map(|(name, packer)| (*name, bzimage(&packer(&pvh_kernel())))).collect();
    kernels.push(("pvh", pvh_kernel()));
    kernels.push(("multiboot", multiboot_flat()));
    kernels.push(("multiboot ELF", multiboot_elf()));
    kernels
}

#[test]
fn a_truncated_kernel_is_an_error() {
    let memory = memory();
    for (name, kernel) in all_kernels() {
        // The last bytes of a bzImage are filling, which is counted; those of the flat image are not loaded.
        let whole = if name == "multiboot" { 0x70 } else { kernel.len() };
        for length in 0..whole {
            assert!(load_into(&memory, &kernel[..length]).is_err(), "{name} cut to {length} bytes");
        }
        assert!(load_into(&memory, &kernel[..whole]).is_ok());
    }
}

#[test]
fn a_damaged_kernel_never_panics() {
    let memory = memory();
    // xorshift64: any fixed sequence will do.
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for (_, kernel) in all_kernels() {
        for _ in 0..3000 {
            let mut damaged = kernel.clone();
            for _ in 0..1 + next() % 4 {
                let at = next() as usize % damaged.len();
                // Values at the edges find more than arbitrary ones.
                let value = [0, 1, 0x7f, 0x80, 0xff, next() as u8][next() as usize % 6];
                let run = 1 + next() as usize % 8;
                damaged.iter_mut().skip(at).take(run).for_each(|b| *b = value);
            }
            // Either answer is right; the ACPI tables must stay whole.
            let _ = load_into(&memory, &damaged);
        }
    }
    assert_eq!(bytes(&memory, 0xe_0000, 0x100), [0xdd; 0x100]);
}

#[test]
fn segment_limits_and_the_task_register_are_those_of_vm_entries() {
    let memory = memory();
    let state = load_into(&memory, &pvh_kernel()).unwrap().state;
    assert_eq!((state.tr.limit, state.tr.attributes), (0x67, 0x8b));
    assert_eq!(state.seg[SegReg::Cs as usize].attributes & Segment::G, Segment::G);
}
