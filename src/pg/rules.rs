//! Guardrails in the statement path: finds out what a statement is about to do, and asks
//! `warden_core::guardrail`.
//!
//! Owns the backend's copy of `warden.rule`, read again after an invalidation, and the protection of
//! the ledger, which no rule can switch off.

use crate::error::{Refusal, RefusalCode};
use crate::pg::compat::{self, pointers};
use crate::pg::local::Local;
use crate::pg::session::text;
use crate::pg::shape::{Target, function_name};
use crate::pg::{fastpath, identity, policy, scan};
use pgrx::pg_sys::{self, NodeTag as T};
use std::ffi::{CStr, c_int};
use std::rc::Rc;
use warden_core::event::AccessKind;
use warden_core::guardrail::{Facts, Rule, Rules, Subject, label};

/// The tables that nobody but the recorder writes.
const LEDGER: [&str; 9] = [
    "ledger_origin",
    "session",
    "statement",
    "transaction",
    "connection_event",
    "journal_transaction",
    "journal_position",
    "journal_pending",
    "sink_cursor",
];

/// What would take the extension, or its schema, apart.
const OURS: &str = "ALTER EXTENSION pg_warden";

static CACHE: Local<Option<(u64, Rc<Rules>)>> = Local::new(None);

unsafe extern "C" {
    fn GetUserId() -> pg_sys::Oid;
}

