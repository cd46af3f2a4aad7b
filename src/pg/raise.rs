//! Raising a [`Refusal`] with its own SQLSTATE.
//!
//! pgrx knows PostgreSQL's error codes only, and rebuilds errors on their way out. So a refusal is
//! first copied into memory of PostgreSQL, every Rust value is dropped, and then the outermost
//! function, which has no destructor to skip, raises it with `ereport`'s own primitives.

use crate::error::Refusal;
use pgrx::pg_sys;
use std::ffi::{CStr, c_char, c_int};

/// A refusal that PostgreSQL's memory owns.
#[derive(Debug, Clone, Copy)]
pub struct Raised {
    sqlstate: c_int,
    message: *const c_char,
    detail: *const c_char,
    hint: *const c_char,
}

// PostgreSQL's own functions, not pgrx's guarded wrappers: an error must leave by longjmp.
unsafe extern "C" {
    fn errstart(elevel: c_int, domain: *const c_char) -> bool;
    fn errcode(sqlerrcode: c_int) -> c_int;
    fn errmsg(fmt: *const c_char, ...) -> c_int;
    fn errdetail(fmt: *const c_char, ...) -> c_int;
    fn errhint(fmt: *const c_char, ...) -> c_int;
}
unsafe extern "C-unwind" {
    fn errfinish(filename: *const c_char, lineno: c_int, funcname: *const c_char);
}

/// PostgreSQL's packed form of five characters (`MAKE_SQLSTATE`).
pub fn pack_sqlstate(s: &[u8; 5]) -> c_int {
    s.iter().rev().fold(0, |n, c| {
        (n << 6) + (c_int::from(*c).wrapping_sub(48) & 0x3f)
    })
}

/// The five characters of a packed SQLSTATE (`unpack_sql_state`).
pub fn unpack_sqlstate(mut code: c_int) -> [u8; 5] {
    let mut s = [0u8; 5];
    for c in &mut s {
        *c = ((code & 0x3f) + 48) as u8;
        code >>= 6;
    }
    s
}

/// Copies a refusal into the current memory context.
pub fn prepare(r: &Refusal) -> Raised {
    Raised {
        sqlstate: pack_sqlstate(r.code.sqlstate()),
        message: pstrdup(&r.message),
        detail: pstrdup(&r.detail),
        hint: pstrdup(&r.hint),
    }
}

fn pstrdup(s: &str) -> *const c_char {
    if s.is_empty() {
        return std::ptr::null();
    }
    // SAFETY: palloc returns s.len() + 1 writable bytes, or does not return.
    unsafe {
        let p = pg_sys::palloc(s.len() + 1).cast::<u8>();
        std::ptr::copy_nonoverlapping(s.as_ptr(), p, s.len());
        p.add(s.len()).write(0);
        p.cast()
    }
}

/// Raises the ERROR.
///
/// # Safety
/// No frame between the caller and PostgreSQL may own a value with a destructor.
pub unsafe fn raise(r: Raised) -> ! {
    const FORMAT: &CStr = c"%s";
    // SAFETY: the strings are NUL-terminated and live in a context that outlives the error's copy.
    unsafe {
        errstart(pgrx::PgLogLevel::ERROR as c_int, std::ptr::null());
        errcode(r.sqlstate);
        errmsg(FORMAT.as_ptr(), r.message);
        if !r.detail.is_null() {
            errdetail(FORMAT.as_ptr(), r.detail);
        }
        if !r.hint.is_null() {
            errhint(FORMAT.as_ptr(), r.hint);
        }
        errfinish(c"pg_warden".as_ptr(), 0, c"raise".as_ptr());
    }
    unreachable!("errfinish(ERROR) does not return")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sqlstate_survives_packing() {
        for s in [b"WA001", b"42501", b"23505", b"XX000"] {
            assert_eq!(&unpack_sqlstate(pack_sqlstate(s)), s);
        }
    }
}
