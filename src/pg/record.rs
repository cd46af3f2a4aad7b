//! Recording: intents and outcomes of statements, and what happens when they cannot be recorded.
//!
//! Owns the statements of this backend that have begun and not ended, and which ledger they belong
//! to; and what this transaction must find on disk before it commits. Never raises an ERROR of its
//! own but the one of `warden.on_journal_full = error`.

use crate::error::{Refusal, RefusalCode};
use crate::pg::local::Local;
use crate::pg::raise::{pack_sqlstate, unpack_sqlstate};
use crate::pg::shared::shared;
use crate::pg::{
    boot, classes, connections, flush, journal, policy, session, shape, transaction, worker,
};
use pgrx::pg_sys;
use std::ffi::c_int;
use std::sync::atomic::Ordering;
use warden_core::classes::{Class, Durability, OnFull};
use warden_core::event::{Outcome as Ended, flags};
use warden_core::frame::{self, FrameKind, GapReason, Intent};

/// An execution that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// Journal position of its intent; 0 if it is not recorded.
    pub intent: u64,
    dest: u32,
    at: i64,
    class: Class,
}

impl Begun {
    /// An execution that is not recorded.
    pub const UNRECORDED: Self = Self {
        intent: 0,
        dest: 0,
        at: 0,
        class: Class::Read,
    };
    /// An execution that an exclusion covers. Its failure is recorded.
    pub const LEFT_OUT: Self = Self {
        intent: 0,
        dest: u32::MAX,
        at: 0,
        class: Class::Read,
    };
}

struct Executor {
    query: *mut pg_sys::QueryDesc,
    begun: Begun,
    rows: i64,
}

struct State {
    generation: Option<u32>,
    dest: u32,
    executing: Vec<Executor>,
    running: Vec<u64>,
    /// The intent of the last statement that nothing ran.
    last: u64,
    exit_registered: bool,
    /// A failure of the current statement has been recorded.
    failure_recorded: bool,
}

static STATE: Local<State> = Local::new(State {
    generation: None,
    dest: 0,
    executing: Vec::new(),
    running: Vec::new(),
    last: 0,
    exit_registered: false,
    failure_recorded: false,
});

// None of them can raise an error, so none needs pgrx's guard.
unsafe extern "C" {
    fn GetCurrentTimestamp() -> i64;
    fn GetTopFullTransactionIdIfAny() -> pg_sys::FullTransactionId;
    fn GetCurrentSubTransactionId() -> pg_sys::SubTransactionId;
}

pub fn now() -> i64 {
    // SAFETY: reads the clock.
    unsafe { GetCurrentTimestamp() }
}

/// The database whose ledger this backend's statements belong to; 0 if they are not recorded.
pub fn destination() -> u32 {
    let sh = shared();
    let generation = sh.generation.load(Ordering::Acquire);
    let (known, dest) = STATE.with(|s| (s.generation, s.dest));
    if known == Some(generation) {
        return dest;
    }
    // SAFETY: plain getters.
    let (database, usable) = unsafe {
        (
            pg_sys::MyDatabaseId,
            pg_sys::IsTransactionState() && !pg_sys::RecoveryInProgress(),
        )
    };
    if !usable {
        return dest;
    }
    boot::announce();
    // A database that was copied, or restored, with its ledger.
    let ungoverned = sh.slot(database).is_none() && policy::installed() && !is_template(database);
    if ungoverned && sh.govern(database) {
        wake_launcher();
    }
    // The generation first: what changes after it is read makes this answer stale.
    let generation = sh.generation.load(Ordering::Acquire);
    let home = sh.home.load(Ordering::Acquire);
    let dest = if sh.slot(database).is_some() {
        database.to_u32()
    } else {
        home
    };
    STATE.with(|s| {
        s.generation = Some(generation);
        s.dest = dest;
    });
    // A ledger that is new, or that missed a frame, does not know what was sent to it before.
    shape::forget();
    session::forget();
    dest
}

