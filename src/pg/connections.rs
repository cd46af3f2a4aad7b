//! Connections: who is admitted, who is refused, and how each session ends.
//!
//! Owns what this backend knows about its own connection. Receives the server's FATALs, the result of
//! authentication, the end of the transaction in which the server admits the session, and the end of
//! the process; emits `Connection` frames. Reads no catalog and raises no error: most of this runs
//! before there is a session, or after it.

use crate::pg::local::Local;
use crate::pg::raise::unpack_sqlstate;
use crate::pg::record::{count_unrecorded, now};
use crate::pg::session::{self, text};
use crate::pg::shared::{self, shared};
use crate::pg::{boot, failures, hooks, journal, port, refusals, withhold};
use crate::settings;
use pgrx::pg_sys;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use warden_core::connection::{ConnectionEvent, ConnectionFacts, Ending, frame, reason};
use warden_core::frame::FrameKind;

type AuthenticationHook = Option<unsafe extern "C-unwind" fn(*mut pg_sys::Port, c_int)>;

static mut PREV_AUTHENTICATION: AuthenticationHook = None;
static mut PREV_LOG: pg_sys::emit_log_hook_type = None;

// Not pgrx's guarded wrappers: an error may be under way.
unsafe extern "C" {
    static mut ClientAuthentication_hook: AuthenticationHook;
    fn GetRecoveryState() -> pg_sys::RecoveryState::Type;
}

const STATUS_OK: c_int = 0;
const STATUS_ERROR: c_int = -1;
/// `admin_shutdown`.
const TERMINATED: &str = "57P01";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The session is not usable yet.
    Connecting,
    /// A refusal has been recorded.
    Refused,
    /// The server has admitted the session.
    Usable,
}

struct State {
    phase: Phase,
    /// Whose ledger has the event that it connected; 0 if none has.
    dest: u32,
    method: String,
    identity: String,
    /// SQLSTATE and message of the FATAL that ends the session.
    fatal: Option<(String, String)>,
}

static STATE: Local<State> = Local::new(State {
    phase: Phase::Connecting,
    dest: 0,
    method: String::new(),
    identity: String::new(),
    fatal: None,
});

/// Installs the hooks. Called from _PG_init of a preloaded library.
pub fn install() {
    // SAFETY: the postmaster has one thread, and no backend exists yet.
    unsafe {
        PREV_AUTHENTICATION = (&raw mut ClientAuthentication_hook).replace(Some(authentication));
        PREV_LOG = (&raw mut pg_sys::emit_log_hook).replace(Some(emit_log));
    }
}

/// Runs `f`; a panic of ours ends here, and neither the connection nor the error under way.
fn quietly(f: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(f));
}

// ------------------------------------------------------------------------------------ trampolines

unsafe extern "C-unwind" fn authentication(port: *mut pg_sys::Port, status: c_int) {
    // SAFETY: PostgreSQL's own arguments, passed on; nothing here has a destructor. What another
    // extension's hook refuses, it refuses by a FATAL, which `emit_log` sees.
    unsafe {
        if let Some(prev) = PREV_AUTHENTICATION {
            prev(port, status);
        }
        match status {
            STATUS_OK => {
                quietly(boot::announce);
                watch();
                withhold::watch();
            }
            STATUS_ERROR => quietly(unspoken_failure),
            // The client went away, as psql does to ask for a password.
            _ => {}
        }
    }
}

unsafe extern "C-unwind" fn emit_log(error: *mut pg_sys::ErrorData) {
    // SAFETY: as above; the error is valid while the hook runs.
    unsafe {
        if port::exists() && shared::available() {
            if (*error).elevel == pg_sys::FATAL as c_int {
                quietly(|| fatal(&*error));
            } else if (*error).elevel == pgrx::PgLogLevel::ERROR as c_int {
                quietly(|| failures::reported(&*error));
            }
        }
        if let Some(prev) = PREV_LOG {
            prev(error);
        }
    }
}

/// Asks to be told how admission goes on. Both lists are PostgreSQL's.
unsafe fn watch() {
    // SAFETY: the callbacks have the right signatures and need no argument.
    unsafe {
        pg_sys::RegisterXactCallback(Some(on_transaction), std::ptr::null_mut());
        pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0));
        // A session's first statement may fail before any hook sees it.
        hooks::register_callbacks();
    }
}

/// The server checks everything about a new session in one transaction: its commit admits it.
unsafe extern "C-unwind" fn on_transaction(event: pg_sys::XactEvent::Type, _arg: *mut c_void) {
    if event == pg_sys::XactEvent::XACT_EVENT_COMMIT && STATE.with(|s| s.phase == Phase::Connecting)
    {
        quietly(admitted);
    }
}

unsafe extern "C-unwind" fn on_exit(code: c_int, _arg: pg_sys::Datum) {
    quietly(|| ended(code));
}

// -------------------------------------------------------------------------------------- recording

