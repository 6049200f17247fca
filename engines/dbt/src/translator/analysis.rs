//! What the translator knows of a block before it emits it: the kind of each instruction, which flags are live,
//! and which accesses go to a stack page that can be checked once for the whole block.

use std::sync::LazyLock;

use bivisor_x86::cpuid::CpuModel;
use bivisor_x86::interp::vector::is_x87;
use iced_x86::{
    Code, CodeSize, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

use super::checks::Check;
use super::code32;
use super::interrupt_return::FRAME;
use super::key::{Key, SUPERVISOR, SUPERVISOR_AC, USER};
use super::operand::number;

/// The arithmetic flags, as iced-x86 numbers them.
pub const ALL_FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Copied, with operands renamed.
    Copy,
    /// Does nothing that the guest could see.
    Nothing,
    /// PAUSE.
    Pause,
    /// PUSH of a register, immediate or memory operand of 64 bits.
    Push,
    /// POP of a 64-bit register.
    Pop,
    /// LEAVE.
    Leave,
    /// CALL to a fixed target.
    Call,
    /// CALL through a register or memory.
    CallIndirect,
    /// Near RET.
    Return,
    /// JMP to a fixed target.
    Jump,
    /// JMP through a register or memory.
    JumpIndirect,
    /// Jcc.
    JumpIf,
    /// JRCXZ or JECXZ.
    JumpIfRcxZero,
    /// BT, BTS, BTR or BTC whose bit offset may lead outside of the memory operand.
    BitString,
    /// REP MOVS or REP STOS.
    RepeatString,
    /// SYSCALL from user mode.
    Syscall,
    /// SYSRET to 64-bit code.
    Sysret,
    /// IRETQ in 64-bit code of supervisor mode.
    InterruptReturn,
    /// INVLPG in supervisor mode.
    Invlpg,
    /// SWAPGS.
    Swapgs,
    /// CLI.
    Cli,
    /// STI.
    Sti,
    /// STAC or CLAC in supervisor mode, where it has an effect; ends the block.
    SwitchAc,
    /// PUSHFQ.
    Pushf,
    /// RDTSC.
    Rdtsc,
    /// RDTSCP.
    Rdtscp,
    /// CPUID.
    Cpuid,
    /// MOV of a segment register's selector.
    ReadSelector,
    /// MOV of CR0, CR2, CR3 or CR4 to a general register, in supervisor mode.
    ReadControl,
    /// CLD.
    Cld,
    /// STD.
    Std,
    /// RDFSBASE and RDGSBASE, of 64 bits.
    ReadBase,
    /// WRFSBASE and WRGSBASE, of 64 bits.
    WriteBase,
    /// Executed by the interpreter, after which the block goes on.
    Interpret,
    /// Executed by the interpreter; ends the block.
    InterpretLast,
}

impl Class {
    /// Whether it is a jump that is translated.
    pub fn is_jump(self) -> bool {
        matches!(
            self,
            Self::Call
                | Self::CallIndirect
                | Self::Return
                | Self::Jump
                | Self::JumpIndirect
                | Self::JumpIf
                | Self::JumpIfRcxZero
        )
    }

    /// Whether the block ends here.
    pub fn is_last(self) -> bool {
        matches!(
            self,
            Self::Call
                | Self::CallIndirect
                | Self::Return
                | Self::Jump
                | Self::JumpIndirect
                | Self::JumpIfRcxZero
                | Self::Syscall
                | Self::Sysret
                | Self::InterruptReturn
                | Self::SwitchAc
                | Self::InterpretLast
        )
    }
}

/// One instruction of a block.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// Decoded at its offset in the page as instruction pointer.
    pub instruction: Instruction,
    /// How it is translated.
    pub class: Class,
    /// Flags that are live before it.
    pub live_before: u32,
    /// Flags that are live where the block does not go on, if it is a conditional jump.
    pub live_taken: u32,
    /// The block goes on at the jump's target.
    pub followed: bool,
    /// Offset from RSP at the block's start of RSP before it, where that is known.
    pub stack_delta: Option<i32>,
    /// Access of each operand.
    pub access: [OpAccess; 4],
    /// Bytes that the stack moves by: 8, or 4 in 32-bit code.
    pub stack_step: i32,
    /// General registers that it may change, by their numbers.
    pub written: u16,
    /// How its memory operand is checked.
    pub check: Check,
}

