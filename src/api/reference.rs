//! The type `warden.reference`. Declared in `sql/18_references.sql`.

use crate::pg::reference;
use pgrx::pg_sys::{Oid, panic::ErrorReport};
use pgrx::prelude::*;
use std::ffi::{CStr, CString};
use warden_core::reference::{Named, Reference};

/// Input: names.
#[pg_extern(sql = false, stable)]
fn reference_in(text: &CStr) -> Vec<u8> {
    match Named::parse(text.to_bytes()) {
        Some(named) => reference::resolve(named).encode(),
        None => {
            let code = PgSqlErrorCode::ERRCODE_INVALID_TEXT_REPRESENTATION;
            let what = format!(
                "invalid input syntax for type warden.reference: \"{}\"",
                text.to_string_lossy()
            );
            ErrorReport::new(code, what, pgrx::function_name!())
                .set_hint("Examples are: column public.customer.email, relation public.customer, role app.")
                .report(PgLogLevel::ERROR);
            unreachable!("ERROR does not return")
        }
    }
}

/// Output: the names as they are now.
#[pg_extern(sql = false, stable)]
fn reference_out(stored: &[u8]) -> CString {
    CString::new(printed(stored)).unwrap_or_default()
}

/// Output for clients that ask for the binary format.
#[pg_extern(sql = false, stable)]
fn reference_send(stored: &[u8]) -> Vec<u8> {
    printed(stored)
}

fn printed(stored: &[u8]) -> Vec<u8> {
    Reference::decode(stored)
        .map_or(Named::Gone, reference::names)
        .print()
}

/// A reference to a relation.
#[pg_extern(sql = false, stable)]
fn reference_to_relation(relation: Oid) -> Vec<u8> {
    Reference::Relation(relation.to_u32()).encode()
}

/// A reference to a column, by name if it does not exist.
#[pg_extern(sql = false, stable)]
fn reference_to_column(relation: Oid, column: &CStr) -> Option<Vec<u8>> {
    let column = column.to_bytes().to_vec();
    match reference::names(Reference::Relation(relation.to_u32())) {
        Named::Relation(schema, name) => {
            Some(reference::resolve(Named::Column(schema, name, column)).encode())
        }
        _ => None,
    }
}

/// A reference to a function with one argument.
#[pg_extern(sql = false, stable)]
fn reference_to_function(function: Oid) -> Option<Vec<u8>> {
    reference::of_function(function).map(|f| Reference::Named(f).encode())
}

/// A reference to a role.
#[pg_extern(sql = false, stable)]
fn reference_to_role(role: Oid) -> Vec<u8> {
    Reference::Role(role.to_u32()).encode()
}

/// The OID, of a column the relation's; NULL for what does not exist.
#[pg_extern(sql = false, stable)]
fn reference_oid(stored: &[u8]) -> Option<Oid> {
    reference::current(stored).map(|(oid, _)| Oid::from(oid))
}

/// The number of a column; NULL for what is none, or does not exist.
#[pg_extern(sql = false, stable)]
fn reference_column(stored: &[u8]) -> Option<i16> {
    reference::current(stored)?.1
}
