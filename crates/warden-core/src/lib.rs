//! The pure logic of pg_warden.
//!
//! Owns: events and their encodings, the journal's frame format, the hash chain, identity tokens,
//! mask functions, guardrail decisions and sink formats. Receives plain Rust values and returns
//! plain Rust values. Never does I/O, never reads a clock, never sees PostgreSQL.
#![forbid(unsafe_code)]

pub mod classes;
pub mod connection;
pub mod event;
pub mod exclusion;
pub mod frame;
pub mod guardrail;
pub mod identity;
pub mod join;
pub mod ledger;
pub mod masks;
pub mod notable;
pub mod parameter;
pub mod reference;
pub mod sink;
pub mod text;
pub mod tlv;
