//! The backend's copy of what is configured, and when it must be read again.
//!
//! Owns: whether the extension is installed in this database, the masks, and who is exempt from
//! them. Every change of a configuration table invalidates all relations (`warden.config_changed`),
//! which every backend hears of before its next statement; then everything here is read anew.

use crate::pg::local::Local;
use crate::pg::reference::{self, Column};
use crate::pg::session::text;
use crate::pg::{identity, scan, version};
use pgrx::pg_sys;
use std::collections::{HashMap, HashSet};
use std::ffi::c_int;
use std::rc::Rc;

/// The masks of one relation: column number and mask function.
pub type RelMasks = Vec<(i16, pg_sys::Oid)>;

/// The masks of a database.
#[derive(Default)]
pub struct Masks {
    /// As configured, by relation.
    by_relation: HashMap<u32, RelMasks>,
    /// Relations of which a mask names a column that they do not have, and the mask's target.
    broken: HashMap<u32, String>,
    /// The version of the extension, if the library has another one: nothing here is to be relied on.
    outdated: Option<String>,
    /// Roles whose members read what is stored.
    exempt: Vec<u32>,
    /// `schema`, `table` of every relation through which masked columns can be read.
    pub names: HashSet<(String, String)>,
    /// Every relation through which masked columns can be read, with the relations whose policies
    /// reach it: itself, its ancestors (a partition read directly) and its descendants (a parent
    /// shows what a child masks).
    family: HashMap<u32, Vec<u32>>,
    /// The configuration tables that were read.
    tables: Vec<u32>,
}

