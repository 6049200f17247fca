//! A small assembler for the code around the guest's own instructions.
//!
//! Instructions copied from the guest are re-encoded by iced-x86; the fixed sequences of the translator (address
//! checks, transitions, jumps) are written here byte by byte, because they are most of what is emitted and
//! translation time is guest time (SDM Vol. 2A, chapter 2, "Instruction Format").

/// A host register by its encoding, 0 to 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reg(pub u8);

/// Host registers by name.
#[allow(missing_docs)]
pub mod reg {
    use super::Reg;
    pub const RAX: Reg = Reg(0);
    pub const RCX: Reg = Reg(1);
    pub const RDX: Reg = Reg(2);
    pub const RBX: Reg = Reg(3);
    pub const RSP: Reg = Reg(4);
    pub const RBP: Reg = Reg(5);
    pub const RSI: Reg = Reg(6);
    pub const RDI: Reg = Reg(7);
    pub const R8: Reg = Reg(8);
    pub const R12: Reg = Reg(12);
    pub const R13: Reg = Reg(13);
    pub const R14: Reg = Reg(14);
    pub const R15: Reg = Reg(15);
}

/// A memory operand: base + index × 2^scale + displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    base: Reg,
    index: Option<(Reg, u8)>,
    displacement: i32,
}

/// `[base + displacement]`.
pub const fn at(base: Reg, displacement: i32) -> Mem {
    Mem { base, index: None, displacement }
}

impl Mem {
    /// The register that the operand's address is, if it is one.
    pub fn register(self) -> Option<Reg> {
        (self.index.is_none() && self.displacement == 0).then_some(self.base)
    }

    /// The operand this many bytes further.
    pub const fn plus(self, bytes: i32) -> Self {
        Self { displacement: self.displacement + bytes, ..self }
    }
}

/// `[base + index * 2^scale + displacement]`.
pub const fn indexed(base: Reg, index: Reg, scale: u8, displacement: i32) -> Mem {
    Mem { base, index: Some((index, scale)), displacement }
}

/// Width of an operation on general registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 32 bits; the upper half of a destination becomes zero.
    W32,
    /// 64 bits.
    W64,
}

/// Conditions of Jcc and SETcc, by their encoding.
#[allow(missing_docs)]
pub mod condition {
    pub const B: u8 = 2;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const A: u8 = 7;
}

/// A place in the code that a later jump target is written to.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Fixup {
    at: usize,
    short: bool,
}

/// Collects code.
#[derive(Default)]
pub struct Emitter {
    /// The bytes so far.
    pub code: Vec<u8>,
    /// Where the code that is rarely executed begins.
    split: Option<usize>,
    /// Bytes of other code that will stand before that.
    gap: usize,
}

