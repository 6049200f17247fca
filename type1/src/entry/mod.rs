//! The first instructions, one file for each way in, and what compiled code needs of an assembler.

mod bios;
mod efi;
mod loaders;
mod long;
mod memory;