/// Offsets from RSP at the block's start that its tracked stack accesses touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackRange {
    /// First byte.
    pub low: i32,
    /// Behind the last byte.
    pub high: i32,
    /// Whether any is written.
    pub write: bool,
}

/// A stack range larger than this is not tracked: it would often cross a page.
const STACK_RANGE_LIMIT: i32 = 1024;

/// Classifies a 64-bit instruction, or one of 32-bit code as [`super::code32::widen`] leaves it.
pub fn classify(instruction: &Instruction, model: &CpuModel, key: Key) -> Class {
    if !instruction.has_lock_prefix()
        && let Some(class) = sensitive(instruction, model, key)
    {
        return class;
    }
    if let Some(class) = control_flow(instruction) {
        return class;
    }
    match instruction.mnemonic() {
        Mnemonic::Push if is_64bit_push(instruction) => return Class::Push,
        Mnemonic::Pop
            if instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_gpr64() =>
        {
            return Class::Pop;
        }
        Mnemonic::Leave if instruction.code() == Code::Leaveq => return Class::Leave,
        Mnemonic::Pause => return Class::Pause,
        Mnemonic::Nop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetch
        | Mnemonic::Reservednop => return Class::Nothing,
        _ => {}
    }
    if is_bit_string(instruction)
        && instruction.memory_size().size() > 2
        && model.offers_instruction(instruction)
    {
        return Class::BitString;
    }
    if ends_block(instruction.mnemonic()) {
        return Class::InterpretLast;
    }
    if copyable(instruction, model, key) { Class::Copy } else { Class::Interpret }
}

/// Sensitive instructions that have translations of their own.
fn sensitive(instruction: &Instruction, model: &CpuModel, key: Key) -> Option<Class> {
    let supervisor = key.class() != USER;
    Some(match instruction.mnemonic() {
        Mnemonic::Rdtsc if key.tsc() => Class::Rdtsc,
        Mnemonic::Rdtscp if key.tsc() && model.offers_instruction(instruction) => Class::Rdtscp,
        Mnemonic::Cpuid => Class::Cpuid,
        Mnemonic::Syscall if !supervisor && !key.code32() => Class::Syscall,
        Mnemonic::Sysretq if supervisor => Class::Sysret,
        Mnemonic::Iretq if supervisor && !key.code32() => Class::InterruptReturn,
        Mnemonic::Invlpg if supervisor && !key.code32() => Class::Invlpg,
        Mnemonic::Swapgs if supervisor => Class::Swapgs,
        Mnemonic::Cli if supervisor => Class::Cli,
        Mnemonic::Sti if supervisor => Class::Sti,
        Mnemonic::Stac if key.class() == SUPERVISOR && model.offers_instruction(instruction) => {
            Class::SwitchAc
        }
        Mnemonic::Clac if key.class() == SUPERVISOR && model.offers_instruction(instruction) => {
            Class::Nothing
        }
        Mnemonic::Stac if key.class() == SUPERVISOR_AC && model.offers_instruction(instruction) => {
            Class::Nothing
        }
        Mnemonic::Cld => Class::Cld,
        Mnemonic::Std => Class::Std,
        Mnemonic::Mov if supervisor && reads_control(instruction) => Class::ReadControl,
        Mnemonic::Clac if key.class() == SUPERVISOR_AC && model.offers_instruction(instruction) => {
            Class::SwitchAc
        }
        Mnemonic::Mov if reads_selector(instruction) => Class::ReadSelector,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase if instruction.op0_register().is_gpr64() => Class::ReadBase,
        Mnemonic::Wrfsbase | Mnemonic::Wrgsbase if instruction.op0_register().is_gpr64() => Class::WriteBase,
        Mnemonic::Pushfq if instruction.code() == Code::Pushfq => Class::Pushf,
        Mnemonic::Movsb
        | Mnemonic::Movsw
        | Mnemonic::Movsd
        | Mnemonic::Movsq
        | Mnemonic::Stosb
        | Mnemonic::Stosw
        | Mnemonic::Stosd
        | Mnemonic::Stosq
            if is_plain_repetition(instruction) =>
        {
            Class::RepeatString
        }
        _ => return None,
    })
}

