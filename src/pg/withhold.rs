//! Errors do not show rows: the DETAIL of a constraint's error is withheld from whoever reads masks.
//!
//! Owns an entry at the bottom of PostgreSQL's stack of error contexts, where it sees every error of a
//! client's backend before anybody catches it: also at COMMIT, when no hook of ours runs. PostgreSQL
//! empties that stack after each error that reaches the top, so what it calls next puts the entry back.

use crate::pg::policy::{self, Masks};
use crate::pg::raise::unpack_sqlstate;
use crate::pg::session::text;
use pgrx::{pg_guard, pg_sys};
use std::ffi::{c_char, c_int, c_void};
use warden_core::masks;

/// `PQcommMethods`, of libpq.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct Methods {
    comm_reset: Option<unsafe extern "C-unwind" fn()>,
    flush: *const c_void,
    flush_if_writable: *const c_void,
    is_send_pending: *const c_void,
    putmessage: *const c_void,
    putmessage_noblock: *const c_void,
}

unsafe extern "C" {
    static mut PqCommMethods: *const Methods;
    // None of them raises an error here, and an error is under way.
    fn geterrcode() -> c_int;
    fn errdetail(fmt: *const c_char, ...) -> c_int;
    fn errdetail_log(fmt: *const c_char, ...) -> c_int;
}

static mut SERVERS: Option<Methods> = None;
static mut OURS: Methods = Methods {
    comm_reset: Some(comm_reset),
    flush: std::ptr::null(),
    flush_if_writable: std::ptr::null(),
    is_send_pending: std::ptr::null(),
    putmessage: std::ptr::null(),
    putmessage_noblock: std::ptr::null(),
};
static mut BOTTOM: pg_sys::ErrorContextCallback = pg_sys::ErrorContextCallback {
    previous: std::ptr::null_mut(),
    callback: Some(at_bottom),
    arg: std::ptr::null_mut(),
};

/// Watches the errors of this process from now on.
///
/// # Safety
/// In a client's backend, once; raises nothing.
pub unsafe fn watch() {
    // SAFETY: the process has one thread, and both statics live as long as it does.
    unsafe {
        let servers = *PqCommMethods;
        SERVERS = Some(servers);
        OURS = Methods {
            comm_reset: Some(comm_reset),
            ..servers
        };
        PqCommMethods = &raw const OURS;
        place();
    }
}

/// PostgreSQL has just emptied the stack, because an error has reached the top.
unsafe extern "C-unwind" fn comm_reset() {
    // SAFETY: the server's own function.
    unsafe {
        let servers = SERVERS;
        if let Some(reset) = servers.and_then(|m| m.comm_reset) {
            reset();
        }
        place();
    }
}

/// Whether nobody is left who could handle the error that is under way: it has reached the top.
pub fn at_the_top() -> bool {
    // SAFETY: reads a variable of this process.
    ends(unsafe { pg_sys::error_context_stack })
}

/// Whether no error context is left but ours.
pub fn ends(stack: *const pg_sys::ErrorContextCallback) -> bool {
    stack.is_null() || std::ptr::eq(stack, &raw const BOTTOM)
}

unsafe fn place() {
    // SAFETY: with an empty stack there is nothing that will be restored over our entry.
    unsafe {
        if pg_sys::error_context_stack.is_null() {
            pg_sys::error_context_stack = &raw mut BOTTOM;
        }
    }
}

unsafe extern "C-unwind" fn at_bottom(_arg: *mut c_void) {
    // SAFETY: an error, or a notice, is being raised.
    let code = unpack_sqlstate(unsafe { geterrcode() });
    if !masks::detail_shows_rows(&code) {
        return;
    }
    // SAFETY: as above; both texts are copied.
    unsafe {
        if shows_masked() {
            let withheld = c"The row is not shown: the table has masked columns.".as_ptr();
            errdetail(withheld);
            errdetail_log(withheld);
        }
    }
}

/// Whether the error that is being raised is about a relation with masks, and the client under them.
#[pg_guard]
unsafe extern "C-unwind" fn shows_masked() -> bool {
    let Some(masks) = policy::last_masks() else {
        return false;
    };
    if masks.is_empty() {
        return false;
    }
    // SAFETY: constraints raise their errors where PostgreSQL itself reads catalogs for them. The copy
    // must not be made in the error's own memory.
    unsafe {
        let old = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = if pg_sys::MessageContext.is_null() {
            pg_sys::TopMemoryContext
        } else {
            pg_sys::MessageContext
        };
        let error = pg_sys::CopyErrorData();
        let shows = !(*error).detail.is_null() && names_masked(&masks, error);
        pg_sys::FreeErrorData(error);
        pg_sys::CurrentMemoryContext = old;
        shows && !(pg_sys::IsTransactionState() && masks.exempts_client())
    }
}

unsafe fn names_masked(masks: &Masks, error: *mut pg_sys::ErrorData) -> bool {
    // SAFETY: strings of PostgreSQL, or null.
    unsafe {
        let table = (!(*error).table_name.is_null())
            .then(|| (text((*error).schema_name), text((*error).table_name)));
        masks::speaks_of(&masks.names, table.as_ref(), &text((*error).message))
    }
}
