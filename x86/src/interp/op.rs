//! A decoded instruction, and the work done once at decoding so that executing it is quick.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::interp::control::loop_counter_size;
use crate::interp::flags::Shift;
use crate::interp::operand::{memory_segment, truncate};
use crate::state::SegReg;

/// Longest instruction in bytes (SDM Vol. 2A, section 2.3.11).
pub const MAX_INSTRUCTION_LENGTH: usize = 15;

/// Where an operand stands: a general register's number, 16 to 19 for AH, CH, DH and BH, or one of these.
pub mod place {
    /// The first of AH, CH, DH, BH.
    pub const HIGH_BYTE: u8 = 16;
    /// The memory operand.
    pub const MEMORY: u8 = 0x40;
    /// The immediate.
    pub const IMMEDIATE: u8 = 0x41;
    /// There is none, or one that general instructions do not have.
    pub const NONE: u8 = 0x42;
    /// As a base register: the instruction pointer.
    pub const RIP: u8 = 0x43;
}

/// The two-operand operations of the arithmetic-logic unit, numbered as in their opcodes (bits 3 to 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Alu {
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
    Test = 8,
}

/// What executes an instruction. The first ones are single frequent instructions with their operand kinds
/// resolved; the others are groups that look at the mnemonic again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Handler {
    Nop,
    MovRegReg,
    MovRegMem,
    MovMemReg,
    MovRegImm,
    MovMemImm,
    /// MOVZX; `source_size` tells from what.
    MovzxReg,
    MovzxMem,
    /// MOVSX and MOVSXD.
    MovsxReg,
    MovsxMem,
    Lea,
    /// The operation on two registers, a register and memory, …
    AluRegReg(Alu),
    AluRegMem(Alu),
    AluRegImm(Alu),
    AluMem(Alu),
    Inc,
    Dec,
    Neg,
    Not,
    /// Shifts and rotates by CL or a constant.
    Shift(Shift),
    Push,
    Pop,
    /// Jcc; the condition is in `condition`.
    JumpIf,
    Jump,
    JumpIndirect,
    Call,
    CallIndirect,
    Return,
    /// CMOVcc; the condition is in `condition`.
    MoveIf,
    /// SETcc; the condition is in `condition`.
    SetIf,
    /// MUL, IMUL, DIV, IDIV, MULX, ADCX, ADOX, CRC32.
    Multiply,
    /// BT and its kin, bit scans and counts, SHLD, SHRD, BMI1, BMI2.
    Bits,
    /// XCHG, XADD, CMPXCHG and its kin, BSWAP, MOVBE, XLAT, conversions.
    Data,
    /// PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE.
    Stack,
    /// LOOP, LOOPcc, JCXZ.
    Loop,
    /// Single flags, LAHF, SAHF, SALC, CLI, STI.
    Flags,
    /// Decimal adjustment and BOUND.
    Decimal,
    /// MOVS, STOS, LODS, SCAS, CMPS.
    String,
    /// IN, OUT, INS, OUTS.
    Port,
    /// HLT, MFENCE, RDRAND, RDSEED and cache flushes.
    Processor,
    /// x87, MMX, SSE, AVX, XSAVE.
    Vector,
    /// Segment registers, descriptor tables, far transfers, control and debug registers, MSRs, …
    System,
    /// #UD.
    Undefined,
    /// #GP(0): longer than 15 bytes.
    TooLong,
}

/// How execution goes on after an instruction that raised no exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Then {
    /// At the following instruction.
    Next,
    /// At the following instruction, unless cached code or a device was written.
    NextIfUnchanged,
    /// At the following instruction or elsewhere: a conditional jump.
    Either,
    /// Elsewhere, or again here; mode, translation, and all that is checked between instructions are as before.
    Elsewhere,
    /// Nothing is known.
    Anything,
}

impl Then {
    /// Whether a block of instructions ends.
    pub(crate) const fn ends_block(self) -> bool {
        matches!(self, Self::Elsewhere | Self::Anything)
    }
}

