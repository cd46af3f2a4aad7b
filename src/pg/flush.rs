//! Making the journal durable: one process syncs for all who wait.
//!
//! Owns the position up to which the journal is on disk. A process that needs a later one becomes
//! the leader, or sleeps until the leader is through; the leader syncs everything that has been
//! written by then. Never raises an ERROR: the caller decides what a failure means.
//!
//! After a failed sync the kernel may take the lost pages for clean, and a second sync would succeed
//! and mean nothing. So a segment whose sync failed is closed and never synced again: it is copied
//! to a new file, that one is synced and takes the old one's name. Until that has succeeded, no
//! position in the segment, and none after it, counts as durable.

use crate::pg::journal::{self, SEGMENT};
use crate::pg::local::Local;
use crate::pg::shared::{Shared, shared};
use pgrx::pg_sys;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use warden_core::frame::HEADER;

/// Microseconds after a failure in which no other sync is tried.
const RETRY_PAUSE: u64 = 1_000_000;
/// How long a leader waits for frames that others are writing.
const WRITER_PATIENCE: u64 = 5_000_000;

/// The journal could not be synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotDurable;

/// What processes share about syncing. Positions move under the lock only, and forwards only.
#[repr(C)]
pub struct Flush {
    /// Everything before this position is on disk.
    pub flushed: AtomicU64,
    /// A sync of a segment before this position has failed; see the module.
    suspect: AtomicU64,
    /// Segments below this number are on disk by name.
    named: AtomicU64,
    /// No sync before this moment; 0 unless the last one failed. Microseconds of the monotonic clock.
    retry_at: AtomicU64,
    /// Calls of fdatasync for segments.
    pub syncs: AtomicU64,
    /// Times that a process needed what was not on disk yet.
    pub waits: AtomicU64,
    /// Syncs that failed.
    pub failures: AtomicU64,
}

impl Flush {
    /// The journal has been opened, and ends at `end`.
    pub fn open(&self, end: u64) {
        self.flushed.store(end, Ordering::Release);
    }

    /// Whether the last sync failed.
    pub fn failing(&self) -> bool {
        self.retry_at.load(Ordering::Relaxed) != 0
    }
}

/// The segment that this process has synced last.
static SYNCING: Local<Option<(u64, File)>> = Local::new(None);

static mut LOCK: *mut pg_sys::LWLock = std::ptr::null_mut();
const TRANCHE: &std::ffi::CStr = c"pg_warden_flush";

/// Asks for the lock. Called by shmem_request_hook.
pub fn request() {
    // SAFETY: called from shmem_request_hook, as PostgreSQL demands.
    unsafe { pg_sys::RequestNamedLWLockTranche(TRANCHE.as_ptr(), 1) }
}

/// Finds the lock. Called by shmem_startup_hook.
pub fn attach() {
    // SAFETY: called from shmem_startup_hook; the lock lives as long as the process.
    unsafe { LOCK = &raw mut (*pg_sys::GetNamedLWLockTranche(TRANCHE.as_ptr())).lock }
}

/// Returns when everything before `pos` is on disk. Without any call to the kernel, if it is.
pub fn wait(pos: u64) -> Result<(), NotDurable> {
    let sh = shared();
    if sh.flush.flushed.load(Ordering::Acquire) >= pos {
        return Ok(());
    }
    sh.flush.waits.fetch_add(1, Ordering::Relaxed);
    while sh.flush.flushed.load(Ordering::Acquire) < pos {
        // SAFETY: the lock is ours; nothing between acquiring and releasing it raises an error.
        let led = unsafe {
            pg_sys::LWLockAcquireOrWait(LOCK, pg_sys::LWLockMode::LW_EXCLUSIVE).then(|| {
                let led = lead(sh, pos);
                pg_sys::LWLockRelease(LOCK);
                led
            })
        };
        match led {
            // The leader is through: what it has synced may be enough.
            None | Some(Led::Synced) => {}
            Some(Led::Recovered) => pgrx::log!("pg_warden: the journal can be synced again"),
            Some(Led::Paused) => return Err(NotDurable),
            Some(Led::Failed { error, first }) => {
                if first {
                    pgrx::warning!("pg_warden: could not sync the journal: {error}");
                }
                return Err(NotDurable);
            }
        }
    }
    Ok(())
}

