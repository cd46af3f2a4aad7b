//! Tells the journal that the server has started.
//!
//! That is done by the first process that could have something recorded, not by the postmaster: only
//! when recovery has ended is it known which transaction ids will be used again. An id that a crash
//! took back, before anything of it was in the WAL, may commit afterwards in another transaction.

use crate::pg::journal;
use crate::pg::shared::{available, shared};
use pgrx::pg_sys;
use std::sync::atomic::Ordering;
use warden_core::frame::{Boot, FrameKind};

const NOT_YET: u32 = 0;
const BEGUN: u32 = 1;
const DONE: u32 = 2;
/// How often, and how long, another process is waited for: it writes one frame.
const TRIES: usize = 1000;
const PAUSE: i64 = 100;

/// Appends the boot frame, unless that has been done since the server started. Raises no error.
pub fn announce() {
    if !available() || shared().booted.load(Ordering::Acquire) == DONE {
        return;
    }
    // SAFETY: reads shared memory.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return;
    }
    let booted = &shared().booted;
    for _ in 0..TRIES {
        match booted.compare_exchange(NOT_YET, BEGUN, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                let done = if append() { DONE } else { NOT_YET };
                booted.store(done, Ordering::Release);
                return;
            }
            Err(DONE) => return,
            // Whoever dies here takes the server, and this, along.
            // SAFETY: sleeps.
            Err(_) => unsafe { pg_sys::pg_usleep(PAUSE as _) },
        }
    }
}

/// Whether there is nothing left to append.
fn append() -> bool {
    let governed = shared()
        .slots
        .iter()
        .any(|s| s.database.load(Ordering::Relaxed) != 0);
    if !governed {
        return true;
    }
    // SAFETY: read the clock and shared memory.
    let boot = unsafe {
        Boot {
            at: pg_sys::GetCurrentTimestamp(),
            next_xid: pg_sys::ReadNextFullTransactionId().value,
        }
    };
    journal::append(FrameKind::Boot, 0, &boot.encode(), true).is_ok()
}
