//! Code that sees stored rows: what would show a masked column, or tell by it, without a query that
//! reads it.
//!
//! Two rules. Commands that attach such code, or take a relation from under its masks, are refused to
//! whoever reads masks. And a trigger of a relation with masks fires only if its function belongs to
//! somebody trusted: a superuser, or a role that is exempt; else the statement that would fire it is
//! refused, to everyone: whoever owns a function decides what it does with the rows.

use crate::error::{Refusal, RefusalCode};
use crate::pg::compat::{self, pointers};
use crate::pg::mask::{self, Rewritten};
use crate::pg::policy::{self, Masks};
use crate::pg::rules::relation_of;
use crate::pg::session::text;
use crate::pg::walk::{guarded, raw_expression_tree_walker};
use crate::pg::{identity, scan};
use pgrx::pg_sys::{self, NodeTag as T, Oid};
use std::ffi::{CStr, CString, c_int, c_void};

/// `pg_trigger_tgrelid_tgname_index`, of pg_trigger.h.
const TRIGGER_BY_RELATION: Oid = Oid::from_u32(2701);
const INSERT: u32 = pg_sys::TRIGGER_TYPE_INSERT;
const UPDATE: u32 = pg_sys::TRIGGER_TYPE_UPDATE;
const DELETE: u32 = pg_sys::TRIGGER_TYPE_DELETE;

// --------------------------------------------------------------------------------------- triggers

/// A trigger that sees rows.
struct Trigger {
    name: String,
    function: Oid,
}

/// Whether the triggers that a query would fire on its target may see its rows. Notes what the answer
/// depends on.
///
/// # Safety
/// `q` is a valid Query with a result relation, `relation`, that it has locked; in a transaction.
pub unsafe fn check_target(
    q: *mut pg_sys::Query,
    relation: Oid,
    masks: &Masks,
    out: &mut Rewritten,
) -> Result<(), Refusal> {
    use pg_sys::CmdType as C;
    let event = |command| match command {
        C::CMD_INSERT => INSERT,
        C::CMD_UPDATE => UPDATE,
        C::CMD_DELETE => DELETE,
        _ => 0,
    };
    // SAFETY: a valid query.
    let mut events = unsafe {
        pointers::<pg_sys::MergeAction>((*q).mergeActionList)
            .map(|a| event((*a).commandType))
            .fold(event((*q).commandType), |all, e| all | e)
    };
    // SAFETY: as above.
    unsafe {
        let upsert = (*q).onConflict;
        if !upsert.is_null() && (*upsert).action == pg_sys::OnConflictAction::ONCONFLICT_UPDATE {
            events |= UPDATE;
        }
        check_triggers(relation, events, masks, out)
    }
}

unsafe fn check_triggers(
    relation: Oid,
    mut events: u32,
    masks: &Masks,
    out: &mut Rewritten,
) -> Result<(), Refusal> {
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        let members = policy::with_children(relation);
        if members.len() > 1 && events & UPDATE != 0 {
            // The row may move to another partition.
            events |= INSERT | DELETE;
        }
        for member in members {
            for trigger in triggers(member, events) {
                let owner = owner_of(trigger.function);
                if !masks.trusts(owner) {
                    return Err(untrusted(&trigger, member, owner));
                }
                out.depend_on(trigger.function, member);
            }
        }
    }
    Ok(())
}

unsafe fn triggers(relation: Oid, events: u32) -> Vec<Trigger> {
    let mut found = Vec::new();
    scan::scan_by_oid(
        pg_sys::TriggerRelationId,
        TRIGGER_BY_RELATION,
        2,
        relation,
        |row| {
            let kind = row.i16("tgtype").unwrap_or(0) as u32;
            let sees = kind & pg_sys::TRIGGER_TYPE_ROW != 0
                || row.name("tgoldtable").is_some()
                || row.name("tgnewtable").is_some();
            if sees && kind & events != 0 {
                found.push(Trigger {
                    name: row.name("tgname").unwrap_or_default(),
                    function: row.oid("tgfoid").unwrap_or(pg_sys::InvalidOid),
                });
            }
        },
    );
    found
}

