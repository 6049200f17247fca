//! The default guest: says what machine it sees, and answers a few commands on the serial port.
#![no_std]
#![no_main]

use kit::{acpi, cpu, machine, memory::read, print, println, serial, start::START_INFO, time};

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    println!("Hello from a guest of Bivisor.");
    info();
    println!("Commands: help, info, poweroff, reboot.");
    let mut line = [0u8; 64];
    loop {
        print!("> ");
        match read_line(&mut line) {
            "" => {}
            "help" => println!("help: this list; info: the machine; poweroff; reboot"),
            "info" => info(),
            "poweroff" => {
                println!("Goodbye.");
                machine::power_off()
            }
            "reboot" => machine::reset(),
            other => println!("unknown command: {other}; try help"),
        }
    }
}

/// Reads a line with echo; what does not fit is dropped.
fn read_line(line: &mut [u8; 64]) -> &str {
    let mut length = 0;
    loop {
        let byte = match serial::get() {
            Some(byte) => byte,
            None => {
                core::hint::spin_loop();
                continue;
            }
        };
        match byte {
            b'\r' | b'\n' => break,
            8 | 127 if length > 0 => {
                length -= 1;
                print!("\x08 \x08");
            }
            b' '..=b'~' if length < line.len() => {
                line[length] = byte;
                length += 1;
                serial::put(byte);
            }
            _ => {}
        }
    }
    println!();
    core::str::from_utf8(&line[..length]).unwrap_or_default().trim()
}

fn info() {
    let mut brand = [0u8; 48];
    let words = (0x8000_0002u32..=0x8000_0004).flat_map(|leaf| {
        let id = cpu::cpuid(leaf, 0);
        [id.eax, id.ebx, id.ecx, id.edx]
    });
    if cpu::cpuid(0x8000_0000, 0).eax >= 0x8000_0004 {
        for (bytes, word) in brand.chunks_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    println!("CPU:     {} {}", vendor(0), text(&brand));
    let id = cpu::cpuid(1, 0);
    println!("         signature {:#x}, AVX {}, x2APIC {}", id.eax, id.ecx >> 28 & 1, id.ecx >> 21 & 1);
    if id.ecx >> 31 == 1 {
        println!("Host:    {}", vendor(0x4000_0000));
    }
    memory_map();
    tables();
    println!("Ticks:   {} per millisecond", time::ticks_per_ms());
}

struct Vendor([u8; 12]);

impl core::fmt::Display for Vendor {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(text(&self.0))
    }
}

fn vendor(leaf: u32) -> Vendor {
    let id = cpu::cpuid(leaf, 0);
    // Leaf 0 spells the name in EBX, EDX, ECX, the hypervisor's leaf in EBX, ECX, EDX.
    let words = if leaf == 0 { [id.ebx, id.edx, id.ecx] } else { [id.ebx, id.ecx, id.edx] };
    let mut name = [0; 12];
    for (bytes, word) in name.chunks_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Vendor(name)
}

fn text(bytes: &[u8]) -> &str {
    core::str::from_utf8(bytes).unwrap_or("?").trim_matches(['\0', ' '])
}

/// Prints the memory map of `hvm_start_info` version 1: its address at offset 40, its length at 48.
fn memory_map() {
    let info = u64::from(START_INFO.get());
    if info == 0 || read::<u32>(info) != 0x336e_c578 || read::<u32>(info + 4) < 1 {
        return println!("Memory:  no map from the loader");
    }
    let (map, entries): (u64, u32) = (read(info + 40), read(info + 48));
    const RAM: u32 = 1;
    let ram = (0..u64::from(entries)).map(|index| map + index * 24).filter(|at| read::<u32>(at + 16) == RAM);
    for at in ram {
        let (base, size): (u64, u64) = (read(at), read(at + 8));
        println!("Memory:  {:#010x} to {:#010x}, {} KiB", base, base.wrapping_add(size), size >> 10);
    }
}

fn tables() {
    let Some(tables) = acpi::find() else { return println!("ACPI:    none") };
    print!("ACPI:   ");
    for table in tables.iter() {
        print!(" {}", text(&acpi::signature(table)));
    }
    println!();
}
