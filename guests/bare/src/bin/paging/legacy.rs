//! Protected mode without long mode: 2-level and PAE paging, and the task switches that only exist there.
//!
//! One routine leaves long mode, makes one access in ring 0 or ring 3, and comes back with the trap that ended it.
use kit::{
    Global, Suite, cpu,
    cpu::cr4,
    memory::{self, bit, fault as code, pages},
    segments::{self, TASK},
    trap::{self, LEAVE_USER, vector},
};

/// What to do, and what came of it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Probe {
    cr3: u32,
    cr4: u32,
    kind: u32,
    ring: u32,
    address: u32,
    vector: u32,
    error: u32,
    cr2: u32,
    value: u32,
    saved_cr3: u32,
    saved_cr4: u32,
    nxe: u32,
    saved_rsp: u64,
}

static PROBE: Global<Probe> = Global::new(Probe {
    cr3: 0,
    cr4: 0,
    kind: 0,
    ring: 0,
    address: 0,
    vector: 0,
    error: 0,
    cr2: 0,
    value: 0,
    saved_cr3: 0,
    saved_cr4: 0,
    nxe: 0,
    saved_rsp: 0,
});

/// Kinds of access.
const READ: u32 = 0;
const WRITE: u32 = 1;
const FETCH: u32 = 2;
const JUMP_TO_TASK: u32 = 3;

/// The selectors of two 32-bit tasks: the one that runs, and the one to switch to.
const TASK32: u16 = segments::FREE;
const OTHER_TASK: u16 = segments::FREE + 0x10;

core::arch::global_asm!(
    r#"
    .section .text
    .set cr3_field, 0
    .set cr4_field, 4
    .set kind_field, 8
    .set ring_field, 12
    .set address_field, 16
    .set vector_field, 20
    .set error_field, 24
    .set cr2_field, 28
    .set value_field, 32
    .set saved_cr3_field, 36
    .set saved_cr4_field, 40
    .set nxe_field, 44
    .set saved_rsp_field, 48

    .global legacy_probe
legacy_probe:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [{probe} + saved_rsp_field], rsp
    mov rax, cr3
    mov [{probe} + saved_cr3_field], eax
    mov rax, cr4
    mov [{probe} + saved_cr4_field], eax
    push 0x18
    lea rax, [rip + legacy_start]
    push rax
    retfq

    .code32
legacy_start:
    mov eax, 0x10
    mov ss, eax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffff6ff                 # LME and NXE off
    or eax, [{probe} + nxe_field]
    wrmsr
    mov eax, [{probe} + cr4_field]
    mov cr4, eax
    mov eax, [{probe} + cr3_field]
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    mov eax, {task}
    ltr ax
    cmp dword ptr [{probe} + ring_field], 3
    jne legacy_access
    mov eax, 0x2b
    mov ds, eax
    mov es, eax
    mov ecx, esp
    push 0x2b
    push ecx
    push 2
    push 0x23
    mov eax, offset legacy_access
    push eax
    iretd

legacy_access:
    mov ebx, [{probe} + address_field]
    mov eax, [{probe} + kind_field]
    cmp eax, 1
    je 2f
    cmp eax, 2
    je 3f
    cmp eax, 3
    je 4f
    mov eax, [ebx]
    mov [{probe} + value_field], eax
    int 0x80
2:  mov dword ptr [ebx], 0x12345678
    int 0x80
3:  call ebx
    int 0x80
4:  .byte 0xea                          # JMP far to the other task
    .long 0
    .short {other}
    int 0x80

    .global legacy_task
legacy_task:
    mov [{probe} + value_field], esi
    int 0x80

    .balign 16
    .global legacy_stubs
legacy_stubs:
    .set number, 0
    .rept 33
    .balign 16
    .if (number == 8) || ((number >= 10) && (number <= 14)) || (number == 17)
    .else
    .byte 0x6a, 0                       # PUSH 0
    .endif
    .byte 0x6a, number                  # PUSH number
    .byte 0xe9                          # JMP
    .long legacy_trap - . - 4
    .set number, number + 1
    .endr

legacy_trap:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov eax, [esp]
    mov [{probe} + vector_field], eax
    mov eax, [esp + 4]
    mov [{probe} + error_field], eax
    mov eax, cr2
    mov [{probe} + cr2_field], eax
    mov eax, cr0
    and eax, 0x7ffffff7                 # PG, and TS, which a task switch sets
    mov cr0, eax
    mov eax, [{probe} + saved_cr4_field]
    mov cr4, eax
    mov eax, [{probe} + saved_cr3_field]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x900
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea                          # JMP far to 64-bit code
    .long legacy_end
    .short 8

    .code64
legacy_end:
    mov rsp, [{probe} + saved_rsp_field]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
    "#,
    probe = sym PROBE,
    task = const TASK32,
    other = const OTHER_TASK,
);

