//! What must be equal after an instruction, and a report of what is not.

use std::fmt::Write;
use std::sync::LazyLock;

use bivisor_x86::registers::{Rflags, gpr};
use iced_x86::{Formatter, Instruction, IntelFormatter, Mnemonic, OpKind, RflagsBits};

use crate::layout::{Case, Change, DATA, Outcome, State};
use bivisor_x86::state::MXCSR_MASK;

/// Names of the general registers in encoding order.
pub const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// Exception flags of MXCSR.
const OVERFLOW: u16 = 8;
const UNDERFLOW: u16 = 16;
const PRECISION: u16 = 32;
const FLAGS: u16 = 0x3f;
/// Bit 17 of MXCSR.
pub const MISALIGNED_SSE: u32 = 1 << 17;
/// Bytes of x87 pointers that are compared: not all processors make them canonical.
const POINTER_SIZE: usize = 6;
/// The last page of the lower half, and all of the upper half: Linux does not tell whether they are mapped.
const UNTOLD_PAGES: u64 = 0x7fff_ffff_f000;

/// Parts of the x87, SSE and AVX state that are compared.
pub static PARTS: LazyLock<Vec<(String, usize, usize)>> = LazyLock::new(|| parts().collect());

/// These parts: name, offset, size.
fn parts() -> impl Iterator<Item = (String, usize, usize)> {
    let control = [
        ("fcw", 0, 2),
        ("fsw", 2, 2),
        ("ftw", 4, 1),
        ("fop", 6, 2),
        ("fip", 8, POINTER_SIZE),
        ("fdp", 16, POINTER_SIZE),
        ("mxcsr", 24, 4),
    ];
    let control = control.into_iter().map(|(name, at, size)| (name.to_string(), at, size));
    let stack = (0..8).map(|i| (format!("st{i}"), 32 + 16 * i, 10));
    let xmm = (0..16).map(|i| (format!("xmm{i}"), 160 + 16 * i, 16));
    let ymm = (0..16).map(|i| (format!("ymm{i} high"), 576 + 16 * i, 16));
    control.chain(stack).chain(xmm).chain(ymm)
}

/// Bytes as one number, most significant first.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Flags that the manuals leave undefined after this instruction.
pub fn undefined_flags(instruction: &Instruction) -> u64 {
    let bits = instruction.rflags_undefined();
    [
        (RflagsBits::OF, Rflags::OF),
        (RflagsBits::SF, Rflags::SF),
        (RflagsBits::ZF, Rflags::ZF),
        (RflagsBits::AF, Rflags::AF),
        (RflagsBits::CF, Rflags::CF),
        (RflagsBits::PF, Rflags::PF),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag.bits())
}

/// Flags that are undefined for some counts only: SHLD and SHRD by more than 16 bits of 16.
fn undefined_by_count(case: &Case, instruction: &Instruction) -> u64 {
    let is_double_shift = matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd);
    let by_register = instruction.op_count() == 3 && instruction.op2_kind() == OpKind::Register;
    let count = if by_register { case.gpr[gpr::RCX] as u8 } else { instruction.immediate8() };
    let is_word = instruction.op_count() == 3 && instruction.op1_register().size() == 2;
    if is_double_shift && is_word && count & 31 > 16 { Rflags::ARITHMETIC.bits() } else { 0 }
}

/// Whether the operand is an x87, SSE or AVX state.
pub fn is_state_operand(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let legacy =
        [M::Fxsave, M::Fxsave64, M::Fxrstor, M::Fxrstor64, M::Fnsave, M::Frstor, M::Fnstenv, M::Fldenv];
    let extended =
        [M::Xsave, M::Xsave64, M::Xsaveopt, M::Xsaveopt64, M::Xsavec, M::Xsavec64, M::Xrstor, M::Xrstor64];
    legacy.contains(&instruction.mnemonic()) || extended.contains(&instruction.mnemonic())
}

/// Whether it is CMPS, which reads two operands.
pub fn compares_strings(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq)
        && instruction.op0_kind() != OpKind::Register
}

