//! What pg_warden promises, checked on a real server by real clients. One module a subject, one
//! test a promise.

mod capture;
mod completeness;
mod connections;
mod databases;
mod depth;
mod dump;
mod durability;
mod errors;
mod exactly_once;
mod exclusions;
mod fastpath;
mod guardrails;
mod identity;
mod identity_attacks;
mod journal;
mod lifecycle;
mod masking;
mod masking_attacks;
mod masking_code;
mod parameters;
mod privileges;
mod readme;
mod restores;
mod secrets;
mod shipping;
mod symbols;
mod tampering;
mod transactions;
mod withheld;
