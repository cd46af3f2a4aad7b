//! What sinks receive, and how delivery goes on when they do not answer as they should.
//!
//! Owns: the NDJSON form of an event, the address of a sink, the size of batches, the meaning of an
//! HTTP answer and the waiting time after a failure. Receives events, facts, the time and random
//! numbers as values. Never opens a connection or a file, never reads a clock.
//!
//! Nothing here drops an event: an answer is either an acknowledgement, or a reason to try again.

use crate::connection::ConnectionFacts;
use crate::event::{
    Event, EventKind, ExecutionFacts, GapFacts, Outcome, SessionFacts, ShapeFacts,
    TransactionFacts, flags,
};
use crate::tlv::TlvError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::value::RawValue;
use std::fmt;
use std::time::Duration;

/// Where an event comes from: makes its id unique among all ledgers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The cluster's system identifier.
    pub system: u64,
    /// The cluster's timeline: a ledger that was restored to an earlier time has other events under
    /// the same numbers.
    pub timeline: u32,
    /// The database's OID.
    pub database: u32,
}

impl Origin {
    /// The id of an event: the same whenever, and however often, it is sent.
    #[must_use]
    pub fn event_id(&self, seq: i64) -> String {
        format!("{}-{seq}", self.ledger())
    }

    /// The id of a batch: the same for the same events.
    #[must_use]
    pub fn batch_id(&self, first_seq: i64, last_seq: i64) -> String {
        format!("{}-{first_seq}-{last_seq}", self.ledger())
    }

    /// What ids start with.
    fn ledger(&self) -> String {
        match self.timeline {
            0 | 1 => format!("{}-{}", self.system, self.database),
            timeline => format!("{}.{timeline}-{}", self.system, self.database),
        }
    }
}

/// An event with the hash that the ledger holds for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The event.
    pub event: Event,
    /// Its hash, as stored.
    pub hash: Vec<u8>,
}

/// What the events that an execution refers to say. Either may be missing: pruned, or unreadable.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// The session.
    pub session: Option<&'a SessionJson>,
    /// The statement.
    pub statement: Option<&'a StatementJson>,
}

/// What the lines of all events of a session have in common: rendered once.
#[derive(Debug, Clone)]
pub struct SessionJson {
    actor: Box<RawValue>,
    session: Box<RawValue>,
}

impl SessionJson {
    /// Of the session event `seq`.
    #[must_use]
    pub fn new(seq: i64, facts: &SessionFacts) -> Self {
        Self {
            actor: raw(&actor(facts)),
            session: raw(&session(seq, facts)),
        }
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.actor.get().len() + self.session.get().len()
    }
}

/// What the lines of all executions of a statement have in common: rendered once.
#[derive(Debug, Clone)]
pub struct StatementJson(Box<RawValue>);

impl StatementJson {
    /// Of the statement event `seq`.
    #[must_use]
    pub fn new(seq: i64, facts: &ShapeFacts) -> Self {
        Self(raw(&statement(seq, facts)))
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.get().len()
    }
}

fn raw(value: &impl Serialize) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).expect("strings and integers always serialise")
}

/// Microseconds from the Unix epoch to 2000-01-01 UTC, where the ledger's time starts.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// RFC 3339 with microseconds, of microseconds since 2000-01-01 UTC.
#[must_use]
pub fn rfc3339(at: i64) -> String {
    let seconds = at.div_euclid(1_000_000) + POSTGRES_EPOCH_SECONDS;
    let micros = at.rem_euclid(1_000_000);
    let (year, month, day) = civil_from_days(seconds.div_euclid(86_400));
    let s = seconds.rem_euclid(86_400);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{micros:06}Z",
        s / 3600,
        s / 60 % 60,
        s % 60
    )
}

/// Year, month and day of a number of days since 1970-01-01, in the proleptic Gregorian calendar.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (
        yoe + era * 400 + i64::from(month <= 2),
        month,
        doy - (153 * mp + 2) / 5 + 1,
    )
}

/// The inverse of [`civil_from_days`].
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let mp = if month > 2 { month - 3 } else { month + 9 };
    let yoe = y.rem_euclid(400);
    let doe = yoe * 365 + yoe / 4 - yoe / 100 + (153 * mp + 2) / 5 + day - 1;
    y.div_euclid(400) * 146_097 + doe - 719_468
}

