//! The journal's frames: what backends append and the recorder reads.
//!
//! A frame is a 32-byte header and a payload, and starts at a multiple of eight bytes. The first
//! word is the frame's own position, XORed with a secret of the journal: it is stored last, with
//! release order, so a reader that finds it finds the rest. Bytes left over from an earlier lap,
//! and bytes that a client smuggled into a statement, do not carry the right word.
//!
//! Hot payloads (intent, outcome) have fixed fields in little-endian order. Session and shape
//! payloads are `{u64le key}` followed by a TLV payload of [`crate::event`].

/// Bytes of a frame's header.
pub const HEADER: usize = 32;
/// The version of the frame format.
pub const VERSION: u16 = 1;
/// The longest payload: longer texts are cut before they get here.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Fills the end of a segment; has no payload to read.
    Pad = 0,
    /// The server started: every intent before it that has no outcome was interrupted.
    Boot = 1,
    /// Facts about a session: key and [`crate::event::SessionFacts`].
    Session = 2,
    /// Facts about a statement: key and [`crate::event::ShapeFacts`].
    Shape = 3,
    /// A statement is about to run: [`Intent`].
    Intent = 4,
    /// A statement has ended: [`Outcome`].
    Outcome = 5,
    /// A backend has ended: [`SessionEnd`]. Its open intents were interrupted.
    SessionEnd = 6,
    /// Statements went on unrecorded, or without their record on disk: u64le count, and the number of
    /// a [`GapReason`], which older frames lack. See `warden.on_journal_full = gap`.
    Gap = 7,
    /// A transaction that wrote has ended, or was prepared: [`Transaction`].
    Transaction = 8,
    /// A client connected, was refused or disconnected: see [`crate::connection::frame`].
    Connection = 9,
}

impl FrameKind {
    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::Pad,
            1 => Self::Boot,
            2 => Self::Session,
            3 => Self::Shape,
            4 => Self::Intent,
            5 => Self::Outcome,
            6 => Self::SessionEnd,
            7 => Self::Gap,
            8 => Self::Transaction,
            9 => Self::Connection,
            _ => return None,
        })
    }
}

/// Why a backend reports a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum GapReason {
    /// The journal had no room.
    JournalFull = 0,
    /// The journal could not be synced. The statements may be recorded nevertheless.
    NotDurable = 1,
}

impl GapReason {
    /// The payload of a gap frame.
    #[must_use]
    pub fn encode(self, statements: u64) -> [u8; 9] {
        let mut b = [0u8; 9];
        b[..8].copy_from_slice(&statements.to_le_bytes());
        b[8] = self as u8;
        b
    }

    /// Reads a payload; `None` if it is malformed.
    #[must_use]
    pub fn decode(b: &[u8]) -> Option<(Self, u64)> {
        let reason = match b.get(8) {
            None | Some(0) => Self::JournalFull,
            Some(1) => Self::NotDurable,
            Some(_) => return None,
        };
        Some((reason, u64le(b, 0)?))
    }
}

/// A frame's header, less its position word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload.
    pub len: u32,
    /// CRC32C over position, kind, destination and payload.
    pub crc: u32,
    /// A [`FrameKind`].
    pub kind: u8,
    /// The version of the format.
    pub version: u16,
    /// The database whose ledger this belongs to.
    pub dest: u32,
    /// The process that appended it.
    pub pid: u32,
}

impl Header {
    /// The header of a frame with this payload.
    #[must_use]
    pub fn new(pos: u64, kind: FrameKind, dest: u32, pid: u32, payload: &[u8]) -> Self {
        Self {
            len: payload.len() as u32,
            crc: crc(pos, kind as u8, dest, payload),
            kind: kind as u8,
            version: VERSION,
            dest,
            pid,
        }
    }

