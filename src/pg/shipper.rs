//! The shipper: one background worker of a governed database, which carries the ledger to its sinks.
//!
//! Owns: the sinks' cursors (`warden.sink_cursor`) and the runtime in which requests run. Reads
//! `warden.sink` and `warden.event` in short transactions; sends with none open. A cursor moves when
//! its sink has acknowledged, never before: every event arrives at least once.
//!
//! One thread. The runtime runs only while this module waits in [`Shipper::drive`], and its tasks
//! never call PostgreSQL, so an ERROR or FATAL is raised only where it may be. Each sink has at most
//! one batch under way; none waits for another.
//!
//! The transaction that takes a batch also writes the cursor's row, and commits synchronously: the
//! flush covers all that it has seen. So nothing is sent that a crash could take back, and a `seq`
//! never arrives with two different contents.

use crate::pg::ledger_table;
use crate::pg::shared::{self, shared};
use crate::pg::version;
use crate::pg::worker::{self, Role};
use crate::settings;
use crate::ship::http::Http;
use crate::ship::{Answer, file};
use pgrx::pg_sys;
use pgrx::spi::{Spi, SpiClient, SpiResult};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::task::{AbortHandle, Id, JoinSet};
use warden_core::event::{Event, EventKind, SessionFacts, ShapeFacts};
use warden_core::sink::{
    Batch, Budget, Context, Limits, Origin, RetryPolicy, SessionJson, StatementJson, Stored,
    Target, Verdict, render,
};

/// How often the ledger is looked at for new events.
const POLL: Duration = Duration::from_secs(1);
/// How often, while there is no sink.
const IDLE: Duration = Duration::from_secs(60);
/// How often signals are obeyed while requests are under way.
const TICK: Duration = Duration::from_millis(50);
/// Bytes of facts that are kept for the next batches.
const CACHED_BYTES: usize = 16 << 20;

/// A sink, as configured, with its cursor.
struct Sink {
    id: i64,
    url: String,
    enabled: bool,
    limits: Limits,
    delivered: i64,
    failures: u32,
    /// Not before this time has passed.
    wait: Duration,
    has_cursor: bool,
    /// It was dropped; only its cursor is left.
    dropped: bool,
}

/// What the worker remembers of a sink between transactions.
struct Runner {
    budget: Budget,
    flight: Option<Flight>,
}

/// A batch under way, or one whose answer has not been recorded yet.
struct Flight {
    /// The cursor when it was taken.
    after: i64,
    failures: u32,
    limits: Limits,
    batch: Batch,
    state: State,
}

enum State {
    Sending(AbortHandle),
    Answered(Answer),
}

/// A batch that has been taken, to be sent when the transaction has ended.
struct Taken {
    sink: i64,
    url: String,
    batch: Batch,
}

/// What one look at the ledger led to.
enum Round {
    /// The extension is not, or no longer, in the database.
    Gone,
    /// There is no sink.
    NoSinks,
    /// Look again after this time, or when an answer arrives.
    Look(Duration),
}

#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn pg_warden_shipper_main(arg: pg_sys::Datum) {
    let database = pg_sys::Oid::from(arg.value() as u32);
    worker::attach(database, Role::Shipper);
    configure();
    let mut shipper = match Shipper::new(database) {
        Ok(shipper) => shipper,
        Err(e) => pgrx::error!("pg_warden: the shipper cannot start: {e}"),
    };
    loop {
        worker::obey();
        match shipper.round() {
            Round::Gone => break,
            Round::NoSinks => worker::wait(IDLE.as_millis() as i64),
            Round::Look(time) => shipper.wait(time),
        }
    }
    worker::extension_is_gone(database);
}

/// Settings that the shipper's transactions rely on, whatever the database's are.
fn configure() {
    let mut settings = vec![
        (c"search_path", c"pg_catalog, pg_temp"),
        // See the module's documentation. A standby that does not answer must not stop delivery.
        (c"synchronous_commit", c"local"),
        (c"default_transaction_isolation", c"read committed"),
        (c"default_transaction_read_only", c"off"),
        (c"lock_timeout", c"0"),
        (c"idle_in_transaction_session_timeout", c"0"),
        (c"row_security", c"off"),
        (c"bytea_output", c"hex"),
    ];
    if cfg!(any(feature = "pg17", feature = "pg18")) {
        settings.push((c"transaction_timeout", c"0"));
    }
    for (name, value) in settings {
        // SAFETY: outside of a transaction, with NUL-terminated strings; the names exist.
        unsafe {
            pg_sys::SetConfigOption(
                name.as_ptr(),
                value.as_ptr(),
                pg_sys::GucContext::PGC_SUSET,
                pg_sys::GucSource::PGC_S_SESSION,
            );
        }
    }
}

