//! A trial: some sequences in the same code pages, and runs of them with different inputs. Trials know nothing of each
//! other: the seed and a number make one.

use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::interp::vector::area::{XMM, YMM_HIGH};
use bivisor_x86::registers::{Cr4, Rflags};
use bivisor_x86::state::XsaveArea;

use super::build::{Builder, Class, MARGIN, RSP};
use super::code::{Assembled, FILLER, Item, assemble, shorten};
use super::layout::{IMAGES, Input, POINTER_COUNT, READ_ONLY};
use super::monitor::{CR0, CR4};
use crate::generate::xsave;
use crate::layout::{CODE, CODE_SIZE, DATA, DATA_SIZE, PAGE};
use crate::mode::Mode;
use crate::random::Random;

/// Instructions of a sequence at most, without those that prepare others.
const LENGTH: u64 = 40;
/// Exceptions of vector units are unmasked once in so many inputs.
const UNMASKED: u64 = 12;
/// Bytes of the sixteen XMM registers, or of the upper halves of the YMM registers.
const VECTORS: usize = 256;

/// Runs one after the other of sequences in the same code pages.
#[derive(Clone, Debug)]
pub struct Trial {
    /// What kind of code they are.
    pub mode: Mode,
    /// The sequences.
    pub items: Vec<Item>,
    /// First item of each.
    pub entries: Vec<usize>,
    /// Privileged instructions are among them.
    pub privileged: bool,
    /// Number of the sequence that SYSCALL leads to.
    pub system_call: usize,
    /// Offset in the code pages of the first.
    pub origin: usize,
    /// The translator is to treat the code as hot.
    pub hot: bool,
    /// The runs: which sequence, and from which state. The address of the first instruction is filled in later.
    pub runs: Vec<(usize, Input)>,
}

impl Trial {
    /// The sequences as they stand in memory, and the inputs of the runs; `code`: number of the code pages.
    pub fn assemble(&self, code: u32) -> (Assembled, Vec<Input>) {
        let assembled = assemble(&self.items, self.origin);
        let input = |(entry, input): &(usize, Input)| {
            let rip = assembled.address(self.entries[*entry]);
            let mut input = Input { rip, code, ..input.clone() };
            input.system[2] = assembled.address(self.entries[self.system_call]);
            input
        };
        let inputs = self.runs.iter().map(input).collect();
        (assembled, inputs)
    }
}

impl Trial {
    /// One sequence of these bytes at an offset in the code pages, run twice with these general registers, something in
    /// the vector registers, and everything else zero or as after a reset.
    pub fn of_code(code: &[u8], mode: Mode, origin: usize, registers: &[(usize, u64)]) -> Self {
        let mut decoder = mode.decoder(code, CODE);
        let mut items = Vec::new();
        while decoder.can_decode() {
            let start = decoder.position();
            let _ = decoder.decode();
            let bytes = code[start..decoder.position()].to_vec();
            items.push(Item::Instruction { bytes, field: None });
        }
        items.push(Item::Instruction { bytes: vec![FILLER], field: None });
        let mut xsave = XsaveArea::default().bytes;
        xsave[XMM..XMM + VECTORS].fill(0x11);
        xsave[YMM_HIGH..YMM_HIGH + VECTORS].fill(0x22);
        let mut gpr = [0; 16];
        registers.iter().for_each(|(number, value)| gpr[*number] = *value);
        let input = Input {
            xsave,
            gpr,
            rflags: (Rflags::IF | Rflags::FIXED).bits(),
            rip: 0,
            control: [1; 1 + POINTER_COUNT],
            image: 0,
            privileged: 0,
            supervisor: 0,
            system: [0; 3],
            code: 0,
            cs: mode.user_cs().into(),
        };
        Self {
            mode,
            items,
            entries: vec![0],
            privileged: false,
            system_call: 0,
            origin,
            hot: false,
            runs: vec![(0, input.clone()), (0, input)],
        }
    }
}

/// The trial with this number.
/// `privileged`: with instructions that only an engine can be compared with.
pub fn trial(seed: u64, number: u64, model: &CpuModel, privileged: bool) -> Trial {
    let mut random = Random::new(seed.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(number));
    let mode = Mode::new(model, number % 8 >= 6);
    // In compatibility mode everything is as natively.
    let with_privileged = privileged && !mode.is_32bit;
    let mut builder = Builder::new(&mut random, model, mode);
    let sequences = 1 + builder.random.below(3);
    let mut supervisors = Vec::new();
    for _ in 0..sequences {
        builder.begin();
        builder.with_privileged = with_privileged;
        builder.is_supervisor = with_privileged && !builder.random.once_in(3);
        supervisors.push(builder.is_supervisor);
        let limit = if builder.random.once_in(3) { LENGTH } else { 10 };
        for _ in 0..=builder.random.below(limit) {
            match builder.random.below(16) {
                0 | 1 => builder.control_flow(),
                2 | 3 => builder.special(),
                4 | 5 if with_privileged => builder.privileged(),
                _ => builder.ordinary(),
            }
        }
        builder.end();
    }
    builder.finish();
    let system_call = builder.any_target().unwrap_or(0);
    builder.entries.push(system_call);
    let (mut items, entries, initial) = (builder.items, builder.entries, builder.initial);
    shorten(&mut items);
    let length: usize = items.iter().map(Item::length).sum();
    let origin = origin(&mut random, length);
    let count = 2 + random.below(6);
    let image = random.below(IMAGES as u64) as u32;
    let runs = (0..count)
        .map(|run| {
            let entry = if run < sequences { run } else { random.below(sequences) };
            let mood = if run < sequences { Mood::Good } else { Mood::any(&mut random) };
            let mut input = input(&mut random, &initial, mood, image, mode);
            if privileged {
                let supervisor = supervisors[entry as usize];
                (input.privileged, input.supervisor) = (1, supervisor.into());
                input.system = system(&mut random);
            }
            (entry as usize, input)
        })
        .collect();
    Trial {
        mode,
        items,
        entries,
        privileged,
        system_call: sequences as usize,
        origin,
        hot: number % 2 == 1,
        runs,
    }
}