unsafe fn owner_of(function: Oid) -> Oid {
    // SAFETY: the tuple is released before it is forgotten.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(
            pg_sys::SysCacheIdentifier::PROCOID as c_int,
            pg_sys::Datum::from(function),
        );
        if tuple.is_null() {
            return pg_sys::InvalidOid;
        }
        let owner = (*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_proc>()).proowner;
        pg_sys::ReleaseSysCache(tuple);
        owner
    }
}

unsafe fn untrusted(trigger: &Trigger, relation: Oid, owner: Oid) -> Refusal {
    // SAFETY: catalog look-ups in a transaction.
    let (table, function, owner) = unsafe {
        (
            text(pg_sys::get_rel_name(relation)),
            text(pg_sys::get_func_name(trigger.function)),
            text(pg_sys::GetUserNameFromId(owner, true)),
        )
    };
    Refusal {
        code: RefusalCode::Blocked,
        message: format!(
            "trigger \"{}\" of table \"{table}\" would see masked columns",
            trigger.name
        ),
        detail: format!(
            "Its function \"{function}\" belongs to role \"{owner}\", which reads masks."
        ),
        hint: "Give the function to a role that warden.unmask_for() exempts, or drop the trigger."
            .into(),
        rule: "masked_trigger".into(),
    }
}

// --------------------------------------------------------------------------------------- commands

/// Whether a utility command may run, as far as masked columns go.
///
/// # Safety
/// `node` is a valid utility statement, in a transaction, in a database with the extension.
pub unsafe fn check_command(node: *mut pg_sys::Node) -> Result<(), Refusal> {
    // SAFETY: each node is read as what its tag says it is.
    unsafe {
        let tag = (*node).type_;
        let looks = matches!(
            tag,
            T::T_CopyStmt
                | T::T_CreateTrigStmt
                | T::T_RuleStmt
                | T::T_IndexStmt
                | T::T_CreateStatsStmt
                | T::T_CreatePolicyStmt
                | T::T_AlterPolicyStmt
                | T::T_AlterTableStmt
                | T::T_CreateStmt
                | T::T_CreateForeignTableStmt
                | T::T_AlterDomainStmt
                | T::T_CreateFunctionStmt
        );
        if !looks {
            return Ok(());
        }
        let masks = policy::masks();
        if masks.is_empty() {
            return Ok(());
        }
        if tag == T::T_CopyStmt {
            let copy = node.cast::<pg_sys::CopyStmt>();
            if (*copy).is_from && !(*copy).relation.is_null() {
                let relation = relation_of((*copy).relation);
                if masks.of(relation).is_some() {
                    return check_triggers(relation, INSERT, &masks, &mut Rewritten::default());
                }
            }
            return Ok(());
        }
        match shown_by(node, &masks) {
            Some(relation) if !masks.exempts() => Err(Refusal {
                code: RefusalCode::Blocked,
                message: format!(
                    "masked columns of table \"{}\" would be shown by this command",
                    text(pg_sys::get_rel_name(relation))
                ),
                detail: "It has code see, or decides by, what is stored in a column that is \
                         masked for you."
                    .into(),
                hint: "Leave masked columns out, or use a role that warden.unmask_for() exempts. \
                       A partition that leaves its table needs masks of its own first."
                    .into(),
                rule: "masked_ddl".into(),
            }),
            _ => Ok(()),
        }
    }
}

