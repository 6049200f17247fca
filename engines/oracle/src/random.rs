//! Random numbers that a seed repeats, and values that are interesting to arithmetic.

/// A small fast generator (xorshift64*).
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Self {
        // One step of SplitMix64, so that similar seeds differ and none is zero.
        let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Self((mixed ^ mixed >> 27) | 1)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// 0 to `limit` - 1.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.bits() >> 32) * limit >> 32
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer, small, at a limit of some size, or random.
    pub fn integer(&mut self) -> u64 {
        let size = self.pick(&[8u32, 16, 32, 64]);
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << (size - 1),
            3 => (1 << (size - 1)) - 1,
            4 => self.below(70),
            5 => self.below(70).wrapping_neg(),
            6 => self.bits() >> (64 - size),
            _ => self.bits(),
        }
    }

    /// The bits of a single-precision number.
    pub fn single(&mut self) -> u32 {
        let sign = (self.bits() as u32) & 0x8000_0000;
        let fraction = self.bits() as u32 & 0x007f_ffff;
        sign | match self.below(14) {
            0 => 0,
            1 => 0x7f80_0000,
            2 => 0x7fc0_0000 | fraction,
            3 => 0x7f80_0000 | fraction & 0x003f_ffff | 1,
            4 => fraction,
            5 => 1 << self.below(23),
            6 => 0x7f7f_ffff,
            7 => 0x0080_0000,
            8 => 0x3f80_0000,
            9 => (self.below(100) as f32).to_bits(),
            10 => 0x4f00_0000,
            11 => (118 + self.below(20) as u32) << 23 | fraction,
            12 => 0x0080_0000 * (1 + self.below(30) as u32) | fraction,
            _ => self.bits() as u32 & 0x7fff_ffff,
        }
    }

    /// The bits of a double-precision number.
    pub fn double(&mut self) -> u64 {
        let sign = self.bits() & 1 << 63;
        let fraction = self.bits() & (1 << 52) - 1;
        sign | match self.below(15) {
            0 => 0,
            1 => 0x7ff << 52,
            2 => 0xfff << 51 | fraction,
            3 => 0x7ff << 52 | fraction >> 1 | 1,
            4 => fraction,
            5 => 1 << self.below(52),
            6 => 0x7fef_ffff_ffff_ffff,
            7 => 1 << 52,
            8 => 1.0f64.to_bits(),
            9 => (self.below(100) as f64).to_bits(),
            10 => 0x43e0 << 48,
            11 => (1014 + self.below(20)) << 52 | fraction,
            12 => (1 + self.below(60)) << 52 | fraction,
            // Near the limits of single precision.
            13 => self.pick(&[1023 - 150, 1023 - 127, 1023 + 127]) << 52 | fraction,
            _ => self.bits() >> 1,
        }
    }

    /// The ten bytes of an extended-precision number: significand, sign and exponent.
    pub fn extended(&mut self) -> (u64, u16) {
        let sign = (self.bits() as u16) & 0x8000;
        let significand = self.bits() | 1 << 63;
        match self.below(16) {
            0 => (0, sign),
            1 => (1 << 63, sign | 0x7fff),
            2 => (3 << 62 | significand, sign | 0x7fff),
            3 => (significand & !(1 << 62) | 1, sign | 0x7fff),
            4 => (significand >> 1, sign),
            // Pseudo-denormal, unnormal, pseudo-infinity.
            5 => (significand, sign),
            6 => (significand >> 1, sign | 0x4000),
            7 => (significand >> 1, sign | 0x7fff),
            8 => (1 << 63, sign | 0x3fff),
            9 => (u64::MAX, sign | 0x7ffe),
            10 => (1 << 63, sign | 1),
            // Small integers and halves.
            11 | 12 => (self.below(0x1000) << 52 | 1 << 63, sign | (0x3fff + self.below(12) as u16)),
            // Near the limits of single and double precision.
            13 => (significand, sign | self.pick(&[0x3f81, 0x3f6a, 0x3c01, 0x3bce, 0x407e, 0x43fe])),
            14 => (significand, sign | (0x3ff0 + self.below(0x60) as u16)),
            _ => (significand, self.bits() as u16),
        }
    }

    /// Sixteen bytes of some element type.
    pub fn vector(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        match self.below(5) {
            0 => {
                for lane in bytes.chunks_exact_mut(4) {
                    lane.copy_from_slice(&self.single().to_le_bytes());
                }
            }
            1 => {
                for lane in bytes.chunks_exact_mut(8) {
                    lane.copy_from_slice(&self.double().to_le_bytes());
                }
            }
            2 => {
                for lane in bytes.chunks_exact_mut(8) {
                    lane.copy_from_slice(&self.integer().to_le_bytes());
                }
            }
            3 => {
                let (significand, exponent) = self.extended();
                bytes[..8].copy_from_slice(&significand.to_le_bytes());
                bytes[8..10].copy_from_slice(&exponent.to_le_bytes());
            }
            _ => {
                for lane in bytes.chunks_exact_mut(8) {
                    lane.copy_from_slice(&self.bits().to_le_bytes());
                }
            }
        }
        bytes
    }
}