/// Whether the same was stored. The host's MXCSR_MASK in a stored state may have a bit (17, misaligned SSE
/// operands) that the guest's has not.
fn same_changes(native: &Outcome, interpreted: &Outcome, is_state: bool) -> bool {
    if native.changes() == interpreted.changes() {
        return true;
    }
    let without_mask = |outcome: &Outcome| {
        let is_mask = |change: &&Change| (change.value >> 32) as u32 & !MISALIGNED_SSE == MXCSR_MASK;
        let changes = outcome.changes().iter().filter(|change| !is_mask(change));
        changes.copied().collect::<Vec<_>>()
    };
    is_state && without_mask(native) == without_mask(interpreted)
}

/// Whether MXCSR is the same but for flags that the interpreter takes from the masked operation: the precision flag
/// after an unmasked overflow or underflow, and those of a dot product's additions after an exception of its
/// multiplications.
pub fn same_mxcsr(before: &[u8], instruction: &Instruction, native: &State, interpreted: &State) -> bool {
    let word = |area: &[u8]| u16::from_le_bytes([area[24], area[25]]);
    let flags = word(&native.xsave) | word(&interpreted.xsave);
    let unmasked = !word(before) >> 7 & (OVERFLOW | UNDERFLOW);
    let difference = word(&native.xsave) ^ word(&interpreted.xsave);
    let is_dot_product =
        matches!(instruction.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd);
    native.vector == 19
        && (flags & unmasked != 0 && difference == PRECISION || is_dot_product && difference & !FLAGS == 0)
}

/// Flags that are not compared after this case.
fn ignored_flags(case: &Case, instruction: &Instruction) -> u64 {
    let stepped = if case.steps { 0 } else { Rflags::TF.bits() };
    undefined_flags(instruction) | undefined_by_count(case, instruction) | stepped
}

/// Whether two different exceptions are both right.
fn is_accepted(case: &Case, instruction: &Instruction, native: &State, interpreted: &State) -> bool {
    let is_gather = instruction.memory_index().is_vector_register();
    match (native.vector, interpreted.vector) {
        // A gather that is single-stepped may trap in the middle, before the element that faults.
        (1, 14) => is_gather && native.rip == case.rip,
        // The first operand may fault in one way, the second in another.
        (12..=14 | 17, 12..=14 | 17) => compares_strings(instruction),
        // How long an undefined opcode is, more than 15 bytes or less, nobody tells.
        (13, 6) | (6, 13) => instruction.is_invalid(),
        _ => false,
    }
}