/// The relation whose masked columns a command would show.
unsafe fn shown_by(node: *mut pg_sys::Node, masks: &Masks) -> Option<Oid> {
    // SAFETY: each node is read as what its tag says it is.
    unsafe {
        let masked = |r: *mut pg_sys::RangeVar| {
            let relation = relation_of(r);
            masks.of(relation).map(|_| relation)
        };
        match (*node).type_ {
            T::T_CreateTrigStmt => {
                let s = node.cast::<pg_sys::CreateTrigStmt>();
                ((*s).row || !(*s).transitionRels.is_null()).then(|| masked((*s).relation))?
            }
            T::T_RuleStmt => masked((*node.cast::<pg_sys::RuleStmt>()).relation),
            T::T_IndexStmt => {
                let s = node.cast::<pg_sys::IndexStmt>();
                if (*s).transformed {
                    // PostgreSQL's own copy of an index that there is.
                    return None;
                }
                let relation = masked((*s).relation)?;
                let mut parts: Vec<_> = pointers::<pg_sys::IndexElem>((*s).indexParams)
                    .map(|e| (*e).expr)
                    .collect();
                parts.push((*s).whereClause);
                names_masked(&parts, relation, masks)
            }
            T::T_CreateStatsStmt => {
                let s = node.cast::<pg_sys::CreateStatsStmt>();
                if (*s).transformed {
                    return None;
                }
                let parts: Vec<_> = pointers::<pg_sys::StatsElem>((*s).exprs)
                    .map(|e| (*e).expr)
                    .collect();
                pointers::<pg_sys::Node>((*s).relations)
                    .filter(|n| (**n).type_ == T::T_RangeVar)
                    .filter_map(|n| masked(n.cast()))
                    .find_map(|relation| names_masked(&parts, relation, masks))
            }
            T::T_CreatePolicyStmt => {
                let s = node.cast::<pg_sys::CreatePolicyStmt>();
                names_masked(&[(*s).qual, (*s).with_check], masked((*s).table)?, masks)
            }
            T::T_AlterPolicyStmt => {
                let s = node.cast::<pg_sys::AlterPolicyStmt>();
                names_masked(&[(*s).qual, (*s).with_check], masked((*s).table)?, masks)
            }
            T::T_AlterTableStmt => {
                let s = node.cast::<pg_sys::AlterTableStmt>();
                let relation = relation_of((*s).relation);
                pointers::<pg_sys::AlterTableCmd>((*s).cmds)
                    .find_map(|c| shown_by_alter(c, relation, masks))
            }
            T::T_CreateStmt => {
                let s = node.cast::<pg_sys::CreateStmt>();
                let mut parts = expressions((*s).tableElts);
                parts.extend(expressions((*s).constraints));
                if !(*s).partspec.is_null() {
                    let elements = (*(*s).partspec).partParams;
                    parts.extend(pointers::<pg_sys::PartitionElem>(elements).map(|e| (*e).expr));
                }
                pointers::<pg_sys::RangeVar>((*s).inhRelations)
                    .filter_map(masked)
                    .find_map(|parent| names_masked(&parts, parent, masks))
            }
            // Rows would go to wherever its server is.
            T::T_CreateForeignTableStmt => {
                let s = node.cast::<pg_sys::CreateForeignTableStmt>();
                pointers::<pg_sys::RangeVar>((*s).base.inhRelations).find_map(masked)
            }
            T::T_AlterDomainStmt => {
                let s = node.cast::<pg_sys::AlterDomainStmt>();
                let checks = [b'C', b'V'].contains(&((*s).subtype as u8));
                checks.then(|| column_of_domain((*s).typeName, masks))?
            }
            T::T_CreateFunctionStmt => {
                let s = node.cast::<pg_sys::CreateFunctionStmt>();
                // The function of a role that is trusted, replaced by an agent in that role.
                let replaces = (*s).replace && identity::is_agent();
                replaces.then(|| seen_by_function((*s).funcname, masks))?
            }
            _ => None,
        }
    }
}

