//! Calling on from a hook without losing the error (trap T2).
//!
//! pgrx's guarded functions catch an error, rebuild it and raise it again: schema, table, column and
//! constraint names, context and cursor position are lost on the way. [`call`] is PG_TRY instead:
//! the error stays where PostgreSQL put it, and [`rethrow`] sends it on untouched.

use cee_scape::call_with_sigsetjmp;
use pgrx::pg_sys;
use std::ffi::c_int;

unsafe extern "C-unwind" {
    fn pg_re_throw() -> !;
}
unsafe extern "C" {
    fn geterrcode() -> c_int;
}

/// Runs `f`. True if it raised an error: then the error is still being handled, and the caller must
/// end with [`rethrow`].
///
/// # Safety
/// `f` calls PostgreSQL's C functions only, and owns nothing with a destructor.
#[inline]
pub unsafe fn call(f: impl FnOnce()) -> bool {
    // SAFETY: the jump buffer lives as long as the closure; both stacks are put back on either way.
    unsafe {
        let exceptions = pg_sys::PG_exception_stack;
        let contexts = pg_sys::error_context_stack;
        let caught = call_with_sigsetjmp(false, |buffer| {
            pg_sys::PG_exception_stack = std::ptr::from_ref(buffer).cast_mut().cast();
            f();
            0
        });
        pg_sys::PG_exception_stack = exceptions;
        pg_sys::error_context_stack = contexts;
        caught != 0
    }
}

/// The SQLSTATE, packed, of the error that [`call`] caught.
pub fn caught_sqlstate() -> c_int {
    // SAFETY: reads the top of the error stack; only called between `call` and `rethrow`.
    unsafe { geterrcode() }
}

/// Raises the caught error again, as it was.
///
/// # Safety
/// After [`call`] returned true, with nothing alive that has a destructor.
pub unsafe fn rethrow() -> ! {
    // SAFETY: the error is on PostgreSQL's error stack.
    unsafe { pg_re_throw() }
}
