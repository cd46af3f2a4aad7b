//! What all processes of the cluster share: the journal's positions, the governed databases, and
//! refused connections that are counted.
//!
//! Plain atomics: a writer that dies cannot leave a lock held. (Counted refusals are locked by process
//! id, which a dead process does not keep.) Sized by constants, so that nothing depends on a setting. Initialised by the postmaster, again after every crash.

use crate::pg::flush::Flush;
use crate::pg::refusals;
use pgrx::pg_sys;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

/// Databases that can have a ledger at the same time.
pub const MAX_DATABASES: usize = 64;

/// Shared state of one governed database.
#[repr(C)]
pub struct Slot {
    /// OID, or 0 if the slot is free.
    pub database: AtomicU32,
    /// A [`SlotState`].
    pub state: AtomicU32,
    /// The recorder needs nothing of the journal before this position.
    pub consumed: AtomicU64,
    /// Statements that went on unrecorded and are not yet in a gap frame.
    pub unrecorded: AtomicU64,
    /// As `unrecorded`: statements that went on although their record was not on disk.
    pub not_durable: AtomicU64,
    /// Process id of the recorder, or 0.
    pub recorder: AtomicI32,
    /// Process id of the shipper, or 0.
    pub shipper: AtomicI32,
    /// The backend that wants the workers out of the database, or 0.
    pub paused_by: AtomicI32,
    /// The database's name, for those who cannot read the catalog yet; empty if it is not known.
    pub name: Bytes<8>,
}

/// What is known about a governed database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum SlotState {
    /// It has, or had a moment ago, the extension.
    Governed = 0,
    /// A worker found that the extension, or the database, is gone.
    Gone = 1,
}

/// Counts that are kept: of exclusions beyond that, none is.
const COUNTS: usize = 256;

/// How many statements were left out, by the key of the exclusion.
#[repr(C)]
pub struct LeftOut([Count; COUNTS]);

#[repr(C)]
struct Count {
    /// 0 if it is free.
    key: AtomicU64,
    count: AtomicU64,
}

impl LeftOut {
    /// Counts a statement.
    pub fn count(&self, key: u64) {
        for c in &self.0 {
            let free = c
                .key
                .compare_exchange(0, key, Ordering::AcqRel, Ordering::Acquire);
            if free.is_ok() || free == Err(key) {
                c.count.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }

    /// How many statements were counted.
    pub fn of(&self, key: u64) -> u64 {
        let mine = |c: &&Count| c.key.load(Ordering::Acquire) == key;
        self.0
            .iter()
            .find(mine)
            .map_or(0, |c| c.count.load(Ordering::Relaxed))
    }
}

/// The shared memory of pg_warden.
#[repr(C)]
pub struct Shared {
    /// Where the next frame goes.
    pub tail: AtomicU64,
    /// Nothing before this position is needed by any recorder.
    pub consumed: AtomicU64,
    /// Frames before this position were written before the server started.
    pub recovered: AtomicU64,
    /// Lowest position whose segment still exists.
    pub oldest: AtomicU64,
    /// XORed with positions in frames; never leaves the server's files.
    pub secret: [AtomicU64; 3],
    /// Non-zero when the journal directory cannot be used.
    pub broken: AtomicU32,
    /// Changes with the set of governed databases.
    pub generation: AtomicU32,
    /// Whether the journal knows that the server has started: see [`crate::pg::boot`].
    pub booted: AtomicU32,
    /// The governed home database, or 0.
    pub home: AtomicU32,
    /// Process id of the launcher; 0 before it has started, and negative once it has ended.
    pub launcher: AtomicI32,
    /// `warden.on_journal_full` as the launcher has read it, a byte a class.
    pub on_full: AtomicU32,
    /// What exclusions leave out.
    pub left_out: LeftOut,
    /// How much of the journal is on disk.
    pub flush: Flush,
    /// The governed databases.
    pub slots: [Slot; MAX_DATABASES],
    /// Refused connections that are counted.
    pub refusals: refusals::Table,
}

/// Some bytes, as atomics. A reader that meets a writer gets a mixture of both, and no more harm.
#[repr(C)]
pub struct Bytes<const WORDS: usize> {
    length: AtomicU32,
    words: [AtomicU64; WORDS],
}

impl<const WORDS: usize> Bytes<WORDS> {
    /// Replaces the bytes; what does not fit is cut off.
    pub fn set(&self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(WORDS * 8)];
        self.length.store(0, Ordering::Release);
        for (word, chunk) in self.words.iter().zip(bytes.chunks(8)) {
            let mut b = [0; 8];
            b[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_le_bytes(b), Ordering::Relaxed);
        }
        self.length.store(bytes.len() as u32, Ordering::Release);
    }

    /// The bytes.
    pub fn get(&self) -> Vec<u8> {
        let length = self.length.load(Ordering::Acquire) as usize;
        let mut bytes: Vec<u8> = self
            .words
            .iter()
            .take(length.div_ceil(8))
            .flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes())
            .collect();
        bytes.truncate(length);
        bytes
    }
}