#[derive(Serialize)]
struct Line<'a> {
    id: String,
    seq: i64,
    at: String,
    kind: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    actor: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    statement: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    execution: Option<ExecutionPart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gap: Option<GapFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    transaction: Option<TransactionFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connection: Option<ConnectionPart>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    flags: Vec<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    ledger: LedgerPart,
}

#[derive(Serialize)]
struct ActorPart<'a> {
    subject: &'a str,
    kind: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    on_behalf_of: &'a str,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    groups: &'a [String],
    trust: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    issuer: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    token_id: &'a str,
}

#[derive(Serialize)]
struct SessionPart<'a> {
    seq: i64,
    database: &'a str,
    session_user: &'a str,
    current_user: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    client_addr: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    client_port: u32,
    #[serde(skip_serializing_if = "str::is_empty")]
    application_name: &'a str,
    pid: u32,
    backend_start: String,
}

#[derive(Serialize)]
struct StatementPart<'a> {
    seq: i64,
    command: &'a str,
    text: &'a str,
    #[serde(skip_serializing_if = "is_zero_u64")]
    full_length: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    digest: String,
    #[serde(skip_serializing_if = "str::is_empty")]
    fingerprint: &'a str,
    accesses: &'a [crate::event::Access],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    masked: &'a [crate::event::MaskedColumn],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    functions: &'a [String],
}

#[derive(Serialize)]
struct ExecutionPart {
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_us: Option<i64>,
    #[serde(skip_serializing_if = "String::is_empty")]
    sqlstate: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    rule: String,
    #[serde(skip_serializing_if = "is_zero_u64")]
    position: u64,
    #[serde(skip_serializing_if = "is_zero_u64")]
    parent_position: u64,
    #[serde(skip_serializing_if = "is_zero_u64")]
    xid: u64,
    #[serde(skip_serializing_if = "is_zero")]
    subtransaction: u32,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    parameters: Vec<crate::parameter::Parameter>,
}

#[derive(Serialize)]
struct ConnectionPart {
    #[serde(flatten)]
    facts: ConnectionFacts,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_us: Option<i64>,
}

/// The columns of `warden.event` that are hashed, unchanged: enough to check the chain offline.
#[derive(Serialize)]
struct LedgerPart {
    at_us: i64,
    kind: i16,
    session: i64,
    statement: i64,
    rows: i64,
    duration_us: i64,
    outcome: i16,
    flags: i32,
    payload: String,
    hash: String,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero_u64(n: &u64) -> bool {
    *n == 0
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut s = String::with_capacity(bytes.len() * 2);
    for b in bytes {
        s.push(char::from(DIGITS[usize::from(b >> 4)]));
        s.push(char::from(DIGITS[usize::from(b & 15)]));
    }
    s
}

fn actor(s: &SessionFacts) -> ActorPart<'_> {
    let a = &s.actor;
    ActorPart {
        subject: &a.subject,
        kind: a.kind.name(),
        on_behalf_of: &a.on_behalf_of,
        groups: &a.groups,
        trust: a.trust.name(),
        issuer: &a.issuer,
        token_id: &a.token_id,
    }
}

fn session(seq: i64, s: &SessionFacts) -> SessionPart<'_> {
    SessionPart {
        seq,
        database: &s.database,
        session_user: &s.session_user,
        current_user: &s.current_user,
        client_addr: &s.client_addr,
        client_port: s.client_port,
        application_name: &s.application_name,
        pid: s.pid,
        backend_start: rfc3339(s.backend_start),
    }
}

fn statement(seq: i64, s: &ShapeFacts) -> StatementPart<'_> {
    StatementPart {
        seq,
        command: &s.command,
        text: &s.text,
        full_length: s.full_length,
        digest: hex(&s.digest),
        fingerprint: &s.fingerprint,
        accesses: &s.accesses,
        masked: &s.masked,
        functions: &s.functions,
    }
}

fn flag_names(bits: i32) -> Vec<&'static str> {
    [
        (flags::NESTED, "nested"),
        (flags::UTILITY, "utility"),
        (flags::MASKED, "masked"),
        (flags::PARTIAL, "partial"),
        (flags::BACKGROUND, "background"),
        (flags::COMMITTED, "committed"),
        (flags::ROLLED_BACK, "rolled_back"),
    ]
    .into_iter()
    .filter(|(bit, _)| bits.cast_unsigned() & bit != 0)
    .map(|(_, name)| name)
    .collect()
}

