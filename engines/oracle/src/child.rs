//! A child process that executes code natively, out of signal frames, and the memory shared with it.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io::{Error, Result};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::layout::{State, XSAVE_SIZE};

/// How long a batch may take before the child is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Flags that a signal frame restores.
const RESTORED_FLAGS: u64 = 0x0005_0dd5;
/// Marks a frame with extended state (Linux, `FP_XSTATE_MAGIC1`), at byte 464 of the legacy area.
const EXTENDED_STATE_MAGIC: u32 = 0x4650_5853;
/// `arch_prctl` codes.
const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
/// The signal to a child that does not get on.
pub(crate) const NUDGE: i32 = libc::SIGUSR2;
/// How often the child may be found where it was before, every tenth of a second.
const STANDSTILLS: u32 = 3;
/// Signals that an instruction may raise, and one that starts the child's work.
const SIGNALS: [i32; 6] =
    [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGUSR1];

/// By what parent and child take turns.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Turns {
    /// The parent counts up: a batch is ready.
    asked: AtomicU32,
    /// The child follows: it is done.
    answered: AtomicU32,
}

/// Memory that starts with the turns, valid when all bytes are zero.
///
/// # Safety
/// `turns` must lead to a field; all zeroes must be a valid value.
pub(crate) unsafe trait Shared: Sized {
    /// The turns.
    fn turns(&self) -> &Turns;
    /// What changes as long as the child gets on. When it doesn't, the child gets [`NUDGE`].
    fn progress(&self) -> Option<u32> {
        None
    }
}

/// The parent's end.
pub(crate) struct Process<T: Shared> {
    shared: NonNull<T>,
    child: libc::pid_t,
}

impl<T: Shared> Process<T> {
    /// Starts a child that executes `main`. `prepare` fills in the shared memory before.
    ///
    /// # Errors
    /// The host gives no memory or no process.
    pub(crate) fn start(main: unsafe fn(*mut T) -> !, prepare: impl FnOnce(&mut T)) -> Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                null_mut(),
                size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        let mut shared = NonNull::new(memory.cast::<T>()).ok_or_else(|| Error::other("mapped at zero"))?;
        // SAFETY: fresh zeroed memory, which is a valid `T`; nobody else has it yet.
        prepare(unsafe { shared.as_mut() });
        // SAFETY: the child calls nothing but system calls and `main`, which allocates nothing.
        let child = unsafe { libc::fork() };
        match child {
            0 => {
                // SAFETY: in the new process, which is this function's from here on.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    main(shared.as_ptr())
                }
            }
            _ if child < 0 => Err(Error::last_os_error()),
            _ => Ok(Self { shared, child }),
        }
    }

    /// Lets `fill` write a batch, and the child work on it. The former batch must have been waited for.
    pub(crate) fn submit(&mut self, fill: impl FnOnce(&mut T)) {
        // SAFETY: the child waits, and reads and writes nothing but the turns until `asked` changes.
        let shared = unsafe { self.shared.as_mut() };
        fill(shared);
        let asked = &shared.turns().asked;
        asked.fetch_add(1, Ordering::Release);
        futex_wake(asked);
    }

    /// Waits until the child is done with the batch.
    ///
    /// # Errors
    /// The child has died or does not answer.
    pub(crate) fn wait(&mut self) -> Result<&T> {
        // SAFETY: the turns are atomic; all else is looked at by the caller, when the child waits again, and until
        // the next `submit`, which needs `&mut self`.
        let shared = unsafe { self.shared.as_ref() };
        let Turns { asked, answered } = shared.turns();
        let start = Instant::now();
        let mut progress = None;
        let mut standstills = 0;
        loop {
            let done = answered.load(Ordering::Acquire);
            if done == asked.load(Ordering::Relaxed) {
                return Ok(shared);
            }
            futex_wait(answered, done);
            let mut status = 0;
            // SAFETY: the child is ours; the call writes the status.
            let ended = unsafe { libc::waitpid(self.child, &mut status, libc::WNOHANG) } == self.child;
            if ended {
                return Err(Error::other(format!("the native process died with wait status {status:#x}")));
            }
            standstills = if shared.progress() == progress { standstills + 1 } else { 0 };
            progress = shared.progress();
            if progress.is_some() && standstills >= STANDSTILLS {
                // SAFETY: the child is ours, and was not waited for.
                unsafe { libc::kill(self.child, NUDGE) };
            }
            if start.elapsed() > PATIENCE {
                return Err(Error::other("the native process does not answer"));
            }
        }
    }
}

