//! Looking up what the configuration refers to, in the catalogs of this database.
//!
//! Owns the way between names and OIDs; `warden_core::reference` owns their forms. Names are looked
//! up in the schema that they say, and never along a search path. What does not exist is no error here:
//! the caller decides what a policy for it means.

use crate::pg::policy;
use pgrx::pg_sys::{self, Oid};
use std::ffi::{CStr, CString, c_char, c_int};
use warden_core::reference::{Named, Reference};

/// Stands for an object that does not exist, in lists where an empty list means everything.
pub const NOBODY: u32 = u32::MAX;

/// A column that the configuration refers to.
pub enum Column {
    Found(Oid, i16),
    /// The relation has no such column: what was to be done with it cannot be done.
    Missing(Oid, Named),
    /// There is no such relation.
    Nowhere,
}

/// Looks up a stored reference to a column.
pub fn column(stored: &[u8]) -> Column {
    match Reference::decode(stored) {
        Some(Reference::Column(relation, number)) => Column::Found(Oid::from(relation), number),
        Some(Reference::Named(named @ Named::Column(..))) => {
            let Named::Column(schema, name, column) = &named else {
                return Column::Nowhere;
            };
            policy::note_unresolved();
            match relation_named(schema, name) {
                None => Column::Nowhere,
                Some(relation) => match attribute_named(relation, column) {
                    Some(number) => Column::Found(relation, number),
                    None => Column::Missing(relation, named),
                },
            }
        }
        _ => Column::Nowhere,
    }
}

/// Looks up a stored reference to a function.
pub fn function(stored: &[u8]) -> Option<Oid> {
    let Some(Reference::Named(Named::Function(schema, name, type_schema, type_name))) =
        Reference::decode(stored)
    else {
        return None;
    };
    let argument = in_schema(
        pg_sys::SysCacheIdentifier::TYPENAMENSP as c_int,
        &type_name,
        None,
        &type_schema,
    )?;
    let found = in_schema(
        pg_sys::SysCacheIdentifier::PROCNAMEARGSNSP as c_int,
        &name,
        Some(argument),
        &schema,
    );
    if found.is_none() {
        policy::note_unresolved();
    }
    found
}

/// The OID of the relation or role of a stored reference, or [`NOBODY`].
pub fn oid(stored: &[u8]) -> u32 {
    let found = match Reference::decode(stored) {
        Some(Reference::Relation(oid) | Reference::Role(oid)) => return oid,
        Some(Reference::Named(Named::Relation(schema, name))) => relation_named(&schema, &name),
        Some(Reference::Named(Named::Role(name))) => role_named(&name),
        _ => return NOBODY,
    };
    policy::note_unresolved();
    found.map_or(NOBODY, |oid| oid.to_u32())
}

/// The OID of what a stored reference is to, and the number of a column; `None` if it does not exist.
pub fn current(stored: &[u8]) -> Option<(u32, Option<i16>)> {
    let named = names(Reference::decode(stored)?);
    if let Named::Function(..) = named {
        return function(stored).map(|f| (f.to_u32(), None));
    }
    match resolve(named) {
        Reference::Relation(oid) | Reference::Role(oid) => Some((oid, None)),
        Reference::Column(oid, number) => Some((oid, Some(number))),
        Reference::Named(_) => None,
    }
}

/// A reference to what exists; by name, to what does not.
pub fn resolve(named: Named) -> Reference {
    let found = match &named {
        Named::Relation(schema, name) => {
            relation_named(schema, name).map(|r| Reference::Relation(r.to_u32()))
        }
        Named::Column(schema, name, column) => relation_named(schema, name).and_then(|r| {
            attribute_named(r, column).map(|number| Reference::Column(r.to_u32(), number))
        }),
        Named::Role(name) => role_named(name).map(|r| Reference::Role(r.to_u32())),
        Named::Function(..) | Named::Gone => None,
    };
    found.unwrap_or(Reference::Named(named))
}