/// One decoded instruction, independent of the linear address it is executed at.
///
/// The first 32 bytes are what the frequent instructions need.
#[derive(Clone, Debug)]
#[repr(C, align(32))]
pub struct Op {
    /// Displacement, immediate operands aside; RIP-relative ones count from the instruction's start.
    pub(crate) displacement: u64,
    /// Immediate operand (extended to the operand size), or branch distance from the instruction's start.
    pub(crate) immediate: u64,
    /// What executes it.
    pub(crate) handler: Handler,
    /// Condition code of Jcc, SETcc and CMOVcc, as in the opcode.
    pub(crate) condition: u8,
    /// Size of the first operand in bytes, where that is 1, 2, 4 or 8; of a stack slot for PUSH, POP, CALL, RET.
    pub(crate) size: u8,
    /// Size of the second operand in bytes.
    pub(crate) source_size: u8,
    /// [`place`] of the first operand.
    pub(crate) destination: u8,
    /// [`place`] of the second operand.
    pub(crate) source: u8,
    /// Segment of the memory operand.
    pub(crate) segment: SegReg,
    /// Base register of the memory operand, [`place::RIP`] or [`place::NONE`].
    pub(crate) base: u8,
    /// Index register or [`place::NONE`].
    pub(crate) index: u8,
    /// Index register's shift: 0 to 3.
    pub(crate) scale: u8,
    /// Address size in bytes: 2, 4 or 8.
    pub(crate) address_size: u8,
    /// The instruction's length in bytes.
    pub(crate) length: u8,
    /// LOCK, or an XCHG with memory.
    pub(crate) locked: bool,
    /// How execution goes on after it.
    pub(crate) then: Then,
    /// As iced-x86 decoded it, at any instruction pointer.
    pub instruction: Instruction,
    /// The instruction's bytes; the first `instruction.len()` count.
    pub bytes: [u8; MAX_INSTRUCTION_LENGTH],
}

impl Op {
    /// Prepares an instruction that iced-x86 decoded at any instruction pointer.
    pub fn new(instruction: Instruction, bytes: [u8; MAX_INSTRUCTION_LENGTH]) -> Self {
        let mut op = Self {
            displacement: 0,
            immediate: 0,
            handler: Handler::Undefined,
            condition: (instruction.condition_code() as u8).wrapping_sub(1),
            size: 0,
            source_size: 0,
            destination: place::NONE,
            source: place::NONE,
            segment: SegReg::Ds,
            base: place::NONE,
            index: place::NONE,
            scale: 0,
            address_size: 8,
            length: instruction.len() as u8,
            locked: instruction.has_lock_prefix(),
            then: Then::Anything,
            instruction,
            bytes,
        };
        if instruction.code() != Code::INVALID {
            op.resolve_operands();
            op.handler = op.classify();
            op.then = op.handler.then(instruction.mnemonic());
        }
        op
    }

    /// What to add to addresses that iced-x86 computed from the instruction pointer at decoding (branch targets,
    /// RIP-relative operands), when the instruction is executed at `rip`.
    pub fn ip_delta(&self, rip: u64) -> u64 {
        rip.wrapping_sub(self.instruction.ip())
    }

    /// Fills in everything about operands.
    fn resolve_operands(&mut self) {
        let instruction = self.instruction;
        for operand in 0..instruction.op_count() {
            let (place, size) = self.resolve_operand(operand);
            match operand {
                0 => (self.destination, self.size) = (place, size),
                1 => (self.source, self.source_size) = (place, size),
                _ => {}
            }
            match instruction.op_kind(operand) {
                OpKind::Memory => self.resolve_memory(),
                kind => self.resolve_string_memory(kind),
            }
        }
        if instruction.mnemonic() == Mnemonic::Xchg && self.destination == place::MEMORY {
            self.locked = true;
        }
    }

