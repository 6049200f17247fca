//! What kind of code is tried: 64-bit code, or 32-bit code in compatibility mode.

use bivisor_x86::cpuid::{CpuModel, Vendor};
use iced_x86::{Decoder, DecoderOptions};

use crate::layout::{USER_CS, USER_CS_32BIT};

/// How code is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// The code is 32-bit code.
    pub is_32bit: bool,
    /// Decoder options of the processor's vendor.
    pub options: u32,
}

impl Mode {
    /// For a CPU model.
    pub fn new(model: &CpuModel, is_32bit: bool) -> Self {
        let options = if model.vendor == Vendor::Amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
        Self { is_32bit, options }
    }

    /// Bits of operands and addresses.
    pub fn bits(self) -> u32 {
        if self.is_32bit { 32 } else { 64 }
    }

    /// A decoder for code at a linear address.
    pub fn decoder(self, bytes: &[u8], address: u64) -> Decoder<'_> {
        Decoder::with_ip(self.bits(), bytes, address, self.options)
    }

    /// The code segment of user mode.
    pub fn user_cs(self) -> u16 {
        if self.is_32bit { USER_CS_32BIT } else { USER_CS }
    }
}
