//! Who acts in this backend.
//!
//! Owns the backend's verified identity, in the backend's own memory: no setting holds it, so no SQL
//! can forge it. Receives tokens from `warden.login()`. Emits the [`Actor`], a generation that
//! changes with it, and whether the session counts as an AI agent. Never keeps a token.
//!
//! The rules:
//! * Only an accepted token gives an identity. A token that is refused takes the former identity
//!   away too, and so does any error on the way.
//! * A session that was an agent's stays restricted as one (`is_agent`) after `warden.logout()`, a
//!   refused token and DISCARD ALL, until another token is accepted or the session ends.
//! * An identity is not part of a transaction: ROLLBACK neither gives nor takes it.
//! * Plans that were made for another identity are made anew.
//! * An identity that has run out stays visible, for the record; [`expired`] says that it has.

use crate::error::{Refusal, RefusalCode};
use crate::pg::functions::v1;
use crate::pg::local::Local;
use crate::pg::raise::{self, Raised};
use crate::pg::scan;
use pgrx::pg_sys::panic::{ErrorReport, pgrx_extern_c_guard};
use pgrx::{IntoDatum, PgLogLevel, PgSqlErrorCode, function_name, pg_getarg, pg_guard, pg_sys};
use std::ffi::{CStr, c_int, c_void};
use warden_core::event::{Actor, ActorKind, Trust};
use warden_core::identity::{Algorithm, Identity, Issuer, Key, TokenError, Unverified};

/// Seconds from 1970-01-01 to 2000-01-01, PostgreSQL's epoch.
const EPOCH: i64 = 946_684_800;
/// Leeway beyond this hides a broken clock.
const MAX_LEEWAY: i32 = 3600;

struct State {
    actor: Option<Actor>,
    /// The token's `exp`: microseconds since 2000-01-01 UTC.
    expires_at: i64,
    /// When the identity ends: `exp` and the leeway.
    valid_until: i64,
    /// An agent logged in, and no other token was accepted since.
    was_agent: bool,
    generation: u64,
}

static STATE: Local<State> = Local::new(State {
    actor: None,
    expires_at: 0,
    valid_until: 0,
    was_agent: false,
    generation: 0,
});

/// Runs `f` on the verified actor, if there is one. `f` must not call into PostgreSQL.
pub fn with_actor<R>(f: impl FnOnce(Option<&Actor>) -> R) -> R {
    STATE.with(|s| f(s.actor.as_ref()))
}

/// Changes whenever the actor changes.
pub fn generation() -> u64 {
    STATE.with(|s| s.generation)
}

/// Whether the session is restricted as an AI agent: by its token, by an earlier token, or because
/// its session user or current user is a member of `warden_agent`.
pub fn is_agent() -> bool {
    STATE.with(|s| s.was_agent || s.actor.as_ref().is_some_and(|a| a.kind == ActorKind::Agent))
        || is_agent_role()
}

/// Whether the token has run out. `now` gives microseconds since 2000-01-01 UTC. False where nobody
/// is logged in.
#[inline]
pub fn expired(now: impl FnOnce() -> i64) -> bool {
    STATE.with(|s| s.actor.is_some() && now() >= s.valid_until)
}

/// Forgets the identity, and remembers that it was an agent's. For `warden.logout()` and, so that a
/// pooler never hands one client's identity to the next, for DISCARD ALL.
pub fn clear() {
    let changed = STATE.with(|s| {
        let actor = s.actor.take();
        if let Some(a) = &actor {
            s.was_agent |= a.kind == ActorKind::Agent;
            s.generation += 1;
        }
        actor.is_some()
    });
    if changed {
        forget_plans();
    }
}

fn set(identity: Identity) {
    STATE.with(|s| {
        s.was_agent = identity.actor.kind == ActorKind::Agent;
        s.actor = Some(identity.actor);
        s.expires_at = (identity.expires_at - EPOCH) * 1_000_000;
        s.valid_until = (identity.valid_until - EPOCH) * 1_000_000;
        s.generation += 1;
    });
    forget_plans();
}

