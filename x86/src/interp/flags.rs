//! Arithmetic with its flags (SDM Vol. 1, section 3.4.3.1), on values of 1, 2, 4 or 8 bytes that are
//! zero-extended to 64 bits.
//!
//! Flags that the manuals leave undefined are what AMD's Zen processors give where that is simple.

use crate::interp::operand::{sign_extend, truncate};
use crate::registers::Rflags;

pub(crate) const CF: u64 = Rflags::CF.bits();
pub(crate) const PF: u64 = Rflags::PF.bits();
pub(crate) const AF: u64 = Rflags::AF.bits();
pub(crate) const ZF: u64 = Rflags::ZF.bits();
pub(crate) const SF: u64 = Rflags::SF.bits();
pub(crate) const OF: u64 = Rflags::OF.bits();
/// All six.
pub(crate) const ARITHMETIC: u64 = Rflags::ARITHMETIC.bits();

/// Bit number of OF.
const OF_SHIFT: u32 = OF.trailing_zeros();

/// `flag` if `condition`.
#[inline(always)]
pub(crate) const fn flag_if(flag: u64, condition: bool) -> u64 {
    if condition { flag } else { 0 }
}

/// Number of the highest bit of a value of `size` bytes.
#[inline(always)]
pub(crate) const fn top_bit(size: usize) -> u32 {
    (8 * size as u32).wrapping_sub(1) & 63
}

/// The highest bit of a value: 0 or 1.
#[inline(always)]
pub(crate) const fn sign(value: u64, size: usize) -> u64 {
    value >> top_bit(size) & 1
}

/// SF, ZF and PF of a result.
#[inline(always)]
pub(crate) const fn result_flags(result: u64, size: usize) -> u64 {
    // Bit n of 0x9669 tells whether n has an even number of ones.
    let parity = 0x9669 >> ((result ^ result >> 4) & 15) & 1;
    sign(result, size) << 7 | ((result == 0) as u64) << 6 | parity << 2
}

/// CF, AF and OF from the carries (or borrows) out of every bit.
#[inline(always)]
const fn carry_flags(carries: u64, size: usize) -> u64 {
    let top = top_bit(size);
    let overflow = (carries ^ carries << 1) >> top & 1;
    overflow << OF_SHIFT | (carries & 8) << 1 | carries >> top & 1
}

/// `left` + `right` + `carry` and all six flags.
#[inline(always)]
pub(crate) fn add(left: u64, right: u64, carry: u64, size: usize) -> (u64, u64) {
    let sum = left.wrapping_add(right).wrapping_add(carry);
    let carries = left & right | (left | right) & !sum;
    let result = truncate(sum, size);
    (result, carry_flags(carries, size) | result_flags(result, size))
}

/// `left` − `right` − `borrow` and all six flags.
#[inline(always)]
pub(crate) fn subtract(left: u64, right: u64, borrow: u64, size: usize) -> (u64, u64) {
    let difference = left.wrapping_sub(right).wrapping_sub(borrow);
    let borrows = !left & right | (!left | right) & difference;
    let result = truncate(difference, size);
    (result, carry_flags(borrows, size) | result_flags(result, size))
}

