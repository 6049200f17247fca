//! The address space in which sequences are tried, and what goes in and comes out.
//!
//! Code and data lie where single instructions have them ([`crate::layout`]), but the first of the code pages may be
//! written. There is a further page, whose number differs from the first data page's by a multiple of 256.

use super::monitor::SYSTEM_NAMES;
use crate::generate::{self, fill, mxcsr};
use crate::layout::{CODE_SIZE, DATA, DATA_SIZE, IMAGE_SIZE, PAGE, State, XSAVE_SIZE};
use crate::random::Random;

/// Linear address of the control page, readable and writable.
pub const CONTROL: u64 = DATA + 0x10_0000;
/// Bytes of it.
pub const CONTROL_SIZE: usize = PAGE as usize;
/// How many jumps backwards a run may make, 8 bytes.
pub const FUEL: u64 = CONTROL;
/// Where pointers into the data pages lie, 8 bytes each.
pub const POINTERS: u64 = CONTROL + 8;
/// How many.
pub const POINTER_COUNT: usize = 7;
/// Where sequences store addresses of code, 8 bytes each.
pub const TARGETS: u64 = CONTROL + 0x40;
/// Where the control page is free for all.
pub const CONTROL_FREE: u64 = 0x100;

/// Linear address of a page that stores make the engine look for events by, see [`INTERRUPT_NUDGE`]. It is not compared, and
/// far from all else: other accesses must not hit it.
pub const NUDGE: u64 = DATA + 0x3000_0000;
/// Bit of what is stored there: an interrupt comes. It does nothing that sequences could see.
pub const INTERRUPT_NUDGE: u64 = 1;

/// Linear address of the page that may only be read.
pub const READ_ONLY: u64 = DATA + DATA_SIZE as u64;
/// Values for LDMXCSR, 4 bytes each.
pub const MXCSRS: u64 = READ_ONLY;
/// How many.
pub const MXCSR_COUNT: u64 = 64;
/// Values for FLDCW, 2 bytes each.
pub const CONTROL_WORDS: u64 = READ_ONLY + 0x100;
/// How many.
pub const CONTROL_WORD_COUNT: u64 = 32;
/// Small numbers, a byte each.
pub const SMALL_NUMBERS: u64 = READ_ONLY + 0x140;
/// How many.
pub const SMALL_NUMBER_COUNT: u64 = 64;
/// Vectors of 32 bytes with small indices of 4 bytes each; as many with indices of 8 bytes follow.
pub const INDICES: u64 = READ_ONLY + 0x180;
/// How many of each.
pub const INDEX_COUNT: u64 = 4;
/// Two areas for XRSTOR and FXRSTOR. Some hosts look at as many bytes as their own areas have.
pub const XSAVE_AREAS: [u64; 2] = [READ_ONLY + 0x280, READ_ONLY + 0x5c0];
/// Bytes of XSAVE's area on hosts with AVX-512.
pub const HOST_AREA_SIZE: u64 = 0x980;

/// Number of different contents of the pages.
pub const IMAGES: usize = 32;

/// Contents of the data pages and the control page.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Image {
    /// The data pages, the one that may only be read last. That is the same in all images.
    pub data: [u8; IMAGE_SIZE],
    /// The control page.
    pub control: [u8; CONTROL_SIZE],
}

/// Code pages.
pub type Code = [u8; CODE_SIZE];

/// State before a sequence.
#[repr(C, align(64))]
#[derive(Clone, Debug)]
pub struct Input {
    /// x87, SSE and AVX state.
    pub xsave: [u8; XSAVE_SIZE],
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// Address of the first instruction.
    pub rip: u64,
    /// What the control page starts with: the fuel, and pointers.
    pub control: [u64; 1 + POINTER_COUNT],
    /// Number of the image.
    pub image: u32,
    /// System registers matter: they are loaded before and stored after.
    pub privileged: u32,
    /// The sequence begins in supervisor mode.
    pub supervisor: u32,
    /// CR0, CR4 and LSTAR.
    pub system: [u64; 3],
    /// Selector of the code segment, in user mode.
    pub cs: u32,
    /// Number of the code pages in the batch. As long as it stays the same, stores to the code pages stay, too.
    pub code: u32,
}

