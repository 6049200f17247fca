//! The feature bits of CPUID: which of them the model offers, why it hides the others, and which instructions
//! hang on each (SDM Vol. 2A, CPUID; APM Vol. 3, appendix E).

use iced_x86::CpuidFeature as F;

/// A CPUID output register that consists of feature bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Word {
    L1Ecx,
    L1Edx,
    L6Eax,
    L7Ebx,
    L7Ecx,
    L7Edx,
    L7s1Eax,
    LDs1Eax,
    X1Ecx,
    X1Edx,
    X7Edx,
    X8Ebx,
    X21Eax,
    X21Ecx,
}

impl Word {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::L1Ecx,
        Self::L1Edx,
        Self::L6Eax,
        Self::L7Ebx,
        Self::L7Ecx,
        Self::L7Edx,
        Self::L7s1Eax,
        Self::LDs1Eax,
        Self::X1Ecx,
        Self::X1Edx,
        Self::X7Edx,
        Self::X8Ebx,
        Self::X21Eax,
        Self::X21Ecx,
    ];

    /// Leaf, sub-leaf and register (0 EAX, 1 EBX, 2 ECX, 3 EDX).
    pub const fn place(self) -> (u32, u32, usize) {
        match self {
            Self::L1Ecx => (1, 0, 2),
            Self::L1Edx => (1, 0, 3),
            Self::L6Eax => (6, 0, 0),
            Self::L7Ebx => (7, 0, 1),
            Self::L7Ecx => (7, 0, 2),
            Self::L7Edx => (7, 0, 3),
            Self::L7s1Eax => (7, 1, 0),
            Self::LDs1Eax => (0xd, 1, 0),
            Self::X1Ecx => (0x8000_0001, 0, 2),
            Self::X1Edx => (0x8000_0001, 0, 3),
            Self::X7Edx => (0x8000_0007, 0, 3),
            Self::X8Ebx => (0x8000_0008, 0, 1),
            Self::X21Eax => (0x8000_0021, 0, 0),
            Self::X21Ecx => (0x8000_0021, 0, 2),
        }
    }
}

/// When the model offers a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Where the host has it: its instructions are executed, or copied by a translator, as the host's own.
    Host,
    /// Always: it is part of the 64-bit baseline, or done by the machine in software on every engine.
    Always,
    /// Always where instructions are executed in software; where the host's processor executes them itself, only if it
    /// has the feature.
    Software,
    /// Always where the vendor is AMD (or Hygon).
    Amd,
    /// [`Policy::Software`] where the vendor is AMD.
    AmdSoftware,
    /// Always where the vendor is not AMD.
    Intel,
    /// Where the machine has more than one processor.
    Smp,
    /// Where the machine has more than one processor and the vendor is AMD.
    AmdSmp,
    /// Filled in when the guest asks, from the processor's state.
    Dynamic,
    /// Never, for this reason.
    Hidden(&'static str),
}

/// One feature bit.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// Register.
    pub word: Word,
    /// Bit in the register.
    pub bit: u32,
    /// Name as in the manuals.
    pub name: &'static str,
    /// Whether it is offered.
    pub policy: Policy,
    /// The instruction sets that the bit announces, as iced-x86 names them.
    pub instructions: &'static [F],
}

/// Instruction sets that need no feature bit: the baseline, and those whose instructions execute as NOP on a
/// processor without them (ENDBR, CLDEMOTE, PREFETCHWT1, PREFETCHIT), so that decoding must let them through.
pub const BASELINE: &[F] = &[
    F::INTEL8086,
    F::INTEL186,
    F::INTEL286,
    F::INTEL386,
    F::INTEL486,
    F::X64,
    F::CPUID,
    F::FPU287,
    F::FPU387,
    F::MULTIBYTENOP,
    F::PAUSE,
    F::RDPMC,
    F::SMM,
    F::CET_IBT,
    F::CLDEMOTE,
    F::PREFETCHWT1,
    F::PREFETCHITI,
];

const fn on(word: Word, bit: u32, name: &'static str, policy: Policy, instructions: &'static [F]) -> Feature {
    Feature { word, bit, name, policy, instructions }
}