/// Workers keep out of templates: CREATE DATABASE needs them unused.
pub fn is_template(database: pg_sys::Oid) -> bool {
    // SAFETY: in a transaction; the tuple is released before it is forgotten.
    unsafe {
        let key = pg_sys::Datum::from(database);
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::DATABASEOID as c_int, key);
        if tuple.is_null() {
            return true;
        }
        let form = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
        let template = (*form).datistemplate;
        pg_sys::ReleaseSysCache(tuple);
        template
    }
}

/// Tells the launcher that the governed databases have changed.
pub fn wake_launcher() {
    let pid = shared().launcher.load(Ordering::Acquire);
    if pid > 0 {
        // SAFETY: SIGUSR1 only sets the latch of a process of PostgreSQL.
        unsafe { libc::kill(pid, libc::SIGUSR1) };
    }
}

/// Records that a statement is about to run. `shape` gives the key of its shape for a ledger; `values`
/// is called after it, and adds what is recorded of its values to the intent.
pub fn begin(
    class: Class,
    utility: bool,
    masked: bool,
    shape: impl Fn(u32) -> Option<u64>,
    values: impl Fn(u64, &mut Vec<u8>),
) -> Result<Begun, Refusal> {
    let dest = destination();
    if dest == 0 {
        return Ok(Begun::UNRECORDED);
    }
    register_exit();
    let parent = STATE.with(|s| s.running.last().copied().unwrap_or(0));
    let mut bits = 0;
    for (bit, set) in [
        (flags::NESTED, parent != 0),
        (flags::UTILITY, utility),
        (flags::MASKED, masked),
        // SAFETY: reads a variable of this process.
        (flags::BACKGROUND, unsafe {
            pg_sys::MyBackendType == pg_sys::BackendType::B_BG_WORKER
        }),
    ] {
        if set {
            bits |= bit;
        }
    }
    let at = now();
    loop {
        if let Some(intent) = append_intent(dest, at, parent, bits, &shape, &values) {
            if parent == 0 {
                STATE.with(|s| s.last = intent);
            }
            let begun = Begun {
                intent,
                dest,
                at,
                class,
            };
            return make_durable(begun);
        }
        match classes::on_full(class) {
            OnFull::Gap => {
                count_unrecorded(dest);
                return Ok(Begun::UNRECORDED);
            }
            OnFull::Error => {
                return Err(Refusal {
                    code: RefusalCode::Recording,
                    message: "statement cannot be recorded".into(),
                    detail: "The journal is full, or its directory cannot be used.".into(),
                    hint: "See the server's log for the recorder's errors; \
                           warden.on_journal_full decides whether statements wait, fail or run."
                        .into(),
                    rule: String::new(),
                });
            }
            // Ends by room, by cancel, by shutdown, or by another setting.
            OnFull::Block => worker::wait_in_backend(10),
        }
    }
}

/// What must be on disk before this transaction commits. The frame that says that it has committed
/// need not: the recorder can ask the server.
#[derive(Clone, Copy)]
struct Due {
    /// The classes of its statements, a bit each.
    classes: u8,
    /// The end of their last frame.
    position: u64,
}

const NOTHING_DUE: Due = Due {
    classes: 0,
    position: 0,
};

static DUE: Local<Due> = Local::new(NOTHING_DUE);

/// A frame of a statement has been written.
#[inline]
fn note_due(class: Class) -> Durability {
    let wanted = classes::durability(class);
    if wanted >= Durability::Commit {
        DUE.set(Due {
            classes: DUE.get().classes | 1 << class as u8,
            position: journal::appended(),
        });
    }
    wanted
}

/// Waits for the intent, if the statement must not run before it is on disk.
fn make_durable(begun: Begun) -> Result<Begun, Refusal> {
    let up_to = journal::appended();
    if note_due(begun.class) < Durability::Statement {
        return Ok(begun);
    }
    while flush::wait(up_to).is_err() {
        match classes::on_full(begun.class) {
            OnFull::Gap => {
                count_not_durable(begun.dest);
                break;
            }
            OnFull::Error => {
                let refusal = not_durable("statement cannot be recorded durably");
                blocked(begun, &refusal);
                return Err(refusal);
            }
            OnFull::Block => worker::wait_in_backend(100),
        }
    }
    Ok(begun)
}

