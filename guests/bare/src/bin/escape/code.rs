//! Code where no code is: in holes and registers, at the ends of memory and of the address space, random bytes.
use crate::tools::{
    FAR, LastPage, PAGE, Random, WATCHDOG, arm, copy, disarm, holes_are_ones, ram_end, short,
};
use core::arch::asm;
use kit::{
    Suite, Trap, catch, cpu,
    cpu::msr,
    machine,
    memory::{self, Tables, bit, pages, read, write},
    segments,
    trap::vector,
    trapping,
    user::{self, Space},
};

/// Last page of the lower half of the canonical addresses.
const BORDER: u64 = 0x7fff_ffff_f000;
/// Last page of the address space.
const TOP: u64 = 0xffff_ffff_ffff_f000;

pub fn all(s: &mut Suite) {
    if holes_are_ones() {
        s.group("code: holes: ");
        in_holes(s);
        end_of_memory(s);
        s.group("code: ");
    } else {
        s.skip("holes", "they are zeros");
    }
    device_memory(s);
    device_registers(s);
    borders(s);
    non_canonical(s);
    if machine::is_qemu_tcg() {
        s.skip("wild code", "QEMU's TCG does not always come back");
    } else {
        s.group("code: wild code: ");
        wild(s);
        s.group("code: ");
    }
}

/// Calls code that changes RAX, RCX, RDX, RSI and RDI at most; what ended it instead of its return, and its RAX then.
fn call(at: u64) -> (Option<Trap>, u64) {
    let mut value = 0;
    let got = catch(|| {
        // SAFETY: the code keeps to that and returns, or traps.
        unsafe { asm!("call {0}", in(reg) at, inout("rax") value, clobber_abi("C")) }
    });
    (got, got.map_or(value, |trap| trap.frame.registers[14]))
}

/// What code returned in RAX, if it did.
fn returned(at: u64) -> Option<u64> {
    let (trap, value) = call(at);
    if trap.is_none() { Some(value) } else { None }
}

/// Vector and RIP of the trap that ended a call.
fn ended(at: u64) -> Option<(u8, u64)> {
    call(at).0.map(|trap| (trap.vector, trap.frame.rip))
}

/// Writes code.
fn put(at: u64, code: &[u8]) {
    for (offset, &byte) in (0..).zip(code) {
        write(at + offset, byte);
    }
}

fn in_holes(s: &mut Suite) {
    // Ones are no instruction.
    let places = [ram_end(), ram_end() + 0x123, 0x8000_0000, 0xe010_0fff, 0xfed0_0000];
    let got = places.map(ended);
    s.check("their code is #UD", got, places.map(|place| Some((vector::UD, place))));
}

fn end_of_memory(s: &mut Suite) {
    let page = LastPage::borrow();
    (0..PAGE).for_each(|offset| write(page.start + offset, 0x90u8));
    let run_off = ended(page.start);
    // MOV EAX, imm32 whose immediate is in the hole.
    write(page.end - 1, 0xb8u8);
    let (across, value) = call(page.end - 1);
    // JMP back to the start of the page, which returns, and again after it was changed.
    put(page.end - 5, &[0xe9, 0x00, 0xf0, 0xff, 0xff]);
    let returns = [1u8, 2, 3].map(|value| {
        put(page.start, &[0xb8, value, 0, 0, 0, 0xc3]);
        returned(page.end - 5)
    });
    let end = page.end;
    page.restore();
    s.check("code that runs out of RAM", run_off, Some((vector::UD, end)));
    let across = across.map(|trap| (trap.vector, trap.frame.rip, value));
    s.check("an instruction across the end of RAM", across, Some((vector::UD, end + 4, 0xffff_ffff)));
    s.check("a jump from the last bytes of RAM", returns, [Some(1), Some(2), Some(3)]);
}