unsafe extern "C" {
    safe fn legacy_probe();
    fn legacy_task();
    static legacy_stubs: [[u8; 16]; 33];
}

/// The 32-bit interrupt table: the exceptions, and the way out of ring 3.
static IDT32: Global<[u64; 129]> = Global::new([0; 129]);

/// 32-bit task state segments (Intel SDM volume 3, figure 8-2): the running one and the other.
static TASKS: Global<[[u32; 26]; 2]> = Global::new([[0; 26]; 2]);

/// Vector, error code and CR2.
type End = (u8, u64, u64);

struct Mode {
    cr3: u64,
    cr4: u64,
    nxe: bool,
}

impl Mode {
    fn probe(&self, ring: u32, kind: u32, address: u64) -> End {
        let probe = Probe {
            cr3: self.cr3 as u32,
            cr4: self.cr4 as u32,
            nxe: if self.nxe { 1 << 11 } else { 0 },
            kind,
            ring,
            address: address as u32,
            ..PROBE.get()
        };
        PROBE.set(probe);
        segments::set_descriptor(TASK32, task_descriptor(0, 103));
        segments::lidt(129 * 8 - 1, IDT32.address());
        legacy_probe();
        trap::load_table();
        segments::set_descriptor(TASK, 0);
        segments::load_task();
        let probe = PROBE.get();
        let vector = if probe.vector == 32 { LEAVE_USER } else { probe.vector as u8 };
        let cr2 = if vector == vector::PF { probe.cr2.into() } else { 0 };
        (vector, probe.error.into(), cr2)
    }
}

fn task_descriptor(index: u64, limit: u64) -> u64 {
    let base = TASKS.address() + index * 104;
    limit & 0xffff | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56
}

/// The access went through.
const THROUGH: End = (LEAVE_USER, 0, 0);

const fn page_fault(error: u64, address: u64) -> End {
    (vector::PF, error, address)
}

pub fn all(s: &mut Suite) {
    for number in 0..33u64 {
        // SAFETY: only the address of the stub is taken.
        let target = unsafe { &raw const legacy_stubs[number as usize] } as u64;
        let gate = target & 0xffff | u64::from(segments::CODE32) << 16 | 0xee00 << 32 | (target >> 16) << 48;
        IDT32.set_at(if number == 32 { LEAVE_USER.into() } else { number as usize }, gate);
    }
    let mut tasks = TASKS.get();
    // ESP0 and SS0.
    tasks[0][1] = segments::stack_top(0) as u32;
    tasks[0][2] = segments::DATA.into();
    TASKS.set(tasks);
    s.group("2-level: ");
    two_level(s);
    s.group("PAE: ");
    pae(s);
    s.group("32-bit: ");
    task_switches(s);
    s.group("");
}

/// Where the probes go: the second 4 MiB.
const HERE: u64 = 0x40_0000;

fn two_level(s: &mut Suite) {
    let (directory, table) = (pages(1), pages(1));
    let page = pages(1);
    let all = (bit::P | bit::W | bit::U) as u32;
    memory::write(page, 0xc3u8);
    let entry = |index: u64| directory + index * 4;
    memory::write(entry(0), bit::PS as u32 | all);
    memory::write(entry(1), table as u32 | all);
    memory::write(table, page as u32 | all);
    let mode = Mode { cr3: directory, cr4: cr4::PSE, nxe: false };
    s.check("ring 0 reads", (mode.probe(0, READ, HERE), PROBE.get().value as u8), (THROUGH, 0xc3));
    s.check("ring 3 reads", mode.probe(3, READ, HERE), THROUGH);
    s.check("ring 3 fetches", mode.probe(3, FETCH, HERE), THROUGH);
    let bits = memory::read::<u32>(table) & (bit::A | bit::D) as u32;
    s.check("reads set the accessed bit", bits, bit::A as u32);
    s.check("ring 3 writes", mode.probe(3, WRITE, HERE), THROUGH);
    let bits = memory::read::<u32>(table) & (bit::A | bit::D) as u32;
    s.check("a write sets the dirty bit", bits, (bit::A | bit::D) as u32);
    s.check("an absent page", mode.probe(0, READ, HERE + 0x1000), page_fault(0, HERE + 0x1000));
    let gone = 0x80_0000;
    s.check("an absent table", mode.probe(3, WRITE, gone), page_fault(code::U | code::W, gone));
    s.check("a fetch is reported as a read", mode.probe(3, FETCH, gone), page_fault(code::U, gone));
    memory::write(table, page as u32 | (bit::P | bit::U) as u32);
    s.check("ring 0 writes read-only", mode.probe(0, WRITE, HERE), page_fault(code::P | code::W, HERE));
    memory::write(table, page as u32 | all);
    memory::write(entry(1), table as u32 | (bit::P | bit::W) as u32);
    s.check("ring 3 reads ring 0's table", mode.probe(3, READ, HERE), page_fault(code::P | code::U, HERE));
    // A 4 MiB page, and the same entry without CR4.PSE: then it is a table.
    memory::write(entry(1), bit::PS as u32 | all);
    memory::write(0x1000u64, 0x5151_5151u32);
    let read = mode.probe(0, READ, HERE + 0x1000);
    s.check("a 4 MiB page", (read, PROBE.get().value), (THROUGH, 0x5151_5151));
    memory::write(entry(1), bit::PS as u32 | all | 1 << 21);
    let got = mode.probe(0, READ, HERE);
    s.check("an unaligned 4 MiB page is reserved", got, page_fault(code::P | code::RSVD, HERE));
}

