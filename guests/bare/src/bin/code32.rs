//! 32-bit code in compatibility mode: addresses, the stack and jumps that wrap at 4 GiB, segments that are flat and others,
//! and instructions that 64-bit mode encodes otherwise (Intel SDM volume 1, section 3.4.1.1; volume 2, section 2.2.1).
#![no_std]
#![no_main]

use kit::{
    Suite, catch, cpu,
    memory::{self, Tables, bit, pages},
    segments,
    trap::vector,
};

/// 32-bit instructions; they end in RETF unless a trap ends them.
macro_rules! routine {
    ($($instruction:literal),+ $(,)?) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn code() {
            core::arch::naked_asm!(".code32", $($instruction,)+ ".code64")
        }
        code as *const () as u64
    }};
}

/// Registers that a routine is given.
#[derive(Clone, Copy, Default)]
struct Given {
    eax: u32,
    ecx: u32,
    edx: u32,
    esi: u32,
    edi: u32,
}

/// Linear address of the last page below 4 GiB.
const LAST: u64 = 0xffff_f000;
/// How often each routine runs: first it is unknown, then it isn't.
const ROUNDS: usize = 3;
/// Ring 0 data with base [`LAST`] and no limit.
const AT_LAST: u16 = segments::FREE;
/// Ring 0 data with base 0 and a limit of 1000h.
const SHORT: u16 = segments::FREE + 8;

/// Calls 32-bit code in ring 0; EAX and EDX as it left them.
fn call(code: u64, given: Given) -> (u32, u32) {
    let (eax, edx);
    // SAFETY: the routine leaves the stack as it was, in the end, and changes only memory that a test set apart.
    unsafe {
        core::arch::asm!(
            "mov r12, rsp",
            "mov r13, rbx",
            "mov r14, rbp",
            // What RETF with operands of 32 bits pops.
            "lea r8, [rip + 2f]",
            "sub rsp, 8",
            "mov [rsp], r8d",
            "mov dword ptr [rsp + 4], {long}",
            "push {short}",
            "push r9",
            ".byte 0x48, 0xcb", // RETF of 64 bits
            "2:",
            "mov rsp, r12",
            "mov rbx, r13",
            "mov rbp, r14",
            long = const segments::CODE,
            short = const segments::CODE32,
            in("r9") code,
            inlateout("eax") given.eax => eax,
            inlateout("edx") given.edx => edx,
            inlateout("ecx") given.ecx => _,
            inlateout("esi") given.esi => _,
            inlateout("edi") given.edi => _,
            out("r8") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        )
    };
    (eax, edx)
}

/// Checks that a routine returns this, in EAX and EDX, each time.
fn returns(s: &mut Suite, what: &str, code: u64, given: Given, expected: (u32, u32)) {
    let mut got = expected;
    for _ in 0..ROUNDS {
        got = call(code, given);
        if got != expected {
            break;
        }
    }
    s.check(what, got, expected);
}

#[unsafe(no_mangle)]
fn guest_main() -> ! {
    let mut suite = Suite::new("code32");
    let s = &mut suite;
    let tables = Tables::new();
    // Small pages take the place of the large one that this program lies in.
    (1..512).for_each(|page| tables.map(page << 12, page << 12, bit::P | bit::W));
    // Above and below are pages that only addresses of more than 32 bits reach.
    let [low, last, above, below] = [pages(1), pages(1), pages(1), pages(1)];
    for (linear, page) in [(0, low), (LAST, last), (1 << 32, above), (LAST | 0xffff_ffff << 32, below)] {
        tables.map(linear, page, bit::P | bit::W);
    }
    tables.load();
    for page in [above, below] {
        (0..4096).step_by(4).for_each(|offset| memory::write(page + offset, 0xbad0_0badu32));
    }
    // Flat but for the base, and flat but for the limit.
    segments::set_descriptor(AT_LAST, 0x00cf_9300_0000_ffff | (LAST & 0xff_ffff) << 16 | (LAST >> 24) << 56);
    segments::set_descriptor(SHORT, 0x0040_9300_0000_1000);
    computes(s);
    calls(s);
    encodings(s, low);
    addresses(s, low, last);
    stack(s, low, last);
    strings(s, low, last);
    segment_registers(s, low, last);
    jumps(s, low, last);
    let untouched = [above, below]
        .into_iter()
        .all(|page| (0..4096).step_by(4).all(|offset| memory::read::<u32>(page + offset) == 0xbad0_0bad));
    s.check("nothing was written outside of 32-bit addresses", untouched, true);
    cpu::write_cr3(memory::boot_root());
    suite.finish()
}

