//! The mask functions as SQL functions.

use pgrx::prelude::*;
use warden_core::masks;

#[pg_extern(immutable, strict, parallel_safe)]
fn partial_email(value: &str) -> String {
    masks::partial_email(value)
}

#[pg_extern(immutable, strict, parallel_safe)]
fn partial_phone(value: &str) -> String {
    masks::partial_phone(value)
}

#[pg_extern(immutable, strict, parallel_safe)]
fn partial_card(value: &str) -> String {
    masks::partial_card(value)
}

#[pg_extern(immutable, strict, parallel_safe)]
fn redact(_value: &str) -> &'static str {
    masks::REDACTED
}

#[pg_extern(immutable, strict, parallel_safe)]
fn mask_null(_value: pgrx::AnyElement) -> Option<pgrx::AnyElement> {
    None
}
