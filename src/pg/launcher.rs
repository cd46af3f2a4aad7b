//! The launcher: one background worker of the cluster, connected to no database.
//!
//! Owns the governed databases: starts a recorder and a shipper in each, again when they end, and
//! frees the slot when the extension or the database is gone. Prepares and removes the journal's
//! segments. Writes nothing else.

use crate::pg::shared::{Slot, SlotState, shared};
use crate::pg::worker::{self, Role};
use crate::pg::{boot, classes, journal, local::Local, refusals, scan};
use crate::settings;
use pgrx::pg_sys;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::Ordering;

/// Longest pause before a worker that keeps failing is started again, in seconds.
const LONGEST_PAUSE: u32 = 30;

struct Child {
    handle: *mut pg_sys::BackgroundWorkerHandle,
    /// Rounds of a second to wait before the next start.
    wait: u32,
    /// Starts in a row that did not live for a minute.
    failures: u32,
    /// Rounds since it was started.
    age: u32,
}

/// Registers the launcher. Called while shared_preload_libraries are loaded.
pub fn register() {
    let mut w = blank_worker(c"pg_warden launcher", c"pg_warden_launcher_main");
    w.bgw_restart_time = 1;
    // SAFETY: in _PG_init of a preloaded library.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut w) };
}

fn blank_worker(name: &CStr, main: &CStr) -> pg_sys::BackgroundWorker {
    let mut w = pg_sys::BackgroundWorker {
        bgw_flags: (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION)
            as i32,
        bgw_start_time: pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished,
        bgw_restart_time: pg_sys::BGW_NEVER_RESTART,
        ..Default::default()
    };
    fill(&mut w.bgw_name, name);
    fill(&mut w.bgw_type, name);
    fill(&mut w.bgw_library_name, c"pg_warden");
    fill(&mut w.bgw_function_name, main);
    w
}

fn fill(field: &mut [c_char], s: &CStr) {
    for (to, from) in field.iter_mut().zip(s.to_bytes_with_nul()) {
        *to = *from as c_char;
    }
}

static CHILDREN: Local<Option<HashMap<(u32, Role), Child>>> = Local::new(None);

