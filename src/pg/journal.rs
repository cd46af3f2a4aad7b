//! The journal: what backends append and recorders read.
//!
//! A sequence of positions (u64), cut into segment files of 16 MiB that are preallocated and mapped.
//! Owns the directory `warden.journal_directory`: `control` (the cluster's identity and the
//! journal's secrets), `databases` (the governed databases), `recovery` ([`origin`]) and
//! `<number>.seg`.
//!
//! Append is one atomic reservation, a copy, and a release-store of the frame's first word. A frame
//! never crosses a segment; what is left of one is a pad frame, or nothing if it is too short for a
//! header. Segments are removed once every recorder is past them.
//!
//! Never waits and never raises an ERROR: the caller decides what a full journal means.

use crate::pg::local::Local;
use crate::pg::origin;
use crate::pg::shared::{Shared, available, shared};
use crate::settings;
use memmap2::{Mmap, MmapMut, MmapOptions};
use pgrx::pg_sys;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use warden_core::frame::{self, FrameKind, HEADER, Header, MAX_PAYLOAD};

/// Bytes of a segment.
pub const SEGMENT: u64 = 16 << 20;
/// Kept free for outcomes and gaps, so that what has begun can be recorded to its end.
const RESERVE: u64 = 16 << 20;
const CONTROL_MAGIC: &[u8; 8] = b"PGWARDJ1";
const CONTROL_SIZE: usize = 44;

/// The journal has no room, or its directory cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// The segments that this process writes to, newest first.
static WRITING: Local<[Option<(u64, MmapMut)>; 2]> = Local::new([None, None]);

/// The position after the last frame that this process has appended.
static APPENDED: Local<u64> = Local::new(0);

/// The position after the last frame that this process has appended.
pub fn appended() -> u64 {
    APPENDED.get()
}

/// Appends a frame and returns its position. With `reserve`, it may use the room that is kept for
/// outcomes and gaps.
pub fn append(kind: FrameKind, dest: u32, payload: &[u8], reserve: bool) -> Result<u64, Full> {
    debug_assert!(payload.len() <= MAX_PAYLOAD);
    let sh = shared();
    if sh.broken.load(Ordering::Relaxed) != 0 || payload.len() > MAX_PAYLOAD {
        return Err(Full);
    }
    let size = frame::frame_size(payload.len()) as u64;
    let room = settings::journal_size() - if reserve { 0 } else { RESERVE };
    loop {
        let tail = sh.tail.load(Ordering::Acquire);
        let left = SEGMENT - tail % SEGMENT;
        let start = if size <= left { tail } else { tail + left };
        if start + size > sh.consumed.load(Ordering::Relaxed) + room {
            return Err(Full);
        }
        // Map before reserving: a reservation that cannot be filled would stop the recorders.
        let page = map_for_writing(start / SEGMENT)?;
        let old = if start == tail {
            page
        } else {
            map_for_writing(tail / SEGMENT)?
        };
        let reserved =
            sh.tail
                .compare_exchange_weak(tail, start + size, Ordering::AcqRel, Ordering::Relaxed);
        if reserved.is_err() {
            continue;
        }
        // SAFETY: reads a variable of this process.
        let pid = unsafe { pg_sys::MyProcPid } as u32;
        if start != tail && left >= HEADER as u64 {
            pad(sh, old, tail, left, pid);
        }
        let header = Header::new(start, kind, dest, pid, payload);
        publish(sh, page, start, &header, payload);
        APPENDED.set(start + size);
        return Ok(start);
    }
}

/// Nanoseconds that an append takes here and now, of as many frames as an outcome's as there is room
/// for, at most `frames`. They belong to no ledger.
pub fn append_cost(frames: u32) -> f64 {
    let payload = [0u8; frame::Outcome::FIXED];
    let start = Instant::now();
    let done = (0..frames)
        .take_while(|_| append(FrameKind::Outcome, 0, &payload, false).is_ok())
        .count();
    start.elapsed().as_nanos() as f64 / done.max(1) as f64
}

/// Moves the journal's end to the next segment, and returns its start: no frame is written any more
/// to the segment before it.
pub fn close_segment() -> Result<u64, Full> {
    let sh = shared();
    loop {
        let tail = sh.tail.load(Ordering::Acquire);
        let left = SEGMENT - tail % SEGMENT;
        if left == SEGMENT {
            return Ok(tail);
        }
        let page = map_for_writing(tail / SEGMENT)?;
        let start = tail + left;
        let reserved =
            sh.tail
                .compare_exchange_weak(tail, start, Ordering::AcqRel, Ordering::Relaxed);
        if reserved.is_err() {
            continue;
        }
        if left >= HEADER as u64 {
            // SAFETY: reads a variable of this process.
            let pid = unsafe { pg_sys::MyProcPid } as u32;
            pad(sh, page, tail, left, pid);
        }
        return Ok(start);
    }
}

