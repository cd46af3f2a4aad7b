//! Masking by rewriting, before a query is planned (DESIGN section 7).
//!
//! Where a relation has masks and the identity is under them, the relation's range table entry
//! becomes, in place, a subquery over itself whose target list masks the columns: what the rewriter
//! does for a view. Everything above it reads the masks and cannot tell. The target of UPDATE,
//! DELETE and MERGE cannot be a subquery: there, reading a masked column is refused, and RETURNING
//! shows masks.
//!
//! What was masked is noted in the planned statement itself, as invalidation items that match no
//! cache, so that a cached plan keeps its notes.

use crate::error::{Refusal, RefusalCode};
use crate::pg::compat::pointers;
use crate::pg::policy::{self, Masks, RelMasks, Unreadable};
use crate::pg::session::text;
use crate::pg::shape::PlanShape;
use crate::pg::walk::{
    self, expression_tree_mutator, expression_tree_walker, guarded, query_tree_mutator,
    query_tree_walker,
};
use crate::pg::{exposure, identity, reference, scan, shape, version, withhold};
use pgrx::pg_guard;
use pgrx::pg_sys::{self, NodeTag as T, Oid};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::rc::Rc;
use warden_core::guardrail::label;
use warden_core::reference::Reference;

/// `cacheId` of the note that carries flags.
const NOTE_FLAGS: c_int = -1;
/// `cacheId` of the notes of the shape's key: its lower and its upper half.
const NOTE_SHAPE: [c_int; 2] = [-2, -3];
/// `cacheId` of a relation that the plan depends on, on its way there.
const NOTE_RELATION: c_int = -4;
/// `cacheId` of the note of a function that the query calls.
const NOTE_CALL: c_int = -5;
/// `cacheId` of the note of a mask is this less the column's number; a second item, one
/// [`NOTE_FUNCTION`] lower, has the function.
const NOTE_COLUMN: c_int = -10_000;
const NOTE_FUNCTION: c_int = -100_000;
/// `pg_statistic_ext`, of pg_statistic_ext.h.
const STATISTIC_EXT: Oid = Oid::from_u32(3381);
/// `pg_statistic_ext_data`, of pg_statistic_ext_data.h.
const STATISTIC_EXT_DATA: Oid = Oid::from_u32(3429);
/// Language `sql`, of pg_language.dat.
const SQL_LANGUAGE: Oid = Oid::from_u32(14);
/// `oid <> oid` of pg_operator.dat.
const OID_NOT_EQUAL: Oid = Oid::from_u32(608);
/// `pg_index`'s index on `indrelid`, of pg_index.h.
const INDEX_BY_RELATION: Oid = Oid::from_u32(2678);
const FLAG_UPDATE: u32 = 1;
const FLAG_DELETE: u32 = 2;
const FLAG_ROLE: u32 = 4;
const FLAG_INTEGRITY: u32 = 8;

/// A column that a statement reads masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Annotation {
    pub relation: Oid,
    pub attribute: i16,
    pub function: Oid,
}

/// What rewriting has done.
#[derive(Debug, Default)]
pub struct Rewritten {
    masked: Vec<Annotation>,
    /// The plan depends on who runs it.
    by_role: bool,
    /// The query is a foreign key's own: it reads what is stored, for everyone.
    integrity: bool,
    /// Functions of triggers, and the relations that have them: the plan is made again when they change.
    triggers: Vec<(Oid, Oid)>,
}

impl Rewritten {
    /// The plan depends on a trigger's function, and on the triggers of a relation.
    pub fn depend_on(&mut self, function: Oid, relation: Oid) {
        self.triggers.push((function, relation));
    }
}

struct Walk {
    masks: Rc<Masks>,
    apply: bool,
    out: Rewritten,
    refusal: Option<Refusal>,
}

/// Masks a query in place.
///
/// # Safety
/// `parse` is a valid rewritten Query that the planner may change, in a transaction.
pub unsafe fn mask_query(
    parse: *mut pg_sys::Query,
    source: *const c_char,
) -> Result<Rewritten, Refusal> {
    // SAFETY: a valid query and its text.
    let integrity = unsafe { is_integrity_check(parse, source) };
    let masks = policy::masks();
    if integrity {
        let mut out = Rewritten {
            integrity,
            ..Rewritten::default()
        };
        // What a cascade changes fires triggers as well.
        // SAFETY: a valid query.
        unsafe {
            let rti = (*parse).resultRelation;
            if rti != 0 {
                let target = pg_sys::list_nth((*parse).rtable, rti - 1);
                let relation = (*target.cast::<pg_sys::RangeTblEntry>()).relid;
                if masks.of(relation).is_some() {
                    exposure::check_target(parse, relation, &masks, &mut out)?;
                }
            }
        }
        return Ok(out);
    }
    if masks.is_empty() {
        return Ok(Rewritten::default());
    }
    let apply = !masks.exempts();
    let mut walk = Walk {
        masks,
        apply,
        out: Rewritten::default(),
        refusal: None,
    };
    // SAFETY: a valid query. Those that are inside of others come first: afterwards what holds them may
    // be a copy, and the subqueries that we make are not looked at again.
    unsafe {
        let queries: Vec<_> = pointers(walk::queries(parse)).collect();
        for query in queries.into_iter().rev() {
            walk_query(query, &mut walk);
        }
    }
    // What refreshes a materialized view is its owner, whatever the session says.
    // SAFETY: reads variables of this process.
    let complete = unsafe { !pg_sys::row_security && !pg_sys::InSecurityRestrictedOperation() };
    match walk.refusal {
        Some(refusal) => Err(refusal),
        None if complete && !walk.out.masked.is_empty() => Err(incomplete(&walk.out.masked[0])),
        None => Ok(walk.out),
    }
}

/// Nobody can say what must be masked: after a restore, or with another library.
fn unreadable(why: &Unreadable<'_>) -> Refusal {
    let (message, detail, hint) = match why {
        Unreadable::NoColumn(target) => (
            format!("the mask of {target} has no such column to mask"),
            "What it was to hide may be there under another name, so nothing is read.",
            "A member of warden_admin can mask the right column with warden.mask(), \
             and remove this mask with warden.unmask().",
        ),
        Unreadable::Outdated(version) => (
            version::problem(version),
            "What is masked cannot be told, so nothing is read.",
            version::HINT,
        ),
    };
    Refusal {
        code: RefusalCode::Blocked,
        message,
        detail: detail.into(),
        hint: hint.into(),
        rule: "mask".into(),
    }
}

/// Who says `row_security = off`, as pg_dump does, wants what is stored, or an error.
fn incomplete(masked: &Annotation) -> Refusal {
    let target = Reference::Column(masked.relation.to_u32(), masked.attribute);
    let target = reference::names(target).print();
    Refusal {
        code: RefusalCode::Blocked,
        message: format!(
            "{} is masked for this role",
            String::from_utf8_lossy(&target)
        ),
        detail: "With row_security = off, masks are not read in place of what is stored.".into(),
        hint: "To dump what is stored, use a role that warden.unmask_for() exempts; \
               to dump masks, pg_dump --enable-row-security."
            .into(),
        rule: "mask".into(),
    }
}

unsafe extern "C" {
    fn InNoForceRLSOperation() -> bool;
}

/// An entry that will be a subquery.
struct Job {
    rti: u32,
    rte: *mut pg_sys::RangeTblEntry,
    masks: Rc<RelMasks>,
    /// System columns that the query reads, in the order of their numbers in the subquery.
    system: Vec<i16>,
}