fn reads_control(instruction: &Instruction) -> bool {
    matches!(instruction.code(), Code::Mov_r64_cr | Code::Mov_r32_cr)
        && matches!(instruction.op1_register(), Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4)
}

fn reads_selector(instruction: &Instruction) -> bool {
    instruction.op1_kind() == OpKind::Register
        && instruction.op1_register().is_segment_register()
        && matches!(instruction.op0_kind(), OpKind::Memory | OpKind::Register)
}

/// A string instruction with REP, 64-bit addresses, and segments whose base is zero.
fn is_plain_repetition(instruction: &Instruction) -> bool {
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let kinds = [instruction.op0_kind(), instruction.op1_kind()];
    let addresses = kinds
        .iter()
        .all(|kind| matches!(kind, OpKind::MemoryESRDI | OpKind::MemorySegRSI | OpKind::Register));
    instruction.is_string_instruction()
        && repeated
        && addresses
        && !matches!(instruction.segment_prefix(), Register::FS | Register::GS)
}

fn is_64bit_push(instruction: &Instruction) -> bool {
    match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().is_gpr64(),
        OpKind::Memory => instruction.memory_size().size() == 8,
        _ => instruction.stack_pointer_increment() == -8,
    }
}

fn control_flow(instruction: &Instruction) -> Option<Class> {
    Some(match instruction.flow_control() {
        FlowControl::Next => return None,
        FlowControl::UnconditionalBranch if instruction.is_jmp_short_or_near() => {
            match instruction.op0_kind() {
                OpKind::NearBranch64 => Class::Jump,
                _ => Class::InterpretLast,
            }
        }
        FlowControl::ConditionalBranch if instruction.op0_kind() == OpKind::NearBranch64 => {
            match instruction.code() {
                Code::Jrcxz_rel8_64 | Code::Jecxz_rel8_64 => Class::JumpIfRcxZero,
                _ if instruction.is_jcc_short_or_near() => Class::JumpIf,
                _ => Class::InterpretLast,
            }
        }
        FlowControl::Call if instruction.code() == Code::Call_rel32_64 => Class::Call,
        FlowControl::IndirectCall if instruction.code() == Code::Call_rm64 => Class::CallIndirect,
        FlowControl::IndirectBranch if instruction.code() == Code::Jmp_rm64 => Class::JumpIndirect,
        FlowControl::Return if matches!(instruction.code(), Code::Retnq | Code::Retnq_imm16) => Class::Return,
        _ => Class::InterpretLast,
    })
}

/// Instructions after which mode, privilege or the interrupt flag may differ: the block's assumptions end.
fn ends_block(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Stac
            | Mnemonic::Clac
            | Mnemonic::Sti
            | Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq
            | Mnemonic::Hlt
            | Mnemonic::Lmsw
            | Mnemonic::Clts
            | Mnemonic::Wrmsr
            | Mnemonic::Xsetbv
            | Mnemonic::Ldmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Fldcw
            | Mnemonic::Fldenv
            | Mnemonic::Frstor
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Invlpg
            | Mnemonic::Invpcid
            | Mnemonic::Invlpga
    )
}