fn not_durable(message: &str) -> Refusal {
    Refusal {
        code: RefusalCode::Recording,
        message: message.into(),
        detail: "The journal could not be synced to disk.".into(),
        hint: "See the server's log, and warden.journal_status(); \
               warden.on_journal_full decides whether statements wait, fail or run."
            .into(),
        rule: String::new(),
    }
}

/// The transaction is about to commit: everything that it recorded goes to disk, if that is wanted.
pub fn before_commit() -> Result<(), Refusal> {
    let due = DUE.get();
    if due.classes == 0 {
        return Ok(());
    }
    while flush::wait(due.position).is_err() {
        match strictest(due.classes) {
            OnFull::Gap => {
                count_not_durable(STATE.with(|s| s.dest));
                DUE.set(NOTHING_DUE);
                break;
            }
            OnFull::Error => return Err(not_durable("transaction cannot be recorded durably")),
            OnFull::Block => worker::wait_in_backend(100),
        }
    }
    Ok(())
}

/// What happens to a transaction that has statements of several classes.
fn strictest(due: u8) -> OnFull {
    let all = [Class::Read, Class::Write, Class::Ddl, Class::Admin];
    let mut strictest = OnFull::Gap;
    for class in all.into_iter().filter(|c| due & 1 << *c as u8 != 0) {
        match classes::on_full(class) {
            OnFull::Error => return OnFull::Error,
            OnFull::Block => strictest = OnFull::Block,
            OnFull::Gap => {}
        }
    }
    strictest
}

/// The transaction has committed, and the client does not know yet. What was recorded since
/// [`before_commit`] goes to disk; if it cannot, that is recorded: it is too late to fail.
pub fn after_commit() {
    let due = DUE.get();
    if due.classes == 0 {
        return;
    }
    DUE.set(NOTHING_DUE);
    if flush::wait(due.position).is_err() {
        count_not_durable(STATE.with(|s| s.dest));
        pgrx::warning!(
            "pg_warden: the transaction has committed, but its record may not be on disk yet"
        );
    }
}

/// The transaction has aborted.
pub fn after_abort() {
    DUE.set(NOTHING_DUE);
}

/// Room for intents, used again.
static INTENT: Local<Vec<u8>> = Local::new(Vec::new());

fn append_intent(
    dest: u32,
    at: i64,
    parent: u64,
    bits: u32,
    shape: impl Fn(u32) -> Option<u64>,
    values: impl Fn(u64, &mut Vec<u8>),
) -> Option<u64> {
    report_gap(dest);
    let session = session::key(dest)?;
    let shape = shape(dest)?;
    let intent = Intent {
        at,
        backend: session::backend(),
        session,
        shape,
        parent,
        flags: bits,
    };
    let mut payload = INTENT.with(std::mem::take);
    payload.clear();
    payload.extend_from_slice(&intent.encode());
    values(shape, &mut payload);
    let position = journal::append(FrameKind::Intent, dest, &payload, false).ok();
    INTENT.with(|i| *i = payload);
    position
}

/// Something went on unrecorded: a later frame says so.
pub fn count_unrecorded(dest: u32) {
    if let Some(slot) = shared().slot(pg_sys::Oid::from(dest)) {
        slot.unrecorded.fetch_add(1, Ordering::AcqRel);
    }
}

fn count_not_durable(dest: u32) {
    if let Some(slot) = shared().slot(pg_sys::Oid::from(dest)) {
        slot.not_durable.fetch_add(1, Ordering::AcqRel);
    }
}