/// The rules of this database; none if it does not have the extension.
fn rules() -> Rc<Rules> {
    let generation = policy::generation();
    if let Some(rules) = CACHE.with(|c| {
        c.as_ref()
            .filter(|(g, _)| *g == generation)
            .map(|(_, r)| Rc::clone(r))
    }) {
        return rules;
    }
    let mut found = Vec::new();
    if let Some(table) = scan::warden_table("rule") {
        scan::scan_table(table, |row| {
            if !row.bool("enabled").unwrap_or(false) {
                return;
            }
            found.push(Rule {
                name: row.text("name").unwrap_or_default(),
                commands: row.texts("commands").unwrap_or_default(),
                relations: row.oids("relations").unwrap_or_default(),
                applies_to: row.oids("applies_to").unwrap_or_default(),
                exempt: row.oids("exempt").unwrap_or_default(),
                agents_only: row.bool("agents_only").unwrap_or(false),
                hint: row.text("hint").unwrap_or_default(),
            });
        });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    let rules = Rc::new(Rules::new(found));
    CACHE.with(|c| *c = Some((generation, Rc::clone(&rules))));
    rules
}

struct CurrentUser;

impl Subject for CurrentUser {
    fn is_member_of(&self, role: u32) -> bool {
        // SAFETY: catalog look-ups in a transaction.
        unsafe { pg_sys::is_member_of_role_nosuper(GetUserId(), pg_sys::Oid::from(role)) }
    }
    fn is_agent(&self) -> bool {
        identity::is_agent()
    }
}

fn refusal(rule: &Rule, what: &str) -> Refusal {
    Refusal {
        code: RefusalCode::Blocked,
        message: format!("{what} is blocked by guardrail \"{}\"", rule.name),
        detail: String::new(),
        hint: if rule.hint.is_empty() {
            "Ask a member of warden_admin.".into()
        } else {
            rule.hint.clone()
        },
        rule: rule.name.clone(),
    }
}

/// Whether this client's session fires no triggers, those of foreign keys included.
fn fires_no_triggers() -> bool {
    // SAFETY: reads variables of this process. The workers of a subscription have it so.
    unsafe {
        pg_sys::SessionReplicationRole == pg_sys::SESSION_REPLICATION_ROLE_REPLICA as c_int
            && pg_sys::MyBackendType == pg_sys::BackendType::B_BACKEND
    }
}

fn decide(rules: &Rules, facts: &Facts<'_>) -> Result<(), Refusal> {
    // What an extension's own script does was decided with CREATE EXTENSION.
    // SAFETY: reads a variable of this process.
    if unsafe { pg_sys::creating_extension } {
        return Ok(());
    }
    match rules.refusing(facts, &CurrentUser) {
        Some(rule) => Err(refusal(
            rule,
            facts.labels.last().copied().unwrap_or("statement"),
        )),
        None => Ok(()),
    }
}

/// Whether a planned statement may run. `everything` are the labels of [`label`] that the planner
/// hook found.
///
/// # Safety
/// `stmt` is a valid PlannedStmt, in a transaction.
pub unsafe fn check_planned(
    stmt: *mut pg_sys::PlannedStmt,
    without_where: &[&'static str],
) -> Result<(), Refusal> {
    use pg_sys::CmdType as C;
    // SAFETY: a valid statement.
    let (command, modifies) = unsafe {
        (
            (*stmt).commandType,
            (*stmt).commandType != C::CMD_SELECT || (*stmt).hasModifyingCTE,
        )
    };
    let rules = rules();
    let tag = match command {
        C::CMD_SELECT => "SELECT",
        C::CMD_INSERT => "INSERT",
        C::CMD_UPDATE => "UPDATE",
        C::CMD_DELETE => "DELETE",
        C::CMD_MERGE => "MERGE",
        _ => return Ok(()),
    };
    let mut labels: Vec<&str> = Vec::new();
    if rules.mention(tag) {
        labels.push(tag);
    }
    labels.extend(without_where.iter().filter(|l| rules.mention(l)));
    // However the setting came about: by set_config(), by a role's or a function's settings.
    let untriggered = modifies && fires_no_triggers() && rules.mention(label::DISABLE_TRIGGER);
    if untriggered {
        labels.push(label::DISABLE_TRIGGER);
    }
    if labels.is_empty() && !modifies {
        return Ok(());
    }
    let writes = u64::from(pg_sys::ACL_INSERT | pg_sys::ACL_UPDATE | pg_sys::ACL_DELETE);
    let mut relations = Vec::new();
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        for p in compat::permissions(stmt) {
            let writing = p.required & writes != 0;
            if writing && in_ledger(p.relid) {
                return Err(ledger_refusal(&text(pg_sys::get_rel_name(p.relid))));
            }
            if !labels.is_empty() && (writing || command == C::CMD_SELECT) && !is_temporary(p.relid)
            {
                relations.push(p.relid.to_u32());
            }
        }
    }
    let nobodys_loss = relations.is_empty() && (!without_where.is_empty() || untriggered);
    if labels.is_empty() || nobodys_loss {
        return Ok(());
    }
    decide(&rules, &Facts { labels, relations })
}

fn ledger_refusal(name: &str) -> Refusal {
    Refusal {
        code: RefusalCode::Blocked,
        message: format!("warden.{name} belongs to the ledger and cannot be changed"),
        detail: "Only the recorder writes the ledger.".into(),
        hint: String::new(),
        rule: "ledger".into(),
    }
}

unsafe fn in_ledger(relid: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-ups in a transaction.
    unsafe {
        let warden = policy::schema();
        if warden == pg_sys::InvalidOid || pg_sys::get_rel_namespace(relid) != warden {
            return false;
        }
        is_ledger_name(&text(pg_sys::get_rel_name(relid)))
    }
}

fn is_ledger_name(name: &str) -> bool {
    name.starts_with("event") || LEDGER.contains(&name)
}

unsafe fn is_temporary(relid: pg_sys::Oid) -> bool {
    // SAFETY: catalog look-up in a transaction.
    unsafe { pg_sys::get_rel_persistence(relid) as u8 == pg_sys::RELPERSISTENCE_TEMP }
}

/// What a utility command is about to do.
#[derive(Debug, Default)]
pub struct Utility {
    /// Its command tag.
    pub command: String,
    /// The relations that it names.
    pub targets: Vec<Target>,
    /// The procedure that it calls.
    pub functions: Vec<String>,
    labels: Vec<&'static str>,
    changes: bool,
    is_copy: bool,
}

impl Utility {
    /// The command tag; of a COPY, with its direction.
    pub fn label(&self) -> &str {
        match (self.is_copy, self.changes) {
            (false, _) => &self.command,
            (true, true) => "COPY FROM",
            (true, false) => "COPY TO",
        }
    }
}

/// Finds out what a utility command is about to do. Without a transaction, names are not resolved.
///
/// # Safety
/// `node` is a valid utility statement.
pub unsafe fn examine(node: *mut pg_sys::Node) -> Utility {
    // SAFETY: each node is read as what its tag says it is.
    unsafe {
        let tag = pg_sys::GetCommandTagName(pg_sys::CreateCommandTag(node));
        let mut u = Utility {
            command: text(tag),
            ..Utility::default()
        };
        if !pg_sys::IsTransactionState() {
            return u;
        }
        u.changes = true;
        match (*node).type_ {
            T::T_DropStmt => {
                let s = node.cast::<pg_sys::DropStmt>();
                dropped(s, &mut u.targets);
            }
            T::T_TruncateStmt => {
                let s = node.cast::<pg_sys::TruncateStmt>();
                for r in pointers::<pg_sys::RangeVar>((*s).relations) {
                    u.targets.push(resolve(r, AccessKind::Truncate));
                }
                u.labels.extend(untriggered());
            }
            T::T_AlterTableStmt => {
                let s = node.cast::<pg_sys::AlterTableStmt>();
                u.targets.push(resolve((*s).relation, AccessKind::Ddl));
                for c in pointers::<pg_sys::AlterTableCmd>((*s).cmds) {
                    u.labels.extend(disabling((*c).subtype));
                    if !(*c).def.is_null() && (*(*c).def).type_ == T::T_PartitionCmd {
                        let partition = (*(*c).def.cast::<pg_sys::PartitionCmd>()).name;
                        u.targets.extend(relation_or_none(partition));
                    }
                }
            }
            T::T_CopyStmt => {
                let s = node.cast::<pg_sys::CopyStmt>();
                u.changes = (*s).is_from;
                u.is_copy = true;
                if !(*s).relation.is_null() {
                    let kind = if (*s).is_from {
                        AccessKind::Insert
                    } else {
                        AccessKind::Select
                    };
                    let mut t = resolve((*s).relation, kind);
                    t.columns = copied_columns(&t, (*s).attlist);
                    u.targets.push(t);
                    u.labels.extend(untriggered().filter(|_| u.changes));
                }
            }
            T::T_VariableSetStmt => {
                u.changes = false;
                u.labels.extend(disabling_setting(node.cast()));
            }
            T::T_AlterRoleSetStmt => {
                u.changes = false;
                let s = node.cast::<pg_sys::AlterRoleSetStmt>();
                u.labels.extend(disabling_setting((*s).setstmt));
            }
            T::T_AlterDatabaseSetStmt => {
                u.changes = false;
                let s = node.cast::<pg_sys::AlterDatabaseSetStmt>();
                u.labels.extend(disabling_setting((*s).setstmt));
            }
            T::T_CreateFunctionStmt => {
                u.changes = false;
                let s = node.cast::<pg_sys::CreateFunctionStmt>();
                u.labels.extend(settings_of((*s).options));
            }
            T::T_AlterFunctionStmt => {
                u.changes = false;
                let s = node.cast::<pg_sys::AlterFunctionStmt>();
                u.labels.extend(settings_of((*s).actions));
            }
            T::T_RenameStmt => {
                let s = node.cast::<pg_sys::RenameStmt>();
                let before = relation_or_none((*s).relation);
                if let (Some(before), true) = (&before, names_relation((*s).renameType)) {
                    u.targets.push(Target {
                        oid: 0,
                        relation: text((*s).newname),
                        ..before.clone()
                    });
                }
                u.targets.extend(before);
                if (*s).renameType == pg_sys::ObjectType::OBJECT_SCHEMA
                    && text((*s).subname) == "warden"
                {
                    u.labels.push(OURS);
                }
            }
            T::T_AlterOwnerStmt => {
                let s = node.cast::<pg_sys::AlterOwnerStmt>();
                if (*s).objectType == pg_sys::ObjectType::OBJECT_SCHEMA
                    && string_value((*s).object) == "warden"
                {
                    u.labels.push(OURS);
                }
            }
            T::T_AlterObjectSchemaStmt => {
                let s = node.cast::<pg_sys::AlterObjectSchemaStmt>();
                let before = relation_or_none((*s).relation);
                if let Some(before) = &before {
                    u.targets.push(Target {
                        oid: 0,
                        schema: text((*s).newschema),
                        ..before.clone()
                    });
                }
                u.targets.extend(before);
            }
            T::T_CreateTrigStmt => {
                let s = node.cast::<pg_sys::CreateTrigStmt>();
                u.targets.extend(relation_or_none((*s).relation));
            }
            T::T_RuleStmt => {
                let s = node.cast::<pg_sys::RuleStmt>();
                u.targets.extend(relation_or_none((*s).relation));
            }
            T::T_CreatePolicyStmt => {
                let s = node.cast::<pg_sys::CreatePolicyStmt>();
                u.targets.extend(relation_or_none((*s).table));
            }
            T::T_IndexStmt => {
                let s = node.cast::<pg_sys::IndexStmt>();
                u.targets.extend(relation_or_none((*s).relation));
            }
            T::T_CreateStmt => {
                let s = node.cast::<pg_sys::CreateStmt>();
                u.targets.push(created((*s).relation));
                for parent in pointers::<pg_sys::RangeVar>((*s).inhRelations) {
                    u.targets.push(resolve(parent, AccessKind::Ddl));
                }
            }
            T::T_GrantStmt => {
                let s = node.cast::<pg_sys::GrantStmt>();
                if (*s).targtype == pg_sys::GrantTargetType::ACL_TARGET_OBJECT
                    && (*s).objtype == pg_sys::ObjectType::OBJECT_TABLE
                {
                    for r in pointers::<pg_sys::RangeVar>((*s).objects) {
                        u.targets.push(resolve(r, AccessKind::Ddl));
                    }
                }
            }
            T::T_AlterExtensionContentsStmt => {
                let s = node.cast::<pg_sys::AlterExtensionContentsStmt>();
                if text((*s).extname) == "pg_warden" {
                    u.labels.push(OURS);
                }
            }
            T::T_CreateTableAsStmt => {
                let s = node.cast::<pg_sys::CreateTableAsStmt>();
                u.targets.push(created((*(*s).into).rel));
            }
            T::T_ViewStmt => {
                let s = node.cast::<pg_sys::ViewStmt>();
                let before = resolve((*s).view, AccessKind::Ddl);
                u.targets.push(if before.oid == 0 {
                    created((*s).view)
                } else {
                    before
                });
            }
            T::T_CreateForeignTableStmt => {
                let s = node.cast::<pg_sys::CreateForeignTableStmt>();
                u.targets.push(created((*s).base.relation));
            }
            T::T_CreateSeqStmt => {
                let s = node.cast::<pg_sys::CreateSeqStmt>();
                u.targets.push(created((*s).sequence));
            }
            T::T_AlterSeqStmt => {
                let s = node.cast::<pg_sys::AlterSeqStmt>();
                u.targets.extend(relation_or_none((*s).sequence));
            }
            T::T_CallStmt => {
                let s = node.cast::<pg_sys::CallStmt>();
                u.changes = false;
                if !(*s).funcexpr.is_null() {
                    u.functions.push(function_name((*(*s).funcexpr).funcid));
                }
            }
            _ => {
                u.changes = false;
                maintained(node, &mut u.targets);
            }
        }
        u
    }
}

/// The relations of commands that change neither definitions nor rows.
unsafe fn maintained(node: *mut pg_sys::Node, targets: &mut Vec<Target>) {
    let kind = AccessKind::Maintain;
    let mut add = |r: *mut pg_sys::RangeVar, kind| {
        if !r.is_null() {
            // SAFETY: a valid RangeVar, in a transaction.
            targets.push(unsafe { resolve(r, kind) });
        }
    };
    // SAFETY: each node is read as what its tag says it is.
    unsafe {
        match (*node).type_ {
            T::T_VacuumStmt => {
                let s = node.cast::<pg_sys::VacuumStmt>();
                for r in pointers::<pg_sys::VacuumRelation>((*s).rels) {
                    add((*r).relation, kind);
                }
            }
            T::T_LockStmt => {
                let s = node.cast::<pg_sys::LockStmt>();
                for r in pointers::<pg_sys::RangeVar>((*s).relations) {
                    add(r, kind);
                }
            }
            T::T_ClusterStmt => add((*node.cast::<pg_sys::ClusterStmt>()).relation, kind),
            T::T_ReindexStmt => add((*node.cast::<pg_sys::ReindexStmt>()).relation, kind),
            T::T_RefreshMatViewStmt => {
                add((*node.cast::<pg_sys::RefreshMatViewStmt>()).relation, kind);
            }
            T::T_CommentStmt => {
                let s = node.cast::<pg_sys::CommentStmt>();
                if names_relation((*s).objtype) {
                    let name = (*s).object.cast();
                    add(pg_sys::makeRangeVarFromNameList(name), AccessKind::Ddl);
                }
            }
            _ => {}
        }
    }
}

fn names_relation(object: pg_sys::ObjectType::Type) -> bool {
    use pg_sys::ObjectType as O;
    matches!(
        object,
        O::OBJECT_TABLE
            | O::OBJECT_VIEW
            | O::OBJECT_MATVIEW
            | O::OBJECT_FOREIGN_TABLE
            | O::OBJECT_INDEX
            | O::OBJECT_SEQUENCE
    )
}

/// What writes without firing triggers does what DISABLE TRIGGER does.
fn untriggered() -> Option<&'static str> {
    fires_no_triggers().then_some(label::DISABLE_TRIGGER)
}

