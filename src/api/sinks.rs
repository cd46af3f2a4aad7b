//! SQL functions behind `sql/50_sinks.sql`, which declares them.

use crate::pg::shipper;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::prelude::*;
use warden_core::sink::Target;

/// Checks the address of a sink; returns it in its normal form.
#[pg_extern(sql = false)]
fn sink_address(url: &str) -> String {
    match Target::parse(url) {
        Ok(Target::Http(url)) => url,
        Ok(Target::File(name)) => format!("file:{name}"),
        Err(e) => {
            let code = PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE;
            ErrorReport::new(code, e.message, pgrx::function_name!())
                .set_hint(e.hint)
                .report(PgLogLevel::ERROR);
            unreachable!("ERROR does not return")
        }
    }
}

/// Lets the shipper look at its sinks when this transaction has committed.
#[pg_extern(sql = false)]
fn wake_shipper() {
    shipper::wake_after_commit();
}
