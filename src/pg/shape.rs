//! The shape of a statement: what is the same for all its executions.
//!
//! Owns the shapes that this backend has recorded. A shape is found by a keyed hash of the normalised
//! text, the command and what is touched, so that a statement which is known costs one hash; names
//! are looked up only for a new one.

use crate::pg::compat::{self, Permission};
use crate::pg::local::Local;
use crate::pg::session::text;
use crate::pg::shared::shared;
use crate::pg::{journal, mask, parameters};
use pgrx::pg_sys;
use siphasher::sip::SipHasher13;
use std::collections::HashSet;
use std::ffi::c_int;
use std::hash::{BuildHasherDefault, Hasher};
use warden_core::event::{Access, AccessKind, MaskedColumn, ShapeFacts};
use warden_core::frame::FrameKind;
use warden_core::text::{Names, Normalised, normalise_names};

/// Bytes of normalised text that are kept; of a longer one, its length and digest are too.
const TEXT_LIMIT: usize = 64 * 1024;
/// Bytes of relations and columns that are kept.
const ACCESSES_LIMIT: usize = 512 * 1024;
/// Shapes that a backend remembers; past that it starts anew, and records them again.
const REMEMBERED: usize = 8192;

static SENT: Local<Option<HashSet<(u32, u64), ByKey>>> = Local::new(None);

/// Hashes what has been hashed with a secret key already.
pub type ByKey = BuildHasherDefault<KeyHasher>;

#[derive(Debug, Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    #[inline]
    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
    #[inline]
    fn write_u64(&mut self, n: u64) {
        // A key's lowest bit is always set.
        self.0 = (self.0 ^ n >> 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }
}

/// A relation that a utility command names.
#[derive(Debug, Clone)]
pub struct Target {
    pub kind: AccessKind,
    /// 0 if it does not exist.
    pub oid: u32,
    pub schema: String,
    pub relation: String,
    pub columns: Vec<String>,
}

/// The statement's own part of a query string.
///
/// # Safety
/// `source` is null or NUL-terminated, and outlives the slice.
pub unsafe fn statement_text<'a>(
    source: *const std::ffi::c_char,
    location: i32,
    length: i32,
) -> &'a [u8] {
    if source.is_null() {
        return &[];
    }
    // SAFETY: see above.
    let all = unsafe { std::ffi::CStr::from_ptr(source) }.to_bytes();
    let start = usize::try_from(location).unwrap_or(0).min(all.len());
    let rest = &all[start..];
    match usize::try_from(length) {
        Ok(n) if n > 0 => &rest[..n.min(rest.len())],
        _ => rest,
    }
}

fn hasher() -> SipHasher13 {
    let (k0, k1) = shared().hash_key();
    SipHasher13::new_with_keys(k0, k1)
}

/// What is known of a planned statement's shape without its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanShape {
    /// The key; never 0, and positive as a bigint.
    pub key: u64,
    /// Whether the text has literals.
    pub literals: bool,
}

/// The shape of a planned statement, whose text is `sql`.
///
/// # Safety
/// `stmt` is a valid PlannedStmt, in a transaction.
pub unsafe fn of_plan(stmt: *mut pg_sys::PlannedStmt, sql: &[u8]) -> PlanShape {
    let mut h = hasher();
    let text = parameters::text_hash(sql);
    h.write_u64(text.hash);
    // SAFETY: a valid statement; sets are only read.
    unsafe {
        h.write_u32((*stmt).commandType);
        for p in compat::permissions(stmt) {
            h.write_u32(p.relid.to_u32());
            h.write_u64(p.required);
            for set in [p.selected, p.inserted, p.updated] {
                for word in compat::words(set) {
                    h.write_u64(*word);
                }
                h.write_u8(0xff);
            }
        }
        for m in mask::annotations(stmt) {
            h.write_u32(m.relation.to_u32());
            h.write_i16(m.attribute);
            h.write_u32(m.function.to_u32());
        }
        for function in mask::calls(stmt) {
            h.write_u32(function.to_u32());
        }
    }
    PlanShape {
        key: (h.finish() >> 1) | 1,
        literals: text.literals,
    }
}