/// The same of setting what has that effect.
unsafe fn disabling_setting(s: *mut pg_sys::VariableSetStmt) -> Option<&'static str> {
    // SAFETY: a valid statement, or null.
    let sets =
        !s.is_null() && unsafe { text((*s).name) }.eq_ignore_ascii_case("session_replication_role");
    sets.then_some(label::DISABLE_TRIGGER)
}

/// The same of a function's `SET`.
unsafe fn settings_of(options: *mut pg_sys::List) -> Vec<&'static str> {
    // SAFETY: a list of DefElem; of `set`, the argument is a VariableSetStmt.
    unsafe {
        pointers::<pg_sys::DefElem>(options)
            .filter(|d| text((**d).defname) == "set")
            .filter_map(|d| disabling_setting((*d).arg.cast()))
            .collect()
    }
}

fn disabling(subtype: pg_sys::AlterTableType::Type) -> Option<&'static str> {
    use pg_sys::AlterTableType as A;
    match subtype {
        A::AT_DisableTrig | A::AT_DisableTrigAll | A::AT_DisableTrigUser | A::AT_DisableRule => {
            Some(label::DISABLE_TRIGGER)
        }
        A::AT_DisableRowSecurity | A::AT_NoForceRowSecurity => Some(label::DISABLE_RLS),
        _ => None,
    }
}

