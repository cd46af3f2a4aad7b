//! From the journal's frames to the ledger's events.
//!
//! Owns: which intents and transactions are open, which sessions and statements a ledger knows, and
//! the end of its chain. Receives frames in journal order; emits, batch by batch, chained events, the rows that
//! project them, and the change of the set of open intents. Never does I/O: what the ledger's
//! tables know comes in through [`Directory`]. Never panics: what it cannot read becomes a gap
//! event.
//!
//! What a transaction wrote waits for its end, so that the events can say what became of it. It does
//! not wait beyond its batch: then a transaction event says it later.
//!
//! Exactly once: when a batch, the journal position after its last frame and the end of the chain
//! are stored together, a joiner that starts from what was stored goes on as if it had never stopped.

use crate::connection::{self, ConnectionFacts, ConnectionRow};
use crate::event::{
    Event, EventKind, ExecutionFacts, GapFacts, Outcome, SessionFacts, ShapeFacts,
    TransactionFacts, flags,
};
use crate::frame::{
    self, Boot, Fate, FrameKind, GapReason, Header, Intent, SessionEnd, Transaction, u64le,
};
use crate::ledger::{Chain, Hash};
use crate::parameter;
use crate::tlv::Reader;
use std::collections::{BTreeMap, HashMap};

/// The tag under which a session or statement event carries the key of its journal frame, after
/// the facts: `key` columns are thereby under the hash as well.
pub const KEY_TAG: u16 = 0xfff0;

/// Keys remembered between two batches.
const REMEMBERED: usize = 100_000;

/// Why something is missing: the `reason` of a gap event.
pub mod reason {
    /// Backends went on unrecorded because the journal was full.
    pub const JOURNAL_FULL: &str = "journal_full";
    /// Backends went on although the journal could not be synced to disk.
    pub const JOURNAL_NOT_DURABLE: &str = "journal_not_durable";
    /// Bytes of the journal are not what was written.
    pub const JOURNAL_DAMAGED: &str = "journal_damaged";
    /// The journal was recycled before the recorder read it.
    pub const JOURNAL_LOST: &str = "journal_lost";
    /// The journal is not the one that the ledger was written from.
    pub const JOURNAL_REPLACED: &str = "journal_replaced";
    /// The ledger is on another cluster than before: after `pg_upgrade`, for instance.
    pub const SERVER_REPLACED: &str = "server_replaced";
    /// The ledger was restored to an earlier time, or its standby was promoted.
    pub const TIMELINE_CHANGED: &str = "timeline_changed";
    /// The ledger's place in the journal is not known any more.
    pub const POSITION_LOST: &str = "position_lost";
    /// A statement ended that had not begun.
    pub const OUTCOME_UNMATCHED: &str = "outcome_unmatched";
    /// An undamaged frame that cannot be understood.
    pub const FRAME_MALFORMED: &str = "frame_malformed";
}

/// What a ledger's tables know.
pub trait Directory {
    /// `seq` of the session event with this key.
    fn session(&mut self, key: u64) -> Option<i64>;
    /// `seq` of the statement event with this key.
    fn statement(&mut self, key: u64) -> Option<i64>;
    /// Whether the server has committed, not rolled back, a transaction; `None` if neither, or if
    /// it does not know any more.
    fn committed(&mut self, xid: u64) -> Option<bool>;
}

/// What the tables know after a start of the server: ids that it gives out again were rolled back.
struct Started<'a, D> {
    directory: &'a mut D,
    boot: Boot,
}

impl<D: Directory> Directory for Started<'_, D> {
    fn session(&mut self, key: u64) -> Option<i64> {
        self.directory.session(key)
    }
    fn statement(&mut self, key: u64) -> Option<i64> {
        self.directory.statement(key)
    }
    fn committed(&mut self, xid: u64) -> Option<bool> {
        if xid >= self.boot.next_xid {
            return Some(false);
        }
        self.directory.committed(xid)
    }
}

/// Names the shape of a statement.
pub trait Fingerprint {
    /// 16 hexadecimal digits, or empty if the text cannot be parsed.
    fn fingerprint(&mut self, text: &str) -> String;
}

/// No fingerprints.
impl Fingerprint for () {
    fn fingerprint(&mut self, _: &str) -> String {
        String::new()
    }
}

/// A row that projects a session event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRow {
    /// `seq` of the event.
    pub id: i64,
    /// Key of the frame.
    pub key: u64,
    /// What the payload says.
    pub facts: SessionFacts,
}

impl SessionRow {
    /// The row that belongs to an event; `None` if its payload is malformed.
    #[must_use]
    pub fn project(seq: i64, payload: &[u8]) -> Option<Self> {
        let key = Reader::parse(payload).ok()?.u64(KEY_TAG).ok()?;
        Some(Self {
            id: seq,
            key,
            facts: SessionFacts::decode(payload).ok()?,
        })
    }
}

/// A row that projects a statement event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatementRow {
    /// `seq` of the event.
    pub id: i64,
    /// Key of the frame.
    pub key: u64,
    /// What the payload says.
    pub facts: ShapeFacts,
}

impl StatementRow {
    /// The row that belongs to an event; `None` if its payload is malformed.
    #[must_use]
    pub fn project(seq: i64, payload: &[u8]) -> Option<Self> {
        let key = Reader::parse(payload).ok()?.u64(KEY_TAG).ok()?;
        Some(Self {
            id: seq,
            key,
            facts: ShapeFacts::decode(payload).ok()?,
        })
    }
}

/// A row that projects a transaction event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionRow {
    /// `seq` of the event.
    pub id: i64,
    /// What the payload says.
    pub facts: TransactionFacts,
}

impl TransactionRow {
    /// The row that belongs to an event; `None` if its payload is malformed.
    #[must_use]
    pub fn project(seq: i64, payload: &[u8]) -> Option<Self> {
        Some(Self {
            id: seq,
            facts: TransactionFacts::decode(payload).ok()?,
        })
    }
}

/// What one transaction adds to a ledger.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Events, in order, with their hashes.
    pub events: Vec<(Event, Hash)>,
    /// Projections of its session events.
    pub sessions: Vec<SessionRow>,
    /// Projections of its statement events.
    pub statements: Vec<StatementRow>,
    /// Projections of its transaction events.
    pub transactions: Vec<TransactionRow>,
    /// Projections of its connection and boot events.
    pub connections: Vec<ConnectionRow>,
    /// Intents that stay open: position and payload.
    pub opened: Vec<(u64, Vec<u8>)>,
    /// Positions of intents of earlier batches that are open no more.
    pub closed: Vec<u64>,
    /// Transactions that stay open, and whose statements are in the ledger: the transaction id, and
    /// the payload of its frame if it was prepared.
    pub unsettled: Vec<(u64, Vec<u8>)>,
    /// Transactions of earlier batches that are open no more, or have a frame now. To be removed
    /// before `unsettled` is added.
    pub settled: Vec<u64>,
}

