//! Refused connections, counted: a login storm becomes a few events.
//!
//! Owns a table of fixed size in shared memory. The first of identical refusals is recorded at once;
//! those that follow within `warden.connection_failure_window` are counted, and become one event: by
//! the first refusal after the window, by the launcher, or when the launcher ends. A refusal that
//! finds no room here is recorded by itself: nothing is counted that is not recorded.
//!
//! Called before authentication, where a process has no place in the server's lock tables yet, and
//! may be ended by a signal at any time: entries are locked by process id, for a few instructions.

use crate::pg::journal;
use crate::pg::record::{count_unrecorded, now};
use crate::pg::shared::{Bytes, shared};
use crate::settings;
use siphasher::sip::SipHasher13;
use std::hash::Hasher;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64, Ordering};
use warden_core::connection::{ConnectionFacts, Window, frame};
use warden_core::frame::FrameKind;

/// Kinds of refusals that are counted at the same time.
const ENTRIES: usize = 128;
/// Words of the facts that are kept of one: see `warden_core::connection` for what they may be.
const WORDS: usize = 128;
/// `launcher` in shared memory, once the launcher has ended: nobody comes to record what is counted.
const LAUNCHER_ENDED: i32 = -1;

/// Identical refusals.
#[repr(C)]
pub struct Entry {
    /// Hash of what they have in common, or 0 if the entry is free.
    key: AtomicU64,
    /// Process id of who changes the entry, or 0.
    owner: AtomicI32,
    /// The ledger.
    dest: AtomicU32,
    since: AtomicI64,
    last: AtomicI64,
    count: AtomicU64,
    /// What they have in common, encoded.
    facts: Bytes<WORDS>,
}

/// The table.
pub type Table = [Entry; ENTRIES];

/// An entry that this process may change.
struct Locked<'a>(&'a Entry);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.0.owner.store(0, Ordering::Release);
    }
}

impl Entry {
    /// Locks the entry. `None` if another process holds it for long.
    fn lock(&self) -> Option<Locked<'_>> {
        let me = std::process::id() as i32;
        for _ in 0..1000 {
            let owner = self.owner.load(Ordering::Relaxed);
            // SAFETY: signal 0 only asks whether the process exists.
            let free = owner == 0 || unsafe { libc::kill(owner, 0) } != 0;
            if free
                && self
                    .owner
                    .compare_exchange(owner, me, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                return Some(Locked(self));
            }
            std::thread::yield_now();
        }
        None
    }
}

impl Locked<'_> {
    fn window(&self) -> Window {
        Window {
            since: self.0.since.load(Ordering::Relaxed),
            last: self.0.last.load(Ordering::Relaxed),
            count: self.0.count.load(Ordering::Relaxed),
        }
    }

    fn set_window(&self, w: Window) {
        self.0.since.store(w.since, Ordering::Relaxed);
        self.0.last.store(w.last, Ordering::Relaxed);
        self.0.count.store(w.count, Ordering::Relaxed);
    }

    /// Records what is counted, if anything is. False if the journal is full: then it stays counted.
    fn record_counted(&self, reserve: bool) -> bool {
        let window = self.window();
        if window.count == 0 {
            return true;
        }
        let Ok(mut facts) = ConnectionFacts::decode(&self.0.facts.get()) else {
            return true;
        };
        facts.count = window.count;
        let recorded = append(
            self.0.dest.load(Ordering::Relaxed),
            window.last,
            &facts,
            reserve,
        );
        if recorded {
            self.set_window(Window { count: 0, ..window });
        }
        recorded
    }
}

/// Records a refusal, or counts it. `message` tells kinds of refusals apart.
pub fn refused(dest: u32, message: &[u8], facts: &ConnectionFacts) {
    let at = now();
    if !counted(dest, message, facts, at) && !append(dest, at, facts, false) {
        count_unrecorded(dest);
    }
}

fn counted(dest: u32, message: &[u8], facts: &ConnectionFacts, at: i64) -> bool {
    let length = settings::connection_failure_window();
    let key = key(dest, message, facts);
    let table = &shared().refusals;
    for entry in table
        .iter()
        .filter(|e| e.key.load(Ordering::Acquire) == key)
    {
        let Some(locked) = entry.lock() else {
            return false;
        };
        if entry.key.load(Ordering::Relaxed) != key {
            continue;
        }
        // Under the lock: the launcher takes it after it has said that it ends.
        if shared().launcher.load(Ordering::Acquire) == LAUNCHER_ENDED {
            return false;
        }
        let mut window = locked.window();
        let counted = window.add(at, length);
        if counted {
            locked.set_window(window);
        } else if locked.record_counted(false) {
            locked.set_window(Window::open(at));
        }
        return counted;
    }
    let common = facts.in_common().encode();
    if length > 0 && common.len() <= WORDS * 8 {
        for entry in table.iter().filter(|e| e.key.load(Ordering::Acquire) == 0) {
            let Some(locked) = entry.lock() else {
                continue;
            };
            if entry.key.load(Ordering::Relaxed) == 0 {
                entry.dest.store(dest, Ordering::Relaxed);
                entry.facts.set(&common);
                locked.set_window(Window::open(at));
                entry.key.store(key, Ordering::Release);
                break;
            }
        }
    }
    false
}

/// Records what was counted in windows that are over, and frees entries. Called by the launcher.
pub fn sweep() {
    let (at, length) = (now(), settings::connection_failure_window());
    for entry in &shared().refusals {
        if entry.key.load(Ordering::Acquire) == 0 {
            continue;
        }
        let Some(locked) = entry.lock() else {
            continue;
        };
        let window = locked.window();
        if !window.over(at, length) {
            continue;
        }
        if window.count == 0 {
            entry.key.store(0, Ordering::Release);
        } else if locked.record_counted(false) {
            locked.set_window(Window::open(at));
        }
    }
}

/// The launcher ends: records everything that is counted. From here on nothing is counted.
pub fn close() {
    shared().launcher.store(LAUNCHER_ENDED, Ordering::Release);
    for entry in &shared().refusals {
        if entry.key.load(Ordering::Acquire) != 0
            && let Some(locked) = entry.lock()
        {
            locked.record_counted(true);
        }
    }
}

/// A storm must not use up the `reserve`: the room that is kept for what has begun.
fn append(dest: u32, at: i64, facts: &ConnectionFacts, reserve: bool) -> bool {
    journal::append(FrameKind::Connection, dest, &frame(at, -1, facts), reserve).is_ok()
}

fn key(dest: u32, message: &[u8], facts: &ConnectionFacts) -> u64 {
    let (k0, k1) = shared().hash_key();
    let mut h = SipHasher13::new_with_keys(k0, k1);
    h.write_u32(dest);
    for part in [
        message,
        facts.role.as_bytes(),
        facts.database.as_bytes(),
        facts.client_addr.as_bytes(),
        facts.sqlstate.as_bytes(),
        facts.kind.name().as_bytes(),
    ] {
        h.write(part);
        h.write_u8(0xff);
    }
    h.finish() | 1
}
