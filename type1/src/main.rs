//! The image: the way from a boot loader to [`bivisor_metal::run`], and what Rust code needs on the bare machine.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

mod entry;

use core::panic::PanicInfo;

use bivisor_metal::memory::heap::Heap;

#[global_allocator]
static HEAP: Heap = Heap::new();

unsafe extern "C" {
    static image_start: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
}

/// Everything after the first instructions: `information` is what the loader left, by this protocol.
extern "C" fn start(information: u64, protocol: u32) -> ! {
    let address = |symbol: *const u8| symbol as u64;
    let image = bivisor_metal::memory::Image {
        start: address(&raw const image_start),
        text_end: address(&raw const text_end),
        rodata_end: address(&raw const rodata_end),
        end: address(&raw const image_end),
    };
    // SAFETY: the entry code comes here once, with the address that the loader left, on a processor that nobody else
    // uses, with 4 GiB mapped as they are and interrupts off. The image's bounds are the linker's.
    unsafe { bivisor_metal::run(protocol, information, &image, &HEAP) }
}

/// Precompiled `core` names it in its unwind tables; with panic = "abort" nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Precompiled `alloc` calls it behind landing pads, which with panic = "abort" nothing reaches.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    unreachable!("nothing unwinds")
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    bivisor_metal::ending::panic(info)
}