fn computes(s: &mut Suite) {
    let lcg = routine!(
        "2: imul eax, eax, 1664525",
        "add eax, 1013904223",
        "adc edx, eax",
        "dec ecx",
        "jnz 2b",
        "retf",
    );
    let expected = (0..100_000).fold((1u32, 0u32), |(x, sum), _| {
        let (next, carry) = x.wrapping_mul(1664525).overflowing_add(1013904223);
        (next, sum.wrapping_add(next).wrapping_add(carry.into()))
    });
    returns(s, "a long loop", lcg, Given { eax: 1, ecx: 100_000, ..Given::default() }, expected);
    let divide = routine!("mul esi", "add eax, 5", "adc edx, 0", "div edi", "retf");
    let product = 0x89ab_cdefu64 * 0x7654_3210 + 5;
    let expected = ((product / 0xf000_0001) as u32, (product % 0xf000_0001) as u32);
    let given = Given { eax: 0x89ab_cdef, esi: 0x7654_3210, edi: 0xf000_0001, ..Given::default() };
    returns(s, "products and quotients of 64 bits", divide, given, expected);
    let vectors = routine!(
        "movd xmm0, eax",
        "movd xmm1, edx",
        "paddd xmm0, xmm1",
        "movd eax, xmm0",
        "sub esp, 8",
        "mov [esp], eax",
        "fild dword ptr [esp]",
        "fadd st(0), st(0)",
        "fistp dword ptr [esp + 4]",
        "mov edx, [esp + 4]",
        "add esp, 8",
        "retf",
    );
    returns(s, "vector and x87 registers", vectors, Given { eax: 20, edx: 22, ..Given::default() }, (42, 84));
}

fn calls(s: &mut Suite) {
    let fibonacci = routine!(
        "call 2f",
        "retf",
        "2: cmp eax, 2",
        "jb 3f",
        "push ebx",
        "push eax",
        "dec eax",
        "call 2b",
        "mov ebx, eax",
        "pop eax",
        "sub eax, 2",
        "call 2b",
        "add eax, ebx",
        "pop ebx",
        "3: ret",
    );
    returns(s, "recursion", fibonacci, Given { eax: 20, ..Given::default() }, (6765, 0));
    let frames = routine!(
        "push eax",
        "push edx",
        "call 2f",
        "retf",
        "2: push ebp",
        "mov ebp, esp",
        "sub esp, 16",
        "and esp, -16",
        "mov ecx, [ebp + 12]",
        "mov [ebp - 8], ecx",
        "mov eax, [ebp - 8]",
        "sub eax, [ebp + 8]",
        "mov edx, [ebp + 8]",
        "leave",
        "ret 8",
    );
    returns(s, "frames and arguments", frames, Given { eax: 50, edx: 8, ..Given::default() }, (42, 8));
    let indirect = routine!(
        "lea edx, [2f]",
        "call edx",
        "push edx",
        "call dword ptr [esp]",
        "mov ecx, 1",
        "lea esi, [3f]",
        "mov [esp], esi",
        "jmp dword ptr [esp + ecx * 4 - 4]",
        "ud2",
        "2: inc eax",
        "ret",
        "3: pop edx",
        "sub edx, esi",
        "retf",
    );
    returns(s, "indirect calls and jumps", indirect, Given { eax: 40, ..Given::default() }, (42, 0));
}

