//! Reports: the sequences, the state before, and what differs.

use std::fmt::Write;

use iced_x86::{Decoder, Formatter, IntelFormatter};

use super::code::{Assembled, Item};
use super::layout::Input;
use super::trial::Trial;
use crate::compare::{NAMES, PARTS, flag_names, hex};

/// The sequences: addresses, bytes and disassembly, as they stood before the first run.
pub fn listing(trial: &Trial, assembled: &Assembled, options: u32) -> String {
    let mut text = String::new();
    for (number, item) in trial.items.iter().enumerate() {
        if trial.entries.contains(&number) {
            let _ = writeln!(text, "  sequence {}:", trial.entries.iter().filter(|&&e| e < number).count());
        }
        if !matches!(item, Item::Instruction { .. }) {
            continue;
        }
        let (start, end) = (assembled.places[number], assembled.places[number + 1]);
        let Some(bytes) = assembled.code.get(start..end) else { continue };
        let address = assembled.address(number);
        let instruction = Decoder::with_ip(64, bytes, address, options).decode();
        let mut line = String::new();
        IntelFormatter::new().format(&instruction, &mut line);
        let bytes = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
        let _ = writeln!(text, "    {address:#x}  {bytes:<32} {line}");
    }
    text
}

/// The state before a run; of the vector registers those that `listing` names.
fn state_before(input: &Input, listing: &str) -> String {
    let mut text = String::new();
    for (i, name) in NAMES.iter().enumerate() {
        let end = if i % 4 == 3 { "\n" } else { " " };
        let _ = write!(text, "  {name:>3} {:016x}{end}", input.gpr[i]);
    }
    let named = |name: &str| {
        let number = name.split(' ').next().unwrap_or(name);
        let number = number.trim_start_matches(|c: char| !c.is_ascii_digit());
        match &name[..1] {
            "x" | "y" => listing.contains(&format!("mm{number}")),
            "s" => listing.contains("    f") || listing.contains(" f"),
            _ => matches!(name, "fcw" | "fsw" | "ftw" | "mxcsr"),
        }
    };
    for (name, at, size) in PARTS.iter().filter(|(name, ..)| named(name)) {
        let _ = writeln!(text, "  {name:>10} {}", hex(&input.xsave[*at..at + size]));
    }
    text
}

/// All about a difference in a run of a trial.
pub fn report(
    trial: &Trial,
    assembled: &Assembled,
    options: u32,
    run: usize,
    input: &Input,
    lines: &[String],
) -> String {
    let mut text = listing(trial, assembled, options);
    let entries = trial.runs.iter().take(run + 1).map(|(entry, _)| entry.to_string());
    let _ = writeln!(
        text,
        "  runs of sequences {}; the last of them differs",
        entries.collect::<Vec<_>>().join(", ")
    );
    let _ =
        writeln!(text, "  from {:#x}, image {}, rflags {}", input.rip, input.image, flag_names(input.rflags));
    let control = input.control.iter().map(|word| format!("{word:x}")).collect::<Vec<_>>().join(" ");
    let _ = writeln!(text, "  fuel and pointers {control}");
    text += &state_before(input, &text);
    for line in lines {
        let _ = writeln!(text, "{line}");
    }
    text
}
