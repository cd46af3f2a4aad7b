//! What became of what a transaction wrote.
//!
//! Owns: whether the running transaction has recorded statements that wrote, which of its
//! subtransactions were rolled back, and the COMMIT that ends it: how that ended is known with the
//! transaction's end. Emits one frame at its end. Raises nothing: it runs where a transaction can no
//! longer fail.

use crate::pg::local::Local;
use crate::pg::record::{self, Begun};
use crate::pg::{chain, journal};
use pgrx::pg_sys;
use std::ffi::c_int;
use warden_core::event::Outcome;
use warden_core::frame::{Fate, FrameKind, Transaction};

/// Ranges of subtransactions that are remembered. A loop that catches errors can make millions.
const REMEMBERED: usize = 1000;

struct State {
    /// The ledger of its statements; 0 if none of them wrote.
    dest: u32,
    /// The highest subtransaction in which a recorded statement ended.
    highest: u32,
    rolled_back: Vec<(u32, u32)>,
    /// What was rolled back from this subtransaction on was not remembered; 0 if everything was.
    unknown_from: u32,
    /// COMMIT or PREPARE TRANSACTION, once it has run as a command.
    ending: Option<Begun>,
}

static STATE: Local<State> = Local::new(State {
    dest: 0,
    highest: 0,
    rolled_back: Vec::new(),
    unknown_from: 0,
    ending: None,
});

/// The transaction whose end has been recorded last.
static ENDED: Local<u64> = Local::new(0);

/// Whether the end of this transaction has been recorded: one that has failed keeps its id until
/// ROLLBACK, and nothing belongs to it any more.
#[inline]
pub fn is_over(xid: u64) -> bool {
    ENDED.get() == xid
}

/// A statement has ended whose transaction has an id.
#[inline]
pub fn wrote(dest: u32, subtransaction: u32) {
    STATE.with(|s| {
        s.dest = dest;
        s.highest = s.highest.max(subtransaction);
    });
}

/// A subtransaction, and with it those that were started inside it, is rolled back.
pub fn subtransaction_rolled_back(subtransaction: u32) {
    STATE.with(|s| {
        if s.dest == 0 || s.highest < subtransaction || s.unknown_from != 0 {
            return;
        }
        let mut first = subtransaction;
        // Numbers ascend: what was started later, and not before this one, was inside it.
        while let Some((start, end)) = s.rolled_back.last().copied() {
            if end.saturating_add(1) < first {
                break;
            }
            first = first.min(start);
            s.rolled_back.pop();
        }
        if s.rolled_back.len() >= REMEMBERED {
            s.unknown_from = first;
        } else {
            s.rolled_back.push((first, s.highest));
        }
    });
}

/// COMMIT or PREPARE TRANSACTION has run as a command. The transaction ends now, and may still fail.
pub fn ends_by(begun: Begun) {
    STATE.with(|s| s.ending = Some(begun));
}

/// The client's message has failed.
pub fn failed(sqlstate: c_int) {
    if let Some(begun) = STATE.with(|s| s.ending.take()) {
        record::end_late(begun, Outcome::Failed, Some(sqlstate), -1, "");
    }
}

/// How the command that was to end the transaction has ended.
fn settle(fate: Fate) {
    // SAFETY: reads a variable of this process. Then its statements are interrupted.
    if unsafe { pg_sys::proc_exit_inprogress } {
        STATE.with(|s| s.ending = None);
    }
    match STATE.with(|s| s.ending) {
        None => {}
        Some(_) if fate == Fate::RolledBack => failed(chain::caught_sqlstate()),
        Some(begun) => {
            STATE.with(|s| s.ending = None);
            record::end_late(begun, Outcome::Succeeded, None, -1, "");
        }
    }
}

/// The transaction has ended, or was prepared.
pub fn ended(fate: Fate) {
    settle(fate);
    let (dest, unknown_from, rolled_back) = STATE.with(|s| {
        s.highest = 0;
        (
            std::mem::take(&mut s.dest),
            std::mem::take(&mut s.unknown_from),
            std::mem::take(&mut s.rolled_back),
        )
    });
    // SAFETY: the id is kept until after the callbacks of the transaction's end.
    let xid = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
    ENDED.set(xid);
    if dest == 0 {
        return;
    }
    let frame = Transaction {
        at: record::now(),
        xid,
        fate,
        unknown_from,
        rolled_back,
    };
    // Without room, the fate stays open until the server starts again and the recorder asks it.
    let _ = journal::append(FrameKind::Transaction, dest, &frame.encode(), true);
}
