//! What the oracle does not try, and why.

use bivisor_x86::cpuid::CpuModel;
use iced_x86::{Instruction, Mnemonic};

/// Reasons that are given more than once.
const SEGMENT_LOAD: &str = "loads segment registers, whose descriptors are the host's";
const LOOP_PREFIX: &str = "Zen lets the prefix choose the condition";
const BIT_FIELD: &str = "the result is undefined where the field does not lie in 64 bits";
const HIDDEN: &str = "hidden by the guest's CPU model";

/// Instructions by mnemonic that are not tried.
const EXCLUDED: &[(&[Mnemonic], &str)] = &[
    (
        &[
            Mnemonic::Cpuid,
            Mnemonic::Xgetbv,
            Mnemonic::Rdpid,
            Mnemonic::Rdpkru,
            Mnemonic::Wrpkru,
            Mnemonic::Rdpru,
        ],
        "tells of the processor or system what the guest's differs in",
    ),
    (
        &[Mnemonic::Rdtsc, Mnemonic::Rdtscp, Mnemonic::Rdrand, Mnemonic::Rdseed, Mnemonic::Rdpmc],
        "gives another result every time",
    ),
    (
        &[
            Mnemonic::Syscall,
            Mnemonic::Sysenter,
            Mnemonic::Sysexit,
            Mnemonic::Sysexitq,
            Mnemonic::Sysret,
            Mnemonic::Sysretq,
            Mnemonic::Int,
            Mnemonic::Int1,
        ],
        "enters the host's kernel",
    ),
    (
        &[
            Mnemonic::Vmcall,
            Mnemonic::Vmmcall,
            Mnemonic::Vmgexit,
            Mnemonic::Monitor,
            Mnemonic::Mwait,
            Mnemonic::Monitorx,
            Mnemonic::Mwaitx,
        ],
        "reaches the hypervisor that the host may run on",
    ),
    (
        &[
            Mnemonic::Sgdt,
            Mnemonic::Sidt,
            Mnemonic::Sldt,
            Mnemonic::Str,
            Mnemonic::Smsw,
            Mnemonic::Lar,
            Mnemonic::Lsl,
            Mnemonic::Verr,
            Mnemonic::Verw,
        ],
        "tells of the host's tables, or is emulated by the host's kernel (UMIP)",
    ),
    (
        &[
            Mnemonic::Iret,
            Mnemonic::Iretd,
            Mnemonic::Iretq,
            Mnemonic::Retf,
            Mnemonic::Lss,
            Mnemonic::Lfs,
            Mnemonic::Lgs,
            Mnemonic::Lds,
            Mnemonic::Les,
        ],
        SEGMENT_LOAD,
    ),
    (
        &[Mnemonic::Wrfsbase, Mnemonic::Wrgsbase],
        "changes the bases of FS and GS, which signal frames do not restore",
    ),
];

/// Why an instruction is not tried, if it is not.
pub fn exclusion(instruction: &Instruction, model: &CpuModel) -> Option<&'static str> {
    let mnemonic = instruction.mnemonic();
    if let Some((_, why)) = EXCLUDED.iter().find(|(mnemonics, _)| mnemonics.contains(&mnemonic)) {
        return Some(why);
    }
    if instruction.is_invalid() {
        return None;
    }
    if is_undefined_bit_field(instruction) {
        return Some(BIT_FIELD);
    }
    let loads_segment = match mnemonic {
        Mnemonic::Mov | Mnemonic::Pop => instruction.op0_register().is_segment_register(),
        _ => false,
    };
    if loads_segment || instruction.is_call_far() || instruction.is_jmp_far() {
        return Some(SEGMENT_LOAD);
    }
    if instruction.is_call_far_indirect() || instruction.is_jmp_far_indirect() {
        return Some(SEGMENT_LOAD);
    }
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    if repeated && matches!(mnemonic, Mnemonic::Loope | Mnemonic::Loopne) {
        return Some(LOOP_PREFIX);
    }
    if !model.offers_instruction(instruction) {
        return Some(HIDDEN);
    }
    None
}

/// Whether it is EXTRQ or INSERTQ with a field that does not lie in 64 bits, or one given by a register's value.
fn is_undefined_bit_field(instruction: &Instruction) -> bool {
    let field = match (instruction.mnemonic(), instruction.op_count()) {
        (Mnemonic::Extrq, 3) => [1, 2],
        (Mnemonic::Insertq, 4) => [2, 3],
        (mnemonic, _) => return matches!(mnemonic, Mnemonic::Extrq | Mnemonic::Insertq),
    };
    let [length, index] = field.map(|operand| instruction.immediate(operand) & 63);
    index + length > 64 || (length == 0 && index > 0)
}

/// Further things that are not tried or not compared, and why; beside [`EXCLUDED`] for users.
const RULES: &[(&str, &str)] = &[
    ("MOV and POP to segment registers, far CALL and JMP", SEGMENT_LOAD),
    ("LOOPE and LOOPNE with a repetition prefix", LOOP_PREFIX),
    ("EXTRQ and INSERTQ by a register, or with such a field", BIT_FIELD),
    ("instructions listed in instructions.md", HIDDEN),
    (
        "undefined opcodes beginning with 0F 00 to 0F 03",
        "the host takes some of them for system instructions",
    ),
    (
        "undefined opcodes among AVX-512's mask instructions",
        "hosts with AVX-512 do not look at all the bits that should be clear",
    ),
    ("VEX encodings that only the W bit makes undefined", "Zen does not look at the bit everywhere"),
    ("modes other than 64-bit, privilege levels other than 3", "the host's programs run in no other"),
    (
        "flags that iced-x86 files as undefined, and those of SHLD and SHRD by more than 16 bits of 16",
        "undefined",
    ),
    (
        "x87 instruction and operand pointers",
        "AMD processors tell them only with an exception pending, and not all make them canonical",
    ),
    (
        "MXCSR.PE after an unmasked overflow or underflow",
        "taken from the masked operation, whose rounding may differ",
    ),
    ("MXCSR's flags after an unmasked exception of DPPS or DPPD", "as if both of its steps were masked"),
    ("bit 17 of a stored MXCSR_MASK", "the guest has no misaligned SSE mode"),
    (
        "where in FXSAVE's, XSAVE's or FNSAVE's operand a page fault is reported",
        "the order of its accesses is not told",
    ),
    ("which operand of CMPS faults, where both do", "the order of its accesses is not told"),
    ("MASKMOVDQU with alignment checks", "processors differ in whether an empty mask is checked"),
    ("a gather that is stepped and faults", "it may trap in between instead"),
    ("#UD or #GP for undefined opcodes of about 15 bytes", "how long they would be is not told"),
];

/// The list for users, a Markdown table.
pub fn table() -> String {
    let named = EXCLUDED.iter().map(|(mnemonics, why)| {
        let names = mnemonics.iter().map(|mnemonic| format!("{mnemonic:?}").to_uppercase());
        (names.collect::<Vec<_>>().join(" "), *why)
    });
    let rules = RULES.iter().map(|(what, why)| (what.to_string(), *why));
    let lines = named.chain(rules).map(|(what, why)| format!("| {what} | {why} |\n"));
    format!("| not tried or not compared | why |\n|---|---|\n{}", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_documentation_has_the_list() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/oracle.md");
        let page = std::fs::read_to_string(path).expect("docs/oracle.md");
        assert!(page.contains(&super::table()), "renew it with `cargo xtask oracle --exclusions`");
    }
}
