//! Task-state segments: I/O permission, stacks, and hardware task switches (SDM Vol. 3A, chapter 7).

use crate::cpu::Cpu;
use crate::env::Env;
use crate::exception::Exception;

impl Cpu {
    /// Whether the current privilege level may access `size` ports from `port` on: IOPL, then the I/O
    /// permission bitmap; #GP(0) if not (SDM Vol. 1, section 18.5).
    pub fn check_io<E: Env>(&mut self, _env: &mut E, _port: u16, _size: usize) -> Result<(), Exception> {
        todo!()
    }
}
