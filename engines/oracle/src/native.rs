//! Executes single instructions natively: in a child process, by signal frames.
//!
//! The child never leaves its signal handler for longer than one instruction: the handler writes the state of a case into
//! the frame that the kernel restores on return, with TF set. The instruction then ends in SIGTRAP, or in the signal
//! of the exception it raised, and the handler finds the state after it in the new frame.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io::{Error, Result};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::layout::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, FS_BASE, GS_BASE, IMAGE_SIZE, IMAGES, Image, Outcome,
    READ_ONLY_SIZE, XSAVE_SIZE,
};

/// Cases of one round trip.
pub const BATCH: usize = 256;
/// How long a batch may take before the child is given up.
const PATIENCE: Duration = Duration::from_secs(20);
/// Trap flag.
const TF: u64 = 0x100;
/// Flags that a signal frame restores.
const RESTORED_FLAGS: u64 = 0x0005_0dd5;
/// Marks a frame with extended state (Linux, `FP_XSTATE_MAGIC1`), at byte 464 of the legacy area.
const EXTENDED_STATE_MAGIC: u32 = 0x4650_5853;
/// `arch_prctl` codes.
const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;

/// Memory that parent and child share.
#[repr(C)]
struct Shared {
    /// The parent counts up: a batch is ready.
    asked: AtomicU32,
    /// The child follows: it is done.
    answered: AtomicU32,
    count: u32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
    images: [Image; IMAGES],
}

/// The child process.
pub struct Native {
    shared: NonNull<Shared>,
    child: libc::pid_t,
}

/// What the child's signal handler knows. Only the child writes it, and it has one thread.
struct ChildState {
    shared: *mut Shared,
    /// Writable view of the code pages.
    code: *mut u8,
    /// Next case, when one is running the one after it.
    next: usize,
    running: bool,
    batch: u32,
    image: usize,
}

static CHILD: AtomicPtr<ChildState> = AtomicPtr::new(null_mut());

/// A system call without the C library, whose thread-local storage is gone once FS is the guest's.
///
/// # Safety
/// As of the system call itself.
unsafe fn system_call(number: i64, arguments: [u64; 4]) -> i64 {
    let result;
    // SAFETY: the kernel changes RAX, RCX and R11 only; the caller answers for what the call does.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result
}

/// Waits until the word is no longer `value`, or for a moment.
fn futex_wait(word: &AtomicU32, value: u32) {
    let timeout = [0u64, 100_000_000];
    // SAFETY: the word and the timeout are live for the call.
    unsafe {
        system_call(
            libc::SYS_futex,
            [word.as_ptr() as u64, libc::FUTEX_WAIT as u64, value.into(), timeout.as_ptr() as u64],
        )
    };
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is live for the call.
    unsafe { system_call(libc::SYS_futex, [word.as_ptr() as u64, libc::FUTEX_WAKE as u64, 1, 0]) };
}

impl Native {
    /// Starts the child with these contents of the data pages.
    ///
    /// # Errors
    /// The host gives no memory or no process.
    pub fn start(images: &[Image; IMAGES]) -> Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let shared = NonNull::new(memory.cast::<Shared>()).ok_or_else(|| Error::other("mapped at zero"))?;
        // SAFETY: fresh zeroed memory, which is a valid `Shared`; nobody else has it yet.
        unsafe { (*shared.as_ptr()).images = *images };
        // SAFETY: the child calls nothing but system calls and `child`, which allocates nothing.
        let child = unsafe { libc::fork() };
        match child {
            0 => {
                // SAFETY: in the new process, which is this function's from here on.
                unsafe { run_child(shared.as_ptr()) }
            }
            _ if child < 0 => Err(Error::last_os_error()),
            _ => Ok(Self { shared, child }),
        }
    }

    /// Hands over a batch of at most [`BATCH`] cases.
    pub fn submit<'a>(&mut self, cases: impl Iterator<Item = &'a Case>) {
        let shared = self.shared.as_ptr();
        // SAFETY: the child waits, and reads and writes nothing but `asked` until that changes.
        unsafe {
            let mut count = 0;
            for (place, case) in (*shared).cases.iter_mut().zip(cases) {
                place.clone_from(case);
                count += 1;
            }
            (*shared).count = count;
            (*shared).asked.fetch_add(1, Ordering::Release);
            futex_wake(&(*shared).asked);
        }
    }

    /// Waits for the outcomes of the batch.
    ///
    /// # Errors
    /// The child has died or does not answer.
    pub fn wait(&mut self) -> Result<&[Outcome]> {
        let shared = self.shared.as_ptr();
        let start = Instant::now();
        loop {
            // SAFETY: the words are atomic; the rest is read when the child waits again.
            let (asked, answered) = unsafe { (&(*shared).asked, &(*shared).answered) };
            let done = answered.load(Ordering::Acquire);
            if done == asked.load(Ordering::Relaxed) {
                // SAFETY: the child waits, and the next `submit` needs `&mut self`.
                let (outcomes, count) = unsafe { (&(*shared).outcomes, (*shared).count as usize) };
                return Ok(&outcomes[..count]);
            }
            futex_wait(answered, done);
            let mut status = 0;
            // SAFETY: the child is ours; the call writes the status.
            let ended = unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) } == self.child;
            if ended {
                return Err(Error::other(format!("the native process died with wait status {status:#x}")));
            }
            if start.elapsed() > PATIENCE {
                return Err(Error::other("the native process does not answer"));
            }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: the process is our child and is waited for here only; the mapping is not used any more.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, &mut status, 0);
            libc::munmap(self.shared.as_ptr().cast(), size_of::<Shared>());
        }
    }
}

