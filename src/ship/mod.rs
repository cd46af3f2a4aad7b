//! Delivery: sends one batch to one place, and says what came of it.
//!
//! Owns the HTTP client and the files of file sinks. Receives addresses and bodies, emits
//! [`Answer`]s. Never reads the ledger, never decides when to try again, never calls PostgreSQL:
//! its code runs inside the shipper's runtime, where an ERROR must not be raised.

pub mod file;
pub mod http;

use std::time::Duration;
use warden_core::sink::Verdict;

/// What came of sending a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What it means.
    pub verdict: Verdict,
    /// What the receiver asked for.
    pub retry_after: Option<Duration>,
    /// Why it was not delivered; empty if it was. Holds no text that the receiver chose, so that a
    /// sink is no way to read what only the server can reach.
    pub error: String,
}

impl Answer {
    /// The receiver has the batch.
    pub fn delivered() -> Self {
        Self {
            verdict: Verdict::Delivered,
            retry_after: None,
            error: String::new(),
        }
    }

    /// It may work in a moment.
    pub fn retry(error: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Retry,
            retry_after: None,
            error: error.into(),
        }
    }
}
