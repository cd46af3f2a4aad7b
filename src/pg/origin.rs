//! Where the ledger is written: on which cluster, timeline and journal.
//!
//! A ledger is data, and goes where the database goes: `pg_upgrade` takes it to another cluster, a base
//! backup back to an earlier time, a promoted standby to another machine. The journal does not go the
//! same way: the one found there may be another, newer or older. Owns `warden.ledger_origin`, which says
//! where the ledger was written from, and the file `recovery` of the journal, which says where the journal
//! ended when an archive was last replayed. Only the recorder asks.

use crate::pg::journal;
use crate::pg::shared::shared;
use pgrx::{Spi, pg_sys};
use siphasher::sip::SipHasher24;
use std::fs;
use std::hash::Hasher;
use std::path::Path;
use std::sync::atomic::Ordering;
use warden_core::event::GapFacts;
use warden_core::join::reason;

/// Where a ledger is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    system: u64,
    timeline: u32,
    journal: u64,
}

/// Where this server writes. After recovery has ended.
pub fn current() -> Origin {
    let (k0, k1) = shared().hash_key();
    let mut hasher = SipHasher24::new_with_keys(k0, k1);
    hasher.write(b"pg_warden journal");
    // SAFETY: reads shared memory of the server, after recovery.
    unsafe {
        Origin {
            system: pg_sys::GetSystemIdentifier(),
            timeline: pg_sys::GetWALInsertionTimeLine(),
            journal: hasher.finish(),
        }
    }
}

/// Where the ledger was written last; `None` for a new one.
pub fn stored() -> Result<Option<Origin>, pgrx::spi::Error> {
    Spi::connect(|c| {
        let query =
            "SELECT system, timeline, journal FROM warden.ledger_origin ORDER BY id DESC LIMIT 1";
        let mut rows = c.select(query, Some(1), &[])?;
        let Some(row) = rows.next() else {
            return Ok(None);
        };
        Ok(Some(Origin {
            system: row.get::<i64>(1)?.unwrap_or(0) as u64,
            timeline: row.get::<i32>(2)?.unwrap_or(0) as u32,
            journal: row.get::<i64>(3)?.unwrap_or(0) as u64,
        }))
    })
}

/// Remembers where the ledger is written from event `seq` on.
pub fn store(origin: Origin, seq: i64) -> Result<(), pgrx::spi::Error> {
    Spi::run_with_args(
        "INSERT INTO warden.ledger_origin (seq, system, timeline, journal, server_version) \
         VALUES ($1, $2, $3, $4, current_setting('server_version_num')::integer)",
        &[
            seq.into(),
            (origin.system as i64).into(),
            (origin.timeline as i32).into(),
            (origin.journal as i64).into(),
        ],
    )
}

/// What the ledger says when it goes on at `to`, and was written at `from` up to the position `saved`.
pub fn moved(from: Origin, to: Origin, saved: u64) -> GapFacts {
    let (oldest, tail) = (journal::oldest(), journal::tail());
    let (reason, position) = if from.system != to.system {
        (reason::SERVER_REPLACED, oldest)
    } else if from.journal != to.journal {
        (reason::JOURNAL_REPLACED, oldest)
    } else {
        // What the journal held before is of another timeline: it happened, but not in this
        // database's past.
        (reason::TIMELINE_CHANGED, end_before_recovery())
    };
    GapFacts {
        reason: reason.to_owned(),
        statements: 0,
        from_position: saved,
        to_position: position.clamp(oldest, tail),
        system: to.system,
        timeline: u64::from(to.timeline),
        server_version: u64::from(pg_sys::PG_VERSION_NUM),
    }
}

/// Whether the journal was empty when the server started: then it does not say that it started.
pub fn journal_is_new() -> bool {
    shared().recovered.load(Ordering::Acquire) == journal::SEGMENT
}

/// When the postmaster started: microseconds since 2000-01-01 UTC.
pub fn started_at() -> i64 {
    // SAFETY: reads a variable of this process.
    unsafe { pg_sys::PgStartTime }
}

const RECOVERY_FILE: &str = "recovery";

/// The server starts, and the journal ends at `end`. If an archive is going to be replayed, all that is
/// in it belongs to the past of another server.
pub fn note_start(end: u64) {
    let replays = ["recovery.signal", "standby.signal"]
        .iter()
        .any(|f| Path::new(f).exists());
    if !replays {
        return;
    }
    let file = journal::directory().join(RECOVERY_FILE);
    if let Err(e) = journal::write_durably(&file, format!("{end}\n").as_bytes()) {
        pgrx::warning!("pg_warden: could not write \"{}\": {e}", file.display());
    }
}

/// The journal's end when the last recovery began.
fn end_before_recovery() -> u64 {
    fs::read_to_string(journal::directory().join(RECOVERY_FILE))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or_else(|| shared().recovered.load(Ordering::Acquire))
}