impl Batch {
    /// Whether there is nothing to store.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
            && self.opened.is_empty()
            && self.closed.is_empty()
            && self.unsettled.is_empty()
            && self.settled.is_empty()
    }
}

/// The details of an event, as JSON. A payload that cannot be read says so under `malformed`.
#[must_use]
pub fn describe(kind: i16, payload: &[u8]) -> serde_json::Value {
    let facts = match EventKind::from_i16(kind) {
        Some(EventKind::Session) => SessionFacts::decode(payload).map(serde_json::to_value),
        Some(EventKind::Statement) => ShapeFacts::decode(payload).map(serde_json::to_value),
        Some(EventKind::Execution) => ExecutionFacts::decode(payload).map(serde_json::to_value),
        Some(EventKind::Gap) => GapFacts::decode(payload).map(serde_json::to_value),
        Some(EventKind::Transaction) => TransactionFacts::decode(payload).map(serde_json::to_value),
        Some(EventKind::Connection) => ConnectionFacts::decode(payload).map(serde_json::to_value),
        Some(EventKind::Boot) => return serde_json::json!({}),
        None => return serde_json::json!({ "malformed": "unknown kind" }),
    };
    match facts {
        Ok(Ok(value)) => value,
        Ok(Err(e)) => serde_json::json!({ "malformed": e.to_string() }),
        Err(e) => serde_json::json!({ "malformed": e.to_string() }),
    }
}

/// An intent, and what follows its fixed part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenIntent {
    /// The fixed part.
    pub intent: Intent,
    /// A TLV payload, or nothing.
    pub tail: Vec<u8>,
}

impl OpenIntent {
    /// Reads a payload; `None` if it is too short.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let intent = Intent::decode(payload)?;
        let tail = payload[Intent::SIZE..].to_vec();
        Some(Self { intent, tail })
    }
}

#[derive(Debug, Clone)]
struct Open {
    intent: Intent,
    tail: Vec<u8>,
    /// Whether an earlier batch holds it.
    stored: bool,
    /// Whether a statement that it ran refers to it.
    referred: bool,
}

/// A transaction that has not ended, and whose statements are in the ledger.
#[derive(Debug, Clone)]
struct Unsettled {
    /// Its frame, if it was prepared.
    prepared: Option<Transaction>,
    /// Whether an earlier batch holds it.
    stored: bool,
}

/// An execution that waits for the end of its transaction.
#[derive(Debug)]
struct Waiting {
    /// Its place among all that wait.
    number: u64,
    /// Position of its intent.
    position: u64,
    subtransaction: u32,
    event: Event,
}

/// The state of one ledger between its frames.
#[derive(Debug)]
pub struct Joiner {
    database: u32,
    /// Journal position at which the ledger began.
    start: u64,
    chain: Chain,
    /// `at` of the last event: the time of what carries none.
    at: i64,
    open: BTreeMap<u64, Open>,
    waiting: HashMap<u64, Vec<Waiting>>,
    waited: u64,
    unsettled: BTreeMap<u64, Unsettled>,
    /// Key to `seq`, or to 0 where the tables know no such key.
    sessions: HashMap<u64, i64>,
    statements: HashMap<u64, i64>,
    remembered: usize,
    lacking: bool,
    batch: Batch,
}

impl Joiner {
    /// A joiner that goes on where the ledger of `database`, which began at the journal position
    /// `start`, ends: at `chain`, whose last event has the time `at`, with the open intents and
    /// transactions that were stored.
    #[must_use]
    pub fn new(
        database: u32,
        start: u64,
        chain: Chain,
        at: i64,
        open: impl IntoIterator<Item = (u64, OpenIntent)>,
        unsettled: impl IntoIterator<Item = (u64, Vec<u8>)>,
    ) -> Self {
        let open = open
            .into_iter()
            .map(|(pos, OpenIntent { intent, tail })| {
                (
                    pos,
                    Open {
                        intent,
                        tail,
                        stored: true,
                        // Whether it is, an earlier joiner knew.
                        referred: true,
                    },
                )
            })
            .collect();
        let unsettled = unsettled
            .into_iter()
            .map(|(xid, frame)| {
                (
                    xid,
                    Unsettled {
                        prepared: Transaction::decode(&frame),
                        stored: true,
                    },
                )
            })
            .collect();
        Self {
            database,
            start,
            chain,
            at,
            open,
            waiting: HashMap::new(),
            waited: 0,
            unsettled,
            sessions: HashMap::new(),
            statements: HashMap::new(),
            remembered: REMEMBERED,
            lacking: false,
            batch: Batch::default(),
        }
    }

    /// The end of the chain.
    #[must_use]
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Whether an execution referred to a session or a statement whose frame never came, since the
    /// last call: backends should record theirs again.
    pub fn lacking(&mut self) -> bool {
        std::mem::take(&mut self.lacking)
    }

    /// Whether a frame is for this ledger.
    #[must_use]
    pub fn wants(&self, header: &Header) -> bool {
        match FrameKind::from_u8(header.kind) {
            Some(FrameKind::Pad) => false,
            Some(FrameKind::Boot) => true,
            _ => header.dest == self.database,
        }
    }

    /// Takes the next frame. Frames of other ledgers are ignored.
    pub fn frame(
        &mut self,
        pos: u64,
        header: &Header,
        payload: &[u8],
        directory: &mut impl Directory,
        fingerprint: &mut impl Fingerprint,
    ) {
        if !self.wants(header) {
            return;
        }
        let understood = header.version == frame::VERSION
            && match FrameKind::from_u8(header.kind) {
                Some(FrameKind::Intent) => self.intent(pos, payload),
                Some(FrameKind::Outcome) => self.outcome(pos, payload, directory),
                Some(FrameKind::Session) => self.session(payload, directory),
                Some(FrameKind::Shape) => self.shape(payload, directory, fingerprint),
                Some(FrameKind::SessionEnd) => self.session_end(payload, directory),
                Some(FrameKind::Boot) => self.boot(payload, directory),
                Some(FrameKind::Gap) => self.backend_gap(pos, payload),
                Some(FrameKind::Transaction) => self.transaction(payload),
                Some(FrameKind::Connection) => self.connection(payload),
                Some(FrameKind::Pad) => true,
                None => false,
            };
        if !understood {
            let end = pos + frame::frame_size(payload.len()) as u64;
            self.gap(reason::FRAME_MALFORMED, 0, pos, end);
        }
    }

