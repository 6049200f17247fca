//! Bivisor on the bare machine, the lowest program there is: boots, takes the memory, and runs the virtual machines that
//! came with it on the hardware's own virtualization (`bivisor-hvm`). The machines are those of `bivisor-machine`, as on Linux.
//!
//! This library is everything but the first instructions (`main.rs`). What needs no bare machine is tested on Linux.
#![no_std]

extern crate alloc;

mod acpi;
pub mod boot;
pub mod bundle;
pub mod console;
mod disk;
pub mod ending;
mod host;
mod list;
pub mod memory;
mod net;
mod processor;
mod scheduler;
mod time;
mod turns;
mod vm;

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::AtomicU64;

use bivisor_machine::host::Clock;

use acpi::SoftOff;
use boot::BootInfo;
use bundle::Bundle;
use console::println;
use memory::Image;
use memory::heap::Heap;
use net::Switches;
use processor::Processor;
use scheduler::Scheduler;
use vm::Host;

/// Runs everything: from the loader's last instruction to the end of the last virtual machine. `information` is what the
/// loader left, by the boot protocol of this number.
///
/// # Safety
/// Called once, at privilege level 0 in 64-bit mode, on the only running processor, with the first 4 GiB mapped as they are,
/// interrupts disabled, and `image` telling where this program is. `heap` is the global allocator, still empty.
#[allow(unsafe_code)]
pub unsafe fn run(protocol: u32, information: u64, image: &Image, heap: &Heap) -> ! {
    console::serial::set_up();
    // SAFETY: the caller's promises, in this order: the machine is ours, the information is the loader's.
    let (info, processor) = unsafe {
        let info = match BootInfo::read(&boot::Identity, protocol, information) {
            Ok(info) => info,
            Err(error) => ending::give_up(format_args!("the loader's information can't be used: {error}")),
        };
        ending::set_options(info.command_line());
        if let Err(error) = memory::take_over(&info, image, heap) {
            ending::give_up(format_args!("{error}"));
        }
        ending::set_soft_off(info.acpi().and_then(|root| SoftOff::find(&boot::Identity, root)));
        (info, Processor::take_over())
    };
    println!(
        "bivisor: {} MiB of memory, time-stamp counter at {} MHz",
        info.usable_memory() >> 20,
        processor.clock.tsc_hz() / 1_000_000
    );
    match start(&info, processor) {
        Ok(mut scheduler) => scheduler.run(),
        Err(error) => ending::give_up(format_args!("{error}")),
    }
    println!("bivisor: no virtual machine runs any more");
    ending::power_off()
}

/// Why nothing can be run.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(
        "the loader gave no module: it has to give the virtual machines, as `bivisor metal bundle` packs them"
    )]
    NoModule,
    #[error("the module with the virtual machines can't be used: {0}")]
    Bundle(#[from] bundle::BundleError),
    #[error(transparent)]
    Engine(#[from] bivisor_machine::engine::EngineError),
    #[error("{name}: {error}")]
    Vm { name: alloc::string::String, error: vm::VmError },
}

/// Makes the virtual machines.
fn start(info: &BootInfo, processor: Processor) -> Result<Scheduler, StartError> {
    let module = info.modules().first().ok_or(StartError::NoModule)?;
    let bundle = Bundle::parse(memory::module(module))?;
    ending::set_options(&bundle.command_line);
    let hardware = processor.enable_virtualization()?;
    println!("bivisor: guests run on {}", hardware.name());
    let host = Arc::new_cyclic(|host: &Weak<Host>| {
        let (clock, host) = (processor.clock.clone(), host.clone());
        // The timer ends the guest's run, and the scheduler delivers.
        let wake = move || host.upgrade().into_iter().for_each(|host| host.processor.arm_by(0));
        let switches = Switches::new(clock, Arc::new(wake));
        Host { switches, processor, hardware, running: AtomicU64::new(0) }
    });
    let alone = bundle.machines.len() == 1;
    let console = Arc::new(console::Console::new(alone));
    let mut machines = Vec::new();
    for config in &bundle.machines {
        let vm = vm::Vm::new(config, &host, console.add(&config.name))
            .map_err(|error| StartError::Vm { name: config.name.clone(), error })?;
        machines.push(vm);
    }
    Ok(Scheduler::new(host, console, machines))
}
