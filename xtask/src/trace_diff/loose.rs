//! What two engines need not agree on: flags that instructions leave undefined, what is read from time-stamp counters,
//! random numbers and ports, and what is computed from these. Followed through registers and memory along the
//! interpreter's trace; memory that is reached over FS and GS, whose bases aren't in the trace, counts as separate.

use std::collections::HashSet;

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register, RflagsBits};

use super::line::Line;

/// Arithmetic flags as bits of RFLAGS, with what the decoder calls them.
const FLAGS: [(u32, u64); 6] = [
    (RflagsBits::CF, 1 << 0),
    (RflagsBits::PF, 1 << 2),
    (RflagsBits::AF, 1 << 4),
    (RflagsBits::ZF, 1 << 6),
    (RflagsBits::SF, 1 << 7),
    (RflagsBits::OF, 1 << 11),
];
/// All of them.
const ALL_FLAGS: u64 = 0x8d5;
/// What stands for the unknown bases of FS and GS.
const FAR: u64 = 1 << 62;
/// Memory is followed in pieces of this many bytes.
const GRANULE: u64 = 8;

/// What is loose in one state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loose {
    /// Bits of RFLAGS.
    pub flags: u64,
    /// General registers, a bit each.
    pub registers: u16,
}

/// Follows what is loose.
pub struct Follower {
    factory: InstructionInfoFactory,
    loose: Loose,
    memory: HashSet<u64>,
    /// The line before, and its instruction.
    before: Option<(Line, Option<Instruction>)>,
}

fn flags(of: u32) -> u64 {
    FLAGS.iter().filter(|(theirs, _)| of & theirs != 0).map(|(_, ours)| ours).sum()
}

fn register_bit(register: Register) -> u16 {
    if register.is_gpr() { 1 << register.full_register().number() } else { 0 }
}

/// Whether an instruction brings in what differs from run to run.
fn is_source(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{In, Insb, Insd, Insw, Rdmsr, Rdpmc, Rdrand, Rdseed, Rdtsc, Rdtscp};
    matches!(mnemonic, Rdtsc | Rdtscp | Rdpmc | Rdrand | Rdseed | Rdmsr | In | Insb | Insw | Insd)
}

impl Follower {
    /// Nothing is loose yet.
    pub fn new() -> Self {
        Self {
            factory: InstructionInfoFactory::new(),
            loose: Loose::default(),
            memory: HashSet::new(),
            before: None,
        }
    }

    /// What is loose where this line, the one that follows that of the last call, begins.
    pub fn next(&mut self, line: &Line) -> Loose {
        if let Some((before, instruction)) = self.before.take() {
            match instruction {
                Some(instruction) if !delivered(&instruction, line) => self.execute(&before, &instruction),
                // The frame on the stack holds the flags, above an error code or not.
                Some(_) if self.loose.flags != 0 => {
                    let stack = line.registers[4] / GRANULE;
                    self.memory.extend([stack + 2, stack + 3]);
                }
                _ => {}
            }
        }
        self.before = Some((line.clone(), line.instruction()));
        self.loose
    }

    fn execute(&mut self, line: &Line, instruction: &Instruction) {
        let mut loose =
            is_source(instruction.mnemonic()) || self.loose.flags & flags(instruction.rflags_read()) != 0;
        let value = |register: Register| match register {
            Register::FS | Register::GS => FAR,
            _ if register.is_gpr() => {
                let full = line.registers[register.full_register().number()];
                match register.size() {
                    8 => full,
                    4 => full & 0xffff_ffff,
                    _ => full & 0xffff,
                }
            }
            _ => 0,
        };
        let info = self.factory.info(instruction);
        let (mut written, mut narrow) = (0, 0);
        for used in info.used_registers() {
            let bit = register_bit(used.register());
            if reads(used.access()) {
                // Where a loose address leads is not followed, and a stack pointer is never loose.
                loose |= self.loose.registers & bit != 0;
            }
            if writes(used.access()) && bit != 1 << 4 {
                written |= bit;
                let partly = used.register().size() < 4 || used.access() == OpAccess::CondWrite;
                narrow |= if partly { bit } else { 0 };
            }
        }
        let mut stores = Vec::new();
        for used in info.used_memory() {
            let start = used.virtual_address(0, |register, _, _| Some(value(register))).unwrap_or(0);
            let size = used.memory_size().size().max(1) as u64;
            let granules = start / GRANULE..=start.saturating_add(size - 1) / GRANULE;
            if reads(used.access()) {
                loose |= granules.clone().any(|granule| self.memory.contains(&granule));
            }
            if writes(used.access()) {
                stores.extend(granules);
            }
        }
        let returns = matches!(instruction.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq);
        if loose && !returns {
            self.loose.registers |= written;
            self.memory.extend(stores);
        } else {
            self.loose.registers &= !(written & !narrow);
            stores.iter().for_each(|granule| {
                self.memory.remove(granule);
            });
        }
        let modified = flags(instruction.rflags_modified());
        let undefined = flags(instruction.rflags_undefined());
        let settled = if loose { 0 } else { modified & !undefined };
        let loosened = if loose { modified } else { undefined };
        self.loose.flags = (self.loose.flags & !settled | loosened) & ALL_FLAGS;
    }
}

fn reads(access: OpAccess) -> bool {
    use OpAccess::{CondRead, Read, ReadCondWrite, ReadWrite};
    matches!(access, Read | CondRead | ReadWrite | ReadCondWrite)
}

fn writes(access: OpAccess) -> bool {
    use OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite)
}

/// Whether an exception or interrupt came in between: the line does not follow from the instruction before it.
pub fn delivered(before: &Instruction, line: &Line) -> bool {
    before.flow_control() == FlowControl::Next && line.rip != before.next_ip() && line.rip != before.ip()
}
