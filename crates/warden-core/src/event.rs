//! Events: what the ledger holds, and the payloads that describe sessions and statements.

use crate::parameter::{self, Parameter};
use crate::tlv::{Reader, TlvError, Writer};
use serde::{Deserialize, Serialize};

/// What an event of the ledger is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i16)]
pub enum EventKind {
    /// A session's facts, referred to by later events. Payload: [`SessionFacts`].
    Session = 1,
    /// A statement's shape, referred to by later events. Payload: [`ShapeFacts`].
    Statement = 2,
    /// One execution of a statement. Payload: [`ExecutionFacts`].
    Execution = 3,
    /// Statements went on unrecorded, the journal was damaged, or the ledger goes on elsewhere.
    /// Payload: [`GapFacts`].
    Gap = 4,
    /// The server started. Payload: empty.
    Boot = 5,
    /// A transaction ended whose statements are in the ledger already. Payload:
    /// [`TransactionFacts`].
    Transaction = 6,
    /// A client connected, was refused or disconnected. Payload:
    /// [`crate::connection::ConnectionFacts`].
    Connection = 7,
}

impl EventKind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_i16(n: i16) -> Option<Self> {
        Some(match n {
            1 => Self::Session,
            2 => Self::Statement,
            3 => Self::Execution,
            4 => Self::Gap,
            5 => Self::Boot,
            6 => Self::Transaction,
            7 => Self::Connection,
            _ => return None,
        })
    }

    /// The name that views and sinks show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Session => "session",
            Self::Statement => "statement",
            Self::Execution => "execution",
            Self::Gap => "gap",
            Self::Boot => "boot",
            Self::Transaction => "transaction",
            Self::Connection => "connection",
        }
    }
}

/// How an execution ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// It completed.
    Succeeded = 0,
    /// It raised an error.
    Failed = 1,
    /// pg_warden refused it.
    Blocked = 2,
    /// The backend died, or the statement was abandoned, before it completed.
    Interrupted = 3,
}

impl Outcome {
    /// The outcome with this number, if there is one.
    #[must_use]
    pub fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::Succeeded,
            1 => Self::Failed,
            2 => Self::Blocked,
            3 => Self::Interrupted,
            _ => return None,
        })
    }

    /// The name that views and sinks show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Blocked => "blocked",
            Self::Interrupted => "interrupted",
        }
    }
}

/// Bits of an event's `flags`.
pub mod flags {
    /// The statement ran inside another one.
    pub const NESTED: u32 = 1;
    /// The statement is a utility command.
    pub const UTILITY: u32 = 2;
    /// At least one column was masked.
    pub const MASKED: u32 = 4;
    /// The statement was abandoned before its last row was fetched.
    pub const PARTIAL: u32 = 8;
    /// A background worker ran it.
    pub const BACKGROUND: u32 = 16;
    /// What the statement wrote was committed.
    pub const COMMITTED: u32 = 32;
    /// What the statement wrote was rolled back.
    pub const ROLLED_BACK: u32 = 64;
}

/// One event of the ledger. `at` is in microseconds since 2000-01-01 UTC; absent references are 0,
/// an absent number of rows or microseconds is -1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Place in the chain, from 1, without holes.
    pub seq: i64,
    /// When it happened.
    pub at: i64,
    /// An [`EventKind`].
    pub kind: i16,
    /// `seq` of the session event, or 0.
    pub session: i64,
    /// `seq` of the statement event, or 0.
    pub statement: i64,
    /// Rows returned or affected, or -1.
    pub rows: i64,
    /// Microseconds, or -1.
    pub duration_us: i64,
    /// An [`Outcome`].
    pub outcome: i16,
    /// [`flags`].
    pub flags: i32,
    /// A TLV payload.
    pub payload: Vec<u8>,
}

/// Who acts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The acting subject: a token's `sub` (or outermost `act.sub`), else the session user.
    pub subject: String,
    /// Person, service, agent or unknown.
    pub kind: ActorKind,
    /// On whose behalf the actor acts, or empty.
    pub on_behalf_of: String,
    /// Groups that the token asserts.
    pub groups: Vec<String>,
    /// How far the identity was checked.
    pub trust: Trust,
    /// The issuer of the token, or empty.
    pub issuer: String,
    /// The token's `jti`, or empty.
    pub token_id: String,
}

/// The kind of an actor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum ActorKind {
    /// Nothing says what it is.
    #[default]
    Unknown = 0,
    /// A person.
    Human = 1,
    /// A program that is not an AI agent.
    Service = 2,
    /// An AI agent.
    Agent = 3,
}

impl ActorKind {
    /// The name that views and sinks show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Human => "human",
            Self::Service => "service",
            Self::Agent => "agent",
        }
    }

    /// The kind with this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Unknown, Self::Human, Self::Service, Self::Agent]
            .into_iter()
            .find(|k| k.name() == name)
    }
}

