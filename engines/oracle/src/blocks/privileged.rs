//! What only the interpreter can be compared with: the supervisor's instructions, and ways between it and user mode.
//!
//! System registers get values with which the sequence can go on, mostly; the monitor brings them back.

use bivisor_x86::registers::{Cr0, Cr4, Rflags};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::build::{Builder, Class, RSP, Way, at, made, r32, r64};
use super::code::Form;
use super::layout::{CONTROL, INTERRUPT_NUDGE, NUDGE};
use super::monitor::PAGE_TABLE;
use crate::layout::{CODE, DATA, PAGE, USER_CS, USER_SS};
use crate::system::KERNEL_CS;

/// Bits of page-table entries that are changed: writable, user, no-execute.
const ENTRY_BITS: [u8; 3] = [1, 2, 63];
/// Bits of CR4 that sequences can live with, set or clear.
const CR4_BITS: [Cr4; 10] = [
    Cr4::TSD,
    Cr4::DE,
    Cr4::PGE,
    Cr4::PCE,
    Cr4::OSFXSR,
    Cr4::OSXMMEXCPT,
    Cr4::UMIP,
    Cr4::FSGSBASE,
    Cr4::OSXSAVE,
    Cr4::SMAP,
];
/// Bits of CR0 likewise.
const CR0_BITS: [Cr0; 6] = [Cr0::TS, Cr0::MP, Cr0::EM, Cr0::AM, Cr0::WP, Cr0::NE];
/// MSRs that hold linear addresses, and others that hold anything.
const ADDRESS_MSRS: [u32; 3] = [0xc000_0100, 0xc000_0101, 0xc000_0102];
/// See [`ADDRESS_MSRS`].
const OTHER_MSRS: [u32; 6] = [0xc000_0081, 0xc000_0084, 0xc000_0103, 0x277, 0xc000_0080, 0x1b];
/// Instructions without operands, for the supervisor.
const PLAIN: [&[u8]; 9] = [
    &[0x0f, 0x06],       // clts
    &[0x0f, 0x01, 0xf8], // swapgs
    &[0x0f, 0x01, 0xca], // clac
    &[0x0f, 0x01, 0xcb], // stac
    &[0xfa],             // cli
    &[0xfb],             // sti
    &[0x0f, 0x09],       // wbinvd
    &[0x0f, 0x01, 0xd0], // xgetbv
    &[0x0f, 0xa2],       // cpuid
];

