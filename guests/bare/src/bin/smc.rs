//! Self-modifying code: what is executed is what was written last, whoever wrote it and by whatever address
//! (Intel SDM volume 3, sections 8.1.3 and 11.6).
#![no_std]
#![no_main]

use kit::{
    Suite, Trap, catch, cpu,
    memory::{self, Tables, bit, fault, pages},
    segments,
    trap::{LEAVE_USER, vector},
    trapping,
    user::{self, Space},
};

/// MOV EAX, imm32; the immediate follows.
const MOV_EAX: u8 = 0xb8;
const RET: u8 = 0xc3;
const INT3: u8 = 0xcc;

const ALL: u64 = bit::P | bit::W | bit::U;

/// Writes `MOV EAX, value; RET` and leaves its address.
fn put(at: u64, value: u32) -> u64 {
    memory::write(at, MOV_EAX);
    memory::write(at + 1, value);
    memory::write(at + 5, RET);
    at
}

/// Calls generated code, which may change RAX, RCX, RDX, RSI and RDI alone.
fn call(at: u64) -> u64 {
    let value;
    // SAFETY: the code keeps to that and ends in RET, or in a trap that `catch` takes.
    unsafe { core::arch::asm!("call {0}", in(reg) at, out("rax") value, clobber_abi("C")) };
    value
}

/// Serialises, as code that was changed by another linear address needs it.
fn serialize() {
    cpu::cpuid(0, 0);
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let mut suite = Suite::new("smc");
    let s = &mut suite;
    patched(s);
    in_line(s);
    writers(s);
    across_pages(s);
    mappings(s);
    modes(s);
    generated(s);
    suite.finish()
}

fn patched(s: &mut Suite) {
    let page = pages(1);
    put(page, 1);
    let first = call(page);
    put(page, 2);
    s.check("a function called, changed and called", (first, call(page)), (1, 2));
    let all = (0..300u32).all(|value| call(put(page, value)) == value.into());
    s.check("changed three hundred times", all, true);
    let all = (0..300u32).all(|value| {
        memory::write(page + 1, value as u8);
        call(page) & 0xff == u64::from(value & 0xff)
    });
    s.check("one byte of it", all, true);
    // Data beside code.
    put(page, 5);
    let all = (0..300u64).all(|value| {
        memory::write(page + 64, value);
        call(page) == 5 && memory::read::<u64>(page + 64) == value
    });
    s.check("data in the page of code", all, true);
    // As Linux patches: a breakpoint first, then the rest, then the first byte.
    memory::write(page, INT3);
    let got = catch(|| {
        call(page);
    });
    memory::write(page + 1, 77u32);
    memory::write(page, MOV_EAX);
    s.check("a breakpoint set", got.map(|trap| (trap.vector, trap.frame.rip)), Some((vector::BP, page + 1)));
    s.check("and taken away", call(page), 77);
    // Twenty functions in a page, changed in turn.
    let at = |index: u64| page + 128 + index * 16;
    for index in 0..20 {
        put(at(index), index as u32);
    }
    let all = (0..200u64).all(|round| {
        put(at(round % 20), 1000 + round as u32);
        (0..20).all(|index| {
            let since = (round + 20 - index) % 20;
            let expected = if index > round { index } else { 1000 + round - since };
            call(at(index)) == expected
        })
    });
    s.check("twenty functions of one page", all, true);
}

