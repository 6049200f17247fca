//! HLT, fences, cache flushes, random numbers.

use core::sync::atomic::{Ordering, fence};

use iced_x86::Mnemonic;

use crate::cpu::{Access, Cpu};
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::flags::{ARITHMETIC, CF};
use crate::interp::op::Op;
use crate::state::Activity;

impl Cpu {
    /// HLT, MFENCE, RDRAND, RDSEED, CLFLUSH, CLFLUSHOPT, CLWB.
    pub(super) fn exec_processor<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        match op.instruction.mnemonic() {
            Mnemonic::Hlt => {
                if self.state.cpl != 0 {
                    return Err(Exception::GP0);
                }
                if !core::mem::take(&mut self.unhalted) {
                    self.state.activity = Activity::Halted;
                }
            }
            // Guest loads and stores are loads and stores of the host.
            Mnemonic::Mfence => fence(Ordering::SeqCst),
            Mnemonic::Rdrand | Mnemonic::Rdseed => {
                let value = env.random();
                self.set_gpr(op.destination, op.size.into(), value);
                self.state.rflags = self.state.rflags & !ARITHMETIC | CF;
            }
            // A flush is a load as far as faults go.
            _ => {
                let (segment, offset) = self.effective_address(op);
                let linear = self.checked_address(segment, offset, 1, Access::Read)?;
                self.place(env, linear, Access::Read, self.privilege())?;
            }
        }
        Ok(())
    }
}