/// Records the shape of a planned statement, unless that has been done, and returns its key. `None`
/// if the journal is full.
///
/// # Safety
/// `stmt` is a valid PlannedStmt, in a transaction.
pub unsafe fn planned<'a>(
    dest: u32,
    stmt: *mut pg_sys::PlannedStmt,
    key: u64,
    sql: impl Fn() -> &'a [u8],
) -> Option<u64> {
    // SAFETY: as above.
    send(dest, key, || unsafe {
        let mut accesses: Vec<Access> = Vec::new();
        for p in compat::permissions(stmt) {
            add_accesses(&p, &mut accesses);
        }
        let masked = mask::annotations(stmt)
            .into_iter()
            .map(|m| MaskedColumn {
                relation: qualified(m.relation),
                column: text(pg_sys::get_attname(m.relation, m.attribute, true)),
                function: function_name(m.function),
            })
            .collect();
        let text = text_of(sql(), Names::All);
        ShapeFacts {
            functions: mask::calls(stmt).map(|f| function_name(f)).collect(),
            ..facts(command_name((*stmt).commandType), text, accesses, masked)
        }
    })
}

/// The key of a utility command's shape; `None` if the journal is full.
pub fn utility(
    dest: u32,
    command: &str,
    sql: &[u8],
    targets: &[Target],
    functions: &[String],
) -> Option<u64> {
    if !parameters::may_name_values(command) {
        return named(dest, command, sql, targets, functions, Names::All);
    }
    let names = Names::BeforeSetting(parameters::is_keyword);
    named(dest, command, sql, targets, functions, names)
}

/// The key of the shape of a text that did not get as far as a hook; `None` if the journal is full.
pub fn unparsed(dest: u32, command: &str, sqlstate: c_int, sql: &[u8]) -> Option<u64> {
    let names = if parameters::may_hold_anything(sqlstate, sql) {
        Names::Keywords(parameters::is_keyword)
    } else {
        Names::BeforeSetting(parameters::is_keyword)
    };
    named(dest, command, sql, &[], &[], names)
}

fn named(
    dest: u32,
    command: &str,
    sql: &[u8],
    targets: &[Target],
    functions: &[String],
    names: Names,
) -> Option<u64> {
    let mut h = hasher();
    // What names hold must not show in the key either.
    let text = match names {
        Names::All => {
            h.write_u64(parameters::text_hash(sql).hash);
            None
        }
        _ => {
            let text = text_of(sql, names);
            h.write(text.text.as_bytes());
            h.write(&text.digest);
            Some(text)
        }
    };
    h.write(command.as_bytes());
    for t in targets {
        h.write_u32(t.oid);
        h.write_u8(t.kind as u8);
        h.write(t.schema.as_bytes());
        h.write(t.relation.as_bytes());
        for c in &t.columns {
            h.write(c.as_bytes());
        }
    }
    for f in functions {
        h.write(f.as_bytes());
    }
    let key = (h.finish() >> 1) | 1;
    send(dest, key, || {
        let accesses = targets
            .iter()
            .map(|t| Access {
                kind: t.kind,
                oid: t.oid,
                schema: t.schema.clone(),
                relation: t.relation.clone(),
                columns: t.columns.clone(),
            })
            .collect();
        let text = text.unwrap_or_else(|| text_of(sql, names));
        ShapeFacts {
            functions: functions.to_vec(),
            ..facts(command, text, accesses, Vec::new())
        }
    })
}

fn text_of(sql: &[u8], names: Names) -> Normalised {
    normalise_names(sql, parameters::backslashes(), TEXT_LIMIT, names)
}

fn facts(
    command: &str,
    n: Normalised,
    mut accesses: Vec<Access>,
    masked: Vec<MaskedColumn>,
) -> ShapeFacts {
    limit(&mut accesses);
    ShapeFacts {
        command: command.to_owned(),
        text: n.text,
        full_length: n.full_length,
        digest: n.digest,
        fingerprint: String::new(),
        accesses,
        masked,
        functions: Vec::new(),
    }
}

/// Keeps a frame of the journal from growing too large: first columns go, then relations.
fn limit(accesses: &mut Vec<Access>) {
    let mut room = ACCESSES_LIMIT;
    let mut kept = 0;
    for a in accesses.iter_mut() {
        // Kind, OID and lengths.
        let own = a.schema.len() + a.relation.len() + 48;
        let Some(rest) = room.checked_sub(own) else {
            break;
        };
        room = rest;
        kept += 1;
        let columns: usize = a.columns.iter().map(|c| c.len() + 4).sum();
        match room.checked_sub(columns) {
            Some(rest) => room = rest,
            None => a.columns.clear(),
        }
    }
    accesses.truncate(kept);
}

