//! The bare-metal guests as images, what each is expected to print, and the harness that runs one on any
//! engine (or on QEMU, as a check of the guests themselves) and compares.

mod harness;

pub use harness::{Outcome, Verdict, run};

/// A bare-metal guest: a static ELF64 kernel with a PVH entry note.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Its name, as in `guests/bare/src/bin`.
    pub name: &'static str,
    /// The ELF file.
    pub image: &'static [u8],
    /// What it prints, line by line. `*` stands for any text within a line, a line of `...` for any number of lines.
    pub expected: &'static str,
    /// What to type on its serial console.
    pub input: &'static str,
    /// Checks, one a line, in which QEMU's TCG (7.2, `-cpu max`) differs from the manuals: it checks no segment
    /// limits, no alignment and few reserved bits, raises no SSE exceptions, and doubles the vector in the
    /// error code of a fault by a gate of the 64-bit interrupt table, reports reserved page table bits without P, and
    /// reads zeros where nothing is.
    pub qemu_differs: &'static str,
}

macro_rules! guest {
    ($name:literal, input: $input:expr) => {
        Guest {
            name: $name,
            image: include_bytes!(concat!(env!("BIVISOR_GUEST_IMAGES"), "/", $name)),
            expected: include_str!(concat!("../expected/", $name, ".txt")),
            input: $input,
            qemu_differs: include_str!(concat!("../expected/", $name, ".qemu.txt")),
        }
    };
}

/// The default guest: says what machine it sees, and has a small prompt.
pub const HELLO: Guest = guest!("hello", input: "help\rinfo\rpoweroff\r");

/// Loses its machine in the way that a key of [`TRIPLE_FAULTS`] or [`HANGS`] chooses.
pub const LOST: Guest = guest!("lost", input: "");

/// Keys of [`LOST`] by which it ends in a triple fault.
pub const TRIPLE_FAULTS: [&str; 8] = ["1", "2", "3", "4", "5", "6", "7", "8"];

/// Keys of [`LOST`] by which its CPU never comes back by itself.
pub const HANGS: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];

/// Every guest that ends by itself.
pub const ALL: &[Guest] = &[
    HELLO,
    guest!("code32", input: ""),
    guest!("escape", input: ""),
    guest!("exceptions", input: ""),
    guest!("paging", input: ""),
    guest!("smc", input: ""),
    guest!("timers", input: ""),
];
