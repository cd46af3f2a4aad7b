//! Function calls by the protocol's own message, as `PQfn` and the large-object functions of libpq
//! send them: neither the executor's hooks nor that of utility commands sees them (trap T12).
//!
//! Owns the call that runs. PostgreSQL tells of its start only. It has ended when its transaction has;
//! or else when the memory of its message is reset, before the client hears that the server is ready.

use crate::pg::local::Local;
use crate::pg::raise::{self, Raised};
use crate::pg::record::{self, Begun};
use crate::pg::session::text;
use crate::pg::{chain, exclusions, hooks, identity, policy, rules, shape};
use pgrx::{pg_guard, pg_sys};
use std::ffi::{c_int, c_void};
use warden_core::classes::Class;
use warden_core::event::Outcome;

/// What such calls are called in the record, and in rules and exclusions.
pub const COMMAND: &str = "FUNCTION CALL";

static mut PREV: pg_sys::object_access_hook_type = None;

/// A call that runs.
#[derive(Clone, Copy)]
struct Call {
    begun: Begun,
    /// What ran around it.
    depth: usize,
    /// How many transactions are open inside each other.
    level: c_int,
}

static RUNNING: Local<Option<Call>> = Local::new(None);
/// The name of the function that is called.
static NAME: Local<String> = Local::new(String::new());

unsafe extern "C" {
    fn GetCurrentTransactionNestLevel() -> c_int;
}

/// Installs the hook. Called from _PG_init of a preloaded library.
pub fn install() {
    // SAFETY: the postmaster has one thread.
    unsafe { PREV = (&raw mut pg_sys::object_access_hook).replace(Some(on_access)) };
}

unsafe extern "C-unwind" fn on_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    sub: c_int,
    arg: *mut c_void,
) {
    // SAFETY: PostgreSQL's own arguments, passed on; nothing here has a destructor.
    unsafe {
        if let Some(prev) = PREV {
            prev(access, class, object, sub, arg);
        }
        if access != pg_sys::ObjectAccessType::OAT_FUNCTION_EXECUTE || !is_call() {
            return;
        }
        let mut refused = None;
        begin(object, &mut refused);
        if let Some(refused) = refused {
            raise::raise(refused);
        }
        if RUNNING.get().is_some() {
            watch();
        }
    }
}

/// Whether a function is executed because a message says so: not by a statement, and not by the
/// function that the message calls. Those run in memory of their own.
fn is_call() -> bool {
    // SAFETY: reads variables of this process.
    unsafe { pg_sys::CurrentMemoryContext == pg_sys::MessageContext && answers_call() }
}

/// Whether this backend answers a function call message.
fn answers_call() -> bool {
    // SAFETY: reads variables of this process.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        if entry.is_null() || pg_sys::MyBackendType != pg_sys::BackendType::B_BACKEND {
            return false;
        }
        match (*entry).st_state {
            pg_sys::BackendState::STATE_FASTPATH => true,
            // Without track_activities: other messages that execute have a query string.
            pg_sys::BackendState::STATE_DISABLED => pg_sys::debug_query_string.is_null(),
            _ => false,
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn begin(function: pg_sys::Oid, refused: *mut Option<Raised>) {
    if hooks::passes() || RUNNING.get().is_some() {
        return;
    }
    hooks::register_callbacks();
    // SAFETY: catalog look-ups in a transaction; `refused` is the trampoline's.
    unsafe {
        let schema = pg_sys::get_func_namespace(function);
        let name = text(pg_sys::quote_qualified_identifier(
            pg_sys::get_namespace_name(schema),
            pg_sys::get_func_name(function),
        ));
        let installed = policy::installed();
        let decision = if installed {
            hooks::check_identity(|| identity::is_identity_function(function))
                .and_then(|()| rules::check_call(&name))
        } else {
            Ok(())
        };
        let begun = if installed && decision.is_ok() && exclusions::leave_out_call(schema) {
            Ok(Begun::LEFT_OUT)
        } else {
            record::begin(
                Class::Write,
                true,
                false,
                |dest| {
                    shape::utility(
                        dest,
                        COMMAND,
                        name.as_bytes(),
                        &[],
                        std::slice::from_ref(&name),
                    )
                },
                |_, _| {},
            )
        };
        match (decision, begun) {
            (Ok(()), Ok(begun)) => {
                NAME.with(|n| *n = name);
                RUNNING.set(Some(Call {
                    begun,
                    depth: record::enter(begun.intent),
                    level: GetCurrentTransactionNestLevel(),
                }));
            }
            (Err(refusal), begun) => {
                record::blocked(begun.unwrap_or(Begun::UNRECORDED), &refusal);
                *refused = Some(raise::prepare(&refusal));
            }
            (Ok(()), Err(refusal)) => *refused = Some(raise::prepare(&refusal)),
        }
    }
}

/// Asks to be told when the memory of the message is reset.
#[pg_guard]
unsafe extern "C-unwind" fn watch() {
    // SAFETY: the callback lives in the context that it waits for.
    unsafe {
        let context = pg_sys::MessageContext;
        let callback =
            pg_sys::MemoryContextAllocZero(context, size_of::<pg_sys::MemoryContextCallback>())
                .cast::<pg_sys::MemoryContextCallback>();
        (*callback).func = Some(answered_message);
        pg_sys::MemoryContextRegisterResetCallback(context, callback);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn answered_message(_arg: *mut c_void) {
    settle(Outcome::Succeeded, None);
}

/// The call that ran, if there was one, has ended. Raises nothing.
fn settle(outcome: Outcome, sqlstate: Option<c_int>) {
    if let Some(call) = RUNNING.get() {
        RUNNING.set(None);
        NAME.with(String::clear);
        record::end(call.begun, outcome, sqlstate, -1, "");
        if outcome == Outcome::Succeeded {
            record::leave(call.depth);
        } else {
            record::leave_failed(call.depth);
        }
    }
}

/// The function whose call is being answered; without a name if it could not be called.
pub fn answered() -> Option<String> {
    // SAFETY: reads the backend's own entry.
    let answering = unsafe {
        let entry = pg_sys::MyBEEntry;
        !entry.is_null() && (*entry).st_state == pg_sys::BackendState::STATE_FASTPATH
    };
    (answering || RUNNING.get().is_some()).then(|| NAME.with(|n| n.clone()))
}

/// The message has failed.
pub fn failed(sqlstate: c_int) {
    settle(Outcome::Failed, Some(sqlstate));
}

/// A savepoint is rolled back: by what the call runs, or because it has failed.
pub fn subtransaction_rolled_back() {
    // SAFETY: reads the transaction's state.
    let level = unsafe { GetCurrentTransactionNestLevel() };
    if RUNNING.get().is_some_and(|call| level <= call.level) {
        settle(Outcome::Failed, Some(chain::caught_sqlstate()));
    }
}

/// The transaction has been committed, or rolled back.
pub fn transaction_ended(committed: bool) {
    if RUNNING.get().is_none() {
        return;
    }
    if committed {
        settle(Outcome::Succeeded, None);
    // SAFETY: reads a variable of this process. Then it is interrupted with its session.
    } else if unsafe { pg_sys::proc_exit_inprogress } {
        RUNNING.set(None);
    } else {
        settle(Outcome::Failed, Some(chain::caught_sqlstate()));
    }
}