/// Code that changes what is just about to run.
fn in_line(s: &mut Suite) {
    let value: u64;
    // SAFETY: the code is mapped writable, and writes its own immediate alone.
    unsafe {
        core::arch::asm!(
            "lea {at}, [rip + 2f]",
            "mov dword ptr [{at} + 1], 0x1234",
            "2: .byte 0xb8",
            ".long 0",
            at = out(reg) _, out("rax") value,
        )
    };
    s.check("the next instruction", value, 0x1234);
    let value: u64;
    // SAFETY: as above; the loop runs ten times.
    unsafe {
        core::arch::asm!(
            "xor {sum:e}, {sum:e}",
            "mov {count:e}, 10",
            "lea {at}, [rip + 3f]",
            "2:",
            "add dword ptr [{at} + 1], 1",
            "nop",
            "3: .byte 0xb8",
            ".long 0",
            "add {sum}, rax",
            "dec {count:e}",
            "jnz 2b",
            sum = out(reg) value, count = out(reg) _, at = out(reg) _, out("rax") _,
        )
    };
    s.check("a loop that changes its body", value, 55);
    let value: u64;
    // SAFETY: the first round turns the INC into a DEC by its ModRM byte, the second leaves.
    unsafe {
        core::arch::asm!(
            "mov eax, 100",
            "mov ecx, 2",
            "lea {at}, [rip + 3f]",
            "2:",
            "3: .byte 0xff, 0xc0",
            "mov byte ptr [{at} + 1], 0xc8",
            "dec ecx",
            "jnz 2b",
            at = out(reg) _, out("rax") value, out("rcx") _,
        )
    };
    s.check("an instruction behind that becomes another", value, 100);
    // An instruction that overwrites itself and is run again.
    let page = pages(1);
    // mov byte ptr [rip - 7], 0xc3: its own first byte becomes a RET.
    for (offset, byte) in (0..).zip([0xc6u8, 0x05, 0xf9, 0xff, 0xff, 0xff, RET, 0xb8, 9, 0, 0, 0, RET]) {
        memory::write(page + offset, byte);
    }
    let first = call(page);
    let second = catch(|| {
        call(page);
    });
    s.check(
        "an instruction that overwrites itself",
        (first, second.is_none(), memory::read::<u8>(page)),
        (9, true, RET),
    );
}

/// Every way of writing memory reaches code.
fn writers(s: &mut Suite) {
    let page = pages(1);
    let fresh = pages(1);
    let mut check = |what: &str, write: &dyn Fn()| {
        put(page, 1);
        let before = call(page);
        put(fresh, 2);
        memory::write(fresh + 6, 0x9090u16);
        write();
        s.check(what, (before, call(page)), (1, 2));
    };
    check("REP MOVSB", &|| {
        // SAFETY: both pages are this test's.
        unsafe {
            core::arch::asm!("rep movsb", inout("rcx") 8u64 => _, inout("rsi") fresh => _, inout("rdi") page => _)
        }
    });
    check("MOVSQ", &|| {
        // SAFETY: as above.
        unsafe { core::arch::asm!("movsq", inout("rsi") fresh => _, inout("rdi") page => _) }
    });
    check("a vector store", &|| {
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("movups xmm0, [{0}]", "movups [{1}], xmm0", in(reg) fresh, in(reg) page, out("xmm0") _)
        }
    });
    check("an x87 store", &|| {
        // SAFETY: as above; 64-bit integers pass through the x87 unchanged.
        unsafe {
            core::arch::asm!("fild qword ptr [{0}]", "fistp qword ptr [{1}]", in(reg) fresh, in(reg) page)
        }
    });
    check("XCHG", &|| {
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("xchg [{1}], {0}", inout(reg) memory::read::<u64>(fresh) => _, in(reg) page)
        }
    });
    check("LOCK CMPXCHG", &|| {
        let (old, new): (u64, u64) = (memory::read(page), memory::read(fresh));
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("lock cmpxchg [{0}], {1}", in(reg) page, in(reg) new, inout("rax") old => _)
        }
    });
    check("LOCK ADD", &|| {
        // SAFETY: as above.
        unsafe { core::arch::asm!("lock add dword ptr [{0} + 1], 1", in(reg) page) }
    });
    check("PUSH", &|| {
        // SAFETY: the stack pointer comes back at once; interrupts are off.
        unsafe {
            core::arch::asm!(
                "mov {save}, rsp", "lea rsp, [{page} + 8]", "push {value}", "mov rsp, {save}",
                save = out(reg) _, page = in(reg) page, value = in(reg) memory::read::<u64>(fresh),
            )
        }
    });
    check("CALL", &|| {
        // The return address is the code: it is written over the page by a call with its stack there.
        // SAFETY: as above; the call's own return address is discarded.
        unsafe {
            core::arch::asm!(
                "mov {save}, rsp", "lea rsp, [{page} + 24]", "call 2f", "2: mov rsp, {save}",
                "mov rax, [{fresh}]", "mov [{page}], rax",
                save = out(reg) _, page = in(reg) page, fresh = in(reg) fresh, out("rax") _,
            )
        }
    });
    check("SETcc", &|| {
        // SAFETY: as above.
        unsafe {
            core::arch::asm!("mov byte ptr [{0} + 1], 0", "or {0}, {0}", "setnz [{0} + 1]", "inc byte ptr [{0} + 1]", in(reg) page)
        }
    });
    check("BTS", &|| {
        // SAFETY: as above: bit 9 of the page is bit 1 of the immediate, bit 8 its bit 0.
        unsafe { core::arch::asm!("bts qword ptr [{0}], 9", "btr qword ptr [{0}], 8", in(reg) page) }
    });
}