fn report_gap(dest: u32) {
    let Some(slot) = shared().slot(pg_sys::Oid::from(dest)) else {
        return;
    };
    for (count, reason) in [
        (&slot.unrecorded, GapReason::JournalFull),
        (&slot.not_durable, GapReason::NotDurable),
    ] {
        if count.load(Ordering::Relaxed) == 0 {
            continue;
        }
        let lost = count.swap(0, Ordering::AcqRel);
        let gap = reason.encode(lost);
        if lost > 0 && journal::append(FrameKind::Gap, dest, &gap, true).is_err() {
            count.fetch_add(lost, Ordering::AcqRel);
        }
    }
}

/// Records how a statement ended.
pub fn end(begun: Begun, outcome: Ended, sqlstate: Option<c_int>, rows: i64, rule: &str) {
    end_late(begun, outcome, sqlstate, rows, rule);
    if begun.intent != 0 {
        note_due(begun.class);
    }
}

/// As [`end`], where it is too late to wait for the disk.
pub fn end_late(begun: Begun, outcome: Ended, sqlstate: Option<c_int>, rows: i64, rule: &str) {
    if outcome != Ended::Succeeded && begun != Begun::LEFT_OUT {
        STATE.with(|s| s.failure_recorded = true);
    }
    if begun.intent == 0 {
        return;
    }
    // SAFETY: reads this process's transaction state.
    let (xid, subtransaction) = unsafe {
        (
            GetTopFullTransactionIdIfAny().value,
            GetCurrentSubTransactionId(),
        )
    };
    let xid = if transaction::is_over(xid) { 0 } else { xid };
    if xid != 0 {
        transaction::wrote(begun.dest, subtransaction);
    }
    let outcome = frame::Outcome {
        intent: begun.intent,
        rows,
        duration_us: now().saturating_sub(begun.at).max(0),
        outcome: outcome as u8,
        flags: 0,
        xid,
        subtransaction,
        sqlstate: sqlstate.map_or([0; 5], unpack_sqlstate),
        rule: rule.to_owned(),
    };
    let fixed = outcome.encode_fixed();
    let written = if rule.is_empty() {
        journal::append(FrameKind::Outcome, begun.dest, &fixed, true)
    } else {
        journal::append(FrameKind::Outcome, begun.dest, &outcome.encode(), true)
    };
    if written.is_err() {
        // Even the reserve is gone. The recorder will call it interrupted.
        count_unrecorded(begun.dest);
    }
}

/// Records a statement that was refused.
pub fn blocked(begun: Begun, refusal: &Refusal) {
    let sqlstate = pack_sqlstate(refusal.code.sqlstate());
    end(begun, Ended::Blocked, Some(sqlstate), -1, &refusal.rule);
}

/// Remembers an executor's query until it ends.
pub fn attach(query: *mut pg_sys::QueryDesc, begun: Begun) {
    STATE.with(|s| {
        s.executing.push(Executor {
            query,
            begun,
            rows: 0,
        })
    });
}

/// The intent of an executor's query; 0 if it is not recorded.
#[inline]
pub fn intent_of(query: *mut pg_sys::QueryDesc) -> u64 {
    STATE.with(|s| {
        s.executing
            .iter()
            .rev()
            .find(|e| e.query == query)
            .map_or(0, |e| e.begun.intent)
    })
}

/// Adds to the rows of an executor's query.
pub fn add_rows(query: *mut pg_sys::QueryDesc, rows: u64) {
    STATE.with(|s| {
        if let Some(e) = s.executing.iter_mut().rev().find(|e| e.query == query) {
            e.rows = e.rows.saturating_add(rows as i64);
        }
    });
}

/// An executor's query has ended; `sqlstate` if by an error. Does nothing when called again.
pub fn detach(query: *mut pg_sys::QueryDesc, outcome: Ended, sqlstate: Option<c_int>) {
    let found = STATE.with(|s| {
        let i = s.executing.iter().rposition(|e| e.query == query)?;
        Some(s.executing.remove(i))
    });
    if let Some(e) = found {
        let rows = if outcome == Ended::Succeeded {
            e.rows
        } else {
            e.rows.max(0)
        };
        end(e.begun, outcome, sqlstate, rows, "");
    }
}