fn forget_plans() {
    // SAFETY: marks cached plans as invalid; may be called at any time.
    unsafe { pg_sys::ResetPlanCache() };
}

/// Whether a function is `warden.login`, `warden.logout` or `warden.whoami`: these stay callable
/// when the token has run out.
pub fn is_identity_function(oid: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups in a transaction; the tuple is released.
    unsafe {
        let schema = pg_sys::get_namespace_oid(c"warden".as_ptr(), true);
        if schema == pg_sys::InvalidOid {
            return false;
        }
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::PROCOID as c_int,
            pg_sys::Datum::from(oid),
        );
        if tuple.is_null() {
            return false;
        }
        let function = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>();
        let name = CStr::from_ptr((*function).proname.data.as_ptr());
        let found = (*function).pronamespace == schema
            && matches!(name.to_bytes(), b"login" | b"logout" | b"whoami");
        pg_sys::ReleaseSysCache(tuple);
        found
    }
}

// -------------------------------------------------------------------------------------- warden_agent

/// Whether these roles are members of `warden_agent`, as of one state of the roles' catalogs.
#[derive(Clone, Copy)]
struct Membership {
    session_user: pg_sys::Oid,
    current_user: pg_sys::Oid,
    roles: u64,
    is_agent: bool,
}

static MEMBERSHIP: Local<Option<Membership>> = Local::new(None);
/// Counts changes of roles and memberships; 0 before the callbacks are registered.
static ROLES: Local<u64> = Local::new(0);

fn is_agent_role() -> bool {
    // SAFETY: plain reads, and catalog look-ups inside a transaction only.
    unsafe {
        let session_user = pg_sys::GetSessionUserId();
        let current_user = pg_sys::GetUserId();
        let roles = ROLES.get();
        let known = MEMBERSHIP.get();
        if let Some(m) = known
            && (m.session_user, m.current_user, m.roles) == (session_user, current_user, roles)
        {
            return m.is_agent;
        }
        if !pg_sys::IsTransactionState() {
            // After an error there is no catalog: the last answer has to do.
            return known.is_some_and(|m| m.is_agent);
        }
        if roles == 0 {
            for cache in [
                pg_sys::SysCacheIdentifier::AUTHMEMROLEMEM,
                pg_sys::SysCacheIdentifier::AUTHOID,
            ] {
                let cache = cache as c_int;
                let nothing = pg_sys::Datum::from(0);
                pg_sys::CacheRegisterSyscacheCallback(cache, Some(roles_changed), nothing);
            }
            ROLES.set(1);
        }
        // Read first: a change that arrives during the look-ups makes the answer stale at once.
        let roles = ROLES.get();
        let agents = pg_sys::get_role_oid(c"warden_agent".as_ptr(), true);
        let is_agent = agents != pg_sys::InvalidOid
            && (pg_sys::is_member_of_role_nosuper(session_user, agents)
                || (current_user != session_user
                    && pg_sys::is_member_of_role_nosuper(current_user, agents)));
        MEMBERSHIP.set(Some(Membership {
            session_user,
            current_user,
            roles,
            is_agent,
        }));
        is_agent
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn roles_changed(_a: pg_sys::Datum, _b: c_int, _c: u32) {
    ROLES.with(|n| *n += 1);
}

// -------------------------------------------------------------------------------------- SQL functions

v1!(
    pg_finfo_warden_login,
    pg_finfo_warden_logout,
    pg_finfo_warden_whoami,
    pg_finfo_warden_check_issuer,
);

/// `warden.login(token text) RETURNS text`: the subject.
///
/// # Safety
/// Called by PostgreSQL's function manager.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn warden_login(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: one argument of type text, by the function's declaration.
    unsafe {
        secretly(c"SELECT warden.login($1)", || {
            clear();
            match accept(pg_getarg(fcinfo, 0)) {
                Ok(identity) => {
                    let subject = printable(&identity.actor.subject);
                    set(identity);
                    Ok(subject.into_datum().unwrap_or(pg_sys::Datum::from(0)))
                }
                Err(refused) => Err(raise::prepare(&refused.into())),
            }
        })
    }
}

/// `warden.logout() RETURNS void`.
///
/// # Safety
/// Called by PostgreSQL's function manager.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn warden_logout(_fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    clear();
    pg_sys::Datum::from(0)
}