impl Builder<'_> {
    /// One of the privileged things.
    pub fn privileged(&mut self) {
        if !self.is_supervisor {
            match self.random.below(8) {
                0..=4 => self.system_call(),
                5 => self.interrupt_instruction(),
                6 => self.plain(),
                _ => self.read_system(),
            }
            return;
        }
        match self.random.below(30) {
            0..=5 => self.plain(),
            6..=9 => self.read_system(),
            10 | 11 => self.change_control(),
            12..=14 => self.change_entry(),
            15..=17 => self.write_msr(),
            18 | 19 => self.load_segment(),
            20 | 21 => self.write_base(),
            22 | 23 => self.leave_for_user(),
            24 | 25 => self.interrupt_return(),
            26 => self.halt(),
            27 => self.debug_register(),
            28 => self.interrupt_flag(),
            _ => self.interrupt_instruction(),
        }
        self.targetable = true;
    }

    fn plain(&mut self) {
        let bytes = self.random.pick(&PLAIN);
        if bytes == [0x0f, 0xa2] {
            let leaf = self.random.pick(&[0u32, 1, 7, 0xd, 0x8000_0001, 0x8000_0008, 0x4000_0000]);
            self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, leaf)));
            self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, 0u32)));
        } else if bytes == [0x0f, 0x01, 0xd0] {
            self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, 0u32)));
        }
        self.emit(bytes, None);
    }

    fn read_system(&mut self) {
        let number = self.any_free();
        let place = at(self.data_address());
        let control =
            self.random.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4, Register::CR8]);
        let segment =
            self.random.pick(&[Register::CS, Register::SS, Register::DS, Register::FS, Register::GS]);
        let instruction = match self.random.below(9) {
            0..=2 => Instruction::with2(Code::Mov_r64_cr, r64(number), control),
            3 => Instruction::with1(Code::Sgdt_m1664, place),
            4 => Instruction::with1(Code::Sidt_m1664, place),
            5 => Instruction::with1(Code::Smsw_r32m16, r32(number)),
            6 => Instruction::with1(Code::Str_r32m16, r32(number)),
            7 => Instruction::with1(Code::Sldt_r32m16, r32(number)),
            _ => Instruction::with2(Code::Mov_r32m16_Sreg, r32(number), segment),
        };
        self.assemble(made(instruction));
    }

    /// Changes a bit of CR0 or CR4, or CR3, CR2 or CR8.
    fn change_control(&mut self) {
        let number = self.any_free();
        let register = r64(number);
        let (control, bit) = match self.random.below(3) {
            0 => (Register::CR0, self.random.pick(&CR0_BITS).bits()),
            1 => (Register::CR4, self.random.pick(&CR4_BITS).bits()),
            _ => (self.random.pick(&[Register::CR3, Register::CR2, Register::CR8]), 0),
        };
        self.assemble(made(Instruction::with2(Code::Mov_r64_cr, register, control)));
        // What would otherwise be loaded would be some other control register.
        self.targetable = false;
        if bit != 0 {
            self.settle_flags();
            self.assemble(made(Instruction::with2(Code::Xor_rm64_imm32, register, bit as i32)));
        }
        self.settle_flags();
        self.assemble(made(Instruction::with2(Code::Mov_cr_r64, control, register)));
    }

    /// Changes a bit of the page-table entry of a code or data page, or exchanges two data pages. The TLB is told.
    fn change_entry(&mut self) {
        let entry = |linear: u64| PAGE_TABLE + 8 * (linear >> 12 & 0x1ff);
        let pages = [DATA, DATA + PAGE, DATA + 2 * PAGE, CONTROL, CODE + PAGE];
        let page = self.random.pick(&pages);
        self.assemble(made(Instruction::with2(Code::Mov_r64_imm64, Register::RAX, entry(page))));
        self.targetable = false;
        let top = MemoryOperand::with_base(Register::RAX);
        if self.random.once_in(4) {
            let other = MemoryOperand::with_base_displ(Register::RAX, 8);
            self.assemble(made(Instruction::with2(Code::Mov_r64_imm64, Register::RAX, entry(DATA))));
            self.assemble(made(Instruction::with2(Code::Mov_r64_rm64, Register::RDX, top)));
            self.assemble(made(Instruction::with2(Code::Xchg_rm64_r64, other, Register::RDX)));
            self.assemble(made(Instruction::with2(Code::Mov_rm64_r64, top, Register::RDX)));
        } else {
            let bit = self.random.pick(&ENTRY_BITS);
            self.settle_flags();
            self.assemble(made(Instruction::with2(Code::Btc_rm64_imm8, top, i32::from(bit))));
        }
        self.settle_flags();
        if self.random.once_in(4) {
            self.assemble(made(Instruction::with2(Code::Mov_r64_cr, Register::RAX, Register::CR3)));
            self.assemble(made(Instruction::with2(Code::Mov_cr_r64, Register::CR3, Register::RAX)));
        } else {
            for page in pages {
                self.assemble(made(Instruction::with1(Code::Invlpg_m, at(page))));
            }
        }
        // What page tables hold is not the same everywhere.
        let value = self.random.bits() as u32;
        self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, value)));
        self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::EDX, value)));
    }

    fn write_msr(&mut self) {
        let (msr, value) = match self.random.below(3) {
            0 => (self.random.pick(&ADDRESS_MSRS), self.data_address() - 0x200),
            1 => (self.random.pick(&OTHER_MSRS), 0),
            _ => (self.random.pick(&OTHER_MSRS), self.random.integer()),
        };
        self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, msr)));
        self.targetable = false;
        // Those that are not for addresses are read and changed a little.
        let reads = value == 0 || self.random.once_in(4);
        if reads {
            self.assemble(Instruction::with(Code::Rdmsr));
            self.settle_flags();
            if msr == 0xc000_0080 {
                self.assemble(made(Instruction::with2(Code::Xor_rm32_imm8, Register::EAX, 1)));
            }
        } else {
            let safe = if msr == 0xc000_0080 { 0xd01 } else { value };
            self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, safe as u32)));
            self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, Register::EDX, (safe >> 32) as u32)));
        }
        self.settle_flags();
        self.assemble(Instruction::with(Code::Wrmsr));
    }

    fn load_segment(&mut self) {
        let number = self.any_free();
        let selector = self.random.pick(&[0u32, 0, 0x10, 0x18, 0x2b, 0x33, 0x3b, 0x40, 3]);
        let segment =
            self.random.pick(&[Register::DS, Register::ES, Register::FS, Register::GS, Register::SS]);
        self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, r32(number), selector)));
        let instruction = match self.random.below(6) {
            0 => Instruction::with2(Code::Lar_r32_r32m16, r32(number), r32(number)),
            1 => Instruction::with2(Code::Lsl_r32_r32m16, r32(number), r32(number)),
            2 => Instruction::with1(Code::Verr_r32m16, r32(number)),
            _ => Instruction::with2(Code::Mov_Sreg_r32m16, segment, r32(number)),
        };
        self.assemble(made(instruction));
    }

    fn write_base(&mut self) {
        let number = self.any_free();
        let value = self.data_address() - 0x200;
        self.assemble(made(Instruction::with2(Code::Mov_r64_imm64, r64(number), value)));
        let code = self.random.pick(&[
            Code::Wrfsbase_r64,
            Code::Wrgsbase_r64,
            Code::Rdfsbase_r64,
            Code::Rdgsbase_r64,
            Code::Wrgsbase_r32,
        ]);
        let register = if code == Code::Wrgsbase_r32 { r32(number) } else { r64(number) };
        self.assemble(made(Instruction::with1(code, register)));
    }

    /// SYSCALL: execution goes on where LSTAR says, which is where supervisor code stands.
    fn system_call(&mut self) {
        self.guard();
        self.emit(&[0x0f, 0x05], None);
    }

    /// SYSRET to some instruction.
    fn leave_for_user(&mut self) {
        self.guard();
        let flags = (self.random.bits() & Rflags::ARITHMETIC.bits()) as u32 | 0x202;
        self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, r32(11), flags)));
        // mov ecx, target
        self.refer(&[0xb9, 0, 0, 0, 0], 1, Form::Absolute, Way::Anywhere, 4);
        self.emit(&[0x48, 0x0f, 0x07], None);
        self.is_supervisor = !self.random.once_in(2);
    }

    /// IRETQ to some instruction, in this mode or another.
    fn interrupt_return(&mut self) {
        self.establish(RSP, Class::Pointer);
        self.guard();
        let to_user = self.random.once_in(2);
        let (cs, ss) = if to_user { (USER_CS.into(), USER_SS.into()) } else { (KERNEL_CS, 0) };
        let flags = (self.random.bits() & Rflags::ARITHMETIC.bits()) as i32 | 0x202;
        self.assemble(made(Instruction::with1(Code::Push_r64, Register::RSP)));
        self.assemble(made(Instruction::with1(Code::Pop_r64, Register::RAX)));
        self.assemble(made(Instruction::with1(Code::Pushq_imm32, ss)));
        self.assemble(made(Instruction::with1(Code::Push_r64, Register::RAX)));
        self.assemble(made(Instruction::with1(Code::Pushq_imm32, flags)));
        self.assemble(made(Instruction::with1(Code::Pushq_imm32, cs as i32)));
        self.refer(&[0x68, 0, 0, 0, 0], 1, Form::Absolute, Way::Anywhere, 4);
        self.emit(&[0x48, 0xcf], None);
    }

    /// HLT with an interrupt waiting.
    fn halt(&mut self) {
        self.emit(&[0xfa], None);
        self.targetable = false;
        let nudge = Instruction::with2(Code::Mov_rm8_imm8, at(NUDGE), INTERRUPT_NUDGE as i32);
        self.assemble(made(nudge));
        self.settle_flags();
        self.emit(&[0xfb], None);
        self.emit(&[0xf4], None);
    }

    /// CLI, an interrupt, something, STI.
    fn interrupt_flag(&mut self) {
        self.emit(&[0xfa], None);
        let nudge = Instruction::with2(Code::Mov_rm8_imm8, at(NUDGE), INTERRUPT_NUDGE as i32);
        self.assemble(made(nudge));
        self.ordinary();
        self.emit(&[0xfb], None);
    }

    /// A breakpoint on a data page, or a debug register read.
    fn debug_register(&mut self) {
        let number = self.any_free();
        let register = self.random.pick(&[Register::DR0, Register::DR3, Register::DR6, Register::DR7]);
        if !self.watched || self.random.once_in(2) {
            self.assemble(made(Instruction::with2(Code::Mov_r64_dr, r64(number), register)));
            return;
        }
        let address = self.data_address() & !7;
        self.assemble(made(Instruction::with2(Code::Mov_r64_imm64, r64(number), address)));
        self.targetable = false;
        self.assemble(made(Instruction::with2(Code::Mov_dr_r64, Register::DR0, r64(number))));
        // DR0, stores or all accesses, 8 bytes.
        let control = self.random.pick(&[0x9_0402u32, 0xb_0402, 0x400]);
        self.assemble(made(Instruction::with2(Code::Mov_r32_imm32, r32(number), control)));
        self.assemble(made(Instruction::with2(Code::Mov_dr_r64, Register::DR7, r64(number))));
    }

    fn interrupt_instruction(&mut self) {
        let vector = self.random.pick(&[3u8, 1, 6, 13, 14, 32, 0x21, 0x80]);
        if self.random.once_in(4) {
            self.emit(&[0xcd, vector], None);
        }
    }
}
