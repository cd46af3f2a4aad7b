//! The versions of the library and of the extension in a database.
//!
//! They differ between the installation of a new library and `ALTER EXTENSION pg_warden UPDATE`. Then nobody
//! can say that the library understands the tables: what may be masked is not read, and nothing is
//! written to the ledger. The journal keeps what happens.

use crate::pg::scan;
use pgrx::pg_sys::{self, panic::ErrorReport};
use pgrx::{PgLogLevel, PgSqlErrorCode, function_name};

/// The library's version.
pub const LIBRARY: &str = env!("CARGO_PKG_VERSION");

/// What to do about it.
pub const HINT: &str = "Run ALTER EXTENSION pg_warden UPDATE in this database, as a superuser.";

/// The version of the extension in this database, if it is another one than the library's.
pub fn other_than_library() -> Option<String> {
    let mut other = None;
    scan::scan_table(pg_sys::ExtensionRelationId, |row| {
        if row.name("extname").as_deref() == Some("pg_warden") {
            other = row.text("extversion").filter(|v| v != LIBRARY);
        }
    });
    other
}

/// What is wrong, in a sentence without a full stop.
pub fn problem(other: &str) -> String {
    format!("pg_warden's library has version {LIBRARY}, and the extension in this database {other}")
}

/// Raises an ERROR if the versions differ.
pub fn require_same() {
    if let Some(other) = other_than_library() {
        let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
        ErrorReport::new(code, problem(&other), function_name!())
            .set_hint(HINT)
            .report(PgLogLevel::ERROR);
    }
}