/// How far an identity was checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Trust {
    /// Only the database role is known.
    #[default]
    Role = 0,
    /// A token whose signature was checked.
    Verified = 1,
}

impl Trust {
    /// The name that views and sinks show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Role => "role",
            Self::Verified => "verified",
        }
    }
}

/// What is the same for all statements of a session, until a role or the actor changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SessionFacts {
    /// Random number of the backend.
    pub session: u64,
    /// Process id of the backend.
    pub pid: u32,
    /// When the backend started: microseconds since 2000-01-01 UTC.
    pub backend_start: i64,
    /// Database name.
    pub database: String,
    /// Who logged in.
    pub session_user: String,
    /// Whose privileges apply.
    pub current_user: String,
    /// Client address, or empty for a Unix socket or a worker.
    pub client_addr: String,
    /// Client port, or 0.
    pub client_port: u32,
    /// What the client calls itself.
    pub application_name: String,
    /// Who acts.
    pub actor: Actor,
}

impl SessionFacts {
    /// The TLV payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.put_u64(1, self.session)
            .put_u64(2, u64::from(self.pid))
            .put_u64(3, self.backend_start as u64)
            .put_str(4, &self.database)
            .put_str(5, &self.session_user)
            .put_str(6, &self.current_user)
            .put_str(7, &self.client_addr)
            .put_u64(8, u64::from(self.client_port))
            .put_str(9, &self.application_name)
            .put_str(10, &self.actor.subject)
            .put(11, &[self.actor.kind as u8])
            .put_str(12, &self.actor.on_behalf_of)
            .put_list(13, &self.actor.groups)
            .put(14, &[self.actor.trust as u8])
            .put_str(15, &self.actor.issuer)
            .put_str(16, &self.actor.token_id);
        w.finish()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn decode(payload: &[u8]) -> Result<Self, TlvError> {
        let r = Reader::parse(payload)?;
        Ok(Self {
            session: r.u64(1)?,
            pid: r.u64(2)? as u32,
            backend_start: r.u64(3)? as i64,
            database: r.str(4)?,
            session_user: r.str(5)?,
            current_user: r.str(6)?,
            client_addr: r.str(7)?,
            client_port: r.u64(8)? as u32,
            application_name: r.str(9)?,
            actor: Actor {
                subject: r.str(10)?,
                kind: match r.get(11) {
                    Some([1]) => ActorKind::Human,
                    Some([2]) => ActorKind::Service,
                    Some([3]) => ActorKind::Agent,
                    _ => ActorKind::Unknown,
                },
                on_behalf_of: r.str(12)?,
                groups: r.strings(13)?,
                trust: match r.get(14) {
                    Some([1]) => Trust::Verified,
                    _ => Trust::Role,
                },
                issuer: r.str(15)?,
                token_id: r.str(16)?,
            },
        })
    }
}

/// How a statement uses a relation. A statement has at most one [`Access`] for a relation and kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum AccessKind {
    /// Columns are read.
    Select = 1,
    /// Columns are inserted.
    Insert = 2,
    /// Columns are updated.
    Update = 3,
    /// Rows are deleted.
    Delete = 4,
    /// The relation is truncated.
    Truncate = 5,
    /// The relation's definition changes.
    Ddl = 6,
    /// The relation is looked after or locked: what privilege MAINTAIN is for.
    Maintain = 7,
}

impl AccessKind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            1 => Self::Select,
            2 => Self::Insert,
            3 => Self::Update,
            4 => Self::Delete,
            5 => Self::Truncate,
            6 => Self::Ddl,
            7 => Self::Maintain,
            _ => return None,
        })
    }
}

/// One relation that a statement touches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Access {
    /// How.
    pub kind: AccessKind,
    /// The relation's OID, or 0 if it did not exist yet.
    pub oid: u32,
    /// Schema, or empty if not resolved.
    pub schema: String,
    /// Relation name.
    pub relation: String,
    /// Columns; empty where the access is not by column.
    pub columns: Vec<String>,
}

/// One column that was masked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MaskedColumn {
    /// `schema.relation`.
    pub relation: String,
    /// Column name.
    pub column: String,
    /// The mask function, `schema.name`.
    pub function: String,
}