/// The names of a reference, as they are now.
pub fn names(reference: Reference) -> Named {
    let found = match reference {
        Reference::Relation(oid) => relation_names(oid).map(|(s, n)| Named::Relation(s, n)),
        Reference::Column(oid, number) => relation_names(oid).and_then(|(schema, name)| {
            // SAFETY: a catalog look-up in a transaction; the name is copied.
            let column = unsafe { copied(pg_sys::get_attname(Oid::from(oid), number, true)) };
            column
                .filter(|c| !c.starts_with(b"........pg.dropped."))
                .map(|column| Named::Column(schema, name, column))
        }),
        // SAFETY: a catalog look-up in a transaction; the name is copied.
        Reference::Role(oid) => unsafe {
            copied(pg_sys::GetUserNameFromId(Oid::from(oid), true)).map(Named::Role)
        },
        Reference::Named(named) => Some(named),
    };
    found.unwrap_or(Named::Gone)
}

/// A reference to a function with one argument.
pub fn of_function(function: Oid) -> Option<Named> {
    // SAFETY: catalog look-ups in a transaction; what is found is copied or released.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::PROCOID as c_int,
            pg_sys::Datum::from(function),
        );
        if tuple.is_null() {
            return None;
        }
        let f = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>();
        let schema = (*f).pronamespace;
        let name = copied((*f).proname.data.as_ptr());
        let argument = ((*f).pronargs == 1).then(|| *(*f).proargtypes.values.as_ptr());
        pg_sys::ReleaseSysCache(tuple);
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::TYPEOID as c_int,
            pg_sys::Datum::from(argument?),
        );
        if tuple.is_null() {
            return None;
        }
        let t = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_type>();
        let type_schema = (*t).typnamespace;
        let type_name = copied((*t).typname.data.as_ptr());
        pg_sys::ReleaseSysCache(tuple);
        Some(Named::Function(
            copied(pg_sys::get_namespace_name(schema))?,
            name?,
            copied(pg_sys::get_namespace_name(type_schema))?,
            type_name?,
        ))
    }
}

fn relation_names(oid: u32) -> Option<(Vec<u8>, Vec<u8>)> {
    let oid = Oid::from(oid);
    // SAFETY: catalog look-ups in a transaction; the names are copied.
    unsafe {
        let name = copied(pg_sys::get_rel_name(oid))?;
        let schema = copied(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(oid)))?;
        Some((schema, name))
    }
}

fn relation_named(schema: &[u8], name: &[u8]) -> Option<Oid> {
    let name = CString::new(name).ok()?;
    let schema = schema_named(schema)?;
    // SAFETY: a catalog look-up in a transaction.
    existing(unsafe { pg_sys::get_relname_relid(name.as_ptr(), schema) })
}

fn attribute_named(relation: Oid, name: &[u8]) -> Option<i16> {
    let name = CString::new(name).ok()?;
    // SAFETY: a catalog look-up in a transaction; dropped columns are not found by name.
    let number = unsafe { pg_sys::get_attnum(relation, name.as_ptr()) };
    (number > 0).then_some(number)
}

fn role_named(name: &[u8]) -> Option<Oid> {
    let name = CString::new(name).ok()?;
    // SAFETY: a catalog look-up in a transaction.
    existing(unsafe { pg_sys::get_role_oid(name.as_ptr(), true) })
}

fn schema_named(name: &[u8]) -> Option<Oid> {
    let name = CString::new(name).ok()?;
    // SAFETY: a catalog look-up in a transaction.
    existing(unsafe { pg_sys::get_namespace_oid(name.as_ptr(), true) })
}

/// The OID in a cache whose keys are a name, perhaps the types of arguments, and a schema.
fn in_schema(cache: c_int, name: &[u8], argument: Option<Oid>, schema: &[u8]) -> Option<Oid> {
    let name = CString::new(name).ok()?;
    let schema = pg_sys::Datum::from(schema_named(schema)?);
    let none = pg_sys::Datum::from(0);
    let key = pg_sys::Datum::from(name.as_ptr());
    // SAFETY: a catalog look-up in a transaction. In both caches, the first column is the OID.
    existing(unsafe {
        match argument {
            Some(argument) => {
                let arguments = pg_sys::Datum::from(pg_sys::buildoidvector(&argument, 1));
                pg_sys::GetSysCacheOid(cache, 1, key, arguments, schema, none)
            }
            None => pg_sys::GetSysCacheOid(cache, 1, key, schema, none, none),
        }
    })
}

fn existing(oid: Oid) -> Option<Oid> {
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// # Safety
/// `name` is null or NUL-terminated.
unsafe fn copied(name: *const c_char) -> Option<Vec<u8>> {
    if name.is_null() {
        return None;
    }
    // SAFETY: see above.
    Some(unsafe { CStr::from_ptr(name) }.to_bytes().to_vec())
}