fn pae(s: &mut Suite) {
    let (pointers, directory, table, page) = (pages(1), pages(1), pages(1), pages(1));
    let all = bit::P | bit::W | bit::U;
    memory::write(page, 0xc3u8);
    memory::write(pointers, directory | bit::P);
    let entry = |index: u64| directory + index * 8;
    memory::write(entry(0), bit::PS | all);
    memory::write(entry(1), 0x20_0000 | bit::PS | all);
    memory::write(entry(2), table | all);
    memory::write(table, page | all);
    let mode = Mode { cr3: pointers, cr4: cr4::PAE, nxe: true };
    s.check("ring 0 reads", (mode.probe(0, READ, HERE), PROBE.get().value as u8), (THROUGH, 0xc3));
    s.check("ring 3 fetches", mode.probe(3, FETCH, HERE), THROUGH);
    s.check("ring 3 writes", mode.probe(3, WRITE, HERE), THROUGH);
    s.check("and makes the page dirty", memory::read::<u64>(table) & bit::D, bit::D);
    memory::write(page, 0xc3u8);
    let gone = 0x4000_0000;
    s.check("an absent directory", mode.probe(0, READ, gone), page_fault(0, gone));
    s.check("a fetch of it", mode.probe(0, FETCH, gone), page_fault(code::I, gone));
    memory::write(table, page | all | bit::NX);
    let got = mode.probe(3, FETCH, HERE);
    s.check("ring 3 fetches no-execute", got, page_fault(code::P | code::I | code::U, HERE));
    let without = Mode { nxe: false, ..mode };
    let got = without.probe(3, READ, HERE);
    s.check("without EFER.NXE the bit is reserved", got, page_fault(code::P | code::RSVD | code::U, HERE));
    memory::write(table, page | all | 1 << 62);
    let got = mode.probe(0, READ, HERE);
    s.check("bits 62 to 52 are reserved", got, page_fault(code::P | code::RSVD, HERE));
    memory::write(table, page | bit::P | bit::U);
    s.check(
        "ring 3 writes read-only",
        mode.probe(3, WRITE, HERE),
        page_fault(code::P | code::W | code::U, HERE),
    );
    memory::write(table, page | all);
    memory::write(entry(1), 0x20_0000 | bit::PS | all | 1 << 13);
    let got = mode.probe(0, READ, 0x20_0000 + 0x1000);
    s.check("an unaligned 2 MiB page is reserved", got, page_fault(code::P | code::RSVD, 0x20_1000));
}

fn task_switches(s: &mut Suite) {
    let directory = pages(1);
    memory::write(directory, (bit::PS | bit::P | bit::W | bit::U) as u32);
    let mode = Mode { cr3: directory, cr4: cr4::PSE, nxe: false };
    let mut tasks = TASKS.get();
    let other = &mut tasks[1];
    *other = [0; 26];
    other[7] = directory as u32;
    other[8] = legacy_task as *const () as u32;
    other[9] = 2;
    other[14] = segments::stack_top(6) as u32;
    other[16] = 0x7a5c_0001;
    other[18] = segments::DATA.into();
    other[19] = segments::CODE32.into();
    other[20] = segments::DATA.into();
    other[21] = segments::DATA.into();
    TASKS.set(tasks);
    let jump = || mode.probe(0, JUMP_TO_TASK, 0);
    segments::set_descriptor(OTHER_TASK, task_descriptor(1, 103));
    s.check("a jump to a task loads its registers", (jump(), PROBE.get().value), (THROUGH, 0x7a5c_0001));
    let access = |selector: u16| segments::GDT.at(usize::from(selector >> 3)) >> 40 & 0xff;
    s.check("and makes it busy and the other free", (access(OTHER_TASK), access(TASK32)), (0x8b, 0x89));
    s.check("#GP by a jump to a busy task", jump(), (vector::GP, OTHER_TASK.into(), 0));
    segments::set_descriptor(OTHER_TASK, task_descriptor(1, 102));
    s.check("#TS by a task that is too short", jump(), (vector::TS, OTHER_TASK.into(), 0));
    segments::set_descriptor(OTHER_TASK, task_descriptor(1, 103) & !(1 << 47));
    s.check("#NP by an absent task", jump(), (vector::NP, OTHER_TASK.into(), 0));
    segments::set_descriptor(OTHER_TASK, 0);
    cpu::cli();
}