/// What is the same for all executions of a statement.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ShapeFacts {
    /// Command tag: `SELECT`, `DROP TABLE`, …
    pub command: String,
    /// Normalised text: literals are `$n`.
    pub text: String,
    /// Bytes of the text before it was cut; 0 if it was not.
    pub full_length: u64,
    /// SHA-256 of the whole normalised text, if it was cut; else empty.
    pub digest: Vec<u8>,
    /// pg_query's fingerprint, 16 hexadecimal digits; empty in the journal, and where the text
    /// cannot be parsed.
    pub fingerprint: String,
    /// What is touched.
    pub accesses: Vec<Access>,
    /// What is masked.
    pub masked: Vec<MaskedColumn>,
    /// Functions that are called by name, `schema.name`: users', and those of [`crate::notable`].
    pub functions: Vec<String>,
}

impl ShapeFacts {
    /// The TLV payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.put_str(1, &self.command)
            .put_str(2, &self.text)
            .put_u64(3, self.full_length);
        if !self.digest.is_empty() {
            w.put(4, &self.digest);
        }
        w.put_str(5, &self.fingerprint)
            .put_list(6, self.accesses.iter().map(encode_access))
            .put_list(7, self.masked.iter().map(encode_masked))
            .put_list(8, &self.functions);
        w.finish()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn decode(payload: &[u8]) -> Result<Self, TlvError> {
        let r = Reader::parse(payload)?;
        Ok(Self {
            command: r.str(1)?,
            text: r.str(2)?,
            full_length: r.u64(3)?,
            digest: r.get(4).unwrap_or_default().to_vec(),
            fingerprint: r.str(5)?,
            accesses: r
                .list(6)?
                .into_iter()
                .map(decode_access)
                .collect::<Result<_, _>>()?,
            masked: r
                .list(7)?
                .into_iter()
                .map(decode_masked)
                .collect::<Result<_, _>>()?,
            functions: r.strings(8)?,
        })
    }
}

fn encode_access(a: &Access) -> Vec<u8> {
    let mut w = Writer::new();
    w.put(1, &[a.kind as u8])
        .put_u64(2, u64::from(a.oid))
        .put_str(3, &a.schema)
        .put_str(4, &a.relation)
        .put_list(5, &a.columns);
    w.finish()
}

fn decode_access(b: &[u8]) -> Result<Access, TlvError> {
    let r = Reader::parse(b)?;
    let kind = match r.get(1) {
        Some([n]) => AccessKind::from_u8(*n).ok_or(TlvError::Value { tag: 1 })?,
        Some(_) => return Err(TlvError::Value { tag: 1 }),
        None => return Err(TlvError::Missing { tag: 1 }),
    };
    Ok(Access {
        kind,
        oid: r.u64(2)? as u32,
        schema: r.str(3)?,
        relation: r.str(4)?,
        columns: r.strings(5)?,
    })
}

fn encode_masked(m: &MaskedColumn) -> Vec<u8> {
    let mut w = Writer::new();
    w.put_str(1, &m.relation)
        .put_str(2, &m.column)
        .put_str(3, &m.function);
    w.finish()
}

fn decode_masked(b: &[u8]) -> Result<MaskedColumn, TlvError> {
    let r = Reader::parse(b)?;
    Ok(MaskedColumn {
        relation: r.str(1)?,
        column: r.str(2)?,
        function: r.str(3)?,
    })
}

/// What one execution adds to its shape.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ExecutionFacts {
    /// Journal position of its intent, by which the statements that it ran refer to it; 0 if none
    /// does.
    pub position: u64,
    /// Position of the statement that ran it, or 0.
    pub parent: u64,
    /// SQLSTATE, or empty.
    pub sqlstate: String,
    /// The rule that refused it, or empty.
    pub rule: String,
    /// The full transaction id, or 0 if its transaction had written nothing when it ended.
    pub xid: u64,
    /// The subtransaction, or 0 for the transaction itself.
    pub subtransaction: u32,
    /// Its literals and bind parameters, as `warden.record_parameters` says.
    pub parameters: Vec<Parameter>,
}

