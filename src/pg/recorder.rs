//! The recorder: one background worker of each governed database.
//!
//! Owns the way from the journal to the ledger. Receives frames, hands them to the joiner, and
//! stores what comes out together with the journal position after them, in one transaction: a
//! recorder that is killed goes on where the last committed batch ended. Never runs in a client's
//! backend, and never waits for one inside a transaction.

use crate::pg::journal::{self, Cursor, Next};
use crate::pg::ledger_table::{Ledger, Stored};
use crate::pg::origin;
use crate::pg::shared::shared;
use crate::pg::sqltext::SqlText;
use crate::pg::version;
use crate::pg::worker::{self, Role};
use pgrx::pg_sys;
use std::sync::atomic::Ordering;
use warden_core::join::{Joiner, reason};

/// Frames, and bytes of payload, of one transaction.
const FRAMES: usize = 8192;
const BYTES: usize = 8 << 20;
/// Pauses when there is nothing to read, in milliseconds: short after work, longer when idle.
const SHORT_PAUSE: i64 = 100;
const LONG_PAUSE: i64 = 1000;
/// Journal bytes of other databases after which the position is stored although nothing happened.
const UNSAVED: u64 = 1 << 20;

/// Main function of the worker; its argument is the database's OID.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn pg_warden_recorder_main(arg: pg_sys::Datum) {
    let database = pg_sys::Oid::from(arg.value() as u32);
    worker::attach(database, Role::Recorder);
    keep_memory();
    let Some(mut recorder) = begin(database) else {
        return;
    };
    let mut pause = SHORT_PAUSE;
    loop {
        worker::obey();
        match recorder.batch() {
            Progress::Gone => match begin(database) {
                Some(another) => recorder = another,
                None => return,
            },
            Progress::More => pause = SHORT_PAUSE,
            Progress::CaughtUp => {
                pause = SHORT_PAUSE;
                worker::wait(pause);
            }
            Progress::Idle => {
                worker::wait(pause);
                pause = (pause * 2).min(LONG_PAUSE);
            }
        }
    }
}

/// A batch needs some megabytes, again and again: they are not handed back to the kernel in between.
fn keep_memory() {
    const KEPT: i32 = 16 << 20;
    // SAFETY: parameters of the allocator, before any other thread could exist.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT);
    }
}

fn begin(database: pg_sys::Oid) -> Option<Recorder> {
    let recorder = worker::transaction(|| Recorder::start(database));
    match &recorder {
        Some(r) => worker::publish_consumed(database, r.saved),
        None => worker::extension_is_gone(database),
    }
    recorder
}

enum Progress {
    /// There was nothing to read.
    Idle,
    /// Everything was read.
    CaughtUp,
    /// There is more to read.
    More,
    /// The ledger is not in this database any more; there may be another one.
    Gone,
}

struct Recorder {
    /// OID of the extension; another one means another ledger.
    extension: pg_sys::Oid,
    database: pg_sys::Oid,
    joiner: Joiner,
    cursor: Cursor,
    /// The journal position that the ledger holds.
    saved: u64,
    /// The journal position at which the ledger began.
    start: u64,
    text: SqlText,
}