    /// Place and size of one operand; immediates and branch distances are kept.
    fn resolve_operand(&mut self, operand: u32) -> (u8, u8) {
        let instruction = &self.instruction;
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                (register_place(register), register.size() as u8)
            }
            OpKind::Memory => (place::MEMORY, instruction.memory_size().size() as u8),
            kind @ (OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64) => {
                self.immediate = instruction.near_branch_target().wrapping_sub(instruction.ip());
                let size = match kind {
                    OpKind::NearBranch16 => 2,
                    OpKind::NearBranch32 => 4,
                    _ => 8,
                };
                (place::IMMEDIATE, size)
            }
            kind @ (OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64) => {
                let size = match kind {
                    OpKind::Immediate8 => 1,
                    OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
                    OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
                    _ => 8,
                };
                self.immediate = truncate(instruction.immediate(operand), size);
                (place::IMMEDIATE, size as u8)
            }
            _ => (place::NONE, 0),
        }
    }

    /// Takes the memory operand apart.
    fn resolve_memory(&mut self) {
        let instruction = &self.instruction;
        self.segment = memory_segment(instruction);
        self.displacement = instruction.memory_displacement64();
        let mut size = 0;
        match instruction.memory_base() {
            Register::None => {}
            base @ (Register::RIP | Register::EIP) => {
                size = base.size();
                self.base = place::RIP;
                self.displacement = self.displacement.wrapping_sub(instruction.ip());
            }
            base => {
                size = base.size();
                self.base = register_place(base);
            }
        }
        let index = instruction.memory_index();
        // XLAT's index is AL, which its handler adds; that of a gather is a vector.
        if index.is_gpr() && index.size() > 1 {
            size = index.size();
            self.index = register_place(index);
            self.scale = instruction.memory_index_scale().trailing_zeros() as u8;
        }
        if size == 0 {
            size = instruction.memory_displ_size() as usize;
        }
        self.address_size = size as u8;
    }

    /// For the operands that string instructions imply: address size, segment of the source, element size.
    fn resolve_string_memory(&mut self, kind: OpKind) {
        let address_size = match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 8,
            _ => return,
        };
        self.address_size = address_size;
        self.size = self.instruction.memory_size().size() as u8;
        if !matches!(kind, OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI) {
            self.segment = memory_segment(&self.instruction);
        }
    }

    /// Chooses the handler; may refine sizes.
    fn classify(&mut self) -> Handler {
        use Mnemonic as M;
        let mnemonic = self.instruction.mnemonic();
        match mnemonic {
            M::Nop | M::Pause | M::Endbr64 | M::Endbr32 | M::Lfence | M::Sfence => Handler::Nop,
            M::Movnti => Handler::MovMemReg,
            M::Mov => self.classify_mov(),
            M::Movzx if self.source == place::MEMORY => Handler::MovzxMem,
            M::Movzx => Handler::MovzxReg,
            // MOVSXD to 16 bits reads 32 (APM Vol. 3).
            M::Movsxd if self.instruction.code() == Code::Movsxd_r16_rm16 && self.source == place::MEMORY => {
                self.source_size = 4;
                Handler::MovsxMem
            }
            M::Movsx | M::Movsxd if self.source == place::MEMORY => Handler::MovsxMem,
            M::Movsx | M::Movsxd => Handler::MovsxReg,
            M::Lea => Handler::Lea,
            M::Add => self.classify_alu(Alu::Add),
            M::Or => self.classify_alu(Alu::Or),
            M::Adc => self.classify_alu(Alu::Adc),
            M::Sbb => self.classify_alu(Alu::Sbb),
            M::And => self.classify_alu(Alu::And),
            M::Sub => self.classify_alu(Alu::Sub),
            M::Xor => self.classify_alu(Alu::Xor),
            M::Cmp => self.classify_alu(Alu::Cmp),
            M::Test => self.classify_alu(Alu::Test),
            M::Inc => Handler::Inc,
            M::Dec => Handler::Dec,
            M::Neg => Handler::Neg,
            M::Not => Handler::Not,
            M::Shl | M::Sal => Handler::Shift(Shift::Shl),
            M::Shr => Handler::Shift(Shift::Shr),
            M::Sar => Handler::Shift(Shift::Sar),
            M::Rol => Handler::Shift(Shift::Rol),
            M::Ror => Handler::Shift(Shift::Ror),
            M::Rcl => Handler::Shift(Shift::Rcl),
            M::Rcr => Handler::Shift(Shift::Rcr),
            M::Push | M::Pop if self.destination == place::NONE => Handler::System,
            M::Push => self.with_stack_slot(Handler::Push),
            M::Pop => self.with_stack_slot(Handler::Pop),
            M::Call | M::Jmp => self.classify_transfer(mnemonic == M::Call),
            M::Ret => self.with_stack_slot(Handler::Return),
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
                self.address_size = loop_counter_size(self.instruction.code());
                Handler::Loop
            }
            _ if self.instruction.is_jcc_short_or_near() => Handler::JumpIf,
            M::Seto | M::Setno | M::Setb | M::Setae | M::Sete | M::Setne | M::Setbe | M::Seta => {
                Handler::SetIf
            }
            M::Sets | M::Setns | M::Setp | M::Setnp | M::Setl | M::Setge | M::Setle | M::Setg => {
                Handler::SetIf
            }
            M::Cmovo | M::Cmovno | M::Cmovb | M::Cmovae | M::Cmove | M::Cmovne => Handler::MoveIf,
            M::Cmovbe | M::Cmova | M::Cmovs | M::Cmovns | M::Cmovp | M::Cmovnp => Handler::MoveIf,
            M::Cmovl | M::Cmovge | M::Cmovle | M::Cmovg => Handler::MoveIf,
            _ => classify_group(mnemonic, self.instruction.code()),
        }
    }

    fn classify_mov(&self) -> Handler {
        match (self.destination, self.source) {
            (place::NONE, _) | (_, place::NONE) => Handler::System,
            (place::MEMORY, place::IMMEDIATE) => Handler::MovMemImm,
            (place::MEMORY, _) => Handler::MovMemReg,
            (_, place::MEMORY) => Handler::MovRegMem,
            (_, place::IMMEDIATE) => Handler::MovRegImm,
            _ => Handler::MovRegReg,
        }
    }

    fn classify_alu(&self, operation: Alu) -> Handler {
        match (self.destination, self.source) {
            (place::MEMORY, _) => Handler::AluMem(operation),
            (_, place::MEMORY) => Handler::AluRegMem(operation),
            (_, place::IMMEDIATE) => Handler::AluRegImm(operation),
            _ => Handler::AluRegReg(operation),
        }
    }

    fn classify_transfer(&mut self, call: bool) -> Handler {
        let instruction = &self.instruction;
        let near_indirect = instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect();
        match (near_indirect, self.destination == place::IMMEDIATE) {
            (true, _) if call => Handler::CallIndirect,
            (true, _) => Handler::JumpIndirect,
            (_, true) if call => Handler::Call,
            (_, true) => Handler::Jump,
            _ => Handler::System,
        }
    }

    /// PUSH and POP of registers and immediates, RET: the size is that of the stack slot.
    fn with_stack_slot(&mut self, handler: Handler) -> Handler {
        self.size = match self.instruction.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            Code::Retnq | Code::Retnq_imm16 => 8,
            _ => self.instruction.stack_pointer_increment().unsigned_abs() as u8,
        };
        handler
    }
}

