//! SQL functions, each a line or two over a plain function.

mod journal;
mod ledger;
mod masks;
mod reference;
pub mod sinks;
