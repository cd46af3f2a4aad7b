//! The values of a statement, its literals and bind parameters, on their way into an intent.
//!
//! Owns: which shapes are about credentials, and
//! which settings of `standard_conforming_strings` this session has seen. What is kept of a value is
//! decided in `warden_core::parameter`. Calls output functions of built-in types only, and reads no
//! value from a TOAST table.
//!
//! Literals of utility commands are never recorded, CALL's aside: that is where passwords are. What
//! such a command runs (EXECUTE, COPY, DECLARE, EXPLAIN ANALYZE) is a statement of its own.

use crate::pg::compat::{self, pointers};
use crate::pg::local::Local;
use crate::pg::policy;
use crate::pg::record;
use crate::pg::session::text;
use crate::pg::shape::{ByKey, PlanShape};
use crate::pg::shared::{self, shared};
use crate::settings::{self, RecordParameters};
use pgrx::pg_sys::{self, Datum};
use pgrx::varlena;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int};
use warden_core::parameter::{self, Mode, Tail, Value};
use warden_core::text::{
    Backslashes, Literals, ShapeHash, find_literals, literal_value, normalise, shape_hash,
};

/// Bytes of a value, other than a text, that are turned into text.
const OUTPUT_LIMIT: usize = 4096;
/// Bytes of a text in which words are looked for; a longer one is taken to hold them.
const WORDS_LIMIT: usize = 64 * 1024;
/// Shapes that a backend remembers; past that it starts anew.
const REMEMBERED: usize = 8192;

struct State {
    /// Room for literals, used again.
    literals: Literals,
    /// By shape, whether it is about credentials.
    credentials: Option<HashMap<u64, bool, ByKey>>,
    /// The depth of the statement about credentials that runs, or ran last: what runs inside of it
    /// is about the same.
    inside: Option<usize>,
    seen_on: bool,
    seen_off: bool,
    key: Option<(u64, u64)>,
}

static STATE: Local<State> = Local::new(State {
    literals: Literals {
        kept: Vec::new(),
        count: 0,
    },
    credentials: None,
    inside: None,
    seen_on: false,
    seen_off: false,
    key: None,
});

unsafe extern "C" {
    static ScanKeywords: pg_sys::ScanKeywordList;
}

/// How a text of this session may have been parsed. The setting that is in force now is not always
/// the one that was when a prepared statement, or a message of several statements, was parsed.
pub fn backslashes() -> Backslashes {
    // SAFETY: reads a setting.
    let on = unsafe { pg_sys::standard_conforming_strings };
    STATE.with(|s| {
        s.seen_on |= on;
        s.seen_off |= !on;
        match (s.seen_on, s.seen_off) {
            (true, true) => Backslashes::Either,
            _ => Backslashes::from(on),
        }
    })
}

/// The hash of a statement's normalised text.
pub fn text_hash(sql: &[u8]) -> ShapeHash {
    shape_hash(sql, backslashes(), shared().hash_key())
}

/// The key of digests.
pub fn digest_key() -> (u64, u64) {
    STATE.with(|s| {
        *s.key
            .get_or_insert_with(|| parameter::derive_key(shared().hash_key()))
    })
}

/// The digest under which a value is recorded, as the record shows it.
pub fn value_digest(value: &str) -> String {
    if !shared::available() {
        pgrx::error!("pg_warden must be loaded by shared_preload_libraries");
    }
    parameter::hexadecimal(&parameter::digest(value.as_bytes(), digest_key()))
}

/// Whether a command's text may hold values in the place of names, as `SET app.token = hush` does.
pub fn may_name_values(command: &str) -> bool {
    matches!(
        command,
        "SET"
            | "ALTER ROLE"
            | "ALTER DATABASE"
            | "ALTER SYSTEM"
            | "ALTER FUNCTION"
            | "ALTER PROCEDURE"
            | "ALTER ROUTINE"
            | "CREATE FUNCTION"
            | "CREATE PROCEDURE"
    )
}

