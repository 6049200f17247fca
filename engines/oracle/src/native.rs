//! Executes single instructions natively: in a child process, by signal frames.
//!
//! The child never leaves its signal handler for longer than one instruction: the handler writes the state of a case into
//! the frame that the kernel restores on return, with TF set. The instruction then ends in SIGTRAP, or in the signal
//! of the exception it raised, and the handler finds the state after it in the new frame.
#![allow(unsafe_code)]

use std::io::Result;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::child::{self, Frame, Process, Turns, Work, handler_entry};
use crate::layout::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, FS_BASE, GS_BASE, IMAGE_SIZE, IMAGES, Image, Outcome,
    READ_ONLY_SIZE, USER_CS,
};

/// Cases of one round trip.
pub const BATCH: usize = 256;
/// Trap flag.
const TF: u64 = 0x100;

/// Memory that parent and child share.
#[repr(C)]
struct Shared {
    turns: Turns,
    count: u32,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
    images: [Image; IMAGES],
}

// SAFETY: numbers only, for which all zeroes are valid.
unsafe impl child::Shared for Shared {
    fn turns(&self) -> &Turns {
        &self.turns
    }
}

/// The child process.
pub struct Native(Process<Shared>);

/// What the child's signal handler knows. Only the child writes it, and it has one thread.
struct ChildState {
    shared: *mut Shared,
    /// Writable view of the code pages.
    code: *mut u8,
    work: Work,
    /// Next case, when one is running the one after it.
    next: usize,
    running: bool,
    image: usize,
}

static CHILD: AtomicPtr<ChildState> = AtomicPtr::new(null_mut());

impl Native {
    /// Starts the child with these contents of the data pages.
    ///
    /// # Errors
    /// The host gives no memory or no process.
    pub fn start(images: &[Image; IMAGES]) -> Result<Self> {
        Process::start(run_child, |shared: &mut Shared| shared.images = *images).map(Self)
    }

    /// Hands over a batch of at most [`BATCH`] cases.
    pub fn submit<'a>(&mut self, cases: impl Iterator<Item = &'a Case>) {
        self.0.submit(|shared| {
            shared.count = 0;
            for (place, case) in shared.cases.iter_mut().zip(cases) {
                place.clone_from(case);
                shared.count += 1;
            }
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
        child::map(CODE, CODE_SIZE, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, file);
        let data = child::map_private(DATA, IMAGE_SIZE);
        data.copy_from_nonoverlapping((&raw const (*shared).images[0]).cast(), IMAGE_SIZE);
        libc::mprotect(data.add(DATA_SIZE).cast(), READ_ONLY_SIZE, libc::PROT_READ);
        let state = child::map_private(0, size_of::<ChildState>()).cast::<ChildState>();
        *state = ChildState { shared, code, work: Work::new(), next: 0, running: false, image: 0 };
        CHILD.store(state, Ordering::Relaxed);
        child::live_in_handler(entry, &[], FS_BASE, GS_BASE)
    }
}

handler_entry!(entry, handler);

unsafe extern "C" fn handler(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a frame that is ours until we return; the child's state was made before the
    // first signal and is used by this handler alone, which never interrupts itself.
    let (child, mut frame) = unsafe { (&mut *CHILD.load(Ordering::Relaxed), Frame::new(context)) };
    // SAFETY: the shared memory is mapped; the parent does not touch cases and outcomes before it is told.
    let shared = unsafe { &mut *child.shared };
    if child.running {
        child.running = false;
        // SAFETY: this handler is the only one that accesses the data pages.
        unsafe { save_outcome(child, &frame, &mut shared.outcomes[child.next - 1]) };
    }
    if child.work.is_idle() || child.next >= shared.count as usize {
        child.work.next_batch(&shared.turns);
        child.next = 0;
    }
    let case = &shared.cases[child.next];
    // SAFETY: as above.
    unsafe { load_case(child, &mut frame, case, &shared.images[case.image as usize % IMAGES]) };
    child.next += 1;
    child.running = true;
}

/// Writes a case into the frame, the code page and the data pages.
///
/// # Safety
/// The code and data pages must be mapped, writable, and referred to by nobody else.
unsafe fn load_case(child: &mut ChildState, frame: &mut Frame<'_>, case: &Case, image: &Image) {
    frame.load(&case.xsave, &case.gpr, case.rflags | TF, case.rip, USER_CS);
    let at = (case.rip - CODE) as usize;
    let length = case.code.len().min(CODE_SIZE - at);
    // SAFETY: `at..at + length` lies in the code pages; the data pages are mapped, and nothing refers to them.
    unsafe {
        child.code.add(at).copy_from_nonoverlapping(case.code.as_ptr(), length);
        if child.image != case.image as usize % IMAGES {
            child.image = case.image as usize % IMAGES;
            (DATA as *mut u8).copy_from_nonoverlapping(image.as_ptr(), DATA_SIZE);
        }
    }
}

/// Reads the outcome from the frame and the data pages, and puts the image back.
///
/// # Safety
/// The data pages must be mapped.
unsafe fn save_outcome(child: &ChildState, frame: &Frame<'_>, outcome: &mut Outcome) {
    frame.save(&mut outcome.state);
    // SAFETY: image and data pages are mapped, of the same size, and only this function and `load_case` access the
    // data pages.
    unsafe {
        let image = &(&(*child.shared).images)[child.image][..DATA_SIZE];
        let data = std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_SIZE);
        if outcome.record_changes(image, data) {
            data.copy_from_slice(image);
        }
    }
}