/// Whether the instruction may be executed in the guest's place by the host, after renaming its operands.
fn copyable(instruction: &Instruction, model: &CpuModel, key: Key) -> bool {
    if instruction.is_privileged()
        || instruction.is_stack_instruction()
        || instruction.is_string_instruction()
        || instruction.is_save_restore_instruction()
        || instruction.is_vsib()
        || instruction.is_invalid()
        || instruction.code_size() != CodeSize::Code64
        || !model.offers_instruction(instruction)
        || instruction.op_count() > 4
    {
        return false;
    }
    match unit(instruction) {
        Unit::General if !known_general(instruction.mnemonic()) => return false,
        Unit::General => {}
        Unit::X87 if !key.x87() || !known_x87(instruction) => return false,
        Unit::X87 => {}
        // MMX lives in the x87 registers; it is too rare to move them about for.
        Unit::Mmx => return false,
        Unit::Sse if !key.sse() => return false,
        Unit::Sse => {}
        Unit::Avx if !key.avx() => return false,
        Unit::Avx => {}
    }
    for operand in 0..instruction.op_count() {
        let register = match instruction.op_kind(operand) {
            OpKind::Register => instruction.op_register(operand),
            // Only an ordinary memory operand, with a known size.
            OpKind::Memory => {
                let size = instruction.memory_size().size();
                if size == 0 || size > 32 {
                    return instruction.mnemonic() == Mnemonic::Lea;
                }
                continue;
            }
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => continue,
            _ => return false,
        };
        let ordinary = register.is_gpr() || register.is_xmm() || register.is_ymm() || register.is_st();
        if !ordinary {
            return false;
        }
    }
    !matches!(
        instruction.mnemonic(),
        Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
            | Mnemonic::Stmxcsr
            | Mnemonic::Vstmxcsr
    )
}

/// The unit that an instruction uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// General registers only.
    General,
    /// x87.
    X87,
    /// MMX registers.
    Mmx,
    /// SSE, legacy encoding.
    Sse,
    /// VEX-encoded vectors.
    Avx,
}

/// Whether an instruction is one of x87, by its code: asking iced-x86 takes long.
static X87: LazyLock<Vec<bool>> = LazyLock::new(|| Code::values().map(is_x87).collect());

/// The unit that an instruction uses.
pub fn unit(instruction: &Instruction) -> Unit {
    if X87.get(instruction.code() as usize).is_some_and(|&x87| x87) {
        return Unit::X87;
    }
    let registers = || {
        (0..instruction.op_count())
            .filter(|&operand| instruction.op_kind(operand) == OpKind::Register)
            .map(|operand| instruction.op_register(operand))
    };
    if registers().any(|register| register.is_mm())
        || matches!(instruction.mnemonic(), Mnemonic::Emms | Mnemonic::Femms)
    {
        return Unit::Mmx;
    }
    if registers().any(|register| register.is_vector_register())
        || matches!(instruction.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall)
        || converts_to_integer(instruction.mnemonic())
    {
        return if instruction.encoding() == iced_x86::EncodingKind::Legacy { Unit::Sse } else { Unit::Avx };
    }
    Unit::General
}

/// Conversions to a general register: with an operand in memory they name no vector register, but obey MXCSR.
fn converts_to_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Cvtss2si | Cvttss2si | Cvtsd2si | Cvttsd2si | Vcvtss2si | Vcvttss2si | Vcvtsd2si | Vcvttsd2si
    )
}

fn known_x87(instruction: &Instruction) -> bool {
    // Those that move the environment show instruction and operand pointers, which must be the guest's.
    let moves_environment = matches!(
        instruction.mnemonic(),
        Mnemonic::Fnstenv
            | Mnemonic::Fstenv
            | Mnemonic::Fldenv
            | Mnemonic::Fnsave
            | Mnemonic::Fsave
            | Mnemonic::Frstor
            | Mnemonic::Fldcw
    );
    !moves_environment
}

