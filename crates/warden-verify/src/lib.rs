//! Verification of a shipped ledger, without a server.
//!
//! Owns: reading events back from the NDJSON that pg_warden's sinks write, and walking their chain.
//! Receives lines, in the order of delivery; at-least-once delivery may repeat some. Emits the first
//! problem, or how far the ledger is what was recorded. Never trusts a field outside of `seq` and
//! `ledger`: only those are under the hash.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::fmt;
use warden_core::event::{Event, EventKind, GapFacts};
use warden_core::ledger::{Chain, ChainError, Hash, ORIGIN, event_hash};

#[derive(Deserialize)]
struct Line {
    id: Option<String>,
    seq: i64,
    ledger: Ledger,
}

#[derive(Deserialize)]
struct Ledger {
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

/// Why a ledger is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A line is not an event.
    Unreadable(String),
    /// A line belongs to another ledger.
    OtherLedger(String),
    /// An event is missing.
    Missing(i64),
    /// An event, or what came before it, is not what was recorded.
    Changed(i64),
    /// Two lines have the same number and different content.
    Conflict(i64),
    /// The ledger does not end with the expected event.
    Head {
        /// `seq` of the last event found.
        last: i64,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(why) => write!(f, "not an event of a ledger: {why}"),
            Self::OtherLedger(id) => write!(f, "event {id} belongs to another ledger"),
            Self::Missing(seq) => write!(f, "event {seq} is missing"),
            Self::Changed(seq) => write!(f, "event {seq} is not what was recorded"),
            Self::Conflict(seq) => write!(f, "event {seq} is there twice, with different content"),
            Self::Head { last } => {
                write!(
                    f,
                    "event {last} is the last one, but does not have the expected hash"
                )
            }
        }
    }
}

/// Walks a shipped ledger line by line. Remembers 32 bytes an event, to recognise repetitions.
#[derive(Debug)]
pub struct Verifier {
    first: i64,
    /// Hash of the event before the first one, then of every event.
    hashes: Vec<Hash>,
    /// What ids start with, from which event on.
    ledgers: Vec<(i64, String)>,
    repeated: u64,
}

impl Default for Verifier {
    fn default() -> Self {
        Self::starting(1, ORIGIN)
    }
}

impl Verifier {
    /// Expects `first` as the first event; `previous` is the hash of the event before it.
    #[must_use]
    pub fn starting(first: i64, previous: Hash) -> Self {
        Self {
            first,
            hashes: vec![previous],
            ledgers: Vec::new(),
            repeated: 0,
        }
    }

    /// `seq` of the last event; one less than the first one's if there was none.
    #[must_use]
    pub fn last(&self) -> i64 {
        self.first + self.hashes.len() as i64 - 2
    }

    /// Number of different events.
    #[must_use]
    pub fn events(&self) -> usize {
        self.hashes.len() - 1
    }

    /// Number of lines that repeated an earlier one.
    #[must_use]
    pub fn repeated(&self) -> u64 {
        self.repeated
    }

    /// Hash of the last event.
    #[must_use]
    pub fn head(&self) -> &Hash {
        &self.hashes[self.hashes.len() - 1]
    }

    /// Checks the next line.
    ///
    /// # Errors
    /// The problem, if the line does not continue or repeat the ledger.
    pub fn line(&mut self, line: &[u8]) -> Result<(), Problem> {
        let line: Line =
            serde_json::from_slice(line).map_err(|e| Problem::Unreadable(e.to_string()))?;
        let (event, hash) = parse(&line)?;
        let elsewhere = self.elsewhere(&line, &event)?;
        if event.seq <= self.last() {
            return self.repetition(&event, &hash);
        }
        let mut chain = Chain {
            seq: self.last(),
            hash: *self.head(),
        };
        chain.check(&event, &hash).map_err(|e| match e {
            ChainError::Sequence { expected } => Problem::Missing(expected),
            ChainError::Hash => Problem::Changed(event.seq),
        })?;
        self.hashes.push(hash);
        self.ledgers.extend(elsewhere.map(|l| (event.seq, l)));
        Ok(())
    }

    /// Checks that the ledger ends with the event that has this hash.
    ///
    /// # Errors
    /// If it does not.
    pub fn expect_head(&self, head: &Hash) -> Result<(), Problem> {
        if self.head() == head {
            Ok(())
        } else {
            Err(Problem::Head { last: self.last() })
        }
    }

