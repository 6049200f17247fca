//! Every exception that code can bring about, with its error code and the RIP it reports.
#![no_std]
#![no_main]

use kit::{Suite, trap::vector, trapping};

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let mut suite = Suite::new("exceptions");
    let s = &mut suite;
    s.trap("#UD by UD2", trapping!(=> "ud2"), vector::UD, 0, "at");
    suite.finish()
}
