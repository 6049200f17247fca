//! Vector instructions that address memory element by element, or past the caches: masked moves, gathers and
//! non-temporal stores.

use iced_x86::{Mnemonic, OpKind, Register};

use crate::cpu::{Access, Cpu};
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::Op;
use crate::interp::operand::{memory_segment, sign_extend, truncate};
use crate::interp::vector::area::{XMM, YMM_HIGH};
use crate::state::SegReg;

/// Offset in the XSAVE area of ST(0), whose low 64 bits are MM0.
const MM: usize = 32;

impl Cpu {
    /// A vector register, 32 bytes of it.
    pub(super) fn vector_register(&self, register: Register) -> [u8; 32] {
        let number = register.number() & 15;
        let mut value = [0; 32];
        value[..16].copy_from_slice(&self.state.xsave.bytes[XMM + 16 * number..][..16]);
        value[16..].copy_from_slice(&self.state.xsave.bytes[YMM_HIGH + 16 * number..][..16]);
        value
    }

    /// Sets all 32 bytes of a vector register.
    pub(super) fn set_vector_register(&mut self, register: Register, value: &[u8; 32]) {
        let number = register.number() & 15;
        self.set_fpu_bytes(XMM + 16 * number, &value[..16]);
        self.set_fpu_bytes(YMM_HIGH + 16 * number, &value[16..]);
    }