    /// Takes note that frames between two positions cannot be read.
    pub fn damaged(&mut self, from: u64, to: u64) {
        self.gap(reason::JOURNAL_DAMAGED, 0, from, to);
    }

    /// Takes note that something is missing.
    pub fn gap(&mut self, reason: &str, statements: u64, from: u64, to: u64) {
        let facts = GapFacts {
            reason: reason.to_owned(),
            statements,
            from_position: from,
            to_position: to,
            ..GapFacts::default()
        };
        self.push(EventKind::Gap, self.at, facts.encode());
    }

    /// The ledger goes on where it was not written before: what was open stays without an end, and the
    /// journal position before which nothing belongs to it is another one. Returns the `seq` of the event
    /// that says so.
    pub fn moved(&mut self, facts: &GapFacts, directory: &mut impl Directory) -> i64 {
        self.interrupt_all(directory);
        self.start = facts.to_position;
        self.push(EventKind::Gap, self.at, facts.encode());
        self.chain.seq
    }

    /// The server started, and its journal cannot say so.
    pub fn started(&mut self, at: i64) {
        self.append_connection(blank(EventKind::Boot, at, Vec::new()));
    }

    /// Journal position at which the ledger began, or goes on.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Ends every open intent as interrupted: nothing can bring its outcome any more. What became of
    /// open transactions, the server knows.
    pub fn interrupt_all(&mut self, directory: &mut impl Directory) {
        self.interrupt(|_| true, "", directory);
        let mut xids: Vec<u64> = self.unsettled.keys().copied().collect();
        xids.extend(self.waiting.keys());
        self.ask(xids, directory);
    }

    /// Settles the transactions that were prepared, and that have been decided since.
    pub fn settle_prepared(&mut self, directory: &mut impl Directory) {
        let prepared = self.unsettled.iter().filter(|(_, u)| u.prepared.is_some());
        let xids: Vec<u64> = prepared.map(|(xid, _)| *xid).collect();
        self.ask(xids, directory);
    }

    /// Settles those of some transactions whose end the server knows.
    fn ask(&mut self, mut xids: Vec<u64>, directory: &mut impl Directory) {
        xids.sort_unstable();
        xids.dedup();
        for xid in xids {
            let Some(committed) = directory.committed(xid) else {
                continue;
            };
            let known = self.unsettled.get(&xid).and_then(|u| u.prepared.clone());
            let mut end = known.unwrap_or(Transaction {
                at: self.at,
                xid,
                fate: Fate::RolledBack,
                unknown_from: 2,
                rolled_back: Vec::new(),
            });
            end.fate = if committed {
                Fate::Committed
            } else {
                Fate::RolledBack
            };
            self.settle(&end);
        }
    }

    /// What came out of the frames since the last call. The caller stores it together with
    /// [`Self::chain`] and the journal position after the last frame.
    pub fn take(&mut self) -> Batch {
        self.release_waiting();
        for (pos, open) in &mut self.open {
            if !open.stored {
                open.stored = true;
                let payload = [&open.intent.encode()[..], &open.tail].concat();
                self.batch.opened.push((*pos, payload));
            }
        }
        for (xid, u) in &mut self.unsettled {
            if !u.stored {
                u.stored = true;
                let frame = u.prepared.as_ref().map(Transaction::encode);
                self.batch.unsettled.push((*xid, frame.unwrap_or_default()));
            }
        }
        // Only here, where the tables are about to know every key.
        if self.sessions.len() > self.remembered {
            self.sessions.clear();
        }
        if self.statements.len() > self.remembered {
            self.statements.clear();
        }
        std::mem::take(&mut self.batch)
    }

    fn intent(&mut self, pos: u64, payload: &[u8]) -> bool {
        let Some(OpenIntent { intent, tail }) = OpenIntent::decode(payload) else {
            return false;
        };
        if self.open.contains_key(&pos) {
            return false;
        }
        if intent.parent != 0 {
            match self.open.get_mut(&intent.parent) {
                Some(parent) => parent.referred = true,
                None => self.refer(intent.parent),
            }
        }
        self.open.insert(
            pos,
            Open {
                intent,
                tail,
                stored: false,
                referred: false,
            },
        );
        true
    }

    /// A statement has ended, and its commit runs another one.
    fn refer(&mut self, pos: u64) {
        let waiting = self.waiting.values_mut().flatten();
        for w in waiting.filter(|w| w.position == pos) {
            if let Ok(mut facts) = ExecutionFacts::decode(&w.event.payload) {
                facts.position = pos;
                w.event.payload = facts.encode();
            }
        }
    }

    fn outcome(&mut self, pos: u64, payload: &[u8], directory: &mut impl Directory) -> bool {
        let Some(o) = frame::Outcome::decode(payload) else {
            return false;
        };
        let Some(sqlstate) = sqlstate(o.sqlstate) else {
            return false;
        };
        if Outcome::from_u8(o.outcome).is_none() {
            return false;
        }
        match self.open.remove(&o.intent) {
            Some(open) => self.execution(o.intent, open, &o, sqlstate, directory),
            // It began before there was a ledger.
            None if o.intent < self.start => {}
            None => self.gap(reason::OUTCOME_UNMATCHED, 1, o.intent, pos),
        }
        true
    }

    fn execution(
        &mut self,
        pos: u64,
        open: Open,
        o: &frame::Outcome,
        sqlstate: String,
        directory: &mut impl Directory,
    ) {
        let Open {
            intent,
            tail,
            stored,
            referred,
        } = open;
        if stored {
            self.batch.closed.push(pos);
        }
        let session = known(&mut self.sessions, intent.session, |k| directory.session(k));
        let statement = known(&mut self.statements, intent.shape, |k| {
            directory.statement(k)
        });
        self.lacking |= session == 0 || statement == 0;
        let facts = ExecutionFacts {
            position: if referred { pos } else { 0 },
            parent: intent.parent,
            sqlstate,
            rule: o.rule.clone(),
            xid: o.xid,
            // Only another one than the transaction itself is worth its bytes.
            subtransaction: if o.subtransaction > 1 {
                o.subtransaction
            } else {
                0
            },
            ..ExecutionFacts::default()
        };
        let mut payload = facts.encode();
        if parameter::is_tail(&tail) {
            payload.extend_from_slice(&tail);
        }
        let mut event = blank(EventKind::Execution, intent.at, payload);
        event.session = session;
        event.statement = statement;
        event.rows = o.rows;
        event.duration_us = o.duration_us;
        event.outcome = i16::from(o.outcome);
        event.flags = (intent.flags | o.flags) as i32;
        if o.xid == 0 {
            self.append(event);
            return;
        }
        self.waited += 1;
        self.waiting.entry(o.xid).or_default().push(Waiting {
            number: self.waited,
            position: pos,
            subtransaction: o.subtransaction,
            event,
        });
    }