/// General-purpose instructions that are copied. A list, so that what is new to iced-x86 is never copied unseen.
fn known_general(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Mov | Movzx
            | Movsx
            | Movsxd
            | Movbe
            | Xchg
            | Bswap
            | Lea
            | Add
            | Sub
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Adc
            | Sbb
            | Inc
            | Dec
            | Neg
            | Not
            | Mul
            | Imul
            | Div
            | Idiv
            | Mulx
            | Shl
            | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Shlx
            | Shrx
            | Sarx
            | Rorx
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Popcnt
            | Andn
            | Bextr
            | Blsi
            | Blsmsk
            | Blsr
            | Bzhi
            | Pdep
            | Pext
            | Adcx
            | Adox
            | Crc32
            | Seto
            | Setno
            | Setb
            | Setae
            | Sete
            | Setne
            | Setbe
            | Seta
            | Sets
            | Setns
            | Setp
            | Setnp
            | Setl
            | Setge
            | Setle
            | Setg
            | Cmovo
            | Cmovno
            | Cmovb
            | Cmovae
            | Cmove
            | Cmovne
            | Cmovbe
            | Cmova
            | Cmovs
            | Cmovns
            | Cmovp
            | Cmovnp
            | Cmovl
            | Cmovge
            | Cmovle
            | Cmovg
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Clc
            | Stc
            | Cmc
            | Lahf
            | Sahf
            | Cmpxchg
            | Cmpxchg16b
            | Cmpxchg8b
            | Xadd
            | Pause
            | Lfence
            | Sfence
            | Mfence
            | Movnti
            | Rdrand
            | Rdseed
    )
}

/// Whether a bit test with a register offset reaches outside of its memory operand.
pub fn is_bit_string(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && instruction.op0_kind() == OpKind::Memory
        && instruction.op1_kind() == OpKind::Register
}

/// Flags read (or passed on unchanged in some cases) and flags certainly written.
fn flag_effects(instruction: &Instruction) -> (u32, u32) {
    let read = instruction.rflags_read() & ALL_FLAGS;
    let modified = instruction.rflags_modified() & ALL_FLAGS;
    let by_cl = instruction.op_count() > 1
        && instruction.op_kind(instruction.op_count() - 1) == OpKind::Register
        && instruction.op_register(instruction.op_count() - 1) == Register::CL;
    let shift_or_rotate = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    // A count of zero leaves all flags as they are, an immediate zero always does.
    let immediate_count = || instruction.immediate(instruction.op_count() - 1) & 0x1f;
    if shift_or_rotate && (by_cl || instruction.op_count() > 1 && immediate_count() == 0) {
        return (ALL_FLAGS, 0);
    }
    // So does a repetition of no times.
    if instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        return (ALL_FLAGS, 0);
    }
    (read, modified)
}

/// Fills in what is live before each instruction. `live_out`: flags that may be read after the block.
pub fn mark_live_flags(block: &mut [Decoded], live_out: u32) {
    let mut live = live_out;
    for decoded in block.iter_mut().rev() {
        let (read, written) = match decoded.class {
            // The interpreter sees and keeps all flags.
            Class::Interpret
            | Class::InterpretLast
            | Class::RepeatString
            | Class::WriteBase
            | Class::Pushf
            | Class::Cpuid
            | Class::Rdtsc
            | Class::Rdtscp
            | Class::Sti
            | Class::SwitchAc
            | Class::Invlpg
            | Class::InterruptReturn
            | Class::Syscall => (ALL_FLAGS, 0),
            Class::Sysret => (0, ALL_FLAGS),
            Class::Nothing
            | Class::Pause
            | Class::Cli
            | Class::Cld
            | Class::Std
            | Class::Swapgs
            | Class::ReadControl
            | Class::ReadSelector => (0, 0),
            Class::ReadBase => (ALL_FLAGS, 0),
            Class::JumpIf => {
                let (read, _) = flag_effects(&decoded.instruction);
                (read | decoded.live_taken, 0)
            }
            _ => flag_effects(&decoded.instruction),
        };
        live = live & !written | read;
        decoded.live_before = live;
    }
}

/// Flags that code starting with these instructions may read, looking no further than they go.
pub fn live_at_start(instructions: impl Iterator<Item = Instruction>) -> u32 {
    let mut undecided = ALL_FLAGS;
    let mut live = 0;
    for instruction in instructions {
        if instruction.is_invalid() {
            break;
        }
        let (read, written) = flag_effects(&instruction);
        live |= read & undecided;
        if instruction.flow_control() != FlowControl::Next || instruction.is_privileged() {
            break;
        }
        undecided &= !written & !read;
        if undecided == 0 {
            return live;
        }
    }
    live | undecided
}