    /// Bytes 8 to 32 of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER - 8] {
        let mut b = [0u8; HEADER - 8];
        b[0..4].copy_from_slice(&self.len.to_le_bytes());
        b[4..8].copy_from_slice(&self.crc.to_le_bytes());
        b[8] = self.kind;
        b[10..12].copy_from_slice(&self.version.to_le_bytes());
        b[12..16].copy_from_slice(&self.dest.to_le_bytes());
        b[16..20].copy_from_slice(&self.pid.to_le_bytes());
        b
    }

    /// Reads bytes 8 to 32 of a header.
    #[must_use]
    pub fn decode(b: &[u8; HEADER - 8]) -> Self {
        let u32at = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        Self {
            len: u32at(0),
            crc: u32at(4),
            kind: b[8],
            version: u16::from_le_bytes([b[10], b[11]]),
            dest: u32at(12),
            pid: u32at(16),
        }
    }

    /// Whether the payload is what was written at this position.
    #[must_use]
    pub fn matches(&self, pos: u64, payload: &[u8]) -> bool {
        self.crc == crc(pos, self.kind, self.dest, payload)
    }
}

fn crc(pos: u64, kind: u8, dest: u32, payload: &[u8]) -> u32 {
    // A CRC differs if its seed does: what is in the seed is covered as by a hash of 32 bits.
    let head = (pos ^ u64::from(dest) << 32 ^ u64::from(kind) << 56).wrapping_mul(SPREAD);
    crc32c::crc32c_append((head >> 32) as u32, payload)
}

/// Odd, so that different heads stay different: 2^64 divided by the golden ratio.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The bytes that a frame occupies, header and padding included.
#[must_use]
pub fn frame_size(payload_len: usize) -> usize {
    (HEADER + payload_len).next_multiple_of(8)
}

/// The server has started, and recovery is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boot {
    /// When: microseconds since 2000-01-01 UTC.
    pub at: i64,
    /// The next full transaction id. This one and those after it may have been used before the start;
    /// then they were rolled back, and mean other transactions from now on.
    pub next_xid: u64,
}

impl Boot {
    /// The payload.
    #[must_use]
    pub fn encode(&self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.at.to_le_bytes());
        b[8..].copy_from_slice(&self.next_xid.to_le_bytes());
        b
    }

    /// Reads a payload; `None` if it is too short.
    #[must_use]
    pub fn decode(b: &[u8]) -> Option<Self> {
        Some(Self {
            at: u64le(b, 0)? as i64,
            next_xid: u64le(b, 8)?,
        })
    }
}

/// A statement is about to run. Its frame's position identifies the execution. A TLV payload may
/// follow: see [`crate::parameter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intent {
    /// When it started: microseconds since 2000-01-01 UTC.
    pub at: i64,
    /// The backend, as in [`crate::event::SessionFacts::session`].
    pub backend: u64,
    /// Key of the session frame in force.
    pub session: u64,
    /// Key of the shape frame.
    pub shape: u64,
    /// Position of the intent of the statement that runs this one; zero at top level.
    pub parent: u64,
    /// `flags::*` of [`crate::event`].
    pub flags: u32,
}

impl Intent {
    /// Bytes of an encoded intent.
    pub const SIZE: usize = 44;

    /// The payload.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut b = [0u8; Self::SIZE];
        b[0..8].copy_from_slice(&self.at.to_le_bytes());
        b[8..16].copy_from_slice(&self.backend.to_le_bytes());
        b[16..24].copy_from_slice(&self.session.to_le_bytes());
        b[24..32].copy_from_slice(&self.shape.to_le_bytes());
        b[32..40].copy_from_slice(&self.parent.to_le_bytes());
        b[40..44].copy_from_slice(&self.flags.to_le_bytes());
        b
    }

    /// Reads a payload; `None` if it is too short.
    #[must_use]
    pub fn decode(b: &[u8]) -> Option<Self> {
        Some(Self {
            at: u64le(b, 0)? as i64,
            backend: u64le(b, 8)?,
            session: u64le(b, 16)?,
            shape: u64le(b, 24)?,
            parent: u64le(b, 32)?,
            flags: u32le(b, 40)?,
        })
    }
}

