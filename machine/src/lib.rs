//! The virtual machine that a guest sees, the same on every hypervisor and every engine: memory map, devices,
//! firmware tables, boot protocols. The *host* ([`host`]) gives memory, time and byte streams; the *engine*
//! ([`engine`]) executes guest instructions.
#![no_std]

extern crate alloc;

pub mod acpi;
pub mod block;
pub mod boot;
pub mod bus;
pub mod device;
pub mod devices;
pub mod dma;
pub mod engine;
pub mod exits;
pub mod firmware;
pub mod host;
pub mod irq;
pub mod lifecycle;
pub mod machine;
pub mod map;
pub mod memory;
pub mod net_switch;
pub mod packet;
pub mod pc;
pub mod pv;
pub mod sync;
pub mod timer;
pub mod vcpu_bus;
pub mod virtio;
