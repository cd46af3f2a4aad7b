//! SQL functions of the ledger. Declared in `sql/10_ledger.sql`.

use crate::pg::{exclusions, journal, ledger_table, parameters, version};
use pgrx::prelude::*;

/// `warden.event_detail(kind, payload)`.
#[pg_extern(sql = false, immutable, parallel_safe)]
fn event_detail(kind: i16, payload: &[u8]) -> pgrx::JsonB {
    pgrx::JsonB(ledger_table::server_json(warden_core::join::describe(
        kind, payload,
    )))
}

/// `warden.value_digest(value)`.
#[pg_extern(sql = false, stable, parallel_safe)]
fn value_digest(value: &str) -> String {
    parameters::value_digest(value)
}

/// `warden.left_out(exclusion)`.
#[pg_extern(sql = false)]
fn left_out(exclusion: i32) -> i64 {
    exclusions::left_out(exclusion)
}

/// `warden.verify(from_seq, to_seq)`.
#[pg_extern(sql = false)]
#[allow(
    clippy::type_complexity,
    reason = "the type is the function's result in SQL"
)]
fn ledger_verify(
    from_seq: Option<i64>,
    to_seq: Option<i64>,
) -> TableIterator<
    'static,
    (
        name!(ok, bool),
        name!(checked, i64),
        name!(first_bad, Option<i64>),
        name!(problem, Option<String>),
    ),
> {
    version::require_same();
    let verdict = ledger_table::verify(from_seq.unwrap_or(1), to_seq);
    let (first_bad, problem) = verdict.problem.unzip();
    TableIterator::once((problem.is_none(), verdict.checked, first_bad, problem))
}

/// Called once, by the extension's script: the ledger begins where the journal ends now.
#[pg_extern(sql = false)]
fn ledger_begin() {
    ledger_table::begin();
}

/// `warden.journal_append_cost(frames)`.
#[pg_extern(sql = false)]
fn journal_append_cost(frames: i32) -> f64 {
    journal::append_cost(frames.clamp(1, 1_000_000).unsigned_abs())
}