fn encodings(s: &mut Suite, low: u64) {
    let short = routine!(
        ".byte 0x40, 0x66, 0x42, 0x66, 0x4a, 0x42, 0x48, 0x40", // INC EAX; INC DX; DEC DX; INC EDX; DEC EAX; INC EAX
        "retf",
    );
    returns(s, "short increments", short, Given { eax: !0, edx: 0xffff, ..Given::default() }, (0, 0x1_0000));
    memory::write(low + 0x10, 0x1234_5678u32);
    let absolute = routine!(
        ".byte 0xa1, 0x10, 0, 0, 0", // MOV EAX, [10h]
        "inc eax",
        ".byte 0xa3, 0x14, 0, 0, 0", // MOV [14h], EAX
        "mov edx, dword ptr ds:[0x14]",
        ".byte 0xa0, 0x13, 0, 0, 0", // MOV AL, [13h]
        "retf",
    );
    returns(s, "absolute addresses", absolute, Given::default(), (0x1234_5612, 0x1234_5679));
    let high = routine!(
        "mov ah, [esi]",
        "mov bl, 3",
        "mov bh, ah",
        "add [esi + 8], bh",
        "movzx edx, bh",
        "cmp ah, [esi]",
        "setne al",
        "mov [esi + 8], al",
        "movzx eax, ah",
        "retf",
    );
    returns(s, "high bytes and memory", high, Given { esi: 0x10, ..Given::default() }, (0x78, 0x78));
    let pushes = routine!(
        "mov ecx, esp",
        "push esp",
        "pop eax",
        "sub eax, ecx",
        ".byte 0x6a, 0xfe",                // PUSH -2
        ".byte 0x68, 0, 0, 0, 0x80",       // PUSH 80000000h
        ".byte 0xff, 0x35, 0x10, 0, 0, 0", // PUSH [10h]
        "pop edx",
        "add edx, [esp]",
        "add edx, [esp + 4]",
        "push edx",
        "push esp",
        "pop esp",
        "pop edx",
        "add esp, 8",
        "pushad",
        "popad",
        "push ax",
        "pop cx",
        "stc",
        "pushfd",
        "popfd",
        "adc eax, 0",
        "retf",
    );
    let sum = 0x1234_5678u32.wrapping_add(0x8000_0000).wrapping_sub(2);
    returns(s, "pushes and pops", pushes, Given::default(), (1, sum));
    let decimal = routine!("mov al, 0x19", "add al, 0x28", "daa", "aam 16", "movzx eax, ax", "retf");
    returns(s, "instructions that 64-bit mode has not", decimal, Given::default(), (0x407, 0));
    let short_addresses = routine!(
        "xor ebx, ebx",
        ".byte 0x67, 0x8b, 0x00", // MOV EAX, [BX+SI]
        ".byte 0x67, 0xe3, 0x02", // JCXZ over UD2
        "ud2",
        "mov ecx, 3",
        "2: inc edx",
        "loop 2b",
        "retf",
    );
    let given = Given { esi: 0xabcd_0010, ecx: 0x1_0000, ..Given::default() };
    returns(s, "addresses of 16 bits", short_addresses, given, (0x1234_5678, 3));
}

fn addresses(s: &mut Suite, low: u64, last: u64) {
    memory::write(low + 0x10, 0x1111_1111u32);
    memory::write(last + 0xff0, 0x2222_2222u32);
    let sums = routine!("mov eax, [esi + edi]", "mov edx, [ecx - 0x20]", "retf",);
    let given = Given { esi: 0xffff_fff0, edi: 0x20, ecx: 0x10, ..Given::default() };
    returns(s, "sums that wrap", sums, given, (0x1111_1111, 0x2222_2222));
    let scaled = routine!("mov eax, [ecx * 4 - 0x1000]", "lea edx, [esi + edi * 8 + 0x7fffffff]", "retf",);
    let given = Given { ecx: 0x404, esi: 0xffff_fff0, edi: 0x2000_0001, ..Given::default() };
    returns(s, "scaled sums that wrap", scaled, given, (0x1111_1111, 0x7fff_fff7));
    let bits =
        routine!("bts [esi], eax", "setc al", "mov edx, [esi - 4]", "btr dword ptr [esi], ecx", "retf",);
    memory::write(last + 0xffc, 0u32);
    let given = Given { eax: !0, ecx: !0, ..Given::default() };
    returns(s, "bit strings that wrap", bits, given, (0xffff_ff00, 0x8000_0000));
    let exchange = routine!(
        "mov ebx, 7",
        "mov ecx, 9",
        "mov eax, [esi]",
        "mov edx, [esi + 4]",
        "cmpxchg8b [esi]",
        "setz al",
        "movzx eax, al",
        "mov edx, [esi]",
        "lock xadd [esi + 4], edx",
        "add edx, [esi + 4]",
        "retf",
    );
    returns(s, "locked instructions", exchange, Given { esi: 0x40, ..Given::default() }, (1, 25));
}

