//! Puts sequences together: what registers hold is kept track of, so that most accesses hit the data pages; and so is
//! which flags are undefined, so that none of them is read.

use bivisor_x86::cpuid::CpuModel;
use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, MemoryOperand, Mnemonic, OpAccess, Register,
};

use super::code::{Field, Form, Item, To};
use super::flags;
use super::layout::{POINTER_COUNT, POINTERS, SMALL_NUMBER_COUNT, SMALL_NUMBERS};
use super::narrow;
use crate::layout::{CODE, DATA, DATA_SIZE};
use crate::mode::Mode;
use crate::random::Random;

/// What a register is known to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Anything.
    Any,
    /// Mostly an address in the data pages, not near their ends.
    Pointer,
    /// Mostly a small number.
    Small,
}

/// Registers in encoding order.
pub const RSP: usize = 4;
/// See [`RSP`].
pub const RBP: usize = 5;
/// How far pointers stay away from the ends of the data pages.
pub const MARGIN: u64 = 0x400;

/// Where a jump may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To an instruction further on.
    Forward,
    /// To any; the jump is guarded.
    Anywhere,
    /// To the end of its sequence.
    End,
}

/// A reference whose target is chosen when everything is there.
struct Pending {
    item: usize,
    way: Way,
}

/// Sequences under construction.
pub struct Builder<'a> {
    /// Where choices come from.
    pub random: &'a mut Random,
    /// What the guest's processor offers.
    pub model: &'a CpuModel,
    /// What kind of code it is.
    pub mode: Mode,
    /// What is there.
    pub items: Vec<Item>,
    /// First item of each sequence.
    pub entries: Vec<usize>,
    /// What registers hold at the start of each sequence.
    pub initial: [Class; 16],
    /// What registers hold now.
    pub classes: [Class; 16],
    /// x87 environments are stored, which tell of the last x87 instruction: so none stands here that they would tell of.
    pub environments: bool,
    /// Stores may trap by a breakpoint: then no state is saved, of which not all is to be compared.
    pub watched: bool,
    /// Privileged instructions are tried, too.
    pub with_privileged: bool,
    /// The processor is in supervisor mode here, if execution comes from where it began.
    pub is_supervisor: bool,
    /// Jumps may lead to what is emitted now.
    pub targetable: bool,
    targets: Vec<bool>,
    pending: Vec<Pending>,
    undefined: u64,
    factory: InstructionInfoFactory,
    encoder: Encoder,
}

/// General register of 8 bytes.
pub fn r64(number: usize) -> Register {
    Register::try_from(Register::RAX as usize + number).unwrap_or_default()
}

/// General register of 4 bytes.
pub fn r32(number: usize) -> Register {
    Register::try_from(Register::EAX as usize + number).unwrap_or_default()
}

/// A memory operand at a linear address, relative to RIP.
pub fn at(address: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RIP, address as i64)
}

/// A memory operand at a distance from a register.
pub fn from(base: usize, displacement: i64) -> MemoryOperand {
    MemoryOperand::with_base_displ(r64(base), displacement)
}

/// An instruction that iced-x86 can make, or a NOP.
pub fn made(instruction: Result<Instruction, iced_x86::IcedError>) -> Instruction {
    instruction.unwrap_or_else(|_| Instruction::with(Code::Nopd))
}

/// How many general registers there are.
fn registers(mode: Mode) -> u64 {
    if mode.is_32bit { 8 } else { 16 }
}