unsafe fn walk_query(q: *mut pg_sys::Query, w: &mut Walk) {
    // SAFETY: a valid query.
    unsafe {
        let excluded = if (*q).onConflict.is_null() {
            0
        } else {
            (*(*q).onConflict).exclRelIndex as u32
        };
        let entries: Vec<*mut pg_sys::RangeTblEntry> = pointers((*q).rtable).collect();
        let mut jobs = Vec::new();
        for (i, rte) in entries.into_iter().enumerate() {
            let rti = i as u32 + 1;
            if (*rte).rtekind != pg_sys::RTEKind::RTE_RELATION || rti == excluded {
                continue;
            }
            let Some(masks) = masks_of(w, (*rte).relid) else {
                continue;
            };
            w.out.by_role = true;
            if rti == (*q).resultRelation as u32
                && let Err(refusal) = exposure::check_target(q, (*rte).relid, &w.masks, &mut w.out)
            {
                w.refusal = Some(refusal);
            }
            if !w.apply {
                continue;
            }
            let only_filled = rti == (*q).resultRelation as u32
                && (*q).commandType == pg_sys::CmdType::CMD_INSERT
                && (*q).onConflict.is_null()
                && (*q).returningList.is_null();
            if let Some(why) = w.masks.unreadable((*rte).relid).filter(|_| !only_filled) {
                w.refusal = Some(unreadable(&why));
                continue;
            }
            if rti == (*q).resultRelation as u32 {
                mask_target(q, rti, (*rte).relid, &masks, w);
            } else {
                jobs.push(Job {
                    rti,
                    rte,
                    masks,
                    system: Vec::new(),
                });
            }
        }
        if !jobs.is_empty() {
            number_system_columns(q, &mut jobs);
        }
        for job in &jobs {
            mask_entry(q, job, w);
        }
    }
}

/// A subquery has no system columns: those that are read become ordinary ones, after the others.
unsafe fn number_system_columns(q: *mut pg_sys::Query, jobs: &mut [Job]) {
    let mut numbering = Numbering { jobs, depth: 0 };
    let context = (&raw mut numbering).cast();
    // SAFETY: a valid query; the context outlives the walk.
    unsafe { guarded(|| query_tree_walker(q, Some(number), context, 0)) };
}

struct Numbering<'a> {
    jobs: &'a mut [Job],
    depth: u32,
}

