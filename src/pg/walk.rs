//! PostgreSQL's own walkers and mutators of trees, as deep as PostgreSQL goes itself.
//!
//! pgrx's guards take five kilobytes of stack a level, where the server takes some hundred bytes. So
//! these are the raw functions: an error on the way down leaves by longjmp, over callbacks that own
//! nothing. What a callback has to ask or to make, it does in a guarded function that does not go deeper;
//! who starts to walk does so by [`guarded`].

use pgrx::pg_sys::{self, NodeTag as T};
use std::ffi::{c_int, c_void};

/// A callback of a walker: `true` stops.
pub type Walker = unsafe extern "C-unwind" fn(*mut pg_sys::Node, *mut c_void) -> bool;
/// A callback of a mutator.
pub type Mutator = unsafe extern "C-unwind" fn(*mut pg_sys::Node, *mut c_void) -> *mut pg_sys::Node;

unsafe extern "C-unwind" {
    #[cfg_attr(not(feature = "pg15"), link_name = "expression_tree_walker_impl")]
    pub fn expression_tree_walker(
        node: *mut pg_sys::Node,
        walker: Option<Walker>,
        context: *mut c_void,
    ) -> bool;
    #[cfg_attr(not(feature = "pg15"), link_name = "query_tree_walker_impl")]
    pub fn query_tree_walker(
        query: *mut pg_sys::Query,
        walker: Option<Walker>,
        context: *mut c_void,
        flags: c_int,
    ) -> bool;
    #[cfg_attr(not(feature = "pg15"), link_name = "expression_tree_mutator_impl")]
    pub fn expression_tree_mutator(
        node: *mut pg_sys::Node,
        mutator: Option<Mutator>,
        context: *mut c_void,
    ) -> *mut pg_sys::Node;
    #[cfg_attr(not(feature = "pg15"), link_name = "query_tree_mutator_impl")]
    pub fn query_tree_mutator(
        query: *mut pg_sys::Query,
        mutator: Option<Mutator>,
        context: *mut c_void,
        flags: c_int,
    ) -> *mut pg_sys::Query;
    #[link_name = "copyObjectImpl"]
    pub fn copy(node: *const c_void) -> *mut c_void;
    fn lappend(list: *mut pg_sys::List, datum: *mut c_void) -> *mut pg_sys::List;
}

/// Calls a raw function so that its error unwinds from here.
///
/// # Safety
/// `f` is a call of a raw walker, mutator or callback, and owns nothing.
pub unsafe fn guarded<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: see above.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(f) }
}

/// All queries of a tree; each before those that it holds.
///
/// # Safety
/// `query` is valid.
pub unsafe fn queries(query: *mut pg_sys::Query) -> *mut pg_sys::List {
    let mut found: *mut pg_sys::List = std::ptr::null_mut();
    let context = (&raw mut found).cast();
    // SAFETY: the context outlives the walk.
    unsafe { guarded(|| collect(query.cast(), context)) };
    found
}

unsafe extern "C-unwind" fn collect(n: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: called by PostgreSQL's walkers, or with a valid Query.
    unsafe {
        if n.is_null() {
            return false;
        }
        if (*n).type_ != T::T_Query {
            return expression_tree_walker(n, Some(collect), context);
        }
        let found = context.cast::<*mut pg_sys::List>();
        *found = lappend(*found, n.cast());
        query_tree_walker(n.cast(), Some(collect), context, 0)
    }
}
