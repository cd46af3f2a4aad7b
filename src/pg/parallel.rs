//! Which queries must not be planned in parallel, and which functions a query calls.
//!
//! A parallel worker does the leader's work: it is not recorded, and knows neither the leader's
//! identity nor its statement. So nothing may run there that runs statements of its own: functions
//! of users in languages other than C and internal, and constraints of domains, which call them.

use crate::pg::walk::{expression_tree_walker, query_tree_walker};
use pgrx::pg_sys::{self, NodeTag as T};
use pgrx::{pg_guard, pg_sys::Oid};
use std::ffi::{c_int, c_void};
use warden_core::notable;

/// Functions that are noted for a query.
const NOTED: usize = 64;

/// What one walk over a query finds.
pub struct Calls {
    /// Whether something may run statements of its own.
    runs_statements: bool,
    count: usize,
    oids: [Oid; NOTED],
}

impl Calls {
    /// The functions that are worth a record, each once.
    pub fn functions(&self) -> &[Oid] {
        &self.oids[..self.count]
    }
}

// Raw: see `walk`.
unsafe extern "C-unwind" {
    fn check_functions_in_node(
        node: *mut pg_sys::Node,
        checker: pg_sys::check_function_callback,
        context: *mut c_void,
    ) -> bool;
}

/// Walks over a query, and takes the option of a parallel plan away if it has to.
///
/// # Safety
/// `parse` is a valid Query, in a transaction; the caller owns nothing with a destructor.
pub unsafe fn examine(parse: *mut pg_sys::Query, options: &mut c_int) -> Calls {
    let mut calls = Calls {
        runs_statements: false,
        count: 0,
        oids: [pg_sys::InvalidOid; NOTED],
    };
    // SAFETY: see above; the context outlives the walk.
    unsafe { walk(parse.cast(), (&raw mut calls).cast()) };
    if calls.runs_statements {
        *options &= !(pg_sys::CURSOR_OPT_PARALLEL_OK as c_int);
    }
    calls
}

unsafe extern "C-unwind" fn walk(n: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: called by PostgreSQL's walkers, or with a valid Query; the context is `Calls`.
    unsafe {
        if n.is_null() {
            return false;
        }
        if (*n).type_ == T::T_Query {
            return query_tree_walker(n.cast(), Some(walk), context, 0);
        }
        if (*n).type_ == T::T_CoerceToDomain {
            (*context.cast::<Calls>()).runs_statements = true;
        }
        check_functions_in_node(n, Some(note), context);
        expression_tree_walker(n, Some(walk), context)
    }
}

unsafe extern "C-unwind" fn note(function: Oid, context: *mut c_void) -> bool {
    // SAFETY: the context is `Calls`, which nothing else refers to now; in a transaction.
    unsafe {
        let calls = &mut *context.cast::<Calls>();
        let users = function.to_u32() >= pg_sys::FirstNormalObjectId;
        if !users && notable::name_of(function.to_u32()).is_none() {
            return false;
        }
        if calls.count < NOTED && !calls.functions().contains(&function) {
            calls.oids[calls.count] = function;
            calls.count += 1;
        }
        if users && !calls.runs_statements {
            calls.runs_statements = may_run_statements(function);
        }
    }
    false
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
