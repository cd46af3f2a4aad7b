//! pg_query behind a three-function C ABI.
//!
//! Owns: parsing statement text with a parser that is not the server's, so that a fingerprint is the
//! same on every server version. Receives normalised UTF-8 text from the recorder, returns text.
//! Never links into `pg_warden.so`: libpg_query defines `palloc`, `errstart`, `raw_parser` and some
//! hundred other names of the server, so it lives in a library of its own, which the recorder opens
//! with `RTLD_LOCAL`. Never unwinds into its caller.
//!
//! Every text that is returned is NUL-terminated, and must go back to [`warden_sqltext_free`].

use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The fingerprint of a statement: 16 hexadecimal digits; null if the text cannot be parsed.
///
/// # Safety
/// `text` is null or points to a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warden_sqltext_fingerprint(text: *const c_char) -> *mut c_char {
    // SAFETY: as promised by the caller.
    unsafe { apply(text, fingerprint) }
}

/// The statement with `$n` in place of its literals; null if the text cannot be parsed.
///
/// # Safety
/// `text` is null or points to a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warden_sqltext_normalize(text: *const c_char) -> *mut c_char {
    // SAFETY: as promised by the caller.
    unsafe { apply(text, normalize) }
}

/// Releases a text that this library returned. Null is allowed.
///
/// # Safety
/// `text` is null, or was returned by this library and was not released before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn warden_sqltext_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: `apply` made it with `into_raw`.
        drop(unsafe { CString::from_raw(text) });
    }
}

/// # Safety
/// `text` is null or points to a NUL-terminated string.
unsafe fn apply(text: *const c_char, f: fn(&str) -> Option<String>) -> *mut c_char {
    if text.is_null() {
        return std::ptr::null_mut();
    }
    // SAFETY: as promised by the caller.
    let text = unsafe { CStr::from_ptr(text) };
    catch_unwind(AssertUnwindSafe(|| {
        let result = f(text.to_str().ok()?)?;
        Some(CString::new(result).ok()?.into_raw())
    }))
    .ok()
    .flatten()
    .unwrap_or(std::ptr::null_mut())
}

fn fingerprint(text: &str) -> Option<String> {
    // Named, so that a new default of pg_query does not change the fingerprints of a ledger: schemas
    // count, aliases do not.
    let options = pg_query::FingerprintOptions::RANGEVAR_PG17_COMPAT;
    pg_query::fingerprint(text, 0, options).ok().map(|f| f.hex)
}

fn normalize(text: &str) -> Option<String> {
    pg_query::normalize(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(f: unsafe extern "C" fn(*const c_char) -> *mut c_char, text: &str) -> Option<String> {
        let text = CString::new(text).unwrap();
        // SAFETY: the text is NUL-terminated, and the result is released once.
        unsafe {
            let p = f(text.as_ptr());
            if p.is_null() {
                return None;
            }
            let s = CStr::from_ptr(p).to_str().unwrap().to_owned();
            warden_sqltext_free(p);
            Some(s)
        }
    }

    #[test]
    fn statements_that_differ_in_literals_and_space_share_a_fingerprint() {
        let a = call(warden_sqltext_fingerprint, "SELECT a FROM t WHERE id = $1").unwrap();
        let b = call(
            warden_sqltext_fingerprint,
            "select  a\nfrom t where id = 17",
        )
        .unwrap();
        assert_eq!(a, b);
        assert_eq!(a.len(), 16);
        let c = call(warden_sqltext_fingerprint, "SELECT b FROM t WHERE id = $1").unwrap();
        assert_ne!(a, c);
    }

    #[test]
    fn text_that_is_not_sql_has_no_fingerprint() {
        assert_eq!(call(warden_sqltext_fingerprint, "SELEC 1"), None);
        assert_eq!(call(warden_sqltext_fingerprint, &"(".repeat(100_000)), None);
    }

    #[test]
    fn literals_become_parameters() {
        let text = call(warden_sqltext_normalize, "SELECT 1 FROM t WHERE s = 'x'").unwrap();
        assert_eq!(text, "SELECT $1 FROM t WHERE s = $2");
    }

    #[test]
    fn null_is_survived() {
        // SAFETY: null is allowed.
        unsafe {
            assert!(warden_sqltext_fingerprint(std::ptr::null()).is_null());
            warden_sqltext_free(std::ptr::null_mut());
        }
    }
}
