//! Random instructions, and states in which they have something to do: memory operands that hit the data pages,
//! divisors that do not always overflow, headers that are valid.

use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::registers::{Rflags, gpr};
use iced_x86::{Code, ConstantOffsets, Instruction, Mnemonic, OpKind, Register};

use crate::exclude::exclusion;
use crate::layout::{
    CODE, Case, DATA, DATA_SIZE, FS_BASE, GS_BASE, IMAGE_SIZE, IMAGES, Image, PAGE, READ_ONLY_SIZE,
    XSAVE_SIZE,
};
use crate::mode::Mode;
use crate::random::Random;

/// Where in every image lie values for LDMXCSR.
const MXCSR_SLOTS: u64 = 0x300;
/// Where lies a valid XSAVE area.
const XSAVE_SLOT: u64 = 0x400;
/// Prefixes that change operand or address size, segment, or repetition.
const PREFIXES: [u8; 11] = [0x66, 0xf2, 0xf3, 0x66, 0x67, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65];

/// An instruction with its state, and how it was decoded.
pub struct Generated {
    /// What to execute.
    pub case: Case,
    /// The instruction; invalid ones are tried, too.
    pub instruction: Instruction,
}

/// Makes cases.
pub struct Generator {
    random: Random,
    mode: Mode,
    /// The current image: it changes now and then only, because copying it takes time.
    image: u32,
}

/// The contents of the data pages, from a fixed seed.
pub fn images() -> Box<[Image; IMAGES]> {
    let mut random = Random::new(1);
    let mut read_only = [0; READ_ONLY_SIZE];
    fill(&mut random, &mut read_only);
    let images: Vec<Image> = (0..IMAGES)
        .map(|number| {
            let mut image = [0; IMAGE_SIZE];
            if number != 0 {
                fill(&mut random, &mut image[..DATA_SIZE]);
            }
            for slot in image[MXCSR_SLOTS as usize..XSAVE_SLOT as usize].chunks_exact_mut(4) {
                slot.copy_from_slice(&mxcsr(&mut random, 3).to_le_bytes());
            }
            image[XSAVE_SLOT as usize..][..XSAVE_SIZE].copy_from_slice(&xsave(&mut random, 4));
            let header = &mut image[XSAVE_SLOT as usize + 512..][..64];
            header.fill(0);
            header[0] = number as u8 & 7;
            if number & 8 != 0 {
                header[8..16].copy_from_slice(&(1u64 << 63 | 7).to_le_bytes());
            }
            image[DATA_SIZE..].copy_from_slice(&read_only);
            image
        })
        .collect();
    match images.into_boxed_slice().try_into() {
        Ok(images) => images,
        Err(_) => unreachable!("made as many as the type says"),
    }
}

pub(crate) fn fill(random: &mut Random, bytes: &mut [u8]) {
    for vector in bytes.chunks_exact_mut(16) {
        vector.copy_from_slice(&random.vector());
    }
}

/// A valid MXCSR: all exceptions masked but once in `unmasked` times.
pub(crate) fn mxcsr(random: &mut Random, unmasked: u64) -> u32 {
    let controls = random.bits() as u32 & 0xe040;
    let masks = if random.once_in(unmasked) { random.bits() as u32 & 0x1f80 } else { 0x1f80 };
    let flags = if random.once_in(2) { random.bits() as u32 & 0x3f } else { 0 };
    let simple = random.once_in(2);
    if simple { masks | flags } else { controls | masks | flags }
}

