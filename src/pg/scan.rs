//! Reading our configuration tables without SPI, whoever the current user is.
//!
//! A scan uses a fresh catalog snapshot, so that a REPEATABLE READ transaction sees the policies that
//! are in force and not those of its own past (trap T11).

use crate::pg::session::text;
use crate::pg::{policy, reference};
use pgrx::pg_sys;
use pgrx::{FromDatum, datum::Array};
use std::ffi::{CString, c_int};

/// A row of a table.
pub struct Row {
    names: Vec<String>,
    values: Vec<Option<pg_sys::Datum>>,
}

impl Row {
    fn datum(&self, column: &str) -> Option<pg_sys::Datum> {
        self.names
            .iter()
            .position(|n| n == column)
            .and_then(|i| self.values[i])
    }

    fn value<T: FromDatum>(&self, column: &str) -> Option<T> {
        // SAFETY: the caller asks for the column's own type; the tuple is alive during the scan.
        self.datum(column)
            .and_then(|d| unsafe { T::from_datum(d, false) })
    }

    pub fn text(&self, column: &str) -> Option<String> {
        self.value(column)
    }

    /// A value of type `name`.
    pub fn name(&self, column: &str) -> Option<String> {
        // SAFETY: a NameData is NUL-terminated; the tuple is alive during the scan.
        self.datum(column)
            .map(|d| unsafe { text(d.cast_mut_ptr()) })
    }

    pub fn bool(&self, column: &str) -> Option<bool> {
        self.value(column)
    }

    pub fn oid(&self, column: &str) -> Option<pg_sys::Oid> {
        self.value(column)
    }

    pub fn i32(&self, column: &str) -> Option<i32> {
        self.value(column)
    }

    pub fn texts(&self, column: &str) -> Option<Vec<String>> {
        let array: Array<'_, String> = self.value(column)?;
        Some(array.iter().flatten().collect())
    }

    /// A value of type `warden.reference`, as stored.
    pub fn reference(&self, column: &str) -> Option<Vec<u8>> {
        self.value(column)
    }

    /// The OIDs of an array of references; [`reference::NOBODY`] for what does not exist.
    pub fn oids(&self, column: &str) -> Option<Vec<u32>> {
        let array: Array<'_, &[u8]> = self.value(column)?;
        Some(array.iter().flatten().map(reference::oid).collect())
    }
}

/// A table of the schema `warden`; `None` where the extension is not installed.
pub fn warden_table(name: &str) -> Option<pg_sys::Oid> {
    let schema = policy::schema();
    if schema == pg_sys::InvalidOid {
        return None;
    }
    let name = CString::new(name).ok()?;
    // SAFETY: a catalog look-up in a transaction.
    let oid = unsafe { pg_sys::get_relname_relid(name.as_ptr(), schema) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// Hands every row of a table to `f`.
pub fn scan_table(relid: pg_sys::Oid, f: impl FnMut(&Row)) {
    scan(relid, None, f);
}

/// Hands the rows of a catalog to `f` whose column number `attribute`, the first of the index
/// `index`, is `value`.
pub fn scan_by_oid(
    relid: pg_sys::Oid,
    index: pg_sys::Oid,
    attribute: i16,
    value: pg_sys::Oid,
    f: impl FnMut(&Row),
) {
    scan(relid, Some((index, attribute, value)), f);
}

fn scan(relid: pg_sys::Oid, by: Option<(pg_sys::Oid, i16, pg_sys::Oid)>, mut f: impl FnMut(&Row)) {
    // SAFETY: in a transaction; what is opened is closed. An error on the way is PostgreSQL's, and
    // its resource owner closes what we could not.
    unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let rel = pg_sys::table_open(relid, lock);
        let desc = (*rel).rd_att;
        let natts = (*desc).natts as usize;
        let names: Vec<String> = (0..natts)
            .map(|i| text((*attribute(desc, i)).attname.data.as_ptr()))
            .collect();
        let mut key = pg_sys::ScanKeyData::default();
        if let Some((_, number, value)) = by {
            pg_sys::ScanKeyInit(
                &mut key,
                number,
                pg_sys::BTEqualStrategyNumber as _,
                pg_sys::F_OIDEQ.into(),
                pg_sys::Datum::from(value),
            );
        }
        let scan = pg_sys::systable_beginscan(
            rel,
            by.map_or(pg_sys::InvalidOid, |(index, _, _)| index),
            by.is_some(),
            std::ptr::null_mut(),
            c_int::from(by.is_some()),
            &mut key,
        );
        loop {
            let tuple = pg_sys::systable_getnext(scan);
            if tuple.is_null() {
                break;
            }
            let mut values = vec![pg_sys::Datum::from(0); natts];
            let mut nulls = vec![false; natts];
            pg_sys::heap_deform_tuple(tuple, desc, values.as_mut_ptr(), nulls.as_mut_ptr());
            let values = values
                .into_iter()
                .zip(nulls)
                .map(|(v, null)| (!null).then_some(v))
                .collect();
            f(&Row {
                names: names.clone(),
                values,
            });
        }
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(rel, lock);
    }
}

/// An attribute of a row type, from 0.
///
/// # Safety
/// `desc` is valid and has more than `i` attributes.
pub unsafe fn attribute(desc: pg_sys::TupleDesc, i: usize) -> *const pg_sys::FormData_pg_attribute {
    // SAFETY: see above.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        {
            (*desc).attrs.as_ptr().add(i)
        }
        #[cfg(feature = "pg18")]
        {
            // The attributes follow the compact ones.
            let n = (*desc).natts as usize;
            (*desc)
                .compact_attrs
                .as_ptr()
                .add(n)
                .cast::<pg_sys::FormData_pg_attribute>()
                .add(i)
        }
    }
}
