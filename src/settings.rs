//! Every setting, and why it exists.
//!
//! None of them can be changed by an ordinary role: what protects a server is not switched off from
//! a session.

use crate::pg::classes;
use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};
use std::ffi::CString;

/// What is recorded of literals and bind parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
#[allow(non_camel_case_types, reason = "the names are the setting's values")]
pub enum RecordParameters {
    /// Nothing.
    none,
    /// Keyed digests: equal values can be recognised.
    digest,
    /// Values, but digests of what is masked and of what a detector knows.
    safe,
    /// Values.
    all,
}

/// Whether statements are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
#[allow(non_camel_case_types, reason = "the names are the setting's values")]
pub enum Record {
    /// All but those that an exclusion covers.
    all,
    /// Only those that no exclusion could cover.
    none,
}

/// Where the journal lives. Its own disk protects it from a data directory that is full.
static JOURNAL_DIRECTORY: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"pg_warden"));
/// How much may be written before the recorder has read it: the slack for a recorder that is down.
static JOURNAL_SIZE: GucSetting<i32> = GucSetting::<i32>::new(256);
/// The ledger of statements in databases that have no ledger of their own.
static HOME_DATABASE: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"postgres"));
/// Availability or completeness, when both cannot be had.
static ON_JOURNAL_FULL: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"block"));
/// Speed, or a record that survives a power failure.
static DURABILITY: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"written"));
/// File sinks write here and nowhere else: who may add a sink may not write any file of the server.
static FILE_SINK_DIRECTORY: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"pg_warden/export"));

/// A login storm must not become a storm of events.
static CONNECTION_FAILURE_WINDOW: GucSetting<i32> = GucSetting::<i32>::new(60);
/// For a migration, say. To silence one job there is warden.exclude().
static RECORD: GucSetting<Record> = GucSetting::<Record>::new(Record::all);
/// A ledger cannot forget: what is written there as it is stays. See docs/adr/0005-values-of-statements.md.
static RECORD_PARAMETERS: GucSetting<RecordParameters> =
    GucSetting::<RecordParameters>::new(RecordParameters::digest);

/// Defines the settings and reserves their prefix.
pub fn init() {
    GucRegistry::define_string_guc(
        c"warden.journal_directory",
        c"Directory of the journal.",
        c"A relative path starts at the data directory.",
        &JOURNAL_DIRECTORY,
        GucContext::Postmaster,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_int_guc(
        c"warden.journal_size",
        c"How much may be in the journal that the recorder has not read yet.",
        c"When it is full, warden.on_journal_full decides.",
        &JOURNAL_SIZE,
        64,
        1 << 20,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_string_guc(
        c"warden.home_database",
        c"Database whose ledger receives the statements of databases without the extension.",
        c"They are not recorded while this database has no ledger either.",
        &HOME_DATABASE,
        GucContext::Sighup,
        GucFlags::default(),
    );
    classes::define_on_full(
        c"warden.on_journal_full",
        c"What happens to a statement that cannot be recorded as warden.durability demands.",
        c"block: it waits. error: it fails with WA005. gap: it runs, and the loss is recorded. \
          Exceptions for the classes read, write, ddl and admin may follow: 'block, read=gap'.",
        &ON_JOURNAL_FULL,
    );
    classes::define_durability(
        c"warden.durability",
        c"When the record of a statement must be on disk.",
        c"written: the kernel writes it in its own time. commit: before a commit is acknowledged. \
          statement: before the statement runs, too. \
          Exceptions for the classes read, write, ddl and admin may follow: 'statement, read=written'.",
        &DURABILITY,
    );
    GucRegistry::define_int_guc(
        c"warden.connection_failure_window",
        c"How long identical refused connections are counted before their number is recorded.",
        c"The first one is recorded at once. 0 records each by itself.",
        &CONNECTION_FAILURE_WINDOW,
        0,
        86_400,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_string_guc(
        c"warden.file_sink_directory",
        c"Directory of the files that file sinks write.",
        c"A relative path starts at the data directory.",
        &FILE_SINK_DIRECTORY,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_enum_guc(
        c"warden.record",
        c"Whether statements are recorded.",
        c"none: refusals, failures, changes of pg_warden itself and the use of masked columns are \
          recorded nevertheless.",
        &RECORD,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_enum_guc(
        c"warden.record_parameters",
        c"What is recorded of literals and bind parameters.",
        c"none, digest, safe (values, but digests of what is masked or looks personal) or all. \
          Passwords and tokens are recorded under none of them.",
        &RECORD_PARAMETERS,
        GucContext::Sighup,
        GucFlags::default(),
    );
}

fn path(setting: &GucSetting<Option<CString>>) -> String {
    setting
        .get()
        .map(|s| s.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// `warden.journal_directory`; relative to the data directory, which is the working directory.
pub fn journal_directory() -> String {
    path(&JOURNAL_DIRECTORY)
}

/// `warden.journal_size` in bytes.
pub fn journal_size() -> u64 {
    u64::from(JOURNAL_SIZE.get().unsigned_abs()) << 20
}

/// `warden.home_database`.
pub fn home_database() -> String {
    path(&HOME_DATABASE)
}

/// `warden.connection_failure_window` in microseconds.
pub fn connection_failure_window() -> i64 {
    i64::from(CONNECTION_FAILURE_WINDOW.get()) * 1_000_000
}

/// `warden.record` is `all`.
pub fn records_all() -> bool {
    RECORD.get() == Record::all
}

/// `warden.record_parameters`.
pub fn record_parameters() -> RecordParameters {
    RECORD_PARAMETERS.get()
}

/// `warden.file_sink_directory`; relative to the data directory.
pub fn file_sink_directory() -> String {
    path(&FILE_SINK_DIRECTORY)
}
