//! Global variables of a single-CPU machine whose interrupt handlers share them with the code they interrupt.
use core::cell::UnsafeCell;

/// A `Copy` value read and written whole and volatile, so that a handler's write is seen by the interrupted code.
#[repr(transparent)]
pub struct Global<T>(UnsafeCell<T>);

// SAFETY: there is one CPU; accesses are whole-value volatile copies, and no reference ever leaves.
unsafe impl<T> Sync for Global<T> {}

impl<T: Copy> Global<T> {
    /// Makes a global with its first value.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// Reads the value.
    pub fn get(&self) -> T {
        // SAFETY: the cell is always valid, and the one CPU cannot race with itself.
        unsafe { self.0.get().read_volatile() }
    }

    /// Replaces the value.
    pub fn set(&self, value: T) {
        // SAFETY: as in `get`.
        unsafe { self.0.get().write_volatile(value) }
    }

    /// Where the value lies, for code and tables that the CPU itself reads or writes.
    pub const fn as_ptr(&self) -> *mut T {
        self.0.get()
    }

    /// The address of the value; virtual equals physical.
    pub fn address(&self) -> u64 {
        self.0.get() as u64
    }
}

impl<T: Copy, const N: usize> Global<[T; N]> {
    /// Reads one element.
    pub fn at(&self, index: usize) -> T {
        assert!(index < N, "index {index} of {N}");
        // SAFETY: in bounds; otherwise as in `Global::get`.
        unsafe { self.0.get().cast::<T>().add(index).read_volatile() }
    }

    /// Replaces one element.
    pub fn set_at(&self, index: usize, value: T) {
        assert!(index < N, "index {index} of {N}");
        // SAFETY: in bounds; otherwise as in `Global::set`.
        unsafe { self.0.get().cast::<T>().add(index).write_volatile(value) }
    }
}