impl<'a> Builder<'a> {
    /// Nothing yet.
    pub fn new(random: &'a mut Random, model: &'a CpuModel, mode: Mode) -> Self {
        let mut initial = [Class::Any; 16];
        initial[RSP] = Class::Pointer;
        initial[RBP] = Class::Pointer;
        for _ in 0..4 {
            initial[random.below(registers(mode)) as usize] = Class::Pointer;
        }
        for _ in 0..3 {
            let number = random.below(registers(mode)) as usize;
            if initial[number] == Class::Any {
                initial[number] = Class::Small;
            }
        }
        let environments = random.once_in(8);
        let watched = random.once_in(3);
        Self {
            random,
            model,
            mode,
            items: Vec::new(),
            entries: Vec::new(),
            initial,
            classes: initial,
            environments,
            watched,
            with_privileged: false,
            is_supervisor: false,
            targetable: true,
            targets: Vec::new(),
            pending: Vec::new(),
            undefined: 0,
            factory: InstructionInfoFactory::new(),
            encoder: Encoder::new(mode.bits()),
        }
    }

    /// Begins a sequence.
    pub fn begin(&mut self) {
        self.entries.push(self.items.len());
        self.classes = self.initial;
    }

    /// Ends a sequence with INT3, and leaves some room behind it.
    pub fn end(&mut self) {
        self.targetable = true;
        self.emit(&[0xcc], None);
        let end = self.items.len() - 1;
        for pending in std::mem::take(&mut self.pending) {
            match pending.way {
                Way::End => self.resolve(pending.item, end),
                _ => self.pending.push(pending),
            }
        }
        let room = if self.random.once_in(4) { self.random.below(200) } else { self.random.below(8) };
        self.items.push(Item::Room(room as usize));
        self.targets.push(false);
    }

    /// Some instruction that jumps may lead to.
    pub fn any_target(&mut self) -> Option<usize> {
        let all: Vec<usize> = (0..self.targets.len()).filter(|&item| self.targets[item]).collect();
        (!all.is_empty()).then(|| self.random.pick(&all))
    }

    /// Chooses where jumps lead. Call when all sequences have ended.
    pub fn finish(&mut self) {
        for Pending { item, way } in std::mem::take(&mut self.pending) {
            let all = self.items.len();
            let near = 2 + self.random.below(16) as usize;
            let (first, last) = match way {
                Way::Anywhere if self.random.once_in(4) => (0, all),
                Way::Anywhere => (item.saturating_sub(near), item + near / 2),
                _ if self.random.once_in(6) => (item + 1, all),
                _ => (item + 1, item + near),
            };
            let range = first..last.min(all);
            let choices: Vec<usize> = range.filter(|&target| self.targets[target]).collect();
            // The last item before the room is INT3, which no undefined flag reaches.
            let target = if choices.is_empty() { all.saturating_sub(2) } else { self.random.pick(&choices) };
            self.resolve(item, target);
        }
    }

    fn resolve(&mut self, item: usize, target: usize) {
        if let Item::Instruction { field: Some(Field { to: To::Item(place, _), .. }), .. } =
            &mut self.items[item]
        {
            *place = target;
        }
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.random.below(100) < percent
    }

    /// Appends an instruction, after one that defines all flags if it reads undefined ones.
    pub fn emit(&mut self, bytes: &[u8], field: Option<Field>) {
        let instruction = self.mode.decoder(bytes, CODE).decode();
        let effect = flags::effect(&instruction);
        if effect.read & self.undefined != 0 {
            self.define_flags();
        }
        self.targets.push(self.targetable && self.undefined == 0);
        self.undefined = flags::after(effect, self.undefined);
        self.follow(&instruction);
        self.items.push(Item::Instruction { bytes: bytes.to_vec(), field });
    }

    /// Sees that no flag is undefined: between what follows nothing may be put.
    pub fn settle_flags(&mut self) {
        if self.undefined != 0 {
            self.define_flags();
        }
    }

    /// A comparison: it changes nothing else.
    fn define_flags(&mut self) {
        let (one, other) = (self.any(), self.any());
        let value = self.random.bits() as i32;
        let instruction = match self.random.below(5) {
            0 => Instruction::with2(Code::Cmp_r64_rm64, r64(one), r64(other)),
            1 => Instruction::with2(Code::Cmp_rm32_r32, r32(one), r32(other)),
            2 => Instruction::with2(Code::Cmp_rm64_imm32, r64(one), value),
            3 => Instruction::with2(Code::Cmp_rm32_imm8, r32(one), i32::from(value as i8)),
            _ => Instruction::with2(Code::Cmp_AL_imm8, Register::AL, i32::from(value as i8)),
        };
        self.assemble(made(instruction));
    }