/// The NDJSON line of an event, with its newline.
///
/// An event whose payload cannot be read is rendered too, with the reason as `problem`: what
/// happened to the ledger must not keep the ledger from leaving the machine.
#[must_use]
pub fn render(origin: &Origin, stored: &Stored, context: Context<'_>) -> String {
    let e = &stored.event;
    let kind = EventKind::from_i16(e.kind);
    let mut problem: Option<String> = None;
    let mut note = |what: &str, error: &TlvError| {
        problem.get_or_insert_with(|| format!("{what}: {error}"));
    };

    let own_session = (kind == Some(EventKind::Session))
        .then(|| {
            SessionFacts::decode(&e.payload)
                .map_err(|x| note("session payload", &x))
                .ok()
        })
        .flatten()
        .map(|s| SessionJson::new(e.seq, &s));
    let own_statement = (kind == Some(EventKind::Statement))
        .then(|| {
            ShapeFacts::decode(&e.payload)
                .map_err(|x| note("statement payload", &x))
                .ok()
        })
        .flatten()
        .map(|s| StatementJson::new(e.seq, &s));
    let execution = (kind == Some(EventKind::Execution))
        .then(|| {
            ExecutionFacts::decode(&e.payload)
                .map_err(|x| note("payload", &x))
                .ok()
        })
        .flatten();
    let gap = (kind == Some(EventKind::Gap))
        .then(|| {
            GapFacts::decode(&e.payload)
                .map_err(|x| note("gap payload", &x))
                .ok()
        })
        .flatten();
    let connection = (kind == Some(EventKind::Connection))
        .then(|| {
            ConnectionFacts::decode(&e.payload)
                .map_err(|x| note("connection payload", &x))
                .ok()
        })
        .flatten();

    let transaction = (kind == Some(EventKind::Transaction))
        .then(|| {
            TransactionFacts::decode(&e.payload)
                .map_err(|x| note("transaction payload", &x))
                .ok()
        })
        .flatten();

    let (session, statement) = match kind {
        Some(EventKind::Session) => (own_session.as_ref(), None),
        Some(EventKind::Statement) => (None, own_statement.as_ref()),
        _ => (context.session, context.statement),
    };

    let line = Line {
        id: origin.event_id(e.seq),
        seq: e.seq,
        at: rfc3339(e.at),
        kind: kind.map_or("unknown", EventKind::name),
        outcome: (kind == Some(EventKind::Execution))
            .then(|| {
                u8::try_from(e.outcome)
                    .ok()
                    .and_then(Outcome::from_u8)
                    .map(Outcome::name)
            })
            .flatten(),
        actor: session.map(|s| &*s.actor),
        session: session.map(|s| &*s.session),
        statement: statement.map(|s| &*s.0),
        execution: execution.map(|x| ExecutionPart {
            rows: (e.rows >= 0).then_some(e.rows),
            duration_us: (e.duration_us >= 0).then_some(e.duration_us),
            sqlstate: x.sqlstate,
            rule: x.rule,
            position: x.position,
            parent_position: x.parent,
            xid: x.xid,
            subtransaction: x.subtransaction,
            parameters: x.parameters,
        }),
        gap,
        transaction,
        connection: connection.map(|facts| ConnectionPart {
            facts,
            duration_us: (e.duration_us >= 0).then_some(e.duration_us),
        }),
        flags: flag_names(e.flags),
        problem,
        ledger: LedgerPart {
            at_us: e.at,
            kind: e.kind,
            session: e.session,
            statement: e.statement,
            rows: e.rows,
            duration_us: e.duration_us,
            outcome: e.outcome,
            flags: e.flags,
            payload: STANDARD.encode(&e.payload),
            hash: hex(&stored.hash),
        },
    };
    let mut out = serde_json::to_string(&line).expect("strings and integers always serialise");
    out.push('\n');
    out
}

/// How much one request may carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Events, at least 1.
    pub events: usize,
    /// Bytes of body. An event that is longer goes alone.
    pub bytes: usize,
}

/// Consecutive events, in order, as one body.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// `seq` of the first event.
    pub first_seq: i64,
    /// `seq` of the last event.
    pub last_seq: i64,
    /// Number of events.
    pub events: usize,
    /// The lines.
    pub body: Vec<u8>,
}