/// A statement has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Position of the intent.
    pub intent: u64,
    /// Rows returned or affected; -1 where there is no such number.
    pub rows: i64,
    /// Microseconds from start to end.
    pub duration_us: i64,
    /// An [`crate::event::Outcome`].
    pub outcome: u8,
    /// Flags to add to those of the intent.
    pub flags: u32,
    /// The full transaction id (64 bits); 0 if the transaction had not written by then.
    pub xid: u64,
    /// The subtransaction in which it ended; 1 is the transaction itself.
    pub subtransaction: u32,
    /// Five characters, or zeros when nothing failed.
    pub sqlstate: [u8; 5],
    /// The rule that decided, or empty.
    pub rule: String,
}

impl Outcome {
    /// Bytes before the rule.
    pub const FIXED: usize = 46;

    /// The payload, as far as it has a fixed length: all of it, if there is no rule.
    #[must_use]
    pub fn encode_fixed(&self) -> [u8; Self::FIXED] {
        let mut b = [0u8; Self::FIXED];
        b[0..8].copy_from_slice(&self.intent.to_le_bytes());
        b[8..16].copy_from_slice(&self.rows.to_le_bytes());
        b[16..24].copy_from_slice(&self.duration_us.to_le_bytes());
        b[24..28].copy_from_slice(&self.flags.to_le_bytes());
        b[28..32].copy_from_slice(&self.subtransaction.to_le_bytes());
        b[32..40].copy_from_slice(&self.xid.to_le_bytes());
        b[40] = self.outcome;
        b[41..46].copy_from_slice(&self.sqlstate);
        b
    }

    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [&self.encode_fixed(), self.rule.as_bytes()].concat()
    }

    /// Reads a payload; `None` if it is malformed.
    #[must_use]
    pub fn decode(b: &[u8]) -> Option<Self> {
        let fixed = b.get(..Self::FIXED)?;
        Some(Self {
            intent: u64le(b, 0)?,
            rows: u64le(b, 8)? as i64,
            duration_us: u64le(b, 16)? as i64,
            flags: u32le(b, 24)?,
            subtransaction: u32le(b, 28)?,
            xid: u64le(b, 32)?,
            outcome: fixed[40],
            sqlstate: fixed[41..46].try_into().ok()?,
            rule: String::from_utf8(b[Self::FIXED..].to_vec()).ok()?,
        })
    }
}

/// A backend has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionEnd {
    /// The backend, as in [`Intent::backend`].
    pub backend: u64,
    /// The SQLSTATE of the FATAL error that ended it, or zeros. Older frames lack it.
    pub sqlstate: [u8; 5],
}

impl SessionEnd {
    /// The payload.
    #[must_use]
    pub fn encode(&self) -> [u8; 13] {
        let mut b = [0u8; 13];
        b[..8].copy_from_slice(&self.backend.to_le_bytes());
        b[8..].copy_from_slice(&self.sqlstate);
        b
    }

    /// Reads a payload; `None` if it is too short.
    #[must_use]
    pub fn decode(b: &[u8]) -> Option<Self> {
        Some(Self {
            backend: u64le(b, 0)?,
            sqlstate: match b.get(8..) {
                None | Some([]) => [0; 5],
                Some(rest) => rest.get(..5)?.try_into().ok()?,
            },
        })
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Fate {
    /// It was rolled back.
    RolledBack = 0,
    /// It was committed.
    Committed = 1,
    /// It was prepared: COMMIT PREPARED or ROLLBACK PREPARED will decide.
    Prepared = 2,
}

impl Fate {
    /// The fate with this number, if there is one.
    #[must_use]
    pub fn from_u8(n: u8) -> Option<Self> {
        Some(match n {
            0 => Self::RolledBack,
            1 => Self::Committed,
            2 => Self::Prepared,
            _ => return None,
        })
    }
}

/// A transaction that wrote has ended, or was prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    /// When: microseconds since 2000-01-01 UTC.
    pub at: i64,
    /// The full transaction id.
    pub xid: u64,
    /// What became of it.
    pub fate: Fate,
    /// Subtransactions from here on may have been rolled back or not; 0 if all are known.
    pub unknown_from: u32,
    /// First and last number of the subtransactions that were rolled back, ascending.
    pub rolled_back: Vec<(u32, u32)>,
}

impl Transaction {
    const FIXED: usize = 24;

    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(Self::FIXED + 8 * self.rolled_back.len());
        b.extend_from_slice(&self.at.to_le_bytes());
        b.extend_from_slice(&self.xid.to_le_bytes());
        b.extend_from_slice(&self.unknown_from.to_le_bytes());
        b.extend_from_slice(&u32::from(self.fate as u8).to_le_bytes());
        for (first, last) in &self.rolled_back {
            b.extend_from_slice(&first.to_le_bytes());
            b.extend_from_slice(&last.to_le_bytes());
        }
        b
    }

