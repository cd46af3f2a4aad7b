//! Differences between the supported servers, in one place.

use pgrx::pg_sys;

/// How a planned statement uses one relation.
#[derive(Clone, Copy)]
pub struct Permission {
    pub relid: pg_sys::Oid,
    pub required: u64,
    pub selected: *const pg_sys::Bitmapset,
    pub inserted: *const pg_sys::Bitmapset,
    pub updated: *const pg_sys::Bitmapset,
}

/// The elements of a list of pointers.
///
/// # Safety
/// `list` is null or a valid list of pointers to `T`, and is not changed while it is walked.
pub unsafe fn pointers<'a, T>(list: *mut pg_sys::List) -> impl Iterator<Item = *mut T> + 'a {
    let (length, elements) = if list.is_null() {
        (0, std::ptr::null_mut())
    } else {
        // SAFETY: a valid list.
        unsafe { ((*list).length as usize, (*list).elements) }
    };
    // SAFETY: `elements` has `length` cells.
    (0..length).map(move |i| unsafe { (*elements.add(i)).ptr_value.cast() })
}

/// The relations that a planned statement checks permissions on.
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
#[cfg(feature = "pg15")]
pub unsafe fn permissions(stmt: *mut pg_sys::PlannedStmt) -> impl Iterator<Item = Permission> {
    // SAFETY: the range table is a list of RangeTblEntry.
    unsafe {
        pointers::<pg_sys::RangeTblEntry>((*stmt).rtable).filter_map(|rte| {
            let r = &*rte;
            (r.rtekind == pg_sys::RTEKind::RTE_RELATION).then_some(Permission {
                relid: r.relid,
                required: u64::from(r.requiredPerms),
                selected: r.selectedCols,
                inserted: r.insertedCols,
                updated: r.updatedCols,
            })
        })
    }
}

/// The relations that a planned statement checks permissions on.
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
#[cfg(not(feature = "pg15"))]
pub unsafe fn permissions(stmt: *mut pg_sys::PlannedStmt) -> impl Iterator<Item = Permission> {
    // SAFETY: a list of RTEPermissionInfo.
    unsafe {
        pointers::<pg_sys::RTEPermissionInfo>((*stmt).permInfos).map(|p| {
            let p = &*p;
            Permission {
                relid: p.relid,
                required: p.requiredPerms,
                selected: p.selectedCols,
                inserted: p.insertedCols,
                updated: p.updatedCols,
            }
        })
    }
}

/// The words of a bitmap set.
///
/// # Safety
/// `set` is null or a valid set that outlives the slice.
pub unsafe fn words<'a>(set: *const pg_sys::Bitmapset) -> &'a [pg_sys::bitmapword] {
    if set.is_null() {
        return &[];
    }
    // SAFETY: a valid set has `nwords` words.
    unsafe { (*set).words.as_slice((*set).nwords as usize) }
}

/// The attribute numbers in a set of columns; 0 is the whole row, negative ones are system columns.
///
/// # Safety
/// As [`words`].
pub unsafe fn attributes(set: *const pg_sys::Bitmapset) -> Vec<i32> {
    let mut found = Vec::new();
    // SAFETY: see above.
    for (i, word) in unsafe { words(set) }.iter().enumerate() {
        let mut rest = *word;
        while rest != 0 {
            let member = i as i32 * pg_sys::bitmapword::BITS as i32 + rest.trailing_zeros() as i32;
            found.push(member + pg_sys::FirstLowInvalidHeapAttributeNumber);
            rest &= rest - 1;
        }
    }
    found
}

/// How many columns a relation has, dropped ones included; 0 if it is gone.
///
/// # Safety
/// In a transaction.
pub unsafe fn natts(relid: pg_sys::Oid) -> i16 {
    // SAFETY: the tuple is released before it is forgotten.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::RELOID as _,
            pg_sys::Datum::from(relid),
        );
        if tuple.is_null() {
            return 0;
        }
        let n = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).relnatts;
        pg_sys::ReleaseSysCache(tuple);
        n
    }
}

/// The composite type that a table is made of (`CREATE TABLE … OF`), or InvalidOid.
///
/// # Safety
/// In a transaction.
pub unsafe fn of_type(relid: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: the tuple is released before it is forgotten.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::RELOID as _,
            pg_sys::Datum::from(relid),
        );
        if tuple.is_null() {
            return pg_sys::InvalidOid;
        }
        let of = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_class>()).reloftype;
        pg_sys::ReleaseSysCache(tuple);
        of
    }
}

/// The type that a domain is made from, which may be one itself; InvalidOid of any other type.
///
/// # Safety
/// In a transaction.
pub unsafe fn domain_base(domain: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: the tuple is released before it is forgotten.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::TYPEOID as _,
            pg_sys::Datum::from(domain),
        );
        if tuple.is_null() {
            return pg_sys::InvalidOid;
        }
        let t = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_type>();
        let base = if (*t).typtype as u8 == b'd' {
            (*t).typbasetype
        } else {
            pg_sys::InvalidOid
        };
        pg_sys::ReleaseSysCache(tuple);
        base
    }
}

/// Whether the current user owns a database.
///
/// # Safety
/// In a transaction.
pub unsafe fn owns_database(database: pg_sys::Oid) -> bool {
    // SAFETY: a catalog look-up.
    unsafe {
        let user = pg_sys::GetUserId();
        #[cfg(feature = "pg15")]
        {
            pg_sys::pg_database_ownercheck(database, user)
        }
        #[cfg(not(feature = "pg15"))]
        {
            pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, database, user)
        }
    }
}