unsafe fn relation_or_none(r: *mut pg_sys::RangeVar) -> Option<Target> {
    // SAFETY: a valid RangeVar, if there is one.
    (!r.is_null()).then(|| unsafe { resolve(r, AccessKind::Ddl) })
}

unsafe fn named(r: *mut pg_sys::RangeVar, kind: AccessKind) -> Target {
    // SAFETY: a valid RangeVar.
    unsafe {
        Target {
            kind,
            oid: 0,
            schema: text((*r).schemaname),
            relation: text((*r).relname),
            columns: Vec::new(),
        }
    }
}

/// A relation that is about to be made, in the schema where it will be.
unsafe fn created(r: *mut pg_sys::RangeVar) -> Target {
    // SAFETY: a valid RangeVar, in a transaction; a list of OIDs.
    unsafe {
        let mut t = named(r, AccessKind::Ddl);
        if (*r).relpersistence as u8 == pg_sys::RELPERSISTENCE_TEMP {
            t.schema = "pg_temp".into();
        } else if t.schema.is_empty() {
            let path = pg_sys::fetch_search_path(false);
            if !path.is_null() && (*path).length > 0 {
                t.schema = text(pg_sys::get_namespace_name((*(*path).elements).oid_value));
            }
        }
        t
    }
}

/// Looks a name up as the command will, without a lock: what is found is recorded and checked, and
/// never used to act.
unsafe fn resolve(r: *mut pg_sys::RangeVar, kind: AccessKind) -> Target {
    // SAFETY: a valid RangeVar, in a transaction. RVR_MISSING_OK: no error for what is not there.
    unsafe {
        let mut t = named(r, kind);
        // Another database's name is the command's own error.
        if !(*r).catalogname.is_null()
            && text((*r).catalogname) != text(pg_sys::get_database_name(pg_sys::MyDatabaseId))
        {
            return t;
        }
        let oid = pg_sys::RangeVarGetRelidExtended(
            r,
            pg_sys::NoLock as c_int,
            pg_sys::RVROption::RVR_MISSING_OK,
            None,
            std::ptr::null_mut(),
        );
        if oid != pg_sys::InvalidOid {
            t.oid = oid.to_u32();
            t.schema = text(pg_sys::get_namespace_name(pg_sys::get_rel_namespace(oid)));
        }
        t
    }
}

