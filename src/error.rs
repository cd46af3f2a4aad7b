//! Refusals: the only errors that pg_warden raises in a user's statement.
//!
//! Owns the SQLSTATEs of class `WA`. PostgreSQL's own error codes never come from here.

/// Why a statement is refused. Each has its SQLSTATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalCode {
    /// `WA001`: a guardrail or a mask forbids the statement.
    Blocked,
    /// `WA003`: a token or an identity is not accepted.
    Identity,
    /// `WA005`: the statement cannot be recorded, and must not run unrecorded.
    Recording,
}

impl RefusalCode {
    /// The five characters.
    pub fn sqlstate(self) -> &'static [u8; 5] {
        match self {
            Self::Blocked => b"WA001",
            Self::Identity => b"WA003",
            Self::Recording => b"WA005",
        }
    }
}

/// What is refused, by which rule, and what to do next.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub code: RefusalCode,
    /// The primary message: lower case, no full stop.
    pub message: String,
    /// A sentence, or empty.
    pub detail: String,
    /// A sentence, or empty.
    pub hint: String,
    /// The rule's name, for the record; or empty.
    pub rule: String,
}