/// [`place`] of a general register; [`place::NONE`] for any other.
fn register_place(register: Register) -> u8 {
    let from = |first: Register| (register as u32).wrapping_sub(first as u32) as u8;
    match register {
        _ if !register.is_gpr() => place::NONE,
        _ if register.is_gpr64() => from(Register::RAX),
        _ if register.is_gpr32() => from(Register::EAX),
        _ if register.is_gpr16() => from(Register::AX),
        _ if register >= Register::SPL => from(Register::SPL) + 4,
        _ if register >= Register::AH => from(Register::AH) + place::HIGH_BYTE,
        _ => from(Register::AL),
    }
}

/// The groups of less frequent instructions.
fn classify_group(mnemonic: Mnemonic, code: Code) -> Handler {
    use Mnemonic as M;
    match mnemonic {
        M::Mul | M::Imul | M::Div | M::Idiv | M::Mulx | M::Adcx | M::Adox | M::Crc32 => Handler::Multiply,
        M::Bt | M::Bts | M::Btr | M::Btc | M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt => Handler::Bits,
        M::Shld | M::Shrd | M::Andn | M::Bextr | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi => Handler::Bits,
        M::Rorx | M::Sarx | M::Shlx | M::Shrx | M::Pdep | M::Pext => Handler::Bits,
        M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b | M::Bswap | M::Movbe => Handler::Data,
        M::Xlatb | M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo => Handler::Data,
        M::Pusha | M::Pushad | M::Popa | M::Popad | M::Pushf | M::Pushfd | M::Pushfq => Handler::Stack,
        M::Popf | M::Popfd | M::Popfq | M::Enter | M::Leave => Handler::Stack,
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std | M::Lahf | M::Sahf | M::Salc => Handler::Flags,
        M::Cli | M::Sti => Handler::Flags,
        M::Daa | M::Das | M::Aaa | M::Aas | M::Aam | M::Aad | M::Bound => Handler::Decimal,
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => Handler::Port,
        M::Movsb | M::Movsw | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq => Handler::String,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
            Handler::String
        }
        M::Cmpsb | M::Cmpsw | M::Cmpsq => Handler::String,
        // SSE2 has a MOVSD and a CMPSD of its own.
        M::Movsd | M::Cmpsd if matches!(code, Code::Movsd_m32_m32 | Code::Cmpsd_m32_m32) => Handler::String,
        M::Hlt | M::Mfence | M::Rdrand | M::Rdseed | M::Clflush | M::Clflushopt | M::Clwb => {
            Handler::Processor
        }
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetch => Handler::Nop,
        M::Prefetchw | M::Prefetchwt1 | M::Prefetchit0 | M::Prefetchit1 | M::Cldemote => Handler::Nop,
        M::Reservednop => Handler::Nop,
        // Without shadow stacks these are no-operations (SDM Vol. 1, section 17.1).
        M::Rdsspd | M::Rdsspq => Handler::Nop,
        M::Xgetbv | M::Xsetbv => Handler::System,
        M::Ud0 | M::Ud1 | M::Ud2 => Handler::Undefined,
        _ if is_vector(code) => Handler::Vector,
        _ => Handler::System,
    }
}