static mut SHARED: *mut Shared = std::ptr::null_mut();

/// Whether the library was loaded by shared_preload_libraries.
pub fn available() -> bool {
    // SAFETY: written once, by the postmaster, before any other process of ours exists.
    unsafe { !SHARED.is_null() }
}

/// The shared state.
///
/// Call it only when [`available`]; hooks and workers exist only then.
#[inline]
pub fn shared() -> &'static Shared {
    // SAFETY: see `available`; the memory lives as long as the process, and holds only atomics.
    unsafe { &*SHARED }
}

/// Asks for the memory. Called by shmem_request_hook.
pub fn request() {
    // SAFETY: called from shmem_request_hook, as PostgreSQL demands.
    unsafe { pg_sys::RequestAddinShmemSpace(size_of::<Shared>()) }
}

/// Attaches; true if the memory is new and must be filled. Called by shmem_startup_hook.
pub fn attach() -> bool {
    let mut found = false;
    // SAFETY: called from shmem_startup_hook; all-zero bytes are a valid `Shared`.
    unsafe {
        let p = pg_sys::ShmemInitStruct(c"pg_warden".as_ptr(), size_of::<Shared>(), &mut found);
        SHARED = p.cast();
        if !found {
            std::ptr::write_bytes(SHARED, 0, 1);
        }
    }
    !found
}

impl Shared {
    /// The slot of a governed database.
    #[inline]
    pub fn slot(&self, database: pg_sys::Oid) -> Option<&Slot> {
        let database = database.to_u32();
        self.slots
            .iter()
            .find(|s| s.database.load(Ordering::Acquire) == database)
    }

    /// The slot of the governed database with this name.
    pub fn slot_named(&self, name: &str) -> Option<&Slot> {
        self.slots.iter().find(|s| {
            !name.is_empty()
                && s.database.load(Ordering::Acquire) != 0
                && s.name.get() == name.as_bytes()
        })
    }

    /// Makes a database governed. `false` if there are too many.
    pub fn govern(&self, database: pg_sys::Oid) -> bool {
        if let Some(slot) = self.slot(database) {
            slot.state
                .store(SlotState::Governed as u32, Ordering::Release);
            return true;
        }
        let oldest = self.oldest.load(Ordering::Acquire);
        for slot in &self.slots {
            if slot.database.load(Ordering::Acquire) != 0 {
                continue;
            }
            // The position first: the slot must not count with a stale one when it appears.
            slot.consumed.store(oldest, Ordering::Release);
            slot.unrecorded.store(0, Ordering::Release);
            slot.not_durable.store(0, Ordering::Release);
            let free = slot.database.compare_exchange(
                0,
                database.to_u32(),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            if free.is_ok() {
                slot.state
                    .store(SlotState::Governed as u32, Ordering::Release);
                self.generation.fetch_add(1, Ordering::AcqRel);
                return true;
            }
        }
        false
    }

    /// Makes every backend record its session and its statements' shapes again: a ledger lacks some.
    pub fn resend(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Forgets a database.
    pub fn release(&self, slot: &Slot) {
        slot.state
            .store(SlotState::Governed as u32, Ordering::Release);
        slot.paused_by.store(0, Ordering::Release);
        slot.name.set(b"");
        slot.database.store(0, Ordering::Release);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.recompute_consumed();
    }

    /// Sets [`Self::consumed`] to the lowest position that any recorder still needs.
    pub fn recompute_consumed(&self) {
        let lowest = self
            .slots
            .iter()
            .filter(|s| s.database.load(Ordering::Acquire) != 0)
            .map(|s| s.consumed.load(Ordering::Acquire))
            .min()
            .unwrap_or_else(|| self.tail.load(Ordering::Acquire));
        self.consumed.fetch_max(lowest, Ordering::AcqRel);
    }

    /// Both halves of the key for hashes that a client must not be able to steer.
    pub fn hash_key(&self) -> (u64, u64) {
        (
            self.secret[1].load(Ordering::Relaxed),
            self.secret[2].load(Ordering::Relaxed),
        )
    }
}
