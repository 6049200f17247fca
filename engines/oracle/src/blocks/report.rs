//! Reports: the sequences, the state before, and what differs.

use std::fmt::Write;

use iced_x86::{Formatter, IntelFormatter};

use super::code::{Assembled, FILLER, Item};
use super::layout::{CONTROL, Input};
use super::trial::Trial;
use crate::compare::{NAMES, PARTS, flag_names, hex};
use bivisor_x86::state::XsaveArea;

/// The sequences: addresses, bytes and disassembly, as they stood before the first run.
pub fn listing(trial: &Trial, assembled: &Assembled) -> String {
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
        let instruction = trial.mode.decoder(bytes, address).decode();
        let mut line = String::new();
        IntelFormatter::new().format(&instruction, &mut line);
        let bytes = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
        let _ = writeln!(text, "    {address:#x}  {bytes:<32} {line}");
    }
    text
}

/// The state before a run: what is not zero, and not as after FNINIT.
fn state_before(input: &Input) -> String {
    let mut words: Vec<String> = Vec::new();
    let registers = NAMES.iter().zip(input.gpr).filter(|(_, value)| *value != 0);
    words.extend(registers.map(|(name, value)| format!("{name} {value:#x}")));
    let control = input.control.iter().enumerate().filter(|(_, word)| **word != 0);
    words.extend(control.map(|(i, word)| format!("[{:#x}] {word:#x}", CONTROL + 8 * i as u64)));
    let reset = XsaveArea::default().bytes;
    for (name, at, size) in PARTS.iter() {
        let bytes = &input.xsave[*at..at + size];
        if *bytes != reset[*at..at + size] {
            words.push(format!("{name} {}", hex(bytes)));
        }
    }
    let mut text = String::new();
    let mut width = 0;
    for word in words {
        let start = if width == 0 || width + word.len() > 110 { "\n  " } else { ", " };
        width = if start == ", " { width + word.len() + 2 } else { word.len() };
        text += start;
        text += &word;
    }
    text + "\n"
}

/// What a difference is about: the last instruction of the sequences, and what differs.
pub fn title(trial: &Trial, lines: &[String]) -> String {
    let last = trial.items.iter().rev().find_map(|item| match item {
        Item::Instruction { bytes, .. } if bytes[..] != [FILLER] => Some(bytes),
        _ => None,
    });
    let mnemonic = |bytes: &Vec<u8>| format!("{:?}", trial.mode.decoder(bytes, 0).decode().mnemonic());
    let mnemonic = last.map_or_else(String::new, mnemonic);
    let differs = lines.iter().filter_map(|line| line.trim_start().split("  ").next());
    let differs: Vec<&str> =
        differs.map(|name| if name.starts_with('[') { "memory" } else { name }).collect();
    format!("{mnemonic}: {}", differs.first().unwrap_or(&""))
}

/// All about a difference in a run of a trial.
pub fn report(trial: &Trial, assembled: &Assembled, run: usize, input: &Input, lines: &[String]) -> String {
    let mut text = listing(trial, assembled);
    let entries: Vec<String> = trial.runs.iter().take(run + 1).map(|(entry, _)| entry.to_string()).collect();
    let _ = writeln!(text, "  runs of sequences {}; the last of them differs", entries.join(", "));
    if input.privileged != 0 {
        let mode = if input.supervisor != 0 { "supervisor" } else { "user" };
        let [cr0, cr4, lstar] = input.system;
        let _ = writeln!(text, "  in {mode} mode, CR0 {cr0:#x}, CR4 {cr4:#x}, LSTAR {lstar:#x}");
    }
    if trial.mode.is_32bit {
        let _ = writeln!(text, "  as 32-bit code");
    }
    if trial.hot {
        let _ = writeln!(text, "  as hot code");
    }
    let flags = flag_names(input.rflags);
    let _ = write!(text, "  from {:#x}, image {}, rflags {flags}", input.rip, input.image);
    text += &state_before(input);
    for line in lines {
        let _ = writeln!(text, "{line}");
    }
    text
}
