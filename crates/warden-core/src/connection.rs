//! Connections: how a client's session begins, is refused, or ends.
//!
//! Owns: the payload of connection events and the row that projects them, what may be kept of
//! PostgreSQL's message, and how identical refusals are counted. Receives the time as a value.

use crate::event::{Event, EventKind, Outcome};
use crate::frame::u64le;
use crate::tlv::{Reader, TlvError, Writer};
use serde::Serialize;

/// Bytes of a name that are kept: clients may send any.
const NAME_LIMIT: usize = 128;
/// Bytes of a message that are kept.
const REASON_LIMIT: usize = 300;

/// What happened to a connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum ConnectionEvent {
    /// The server admitted the session.
    #[default]
    Connected = 1,
    /// The connection ended before its session was usable.
    Refused = 2,
    /// The session ended.
    Disconnected = 3,
}

impl ConnectionEvent {
    /// The name that views and sinks show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Connected => "connected",
            Self::Refused => "refused",
            Self::Disconnected => "disconnected",
        }
    }
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Ending {
    /// The client said so, or went away.
    Normal = 1,
    /// An administrator, or a shutdown, ended it.
    Terminated = 2,
    /// A FATAL error ended it.
    Fatal = 3,
}

impl Ending {
    /// The name that views and sinks show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Terminated => "terminated",
            Self::Fatal => "fatal",
        }
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum ConnectionKind {
    /// Statements.
    #[default]
    Client = 0,
    /// The replication protocol.
    Replication = 1,
}

impl ConnectionKind {
    /// The name that views and sinks show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Replication => "replication",
        }
    }
}

/// What is known about a connection. What is not known is empty or 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ConnectionFacts {
    /// What happened.
    pub event: ConnectionEvent,
    /// How the session ended, if it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ending>,
    /// Random number of the backend, as in [`crate::event::SessionFacts::session`].
    #[serde(skip)]
    pub backend: u64,
    /// Process id of the backend.
    #[serde(skip_serializing_if = "is_zero")]
    pub pid: u32,
    /// What it is for.
    pub kind: ConnectionKind,
    /// The database that was asked for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub database: String,
    /// The role that was asked for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub role: String,
    /// Client address, or empty for a Unix socket.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub client_addr: String,
    /// Client port, or 0.
    #[serde(skip_serializing_if = "is_zero")]
    pub client_port: u32,
    /// What the client calls itself.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub application_name: String,
    /// Whether TLS is in use.
    pub tls: bool,
    /// The authentication method of pg_hba.conf.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
    /// Who the method found the client to be: a certificate's or a ticket's name, for example.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub identity: String,
    /// SQLSTATE of what refused or ended it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sqlstate: String,
    /// PostgreSQL's primary message: see [`reason`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// How many identical refusals this stands for; else 1.
    pub count: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it with a reference"
)]
fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl ConnectionFacts {
    /// The TLV payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.put(1, &[self.event as u8]);
        if let Some(ended) = self.ended {
            w.put(2, &[ended as u8]);
        }
        w.put_u64(3, self.backend)
            .put_u64(4, u64::from(self.pid))
            .put(5, &[self.kind as u8])
            .put_str(6, &self.database)
            .put_str(7, &self.role)
            .put_str(8, &self.client_addr)
            .put_u64(9, u64::from(self.client_port))
            .put_str(10, &self.application_name)
            .put(11, &[u8::from(self.tls)])
            .put_str(12, &self.method)
            .put_str(13, &self.identity)
            .put_str(14, &self.sqlstate)
            .put_str(15, &self.reason)
            .put_u64(16, self.count);
        w.finish()
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn decode(payload: &[u8]) -> Result<Self, TlvError> {
        let r = Reader::parse(payload)?;
        let u32of = |tag| u32::try_from(r.u64(tag)?).map_err(|_| TlvError::Value { tag });
        Ok(Self {
            event: match r.get(1) {
                Some([1]) => ConnectionEvent::Connected,
                Some([2]) => ConnectionEvent::Refused,
                Some([3]) => ConnectionEvent::Disconnected,
                Some(_) => return Err(TlvError::Value { tag: 1 }),
                None => return Err(TlvError::Missing { tag: 1 }),
            },
            ended: match r.get(2) {
                None => None,
                Some([1]) => Some(Ending::Normal),
                Some([2]) => Some(Ending::Terminated),
                Some([3]) => Some(Ending::Fatal),
                Some(_) => return Err(TlvError::Value { tag: 2 }),
            },
            backend: r.u64(3)?,
            pid: u32of(4)?,
            kind: match r.get(5) {
                Some([1]) => ConnectionKind::Replication,
                _ => ConnectionKind::Client,
            },
            database: r.str(6)?,
            role: r.str(7)?,
            client_addr: r.str(8)?,
            client_port: u32of(9)?,
            application_name: r.str(10)?,
            tls: r.get(11) == Some(&[1]),
            method: r.str(12)?,
            identity: r.str(13)?,
            sqlstate: r.str(14)?,
            reason: r.str(15)?,
            count: r.u64(16)?,
        })
    }

    /// Cuts what a client may have made long.
    #[must_use]
    pub fn clipped(mut self) -> Self {
        for name in [
            &mut self.database,
            &mut self.role,
            &mut self.application_name,
            &mut self.identity,
        ] {
            clip(name, NAME_LIMIT);
        }
        self
    }

    /// What is the same for all refusals that are counted together.
    #[must_use]
    pub fn in_common(&self) -> Self {
        Self {
            backend: 0,
            pid: 0,
            client_port: 0,
            application_name: String::new(),
            identity: String::new(),
            count: 0,
            ..self.clone()
        }
    }

    /// The outcome of the event.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match (self.event, self.ended) {
            (ConnectionEvent::Refused, _) => Outcome::Failed,
            (_, Some(Ending::Terminated | Ending::Fatal)) => Outcome::Interrupted,
            _ => Outcome::Succeeded,
        }
    }
}