/// Why nothing may be read from a relation.
pub enum Unreadable<'a> {
    /// A mask names this column, and the relation, its ancestor or its descendant does not have it:
    /// nobody can say what must not be read.
    NoColumn(&'a str),
    /// The extension in this database has this version, and the library another.
    Outdated(&'a str),
}

struct State {
    registered: bool,
    generation: u64,
    schema: Option<pg_sys::Oid>,
    /// The configuration names something that does not exist: whatever is created may be it.
    unresolved: bool,
    masks: Option<Rc<Masks>>,
    /// The masks before they were forgotten.
    former: Option<Rc<Masks>>,
    by_relation: HashMap<u32, Option<Rc<RelMasks>>>,
}

static STATE: Local<Option<State>> = Local::new(None);

fn with<R>(f: impl FnOnce(&mut State) -> R) -> R {
    STATE.with(|s| {
        f(s.get_or_insert_with(|| State {
            registered: false,
            generation: 1,
            schema: None,
            unresolved: false,
            masks: None,
            former: None,
            by_relation: HashMap::new(),
        }))
    })
}

unsafe extern "C-unwind" {
    fn find_all_inheritors(
        parent: pg_sys::Oid,
        lock: pg_sys::LOCKMODE,
        parents: *mut *mut pg_sys::List,
    ) -> *mut pg_sys::List;
}

/// Changes whenever something that was read from the configuration may have changed.
pub fn generation() -> u64 {
    register();
    with(|s| s.generation)
}

/// Forgets everything.
pub fn forget() {
    with(|s| {
        s.generation += 1;
        s.schema = None;
        s.unresolved = false;
        s.former = s.masks.take().or_else(|| s.former.take());
        s.by_relation.clear();
    });
}

/// Something that the configuration names was not found: it is looked for again whenever a relation
/// or a role changes.
pub fn note_unresolved() {
    with(|s| s.unresolved = true);
}

fn register() {
    if with(|s| std::mem::replace(&mut s.registered, true)) {
        return;
    }
    // SAFETY: the callbacks have the right signatures; there are slots for them once a backend.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::from(0));
        pg_sys::CacheRegisterSyscacheCallback(
            pg_sys::SysCacheIdentifier::NAMESPACEOID as c_int,
            Some(schema_changed),
            pg_sys::Datum::from(0),
        );
        pg_sys::CacheRegisterSyscacheCallback(
            pg_sys::SysCacheIdentifier::AUTHMEMROLEMEM as c_int,
            Some(membership_changed),
            pg_sys::Datum::from(0),
        );
        pg_sys::CacheRegisterSyscacheCallback(
            pg_sys::SysCacheIdentifier::AUTHOID as c_int,
            Some(role_changed),
            pg_sys::Datum::from(0),
        );
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn relation_changed(_arg: pg_sys::Datum, relid: pg_sys::Oid) {
    let key = relid.to_u32();
    // A relation that masks reach may have got a new partition, or lost one.
    let all = relid == pg_sys::InvalidOid
        || with(|s| {
            s.unresolved
                || s.masks
                    .as_ref()
                    .is_some_and(|m| m.family.contains_key(&key) || m.tables.contains(&key))
        });
    if all {
        forget();
    } else {
        with(|s| s.by_relation.remove(&key));
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn role_changed(_arg: pg_sys::Datum, _cache: c_int, _hash: u32) {
    if with(|s| s.unresolved) {
        forget();
    }
}

/// Plans are kept by role, and say nothing about what the role is a member of.
#[pgrx::pg_guard]
unsafe extern "C-unwind" fn membership_changed(_arg: pg_sys::Datum, _cache: c_int, _hash: u32) {
    if with(|s| s.schema) != Some(pg_sys::InvalidOid) {
        // SAFETY: PostgreSQL's own callbacks do the same.
        unsafe { pg_sys::ResetPlanCache() };
    }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn schema_changed(_arg: pg_sys::Datum, _cache: c_int, _hash: u32) {
    with(|s| {
        s.generation += 1;
        s.schema = None;
    });
}

/// The schema `warden`, if it belongs to the extension in this database; else InvalidOid.
pub fn schema() -> pg_sys::Oid {
    register();
    if let Some(schema) = with(|s| s.schema) {
        return schema;
    }
    // SAFETY: catalog look-ups, only in a transaction and connected to a database.
    let schema = unsafe {
        if !pg_sys::IsTransactionState() || pg_sys::MyDatabaseId == pg_sys::InvalidOid {
            return pg_sys::InvalidOid;
        }
        if pg_sys::get_extension_oid(c"pg_warden".as_ptr(), true) == pg_sys::InvalidOid {
            pg_sys::InvalidOid
        } else {
            pg_sys::get_namespace_oid(c"warden".as_ptr(), true)
        }
    };
    with(|s| s.schema = Some(schema));
    schema
}

/// Whether the extension is installed in this database.
#[inline]
pub fn installed() -> bool {
    schema() != pg_sys::InvalidOid
}

/// The masks of this database.
pub fn masks() -> Rc<Masks> {
    let generation = generation();
    if let Some(masks) = with(|s| s.masks.clone()) {
        return masks;
    }
    let mut masks = Masks {
        outdated: if installed() {
            version::other_than_library()
        } else {
            None
        },
        ..Masks::default()
    };
    if let Some(table) = scan::warden_table("mask_policy") {
        masks.tables.push(table.to_u32());
        scan::scan_table(table, |row| {
            match row.reference("target").map(|r| reference::column(&r)) {
                Some(Column::Found(relation, attribute)) => {
                    let function = row.reference("function");
                    // Without its function, a masked column is NULL.
                    let function = function.and_then(|f| reference::function(&f));
                    let mask = (attribute, function.unwrap_or(pg_sys::InvalidOid));
                    let masked: &mut RelMasks =
                        masks.by_relation.entry(relation.to_u32()).or_default();
                    masked.push(mask);
                }
                Some(Column::Missing(relation, target)) => {
                    let relation = relation.to_u32();
                    masks.by_relation.entry(relation).or_default();
                    let target = String::from_utf8_lossy(&target.print()).into_owned();
                    masks.broken.insert(relation, target);
                }
                Some(Column::Nowhere) | None => {}
            }
        });
    }
    if let Some(table) = scan::warden_table("mask_exemption") {
        masks.tables.push(table.to_u32());
        scan::scan_table(table, |row| {
            masks
                .exempt
                .extend(row.reference("role").map(|r| reference::oid(&r)));
        });
    }
    for policy in masks.by_relation.keys() {
        let oid = pg_sys::Oid::from(*policy);
        for member in with_children(oid).into_iter().chain(ancestors(oid)) {
            let reached_by: &mut Vec<u32> = masks.family.entry(member.to_u32()).or_default();
            // Its own policy comes first.
            let at = if member == oid { 0 } else { reached_by.len() };
            reached_by.insert(at, *policy);
        }
    }
    for relation in masks.family.keys() {
        // SAFETY: catalog look-ups in a transaction.
        let name = unsafe {
            let relation = pg_sys::Oid::from(*relation);
            let schema = pg_sys::get_namespace_name(pg_sys::get_rel_namespace(relation));
            (text(schema), text(pg_sys::get_rel_name(relation)))
        };
        masks.names.insert(name);
    }
    let masks = Rc::new(masks);
    // Not kept if something has changed while it was read.
    with(|s| {
        if s.generation == generation {
            s.masks = Some(Rc::clone(&masks));
        }
    });
    masks
}

/// The masks as they were last read: for where catalogs cannot be.
pub fn last_masks() -> Option<Rc<Masks>> {
    with(|s| s.masks.clone().or_else(|| s.former.clone()))
}

fn with_children(relation: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    // SAFETY: a catalog scan in a transaction, without locks: what is gone is not found by name.
    unsafe {
        let list = pg_sys::ffi::pg_guard_ffi_boundary(|| {
            find_all_inheritors(relation, pg_sys::NoLock as _, std::ptr::null_mut())
        });
        (0..(*list).length as usize)
            .map(|i| (*(*list).elements.add(i)).oid_value)
            .collect()
    }
}

/// Parents, their parents, and so on.
fn ancestors(relation: pg_sys::Oid) -> Vec<pg_sys::Oid> {
    let mut found = vec![relation];
    let mut next = 0;
    while next < found.len() {
        let mut parents = Vec::new();
        scan::scan_by_oid(INHERITS, INHERITS_BY_RELATION, 1, found[next], |row| {
            parents.extend(row.oid("inhparent"))
        });
        for parent in parents {
            if !found.contains(&parent) {
                found.push(parent);
            }
        }
        next += 1;
    }
    found.split_off(1)
}

/// `pg_inherits`, of pg_inherits.h.
const INHERITS: pg_sys::Oid = pg_sys::Oid::from_u32(2611);
/// `pg_inherits_relid_seqno_index`, of pg_inherits.h.
const INHERITS_BY_RELATION: pg_sys::Oid = pg_sys::Oid::from_u32(2680);

impl Masks {
    /// Whether nothing is masked in this database.
    pub fn is_empty(&self) -> bool {
        self.by_relation.is_empty() && self.outdated.is_none()
    }

    /// Whether the current identity reads what is stored: it has the privileges of an exempt role,
    /// being a superuser does not count, and it is no AI agent.
    pub fn exempts(&self) -> bool {
        // SAFETY: reads a variable of this process.
        self.exempts_user(unsafe { pg_sys::GetUserId() })
    }

    /// The same for the client, whatever function of whichever owner runs for it now.
    pub fn exempts_client(&self) -> bool {
        // SAFETY: reads a variable of this process.
        self.exempts_user(unsafe { pg_sys::GetOuterUserId() })
    }

    fn exempts_user(&self, user: pg_sys::Oid) -> bool {
        if self.exempt.is_empty() || identity::is_agent() {
            return false;
        }
        // SAFETY: catalog look-ups in a transaction. A superuser has the privileges of every role:
        // for one, being granted the role is asked for.
        unsafe {
            let superuser = pg_sys::superuser_arg(user);
            self.exempt.iter().any(|role| {
                let role = pg_sys::Oid::from(*role);
                if superuser {
                    pg_sys::is_member_of_role_nosuper(user, role)
                } else {
                    pg_sys::has_privs_of_role(user, role)
                }
            })
        }
    }

    /// Whether the current identity is under masks.
    pub fn apply(&self) -> bool {
        !self.is_empty() && !self.exempts()
    }

    /// Every relation through which masked columns can be read.
    pub fn relations(&self) -> impl Iterator<Item = pg_sys::Oid> {
        self.family.keys().map(|r| pg_sys::Oid::from(*r))
    }

    /// Why nothing may be read from a relation.
    pub fn unreadable(&self, relation: pg_sys::Oid) -> Option<Unreadable<'_>> {
        if let Some(version) = &self.outdated {
            let users = relation.to_u32() >= pg_sys::FirstNormalObjectId;
            return users.then_some(Unreadable::Outdated(version));
        }
        if self.broken.is_empty() {
            return None;
        }
        let reached_by = self.family.get(&relation.to_u32())?;
        let broken = reached_by
            .iter()
            .find_map(|policy| self.broken.get(policy))?;
        Some(Unreadable::NoColumn(broken))
    }

    /// The masks of a relation: its own and, by column name, those of its ancestors and descendants.
    pub fn of(&self, relation: pg_sys::Oid) -> Option<Rc<RelMasks>> {
        let key = relation.to_u32();
        if self.outdated.is_some() {
            return self.unreadable(relation).map(|_| Rc::default());
        }
        let policies = self.family.get(&key)?;
        if let Some(known) = with(|s| s.by_relation.get(&key).cloned()) {
            return known;
        }
        let generation = generation();
        let mut found = RelMasks::new();
        for policy in policies {
            for (attribute, function) in &self.by_relation[policy] {
                let mine = if *policy == key {
                    *attribute
                } else {
                    // SAFETY: catalog look-ups in a transaction.
                    unsafe {
                        let policy = pg_sys::Oid::from(*policy);
                        let name = pg_sys::get_attname(policy, *attribute, true);
                        if name.is_null() {
                            continue;
                        }
                        pg_sys::get_attnum(relation, name)
                    }
                };
                if mine > 0 && !found.iter().any(|(a, _)| *a == mine) {
                    found.push((mine, *function));
                }
            }
        }
        // An empty list for a relation that cannot be read.
        let found =
            (!found.is_empty() || self.unreadable(relation).is_some()).then(|| Rc::new(found));
        with(|s| {
            if s.generation == generation {
                s.by_relation.insert(key, found.clone());
            }
        });
        found
    }
}