/// Ends the child at once.
fn give_up(status: u64) -> ! {
    loop {
        // SAFETY: ends the process.
        unsafe { system_call(libc::SYS_exit_group, [status, 0, 0, 0]) };
    }
}

/// Maps memory in the child, at `address` unless that is null.
unsafe fn map(address: u64, size: usize, protection: i32, flags: i32, file: i32) -> *mut u8 {
    let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    // SAFETY: NOREPLACE keeps every mapping that exists.
    let memory = unsafe {
        libc::mmap(address as *mut c_void, size, protection, flags | fixed | libc::MAP_POPULATE, file, 0)
    };
    if memory == libc::MAP_FAILED || (address != 0 && memory as u64 != address) {
        give_up(3);
    }
    memory.cast()
}

/// The child: maps the address space, and lets the handler do the rest.
unsafe fn run_child(shared: *mut Shared) -> ! {
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: this process has one thread and belongs to this function; what is mapped is new.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let file = libc::memfd_create(c"oracle-code".as_ptr(), 0);
        if file < 0 || libc::ftruncate(file, CODE_SIZE as i64) != 0 {
            give_up(2);
        }
        let code = map(0, CODE_SIZE, read_write, libc::MAP_SHARED, file);
        map(CODE, CODE_SIZE, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, file);
        let data = map(DATA, IMAGE_SIZE, read_write, private, -1);
        data.copy_from_nonoverlapping((&raw const (*shared).images[0]).cast(), IMAGE_SIZE);
        libc::mprotect(data.add(DATA_SIZE).cast(), READ_ONLY_SIZE, libc::PROT_READ);
        let state = map(0, size_of::<ChildState>(), read_write, private, -1).cast::<ChildState>();
        *state = ChildState { shared, code, next: 0, running: false, batch: 0, image: 0 };
        CHILD.store(state, Ordering::Relaxed);
        let stack_size = 1 << 16;
        let stack = map(0, stack_size, read_write, private, -1);
        let stack = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: stack_size };
        libc::sigaltstack(&stack, null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGUSR1]
        {
            if libc::sigaction(signal, &action, null_mut()) != 0 {
                give_up(4);
            }
        }
        let (process, thread) = (libc::getpid(), libc::gettid());
        system_call(libc::SYS_arch_prctl, [ARCH_SET_GS, GS_BASE, 0, 0]);
        system_call(libc::SYS_arch_prctl, [ARCH_SET_FS, FS_BASE, 0, 0]);
        system_call(libc::SYS_tgkill, [process as u64, thread as u64, libc::SIGUSR1 as u64, 0]);
    }
    give_up(5)
}

/// The signal handler's entry: the kernel leaves on what the instruction may have set of AC, NT and ID.
#[unsafe(naked)]
unsafe extern "C" fn entry(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    std::arch::naked_asm!(
        "pushfq",
        "and qword ptr [rsp], {keep}",
        "popfq",
        "jmp {handler}",
        keep = const !0x24_4000i32,
        handler = sym handler,
    )
}

/// General registers in encoding order, as their places in the signal frame.
const FRAME_REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