impl Batch {
    /// Appends a line, if it fits; an empty batch takes any line. Returns whether it did.
    pub fn push(&mut self, seq: i64, line: &str, limits: Limits) -> bool {
        if self.events > 0
            && (self.events >= limits.events || self.body.len() + line.len() > limits.bytes)
        {
            return false;
        }
        if self.events == 0 {
            self.first_seq = seq;
        }
        self.last_seq = seq;
        self.events += 1;
        self.body.extend_from_slice(line.as_bytes());
        true
    }
}

/// How large batches are allowed to be: what was configured, or less where a receiver said 413.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    limits: Limits,
    /// Deliveries since the limits were last changed.
    delivered: u32,
}

/// Deliveries after which a reduced budget is doubled.
const GROW_AFTER: u32 = 64;

impl Budget {
    /// A budget that has not been reduced.
    #[must_use]
    pub fn new(configured: Limits) -> Self {
        Self {
            limits: configured,
            delivered: 0,
        }
    }

    /// What the next batch may carry.
    #[must_use]
    pub fn limits(&self, configured: Limits) -> Limits {
        Limits {
            events: self.limits.events.min(configured.events).max(1),
            bytes: self.limits.bytes.min(configured.bytes).max(1),
        }
    }

    /// A batch of this size was too large: the next one is at most half of it. Returns false if
    /// there is nothing left to halve.
    pub fn too_large(&mut self, batch: &Batch) -> bool {
        if batch.events <= 1 {
            return false;
        }
        self.limits = Limits {
            events: batch.events / 2,
            bytes: (batch.body.len() / 2).max(1),
        };
        self.delivered = 0;
        true
    }

    /// A batch was delivered. From time to time a reduced budget tries larger batches again.
    pub fn delivered(&mut self, configured: Limits) {
        self.delivered += 1;
        if self.delivered >= GROW_AFTER {
            self.delivered = 0;
            self.limits = Limits {
                events: self.limits.events.saturating_mul(2).min(configured.events),
                bytes: self.limits.bytes.saturating_mul(2).min(configured.bytes),
            };
        }
    }
}

/// What an answer, or its absence, means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The receiver has the events.
    Delivered,
    /// The batch is too large: send less.
    TooLarge,
    /// It may work in a moment.
    Retry,
    /// It will not work until somebody changes something. It is tried again all the same, at the
    /// longest interval: nothing is dropped.
    Refused,
}

/// What an HTTP status means.
#[must_use]
pub fn classify(status: u16) -> Verdict {
    match status {
        200..=299 => Verdict::Delivered,
        413 => Verdict::TooLarge,
        408 | 425 | 429 | 500..=599 => Verdict::Retry,
        _ => Verdict::Refused,
    }
}

/// How long to wait after failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The longest wait after the first failure; doubles with each further one.
    pub base: Duration,
    /// The longest wait that we choose.
    pub cap: Duration,
    /// The longest wait that a receiver may ask for.
    pub retry_after_cap: Duration,
    /// The shortest wait.
    pub floor: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            base: Duration::from_secs(1),
            cap: Duration::from_secs(60),
            retry_after_cap: Duration::from_secs(3600),
            floor: Duration::from_millis(100),
        }
    }
}

impl RetryPolicy {
    /// The wait after the `failures`th failure in a row (from 1): exponential with full jitter, as
    /// the AWS architecture blog describes it, but not less than what the receiver asked for.
    /// `random` is uniform over all its values.
    #[must_use]
    pub fn delay(
        &self,
        verdict: Verdict,
        failures: u32,
        retry_after: Option<Duration>,
        random: u64,
    ) -> Duration {
        let ours = match verdict {
            Verdict::Delivered => Duration::ZERO,
            Verdict::Refused | Verdict::TooLarge => self.cap,
            Verdict::Retry => {
                let doublings = failures.saturating_sub(1).min(32);
                let longest = self
                    .base
                    .saturating_mul(1u32 << doublings.min(31))
                    .min(self.cap);
                let micros = (u128::from(random) * longest.as_micros()) >> 64;
                Duration::from_micros(micros as u64).max(self.floor)
            }
        };
        retry_after.map_or(ours, |asked| ours.max(asked.min(self.retry_after_cap)))
    }
}