unsafe extern "C-unwind" fn number(n: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: called with our context by PostgreSQL's walkers; a Var that is met twice has its new
    // number by then.
    unsafe {
        if n.is_null() {
            return false;
        }
        match (*n).type_ {
            T::T_Var => {
                if (*n.cast::<pg_sys::Var>()).varattno < 0 {
                    renumber(n.cast(), context.cast());
                }
                false
            }
            T::T_Query => {
                (*context.cast::<Numbering<'_>>()).depth += 1;
                let stop = query_tree_walker(n.cast(), Some(number), context, 0);
                (*context.cast::<Numbering<'_>>()).depth -= 1;
                stop
            }
            _ => expression_tree_walker(n, Some(number), context),
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn renumber(v: *mut pg_sys::Var, context: *mut Numbering<'_>) {
    // SAFETY: a valid Var, and the context of `number`.
    unsafe {
        let s = &mut *context;
        if (*v).varlevelsup != s.depth {
            return;
        }
        let Some(job) = s.jobs.iter_mut().find(|j| j.rti == (*v).varno as u32) else {
            return;
        };
        let attribute = (*v).varattno;
        let known = job.system.iter().position(|a| *a == attribute);
        let index = known.unwrap_or_else(|| {
            job.system.push(attribute);
            job.system.len() - 1
        });
        let natts = crate::pg::compat::natts((*job.rte).relid);
        (*v).varattno = (natts + 1 + index as i16) as _;
    }
}

/// The masks of a relation; an empty list for the statistics catalogs, whose rows are hidden.
fn masks_of(w: &Walk, relation: Oid) -> Option<Rc<RelMasks>> {
    if relation == pg_sys::StatisticRelationId || relation == STATISTIC_EXT_DATA {
        return Some(Rc::new(Vec::new()));
    }
    w.masks.of(relation)
}

/// Turns a relation's entry into a subquery over itself.
unsafe fn mask_entry(q: *mut pg_sys::Query, job: &Job, w: &mut Walk) {
    // SAFETY: a valid query and entry; every node is made in the current context, as the planner's
    // own are.
    unsafe {
        let Job { rti, rte, .. } = *job;
        let relid = (*rte).relid;
        let read = columns_read(q, rte);
        for (attribute, function) in job.masks.iter() {
            let all = read.contains(&0);
            if all || read.contains(&i32::from(*attribute)) {
                note(w, relid, *attribute, *function);
            }
        }
        let sub = node::<pg_sys::Query>(T::T_Query);
        (*sub).commandType = pg_sys::CmdType::CMD_SELECT;
        (*sub).querySource = pg_sys::QuerySource::QSRC_ORIGINAL;
        (*sub).canSetTag = true;
        let inner = pg_sys::copyObjectImpl(rte.cast()).cast::<pg_sys::RangeTblEntry>();
        // Security quals speak of the relation by its number.
        pg_sys::ChangeVarNodes((*inner).securityQuals.cast(), rti as c_int, 1, 0);
        // What TABLESAMPLE takes from queries around us is one level further away now.
        pg_sys::IncrementVarSublevelsUp((*inner).tablesample.cast(), 1, 0);
        (*inner).lateral = false;
        (*sub).rtable = pg_sys::lappend(std::ptr::null_mut(), inner.cast());
        let reference = node::<pg_sys::RangeTblRef>(T::T_RangeTblRef);
        (*reference).rtindex = 1;
        let from = pg_sys::lappend(std::ptr::null_mut(), reference.cast());
        (*sub).jointree = pg_sys::makeFromExpr(from, hidden_rows(relid, w));
        (*sub).hasSubLinks = !(*inner).securityQuals.is_null()
            && pg_sys::checkExprHasSubLink((*inner).securityQuals.cast());
        (*sub).hasRowSecurity = !(*inner).securityQuals.is_null();
        (*sub).targetList = target_list(relid, &job.masks);
        add_system_columns(rte, sub, &job.system);
        move_permissions(q, rte, sub, inner);
        for mark in pointers::<pg_sys::RowMarkClause>((*q).rowMarks) {
            if (*mark).rti == rti {
                let down = pg_sys::copyObjectImpl(mark.cast()).cast::<pg_sys::RowMarkClause>();
                (*down).rti = 1;
                (*down).pushedDown = true;
                // hasForUpdate stays false, as in the rewriter: the subquery is pulled up, and rows
                // are locked where the query asked for it, above its LIMIT's sort.
                (*sub).rowMarks = pg_sys::lappend((*sub).rowMarks, down.cast());
            }
        }
        (*rte).rtekind = pg_sys::RTEKind::RTE_SUBQUERY;
        (*rte).subquery = sub;
        (*rte).security_barrier = false;
        (*rte).securityQuals = std::ptr::null_mut();
        (*rte).tablesample = std::ptr::null_mut();
        (*rte).inh = false;
    }
}

/// System columns as columns of the subquery. They are junk to it, so that its whole row is still
/// the relation's.
unsafe fn add_system_columns(
    rte: *mut pg_sys::RangeTblEntry,
    sub: *mut pg_sys::Query,
    system: &[i16],
) {
    if system.is_empty() {
        return;
    }
    // SAFETY: a valid entry and its subquery; nodes of the current context.
    unsafe {
        let natts = (*(*sub).targetList).length as i16;
        let eref = pg_sys::copyObjectImpl((*rte).eref.cast()).cast::<pg_sys::Alias>();
        (*rte).eref = eref;
        while i32::from(natts) > length((*eref).colnames) {
            // Added since the query was parsed: nothing refers to it.
            (*eref).colnames = pg_sys::lappend((*eref).colnames, name_node(c"".as_ptr()));
        }
        for (i, attribute) in system.iter().enumerate() {
            let a = &*pg_sys::SystemAttributeDefinition(*attribute);
            let var = pg_sys::makeVar(
                1,
                *attribute as _,
                a.atttypid,
                a.atttypmod,
                a.attcollation,
                0,
            );
            let name = a.attname.data.as_ptr();
            let resno = natts + 1 + i as i16;
            let entry =
                pg_sys::makeTargetEntry(var.cast(), resno as _, pg_sys::pstrdup(name), true);
            (*sub).targetList = pg_sys::lappend((*sub).targetList, entry.cast());
            (*eref).colnames = pg_sys::lappend((*eref).colnames, name_node(name));
        }
    }
}

fn length(list: *mut pg_sys::List) -> i32 {
    // SAFETY: null or a valid list.
    if list.is_null() {
        0
    } else {
        // SAFETY: a valid list.
        unsafe { (*list).length }
    }
}

unsafe fn name_node(name: *const c_char) -> *mut c_void {
    // SAFETY: a name's copy in the current context.
    unsafe { pg_sys::makeString(pg_sys::pstrdup(name)).cast() }
}

/// Permissions are checked on the relation, inside.
#[cfg(feature = "pg15")]
unsafe fn move_permissions(
    _q: *mut pg_sys::Query,
    rte: *mut pg_sys::RangeTblEntry,
    _sub: *mut pg_sys::Query,
    _inner: *mut pg_sys::RangeTblEntry,
) {
    // SAFETY: a valid entry.
    unsafe {
        (*rte).requiredPerms = 0;
        (*rte).selectedCols = std::ptr::null_mut();
        (*rte).insertedCols = std::ptr::null_mut();
        (*rte).updatedCols = std::ptr::null_mut();
        (*rte).relid = pg_sys::InvalidOid;
        (*rte).relkind = 0;
        (*rte).rellockmode = 0;
    }
}

/// Permissions are checked on the relation, inside.
#[cfg(not(feature = "pg15"))]
unsafe fn move_permissions(
    q: *mut pg_sys::Query,
    rte: *mut pg_sys::RangeTblEntry,
    sub: *mut pg_sys::Query,
    inner: *mut pg_sys::RangeTblEntry,
) {
    // SAFETY: a valid entry, whose index is that of its permissions.
    unsafe {
        if (*rte).perminfoindex == 0 {
            return;
        }
        let outer = pg_sys::getRTEPermissionInfo((*q).rteperminfos, rte);
        let copy = pg_sys::copyObjectImpl(outer.cast());
        (*sub).rteperminfos = pg_sys::lappend(std::ptr::null_mut(), copy);
        (*inner).perminfoindex = 1;
        (*outer).requiredPerms = 0;
    }
}

#[cfg(feature = "pg15")]
unsafe fn columns_read(_q: *mut pg_sys::Query, rte: *mut pg_sys::RangeTblEntry) -> Vec<i32> {
    // SAFETY: a valid entry.
    unsafe { crate::pg::compat::attributes((*rte).selectedCols) }
}

#[cfg(not(feature = "pg15"))]
unsafe fn columns_read(q: *mut pg_sys::Query, rte: *mut pg_sys::RangeTblEntry) -> Vec<i32> {
    // SAFETY: a valid entry.
    unsafe {
        if (*rte).perminfoindex == 0 {
            return vec![0];
        }
        let p = pg_sys::getRTEPermissionInfo((*q).rteperminfos, rte);
        crate::pg::compat::attributes((*p).selectedCols)
    }
}

fn note(w: &mut Walk, relation: Oid, attribute: i16, function: Oid) {
    let a = Annotation {
        relation,
        attribute,
        function,
    };
    if !w.out.masked.contains(&a) {
        w.out.masked.push(a);
    }
}

unsafe fn node<N>(tag: T) -> *mut N {
    // SAFETY: zeroed memory of the node's size; the tag comes first in every node.
    unsafe {
        let p = pg_sys::palloc0(size_of::<N>()).cast::<pg_sys::Node>();
        (*p).type_ = tag;
        p.cast()
    }
}

/// All columns of a relation, those with masks masked; generated columns are computed from masks.
unsafe fn target_list(relid: Oid, masks: &RelMasks) -> *mut pg_sys::List {
    // SAFETY: the relation is locked by the query.
    unsafe {
        let rel = pg_sys::table_open(relid, pg_sys::NoLock as _);
        let desc = (*rel).rd_att;
        let mut list = std::ptr::null_mut();
        for i in 0..(*desc).natts {
            let a = &*scan::attribute(desc, i as usize);
            let number = (i + 1) as i16;
            let (expr, name) = if a.attisdropped {
                let null = pg_sys::makeConst(
                    pg_sys::INT4OID,
                    -1,
                    pg_sys::InvalidOid,
                    4,
                    pg_sys::Datum::from(0),
                    true,
                    true,
                );
                (null.cast(), pg_sys::pstrdup(c"".as_ptr()))
            } else {
                let var =
                    pg_sys::makeVar(1, number as _, a.atttypid, a.atttypmod, a.attcollation, 0);
                let expr = match masks.iter().find(|(m, _)| *m == number) {
                    Some((_, function)) => masked(var.cast(), a, *function),
                    None if a.attgenerated != 0 => generated(rel, a, masks, var),
                    None => var.cast(),
                };
                (expr, pg_sys::pstrdup(a.attname.data.as_ptr()))
            };
            let entry = pg_sys::makeTargetEntry(expr, number as _, name, false);
            list = pg_sys::lappend(list, entry.cast());
        }
        pg_sys::table_close(rel, pg_sys::NoLock as _);
        list
    }
}

/// The mask of an expression of a column's type. Where the types do not fit any more, NULL.
unsafe fn masked(
    value: *mut pg_sys::Expr,
    a: &pg_sys::FormData_pg_attribute,
    function: Oid,
) -> *mut pg_sys::Expr {
    // SAFETY: catalog look-ups in a transaction; nodes of the current context.
    unsafe {
        let mut typmod = a.atttypmod;
        let base = pg_sys::getBaseTypeAndTypmod(a.atttypid, &mut typmod);
        let call = if fits(base, function) {
            call_mask(value, a, function, base, typmod)
        } else {
            std::ptr::null_mut()
        };
        if call.is_null() {
            let mut length = 0;
            let mut by_value = false;
            pg_sys::get_typlenbyval(a.atttypid, &mut length, &mut by_value);
            return pg_sys::makeConst(
                a.atttypid,
                a.atttypmod,
                a.attcollation,
                c_int::from(length),
                pg_sys::Datum::from(0),
                true,
                by_value,
            )
            .cast();
        }
        if base == a.atttypid {
            return call;
        }
        // A mask need not satisfy the domain's constraints; it must only have its type.
        pg_sys::makeRelabelType(
            call,
            a.atttypid,
            a.atttypmod,
            a.attcollation,
            pg_sys::CoercionForm::COERCE_IMPLICIT_CAST,
        )
        .cast()
    }
}

/// Whether a mask function still fits a type, which may have been altered since: a value must be
/// assignable to its argument, and its result to the column.
unsafe fn fits(base: Oid, function: Oid) -> bool {
    // SAFETY: catalog look-ups in a transaction; the type array has `n` elements.
    unsafe {
        let mut types: *mut Oid = std::ptr::null_mut();
        let mut n = 0;
        let exists = pg_sys::SearchSysCacheExists(
            pg_sys::SysCacheIdentifier::PROCOID as c_int,
            pg_sys::Datum::from(function),
            pg_sys::Datum::from(0),
            pg_sys::Datum::from(0),
            pg_sys::Datum::from(0),
        );
        if !exists {
            return false;
        }
        let declared = pg_sys::get_func_signature(function, &mut types, &mut n);
        let assignable = |from: Oid, to: Oid| {
            is_any(from)
                || is_any(to)
                || pg_sys::can_coerce_type(
                    1,
                    &from,
                    &to,
                    pg_sys::CoercionContext::COERCION_ASSIGNMENT,
                )
        };
        n == 1 && assignable(base, *types) && assignable(declared, base)
    }
}

unsafe fn call_mask(
    value: *mut pg_sys::Expr,
    a: &pg_sys::FormData_pg_attribute,
    function: Oid,
    base: Oid,
    typmod: i32,
) -> *mut pg_sys::Expr {
    use pg_sys::{CoercionContext as C, CoercionForm as F};
    // SAFETY: as in `masked`; the type array of a function with one argument has one element.
    unsafe {
        let mut types: *mut Oid = std::ptr::null_mut();
        let mut n = 0;
        let declared = pg_sys::get_func_signature(function, &mut types, &mut n);
        let polymorphic = is_any(*types);
        let argument = if polymorphic {
            value.cast()
        } else {
            coerce(value.cast(), a.atttypid, *types, -1, C::COERCION_EXPLICIT)
        };
        if argument.is_null() {
            return std::ptr::null_mut();
        }
        let result = if is_any(declared) {
            a.atttypid
        } else {
            declared
        };
        // The argument's collation decides inside the function, the column's outside.
        let call = pg_sys::makeFuncExpr(
            function,
            result,
            pg_sys::lappend(std::ptr::null_mut(), argument.cast()),
            if pg_sys::type_is_collatable(result) {
                or_default(a.attcollation)
            } else {
                pg_sys::InvalidOid
            },
            or_default(a.attcollation),
            F::COERCE_EXPLICIT_CALL,
        );
        if result == a.atttypid && base != a.atttypid {
            return call.cast();
        }
        let cast = coerce(call.cast(), result, base, typmod, C::COERCION_EXPLICIT);
        if !cast.is_null() && pg_sys::type_is_collatable(base) {
            pg_sys::exprSetCollation(cast.cast(), a.attcollation);
        }
        cast.cast()
    }
}

fn or_default(collation: Oid) -> Oid {
    if collation == pg_sys::InvalidOid {
        pg_sys::DEFAULT_COLLATION_OID
    } else {
        collation
    }
}

fn is_any(t: Oid) -> bool {
    matches!(
        t,
        pg_sys::ANYELEMENTOID
            | pg_sys::ANYNONARRAYOID
            | pg_sys::ANYARRAYOID
            | pg_sys::ANYCOMPATIBLEOID
    )
}

unsafe fn coerce(
    expr: *mut pg_sys::Node,
    from: Oid,
    to: Oid,
    typmod: i32,
    context: pg_sys::CoercionContext::Type,
) -> *mut pg_sys::Node {
    // SAFETY: a valid expression of type `from`; no parse state is needed without parameters.
    unsafe {
        pg_sys::coerce_to_target_type(
            std::ptr::null_mut(),
            expr,
            from,
            to,
            typmod,
            context,
            pg_sys::CoercionForm::COERCE_EXPLICIT_CAST,
            -1,
        )
    }
}

/// A generated column, computed from masks if it is made from masked columns.
unsafe fn generated(
    rel: pg_sys::Relation,
    a: &pg_sys::FormData_pg_attribute,
    masks: &RelMasks,
    var: *mut pg_sys::Var,
) -> *mut pg_sys::Expr {
    // SAFETY: the relation is open; the expression is a copy.
    unsafe {
        let expr = pg_sys::build_column_default(rel, c_int::from(a.attnum));
        let mut used = std::ptr::null_mut();
        if !expr.is_null() {
            pg_sys::pull_varattnos(expr, 1, &mut used);
        }
        let used = crate::pg::compat::attributes(used);
        let touches = used.contains(&0) || masks.iter().any(|(m, _)| used.contains(&i32::from(*m)));
        if !touches {
            return var.cast();
        }
        let mut r = Replace {
            varno: 1,
            depth: 0,
            rel,
            masks,
            like: None,
        };
        r.run(expr).cast()
    }
}

/// Replaces the Vars of a relation's masked columns by their masks.
struct Replace<'a> {
    varno: c_int,
    depth: u32,
    rel: pg_sys::Relation,
    masks: &'a RelMasks,
    /// What all of them become Vars like: the expression of a generated column speaks of its
    /// relation as number 1.
    like: Option<*mut pg_sys::Var>,
}

impl Replace<'_> {
    /// A copy of a tree, with the Vars replaced.
    unsafe fn run(&mut self, n: *mut pg_sys::Node) -> *mut pg_sys::Node {
        let context = std::ptr::from_mut(self).cast();
        // SAFETY: a valid tree or null; the context outlives the walk.
        unsafe { guarded(|| replace(n, context)) }
    }
}

unsafe extern "C-unwind" fn replace(
    n: *mut pg_sys::Node,
    context: *mut c_void,
) -> *mut pg_sys::Node {
    // SAFETY: called with our context, directly or by PostgreSQL's mutators.
    unsafe {
        if n.is_null() {
            return n;
        }
        let r = context.cast::<Replace<'_>>();
        match (*n).type_ {
            T::T_Var => {
                let v = n.cast::<pg_sys::Var>();
                if (*v).varno as c_int == (*r).varno && (*v).varlevelsup == (*r).depth {
                    return replacement(v, r);
                }
                walk::copy(n.cast()).cast()
            }
            T::T_Query => {
                (*r).depth += 1;
                let q = query_tree_mutator(n.cast(), Some(replace), context, 0);
                (*r).depth -= 1;
                q.cast()
            }
            _ => expression_tree_mutator(n, Some(replace), context),
        }
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn replacement(
    v: *mut pg_sys::Var,
    r: *mut Replace<'_>,
) -> *mut pg_sys::Node {
    // SAFETY: a Var of the open relation, and the context of `replace`.
    unsafe {
        let r = &*r;
        if (*v).varattno == 0 {
            return whole_row(v, r).cast();
        }
        column(r.like.unwrap_or(v), (*v).varattno, r).cast()
    }
}

/// A column of the relation that `v` speaks of, masked if it has to be.
unsafe fn column(v: *mut pg_sys::Var, number: i16, r: &Replace<'_>) -> *mut pg_sys::Expr {
    // SAFETY: a valid Var of the open relation; nodes of the current context.
    unsafe {
        let var = pg_sys::copyObjectImpl(v.cast()).cast::<pg_sys::Var>();
        if number <= 0 {
            return var.cast();
        }
        let a = &*scan::attribute((*r.rel).rd_att, number as usize - 1);
        if (*v).varattno != number {
            (*var).varattno = number as _;
            (*var).varattnosyn = number as _;
            (*var).vartype = a.atttypid;
            (*var).vartypmod = a.atttypmod;
            (*var).varcollid = a.attcollation;
        }
        let Some((_, function)) = r.masks.iter().find(|(m, _)| *m == number) else {
            return var.cast();
        };
        if *function != pg_sys::InvalidOid || a.attgenerated == 0 {
            return masked(var.cast(), a, *function);
        }
        let expr = pg_sys::build_column_default(r.rel, c_int::from(number));
        let mut like = Replace {
            varno: 1,
            depth: 0,
            rel: r.rel,
            masks: r.masks,
            like: Some(v),
        };
        like.run(expr).cast()
    }
}

/// A whole row as a row of its columns, masked where they are.
unsafe fn whole_row(v: *mut pg_sys::Var, r: &Replace<'_>) -> *mut pg_sys::RowExpr {
    // SAFETY: a valid Var of the open relation; nodes of the current context.
    unsafe {
        let desc = (*r.rel).rd_att;
        let record = (*v).vartype == pg_sys::RECORDOID;
        let row = node::<pg_sys::RowExpr>(T::T_RowExpr);
        for i in 0..(*desc).natts {
            let a = &*scan::attribute(desc, i as usize);
            let value: *mut pg_sys::Expr = if a.attisdropped {
                if record {
                    continue;
                }
                pg_sys::makeNullConst(pg_sys::INT4OID, -1, pg_sys::InvalidOid).cast()
            } else {
                column(v, (i + 1) as i16, r)
            };
            (*row).args = pg_sys::lappend((*row).args, value.cast());
            if record {
                (*row).colnames =
                    pg_sys::lappend((*row).colnames, name_node(a.attname.data.as_ptr()));
            }
        }
        (*row).row_typeid = (*v).vartype;
        (*row).row_format = pg_sys::CoercionForm::COERCE_IMPLICIT_CAST;
        (*row).location = -1;
        row
    }
}

/// How many of a target's security conditions are of its row-level security policies.
unsafe fn policy_conditions(
    q: *mut pg_sys::Query,
    rti: u32,
    target: *mut pg_sys::RangeTblEntry,
    rel: pg_sys::Relation,
) -> usize {
    // SAFETY: a valid query and its target, an open relation. The rewriter has asked the same.
    unsafe {
        if !(*(*rel).rd_rel).relrowsecurity || (*target).securityQuals.is_null() {
            return 0;
        }
        let mut conditions = std::ptr::null_mut();
        let mut checks = std::ptr::null_mut();
        let mut applies = false;
        let mut has_sublinks = false;
        pg_sys::get_row_security_policies(
            q,
            target,
            rti as c_int,
            &mut conditions,
            &mut checks,
            &mut applies,
            &mut has_sublinks,
        );
        length(conditions) as usize
    }
}

/// The masked columns of a relation, and the generated ones that are made from them, which tell as much.
///
/// # Safety
/// `rel` is open.
pub unsafe fn sensitive(rel: pg_sys::Relation, masks: &RelMasks) -> RelMasks {
    let mut found = masks.clone();
    // SAFETY: an open relation; expressions of generated columns speak of it as number 1.
    unsafe {
        let desc = (*rel).rd_att;
        for i in 0..(*desc).natts {
            let a = &*scan::attribute(desc, i as usize);
            if a.attgenerated == 0 || a.attisdropped {
                continue;
            }
            let mut r = Reads::new(1, masks);
            r.look(pg_sys::build_column_default(rel, i + 1), 0);
            if r.found {
                found.push(((i + 1) as i16, pg_sys::InvalidOid));
            }
        }
    }
    found
}

/// Looks for reads of a target's masked columns.
struct Reads<'a> {
    varno: c_int,
    depth: u32,
    masks: &'a RelMasks,
    found: bool,
}

impl<'a> Reads<'a> {
    fn new(varno: c_int, masks: &'a RelMasks) -> Self {
        Self {
            varno,
            depth: 0,
            masks,
            found: false,
        }
    }

    /// Looks into a tree that is `depth` levels below the query of the target.
    unsafe fn look(&mut self, n: *mut pg_sys::Node, depth: u32) {
        self.depth = depth;
        let context = std::ptr::from_mut(self).cast();
        // SAFETY: a valid tree or null; the context outlives the walk.
        unsafe { guarded(|| reads(n, context)) };
    }
}

unsafe extern "C-unwind" fn reads(n: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: called with our context, directly or by PostgreSQL's walkers.
    unsafe {
        if n.is_null() {
            return false;
        }
        match (*n).type_ {
            T::T_Var => {
                let r = &mut *context.cast::<Reads<'_>>();
                let v = n.cast::<pg_sys::Var>();
                let ours = (*v).varno as c_int == r.varno && (*v).varlevelsup == r.depth;
                let read = (*v).varattno == 0 || r.masks.iter().any(|(m, _)| *m == (*v).varattno);
                r.found |= ours && read;
                r.found
            }
            T::T_Query => {
                (*context.cast::<Reads<'_>>()).depth += 1;
                let stop = query_tree_walker(n.cast(), Some(reads), context, 0);
                (*context.cast::<Reads<'_>>()).depth -= 1;
                stop
            }
            _ => expression_tree_walker(n, Some(reads), context),
        }
    }
}

/// The target of a data-modifying statement: what it reads of masked columns is refused, what it
/// returns is masked.
unsafe fn mask_target(
    q: *mut pg_sys::Query,
    rti: u32,
    relid: Oid,
    masks: &Rc<RelMasks>,
    w: &mut Walk,
) {
    // SAFETY: a valid query; the relation is locked by it.
    unsafe {
        let rel = pg_sys::table_open(relid, pg_sys::NoLock as _);
        let sensitive = sensitive(rel, masks);
        let mut r = Reads::new(rti as c_int, &sensitive);
        for part in [
            (*q).targetList.cast::<pg_sys::Node>(),
            (*q).jointree.cast(),
            (*q).mergeActionList.cast(),
        ] {
            r.look(part, 0);
        }
        let upsert = (*q).onConflict;
        if !upsert.is_null() {
            // The columns of the conflict itself are no more than the unique constraint tells.
            r.look((*upsert).onConflictSet.cast(), 0);
            r.look((*upsert).onConflictWhere, 0);
        }
        // A view's check of a row that was there before is a condition on it.
        if !upsert.is_null() || (*q).commandType != pg_sys::CmdType::CMD_INSERT {
            for check in pointers::<pg_sys::WithCheckOption>((*q).withCheckOptions) {
                if (*check).kind == pg_sys::WCOKind::WCO_VIEW_CHECK {
                    r.look((*check).qual, 0);
                }
            }
        }
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        r.look((*q).mergeJoinCondition, 0);
        // Subqueries and functions in FROM may refer to the target.
        for (i, rte) in pointers::<pg_sys::RangeTblEntry>((*q).rtable).enumerate() {
            if i as u32 + 1 != rti && (*rte).rtekind != pg_sys::RTEKind::RTE_RELATION {
                r.look((*rte).subquery.cast(), 0);
                r.look((*rte).functions.cast(), 0);
            }
        }
        // Conditions of security barrier views, but not those of row-level security, which come first:
        // that is the owner's.
        let target =
            pg_sys::list_nth((*q).rtable, rti as c_int - 1).cast::<pg_sys::RangeTblEntry>();
        let by_policy = policy_conditions(q, rti, target, rel);
        for condition in pointers((*target).securityQuals).skip(by_policy) {
            r.look(condition, 0);
        }
        if r.found {
            w.refusal = Some(Refusal {
                code: RefusalCode::Blocked,
                message: format!(
                    "masked columns of table \"{}\" cannot be read to change it",
                    text(pg_sys::get_rel_name(relid))
                ),
                detail: "A condition or an assignment reads a column that is masked for you."
                    .into(),
                hint: "Select the rows by columns that are not masked, and assign values that do \
                       not depend on masked columns."
                    .into(),
                rule: "masked_dml".into(),
            });
        } else if !(*q).returningList.is_null() {
            return_masks(q, rti, rel, &sensitive, w);
        }
        pg_sys::table_close(rel, pg_sys::NoLock as _);
    }
}

unsafe fn return_masks(
    q: *mut pg_sys::Query,
    rti: u32,
    rel: pg_sys::Relation,
    sensitive: &RelMasks,
    w: &mut Walk,
) {
    // SAFETY: as in `mask_target`.
    unsafe {
        let mut seen = Reads::new(rti as c_int, sensitive);
        seen.look((*q).returningList.cast(), 0);
        if !seen.found {
            return;
        }
        let mut r = Replace {
            varno: rti as c_int,
            depth: 0,
            rel,
            masks: sensitive,
            like: None,
        };
        (*q).returningList = r.run((*q).returningList.cast()).cast();
        for (attribute, function) in sensitive {
            if *function != pg_sys::InvalidOid {
                note(w, (*rel).rd_id, *attribute, *function);
            }
        }
    }
}

/// The condition that hides the statistics of masked relations, and of their indexes on
/// expressions: they hold sample values.
unsafe fn hidden_rows(relid: Oid, w: &Walk) -> *mut pg_sys::Node {
    let mut hidden: Vec<Oid> = Vec::new();
    if relid == pg_sys::StatisticRelationId {
        for relation in w.masks.relations() {
            hidden.push(relation);
            scan::scan_by_oid(
                pg_sys::IndexRelationId,
                INDEX_BY_RELATION,
                2,
                relation,
                |row| {
                    hidden.extend(row.oid("indexrelid"));
                },
            );
        }
    } else if relid == STATISTIC_EXT_DATA {
        let masked: Vec<Oid> = w.masks.relations().collect();
        scan::scan_table(STATISTIC_EXT, |row| {
            if row.oid("stxrelid").is_some_and(|r| masked.contains(&r)) {
                hidden.extend(row.oid("oid"));
            }
        });
    }
    if hidden.is_empty() {
        return std::ptr::null_mut();
    }
    // SAFETY: column 1 of both catalogs is the OID; nodes of the current context.
    unsafe {
        let mut values: Vec<pg_sys::Datum> =
            hidden.iter().map(|o| pg_sys::Datum::from(*o)).collect();
        let array = pg_sys::construct_array(
            values.as_mut_ptr(),
            values.len() as c_int,
            pg_sys::OIDOID,
            4,
            true,
            b'i' as c_char,
        );
        let oids = pg_sys::makeConst(
            pg_sys::OIDARRAYOID,
            -1,
            pg_sys::InvalidOid,
            -1,
            pg_sys::Datum::from(array),
            false,
            false,
        );
        let var = pg_sys::makeVar(1, 1, pg_sys::OIDOID, -1, pg_sys::InvalidOid, 0);
        let differs = node::<pg_sys::ScalarArrayOpExpr>(T::T_ScalarArrayOpExpr);
        (*differs).opno = OID_NOT_EQUAL;
        (*differs).opfuncid = pg_sys::get_opcode(OID_NOT_EQUAL);
        (*differs).useOr = false;
        (*differs).args = pg_sys::lappend(std::ptr::null_mut(), var.cast());
        (*differs).args = pg_sys::lappend((*differs).args, oids.cast());
        (*differs).location = -1;
        differs.cast()
    }
}

// ------------------------------------------------------------------------------------ foreign keys

unsafe extern "C" {
    fn dladdr(address: *const c_void, info: *mut libc::Dl_info) -> c_int;
}

/// Whether this is a foreign key's own query. Those read what is stored, whoever made them run. But
/// a user's trigger that a cascade fires runs in the same security context, so the context alone
/// proves nothing: the query must come from SPI, and not from a procedural language; must have the
/// form that PostgreSQL gives it, keys equal to parameters; and may read key columns only, whose
/// presence foreign keys tell anyway.
unsafe fn is_integrity_check(q: *mut pg_sys::Query, source: *const c_char) -> bool {
    // SAFETY: a valid query and its text or null; the error context stack is PostgreSQL's.
    unsafe {
        if !InNoForceRLSOperation() || source.is_null() {
            return false;
        }
        let text = CStr::from_ptr(source).to_bytes();
        let forms: [&[u8]; 4] = [
            b"SELECT 1 FROM ",
            b"DELETE FROM ",
            b"UPDATE ONLY \"",
            b"UPDATE \"",
        ];
        if !forms.iter().any(|f| text.starts_with(f)) {
            return false;
        }
        let spi = pg_sys::error_context_stack;
        if spi.is_null()
            || (*spi).arg.is_null()
            || (!withhold::ends((*spi).previous) && is_foreign((*(*spi).previous).callback))
        {
            return false;
        }
        // SPI's argument starts with the query's text; that of SQL functions does not.
        if *(*spi).arg.cast::<*const c_char>() != source {
            return false;
        }
        if !(*q).cteList.is_null() || (*q).hasSubLinks || length((*q).rtable) != 1 {
            return false;
        }
        let rte = pg_sys::list_nth((*q).rtable, 0).cast::<pg_sys::RangeTblEntry>();
        match (*rte).rtekind {
            pg_sys::RTEKind::RTE_RELATION => {
                !pg_sys::contain_var_clause((*q).targetList.cast())
                    && (*q).havingQual.is_null()
                    && compares_keys(q)
                    && reads_keys_only(q, rte)
            }
            // WITHOUT OVERLAPS, since 18.
            pg_sys::RTEKind::RTE_SUBQUERY => {
                let inner = (*rte).subquery;
                if !(*inner).cteList.is_null()
                    || (*inner).hasSubLinks
                    || length((*inner).rtable) != 1
                {
                    return false;
                }
                let rte = pg_sys::list_nth((*inner).rtable, 0).cast::<pg_sys::RangeTblEntry>();
                (*rte).rtekind == pg_sys::RTEKind::RTE_RELATION
                    && compares_keys(inner)
                    && reads_keys_only(inner, rte)
            }
            _ => false,
        }
    }
}

/// Whether the condition of a query is of columns that are equal to parameters, and no more.
unsafe fn compares_keys(q: *mut pg_sys::Query) -> bool {
    let mut parameters = false;
    // SAFETY: a valid query; the context outlives the walk.
    unsafe {
        let quals = (*(*q).jointree).quals;
        let context = (&raw mut parameters).cast();
        !quals.is_null() && !guarded(|| is_no_comparison(quals, context)) && parameters
    }
}

/// Range && range, of pg_operator.dat: how keys WITHOUT OVERLAPS are compared.
const RANGE_OVERLAPS: Oid = Oid::from_u32(3888);

unsafe extern "C-unwind" fn is_no_comparison(n: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: called with our context, directly or by PostgreSQL's walkers.
    unsafe {
        if n.is_null() {
            return false;
        }
        match (*n).type_ {
            T::T_Param => {
                *context.cast::<bool>() = true;
                return false;
            }
            T::T_Var | T::T_Const => return false,
            T::T_List
            | T::T_RelabelType
            | T::T_CoerceViaIO
            | T::T_ArrayCoerceExpr
            | T::T_CollateExpr => {}
            T::T_BoolExpr => {
                let and = pg_sys::BoolExprType::AND_EXPR;
                if (*n.cast::<pg_sys::BoolExpr>()).boolop != and {
                    return true;
                }
            }
            T::T_FuncExpr => {
                // An implicit cast.
                let function = (*n.cast::<pg_sys::FuncExpr>()).funcid;
                if function.to_u32() >= pg_sys::FirstNormalObjectId {
                    return true;
                }
            }
            T::T_OpExpr => {
                let operator = (*n.cast::<pg_sys::OpExpr>()).opno;
                if operator != RANGE_OVERLAPS && !is_equality(operator) {
                    return true;
                }
            }
            _ => return true,
        }
        expression_tree_walker(n, Some(is_no_comparison), context)
    }
}

/// Only a superuser makes an operator the equality of an operator family.
#[pg_guard]
unsafe extern "C-unwind" fn is_equality(operator: Oid) -> bool {
    // SAFETY: a catalog look-up.
    unsafe { !pg_sys::get_mergejoin_opfamilies(operator).is_null() }
}

/// Whether a function is not the server's own: a procedural language's, say.
unsafe fn is_foreign(callback: Option<unsafe extern "C-unwind" fn(*mut c_void)>) -> bool {
    let base = |address: *const c_void| {
        // SAFETY: fills in the structure, or returns 0.
        unsafe {
            let mut info: libc::Dl_info = std::mem::zeroed();
            if dladdr(address, &mut info) == 0 {
                std::ptr::null_mut()
            } else {
                info.dli_fbase
            }
        }
    };
    callback.is_some_and(|f| {
        let server = InNoForceRLSOperation as unsafe extern "C" fn() -> bool;
        base(f as *const c_void) != base(server as *const c_void)
    })
}

unsafe fn reads_keys_only(q: *mut pg_sys::Query, rte: *mut pg_sys::RangeTblEntry) -> bool {
    // SAFETY: a valid query and entry; the relation is locked by it.
    unsafe {
        let rel = pg_sys::table_open((*rte).relid, pg_sys::NoLock as _);
        let keys = pg_sys::RelationGetIndexAttrBitmap(
            rel,
            pg_sys::IndexAttrBitmapKind::INDEX_ATTR_BITMAP_KEY,
        );
        let mut keys = crate::pg::compat::attributes(keys);
        for key in pointers::<pg_sys::ForeignKeyCacheInfo>(pg_sys::RelationGetFKeyList(rel)) {
            let columns = &(&(*key).conkey)[..(*key).nkeys as usize];
            keys.extend(columns.iter().map(|c| i32::from(*c)));
        }
        pg_sys::table_close(rel, pg_sys::NoLock as _);
        columns_read(q, rte).iter().all(|c| keys.contains(c))
    }
}

/// Whether a plan is of a foreign key's own query.
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
pub unsafe fn plans_integrity_check(stmt: *mut pg_sys::PlannedStmt) -> bool {
    // SAFETY: a list of invalidation items.
    unsafe {
        InNoForceRLSOperation()
            && pointers::<pg_sys::PlanInvalItem>((*stmt).invalItems)
                .any(|i| (*i).cacheId == NOTE_FLAGS && (*i).hashValue & FLAG_INTEGRITY != 0)
    }
}

// -------------------------------------------------------------------------------------------- notes

/// The notes for a plan, in PostgreSQL's memory; null if there is nothing to note.
///
/// # Safety
/// In a context that lives until the plan is made.
pub unsafe fn notes(
    r: &Rewritten,
    labels: &[&'static str],
    functions: &[Oid],
) -> *mut pg_sys::List {
    let mut flags = 0;
    for l in labels {
        flags |= if *l == label::UPDATE_WITHOUT_WHERE {
            FLAG_UPDATE
        } else {
            FLAG_DELETE
        };
    }
    if r.by_role {
        flags |= FLAG_ROLE;
    }
    if r.integrity {
        flags |= FLAG_INTEGRITY;
    }
    let mut list = std::ptr::null_mut();
    // SAFETY: nodes of the current context.
    unsafe {
        if flags != 0 {
            list = add_note(list, NOTE_FLAGS, flags);
        }
        for f in functions {
            list = add_note(list, NOTE_CALL, f.to_u32());
        }
        for a in &r.masked {
            let column = NOTE_COLUMN - c_int::from(a.attribute);
            list = add_note(list, column, a.relation.to_u32());
            list = add_note(list, NOTE_FUNCTION, a.function.to_u32());
        }
        for (function, relation) in &r.triggers {
            let functions = pg_sys::SysCacheIdentifier::PROCOID as c_int;
            let none = pg_sys::Datum::from(0);
            let function = pg_sys::Datum::from(*function);
            let hash = pg_sys::GetSysCacheHashValue(functions, function, none, none, none);
            list = add_note(list, functions, hash);
            list = add_note(list, NOTE_RELATION, relation.to_u32());
        }
    }
    list
}

unsafe fn add_note(list: *mut pg_sys::List, id: c_int, value: u32) -> *mut pg_sys::List {
    // SAFETY: see `node`.
    unsafe {
        let item = node::<pg_sys::PlanInvalItem>(T::T_PlanInvalItem);
        (*item).cacheId = id;
        (*item).hashValue = value;
        pg_sys::lappend(list, item.cast())
    }
}

/// Puts the notes into the planned statement.
///
/// # Safety
/// Both come from the same query.
pub unsafe fn annotate(stmt: *mut pg_sys::PlannedStmt, notes: *mut pg_sys::List) {
    // SAFETY: a valid statement; items without a matching cache are never looked at.
    unsafe {
        let by_role = pointers::<pg_sys::PlanInvalItem>(notes)
            .any(|i| (*i).cacheId == NOTE_FLAGS && (*i).hashValue & FLAG_ROLE != 0);
        for note in pointers::<pg_sys::PlanInvalItem>(notes) {
            if (*note).cacheId == NOTE_RELATION {
                let relation = Oid::from((*note).hashValue);
                (*stmt).relationOids = pg_sys::lappend_oid((*stmt).relationOids, relation);
            }
        }
        (*stmt).invalItems = pg_sys::list_concat((*stmt).invalItems, notes);
        if by_role || inlines_masked(stmt) {
            // Who may read differs by role: another role, another plan.
            (*stmt).dependsOnRole = true;
        }
    }
}

/// Puts its shape into a planned statement, so that no execution has to find it again.
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
pub unsafe fn note_shape(stmt: *mut pg_sys::PlannedStmt, shape: PlanShape) {
    // The key's highest bit is free.
    let high = (shape.key >> 32) as u32 | u32::from(shape.literals) << 31;
    // SAFETY: a valid statement; items without a matching cache are never looked at.
    unsafe {
        let list = add_note((*stmt).invalItems, NOTE_SHAPE[0], shape.key as u32);
        (*stmt).invalItems = add_note(list, NOTE_SHAPE[1], high);
    }
}

/// Whether a plan reads a masked relation that its query did not name: by an SQL function that was
/// inlined for an exempt role.
unsafe fn inlines_masked(stmt: *mut pg_sys::PlannedStmt) -> bool {
    let masks = policy::masks();
    if masks.is_empty() {
        return false;
    }
    let relations = unsafe {
        // SAFETY: null or a valid list of OIDs.
        let list = (*stmt).relationOids;
        (0..length(list) as usize).map(move |i| (*(*list).elements.add(i)).oid_value)
    };
    masks.relations().any(|m| relations.clone().any(|r| r == m))
}

/// What a planned statement carries.
#[derive(Debug, Default)]
pub struct Notes {
    pub labels: Vec<&'static str>,
    pub masked: bool,
    /// Its shape, if it was planned with us.
    pub shape: Option<PlanShape>,
}

/// Reads the notes of a planned statement.
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
pub unsafe fn read_notes(stmt: *mut pg_sys::PlannedStmt) -> Notes {
    let mut notes = Notes::default();
    let mut shape = 0;
    // SAFETY: a list of invalidation items.
    for item in unsafe { pointers::<pg_sys::PlanInvalItem>((*stmt).invalItems) } {
        // SAFETY: as above.
        let (id, value) = unsafe { ((*item).cacheId, (*item).hashValue) };
        if id == NOTE_FLAGS {
            if value & FLAG_UPDATE != 0 {
                notes.labels.push(label::UPDATE_WITHOUT_WHERE);
            }
            if value & FLAG_DELETE != 0 {
                notes.labels.push(label::DELETE_WITHOUT_WHERE);
            }
        }
        if id == NOTE_SHAPE[0] {
            shape |= u64::from(value);
        } else if id == NOTE_SHAPE[1] {
            shape |= u64::from(value) << 32;
        }
        notes.masked |= id < NOTE_COLUMN;
    }
    notes.shape = (shape != 0).then_some(PlanShape {
        key: shape & (u64::MAX >> 1),
        literals: shape >> 63 != 0,
    });
    notes
}

/// The functions that the query of a planned statement calls, as far as they are worth a record.
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
pub unsafe fn calls(stmt: *mut pg_sys::PlannedStmt) -> impl Iterator<Item = Oid> {
    // SAFETY: a list of invalidation items.
    unsafe {
        pointers::<pg_sys::PlanInvalItem>((*stmt).invalItems)
            .filter(|i| (**i).cacheId == NOTE_CALL)
            .map(|i| Oid::from((*i).hashValue))
    }
}

/// The masks of a planned statement.
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
pub unsafe fn annotations(stmt: *mut pg_sys::PlannedStmt) -> Vec<Annotation> {
    let mut found: Vec<Annotation> = Vec::new();
    // SAFETY: a list of invalidation items; a function's follows its column's.
    for item in unsafe { pointers::<pg_sys::PlanInvalItem>((*stmt).invalItems) } {
        // SAFETY: as above.
        let (id, value) = unsafe { ((*item).cacheId, Oid::from((*item).hashValue)) };
        if id == NOTE_FUNCTION {
            if let Some(last) = found.last_mut() {
                last.function = value;
            }
        } else if id < NOTE_COLUMN {
            found.push(Annotation {
                relation: value,
                attribute: (NOTE_COLUMN - id) as i16,
                function: pg_sys::InvalidOid,
            });
        }
    }
    found
}

/// Whether a statement does nothing but call warden.login(), logout() or whoami().
///
/// # Safety
/// `stmt` is a valid PlannedStmt.
pub unsafe fn calls_only_identity_functions(stmt: *mut pg_sys::PlannedStmt) -> bool {
    // SAFETY: a valid plan.
    unsafe {
        let plan = (*stmt).planTree;
        if plan.is_null() || (*plan).type_ != T::T_Result || !(*plan).lefttree.is_null() {
            return false;
        }
        let mut entries = pointers::<pg_sys::TargetEntry>((*plan).targetlist).peekable();
        entries.peek().is_some()
            && entries.all(|e| {
                let expr = (*e).expr;
                if (*expr).type_ != T::T_FuncExpr {
                    return false;
                }
                // Nothing may be run to find the argument.
                let call = expr.cast::<pg_sys::FuncExpr>();
                let plain = pointers::<pg_sys::Node>((*call).args)
                    .all(|a| matches!((*a).type_, T::T_Const | T::T_Param));
                plain && identity::is_identity_function((*call).funcid)
            })
    }
}

// --------------------------------------------------------------------------------------------- COPY

/// COPY table TO never plans: for a table with masks it becomes COPY (SELECT …) TO, as the server
/// does it for row-level security.
///
/// # Safety
/// `stmt` is a valid utility statement, in a transaction.
pub unsafe fn rewrite_copy(stmt: *mut pg_sys::PlannedStmt) -> Option<*mut pg_sys::PlannedStmt> {
    // SAFETY: a valid statement; only a copy of it is changed.
    unsafe {
        let node = (*stmt).utilityStmt;
        if (*node).type_ != T::T_CopyStmt {
            return None;
        }
        let copy = node.cast::<pg_sys::CopyStmt>();
        if (*copy).is_from || (*copy).relation.is_null() {
            return None;
        }
        let masks = policy::masks();
        if !masks.apply() {
            return None;
        }
        let relid = pg_sys::RangeVarGetRelidExtended(
            (*copy).relation,
            pg_sys::AccessShareLock as _,
            pg_sys::RVROption::RVR_MISSING_OK,
            None,
            std::ptr::null_mut(),
        );
        if relid == pg_sys::InvalidOid {
            return None;
        }
        let kind = pg_sys::get_rel_relkind(relid) as u8;
        let catalog = relid == pg_sys::StatisticRelationId || relid == STATISTIC_EXT_DATA;
        let copied = kind == pg_sys::RELKIND_RELATION
            || (cfg!(feature = "pg18") && kind == pg_sys::RELKIND_MATVIEW && is_populated(relid));
        if !catalog && (!copied || masks.of(relid).is_none()) {
            return None;
        }
        if !copies_columns(relid, (*copy).attlist) {
            return None;
        }
        warn_of_masked_copy(relid);
        let changed = pg_sys::copyObjectImpl(stmt.cast()).cast::<pg_sys::PlannedStmt>();
        let copy = (*changed).utilityStmt.cast::<pg_sys::CopyStmt>();
        (*copy).query = select_columns(relid, (*copy).attlist);
        (*copy).relation = std::ptr::null_mut();
        (*copy).attlist = std::ptr::null_mut();
        Some(changed)
    }
}

/// Whether COPY accepts these columns. If not, the error is left to it.
unsafe fn copies_columns(relid: Oid, attlist: *mut pg_sys::List) -> bool {
    // SAFETY: a list of names; the relation is locked.
    unsafe {
        let mut seen: Vec<i16> = Vec::new();
        let rel = pg_sys::table_open(relid, pg_sys::NoLock as _);
        let accepted = pointers::<pg_sys::String>(attlist).all(|name| {
            let number = pg_sys::get_attnum(relid, (*name).sval) as i16;
            let fine = number > 0
                && !seen.contains(&number)
                && (*scan::attribute((*rel).rd_att, number as usize - 1)).attgenerated == 0;
            seen.push(number);
            fine
        });
        pg_sys::table_close(rel, pg_sys::NoLock as _);
        accepted
    }
}

/// Whether a materialized view has contents.
unsafe fn is_populated(relid: Oid) -> bool {
    // SAFETY: the relation is locked.
    unsafe {
        let rel = pg_sys::table_open(relid, pg_sys::NoLock as _);
        let populated = (*(*rel).rd_rel).relispopulated;
        pg_sys::table_close(rel, pg_sys::NoLock as _);
        populated
    }
}

/// A backup that holds masks instead of data must not come as a surprise.
unsafe fn warn_of_masked_copy(relid: Oid) {
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        if !pg_sys::superuser() && !is_owner(relid) {
            return;
        }
        pgrx::ereport!(
            pgrx::PgLogLevel::WARNING,
            pgrx::PgSqlErrorCode::ERRCODE_WARNING,
            format!(
                "masked columns of \"{}\" are copied as masks",
                shape::qualified(relid)
            ),
            "For a faithful copy, use a role that warden.unmask_for() exempts."
        );
    }
}

#[cfg(feature = "pg15")]
unsafe fn is_owner(relid: Oid) -> bool {
    // SAFETY: a catalog look-up.
    unsafe { pg_sys::pg_class_ownercheck(relid, pg_sys::GetUserId()) }
}

#[cfg(not(feature = "pg15"))]
unsafe fn is_owner(relid: Oid) -> bool {
    // SAFETY: a catalog look-up.
    unsafe { pg_sys::object_ownercheck(pg_sys::RelationRelationId, relid, pg_sys::GetUserId()) }
}

/// `SELECT columns FROM ONLY table`, as a raw parse tree.
unsafe fn select_columns(relid: Oid, attlist: *mut pg_sys::List) -> *mut pg_sys::Node {
    // SAFETY: catalog look-ups; nodes of the current context.
    unsafe {
        let mut names: Vec<*mut std::ffi::c_char> = Vec::new();
        if attlist.is_null() {
            let rel = pg_sys::table_open(relid, pg_sys::AccessShareLock as _);
            let desc = (*rel).rd_att;
            for i in 0..(*desc).natts {
                let a = &*scan::attribute(desc, i as usize);
                // As COPY itself: generated columns only when they are named.
                if !a.attisdropped && a.attgenerated == 0 {
                    names.push(pg_sys::pstrdup(a.attname.data.as_ptr()));
                }
            }
            pg_sys::table_close(rel, pg_sys::NoLock as _);
        } else {
            for n in pointers::<pg_sys::String>(attlist) {
                names.push((*n).sval);
            }
        }
        let mut targets = std::ptr::null_mut();
        for name in names {
            let column = node::<pg_sys::ColumnRef>(T::T_ColumnRef);
            (*column).fields =
                pg_sys::lappend(std::ptr::null_mut(), pg_sys::makeString(name).cast());
            (*column).location = -1;
            let target = node::<pg_sys::ResTarget>(T::T_ResTarget);
            (*target).val = column.cast();
            (*target).location = -1;
            targets = pg_sys::lappend(targets, target.cast());
        }
        let from = pg_sys::makeRangeVar(
            pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relid)),
            pg_sys::get_rel_name(relid),
            -1,
        );
        (*from).inh = false;
        let select = node::<pg_sys::SelectStmt>(T::T_SelectStmt);
        (*select).targetList = targets;
        (*select).fromClause = pg_sys::lappend(std::ptr::null_mut(), from.cast());
        select.cast()
    }
}

// ------------------------------------------------------------------------------------------- inlining

static mut PREV_NEEDS_FMGR: pg_sys::needs_fmgr_hook_type = None;

/// Installs the hook that keeps the planner from inlining SQL functions that return sets (trap T14):
/// their tables would never pass the planner hook.
pub fn install() {
    // SAFETY: the postmaster has one thread.
    unsafe {
        PREV_NEEDS_FMGR = (&raw mut pg_sys::needs_fmgr_hook).replace(Some(needs_fmgr));
        PREV_CHECK_PERMS = (&raw mut pg_sys::ExecutorCheckPerms_hook).replace(Some(check_perms));
    }
}

static mut PREV_CHECK_PERMS: pg_sys::ExecutorCheckPerms_hook_type = None;

/// ALTER TABLE ... ADD FOREIGN KEY checks existing rows with one ordinary query, as the current
/// user, if that user may read both tables. Under masks it would compare masks: say no, and
/// PostgreSQL checks row by row with the key's own triggers.
#[cfg(feature = "pg15")]
#[pg_guard]
unsafe extern "C-unwind" fn check_perms(entries: *mut pg_sys::List, raise: bool) -> bool {
    // SAFETY: the previous hook, and PostgreSQL's own arguments.
    unsafe {
        PREV_CHECK_PERMS.is_none_or(|prev| prev(entries, raise)) && (raise || !reads_masks(entries))
    }
}

/// As on 15.
#[cfg(not(feature = "pg15"))]
#[pg_guard]
unsafe extern "C-unwind" fn check_perms(
    entries: *mut pg_sys::List,
    permissions: *mut pg_sys::List,
    raise: bool,
) -> bool {
    // SAFETY: the previous hook, and PostgreSQL's own arguments.
    unsafe {
        PREV_CHECK_PERMS.is_none_or(|prev| prev(entries, permissions, raise))
            && (raise || !reads_masks(entries))
    }
}

unsafe fn reads_masks(entries: *mut pg_sys::List) -> bool {
    if !policy::installed() {
        return false;
    }
    let masks = policy::masks();
    // SAFETY: a list of range table entries.
    masks.apply()
        && unsafe { pointers::<pg_sys::RangeTblEntry>(entries) }
            // SAFETY: as above.
            .any(|rte| unsafe { masks.of((*rte).relid) }.is_some())
}

#[pg_guard]
unsafe extern "C-unwind" fn needs_fmgr(function: Oid) -> bool {
    // SAFETY: the previous hook, and a catalog look-up in a transaction.
    unsafe {
        if PREV_NEEDS_FMGR.is_some_and(|prev| prev(function)) {
            return true;
        }
        if !pg_sys::IsTransactionState() || function.to_u32() < pg_sys::FirstNormalObjectId {
            return false;
        }
        policy::installed()
            && pg_sys::get_func_retset(function)
            && language_of(function) == SQL_LANGUAGE
            && policy::masks().apply()
    }
}

unsafe fn language_of(function: Oid) -> Oid {
    // SAFETY: the tuple is released before it is forgotten.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::PROCOID as c_int,
            pg_sys::Datum::from(function),
        );
        if tuple.is_null() {
            return pg_sys::InvalidOid;
        }
        let language = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>()).prolang;
        pg_sys::ReleaseSysCache(tuple);
        language
    }
}