impl Emitter {
    /// Bytes so far.
    pub fn position(&self) -> usize {
        self.code.len()
    }
    /// An emitter with room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self { code: Vec::with_capacity(bytes), ..Self::default() }
    }
    /// What follows will stand `gap` bytes behind what there is so far.
    pub fn split(&mut self, gap: usize) {
        (self.split, self.gap) = (Some(self.position()), gap);
    }
    /// Bytes before the split.
    pub fn before_split(&self) -> usize {
        self.split.unwrap_or(self.position())
    }
    /// How far from the first byte a position will be.
    pub fn place(&self, position: usize) -> usize {
        if position < self.before_split() { position } else { position + self.gap }
    }

    fn rex(&mut self, wide: Width, register: Reg, index: u8, base: u8, force: bool) {
        let byte =
            0x40 | u8::from(wide == Width::W64) << 3 | (register.0 >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if byte != 0x40 || force {
            self.code.push(byte);
        }
    }

    fn modrm_mem(&mut self, register: Reg, mem: Mem) {
        let low = mem.base.0 & 7;
        // Base 5 (RBP, R13) has no form without a displacement.
        let mode = match mem.displacement {
            0 if low != 5 => 0,
            -128..=127 => 1,
            _ => 2,
        };
        match mem.index {
            None if low != 4 => self.code.push(mode << 6 | (register.0 & 7) << 3 | low),
            None => self.code.extend([mode << 6 | (register.0 & 7) << 3 | 4, 0x20 | low]),
            Some((index, scale)) => {
                self.code
                    .extend([mode << 6 | (register.0 & 7) << 3 | 4, scale << 6 | (index.0 & 7) << 3 | low]);
            }
        }
        match mode {
            1 => self.code.push(mem.displacement as u8),
            2 => self.code.extend(mem.displacement.to_le_bytes()),
            _ => {}
        }
    }

    fn op_mem(&mut self, wide: Width, opcode: &[u8], register: Reg, mem: Mem) {
        self.rex(wide, register, mem.index.map_or(0, |(index, _)| index.0), mem.base.0, false);
        self.code.extend(opcode);
        self.modrm_mem(register, mem);
    }

    fn op_reg(&mut self, wide: Width, opcode: &[u8], register: Reg, rm: Reg) {
        self.rex(wide, register, 0, rm.0, false);
        self.code.extend(opcode);
        self.code.push(0xc0 | (register.0 & 7) << 3 | rm.0 & 7);
    }

    /// `mov register, [mem]`.
    pub fn load(&mut self, wide: Width, register: Reg, mem: Mem) {
        self.op_mem(wide, &[0x8b], register, mem);
    }
    /// `mov [mem], register`.
    pub fn store(&mut self, wide: Width, mem: Mem, register: Reg) {
        self.op_mem(wide, &[0x89], register, mem);
    }
    /// `mov qword [mem], value`, sign-extended.
    pub fn store_imm32_as_64(&mut self, mem: Mem, value: i32) {
        self.op_mem(Width::W64, &[0xc7], Reg(0), mem);
        self.code.extend(value.to_le_bytes());
    }
    /// `mov register, value`, in the shortest form.
    pub fn load_immediate(&mut self, register: Reg, value: u64) {
        if let Ok(value) = u32::try_from(value) {
            self.rex(Width::W32, Reg(0), 0, register.0, false);
            self.code.push(0xb8 | register.0 & 7);
            self.code.extend(value.to_le_bytes());
        } else if let Ok(value) = i32::try_from(value as i64) {
            self.op_reg(Width::W64, &[0xc7], Reg(0), register);
            self.code.extend(value.to_le_bytes());
        } else {
            self.rex(Width::W64, Reg(0), 0, register.0, false);
            self.code.push(0xb8 | register.0 & 7);
            self.code.extend(value.to_le_bytes());
        }
    }
    /// `mov to, from` of 16 bits: the rest of `to` stays.
    pub fn copy16(&mut self, to: Reg, from: Reg) {
        self.code.push(0x66);
        self.op_reg(Width::W32, &[0x8b], to, from);
    }
    /// `lea register, [index * 2^scale + displacement]`.
    pub fn lea_index(&mut self, wide: Width, register: Reg, index: Reg, scale: u8, displacement: i32) {
        self.rex(wide, register, index.0, 0, false);
        self.code.extend([0x8d, (register.0 & 7) << 3 | 4, scale << 6 | (index.0 & 7) << 3 | 5]);
        self.code.extend(displacement.to_le_bytes());
    }
    /// `mov word [mem], register`.
    pub fn store16(&mut self, mem: Mem, register: Reg) {
        self.code.push(0x66);
        self.op_mem(Width::W32, &[0x89], register, mem);
    }
    /// `mov dword [mem], value`.
    pub fn store_imm32(&mut self, mem: Mem, value: u32) {
        self.op_mem(Width::W32, &[0xc7], Reg(0), mem);
        self.code.extend(value.to_le_bytes());
    }
    /// `mov byte [mem], value`.
    pub fn store_imm8(&mut self, mem: Mem, value: u8) {
        self.op_mem(Width::W32, &[0xc6], Reg(0), mem);
        self.code.push(value);
    }
    /// `movzx register, word [mem]`.
    pub fn load_zx16(&mut self, register: Reg, mem: Mem) {
        self.op_mem(Width::W32, &[0x0f, 0xb7], register, mem);
    }
    /// `movzx register, byte [mem]`.
    pub fn load_zx8(&mut self, register: Reg, mem: Mem) {
        self.op_mem(Width::W32, &[0x0f, 0xb6], register, mem);
    }
    /// `mov to, from`.
    pub fn copy(&mut self, wide: Width, to: Reg, from: Reg) {
        self.op_reg(wide, &[0x8b], to, from);
    }
    /// `lea register, mem`, or `mov`, which is shorter, where that does the same.
    pub fn lea(&mut self, wide: Width, register: Reg, mem: Mem) {
        match mem {
            Mem { base, index: None, displacement: 0 } => self.copy(wide, register, base),
            _ => self.op_mem(wide, &[0x8d], register, mem),
        }
    }
    /// `shr register, count`.
    pub fn shr(&mut self, wide: Width, register: Reg, count: u8) {
        self.op_reg(wide, &[0xc1], Reg(5), register);
        self.code.push(count);
    }
    /// `movzx to, from` of the low byte.
    pub fn zero_extend8(&mut self, to: Reg, from: Reg) {
        // Without REX, encodings 4 to 7 would name AH to BH.
        self.rex(Width::W32, to, 0, from.0, true);
        self.code.extend([0x0f, 0xb6, 0xc0 | (to.0 & 7) << 3 | from.0 & 7]);
    }
    /// `cmp register, [mem]`.
    pub fn compare(&mut self, wide: Width, register: Reg, mem: Mem) {
        self.op_mem(wide, &[0x3b], register, mem);
    }
    /// `cmp byte [mem], value`.
    pub fn compare_imm8(&mut self, mem: Mem, value: u8) {
        self.op_mem(Width::W32, &[0x80], Reg(7), mem);
        self.code.push(value);
    }
    /// `cmp byte [mem], 0`.
    pub fn compare_zero8(&mut self, mem: Mem) {
        self.compare_imm8(mem, 0);
    }
    /// An instruction of the three-byte VEX form, map 0F38, on general registers: `pp` and W as in the third byte.
    fn vex_general(&mut self, opcode: u8, bits: u8, register: Reg, second: Reg, mem: Mem) {
        let index = mem.index.map_or(0, |(index, _)| index.0);
        let inverted = 0x02 | (!register.0 & 8) << 4 | (!index & 8) << 3 | (!mem.base.0 & 8) << 2;
        self.code.extend([0xc4, inverted, (!second.0 & 15) << 3 | bits, opcode]);
        self.modrm_mem(register, mem);
    }
    /// `pext to, from, [mask]` (BMI2; leaves the flags alone).
    pub fn pext(&mut self, to: Reg, from: Reg, mask: Mem) {
        // W = 1, pp = F3.
        self.vex_general(0xf5, 0x82, to, from, mask);
    }
    /// `pdep to, from, [mask]` (BMI2; leaves the flags alone).
    pub fn pdep(&mut self, to: Reg, from: Reg, mask: Mem) {
        // W = 1, pp = F2.
        self.vex_general(0xf5, 0x83, to, from, mask);
    }
    /// `rorx to, from, count` of 64 bits (BMI2; leaves the flags alone).
    pub fn rorx(&mut self, to: Reg, from: Reg, count: u8) {
        // Map 0F3A, W = 1, pp = F2, no second source.
        let inverted = 0x03 | (!to.0 & 8) << 4 | 0x40 | (!from.0 & 8) << 2;
        self.code.extend([0xc4, inverted, 0xfb, 0xf0, 0xc0 | (to.0 & 7) << 3 | from.0 & 7, count]);
    }
    /// `sarx to, from, count` of 64 bits (BMI2; leaves the flags alone).
    pub fn sarx(&mut self, to: Reg, from: Reg, count: Reg) {
        // Map 0F38, W = 1, pp = F3.
        let inverted = 0x02 | (!to.0 & 8) << 4 | 0x40 | (!from.0 & 8) << 2;
        self.code.extend([
            0xc4,
            inverted,
            (!count.0 & 15) << 3 | 0x82,
            0xf7,
            0xc0 | (to.0 & 7) << 3 | from.0 & 7,
        ]);
    }
    /// `and register, value`, sign-extended.
    pub fn and_imm(&mut self, wide: Width, register: Reg, value: i32) {
        self.alu_imm(wide, 4, register, value);
    }
    /// `or register, value`, sign-extended.
    pub fn or_imm(&mut self, wide: Width, register: Reg, value: i32) {
        self.alu_imm(wide, 1, register, value);
    }
    /// `cmp register, value`, sign-extended.
    pub fn compare_imm(&mut self, wide: Width, register: Reg, value: i32) {
        self.alu_imm(wide, 7, register, value);
    }
    fn alu_imm(&mut self, wide: Width, operation: u8, register: Reg, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.op_reg(wide, &[0x83], Reg(operation), register);
            self.code.push(short as u8);
        } else {
            self.op_reg(wide, &[0x81], Reg(operation), register);
            self.code.extend(value.to_le_bytes());
        }
    }
    /// `test register, value` of 32 bits.
    pub fn test_imm(&mut self, register: Reg, value: u32) {
        self.op_reg(Width::W32, &[0xf7], Reg(0), register);
        self.code.extend(value.to_le_bytes());
    }
    /// `sub register, [mem]`.
    pub fn sub_mem(&mut self, wide: Width, register: Reg, mem: Mem) {
        self.op_mem(wide, &[0x2b], register, mem);
    }
    /// `add register, other`.
    pub fn add(&mut self, wide: Width, register: Reg, other: Reg) {
        self.op_reg(wide, &[0x03], register, other);
    }
    /// `sub register, other`.
    pub fn sub(&mut self, wide: Width, register: Reg, other: Reg) {
        self.op_reg(wide, &[0x2b], register, other);
    }
    /// `or register, other`.
    pub fn or(&mut self, wide: Width, register: Reg, other: Reg) {
        self.op_reg(wide, &[0x0b], register, other);
    }
    /// `and register, other`.
    pub fn and(&mut self, wide: Width, register: Reg, other: Reg) {
        self.op_reg(wide, &[0x23], register, other);
    }
    /// `cmp register, other`.
    pub fn compare_reg(&mut self, wide: Width, register: Reg, other: Reg) {
        self.op_reg(wide, &[0x3b], register, other);
    }
    /// `not register`.
    pub fn not(&mut self, wide: Width, register: Reg) {
        self.op_reg(wide, &[0xf7], Reg(2), register);
    }
    /// `sar register, count`.
    pub fn sar(&mut self, wide: Width, register: Reg, count: u8) {
        self.op_reg(wide, &[0xc1], Reg(7), register);
        self.code.push(count);
    }
    /// `movsxd to, from`: 32 bits to 64.
    pub fn sign_extend32(&mut self, to: Reg, from: Reg) {
        self.op_reg(Width::W64, &[0x63], to, from);
    }
    /// `mov byte [mem], register` of a register with a REX encoding.
    pub fn store8(&mut self, mem: Mem, register: Reg) {
        self.rex(Width::W32, register, mem.index.map_or(0, |(index, _)| index.0), mem.base.0, true);
        self.code.push(0x88);
        self.modrm_mem(register, mem);
    }
    /// `cmovcc to, from` of 64 bits.
    pub fn move_if(&mut self, condition: u8, to: Reg, from: Reg) {
        self.op_reg(Width::W64, &[0x0f, 0x40 | condition], to, from);
    }
    /// `test byte [mem], value`.
    pub fn test_mem8(&mut self, mem: Mem, value: u8) {
        self.op_mem(Width::W32, &[0xf6], Reg(0), mem);
        self.code.push(value);
    }
    /// `pop qword [mem]`: RSP as a base is the one after the pop.
    pub fn pop_mem(&mut self, mem: Mem) {
        self.op_mem(Width::W32, &[0x8f], Reg(0), mem);
    }
    /// `shl register, count`.
    pub fn shl(&mut self, wide: Width, register: Reg, count: u8) {
        self.op_reg(wide, &[0xc1], Reg(4), register);
        self.code.push(count);
    }
    /// `xchg [mem], register`: atomic, and a full barrier.
    pub fn exchange(&mut self, mem: Mem, register: Reg) {
        self.op_mem(Width::W64, &[0x87], register, mem);
    }
    /// `push value`.
    pub fn push_imm(&mut self, value: u32) {
        self.code.push(0x68);
        self.code.extend(value.to_le_bytes());
    }
    /// `stc` or `clc`.
    pub fn set_carry(&mut self, set: bool) {
        self.code.push(if set { 0xf9 } else { 0xf8 });
    }
    /// `xor register, other`.
    pub fn xor(&mut self, wide: Width, register: Reg, other: Reg) {
        self.op_reg(wide, &[0x33], register, other);
    }
    /// `bts [mem], number`: of a string of bits that begins at `mem`, and not atomic.
    pub fn set_bit(&mut self, mem: Mem, number: Reg) {
        self.op_mem(Width::W64, &[0x0f, 0xab], number, mem);
    }
    /// `inc qword [mem]`.
    pub fn increment(&mut self, mem: Mem) {
        self.op_mem(Width::W64, &[0xff], Reg(0), mem);
    }
    /// `dec qword [mem]`.
    pub fn decrement(&mut self, mem: Mem) {
        self.op_mem(Width::W64, &[0xff], Reg(1), mem);
    }
    /// `pause`.
    pub fn pause(&mut self) {
        self.code.extend([0xf3, 0x90]);
    }
    /// `pushfq`.
    pub fn pushfq(&mut self) {
        self.code.push(0x9c);
    }
    /// `popfq`.
    pub fn popfq(&mut self) {
        self.code.push(0x9d);
    }
    /// `rdtsc`.
    pub fn rdtsc(&mut self) {
        self.code.extend([0x0f, 0x31]);
    }
    /// `lfence`.
    pub fn lfence(&mut self) {
        self.code.extend([0x0f, 0xae, 0xe8]);
    }
    /// `rep movs` or `rep stos` of elements of 1 << `scale` bytes.
    pub fn repeat_string(&mut self, is_move: bool, scale: u8) {
        self.code.push(0xf3);
        match scale {
            1 => self.code.push(0x66),
            3 => self.code.push(0x48),
            _ => {}
        }
        self.code.push(if is_move { 0xa4 } else { 0xaa } | u8::from(scale != 0));
    }
    /// `lahf; seto al`: the arithmetic flags to AX.
    pub fn flags_to_ax(&mut self) {
        self.code.extend([0x9f, 0x0f, 0x90, 0xc0]);
    }
    /// `add al, 7fh; sahf`: the arithmetic flags from AX as [`Emitter::flags_to_ax`] left them.
    pub fn flags_from_ax(&mut self) {
        self.code.extend([0x04, 0x7f, 0x9e]);
    }
    /// `ldmxcsr [mem]`.
    pub fn load_mxcsr(&mut self, mem: Mem) {
        self.op_mem(Width::W32, &[0x0f, 0xae], Reg(2), mem);
    }
    /// `stmxcsr [mem]`.
    pub fn store_mxcsr(&mut self, mem: Mem) {
        self.op_mem(Width::W32, &[0x0f, 0xae], Reg(3), mem);
    }
    /// `fxsave64 [mem]`.
    pub fn fxsave(&mut self, mem: Mem) {
        self.op_mem(Width::W64, &[0x0f, 0xae], Reg(0), mem);
    }
    /// `fxrstor64 [mem]`.
    pub fn fxrstor(&mut self, mem: Mem) {
        self.op_mem(Width::W64, &[0x0f, 0xae], Reg(1), mem);
    }
    /// `fninit`.
    pub fn fninit(&mut self) {
        self.code.extend([0xdb, 0xe3]);
    }
    /// `vzeroupper`.
    pub fn vzeroupper(&mut self) {
        self.code.extend([0xc5, 0xf8, 0x77]);
    }

    /// A VEX instruction of the three-byte form with a memory operand. `form`: opcode map, the third byte's W, L and
    /// pp bits, opcode.
    fn vex_mem(&mut self, form: [u8; 3], vector: u8, second_source: u8, mem: Mem) {
        let [map, bits, opcode] = form;
        let second = map | (!vector & 8) << 4 | 0x40 | (!mem.base.0 & 8) << 2;
        self.code.extend([0xc4, second, (!second_source & 15) << 3 | bits, opcode]);
        self.modrm_mem(Reg(vector), mem);
    }
    /// `vmovups [mem], ymm`.
    pub fn store_ymm(&mut self, mem: Mem, vector: u8) {
        self.vex_mem([1, 4, 0x11], vector, 0, mem);
    }
    /// `vmovups xmm, [mem]`, which clears the upper half.
    pub fn load_lower(&mut self, vector: u8, mem: Mem) {
        self.vex_mem([1, 0, 0x10], vector, 0, mem);
    }
    /// `vorps xmm0, xmm0, [mem]`.
    pub fn or_to_xmm0(&mut self, mem: Mem) {
        self.vex_mem([1, 0, 0x56], 0, 0, mem);
    }
    /// `vptest xmm0, xmm0`.
    pub fn test_xmm0(&mut self) {
        self.code.extend([0xc4, 0xe2, 0x79, 0x17, 0xc0]);
    }
    /// `vmovups ymm, [mem]`.
    pub fn load_ymm(&mut self, vector: u8, mem: Mem) {
        self.vex_mem([1, 4, 0x10], vector, 0, mem);
    }

    /// `push register`.
    pub fn push(&mut self, register: Reg) {
        self.rex(Width::W32, Reg(0), 0, register.0, false);
        self.code.push(0x50 | register.0 & 7);
    }
    /// `pop register`.
    pub fn pop(&mut self, register: Reg) {
        self.rex(Width::W32, Reg(0), 0, register.0, false);
        self.code.push(0x58 | register.0 & 7);
    }
    /// `ret`.
    pub fn ret(&mut self) {
        self.code.push(0xc3);
    }

    /// `jmp [mem]`.
    pub fn jump_mem(&mut self, mem: Mem) {
        self.op_mem(Width::W32, &[0xff], Reg(4), mem);
    }
    /// `jmp rel32` to a target set later.
    pub fn jump(&mut self) -> Fixup {
        self.code.extend([0xe9, 0, 0, 0, 0]);
        Fixup { at: self.code.len() - 4, short: false }
    }
    /// `call rel32` to a target set later.
    pub fn call(&mut self) -> Fixup {
        self.code.extend([0xe8, 0, 0, 0, 0]);
        Fixup { at: self.code.len() - 4, short: false }
    }
    /// `jcc rel32` to a target set later.
    pub fn jump_if(&mut self, condition: u8) -> Fixup {
        self.code.extend([0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Fixup { at: self.code.len() - 4, short: false }
    }
    /// `jrcxz rel8` (or with `short32`, `jecxz`) to a target set later, at most 127 bytes ahead.
    pub fn jump_if_rcx_zero(&mut self, short32: bool) -> Fixup {
        if short32 {
            self.code.push(0x67);
        }
        self.code.extend([0xe3, 0]);
        Fixup { at: self.code.len() - 1, short: true }
    }

    /// Makes a jump go to the current position.
    pub fn bind(&mut self, fixup: Fixup) {
        let target = self.position();
        self.bind_to(fixup, target);
    }
    /// Makes a jump go to a position in this code.
    pub fn bind_to(&mut self, fixup: Fixup, target: usize) {
        if fixup.short {
            // The translator's own sequences: their lengths are known to fit.
            self.code[fixup.at] = (target - fixup.at - 1) as u8;
        } else {
            let relative = (self.place(target) as i64 - self.place(fixup.at) as i64 - 4) as i32;
            self.code[fixup.at..fixup.at + 4].copy_from_slice(&relative.to_le_bytes());
        }
    }
    /// Makes a jump go to an offset in the code memory, when this code will stand at `start` there.
    pub fn bind_outside(&mut self, fixup: Fixup, start: usize, target: usize) {
        let relative = (target as i64 - (start + self.place(fixup.at)) as i64 - 4) as i32;
        self.code[fixup.at..fixup.at + 4].copy_from_slice(&relative.to_le_bytes());
    }
    /// Where the jump's 32-bit displacement stands in this code.
    pub fn displacement_position(fixup: Fixup) -> usize {
        fixup.at
    }
}

#[cfg(test)]
mod tests {
    use super::reg::*;
    use super::*;
    use iced_x86::{Code, Decoder, DecoderOptions, MemorySize, Register};

    fn decode(fill: impl FnOnce(&mut Emitter)) -> iced_x86::Instruction {
        let mut emitter = Emitter::default();
        fill(&mut emitter);
        let mut decoder = Decoder::with_ip(64, &emitter.code, 0x1000, DecoderOptions::NONE);
        let instruction = decoder.decode();
        assert_eq!(instruction.len(), emitter.code.len(), "{instruction:?}");
        instruction
    }

    #[test]
    fn memory_operands_of_every_base_and_index() {
        for base in (0..16).map(Reg) {
            for index in (0..16).filter(|&i| i != 4).map(Reg) {
                for displacement in [0, 8, -128, 128, 0x1234_5678] {
                    let i = decode(|e| e.load(Width::W64, Reg(9), indexed(base, index, 3, displacement)));
                    assert_eq!(i.code(), Code::Mov_r64_rm64);
                    assert_eq!(i.memory_base() as u32 - Register::RAX as u32, base.0.into());
                    assert_eq!(i.memory_index() as u32 - Register::RAX as u32, index.0.into());
                    assert_eq!(
                        (i.memory_index_scale(), i.memory_displacement64()),
                        (8, displacement as i64 as u64)
                    );
                }
            }
            let i = decode(|e| e.store(Width::W32, at(base, 0), R15));
            assert_eq!(i.code(), Code::Mov_rm32_r32);
            assert_eq!(i.memory_base() as u32 - Register::RAX as u32, base.0.into());
        }
    }

    #[test]
    fn immediates_and_index_only() {
        for value in [0, 0x1234, 0xffff_ffff, 0xffff_ffff_8000_0000, 0x1234_5678_9abc] {
            let i = decode(|e| e.load_immediate(R14, value));
            assert_eq!(i.immediate(1), value);
        }
        let i = decode(|e| e.lea_index(Width::W64, R14, R15, 3, -8));
        assert_eq!(
            (i.memory_base(), i.memory_index(), i.memory_index_scale()),
            (Register::None, Register::R15, 8)
        );
        let i = decode(|e| e.store_imm32_as_64(at(R12, -8), -5));
        assert_eq!((i.code(), i.immediate(1) as i64), (Code::Mov_rm64_imm32, -5));
        assert_eq!(decode(|e| e.copy16(RAX, R14)).code(), Code::Mov_r16_rm16);
    }

    #[test]
    fn single_instructions_are_what_they_say() {
        let i = decode(|e| e.pext(R13, R14, indexed(RSP, R15, 3, 0x200)));
        assert_eq!(i.code(), Code::VEX_Pext_r64_r64_rm64);
        assert_eq!((i.op0_register(), i.op1_register()), (Register::R13, Register::R14));
        assert_eq!((i.memory_base(), i.memory_index()), (Register::RSP, Register::R15));
        let i = decode(|e| e.pdep(R14, R15, at(RSP, 0x40)));
        assert_eq!((i.code(), i.op1_register()), (Code::VEX_Pdep_r64_r64_rm64, Register::R15));
        let i = decode(|e| e.rorx(R14, RDX, 45));
        assert_eq!(
            (i.code(), i.op0_register(), i.op1_register()),
            (Code::VEX_Rorx_r64_rm64_imm8, Register::R14, Register::RDX)
        );
        assert_eq!(i.immediate(2), 45);
        let i = decode(|e| e.store_ymm(at(RSP, 0x200), 9));
        assert_eq!((i.code(), i.op1_register()), (Code::VEX_Vmovups_ymmm256_ymm, Register::YMM9));
        let i = decode(|e| e.load_lower(12, at(RSP, 0x200)));
        assert_eq!((i.code(), i.op0_register()), (Code::VEX_Vmovups_xmm_xmmm128, Register::XMM12));
        let i = decode(|e| e.or_to_xmm0(at(RSP, 0x200)));
        assert_eq!(
            (i.code(), i.op0_register(), i.op1_register()),
            (Code::VEX_Vorps_xmm_xmm_xmmm128, Register::XMM0, Register::XMM0)
        );
        let i = decode(|e| e.test_xmm0());
        assert_eq!(
            (i.code(), i.op0_register(), i.op1_register()),
            (Code::VEX_Vptest_xmm_xmmm128, Register::XMM0, Register::XMM0)
        );
        let i = decode(|e| e.load_ymm(12, at(RSP, 0x200)));
        assert_eq!(
            (i.code(), i.memory_size()),
            (Code::VEX_Vmovups_ymm_ymmm256, MemorySize::Packed256_Float32)
        );
        assert_eq!(decode(|e| e.and_imm(Width::W32, R13, 0x7fe0)).code(), Code::And_rm32_imm32);
        assert_eq!(decode(|e| e.compare_imm(Width::W64, R14, -1)).code(), Code::Cmp_rm64_imm8);
        assert_eq!(decode(|e| e.or_imm(Width::W32, R14, 2)).code(), Code::Or_rm32_imm8);
        assert_eq!(decode(|e| e.test_imm(RAX, 0x100)).code(), Code::Test_rm32_imm32);
        assert_eq!(decode(|e| e.test_mem8(at(R15, 0x80), 4)).code(), Code::Test_rm8_imm8);
        assert_eq!(decode(|e| e.exchange(at(RSP, 0x38), R15)).code(), Code::Xchg_rm64_r64);
        assert_eq!(decode(|e| e.pop_mem(at(RSP, 0x38))).code(), Code::Pop_rm64);
        assert_eq!(decode(|e| e.push_imm(0x8000_0000)).code(), Code::Pushq_imm32);
        assert_eq!(decode(|e| e.move_if(condition::A, R15, RCX)).code(), Code::Cmova_r64_rm64);
        assert_eq!(decode(|e| e.sign_extend32(R15, RSI)).code(), Code::Movsxd_r64_rm32);
        assert_eq!(decode(|e| e.lea(Width::W64, R15, at(R12, 0))).code(), Code::Mov_r64_rm64);
        assert_eq!(decode(|e| e.lea(Width::W64, R15, at(R12, 8))).code(), Code::Lea_r64_m);
        assert_eq!(decode(|e| e.sub_mem(Width::W64, R14, at(RSP, 0x28))).code(), Code::Sub_r64_rm64);
        let i = decode(|e| e.store8(at(RSP, 0x50), RSI));
        assert_eq!((i.code(), i.op1_register()), (Code::Mov_rm8_r8, Register::SIL));
        for (scale, code) in
            [Code::Movsb_m8_m8, Code::Movsw_m16_m16, Code::Movsd_m32_m32, Code::Movsq_m64_m64]
                .into_iter()
                .enumerate()
        {
            let i = decode(|e| e.repeat_string(true, scale as u8));
            assert!(i.code() == code && i.has_rep_prefix());
        }
        assert_eq!(decode(|e| e.repeat_string(false, 3)).code(), Code::Stosq_m64_RAX);
        assert_eq!(decode(|e| e.fxsave(at(R15, 0))).code(), Code::Fxsave64_m512byte);
        assert_eq!(decode(|e| e.fxrstor(at(R15, 0))).code(), Code::Fxrstor64_m512byte);
        assert_eq!(decode(|e| e.store_mxcsr(at(R15, 24))).code(), Code::Stmxcsr_m32);
        assert_eq!(decode(|e| e.load_mxcsr(at(RSP, 24))).code(), Code::Ldmxcsr_m32);
        let i = decode(|e| e.zero_extend8(R13, RSI));
        assert_eq!((i.code(), i.op1_register()), (Code::Movzx_r32_rm8, Register::SIL));
        assert_eq!(decode(|e| e.shr(Width::W64, R15, 12)).code(), Code::Shr_rm64_imm8);
        assert_eq!(decode(|e| e.compare(Width::W64, R15, at(RSP, 8))).code(), Code::Cmp_r64_rm64);
        assert_eq!(decode(|e| e.compare_zero8(at(RSP, 8))).code(), Code::Cmp_rm8_imm8);
        assert_eq!(decode(|e| e.jump_mem(at(RSP, 8))).code(), Code::Jmp_rm64);
        assert_eq!(decode(|e| e.load_zx16(RAX, at(RSP, 8))).code(), Code::Movzx_r32_rm16);
        assert_eq!(decode(|e| e.store16(at(RSP, 8), RAX)).code(), Code::Mov_rm16_r16);
        assert_eq!(decode(|e| e.push(R15)).op0_register(), Register::R15);
    }
}