/// Reads a `Retry-After` header (RFC 9110 §10.2.3): seconds, or an IMF-fixdate. `now` is in seconds
/// since the Unix epoch. A date that has passed is zero; what is neither is `None`.
#[must_use]
pub fn retry_after(value: &str, now: u64) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let then = http_date(value)?;
    Some(Duration::from_secs(
        u64::try_from(then).unwrap_or(0).saturating_sub(now),
    ))
}

/// Seconds since the Unix epoch of `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(s: &str) -> Option<i64> {
    let (_, rest) = s.split_once(", ")?;
    let mut parts = rest.split(' ');
    let day = number(parts.next()?, 2, 31)?;
    let month = parts.next()?;
    let month = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ]
    .iter()
    .position(|m| *m == month)? as i64
        + 1;
    let year = number(parts.next()?, 4, 9999)?;
    let mut time = parts.next()?.split(':');
    let hour = number(time.next()?, 2, 23)?;
    let minute = number(time.next()?, 2, 59)?;
    let second = number(time.next()?, 2, 60)?;
    if parts.next()? != "GMT" || parts.next().is_some() || time.next().is_some() || day == 0 {
        return None;
    }
    Some(days_from_civil(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second)
}

fn number(s: &str, digits: usize, max: i64) -> Option<i64> {
    if s.len() != digits || !s.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    s.parse().ok().filter(|n| *n <= max)
}

/// Where a sink sends to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A URL with scheme `http` or `https`.
    Http(String),
    /// A name in `warden.file_sink_directory`.
    File(String),
}

/// Why an address is not one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetError {
    /// What is wrong: lower case, no full stop.
    pub message: &'static str,
    /// What to do: a sentence.
    pub hint: &'static str,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message)
    }
}

impl std::error::Error for TargetError {}

const FORMS: &str = "Use https://host[:port]/path, http://host[:port]/path or file:NAME.";
/// The longest address of a sink, in bytes.
pub const MAX_ADDRESS: usize = 2048;
/// The longest name of a file sink's file, in bytes.
pub const MAX_FILE_NAME: usize = 200;

impl Target {
    /// Reads the address of a sink.
    ///
    /// # Errors
    /// If it is neither an HTTP URL without credentials nor a plain file name.
    pub fn parse(address: &str) -> Result<Self, TargetError> {
        let fail = |message, hint| Err(TargetError { message, hint });
        if address.len() > MAX_ADDRESS {
            return fail("sink URL is too long", "The limit is 2048 bytes.");
        }
        if address.bytes().any(|b| b <= b' ' || b == 0x7f) {
            return fail(
                "sink URL contains white space or control characters",
                "Write them percent-encoded.",
            );
        }
        if let Some(name) = address.strip_prefix("file:") {
            return Self::parse_file(name);
        }
        let Ok(url) = url::Url::parse(address) else {
            return fail("sink URL is not valid", FORMS);
        };
        if !matches!(url.scheme(), "http" | "https") {
            return fail("sink URL has a scheme that is not supported", FORMS);
        }
        // The URL standard forgives a missing slash; whoever reads the configuration should not.
        let after_scheme = address.split_once(':').map_or("", |(_, rest)| rest);
        if !after_scheme.starts_with("//")
            || after_scheme.starts_with("///")
            || address.contains('\\')
            || url.host_str().is_none_or(str::is_empty)
        {
            return fail("sink URL has no host", FORMS);
        }
        if !url.username().is_empty()
            || url.password().is_some()
            || after_scheme[2..]
                .split(['/', '?', '#'])
                .next()
                .is_some_and(|a| a.contains('@'))
        {
            return fail(
                "sink URL contains credentials",
                "Let a proxy on this machine add them: a URL is shown in views, logs and dumps.",
            );
        }
        if url.fragment().is_some() {
            return fail(
                "sink URL has a fragment",
                "Remove the \"#\" and what follows it.",
            );
        }
        Ok(Self::Http(url.into()))
    }

