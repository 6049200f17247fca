//! Segment descriptors and segment registers (SDM Vol. 3A, chapters 3 and 5).

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::Op;
use crate::state::SegReg;

impl Cpu {
    /// Loads a segment register other than CS as MOV does, with all checks.
    pub fn load_segment<E: Env>(
        &mut self,
        _env: &mut E,
        _seg: SegReg,
        _selector: u16,
    ) -> Result<(), Exception> {
        todo!()
    }

    /// Executes an instruction that deals in segments, gates and tasks, if `op` is one: far JMP, CALL and RET,
    /// IRET, INT n, INT3, INT1, INTO, SYSCALL, SYSRET, SYSENTER, SYSEXIT, MOV, POP and PUSH of segment
    /// registers, LDS and its kin, LLDT, LTR, SLDT, STR, VERR, VERW, LAR, LSL, ARPL, LGDT, LIDT, SGDT, SIDT.
    /// Transfers set [`Cpu::next_rip`]. False: not one of these.
    pub fn exec_segment_op<E: Env>(&mut self, _env: &mut E, _op: &Op) -> Result<bool, Exception> {
        todo!()
    }
}