    /// Executes a masked move, a gather or a non-temporal move. False if it is none of these.
    pub(super) fn exec_vector_memory_op<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        use Mnemonic as M;
        match op.instruction.mnemonic() {
            M::Maskmovdqu | M::Maskmovq | M::Vmaskmovdqu => self.store_masked_bytes(env, op)?,
            M::Vmaskmovps | M::Vpmaskmovd => self.masked_move(env, op, 4)?,
            M::Vmaskmovpd | M::Vpmaskmovq => self.masked_move(env, op, 8)?,
            M::Vgatherdps | M::Vpgatherdd => self.gather(env, op, 4, 4)?,
            M::Vgatherdpd | M::Vpgatherdq => self.gather(env, op, 4, 8)?,
            M::Vgatherqps | M::Vpgatherqd => self.gather(env, op, 8, 4)?,
            M::Vgatherqpd | M::Vpgatherqq => self.gather(env, op, 8, 8)?,
            M::Movntps | M::Movntpd | M::Movntdq | M::Vmovntps | M::Vmovntpd | M::Vmovntdq => {
                self.store_non_temporal(env, op)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// MASKMOVDQU and MASKMOVQ: stores the bytes whose mask byte has its top bit set, at DS:rDI.
    fn store_masked_bytes<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let instruction = &op.instruction;
        let (source, mask) = (instruction.op1_register(), instruction.op2_register());
        let (source, mask, size) = if source.is_mm() {
            // From here on MM registers and ST registers have the same numbers.
            self.enter_mmx();
            let register = |register: Register| {
                let mut value = [0; 32];
                value[..8].copy_from_slice(&self.state.xsave.bytes[MM + 16 * (register.number() & 7)..][..8]);
                value
            };
            (register(source), register(mask), 8)
        } else {
            (self.vector_register(source), self.vector_register(mask), 16)
        };
        let pointer = match instruction.op0_kind() {
            OpKind::MemorySegDI => Register::DI,
            OpKind::MemorySegEDI => Register::EDI,
            _ => Register::RDI,
        };
        let segment = memory_segment(instruction);
        let base = self.register(pointer);
        let address = |i: usize| truncate(base.wrapping_add(i as u64), pointer.size());
        let selected = |i: &usize| mask[*i] & 0x80 != 0;
        // Zen checks all bytes, whatever the mask.
        let linear = self.checked_address(segment, base, size, Access::Write)?;
        self.check_alignment(linear, size)?;
        self.check_write(env, segment, base, size)?;
        for i in (0..size).filter(selected) {
            self.write(env, segment, address(i), 1, source[i].into())?;
        }
        Ok(())
    }

    /// VMASKMOV and VPMASKMOV: elements whose mask has its top bit clear are not accessed, and load as zero. Alignment
    /// is not checked.
    fn masked_move<E: Env>(&mut self, env: &mut E, op: &Op, element: usize) -> Result<(), Exception> {
        let instruction = &op.instruction;
        let (segment, offset) = self.effective_address(op);
        let size = instruction.memory_size().size().min(32);
        let mask = self.vector_register(instruction.op1_register());
        let address = |i: usize| offset.wrapping_add(i as u64);
        let selected = |i: &usize| mask[*i + element - 1] & 0x80 != 0;
        let elements = || (0..size).step_by(element).filter(selected);
        if instruction.op0_kind() == OpKind::Memory {
            let source = self.vector_register(instruction.op2_register());
            for i in elements() {
                self.check_write(env, segment, address(i), element)?;
            }
            for i in elements() {
                self.write_bytes(env, segment, address(i), &source[i..i + element])?;
            }
            return Ok(());
        }
        let mut result = [0; 32];
        for i in elements() {
            self.read_bytes(env, segment, address(i), &mut result[i..i + element])?;
        }
        self.set_vector_register(instruction.op0_register(), &result);
        Ok(())
    }

    /// Segment and offset of one element of a VSIB operand.
    fn vsib_address(&self, op: &Op, index: u64) -> (SegReg, u64) {
        let instruction = &op.instruction;
        let base = instruction.memory_base();
        let mut offset = instruction.memory_displacement64();
        let mut size = if self.in_64bit_mode() { 8 } else { 4 };
        if base.is_gpr() {
            size = base.size();
            offset = offset.wrapping_add(self.register(base));
        } else if instruction.memory_displ_size() != 0 {
            size = instruction.memory_displ_size() as usize;
        }
        offset = offset.wrapping_add(index.wrapping_mul(instruction.memory_index_scale().into()));
        (memory_segment(instruction), truncate(offset, size))
    }

    /// VGATHER and VPGATHER: loads the elements whose mask has its top bit set. An element that is done has
    /// its mask cleared (and so has one passed over), so that the instruction goes on after a fault where it was (SDM Vol. 2C).
    fn gather<E: Env>(
        &mut self,
        env: &mut E,
        op: &Op,
        index_size: usize,
        element: usize,
    ) -> Result<(), Exception> {
        let instruction = &op.instruction;
        let (target, index, mask) =
            (instruction.op0_register(), instruction.memory_index(), instruction.op2_register());
        if target.number() == index.number()
            || mask.number() == index.number()
            || target.number() == mask.number()
        {
            return Err(Exception::UD);
        }
        let indices = self.vector_register(index);
        let count = (index.size() / index_size).min(target.size() / element);
        let mut result = self.vector_register(target);
        let mut pending = self.vector_register(mask);
        let mut fault = None;
        for i in 0..count {
            let lane = i * element..(i + 1) * element;
            if pending[lane.end - 1] & 0x80 == 0 {
                pending[lane].fill(0);
                continue;
            }
            let mut bytes = [0; 8];
            bytes[..index_size].copy_from_slice(&indices[i * index_size..(i + 1) * index_size]);
            let (segment, offset) = self.vsib_address(op, sign_extend(u64::from_le_bytes(bytes), index_size));
            match self.read_bytes(env, segment, offset, &mut result[lane.clone()]) {
                Ok(()) => pending[lane].fill(0),
                Err(exception) => {
                    fault = Some(exception);
                    break;
                }
            }
        }
        if fault.is_none() {
            result[count * element..].fill(0);
            pending.fill(0);
        }
        self.set_vector_register(target, &result);
        self.set_vector_register(mask, &pending);
        fault.map_or(Ok(()), Err)
    }

    /// MOVNTPS and its kin: an aligned store; the guest's caches are the host's affair.
    fn store_non_temporal<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let instruction = &op.instruction;
        let (segment, offset) = self.effective_address(op);
        let size = instruction.memory_size().size().min(32);
        if self.address_of(segment, offset) & (size as u64).wrapping_sub(1) != 0 {
            return Err(Exception::GP0);
        }
        let source = self.vector_register(instruction.op1_register());
        self.write_bytes(env, segment, offset, &source[..size])
    }
}