/// Fills what is left of a segment.
fn pad(sh: &Shared, segment: *mut u8, pos: u64, left: u64, pid: u32) {
    let header = Header {
        len: left as u32 - HEADER as u32,
        ..Header::new(pos, FrameKind::Pad, 0, pid, &[])
    };
    publish(sh, segment, pos, &header, &[]);
}

/// Writes a reserved frame; its first word last.
fn publish(sh: &Shared, segment: *mut u8, pos: u64, header: &Header, payload: &[u8]) {
    let at = (pos % SEGMENT) as usize;
    let head = header.encode();
    let word = pos ^ sh.secret[0].load(Ordering::Relaxed);
    // SAFETY: the reservation makes these bytes ours; they lie in the mapped segment, and `pos` is a
    // multiple of eight, so the word is aligned.
    unsafe {
        let p = segment.add(at);
        std::ptr::copy_nonoverlapping(head.as_ptr(), p.add(8), head.len());
        std::ptr::copy_nonoverlapping(payload.as_ptr(), p.add(HEADER), payload.len());
        AtomicU64::from_ptr(p.cast()).store(word, Ordering::Release);
    }
}

fn map_for_writing(segment: u64) -> Result<*mut u8, Full> {
    WRITING.with(|maps| {
        if let Some((_, map)) = maps.iter_mut().flatten().find(|(s, _)| *s == segment) {
            return Ok(map.as_mut_ptr());
        }
        let file = create_segment(segment).map_err(|_| Full)?;
        // SAFETY: the file is preallocated, so no store raises SIGBUS, and it is never truncated.
        let mut map =
            unsafe { MmapOptions::new().len(SEGMENT as usize).map_mut(&file) }.map_err(|_| Full)?;
        let p = map.as_mut_ptr();
        maps.swap(0, 1);
        maps[0] = Some((segment, map));
        Ok(p)
    })
}

/// The journal's directory.
pub fn directory() -> PathBuf {
    PathBuf::from(settings::journal_directory())
}

/// The file of a segment.
pub fn segment_path(segment: u64) -> PathBuf {
    directory().join(format!("{segment:016x}.seg"))
}

/// Opens a segment, and creates and preallocates it if need be. Idempotent, and safe when several
/// processes do it at once.
fn create_segment(segment: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(segment_path(segment))?;
    // SAFETY: a valid file descriptor.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, SEGMENT as i64) } {
        0 => Ok(file),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

/// Creates the segments that will be needed next. Called by the launcher, so that backends do not
/// have to.
pub fn prepare_segments() {
    let next = shared().tail.load(Ordering::Acquire) / SEGMENT;
    for segment in next..next + 2 {
        if let Err(e) = create_segment(segment) {
            pgrx::warning!("pg_warden: could not create journal segment {segment}: {e}");
            return;
        }
    }
}

/// Removes the segments that no recorder needs.
pub fn remove_segments() {
    let sh = shared();
    let first = sh.consumed.load(Ordering::Acquire) / SEGMENT;
    sh.oldest.fetch_max(first * SEGMENT, Ordering::AcqRel);
    for segment in segments(&directory()) {
        if segment < first {
            let _ = fs::remove_file(segment_path(segment));
        }
    }
}

/// The numbers of the segment files, ascending.
fn segments(dir: &Path) -> Vec<u64> {
    let mut found: Vec<u64> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let name = e.file_name();
            u64::from_str_radix(name.to_str()?.strip_suffix(".seg")?, 16).ok()
        })
        .filter(|s| *s > 0 && *s < u64::MAX / SEGMENT)
        .collect();
    found.sort_unstable();
    found
}

/// Lowest position that is still kept.
pub fn oldest() -> u64 {
    shared().oldest.load(Ordering::Acquire)
}

/// Where the next frame goes.
pub fn tail() -> u64 {
    shared().tail.load(Ordering::Acquire)
}

/// How the journal does: positions, and counts since the server started.
#[derive(Debug, Clone, Copy)]
pub struct Status {
    pub written: u64,
    pub consumed: u64,
    pub flushed: u64,
    pub size: u64,
    pub syncs: u64,
    pub waits: u64,
    pub failures: u64,
    pub failing: bool,
}

