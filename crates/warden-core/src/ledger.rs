//! The hash chain over the ledger's events.
//!
//! `hash = SHA-256(0x00 || "pg_warden/event/v1\n" || previous hash || columns || payload)`, where the
//! columns are `seq at kind session statement rows duration_us outcome flags`, each big-endian in
//! its own width (8 8 2 8 8 8 8 2 4 bytes). The hash before the first event is 32 zero bytes. The
//! leading 0x00 makes the hash an RFC 6962 Merkle leaf as well.

use crate::event::Event;
use sha2::{Digest, Sha256};

/// A SHA-256 digest.
pub type Hash = [u8; 32];

/// The hash before the first event of a ledger.
pub const ORIGIN: Hash = [0; 32];

/// The hash of an event that follows the event with the hash `previous`.
#[must_use]
pub fn event_hash(previous: &Hash, e: &Event) -> Hash {
    let mut head = [0u8; 1 + 19 + 32 + 56];
    head[1..20].copy_from_slice(b"pg_warden/event/v1\n");
    head[20..52].copy_from_slice(previous);
    head[52..60].copy_from_slice(&e.seq.to_be_bytes());
    head[60..68].copy_from_slice(&e.at.to_be_bytes());
    head[68..70].copy_from_slice(&e.kind.to_be_bytes());
    head[70..78].copy_from_slice(&e.session.to_be_bytes());
    head[78..86].copy_from_slice(&e.statement.to_be_bytes());
    head[86..94].copy_from_slice(&e.rows.to_be_bytes());
    head[94..102].copy_from_slice(&e.duration_us.to_be_bytes());
    head[102..104].copy_from_slice(&e.outcome.to_be_bytes());
    head[104..108].copy_from_slice(&e.flags.to_be_bytes());
    let mut h = Sha256::new();
    h.update(head);
    h.update(&e.payload);
    h.finalize().into()
}

/// Why an event does not continue the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChainError {
    /// An event is missing, or there twice: this `seq` was expected.
    Sequence {
        /// The `seq` that should have come.
        expected: i64,
    },
    /// The event, or its predecessor, is not what was recorded.
    Hash,
}

/// Walks a chain, one event after the other.
#[derive(Debug, Clone)]
pub struct Chain {
    /// `seq` of the last event; 0 before the first one.
    pub seq: i64,
    /// Hash of the last event.
    pub hash: Hash,
}

impl Default for Chain {
    fn default() -> Self {
        Self {
            seq: 0,
            hash: ORIGIN,
        }
    }
}

impl Chain {
    /// Appends an event: gives it its `seq`, and returns its hash.
    pub fn append(&mut self, e: &mut Event) -> Hash {
        self.seq += 1;
        e.seq = self.seq;
        self.hash = event_hash(&self.hash, e);
        self.hash
    }

    /// Checks the next event of a recorded chain.
    ///
    /// # Errors
    /// If it is not the next one, or not what was recorded.
    pub fn check(&mut self, e: &Event, stored: &[u8]) -> Result<(), ChainError> {
        if e.seq != self.seq + 1 {
            return Err(ChainError::Sequence {
                expected: self.seq + 1,
            });
        }
        let hash = event_hash(&self.hash, e);
        if hash[..] != *stored {
            return Err(ChainError::Hash);
        }
        self.seq = e.seq;
        self.hash = hash;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at: i64) -> Event {
        Event {
            seq: 0,
            at,
            kind: 3,
            session: 1,
            statement: 2,
            rows: 5,
            duration_us: 17,
            outcome: 0,
            flags: 0,
            payload: vec![1, 2, 3],
        }
    }

    /// A frozen fixture: if this test fails, the format has changed and needs a new version.
    #[test]
    fn the_format_is_frozen() {
        let mut chain = Chain::default();
        let hash = chain.append(&mut event(1));
        let hex: String = hash.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "f2bfc2a23e7623a4f479f0e0c81be2b027db59abf4a16b39fae67b0f0dba7b66"
        );
    }

    #[test]
    fn a_changed_event_is_named() {
        let mut chain = Chain::default();
        let mut events: Vec<(Event, Hash)> = Vec::new();
        for at in 0..5 {
            let mut e = event(at);
            let h = chain.append(&mut e);
            events.push((e, h));
        }
        events[2].0.rows = 6;
        let mut walk = Chain::default();
        let bad = events.iter().position(|(e, h)| walk.check(e, h).is_err());
        assert_eq!(bad, Some(2));
    }

    #[test]
    fn a_missing_event_is_named() {
        let mut chain = Chain::default();
        let (mut a, mut b) = (event(1), event(2));
        chain.append(&mut a);
        let h = chain.append(&mut b);
        assert_eq!(
            Chain::default().check(&b, &h),
            Err(ChainError::Sequence { expected: 1 })
        );
    }
}