fn across_pages(s: &mut Suite) {
    let two = pages(2);
    let start = two + 0x1000 - 3;
    put(start, 0x1111_1111);
    let first = call(start);
    memory::write(two + 0x1000, 0x22u8);
    let second = call(start);
    memory::write(two + 0xffe, 0x33u8);
    s.check(
        "an instruction across two pages",
        (first, second, call(start)),
        (0x1111_1111, 0x1122_1111, 0x1122_1133),
    );
    let start = two + 0x1000 - 2;
    memory::write(start, 0xb890u16);
    memory::write(start + 2, 0x0101_0101u32);
    memory::write(start + 6, RET);
    let first = call(start);
    // One store into both pages.
    memory::write(start + 1, 0xc302_0202_02b8_u64);
    s.check("one store across two pages", (first, call(start)), (0x0101_0101, 0x0202_0202));
    let (caller, callee) = (two, two + 0x1800);
    put(callee, 1);
    // jmp callee, by a relative offset.
    memory::write(caller, 0xe9u8);
    memory::write(caller + 1, (callee - caller - 5) as u32);
    let first = call(caller);
    put(callee, 2);
    let second = call(caller);
    put(callee + 16, 3);
    memory::write(caller + 1, (callee + 16 - caller - 5) as u32);
    s.check("a jump, its target and then itself", (first, second, call(caller)), (1, 2, 3));
}