    fn transaction(&mut self, payload: &[u8]) -> bool {
        let Some(t) = Transaction::decode(payload) else {
            return false;
        };
        self.settle(&t);
        true
    }

    /// A transaction has ended, or was prepared.
    fn settle(&mut self, t: &Transaction) {
        let waiting = self.waiting.remove(&t.xid).unwrap_or_default();
        let waited = !waiting.is_empty();
        for mut w in waiting {
            w.event.flags |= match t.keeps(w.subtransaction) {
                Some(true) => flags::COMMITTED as i32,
                Some(false) => flags::ROLLED_BACK as i32,
                None => 0,
            };
            self.append(w.event);
        }
        let known = self.unsettled.remove(&t.xid);
        if known.as_ref().is_some_and(|u| u.stored) {
            self.batch.settled.push(t.xid);
        }
        if t.fate == Fate::Prepared {
            if waited || known.is_some() {
                let prepared = Some(t.clone());
                self.unsettled.insert(
                    t.xid,
                    Unsettled {
                        prepared,
                        stored: false,
                    },
                );
            }
        } else if known.is_some() {
            let facts = TransactionFacts {
                xid: t.xid,
                committed: t.fate == Fate::Committed,
                unknown_from: t.unknown_from,
                rolled_back: t.rolled_back.clone(),
            };
            let id = self.chain.seq + 1;
            self.push(EventKind::Transaction, t.at, facts.encode());
            self.batch.transactions.push(TransactionRow { id, facts });
        }
    }

    /// What waits for the end of its transaction waits no longer.
    fn release_waiting(&mut self) {
        let mut all = Vec::new();
        for (xid, waiting) in std::mem::take(&mut self.waiting) {
            self.unsettled.entry(xid).or_insert(Unsettled {
                prepared: None,
                stored: false,
            });
            all.extend(waiting);
        }
        all.sort_unstable_by_key(|w| w.number);
        for w in all {
            self.append(w.event);
        }
    }

    fn interrupt(
        &mut self,
        which: impl Fn(&Intent) -> bool,
        sqlstate: &str,
        directory: &mut impl Directory,
    ) {
        let positions: Vec<u64> = self
            .open
            .iter()
            .filter(|(_, o)| which(&o.intent))
            .map(|(pos, _)| *pos)
            .collect();
        let interrupted = frame::Outcome {
            intent: 0,
            rows: -1,
            duration_us: -1,
            outcome: Outcome::Interrupted as u8,
            flags: 0,
            xid: 0,
            subtransaction: 0,
            sqlstate: [0; 5],
            rule: String::new(),
        };
        for pos in positions {
            if let Some(open) = self.open.remove(&pos) {
                self.execution(pos, open, &interrupted, sqlstate.to_owned(), directory);
            }
        }
    }

    fn session(&mut self, payload: &[u8], directory: &mut impl Directory) -> bool {
        let Some((key, tlv)) = keyed(payload) else {
            return false;
        };
        if SessionFacts::decode(tlv).is_err() {
            return false;
        }
        if known(&mut self.sessions, key, |k| directory.session(k)) != 0 {
            return true;
        }
        let stored = with_key(tlv.to_vec(), key);
        let Some(row) = SessionRow::project(self.chain.seq + 1, &stored) else {
            return false;
        };
        self.push(
            EventKind::Session,
            self.at.max(row.facts.backend_start),
            stored,
        );
        self.sessions.insert(key, row.id);
        self.batch.sessions.push(row);
        true
    }

    fn shape(
        &mut self,
        payload: &[u8],
        directory: &mut impl Directory,
        fingerprint: &mut impl Fingerprint,
    ) -> bool {
        let Some((key, tlv)) = keyed(payload) else {
            return false;
        };
        let Ok(mut facts) = ShapeFacts::decode(tlv) else {
            return false;
        };
        if known(&mut self.statements, key, |k| directory.statement(k)) != 0 {
            return true;
        }
        if facts.fingerprint.is_empty() && facts.full_length == 0 {
            facts.fingerprint = fingerprint.fingerprint(&facts.text);
        }
        let stored = with_key(facts.encode(), key);
        let row = StatementRow {
            id: self.chain.seq + 1,
            key,
            facts,
        };
        self.push(EventKind::Statement, self.at, stored);
        self.statements.insert(key, row.id);
        self.batch.statements.push(row);
        true
    }

    fn session_end(&mut self, payload: &[u8], directory: &mut impl Directory) -> bool {
        let Some(end) = SessionEnd::decode(payload) else {
            return false;
        };
        let Some(sqlstate) = sqlstate(end.sqlstate) else {
            return false;
        };
        self.interrupt(|i| i.backend == end.backend, &sqlstate, directory);
        true
    }

    fn boot(&mut self, payload: &[u8], directory: &mut impl Directory) -> bool {
        let Some(boot) = Boot::decode(payload) else {
            return false;
        };
        self.interrupt_all(&mut Started { directory, boot });
        self.append_connection(blank(EventKind::Boot, boot.at, Vec::new()));
        true
    }

    fn connection(&mut self, payload: &[u8]) -> bool {
        let Some(event) = connection::event(payload) else {
            return false;
        };
        self.append_connection(event);
        true
    }

    fn append_connection(&mut self, mut event: Event) {
        event.seq = self.chain.seq + 1;
        self.batch
            .connections
            .extend(ConnectionRow::project(&event));
        self.append(event);
    }

    fn backend_gap(&mut self, pos: u64, payload: &[u8]) -> bool {
        let Some((why, count)) = GapReason::decode(payload) else {
            return false;
        };
        let why = match why {
            GapReason::JournalFull => reason::JOURNAL_FULL,
            GapReason::NotDurable => reason::JOURNAL_NOT_DURABLE,
        };
        let end = pos + frame::frame_size(payload.len()) as u64;
        self.gap(why, count, pos, end);
        true
    }