/// Code in memory that is a device (of the machine for test kernels).
fn device_memory(s: &mut Suite) {
    const MEMORY: u64 = 0xff00_0000;
    write(MEMORY, 0x1234_5678u32);
    if read::<u32>(MEMORY) != 0x1234_5678 {
        return s.skip("a device's memory", "no such device");
    }
    s.group("code: a device's memory: ");
    let right = (0..200u32).filter(|&value| {
        let at = MEMORY + u64::from(value) * 13;
        write(at, 0xb8u8);
        write(at + 1, value);
        write(at + 5, 0xc3u8);
        returned(at) == Some(value.into())
    });
    s.check("two hundred functions", right.count(), 200);
    // XOR EAX, EAX; MOV ECX, 1000; loop: INC EAX; INC BYTE PTR [RIP+8] (of an immediate); LOOP; MOV EDX, n; RET
    let code = [
        0x31, 0xc0, 0xb9, 0xe8, 3, 0, 0, 0xff, 0xc0, 0xfe, 0x05, 3, 0, 0, 0, 0xe2, 0xf6, 0xba, 0, 0, 0, 0,
        0xc3,
    ];
    put(MEMORY + PAGE - 10, &code);
    let counted = returned(MEMORY + PAGE - 10);
    s.check(
        "a loop that changes itself",
        (counted, read::<u8>(MEMORY + PAGE + 8)),
        (Some(1000), 1000u32 as u8),
    );
    s.check("code that runs off its end", ended(MEMORY + 0xffff).map(|got| got.0).is_some(), true);
    s.group("code: ");
}

/// The local APIC's registers as code: additions to what RAX and RCX point to, up to the first ones.
fn device_registers(s: &mut Suite) {
    const LOCAL_APIC: u64 = 0xfee0_0000;
    if machine::is_qemu_tcg() {
        return s.skip("the local APIC's registers as code", "on QEMU they run on into zeros, for long");
    }
    let scratch = pages(2) + 0x800;
    let got = catch(|| {
        // SAFETY: that code adds to the scratch pages, if it does what the registers' values mean.
        unsafe {
            asm!("jmp {0}", in(reg) LOCAL_APIC, in("rax") scratch, in("rcx") scratch, options(noreturn));
        }
    });
    let seen = got.map(|trap| (trap.vector, trap.frame.rip & !0xff));
    s.check("the local APIC's registers as code", seen, Some((vector::UD, LOCAL_APIC)));
}

fn borders(s: &mut Suite) {
    let tables = Tables::new();
    let (lower, upper) = (pages(1), pages(1));
    tables.map(BORDER, lower, bit::P | bit::W);
    tables.map(TOP, upper, bit::P | bit::W);
    tables.load();
    let end = BORDER + PAGE;
    put(BORDER + 0xfff, &[0x90]);
    s.check("code that runs into a non-canonical address", ended(BORDER + 0xfff), Some((vector::GP, end)));
    put(BORDER + 0xfff, &[0x31]);
    s.check("an instruction that ends in one", ended(BORDER + 0xfff), Some((vector::GP, end - 1)));
    put(BORDER + 0xffe, &[0xeb, 0x10]);
    s.check("a jump over the border", ended(BORDER + 0xffe).map(|got| got.0), Some(vector::GP));
    // Behind the last address comes the first one.
    put(TOP + 0xfff, &[0x90]);
    put(0, &[0xb8, 0x4d, 0, 0, 0, 0xc3]);
    s.check("code over the end of the address space", returned(TOP + 0xfff), Some(0x4d));
    put(TOP + 0xffe, &[0xb8, 0x11]);
    put(0, &[0x22, 0x33, 0x44, 0xc3]);
    s.check("an instruction across it", returned(TOP + 0xffe), Some(0x4433_2211));
    put(TOP + 0xffe, &[0xeb, 0x10]);
    put(0x10, &[0xb8, 0x57, 0, 0, 0, 0xe9]);
    // And back: JMP rel32 from 15h to TOP + FF0h, where a RET is.
    write(0x16, (TOP + 0xff0).wrapping_sub(0x1a) as u32);
    put(TOP + 0xff0, &[0xc3]);
    s.check("jumps over it, both ways", returned(TOP + 0xffe), Some(0x57));
    cpu::write_cr3(memory::boot_root());
}

fn non_canonical(s: &mut Suite) {
    let mut random = Random::new(80);
    let right = (0..1_000).filter(|_| {
        let target = 1u64 << 47 | random.next() >> 16;
        let pointer = target;
        let got = [
            trapping!(=> "jmp {0}"; in(reg) target),
            trapping!(=> "call {0}"; in(reg) target),
            trapping!(=> "jmp [{0}]"; in(reg) &raw const pointer),
            trapping!(=> "call [{0}]"; in(reg) &raw const pointer),
            trapping!("push {0}", => "ret"; in(reg) target),
            trapping!("push {0}", => "ret 16"; in(reg) target),
        ];
        got.into_iter().all(|got| short(got) == Some((vector::GP, 0)))
    });
    s.check("a thousand jumps to no address at all", right.count(), 1_000);
}