/// Why a token gives no identity.
enum Refused {
    Token(TokenError),
    /// A dump carries no secrets: the issuer's was not put in again.
    NoSecret,
    /// The issuer's entry was written past `warden.add_issuer()`.
    Entry,
}

impl From<TokenError> for Refused {
    fn from(e: TokenError) -> Self {
        Self::Token(e)
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        let (detail, hint) = match refused {
            Refused::Token(e) => (sentence(&e.to_string()), e.hint()),
            Refused::NoSecret => (
                "The secret of the token's issuer is missing: a dump does not carry it.".to_owned(),
                "A member of warden_admin can put it in again with warden.add_issuer().",
            ),
            Refused::Entry => (
                "The entry of the token's issuer in warden.issuer is not valid.".to_owned(),
                "A member of warden_admin can replace it with warden.add_issuer().",
            ),
        };
        Self {
            code: RefusalCode::Identity,
            message: "identity token refused".into(),
            detail,
            hint: hint.into(),
            rule: "token".into(),
        }
    }
}

fn sentence(s: &str) -> String {
    let mut chars = s.chars();
    chars.next().map_or_else(String::new, |c| {
        format!("{}{}.", c.to_uppercase(), chars.as_str())
    })
}

fn accept(token: Option<&[u8]>) -> Result<Identity, Refused> {
    let token =
        std::str::from_utf8(token.unwrap_or_default()).map_err(|_| TokenError::Malformed)?;
    let token = Unverified::parse(token)?;
    let issuer = find_issuer(token.issuer())?;
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() }.div_euclid(1_000_000) + EPOCH;
    Ok(token.verify(&issuer, now)?)
}

/// Reads the issuer's entry. The table is short, and the current user may not read it.
fn find_issuer(name: &str) -> Result<Issuer, Refused> {
    let mut found = None;
    if let Some(table) = scan::warden_table("issuer") {
        scan::scan_table(table, |row| {
            if row.text("issuer").as_deref() == Some(name) {
                let secret = row.text("algorithm").as_deref() == Some(Algorithm::Hs256.name());
                let key = if secret {
                    find_secret(name)
                } else {
                    row.text("key")
                };
                found = Some(match key {
                    None if !secret => Err(Refused::Entry),
                    Some(key) => read_issuer(row, &key).ok_or(Refused::Entry),
                    None => Err(Refused::NoSecret),
                });
            }
        });
    }
    found.unwrap_or_else(|| Err(TokenError::UnknownIssuer.into()))
}

fn find_secret(issuer: &str) -> Option<String> {
    let mut found = None;
    scan::scan_table(scan::warden_table("issuer_secret")?, |row| {
        if row.text("issuer").as_deref() == Some(issuer) {
            found = row.text("secret");
        }
    });
    found
}

fn read_issuer(row: &scan::Row, key: &str) -> Option<Issuer> {
    let algorithm = Algorithm::parse(&row.text("algorithm")?)?;
    Some(Issuer {
        issuer: row.text("issuer")?,
        key: Key::parse(algorithm, key).ok()?,
        audience: row.text("audience")?,
        kind: ActorKind::parse(&row.text("kind")?)?,
        leeway: u32::try_from(row.i32("leeway_seconds")?).ok()?,
    })
}