/// What a leader has achieved.
enum Led {
    Synced,
    /// As `Synced`, after failures.
    Recovered,
    Failed {
        error: io::Error,
        first: bool,
    },
    /// The last sync failed a moment ago.
    Paused,
}

/// Syncs up to `pos`, and what others have written after it. The caller holds the lock.
fn lead(sh: &Shared, pos: u64) -> Led {
    let f = &sh.flush;
    let retry_at = f.retry_at.load(Ordering::Relaxed);
    if f.flushed.load(Ordering::Relaxed) >= pos {
        return Led::Synced;
    }
    if retry_at > monotonic() {
        return Led::Paused;
    }
    let Err(error) = sync_until(sh, pos) else {
        f.retry_at.store(0, Ordering::Relaxed);
        return if retry_at == 0 {
            Led::Synced
        } else {
            Led::Recovered
        };
    };
    f.failures.fetch_add(1, Ordering::Relaxed);
    f.retry_at
        .store(monotonic() + RETRY_PAUSE, Ordering::Relaxed);
    if f.flushed.load(Ordering::Relaxed) >= f.suspect.load(Ordering::Relaxed) {
        match journal::close_segment() {
            Ok(start) => f.suspect.store(start, Ordering::Release),
            // Its frames could never be trusted to be on disk: write no more of them.
            Err(journal::Full) => sh.broken.store(1, Ordering::Release),
        }
    }
    Led::Failed {
        error,
        first: retry_at == 0,
    }
}

fn sync_until(sh: &Shared, pos: u64) -> io::Result<()> {
    let f = &sh.flush;
    let suspect = f.suspect.load(Ordering::Relaxed);
    // What is not kept any more is in the ledgers.
    let mut from = f.flushed.load(Ordering::Relaxed).max(journal::oldest());
    let until = written(sh, from, pos.max(suspect))?;
    while from < until {
        let segment = from / SEGMENT;
        let end = until.min((segment + 1) * SEGMENT);
        let synced = if from < suspect {
            copy(sh, segment)
        } else {
            sync(sh, segment)
        };
        match synced {
            Err(e) if e.kind() == io::ErrorKind::NotFound && end <= journal::oldest() => {}
            other => other?,
        }
        f.flushed.store(end, Ordering::Release);
        from = end;
    }
    Ok(())
}

/// The end of what has been written without holes from `from` on; waits for writers before `need`.
/// A frame that was reserved and not yet written would be synced as nothing.
fn written(sh: &Shared, mut from: u64, need: u64) -> io::Result<u64> {
    let tail = sh.tail.load(Ordering::Acquire);
    let mut deadline = None;
    while from < tail {
        let left = SEGMENT - from % SEGMENT;
        if left < HEADER as u64 {
            from += left;
            continue;
        }
        if let Some(size) = journal::size_at(from) {
            from += size;
            continue;
        }
        if from < journal::oldest() {
            from = journal::oldest();
            continue;
        }
        if from >= need {
            break;
        }
        let now = monotonic();
        if now > *deadline.get_or_insert(now + WRITER_PATIENCE) {
            return Err(io::Error::other("a process does not finish its frame"));
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(from)
}

fn sync(sh: &Shared, segment: u64) -> io::Result<()> {
    SYNCING.with(|syncing| {
        let file = match syncing {
            Some((s, file)) if *s == segment => file,
            other => {
                let file = File::open(journal::segment_path(segment))?;
                &other.insert((segment, file)).1
            }
        };
        fdatasync(sh, file)
    })?;
    if sh.flush.named.load(Ordering::Relaxed) <= segment {
        File::open(journal::directory())?.sync_all()?;
        sh.flush.named.store(segment + 1, Ordering::Relaxed);
    }
    Ok(())
}

/// Writes a segment whose sync failed to a new file. Nobody writes to it any more: it is closed, and
/// what was reserved in it has been written.
fn copy(sh: &Shared, segment: u64) -> io::Result<()> {
    let path = journal::segment_path(segment);
    let bytes = fs::read(&path)?;
    journal::write_durably_with(&path, &bytes, |file| fdatasync(sh, file))
}

fn fdatasync(sh: &Shared, file: &File) -> io::Result<()> {
    sh.flush.syncs.fetch_add(1, Ordering::Relaxed);
    // SAFETY: a valid file descriptor.
    match unsafe { libc::fdatasync(file.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Microseconds of a clock that nobody sets.
fn monotonic() -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000 + t.tv_nsec as u64 / 1000
}