/// Whether a text that failed before any hook saw it may hold a secret anywhere: the parser refused
/// it, or it speaks of passwords, and `PASSWORD hush` and `PASSWORD "hush"` are names to the lexer.
pub fn may_hold_anything(sqlstate: c_int, sql: &[u8]) -> bool {
    let code = crate::pg::raise::unpack_sqlstate(sqlstate);
    matches!(
        &code,
        b"42601" | b"42602" | b"0A000" | b"22019" | b"22021" | b"22025" | b"22P05" | b"22P06"
    ) || parameter::names_credentials(sql)
}

/// Whether a lower-case word is a keyword of this server.
pub fn is_keyword(word: &[u8]) -> bool {
    let Ok(word) = CString::new(word) else {
        return false;
    };
    // SAFETY: the server's own list; the word is NUL-terminated.
    unsafe { pg_sys::ScanKeywordLookup(word.as_ptr(), &raw const ScanKeywords) >= 0 }
}

/// Adds the values of a planned statement to its intent.
///
/// # Safety
/// `stmt` is a valid PlannedStmt and `params` null or valid, in a transaction.
pub unsafe fn planned<'a>(
    shape: PlanShape,
    stmt: *mut pg_sys::PlannedStmt,
    params: pg_sys::ParamListInfo,
    sql: impl Fn() -> &'a [u8],
    out: &mut Vec<u8>,
) {
    let mode = match settings::record_parameters() {
        RecordParameters::none => return,
        RecordParameters::digest => Mode::Digest,
        RecordParameters::all => Mode::All,
        // SAFETY: see above.
        RecordParameters::safe if unsafe { may_touch_masked(stmt) } => Mode::Digest,
        RecordParameters::safe => Mode::Safe,
    };
    // SAFETY: see above.
    let bound = unsafe { bound(params) };
    collect(shape, mode, bound, sql(), out);
}

/// Adds the values of a utility command to its intent.
pub fn utility(shape: u64, command: &str, sql: &[u8], out: &mut Vec<u8>) {
    let mode = match settings::record_parameters() {
        RecordParameters::none => return,
        RecordParameters::all => Mode::All,
        // What a procedure does with its arguments is not known.
        RecordParameters::safe if !has_masks() => Mode::Safe,
        RecordParameters::digest | RecordParameters::safe => Mode::Digest,
    };
    if command != "CALL" {
        // What EXECUTE or DO runs comes next.
        enter(|| sql.len() > WORDS_LIMIT || parameter::names_credentials(sql));
        return;
    }
    let shape = PlanShape {
        key: shape,
        literals: true,
    };
    collect(shape, mode, &[], sql, out);
}

fn collect(
    shape: PlanShape,
    mode: Mode,
    bound: &[pg_sys::ParamExternData],
    sql: &[u8],
    out: &mut Vec<u8>,
) {
    // A function of SQL in standard form has no text to search.
    let about = enter(|| sql.is_empty() || is_about_credentials(shape.key, sql));
    if bound.is_empty() && !shape.literals {
        return;
    }
    let backslashes = backslashes();
    let mut literals = STATE.with(|s| std::mem::take(&mut s.literals));
    if shape.literals {
        find_literals(sql, backslashes, &mut literals);
    } else {
        literals.clear();
    }
    let mut tail = Tail::new(digest_key(), out);
    if bound.is_empty() && literals.count == 0 {
        // Nothing to look at.
    } else if about {
        tail.put(0, Value::Withheld);
    } else {
        for (i, p) in bound.iter().enumerate() {
            if !tail.has_room() {
                tail.leave_out((bound.len() - i) as u64);
                break;
            }
            if p.ptype != pg_sys::InvalidOid {
                // SAFETY: a bound parameter has a value of its type.
                unsafe { add(&mut tail, i as u32 + 1, p, mode) };
            }
        }
        let mut added = 0;
        for l in &literals.kept {
            if !tail.has_room() {
                break;
            }
            if l.span.len() > parameter::DIGEST_LIMIT {
                tail.put(l.number, Value::Opaque("text".into(), l.span.len() as u64));
            } else {
                tail.add(l.number, &literal_value(sql, l, backslashes), mode);
            }
            added += 1;
        }
        tail.leave_out((literals.count - added) as u64);
    }
    tail.finish();
    STATE.with(|s| s.literals = literals);
}

