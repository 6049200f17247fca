//! Executes sequences natively: a child process enters each from a signal frame, and finds the state after it in the
//! frame of the signal that its exception raises.
#![allow(unsafe_code)]

use std::io::Result;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::layout::{Batch, CONTROL, CONTROL_SIZE, Code, IMAGES, Image, Input, NUDGE, Outcome, TIMEOUT};
use crate::child::{self, Frame, Process, Turns, Work, handler_entry};
use crate::layout::{
    CODE, CODE_SIZE, DATA, DATA_SIZE, FS_BASE, GS_BASE, IMAGE_SIZE, PAGE, READ_ONLY_SIZE, USER_SS,
};

/// Runs of one batch at most.
pub const RUNS: usize = 256;
/// Code pages of one batch at most.
pub const CODES: usize = 64;

/// Memory that parent and child share.
#[repr(C)]
struct Shared {
    turns: Turns,
    /// Counts runs.
    progress: AtomicU32,
    count: u32,
    codes: [Code; CODES],
    inputs: [Input; RUNS],
    outcomes: [Outcome; RUNS],
    images: [Image; IMAGES],
}

// SAFETY: numbers only, for which all zeroes are valid.
unsafe impl child::Shared for Shared {
    fn turns(&self) -> &Turns {
        &self.turns
    }
    fn progress(&self) -> Option<u32> {
        Some(self.progress.load(Ordering::Relaxed))
    }
}

/// The child process.
pub struct Native(Process<Shared>);

/// What the child's signal handler knows. Only the child writes it, and it has one thread.
struct ChildState {
    shared: *mut Shared,
    /// Writable view of the code pages.
    code: *mut Code,
    work: Work,
    /// Next input, when one is running the one after it.
    next: usize,
    running: bool,
    /// What is in the code pages.
    current: Option<u32>,
}

static CHILD: AtomicPtr<ChildState> = AtomicPtr::new(null_mut());

impl Native {
    /// Starts the child with these contents of the pages.
    ///
    /// # Errors
    /// The host gives no memory or no process.
    pub fn start(images: &[Image]) -> Result<Self> {
        Process::start(run_child, |shared: &mut Shared| shared.images.clone_from_slice(images)).map(Self)
    }

    /// Hands over a batch, of at most [`CODES`] and [`RUNS`].
    pub fn submit(&mut self, batch: &Batch) {
        self.0.submit(|shared| {
            shared.codes[..batch.codes.len()].copy_from_slice(&batch.codes);
            shared.inputs[..batch.inputs.len()].clone_from_slice(&batch.inputs);
            shared.count = batch.inputs.len() as u32;
        });
    }

    /// Waits for the outcomes of the batch.
    ///
    /// # Errors
    /// The child has died or does not answer.
    pub fn wait(&mut self) -> Result<&[Outcome]> {
        let shared = self.0.wait()?;
        Ok(&shared.outcomes[..shared.count as usize])
    }
}

/// The child: maps the address space, and lets the handler do the rest.
///
/// # Safety
/// The process must be a child of this one with no other thread, and `shared` its mapping.
unsafe fn run_child(shared: *mut Shared) -> ! {
    // SAFETY: this process has one thread and belongs to this function; what is mapped is new.
    unsafe {
        let (file, code) = child::code_file(CODE_SIZE);
        let executable = libc::PROT_READ | libc::PROT_EXEC;
        let pages = child::map(CODE, CODE_SIZE, executable | libc::PROT_WRITE, libc::MAP_SHARED, file);
        libc::mprotect(pages.add(PAGE as usize).cast(), CODE_SIZE - PAGE as usize, executable);
        let data = child::map_private(DATA, IMAGE_SIZE);
        data.copy_from_nonoverlapping((&raw const (*shared).images[0].data).cast(), IMAGE_SIZE);
        libc::mprotect(data.add(DATA_SIZE).cast(), READ_ONLY_SIZE, libc::PROT_READ);
        child::map_private(CONTROL, CONTROL_SIZE);
        child::map_private(NUDGE, PAGE as usize);
        let state = child::map_private(0, size_of::<ChildState>()).cast::<ChildState>();
        *state = ChildState {
            shared,
            code: code.cast(),
            work: Work::new(),
            next: 0,
            running: false,
            current: None,
        };
        CHILD.store(state, Ordering::Relaxed);
        child::live_in_handler(entry, &[child::NUDGE], FS_BASE, GS_BASE)
    }
}

handler_entry!(entry, handler);

unsafe extern "C" fn handler(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a frame that is ours until we return; the child's state was made before the
    // first signal and is used by this handler alone, which never interrupts itself.
    let (child, mut frame) = unsafe { (&mut *CHILD.load(Ordering::Relaxed), Frame::new(context)) };
    let is_nudge = signal == child::NUDGE;
    if is_nudge && !child.running {
        return;
    }
    // SAFETY: the shared memory is mapped; the parent does not touch inputs and outcomes before it is told.
    let shared = unsafe { &mut *child.shared };
    if child.running {
        child.running = false;
        let outcome = &mut shared.outcomes[child.next - 1];
        // SAFETY: this handler is the only one that accesses the pages.
        unsafe { save_outcome(child, &frame, outcome) };
        if is_nudge {
            outcome.state.vector = TIMEOUT;
        }
    }
    if child.work.is_idle() || child.next >= shared.count as usize {
        child.work.next_batch(&shared.turns);
        child.next = 0;
        child.current = None;
    }
    let input = &shared.inputs[child.next];
    // SAFETY: as above.
    unsafe { load_input(child, &mut frame, input, shared) };
    child.next += 1;
    shared.progress.fetch_add(1, Ordering::Relaxed);
    child.running = true;
}

/// Writes an input into the frame and the pages.
///
/// # Safety
/// The pages of the trial must be mapped, writable, and referred to by nobody else.
unsafe fn load_input(child: &mut ChildState, frame: &mut Frame<'_>, input: &Input, shared: &Shared) {
    // 32-bit code uses these segments, and code that was overwritten may load them. 64-bit code does not look at them.
    // SAFETY: the selector is that of the flat data segment which SS has.
    unsafe {
        std::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(USER_SS), options(nomem, nostack));
    }
    frame.load(&input.xsave, &input.gpr, input.rflags, input.rip, input.cs as u16);
    let image = &shared.images[input.image as usize % IMAGES];
    // SAFETY: the pages are mapped, with these sizes, and nothing refers to them.
    unsafe {
        if child.current != Some(input.code) {
            child.current = Some(input.code);
            *child.code = shared.codes[input.code as usize % CODES];
        }
        (DATA as *mut u8).copy_from_nonoverlapping(image.data.as_ptr(), DATA_SIZE);
        (CONTROL as *mut u8).copy_from_nonoverlapping(image.control.as_ptr(), CONTROL_SIZE);
        (CONTROL as *mut u64).copy_from_nonoverlapping(input.control.as_ptr(), input.control.len());
    }
}

/// Reads the outcome from the frame and the pages.
///
/// # Safety
/// The pages of the trial must be mapped.
unsafe fn save_outcome(child: &ChildState, frame: &Frame<'_>, outcome: &mut Outcome) {
    frame.save(&mut outcome.state);
    // SAFETY: the pages are mapped, with these sizes, and nothing refers to them.
    unsafe {
        outcome.data = *(DATA as *const [u8; DATA_SIZE]);
        outcome.control = *(CONTROL as *const [u8; CONTROL_SIZE]);
        outcome.code = *child.code;
    }
}