/// The relation that a name stands for; InvalidOid if there is none.
///
/// # Safety
/// A valid RangeVar or null, in a transaction.
pub unsafe fn relation_of(r: *mut pg_sys::RangeVar) -> pg_sys::Oid {
    if r.is_null() {
        return pg_sys::InvalidOid;
    }
    // SAFETY: see above.
    pg_sys::Oid::from(unsafe { resolve(r, AccessKind::Ddl) }.oid)
}

unsafe fn dropped(s: *mut pg_sys::DropStmt, targets: &mut Vec<Target>) {
    use pg_sys::ObjectType as O;
    // SAFETY: for these kinds of objects, each element is a list of name parts.
    unsafe {
        let on_table = matches!(
            (*s).removeType,
            O::OBJECT_TRIGGER | O::OBJECT_RULE | O::OBJECT_POLICY
        );
        if !on_table && !names_relation((*s).removeType) {
            return;
        }
        for name in pointers::<pg_sys::List>((*s).objects) {
            let parts = pg_sys::list_copy(name);
            let parts = if on_table {
                // The last part names the trigger, rule or policy.
                pg_sys::list_truncate(parts, (*parts).length - 1)
            } else {
                parts
            };
            if parts.is_null() || (*parts).length == 0 {
                continue;
            }
            targets.push(resolve(
                pg_sys::makeRangeVarFromNameList(parts),
                AccessKind::Ddl,
            ));
        }
    }
}