/// How the journal does; `None` if the library was not preloaded.
pub fn status() -> Option<Status> {
    if !available() {
        return None;
    }
    let sh = shared();
    // The end last: it must not lie before the others.
    Some(Status {
        consumed: sh.consumed.load(Ordering::Acquire),
        flushed: sh.flush.flushed.load(Ordering::Acquire),
        size: settings::journal_size(),
        syncs: sh.flush.syncs.load(Ordering::Relaxed),
        waits: sh.flush.waits.load(Ordering::Relaxed),
        failures: sh.flush.failures.load(Ordering::Relaxed),
        failing: sh.flush.failing(),
        written: sh.tail.load(Ordering::Acquire),
    })
}

/// What a [`Cursor`] finds.
#[derive(Debug)]
pub enum Next<'a> {
    /// A frame.
    Frame {
        pos: u64,
        header: Header,
        payload: &'a [u8],
    },
    /// These positions hold no readable frame, though there should be some.
    Damaged { from: u64, to: u64 },
    /// Nothing more for now.
    End,
}

/// Reads frames in order.
pub struct Cursor {
    pos: u64,
    map: Option<(u64, Mmap)>,
    payload: Vec<u8>,
}

enum Look {
    Frame(Header),
    /// No frame has been published here.
    Empty,
    /// A frame was published here, but it is not what was written.
    Bad,
    NoSegment,
}

impl Cursor {
    /// Starts at a position.
    pub fn open(pos: u64) -> Self {
        Self {
            pos: pos.max(oldest()),
            map: None,
            payload: Vec::new(),
        }
    }

    /// The position after the last frame returned.
    pub fn position(&self) -> u64 {
        self.pos
    }

    /// The next frame.
    pub fn next(&mut self) -> Next<'_> {
        let sh = shared();
        loop {
            let tail = sh.tail.load(Ordering::Acquire);
            if self.pos >= tail {
                return Next::End;
            }
            let left = SEGMENT - self.pos % SEGMENT;
            if left < HEADER as u64 {
                self.pos += left;
                continue;
            }
            let recovered = sh.recovered.load(Ordering::Acquire);
            match self.look(sh, self.pos) {
                Look::Frame(header) => {
                    let pos = self.pos;
                    self.pos += frame::frame_size(header.len as usize) as u64;
                    if header.kind == FrameKind::Pad as u8 {
                        continue;
                    }
                    return Next::Frame {
                        pos,
                        header,
                        payload: &self.payload,
                    };
                }
                // Its writer is about to publish it: nobody can die here without the postmaster
                // starting all processes, and this journal, anew.
                Look::Empty if self.pos >= recovered => return Next::End,
                Look::Empty | Look::Bad | Look::NoSegment => {
                    let from = self.pos;
                    let until = if from < recovered { recovered } else { tail };
                    let to = self.resync(sh, from + 8, until);
                    self.pos = to;
                    return Next::Damaged { from, to };
                }
            }
        }
    }

    /// The first position from `pos` that holds a good frame, or `until`.
    fn resync(&mut self, sh: &Shared, mut pos: u64, until: u64) -> u64 {
        while pos < until {
            match self.look(sh, pos) {
                Look::Frame(_) => return pos,
                Look::NoSegment => pos = (pos / SEGMENT + 1) * SEGMENT,
                Look::Empty | Look::Bad => pos += 8,
            }
        }
        until
    }

    /// Looks at one position; a frame's payload is left in `self.payload`.
    fn look(&mut self, sh: &Shared, pos: u64) -> Look {
        let segment = pos / SEGMENT;
        if self.map.as_ref().is_none_or(|(s, _)| *s != segment) {
            self.map = map_for_reading(segment).map(|m| (segment, m));
        }
        let Some((_, map)) = &self.map else {
            return Look::NoSegment;
        };
        let at = (pos % SEGMENT) as usize;
        if at + HEADER > map.len() {
            return Look::Empty;
        }
        // SAFETY: in the mapped segment, aligned; written with release order by `publish`.
        let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add(at).cast_mut().cast()) }
            .load(Ordering::Acquire);
        if word != pos ^ sh.secret[0].load(Ordering::Relaxed) {
            return Look::Empty;
        }
        let Some(header) = map[at + 8..at + HEADER]
            .try_into()
            .ok()
            .map(|h| Header::decode(&h))
        else {
            return Look::Bad;
        };
        if header.kind == FrameKind::Pad as u8 {
            let fits = at + HEADER + header.len as usize == map.len();
            return if fits && header.matches(pos, &[]) {
                Look::Frame(header)
            } else {
                Look::Bad
            };
        }
        let Some(payload) = map.get(at + HEADER..at + HEADER + header.len as usize) else {
            return Look::Bad;
        };
        if header.version != frame::VERSION || !header.matches(pos, payload) {
            return Look::Bad;
        }
        self.payload.clear();
        self.payload.extend_from_slice(payload);
        Look::Frame(header)
    }
}

