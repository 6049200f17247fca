//! Ordinary instructions: random bytes, as for single instructions, with memory operands that mostly hit the data pages.

use bivisor_x86::interp::vector::is_x87;
use iced_x86::{ConstantOffsets, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::build::{Builder, Class, RBP, RSP};
use super::code::{Field, Form, To};
use super::layout::{CONTROL, CONTROL_FREE, CONTROL_SIZE, NUDGE, READ_ONLY};
use crate::exclude::exclusion;
use crate::generate::{is_untold, random_bytes};
use crate::layout::{CODE, DATA, DATA_SIZE, PAGE};
use crate::mode::Mode;
use crate::random::Random;

/// Opcodes of one byte that compilers use much.
const COMMON: &[u8] = &[
    0x63, 0x69, 0x6b, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8d, 0x98, 0x99,
    0xa8, 0xa9, 0xc0, 0xc1, 0xc6, 0xc7, 0xd0, 0xd1, 0xd2, 0xd3, 0xf6, 0xf7, 0xfe, 0xff,
];
/// Opcodes behind 0F that compilers use much.
const COMMON_0F: &[u8] = &[
    0x10, 0x11, 0x12, 0x14, 0x16, 0x28, 0x29, 0x2a, 0x2c, 0x2e, 0x51, 0x54, 0x57, 0x58, 0x59, 0x5a, 0x5c,
    0x5d, 0x5e, 0x60, 0x61, 0x62, 0x6e, 0x6f, 0x70, 0x73, 0x74, 0x7e, 0x7f, 0xa3, 0xa4, 0xa5, 0xab, 0xac,
    0xad, 0xaf, 0xb0, 0xb1, 0xb3, 0xb6, 0xb7, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc6, 0xd4,
    0xd6, 0xd7, 0xe7, 0xeb, 0xef, 0xfa, 0xfe,
];
/// String instructions.
const STRINGS: &[u8] = &[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf];

/// Bytes that are likely to be an instruction that compilers use.
fn common_bytes(random: &mut Random, mode: Mode) -> [u8; 16] {
    let mut code = Vec::with_capacity(32);
    if random.once_in(16) {
        code.push(0xf0);
    }
    let kind = random.below(16);
    if random.once_in(8) || (kind >= 11 && random.once_in(2)) {
        code.push(random.pick(&[0x66, 0x66, 0xf2, 0xf3]));
    }
    if !random.once_in(3) && !mode.is_32bit {
        code.push(0x40 | random.bits() as u8 & 15 | if random.once_in(2) { 8 } else { 0 });
    }
    match kind {
        0..=3 => code.push(random.bits() as u8 & 0x38 | random.below(6) as u8),
        4..=7 => code.push(random.pick(COMMON)),
        8 => code.push(0x88 + random.below(4) as u8),
        9 => code.push(0xb0 | random.bits() as u8 & 15),
        10 => code.push(random.pick(STRINGS)),
        11 => code.extend([0x0f, 0x40 | random.bits() as u8 & 15 | if random.once_in(2) { 0x50 } else { 0 }]),
        _ => code.extend([0x0f, random.pick(COMMON_0F)]),
    }
    let modrm = random.bits() as u8;
    code.push(if random.once_in(3) { modrm | 0xc0 } else { modrm });
    code.extend(random.bits().to_le_bytes());
    code.extend(random.bits().to_le_bytes());
    code.truncate(16);
    let mut bytes = [0; 16];
    bytes[..code.len()].copy_from_slice(&code);
    bytes
}

/// What an instruction asks of registers, and where its displacement leads.
#[derive(Default)]
struct Needs {
    registers: Vec<(usize, Class)>,
    field: Option<Field>,
}

impl Needs {
    /// False if the register already has to hold something else.
    fn add(&mut self, number: usize, class: Class) -> bool {
        match self.registers.iter().find(|(other, _)| *other == number) {
            Some((_, other)) => *other == class,
            None => {
                self.registers.push((number, class));
                true
            }
        }
    }
}

impl Builder<'_> {
    /// Appends one ordinary instruction, and before it what it needs.
    pub fn ordinary(&mut self) {
        for _ in 0..1000 {
            let bytes = match self.random.once_in(2) {
                true => random_bytes(self.random, self.mode),
                false => common_bytes(self.random, self.mode),
            };
            if self.try_bytes(bytes) {
                return;
            }
        }
    }

    /// Appends the instruction with these bytes if it fits here.
    fn try_bytes(&mut self, mut bytes: [u8; 16]) -> bool {
        let mut decoder = self.mode.decoder(&bytes, CODE);
        let instruction = decoder.decode();
        let offsets = decoder.get_constant_offsets(&instruction);
        if instruction.is_invalid() {
            return self.random.once_in(4000) && !is_untold(&bytes, self.mode) && {
                self.emit(&bytes[..instruction.len().clamp(1, 15)], None);
                true
            };
        }
        if self.is_excluded(&instruction)
            || leads_to_nudges(&bytes[..instruction.len()])
            || !self.is_wanted(&instruction)
        {
            return false;
        }
        let mut needs = Needs::default();
        let wild = self.random.once_in(400);
        if !wild && !self.needs(&instruction, &offsets, &mut bytes, &mut needs) {
            return false;
        }
        if !self.may_set_up(&instruction, &needs) {
            return false;
        }
        for (number, class) in needs.registers {
            self.establish(number, class);
        }
        self.emit(&bytes[..instruction.len()], needs.field);
        true
    }

    fn is_excluded(&self, instruction: &Instruction) -> bool {
        use Mnemonic as M;
        // They give another result every time; or tell of the interpreter's own.
        let varies = matches!(
            instruction.mnemonic(),
            M::Rdtsc
                | M::Rdtscp
                | M::Rdrand
                | M::Rdseed
                | M::Rdpmc
                | M::Mwait
                | M::Mwaitx
                | M::Monitor
                | M::Monitorx
        );
        match self.with_privileged {
            true => varies,
            false => exclusion(instruction, self.model).is_some(),
        }
    }

    /// Whether the instruction does something that sequences are after, and nothing that mostly ends them.
    fn is_wanted(&mut self, instruction: &Instruction) -> bool {
        use Mnemonic as M;
        if matches!(instruction.flow_control(), FlowControl::Interrupt | FlowControl::Exception) {
            return self.random.once_in(40);
        }
        if instruction.flow_control() != FlowControl::Next {
            return false;
        }
        let rare = match instruction.mnemonic() {
            // Those come from templates, which see that the sequence can go on.
            _ if self.is_supervisor && is_system(instruction) => 300,
            _ if instruction.is_privileged() => 100,
            M::Cli | M::Sti => 100,
            mnemonic if uses_ports(mnemonic) => 100,
            M::Div | M::Idiv => 3,
            M::Popf | M::Popfq | M::Popfd | M::Enter => 20,
            // They come from templates: the host knows a bit of MXCSR that the guest does not.
            M::Fxrstor | M::Fxrstor64 | M::Ldmxcsr | M::Vldmxcsr => return false,
            M::Fldenv | M::Frstor if self.environments => return false,
            M::Fldenv | M::Frstor | M::Fldcw => 20,
            M::Fxsave | M::Fxsave64 | M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => return false,
            M::Xsavec | M::Xsavec64 | M::Xrstor | M::Xrstor64 | M::Xgetbv => return false,
            M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave => return self.environments,
            M::Fnstcw | M::Fnstsw | M::Fninit | M::Fnclex => 2,
            _ if self.environments && is_x87(instruction.code()) => return false,
            // Whether it asks for alignment with an empty mask, processors differ in.
            M::Maskmovdqu | M::Vmaskmovdqu => return false,
            // Vectors of indices come from templates.
            _ if instruction.is_vsib() => return false,
            M::Emms => 2,
            _ => 1,
        };
        self.random.once_in(rare)
    }

    /// Whether pointers survive, mostly.
    fn may_set_up(&mut self, instruction: &Instruction, needs: &Needs) -> bool {
        let unmet = needs.registers.iter().filter(|(number, class)| self.classes[*number] != *class);
        let unmet: Vec<usize> = unmet.map(|(number, _)| *number).collect();
        if unmet.len() > 1 || (unmet.len() == 1 && !self.random.once_in(3)) {
            return false;
        }
        let written = self.written_registers(instruction);
        let keeps_rsp = instruction.is_stack_instruction();
        let keeps = instruction.is_string_instruction();
        let lost = written.iter().chain(&unmet).filter(|&&number| {
            self.classes[number] == Class::Pointer && !(number == RSP && keeps_rsp) && !keeps
        });
        let lost: Vec<usize> = lost.copied().collect();
        if lost.contains(&RSP) && !self.random.once_in(60) {
            return false;
        }
        lost.is_empty() || self.random.once_in(6)
    }

    // ---- operands ----

    /// What the operands need; false if they can't get it.
    fn needs(
        &mut self,
        instruction: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8; 16],
        needs: &mut Needs,
    ) -> bool {
        use Mnemonic as M;
        for operand in 0..instruction.op_count() {
            let met = match instruction.op_kind(operand) {
                OpKind::Memory => self.memory_needs(instruction, offsets, bytes, needs),
                OpKind::MemorySegRSI | OpKind::MemorySegESI => {
                    needs.add(6, pointer_in(instruction.memory_segment()))
                }
                // Nothing is where 16 bits lead.
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => self.random.once_in(50),
                OpKind::MemoryESRDI | OpKind::MemoryESEDI => needs.add(7, Class::Pointer),
                OpKind::MemorySegRDI | OpKind::MemorySegEDI => {
                    needs.add(7, pointer_in(instruction.memory_segment()))
                }
                _ => true,
            };
            if !met {
                return false;
            }
        }
        let is_repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        let bits = matches!(instruction.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
            && instruction.op0_kind() == OpKind::Memory
            && instruction.op1_kind() == OpKind::Register;
        let more = match instruction.mnemonic() {
            M::Leave => needs.add(RBP, Class::Pointer),
            M::Clzero => needs.add(0, Class::Pointer),
            _ if instruction.is_string_instruction() && is_repeated => needs.add(1, Class::Small),
            _ if bits => needs.add(instruction.op1_register().full_register().number(), Class::Small),
            _ => true,
        };
        more && (!instruction.is_stack_instruction() || needs.add(RSP, Class::Pointer))
    }

    fn memory_needs(
        &mut self,
        instruction: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8; 16],
        needs: &mut Needs,
    ) -> bool {
        // NOPs, prefetches and LEA access nothing.
        if matches!(instruction.mnemonic(), Mnemonic::Lea | Mnemonic::Nop | Mnemonic::Reservednop) {
            return true;
        }
        let in_segment = pointer_in(instruction.memory_segment()) == Class::Small;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        if base == Register::RIP || base == Register::EIP {
            let address = self.operand_address(instruction);
            if !in_segment {
                let at = offsets.displacement_offset() as u8;
                needs.field = Some(Field { at, size: 4, form: Form::Relative, to: To::Address(address) });
            }
            return !in_segment;
        }
        let is_16bit = base.size() == 2 || index.size() == 2 || instruction.memory_displ_size() == 2;
        // FS and GS hold null in 32-bit code; nothing is where 16 bits lead.
        if self.mode.is_32bit && (in_segment || is_16bit) {
            return self.random.once_in(50);
        }
        let class = pointer_in(instruction.memory_segment());
        if index != Register::None && !needs.add(index.full_register().number(), Class::Small) {
            return false;
        }
        if base != Register::None && !needs.add(base.full_register().number(), class) {
            return false;
        }
        let displacement = match base {
            Register::None if in_segment => self.random.below(0x400) & !31,
            Register::None => self.operand_address(instruction),
            _ => self.random.below(0x300).wrapping_sub(0x180) & !31,
        };
        self.set_displacement(instruction, offsets, bytes, displacement);
        true
    }

    /// Overwrites a displacement; one of a byte stays, but is mostly aligned.
    fn set_displacement(
        &mut self,
        instruction: &Instruction,
        offsets: &ConstantOffsets,
        bytes: &mut [u8; 16],
        displacement: u64,
    ) {
        let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
        if !offsets.has_displacement() || at + size > bytes.len() {
            return;
        }
        let exact = self.random.once_in(12) || instruction.memory_size().size() < 16;
        match size {
            1 if exact => {}
            1 => bytes[at] &= !31,
            _ => {
                let slack = if exact { self.random.below(32) } else { 0 };
                bytes[at..at + size].copy_from_slice(&(displacement + slack).to_le_bytes()[..size]);
            }
        }
    }

    /// A linear address for an operand that is told as such.
    fn operand_address(&mut self, instruction: &Instruction) -> u64 {
        let size = instruction.memory_size().size().max(1) as u64;
        let end = READ_ONLY + PAGE;
        let near = |random: &mut Random, boundary: u64| boundary - size + random.below(size + 1);
        match self.random.below(200) {
            0 => near(self.random, DATA),
            1 => near(self.random, end),
            2 | 3 => near(self.random, DATA + DATA_SIZE as u64),
            4..=9 => near(self.random, DATA + PAGE),
            10..=20 => READ_ONLY + self.random.below(PAGE / 64) * 64,
            21..=60 => {
                let free = CONTROL_SIZE as u64 - CONTROL_FREE;
                CONTROL + CONTROL_FREE + self.random.below(free / 64) * 64
            }
            _ => self.data_address(),
        }
    }
}

/// Whether a constant in the instruction may make an address near the page of nudges, which holds other things in the guest.
fn leads_to_nudges(bytes: &[u8]) -> bool {
    let near = NUDGE - 0x1_0000..NUDGE + 0x2_0000;
    bytes
        .windows(4)
        .any(|word| near.contains(&u32::from_le_bytes([word[0], word[1], word[2], word[3]]).into()))
}

/// Whether the instruction changes system registers, or ports.
fn is_system(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let loads_segment = instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().is_segment_register();
    loads_segment
        || instruction.is_privileged()
        || uses_ports(instruction.mnemonic())
        || matches!(instruction.mnemonic(), M::Popf | M::Popfq)
}

fn uses_ports(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::In | M::Insb | M::Insw | M::Insd | M::Out | M::Outsb | M::Outsw | M::Outsd)
}

/// What a base register holds for an access in this segment: FS and GS have bases in the data pages.
fn pointer_in(segment: Register) -> Class {
    if matches!(segment, Register::FS | Register::GS) { Class::Small } else { Class::Pointer }
}