const fn hide(
    word: Word,
    bit: u32,
    name: &'static str,
    instructions: &'static [F],
    why: &'static str,
) -> Feature {
    Feature { word, bit, name, policy: Policy::Hidden(why), instructions }
}

const AVX512: &str = "no 512-bit state";
const NESTED: &str = "no virtualization inside a guest";
const PERFMON: &str = "no performance counters";
const THERMAL: &str = "power and heat are the host's affair";
const TSX: &str = "no transactional memory: it would abort always";
const SPECULATION: &str = "the guest is told that it is not affected: it needs no mitigation";
const OBSOLETE: &str = "withdrawn by its maker";
const NO_STATE: &str = "its register state is not kept";
const UNTESTED: &str = "not executed by the engines so far";
const MWAIT: &str = "waiting is done by HLT, which lets the host have the processor";
const TRACE: &str = "no branch trace or debug store";
const RESOURCES: &str = "no cache or bandwidth control";
const SMM: &str = "no system management mode";

use Policy::{Always, Amd, AmdSmp, AmdSoftware, Dynamic, Host, Intel, Smp, Software};
use Word::*;

/// Every feature bit that the manuals name.
#[rustfmt::skip]
pub const FEATURES: &[Feature] = &[
    on(L1Ecx, 0, "SSE3", Host, &[F::SSE3]),
    on(L1Ecx, 1, "PCLMULQDQ", Host, &[F::PCLMULQDQ]),
    hide(L1Ecx, 2, "DTES64", &[], TRACE),
    hide(L1Ecx, 3, "MONITOR", &[F::MONITOR], MWAIT),
    hide(L1Ecx, 4, "DS-CPL", &[], TRACE),
    hide(L1Ecx, 5, "VMX", &[F::VMX, F::INVEPT, F::INVVPID], NESTED),
    hide(L1Ecx, 6, "SMX", &[F::SMX], NESTED),
    hide(L1Ecx, 7, "EIST", &[], THERMAL),
    hide(L1Ecx, 8, "TM2", &[], THERMAL),
    on(L1Ecx, 9, "SSSE3", Host, &[F::SSSE3]),
    hide(L1Ecx, 10, "CNXT-ID", &[], TRACE),
    hide(L1Ecx, 11, "SDBG", &[], TRACE),
    on(L1Ecx, 12, "FMA", Host, &[F::FMA]),
    on(L1Ecx, 13, "CMPXCHG16B", Host, &[F::CMPXCHG16B]),
    hide(L1Ecx, 14, "XTPR", &[], THERMAL),
    hide(L1Ecx, 15, "PDCM", &[], PERFMON),
    on(L1Ecx, 17, "PCID", Software, &[]),
    hide(L1Ecx, 18, "DCA", &[], OBSOLETE),
    on(L1Ecx, 19, "SSE4.1", Host, &[F::SSE4_1]),
    on(L1Ecx, 20, "SSE4.2", Host, &[F::SSE4_2]),
    on(L1Ecx, 21, "x2APIC", Always, &[]),
    on(L1Ecx, 22, "MOVBE", Host, &[F::MOVBE]),
    on(L1Ecx, 23, "POPCNT", Host, &[F::POPCNT]),
    on(L1Ecx, 24, "TSC-DEADLINE", Always, &[]),
    on(L1Ecx, 25, "AES-NI", Host, &[F::AES]),
    on(L1Ecx, 26, "XSAVE", Host, &[F::XSAVE]),
    on(L1Ecx, 27, "OSXSAVE", Dynamic, &[]),
    on(L1Ecx, 28, "AVX", Host, &[F::AVX]),
    on(L1Ecx, 29, "F16C", Host, &[F::F16C]),
    on(L1Ecx, 30, "RDRAND", Software, &[F::RDRAND]),
    on(L1Ecx, 31, "HYPERVISOR", Always, &[]),

    on(L1Edx, 0, "FPU", Always, &[F::FPU]),
    hide(L1Edx, 1, "VME", &[], "virtual-8086 mode has no virtual interrupt flag"),
    on(L1Edx, 2, "DE", Always, &[]),
    on(L1Edx, 3, "PSE", Always, &[]),
    on(L1Edx, 4, "TSC", Always, &[F::TSC]),
    on(L1Edx, 5, "MSR", Always, &[F::MSR]),
    on(L1Edx, 6, "PAE", Always, &[]),
    on(L1Edx, 7, "MCE", Always, &[]),
    on(L1Edx, 8, "CMPXCHG8B", Always, &[F::CX8]),
    on(L1Edx, 9, "APIC", Dynamic, &[]),
    on(L1Edx, 11, "SEP", Always, &[F::SEP]),
    on(L1Edx, 12, "MTRR", Always, &[]),
    on(L1Edx, 13, "PGE", Always, &[]),
    on(L1Edx, 14, "MCA", Always, &[]),
    on(L1Edx, 15, "CMOV", Always, &[F::CMOV]),
    on(L1Edx, 16, "PAT", Always, &[]),
    on(L1Edx, 17, "PSE-36", Always, &[]),
    hide(L1Edx, 18, "PSN", &[], OBSOLETE),
    on(L1Edx, 19, "CLFLUSH", Always, &[F::CLFSH]),
    hide(L1Edx, 21, "DS", &[], TRACE),
    hide(L1Edx, 22, "ACPI", &[], THERMAL),
    on(L1Edx, 23, "MMX", Always, &[F::MMX]),
    on(L1Edx, 24, "FXSR", Always, &[F::FXSR]),
    on(L1Edx, 25, "SSE", Always, &[F::SSE]),
    on(L1Edx, 26, "SSE2", Always, &[F::SSE2]),
    on(L1Edx, 27, "SS", Intel, &[]),
    on(L1Edx, 28, "HTT", Smp, &[]),
    hide(L1Edx, 29, "TM", &[], THERMAL),
    hide(L1Edx, 31, "PBE", &[], PERFMON),

    hide(L6Eax, 0, "DTS", &[], THERMAL),
    hide(L6Eax, 1, "TURBO", &[], THERMAL),
    on(L6Eax, 2, "ARAT", Always, &[]),
    hide(L6Eax, 7, "HWP", &[], THERMAL),
    hide(L6Eax, 19, "HW-FEEDBACK", &[F::HRESET], THERMAL),

    on(L7Ebx, 0, "FSGSBASE", Software, &[F::FSGSBASE]),
    on(L7Ebx, 1, "TSC_ADJUST", Always, &[]),
    hide(L7Ebx, 2, "SGX", &[F::SGX1, F::OSS], NESTED),
    on(L7Ebx, 3, "BMI1", Host, &[F::BMI1]),
    hide(L7Ebx, 4, "HLE", &[F::HLE, F::HLE_or_RTM], TSX),
    on(L7Ebx, 5, "AVX2", Host, &[F::AVX2]),
    on(L7Ebx, 6, "FDP_EXCPTN_ONLY", Host, &[]),
    on(L7Ebx, 7, "SMEP", Software, &[]),
    on(L7Ebx, 8, "BMI2", Host, &[F::BMI2]),
    on(L7Ebx, 9, "ERMS", Software, &[]),
    on(L7Ebx, 10, "INVPCID", Software, &[F::INVPCID]),
    hide(L7Ebx, 11, "RTM", &[F::RTM], TSX),
    hide(L7Ebx, 12, "PQM", &[], RESOURCES),
    on(L7Ebx, 13, "ZERO_FCS_FDS", Host, &[]),
    hide(L7Ebx, 14, "MPX", &[F::MPX], OBSOLETE),
    hide(L7Ebx, 15, "PQE", &[], RESOURCES),
    hide(L7Ebx, 16, "AVX512F", &[F::AVX512F], AVX512),
    hide(L7Ebx, 17, "AVX512DQ", &[F::AVX512DQ], AVX512),
    on(L7Ebx, 18, "RDSEED", Software, &[F::RDSEED]),
    on(L7Ebx, 19, "ADX", Host, &[F::ADX]),
    on(L7Ebx, 20, "SMAP", Software, &[F::SMAP]),
    hide(L7Ebx, 21, "AVX512_IFMA", &[F::AVX512_IFMA], AVX512),
    on(L7Ebx, 23, "CLFLUSHOPT", Software, &[F::CLFLUSHOPT]),
    on(L7Ebx, 24, "CLWB", Software, &[F::CLWB]),
    hide(L7Ebx, 25, "PT", &[], TRACE),
    hide(L7Ebx, 26, "AVX512PF", &[F::AVX512PF], AVX512),
    hide(L7Ebx, 27, "AVX512ER", &[F::AVX512ER], AVX512),
    hide(L7Ebx, 28, "AVX512CD", &[F::AVX512CD], AVX512),
    on(L7Ebx, 29, "SHA", Host, &[F::SHA]),
    hide(L7Ebx, 30, "AVX512BW", &[F::AVX512BW], AVX512),
    hide(L7Ebx, 31, "AVX512VL", &[F::AVX512VL], AVX512),

    hide(L7Ecx, 1, "AVX512_VBMI", &[F::AVX512_VBMI], AVX512),
    on(L7Ecx, 2, "UMIP", Software, &[]),
    hide(L7Ecx, 3, "PKU", &[F::PKU], NO_STATE),
    hide(L7Ecx, 4, "OSPKE", &[], NO_STATE),
    hide(L7Ecx, 5, "WAITPKG", &[F::WAITPKG], MWAIT),
    hide(L7Ecx, 6, "AVX512_VBMI2", &[F::AVX512_VBMI2], AVX512),
    hide(L7Ecx, 7, "CET_SS", &[F::CET_SS], NO_STATE),
    hide(L7Ecx, 8, "GFNI", &[F::GFNI], UNTESTED),
    on(L7Ecx, 9, "VAES", Host, &[F::VAES]),
    on(L7Ecx, 10, "VPCLMULQDQ", Host, &[F::VPCLMULQDQ]),
    hide(L7Ecx, 11, "AVX512_VNNI", &[F::AVX512_VNNI], AVX512),
    hide(L7Ecx, 12, "AVX512_BITALG", &[F::AVX512_BITALG], AVX512),
    hide(L7Ecx, 13, "TME", &[], "memory encryption is the host's affair"),
    hide(L7Ecx, 14, "AVX512_VPOPCNTDQ", &[F::AVX512_VPOPCNTDQ], AVX512),
    hide(L7Ecx, 16, "LA57", &[], "no 5-level paging"),
    on(L7Ecx, 22, "RDPID", Software, &[F::RDPID]),
    hide(L7Ecx, 23, "KL", &[F::KL, F::AESKLE, F::WIDE_KL], NO_STATE),
    hide(L7Ecx, 24, "BUS_LOCK_DETECT", &[], UNTESTED),
    hide(L7Ecx, 25, "CLDEMOTE", &[], "a hint; executes as NOP"),
    hide(L7Ecx, 27, "MOVDIRI", &[F::MOVDIRI], UNTESTED),
    hide(L7Ecx, 28, "MOVDIR64B", &[F::MOVDIR64B], UNTESTED),
    hide(L7Ecx, 29, "ENQCMD", &[F::ENQCMD], NO_STATE),
    hide(L7Ecx, 30, "SGX_LC", &[], NESTED),
    hide(L7Ecx, 31, "PKS", &[], NO_STATE),

    hide(L7Edx, 2, "AVX512_4VNNIW", &[F::AVX512_4VNNIW], AVX512),
    hide(L7Edx, 3, "AVX512_4FMAPS", &[F::AVX512_4FMAPS], AVX512),
    on(L7Edx, 4, "FSRM", Software, &[]),
    hide(L7Edx, 5, "UINTR", &[F::UINTR], NO_STATE),
    hide(L7Edx, 8, "AVX512_VP2INTERSECT", &[F::AVX512_VP2INTERSECT], AVX512),
    hide(L7Edx, 9, "SRBDS_CTRL", &[], SPECULATION),
    hide(L7Edx, 10, "MD_CLEAR", &[], SPECULATION),
    hide(L7Edx, 11, "RTM_ALWAYS_ABORT", &[], TSX),
    hide(L7Edx, 13, "TSX_FORCE_ABORT", &[], TSX),
    hide(L7Edx, 14, "SERIALIZE", &[F::SERIALIZE], UNTESTED),
    hide(L7Edx, 15, "HYBRID", &[], "all processors are alike"),
    hide(L7Edx, 16, "TSXLDTRK", &[F::TSXLDTRK], TSX),
    hide(L7Edx, 18, "PCONFIG", &[F::PCONFIG], NESTED),
    hide(L7Edx, 19, "ARCH_LBR", &[], TRACE),
    hide(L7Edx, 20, "CET_IBT", &[], NO_STATE),
    hide(L7Edx, 22, "AMX-BF16", &[F::AMX_BF16], NO_STATE),
    hide(L7Edx, 23, "AVX512_FP16", &[F::AVX512_FP16], AVX512),
    hide(L7Edx, 24, "AMX-TILE", &[F::AMX_TILE], NO_STATE),
    hide(L7Edx, 25, "AMX-INT8", &[F::AMX_INT8], NO_STATE),
    on(L7Edx, 26, "SPEC_CTRL", Intel, &[]),
    hide(L7Edx, 27, "STIBP", &[], SPECULATION),
    hide(L7Edx, 28, "L1D_FLUSH", &[], SPECULATION),
    on(L7Edx, 29, "ARCH_CAPABILITIES", Software, &[]),
    hide(L7Edx, 30, "CORE_CAPABILITIES", &[], UNTESTED),
    hide(L7Edx, 31, "SSBD", &[], SPECULATION),

    hide(L7s1Eax, 3, "RAO-INT", &[F::RAO_INT], UNTESTED),
    hide(L7s1Eax, 4, "AVX-VNNI", &[F::AVX_VNNI], UNTESTED),
    hide(L7s1Eax, 5, "AVX512_BF16", &[F::AVX512_BF16], AVX512),
    hide(L7s1Eax, 7, "CMPCCXADD", &[F::CMPCCXADD], UNTESTED),
    hide(L7s1Eax, 10, "FZRM", &[], UNTESTED),
    hide(L7s1Eax, 11, "FSRS", &[], UNTESTED),
    hide(L7s1Eax, 12, "FSRC", &[], UNTESTED),
    hide(L7s1Eax, 17, "FRED", &[F::FRED], UNTESTED),
    hide(L7s1Eax, 18, "LKGS", &[F::LKGS], UNTESTED),
    hide(L7s1Eax, 19, "WRMSRNS", &[F::WRMSRNS], UNTESTED),
    hide(L7s1Eax, 21, "AMX-FP16", &[F::AMX_FP16], NO_STATE),
    hide(L7s1Eax, 22, "HRESET", &[F::HRESET], THERMAL),
    hide(L7s1Eax, 23, "AVX-IFMA", &[F::AVX_IFMA], UNTESTED),
    hide(L7s1Eax, 26, "LAM", &[], UNTESTED),
    hide(L7s1Eax, 27, "MSRLIST", &[F::MSRLIST], UNTESTED),

    on(LDs1Eax, 0, "XSAVEOPT", Host, &[F::XSAVEOPT]),
    on(LDs1Eax, 1, "XSAVEC", Host, &[F::XSAVEC]),
    on(LDs1Eax, 2, "XGETBV1", Host, &[]),
    hide(LDs1Eax, 3, "XSAVES", &[F::XSAVES], "there is no supervisor state to save"),
    hide(LDs1Eax, 4, "XFD", &[], NO_STATE),

    on(X1Ecx, 0, "LAHF/SAHF", Software, &[]),
    on(X1Ecx, 1, "CmpLegacy", AmdSmp, &[]),
    hide(X1Ecx, 2, "SVM", &[F::SVM, F::SKINIT_or_SVM], NESTED),
    hide(X1Ecx, 3, "ExtApicSpace", &[], UNTESTED),
    on(X1Ecx, 4, "AltMovCr8", Amd, &[]),
    on(X1Ecx, 5, "LZCNT", Host, &[F::LZCNT]),
    on(X1Ecx, 6, "SSE4A", Host, &[F::SSE4A]),
    hide(X1Ecx, 7, "MisAlignSse", &[], "MXCSR.MM can't be set"),
    on(X1Ecx, 8, "PREFETCHW", Software, &[F::PREFETCHW]),
    hide(X1Ecx, 9, "OSVW", &[], "no processor errata are passed on"),
    hide(X1Ecx, 10, "IBS", &[], PERFMON),
    hide(X1Ecx, 11, "XOP", &[F::XOP], OBSOLETE),
    hide(X1Ecx, 12, "SKINIT", &[F::SKINIT], NESTED),
    hide(X1Ecx, 13, "WDT", &[], UNTESTED),
    hide(X1Ecx, 15, "LWP", &[F::LWP], OBSOLETE),
    hide(X1Ecx, 16, "FMA4", &[F::FMA4], OBSOLETE),
    hide(X1Ecx, 17, "TCE", &[], UNTESTED),
    hide(X1Ecx, 19, "NodeId", &[], UNTESTED),
    hide(X1Ecx, 21, "TBM", &[F::TBM], OBSOLETE),
    on(X1Ecx, 22, "TopologyExtensions", Amd, &[]),
    hide(X1Ecx, 23, "PerfCtrExtCore", &[], PERFMON),
    hide(X1Ecx, 24, "PerfCtrExtNB", &[], PERFMON),
    hide(X1Ecx, 26, "DataBkptExt", &[], UNTESTED),
    hide(X1Ecx, 27, "PerfTsc", &[], PERFMON),
    hide(X1Ecx, 28, "PerfCtrExtLLC", &[], PERFMON),
    hide(X1Ecx, 29, "MONITORX", &[F::MONITORX], MWAIT),
    hide(X1Ecx, 30, "AddrMaskExt", &[], UNTESTED),

    on(X1Edx, 0, "FPU", Amd, &[]),
    hide(X1Edx, 1, "VME", &[], "virtual-8086 mode has no virtual interrupt flag"),
    on(X1Edx, 2, "DE", Amd, &[]),
    on(X1Edx, 3, "PSE", Amd, &[]),
    on(X1Edx, 4, "TSC", Amd, &[]),
    on(X1Edx, 5, "MSR", Amd, &[]),
    on(X1Edx, 6, "PAE", Amd, &[]),
    on(X1Edx, 7, "MCE", Amd, &[]),
    on(X1Edx, 8, "CMPXCHG8B", Amd, &[]),
    on(X1Edx, 9, "APIC", Dynamic, &[]),
    on(X1Edx, 11, "SYSCALL", Always, &[F::SYSCALL]),
    on(X1Edx, 12, "MTRR", Amd, &[]),
    on(X1Edx, 13, "PGE", Amd, &[]),
    on(X1Edx, 14, "MCA", Amd, &[]),
    on(X1Edx, 15, "CMOV", Amd, &[]),
    on(X1Edx, 16, "PAT", Amd, &[]),
    on(X1Edx, 17, "PSE-36", Amd, &[]),
    on(X1Edx, 20, "NX", Always, &[]),
    on(X1Edx, 22, "MmxExt", Host, &[]),
    on(X1Edx, 23, "MMX", Amd, &[]),
    on(X1Edx, 24, "FXSR", Amd, &[]),
    hide(X1Edx, 25, "FFXSR", &[], "FXSAVE always saves the XMM registers"),
    on(X1Edx, 26, "Page1GB", Software, &[]),
    on(X1Edx, 27, "RDTSCP", Software, &[F::RDTSCP]),
    on(X1Edx, 29, "LM", Always, &[]),
    hide(X1Edx, 30, "3DNowExt", &[F::D3NOWEXT], OBSOLETE),
    hide(X1Edx, 31, "3DNow", &[F::D3NOW], OBSOLETE),

    hide(X7Edx, 0, "TS", &[], THERMAL),
    hide(X7Edx, 3, "TTP", &[], THERMAL),
    hide(X7Edx, 4, "TM", &[], THERMAL),
    hide(X7Edx, 7, "HwPstate", &[], THERMAL),
    on(X7Edx, 8, "TscInvariant", Host, &[]),
    hide(X7Edx, 9, "CPB", &[], THERMAL),
    hide(X7Edx, 10, "EffFreqRO", &[], PERFMON),
    hide(X7Edx, 12, "ProcPowerReporting", &[], THERMAL),
    hide(X7Edx, 14, "RAPL", &[], THERMAL),

    on(X8Ebx, 0, "CLZERO", AmdSoftware, &[F::CLZERO]),
    hide(X8Ebx, 1, "InstRetCntMsr", &[], PERFMON),
    on(X8Ebx, 2, "RstrFpErrPtrs", Host, &[]),
    hide(X8Ebx, 3, "INVLPGB", &[F::INVLPGB], UNTESTED),
    hide(X8Ebx, 4, "RDPRU", &[F::RDPRU], PERFMON),
    hide(X8Ebx, 6, "MBE", &[], RESOURCES),
    hide(X8Ebx, 8, "MCOMMIT", &[F::MCOMMIT], UNTESTED),
    on(X8Ebx, 9, "WBNOINVD", Software, &[F::WBNOINVD]),
    hide(X8Ebx, 12, "IBPB", &[], SPECULATION),
    hide(X8Ebx, 13, "INT_WBINVD", &[], UNTESTED),
    on(X8Ebx, 14, "IBRS", AmdSoftware, &[]),
    hide(X8Ebx, 15, "STIBP", &[], SPECULATION),
    hide(X8Ebx, 16, "IbrsAlwaysOn", &[], SPECULATION),
    hide(X8Ebx, 17, "StibpAlwaysOn", &[], SPECULATION),
    hide(X8Ebx, 18, "IbrsPreferred", &[], SPECULATION),
    hide(X8Ebx, 19, "IbrsSameMode", &[], SPECULATION),
    hide(X8Ebx, 20, "EferLmsleUnsupported", &[], UNTESTED),
    hide(X8Ebx, 21, "INVLPGBnestedPages", &[], UNTESTED),
    hide(X8Ebx, 23, "PPIN", &[], "the serial number of the host's processor is not passed on"),
    hide(X8Ebx, 24, "SSBD", &[], SPECULATION),
    hide(X8Ebx, 25, "SsbdVirtSpecCtrl", &[], SPECULATION),
    on(X8Ebx, 26, "SsbdNotRequired", AmdSoftware, &[]),
    hide(X8Ebx, 27, "CPPC", &[], THERMAL),
    hide(X8Ebx, 28, "PSFD", &[], SPECULATION),
    on(X8Ebx, 29, "BTC_NO", AmdSoftware, &[]),
    hide(X8Ebx, 30, "IBPB_RET", &[], SPECULATION),

    on(X21Eax, 0, "NoNestedDataBp", AmdSoftware, &[]),
    hide(X21Eax, 1, "FsGsKernelGsBaseNonSerializing", &[], UNTESTED),
    on(X21Eax, 2, "LFenceAlwaysSerializing", AmdSoftware, &[]),
    hide(X21Eax, 3, "SmmPgCfgLock", &[], SMM),
    hide(X21Eax, 5, "VerwClear", &[], SPECULATION),
    on(X21Eax, 6, "NullSelectClearsBase", AmdSoftware, &[]),
    hide(X21Eax, 7, "UpperAddressIgnore", &[], UNTESTED),
    on(X21Eax, 8, "AutomaticIBRS", AmdSoftware, &[]),
    on(X21Eax, 9, "NoSmmCtlMSR", Amd, &[]),
    hide(X21Eax, 10, "FSRS", &[], UNTESTED),
    hide(X21Eax, 11, "FSRC", &[], UNTESTED),
    hide(X21Eax, 13, "PrefetchCtlMsr", &[], RESOURCES),
    hide(X21Eax, 17, "CpuidUserDis", &[], UNTESTED),
    hide(X21Eax, 18, "EPSF", &[], SPECULATION),
    hide(X21Eax, 27, "SBPB", &[], SPECULATION),
    hide(X21Eax, 28, "IBPB_BRTYPE", &[], SPECULATION),
    on(X21Eax, 29, "SRSO_NO", AmdSoftware, &[]),
    on(X21Eax, 30, "SRSO_USER_KERNEL_NO", AmdSoftware, &[]),

    on(X21Ecx, 1, "TSA_SQ_NO", AmdSoftware, &[]),
    on(X21Ecx, 2, "TSA_L1_NO", AmdSoftware, &[]),
];