impl<T: Shared> Drop for Process<T> {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: the process is our child and is waited for here only; the mapping is not used any more.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, &mut status, 0);
            libc::munmap(self.shared.as_ptr().cast(), size_of::<T>());
        }
    }
}

/// The child's side of the turns.
pub(crate) struct Work {
    batch: u32,
}

impl Work {
    /// Before the first batch.
    pub(crate) const fn new() -> Self {
        Self { batch: 0 }
    }

    /// Whether no batch was taken up yet.
    pub(crate) fn is_idle(&self) -> bool {
        self.batch == 0
    }

    /// Tells the parent that the batch is done, if there was one, and waits for the next.
    pub(crate) fn next_batch(&mut self, turns: &Turns) {
        if self.batch != 0 {
            turns.answered.store(self.batch, Ordering::Release);
            futex_wake(&turns.answered);
        }
        while turns.asked.load(Ordering::Acquire) == self.batch {
            futex_wait(&turns.asked, self.batch);
        }
        self.batch = turns.asked.load(Ordering::Acquire);
    }
}

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

/// Ends the child at once.
pub(crate) fn give_up(status: u64) -> ! {
    loop {
        // SAFETY: ends the process.
        unsafe { system_call(libc::SYS_exit_group, [status, 0, 0, 0]) };
    }
}

/// Maps memory in the child, at `address` unless that is null.
///
/// # Safety
/// For the child only, which it ends on failure.
pub(crate) unsafe fn map(address: u64, size: usize, protection: i32, flags: i32, file: i32) -> *mut u8 {
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

/// Maps private memory that may be read and written.
///
/// # Safety
/// As of [`map`].
pub(crate) unsafe fn map_private(address: u64, size: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: by the caller's promise.
    unsafe { map(address, size, libc::PROT_READ | libc::PROT_WRITE, flags, -1) }
}

/// A file in memory for code pages, and a writable view of it.
///
/// # Safety
/// As of [`map`].
pub(crate) unsafe fn code_file(size: usize) -> (i32, *mut u8) {
    // SAFETY: makes a new file and a new mapping.
    unsafe {
        let file = libc::memfd_create(c"oracle-code".as_ptr(), 0);
        if file < 0 || libc::ftruncate(file, size as i64) != 0 {
            give_up(2);
        }
        (file, map(0, size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file))
    }
}

/// What a signal handler looks like.
pub(crate) type Handler = unsafe extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t);

/// Makes every signal of an instruction go to `handler`, on a stack of its own, with these `blocked`; sets the bases
/// of FS and GS, and raises a first signal. The handler never returns here.
///
/// # Safety
/// For the child only. The handler must be one that needs no thread-local storage.
pub(crate) unsafe fn live_in_handler(handler: Handler, blocked: &[i32], fs_base: u64, gs_base: u64) -> ! {
    // SAFETY: this process has one thread, which gives up everything but the handler; what is mapped is new.
    unsafe {
        let stack_size = 1 << 16;
        let stack = map_private(0, stack_size);
        let stack = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: stack_size };
        libc::sigaltstack(&stack, null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in blocked {
            libc::sigaddset(&mut action.sa_mask, *signal);
        }
        for signal in SIGNALS.iter().chain(blocked) {
            if libc::sigaction(*signal, &action, null_mut()) != 0 {
                give_up(4);
            }
        }
        let (process, thread) = (libc::getpid(), libc::gettid());
        system_call(libc::SYS_arch_prctl, [ARCH_SET_GS, gs_base, 0, 0]);
        system_call(libc::SYS_arch_prctl, [ARCH_SET_FS, fs_base, 0, 0]);
        system_call(libc::SYS_tgkill, [process as u64, thread as u64, libc::SIGUSR1 as u64, 0]);
    }
    give_up(5)
}