fn stack(s: &mut Suite, low: u64, last: u64) {
    memory::write(low, [0u32; 16]);
    let pushes = routine!(
        "mov ebx, esp",
        "mov esp, 8",
        "push eax",
        "push edx",
        "push ecx",
        "mov eax, [esp + 8]",
        "mov edx, [esp]",
        "pop esi",
        "pop edi",
        "add edx, edi",
        "mov esp, ebx",
        "retf",
    );
    let given = Given { eax: 1, edx: 20, ecx: 300, ..Given::default() };
    returns(s, "a stack that wraps", pushes, given, (1, 320));
    s.check("its last word", memory::read::<u32>(last + 0xffc), 300);
    let down = routine!(
        "mov ebx, esp",
        "mov esp, 0x10",
        "sub esp, 0x20",
        "mov [esp + 0x20], eax",
        "mov [esp + 0x1c], edx",
        "add esp, 0x24",
        "mov eax, [esp - 4]",
        "mov edx, [esp - 8]",
        "add edx, [esp - 8]",
        "mov esp, ebx",
        "retf",
    );
    let given = Given { eax: 5, edx: 6, ..Given::default() };
    returns(s, "a stack pointer that wraps and comes back", down, given, (5, 12));
    let around = routine!(
        "mov ebx, esp",
        "mov esp, -8",
        "mov [esp], eax",
        "mov [esp + 4], edx",
        "pop eax",
        "pop edx",
        "push ecx",
        "pop ecx",
        "push ecx",
        "pop ecx",
        "push ecx",
        "mov edx, [esp]",
        "mov esp, ebx",
        "retf",
    );
    let given = Given { eax: 5, edx: 6, ecx: 7, ..Given::default() };
    returns(s, "the top of the last page", around, given, (5, 7));
}

fn strings(s: &mut Suite, low: u64, last: u64) {
    let fill = routine!("cld", "rep stosb", "mov eax, edi", "mov edx, ecx", "retf",);
    memory::write(low, [0u32; 16]);
    let given = Given { eax: 0x5a, edi: 0xffff_fff0, ecx: 0x20, ..Given::default() };
    returns(s, "a fill that wraps", fill, given, (0x10, 0));
    let filled =
        (0..16).all(|i| memory::read::<u8>(low + i) == 0x5a && memory::read::<u8>(last + 0xff0 + i) == 0x5a);
    s.check("its bytes", (filled, memory::read::<u8>(low + 16)), (true, 0));
    let copy = routine!("cld", "rep movsd", "mov eax, esi", "mov edx, edi", "retf",);
    (0..4u64).for_each(|i| memory::write(last + 0xff0 + i * 4, 0x100 + i as u32));
    (0..4u64).for_each(|i| memory::write(low + i * 4, 0x200 + i as u32));
    let given = Given { esi: 0xffff_fff0, edi: 0x80, ecx: 8, ..Given::default() };
    returns(s, "a copy that wraps", copy, given, (0x10, 0xa0));
    let words = (memory::read::<u32>(low + 0x8c), memory::read::<u32>(low + 0x90));
    s.check("its words", words, (0x103, 0x200));
    let back = routine!("std", "rep movsb", "cld", "lodsd", "mov edx, esi", "retf");
    let given = Given { esi: 3, edi: 0x103, ecx: 8, ..Given::default() };
    returns(s, "a copy backwards that wraps", back, given, (0x1_0300, 0xffff_ffff));
}

