//! pg_warden: identity, recording, masking, guardrails and a verifiable ledger inside PostgreSQL.

use pgrx::prelude::*;

mod api;
mod error;
mod pg;
mod settings;
mod ship;

pgrx::pg_module_magic!(name = c"pg_warden", version = c"0.1.0");

extension_sql_file!("../sql/00_roles.sql", name = "roles", bootstrap);
extension_sql_file!(
    "../sql/10_ledger.sql",
    name = "ledger",
    requires = ["roles", event_detail]
);
extension_sql_file!(
    "../sql/15_journal.sql",
    name = "journal",
    requires = ["ledger"]
);
extension_sql_file!(
    "../sql/18_references.sql",
    name = "references",
    requires = ["journal"]
);
extension_sql_file!(
    "../sql/20_masking.sql",
    name = "masking",
    requires = [
        "references",
        partial_email,
        partial_phone,
        partial_card,
        redact,
        mask_null
    ]
);
extension_sql_file!(
    "../sql/30_rules.sql",
    name = "rules",
    requires = ["masking"]
);
extension_sql_file!(
    "../sql/35_exclusions.sql",
    name = "exclusions",
    requires = ["rules"]
);
extension_sql_file!(
    "../sql/40_identity.sql",
    name = "identity",
    requires = ["exclusions"]
);
extension_sql_file!(
    "../sql/50_sinks.sql",
    name = "sinks",
    requires = ["identity"],
    finalize
);

#[pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::startup::init();
}

/// The version of the library that is loaded.
#[pg_extern(immutable, parallel_safe)]
fn version() -> &'static str {
    pg::version::LIBRARY
}