    fn repetition(&mut self, event: &Event, hash: &Hash) -> Result<(), Problem> {
        if event.seq < self.first {
            // Before the part that is verified here.
            return Ok(());
        }
        let at = (event.seq - self.first) as usize;
        let (previous, known) = (&self.hashes[at], &self.hashes[at + 1]);
        if known != hash || event_hash(previous, event) != *hash {
            return Err(Problem::Conflict(event.seq));
        }
        self.repeated += 1;
        Ok(())
    }

    /// What ids start with from this event on, if it is the first one, or says that the ledger has
    /// moved to another cluster or timeline.
    fn elsewhere(&self, line: &Line, event: &Event) -> Result<Option<String>, Problem> {
        let Some(id) = &line.id else { return Ok(None) };
        let ledger = id.rsplit_once('-').map_or("", |(ledger, _)| ledger);
        if id.strip_prefix(ledger) != Some(&format!("-{}", line.seq)) {
            return Err(Problem::Unreadable(format!(
                "id {id:?} is not that of event {}",
                line.seq
            )));
        }
        let known = self
            .ledgers
            .iter()
            .rev()
            .find(|(from, _)| *from <= line.seq);
        match known {
            Some((_, known)) if known == ledger => Ok(None),
            Some(_) if event.seq <= self.last() || !moves(event) => {
                Err(Problem::OtherLedger(id.clone()))
            }
            None if event.seq < self.first => Ok(None),
            _ => Ok(Some(ledger.to_owned())),
        }
    }
}

/// Whether an event says that the ledger goes on elsewhere.
fn moves(event: &Event) -> bool {
    event.kind == EventKind::Gap as i16
        && GapFacts::decode(&event.payload).is_ok_and(|facts| facts.system != 0)
}

fn parse(line: &Line) -> Result<(Event, Hash), Problem> {
    let bad = |what: &str| Problem::Unreadable(format!("{what} of event {}", line.seq));
    let l = &line.ledger;
    if EventKind::from_i16(l.kind).is_none() {
        return Err(bad("unknown kind"));
    }
    let event = Event {
        seq: line.seq,
        at: l.at_us,
        kind: l.kind,
        session: l.session,
        statement: l.statement,
        rows: l.rows,
        duration_us: l.duration_us,
        outcome: l.outcome,
        flags: l.flags,
        payload: STANDARD
            .decode(&l.payload)
            .map_err(|_| bad("malformed payload"))?,
    };
    Ok((
        event,
        parse_hash(&l.hash).ok_or_else(|| bad("malformed hash"))?,
    ))
}

