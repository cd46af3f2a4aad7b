//! What the background workers share: attaching to a database, waiting, transactions.

use crate::pg::local::Local;
use crate::pg::shared::{Slot, SlotState, shared};
use pgrx::pg_sys;
use std::ffi::c_int;
use std::sync::atomic::Ordering;

static IN_WORKER: Local<bool> = Local::new(false);

/// Whether this process is a worker of ours: its statements are not recorded.
#[inline]
pub fn in_worker() -> bool {
    IN_WORKER.get()
}

// The handlers themselves: a guarded wrapper has no place in a signal handler.
unsafe extern "C-unwind" {
    fn die(signal: c_int);
    fn SignalHandlerForConfigReload(signal: c_int);
    #[cfg_attr(feature = "pg18", link_name = "pqsignal_be")]
    fn pqsignal(signal: c_int, handler: Option<unsafe extern "C-unwind" fn(c_int)>);
}

/// Which worker of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Recorder,
    Shipper,
}

fn pid_of(slot: &Slot, role: Role) -> &std::sync::atomic::AtomicI32 {
    match role {
        Role::Recorder => &slot.recorder,
        Role::Shipper => &slot.shipper,
    }
}

/// Signal handlers of a worker: `die`, so that waits and queries end at once, and reload.
pub fn signals() {
    IN_WORKER.set(true);
    // SAFETY: called first thing in a worker's main function.
    unsafe {
        pqsignal(libc::SIGTERM, Some(die));
        pqsignal(libc::SIGHUP, Some(SignalHandlerForConfigReload));
        pg_sys::BackgroundWorkerUnblockSignals();
    }
}

/// Connects a worker to its database, and says so in shared memory.
pub fn attach(database: pg_sys::Oid, role: Role) {
    signals();
    let me = std::process::id() as i32;
    if let Some(slot) = shared().slot(database) {
        pid_of(slot, role).store(me, Ordering::Release);
    }
    // SAFETY: in a worker's main function; the callback gets what it expects.
    unsafe {
        pg_sys::before_shmem_exit(
            Some(detach),
            pg_sys::Datum::from((u64::from(database.to_u32()) << 1) | role as u64),
        );
        pg_sys::BackgroundWorkerInitializeConnectionByOid(database, pg_sys::InvalidOid, 0);
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn detach(_code: c_int, arg: pg_sys::Datum) {
    let arg = arg.value() as u64;
    let role = if arg & 1 == 0 {
        Role::Recorder
    } else {
        Role::Shipper
    };
    if let Some(slot) = shared().slot(pg_sys::Oid::from((arg >> 1) as u32)) {
        pid_of(slot, role).store(0, Ordering::Release);
    }
}

/// The worker found that the extension is not in its database.
pub fn extension_is_gone(database: pg_sys::Oid) {
    if let Some(slot) = shared().slot(database) {
        slot.state.store(SlotState::Gone as u32, Ordering::Release);
    }
}

/// The recorder of `database` needs nothing of the journal before `pos`.
pub fn publish_consumed(database: pg_sys::Oid, pos: u64) {
    if let Some(slot) = shared().slot(database) {
        slot.consumed.store(pos, Ordering::Release);
        shared().recompute_consumed();
    }
}

/// Waits for a latch or a time, and obeys what has been asked meanwhile.
pub fn wait(timeout_ms: i64) {
    wait_for_latch(timeout_ms);
    obey();
}

/// Waits in a client's backend, interruptible by cancel, timeout and shutdown. Settings are left as they
/// are: a statement is running, and PostgreSQL reads its configuration between commands only.
pub fn wait_in_backend(timeout_ms: i64) {
    wait_for_latch(timeout_ms);
    pgrx::check_for_interrupts!();
}

fn wait_for_latch(timeout_ms: i64) {
    // SAFETY: the process has a latch.
    unsafe {
        pg_sys::WaitLatch(
            pg_sys::MyLatch,
            (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH) as c_int,
            timeout_ms as _,
            pg_sys::PG_WAIT_EXTENSION,
        );
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
}

/// Ends or reloads, if that has been asked for.
pub fn obey() {
    // SAFETY: reads flags that signal handlers set; called between transactions or inside one.
    unsafe {
        pgrx::check_for_interrupts!();
        if pg_sys::ConfigReloadPending != 0 {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

/// Runs `f` in a transaction. An error ends the worker; the launcher starts it again.
pub fn transaction<R>(f: impl FnOnce() -> R) -> R {
    // SAFETY: outside of a transaction; every call is paired.
    unsafe {
        pg_sys::SetCurrentStatementStartTimestamp();
        pg_sys::StartTransactionCommand();
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
    }
    let r = f();
    // SAFETY: as above.
    unsafe {
        pg_sys::PopActiveSnapshot();
        pg_sys::CommitTransactionCommand();
    }
    r
}