/// `warden.whoami(OUT …)`: one row, in the order of the declaration.
///
/// # Safety
/// Called by PostgreSQL's function manager.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn warden_whoami(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: catalog look-ups in a transaction; the row type is that of the declaration, whose
    // columns `row` gives in the same number, order and types.
    unsafe {
        let now = pg_sys::GetCurrentTimestamp();
        let session_role = role_name(pg_sys::GetSessionUserId());
        let agent = is_agent();
        let (actor, expires_at) = STATE.with(|s| {
            let expires_at = s.actor.is_some().then_some(s.expires_at);
            (s.actor.clone(), expires_at)
        });
        let actor = actor.unwrap_or_else(|| Actor {
            subject: session_role.clone().unwrap_or_default(),
            kind: if agent {
                ActorKind::Agent
            } else {
                ActorKind::Unknown
            },
            trust: Trust::Role,
            ..Actor::default()
        });
        let text = |s: &str| (!s.is_empty()).then(|| printable(s)).into_datum();
        let groups: Vec<String> = actor.groups.iter().map(|g| printable(g)).collect();
        let row = [
            text(&actor.subject),
            text(actor.kind.name()),
            text(&actor.on_behalf_of),
            groups.into_datum(),
            text(actor.trust.name()),
            text(&actor.issuer),
            text(&actor.token_id),
            agent.into_datum(),
            session_role.into_datum(),
            role_name(pg_sys::GetUserId()).into_datum(),
            database_name().into_datum(),
            expires_at.map(pg_sys::Datum::from),
            expired(|| now).into_datum(),
        ];
        let mut desc = std::ptr::null_mut();
        let class = pg_sys::get_call_result_type(fcinfo, std::ptr::null_mut(), &raw mut desc);
        if class != pg_sys::TypeFuncClass::TYPEFUNC_COMPOSITE || (*desc).natts as usize != row.len()
        {
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_DATATYPE_MISMATCH,
                "warden.whoami() is not declared as this library defines it",
                function_name!(),
            )
            .set_hint("Run ALTER EXTENSION pg_warden UPDATE.")
            .report(PgLogLevel::ERROR);
        }
        let mut nulls = row.map(|d| d.is_none());
        let mut values = row.map(|d| d.unwrap_or(pg_sys::Datum::from(0)));
        let desc = pg_sys::BlessTupleDesc(desc);
        let tuple = pg_sys::heap_form_tuple(desc, values.as_mut_ptr(), nulls.as_mut_ptr());
        pg_sys::heap_copy_tuple_as_datum(tuple, desc)
    }
}

/// A role's name; `None` if it has been dropped.
fn role_name(role: pg_sys::Oid) -> Option<String> {
    // SAFETY: a catalog look-up in a transaction; the name is copied.
    unsafe { copied(pg_sys::GetUserNameFromId(role, true)) }
}

fn database_name() -> Option<String> {
    // SAFETY: a catalog look-up in a transaction; the name is copied.
    unsafe { copied(pg_sys::get_database_name(pg_sys::MyDatabaseId)) }
}

/// # Safety
/// `name` is NULL or NUL-terminated.
unsafe fn copied(name: *const std::ffi::c_char) -> Option<String> {
    if name.is_null() {
        return None;
    }
    // SAFETY: see above.
    let name = unsafe { CStr::from_ptr(name) };
    Some(name.to_string_lossy().into_owned())
}

/// Text from a token in the database's encoding: names outside ASCII need a database in UTF-8.
fn printable(s: &str) -> String {
    // SAFETY: reads a variable.
    let utf8 = unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as c_int;
    if utf8 || s.is_ascii() {
        return s.to_owned();
    }
    s.chars()
        .map(|c| if c.is_ascii() { c } else { '?' })
        .collect()
}

/// `warden.check_issuer(issuer, algorithm, key, audience, kind, leeway_seconds) RETURNS void`: fails
/// unless `warden.login()` can use such an entry. The statement holds a key, so it is not logged
/// with the error.
///
/// # Safety
/// Called by PostgreSQL's function manager.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn warden_check_issuer(
    fcinfo: pg_sys::FunctionCallInfo,
) -> pg_sys::Datum {
    // SAFETY: five arguments of type text and one integer, by the function's declaration.
    unsafe {
        secretly(c"SELECT warden.add_issuer(...)", || {
            let arg = |i| {
                let bytes: Option<&[u8]> = pg_getarg(fcinfo, i);
                bytes.and_then(|b| std::str::from_utf8(b).ok())
            };
            let fields = (arg(0), arg(1), arg(2), arg(3), arg(4), pg_getarg(fcinfo, 5));
            if let Err((problem, hint)) = check_issuer(fields) {
                ErrorReport::new(
                    PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE,
                    problem,
                    function_name!(),
                )
                .set_hint(hint)
                .report(PgLogLevel::ERROR);
            }
            Ok(pg_sys::Datum::from(0))
        })
    }
}

