//! Exclusions in the statement path: whether a statement that may run is not recorded.
//!
//! Owns the backend's copy of `warden.exclusion`, read again after an invalidation, and the counts of
//! what was left out. Asked only after the rules have let a statement through: refusals are
//! recorded. So are the statements of AI agents, those that use masked columns, and those that touch
//! this extension in any way.

use crate::pg::compat::{self, pointers};
use crate::pg::local::Local;
use crate::pg::rules::Utility;
use crate::pg::shared::{self, shared};
use crate::pg::{fastpath, identity, parameters, policy, scan};
use crate::settings;
use pgrx::pg_sys;
use std::ffi::{CStr, c_char, c_int};
use std::rc::Rc;
use warden_core::event::AccessKind;
use warden_core::exclusion::{Exclusion, always_recorded};
use warden_core::guardrail::Subject;

/// `pg_depend`, of pg_depend.h.
const DEPEND: pg_sys::Oid = pg_sys::Oid::from_u32(2608);
/// `pg_depend_reference_index`, of pg_depend.h: its first column is the fourth of the table.
const DEPEND_BY_REFERENCE: pg_sys::Oid = pg_sys::Oid::from_u32(2674);
/// Bytes of a command in which our name is looked for; a longer one is recorded.
const TEXT_LIMIT: usize = 64 * 1024;

#[derive(Default)]
struct Exclusions {
    all: Vec<Exclusion>,
    /// Hashes of our own functions, as plans carry them.
    own_functions: Vec<u32>,
}

static CACHE: Local<Option<(u64, Rc<Exclusions>)>> = Local::new(None);

unsafe extern "C" {
    fn GetSessionUserId() -> pg_sys::Oid;
    static namespace_search_path: *const c_char;
}

fn exclusions() -> Rc<Exclusions> {
    let generation = policy::generation();
    if let Some(known) = CACHE.with(|c| {
        c.as_ref()
            .filter(|(g, _)| *g == generation)
            .map(|(_, e)| Rc::clone(e))
    }) {
        return known;
    }
    let mut found = Exclusions::default();
    if let Some(table) = scan::warden_table("exclusion") {
        scan::scan_table(table, |row| {
            if row.bool("active").unwrap_or(false) {
                found.all.push(Exclusion {
                    id: row.i32("id").unwrap_or(0).unsigned_abs(),
                    commands: row.texts("commands").unwrap_or_default(),
                    relations: row.oids("relations").unwrap_or_default(),
                    roles: row.oids("roles").unwrap_or_default(),
                });
            }
        });
    }
    if leaves_out(&found) {
        found.own_functions = own_functions();
    }
    let found = Rc::new(found);
    CACHE.with(|c| *c = Some((generation, Rc::clone(&found))));
    found
}

/// The functions of this extension.
fn own_functions() -> Vec<u32> {
    let mut hashes = Vec::new();
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        let ours = pg_sys::get_extension_oid(c"pg_warden".as_ptr(), true);
        let of = pg_sys::ExtensionRelationId;
        scan::scan_by_oid(DEPEND, DEPEND_BY_REFERENCE, 4, of, |row| {
            let function = row.oid("classid") == Some(pg_sys::ProcedureRelationId);
            if let (true, Some(oid)) = (
                function && row.oid("refobjid") == Some(ours),
                row.oid("objid"),
            ) {
                hashes.push(pg_sys::GetSysCacheHashValue(
                    pg_sys::SysCacheIdentifier::PROCOID as c_int,
                    pg_sys::Datum::from(oid),
                    pg_sys::Datum::from(0),
                    pg_sys::Datum::from(0),
                    pg_sys::Datum::from(0),
                ));
            }
        });
    }
    hashes
}

fn leaves_out(e: &Exclusions) -> bool {
    !e.all.is_empty() || !settings::records_all()
}

/// Who logged in: SET ROLE does not lead into an exclusion.
struct Login;

impl Subject for Login {
    fn is_member_of(&self, role: u32) -> bool {
        // SAFETY: catalog look-ups in a transaction.
        unsafe { pg_sys::is_member_of_role_nosuper(GetSessionUserId(), pg_sys::Oid::from(role)) }
    }
    fn is_agent(&self) -> bool {
        identity::is_agent()
    }
}