/// The segment that this process has looked at last.
static LOOKING: Local<Option<(u64, Mmap)>> = Local::new(None);

/// The bytes of the frame at a position, if it has been written.
pub fn size_at(pos: u64) -> Option<u64> {
    let segment = pos / SEGMENT;
    let secret = shared().secret[0].load(Ordering::Relaxed);
    LOOKING.with(|looking| {
        if looking.as_ref().is_none_or(|(s, _)| *s != segment) {
            *looking = map_for_reading(segment).map(|m| (segment, m));
        }
        let (_, map) = looking.as_ref()?;
        let at = (pos % SEGMENT) as usize;
        // SAFETY: in the mapped segment, aligned; written with release order by `publish`.
        let word = unsafe { AtomicU64::from_ptr(map.as_ptr().add(at).cast_mut().cast()) }
            .load(Ordering::Acquire);
        let len = frame::u32le(map, at + 8)? as usize;
        (word == pos ^ secret).then(|| frame::frame_size(len) as u64)
    })
}

fn map_for_reading(segment: u64) -> Option<Mmap> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(segment_path(segment))
        .ok()?;
    if file.metadata().ok()?.len() < SEGMENT {
        // Cut short: reading past the end would raise SIGBUS, so give back what was cut.
        create_segment(segment).ok()?;
    }
    // SAFETY: the file has its full length and is never truncated; what is read was published.
    unsafe { MmapOptions::new().len(SEGMENT as usize).map(&file) }.ok()
}

/// Opens the journal when the server starts, or starts again after a crash: finds its end, and
/// appends a boot frame if anything is recorded. Called by the postmaster.
pub fn startup() {
    let sh = shared();
    if let Err(e) = open_directory(sh) {
        sh.broken.store(1, Ordering::Release);
        pgrx::warning!(
            "pg_warden: the journal in \"{}\" cannot be used: {e}",
            settings::journal_directory()
        );
        return;
    }
    origin::note_start(tail());
    for (database, name) in read_databases() {
        let database = pg_sys::Oid::from(database);
        sh.govern(database);
        if let Some(slot) = sh.slot(database) {
            slot.name.set(name.as_bytes());
        }
    }
    let governed = sh
        .slots
        .iter()
        .any(|s| s.database.load(Ordering::Relaxed) != 0);
    if governed {
        // SAFETY: reads the clock.
        let now = unsafe { pg_sys::GetCurrentTimestamp() };
        // A full journal has no room for it, and then no statement ran since the last one either.
        let _ = append(FrameKind::Boot, 0, &now.to_le_bytes(), true);
    }
}

fn open_directory(sh: &Shared) -> io::Result<()> {
    let dir = directory();
    if !dir.is_dir() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)?;
    }
    // SAFETY: the control file of the cluster has been read before shared memory is set up.
    let system = unsafe { pg_sys::GetSystemIdentifier() };
    let secret = match read_control(&dir, system) {
        Some(secret) => secret,
        None => {
            set_aside(&dir)?;
            write_control(&dir, system)?
        }
    };
    for (mine, s) in sh.secret.iter().zip(secret) {
        mine.store(s, Ordering::Release);
    }
    let (mut oldest, mut end) = (u64::MAX, SEGMENT);
    for segment in segments(&dir) {
        if let Some((first, last)) = frames_of(segment, secret[0]) {
            oldest = oldest.min(first);
            end = end.max(last);
        }
    }
    let oldest = oldest.min(end);
    sh.tail.store(end, Ordering::Release);
    sh.recovered.store(end, Ordering::Release);
    sh.flush.open(end);
    sh.oldest.store(oldest, Ordering::Release);
    sh.consumed.store(oldest, Ordering::Release);
    Ok(())
}