unsafe extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a frame that is ours until we return; the child's state was made before the
    // first signal and is used by this handler alone, which never interrupts itself.
    let (child, frame) = unsafe { (&mut *CHILD.load(Ordering::Relaxed), &mut (*context).uc_mcontext) };
    let area = frame.fpregs.cast::<u8>();
    // SAFETY: the shared memory is mapped; the parent does not touch cases and outcomes before `answered` changes.
    let shared = unsafe { &mut *child.shared };
    // SAFETY: the frame's state lies on this stack, 512 bytes at least.
    let magic = unsafe { area.add(464).cast::<u32>().read_unaligned() };
    if magic != EXTENDED_STATE_MAGIC {
        give_up(6);
    }
    if child.running {
        child.running = false;
        // SAFETY: the extended state has the AVX component, as the magic says and every host here has.
        unsafe { save_outcome(child, frame, area, &mut shared.outcomes[child.next - 1]) };
    }
    if child.batch != 0 && child.next >= shared.count as usize {
        shared.answered.store(child.batch, Ordering::Release);
        futex_wake(&shared.answered);
    }
    if child.batch == 0 || child.next >= shared.count as usize {
        while shared.asked.load(Ordering::Acquire) == child.batch {
            futex_wait(&shared.asked, child.batch);
        }
        child.batch = shared.asked.load(Ordering::Acquire);
        child.next = 0;
    }
    let case = &shared.cases[child.next];
    // SAFETY: as above.
    unsafe { load_case(child, frame, area, case, &shared.images[case.image as usize % IMAGES]) };
    child.next += 1;
    child.running = true;
}

/// Writes a case into the frame, the code page and the data pages.
unsafe fn load_case(
    child: &mut ChildState,
    frame: &mut libc::mcontext_t,
    area: *mut u8,
    case: &Case,
    image: &Image,
) {
    for (place, value) in FRAME_REGISTERS.iter().zip(case.gpr) {
        frame.gregs[*place as usize] = value as i64;
    }
    frame.gregs[libc::REG_RIP as usize] = case.rip as i64;
    let flags = &mut frame.gregs[libc::REG_EFL as usize];
    *flags = *flags & !(RESTORED_FLAGS as i64) | (case.rflags & RESTORED_FLAGS | TF) as i64;
    let at = (case.rip - CODE) as usize;
    let length = case.code.len().min(CODE_SIZE - at);
    // SAFETY: `at..at + length` lies in the code pages; the area is the kernel's frame, whose software bytes
    // (464 to 511) stay; the data pages are mapped, and nothing refers to them.
    unsafe {
        child.code.add(at).copy_from_nonoverlapping(case.code.as_ptr(), length);
        area.copy_from_nonoverlapping(case.xsave.as_ptr(), 416);
        area.add(576).copy_from_nonoverlapping(case.xsave.as_ptr().add(576), 256);
        let header = area.add(512).cast::<u64>();
        header.write_unaligned(header.read_unaligned() | 7);
        if child.image != case.image as usize % IMAGES {
            child.image = case.image as usize % IMAGES;
            (DATA as *mut u8).copy_from_nonoverlapping(image.as_ptr(), DATA_SIZE);
        }
    }
}

/// Reads the outcome from the frame and the data pages, and puts the image back.
unsafe fn save_outcome(child: &ChildState, frame: &libc::mcontext_t, area: *const u8, outcome: &mut Outcome) {
    let register = |number: i32| frame.gregs[number as usize] as u64;
    for (value, place) in outcome.gpr.iter_mut().zip(FRAME_REGISTERS) {
        *value = register(place);
    }
    outcome.rip = register(libc::REG_RIP);
    outcome.rflags = register(libc::REG_EFL);
    outcome.vector = register(libc::REG_TRAPNO);
    outcome.error = register(libc::REG_ERR);
    outcome.cr2 = if outcome.vector == 14 { register(libc::REG_CR2) } else { 0 };
    // SAFETY: the frame's area has the AVX component; image and data pages are mapped, of the same size, and only
    // this function and `load_case` access the data pages.
    unsafe {
        outcome.xsave.as_mut_ptr().copy_from_nonoverlapping(area, XSAVE_SIZE);
        let image = &(&(*child.shared).images)[child.image][..DATA_SIZE];
        let data = std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_SIZE);
        if outcome.record_changes(image, data) {
            data.copy_from_slice(image);
        }
    }
}
