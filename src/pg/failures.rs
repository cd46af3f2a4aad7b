//! Statements that fail before a hook sees them: they cannot be parsed, analysed or planned, or their
//! transaction has failed already.
//!
//! Owns the failure under way, from the server's report of it to the end of the transaction or
//! savepoint that it takes with it: only then may its record be written, because whatever failed may
//! hold locks until then.

use crate::pg::local::Local;
use crate::pg::raise::unpack_sqlstate;
use crate::pg::shape::{self, statement_text};
use crate::pg::{chain, fastpath, hooks, record, transaction, withhold};
use pgrx::pg_sys;
use std::ffi::c_int;

/// Bytes of a failed text that are looked at.
const TEXT_LIMIT: usize = 1024 * 1024;

enum Failure {
    /// A hook has recorded it.
    Recorded,
    Unseen {
        sqlstate: c_int,
        what: What,
    },
}

enum What {
    Text(Vec<u8>),
    /// A function call message, and the function's name if it got that far.
    Call(String),
}

static STATE: Local<Option<Failure>> = Local::new(None);

/// Whether this process answers a client, and is not about to end.
fn serves() -> bool {
    // SAFETY: reads variables of this process.
    let (kind, ends) = unsafe { (pg_sys::MyBackendType, pg_sys::proc_exit_inprogress) };
    kind == pg_sys::BackendType::B_BACKEND && !ends && !hooks::passes()
}

/// The server reports an error to the client: the client's message has failed. Raises nothing.
pub fn reported(error: &pg_sys::ErrorData) {
    if !serves() {
        return;
    }
    let sqlstate = error.sqlerrcode;
    let call = fastpath::answered();
    fastpath::failed(sqlstate);
    transaction::failed(sqlstate);
    let failure = if record::take_failure() {
        Failure::Recorded
    } else {
        let what = call.map_or_else(|| What::Text(failing_text()), What::Call);
        Failure::Unseen { sqlstate, what }
    };
    // SAFETY: reads the transaction's state. One that has failed before is not rolled back again.
    if unsafe { pg_sys::IsTransactionState() } {
        STATE.with(|s| *s = Some(failure));
    } else {
        failure.record();
    }
}

/// A transaction is rolled back: by an error, or by ROLLBACK.
pub fn transaction_rolled_back() {
    rolled_back(STATE.with(Option::take));
}

/// A savepoint is rolled back, perhaps by an error; or an exception block, which runs inside a statement.
pub fn subtransaction_rolled_back() {
    let failure = STATE.with(Option::take);
    if failure.is_some() || withhold::at_the_top() {
        rolled_back(failure);
    }
}

fn rolled_back(failure: Option<Failure>) {
    // PostgreSQL forgets its query string before it aborts the transaction of a failed statement, and
    // only then: a ROLLBACK still has it.
    // SAFETY: reads a variable of this process.
    if !serves() || !unsafe { pg_sys::debug_query_string }.is_null() {
        return;
    }
    record::stop_running();
    let failure = failure.or_else(|| {
        // `log_min_messages` keeps errors from `reported`.
        (!record::take_failure()).then(|| Failure::Unseen {
            sqlstate: chain::caught_sqlstate(),
            what: What::Text(activity()),
        })
    });
    if let Some(failure) = failure {
        failure.record();
    }
}

impl Failure {
    fn record(self) {
        let Self::Unseen { sqlstate, what } = self else {
            return;
        };
        match what {
            What::Text(sql) => {
                // Constraints and conflicts are found by statements that run, which hooks have seen, and by
                // the commit after the last of them.
                let class = &unpack_sqlstate(sqlstate)[..2];
                let command = match class {
                    b"23" | b"40" => "COMMIT",
                    _ => "UNKNOWN",
                };
                record::unseen(false, sqlstate, |dest| {
                    shape::unparsed(dest, command, sqlstate, &sql)
                });
            }
            What::Call(name) => record::unseen(true, sqlstate, |dest| {
                shape::utility(dest, fastpath::COMMAND, name.as_bytes(), &[], &[])
            }),
        }
    }
}

/// The text of the message that is failing.
fn failing_text() -> Vec<u8> {
    // SAFETY: reads variables of this process; the query string is NUL-terminated.
    let sql = unsafe {
        if pg_sys::debug_query_string.is_null() {
            return activity();
        }
        statement_text(pg_sys::debug_query_string, 0, 0)
    };
    sql[..sql.len().min(TEXT_LIMIT)].to_vec()
}

/// The text that this backend has last reported as running: nothing, if it does not run any.
fn activity() -> Vec<u8> {
    // SAFETY: the backend's own entry; the activity string is NUL-terminated.
    unsafe {
        let entry = pg_sys::MyBEEntry;
        if entry.is_null() || (*entry).st_state != pg_sys::BackendState::STATE_RUNNING {
            return Vec::new();
        }
        statement_text((*entry).st_activity_raw, 0, 0).to_vec()
    }
}