unsafe fn shown_by_alter(
    c: *mut pg_sys::AlterTableCmd,
    relation: Oid,
    masks: &Masks,
) -> Option<Oid> {
    use pg_sys::AlterTableType as A;
    // SAFETY: a valid command; its definition is read as what its kind says it is.
    unsafe {
        let masked = masks.of(relation).is_some();
        let is_masked_column = || {
            let name = text((*c).name);
            column_names(relation, masks)
                .iter()
                .any(|n| n.as_bytes() == name.as_bytes())
        };
        let names = |parts: &[*mut pg_sys::Node]| names_masked(parts, relation, masks);
        match (*c).subtype {
            A::AT_AlterColumnType if masked => {
                let using = (*(*c).def.cast::<pg_sys::ColumnDef>()).raw_default;
                is_masked_column()
                    .then_some(relation)
                    .or_else(|| names(&[using]))
            }
            // What was computed from a masked column would become a column like any other.
            A::AT_DropExpression if masked => is_masked_column().then_some(relation),
            A::AT_AddColumn | A::AT_AddConstraint if masked => {
                let list = pg_sys::lappend(std::ptr::null_mut(), (*c).def.cast());
                names(&expressions(list))
            }
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            A::AT_SetExpression if masked => names(&[(*c).def]),
            A::AT_DropInherit => loses_masks(relation, masks),
            A::AT_DetachPartition => loses_masks(
                relation_of((*(*c).def.cast::<pg_sys::PartitionCmd>()).name),
                masks,
            ),
            // Triggers, indexes and bounds of the table come to the partition; rows go to a foreign one.
            A::AT_AttachPartition => {
                let partition = relation_of((*(*c).def.cast::<pg_sys::PartitionCmd>()).name);
                let foreign =
                    pg_sys::get_rel_relkind(partition) as u8 == pg_sys::RELKIND_FOREIGN_TABLE;
                let shows = if masked {
                    foreign
                } else {
                    masks.of(partition).is_some()
                };
                shows.then_some(partition)
            }
            // Tables of a composite type change with it.
            A::AT_AlterColumnType => {
                let composite = pg_sys::get_rel_type_id(relation);
                masks
                    .relations()
                    .find(|r| composite != pg_sys::InvalidOid && compat::of_type(*r) == composite)
            }
            _ => None,
        }
    }
}

/// A relation that is masked by what it inherits, and would not be without.
fn loses_masks(relation: Oid, masks: &Masks) -> Option<Oid> {
    let all = masks.of(relation)?;
    let own = masks.own(relation);
    let loses = all
        .iter()
        .any(|(column, _)| !own.iter().any(|(c, _)| c == column));
    loses.then_some(relation)
}

/// The expressions in columns and constraints, as they are written.
unsafe fn expressions(elements: *mut pg_sys::List) -> Vec<*mut pg_sys::Node> {
    let mut found = Vec::new();
    // SAFETY: a list of nodes, each read as what its tag says it is.
    unsafe {
        for n in pointers::<pg_sys::Node>(elements) {
            match (*n).type_ {
                T::T_ColumnDef => {
                    found.extend(expressions((*n.cast::<pg_sys::ColumnDef>()).constraints));
                }
                T::T_Constraint => {
                    let c = n.cast::<pg_sys::Constraint>();
                    found.push((*c).raw_expr);
                    found.push((*c).where_clause);
                    for pair in pointers::<pg_sys::List>((*c).exclusions) {
                        let first = pg_sys::list_nth(pair, 0).cast::<pg_sys::IndexElem>();
                        found.push((*first).expr);
                    }
                }
                _ => {}
            }
        }
    }
    found
}

// ------------------------------------------------------------------------------------------ names

/// What an expression must not name.
struct Names<'a> {
    columns: &'a [CString],
    /// Its whole row.
    relation: &'a CStr,
}