impl Recorder {
    /// Goes on where the ledger ends; `None` without the extension.
    fn start(database: pg_sys::Oid) -> Option<Self> {
        let ledger = Ledger::open()?;
        version::require_same();
        let Stored {
            position,
            start,
            chain,
            at,
            pending,
            unsettled,
        } = match ledger.load() {
            Ok(stored) => stored,
            Err(e) => pgrx::error!("pg_warden: could not read the ledger's state: {e}"),
        };
        let events = chain.seq;
        let (oldest, tail) = (journal::oldest(), journal::tail());
        let start = start.unwrap_or(oldest);
        let mut joiner = Joiner::new(database.to_u32(), start, chain, at, pending, unsettled);
        let origin = origin::current();
        let former = match origin::stored() {
            Ok(former) => former,
            Err(e) => pgrx::error!("pg_warden: could not read warden.ledger_origin: {e}"),
        };
        let moved = former.filter(|former| *former != origin);
        let next = match (position, moved) {
            (Some(saved), Some(former)) => {
                let facts = origin::moved(former, origin, saved);
                joiner.moved(&facts, &mut &ledger);
                if origin::journal_is_new() {
                    joiner.started(origin::started_at());
                }
                facts.to_position
            }
            (None, _) => {
                if events > 0 {
                    joiner.gap(reason::POSITION_LOST, 0, 0, oldest);
                }
                oldest
            }
            (Some(saved), None) if saved > tail || (events > 0 && restarted(database, saved)) => {
                let next = shared()
                    .recovered
                    .load(Ordering::Acquire)
                    .clamp(oldest, tail);
                joiner.interrupt_all(&mut &ledger);
                joiner.gap(reason::JOURNAL_REPLACED, 0, saved, next);
                next
            }
            (Some(saved), None) if saved < oldest => {
                joiner.gap(reason::JOURNAL_LOST, 0, saved, oldest);
                oldest
            }
            (Some(saved), None) => saved,
        };
        let start = joiner.start();
        if former != Some(origin)
            && let Err(e) = origin::store(origin, events + 1)
        {
            pgrx::error!("pg_warden: could not write warden.ledger_origin: {e}");
        }
        let batch = joiner.take();
        if !batch.is_empty() || position != Some(next) {
            ledger.store(&batch, joiner.chain(), next, start);
        }
        let cursor = Cursor::open(next);
        Some(Self {
            extension: ledger.extension,
            database,
            joiner,
            cursor,
            saved: next,
            start,
            text: SqlText::default(),
        })
    }

    fn batch(&mut self) -> Progress {
        if self.cursor.position() >= journal::tail() {
            return Progress::Idle;
        }
        let progress = worker::transaction(|| self.read_and_store());
        // Only now: what is published may be removed from the journal.
        worker::publish_consumed(self.database, self.saved);
        progress
    }

    /// The body of one transaction.
    fn read_and_store(&mut self) -> Progress {
        let Some(ledger) = Ledger::open().filter(|l| l.extension == self.extension) else {
            return Progress::Gone;
        };
        let (mut frames, mut bytes, mut more) = (0, 0, true);
        while frames < FRAMES && bytes < BYTES {
            match self.cursor.next() {
                Next::Frame {
                    pos,
                    header,
                    payload,
                } => {
                    self.joiner
                        .frame(pos, &header, payload, &mut &ledger, &mut self.text);
                    frames += 1;
                    bytes += payload.len();
                }
                Next::Damaged { from, to } => {
                    pgrx::warning!("pg_warden: the journal is damaged from {from} to {to}");
                    self.joiner.damaged(from, to);
                    frames += 1;
                }
                Next::End => {
                    more = false;
                    break;
                }
            }
        }
        self.joiner.settle_prepared(&mut &ledger);
        if self.joiner.lacking() {
            shared().resend();
        }
        let batch = self.joiner.take();
        let position = self.cursor.position();
        if !batch.is_empty() || position - self.saved > UNSAVED {
            ledger.store(&batch, self.joiner.chain(), position, self.start);
            self.saved = position;
        }
        match (more, frames) {
            (true, _) => Progress::More,
            (false, 0) => Progress::Idle,
            (false, _) => Progress::CaughtUp,
        }
    }
}

/// Whether the journal ended before `saved` when the server started: it is not the one that the
/// ledger was written from, and positions up to `saved` are used a second time.
///
/// The slot's position tells whether a recorder has run since: it is published right after the
/// commit, where no signal is obeyed.
fn restarted(database: pg_sys::Oid, saved: u64) -> bool {
    let recovered = shared().recovered.load(Ordering::Acquire);
    let consumed = shared()
        .slot(database)
        .map_or(0, |s| s.consumed.load(Ordering::Acquire));
    saved > recovered && consumed <= recovered
}