struct Shipper {
    /// OID of the extension; another one means another ledger.
    extension: pg_sys::Oid,
    origin: Origin,
    policy: RetryPolicy,
    runtime: Runtime,
    http: Option<Http>,
    requests: JoinSet<Answer>,
    runners: HashMap<i64, Runner>,
    facts: Facts,
}

impl Shipper {
    fn new(database: pg_sys::Oid) -> std::io::Result<Self> {
        Ok(Self {
            extension: pg_sys::InvalidOid,
            origin: Origin {
                // SAFETY: the control file was read when the server started.
                system: unsafe { pg_sys::GetSystemIdentifier() },
                database: database.to_u32(),
            },
            policy: RetryPolicy::default(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
            http: None,
            requests: JoinSet::new(),
            runners: HashMap::new(),
            facts: Facts::default(),
        })
    }

    /// Records answers, takes what is due, and starts to send it.
    fn round(&mut self) -> Round {
        let taken = worker::transaction(|| self.read_and_write());
        // SAFETY: outside of a transaction; without it autovacuum never hears of our updates.
        unsafe { pg_sys::pgstat_report_stat(false) };
        let (round, taken) = match taken {
            Ok(taken) => taken,
            Err(e) => pgrx::error!("pg_warden: the shipper cannot read its tables: {e}"),
        };
        let mut answered = false;
        for t in taken {
            answered |= self.send(t);
        }
        if answered {
            Round::Look(Duration::ZERO)
        } else {
            round
        }
    }

    fn read_and_write(&mut self) -> SpiResult<(Round, Vec<Taken>)> {
        let extension = lock_extension();
        if extension == pg_sys::InvalidOid {
            return Ok((Round::Gone, Vec::new()));
        }
        if extension != self.extension {
            version::require_same();
            self.extension = extension;
            self.requests.abort_all();
            self.runners.clear();
            self.facts.clear();
        }
        Spi::connect_mut(|spi| {
            self.record_answers(spi)?;
            let sinks = settle_cursors(spi, read_sinks(spi)?)?;
            self.forget_dropped(&sinks);
            if sinks.iter().all(|s| !s.enabled) && self.runners.values().all(|r| r.flight.is_none())
            {
                return Ok((Round::NoSinks, Vec::new()));
            }
            let head = last_seq(spi)?;
            let mut taken = Vec::new();
            let mut look = POLL;
            for sink in sinks.iter().filter(|s| s.enabled && s.delivered < head) {
                let runner = self.runners.entry(sink.id).or_insert_with(|| Runner {
                    budget: Budget::new(sink.limits),
                    flight: None,
                });
                if runner.flight.is_some() {
                    continue;
                }
                if !sink.wait.is_zero() {
                    look = look.min(sink.wait);
                    continue;
                }
                taken.extend(self.take(spi, sink)?);
            }
            Ok((Round::Look(look), taken))
        })
    }

    /// Moves cursors, or counts failures.
    fn record_answers(&mut self, spi: &mut SpiClient<'_>) -> SpiResult<()> {
        for (id, runner) in &mut self.runners {
            let Some(flight) = &runner.flight else {
                continue;
            };
            let State::Answered(answer) = &flight.state else {
                continue;
            };
            match answer.verdict {
                Verdict::Delivered => {
                    spi.update(
                        "UPDATE warden.sink_cursor SET delivered_seq = $2, sent = sent + $3, \
                         failures = 0, next_retry = NULL, last_success = clock_timestamp() \
                         WHERE sink = $1 AND delivered_seq = $4",
                        None,
                        &[
                            (*id).into(),
                            flight.batch.last_seq.into(),
                            (flight.batch.events as i64).into(),
                            flight.after.into(),
                        ],
                    )?;
                    runner.budget.delivered(flight.limits);
                }
                // Smaller batches at once; it is no failure of the receiver.
                Verdict::TooLarge if runner.budget.too_large(&flight.batch) => {}
                verdict => {
                    let failures = flight.failures.saturating_add(1);
                    let delay = self
                        .policy
                        .delay(verdict, failures, answer.retry_after, random());
                    spi.update(
                        "UPDATE warden.sink_cursor SET failed = failed + 1, \
                         failures = failures + 1, last_error = $2, \
                         last_failure = clock_timestamp(), \
                         next_retry = clock_timestamp() + $3 * interval '1 millisecond' \
                         WHERE sink = $1",
                        None,
                        &[
                            (*id).into(),
                            answer.error.as_str().into(),
                            (delay.as_millis() as f64).into(),
                        ],
                    )?;
                }
            }
            runner.flight = None;
        }
        Ok(())
    }

    /// Stops sending to sinks that are not there any more.
    fn forget_dropped(&mut self, sinks: &[Sink]) {
        self.runners.retain(|id, runner| {
            let keep = sinks.iter().any(|s| s.id == *id);
            if let (
                false,
                Some(Flight {
                    state: State::Sending(request),
                    ..
                }),
            ) = (keep, &runner.flight)
            {
                request.abort();
            }
            keep
        });
    }

    /// Takes the next batch of a sink, if there is one.
    fn take(&mut self, spi: &mut SpiClient<'_>, sink: &Sink) -> SpiResult<Option<Taken>> {
        let Some(runner) = self.runners.get_mut(&sink.id) else {
            return Ok(None);
        };
        let limits = runner.budget.limits(sink.limits);
        let events = ledger_table::events_after(sink.delivered, limits);
        self.facts.load(spi, &events)?;
        let mut batch = Batch::default();
        for e in &events {
            let line = render(&self.origin, e, self.facts.context(&e.event));
            if !batch.push(e.event.seq, &line, limits) {
                break;
            }
        }
        if batch.events == 0 {
            return Ok(None);
        }
        // Not only for the record: see the module's documentation.
        spi.update(
            "UPDATE warden.sink_cursor SET attempted_seq = $2 WHERE sink = $1",
            None,
            &[sink.id.into(), batch.last_seq.into()],
        )?;
        runner.flight = Some(Flight {
            after: sink.delivered,
            failures: sink.failures,
            limits: sink.limits,
            batch: batch.clone(),
            state: State::Answered(Answer::retry("it was not sent")),
        });
        Ok(Some(Taken {
            sink: sink.id,
            url: sink.url.clone(),
            batch,
        }))
    }

    /// Sends a batch, or starts to. Returns whether there is an answer already.
    fn send(&mut self, taken: Taken) -> bool {
        let state = match Target::parse(&taken.url) {
            Ok(Target::File(name)) => {
                let directory = settings::file_sink_directory();
                let written = file::append(Path::new(&directory), &name, &taken.batch.body);
                State::Answered(match written {
                    Ok(()) => Answer::delivered(),
                    Err(e) => Answer::retry(format!("cannot append to \"{name}\": {e}")),
                })
            }
            Ok(Target::Http(url)) => self.post(&url, &taken.batch),
            Err(e) => State::Answered(Answer {
                verdict: Verdict::Refused,
                retry_after: None,
                error: e.to_string(),
            }),
        };
        let answered = matches!(state, State::Answered(_));
        if let Some(flight) = self
            .runners
            .get_mut(&taken.sink)
            .and_then(|r| r.flight.as_mut())
        {
            flight.state = state;
        }
        answered
    }

    fn post(&mut self, url: &str, batch: &Batch) -> State {
        let _inside = self.runtime.enter();
        if self.http.is_none() {
            match Http::new() {
                Ok(http) => self.http = Some(http),
                Err(e) => return State::Answered(Answer::retry(format!("no HTTP client: {e}"))),
            }
        }
        let Some(http) = &self.http else {
            return State::Answered(Answer::retry("no HTTP client"));
        };
        let id = self.origin.batch_id(batch.first_seq, batch.last_seq);
        State::Sending(self.requests.spawn(http.post(url, &id, batch)))
    }

    /// Waits for an answer, a time or a signal.
    fn wait(&mut self, time: Duration) {
        if time.is_zero() {
            return;
        }
        if self.requests.is_empty() {
            worker::wait(time.as_millis().max(1) as i64);
        } else {
            self.drive(time);
        }
    }

    /// Lets requests go on, until one is answered or the time has passed.
    fn drive(&mut self, time: Duration) {
        let end = Instant::now() + time;
        loop {
            let requests = &mut self.requests;
            let next = self
                .runtime
                .block_on(async { tokio::time::timeout(TICK, requests.join_next_with_id()).await });
            match next {
                Ok(Some(Ok((id, answer)))) => self.answered(id, answer),
                // A panic is a bug, an abort a dropped sink; neither loses the batch.
                Ok(Some(Err(e))) => {
                    self.answered(e.id(), Answer::retry("the request was abandoned"));
                }
                Ok(None) => return,
                Err(_elapsed) => {
                    worker::obey();
                    if Instant::now() >= end {
                        return;
                    }
                    continue;
                }
            }
            return;
        }
    }

    fn answered(&mut self, id: Id, answer: Answer) {
        let flight = self
            .runners
            .values_mut()
            .filter_map(|r| r.flight.as_mut())
            .find(|f| matches!(&f.state, State::Sending(request) if request.id() == id));
        if let Some(flight) = flight {
            flight.state = State::Answered(answer);
        }
    }
}

/// The OID of the extension, which then cannot be dropped before the transaction ends.
///
/// DROP EXTENSION locks the extension before anything in it, so waiting here, where nothing is
/// locked yet, cannot deadlock with it.
fn lock_extension() -> pg_sys::Oid {
    // SAFETY: in a transaction, with a NUL-terminated name.
    unsafe {
        let name = c"pg_warden".as_ptr();
        let oid = pg_sys::get_extension_oid(name, true);
        if oid == pg_sys::InvalidOid {
            return oid;
        }
        pg_sys::LockDatabaseObject(
            pg_sys::ExtensionRelationId,
            oid,
            0,
            pg_sys::AccessShareLock as pg_sys::LOCKMODE,
        );
        pg_sys::get_extension_oid(name, true)
    }
}

/// Uniform over all values.
fn random() -> u64 {
    let mut n = 0u64;
    // SAFETY: eight writable bytes. If there is no randomness, the wait is the shortest one.
    unsafe { pg_sys::pg_strong_random((&raw mut n).cast(), size_of::<u64>() as _) };
    n
}

fn read_sinks(spi: &SpiClient<'_>) -> SpiResult<Vec<Sink>> {
    let rows = spi.select(
        "SELECT coalesce(s.id, c.sink), s.url || h.query, s.enabled AND h.sink IS NOT NULL, s.batch_events, s.batch_bytes, \
         coalesce(c.delivered_seq, 0), coalesce(c.failures, 0), \
         CASE WHEN c.next_retry IS NULL OR s.resumed_at > c.last_failure THEN 0 \
         ELSE extract(epoch FROM c.next_retry - clock_timestamp())::float8 END, \
         c.sink IS NOT NULL, s.id IS NULL \
         FROM warden.sink s FULL JOIN warden.sink_cursor c ON c.sink = s.id \
         LEFT JOIN warden.sink_here h ON h.sink = s.id ORDER BY 1",
        None,
        &[],
    )?;
    rows.map(|r| {
        let wait: f64 = r.get(8)?.unwrap_or_default();
        Ok(Sink {
            id: r.get(1)?.unwrap_or_default(),
            url: r.get(2)?.unwrap_or_default(),
            enabled: r.get(3)?.unwrap_or_default(),
            limits: Limits {
                events: r.get::<i32>(4)?.unwrap_or_default().max(1) as usize,
                bytes: r.get::<i32>(5)?.unwrap_or_default().max(1) as usize,
            },
            delivered: r.get(6)?.unwrap_or_default(),
            failures: r.get::<i32>(7)?.unwrap_or_default().max(0) as u32,
            // A clock that was set back must not stop a sink for longer than a receiver may.
            wait: Duration::from_secs_f64(wait.clamp(0.0, 3600.0)),
            has_cursor: r.get(9)?.unwrap_or_default(),
            dropped: r.get(10)?.unwrap_or_default(),
        })
    })
    .collect()
}

/// Creates the cursors of new sinks and deletes those of dropped ones. Returns the sinks.
fn settle_cursors(spi: &mut SpiClient<'_>, mut sinks: Vec<Sink>) -> SpiResult<Vec<Sink>> {
    for sink in sinks.iter_mut().filter(|s| s.dropped || !s.has_cursor) {
        let sql = if sink.dropped {
            "DELETE FROM warden.sink_cursor WHERE sink = $1 RETURNING 0::bigint"
        } else {
            "INSERT INTO warden.sink_cursor (sink, delivered_seq) \
             SELECT s.id, CASE WHEN s.ship_from = '-infinity' THEN 0 ELSE coalesce( \
             (SELECT min(e.seq) - 1 FROM warden.event e WHERE e.at >= s.ship_from), \
             (SELECT max(e.seq) FROM warden.event e), 0) END \
             FROM warden.sink s WHERE s.id = $1 RETURNING delivered_seq"
        };
        let rows = spi.update(sql, None, &[sink.id.into()])?;
        if let Some(row) = rows.into_iter().next() {
            sink.delivered = row.get(1)?.unwrap_or_default();
        }
    }
    sinks.retain(|s| !s.dropped);
    Ok(sinks)
}

fn last_seq(spi: &SpiClient<'_>) -> SpiResult<i64> {
    let mut rows = spi.select(
        "SELECT seq FROM warden.event ORDER BY seq DESC LIMIT 1",
        None,
        &[],
    )?;
    Ok(rows
        .next()
        .map(|r| r.get(1))
        .transpose()?
        .flatten()
        .unwrap_or_default())
}

/// Facts that events refer to. What is missing or unreadable is remembered as such.
#[derive(Default)]
struct Facts {
    sessions: HashMap<i64, Option<SessionJson>>,
    statements: HashMap<i64, Option<StatementJson>>,
    bytes: usize,
}

impl Facts {
    fn clear(&mut self) {
        *self = Self::default();
    }