/// State after a sequence.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Outcome {
    /// Registers and exception.
    pub state: State,
    /// The data pages that may be written.
    pub data: [u8; DATA_SIZE],
    /// The control page.
    pub control: [u8; CONTROL_SIZE],
    /// The code pages.
    pub code: Code,
    /// System registers, as the monitor names them, after privileged runs.
    pub system: [u64; SYSTEM_NAMES.len()],
    /// Instructions executed, where they are counted.
    pub count: u64,
}

impl Outcome {
    /// Nothing.
    pub const fn empty() -> Self {
        Self {
            state: State::empty(),
            data: [0; DATA_SIZE],
            control: [0; CONTROL_SIZE],
            code: [0; CODE_SIZE],
            system: [0; SYSTEM_NAMES.len()],
            count: 0,
        }
    }
}

/// Stands for the vector when the engine panicked.
pub const PANIC: u64 = 256;
/// Stands for the vector when a sequence did not end.
pub const TIMEOUT: u64 = 257;
/// Stands for the vector after a triple fault.
pub const SHUTDOWN: u64 = 258;
/// Stands for the vector when the engine gave up.
pub const ENGINE_ERROR: u64 = 259;
/// Stands for the vector of what was not run, because what had to run before did not end.
pub const SKIPPED: u64 = 260;

/// Several code pages and the runs in them, in their order.
#[derive(Clone, Default)]
pub struct Batch {
    /// Code pages.
    pub codes: Vec<Code>,
    /// Runs, those of the same code pages one after another.
    pub inputs: Vec<Input>,
}

/// The contents of the pages, from a fixed seed.
pub fn images() -> Vec<Image> {
    let mut random = Random::new(2);
    let mut read_only = [0; PAGE as usize];
    fill(&mut random, &mut read_only);
    fill_read_only(&mut random, &mut read_only);
    let one = |number: usize| {
        let mut image = Image { data: [0; IMAGE_SIZE], control: [0; CONTROL_SIZE] };
        if number != 0 {
            fill(&mut random, &mut image.data[..DATA_SIZE]);
            fill(&mut random, &mut image.control);
        }
        image.data[DATA_SIZE..].copy_from_slice(&read_only);
        image
    };
    (0..IMAGES).map(one).collect()
}

fn fill_read_only(random: &mut Random, page: &mut [u8]) {
    let at = |address: u64| (address - READ_ONLY) as usize;
    for slot in page[at(MXCSRS)..][..4 * MXCSR_COUNT as usize].chunks_exact_mut(4) {
        slot.copy_from_slice(&mxcsr(random, 12).to_le_bytes());
    }
    for slot in page[at(CONTROL_WORDS)..][..2 * CONTROL_WORD_COUNT as usize].chunks_exact_mut(2) {
        let masks = if random.once_in(12) { random.bits() as u16 & 0x3f } else { 0x3f };
        slot.copy_from_slice(&(random.bits() as u16 & 0xf00 | 0x40 | masks).to_le_bytes());
    }
    for number in &mut page[at(SMALL_NUMBERS)..][..SMALL_NUMBER_COUNT as usize] {
        *number = random.below(3) as u8 * 32;
    }
    let (dwords, qwords) =
        page[at(INDICES)..][..64 * INDEX_COUNT as usize].split_at_mut(32 * INDEX_COUNT as usize);
    for index in dwords.chunks_exact_mut(4) {
        index.copy_from_slice(&(random.below(0x80) as i32 - 0x40).to_le_bytes());
    }
    for index in qwords.chunks_exact_mut(8) {
        index.copy_from_slice(&(random.below(0x80) as i64 - 0x40).to_le_bytes());
    }
    for (number, area) in XSAVE_AREAS.into_iter().enumerate() {
        page[at(area)..][..XSAVE_SIZE].copy_from_slice(&generate::xsave(random, 12));
        let header = &mut page[at(area) + 512..][..64];
        header.fill(0);
        header[0] = if number == 0 { 7 } else { 5 };
    }
}