/// A signal handler's entry that jumps to another one: the kernel leaves on what the instruction may have set of AC,
/// NT and ID.
macro_rules! handler_entry {
    ($entry:ident, $handler:ident) => {
        #[unsafe(naked)]
        unsafe extern "C" fn $entry(_: i32, _: *mut libc::siginfo_t, _: *mut libc::ucontext_t) {
            std::arch::naked_asm!(
                "pushfq",
                "and qword ptr [rsp], {keep}",
                "popfq",
                "jmp {handler}",
                keep = const !0x24_4000i32,
                handler = sym $handler,
            )
        }
    };
}
pub(crate) use handler_entry;

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

/// What a signal interrupted, as the kernel laid it down and takes it up again.
pub(crate) struct Frame<'a> {
    registers: &'a mut libc::mcontext_t,
    /// The area of XSAVE, on the stack.
    area: *mut u8,
}

impl<'a> Frame<'a> {
    /// The frame of a signal.
    ///
    /// # Safety
    /// `context` is what the kernel passed to the handler that runs.
    pub(crate) unsafe fn new(context: *mut libc::ucontext_t) -> Self {
        // SAFETY: by the caller's promise: a frame that is ours until the handler returns.
        let registers: &'a mut libc::mcontext_t = unsafe { &mut (*context).uc_mcontext };
        let area = registers.fpregs.cast::<u8>();
        // SAFETY: the frame's vector state has 512 bytes at least.
        let magic = unsafe { area.add(464).cast::<u32>().read_unaligned() };
        // With it, the AVX component is there on every host with AVX.
        if magic != EXTENDED_STATE_MAGIC {
            give_up(6);
        }
        Self { registers, area }
    }

    /// Writes a state into the frame, for the handler's return.
    pub(crate) fn load(&mut self, xsave: &[u8; XSAVE_SIZE], gpr: &[u64; 16], rflags: u64, rip: u64, cs: u16) {
        for (place, value) in FRAME_REGISTERS.iter().zip(gpr) {
            self.registers.gregs[*place as usize] = *value as i64;
        }
        self.registers.gregs[libc::REG_RIP as usize] = rip as i64;
        let selectors = &mut self.registers.gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | i64::from(cs);
        let flags = &mut self.registers.gregs[libc::REG_EFL as usize];
        *flags = *flags & !(RESTORED_FLAGS as i64) | (rflags & RESTORED_FLAGS) as i64;
        // SAFETY: the area has these bytes, whose software part (464 to 511) stays as it is.
        unsafe {
            self.area.copy_from_nonoverlapping(xsave.as_ptr(), 416);
            self.area.add(576).copy_from_nonoverlapping(xsave.as_ptr().add(576), 256);
            let header = self.area.add(512).cast::<u64>();
            header.write_unaligned(header.read_unaligned() | 7);
        }
    }

    /// Reads the state out of the frame.
    pub(crate) fn save(&self, state: &mut State) {
        let register = |number: i32| self.registers.gregs[number as usize] as u64;
        for (value, place) in state.gpr.iter_mut().zip(FRAME_REGISTERS) {
            *value = register(place);
        }
        state.rip = register(libc::REG_RIP);
        state.rflags = register(libc::REG_EFL);
        state.vector = register(libc::REG_TRAPNO);
        state.error = register(libc::REG_ERR);
        state.cr2 = if state.vector == 14 { register(libc::REG_CR2) } else { 0 };
        // SAFETY: the area has these bytes.
        unsafe { state.xsave.as_mut_ptr().copy_from_nonoverlapping(self.area, XSAVE_SIZE) };
    }
}