fn clip(s: &mut String, limit: usize) {
    if s.len() > limit {
        s.truncate(
            (0..=limit)
                .rev()
                .find(|i| s.is_char_boundary(*i))
                .unwrap_or(0),
        );
    }
}

/// What is kept of PostgreSQL's primary message: one line of bounded length. Messages about settings
/// in the startup packet quote their values, which may be anything; these are left out.
#[must_use]
pub fn reason(message: &str, sqlstate: &str) -> String {
    let shown = match sqlstate {
        // invalid_parameter_value, syntax_error: `invalid value for parameter "name": "value"`.
        "22023" | "42601" => message.split(": ").next().unwrap_or_default(),
        _ => message,
    };
    let mut line: String = shown
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    clip(&mut line, REASON_LIMIT);
    line
}

/// The payload of a journal frame: `{u64le at}{u64le duration_us}` and the facts.
#[must_use]
pub fn frame(at: i64, duration_us: i64, facts: &ConnectionFacts) -> Vec<u8> {
    let mut b = at.to_le_bytes().to_vec();
    b.extend_from_slice(&duration_us.to_le_bytes());
    b.extend_from_slice(&facts.encode());
    b
}

/// The event that a journal frame describes, not yet numbered; `None` if it is malformed.
#[must_use]
pub fn event(payload: &[u8]) -> Option<Event> {
    let tlv = payload.get(16..)?;
    let facts = ConnectionFacts::decode(tlv).ok()?;
    Some(Event {
        seq: 0,
        at: u64le(payload, 0)? as i64,
        kind: EventKind::Connection as i16,
        session: 0,
        statement: 0,
        rows: -1,
        duration_us: u64le(payload, 8)? as i64,
        outcome: facts.outcome() as i16,
        flags: 0,
        payload: tlv.to_vec(),
    })
}

/// A row that projects a connection event, or a boot event: it ends every session before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionRow {
    /// `seq` of the event.
    pub id: i64,
    /// When it happened.
    pub at: i64,
    /// Microseconds, or -1.
    pub duration_us: i64,
    /// What the payload says; `None` for a boot event.
    pub facts: Option<ConnectionFacts>,
}

impl ConnectionRow {
    /// The row that belongs to an event of these two kinds; `None` if its payload is malformed.
    #[must_use]
    pub fn project(e: &Event) -> Option<Self> {
        let facts = match EventKind::from_i16(e.kind)? {
            EventKind::Boot => None,
            EventKind::Connection => Some(ConnectionFacts::decode(&e.payload).ok()?),
            _ => return None,
        };
        Some(Self {
            id: e.seq,
            at: e.at,
            duration_us: e.duration_us,
            facts,
        })
    }
}

/// Identical refusals of a time window. The one that opens it is recorded by itself; those that
/// follow are counted. Times are in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    /// When it opened.
    pub since: i64,
    /// The last refusal that was counted.
    pub last: i64,
    /// Refusals that are counted and not yet recorded.
    pub count: u64,
}

