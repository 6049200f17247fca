//! Keeps `docs/instructions.md` true: it is made here from the CPU model and from what the interpreter executes. With
//! `BLESS=1` in the environment this test writes the file anew instead of comparing.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use bivisor_x86::cpuid::{CpuModel, FEATURES, Feature, Policy, REFERENCE_HOST, Word};
use iced_x86::{Code, Instruction};

/// More mnemonics than these are counted, not listed.
const LISTED: usize = 12;

const HEAD: &str = "\
# Instructions and features that a guest does not get

What a guest's CPUID offers comes from the CPU model `bivisor-v3`: the host's processor without the features below.
An instruction of a feature that is not offered raises #UD, as it does on a processor that lacks it, and so do the
EVEX-encoded forms of AVX instructions that are not listed here by name.

This file is made by a test from the model and the interpreter. To renew it:
`BLESS=1 cargo test -p bivisor-x86 --test instructions_table`.
";

const TAIL: &str = "
## Offered, but not executed

None: `x86/src/interp/coverage_tests.rs` tries every opcode and fails if an instruction that the model offers raises #UD
in the interpreter.

## Offered, and different

- RDPMC reads zero: AMD's four oldest performance counters are there, but never count. For an Intel processor it
  raises #GP(0).
- VMCALL and VMMCALL are hypercalls, whatever the vendor; where the machine offers no paravirtual interface
  they raise #UD.
- RSM raises #UD: there is no system management mode to return from.
- SYSENTER and SYSEXIT raise #UD in long mode, and SYSCALL and SYSRET outside of 64-bit mode, where the host's vendor has it so.
";

fn host_has(feature: &Feature) -> bool {
    let (function, index, register) = feature.word.place();
    REFERENCE_HOST
        .iter()
        .find(|leaf| leaf.function == function && leaf.index.unwrap_or(0) == index)
        .is_some_and(|leaf| leaf.registers[register] >> feature.bit & 1 != 0)
}

/// Mnemonics of the feature's instructions, without those that have an offered form.
fn mnemonics(feature: &Feature, offered: &BTreeSet<String>) -> BTreeSet<String> {
    Code::values()
        .filter(|code| code.cpuid_features().iter().any(|set| feature.instructions.contains(set)))
        .map(mnemonic)
        .filter(|name| !offered.contains(name))
        .collect()
}

fn mnemonic(code: Code) -> String {
    format!("{:?}", code.mnemonic()).to_uppercase()
}

/// Mnemonics of which the model offers at least one form.
fn offered(model: &CpuModel) -> BTreeSet<String> {
    let offers = |code: &Code| {
        let mut instruction = Instruction::new();
        instruction.set_code(*code);
        model.offers_instruction(&instruction)
    };
    Code::values().filter(offers).map(mnemonic).collect()
}

fn cpuid_place(feature: &Feature) -> String {
    let (function, index, register) = feature.word.place();
    let register = ["EAX", "EBX", "ECX", "EDX"][register];
    let index = if index == 0 { String::new() } else { format!(".{index}") };
    format!("{function:X}h{index} {register}[{}]", feature.bit)
}

fn row(out: &mut String, feature: &Feature, why: &str, offered: &BTreeSet<String>) {
    let names = mnemonics(feature, offered);
    let list = match names.len() {
        0 => "—".to_owned(),
        count if count > LISTED => {
            let first: Vec<_> = names.into_iter().take(LISTED).collect();
            format!("{} … ({count} in all)", first.join(" "))
        }
        _ => names.into_iter().collect::<Vec<_>>().join(" "),
    };
    writeln!(out, "| {} | {} | {list} | {why} |", feature.name, cpuid_place(feature)).unwrap();
}

fn features_table(out: &mut String, choose: impl Fn(&Feature) -> bool) {
    let offered = offered(&CpuModel::reference(1));
    out.push_str("\n| feature | CPUID | instructions that raise #UD | why |\n|---|---|---|---|\n");
    for feature in FEATURES.iter().filter(|feature| choose(feature)) {
        if let Policy::Hidden(why) = feature.policy {
            row(out, feature, why, &offered);
        }
    }
}

/// Bits that the recorded host shows and the manuals' list here does not know.
fn unknown_bits() -> Vec<String> {
    let mut unknown = Vec::new();
    for word in Word::ALL {
        for bit in 0..32 {
            let probe = Feature { word, bit, name: "?", policy: Policy::Always, instructions: &[] };
            let known = FEATURES.iter().any(|feature| (feature.word, feature.bit) == (word, bit));
            if host_has(&probe) && !known {
                unknown.push(cpuid_place(&probe));
            }
        }
    }
    unknown
}

fn document() -> String {
    let mut out = String::from(HEAD);
    out.push_str(
        "\n## Hidden on the recorded host\n\nThe host is an AMD EPYC (Zen 3, family 19h) as a cloud offers it; \
         its CPUID is recorded in\n`x86/src/cpuid/reference.rs`. It has these, and a guest on it does not:\n",
    );
    features_table(&mut out, host_has);
    out.push_str("\n## Hidden on hosts that have them\n\nWhat other processors have besides, and their guests do not:\n");
    features_table(&mut out, |feature| !host_has(feature) && !feature.instructions.is_empty());
    out.push_str(TAIL);
    out
}

#[test]
fn the_table_is_fresh() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/instructions.md");
    let fresh = document();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, fresh).unwrap();
        return;
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(kept, fresh, "docs/instructions.md is stale: run this test with BLESS=1");
}

#[test]
fn every_bit_of_the_recorded_host_is_listed() {
    assert_eq!(unknown_bits(), Vec::<String>::new());
}

#[test]
fn hidden_instructions_are_not_offered() {
    let model = CpuModel::reference(1);
    for feature in FEATURES.iter().filter(|feature| matches!(feature.policy, Policy::Hidden(_))) {
        for &set in feature.instructions {
            assert!(!model.offers(set), "{}: {set:?}", feature.name);
        }
    }
}