/// What need not be equal in two states.
pub struct Rules {
    /// Names of the two sides.
    pub names: [&'static str; 2],
    /// Two different exceptions are both right.
    pub any_exception: bool,
    /// So far apart may the addresses of page faults be.
    pub fault_slack: u64,
    /// Bits of a page fault's error code that may differ.
    pub hidden_error: u64,
    /// Flags that may differ.
    pub ignored_flags: u64,
    /// MXCSR may differ.
    pub any_mxcsr: bool,
    /// The pointers to the last x87 instruction may differ.
    pub any_pointers: bool,
}

/// How two states differ, a line each.
pub fn state_differences(one: &State, other: &State, rules: &Rules) -> Vec<String> {
    let mut lines = Vec::new();
    let [first, second] = rules.names;
    let mut differ = |name: &str, one: String, other: String| {
        lines.push(format!("{name:>12}  {first} {one}  {second} {other}"));
    };
    if one.vector != other.vector && rules.any_exception {
        // The rest counts.
    } else if one.vector != other.vector {
        differ("exception", exception(one), exception(other));
    } else if one.vector == 14 {
        let hidden = rules.hidden_error | if one.cr2 >= UNTOLD_PAGES { 1 } else { 0 };
        if one.cr2.abs_diff(other.cr2) > rules.fault_slack || (one.error ^ other.error) & !hidden != 0 {
            differ("page fault", exception(one), exception(other));
        }
    } else if one.error != other.error && one.vector != 1 {
        differ("error code", format!("{:#x}", one.error), format!("{:#x}", other.error));
    }
    if one.rip != other.rip {
        differ("rip", format!("{:#x}", one.rip), format!("{:#x}", other.rip));
    }
    let flags = one.rflags ^ other.rflags;
    let resume = if one.vector != other.vector { Rflags::RF.bits() | Rflags::TF.bits() } else { 0 };
    if flags & !rules.ignored_flags & !resume != 0 {
        differ("rflags", flag_names(one.rflags), flag_names(other.rflags));
    }
    for (i, name) in NAMES.iter().enumerate() {
        if one.gpr[i] != other.gpr[i] {
            differ(name, format!("{:#x}", one.gpr[i]), format!("{:#x}", other.gpr[i]));
        }
    }
    if one.xsave != other.xsave {
        for &(ref name, at, size) in PARTS.iter() {
            let (one, other) = (&one.xsave[at..at + size], &other.xsave[at..at + size]);
            // AMD processors tell the pointers to the last x87 instruction only with an exception pending.
            let untold = matches!(&**name, "fop" | "fip" | "fdp")
                && (rules.any_pointers || one.iter().all(|&byte| byte == 0));
            if one != other && !untold && !(name == "mxcsr" && rules.any_mxcsr) {
                differ(name, hex(one), hex(other));
            }
        }
    }
    lines
}

/// What may differ after this case.
fn rules(case: &Case, instruction: &Instruction, native: &State, interpreted: &State) -> Rules {
    // Which byte of a large operand faults first, or which of two operands, is the processor's own affair.
    let (fault_slack, hidden_error) = match () {
        () if is_state_operand(instruction) => (0x400, 1),
        () if compares_strings(instruction) => (u64::MAX, 1),
        () => (0, 0),
    };
    Rules {
        names: ["native", "interpreter"],
        any_exception: is_accepted(case, instruction, native, interpreted),
        fault_slack,
        hidden_error,
        ignored_flags: ignored_flags(case, instruction),
        any_mxcsr: same_mxcsr(&case.xsave, instruction, native, interpreted),
        any_pointers: false,
    }
}

/// The differences, a line each; empty if there are none.
pub fn differences(
    case: &Case,
    instruction: &Instruction,
    native: &Outcome,
    interpreted: &Outcome,
) -> Vec<String> {
    let rules = rules(case, instruction, &native.state, &interpreted.state);
    let mut lines = state_differences(&native.state, &interpreted.state, &rules);
    if !same_changes(native, interpreted, is_state_operand(instruction)) {
        let (native, interpreted) = (changes(native), changes(interpreted));
        lines.push(format!("{:>12}  native {native}  interpreter {interpreted}", "memory"));
    }
    lines
}

/// The exception and what it tells.
pub fn exception(state: &State) -> String {
    match state.vector {
        1 => "none".into(),
        14 => format!("#14({:#x}) at {:#x}", state.error, state.cr2),
        vector => format!("#{vector}({:#x})", state.error),
    }
}

/// Flags as a number and by name.
pub fn flag_names(flags: u64) -> String {
    let names = Rflags::from_bits_truncate(flags).iter_names().map(|(name, _)| name).collect::<Vec<_>>();
    format!("{flags:#x} ({})", names.join(" "))
}

fn changes(outcome: &Outcome) -> String {
    let words = outcome
        .changes()
        .iter()
        .take(8)
        .map(|change| format!("[{:#x}] = {:016x}", DATA + u64::from(change.offset), change.value))
        .collect::<Vec<_>>();
    if words.is_empty() { "unchanged".into() } else { words.join(", ") }
}

/// Bytes and disassembly.
pub fn disassembly(case: &Case, instruction: &Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(instruction, &mut text);
    let bytes = case.code.iter().take(instruction.len().clamp(1, 15));
    let bytes = bytes.map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    format!("{bytes}  {text}")
}

/// All about a difference: the instruction, the state before it as far as it may matter, and what differs.
pub fn report(case: &Case, instruction: &Instruction, lines: &[String]) -> String {
    let mut text =
        format!("{}\n  at {:#x}, image {}, ", disassembly(case, instruction), case.rip, case.image);
    let _ = writeln!(text, "{}rflags {}", if case.steps { "TF, " } else { "" }, flag_names(case.rflags));
    for (i, name) in NAMES.iter().enumerate() {
        let end = if i % 4 == 3 { "\n" } else { " " };
        let _ = write!(text, "  {name:>3} {:016x}{end}", case.gpr[i]);
    }
    let named = |name: &str| {
        let number = name.split(' ').next().unwrap_or(name);
        let operands = disassembly(case, instruction);
        operands.contains(&number.replace("ymm", "mm")) || matches!(name, "fcw" | "fsw" | "ftw" | "mxcsr")
    };
    for (name, at, size) in PARTS.iter().filter(|(name, ..)| named(name)) {
        let _ = writeln!(text, "  {name:>10} {}", hex(&case.xsave[*at..at + size]));
    }
    for line in lines {
        let _ = writeln!(text, "{line}");
    }
    text
}