impl Window {
    /// A window that a refusal opens.
    #[must_use]
    pub fn open(at: i64) -> Self {
        Self {
            since: at,
            last: at,
            count: 0,
        }
    }

    /// Whether the window is over. A clock that went back ends it too.
    #[must_use]
    pub fn over(&self, at: i64, length: i64) -> bool {
        !(0..length).contains(&at.saturating_sub(self.since))
    }

    /// Counts a refusal, if the window is not over; else it must be recorded, and so must what was
    /// counted before.
    pub fn add(&mut self, at: i64, length: i64) -> bool {
        if self.over(at, length) {
            return false;
        }
        self.count += 1;
        self.last = at;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts() -> ConnectionFacts {
        ConnectionFacts {
            event: ConnectionEvent::Disconnected,
            ended: Some(Ending::Terminated),
            backend: 7,
            pid: 42,
            kind: ConnectionKind::Replication,
            database: "shop".into(),
            role: "app".into(),
            client_addr: "10.0.0.7".into(),
            client_port: 5000,
            application_name: "psql".into(),
            tls: true,
            method: "cert".into(),
            identity: "CN=app".into(),
            sqlstate: "57P01".into(),
            reason: "terminating connection due to administrator command".into(),
            count: 1,
        }
    }

    /// A frozen fixture: if this test fails, the format has changed and needs a new version.
    #[test]
    fn the_format_is_frozen() {
        let hex: String = facts()
            .encode()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(hex, include_str!("../fixtures/connection.hex").trim());
    }

    #[test]
    fn the_event_of_a_frame_has_its_time_and_duration() {
        let e = event(&frame(17, 5, &facts())).unwrap();
        assert_eq!((e.at, e.duration_us, e.kind), (17, 5, 7));
        assert_eq!(e.outcome, Outcome::Interrupted as i16);
        let row = ConnectionRow::project(&e).unwrap();
        assert_eq!((row.at, row.duration_us), (17, 5));
        assert_eq!(row.facts, Some(facts()));
        assert_eq!(event(&frame(17, 5, &facts())[..20]), None);
    }

    #[test]
    fn what_is_in_common_says_nothing_of_one_client() {
        let common = facts().in_common();
        assert_eq!((common.pid, common.client_port, common.count), (0, 0, 0));
        assert_eq!(common.application_name, "");
        assert_eq!(common.role, "app");
    }

    #[test]
    fn a_value_of_the_startup_packet_is_not_kept() {
        let message = "invalid value for parameter \"search_path\": \"s3cret\"";
        let kept = reason(message, "22023");
        assert_eq!(kept, "invalid value for parameter \"search_path\"");
        let message = "role \"x: y\" does not exist";
        assert_eq!(reason(message, "28000"), message);
        assert_eq!(reason("a\nb", "28000"), "a b");
    }

    proptest! {
        #[test]
        fn facts_survive_their_payload(
            database in ".{0,80}", role in ".{0,80}", reason in ".{0,80}", port: u16, tls: bool,
            count: u64, ended in 0u8..4,
        ) {
            let f = ConnectionFacts {
                event: ConnectionEvent::Refused,
                ended: [None, Some(Ending::Normal), Some(Ending::Terminated), Some(Ending::Fatal)]
                    [usize::from(ended)],
                database, role, reason, client_port: port.into(), tls, count,
                ..ConnectionFacts::default()
            };
            prop_assert_eq!(ConnectionFacts::decode(&f.encode()), Ok(f));
        }

        #[test]
        fn no_input_panics(b in prop::collection::vec(any::<u8>(), 0..120), s in ".{0,400}") {
            let _ = (ConnectionFacts::decode(&b), event(&b));
            prop_assert!(reason(&s, "28000").len() <= REASON_LIMIT);
            let long = ConnectionFacts { role: s, ..ConnectionFacts::default() }.clipped();
            prop_assert!(long.role.len() <= NAME_LIMIT);
        }

        /// A refusal is recorded by itself, or counted once.
        #[test]
        fn every_refusal_is_recorded_or_counted(steps in prop::collection::vec(-5i64..40, 1..200)) {
            let (mut now, mut recorded) = (0i64, 0u64);
            let mut window: Option<Window> = None;
            for step in &steps {
                now += step;
                if window.as_mut().is_some_and(|w| w.add(now, 60)) {
                    continue;
                }
                recorded += 1 + window.map_or(0, |w| w.count);
                window = Some(Window::open(now));
            }
            recorded += window.map_or(0, |w| w.count);
            prop_assert_eq!(recorded, steps.len() as u64);
        }
    }
}