/// Where sequences of so many bytes start: often so that they cross a page.
fn origin(random: &mut Random, length: usize) -> usize {
    let room = CODE_SIZE.saturating_sub(length) as u64;
    let page = PAGE.saturating_sub(random.below(1 + length as u64));
    let start = if random.once_in(3) { page } else { random.below(PAGE) };
    start.min(room) as usize
}

/// What kind of input a run gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    /// Pointers are aligned and lie well inside.
    Good,
    /// Pointers are not aligned.
    Misaligned,
    /// One pointer is bad.
    OneBad(usize),
    /// Registers hold anything.
    Wild,
}

impl Mood {
    fn any(random: &mut Random) -> Self {
        match random.below(16) {
            0..=5 => Self::Good,
            6 | 7 => Self::Misaligned,
            8..=14 => Self::OneBad(random.below(16) as usize),
            _ => Self::Wild,
        }
    }
}

/// An address that some accesses fault at.
fn bad_pointer(random: &mut Random) -> u64 {
    let end = DATA + DATA_SIZE as u64;
    let distance = random.below(0x80).wrapping_sub(0x40);
    match random.below(8) {
        0 => DATA.wrapping_add(distance),
        1 | 2 => end.wrapping_add(distance),
        3 => (end + PAGE).wrapping_add(distance),
        4 => (DATA + PAGE).wrapping_add(distance),
        5 => READ_ONLY + random.below(PAGE),
        6 => random.integer(),
        _ => 1 << 47 | random.bits() >> 1,
    }
}

fn input(random: &mut Random, classes: &[Class; 16], mood: Mood, image: u32, mode: Mode) -> Input {
    let mut gpr = [0; 16];
    let pointer = |random: &mut Random| {
        let place = DATA + MARGIN + random.below(DATA_SIZE as u64 - 2 * MARGIN);
        if mood == Mood::Misaligned { place } else { place & !63 }
    };
    for (number, register) in gpr.iter_mut().enumerate() {
        *register = match classes[number] {
            _ if mood == Mood::OneBad(number) => bad_pointer(random),
            _ if mood == Mood::Wild => random.integer(),
            Class::Pointer => pointer(random),
            Class::Small => 32 * random.below(3) + if random.once_in(4) { random.below(32) } else { 0 },
            Class::Any => random.integer(),
        };
    }
    if mood != Mood::OneBad(RSP) && mood != Mood::Wild {
        // 8 bytes beside a multiple of 64, as after a call.
        gpr[RSP] = (pointer(random) & !7) + 8 * random.below(8);
    }
    if mode.is_32bit {
        gpr[..8].iter_mut().for_each(|register| *register &= 0xffff_ffff);
    }
    let mut control = [0; 1 + POINTER_COUNT];
    control.fill_with(|| pointer(random));
    control[0] = 1 + random.below(6);
    Input {
        xsave: xsave(random, UNMASKED),
        gpr,
        rflags: rflags(random),
        rip: 0,
        control,
        image,
        privileged: 0,
        supervisor: 0,
        system: [0; 3],
        code: 0,
        cs: mode.user_cs().into(),
    }
}

/// CR0, CR4 and LSTAR, which comes later.
fn system(random: &mut Random) -> [u64; 3] {
    let mut cr4 = CR4;
    if random.once_in(4) {
        cr4 |= (Cr4::UMIP | Cr4::TSD).bits();
    }
    if random.once_in(4) {
        cr4 |= Cr4::SMAP.bits();
    }
    [CR0, cr4, 0]
}

fn rflags(random: &mut Random) -> u64 {
    let mut writable = Rflags::ARITHMETIC;
    if random.once_in(4) {
        writable |= Rflags::DF;
    }
    if random.once_in(32) {
        writable |= Rflags::AC;
    }
    if random.once_in(64) {
        writable |= Rflags::TF;
    }
    random.bits() & writable.bits() | Rflags::IF.bits() | Rflags::FIXED.bits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::flags::undefined_before;

    #[test]
    fn trials_read_no_undefined_flags_and_consist_of_what_they_say() {
        let model = crate::host_model();

        for number in 0..2000 {
            let trial = trial(3, number, &model, number % 2 == 0);
            assert!(undefined_before(&trial.items, &trial.entries, trial.mode).is_some(), "trial {number}");
            for item in &trial.items {
                let Item::Instruction { bytes, .. } = item else { continue };
                let length = trial.mode.decoder(bytes, CODE).decode().len();
                assert_eq!(length, bytes.len(), "trial {number}: {bytes:02x?}");
            }
        }
    }
}
