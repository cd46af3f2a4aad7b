//! State of one backend process.
//!
//! PostgreSQL runs a backend in one thread, so a plain cell is enough; what must not happen is a
//! reference that lives across a call into PostgreSQL, because that call may come back into a hook.

use std::cell::UnsafeCell;

/// A value that belongs to the backend's only thread.
pub struct Local<T>(UnsafeCell<T>);

// SAFETY: backends and background workers touch these cells from their main thread only; no thread
// that the shipper's runtime could start is handed one.
unsafe impl<T> Sync for Local<T> {}

impl<T> Local<T> {
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// Runs `f` on the value. `f` must not call into PostgreSQL, unless it is certain that the call
    /// neither raises an error nor runs a hook of ours.
    #[inline]
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        // SAFETY: one thread, and by the rule above `f` is never entered twice.
        f(unsafe { &mut *self.0.get() })
    }
}

impl<T: Copy> Local<T> {
    #[inline]
    pub fn get(&self) -> T {
        self.with(|v| *v)
    }

    #[inline]
    pub fn set(&self, value: T) {
        self.with(|v| *v = value);
    }
}
