//! A guest that tries to get out, or at least to take its machine down: wild accesses to ports, memory and
//! registers, tables full of junk, storms of faults and interrupts, code from where no code is. It comes back from
//! each by its own handlers and says what it saw; nothing of it may end the machine monitor.
#![no_std]
#![no_main]

mod code;
mod descriptors;
mod devices;
mod gates;
mod ports;
mod registers;
mod storms;
mod strings;
mod tables;
mod tools;
mod vectors;

use kit::{Suite, apic, cpu, memory};

/// The name before a stage's checks, and the stage.
type Stage = (&'static str, fn(&mut Suite));

const STAGES: [Stage; 10] = [
    ("ports: ", ports::all),
    ("devices: ", devices::all),
    ("page tables: ", tables::all),
    ("gates: ", gates::all),
    ("descriptors: ", descriptors::all),
    ("registers: ", registers::all),
    ("strings: ", strings::all),
    ("code: ", code::all),
    ("storms: ", storms::all),
    ("vectors: ", vectors::all),
];

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let mut suite = Suite::new("escape");
    let s = &mut suite;
    apic::init();
    for (name, stage) in STAGES {
        s.group(name);
        stage(s);
        cpu::write_cr3(memory::boot_root());
        apic::init();
    }
    s.group("");
    suite.power_off()
}