/// A FATAL of a client's backend: it refuses the connection, or ends the session.
fn fatal(error: &pg_sys::ErrorData) {
    let sqlstate: String = unpack_sqlstate(error.sqlerrcode)
        .into_iter()
        .map(char::from)
        .collect();
    // SAFETY: strings of the error are null or NUL-terminated.
    let (message, id) = unsafe { (text(error.message), text(error.message_id)) };
    let reason = reason(&message, &sqlstate);
    match STATE.with(|s| s.phase) {
        Phase::Connecting => refused(sqlstate, reason, id.as_bytes()),
        Phase::Refused => {}
        Phase::Usable => STATE.with(|s| s.fatal = Some((sqlstate, reason))),
    }
}

/// Authentication failed, and `log_min_messages` keeps the message from [`fatal`].
fn unspoken_failure() {
    // SAFETY: reads a setting.
    if unsafe { pg_sys::log_min_messages } > pg_sys::FATAL as c_int {
        refused("28000".into(), "authentication failed".into(), b"");
    }
}

fn refused(sqlstate: String, reason: String, message: &[u8]) {
    STATE.with(|s| s.phase = Phase::Refused);
    if on_standby() {
        return;
    }
    // SAFETY: the session is not usable.
    let (method, identity) = unsafe { port::authentication() };
    let facts = ConnectionFacts {
        event: ConnectionEvent::Refused,
        method,
        identity,
        sqlstate,
        reason,
        ..port::facts()
    }
    .clipped();
    let dest = ledger_of(&facts.database);
    if dest != 0 {
        refusals::refused(dest, message, &facts);
    }
}

/// A standby has no recorder. A server that recovers from a crash will have one.
fn on_standby() -> bool {
    // SAFETY: reads shared memory.
    unsafe { GetRecoveryState() == pg_sys::RecoveryState::RECOVERY_STATE_ARCHIVE }
}

/// The ledger of a database that is known by name only, as long as no catalog can be read.
fn ledger_of(name: &str) -> u32 {
    let sh = shared();
    let of = |name: &str| {
        sh.slot_named(name)
            .map(|s| s.database.load(Ordering::Acquire))
    };
    match (of(name), sh.home.load(Ordering::Acquire)) {
        (Some(dest), _) => dest,
        (None, 0) => of(&settings::home_database()).unwrap_or(0),
        (None, home) => home,
    }
}

/// The ledger of this session's database.
fn ledger_of_session() -> u32 {
    let sh = shared();
    // SAFETY: reads a variable of this process.
    let database = unsafe { pg_sys::MyDatabaseId };
    if database != pg_sys::InvalidOid && sh.slot(database).is_some() {
        return database.to_u32();
    }
    sh.home.load(Ordering::Acquire)
}

fn admitted() {
    // SAFETY: the server has not forgotten the line of pg_hba.conf yet.
    let (method, identity) = unsafe { port::authentication() };
    STATE.with(|s| {
        s.phase = Phase::Usable;
        (s.method, s.identity) = (method, identity);
    });
    let dest = ledger_of_session();
    if dest == 0 || on_standby() {
        return;
    }
    STATE.with(|s| s.dest = dest);
    append(dest, -1, session_facts(ConnectionEvent::Connected), false);
}

/// The process ends with this exit code; 0 is a client that said goodbye or went away.
fn ended(code: c_int) {
    let (phase, dest, fatal) = STATE.with(|s| (s.phase, s.dest, s.fatal.take()));
    match phase {
        Phase::Connecting if code != 0 => refused(String::new(), String::new(), b""),
        Phase::Connecting | Phase::Refused => {}
        Phase::Usable => {
            let known = dest != 0 && shared().slot(pg_sys::Oid::from(dest)).is_some();
            let dest = if known { dest } else { ledger_of_session() };
            if dest == 0 || on_standby() {
                return;
            }
            let mut facts = session_facts(ConnectionEvent::Disconnected);
            facts.ended = Some(match (&fatal, code) {
                (Some((sqlstate, _)), _) if sqlstate == TERMINATED => Ending::Terminated,
                (None, 0) => Ending::Normal,
                _ => Ending::Fatal,
            });
            (facts.sqlstate, facts.reason) = fatal.unwrap_or_default();
            // SAFETY: reads a variable of this process.
            let start = unsafe { pg_sys::MyStartTimestamp };
            append(dest, now().saturating_sub(start).max(0), facts, true);
        }
    }
}

/// SQLSTATE of the FATAL that ends the session; zeros if there is none.
pub fn fatal_sqlstate() -> [u8; 5] {
    STATE
        .with(|s| {
            let (sqlstate, _) = s.fatal.as_ref()?;
            sqlstate.as_bytes().try_into().ok()
        })
        .unwrap_or_default()
}

/// The connection of a usable session.
fn session_facts(event: ConnectionEvent) -> ConnectionFacts {
    let (method, identity) = STATE.with(|s| (s.method.clone(), s.identity.clone()));
    ConnectionFacts {
        event,
        backend: session::backend(),
        // SAFETY: a setting, NUL-terminated.
        application_name: unsafe { text(pg_sys::application_name) },
        method,
        identity,
        ..port::facts()
    }
    .clipped()
}

fn append(dest: u32, duration_us: i64, facts: ConnectionFacts, reserve: bool) {
    let payload = frame(now(), duration_us, &facts);
    if journal::append(FrameKind::Connection, dest, &payload, reserve).is_err() {
        count_unrecorded(dest);
    }
}