    /// Bytes of an instruction, with the field of an operand relative to RIP.
    fn encode(&mut self, instruction: &Instruction) -> Option<(Vec<u8>, Option<Field>)> {
        let encoded = self.encoder.encode(instruction, CODE);
        let offsets = self.encoder.get_constant_offsets();
        // In any case: what can't be encoded may leave bytes behind.
        let bytes = self.encoder.take_buffer();
        encoded.ok()?;
        let field = instruction.is_ip_rel_memory_operand().then(|| Field {
            at: offsets.displacement_offset() as u8,
            size: 4,
            form: Form::Relative,
            to: To::Address(instruction.memory_displacement64()),
        });
        Some((bytes, field))
    }

    /// Appends an instruction that was made. Those that can't be encoded are left out.
    pub fn assemble(&mut self, instruction: Instruction) {
        let instruction = if self.mode.is_32bit { narrow::instruction(&instruction) } else { instruction };
        if let Some((bytes, field)) = self.encode(&instruction) {
            self.emit(&bytes, field);
        }
    }

    /// Appends a jump, call or loop of this kind.
    pub fn jump(&mut self, code: Code, way: Way) {
        let jump = made(Instruction::with_branch(code, CODE));
        let jump = if self.mode.is_32bit { narrow::instruction(&jump) } else { jump };
        let Some((bytes, _)) = self.encode(&jump) else { return };
        let bytes = self.with_prefix(bytes);
        let size = if code.op_code().instruction_string().contains("rel8") { 1 } else { 4 };
        self.refer(&bytes, bytes.len() - size, Form::Relative, way, size);
    }

    /// Puts a prefix before a jump now and then: a hint, one without meaning, or one that cuts its target.
    pub fn with_prefix(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        // What F2 means for LOOPE and LOOPNE, Zen tells otherwise than the manuals.
        let is_loop = bytes.contains(&0xe0) || bytes.contains(&0xe1);
        if self.random.once_in(10) && !is_loop {
            let prefixes = [0x2e, 0x3e, 0x26, 0x36, 0x64, 0xf2, 0x48, 0x41];
            // The last two are instructions in 32-bit code.
            let count = if self.mode.is_32bit { 6 } else { 8 };
            bytes.insert(0, self.random.pick(&prefixes[..count]));
        } else if self.random.once_in(300) && bytes.len() == 2 {
            bytes.insert(0, 0x66);
        }
        bytes
    }

    /// Appends an instruction with a field that leads to another.
    pub fn refer(&mut self, bytes: &[u8], at: usize, form: Form, way: Way, size: usize) {
        let field = Field { at: at as u8, size: size as u8, form, to: To::Item(0, 0) };
        self.emit(bytes, Some(field));
        self.pending.push(Pending { item: self.items.len() - 1, way });
    }

    /// Appends a short jump to a known item.
    pub fn skip(&mut self, bytes: &[u8], item: usize) {
        let field = Field { at: 1, size: 1, form: Form::Relative, to: To::Item(item, 0) };
        self.emit(bytes, Some(field));
    }

    /// Appends an instruction whose memory operand, a displacement of 4 bytes, lies in a known item.
    pub fn refer_to_memory(&mut self, bytes: &[u8], at: usize, item: usize, offset: u8) {
        // The same ModRM byte is relative to RIP in 64-bit code only.
        let form = if self.mode.is_32bit { Form::Absolute } else { Form::Relative };
        self.emit(bytes, Some(Field { at: at as u8, size: 4, form, to: To::Item(item, offset) }));
    }

    // ---- what registers hold ----