unsafe fn copied_columns(t: &Target, attlist: *mut pg_sys::List) -> Vec<String> {
    // SAFETY: a list of String nodes; catalog look-ups in a transaction.
    unsafe {
        if !attlist.is_null() {
            return pointers::<pg_sys::Node>(attlist)
                .map(|n| string_value(n))
                .collect();
        }
        let oid = pg_sys::Oid::from(t.oid);
        if oid == pg_sys::InvalidOid {
            return Vec::new();
        }
        (1..=compat::natts(oid))
            .map(|n| text(pg_sys::get_attname(oid, n, true)))
            .filter(|n| !n.is_empty() && !n.starts_with("........pg.dropped."))
            .collect()
    }
}

unsafe fn string_value(node: *mut pg_sys::Node) -> String {
    // SAFETY: a String node.
    unsafe { text((*node.cast::<pg_sys::String>()).sval) }
}

/// Whether a utility command may run.
pub fn check_utility(u: &Utility) -> Result<(), Refusal> {
    if u.changes {
        let schema = policy::schema();
        if schema != pg_sys::InvalidOid {
            // SAFETY: catalog look-ups; `changes` is only set in a transaction.
            let hit = unsafe {
                u.targets.iter().find(|t| {
                    t.oid != 0
                        && t.kind != AccessKind::Select
                        && in_ledger(pg_sys::Oid::from(t.oid))
                })
            };
            // SAFETY: reads a variable of this process.
            if let Some(t) = hit.filter(|_| !unsafe { pg_sys::creating_extension }) {
                return Err(ledger_refusal(&t.relation));
            }
            if u.labels.contains(&OURS) {
                return Err(ledger_refusal("*"));
            }
        }
    }
    // SAFETY: reads the transaction's state.
    if !unsafe { pg_sys::IsTransactionState() } {
        return Ok(());
    }
    let rules = rules();
    let mut labels: Vec<&str> = Vec::new();
    if rules.mention(&u.command) {
        labels.push(&u.command);
    }
    labels.extend(u.labels.iter().copied().filter(|l| rules.mention(l)));
    if u.is_copy {
        labels.extend(
            ["COPY FROM", "COPY TO"]
                .into_iter()
                .filter(|l| rules.mention(l) && (*l == "COPY FROM") == u.changes),
        );
    }
    if labels.is_empty() {
        return Ok(());
    }
    // SAFETY: catalog look-ups in a transaction.
    let relations: Vec<u32> = unsafe {
        u.targets
            .iter()
            .filter(|t| t.oid != 0 && !is_temporary(pg_sys::Oid::from(t.oid)))
            .map(|t| t.oid)
            .collect()
    };
    // Temporary tables, and tables that do not exist, are nobody's loss.
    let on_tables = ["DROP TABLE", "TRUNCATE TABLE", "COPY"];
    if relations.is_empty() && on_tables.contains(&u.command.as_str()) {
        return Ok(());
    }
    decide(&rules, &Facts { labels, relations })
}