/// Whether the statement that begins is about credentials, by itself or by what it runs inside of.
fn enter(about: impl FnOnce() -> bool) -> bool {
    let depth = record::depth();
    if STATE.with(|s| s.inside.is_some_and(|outer| depth > outer)) {
        return true;
    }
    let about = about();
    STATE.with(|s| s.inside = about.then_some(depth));
    about
}

/// Looked up once a shape: the text is known to be what it was.
fn is_about_credentials(shape: u64, sql: &[u8]) -> bool {
    if let Some(known) = STATE.with(|s| s.credentials.get_or_insert_default().get(&shape).copied())
    {
        return known;
    }
    let n = normalise(sql, backslashes(), WORDS_LIMIT);
    let about = n.full_length > 0 || parameter::is_about_credentials(&n.text);
    STATE.with(|s| {
        let known = s.credentials.get_or_insert_default();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(shape, about);
    });
    about
}

/// The parameters of a client, or of a function that bound them. The variables of a PL/pgSQL
/// function come from a callback that may raise: they are not looked at.
///
/// # Safety
/// `params` is null or valid, and outlives the slice.
unsafe fn bound<'a>(params: pg_sys::ParamListInfo) -> &'a [pg_sys::ParamExternData] {
    // SAFETY: without a callback, the array has `numParams` elements.
    unsafe {
        if params.is_null() || (*params).paramFetch.is_some() {
            return &[];
        }
        let n = usize::try_from((*params).numParams).unwrap_or(0);
        std::slice::from_raw_parts((*params).params.as_ptr(), n)
    }
}

fn has_masks() -> bool {
    policy::installed() && !policy::masks().is_empty()
}

/// Whether a value of this statement may be one of a masked column: the statement uses such a
/// column in any way, or hands its values to a function that is not PostgreSQL's own.
unsafe fn may_touch_masked(stmt: *mut pg_sys::PlannedStmt) -> bool {
    if !has_masks() {
        return false;
    }
    // SAFETY: a valid statement; the list is only read.
    unsafe {
        let functions = pg_sys::SysCacheIdentifier::PROCOID as c_int;
        pointers::<pg_sys::PlanInvalItem>((*stmt).invalItems).any(|i| (*i).cacheId == functions)
            || uses_masked(stmt)
    }
}

/// Whether a statement reads or writes a masked column, whether masked for this identity or not.
///
/// # Safety
/// `stmt` is a valid PlannedStmt, in a transaction, in a database with the extension.
pub unsafe fn uses_masked(stmt: *mut pg_sys::PlannedStmt) -> bool {
    let masks = policy::masks();
    if masks.is_empty() {
        return false;
    }
    // SAFETY: a valid statement; sets are only read.
    unsafe {
        compat::permissions(stmt).any(|p| {
            masks.of(p.relid).is_some_and(|masked| {
                [p.selected, p.inserted, p.updated].iter().any(|set| {
                    compat::attributes(*set)
                        .iter()
                        .any(|a| *a == 0 || masked.iter().any(|(m, _)| i32::from(*m) == *a))
                })
            })
        })
    }
}

/// # Safety
/// The parameter has a value of its type.
unsafe fn add(tail: &mut Tail, number: u32, p: &pg_sys::ParamExternData, mode: Mode) {
    if p.isnull {
        return tail.put(number, Value::Null);
    }
    let d = p.value;
    // SAFETY: each value is read as its type says.
    unsafe {
        match p.ptype {
            pg_sys::BOOLOID => {
                let bit: &[u8] = if d.value() & 0xff != 0 { b"t" } else { b"f" };
                tail.add(number, bit, mode);
            }
            pg_sys::INT2OID => tail.add(number, (d.value() as i16).to_string().as_bytes(), mode),
            pg_sys::INT4OID => tail.add(number, (d.value() as i32).to_string().as_bytes(), mode),
            pg_sys::INT8OID => tail.add(number, (d.value() as i64).to_string().as_bytes(), mode),
            pg_sys::OIDOID => tail.add(number, (d.value() as u32).to_string().as_bytes(), mode),
            pg_sys::NAMEOID | pg_sys::UNKNOWNOID => {
                tail.add(number, CStr::from_ptr(d.cast_mut_ptr()).to_bytes(), mode);
            }
            pg_sys::UUIDOID => {
                let b: [u8; 16] = *d.cast_mut_ptr();
                tail.add(number, uuid(&b).as_bytes(), mode);
            }
            pg_sys::TEXTOID
            | pg_sys::VARCHAROID
            | pg_sys::BPCHAROID
            | pg_sys::JSONOID
            | pg_sys::XMLOID => match inline(d) {
                Some(bytes) => tail.add(number, bytes, mode),
                None => opaque(tail, number, p),
            },
            other => match output(other, d) {
                Some(s) => {
                    tail.add(number, CStr::from_ptr(s).to_bytes(), mode);
                    pg_sys::pfree(s.cast());
                }
                None => opaque(tail, number, p),
            },
        }
    }
}

