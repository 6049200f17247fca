//! What the oracle does not try, and why.

use bivisor_x86::cpuid::CpuModel;
use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind, OpCodeTableKind};

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
        "loads segment registers, whose descriptors are the host's",
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
    let info = instruction.op_code();
    let loads_segment = match mnemonic {
        Mnemonic::Mov => info.op0_kind() == OpCodeOperandKind::seg_reg,
        Mnemonic::Pop => matches!(info.op_code(), 0xa1 | 0xa9) && info.table() == OpCodeTableKind::T0F,
        _ => false,
    };
    if loads_segment || instruction.is_call_far() || instruction.is_jmp_far() {
        return Some("loads segment registers, whose descriptors are the host's");
    }
    if instruction.is_call_far_indirect() || instruction.is_jmp_far_indirect() {
        return Some("loads segment registers, whose descriptors are the host's");
    }
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    if repeated && matches!(mnemonic, Mnemonic::Loope | Mnemonic::Loopne) {
        return Some("LOOPE and LOOPNE with a repetition prefix: Zen lets the prefix choose the condition");
    }
    if !model.offers_instruction(instruction) {
        return Some("hidden by the guest's CPU model");
    }
    None
}

/// The list for users: mnemonics and reason.
pub fn list() -> Vec<(String, &'static str)> {
    let names = |mnemonics: &[Mnemonic]| {
        mnemonics.iter().map(|mnemonic| format!("{mnemonic:?}").to_uppercase()).collect::<Vec<_>>().join(" ")
    };
    EXCLUDED.iter().map(|(mnemonics, why)| (names(mnemonics), *why)).collect()
}