/// Whether a function call message may run. Its arguments are not known: what can change any setting
/// counts as changing the one that a rule speaks of.
pub fn check_call(function: &str) -> Result<(), Refusal> {
    let rules = rules();
    let mut labels = vec![fastpath::COMMAND];
    if function == "pg_catalog.set_config" {
        labels.insert(0, label::DISABLE_TRIGGER);
    }
    labels.retain(|l| rules.mention(l));
    if labels.is_empty() {
        return Ok(());
    }
    let relations = Vec::new();
    decide(&rules, &Facts { labels, relations })
}

/// Whether a DROP command may take a relation, or one of its columns, along.
///
/// # Safety
/// In a transaction.
pub unsafe fn check_drop(relation: pg_sys::Oid, column: bool) -> Result<(), Refusal> {
    // SAFETY: catalog look-ups.
    unsafe {
        let tag = match pg_sys::get_rel_relkind(relation) as u8 {
            pg_sys::RELKIND_RELATION | pg_sys::RELKIND_PARTITIONED_TABLE => "DROP TABLE",
            pg_sys::RELKIND_FOREIGN_TABLE => "DROP FOREIGN TABLE",
            pg_sys::RELKIND_MATVIEW => "DROP MATERIALIZED VIEW",
            pg_sys::RELKIND_VIEW => "DROP VIEW",
            _ => return Ok(()),
        };
        if is_temporary(relation) {
            return Ok(());
        }
        if in_ledger(relation) && !pg_sys::creating_extension {
            return Err(ledger_refusal(&text(pg_sys::get_rel_name(relation))));
        }
        let what = if column {
            label::CASCADE_TO_COLUMN
        } else {
            tag
        };
        let rules = rules();
        if !rules.mention(what) {
            return Ok(());
        }
        decide(
            &rules,
            &Facts {
                labels: vec![what],
                relations: vec![relation.to_u32()],
            },
        )
        .map_err(|refusal| Refusal {
            detail: format!(
                "The command would take {} \"{}\" along.",
                if column {
                    "a column of"
                } else {
                    "the relation"
                },
                crate::pg::shape::qualified(relation)
            ),
            ..refusal
        })
    }
}

/// The labels of [`label`] that a query carries, found before it is planned.
///
/// # Safety
/// `query` is a valid Query.
pub unsafe fn without_where(query: *mut pg_sys::Query) -> Vec<&'static str> {
    use pg_sys::CmdType as C;
    let mut found = Vec::new();
    // SAFETY: a valid query; the qualification is copied before it is simplified.
    unsafe {
        for cte in pointers::<pg_sys::CommonTableExpr>((*query).cteList) {
            let inner = (*cte).ctequery;
            if !inner.is_null() && (*inner).type_ == T::T_Query {
                found.extend(without_where(inner.cast()));
            }
        }
        let name = match (*query).commandType {
            C::CMD_UPDATE => label::UPDATE_WITHOUT_WHERE,
            C::CMD_DELETE => label::DELETE_WITHOUT_WHERE,
            C::CMD_MERGE => {
                found.extend(merges_everything(query));
                return found;
            }
            _ => return found,
        };
        let tree = (*query).jointree;
        if tree.is_null() || always_true((*tree).quals) {
            found.push(name);
        }
    }
    found
}

/// The same of a MERGE: actions without a condition, on rows that are joined whatever they hold.
unsafe fn merges_everything(query: *mut pg_sys::Query) -> Vec<&'static str> {
    use pg_sys::CmdType as C;
    // SAFETY: a valid query.
    unsafe {
        #[cfg(any(feature = "pg15", feature = "pg16"))]
        let condition = (*(*query).jointree).quals;
        #[cfg(any(feature = "pg17", feature = "pg18"))]
        let condition = (*query).mergeJoinCondition;
        if looks_at(condition, (*query).resultRelation) {
            return Vec::new();
        }
        pointers::<pg_sys::MergeAction>((*query).mergeActionList)
            .filter(|a| always_true((**a).qual))
            .filter_map(|a| match (*a).commandType {
                C::CMD_UPDATE => Some(label::UPDATE_WITHOUT_WHERE),
                C::CMD_DELETE => Some(label::DELETE_WITHOUT_WHERE),
                _ => None,
            })
            .collect()
    }
}