    fn push(&mut self, kind: EventKind, at: i64, payload: Vec<u8>) {
        self.append(blank(kind, at, payload));
    }

    fn append(&mut self, mut event: Event) {
        let hash = self.chain.append(&mut event);
        self.at = event.at;
        self.batch.events.push((event, hash));
    }
}

fn blank(kind: EventKind, at: i64, payload: Vec<u8>) -> Event {
    Event {
        seq: 0,
        at,
        kind: kind as i16,
        session: 0,
        statement: 0,
        rows: -1,
        duration_us: -1,
        outcome: Outcome::Succeeded as i16,
        flags: 0,
        payload,
    }
}

/// The `seq` of a key, or 0.
fn known(cache: &mut HashMap<u64, i64>, key: u64, look_up: impl FnOnce(u64) -> Option<i64>) -> i64 {
    *cache
        .entry(key)
        .or_insert_with(|| look_up(key).unwrap_or(0))
}

fn keyed(payload: &[u8]) -> Option<(u64, &[u8])> {
    Some((u64le(payload, 0)?, &payload[8..]))
}

fn with_key(mut tlv: Vec<u8>, key: u64) -> Vec<u8> {
    tlv.extend_from_slice(&KEY_TAG.to_be_bytes());
    tlv.extend_from_slice(&8u32.to_be_bytes());
    tlv.extend_from_slice(&key.to_be_bytes());
    tlv
}