#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn pg_warden_launcher_main(_arg: pg_sys::Datum) {
    worker::signals();
    // SAFETY: in a worker's main function; no database: shared catalogs only.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
    }
    boot::announce();
    let sh = shared();
    sh.launcher
        .store(std::process::id() as i32, Ordering::Release);
    // SAFETY: the callback needs no argument.
    unsafe { pg_sys::before_shmem_exit(Some(on_exit), pg_sys::Datum::from(0)) };
    let mut generation = u32::MAX;
    loop {
        classes::publish();
        let now = sh.generation.load(Ordering::Acquire);
        if now != generation {
            generation = now;
            settle_databases();
        }
        let governed = sh
            .slots
            .iter()
            .filter(|s| s.database.load(Ordering::Acquire) != 0);
        let mut any = false;
        for slot in governed {
            any = true;
            keep(slot, Role::Recorder);
            keep(slot, Role::Shipper);
        }
        if any {
            sh.recompute_consumed();
            journal::prepare_segments();
            journal::remove_segments();
            refusals::sweep();
        }
        worker::wait(1000);
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn on_exit(_code: c_int, _arg: pg_sys::Datum) {
    refusals::close();
}

/// Frees the slots of databases that are gone, finds the home database, and remembers the rest.
fn settle_databases() {
    let sh = shared();
    let existing = databases();
    for slot in &sh.slots {
        let oid = slot.database.load(Ordering::Acquire);
        if oid != 0 && !existing.iter().any(|(o, _)| *o == oid) {
            sh.release(slot);
        }
    }
    let name = settings::home_database();
    let home = existing
        .iter()
        .find(|(_, n)| *n == name)
        .map_or(0, |(o, _)| *o);
    let home = if home != 0 && sh.slot(pg_sys::Oid::from(home)).is_some() {
        home
    } else {
        0
    };
    if sh.home.swap(home, Ordering::AcqRel) != home {
        sh.generation.fetch_add(1, Ordering::AcqRel);
    }
    let mut governed = Vec::new();
    for slot in &sh.slots {
        let oid = slot.database.load(Ordering::Acquire);
        if let Some((_, name)) = existing.iter().find(|(o, _)| oid != 0 && *o == oid) {
            if slot.name.get() != name.as_bytes() {
                slot.name.set(name.as_bytes());
            }
            governed.push((oid, name.as_str()));
        }
    }
    journal::write_databases(&governed);
}

/// OIDs and names of all databases. Without a database of our own, no index can be used.
fn databases() -> Vec<(u32, String)> {
    worker::transaction(|| {
        let mut found = Vec::new();
        scan::scan_table(pg_sys::DatabaseRelationId, |row| {
            if let (Some(oid), Some(name)) = (row.oid("oid"), row.name("datname")) {
                found.push((oid.to_u32(), name));
            }
        });
        found
    })
}

/// Starts a worker that should run and does not.
fn keep(slot: &Slot, role: Role) {
    let database = slot.database.load(Ordering::Acquire);
    if database == 0 || pause_holds(slot) {
        return;
    }
    let running = CHILDREN.with(|c| {
        let child = c.get_or_insert_default().get_mut(&(database, role))?;
        let mut pid = 0;
        // SAFETY: the handle came from RegisterDynamicBackgroundWorker.
        let status = unsafe { pg_sys::GetBackgroundWorkerPid(child.handle, &mut pid) };
        let stopped = status == pg_sys::BgwHandleStatus::BGWH_STOPPED;
        child.age += 1;
        if !stopped {
            if child.age > 60 {
                child.failures = 0;
            }
            return Some(true);
        }
        child.wait = child.wait.saturating_sub(1);
        Some(child.wait > 0)
    });
    if running == Some(true) {
        return;
    }
    if slot.state.load(Ordering::Acquire) == SlotState::Gone as u32 {
        CHILDREN.with(|c| {
            if let Some(c) = c {
                c.retain(|(d, _), _| *d != database);
            }
        });
        shared().release(slot);
        return;
    }
    if !databases().iter().any(|(oid, _)| *oid == database) {
        shared().release(slot);
        return;
    }
    start(database, role);
}

/// A backend has asked for the database: DROP DATABASE and the like need it empty.
fn pause_holds(slot: &Slot) -> bool {
    let pid = slot.paused_by.load(Ordering::Acquire);
    if pid == 0 {
        return false;
    }
    // SAFETY: signal 0 only asks whether the process exists.
    if unsafe { libc::kill(pid, 0) } == 0 {
        return true;
    }
    slot.paused_by.store(0, Ordering::Release);
    false
}

fn start(database: u32, role: Role) {
    let (name, main) = match role {
        Role::Recorder => (c"pg_warden recorder", c"pg_warden_recorder_main"),
        Role::Shipper => (c"pg_warden shipper", c"pg_warden_shipper_main"),
    };
    let mut w = blank_worker(name, main);
    w.bgw_main_arg = pg_sys::Datum::from(database);
    // SAFETY: MyProcPid is this worker's; the descriptor is copied.
    let (handle, registered) = unsafe {
        w.bgw_notify_pid = pg_sys::MyProcPid;
        let mut handle = std::ptr::null_mut();
        let ok = pg_sys::RegisterDynamicBackgroundWorker(&mut w, &mut handle);
        (handle, ok)
    };
    CHILDREN.with(|c| {
        let children = c.get_or_insert_default();
        if !registered {
            children.remove(&(database, role));
            return;
        }
        let failures = children
            .get(&(database, role))
            .map_or(0, |c| c.failures + 1);
        let wait = failures.min(LONGEST_PAUSE);
        children.insert(
            (database, role),
            Child {
                handle,
                wait,
                failures,
                age: 0,
            },
        );
    });
    if !registered {
        pgrx::warning!(
            "pg_warden: no background worker is free for database {database}; \
             increase max_worker_processes"
        );
    }
}
