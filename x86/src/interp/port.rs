//! IN, OUT, INS, OUTS.

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;
use crate::interp::op::{Op, place};
use crate::registers::gpr::{RAX, RDI, RDX, RSI};
use crate::state::SegReg;

const A: u8 = RAX as u8;

impl Cpu {
    /// IN, OUT, INS, OUTS.
    pub(super) fn exec_port<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<(), Exception> {
        let dx = self.state.gpr[RDX] as u16;
        match op.instruction.mnemonic() {
            Mnemonic::In => {
                let size = usize::from(op.size);
                let port = if op.source == place::IMMEDIATE { op.immediate as u16 } else { dx };
                self.check_port(env, port, size)?;
                let value = env.port_in(port, size);
                self.set_gpr(A, size, value.into());
                Ok(())
            }
            Mnemonic::Out => {
                let size = usize::from(op.source_size);
                let port = if op.destination == place::IMMEDIATE { op.immediate as u16 } else { dx };
                self.check_port(env, port, size)?;
                env.port_out(port, size, self.gpr(A, size) as u32);
                Ok(())
            }
            mnemonic => {
                // Checked even where RCX is zero, as Zen does.
                self.check_io(env, dx, op.size.into())?;
                match mnemonic {
                    Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
                        self.repeat(env, op, Self::input_element)
                    }
                    _ => self.repeat(env, op, Self::output_element),
                }
            }
        }
    }

    /// Permission check, and the watch of the debug registers.
    fn check_port<E: Env>(&mut self, env: &mut E, port: u16, size: usize) -> Result<(), Exception> {
        self.check_io(env, port, size)?;
        self.note_port_access(port, size);
        Ok(())
    }

    /// One iteration of INS. The destination is checked before the port is read.
    fn input_element<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let (port, size) = (self.state.gpr[RDX] as u16, usize::from(op.size));
        self.check_port(env, port, size)?;
        let offset = self.gpr(RDI as u8, op.address_size.into());
        self.check_write(env, SegReg::Es, offset, size)?;
        let value = env.port_in(port, size);
        self.write(env, SegReg::Es, offset, size, value.into())?;
        self.advance(op, RDI);
        Ok(true)
    }

    /// One iteration of OUTS.
    fn output_element<E: Env>(&mut self, env: &mut E, op: &Op) -> Result<bool, Exception> {
        let (port, size) = (self.state.gpr[RDX] as u16, usize::from(op.size));
        self.check_port(env, port, size)?;
        let offset = self.gpr(RSI as u8, op.address_size.into());
        let value = self.read(env, op.segment, offset, size)?;
        env.port_out(port, size, value as u32);
        self.advance(op, RSI);
        Ok(true)
    }
}