/// Shifts and rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// Shifts or rotates by `count`, already masked to 5 or 6 bits; the result and RFLAGS after it.
#[inline(always)]
pub(crate) fn shift(kind: Shift, value: u64, count: u32, size: usize, rflags: u64) -> (u64, u64) {
    if count == 0 {
        return (value, rflags);
    }
    let bits = 8 * size as u32;
    let (result, carry) = match kind {
        Shift::Shl => {
            // Bytes and words may be shifted by more than their size.
            let carry = if count <= bits { value >> (bits - count) } else { 0 };
            (truncate(value << count, size), carry & 1)
        }
        Shift::Shr => (value >> count, value >> (count - 1) & 1),
        Shift::Sar => {
            let extended = sign_extend(value, size) as i64;
            (truncate((extended >> count) as u64, size), (extended >> (count - 1)) as u64 & 1)
        }
        Shift::Rol => {
            let count = count % bits;
            let result = truncate(value << count | value >> ((bits - count) & 63), size);
            (result, result & 1)
        }
        Shift::Ror => {
            let count = count % bits;
            let result = truncate(value >> count | value << ((bits - count) & 63), size);
            (result, sign(result, size))
        }
        Shift::Rcl | Shift::Rcr => {
            let with_carry = u128::from(rflags & CF) << bits | u128::from(value);
            let width = bits + 1;
            let left = if kind == Shift::Rcl { count % width } else { width - count % width };
            let result = rotate_left(with_carry, left, width);
            (truncate(result as u64, size), (result >> bits) as u64 & 1)
        }
    };
    let top = sign(result, size);
    let overflow = match kind {
        Shift::Shl | Shift::Rol | Shift::Rcl => top ^ carry,
        // The sign before a shift by one is the second highest bit after it.
        _ => top ^ result >> (bits - 2) & 1,
    };
    let new = carry | flag_if(OF, overflow & 1 != 0);
    let flags = match kind {
        Shift::Shl | Shift::Shr | Shift::Sar => rflags & !ARITHMETIC | new | AF | result_flags(result, size),
        _ => rflags & !(CF | OF) | new,
    };
    (result, flags)
}

/// Rotates the low `width` (at most 65) bits left by `count` (at most `width`).
fn rotate_left(value: u128, count: u32, width: u32) -> u128 {
    (value << count | value >> (width - count)) & ((1 << width) - 1)
}

/// SHLD and SHRD: `value` shifted by `count` (masked to 5 or 6 bits) with bits of `fill` coming in; the result
/// and RFLAGS.
pub(crate) fn double_shift(
    left: bool,
    value: u64,
    fill: u64,
    count: u32,
    size: usize,
    rflags: u64,
) -> (u64, u64) {
    if count == 0 {
        return (value, rflags);
    }
    let bits = 8 * size as u32;
    let (value, fill) = (u128::from(value), u128::from(fill));
    // With 16-bit operands the count may exceed the size: then Zen lets the fill come in once more.
    let (result, carry) = if left {
        let (window, shift) =
            if size == 2 { (value << 32 | fill << 16 | fill, 32) } else { (value << bits | fill, bits) };
        (window << count >> shift, window >> (shift + bits - count) & 1)
    } else {
        let window = if size == 2 { fill << 32 | fill << 16 | value } else { fill << bits | value };
        (window >> count, window >> (count - 1) & 1)
    };
    let result = truncate(result as u64, size);
    let overflow =
        if left { sign(result, size) ^ carry as u64 } else { sign(result, size) ^ result >> (bits - 2) & 1 };
    let flags = carry as u64 | AF | flag_if(OF, overflow != 0) | result_flags(result, size);
    (result, rflags & !ARITHMETIC | flags)
}

