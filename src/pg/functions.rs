//! SQL functions that need PostgreSQL's own calling convention: a trigger, and the check that the
//! library was preloaded.

use crate::pg::shared;
use pgrx::{pg_guard, pg_sys};

/// The version-1 calling convention, for functions declared in our own SQL.
macro_rules! v1 {
    ($($name:ident),+ $(,)?) => {$(
        #[unsafe(no_mangle)]
        #[doc(hidden)]
        pub extern "C" fn $name() -> &'static pg_sys::Pg_finfo_record {
            const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
            &V1
        }
    )+};
}
pub(crate) use v1;

v1!(
    pg_finfo_warden_config_changed,
    pg_finfo_warden_require_preload
);

/// Trigger of the configuration tables: invalidates all relations, so that every session reads them
/// again, and plans again, before its next statement.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn warden_config_changed(
    _fcinfo: pg_sys::FunctionCallInfo,
) -> pg_sys::Datum {
    // SAFETY: in a transaction; takes effect when it commits, and for this session at once.
    unsafe { pg_sys::CacheInvalidateRelcacheAll() };
    pg_sys::Datum::from(0)
}

/// Refuses CREATE EXTENSION where the library was not preloaded: nothing would be protected.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn warden_require_preload(
    _fcinfo: pg_sys::FunctionCallInfo,
) -> pg_sys::Datum {
    if !shared::available() {
        pgrx::pg_sys::panic::ErrorReport::new(
            pgrx::PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            "pg_warden must be loaded by shared_preload_libraries",
            pgrx::function_name!(),
        )
        .set_hint("Add pg_warden to shared_preload_libraries in postgresql.conf, and restart.")
        .report(pgrx::PgLogLevel::ERROR);
    }
    pg_sys::Datum::from(0)
}
