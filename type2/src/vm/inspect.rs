//! Looking at a vCPU that stands still: memory by linear address, and registers in print.

use std::fmt::Write;

use bivisor_machine::engine::Vcpu;
use bivisor_machine::memory::GuestMemory;
use bivisor_x86::registers::{Cr0, Cr4, Efer, Rflags};
use bivisor_x86::state::{CpuState, Mode, SegReg, Segment};

const PAGE: u64 = 4096;

/// Linear address of the next instruction.
pub fn linear_rip(state: &CpuState) -> u64 {
    match state.mode() {
        Mode::Long64 => state.rip,
        _ => state.seg[SegReg::Cs as usize].base.wrapping_add(state.rip) & 0xffff_ffff,
    }
}

/// Calls `access(guest-physical address, range of the whole)` for each piece of a linear range that lies in one
/// page, until one is not mapped or `access` fails. Returns how many bytes were covered.
fn pages(
    vcpu: &mut dyn Vcpu,
    linear: u64,
    length: usize,
    mut access: impl FnMut(u64, std::ops::Range<usize>) -> bool,
) -> usize {
    let mut done = 0;
    while done < length {
        let at = linear.wrapping_add(done as u64);
        let piece = (length - done).min((PAGE - at % PAGE) as usize);
        match vcpu.translate(at) {
            Some(gpa) if access(gpa, done..done + piece) => done += piece,
            _ => break,
        }
    }
    done
}

/// Reads memory by linear address; returns how many bytes could be read.
pub fn read(vcpu: &mut dyn Vcpu, memory: &GuestMemory, linear: u64, to: &mut [u8]) -> usize {
    pages(vcpu, linear, to.len(), |gpa, range| memory.read(gpa, &mut to[range]).is_ok())
}

/// Writes memory by linear address, whatever the pages permit; returns how many bytes could be written.
pub fn write(vcpu: &mut dyn Vcpu, memory: &GuestMemory, linear: u64, from: &[u8]) -> usize {
    pages(vcpu, linear, from.len(), |gpa, range| memory.write(gpa, &from[range]).is_ok())
}

/// The bytes of the next instruction, as far as they can be read.
pub fn code(vcpu: &mut dyn Vcpu, memory: &GuestMemory, state: &CpuState) -> Vec<u8> {
    // No instruction is longer.
    let mut code = vec![0; 15];
    let length = read(vcpu, memory, linear_rip(state), &mut code);
    code.truncate(length);
    code
}

/// The registers of a vCPU for people, and the instruction bytes at RIP.
pub fn dump(state: &CpuState, code: &[u8]) -> String {
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = write_dump(&mut text, state, code);
    text
}

fn write_dump(f: &mut String, state: &CpuState, code: &[u8]) -> std::fmt::Result {
    let mode = match state.mode() {
        Mode::Real => "real mode",
        Mode::Virtual8086 => "virtual-8086 mode",
        Mode::Protected => "protected mode",
        Mode::Compatibility => "compatibility mode",
        Mode::Long64 => "64-bit mode",
    };
    writeln!(f, "  {mode}, CPL {}, {:?}", state.cpl, state.activity)?;
    writeln!(
        f,
        "  RIP {:016x}  RFLAGS {:08x} [{}]",
        state.rip,
        state.rflags,
        names(Rflags::from_bits_truncate(state.rflags & !Rflags::FIXED.bits()).iter_names())
    )?;
    const GENERAL: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13",
        "R14", "R15",
    ];
    for row in GENERAL.iter().zip(state.gpr).collect::<Vec<_>>().chunks(4) {
        let row: Vec<_> = row.iter().map(|(name, value)| format!("{name} {value:016x}")).collect();
        writeln!(f, "  {}", row.join("  "))?;
    }
    let segments = ["ES ", "CS ", "SS ", "DS ", "FS ", "GS "].into_iter().zip(&state.seg);
    for (name, segment) in segments.chain([("LDT", &state.ldtr), ("TR ", &state.tr)]) {
        writeln!(f, "  {name} {}", describe(segment))?;
    }
    writeln!(f, "  GDT base {:016x} limit {:04x}", state.gdtr.base, state.gdtr.limit)?;
    writeln!(f, "  IDT base {:016x} limit {:04x}", state.idtr.base, state.idtr.limit)?;
    writeln!(f, "  CR0 {:08x} [{}]", state.cr0, names(Cr0::from_bits_truncate(state.cr0).iter_names()))?;
    writeln!(f, "  CR2 {:016x}  CR3 {:016x}", state.cr2, state.cr3)?;
    writeln!(f, "  CR4 {:08x} [{}]", state.cr4, names(Cr4::from_bits_truncate(state.cr4).iter_names()))?;
    let efer = state.msr.efer;
    writeln!(f, "  EFER {efer:08x} [{}]", names(Efer::from_bits_truncate(efer).iter_names()))?;
    write!(f, "  code at RIP:")?;
    for byte in code {
        write!(f, " {byte:02x}")?;
    }
    writeln!(f, "{}", if code.is_empty() { " not mapped" } else { "" })
}