    fn parse_file(name: &str) -> Result<Self, TargetError> {
        let ok = !name.is_empty()
            && name.len() <= MAX_FILE_NAME
            && !name.starts_with(['.', '-'])
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if ok {
            Ok(Self::File(name.to_owned()))
        } else {
            Err(TargetError {
                message: "file sink needs a plain file name",
                hint: "Use letters, digits, \".\", \"_\" and \"-\", as in file:audit.ndjson. \
                       Its directory is set by warden.file_sink_directory.",
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{ConnectionEvent, frame};
    use crate::event::{Access, AccessKind, Actor, ActorKind, MaskedColumn, Trust};
    use proptest::prelude::*;

    const ORIGIN: Origin = Origin {
        system: 7_300_000_000_000_000_001,
        timeline: 1,
        database: 16_384,
    };

    fn facts() -> (SessionFacts, ShapeFacts) {
        let s = SessionFacts {
            session: 7,
            pid: 42,
            backend_start: 849_283_200_000_000,
            database: "shop".into(),
            session_user: "app".into(),
            current_user: "reader".into(),
            client_addr: "127.0.0.1".into(),
            client_port: 5000,
            application_name: "psql".into(),
            actor: Actor {
                subject: "agent-1".into(),
                kind: ActorKind::Agent,
                on_behalf_of: "ana@example.com".into(),
                groups: vec!["support".into()],
                trust: Trust::Verified,
                issuer: "https://idp.example".into(),
                token_id: "t1".into(),
            },
        };
        let shape = ShapeFacts {
            command: "SELECT".into(),
            text: "SELECT \"émail\"\n FROM customer WHERE id = $1".into(),
            accesses: vec![Access {
                kind: AccessKind::Select,
                oid: 16400,
                schema: "public".into(),
                relation: "customer".into(),
                columns: vec!["émail".into(), "id".into()],
            }],
            masked: vec![MaskedColumn {
                relation: "public.customer".into(),
                column: "émail".into(),
                function: "warden.partial_email".into(),
            }],
            fingerprint: "00ff00ff00ff00ff".into(),
            ..ShapeFacts::default()
        };
        (s, shape)
    }

    fn execution() -> Stored {
        Stored {
            event: Event {
                seq: 12,
                at: 849_283_201_000_007,
                kind: 3,
                session: 10,
                statement: 11,
                rows: 3,
                duration_us: 250,
                outcome: 1,
                flags: 5,
                payload: ExecutionFacts {
                    position: 4096,
                    parent: 2048,
                    sqlstate: "57014".into(),
                    rule: String::new(),
                    ..ExecutionFacts::default()
                }
                .encode(),
            },
            hash: vec![0xab; 32],
        }
    }

    /// A frozen fixture: receivers depend on it. A changed field needs a new name.
    #[test]
    fn what_happens_on_another_timeline_has_other_ids() {
        let promoted = Origin {
            timeline: 2,
            ..ORIGIN
        };
        assert_ne!(ORIGIN.event_id(7), promoted.event_id(7));
        assert_ne!(ORIGIN.batch_id(7, 9), promoted.batch_id(7, 9));
    }

    #[test]
    fn the_line_of_an_execution_is_frozen() {
        let (s, shape) = facts();
        let e = execution().event;
        let context = Context {
            session: Some(&SessionJson::new(e.session, &s)),
            statement: Some(&StatementJson::new(e.statement, &shape)),
        };
        assert_eq!(
            render(&ORIGIN, &execution(), context),
            include_str!("../fixtures/execution.ndjson")
        );
    }

    /// As above.
    #[test]
    fn the_line_of_a_connection_is_frozen() {
        let facts = ConnectionFacts {
            event: ConnectionEvent::Refused,
            pid: 42,
            database: "shop".into(),
            role: "app".into(),
            client_addr: "10.0.0.7".into(),
            client_port: 5000,
            method: "scram-sha-256".into(),
            sqlstate: "28P01".into(),
            reason: "password authentication failed for user \"app\"".into(),
            count: 3,
            ..ConnectionFacts::default()
        };
        let mut e = execution();
        e.event = crate::connection::event(&frame(849_283_201_000_007, -1, &facts)).unwrap();
        e.event.seq = 12;
        assert_eq!(
            render(&ORIGIN, &e, Context::default()),
            include_str!("../fixtures/connection.ndjson")
        );
    }

    #[test]
    fn every_kind_of_event_has_a_line() {
        let (s, shape) = facts();
        let gap = GapFacts {
            reason: "journal_full".into(),
            statements: 9,
            ..GapFacts::default()
        };
        let cases = [
            (1, s.encode(), "session"),
            (2, shape.encode(), "statement"),
            (4, gap.encode(), "gap"),
            (5, vec![], "boot"),
            (7, ConnectionFacts::default().encode(), "connection"),
            (99, vec![1], "unknown"),
        ];
        for (kind, payload, name) in cases {
            let mut e = execution();
            (e.event.kind, e.event.payload) = (kind, payload);
            let line = render(&ORIGIN, &e, Context::default());
            assert!(line.ends_with('\n') && line.matches('\n').count() == 1);
            let v: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(v["kind"], name);
            assert_eq!(v.get("problem"), None);
            match kind {
                1 => assert_eq!(v["actor"]["on_behalf_of"], "ana@example.com"),
                2 => assert_eq!(v["statement"]["masked"][0]["column"], "émail"),
                4 => assert_eq!(v["gap"]["statements"], 9),
                _ => {}
            }
        }
    }

    #[test]
    fn an_unreadable_payload_is_still_shipped() {
        let mut e = execution();
        e.event.payload = vec![1, 2, 3];
        let v: serde_json::Value =
            serde_json::from_str(&render(&ORIGIN, &e, Context::default())).unwrap();
        assert!(v["problem"].as_str().unwrap().starts_with("payload: "));
        assert_eq!(v["ledger"]["payload"], "AQID");
    }

    #[test]
    fn timestamps_are_rfc_3339() {
        for (at, text) in [
            (0, "2000-01-01T00:00:00.000000Z"),
            (-1, "1999-12-31T23:59:59.999999Z"),
            (5_097_600_000_000, "2000-02-29T00:00:00.000000Z"),
            (849_283_201_000_007, "2026-11-29T16:00:01.000007Z"),
        ] {
            assert_eq!(rfc3339(at), text);
        }
        let _ = (rfc3339(i64::MAX), rfc3339(i64::MIN));
    }

    #[test]
    fn answers_mean_what_http_says() {
        for s in [200, 201, 202, 204, 299] {
            assert_eq!(classify(s), Verdict::Delivered);
        }
        for s in [408, 425, 429, 500, 502, 503, 504, 599] {
            assert_eq!(classify(s), Verdict::Retry);
        }
        for s in [100, 301, 302, 307, 400, 401, 403, 404, 600] {
            assert_eq!(classify(s), Verdict::Refused);
        }
        assert_eq!(classify(413), Verdict::TooLarge);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = 784_111_770;
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after(" 0 ", now), Some(Duration::ZERO));
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(retry_after(date, now), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(date, now + 100), Some(Duration::ZERO));
        assert_eq!(
            retry_after("99999999999999999999999", now),
            Some(Duration::from_secs(u64::MAX))
        );
        for bad in [
            "",
            "-1",
            "1.5",
            "soon",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "x, 1 Nov 1994 8:9:7 GMT",
        ] {
            assert_eq!(retry_after(bad, now), None, "{bad}");
        }
    }

    #[test]
    fn addresses_are_checked() {
        for ok in [
            "http://127.0.0.1:8080/in",
            "https://siem.example/a?b=c",
            "http://[::1]:9/x",
        ] {
            assert!(matches!(Target::parse(ok), Ok(Target::Http(_))), "{ok}");
        }
        assert_eq!(
            Target::parse("file:audit.ndjson"),
            Ok(Target::File("audit.ndjson".into()))
        );
        let bad = [
            "",
            "x",
            "/etc/passwd",
            "ftp://h/",
            "http:",
            "http://",
            "http:///p",
            "http:host/x",
            "https://u:p@h/",
            "https://u@h/",
            "https://:p@h/",
            "https://@h/",
            "https://h/#f",
            "http://h/a b",
            "http://h/\n",
            "http://h\\@evil/",
            "javascript:1",
            "file:",
            "file:/etc/passwd",
            "file://h/x",
            "file:../x",
            "file:a/b",
            "file:.hidden",
            "file:a\0b",
            "file:-rf",
            "file:a%2fb",
            "file:ä",
            "unix:/tmp/x",
        ];
        for b in bad {
            let e = Target::parse(b).expect_err(b);
            assert!(!e.hint.is_empty());
        }
        assert!(Target::parse(&format!("http://h/{}", "x".repeat(MAX_ADDRESS))).is_err());
        assert!(Target::parse(&format!("file:{}", "x".repeat(MAX_FILE_NAME + 1))).is_err());
    }

    /// A receiver that takes bodies up to `max` bytes, fed as the shipper feeds it.
    fn deliver(lines: &[String], configured: Limits, max: usize) -> (Vec<i64>, usize) {
        let (mut got, mut cursor, mut requests) = (Vec::new(), 0usize, 0);
        let mut budget = Budget::new(configured);
        while cursor < lines.len() {
            requests += 1;
            let mut batch = Batch::default();
            let mut next = cursor;
            while next < lines.len()
                && batch.push(next as i64, &lines[next], budget.limits(configured))
            {
                next += 1;
            }
            if batch.body.len() <= max {
                got.extend(batch.first_seq..=batch.last_seq);
                cursor = next;
                budget.delivered(configured);
            } else if !budget.too_large(&batch) {
                break;
            }
        }
        (got, requests)
    }

    proptest! {
        #[test]
        fn batches_hold_every_event_once_and_in_order(
            sizes in prop::collection::vec(1usize..300, 0..200),
            events in 1usize..50, bytes in 1usize..2000, max in 300usize..3000,
        ) {
            let lines: Vec<String> = sizes.iter().map(|n| "x".repeat(*n)).collect();
            let (got, requests) = deliver(&lines, Limits { events, bytes }, max);
            prop_assert_eq!(got, (0..lines.len() as i64).collect::<Vec<_>>());
            prop_assert!(requests <= 2 * lines.len() + 16);
        }

        #[test]
        fn a_batch_keeps_its_limits(
            sizes in prop::collection::vec(1usize..300, 1..100), events in 1usize..20, bytes in 1usize..1000,
        ) {
            let mut batch = Batch::default();
            for (i, n) in sizes.iter().enumerate() {
                if !batch.push(i as i64, &"x".repeat(*n), Limits { events, bytes }) { break }
            }
            prop_assert!(batch.events <= events);
            prop_assert!(batch.events == 1 || batch.body.len() <= bytes);
            prop_assert_eq!(batch.last_seq - batch.first_seq + 1, batch.events as i64);
        }

        #[test]
        fn waits_are_bounded_and_grow(failures in 1u32.., random: u64) {
            let p = RetryPolicy::default();
            let d = p.delay(Verdict::Retry, failures, None, random);
            prop_assert!(d >= p.floor && d <= p.cap);
            let bound = 2f64.powi(failures.min(30) as i32 - 1);
            prop_assert!(d.as_secs_f64() <= bound);
            prop_assert!(p.delay(Verdict::Retry, failures.saturating_add(1), None, random) >= d);
            prop_assert_eq!(p.delay(Verdict::Refused, failures, None, random), p.cap);
        }

        #[test]
        fn a_receiver_is_not_asked_earlier_than_it_wants(failures in 1u32..100, random: u64, asked in 0u64..10_000) {
            let p = RetryPolicy::default();
            for v in [Verdict::Retry, Verdict::Refused, Verdict::TooLarge] {
                let d = p.delay(v, failures, Some(Duration::from_secs(asked)), random);
                prop_assert!(d >= Duration::from_secs(asked).min(p.retry_after_cap));
                prop_assert!(d <= p.cap.max(p.retry_after_cap));
            }
        }

        #[test]
        fn no_address_panics(s in ".{0,60}", f in "(http|https|file):.{0,40}") {
            let _ = (Target::parse(&s), Target::parse(&f), retry_after(&s, 0));
        }

        #[test]
        fn a_date_is_read_back(days in 0i64..200_000) {
            let (y, m, d) = civil_from_days(days);
            prop_assert_eq!(days_from_civil(y, m, d), days);
        }

        #[test]
        fn any_event_is_one_line_of_json(kind: i16, at: i64, payload in prop::collection::vec(any::<u8>(), 0..80), outcome: i16, flags: i32) {
            let mut e = execution();
            e.event.kind = kind;
            e.event.at = at;
            e.event.payload = payload;
            e.event.outcome = outcome;
            e.event.flags = flags;
            let line = render(&ORIGIN, &e, Context::default());
            prop_assert_eq!(line.matches('\n').count(), 1);
            prop_assert!(serde_json::from_str::<serde_json::Value>(&line).is_ok());
        }
    }
}