/// First and end position of the frames of a segment. Payloads are not read: the recorder does.
fn frames_of(segment: u64, secret: u64) -> Option<(u64, u64)> {
    let map = map_for_reading(segment)?;
    let (mut first, mut end) = (None, 0);
    let mut at = 0;
    while at + HEADER <= map.len() {
        let pos = segment * SEGMENT + at as u64;
        let word = frame::u64le(&map, at)? ^ secret;
        let len = frame::u32le(&map, at + 8)? as usize;
        if word != pos || at + HEADER + len > map.len() {
            at += 8;
            continue;
        }
        first.get_or_insert(pos);
        at += frame::frame_size(len);
        end = segment * SEGMENT + at as u64;
    }
    first.map(|f| (f, end))
}

fn read_control(dir: &Path, system: u64) -> Option<[u64; 3]> {
    let mut b = Vec::new();
    File::open(dir.join("control"))
        .ok()?
        .take(1024)
        .read_to_end(&mut b)
        .ok()?;
    let good = b.len() == CONTROL_SIZE
        && b.starts_with(CONTROL_MAGIC)
        && frame::u64le(&b, 8)? == system
        && frame::u32le(&b, 40)? == crc32c::crc32c(&b[..40]);
    good.then(|| {
        [16, 24, 32].map(|at| frame::u64le(&b, at).expect("the length of the file was checked"))
    })
}

fn write_control(dir: &Path, system: u64) -> io::Result<[u64; 3]> {
    let mut random = [0u8; 24];
    // SAFETY: fills the buffer with its own length.
    if !unsafe { pg_sys::pg_strong_random(random.as_mut_ptr().cast(), random.len()) } {
        return Err(io::Error::other("no random numbers"));
    }
    let mut b = Vec::with_capacity(CONTROL_SIZE);
    b.extend_from_slice(CONTROL_MAGIC);
    b.extend_from_slice(&system.to_le_bytes());
    b.extend_from_slice(&random);
    b.extend_from_slice(&crc32c::crc32c(&b).to_le_bytes());
    write_durably(&dir.join("control"), &b)?;
    Ok([0, 8, 16].map(|at| frame::u64le(&random, at).expect("24 bytes")))
}

/// Moves a journal that is not ours, or that cannot be read, out of the way.
fn set_aside(dir: &Path) -> io::Result<()> {
    let found = segments(dir);
    if found.is_empty() && !dir.join("control").exists() {
        return Ok(());
    }
    // SAFETY: reads the clock.
    let aside = dir.join(format!("aside-{}", unsafe {
        pg_sys::GetCurrentTimestamp()
    }));
    fs::create_dir(&aside)?;
    let names = found
        .iter()
        .map(|s| format!("{s:016x}.seg"))
        .chain(["control", "databases", "recovery"].map(String::from));
    for name in names {
        let _ = fs::rename(dir.join(&name), aside.join(&name));
    }
    pgrx::warning!(
        "pg_warden: the journal belongs to another cluster or its control file is damaged; \
         moved to \"{}\"",
        aside.display()
    );
    Ok(())
}

/// Replaces a file, and has it on disk.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_durably_with(path, bytes, File::sync_all)
}

/// Replaces a file by one that is on disk before it has the name.
pub fn write_durably_with(
    path: &Path,
    bytes: &[u8],
    sync: impl FnOnce(&File) -> io::Result<()>,
) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut f = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)?;
    f.write_all(bytes)?;
    sync(&f)?;
    fs::rename(&temporary, path)?;
    if let Some(dir) = path.parent() {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

/// A line holds an OID and, after a blank, a name.
fn read_databases() -> Vec<(u32, String)> {
    fs::read_to_string(directory().join("databases"))
        .unwrap_or_default()
        .lines()
        .filter_map(|l| {
            let (oid, name) = l.split_once(' ').unwrap_or((l.trim(), ""));
            Some((oid.parse().ok()?, name.to_owned()))
        })
        .collect()
}

/// Remembers the governed databases, so that their statements are recorded from the first one after
/// a restart.
pub fn write_databases(databases: &[(u32, &str)]) {
    let mut text = String::new();
    for (oid, name) in databases {
        // A name with a line break stays unknown until the launcher has read the catalog.
        let name = if name.contains(['\n', '\r']) {
            ""
        } else {
            name
        };
        text.push_str(&format!("{oid} {name}\n"));
    }
    if let Err(e) = write_durably(&directory().join("databases"), text.as_bytes()) {
        pgrx::warning!("pg_warden: could not write the list of governed databases: {e}");
    }
}
