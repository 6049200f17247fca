//! The address space in which an instruction is tried, natively and in the interpreter, and what goes in and comes out.

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Linear address of the code pages, readable and executable. The page behind them is not mapped.
pub const CODE: u64 = 0x1000_0000;
/// Bytes of code pages.
pub const CODE_SIZE: usize = 2 * PAGE as usize;
/// Linear address of the data pages. The pages before and behind them are not mapped.
pub const DATA: u64 = 0x1001_0000;
/// Bytes of data that may be written.
pub const DATA_SIZE: usize = 2 * PAGE as usize;
/// Bytes of data behind the former that may only be read.
pub const READ_ONLY_SIZE: usize = PAGE as usize;
/// Base of FS.
pub const FS_BASE: u64 = DATA + 0x140;
/// Base of GS.
pub const GS_BASE: u64 = DATA + 0x1000;
/// Selectors that Linux gives a 64-bit program.
pub const USER_CS: u16 = 0x33;
/// Selector of 32-bit code that Linux has for such programs.
pub const USER_CS_32BIT: u16 = 0x23;
/// Stack segment of a 64-bit program on Linux.
pub const USER_SS: u16 = 0x2b;
/// Number of different contents of the data pages.
pub const IMAGES: usize = 64;
/// Bytes of one of them, the read-only page included.
pub const IMAGE_SIZE: usize = DATA_SIZE + READ_ONLY_SIZE;
/// Bytes of the x87, SSE and AVX state in the standard format of XSAVE.
pub const XSAVE_SIZE: usize = 832;
/// Words of 8 bytes that one instruction may change: more than XSAVE writes.
pub const MAX_CHANGES: usize = 128;

/// Contents of the data pages. The read-only page is the same in all images.
pub type Image = [u8; IMAGE_SIZE];

/// State before an instruction, and the instruction.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Case {
    /// x87, SSE and AVX state.
    pub xsave: [u8; XSAVE_SIZE],
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Flags, without TF.
    pub rflags: u64,
    /// Address of the instruction, in the code pages.
    pub rip: u64,
    /// Bytes at `rip`, as far as they lie in the code pages.
    pub code: [u8; 16],
    /// Number of the image in the data pages.
    pub image: u32,
    /// Whether the interpreter single-steps, as the native run always does.
    pub steps: bool,
}

/// A word of the data pages that was changed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Offset from [`DATA`] in bytes.
    pub offset: u32,
    /// What is there now.
    pub value: u64,
}

/// State after an instruction or a sequence of them.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct State {
    /// x87, SSE and AVX state.
    pub xsave: [u8; XSAVE_SIZE],
    /// General registers.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// Where execution would go on.
    pub rip: u64,
    /// The exception's vector; 1 after an instruction that raised none.
    pub vector: u64,
    /// The exception's error code, zero where it has none.
    pub error: u64,
    /// Linear address of a page fault.
    pub cr2: u64,
}

impl State {
    /// Nothing.
    pub const fn empty() -> Self {
        Self { xsave: [0; XSAVE_SIZE], gpr: [0; 16], rflags: 0, rip: 0, vector: 0, error: 0, cr2: 0 }
    }
}

/// What an instruction did.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct Outcome {
    /// The state after it.
    pub state: State,
    /// How many `changes` there are.
    pub change_count: u32,
    /// Changed words of the data pages.
    pub changes: [Change; MAX_CHANGES],
}

impl Outcome {
    /// Nothing.
    pub const fn empty() -> Self {
        Self {
            state: State::empty(),
            change_count: 0,
            changes: [Change { offset: 0, value: 0 }; MAX_CHANGES],
        }
    }

    /// The changed words, as far as they were recorded.
    pub fn changes(&self) -> &[Change] {
        &self.changes[..(self.change_count as usize).min(MAX_CHANGES)]
    }

    /// Records how the data pages differ from the image. Returns whether they do.
    pub fn record_changes(&mut self, image: &[u8], data: &[u8]) -> bool {
        self.change_count = 0;
        if image == data {
            return false;
        }
        for (i, (before, after)) in image.chunks_exact(8).zip(data.chunks_exact(8)).enumerate() {
            if before != after
                && let Some(change) = self.changes.get_mut(self.change_count as usize)
            {
                let value = after.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
                *change = Change { offset: 8 * i as u32, value };
                self.change_count += 1;
            }
        }
        true
    }
}