/// A hash of 64 hexadecimal digits.
#[must_use]
pub fn parse_hash(text: &str) -> Option<Hash> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut hash = [0; 32];
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(n: i64) -> Vec<String> {
        let mut chain = Chain::default();
        (0..n)
            .map(|i| {
                let mut e = Event {
                    seq: 0,
                    at: i,
                    kind: 3,
                    session: 1,
                    statement: 2,
                    rows: i,
                    duration_us: 9,
                    outcome: 0,
                    flags: 0,
                    payload: vec![i as u8; 5],
                };
                let hash = chain.append(&mut e);
                let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
                serde_json::json!({
                    "id": format!("7000-16384-{}", e.seq), "seq": e.seq, "at": "x", "kind": "execution",
                    "ledger": {"at_us": e.at, "kind": 3, "session": 1, "statement": 2, "rows": e.rows,
                        "duration_us": 9, "outcome": 0, "flags": 0,
                        "payload": STANDARD.encode(&e.payload), "hash": hash}
                })
                .to_string()
            })
            .collect()
    }

    fn walk(v: &mut Verifier, lines: &[String]) -> Result<(), Problem> {
        lines.iter().try_for_each(|l| v.line(l.as_bytes()))
    }

    fn check(lines: &[String]) -> Result<i64, Problem> {
        let mut v = Verifier::default();
        walk(&mut v, lines).map(|()| v.last())
    }

    #[test]
    fn an_untouched_ledger_verifies() {
        assert_eq!(check(&lines(20)), Ok(20));
        assert_eq!(check(&[]), Ok(0));
    }

    #[test]
    fn repeated_deliveries_are_fine() {
        let mut all = lines(20);
        all.splice(10..10, lines(8));
        assert_eq!(check(&all), Ok(20));
    }

    #[test]
    fn a_changed_event_is_named() {
        let mut all = lines(20);
        all[6] = all[6].replace("\"rows\":6", "\"rows\":7");
        assert_eq!(check(&all), Err(Problem::Changed(7)));
    }

    #[test]
    fn a_repetition_with_other_content_is_named() {
        let mut all = lines(20);
        let forged = all[6].replace("\"rows\":6", "\"rows\":7");
        all.push(forged);
        assert_eq!(check(&all), Err(Problem::Conflict(7)));
    }

    #[test]
    fn a_missing_event_is_named() {
        let mut all = lines(20);
        all.remove(6);
        assert_eq!(check(&all), Err(Problem::Missing(7)));
        assert_eq!(check(&lines(20)[1..]), Err(Problem::Missing(1)));
    }

    #[test]
    fn events_of_another_ledger_are_refused() {
        let mut all = lines(3);
        all.extend(lines(1).iter().map(|l| l.replace("7000-16384", "7000-5")));
        assert!(matches!(check(&all), Err(Problem::OtherLedger(_))));
        let renumbered = lines(1)[0].replace("7000-16384-1", "7000-16384-2");
        assert!(matches!(check(&[renumbered]), Err(Problem::Unreadable(_))));
    }

    /// A ledger whose event `at` says that it goes on on another cluster.
    fn moved(n: i64, at: i64) -> Vec<String> {
        let mut chain = Chain::default();
        let facts = GapFacts {
            reason: "server_replaced".into(),
            system: 8000,
            ..GapFacts::default()
        };
        let all = lines(n);
        let all = all.iter().map(|l| {
            let mut v: serde_json::Value = serde_json::from_str(l).unwrap();
            let line: Line = serde_json::from_str(l).unwrap();
            let (mut e, _) = parse(&line).unwrap();
            if e.seq == at {
                (e.kind, e.payload) = (EventKind::Gap as i16, facts.encode());
            }
            let hash = chain.append(&mut e);
            let hash: String = hash.iter().map(|b| format!("{b:02x}")).collect();
            v["ledger"]["kind"] = e.kind.into();
            v["ledger"]["payload"] = STANDARD.encode(&e.payload).into();
            v["ledger"]["hash"] = hash.into();
            if e.seq >= at {
                v["id"] = format!("8000-16384-{}", e.seq).into();
            }
            v.to_string()
        });
        all.collect()
    }

    #[test]
    fn a_ledger_may_say_that_it_goes_on_on_another_cluster() {
        let mut all = moved(9, 5);
        assert_eq!(check(&all), Ok(9));
        // Repeated deliveries have the ids of before.
        all.extend(moved(9, 5));
        assert_eq!(check(&all), Ok(9));
        all[1] = all[1].replace("7000-16384", "8000-16384");
        assert!(matches!(check(&all), Err(Problem::OtherLedger(_))));
        let unsaid: Vec<_> = lines(9)
            .iter()
            .enumerate()
            .map(|(i, l)| match i {
                0..5 => l.clone(),
                _ => l.replace("7000-16384", "8000-16384"),
            })
            .collect();
        assert!(matches!(check(&unsaid), Err(Problem::OtherLedger(_))));
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for l in ["", "{}", "nonsense", "{\"seq\":1}"] {
            assert!(matches!(
                check(&[l.to_owned()]),
                Err(Problem::Unreadable(_))
            ));
        }
    }

    #[test]
    fn a_later_part_continues_from_the_hash_before_it() {
        let all = lines(20);
        let mut first = Verifier::default();
        assert_eq!(walk(&mut first, &all[..10]), Ok(()));
        let mut rest = Verifier::starting(11, *first.head());
        assert_eq!(walk(&mut rest, &all[8..]), Ok(()));
        assert_eq!((rest.events(), rest.last()), (10, 20));
        assert_eq!(rest.expect_head(rest.head()), Ok(()));
        assert_eq!(
            first.expect_head(rest.head()),
            Err(Problem::Head { last: 10 })
        );
    }
}