/// A statement starts to run inside those that run already. Returns what [`leave`] wants.
#[inline]
pub fn enter(intent: u64) -> usize {
    STATE.with(|s| {
        let depth = s.running.len();
        if intent != 0 {
            s.running.push(intent);
        }
        depth
    })
}

/// Back to where [`enter`] was called, by whichever way.
#[inline]
pub fn leave(depth: usize) {
    STATE.with(|s| {
        s.running.truncate(depth);
        if depth == 0 {
            s.failure_recorded = false;
        }
    });
}

/// As [`leave`], after an error: what failed stays known until the transaction has ended.
#[inline]
pub fn leave_failed(depth: usize) {
    STATE.with(|s| s.running.truncate(depth));
}

/// The intent of the last statement that nothing ran.
pub fn last() -> u64 {
    STATE.with(|s| s.last)
}

/// How many statements run inside each other.
#[inline]
pub fn depth() -> usize {
    STATE.with(|s| s.running.len())
}

/// Whether a statement runs inside another one.
#[inline]
pub fn nested() -> bool {
    STATE.with(|s| !s.running.is_empty())
}

fn register_exit() {
    if STATE.with(|s| std::mem::replace(&mut s.exit_registered, true)) {
        return;
    }
    // SAFETY: the callbacks have the right signatures and need no argument.
    unsafe {
        pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0));
    }
}

/// The backend ends, normally or by FATAL: what has begun is interrupted, and its transaction aborts
/// after this.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: c_int, _arg: pg_sys::Datum) {
    let sqlstate = connections::fatal_sqlstate();
    let (dest, executing, running) = STATE.with(|s| {
        (
            s.dest,
            std::mem::take(&mut s.executing),
            std::mem::take(&mut s.running),
        )
    });
    for e in executing {
        let mut rows = e.rows;
        if running.contains(&e.begun.intent) {
            // SAFETY: it runs, so its state is there: nothing has been cleaned up yet.
            rows += unsafe { (*(*e.query).estate).es_processed } as i64;
        }
        let sqlstate = (sqlstate != [0; 5]).then(|| pack_sqlstate(&sqlstate));
        end_late(e.begun, Ended::Interrupted, sqlstate, rows, "");
    }
    if dest != 0 {
        let end = frame::SessionEnd {
            backend: session::backend(),
            sqlstate,
        };
        let _ = journal::append(FrameKind::SessionEnd, dest, &end.encode(), true);
    }
}

/// Whether a failure has been recorded since this was last asked.
pub fn take_failure() -> bool {
    STATE.with(|s| std::mem::replace(&mut s.failure_recorded, false))
}

/// The client's statement has failed: nothing runs any more.
pub fn stop_running() {
    STATE.with(|s| s.running.clear());
}

/// Records a statement that failed before a hook saw it. Reads no catalog.
pub fn unseen(utility: bool, sqlstate: c_int, shape: impl Fn(u32) -> Option<u64>) {
    let dest = match STATE.with(|s| s.dest) {
        0 => destination_unseen(),
        known => known,
    };
    if dest == 0 {
        return;
    }
    register_exit();
    let at = now();
    let bits = if utility { flags::UTILITY } else { 0 };
    match append_intent(dest, at, 0, bits, shape, |_, _| {}) {
        Some(intent) => end(
            Begun {
                intent,
                dest,
                at,
                class: Class::Read,
            },
            Ended::Failed,
            Some(sqlstate),
            -1,
            "",
        ),
        None => count_unrecorded(dest),
    }
    STATE.with(|s| s.failure_recorded = false);
}

/// As [`destination`], for a session of which no statement has been seen, without catalogs.
fn destination_unseen() -> u32 {
    let sh = shared();
    // SAFETY: plain getters.
    unsafe {
        if pg_sys::RecoveryInProgress() {
            0
        } else if sh.slot(pg_sys::MyDatabaseId).is_some() {
            pg_sys::MyDatabaseId.to_u32()
        } else {
            sh.home.load(Ordering::Acquire)
        }
    }
}