type Fields<'a> = (
    Option<&'a str>,
    Option<&'a str>,
    Option<&'a str>,
    Option<&'a str>,
    Option<&'a str>,
    Option<i32>,
);

fn check_issuer(fields: Fields<'_>) -> Result<(), (String, String)> {
    let fail = |problem: &str, hint: &str| Err((problem.to_owned(), hint.to_owned()));
    let (Some(issuer), Some(algorithm), Some(key), Some(audience), Some(kind), Some(leeway)) =
        fields
    else {
        return fail(
            "an issuer needs a value for each of its properties",
            "Give issuer, algorithm, key and audience; kind and leeway_seconds have defaults.",
        );
    };
    if issuer.trim() != issuer || issuer.is_empty() || issuer.len() > 1024 {
        return fail(
            "the issuer must be the exact text of the tokens' claim \"iss\"",
            "It is usually a URL, without blanks around it.",
        );
    }
    if audience.trim() != audience || audience.is_empty() || audience.len() > 1024 {
        return fail(
            "the audience must be the exact text of the tokens' claim \"aud\"",
            "Without an audience, tokens that were issued for other services would be accepted.",
        );
    }
    let Some(algorithm) = Algorithm::parse(algorithm) else {
        let names = Algorithm::ALL.map(Algorithm::name).join(", ");
        return fail(
            "unknown signature algorithm",
            &format!("Known ones are {names}."),
        );
    };
    if let Err(e) = Key::parse(algorithm, key) {
        let hint = if algorithm == Algorithm::Hs256 {
            "Give the secret itself, at least 32 bytes of it.".to_owned()
        } else {
            let kind = algorithm.key_kind();
            format!(
                "{} needs {kind}: as PEM (BEGIN PUBLIC KEY) or as one JWK.",
                algorithm.name()
            )
        };
        return fail(&e.to_string(), &hint);
    }
    if !matches!(kind, "human" | "service" | "agent") {
        return fail(
            "unknown kind of actor",
            "Known ones are human, service and agent.",
        );
    }
    if !(0..=MAX_LEEWAY).contains(&leeway) {
        return fail(
            "the leeway is out of range",
            &format!("It is in seconds, from 0 to {MAX_LEEWAY}."),
        );
    }
    Ok(())
}

// PostgreSQL's own function, not pgrx's guarded wrapper: called while an error is being raised.
unsafe extern "C" {
    fn errhidestmt(hide_stmt: bool) -> c_int;
}

/// Runs `f` for a statement whose text holds a secret: pg_stat_activity shows `instead`, and no
/// error on the way, ours or PostgreSQL's, puts the statement or its parameters into the log. Nor
/// has the error a CONTEXT: callers describe themselves by their SQL and its parameters.
///
/// # Safety
/// The caller is called by PostgreSQL, and owns nothing with a destructor.
unsafe fn secretly(
    instead: &CStr,
    f: impl FnOnce() -> Result<pg_sys::Datum, Raised>,
) -> pg_sys::Datum {
    // SAFETY: the callback's record lives in this frame until it is taken off the stack, or until
    // the error has left the frame; whoever catches the error puts his own stack back.
    unsafe {
        let callers = pg_sys::error_context_stack;
        let mut quiet = pg_sys::ErrorContextCallback {
            previous: std::ptr::null_mut(),
            callback: Some(hide_statement),
            arg: std::ptr::null_mut(),
        };
        pg_sys::error_context_stack = &raw mut quiet;
        let result = pgrx_extern_c_guard(|| {
            pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, instead.as_ptr());
            f()
        });
        match result {
            Ok(datum) => {
                pg_sys::error_context_stack = callers;
                datum
            }
            Err(raised) => raise::raise(raised),
        }
    }
}

unsafe extern "C-unwind" fn hide_statement(_: *mut c_void) {
    // SAFETY: PostgreSQL calls this while it completes an error.
    unsafe { errhidestmt(true) };
}