impl ExecutionFacts {
    /// The TLV payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.put_u64(1, self.position)
            .put_u64(2, self.parent)
            .put_str(3, &self.sqlstate)
            .put_str(4, &self.rule)
            .put_u64(5, self.xid)
            .put_u64(6, u64::from(self.subtransaction));
        parameter::put(&mut w, &self.parameters);
        w.finish()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn decode(payload: &[u8]) -> Result<Self, TlvError> {
        let r = Reader::parse(payload)?;
        Ok(Self {
            position: r.u64(1)?,
            parent: r.u64(2)?,
            sqlstate: r.str(3)?,
            rule: r.str(4)?,
            xid: r.u64(5)?,
            subtransaction: r.u64(6)? as u32,
            parameters: parameter::get(&r).ok_or(TlvError::Value {
                tag: parameter::TAG,
            })?,
        })
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TransactionFacts {
    /// The full transaction id.
    pub xid: u64,
    /// Whether it was committed, not rolled back.
    pub committed: bool,
    /// Subtransactions from here on may have been rolled back or not; 0 if all are known.
    pub unknown_from: u32,
    /// First and last number of the subtransactions that were rolled back.
    pub rolled_back: Vec<(u32, u32)>,
}

impl TransactionFacts {
    /// The TLV payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let pair = |(a, b): &(u32, u32)| [a.to_be_bytes(), b.to_be_bytes()].concat();
        let mut w = Writer::new();
        w.put_u64(1, self.xid)
            .put(2, &[u8::from(self.committed)])
            .put_u64(3, u64::from(self.unknown_from))
            .put_list(4, self.rolled_back.iter().map(pair));
        w.finish()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn decode(payload: &[u8]) -> Result<Self, TlvError> {
        let r = Reader::parse(payload)?;
        let pair = |b: &[u8]| {
            let n = u64::from_be_bytes(b.try_into().map_err(|_| TlvError::Value { tag: 4 })?);
            Ok(((n >> 32) as u32, n as u32))
        };
        Ok(Self {
            xid: r.u64(1)?,
            committed: match r.get(2) {
                Some([0]) => false,
                Some([1]) => true,
                Some(_) => return Err(TlvError::Value { tag: 2 }),
                None => return Err(TlvError::Missing { tag: 2 }),
            },
            unknown_from: r.u64(3)? as u32,
            rolled_back: r.list(4)?.into_iter().map(pair).collect::<Result<_, _>>()?,
        })
    }
}

/// What is missing, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GapFacts {
    /// One of [`crate::join::reason`].
    pub reason: String,
    /// Statements lost, if known.
    pub statements: u64,
    /// First journal position concerned.
    pub from_position: u64,
    /// First journal position after it.
    pub to_position: u64,
    /// Where the ledger goes on, if it has moved: the cluster's system identifier.
    #[serde(skip_serializing_if = "is_zero")]
    pub system: u64,
    /// The timeline.
    #[serde(skip_serializing_if = "is_zero")]
    pub timeline: u64,
    /// The server's version, as `server_version_num` has it.
    #[serde(skip_serializing_if = "is_zero")]
    pub server_version: u64,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl GapFacts {
    /// The TLV payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.put_str(1, &self.reason)
            .put_u64(2, self.statements)
            .put_u64(3, self.from_position)
            .put_u64(4, self.to_position)
            .put_u64(5, self.system)
            .put_u64(6, self.timeline)
            .put_u64(7, self.server_version);
        w.finish()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn decode(payload: &[u8]) -> Result<Self, TlvError> {
        let r = Reader::parse(payload)?;
        Ok(Self {
            reason: r.str(1)?,
            statements: r.u64(2)?,
            from_position: r.u64(3)?,
            to_position: r.u64(4)?,
            system: r.u64(5)?,
            timeline: r.u64(6)?,
            server_version: r.u64(7)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_survives_its_payload_and_one_of_before_moves_is_read() {
        let moved = GapFacts {
            reason: "server_replaced".into(),
            statements: 1,
            from_position: 2,
            to_position: 3,
            system: u64::MAX,
            timeline: 4,
            server_version: 180_006,
        };
        assert_eq!(GapFacts::decode(&moved.encode()), Ok(moved));
        let mut w = Writer::new();
        w.put_str(1, "journal_full")
            .put_u64(2, 9)
            .put_u64(3, 7)
            .put_u64(4, 8);
        let old = GapFacts::decode(&w.finish()).unwrap();
        let json = serde_json::to_string(&old).unwrap();
        assert_eq!(
            json,
            r#"{"reason":"journal_full","statements":9,"from_position":7,"to_position":8}"#
        );
    }

    #[test]
    fn a_session_survives_its_payload() {
        let s = SessionFacts {
            session: 7,
            pid: 42,
            backend_start: 99,
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
                groups: vec!["support".into(), "eu".into()],
                trust: Trust::Verified,
                issuer: "https://idp.example".into(),
                token_id: "t1".into(),
            },
        };
        assert_eq!(SessionFacts::decode(&s.encode()), Ok(s));
    }

    #[test]
    fn a_shape_survives_its_payload() {
        let s = ShapeFacts {
            command: "SELECT".into(),
            text: "SELECT email FROM customer WHERE id = $1".into(),
            accesses: vec![Access {
                kind: AccessKind::Select,
                oid: 16400,
                schema: "public".into(),
                relation: "customer".into(),
                columns: vec!["email".into(), "id".into()],
            }],
            masked: vec![MaskedColumn {
                relation: "public.customer".into(),
                column: "email".into(),
                function: "warden.partial_email".into(),
            }],
            functions: vec!["public.f".into()],
            ..ShapeFacts::default()
        };
        assert_eq!(ShapeFacts::decode(&s.encode()), Ok(s));
    }
}
