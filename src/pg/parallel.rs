//! Which queries must not be planned in parallel.
//!
//! A parallel worker does the leader's work: it is not recorded, and knows neither the leader's
//! identity nor its statement. So nothing may run there that runs statements of its own: functions
//! of users in languages other than C and internal, and constraints of domains, which call them.

use crate::pg::walk::{expression_tree_walker, query_tree_walker};
use pgrx::pg_sys::{self, NodeTag as T};
use pgrx::{pg_guard, pg_sys::Oid};
use std::ffi::{c_int, c_void};

// Raw: see `walk`.
unsafe extern "C-unwind" {
    fn check_functions_in_node(
        node: *mut pg_sys::Node,
        checker: pg_sys::check_function_callback,
        context: *mut c_void,
    ) -> bool;
}

/// The options to plan a query with.
///
/// # Safety
/// `parse` is a valid Query, in a transaction; the caller owns nothing with a destructor.
pub unsafe fn options(parse: *mut pg_sys::Query, options: c_int) -> c_int {
    let parallel = pg_sys::CURSOR_OPT_PARALLEL_OK as c_int;
    // SAFETY: see above.
    if options & parallel != 0 && unsafe { runs_statements(parse.cast(), std::ptr::null_mut()) } {
        return options & !parallel;
    }
    options
}

unsafe extern "C-unwind" fn runs_statements(n: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: called by PostgreSQL's walkers, or with a valid Query.
    unsafe {
        if n.is_null() {
            return false;
        }
        match (*n).type_ {
            T::T_Query => query_tree_walker(n.cast(), Some(runs_statements), context, 0),
            T::T_CoerceToDomain => true,
            _ => {
                check_functions_in_node(n, Some(is_users), context)
                    || expression_tree_walker(n, Some(runs_statements), context)
            }
        }
    }
}

unsafe extern "C-unwind" fn is_users(function: Oid, _context: *mut c_void) -> bool {
    // SAFETY: in a transaction.
    function.to_u32() >= pg_sys::FirstNormalObjectId && unsafe { may_run_statements(function) }
}

/// Whether a function is parallel safe, and may run statements.
#[pg_guard]
unsafe extern "C-unwind" fn may_run_statements(function: Oid) -> bool {
    const INTERNAL: Oid = Oid::from_u32(12);
    const C: Oid = Oid::from_u32(13);
    // SAFETY: the tuple is released before it is forgotten.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::PROCOID as c_int,
            pg_sys::Datum::from(function),
        );
        if tuple.is_null() {
            return true;
        }
        let f = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>();
        // An aggregate's language says nothing about its transition function's.
        let plain = (*f).prokind as u8 == b'f' && [INTERNAL, C].contains(&(*f).prolang);
        let safe = (*f).proparallel as u8 == b's';
        pg_sys::ReleaseSysCache(tuple);
        safe && !plain
    }
}