/// Fills in where RSP is relative to the block's start, and returns the range of accesses to check for it.
pub fn track_stack(block: &mut [Decoded]) -> Option<StackRange> {
    let mut delta = Some(0i32);
    let mut range: Option<StackRange> = None;
    for decoded in block.iter_mut() {
        decoded.stack_delta = delta;
        let Some(current) = delta else { continue };
        if let Some((offset, size, write)) = stack_access(decoded) {
            let (mut low, mut high) = (current + offset, current + offset + size);
            if decoded.stack_step == code32::STACK_STEP {
                // ESP itself lies in the page, too: it has not wrapped since the check.
                (low, high) = (low.min(current), high.max(current));
            }
            let candidate = match range {
                None => StackRange { low, high, write },
                Some(r) => StackRange { low: r.low.min(low), high: r.high.max(high), write: r.write | write },
            };
            if candidate.high - candidate.low > STACK_RANGE_LIMIT {
                delta = None;
                decoded.stack_delta = None;
                continue;
            }
            range = Some(candidate);
        }
        delta = after(decoded, current);
    }
    range
}

/// Whether an operand is memory, of the ordinary form.
pub fn has_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

/// Whether the memory operand has a base register other than RSP, of 64 bits, and neither index nor segment base.
pub fn is_based(instruction: &Instruction) -> bool {
    let base = instruction.memory_base();
    has_memory(instruction)
        && base.is_gpr64()
        && base != Register::RSP
        && instruction.memory_index() == Register::None
        && !matches!(instruction.memory_segment(), Register::FS | Register::GS)
}

/// Offset from RSP, size and direction of an access to the stack at a fixed offset. PUSH of a memory operand and
/// CALL through memory may make another one.
pub fn stack_access(decoded: &Decoded) -> Option<(i32, i32, bool)> {
    let step = decoded.stack_step;
    match decoded.class {
        Class::Push | Class::Pushf | Class::Call | Class::CallIndirect => Some((-step, step, true)),
        Class::Pop | Class::Return => Some((0, step, false)),
        Class::InterruptReturn => Some((0, FRAME, false)),
        Class::Copy => {
            let (offset, size) = rsp_operand(&decoded.instruction)?;
            Some((offset, size, writes_memory(decoded)))
        }
        _ => None,
    }
}