    /// Reads a payload; `None` if it is malformed.
    #[must_use]
    pub fn decode(b: &[u8]) -> Option<Self> {
        let rest = b.get(Self::FIXED..)?;
        if rest.len() % 8 != 0 {
            return None;
        }
        let ranges = rest.chunks_exact(8);
        Some(Self {
            at: u64le(b, 0)? as i64,
            xid: u64le(b, 8)?,
            unknown_from: u32le(b, 16)?,
            fate: Fate::from_u8(u8::try_from(u32le(b, 20)?).ok()?)?,
            rolled_back: ranges
                .map(|r| Some((u32le(r, 0)?, u32le(r, 4)?)))
                .collect::<Option<_>>()?,
        })
    }

    /// Whether what a subtransaction did stays; `None` where that is not known.
    #[must_use]
    pub fn keeps(&self, subtransaction: u32) -> Option<bool> {
        let lost = |(first, last): &(u32, u32)| (*first..=*last).contains(&subtransaction);
        match self.fate {
            Fate::Prepared => None,
            Fate::RolledBack => Some(false),
            Fate::Committed if self.rolled_back.iter().any(lost) => Some(false),
            Fate::Committed if self.unknown_from != 0 && subtransaction >= self.unknown_from => {
                None
            }
            Fate::Committed => Some(true),
        }
    }
}

/// A little-endian u64 at an offset.
#[must_use]
pub fn u64le(b: &[u8], at: usize) -> Option<u64> {
    b.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// A little-endian u32 at an offset.
#[must_use]
pub fn u32le(b: &[u8], at: usize) -> Option<u32> {
    b.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_outcome_survives_the_journal(
            intent: u64, rows: i64, us: i64, flags: u32, xid: u64, subtransaction: u32, rule in "[a-z_]{0,60}",
        ) {
            let o = Outcome {
                intent, rows, duration_us: us, outcome: 2, flags, xid, subtransaction, sqlstate: *b"WA001", rule,
            };
            prop_assert_eq!(Outcome::decode(&o.encode()), Some(o));
        }

        #[test]
        fn a_transaction_survives_the_journal(
            at: i64, xid: u64, fate in 0u8..3, unknown_from: u32,
            rolled_back in prop::collection::vec(any::<(u32, u32)>(), 0..5),
        ) {
            let fate = Fate::from_u8(fate).unwrap();
            let t = Transaction { at, xid, fate, unknown_from, rolled_back };
            prop_assert_eq!(Transaction::decode(&t.encode()), Some(t));
        }

        #[test]
        fn an_intent_survives_the_journal(at: i64, backend: u64, session: u64, shape: u64, parent: u64, flags: u32) {
            let i = Intent { at, backend, session, shape, parent, flags };
            prop_assert_eq!(Intent::decode(&i.encode()), Some(i));
        }

        #[test]
        fn one_flipped_bit_is_seen(payload in prop::collection::vec(any::<u8>(), 1..200), bit in 0usize..8, at: prop::sample::Index) {
            let h = Header::new(4096, FrameKind::Intent, 5, 1, &payload);
            prop_assert!(h.matches(4096, &payload));
            let mut bad = payload.clone();
            bad[at.index(payload.len())] ^= 1 << bit;
            prop_assert!(!h.matches(4096, &bad));
            prop_assert!(!h.matches(4104, &payload));
            prop_assert_eq!(Header::decode(&h.encode()), h);
        }
    }
}