fn uuid(b: &[u8; 16]) -> String {
    let hex = parameter::hexadecimal(b);
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

/// The bytes of a value of variable length that is here, and not compressed.
///
/// # Safety
/// The datum is a varlena, and outlives the slice.
unsafe fn inline<'a>(d: Datum) -> Option<&'a [u8]> {
    let p: *mut pg_sys::varlena = d.cast_mut_ptr();
    // SAFETY: see above.
    unsafe {
        if varlena::varatt_is_1b_e(p) || varlena::varatt_is_4b_c(p) {
            return None;
        }
        let length = varlena::varsize_any_exhdr(p);
        Some(std::slice::from_raw_parts(
            varlena::vardata_any(p).cast(),
            length,
        ))
    }
}

/// What a built-in output function makes of a value.
///
/// # Safety
/// The datum has this type.
unsafe fn output(oid: pg_sys::Oid, d: Datum) -> Option<*mut std::ffi::c_char> {
    let (function, varies) = match oid {
        pg_sys::FLOAT4OID => (pg_sys::F_FLOAT4OUT, false),
        pg_sys::FLOAT8OID => (pg_sys::F_FLOAT8OUT, false),
        pg_sys::DATEOID => (pg_sys::F_DATE_OUT, false),
        pg_sys::TIMEOID => (pg_sys::F_TIME_OUT, false),
        pg_sys::TIMETZOID => (pg_sys::F_TIMETZ_OUT, false),
        pg_sys::TIMESTAMPOID => (pg_sys::F_TIMESTAMP_OUT, false),
        pg_sys::TIMESTAMPTZOID => (pg_sys::F_TIMESTAMPTZ_OUT, false),
        pg_sys::INTERVALOID => (pg_sys::F_INTERVAL_OUT, false),
        pg_sys::NUMERICOID => (pg_sys::F_NUMERIC_OUT, true),
        pg_sys::JSONBOID => (pg_sys::F_JSONB_OUT, true),
        pg_sys::INETOID => (pg_sys::F_INET_OUT, true),
        pg_sys::INT4ARRAYOID
        | pg_sys::INT8ARRAYOID
        | pg_sys::TEXTARRAYOID
        | pg_sys::VARCHARARRAYOID
        | pg_sys::UUIDARRAYOID => (pg_sys::F_ARRAY_OUT, true),
        _ => return None,
    };
    // SAFETY: a function of PostgreSQL itself, for a value of its type that is all here.
    unsafe {
        if varies && inline(d).is_none_or(|b| b.len() > OUTPUT_LIMIT) {
            return None;
        }
        Some(pg_sys::OidOutputFunctionCall(
            pg_sys::Oid::from(function),
            d,
        ))
    }
}

unsafe fn opaque(tail: &mut Tail, number: u32, p: &pg_sys::ParamExternData) {
    let (mut length, mut by_value) = (0i16, false);
    // SAFETY: catalog look-ups; of a varlena, the header is read.
    let (name, bytes) = unsafe {
        pg_sys::get_typlenbyval(p.ptype, &mut length, &mut by_value);
        let bytes = match length {
            -1 => {
                pg_sys::toast_raw_datum_size(p.value).saturating_sub(pg_sys::VARHDRSZ as _) as u64
            }
            -2 => CStr::from_ptr(p.value.cast_mut_ptr()).count_bytes() as u64,
            n => n as u64,
        };
        (text(pg_sys::format_type_be(p.ptype)), bytes)
    };
    tail.put(number, Value::Opaque(name, bytes));
}
