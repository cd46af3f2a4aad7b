//! What became of what a transaction wrote.
//!
//! Owns: whether the running transaction has recorded statements that wrote, and which of its
//! subtransactions were rolled back. Emits one frame at its end. Raises nothing: it runs where a
//! transaction can no longer fail.

use crate::pg::local::Local;
use crate::pg::{journal, record};
use pgrx::pg_sys;
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
}

static STATE: Local<State> = Local::new(State {
    dest: 0,
    highest: 0,
    rolled_back: Vec::new(),
    unknown_from: 0,
});

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

/// The transaction has ended, or was prepared.
pub fn ended(fate: Fate) {
    let (dest, unknown_from, rolled_back) = STATE.with(|s| {
        s.highest = 0;
        (
            std::mem::take(&mut s.dest),
            std::mem::take(&mut s.unknown_from),
            std::mem::take(&mut s.rolled_back),
        )
    });
    if dest == 0 {
        return;
    }
    // SAFETY: the id is kept until after the callbacks of the transaction's end.
    let xid = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
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
