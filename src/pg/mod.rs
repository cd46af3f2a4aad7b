//! The only code that calls PostgreSQL directly, and the only unsafe code.

pub mod chain;
pub mod compat;
pub mod databases;
pub mod exclusions;
pub mod functions;
pub mod hooks;
pub mod identity;
pub mod journal;
pub mod launcher;
pub mod ledger_table;
pub mod local;
pub mod mask;
pub mod parameters;
pub mod policy;
pub mod raise;
pub mod record;
pub mod recorder;
pub mod rules;
pub mod scan;
pub mod session;
pub mod shape;
pub mod shared;
pub mod shipper;
pub mod sqltext;
pub mod startup;
pub mod worker;