fn names<T>(bits: impl Iterator<Item = (&'static str, T)>) -> String {
    bits.map(|(name, _)| name).collect::<Vec<_>>().join(" ")
}

fn describe(segment: &Segment) -> String {
    format!(
        "{:04x} base {:016x} limit {:08x} attributes {:04x} (type {:x}, DPL {}{}{}{}{})",
        segment.selector,
        segment.base,
        segment.limit,
        segment.attributes,
        segment.attributes & 0xf,
        segment.dpl(),
        if segment.attributes & Segment::P != 0 { ", present" } else { ", not present" },
        if segment.attributes & Segment::L != 0 { ", 64-bit" } else { "" },
        if segment.attributes & Segment::DB != 0 { ", 32-bit" } else { "" },
        if segment.usable() { "" } else { ", unusable" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use bivisor_machine::engine::{DebugControl, EngineError, Exit};

    /// Two pages at linear 0x1000 lie crosswise in RAM, the third is not mapped.
    struct Crosswise;
    impl Vcpu for Crosswise {
        fn state(&mut self) -> Result<CpuState, EngineError> {
            Ok(CpuState::default())
        }
        fn set_state(&mut self, _: &CpuState) -> Result<(), EngineError> {
            Ok(())
        }
        fn run(&mut self) -> Result<Exit, EngineError> {
            Ok(Exit::Shutdown)
        }
        fn set_debug(&mut self, _: &DebugControl) -> Result<(), EngineError> {
            Ok(())
        }
        fn translate(&mut self, linear: u64) -> Option<u64> {
            match linear / PAGE {
                1 => Some(0x2000 + linear % PAGE),
                2 => Some(0x1000 + linear % PAGE),
                _ => None,
            }
        }
    }

    #[test]
    fn memory_is_followed_through_page_tables_up_to_what_is_not_mapped() {
        let memory = GuestMemory::on_heap(0x4000);
        assert_eq!(write(&mut Crosswise, &memory, 0x1ffe, b"abcd"), 4);
        let mut bytes = [0; 2];
        memory.read(0x2ffe, &mut bytes).unwrap();
        assert_eq!(&bytes, b"ab");
        memory.read(0x1000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"cd");
        let mut four = [0; 4];
        assert_eq!(read(&mut Crosswise, &memory, 0x1ffe, &mut four), 4);
        assert_eq!(&four, b"abcd");
        assert_eq!(read(&mut Crosswise, &memory, 0x2ffe, &mut four), 2);
        assert_eq!(read(&mut Crosswise, &memory, 0, &mut four), 0);
    }

    #[test]
    fn the_dump_shows_every_kind_of_register() {
        let text = dump(&CpuState::default(), &[0x0f, 0x0b]);
        for part in [
            "real mode",
            "RIP 000000000000fff0",
            "RSP ",
            "CS  f000 base 00000000ffff0000",
            "CR0 60000010",
            "[ET NW CD]",
            "EFER",
            "code at RIP: 0f 0b",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(dump(&CpuState::default(), &[]).contains("not mapped"));
    }
}