/// x87, SSE and AVX state. Exceptions may be unmasked once in `unmasked` times.
pub(crate) fn xsave(random: &mut Random, unmasked: u64) -> [u8; XSAVE_SIZE] {
    let mut area = [0; XSAVE_SIZE];
    let control = match random.below(4) {
        _ if random.once_in(unmasked) => random.bits() as u16 & 0x0f3f | 0x40,
        0 | 1 => random.bits() as u16 & 0x0f00 | 0x7f,
        _ => 0x37f,
    };
    let mut status = random.bits() as u16 & 0x7f7f;
    if !random.once_in(32) {
        status &= control | !0x3f;
    }
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    let tags = match random.below(4) {
        0 => 0,
        1 => 0xff,
        _ => random.bits() as u8,
    };
    area[0..2].copy_from_slice(&control.to_le_bytes());
    area[2..4].copy_from_slice(&status.to_le_bytes());
    area[4] = tags;
    // The pointers to the last x87 instruction stay zero: AMD processors drop them in signal frames.
    area[24..28].copy_from_slice(&mxcsr(random, unmasked).to_le_bytes());
    area[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    for register in area[32..160].chunks_exact_mut(16) {
        let (significand, exponent) =
            if random.once_in(4) { (random.integer(), 0xffff) } else { random.extended() };
        register[..8].copy_from_slice(&significand.to_le_bytes());
        register[8..10].copy_from_slice(&exponent.to_le_bytes());
    }
    if !random.once_in(64) {
        for register in area[160..416].chunks_exact_mut(16) {
            register.copy_from_slice(&random.vector());
        }
    }
    if !random.once_in(64) {
        for register in area[576..832].chunks_exact_mut(16) {
            register.copy_from_slice(&random.vector());
        }
    }
    area
}

impl Generator {
    /// A generator for instructions of this CPU model.
    pub fn new(seed: u64, model: &CpuModel) -> Self {
        Self { random: Random::new(seed), mode: Mode::new(model, false), image: 0 }
    }

    /// The next case.
    pub fn next(&mut self, model: &CpuModel, images: &[Image; IMAGES]) -> Generated {
        loop {
            let mut code = random_bytes(&mut self.random, self.mode);
            let rip = CODE + 0x800 + self.random.below(64);
            let mut decoder = self.mode.decoder(&code, rip);
            let instruction = decoder.decode();
            let offsets = decoder.get_constant_offsets(&instruction);
            if instruction.is_invalid() && (!self.random.once_in(16) || is_untold(&code, self.mode)) {
                continue;
            }
            if exclusion(&instruction, model).is_some() {
                continue;
            }
            let mut gpr = self.registers();
            let mut case_xsave = xsave(&mut self.random, 4);
            if self.random.once_in(16) {
                self.image = self.random.below(IMAGES as u64) as u32;
            }
            let image = self.image;
            let mut placement = Placement {
                random: &mut self.random,
                gpr: &mut gpr,
                code: &mut code,
                xsave: &mut case_xsave,
                instruction: &instruction,
                offsets,
            };
            let target = placement.place();
            placement.tune(target, &images[image as usize]);
            let case = Case {
                xsave: case_xsave,
                gpr,
                rflags: self.flags(&instruction),
                rip,
                code,
                image,
                steps: self.random.once_in(2) || must_step(&instruction),
            };
            let instruction = self.mode.decoder(&case.code, rip).decode();
            return Generated { case, instruction };
        }
    }

    fn flags(&mut self, instruction: &Instruction) -> u64 {
        let mut writable = Rflags::ARITHMETIC | Rflags::DF;
        // Processors differ in whether an access with an empty mask must be aligned.
        let is_masked = matches!(instruction.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu);
        if self.random.once_in(16) && !is_masked {
            writable |= Rflags::AC;
        }
        self.random.bits() & writable.bits() | Rflags::IF.bits() | Rflags::FIXED.bits()
    }

    fn registers(&mut self) -> [u64; 16] {
        let mut gpr = [0; 16];
        for register in &mut gpr {
            *register = match self.random.below(3) {
                0 => DATA + self.random.below(DATA_SIZE as u64),
                _ => self.random.integer(),
            };
        }
        let mask = if self.random.once_in(8) { !0 } else { !7 };
        gpr[gpr::RSP] = DATA + 0x200 + self.random.below(DATA_SIZE as u64 - 0x400) & mask;
        gpr[gpr::RBP] = DATA + 0x200 + self.random.below(DATA_SIZE as u64 - 0x400) & mask;
        gpr
    }
}

/// Bytes that are likely to be an instruction.
pub(crate) fn random_bytes(random: &mut Random, mode: Mode) -> [u8; 16] {
    let mut rest = [0; 16];
    for word in rest.chunks_exact_mut(8) {
        word.copy_from_slice(&random.bits().to_le_bytes());
    }
    if random.once_in(24) {
        return rest;
    }
    let mut code = Vec::with_capacity(32);
    while random.once_in(4) {
        code.push(random.pick(&PREFIXES));
    }
    if random.once_in(20) {
        code.push(0xf0);
    }
    let opcode = random.bits() as u8;
    let kind = random.below(16);
    let is_legacy = kind < 11;
    // In 32-bit code a VEX prefix has these bits set.
    let vex = if mode.is_32bit { 0xc0 } else { 0 };
    if is_legacy {
        if kind > 4 && random.once_in(2) {
            code.push(random.pick(&[0x66, 0xf2, 0xf3]));
        }
        // In 32-bit code these are no prefixes.
        if random.once_in(2) && !mode.is_32bit {
            code.push(0x40 | random.bits() as u8 & 15);
        }
    }
    match kind {
        0..=3 => code.push(opcode),
        4 => code.push(0xd8 | opcode & 7),
        5..=7 => code.extend([0x0f, opcode]),
        8 | 9 => code.extend([0x0f, 0x38, opcode]),
        10 => code.extend([0x0f, 0x3a, opcode]),
        11 | 12 => code.extend([0xc5, random.bits() as u8 | vex, opcode]),
        _ => {
            let map = 1 + random.below(3) as u8;
            let registers = random.bits() as u8 & 0xe0 | vex;
            code.extend([0xc4, registers | map, random.bits() as u8, opcode]);
        }
    }
    let modrm = random.bits() as u8;
    code.push(if random.once_in(3) { modrm | 0xc0 } else { modrm });
    code.extend(rest);
    code.truncate(16);
    rest.copy_from_slice(&code);
    rest
}

/// Whether these undefined bytes may be an instruction for some processors.
pub(crate) fn is_untold(code: &[u8; 16], mode: Mode) -> bool {
    is_system_group(code) || is_mask_instruction(code) || is_valid_with_other_w(code, mode)
}

/// Whether only the W bit of a VEX prefix makes the instruction undefined: Zen does not look at it everywhere.
fn is_valid_with_other_w(code: &[u8; 16], mode: Mode) -> bool {
    (0..code.len() - 2).filter(|&at| code[at] == 0xc4).any(|at| {
        let mut other = *code;
        other[at + 2] ^= 0x80;
        !mode.decoder(&other, CODE).decode().is_invalid()
    })
}

/// Whether these bytes may be of the system instructions 0F 00 to 0F 03, of which processors take more than the
/// decoder does, prefixes included.
fn is_system_group(code: &[u8; 16]) -> bool {
    code.windows(2).any(|pair| matches!(pair, [0x0f, 0..=3]))
}

/// Whether these bytes may be of AVX-512's mask instructions (VEX maps 0F and 0F3A): hosts that have them don't look
/// at all the bits which the decoder wants to see clear.
fn is_mask_instruction(code: &[u8; 16]) -> bool {
    let in_map = |map: u8, opcode: u8| match map {
        1 => matches!(opcode, 0x41..=0x4b | 0x90..=0x93 | 0x98 | 0x99),
        3 => matches!(opcode, 0x30..=0x33),
        _ => false,
    };
    code.windows(4).any(|bytes| match *bytes {
        [0xc5, _, opcode, _] => in_map(1, opcode),
        [0xc4, map, _, opcode] => in_map(map & 0x1f, opcode),
        _ => false,
    })
}

/// Instructions that show the trap flag, or that are repeated: natively they always execute with TF set.
fn must_step(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq)
        || matches!(instruction.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq)
        || instruction.has_rep_prefix()
        || instruction.has_repne_prefix()
}