/// Whether a planned statement is not recorded.
///
/// # Safety
/// `stmt` is a valid PlannedStmt, in a transaction, in a database with the extension.
pub unsafe fn leave_out_planned(stmt: *mut pg_sys::PlannedStmt, masked: bool) -> bool {
    let exclusions = exclusions();
    if !leaves_out(&exclusions) || masked || identity::is_agent() {
        return false;
    }
    // SAFETY: a valid statement; lists are only read.
    unsafe {
        let functions = pg_sys::SysCacheIdentifier::PROCOID as c_int;
        let calls_us = pointers::<pg_sys::PlanInvalItem>((*stmt).invalItems).any(|i| {
            (*i).cacheId == functions && exclusions.own_functions.contains(&(*i).hashValue)
        });
        if calls_us || parameters::uses_masked(stmt) {
            return false;
        }
        let mut commands = vec![crate::pg::shape::command_name((*stmt).commandType)];
        let mut relations = Vec::new();
        for p in compat::permissions(stmt) {
            if pg_sys::get_rel_namespace(p.relid) == policy::schema() {
                return false;
            }
            if p.required == 0 {
                continue;
            }
            relations.push(p.relid.to_u32());
            // SELECT FOR UPDATE asks for UPDATE on no column.
            let updates = p.required & u64::from(pg_sys::ACL_UPDATE) != 0 && !p.updated.is_null();
            for (writes, name) in [
                (p.required & u64::from(pg_sys::ACL_INSERT) != 0, "INSERT"),
                (updates, "UPDATE"),
                (p.required & u64::from(pg_sys::ACL_DELETE) != 0, "DELETE"),
            ] {
                if writes && commands[0] != "MERGE" {
                    commands.push(name);
                }
            }
        }
        leave_out(&exclusions, &commands, &relations)
    }
}

/// Whether a utility command is not recorded.
pub fn leave_out_utility(u: &Utility, sql: &[u8]) -> bool {
    // SAFETY: reads the transaction's state: without one, no catalog can be asked.
    if !unsafe { pg_sys::IsTransactionState() } {
        return false;
    }
    let exclusions = exclusions();
    let command = u.label();
    if !leaves_out(&exclusions)
        || identity::is_agent()
        || always_recorded(command)
        || may_be_about_us(sql)
    {
        return false;
    }
    let masks = policy::masks();
    let mut relations = Vec::new();
    for t in &u.targets {
        let oid = pg_sys::Oid::from(t.oid);
        // SAFETY: catalog look-up in a transaction.
        let ours = t.oid != 0 && unsafe { pg_sys::get_rel_namespace(oid) } == policy::schema();
        let reads = matches!(t.kind, AccessKind::Select | AccessKind::Insert);
        if ours || reads && masks.of(oid).is_some() {
            return false;
        }
        relations.push(t.oid);
    }
    leave_out(&exclusions, &[command], &relations)
}

/// Whether a function call message is not recorded, for a function of this schema.
pub fn leave_out_call(schema: pg_sys::Oid) -> bool {
    let exclusions = exclusions();
    leaves_out(&exclusions)
        && !identity::is_agent()
        && schema != policy::schema()
        && leave_out(&exclusions, &[fastpath::COMMAND], &[])
}

/// Whether a command names something of ours, or could without saying so.
fn may_be_about_us(sql: &[u8]) -> bool {
    let names = |text: &[u8], what: &[u8]| {
        text.windows(what.len())
            .any(|w| w.eq_ignore_ascii_case(what))
    };
    // SAFETY: a setting's value, NUL-terminated if there is one.
    let path = unsafe {
        if namespace_search_path.is_null() {
            &[]
        } else {
            CStr::from_ptr(namespace_search_path).to_bytes()
        }
    };
    sql.len() > TEXT_LIMIT || names(sql, b"warden") || names(sql, b"u&\"") || names(path, b"warden")
}

fn leave_out(exclusions: &Exclusions, commands: &[&str], relations: &[u32]) -> bool {
    let by = exclusions
        .all
        .iter()
        .find(|e| e.covers(commands, relations, &Login));
    match by {
        Some(e) => {
            shared().left_out.count(key(e.id));
            true
        }
        None => !settings::records_all(),
    }
}

fn key(exclusion: u32) -> u64 {
    // SAFETY: reads a variable of this process.
    u64::from(unsafe { pg_sys::MyDatabaseId }.to_u32()) << 32 | u64::from(exclusion)
}

/// How many statements an exclusion of this database has left out since the server started.
pub fn left_out(exclusion: i32) -> i64 {
    if !shared::available() {
        return 0;
    }
    shared().left_out.of(key(exclusion.unsigned_abs())) as i64
}
