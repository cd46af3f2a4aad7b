//! Settings by class of statement, and the class of a statement.
//!
//! The value is read when it is set, not when it is used: a session looks at one word. A session that waits
//! in the middle of a statement reads no configuration; it looks at what the launcher has read.

use crate::pg::shared::shared;
use pgrx::{GucContext, GucFlags, GucSetting, pg_guard, pg_sys};
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicU32, Ordering};
use warden_core::classes::{ByClass, Choice, Class, Durability, OnFull};

/// The values in force, a byte a class.
static DURABILITY: AtomicU32 = AtomicU32::new(0);
static ON_FULL: AtomicU32 = AtomicU32::new(0);

/// Defines `warden.durability`.
pub fn define_durability(
    name: &'static CStr,
    short: &'static CStr,
    long: &'static CStr,
    setting: &'static GucSetting<Option<CString>>,
) {
    // SAFETY: the hooks are guarded.
    unsafe {
        pgrx::GucRegistry::define_string_guc_with_hooks(
            name,
            short,
            long,
            setting,
            GucContext::Sighup,
            GucFlags::default(),
            Some(check_durability),
            Some(assign_durability),
            None,
        );
    }
}

/// Defines `warden.on_journal_full`.
pub fn define_on_full(
    name: &'static CStr,
    short: &'static CStr,
    long: &'static CStr,
    setting: &'static GucSetting<Option<CString>>,
) {
    // SAFETY: the hooks are guarded.
    unsafe {
        pgrx::GucRegistry::define_string_guc_with_hooks(
            name,
            short,
            long,
            setting,
            GucContext::Sighup,
            GucFlags::default(),
            Some(check_on_full),
            Some(assign_on_full),
            None,
        );
    }
}

/// `warden.durability` of a class.
pub fn durability(class: Class) -> Durability {
    match byte(&DURABILITY, class) {
        0 => Durability::Written,
        1 => Durability::Commit,
        _ => Durability::Statement,
    }
}

/// `warden.on_journal_full` of a class.
pub fn on_full(class: Class) -> OnFull {
    // SAFETY: reads a flag that a signal handler sets.
    let stale = unsafe { pg_sys::ConfigReloadPending } != 0;
    let values = if stale { &shared().on_full } else { &ON_FULL };
    match byte(values, class) {
        0 => OnFull::Block,
        1 => OnFull::Error,
        _ => OnFull::Gap,
    }
}

/// Shows other processes what this one has read. Called by the launcher.
pub fn publish() {
    let values = ON_FULL.load(Ordering::Relaxed);
    shared().on_full.store(values, Ordering::Relaxed);
}

fn byte(values: &AtomicU32, class: Class) -> u8 {
    values.load(Ordering::Relaxed).to_le_bytes()[class as usize]
}

fn bytes<T: Choice>(by: &ByClass<T>, byte: impl Fn(T) -> u8) -> u32 {
    let all = [Class::Read, Class::Write, Class::Ddl, Class::Admin];
    u32::from_le_bytes(all.map(|c| byte(by.of(c))))
}

/// # Safety
/// `value` is null or NUL-terminated.
unsafe fn parse<T: Choice>(value: *const c_char) -> Result<ByClass<T>, String> {
    if value.is_null() {
        return Err("The value is missing.".into());
    }
    // SAFETY: see above.
    let text = unsafe { CStr::from_ptr(value) };
    ByClass::parse(&text.to_string_lossy()).map_err(|e| e.to_string())
}

/// # Safety
/// As the check hook of a string setting.
unsafe fn check<T: Choice>(value: *mut *mut c_char) -> bool {
    // SAFETY: PostgreSQL's arguments; it frees the detail with its context.
    unsafe {
        match parse::<T>(*value) {
            Ok(_) => true,
            Err(why) => {
                let why = CString::new(why).unwrap_or_default();
                pg_sys::GUC_check_errdetail_string = pg_sys::pstrdup(why.as_ptr());
                false
            }
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn check_durability(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL's own arguments.
    unsafe { check::<Durability>(value) }
}

#[pg_guard]
unsafe extern "C-unwind" fn assign_durability(value: *const c_char, _extra: *mut c_void) {
    // SAFETY: PostgreSQL's own arguments; the value has been checked.
    if let Ok(by) = unsafe { parse::<Durability>(value) } {
        DURABILITY.store(bytes(&by, |v| v as u8), Ordering::Relaxed);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn check_on_full(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: PostgreSQL's own arguments.
    unsafe { check::<OnFull>(value) }
}

#[pg_guard]
unsafe extern "C-unwind" fn assign_on_full(value: *const c_char, _extra: *mut c_void) {
    // SAFETY: PostgreSQL's own arguments; the value has been checked.
    if let Ok(by) = unsafe { parse::<OnFull>(value) } {
        ON_FULL.store(bytes(&by, |v| v as u8), Ordering::Relaxed);
    }
}

/// The class of a planned statement.
///
/// # Safety
/// `stmt` is valid.
pub unsafe fn of_planned(stmt: *mut pg_sys::PlannedStmt) -> Class {
    // SAFETY: see above.
    unsafe {
        let reads = (*stmt).commandType == pg_sys::CmdType::CMD_SELECT
            && !(*stmt).hasModifyingCTE
            && (*stmt).rowMarks.is_null();
        if reads { Class::Read } else { Class::Write }
    }
}

/// The class of a utility command: as `log_statement` has it, and what concerns roles, privileges
/// and the server apart.
///
/// # Safety
/// `node` is a valid utility statement.
pub unsafe fn of_utility(node: *mut pg_sys::Node) -> Class {
    use pg_sys::LogStmtLevel as L;
    use pg_sys::NodeTag as T;
    // SAFETY: see above; the level of EXECUTE needs the prepared statement, which may be missing.
    unsafe {
        match (*node).type_ {
            T::T_GrantStmt
            | T::T_GrantRoleStmt
            | T::T_CreateRoleStmt
            | T::T_AlterRoleStmt
            | T::T_AlterRoleSetStmt
            | T::T_DropRoleStmt
            | T::T_DropOwnedStmt
            | T::T_ReassignOwnedStmt
            | T::T_AlterDefaultPrivilegesStmt
            | T::T_AlterOwnerStmt
            | T::T_AlterSystemStmt
            | T::T_AlterDatabaseSetStmt
            | T::T_CreatePolicyStmt
            | T::T_AlterPolicyStmt
            | T::T_SecLabelStmt => Class::Admin,
            // What it runs is recorded as a statement of its own.
            T::T_ExecuteStmt => Class::Read,
            _ => match pg_sys::GetCommandLogLevel(node) {
                L::LOGSTMT_DDL => Class::Ddl,
                L::LOGSTMT_MOD => Class::Write,
                _ => Class::Read,
            },
        }
    }
}