/// Sets the registers and the displacement so that an instruction accesses the data pages.
struct Placement<'a> {
    random: &'a mut Random,
    gpr: &'a mut [u64; 16],
    code: &'a mut [u8; 16],
    xsave: &'a mut [u8; XSAVE_SIZE],
    instruction: &'a Instruction,
    offsets: ConstantOffsets,
}

fn segment_base(segment: Register) -> u64 {
    match segment {
        Register::FS => FS_BASE,
        Register::GS => GS_BASE,
        _ => 0,
    }
}

impl Placement<'_> {
    /// A linear address for an operand.
    fn target(&mut self) -> u64 {
        use Mnemonic as M;
        let mnemonic = self.instruction.mnemonic();
        let special = match mnemonic {
            M::Ldmxcsr | M::Vldmxcsr => Some(MXCSR_SLOTS + 4 * self.random.below(64)),
            M::Xrstor | M::Xrstor64 | M::Fxrstor | M::Fxrstor64 => Some(XSAVE_SLOT),
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
                Some(64 * self.random.below(DATA_SIZE as u64 / 64))
            }
            _ => None,
        };
        if let Some(offset) = special
            && !self.random.once_in(8)
        {
            return DATA + offset;
        }
        let size = self.instruction.memory_size().size() as u64;
        let near =
            |random: &mut Random, boundary: u64| boundary.wrapping_sub(size + 1) + random.below(size + 2);
        let end = DATA + IMAGE_SIZE as u64;
        match self.random.below(32) {
            0 => near(self.random, DATA + PAGE),
            1 => near(self.random, DATA + DATA_SIZE as u64),
            2 => near(self.random, end),
            3 => near(self.random, DATA),
            4 => end - 1 - self.random.below(READ_ONLY_SIZE as u64),
            5..=12 => DATA + self.random.below(DATA_SIZE as u64 - 64),
            _ => DATA + self.random.below(DATA_SIZE as u64 - 512) & !63,
        }
    }

    fn set(&mut self, register: Register, value: u64) {
        let full = register.full_register();
        if !full.is_gpr64() {
            return;
        }
        let slot = &mut self.gpr[full.number()];
        // A 32-bit address register may have anything in its upper half.
        *slot = match register.size() {
            4 => value & 0xffff_ffff | *slot & 0xffff_ffff_0000_0000,
            _ => value,
        };
    }

    fn value(&self, register: Register) -> u64 {
        let full = register.full_register();
        if !full.is_gpr64() {
            return 0;
        }
        let value = self.gpr[full.number()];
        match register.size() {
            1 => value & 0xff,
            4 => value & 0xffff_ffff,
            _ => value,
        }
    }

    /// Overwrites the displacement.
    fn patch_displacement(&mut self, value: u64) {
        let (at, size) = (self.offsets.displacement_offset(), self.offsets.displacement_size());
        if self.offsets.has_displacement() && size >= 4 && at + size <= self.code.len() {
            self.code[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }

    /// Places the explicit and implicit memory operands. Returns where the explicit one went.
    fn place(&mut self) -> Option<u64> {
        let mut placed = None;
        if self.random.once_in(64) {
            return None;
        }
        for i in 0..self.instruction.op_count() {
            let segment = segment_base(self.instruction.memory_segment());
            match self.instruction.op_kind(i) {
                OpKind::Memory if self.instruction.memory_index().is_vector_register() => self.place_vsib(),
                OpKind::Memory => placed = Some(self.place_memory()),
                OpKind::MemorySegRSI | OpKind::MemorySegESI => {
                    self.gpr[gpr::RSI] = self.target().wrapping_sub(segment);
                }
                OpKind::MemoryESRDI | OpKind::MemoryESEDI => self.gpr[gpr::RDI] = self.target(),
                OpKind::MemorySegRDI | OpKind::MemorySegEDI => {
                    self.gpr[gpr::RDI] = self.target().wrapping_sub(segment);
                }
                _ => {}
            }
        }
        placed
    }

    fn place_memory(&mut self) -> u64 {
        let instruction = self.instruction;
        let target = self.target();
        let want = target.wrapping_sub(segment_base(instruction.memory_segment()));
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let scale = u64::from(instruction.memory_index_scale());
        let displacement = instruction.memory_displacement64();
        if base == Register::RIP || base == Register::EIP {
            self.patch_displacement(want.wrapping_sub(instruction.next_ip()));
            return target;
        }
        let rest = want.wrapping_sub(displacement);
        if index == Register::None {
            match base {
                Register::None => self.patch_displacement(want),
                _ => self.set(base, rest),
            }
        } else if base == index {
            self.set(base, rest / (1 + scale));
        } else {
            if index.size() > 1 && !self.random.once_in(4) {
                let small = self.random.below(0x100);
                self.set(index, small);
            }
            let scaled = self.value(index).wrapping_mul(scale);
            match base {
                Register::None => self.patch_displacement(want.wrapping_sub(scaled)),
                _ => self.set(base, rest.wrapping_sub(scaled)),
            }
        }
        target
    }

    /// Gathers: a base in the data pages, and indices that mostly stay there.
    fn place_vsib(&mut self) {
        let instruction = self.instruction;
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let middle = DATA + 0x1000;
        let want = middle.wrapping_sub(segment_base(instruction.memory_segment()));
        match base {
            Register::None => self.patch_displacement(want),
            _ => {
                let rest = want.wrapping_sub(instruction.memory_displacement64());
                self.set(base, rest);
            }
        }
        let limit = 0xff0 / u64::from(instruction.memory_index_scale());
        let wild = self.random.once_in(8);
        let lane_size = self.random.pick(&[4, 8]);
        let number = index.number() & 15;
        for half in [160, 576] {
            let at = half + 16 * number;
            for lane in self.xsave[at..at + 16].chunks_exact_mut(lane_size) {
                let offset = self.random.below(2 * limit).wrapping_sub(limit);
                let offset = if wild { offset.wrapping_mul(1 + self.random.below(3)) } else { offset };
                lane.copy_from_slice(&offset.to_le_bytes()[..lane_size]);
            }
        }
    }

    /// Sets what else an instruction needs so that it does not mostly fault or do nothing.
    fn tune(&mut self, target: Option<u64>, image: &Image) {
        use Mnemonic as M;
        let instruction = self.instruction;
        if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
            let count = self.random.below(4);
            if !self.random.once_in(4) && instruction.is_string_instruction() {
                self.gpr[gpr::RCX] = count;
            }
        }
        match instruction.mnemonic() {
            M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsavec
            | M::Xsavec64
            | M::Xrstor
            | M::Xrstor64 => {
                // Without the components that only the host has enabled.
                self.gpr[gpr::RAX] = self.gpr[gpr::RAX] & !0xffff_ffff | self.random.below(8);
                self.gpr[gpr::RDX] &= !0xffff_ffff;
            }
            M::Bt | M::Bts | M::Btr | M::Btc
                if target.is_some() && instruction.op1_kind() == OpKind::Register =>
            {
                let register = instruction.op1_register();
                if !self.random.once_in(8) && !self.is_address_register(register) {
                    let bit = self.random.below(0x2000).wrapping_sub(0x1000);
                    self.gpr[register.full_register().number()] = bit;
                }
            }
            M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if self.random.once_in(2) => {
                let word = |address: u64| {
                    let at = address.wrapping_sub(DATA) as usize;
                    let bytes = image.get(at..).and_then(|rest| rest.first_chunk::<8>());
                    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
                };
                let Some(target) = target else { return };
                let (low, high) = match instruction.mnemonic() {
                    M::Cmpxchg8b => (word(target) & 0xffff_ffff, word(target) >> 32),
                    _ => (word(target), word(target.wrapping_add(8))),
                };
                if !self.is_address_register(Register::RAX) && !self.is_address_register(Register::RDX) {
                    self.gpr[gpr::RAX] = low;
                    if instruction.mnemonic() != M::Cmpxchg {
                        self.gpr[gpr::RDX] = high;
                    }
                }
            }
            M::Div | M::Idiv if self.random.once_in(2) && !self.is_address_register(Register::RDX) => {
                self.gpr[gpr::RDX] =
                    if self.random.once_in(2) { 0 } else { self.random.below(3).wrapping_sub(1) };
            }
            M::Pcmpestri | M::Pcmpestrm | M::Vpcmpestri | M::Vpcmpestrm if self.random.once_in(2) => {
                for register in [Register::RAX, Register::RDX] {
                    if !self.is_address_register(register) {
                        self.gpr[register.number()] = self.random.below(40).wrapping_sub(20);
                    }
                }
            }
            _ => {}
        }
    }

    fn is_address_register(&self, register: Register) -> bool {
        let full = register.full_register();
        self.instruction.memory_base().full_register() == full
            || self.instruction.memory_index().full_register() == full
    }
}

/// Whether the decoder knows the bytes.
pub fn is_known(instruction: &Instruction) -> bool {
    instruction.code() != Code::INVALID
}