    fn context(&self, e: &Event) -> Context<'_> {
        Context {
            session: self.sessions.get(&e.session).and_then(Option::as_ref),
            statement: self.statements.get(&e.statement).and_then(Option::as_ref),
        }
    }

    /// Reads what `events` refer to and is not known yet.
    fn load(&mut self, spi: &SpiClient<'_>, events: &[Stored]) -> SpiResult<()> {
        if self.bytes > CACHED_BYTES {
            self.clear();
        }
        let mut missing = Vec::new();
        for Stored { event: e, .. } in events {
            if e.session != 0 && !self.sessions.contains_key(&e.session) {
                self.sessions.insert(e.session, None);
                missing.push(e.session);
            }
            if e.statement != 0 && !self.statements.contains_key(&e.statement) {
                self.statements.insert(e.statement, None);
                missing.push(e.statement);
            }
        }
        self.bytes += missing.len() * 64;
        if missing.is_empty() {
            return Ok(());
        }
        let rows = spi.select(
            "SELECT seq, kind, payload FROM warden.event WHERE seq = ANY ($1)",
            None,
            &[missing.into()],
        )?;
        for r in rows {
            let seq: i64 = r.get(1)?.unwrap_or_default();
            let kind: i16 = r.get(2)?.unwrap_or_default();
            let payload: Vec<u8> = r.get(3)?.unwrap_or_default();
            match EventKind::from_i16(kind) {
                Some(EventKind::Session) => {
                    let facts = SessionFacts::decode(&payload).ok();
                    let json = facts.map(|f| SessionJson::new(seq, &f));
                    self.bytes += json.as_ref().map_or(0, SessionJson::size);
                    self.sessions.insert(seq, json);
                }
                Some(EventKind::Statement) => {
                    let facts = ShapeFacts::decode(&payload).ok();
                    let json = facts.map(|f| StatementJson::new(seq, &f));
                    self.bytes += json.as_ref().map_or(0, StatementJson::size);
                    self.statements.insert(seq, json);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Sets the shipper's latch when the current transaction has committed.
pub fn wake_after_commit() {
    // SAFETY: written by the server before this process runs a query.
    let database = unsafe { pg_sys::MyDatabaseId };
    pgrx::register_xact_callback(pgrx::PgXactCallbackEvent::Commit, move || wake(database));
}

/// Sets the latch of a database's shipper, if it runs. Raises no error.
pub fn wake(database: pg_sys::Oid) {
    if !shared::available() {
        return;
    }
    let Some(slot) = shared().slot(database) else {
        return;
    };
    let pid = slot.shipper.load(Ordering::Acquire);
    if pid == 0 {
        return;
    }
    // SAFETY: a PGPROC is never freed; setting the latch of another process is harmless.
    unsafe {
        let process = pg_sys::BackendPidGetProc(pid);
        if !process.is_null() {
            pg_sys::SetLatch(&raw mut (*process).procLatch);
        }
    }
}