/// Whether the memory operand is written.
pub fn writes_memory(decoded: &Decoded) -> bool {
    (0..decoded.instruction.op_count().min(4)).any(|operand| {
        decoded.instruction.op_kind(operand) == OpKind::Memory
            && matches!(
                decoded.access[operand as usize],
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
    })
}

/// Offset and size of a memory operand `[rsp + offset]`.
fn rsp_operand(instruction: &Instruction) -> Option<(i32, i32)> {
    if !has_memory(instruction)
        || instruction.mnemonic() == Mnemonic::Lea
        || is_bit_string(instruction)
        || instruction.memory_base() != Register::RSP
        || instruction.memory_index() != Register::None
        || !matches!(instruction.memory_segment(), Register::SS | Register::DS | Register::ES | Register::CS)
    {
        return None;
    }
    let offset = i32::try_from(instruction.memory_displacement64() as i64).ok()?;
    let near = (-STACK_RANGE_LIMIT..=STACK_RANGE_LIMIT).contains(&offset);
    near.then(|| (offset, instruction.memory_size().size() as i32))
}

/// RSP after the instruction, relative to the block's start.
fn after(decoded: &Decoded, delta: i32) -> Option<i32> {
    let instruction = &decoded.instruction;
    let moved = match decoded.class {
        Class::Push | Class::Pushf => -i64::from(decoded.stack_step),
        Class::Pop if instruction.op0_register() == Register::RSP => return None,
        Class::Pop => decoded.stack_step.into(),
        Class::Nothing
        | Class::Pause
        | Class::JumpIf
        | Class::BitString
        | Class::RepeatString
        | Class::Swapgs
        | Class::WriteBase
        | Class::Cli
        | Class::Cld
        | Class::Std
        | Class::Sti
        | Class::Rdtsc
        | Class::Rdtscp
        | Class::Cpuid => 0,
        Class::Copy | Class::ReadControl | Class::ReadSelector | Class::ReadBase => {
            let writes_rsp = (0..instruction.op_count().min(4)).any(|operand| {
                instruction.op_kind(operand) == OpKind::Register
                    && instruction.op_register(operand).full_register() == Register::RSP
                    && !matches!(decoded.access[operand as usize], OpAccess::Read | OpAccess::None)
            });
            match instruction.mnemonic() {
                _ if !writes_rsp => 0,
                Mnemonic::Add => stack_constant(decoded)?,
                Mnemonic::Sub => stack_constant(decoded)?.checked_neg()?,
                Mnemonic::Lea
                    if i32::try_from(instruction.op0_register().size()) == Ok(decoded.stack_step)
                        && instruction.memory_base() == Register::RSP
                        && instruction.memory_index() == Register::None =>
                {
                    instruction.memory_displacement64() as i64
                }
                _ => return None,
            }
        }
        _ => return None,
    };
    let delta = i64::from(delta).checked_add(moved)?;
    i32::try_from(delta).ok().filter(|delta| delta.abs() < 1 << 20)
}

/// Whether RSP is somewhere else after the instruction, which isn't the block's last one anyway.
pub fn changes_stack(decoded: &Decoded) -> bool {
    matches!(decoded.class, Class::Copy | Class::Pop | Class::Leave) && after(decoded, 0).is_none()
}

/// What an addition to or subtraction from the stack pointer adds or subtracts, if that is constant.
fn stack_constant(decoded: &Decoded) -> Option<i64> {
    let instruction = &decoded.instruction;
    if decoded.stack_step == code32::STACK_STEP {
        return code32::stack_constant(instruction);
    }
    let constant = instruction.op0_kind() == OpKind::Register
        && instruction.op0_register() == Register::RSP
        && matches!(instruction.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
    constant.then(|| instruction.immediate(1) as i64)
}

/// Accesses of the operands, and the general registers that may change, by their numbers.
pub fn accesses(factory: &mut InstructionInfoFactory, instruction: &Instruction) -> ([OpAccess; 4], u16) {
    let info = factory.info_options(instruction, InstructionInfoOptions::NO_MEMORY_USAGE);
    let written = info
        .used_registers()
        .iter()
        .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead))
        .filter_map(|used| number(used.register()))
        .fold(0, |mask, number| mask | 1 << number);
    ([info.op0_access(), info.op1_access(), info.op2_access(), info.op3_access()], written)
}

/// Whether the host has what the translator's own sequences use.
pub fn host_can_translate() -> bool {
    std::is_x86_feature_detected!("bmi2") && std::is_x86_feature_detected!("avx")
}

/// Instructions on the memory image of the vector and x87 state, or on its control registers.
pub fn is_state_image(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Fxsave
            | Fxsave64
            | Fxrstor
            | Fxrstor64
            | Xsave
            | Xsave64
            | Xsavec
            | Xsavec64
            | Xsaveopt
            | Xsaveopt64
            | Xrstor
            | Xrstor64
            | Ldmxcsr
            | Vldmxcsr
            | Stmxcsr
            | Vstmxcsr
            | Xsetbv
            | Wait
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::new(64, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn a_conversion_from_memory_to_a_general_register_works_on_vectors() {
        // cvtsd2si eax, [rbp]; vcvttss2si rax, [rbp]
        assert_eq!(unit(&decode(&[0xf2, 0x0f, 0x2d, 0x45, 0x00])), Unit::Sse);
        assert_eq!(unit(&decode(&[0xc4, 0xe1, 0xfa, 0x2c, 0x45, 0x00])), Unit::Avx);
    }

    #[test]
    fn a_repetition_may_keep_all_flags() {
        // repe cmpsb; jmp .
        let code = [decode(&[0xf3, 0xa6]), decode(&[0xeb, 0xfe])];
        assert_eq!(live_at_start(code.into_iter()), ALL_FLAGS);
        // cmpsb
        assert_eq!(live_at_start([decode(&[0xa6])].into_iter()), 0);
    }
}