/// One page of memory at several addresses, one address for several pages.
fn mappings(s: &mut Suite) {
    const HERE: u64 = 0x1234_5678_9000;
    const THERE: u64 = 0x2345_6789_a000;
    let (one, two) = (pages(1), pages(1));
    let tables = Tables::new();
    tables.load();
    tables.map(HERE, one, ALL);
    tables.map(THERE, one, ALL);
    put(one, 1);
    let first = call(HERE);
    put(THERE, 2);
    serialize();
    s.check("code changed by another address", (first, call(HERE), call(THERE)), (1, 2, 2));
    put(one, 3);
    serialize();
    s.check("and by its physical one", (call(HERE), call(THERE), call(one)), (3, 3, 3));
    put(two, 4);
    tables.map(HERE, two, ALL);
    s.check("another page under the code's address", (call(HERE), call(THERE)), (4, 3));
    let all = (0..50u32).all(|round| {
        let (page, expected) = if round & 1 == 0 { (one, 3) } else { (two, 4) };
        tables.map(HERE, page, ALL);
        call(HERE) == expected
    });
    s.check("to and fro", all, true);

    let other = Tables::new();
    other.map(HERE, one, ALL);
    tables.map(HERE, two, ALL);
    let all = (0..50u32).all(|round| {
        let (space, expected) = if round & 1 == 0 { (&other, 3) } else { (&tables, 4) };
        space.load();
        call(HERE) == expected
    });
    tables.load();
    s.check("two address spaces with other code at one address", all, true);

    // Rights taken from code that has run.
    let fetch = || {
        catch(|| {
            call(HERE);
        })
        .map(|trap: Trap| (trap.vector, trap.error, trap.cr2))
    };
    tables.map(HERE, two, ALL | bit::NX);
    s.check("code that is made data", fetch(), Some((vector::PF, fault::P | fault::I, HERE)));
    tables.map(HERE, two, 0);
    s.check("code that is taken away", fetch(), Some((vector::PF, fault::I, HERE)));
    tables.map(HERE, two, bit::P);
    s.check("code that comes back read-only", call(HERE), 4);
    let got = trapping!(=> "mov byte ptr [{0}], 0"; in(reg) HERE);
    s.trap("and is written", got, vector::PF, fault::P | fault::W, "at");
    s.check("is as it was", call(HERE), 4);
    // A jump from one page into another that is mapped anew.
    let jump = HERE - 0x1000;
    let from = pages(1);
    tables.map(jump, from, ALL);
    memory::write(from + 0xffb, 0xe9u8);
    memory::write(from + 0xffc, 0u32);
    tables.map(HERE, one, ALL);
    let first = call(jump + 0xffb);
    tables.map(HERE, two, ALL);
    s.check("a jump into a page that is mapped anew", (first, call(jump + 0xffb)), (3, 4));
    // The same, with no jump: code that runs on over the end of its page.
    memory::write(from + 0xffb, 0x90u8);
    memory::write(from + 0xffc, 0x9090_9090u32);
    let first = call(jump + 0xffb);
    tables.map(HERE, one, ALL);
    s.check("and running on into it", (first, call(jump + 0xffb)), (4, 3));
    cpu::write_cr3(memory::boot_root());
}

/// The same bytes in other modes and rings.
fn modes(s: &mut Suite) {
    #[unsafe(naked)]
    unsafe extern "C" fn increments() {
        // Twice INC EAX in 32-bit code, two REX prefixes and no increment in 64-bit code.
        core::arch::naked_asm!("xor eax, eax", ".byte 0x40, 0x40, 0x90", "int 0x80")
    }
    let space = Space::new();
    let all = (0..20u32).all(|round| {
        let (cs, expected) =
            if round & 1 == 0 { (segments::USER_CODE, 0) } else { (segments::USER_CODE32, 2) };
        let got = space.run_as(cs, increments, 2);
        got.map(|trap| (trap.vector, trap.frame.registers[14])) == Some((LEAVE_USER, expected))
    });
    s.check("the same bytes as 64-bit and as 32-bit code", all, true);
    // CLI; RET: in ring 0 it runs, in ring 3 it faults.
    memory::write(space.code, 0xc3fau16);
    let all = (0..20u32).all(|round| {
        if round & 1 == 0 {
            catch(|| {
                call(user::CODE);
            })
            .is_none()
        } else {
            let got = user::enter(segments::USER_CODE, user::CODE, user::STACK, 2);
            got.map(|trap| (trap.vector, trap.frame.rip)) == Some((vector::GP, user::CODE))
        }
    });
    s.check("the same bytes in ring 0 and in ring 3", all, true);
    cpu::write_cr3(memory::boot_root());
}

/// A generator of code: each round another straight line of additions, run and replaced.
fn generated(s: &mut Suite) {
    let page = pages(1);
    let mut seed = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let all = (0..200).all(|_| {
        let mut at = page + (next() & 0x3f);
        let start = at;
        // XOR EAX, EAX.
        memory::write(at, 0xc031u16);
        at += 2;
        let mut sum = 0u32;
        for _ in 0..next() % 40 {
            let addend = next() as u32;
            // ADD EAX, imm32.
            memory::write(at, 0x05u8);
            memory::write(at + 1, addend);
            at += 5;
            sum = sum.wrapping_add(addend);
        }
        memory::write(at, RET);
        call(start) == sum.into()
    });
    s.check("two hundred generated functions", all, true);
}
