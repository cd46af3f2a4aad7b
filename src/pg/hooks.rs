//! The hooks: trampolines that ask our own functions before and after, and call on exactly once.
//!
//! Each trampoline owns nothing with a destructor while it calls on (see [`chain`]); what comes
//! before and after sits in guarded functions. `docs/ARCHITECTURE.md` lists why each hook exists,
//! what it passes over, and what happens when it fails.

use crate::error::{Refusal, RefusalCode};
use crate::pg::raise::{self, Raised};
use crate::pg::record::{self, Begun};
use crate::pg::shape::{self, statement_text};
use crate::pg::{
    chain, classes, databases, drops, exclusions, exposure, failures, fastpath, identity,
    local::Local, mask, parallel, parameters, policy, rules, transaction, worker,
};
use pgrx::{pg_guard, pg_sys};
use std::ffi::{c_char, c_int, c_void};
use warden_core::classes::Class;
use warden_core::event::Outcome;
use warden_core::frame::Fate;

static mut PREV_START: pg_sys::ExecutorStart_hook_type = None;
static mut PREV_RUN: pg_sys::ExecutorRun_hook_type = None;
static mut PREV_FINISH: pg_sys::ExecutorFinish_hook_type = None;
static mut PREV_END: pg_sys::ExecutorEnd_hook_type = None;
static mut PREV_UTILITY: pg_sys::ProcessUtility_hook_type = None;
static mut PREV_PLANNER: pg_sys::planner_hook_type = None;

// PostgreSQL's own functions, not pgrx's guarded wrappers (trap T2).
unsafe extern "C-unwind" {
    fn standard_ExecutorStart(query: *mut pg_sys::QueryDesc, eflags: c_int);
    #[cfg(not(feature = "pg18"))]
    fn standard_ExecutorRun(
        query: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
        once: bool,
    );
    #[cfg(feature = "pg18")]
    fn standard_ExecutorRun(
        query: *mut pg_sys::QueryDesc,
        direction: pg_sys::ScanDirection::Type,
        count: u64,
    );
    fn MemoryContextAlloc(context: pg_sys::MemoryContext, size: usize) -> *mut c_void;
    fn MemoryContextRegisterResetCallback(
        context: pg_sys::MemoryContext,
        callback: *mut pg_sys::MemoryContextCallback,
    );
    fn standard_ExecutorFinish(query: *mut pg_sys::QueryDesc);
    fn standard_ExecutorEnd(query: *mut pg_sys::QueryDesc);
    fn standard_planner(
        parse: *mut pg_sys::Query,
        source: *const c_char,
        options: c_int,
        params: pg_sys::ParamListInfo,
    ) -> *mut pg_sys::PlannedStmt;
    fn standard_ProcessUtility(
        stmt: *mut pg_sys::PlannedStmt,
        source: *const c_char,
        read_only: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        params: pg_sys::ParamListInfo,
        env: *mut pg_sys::QueryEnvironment,
        dest: *mut pg_sys::DestReceiver,
        qc: *mut pg_sys::QueryCompletion,
    );
}

/// Installs the hooks. Called from _PG_init of a preloaded library.
pub fn install() {
    // SAFETY: the postmaster has one thread, and no backend exists yet.
    unsafe {
        PREV_START = (&raw mut pg_sys::ExecutorStart_hook).replace(Some(executor_start));
        PREV_RUN = (&raw mut pg_sys::ExecutorRun_hook).replace(Some(executor_run));
        PREV_FINISH = (&raw mut pg_sys::ExecutorFinish_hook).replace(Some(executor_finish));
        PREV_END = (&raw mut pg_sys::ExecutorEnd_hook).replace(Some(executor_end));
        PREV_UTILITY = (&raw mut pg_sys::ProcessUtility_hook).replace(Some(process_utility));
        PREV_PLANNER = (&raw mut pg_sys::planner_hook).replace(Some(planner));
    }
}

/// Set when this backend has asked to be told of the ends of transactions.
static CALLBACKS: Local<bool> = Local::new(false);

/// Statements of our own workers and of parallel workers (their leader is recorded) are not ours.
/// Those of foreign keys are not either, but only the planner hook can tell them from statements of
/// users' triggers that a cascade fires: see [`mask::plans_integrity_check`].
#[inline]
pub fn passes() -> bool {
    // SAFETY: reads a variable of this process.
    worker::in_worker() || unsafe { pg_sys::ParallelWorkerNumber >= 0 }
}

// ---------------------------------------------------------------------------------------- planner

