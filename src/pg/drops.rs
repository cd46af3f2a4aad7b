//! What a DROP command takes along: tables and columns that it does not name.
//!
//! Owns the object access hook, which hears of every object just before it is deleted. Asks the rules
//! that a direct DROP of the same table would meet. Only while a DROP command runs: what ALTER TABLE drops
//! is what it names, and what PostgreSQL drops for itself is nobody's loss.

use crate::pg::local::Local;
use crate::pg::raise::{self, Raised};
use crate::pg::{policy, rules, worker};
use pgrx::pg_guard;
use pgrx::pg_sys::{self, NodeTag as T, Oid};
use std::ffi::{c_int, c_void};

static mut PREV: pg_sys::object_access_hook_type = None;

/// A DROP command runs in this backend.
static DROPPING: Local<bool> = Local::new(false);
/// The rule that has just refused what the running command takes along.
static REFUSED_BY: Local<Option<String>> = Local::new(None);

/// Installs the hook. Called from _PG_init of a preloaded library.
pub fn install() {
    // SAFETY: the postmaster has one thread.
    unsafe { PREV = (&raw mut pg_sys::object_access_hook).replace(Some(object_access)) };
}

/// A utility command begins. Returns what [`leave`] wants.
///
/// # Safety
/// `node` is a valid utility statement.
pub unsafe fn enter(node: *mut pg_sys::Node) -> bool {
    // SAFETY: see above.
    let drops = unsafe {
        matches!((*node).type_, T::T_DropStmt | T::T_DropOwnedStmt) && !rules::is_about_us(node)
    };
    let outer = DROPPING.get();
    DROPPING.set(drops);
    outer
}

/// The command has ended, in whatever way.
pub fn leave(outer: bool) {
    DROPPING.set(outer);
}

/// The rule that has refused the command which has just failed, if one has.
pub fn refused_by() -> Option<String> {
    REFUSED_BY.with(Option::take)
}

unsafe extern "C-unwind" fn object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: Oid,
    object: Oid,
    column: c_int,
    arg: *mut c_void,
) {
    // SAFETY: PostgreSQL's own arguments, passed on; nothing here has a destructor.
    unsafe {
        if let Some(prev) = PREV {
            prev(access, class, object, column, arg);
        }
        let dropped = access == pg_sys::ObjectAccessType::OAT_DROP
            && class == pg_sys::RelationRelationId
            && DROPPING.get();
        if !dropped {
            return;
        }
        let mut refused = None;
        before_drop(object, column, arg.cast(), &mut refused);
        if let Some(refused) = refused {
            raise::raise(refused);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_drop(
    relation: Oid,
    column: c_int,
    arg: *const pg_sys::ObjectAccessDrop,
    refused: *mut Option<Raised>,
) {
    // SAFETY: the argument of OAT_DROP, and the trampoline's `refused`; in a transaction.
    unsafe {
        let internal =
            !arg.is_null() && (*arg).dropflags & pg_sys::PERFORM_DELETION_INTERNAL as c_int != 0;
        if internal || worker::in_worker() || !policy::installed() {
            return;
        }
        if let Err(refusal) = rules::check_drop(relation, column != 0) {
            *refused = Some(raise::prepare(&refusal));
            REFUSED_BY.with(|r| *r = Some(refusal.rule));
        }
    }
}