/// Where SYSCALL enters: straight into a trap.
#[unsafe(naked)]
unsafe extern "C" fn system_call() {
    core::arch::naked_asm!("int 0x92")
}

/// Runs what is in the code page of ring 3, every register pointing to the data page; what ended it.
fn run(cs: u16, rflags: u64) -> Option<Trap> {
    arm();
    let got = catch(|| {
        // SAFETY: every way out of ring 3 is a trap, and that ends in `catch`.
        unsafe {
            asm!(
                "mov ds, {data:e}", "mov es, {data:e}",
                "push {data}", "push {rsp}", "push {rflags}", "push {cs}", "push {rip}",
                "mov rax, {value}", "mov rbx, rax", "mov rcx, rax", "mov rdx, rax", "mov rsi, rax",
                "mov rdi, rax", "mov rbp, rax", "mov r8, rax", "mov r9, rax", "mov r10, rax", "mov r11, rax",
                "mov r12, rax", "mov r13, rax", "mov r14, rax", "mov r15, rax",
                "iretq",
                data = in(reg) u64::from(segments::USER_DATA),
                rsp = in(reg) user::STACK - 0x800,
                rflags = in(reg) rflags,
                cs = in(reg) u64::from(cs),
                rip = in(reg) user::CODE,
                value = in(reg) user::DATA + 0x800,
                options(noreturn)
            )
        }
    });
    disarm(got);
    let mxcsr = 0x1f80u32;
    // SAFETY: puts the floating-point units back to what compiled code expects.
    unsafe { asm!("fninit", "ldmxcsr [{0}]", in(reg) &raw const mxcsr) };
    got
}

/// Sum of the program's own code.
fn own_sum() -> u64 {
    (0x10_0000..0x10_8000).step_by(8).fold(0, |sum, at| sum.rotate_left(1).wrapping_add(read::<u64>(at)))
}

/// Random bytes, and the program's own from odd places, as code of ring 3, in 64-bit and 32-bit mode.
fn wild(s: &mut Suite) {
    const ROUNDS: usize = 4_000;
    const SYSTEM_CALL: u8 = 0x92;
    let mut random = Random::new(81);
    let space = Space::new();
    cpu::wrmsr(msr::STAR, u64::from(segments::USER_CODE32) << 48 | u64::from(segments::CODE) << 32);
    for entry in [msr::LSTAR, msr::CSTAR] {
        cpu::wrmsr(entry, system_call as *const () as u64);
    }
    cpu::wrmsr(msr::SFMASK, 0x4_0700);
    let (before, cr0) = (own_sum(), cpu::read_cr0());
    let ended = (0..ROUNDS).filter(|round| {
        if round & 1 == 0 {
            (0..512).step_by(8).for_each(|offset| write(space.code + offset, random.next()));
        } else {
            copy(0x10_0000 + random.below(0x8000), space.code, 512);
        }
        let cs = random.pick(&[segments::USER_CODE, segments::USER_CODE, segments::USER_CODE32]);
        // IF, and sometimes AC, DF, TF.
        let flags = 0x202 | random.pick(&[0, 0, 0x4_0000, 0x400, 0x100]);
        cpu::write_cr0(cr0 | cpu::cr0::AM);
        let got = run(cs, flags);
        cpu::write_cr0(cr0);
        got.is_some_and(|trap| {
            trap.frame.cs & 3 == 3 || trap.vector == SYSTEM_CALL || trap.vector == WATCHDOG
        })
    });
    let ended = ended.count();
    cpu::write_cr3(memory::boot_root());
    s.check("four thousand pages of it in ring 3", ended, ROUNDS);
    s.check("leave the kernel as it was", own_sum(), before);
    let got = trapping!(=> "call {0}"; in(reg) FAR);
    s.check("and nothing mapped that was not", short(got), Some((vector::PF, memory::fault::I)));
}
