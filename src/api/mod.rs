//! SQL functions, each a line or two over a plain function.

mod journal;
mod ledger;
mod masks;
pub mod sinks;