fn segment_registers(s: &mut Suite, low: u64, last: u64) {
    memory::write(low + 0x10, 0x3333u32);
    memory::write(last + 0x10, 0x4444u32);
    let fs = routine!(
        "mov fs, ecx",
        "mov eax, fs:[0x10]",
        "mov edx, fs:[esi + 0x10]",
        "mov ecx, 0x68",
        "mov fs, ecx",
        "add eax, fs:[0x10]",
        "xor ecx, ecx",
        "mov fs, ecx",
        "retf",
    );
    let given = Given { ecx: AT_LAST.into(), esi: 0x1000, ..Given::default() };
    returns(s, "FS with a base, and with a limit", fs, given, (0x7777, 0x3333));
    let data = routine!(
        "mov ds, ecx",
        "mov eax, [esi]",
        "mov ecx, 0x10",
        "mov ds, ecx",
        "mov edx, [esi]",
        "mov ebx, cs:[esi]",
        "sub edx, ebx",
        "push es",
        "mov ecx, 0x60",
        "mov es, ecx",
        "add edx, es:[esi]",
        "pop es",
        "retf",
    );
    let given = Given { ecx: AT_LAST.into(), esi: 0x10, ..Given::default() };
    returns(s, "DS and ES with a base", data, given, (0x4444, 0x4444));
    let outside = routine!("mov gs, ecx", "mov eax, gs:[esi]", "retf");
    for (register, what) in [(0xffd, "the last word of a limited GS"), (0x1000, "beyond the limit of GS")] {
        let given = Given { ecx: SHORT.into(), esi: register, ..Given::default() };
        let got = catch(|| {
            (0..ROUNDS).for_each(|_| {
                call(outside, given);
            });
        });
        s.check(
            what,
            got.map(|trap| (trap.vector, trap.error)),
            (register == 0x1000).then_some((vector::GP, 0)),
        );
    }
}

fn jumps(s: &mut Suite, low: u64, last: u64) {
    // JMP from the last page to the first one; there, a CALL back.
    let put = |at: u64, bytes: &[u8]| (0..).zip(bytes).for_each(|(i, &byte)| memory::write(at + i, byte));
    put(last + 0xfe0, &[0xe9, 0x3b, 0, 0, 0]); // JMP 20h
    put(low + 0x20, &[0x40, 0xe8, 0xca, 0xff, 0xff, 0xff, 0xcb]); // INC EAX; CALL FFFFFFF0h; RETF
    put(last + 0xff0, &[0x42, 0xc3]); // INC EDX; RET
    returns(s, "jumps that wrap", LAST + 0xfe0, Given::default(), (1, 1));
    // A loop whose body lies on both sides.
    put(low + 0x40, &[0x40, 0x49, 0x0f, 0x85, 0xa8, 0xff, 0xff, 0xff, 0xcb]); // INC EAX; DEC ECX; JNZ FFFFFFF0h; RETF
    put(last + 0xff0, &[0x42, 0xe9, 0x4a, 0, 0, 0]); // INC EDX; JMP 40h
    let given = Given { ecx: 1000, ..Given::default() };
    returns(s, "a loop that wraps", LAST + 0xff0, given, (1000, 1000));
    let conditions = routine!(
        "cmp eax, edx",
        "jo 9f",
        "jp 9f",
        "js 2f",
        "jmp 9f",
        "2: jge 9f",
        "jg 9f",
        "jae 9f",
        "je 9f",
        "jbe 3f",
        "9: ud2",
        "3: jl 4f",
        "ud2",
        "4: jecxz 9b",
        "xor ecx, ecx",
        "jecxz 5f",
        "ud2",
        "5: retf",
    );
    let given = Given { eax: 1, edx: 3, ecx: 0x1_0000, ..Given::default() };
    returns(s, "conditions", conditions, given, (1, 3));
}
