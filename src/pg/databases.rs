//! Databases that gain, lose or lend the extension.
//!
//! Owns three facts of the running transaction: that it creates or drops the extension, that it
//! renames a database, and that workers have left a database because a command needs it empty.

use crate::pg::local::Local;
use crate::pg::session::text;
use crate::pg::shared::{SlotState, shared};
use crate::pg::{compat, policy, record, worker};
use pgrx::pg_sys::{self, NodeTag as T};
use std::sync::atomic::Ordering;

static CHANGED: Local<bool> = Local::new(false);
static PAUSED: Local<u32> = Local::new(0);
static RENAMED: Local<bool> = Local::new(false);

/// CREATE, ALTER or DROP EXTENSION has run; what it means is known when the transaction commits.
pub fn extension_changed() {
    // Every session reads again what is configured, by the new version's tables.
    // SAFETY: in a transaction; takes effect when it commits.
    unsafe { pg_sys::CacheInvalidateRelcacheAll() };
    CHANGED.set(true);
}

/// The transaction has ended. Runs where no error may be raised.
pub fn transaction_ended(committed: bool) {
    if RENAMED.get() {
        RENAMED.set(false);
        // Only now can the launcher see the new name.
        shared().generation.fetch_add(1, Ordering::AcqRel);
        record::wake_launcher();
    }
    if !CHANGED.get() {
        return;
    }
    CHANGED.set(false);
    if !committed {
        return;
    }
    // SAFETY: reads a variable of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    // A recorder finds out which of the two it was.
    shared().govern(database);
    shared().generation.fetch_add(1, Ordering::AcqRel);
    policy::forget();
    record::wake_launcher();
}

/// Sends our workers out of the database that a command needs for itself. True if there were any.
///
/// # Safety
/// `node` is a valid utility statement, in a transaction.
pub unsafe fn make_room(node: *mut pg_sys::Node) -> bool {
    // SAFETY: each node is read as what its tag says it is.
    let name = unsafe {
        match (*node).type_ {
            T::T_DropdbStmt => (*node.cast::<pg_sys::DropdbStmt>()).dbname,
            T::T_AlterDatabaseStmt => {
                let s = node.cast::<pg_sys::AlterDatabaseStmt>();
                let moves = compat::pointers::<pg_sys::DefElem>((*s).options)
                    .any(|option| text((*option).defname) == "tablespace");
                if !moves {
                    return false;
                }
                (*s).dbname
            }
            T::T_RenameStmt => {
                let s = node.cast::<pg_sys::RenameStmt>();
                if (*s).renameType != pg_sys::ObjectType::OBJECT_DATABASE {
                    return false;
                }
                RENAMED.set(true);
                (*s).subname
            }
            T::T_CreatedbStmt => template_of(node.cast()),
            _ => return false,
        }
    };
    // SAFETY: a name from the parse tree, in a transaction.
    let database = unsafe {
        if name.is_null() || !pg_sys::IsTransactionState() {
            return false;
        }
        pg_sys::get_database_oid(name, true)
    };
    let Some(slot) = shared()
        .slot(database)
        .filter(|_| database != pg_sys::InvalidOid)
    else {
        return false;
    };
    // Whoever may not do it does not get that far: our workers are not for everyone to stop.
    // SAFETY: catalog look-ups in a transaction.
    let allowed = unsafe {
        compat::owns_database(database)
            || ((*node).type_ == T::T_CreatedbStmt && record::is_template(database))
    };
    if !allowed {
        return false;
    }
    slot.paused_by
        .store(std::process::id() as i32, Ordering::Release);
    PAUSED.set(database.to_u32());
    // Bounded: PostgreSQL itself waits five seconds more, and then says who is in the way.
    for _ in 0..500 {
        let pids = [&slot.recorder, &slot.shipper].map(|p| p.load(Ordering::Acquire));
        if pids == [0, 0] {
            break;
        }
        for pid in pids.into_iter().filter(|p| *p > 0) {
            // SAFETY: a worker of ours; `die` ends it at its next chance.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
        worker::wait_in_backend(10);
    }
    true
}

unsafe fn template_of(s: *mut pg_sys::CreatedbStmt) -> *const std::ffi::c_char {
    // SAFETY: a list of DefElem nodes.
    unsafe {
        for option in compat::pointers::<pg_sys::DefElem>((*s).options) {
            if text((*option).defname) == "template" {
                return pg_sys::defGetString(option);
            }
        }
    }
    std::ptr::null()
}

/// The command is over: the workers may come back. Also after an error: touches atomics only.
pub fn resume() {
    let database = PAUSED.get();
    PAUSED.set(0);
    if let Some(slot) = shared()
        .slot(pg_sys::Oid::from(database))
        .filter(|_| database != 0)
    {
        slot.state
            .store(SlotState::Governed as u32, Ordering::Release);
        slot.paused_by.store(0, Ordering::Release);
        shared().generation.fetch_add(1, Ordering::AcqRel);
        record::wake_launcher();
    }
}