/// `relation`, if one of the expressions, as they are written, names a masked column of it, or its
/// whole row. Names are compared without regard to what else they could mean.
unsafe fn names_masked(parts: &[*mut pg_sys::Node], relation: Oid, masks: &Masks) -> Option<Oid> {
    if parts.iter().all(|p| p.is_null()) {
        return None;
    }
    // SAFETY: raw expressions; the context outlives the walk.
    unsafe {
        let columns = column_names(relation, masks);
        let name = CString::new(text(pg_sys::get_rel_name(relation))).unwrap_or_default();
        let mut names = Names {
            columns: &columns,
            relation: &name,
        };
        let context = (&raw mut names).cast();
        parts
            .iter()
            .any(|part| guarded(|| names_any(*part, context)))
            .then_some(relation)
    }
}

unsafe extern "C-unwind" fn names_any(n: *mut pg_sys::Node, context: *mut c_void) -> bool {
    // SAFETY: called with our context, directly or by PostgreSQL's walker.
    unsafe {
        if n.is_null() {
            return false;
        }
        match (*n).type_ {
            T::T_A_Star => true,
            T::T_ColumnRef => {
                let names = &*context.cast::<Names<'_>>();
                let fields = (*n.cast::<pg_sys::ColumnRef>()).fields;
                let alone = (*fields).length == 1;
                pointers::<pg_sys::Node>(fields).any(|f| {
                    if (*f).type_ != T::T_String {
                        return true;
                    }
                    let name = CStr::from_ptr((*f.cast::<pg_sys::String>()).sval);
                    names.columns.iter().any(|c| c.as_c_str() == name)
                        || alone && name == names.relation
                })
            }
            _ => raw_expression_tree_walker(n, Some(names_any), context),
        }
    }
}

/// The names of a relation's masked columns, and of those that are generated from them.
unsafe fn column_names(relation: Oid, masks: &Masks) -> Vec<CString> {
    let Some(columns) = masks.of(relation) else {
        return Vec::new();
    };
    // SAFETY: the relation is locked while it is looked at.
    unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let rel = pg_sys::table_open(relation, lock);
        let found = mask::sensitive(rel, &columns)
            .iter()
            .filter_map(|(column, _)| {
                CString::new(text(pg_sys::get_attname(relation, *column, true))).ok()
            })
            .collect();
        pg_sys::table_close(rel, lock);
        found
    }
}

/// A relation with a masked column of a domain, or of a domain over it.
unsafe fn column_of_domain(name: *mut pg_sys::List, masks: &Masks) -> Option<Oid> {
    // SAFETY: a list of name parts; catalog look-ups in a transaction.
    unsafe {
        let domain = pg_sys::LookupTypeNameOid(
            std::ptr::null_mut(),
            pg_sys::makeTypeNameFromNameList(name),
            true,
        );
        if domain == pg_sys::InvalidOid {
            return None;
        }
        let is_of = |relation: Oid, column: i16| {
            let mut t = pg_sys::get_atttype(relation, column);
            loop {
                let element = pg_sys::get_element_type(t);
                if element != pg_sys::InvalidOid {
                    t = element;
                }
                if t == domain {
                    return true;
                }
                let base = compat::domain_base(t);
                if base == pg_sys::InvalidOid {
                    return false;
                }
                t = base;
            }
        };
        masks.relations().find(|r| {
            masks
                .of(*r)
                .is_some_and(|columns| columns.iter().any(|(c, _)| is_of(*r, *c)))
        })
    }
}

/// A relation with a trigger whose function has this name.
unsafe fn seen_by_function(name: *mut pg_sys::List, masks: &Masks) -> Option<Oid> {
    // SAFETY: a list of name parts; catalog look-ups in a transaction.
    unsafe {
        let last = pointers::<pg_sys::String>(name).last()?;
        let name = text((*last).sval);
        masks.relations().find(|r| {
            triggers(*r, INSERT | UPDATE | DELETE)
                .iter()
                .any(|t| text(pg_sys::get_func_name(t.function)) == name)
        })
    }
}
