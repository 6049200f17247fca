//! Exceptions: what a guest instruction may raise (SDM Vol. 3A, chapter 6; APM Vol. 2, chapter 8).

/// A fault, trap or abort raised by a guest instruction, before it is delivered through the IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector number, 0 to 31.
    pub vector: u8,
    /// Error code for the vectors that push one.
    pub error_code: Option<u32>,
    /// For #PF: the linear address that goes to CR2.
    pub cr2: u64,
}

/// Exception vectors by name.
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

impl Exception {
    /// An exception without an error code.
    pub const fn new(vector: u8) -> Self {
        Self { vector, error_code: None, cr2: 0 }
    }
    /// An exception with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self { vector, error_code: Some(code), cr2: 0 }
    }
    /// #DE, divide error.
    pub const DE: Self = Self::new(vector::DE);
    /// #DB, debug; the caller has set DR6.
    pub const DB: Self = Self::new(vector::DB);
    /// #UD, invalid opcode.
    pub const UD: Self = Self::new(vector::UD);
    /// #NM, device not available.
    pub const NM: Self = Self::new(vector::NM);
    /// #MF, x87 floating-point error.
    pub const MF: Self = Self::new(vector::MF);
    /// #XM, SIMD floating-point exception.
    pub const XM: Self = Self::new(vector::XM);
    /// #GP(0), general protection without a selector.
    pub const GP0: Self = Self::with_code(vector::GP, 0);
    /// #SS(0), stack fault without a selector.
    pub const SS0: Self = Self::with_code(vector::SS, 0);
    /// #AC(0), alignment check.
    pub const AC0: Self = Self::with_code(vector::AC, 0);

    /// #GP with a selector (its RPL bits are cleared) or another error code.
    pub const fn gp(code: u32) -> Self {
        Self::with_code(vector::GP, code)
    }
    /// An exception whose error code is a selector: #TS, #NP, #SS or #GP.
    pub const fn selector(vector: u8, selector: u16) -> Self {
        Self::with_code(vector, selector as u32 & 0xfffc)
    }
    /// #PF at a linear address with the given page-fault error code.
    pub const fn page_fault(linear: u64, code: u32) -> Self {
        Self { vector: vector::PF, error_code: Some(code), cr2: linear }
    }
}