/// Whether the instruction belongs to the vector and floating-point units, or saves their state.
fn is_vector(code: Code) -> bool {
    use iced_x86::CpuidFeature as F;
    code.cpuid_features().iter().any(|feature| {
        matches!(
            feature,
            F::FPU
                | F::FPU287
                | F::FPU387
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSE4A
                | F::AVX
                | F::AVX2
                | F::FMA
                | F::F16C
                | F::AES
                | F::VAES
                | F::PCLMULQDQ
                | F::VPCLMULQDQ
                | F::SHA
                | F::GFNI
                | F::FXSR
                | F::XSAVE
                | F::XSAVEC
                | F::XSAVEOPT
                | F::XSAVES
        )
    })
}

impl Handler {
    /// How execution goes on after the instruction.
    fn then(self, mnemonic: Mnemonic) -> Then {
        use Mnemonic as M;
        match self {
            Self::JumpIf => Then::Either,
            Self::Jump | Self::JumpIndirect | Self::Call | Self::CallIndirect | Self::Return => {
                Then::Elsewhere
            }
            Self::Loop | Self::String => Then::Elsewhere,
            Self::Port | Self::Processor | Self::System | Self::Undefined | Self::TooLong => Then::Anything,
            Self::Stack if matches!(mnemonic, M::Popf | M::Popfd | M::Popfq) => Then::Anything,
            Self::Flags if matches!(mnemonic, M::Cli | M::Sti) => Then::Anything,
            _ if self.only_reads() => Then::Next,
            _ => Then::NextIfUnchanged,
        }
    }

    /// Whether it never writes memory.
    fn only_reads(self) -> bool {
        matches!(
            self,
            Self::Nop
                | Self::MovRegReg
                | Self::MovRegMem
                | Self::MovRegImm
                | Self::MovzxReg
                | Self::MovzxMem
                | Self::MovsxReg
                | Self::MovsxMem
                | Self::Lea
                | Self::AluRegReg(_)
                | Self::AluRegImm(_)
                | Self::AluRegMem(_)
                | Self::MoveIf
                | Self::Multiply
                | Self::AluMem(Alu::Cmp | Alu::Test)
        )
    }
}