/// Whether a condition code (bits 0 to 3 of Jcc's opcode) holds.
#[inline(always)]
pub(crate) fn condition(code: u8, rflags: u64) -> bool {
    /// In the place of bit 1 of RFLAGS, which is constant: whether SF and OF differ.
    const LESS: u64 = 2;
    const TESTED: [u64; 8] = [OF, CF, ZF, CF | ZF, SF, PF, LESS, LESS | ZF];
    let differ = (rflags >> 7 ^ rflags >> OF_SHIFT) & 1;
    let flags = rflags & !LESS | differ << 1;
    (flags & TESTED[(code >> 1 & 7) as usize] != 0) ^ (code & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addition_and_subtraction_agree_with_wider_arithmetic() {
        for left in 0..=255u64 {
            for right in 0..=255u64 {
                for carry in 0..=1 {
                    let (sum, flags) = add(left, right, carry, 1);
                    let wide = left + right + carry;
                    let signed = i64::from(left as i8) + i64::from(right as i8) + carry as i64;
                    assert_eq!(sum, wide & 0xff);
                    assert_eq!(flags & CF != 0, wide > 0xff);
                    assert_eq!(flags & OF != 0, i8::try_from(signed).is_err());
                    assert_eq!(flags & AF != 0, (left & 15) + (right & 15) + carry > 15);
                    assert_eq!(flags & ZF != 0, sum == 0);
                    assert_eq!(flags & SF != 0, sum > 127);
                    assert_eq!(flags & PF != 0, (sum as u8).count_ones().is_multiple_of(2));
                    let (difference, flags) = subtract(left, right, carry, 1);
                    let signed = i64::from(left as i8) - i64::from(right as i8) - carry as i64;
                    assert_eq!(difference, left.wrapping_sub(right + carry) & 0xff);
                    assert_eq!(flags & CF != 0, left < right + carry);
                    assert_eq!(flags & OF != 0, i8::try_from(signed).is_err());
                    assert_eq!(flags & AF != 0, (left & 15) < (right & 15) + carry);
                }
            }
        }
    }

    #[test]
    fn sixty_four_bit_carries() {
        assert_eq!(add(u64::MAX, 0, 1, 8), (0, CF | AF | ZF | PF));
        assert_eq!(add(i64::MAX as u64, 1, 0, 8), (1 << 63, OF | AF | SF | PF));
        assert_eq!(subtract(1 << 63, 1, 0, 8), (i64::MAX as u64, OF | AF | PF));
    }

    #[test]
    fn conditions() {
        for (code, flags, expected) in [
            (0, OF, true),
            (2, CF, true),
            (3, CF, false),
            (4, ZF, true),
            (6, CF, true),
            (6, ZF, true),
            (7, 0, true),
            (8, SF, true),
            (10, PF, true),
            (12, SF, true),
            (12, SF | OF, false),
            (13, OF, false),
            (14, ZF, true),
            (15, 2, true),
            (15, ZF, false),
        ] {
            assert_eq!(condition(code, flags), expected, "condition {code} with flags {flags:x}");
        }
    }

    #[test]
    fn shifts_of_bytes_bit_by_bit() {
        for value in 0..=255u64 {
            for count in 1..=31 {
                let (mut rol, mut ror, mut shl, mut shr, mut sar) = (value, value, value, value, value);
                let (mut rcl, mut rcr, mut rcl_carry, mut rcr_carry) = (value, value, 1, 1);
                for _ in 0..count {
                    rol = (rol << 1 | rol >> 7) & 0xff;
                    ror = (ror >> 1 | ror << 7) & 0xff;
                    shl = shl << 1 & 0xff;
                    shr >>= 1;
                    sar = sar >> 1 | sar & 0x80;
                    (rcl, rcl_carry) = ((rcl << 1 | rcl_carry) & 0xff, rcl >> 7);
                    (rcr, rcr_carry) = (rcr >> 1 | rcr_carry << 7, rcr & 1);
                }
                assert_eq!(shift(Shift::Rol, value, count, 1, 0).0, rol);
                assert_eq!(shift(Shift::Ror, value, count, 1, 0).0, ror);
                assert_eq!(shift(Shift::Shl, value, count, 1, 0).0, shl);
                assert_eq!(shift(Shift::Shr, value, count, 1, 0).0, shr);
                assert_eq!(shift(Shift::Sar, value, count, 1, 0).0, sar);
                let (result, flags) = shift(Shift::Rcl, value, count, 1, CF);
                assert_eq!((result, flags & CF), (rcl, rcl_carry));
                let (result, flags) = shift(Shift::Rcr, value, count, 1, CF);
                assert_eq!((result, flags & CF), (rcr, rcr_carry));
            }
        }
    }

    #[test]
    fn double_shifts() {
        assert_eq!(double_shift(true, 0x8000_0001, 0xc000_0000, 1, 4, 0).0, 3);
        assert_eq!(double_shift(true, 0x8000_0001, 0xc000_0000, 1, 4, 0).1 & CF, CF);
        assert_eq!(double_shift(false, 1, 3, 1, 8, 0).0, 1 << 63);
        assert_eq!(double_shift(false, 0x1234, 0xabcd, 4, 2, 0).0, 0xd123);
        assert_eq!(double_shift(false, 0x1234, 0xabcd, 20, 2, 0).0, 0xdabc);
        assert_eq!(double_shift(true, 0x1234, 0xabcd, 20, 2, 0).0, 0xbcda);
    }
}