unsafe extern "C-unwind" fn planner(
    parse: *mut pg_sys::Query,
    source: *const c_char,
    options: c_int,
    params: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: PostgreSQL's own arguments, passed on; nothing here has a destructor.
    unsafe {
        let mut refused = None;
        let mut options = options;
        let notes = before_planner(parse, source, &mut options, &mut refused);
        if let Some(refused) = refused {
            raise::raise(refused);
        }
        let stmt = match PREV_PLANNER {
            Some(prev) => prev(parse, source, options, params),
            None => standard_planner(parse, source, options, params),
        };
        after_planner(stmt, source, notes);
        stmt
    }
}

/// What was found before planning, as nodes in PostgreSQL's memory: an error leaks nothing.
#[pg_guard]
unsafe extern "C-unwind" fn before_planner(
    parse: *mut pg_sys::Query,
    source: *const c_char,
    options: *mut c_int,
    refused: *mut Option<Raised>,
) -> *mut pg_sys::List {
    // Not `passes()`: functions that a parallel worker runs have queries of their own to mask.
    if worker::in_worker() || !policy::installed() {
        return std::ptr::null_mut();
    }
    // SAFETY: a valid query, in a transaction; `options` and `refused` are the trampoline's.
    unsafe {
        // First: nothing here has a destructor yet.
        let calls = parallel::examine(parse, &mut *options);
        let labels = rules::without_where(parse);
        match mask::mask_query(parse, source) {
            Ok(outcome) => mask::notes(&outcome, &labels, calls.functions()),
            Err(refusal) => {
                let sql = statement_text(source, (*parse).stmt_location, (*parse).stmt_len);
                let command = shape::command_name((*parse).commandType);
                let begun = record::begin(
                    Class::Read,
                    false,
                    true,
                    |dest| shape::utility(dest, command, sql, &[], &[]),
                    |_, _| {},
                );
                record::blocked(begun.unwrap_or(Begun::UNRECORDED), &refusal);
                *refused = Some(raise::prepare(&refusal));
                std::ptr::null_mut()
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn after_planner(
    stmt: *mut pg_sys::PlannedStmt,
    source: *const c_char,
    notes: *mut pg_sys::List,
) {
    if worker::in_worker() || !policy::installed() {
        return;
    }
    // SAFETY: a valid statement, the text that it was made from, and the notes made for it.
    unsafe {
        mask::annotate(stmt, notes);
        let sql = statement_text(source, (*stmt).stmt_location, (*stmt).stmt_len);
        mask::note_shape(stmt, shape::of_plan(stmt, sql));
    }
}

// --------------------------------------------------------------------------------------- executor

unsafe extern "C-unwind" fn executor_start(query: *mut pg_sys::QueryDesc, eflags: c_int) {
    // SAFETY: as in `planner`.
    unsafe {
        let mut refused = None;
        let recorded = before_start(query, eflags, &mut refused);
        if let Some(refused) = refused {
            raise::raise(refused);
        }
        let failed = chain::call(|| match PREV_START {
            Some(prev) => {
                prev(query, eflags);
            }
            None => standard_ExecutorStart(query, eflags),
        });
        if failed {
            failed_query(query);
            chain::rethrow();
        }
        if recorded {
            watch(query);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_start(
    query: *mut pg_sys::QueryDesc,
    eflags: c_int,
    refused: *mut Option<Raised>,
) -> bool {
    if passes() || eflags & pg_sys::EXEC_FLAG_EXPLAIN_ONLY as c_int != 0 {
        return false;
    }
    register_callbacks();
    // SAFETY: a valid query; `refused` is the trampoline's.
    unsafe {
        let stmt = (*query).plannedstmt;
        let integrity = mask::plans_integrity_check(stmt);
        // What foreign keys check is not recorded; what they change is.
        if integrity && (*stmt).commandType == pg_sys::CmdType::CMD_SELECT {
            return false;
        }
        let sql = || statement_text((*query).sourceText, (*stmt).stmt_location, (*stmt).stmt_len);
        let notes = mask::read_notes(stmt);
        let decision = if policy::installed() && !integrity {
            check_identity(|| mask::calls_only_identity_functions(stmt))
                .and_then(|()| rules::check_planned(stmt, &notes.labels))
        } else {
            Ok(())
        };
        if decision.is_ok()
            && policy::installed()
            && exclusions::leave_out_planned(stmt, notes.masked)
        {
            return false;
        }
        let class = classes::of_planned(stmt);
        let depth = enter_commit((*query).dest);
        let shape = notes.shape.unwrap_or_else(|| shape::of_plan(stmt, sql()));
        let begun = record::begin(
            class,
            false,
            notes.masked,
            |dest| shape::planned(dest, stmt, shape.key, sql),
            |_, out| parameters::planned(shape, stmt, (*query).params, sql, out),
        );
        record::leave_failed(depth);
        match (decision, begun) {
            (Ok(()), Ok(Begun::UNRECORDED)) => false,
            (Ok(()), Ok(begun)) => {
                record::attach(query, begun);
                true
            }
            (Err(refusal), begun) => {
                record::blocked(begun.unwrap_or(Begun::UNRECORDED), &refusal);
                *refused = Some(raise::prepare(&refusal));
                false
            }
            (Ok(()), Err(refusal)) => {
                *refused = Some(raise::prepare(&refusal));
                false
            }
        }
    }
}

/// A function that nothing runs is a deferred trigger's: COMMIT runs it, or the statement that
/// commits by itself. Returns what [`record::leave_failed`] wants.
unsafe fn enter_commit(dest: *mut pg_sys::DestReceiver) -> usize {
    use pg_sys::CommandDest as D;
    let depth = record::depth();
    // SAFETY: reads a variable of this process; `dest` is valid or null.
    unsafe {
        if depth > 0
            || dest.is_null()
            || !matches!((*dest).mydest, D::DestSPI | D::DestSQLFunction)
            || pg_sys::MyBackendType != pg_sys::BackendType::B_BACKEND
        {
            return depth;
        }
    }
    record::enter(record::last())
}

/// An expired token lets nothing through but a new one.
pub fn check_identity(renews: impl FnOnce() -> bool) -> Result<(), Refusal> {
    if record::nested() || !identity::expired(record::now) || renews() {
        return Ok(());
    }
    Err(Refusal {
        code: RefusalCode::Identity,
        message: "the identity token of this session has expired".into(),
        detail: String::new(),
        hint: "Call warden.login() with a new token, or warden.logout().".into(),
        rule: "token_expired".into(),
    })
}

/// Hangs our state on the query's memory: a query that is abandoned never reaches ExecutorEnd.
///
/// # Safety
/// Of a query that has been started. An error passes through here: no destructor may wait.
unsafe fn watch(query: *mut pg_sys::QueryDesc) {
    // SAFETY: the executor has just made the context; the callback lives in it.
    unsafe {
        let context = (*(*query).estate).es_query_cxt;
        let callback = MemoryContextAlloc(context, size_of::<pg_sys::MemoryContextCallback>())
            .cast::<pg_sys::MemoryContextCallback>();
        (*callback).func = Some(abandoned);
        (*callback).arg = query.cast();
        (*callback).next = std::ptr::null_mut();
        MemoryContextRegisterResetCallback(context, callback);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn abandoned(arg: *mut c_void) {
    record::detach(arg.cast(), Outcome::Interrupted, None);
}

#[pg_guard]
unsafe extern "C-unwind" fn failed_query(query: *mut pg_sys::QueryDesc) {
    record::detach(query, Outcome::Failed, Some(chain::caught_sqlstate()));
}

/// The rows that a failed run had sent: the client has them.
unsafe fn add_rows_shown(query: *mut pg_sys::QueryDesc) {
    // SAFETY: a query that was running.
    unsafe {
        let stmt = (*query).plannedstmt;
        if (*stmt).commandType == pg_sys::CmdType::CMD_SELECT || (*stmt).hasReturning {
            record::add_rows(query, (*(*query).estate).es_processed);
        }
    }
}

/// Runs `f` as part of `query`; `shows` if it sends rows.
///
/// # Safety
/// As [`chain::call`]; the caller has nothing with a destructor alive.
#[inline]
unsafe fn run_inside(query: *mut pg_sys::QueryDesc, shows: bool, f: impl FnOnce()) {
    let depth = record::enter(record::intent_of(query));
    // SAFETY: the closure calls on, and no more.
    let failed = unsafe { chain::call(f) };
    if failed {
        // SAFETY: an error has been caught.
        unsafe {
            if shows {
                add_rows_shown(query);
            }
            failed_query(query);
            record::leave_failed(depth);
            chain::rethrow();
        }
    }
    record::leave(depth);
}

#[cfg(not(feature = "pg18"))]
unsafe extern "C-unwind" fn executor_run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
    once: bool,
) {
    // SAFETY: as in `planner`.
    unsafe {
        run_inside(query, true, || match PREV_RUN {
            Some(prev) => prev(query, direction, count, once),
            None => standard_ExecutorRun(query, direction, count, once),
        });
        record::add_rows(query, (*(*query).estate).es_processed);
    }
}

#[cfg(feature = "pg18")]
unsafe extern "C-unwind" fn executor_run(
    query: *mut pg_sys::QueryDesc,
    direction: pg_sys::ScanDirection::Type,
    count: u64,
) {
    // SAFETY: as in `planner`.
    unsafe {
        run_inside(query, true, || match PREV_RUN {
            Some(prev) => prev(query, direction, count),
            None => standard_ExecutorRun(query, direction, count),
        });
        record::add_rows(query, (*(*query).estate).es_processed);
    }
}

unsafe extern "C-unwind" fn executor_finish(query: *mut pg_sys::QueryDesc) {
    // SAFETY: as in `planner`.
    unsafe {
        run_inside(query, false, || match PREV_FINISH {
            Some(prev) => prev(query),
            None => standard_ExecutorFinish(query),
        });
    }
}

unsafe extern "C-unwind" fn executor_end(query: *mut pg_sys::QueryDesc) {
    // SAFETY: as in `planner`. The outcome is recorded before the client hears of it.
    unsafe {
        after_query(query);
        match PREV_END {
            Some(prev) => prev(query),
            None => standard_ExecutorEnd(query),
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn after_query(query: *mut pg_sys::QueryDesc) {
    record::detach(query, Outcome::Succeeded, None);
}

// ---------------------------------------------------------------------------------------- utility

/// What `before_utility` hands to the trampoline.
#[derive(Clone, Copy)]
struct Decided {
    refused: Option<Raised>,
    begun: Begun,
    stmt: *mut pg_sys::PlannedStmt,
    /// The extension is created or dropped by this command.
    ours: bool,
    /// Workers have left a database for this command.
    paused: bool,
}

unsafe extern "C-unwind" fn process_utility(
    stmt: *mut pg_sys::PlannedStmt,
    source: *const c_char,
    read_only: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    params: pg_sys::ParamListInfo,
    env: *mut pg_sys::QueryEnvironment,
    dest: *mut pg_sys::DestReceiver,
    qc: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: as in `planner`.
    unsafe {
        let mut d = Decided {
            refused: None,
            begun: Begun::UNRECORDED,
            stmt,
            ours: false,
            paused: false,
        };
        before_utility(source, dest, &mut d);
        if let Some(refused) = d.refused {
            raise::raise(refused);
        }
        let depth = record::enter(d.begun.intent);
        let dropping = drops::enter((*stmt).utilityStmt);
        let failed = chain::call(|| match PREV_UTILITY {
            Some(prev) => prev(d.stmt, source, read_only, context, params, env, dest, qc),
            None => {
                standard_ProcessUtility(d.stmt, source, read_only, context, params, env, dest, qc);
            }
        });
        drops::leave(dropping);
        if d.paused {
            databases::resume();
        }
        if failed {
            failed_utility(&d.begun);
            record::leave_failed(depth);
            chain::rethrow();
        }
        after_utility(&d, qc);
        record::leave(depth);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn before_utility(
    source: *const c_char,
    dest: *mut pg_sys::DestReceiver,
    d: *mut Decided,
) {
    if passes() {
        return;
    }
    register_callbacks();
    // SAFETY: a valid statement; `d` is the trampoline's.
    unsafe {
        let d = &mut *d;
        let stmt = d.stmt;
        let node = (*stmt).utilityStmt;
        let sql = statement_text(source, (*stmt).stmt_location, (*stmt).stmt_len);
        let utility = rules::examine(node);
        let installed = policy::installed();
        if installed && pg_sys::IsTransactionState() {
            // So that they are known if the command, or the commit, fails: see `withhold`.
            policy::masks();
        }
        let decision = if installed {
            check_identity(|| rules::ends_transaction(node))
                .and_then(|()| rules::check_utility(&utility))
                .and_then(|()| match pg_sys::IsTransactionState() {
                    true => exposure::check_command(node),
                    false => Ok(()),
                })
        } else {
            Ok(())
        };
        let left_out =
            installed && decision.is_ok() && exclusions::leave_out_utility(&utility, sql);
        let begun = if left_out {
            Ok(Begun::LEFT_OUT)
        } else {
            let depth = enter_commit(dest);
            let begun = record::begin(
                classes::of_utility(node),
                true,
                false,
                |dest| {
                    let u = &utility;
                    shape::utility(dest, &u.command, sql, &u.targets, &u.functions)
                },
                |shape, out| parameters::utility(shape, &utility.command, sql, out),
            );
            record::leave_failed(depth);
            begun
        };
        match (decision, begun) {
            (Err(refusal), begun) => {
                record::blocked(begun.unwrap_or(Begun::UNRECORDED), &refusal);
                d.refused = Some(raise::prepare(&refusal));
                return;
            }
            (Ok(()), Err(refusal)) => {
                d.refused = Some(raise::prepare(&refusal));
                return;
            }
            (Ok(()), Ok(begun)) => d.begun = begun,
        }
        d.ours = rules::is_about_us(node);
        d.paused = databases::make_room(node);
        if installed && let Some(rewritten) = mask::rewrite_copy(stmt) {
            d.stmt = rewritten;
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn failed_utility(begun: *const Begun) {
    // SAFETY: the trampoline's.
    let begun = unsafe { *begun };
    let (outcome, rule) = match drops::refused_by() {
        Some(rule) => (Outcome::Blocked, rule),
        None => (Outcome::Failed, String::new()),
    };
    record::end(begun, outcome, Some(chain::caught_sqlstate()), -1, &rule);
}

#[pg_guard]
unsafe extern "C-unwind" fn after_utility(d: *const Decided, qc: *mut pg_sys::QueryCompletion) {
    // SAFETY: the trampoline's; `qc` is null or valid.
    unsafe {
        let counted = !qc.is_null() && pg_sys::command_tag_display_rowcount((*qc).commandTag);
        let rows = if counted { (*qc).nprocessed as i64 } else { -1 };
        if rules::commits((*(*d).stmt).utilityStmt) && pg_sys::IsTransactionState() {
            transaction::ends_by((*d).begun);
        } else {
            record::end((*d).begun, Outcome::Succeeded, None, rows, "");
        }
        if rules::discards_all((*(*d).stmt).utilityStmt) {
            // A pooler hands the connection on: not with the identity of the one before.
            identity::clear();
        }
        if (*d).ours {
            databases::extension_changed();
        }
    }
}

// ----------------------------------------------------------------------------------- transactions

/// Asks to be told of the ends of transactions.
pub fn register_callbacks() {
    if CALLBACKS.get() {
        return;
    }
    CALLBACKS.set(true);
    // SAFETY: the callbacks have the right signatures and need no argument.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_transaction), std::ptr::null_mut());
        pg_sys::RegisterSubXactCallback(Some(on_subtransaction), std::ptr::null_mut());
        pg_sys::RegisterResourceReleaseCallback(Some(on_release), std::ptr::null_mut());
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn on_subtransaction(
    event: pg_sys::SubXactEvent::Type,
    subtransaction: pg_sys::SubTransactionId,
    _parent: pg_sys::SubTransactionId,
    _arg: *mut c_void,
) {
    if event == pg_sys::SubXactEvent::SUBXACT_EVENT_ABORT_SUB {
        fastpath::subtransaction_rolled_back();
        failures::subtransaction_rolled_back();
        transaction::subtransaction_rolled_back(subtransaction);
    }
}

unsafe extern "C-unwind" fn on_transaction(event: pg_sys::XactEvent::Type, arg: *mut c_void) {
    // SAFETY: as in `planner`.
    unsafe {
        let mut refused = None;
        transaction_event(event, arg, &mut refused);
        if let Some(refused) = refused {
            raise::raise(refused);
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn transaction_event(
    event: pg_sys::XactEvent::Type,
    _arg: *mut c_void,
    refused: *mut Option<Raised>,
) {
    use pg_sys::XactEvent as E;
    match event {
        E::XACT_EVENT_PRE_COMMIT | E::XACT_EVENT_PRE_PREPARE => {
            if let Err(refusal) = record::before_commit() {
                // SAFETY: the trampoline's.
                unsafe { *refused = Some(raise::prepare(&refusal)) };
            }
        }
        E::XACT_EVENT_COMMIT => {
            fastpath::transaction_ended(true);
            transaction::ended(Fate::Committed);
            databases::transaction_ended(true);
        }
        E::XACT_EVENT_PREPARE => transaction::ended(Fate::Prepared),
        E::XACT_EVENT_ABORT => {
            fastpath::transaction_ended(false);
            transaction::ended(Fate::RolledBack);
            databases::transaction_ended(false);
            failures::transaction_rolled_back();
        }
        _ => {}
    }
}

/// After the locks are released: whoever waits for them does not wait for the disk as well.
#[pg_guard]
unsafe extern "C-unwind" fn on_release(
    phase: pg_sys::ResourceReleasePhase::Type,
    commit: bool,
    top_level: bool,
    _arg: *mut c_void,
) {
    if !top_level || phase != pg_sys::ResourceReleasePhase::RESOURCE_RELEASE_AFTER_LOCKS {
        return;
    }
    if commit {
        record::after_commit();
    } else {
        record::after_abort();
    }
}