/// Five characters as text; zeros are an empty text.
fn sqlstate(code: [u8; 5]) -> Option<String> {
    if code == [0; 5] {
        return Some(String::new());
    }
    let valid = code
        .iter()
        .all(|c| c.is_ascii_digit() || c.is_ascii_uppercase());
    valid.then(|| code.iter().map(|c| char::from(*c)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::flags;
    use crate::ledger::event_hash;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const DB: u32 = 5;
    const START: u64 = 64;

    /// The tables of a ledger, as the recorder would store them.
    #[derive(Debug, Default)]
    struct Tables {
        events: Vec<(Event, Hash)>,
        sessions: HashMap<u64, i64>,
        statements: HashMap<u64, i64>,
        connections: Vec<ConnectionRow>,
        pending: BTreeMap<u64, OpenIntent>,
        transactions: HashMap<u64, TransactionFacts>,
        unsettled: BTreeMap<u64, Vec<u8>>,
        committed: HashSet<u64>,
        chain: Chain,
    }

    impl Directory for &Tables {
        fn session(&mut self, key: u64) -> Option<i64> {
            self.sessions.get(&key).copied()
        }
        fn statement(&mut self, key: u64) -> Option<i64> {
            self.statements.get(&key).copied()
        }
        fn committed(&mut self, xid: u64) -> Option<bool> {
            self.committed.contains(&xid).then_some(true)
        }
    }

    impl Tables {
        fn joiner(&self) -> Joiner {
            let at = self.events.last().map_or(0, |(e, _)| e.at);
            let pending = self.pending.iter().map(|(p, i)| (*p, i.clone()));
            let unsettled = self.unsettled.clone();
            let mut j = Joiner::new(DB, START, self.chain.clone(), at, pending, unsettled);
            j.remembered = 2;
            j
        }

        fn store(&mut self, j: &mut Joiner) {
            let b = j.take();
            for r in &b.sessions {
                assert_eq!(
                    self.sessions.insert(r.key, r.id),
                    None,
                    "a session is stored once"
                );
            }
            for r in &b.statements {
                assert_eq!(
                    self.statements.insert(r.key, r.id),
                    None,
                    "a statement is stored once"
                );
            }
            for pos in &b.closed {
                assert!(
                    self.pending.remove(pos).is_some(),
                    "only stored intents are removed"
                );
            }
            for (pos, i) in &b.opened {
                assert!(
                    self.pending
                        .insert(*pos, OpenIntent::decode(i).unwrap())
                        .is_none()
                );
            }
            for xid in &b.settled {
                assert!(
                    self.unsettled.remove(xid).is_some(),
                    "only stored transactions are removed"
                );
            }
            for (xid, frame) in b.unsettled {
                assert_eq!(self.unsettled.insert(xid, frame), None);
            }
            for r in b.transactions {
                let again = self.transactions.insert(r.facts.xid, r.facts);
                assert_eq!(again, None, "a transaction ends once");
            }
            self.connections.extend(b.connections);
            self.events.extend(b.events);
            self.chain = j.chain().clone();
        }
    }

    struct Digits;
    impl Fingerprint for Digits {
        fn fingerprint(&mut self, text: &str) -> String {
            format!("{:016x}", text.len())
        }
    }

    #[derive(Debug, Clone)]
    enum Item {
        Frame(u8, u32, u16, Vec<u8>),
        Damaged,
    }

    fn frame(kind: FrameKind, payload: Vec<u8>) -> Item {
        Item::Frame(kind as u8, DB, frame::VERSION, payload)
    }

    fn session(key: u64) -> Item {
        let facts = SessionFacts {
            session: key,
            session_user: format!("user{key}"),
            ..SessionFacts::default()
        };
        frame(
            FrameKind::Session,
            [&key.to_le_bytes()[..], &facts.encode()].concat(),
        )
    }

    fn shape(key: u64) -> Item {
        let facts = ShapeFacts {
            command: "SELECT".into(),
            text: "x".repeat(key as usize + 1),
            ..ShapeFacts::default()
        };
        frame(
            FrameKind::Shape,
            [&key.to_le_bytes()[..], &facts.encode()].concat(),
        )
    }

    fn intent(at: i64, backend: u64, session: u64, shape: u64) -> Item {
        let i = Intent {
            at,
            backend,
            session,
            shape,
            parent: 0,
            flags: flags::NESTED,
        };
        frame(FrameKind::Intent, i.encode().to_vec())
    }

    fn outcome(intent: u64, rows: i64) -> Item {
        written(intent, rows, 0, 0)
    }

    fn written(intent: u64, rows: i64, xid: u64, subtransaction: u32) -> Item {
        let o = frame::Outcome {
            intent,
            rows,
            duration_us: 3,
            outcome: 0,
            flags: flags::MASKED,
            xid,
            subtransaction,
            sqlstate: [0; 5],
            rule: String::new(),
        };
        frame(FrameKind::Outcome, o.encode())
    }

    fn ended(xid: u64, fate: Fate, rolled_back: &[(u32, u32)]) -> Item {
        let t = Transaction {
            at: 77,
            xid,
            fate,
            unknown_from: 0,
            rolled_back: rolled_back.to_vec(),
        };
        frame(FrameKind::Transaction, t.encode())
    }

    /// What the ledger says of the executions, by the rows that they have in the tests: whether what
    /// they wrote stays.
    fn fates(t: &Tables) -> BTreeMap<i64, Option<bool>> {
        let executions = t.events.iter().filter(|(e, _)| e.kind == 3);
        executions
            .map(|(e, _)| {
                let facts = ExecutionFacts::decode(&e.payload).unwrap();
                let bits = e.flags as u32;
                let later = t.transactions.get(&facts.xid).and_then(|f| {
                    let fate = Fate::from_u8(u8::from(f.committed)).unwrap();
                    let (unknown_from, rolled_back) = (f.unknown_from, f.rolled_back.clone());
                    let t = Transaction {
                        at: 0,
                        xid: facts.xid,
                        fate,
                        unknown_from,
                        rolled_back,
                    };
                    t.keeps(facts.subtransaction.max(1))
                });
                let fate = match (bits & flags::COMMITTED, bits & flags::ROLLED_BACK) {
                    (0, 0) => later,
                    (_, 0) => Some(true),
                    _ => Some(false),
                };
                (e.rows, fate)
            })
            .collect()
    }

    fn end(backend: u64) -> Item {
        frame(FrameKind::SessionEnd, backend.to_le_bytes().to_vec())
    }

    fn connection(at: i64, role: &str) -> Item {
        let facts = ConnectionFacts {
            role: role.to_owned(),
            ..ConnectionFacts::default()
        };
        frame(FrameKind::Connection, connection::frame(at, -1, &facts))
    }

    /// Item `i` lies at position `(i + 1) * 64`.
    fn feed(j: &mut Joiner, tables: &Tables, i: usize, item: &Item) {
        let pos = (i as u64 + 1) * 64;
        match item {
            Item::Frame(kind, dest, version, payload) => {
                let h = Header {
                    len: payload.len() as u32,
                    crc: 0,
                    kind: *kind,
                    version: *version,
                    dest: *dest,
                    pid: 1,
                };
                j.frame(pos, &h, payload, &mut &*tables, &mut Digits);
            }
            Item::Damaged => j.damaged(pos, pos + 64),
        }
    }

    fn run(items: &[Item], cuts: &HashSet<usize>, restarts: &HashSet<usize>) -> Tables {
        let mut tables = Tables::default();
        let mut j = tables.joiner();
        for (i, item) in items.iter().enumerate() {
            feed(&mut j, &tables, i, item);
            if restarts.contains(&i) {
                // What was not stored is read again by the next recorder.
                tables.store(&mut j);
                let mut dies = tables.joiner();
                for (k, item) in items.iter().enumerate().skip(i + 1).take(3) {
                    feed(&mut dies, &tables, k, item);
                }
                j = tables.joiner();
            } else if cuts.contains(&i) {
                tables.store(&mut j);
            }
        }
        tables.store(&mut j);
        tables
    }

    /// The events, less the positions: what an earlier joiner left open always has one.
    fn without_positions(t: &Tables) -> Vec<Event> {
        let events = t.events.iter().map(|(e, _)| e.clone());
        events
            .map(|mut e| {
                if e.kind == EventKind::Execution as i16 {
                    let mut facts = ExecutionFacts::decode(&e.payload).unwrap();
                    facts.position = 0;
                    e.payload = facts.encode();
                }
                e
            })
            .collect()
    }

    fn kinds(t: &Tables) -> Vec<i16> {
        t.events.iter().map(|(e, _)| e.kind).collect()
    }

    fn whole(items: &[Item]) -> Tables {
        run(items, &HashSet::new(), &HashSet::new())
    }

    fn gap_reason(e: &Event) -> String {
        GapFacts::decode(&e.payload).unwrap().reason
    }

    fn boot(at: i64, next_xid: u64) -> Item {
        let payload = Boot { at, next_xid }.encode().to_vec();
        Item::Frame(FrameKind::Boot as u8, 0, frame::VERSION, payload)
    }

    fn item() -> impl Strategy<Value = Item> {
        prop_oneof![
            2 => (0u64..6).prop_map(session),
            2 => (0u64..6).prop_map(shape),
            8 => (0i64..99, 0u64..4, 0u64..7, 0u64..7).prop_map(|(a, b, s, q)| intent(a, b, s, q)),
            8 => (1u64..40, -1i64..5).prop_map(|(n, rows)| outcome(n * 64, rows)),
            1 => (0u64..4).prop_map(end),
            1 => (0i64..99, "[a-z]{0,9}").prop_map(|(at, role)| connection(at, &role)),
            1 => (0u64..9).prop_map(|x| boot(0, x)),
            1 => Just(frame(FrameKind::Gap, 7u64.to_le_bytes().to_vec())),
            1 => Just(Item::Damaged),
            2 => (any::<u8>(), 4u32..7, 0u16..3, prop::collection::vec(any::<u8>(), 0..80))
                .prop_map(|(k, d, v, p)| Item::Frame(k, d, v, p)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn cuts_and_restarts_change_nothing(
            items in prop::collection::vec(item(), 0..60),
            cuts in prop::collection::hash_set(0usize..60, 0..20),
            restarts in prop::collection::hash_set(0usize..60, 0..20),
        ) {
            let expected = whole(&items);
            let got = run(&items, &cuts, &restarts);
            prop_assert_eq!(without_positions(&got), without_positions(&expected));
            prop_assert_eq!(&got.pending, &expected.pending);
            let projected = got.events.iter().filter_map(|(e, _)| ConnectionRow::project(e));
            prop_assert_eq!(&got.connections, &projected.collect::<Vec<_>>());
            let mut walk = Chain::default();
            for (e, h) in &got.events {
                prop_assert_eq!(walk.check(e, h), Ok(()));
                match EventKind::from_i16(e.kind) {
                    Some(EventKind::Session) => {
                        let r = SessionRow::project(e.seq, &e.payload).unwrap();
                        prop_assert_eq!(got.sessions.get(&r.key), Some(&e.seq));
                    }
                    Some(EventKind::Statement) => {
                        let r = StatementRow::project(e.seq, &e.payload).unwrap();
                        prop_assert_eq!(got.statements.get(&r.key), Some(&e.seq));
                    }
                    _ => {}
                }
            }
        }

        #[test]
        fn every_intent_is_recorded_once(mut items in prop::collection::vec(item(), 0..60)) {
            // Each has its own time.
            for (i, item) in items.iter_mut().enumerate() {
                if let Item::Frame(4, DB, 1, p) = item && p.len() >= Intent::SIZE {
                    p[..8].copy_from_slice(&(1000 + i as u64).to_le_bytes());
                }
            }
            let t = whole(&items);
            let mut seen = HashSet::new();
            for (e, _) in t.events.iter().filter(|(e, _)| e.kind == EventKind::Execution as i16) {
                prop_assert!(seen.insert(e.at));
            }
            for (i, item) in items.iter().enumerate() {
                if let Item::Frame(4, DB, 1, p) = item && p.len() >= Intent::SIZE {
                    let pos = (i as u64 + 1) * 64;
                    prop_assert!(seen.contains(&(1000 + i as i64)) ^ t.pending.contains_key(&pos));
                }
            }
        }

        /// Steps: a statement of transaction 0 to 3 in a subtransaction, or the end of one.
        #[test]
        fn the_fate_of_what_was_written_does_not_depend_on_batches(
            steps in prop::collection::vec((0u64..4, 1u32..5, 0u8..12), 0..30),
            cuts in prop::collection::hash_set(0usize..60, 0..20),
            restarts in prop::collection::hash_set(0usize..60, 0..20),
        ) {
            let mut items = Vec::new();
            let mut lap = [0u64; 4];
            for (i, (n, sub, what)) in steps.iter().enumerate() {
                let xid = 1 + n + 10 * lap[*n as usize];
                if *what < 9 {
                    items.push(intent(i as i64, 9, 0, 0));
                    items.push(written(items.len() as u64 * 64, i as i64, xid, *sub));
                } else {
                    let fate = Fate::from_u8(what - 9).unwrap();
                    items.push(ended(xid, fate, &[(*sub, sub + 1)]));
                    // A transaction ends once.
                    lap[*n as usize] += u64::from(fate != Fate::Prepared);
                }
            }
            let expected = fates(&whole(&items));
            let got = run(&items, &cuts, &restarts);
            prop_assert_eq!(fates(&got), expected);
            let mut walk = Chain::default();
            for (e, h) in &got.events {
                prop_assert_eq!(walk.check(e, h), Ok(()));
            }
        }
    }

    #[test]
    fn what_is_committed_in_its_batch_says_so_itself() {
        let t = whole(&[
            intent(1, 9, 0, 0),
            written(64, 1, 700, 1),
            intent(2, 9, 0, 0),
            written(192, 2, 700, 3),
            ended(700, Fate::Committed, &[(3, 4)]),
        ]);
        assert_eq!(kinds(&t), [3, 3]);
        assert_eq!(
            fates(&t),
            BTreeMap::from([(1, Some(true)), (2, Some(false))])
        );
        assert!(t.unsettled.is_empty());
    }

    #[test]
    fn what_ends_later_says_so_by_an_event() {
        let items = [
            intent(1, 9, 0, 0),
            written(64, 1, 700, 1),
            ended(700, Fate::RolledBack, &[]),
        ];
        let t = run(&items, &HashSet::from([1]), &HashSet::new());
        assert_eq!(kinds(&t), [3, 6]);
        assert_eq!(fates(&t), BTreeMap::from([(1, Some(false))]));
    }

    #[test]
    fn after_a_crash_the_server_knows_what_was_committed() {
        let items = [intent(1, 9, 0, 0), written(64, 1, 700, 1), boot(0, 701)];
        let mut tables = Tables {
            committed: HashSet::from([700]),
            ..Tables::default()
        };
        let mut j = tables.joiner();
        for (i, item) in items.iter().enumerate() {
            feed(&mut j, &tables, i, item);
        }
        tables.store(&mut j);
        assert_eq!(fates(&tables), BTreeMap::from([(1, Some(true))]));
    }

    #[test]
    fn an_id_that_a_crash_took_back_was_not_committed_by_who_has_it_next() {
        let items = [
            intent(1, 9, 0, 0),
            written(64, 1, 700, 1),
            boot(5, 700),
            intent(6, 9, 0, 0),
            written(4 * 64, 2, 700, 1),
        ];
        let mut tables = Tables {
            committed: HashSet::from([700]),
            ..Tables::default()
        };
        let mut j = tables.joiner();
        for (i, item) in items.iter().enumerate() {
            feed(&mut j, &tables, i, item);
        }
        j.interrupt_all(&mut &tables);
        tables.store(&mut j);
        let expected = BTreeMap::from([(1, Some(false)), (2, Some(true))]);
        assert_eq!(fates(&tables), expected);
    }

    #[test]
    fn a_prepared_transaction_is_settled_when_it_is_decided() {
        let items = [
            intent(1, 9, 0, 0),
            written(64, 1, 700, 1),
            ended(700, Fate::Prepared, &[]),
        ];
        let mut t = whole(&items);
        assert_eq!(fates(&t), BTreeMap::from([(1, None)]));
        assert_eq!(t.unsettled.len(), 1);
        let mut j = t.joiner();
        j.settle_prepared(&mut &t);
        assert!(j.take().is_empty());
        t.committed.insert(700);
        let mut j = t.joiner();
        j.settle_prepared(&mut &t);
        t.store(&mut j);
        assert_eq!(fates(&t), BTreeMap::from([(1, Some(true))]));
        assert!(t.unsettled.is_empty());
    }

    #[test]
    fn only_what_is_referred_to_has_a_position() {
        let mut child = intent(2, 9, 0, 0);
        if let Item::Frame(_, _, _, p) = &mut child {
            p[32..40].copy_from_slice(&64u64.to_le_bytes());
        }
        let t = whole(&[
            intent(1, 9, 0, 0),
            child,
            outcome(128, 1),
            outcome(64, 2),
            intent(3, 9, 0, 0),
            outcome(320, 3),
        ]);
        let positions: Vec<_> = t
            .events
            .iter()
            .map(|(e, _)| ExecutionFacts::decode(&e.payload).unwrap())
            .map(|f| (f.position, f.parent))
            .collect();
        assert_eq!(positions, [(0, 64), (64, 0), (0, 0)]);
    }

    #[test]
    fn an_execution_refers_to_its_session_and_statement() {
        let t = whole(&[session(1), shape(2), intent(17, 9, 1, 2), outcome(192, 5)]);
        assert_eq!(kinds(&t), [1, 2, 3]);
        let e = &t.events[2].0;
        assert_eq!(
            (e.session, e.statement, e.rows, e.duration_us, e.at),
            (1, 2, 5, 3, 17)
        );
        assert_eq!(e.flags as u32, flags::NESTED | flags::MASKED);
        assert_eq!(t.events[2].1, event_hash(&t.events[1].1, e));
        assert!(t.pending.is_empty());
    }

    #[test]
    fn a_repeated_session_or_shape_is_no_event() {
        let t = whole(&[session(1), shape(2), session(1), shape(2)]);
        assert_eq!(kinds(&t), [1, 2]);
    }

    #[test]
    fn lost_sessions_and_shapes_leave_a_zero() {
        let t = whole(&[intent(17, 9, 1, 2), outcome(64, 5), session(1)]);
        assert_eq!(kinds(&t), [3, 1]);
        assert_eq!((t.events[0].0.session, t.events[0].0.statement), (0, 0));
        assert_eq!(t.sessions.get(&1), Some(&2));
    }

    #[test]
    fn a_boot_interrupts_every_open_intent() {
        let t = whole(&[intent(1, 8, 0, 0), intent(2, 9, 0, 0), boot(4_000_000, 1)]);
        assert_eq!(kinds(&t), [3, 3, 5]);
        assert!(
            t.events[..2]
                .iter()
                .all(|(e, _)| e.outcome == Outcome::Interrupted as i16)
        );
        assert_eq!(t.events[2].0.at, 4_000_000);
    }

    #[test]
    fn a_backend_that_ends_interrupts_its_own_intents_only() {
        let t = whole(&[intent(1, 8, 0, 0), intent(2, 9, 0, 0), end(8)]);
        assert_eq!(kinds(&t), [3]);
        assert_eq!(t.events[0].0.at, 1);
        assert_eq!(t.pending.keys().copied().collect::<Vec<_>>(), [128]);
    }

    #[test]
    fn the_error_that_ends_a_backend_is_that_of_its_open_intents() {
        let facts = |t: &Tables| ExecutionFacts::decode(&t.events[0].0.payload).unwrap();
        let end = frame::SessionEnd {
            backend: 8,
            sqlstate: *b"57P01",
        };
        let end = frame(FrameKind::SessionEnd, end.encode().to_vec());
        assert_eq!(facts(&whole(&[intent(1, 8, 0, 0), end])).sqlstate, "57P01");
        // As frames were before they carried one.
        let older = frame(FrameKind::SessionEnd, 8u64.to_le_bytes().to_vec());
        assert_eq!(facts(&whole(&[intent(1, 8, 0, 0), older])).sqlstate, "");
    }

    #[test]
    fn a_statement_whose_commit_runs_another_is_found_by_it() {
        let mut inner = intent(2, 8, 0, 0);
        if let Item::Frame(_, _, _, payload) = &mut inner {
            payload[32..40].copy_from_slice(&64u64.to_le_bytes());
        }
        let items = [
            intent(1, 8, 0, 0),
            written(64, 1, 7, 1),
            inner,
            written(192, 1, 7, 1),
            ended(7, Fate::Committed, &[]),
        ];
        let positions: Vec<_> = whole(&items)
            .events
            .iter()
            .map(|(e, _)| ExecutionFacts::decode(&e.payload).unwrap())
            .map(|f| (f.position, f.parent))
            .collect();
        assert_eq!(positions, [(64, 0), (0, 64)]);
    }

    #[test]
    fn what_cannot_be_read_is_a_gap() {
        let mut newer = intent(1, 1, 1, 1);
        if let Item::Frame(_, _, version, _) = &mut newer {
            *version = 2;
        }
        let t = whole(&[
            Item::Damaged,
            outcome(9999, 1),
            frame(FrameKind::Gap, 12u64.to_le_bytes().to_vec()),
            frame(FrameKind::Session, vec![1, 2, 3]),
            newer,
        ]);
        assert_eq!(kinds(&t), [4, 4, 4, 4, 4]);
        let reasons: Vec<_> = t.events.iter().map(|(e, _)| gap_reason(e)).collect();
        assert_eq!(
            reasons,
            [
                "journal_damaged",
                "outcome_unmatched",
                "journal_full",
                "frame_malformed",
                "frame_malformed"
            ]
        );
        assert_eq!(
            GapFacts::decode(&t.events[2].0.payload).unwrap().statements,
            12
        );
    }

    #[test]
    fn a_statement_that_began_before_the_ledger_is_no_gap() {
        assert!(whole(&[outcome(56, 1)]).events.is_empty());
    }

    #[test]
    fn a_ledger_that_moves_ends_what_is_open_and_says_so() {
        let mut tables = Tables::default();
        let mut j = tables.joiner();
        let items = [session(1), shape(2), intent(5, 1, 1, 2)];
        for (i, item) in items.iter().enumerate() {
            feed(&mut j, &tables, i, item);
        }
        tables.store(&mut j);
        let mut j = tables.joiner();
        let facts = GapFacts {
            reason: reason::TIMELINE_CHANGED.to_owned(),
            from_position: 10_000,
            to_position: 9_000,
            ..GapFacts::default()
        };
        assert_eq!(j.moved(&facts, &mut &tables), 4);
        j.started(77);
        assert_eq!(j.start(), 9_000);
        // Its intent is of the time before.
        feed(&mut j, &tables, 3, &outcome(8_992, 1));
        tables.store(&mut j);
        assert_eq!(kinds(&tables), [1, 2, 3, 4, 5]);
        assert_eq!(tables.events[2].0.outcome, Outcome::Interrupted as i16);
        assert_eq!(gap_reason(&tables.events[3].0), reason::TIMELINE_CHANGED);
        assert_eq!(tables.connections[0].at, 77);
        assert!(tables.pending.is_empty());
    }

    #[test]
    fn connections_and_boots_are_projected() {
        let t = whole(&[connection(7, "app"), boot(0, 1), connection(9, "ana")]);
        assert_eq!(kinds(&t), [7, 5, 7]);
        let rows: Vec<_> = t.connections.iter().map(|r| (r.id, r.at)).collect();
        assert_eq!(rows, [(1, 7), (2, 0), (3, 9)]);
        assert!(t.connections[1].facts.is_none());
    }

    #[test]
    fn frames_of_other_ledgers_are_ignored() {
        let other = Item::Frame(FrameKind::Gap as u8, 6, frame::VERSION, vec![0; 8]);
        assert!(whole(&[other]).events.is_empty());
    }

    #[test]
    fn a_statement_is_stored_with_its_fingerprint_and_key() {
        let t = whole(&[shape(3)]);
        let row = StatementRow::project(1, &t.events[0].0.payload).unwrap();
        assert_eq!(row.facts.fingerprint, "0000000000000004");
        assert_eq!(row.key, 3);
    }
}
