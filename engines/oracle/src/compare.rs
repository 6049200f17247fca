//! What must be equal after an instruction, and a report of what is not.

use std::fmt::Write;
use std::sync::LazyLock;

use bivisor_x86::registers::{Rflags, gpr};
use iced_x86::{Formatter, Instruction, IntelFormatter, Mnemonic, OpKind, RflagsBits};

use crate::layout::{Case, Change, DATA, Outcome};
use bivisor_x86::state::MXCSR_MASK;

/// Names of the general registers in encoding order.
const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// Exception flags of MXCSR.
const OVERFLOW: u16 = 8;
const UNDERFLOW: u16 = 16;
const PRECISION: u16 = 32;
const FLAGS: u16 = 0x3f;
/// Bit 17 of MXCSR.
const MISALIGNED_SSE: u32 = 1 << 17;
/// First linear address of the upper half, about whose pages Linux tells nothing.
const UPPER_HALF: u64 = 1 << 63;

/// Parts of the x87, SSE and AVX state that are compared.
static PARTS: LazyLock<Vec<(String, usize, usize)>> = LazyLock::new(|| parts().collect());

/// These parts: name, offset, size.
fn parts() -> impl Iterator<Item = (String, usize, usize)> {
    let control = [
        ("fcw", 0, 2),
        ("fsw", 2, 2),
        ("ftw", 4, 1),
        ("fop", 6, 2),
        ("fip", 8, 8),
        ("fdp", 16, 8),
        ("mxcsr", 24, 4),
    ];
    let control = control.into_iter().map(|(name, at, size)| (name.to_string(), at, size));
    let stack = (0..8).map(|i| (format!("st{i}"), 32 + 16 * i, 10));
    let xmm = (0..16).map(|i| (format!("xmm{i}"), 160 + 16 * i, 16));
    let ymm = (0..16).map(|i| (format!("ymm{i} high"), 576 + 16 * i, 16));
    control.chain(stack).chain(xmm).chain(ymm)
}

/// Bytes as one number, most significant first.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Flags that the manuals leave undefined after this instruction.
fn undefined_flags(instruction: &Instruction) -> u64 {
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
fn is_state_operand(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let legacy =
        [M::Fxsave, M::Fxsave64, M::Fxrstor, M::Fxrstor64, M::Fnsave, M::Frstor, M::Fnstenv, M::Fldenv];
    let extended =
        [M::Xsave, M::Xsave64, M::Xsaveopt, M::Xsaveopt64, M::Xsavec, M::Xsavec64, M::Xrstor, M::Xrstor64];
    legacy.contains(&instruction.mnemonic()) || extended.contains(&instruction.mnemonic())
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
fn same_mxcsr(case: &Case, instruction: &Instruction, native: &Outcome, interpreted: &Outcome) -> bool {
    let word = |area: &[u8]| u16::from_le_bytes([area[24], area[25]]);
    let flags = word(&native.xsave) | word(&interpreted.xsave);
    let unmasked = !word(&case.xsave) >> 7 & (OVERFLOW | UNDERFLOW);
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
fn is_accepted(case: &Case, instruction: &Instruction, native: &Outcome, interpreted: &Outcome) -> bool {
    let is_gather = instruction.memory_index().is_vector_register();
    match (native.vector, interpreted.vector) {
        // A gather that is single-stepped may trap in the middle, before the element that faults.
        (1, 14) => is_gather && native.rip == case.rip,
        // How long an undefined opcode is, more than 15 bytes or less, nobody tells.
        (13, 6) | (6, 13) => instruction.is_invalid(),
        _ => false,
    }
}

/// The differences, a line each; empty if there are none.
pub fn differences(
    case: &Case,
    instruction: &Instruction,
    native: &Outcome,
    interpreted: &Outcome,
) -> Vec<String> {
    let mut lines = Vec::new();
    let mut differ = |name: &str, native: String, interpreted: String| {
        lines.push(format!("{name:>12}  native {native}  interpreter {interpreted}"));
    };
    if native.vector != interpreted.vector && is_accepted(case, instruction, native, interpreted) {
        // The rest counts.
    } else if native.vector != interpreted.vector {
        differ("exception", exception(native), exception(interpreted));
    } else if native.vector == 14 {
        // Linux hides whether addresses in the upper half are mapped.
        let hidden = if native.cr2 >= UPPER_HALF { 1 } else { 0 };
        // Which byte of a large operand faults first, and so in which page, is the processor's own affair.
        let (slack, hidden) = if is_state_operand(instruction) { (0x400, 1) } else { (0, hidden) };
        if native.cr2.abs_diff(interpreted.cr2) > slack || (native.error ^ interpreted.error) & !hidden != 0 {
            differ("page fault", exception(native), exception(interpreted));
        }
    } else if native.error != interpreted.error && native.vector != 1 {
        differ("error code", format!("{:#x}", native.error), format!("{:#x}", interpreted.error));
    }
    if native.rip != interpreted.rip {
        differ("rip", format!("{:#x}", native.rip), format!("{:#x}", interpreted.rip));
    }
    let flags = native.rflags ^ interpreted.rflags;
    let resume = if native.vector != interpreted.vector { Rflags::RF.bits() | Rflags::TF.bits() } else { 0 };
    if flags & !ignored_flags(case, instruction) & !resume != 0 {
        differ("rflags", flag_names(native.rflags), flag_names(interpreted.rflags));
    }
    for (i, name) in NAMES.iter().enumerate() {
        if native.gpr[i] != interpreted.gpr[i] {
            differ(name, format!("{:#x}", native.gpr[i]), format!("{:#x}", interpreted.gpr[i]));
        }
    }
    if native.xsave != interpreted.xsave {
        for &(ref name, at, size) in PARTS.iter() {
            let (one, other) = (&native.xsave[at..at + size], &interpreted.xsave[at..at + size]);
            // AMD processors tell the pointers to the last x87 instruction only with an exception pending.
            let untold = matches!(&**name, "fop" | "fip" | "fdp") && one.iter().all(|&byte| byte == 0);
            if one != other
                && !untold
                && !(name == "mxcsr" && same_mxcsr(case, instruction, native, interpreted))
            {
                differ(name, hex(one), hex(other));
            }
        }
    }
    if !same_changes(native, interpreted, is_state_operand(instruction)) {
        differ("memory", changes(native), changes(interpreted));
    }
    lines
}

fn exception(outcome: &Outcome) -> String {
    match outcome.vector {
        1 => "none".into(),
        14 => format!("#14({:#x}) at {:#x}", outcome.error, outcome.cr2),
        vector => format!("#{vector}({:#x})", outcome.error),
    }
}

fn flag_names(flags: u64) -> String {
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
