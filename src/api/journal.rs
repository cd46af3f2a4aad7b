//! SQL functions of the journal. Declared in `sql/15_journal.sql`.

use crate::pg::journal;
use pgrx::prelude::*;

/// `warden.journal_status()`.
#[pg_extern(sql = false)]
#[allow(
    clippy::type_complexity,
    reason = "the type is the function's result in SQL"
)]
fn journal_status() -> TableIterator<
    'static,
    (
        name!(written, i64),
        name!(consumed, i64),
        name!(flushed, i64),
        name!(unread_bytes, i64),
        name!(size_bytes, i64),
        name!(syncs, i64),
        name!(waits, i64),
        name!(failures, i64),
        name!(failing, bool),
    ),
> {
    TableIterator::new(journal::status().into_iter().map(|s| {
        (
            s.written as i64,
            s.consumed as i64,
            s.flushed as i64,
            s.written.saturating_sub(s.consumed) as i64,
            s.size as i64,
            s.syncs as i64,
            s.waits as i64,
            s.failures as i64,
            s.failing,
        )
    }))
}