    /// General registers that an instruction writes.
    pub fn written_registers(&mut self, instruction: &Instruction) -> Vec<usize> {
        let info = self.factory.info(instruction);
        let writes = |access| {
            matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
        };
        let registers = info.used_registers().iter().filter(|used| writes(used.access()));
        registers
            .map(|used| used.register().full_register())
            .filter(|register| register.is_gpr64())
            .map(|register| register.number())
            .collect()
    }

    fn follow(&mut self, instruction: &Instruction) {
        let moves_pointers = instruction.is_string_instruction();
        for number in self.written_registers(instruction) {
            let keeps = match number {
                RSP => instruction.is_stack_instruction() && instruction.op0_register() != Register::RSP,
                // String instructions move RSI and RDI a little, repetitions and loops count RCX down.
                6 | 7 => moves_pointers,
                1 => moves_pointers || instruction.is_loop() || instruction.is_loopcc(),
                RBP => matches!(instruction.mnemonic(), Mnemonic::Enter),
                _ => false,
            };
            if !keeps {
                self.classes[number] = Class::Any;
            }
        }
    }

    /// A linear address in the data pages, mostly aligned to a cache line.
    pub fn data_address(&mut self) -> u64 {
        let place = DATA + MARGIN + self.random.below(DATA_SIZE as u64 - 2 * MARGIN);
        if self.random.once_in(6) { place } else { place & !63 }
    }

    /// A register that holds a pointer, not RSP.
    pub fn any_pointer(&mut self) -> Option<usize> {
        let all: Vec<usize> =
            (0..16).filter(|&number| number != RSP && self.classes[number] == Class::Pointer).collect();
        (!all.is_empty()).then(|| self.random.pick(&all))
    }

    /// Some register.
    pub fn any(&mut self) -> usize {
        self.random.below(registers(self.mode)) as usize
    }

    /// A register that may be changed without much loss.
    pub fn any_free(&mut self) -> usize {
        for _ in 0..8 {
            let number = self.any();
            if self.classes[number] != Class::Pointer {
                return number;
            }
        }
        0
    }

    /// Makes a register hold something of a class.
    pub fn establish(&mut self, number: usize, class: Class) {
        if self.classes[number] == class {
            return;
        }
        match class {
            Class::Any => {}
            Class::Pointer => self.establish_pointer(number),
            Class::Small => self.establish_small(number),
        }
        self.classes[number] = class;
    }

    fn establish_pointer(&mut self, number: usize) {
        let address = self.data_address();
        let other = self.any_pointer();
        let register = r64(number);
        let instruction = match (self.random.below(7), other) {
            (0, Some(other)) => Instruction::with2(Code::Mov_r64_rm64, register, r64(other)),
            (1, Some(other)) => {
                let distance = 32 * (self.random.below(4) as i64 - 2);
                Instruction::with2(Code::Lea_r64_m, register, from(other, distance))
            }
            (2, _) => Instruction::with2(Code::Lea_r64_m, register, at(address)),
            (3, _) => Instruction::with2(Code::Mov_rm64_imm32, register, address as i32),
            (4, _) => Instruction::with2(Code::Mov_r64_imm64, register, address),
            (5, _) => {
                let slot = POINTERS + 8 * self.random.below(POINTER_COUNT as u64);
                Instruction::with2(Code::Mov_r64_rm64, register, at(slot))
            }
            _ => Instruction::with2(Code::Mov_r32_imm32, r32(number), address as u32),
        };
        self.assemble(made(instruction));
    }

    fn establish_small(&mut self, number: usize) {
        let value = 32 * self.random.below(3) as u32;
        let instruction = match self.random.below(3) {
            0 => {
                let slot = SMALL_NUMBERS + self.random.below(SMALL_NUMBER_COUNT);
                Instruction::with2(Code::Movzx_r32_rm8, r32(number), at(slot))
            }
            1 => Instruction::with2(Code::Mov_rm64_imm32, r64(number), value as i32),
            _ => Instruction::with2(Code::Mov_r32_imm32, r32(number), value),
        };
        self.assemble(made(instruction));
    }
}
