//! What lies around a processor: guest-physical memory, ports, the local APIC, time, and the host's own
//! vector units. An engine implements [`Env`] once; the interpreter is generic over it.

use crate::state::CpuState;
use iced_x86::Instruction;

/// An event from outside that a processor takes between two instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A maskable interrupt, acknowledged, with its vector.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI with its vector (start address is vector × 4 KiB).
    Sipi(u8),
    /// Somebody wants the engine to return to its caller.
    Kick,
    /// Ends HLT without an interrupt: the present one, or the next.
    Unhalt,
    /// All cached translations are to be dropped.
    FlushTlb,
}

/// A register of a memory-mapped device, or none, answered this.
pub const OPEN_BUS: u64 = u64::MAX;

/// What an instruction that the host executes for the guest came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostExecution {
    /// Done: state and memory operand are updated.
    Done,
    /// An unmasked SIMD floating-point exception: MXCSR has the flags, nothing else changed.
    SimdException,
    /// An unmasked x87 exception is pending from an earlier instruction: nothing changed.
    X87Exception,
    /// The host has no such instruction.
    Undefined,
}

/// An instruction that is executed by the host's own units: x87, MMX, SSE, AVX and the like.
pub struct HostInstruction<'a> {
    /// Decoded; its memory operand, if it has one, is replaced by the buffer.
    pub instruction: &'a Instruction,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// What a repeated comparison of elements came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compared {
    /// Elements compared, the one included that ended it.
    pub count: u64,
    /// CF, PF, AF, ZF, SF and OF of the last comparison, where RFLAGS has them.
    pub flags: u64,
}

/// The surroundings of one logical processor.
///
/// RAM is addressed by *offset*: [`Env::ram_page`] turns a guest-physical page into the offset of that page in
/// the machine's RAM, which a TLB keeps. An offset got from it, plus 0 to 4095, is always valid. Loads and
/// stores of 2, 4 and 8 bytes are single accesses when naturally aligned, and never cross a 4 KiB page.
pub trait Env {
    /// Offset in RAM of the 4 KiB page at this guest-physical address, if RAM is there.
    fn ram_page(&self, gpa: u64) -> Option<u64>;
    /// Loads a byte.
    fn load8(&self, offset: u64) -> u8;
    /// Loads two bytes.
    fn load16(&self, offset: u64) -> u16;
    /// Loads four bytes.
    fn load32(&self, offset: u64) -> u32;
    /// Loads eight bytes.
    fn load64(&self, offset: u64) -> u64;
    /// Loads bytes, not crossing a page.
    fn load_bytes(&self, offset: u64, to: &mut [u8]);
    /// Stores a byte. Every store tells the engine's record of pages that hold translated code.
    fn store8(&self, offset: u64, value: u8);
    /// Stores two bytes.
    fn store16(&self, offset: u64, value: u16);
    /// Stores four bytes.
    fn store32(&self, offset: u64, value: u32);
    /// Stores eight bytes.
    fn store64(&self, offset: u64, value: u64);
    /// Stores bytes, not crossing a page.
    fn store_bytes(&self, offset: u64, from: &[u8]);
    /// Copies `count` elements of `size` (1, 2, 4, 8) bytes one after the other, as MOVS does where the ranges
    /// overlap. `from` and `to` are the lowest offsets of the two ranges, each within a page; `down` begins with
    /// the highest elements.
    fn copy_elements(&self, from: u64, to: u64, count: u64, size: u64, down: bool);
    /// Stores `value`, cut to `size` (1, 2, 4, 8) bytes, in `count` elements from an offset on, within a page.
    fn fill_elements(&self, to: u64, value: u64, count: u64, size: u64);
    /// Compares up to `count` (not 0) pairs of elements upwards, each range within a page, while they are `equal`
    /// or while they are not, as CMPS with REPE or REPNE does. `None` where that can't be done.
    fn compare_elements(&self, left: u64, right: u64, count: u64, size: u64, equal: bool)
    -> Option<Compared>;
    /// Compares `value` with up to `count` (not 0) elements upwards within a page, while they are `equal` or while
    /// they are not, as SCAS with REPE or REPNE does. `None` where that can't be done.
    fn scan_elements(&self, value: u64, right: u64, count: u64, size: u64, equal: bool) -> Option<Compared>;
    /// Atomic compare and exchange of `size` (1, 2, 4, 8) bytes; returns the old value. The exchange has
    /// happened if that equals `expected`. Any alignment.
    fn compare_exchange(&self, offset: u64, size: usize, expected: u64, new: u64) -> u64;
    /// The same for 16 bytes, 16-byte aligned.
    fn compare_exchange128(&self, offset: u64, expected: u128, new: u128) -> u128;

    /// Notes that instructions of this RAM page are being cached, and returns the page's generation.
    fn mark_code(&self, offset: u64) -> u32;
    /// The page's generation: it changes when a page that holds cached code is written.
    fn code_generation(&self, offset: u64) -> u32;
    /// A count that grows whenever any page's generation changes.
    fn code_epoch(&self) -> u64;

    /// Reads `size` (1, 2, 4, 8) bytes of a device at a guest-physical address; [`OPEN_BUS`] where none is.
    fn mmio_read(&mut self, gpa: u64, size: usize) -> u64;
    /// Writes `size` bytes to a device.
    fn mmio_write(&mut self, gpa: u64, size: usize, value: u64);
    /// IN of `size` (1, 2, 4) bytes.
    fn port_in(&mut self, port: u16, size: usize) -> u32;
    /// OUT of `size` bytes.
    fn port_out(&mut self, port: u16, size: usize, value: u32);

    /// Whether an event may be waiting. Cheap: asked before every instruction.
    fn has_event(&self) -> bool;
    /// Takes the next event by priority. Interrupts are given only if `interrupts` is true, NMIs only if `nmis` is.
    fn take_event(&mut self, interrupts: bool, nmis: bool) -> Option<Event>;

    /// The time-stamp counter as RDTSC gives it.
    fn tsc(&self) -> u64;
    /// Sets the time-stamp counter (WRMSR to IA32_TIME_STAMP_COUNTER or IA32_TSC_ADJUST).
    fn set_tsc(&mut self, value: u64);
    /// CR8: the task priority class, 0 to 15.
    fn cr8(&self) -> u8;
    /// Sets CR8.
    fn set_cr8(&mut self, value: u8);
    /// Reads an MSR that is not the processor's own (APIC, x2APIC, paravirtual); `None` raises #GP.
    fn read_msr(&mut self, msr: u32) -> Option<u64>;
    /// Writes such an MSR; false raises #GP.
    fn write_msr(&mut self, msr: u32, value: u64) -> bool;
    /// Tells that this processor was reset by INIT, so that its local APIC is too.
    fn on_init(&mut self);
    /// A random number for RDRAND and RDSEED.
    fn random(&mut self) -> u64;
    /// A hypercall (VMCALL or VMMCALL): number in RAX, arguments in RBX, RCX, RDX, RSI, answer to RAX. `None`
    /// where the machine has no paravirtual interface: #UD.
    fn hypercall(&mut self, state: &CpuState) -> Option<u64>;

    /// Executes one instruction on the host's own units. A memory operand stands in `memory`, in and out.
    fn execute_on_host(
        &mut self,
        instruction: &HostInstruction<'_>,
        state: &mut CpuState,
        memory: &mut [u8; 64],
    ) -> HostExecution;
}