fn send(dest: u32, key: u64, facts: impl FnOnce() -> ShapeFacts) -> Option<u64> {
    if SENT.with(|s| s.get_or_insert_default().contains(&(dest, key))) {
        return Some(key);
    }
    let mut frame = key.to_le_bytes().to_vec();
    frame.extend_from_slice(&facts().encode());
    journal::append(FrameKind::Shape, dest, &frame, true).ok()?;
    SENT.with(|s| {
        let sent = s.get_or_insert_default();
        if sent.len() >= REMEMBERED {
            sent.clear();
        }
        sent.insert((dest, key));
    });
    Some(key)
}

/// Forgets what has been sent: shapes are recorded again when they are next used.
pub fn forget() {
    SENT.with(|s| *s = None);
}

/// The name of a planned command.
pub fn command_name(command: pg_sys::CmdType::Type) -> &'static str {
    use pg_sys::CmdType as C;
    match command {
        C::CMD_SELECT => "SELECT",
        C::CMD_INSERT => "INSERT",
        C::CMD_UPDATE => "UPDATE",
        C::CMD_DELETE => "DELETE",
        C::CMD_MERGE => "MERGE",
        _ => "OTHER",
    }
}

unsafe fn add_accesses(p: &Permission, accesses: &mut Vec<Access>) {
    // SAFETY: catalog look-ups in a transaction; sets are only read.
    unsafe {
        let name = pg_sys::get_rel_name(p.relid);
        if name.is_null() {
            return;
        }
        let schema = text(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(
            p.relid,
        )));
        let relation = text(name);
        let kinds = [
            (pg_sys::ACL_SELECT, AccessKind::Select, p.selected),
            (pg_sys::ACL_INSERT, AccessKind::Insert, p.inserted),
            (pg_sys::ACL_UPDATE, AccessKind::Update, p.updated),
            (pg_sys::ACL_DELETE, AccessKind::Delete, std::ptr::null()),
        ];
        for (bit, kind, columns) in kinds {
            if p.required & u64::from(bit) == 0 {
                continue;
            }
            // SELECT FOR UPDATE asks for UPDATE on no column; it reads.
            if kind == AccessKind::Update && columns.is_null() {
                continue;
            }
            let columns = column_names(p.relid, columns);
            let oid = p.relid.to_u32();
            match accesses.iter_mut().find(|a| a.oid == oid && a.kind == kind) {
                Some(known) => {
                    for c in columns {
                        if !known.columns.contains(&c) {
                            known.columns.push(c);
                        }
                    }
                }
                None => accesses.push(Access {
                    kind,
                    oid,
                    schema: schema.clone(),
                    relation: relation.clone(),
                    columns,
                }),
            }
        }
    }
}

unsafe fn column_names(relid: pg_sys::Oid, set: *const pg_sys::Bitmapset) -> Vec<String> {
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        let attributes = compat::attributes(set);
        let whole_row = attributes.contains(&0);
        let numbers: Vec<i32> = if whole_row {
            (1..=i32::from(compat::natts(relid))).collect()
        } else {
            attributes
        };
        numbers
            .into_iter()
            .map(|n| text(pg_sys::get_attname(relid, n as i16, true)))
            .filter(|name| !name.is_empty() && !name.starts_with("........pg.dropped."))
            .collect()
    }
}

/// `schema.relation`.
///
/// # Safety
/// In a transaction.
pub unsafe fn qualified(relid: pg_sys::Oid) -> String {
    // SAFETY: catalog look-ups.
    unsafe {
        let schema = text(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relid)));
        format!("{schema}.{}", text(pg_sys::get_rel_name(relid)))
    }
}

/// `schema.function`.
///
/// # Safety
/// In a transaction.
pub unsafe fn function_name(function: pg_sys::Oid) -> String {
    // SAFETY: catalog look-ups.
    unsafe {
        let schema = text(pg_sys::get_namespace_name(pg_sys::get_func_namespace(
            function,
        )));
        format!("{schema}.{}", text(pg_sys::get_func_name(function)))
    }
}