/// Whether a condition looks at a relation of its query, directly or in a subquery.
unsafe fn looks_at(condition: *mut pg_sys::Node, relation: c_int) -> bool {
    if condition.is_null() {
        return false;
    }
    // SAFETY: a valid expression.
    unsafe {
        let mut columns = std::ptr::null_mut();
        pg_sys::pull_varattnos(condition, relation as _, &mut columns);
        !columns.is_null() || pg_sys::contain_subplans(condition)
    }
}

/// Whether a condition is missing, or a constant that is true, as `WHERE 1 = 1` is.
unsafe fn always_true(quals: *mut pg_sys::Node) -> bool {
    if quals.is_null() {
        return true;
    }
    // SAFETY: a valid expression; only constants are folded, on a copy.
    unsafe {
        if pg_sys::contain_var_clause(quals)
            || pg_sys::contain_subplans(quals)
            || pg_sys::contain_volatile_functions(quals)
        {
            return false;
        }
        let copy = pg_sys::copyObjectImpl(quals.cast()).cast::<pg_sys::Node>();
        let folded = pg_sys::eval_const_expressions(std::ptr::null_mut(), copy);
        if folded.is_null() || (*folded).type_ != T::T_Const {
            return false;
        }
        let c = folded.cast::<pg_sys::Const>();
        !(*c).constisnull && (*c).constvalue.value() != 0
    }
}

/// Whether a plain string names this extension.
pub fn is_our_extension(name: *const std::ffi::c_char) -> bool {
    // SAFETY: null or NUL-terminated, from a parse tree.
    !name.is_null() && unsafe { CStr::from_ptr(name) } == c"pg_warden"
}

/// Whether a command creates, drops or changes this extension.
///
/// # Safety
/// `node` is a valid utility statement.
pub unsafe fn is_about_us(node: *mut pg_sys::Node) -> bool {
    // SAFETY: each node is read as what its tag says it is.
    unsafe {
        match (*node).type_ {
            T::T_CreateExtensionStmt => {
                is_our_extension((*node.cast::<pg_sys::CreateExtensionStmt>()).extname)
            }
            T::T_AlterExtensionStmt => {
                is_our_extension((*node.cast::<pg_sys::AlterExtensionStmt>()).extname)
            }
            T::T_DropStmt => {
                let s = node.cast::<pg_sys::DropStmt>();
                (*s).removeType == pg_sys::ObjectType::OBJECT_EXTENSION
                    && pointers::<pg_sys::Node>((*s).objects)
                        .any(|n| string_value(n) == "pg_warden")
            }
            _ => false,
        }
    }
}

/// Whether a command ends a transaction or its error: such a command must always get through.
///
/// # Safety
/// `node` is a valid utility statement.
pub unsafe fn ends_transaction(node: *mut pg_sys::Node) -> bool {
    // SAFETY: a valid node.
    unsafe { (*node).type_ == T::T_TransactionStmt }
}

/// Whether a command ends a transaction with what it has done: COMMIT or PREPARE TRANSACTION.
///
/// # Safety
/// `node` is a valid utility statement.
pub unsafe fn commits(node: *mut pg_sys::Node) -> bool {
    use pg_sys::TransactionStmtKind as K;
    // SAFETY: read as what its tag says it is.
    unsafe {
        (*node).type_ == T::T_TransactionStmt
            && matches!(
                (*node.cast::<pg_sys::TransactionStmt>()).kind,
                K::TRANS_STMT_COMMIT | K::TRANS_STMT_PREPARE
            )
    }
}

/// Whether a command is DISCARD ALL.
///
/// # Safety
/// `node` is a valid utility statement.
pub unsafe fn discards_all(node: *mut pg_sys::Node) -> bool {
    // SAFETY: read as what its tag says it is.
    unsafe {
        (*node).type_ == T::T_DiscardStmt
            && (*node.cast::<pg_sys::DiscardStmt>()).target == pg_sys::DiscardMode::DISCARD_ALL
    }
}
