//! The ledger's tables: read and written without the executor, so that no hook of any extension
//! comes between the recorder and its rows.
//!
//! Owns: the layout of `warden.event`, `session`, `statement`, `connection_event`,
//! `journal_position` and `journal_pending`, and their verification. Receives batches of the joiner. Never decides what an
//! event is.
//!
//! Rows go in by `heap_multi_insert`, and into the indexes one by one, as COPY does it. The server's
//! own routine for that, for catalogs, takes the wrong place for rows that are toasted.

use crate::pg::{journal, shared};
use pgrx::pg_sys;
use pgrx::{Inet, IntoDatum, JsonB, PgMemoryContexts, Spi};
use std::borrow::Cow;
use std::ffi::{CStr, CString, c_int};
use std::net::IpAddr;
use warden_core::connection::{ConnectionFacts, ConnectionRow, Ending};
use warden_core::event::{Event, EventKind};
use warden_core::join::{Batch, Directory, OpenIntent, SessionRow, StatementRow, TransactionRow};
use warden_core::ledger::{Chain, ChainError, Hash, ORIGIN};
use warden_core::sink::{Limits, Stored as Record};

/// Events of a partition.
const PARTITION: i64 = 1 << 24;
/// Rows that are inserted, or read for verification, at a time.
const ROWS: usize = 500;

unsafe extern "C-unwind" {
    fn datum_image_eq(a: pg_sys::Datum, b: pg_sys::Datum, by_value: bool, length: c_int) -> bool;
}

/// A column's value; `None` is NULL.
type Value = Option<pg_sys::Datum>;

/// The ledger of this database, for one transaction: DROP EXTENSION waits until it ends.
pub struct Ledger {
    /// OID of the extension.
    pub extension: pg_sys::Oid,
    schema: pg_sys::Oid,
}

/// What a ledger holds when its recorder starts.
pub struct Stored {
    /// Journal position after the last frame recorded, if it is known.
    pub position: Option<u64>,
    /// Journal position at which the ledger began, if it is known.
    pub start: Option<u64>,
    /// The end of the chain.
    pub chain: Chain,
    /// `at` of the last event, or 0.
    pub at: i64,
    /// Open intents.
    pub pending: Vec<(u64, OpenIntent)>,
    /// Open transactions.
    pub unsettled: Vec<(u64, Vec<u8>)>,
}

impl Ledger {
    /// The ledger, if the extension is in this database.
    ///
    /// The lock on the extension comes before any lock on a table, as in DROP EXTENSION, so the two
    /// cannot deadlock, and no table goes away once it is held.
    pub fn open() -> Option<Self> {
        // SAFETY: in a transaction; the lock is released when it ends.
        unsafe {
            let extension = pg_sys::get_extension_oid(c"pg_warden".as_ptr(), true);
            if extension == pg_sys::InvalidOid {
                return None;
            }
            let share = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
            pg_sys::LockDatabaseObject(pg_sys::ExtensionRelationId, extension, 0, share);
            pg_sys::AcceptInvalidationMessages();
            if pg_sys::get_extension_oid(c"pg_warden".as_ptr(), true) != extension {
                return None;
            }
            let schema = pg_sys::get_namespace_oid(c"warden".as_ptr(), true);
            (schema != pg_sys::InvalidOid).then_some(Self { extension, schema })
        }
    }

    fn relation(&self, name: &CStr) -> Option<pg_sys::Oid> {
        // SAFETY: a syscache lookup in a transaction.
        let oid = unsafe { pg_sys::get_relname_relid(name.as_ptr(), self.schema) };
        (oid != pg_sys::InvalidOid).then_some(oid)
    }

    fn require(&self, name: &CStr) -> pg_sys::Oid {
        match self.relation(name) {
            Some(oid) => oid,
            None => pgrx::error!("pg_warden: warden.{} is missing", name.to_string_lossy()),
        }
    }

    /// What the ledger holds.
    pub fn load(&self) -> Result<Stored, pgrx::spi::Error> {
        let (mut position, mut start, mut chain) = (None, None, Chain::default());
        Spi::connect(|c| {
            let query = "SELECT position, seq, hash, start FROM warden.journal_position LIMIT 1";
            if let Some(row) = c.select(query, Some(1), &[])?.next() {
                position = row.get::<i64>(1)?.map(|p| p as u64);
                let hash = row.get::<Vec<u8>>(3)?.unwrap_or_default();
                chain = Chain {
                    seq: row.get::<i64>(2)?.unwrap_or(0),
                    hash: to_hash(&hash),
                };
                start = row.get::<i64>(4)?.map(|p| p as u64);
            }
            Ok::<_, pgrx::spi::Error>(())
        })?;
        let mut at = 0;
        // Without its place the recorder still must not number an event twice.
        let last = Spi::connect(|c| {
            let query = "SELECT seq, hash, at FROM warden.event ORDER BY seq DESC LIMIT 1";
            let mut rows = c.select(query, Some(1), &[])?;
            match rows.next() {
                None => Ok::<_, pgrx::spi::Error>(None),
                Some(row) => Ok(Some((
                    row.get::<i64>(1)?.unwrap_or(0),
                    row.get::<Vec<u8>>(2)?.unwrap_or_default(),
                    row.get::<pgrx::datum::TimestampWithTimeZone>(3)?,
                ))),
            }
        })?;
        if let Some((seq, hash, when)) = last {
            if position.is_none() {
                chain = Chain {
                    seq,
                    hash: to_hash(&hash),
                };
            }
            at = when.map_or(0, pg_sys::TimestampTz::from);
        }
        let pending = Spi::connect(|c| {
            let mut pending = Vec::new();
            for row in c.select(
                "SELECT position, frame FROM warden.journal_pending",
                None,
                &[],
            )? {
                let position = row.get::<i64>(1)?.unwrap_or(0) as u64;
                let frame = row.get::<Vec<u8>>(2)?.unwrap_or_default();
                if let Some(intent) = OpenIntent::decode(&frame) {
                    pending.push((position, intent));
                }
            }
            Ok::<_, pgrx::spi::Error>(pending)
        })?;
        let unsettled = Spi::connect(|c| {
            let query = "SELECT xid, frame FROM warden.journal_transaction";
            c.select(query, None, &[])?
                .map(|row| {
                    let xid = row.get::<i64>(1)?.unwrap_or(0) as u64;
                    Ok((xid, row.get::<Vec<u8>>(2)?.unwrap_or_default()))
                })
                .collect::<Result<_, pgrx::spi::Error>>()
        })?;
        Ok(Stored {
            position,
            start,
            chain,
            at,
            pending,
            unsettled,
        })
    }

    /// Stores a batch, the end of the chain and the journal position after the batch. `start` is
    /// where the ledger began.
    pub fn store(&self, batch: &Batch, chain: &Chain, position: u64, start: u64) {
        if let Some((last, _)) = batch.events.last() {
            let first = batch.events[0].0.seq;
            // Half a partition ahead of need.
            for number in partition(first)..=partition(last.seq + PARTITION / 2) {
                self.ensure_partition(number);
            }
        }
        let mut events = batch.events.as_slice();
        while let Some((first, _)) = events.first() {
            let number = partition(first.seq);
            let n = events.partition_point(|(e, _)| partition(e.seq) == number);
            let (here, later) = events.split_at(n);
            let rows = here.iter().map(|(e, hash)| event_values(e, hash));
            insert_as(self.require(&partition_name(number)), rows, Keys::Ascending);
            events = later;
        }
        if !batch.sessions.is_empty() {
            insert(
                self.require(c"session"),
                batch.sessions.iter().map(session_values),
            );
        }
        if !batch.statements.is_empty() {
            insert(
                self.require(c"statement"),
                batch.statements.iter().map(statement_values),
            );
        }
        if !batch.transactions.is_empty() {
            insert(
                self.require(c"transaction"),
                batch.transactions.iter().map(transaction_values),
            );
        }
        if !batch.settled.is_empty() {
            self.remove(
                c"journal_transaction",
                c"journal_transaction_pkey",
                &batch.settled,
            );
        }
        if !batch.unsettled.is_empty() {
            let rows = batch
                .unsettled
                .iter()
                .map(|(xid, f)| [(*xid as i64).into_datum(), bytea(f)]);
            insert(self.require(c"journal_transaction"), rows);
        }
        if !batch.connections.is_empty() {
            insert(
                self.require(c"connection_event"),
                batch.connections.iter().map(connection_values),
            );
        }
        if !batch.closed.is_empty() {
            self.remove(c"journal_pending", c"journal_pending_pkey", &batch.closed);
        }
        if !batch.opened.is_empty() {
            let rows = batch
                .opened
                .iter()
                .map(|(p, f)| [(*p as i64).into_datum(), bytea(f)]);
            insert(self.require(c"journal_pending"), rows);
        }
        self.store_position(chain, position, start);
    }

    fn store_position(&self, chain: &Chain, position: u64, start: u64) {
        let values = [
            (position as i64).into_datum(),
            chain.seq.into_datum(),
            bytea(&chain.hash),
            (start as i64).into_datum(),
        ];
        let oid = self.require(c"journal_position");
        let table = Table::open(oid, pg_sys::RowExclusiveLock);
        let (mut values, mut nulls) = split(&values);
        let mut all = [true; 4];
        // SAFETY: the arrays have a value for each of the table's four columns; the scan is ended,
        // and its tuple is not used afterwards.
        unsafe {
            let desc = (*table.0).rd_att;
            let scan = pg_sys::systable_beginscan(
                table.0,
                pg_sys::InvalidOid,
                false,
                std::ptr::null_mut(),
                0,
                std::ptr::null_mut(),
            );
            let old = pg_sys::systable_getnext(scan);
            if old.is_null() {
                let new = pg_sys::heap_form_tuple(desc, values.as_mut_ptr(), nulls.as_mut_ptr());
                pg_sys::CatalogTupleInsert(table.0, new);
            } else {
                let new = pg_sys::heap_modify_tuple(
                    old,
                    desc,
                    values.as_mut_ptr(),
                    nulls.as_mut_ptr(),
                    all.as_mut_ptr(),
                );
                pg_sys::CatalogTupleUpdate(table.0, &mut (*old).t_self, new);
            }
            pg_sys::systable_endscan(scan);
        }
    }

    /// Removes the rows with these keys.
    fn remove(&self, table: &CStr, index: &CStr, keys: &[u64]) {
        let table = Table::open(self.require(table), pg_sys::RowExclusiveLock);
        let index = self.require(index);
        for key in keys {
            // SAFETY: the callback gets a tuple of the open table.
            find(&table, index, 1, *key as i64, |tuple| unsafe {
                pg_sys::CatalogTupleDelete(table.0, &mut (*tuple).t_self);
            });
        }
    }

    fn seq_of_key(&self, table: &CStr, index: &CStr, key: u64) -> Option<i64> {
        let table = Table::open(self.require(table), pg_sys::AccessShareLock);
        let index = self.require(index);
        find(&table, index, 2, key as i64, |tuple| {
            let mut null = false;
            // SAFETY: the first column is a bigint that is never NULL.
            unsafe { pg_sys::heap_getattr(tuple, 1, (*table.0).rd_att, &mut null).value() as i64 }
        })
    }

    /// Adds a partition, and attaches it, which does not disturb readers as CREATE TABLE …
    /// PARTITION OF would.
    fn ensure_partition(&self, number: i64) {
        let name = partition_name(number);
        if self.relation(&name).is_some() {
            return;
        }
        let name = name.to_string_lossy();
        let from = number * PARTITION + 1;
        let to = from + PARTITION;
        let last = to - 1;
        let commands = [
            format!("CREATE TABLE warden.{name} (LIKE warden.event INCLUDING ALL)"),
            format!("REVOKE ALL ON warden.{name} FROM PUBLIC"),
            format!("COMMENT ON TABLE warden.{name} IS 'Events {from} to {last} of the ledger'"),
            format!(
                "ALTER TABLE warden.event ATTACH PARTITION warden.{name} \
                 FOR VALUES FROM ({from}) TO ({to})"
            ),
        ];
        for command in commands {
            if let Err(e) = Spi::run(&command) {
                pgrx::error!("pg_warden: could not add a partition to the ledger: {e}");
            }
        }
    }
}

impl Directory for &Ledger {
    fn session(&mut self, key: u64) -> Option<i64> {
        self.seq_of_key(c"session", c"session_key_idx", key)
    }
    fn statement(&mut self, key: u64) -> Option<i64> {
        self.seq_of_key(c"statement", c"statement_key_idx", key)
    }
    fn committed(&mut self, xid: u64) -> Option<bool> {
        // SAFETY: in a transaction. The function raises an error for ids of the future only, and
        // returns NULL for those whose state has been forgotten.
        unsafe {
            if xid >= pg_sys::ReadNextFullTransactionId().value {
                // A crash has taken it, with all that it wrote: the server does not even know it.
                return Some(false);
            }
            let status = pgrx::direct_function_call::<String>(
                pg_sys::pg_xact_status,
                &[Some(pg_sys::Datum::from(xid))],
            )?;
            match status.as_str() {
                "committed" => Some(true),
                "aborted" => Some(false),
                _ => None,
            }
        }
    }
}

/// Begins a ledger at the journal's end.
pub fn begin() {
    if !shared::available() {
        pgrx::error!("pg_warden must be loaded by shared_preload_libraries");
    }
    // SAFETY: in a transaction, of CREATE EXTENSION.
    let (extension, schema) = unsafe {
        (
            pg_sys::CurrentExtensionObject,
            pg_sys::get_namespace_oid(c"warden".as_ptr(), false),
        )
    };
    let tail = journal::tail();
    Ledger { extension, schema }.store_position(&Chain::default(), tail, tail);
    shared::shared().resend();
}

fn partition(seq: i64) -> i64 {
    (seq - 1) / PARTITION
}

fn partition_name(number: i64) -> CString {
    CString::new(format!("event_p{number:05}")).unwrap_or_default()
}

fn to_hash(bytes: &[u8]) -> Hash {
    bytes.try_into().unwrap_or(ORIGIN)
}

/// An open table. Its lock stays until the transaction ends.
struct Table(pg_sys::Relation);

impl Table {
    fn open(oid: pg_sys::Oid, lock: u32) -> Self {
        // SAFETY: in a transaction; raises an error if there is no such table.
        Self(unsafe { pg_sys::table_open(oid, lock as pg_sys::LOCKMODE) })
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: opened by `open`, closed once. After an error, the abort closes it.
            unsafe { pg_sys::table_close(self.0, pg_sys::NoLock as pg_sys::LOCKMODE) }
        }
    }
}

/// Calls `f` with the row whose bigint column `attribute` is `value`, through an index on it.
fn find<R>(
    table: &Table,
    index: pg_sys::Oid,
    attribute: i16,
    value: i64,
    f: impl FnOnce(pg_sys::HeapTuple) -> R,
) -> Option<R> {
    // SAFETY: the key describes a column of the table that is in the index; the scan is ended.
    unsafe {
        let mut key = pg_sys::ScanKeyData::default();
        pg_sys::ScanKeyInit(
            &mut key,
            attribute,
            pg_sys::BTEqualStrategyNumber as u16,
            pg_sys::F_INT8EQ.into(),
            pg_sys::Datum::from(value),
        );
        let scan =
            pg_sys::systable_beginscan(table.0, index, true, std::ptr::null_mut(), 1, &mut key);
        let tuple = pg_sys::systable_getnext(scan);
        let r = (!tuple.is_null()).then(|| f(tuple));
        pg_sys::systable_endscan(scan);
        r
    }
}

/// What is known of the keys of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keys {
    Any,
    /// Each is greater than those before it, so that all are unique if the first and the last are.
    Ascending,
}

/// Inserts rows of N columns, in order, into the table and its indexes.
fn insert<const N: usize>(oid: pg_sys::Oid, rows: impl Iterator<Item = [Value; N]>) {
    insert_as(oid, rows, Keys::Any);
}

fn insert_as<const N: usize>(
    oid: pg_sys::Oid,
    mut rows: impl Iterator<Item = [Value; N]>,
    keys: Keys,
) {
    let table = Table::open(oid, pg_sys::RowExclusiveLock);
    let mut slots: Vec<*mut pg_sys::TupleTableSlot> = Vec::new();
    // SAFETY: every slot is made for this table and has N columns; slots and indexes are released
    // here, or by the abort of the transaction.
    unsafe {
        let columns = (*(*table.0).rd_att).natts as usize;
        if columns != N {
            pgrx::error!("pg_warden: a table of the ledger has {columns} columns, not {N}");
        }
        let indexes = pg_sys::CatalogOpenIndexes(table.0);
        // A copy: nobody counts its references, once for each slot.
        let desc = pg_sys::CreateTupleDescCopy((*table.0).rd_att);
        loop {
            let mut n = 0;
            for row in rows.by_ref().take(ROWS) {
                if n == slots.len() {
                    slots.push(pg_sys::MakeSingleTupleTableSlot(
                        desc,
                        &raw const pg_sys::TTSOpsVirtual,
                    ));
                }
                let slot = slots[n];
                pg_sys::ExecClearTuple(slot);
                for (i, value) in row.into_iter().enumerate() {
                    *(*slot).tts_values.add(i) = value.unwrap_or(pg_sys::Datum::null());
                    *(*slot).tts_isnull.add(i) = value.is_none();
                }
                pg_sys::ExecStoreVirtualTuple(slot);
                n += 1;
            }
            if n == 0 {
                break;
            }
            let (table, first) = (table.0, slots.as_mut_ptr());
            pg_sys::ffi::pg_guard_ffi_boundary(|| insert_slots(table, indexes, first, n, keys));
        }
        pg_sys::CatalogCloseIndexes(indexes);
        for slot in slots {
            pg_sys::ExecDropSingleTupleTableSlot(slot);
        }
    }
}

mod raw {
    //! PostgreSQL's own functions: a guard around each of them would cost more than some of them.
    use pgrx::pg_sys::{
        BulkInsertState, CommandId, Datum, EState, IndexInfo, IndexUniqueCheck, ItemPointer,
        Relation, TupleTableSlot,
    };
    use std::ffi::c_int;

    unsafe extern "C-unwind" {
        pub fn GetCurrentCommandId(used: bool) -> CommandId;
        pub fn heap_multi_insert(
            relation: Relation,
            slots: *mut *mut TupleTableSlot,
            ntuples: c_int,
            cid: CommandId,
            options: c_int,
            bistate: BulkInsertState,
        );
        pub fn FormIndexDatum(
            info: *mut IndexInfo,
            slot: *mut TupleTableSlot,
            estate: *mut EState,
            values: *mut Datum,
            isnull: *mut bool,
        );
        pub fn index_insert(
            index: Relation,
            values: *mut Datum,
            isnull: *mut bool,
            place: ItemPointer,
            heap: Relation,
            check: IndexUniqueCheck::Type,
            unchanged: bool,
            info: *mut IndexInfo,
        ) -> bool;
    }
}

/// Inserts the rows in slots. Owns nothing with a destructor: an error leaves by longjmp.
///
/// # Safety
/// In a transaction, guarded; the indexes are those of the table, none on expressions and none
/// partial; there are `n` filled slots.
unsafe fn insert_slots(
    table: pg_sys::Relation,
    indexes: pg_sys::CatalogIndexState,
    slots: *mut *mut pg_sys::TupleTableSlot,
    n: usize,
    keys: Keys,
) {
    use pg_sys::IndexUniqueCheck::{UNIQUE_CHECK_NO, UNIQUE_CHECK_YES};
    // SAFETY: see above. heap_multi_insert leaves each row's place in its slot.
    unsafe {
        let cid = raw::GetCurrentCommandId(true);
        raw::heap_multi_insert(table, slots, n as c_int, cid, 0, std::ptr::null_mut());
        let mut values = [pg_sys::Datum::null(); pg_sys::INDEX_MAX_KEYS as usize];
        let mut nulls = [false; pg_sys::INDEX_MAX_KEYS as usize];
        for i in 0..(*indexes).ri_NumIndices as usize {
            let index = *(*indexes).ri_IndexRelationDescs.add(i);
            let info = *(*indexes).ri_IndexRelationInfo.add(i);
            let check = |number: usize| {
                let end = number == 0 || number == n - 1;
                if (*info).ii_Unique && (end || keys == Keys::Any) {
                    UNIQUE_CHECK_YES
                } else {
                    UNIQUE_CHECK_NO
                }
            };
            let (v, null) = (values.as_mut_ptr(), nulls.as_mut_ptr());
            let form = |number: usize| {
                let slot = *slots.add(number);
                raw::FormIndexDatum(info, slot, std::ptr::null_mut(), v, null);
                (&raw mut (*slot).tts_tid, (*v).value() as i64)
            };
            let enter = |number: usize| {
                let (place, _) = form(number);
                raw::index_insert(index, v, null, place, table, check(number), false, info);
            };
            if (*(*index).rd_rel).relam != pg_sys::BRIN_AM_OID {
                (0..n).for_each(enter);
                continue;
            }
            // A summary of blocks, by a bigint or a time: of each block, the ends say all.
            let mut number = 0;
            while number < n {
                let (first, at) = form(number);
                let (mut low, mut high) = ((number, at), (number, at));
                number += 1;
                while number < n {
                    let (place, at) = form(number);
                    if ((*place).ip_blkid.bi_hi, (*place).ip_blkid.bi_lo)
                        != ((*first).ip_blkid.bi_hi, (*first).ip_blkid.bi_lo)
                    {
                        break;
                    }
                    if at < low.1 {
                        low = (number, at);
                    }
                    if at > high.1 {
                        high = (number, at);
                    }
                    number += 1;
                }
                enter(low.0);
                if high.0 != low.0 {
                    enter(high.0);
                }
            }
        }
    }
}

fn split<const N: usize>(values: &[Value; N]) -> ([pg_sys::Datum; N], [bool; N]) {
    (
        values.map(|v| v.unwrap_or(pg_sys::Datum::null())),
        values.map(|v| v.is_none()),
    )
}

fn bytea(bytes: &[u8]) -> Value {
    bytes.into_datum()
}

fn text(s: &str) -> Value {
    server_text(s).as_ref().into_datum()
}

fn event_values(e: &Event, hash: &Hash) -> [Value; 11] {
    [
        e.seq.into_datum(),
        e.at.into_datum(),
        e.session.into_datum(),
        e.statement.into_datum(),
        e.rows.into_datum(),
        e.duration_us.into_datum(),
        e.flags.into_datum(),
        e.kind.into_datum(),
        e.outcome.into_datum(),
        bytea(&e.payload),
        bytea(hash),
    ]
}

fn session_values(r: &SessionRow) -> [Value; 18] {
    let f = &r.facts;
    let groups: Vec<String> = f
        .actor
        .groups
        .iter()
        .map(|g| server_text(g).into_owned())
        .collect();
    [
        r.id.into_datum(),
        (r.key as i64).into_datum(),
        (f.session as i64).into_datum(),
        (f.pid as i32).into_datum(),
        f.backend_start.into_datum(),
        text(&f.database),
        text(&f.session_user),
        text(&f.current_user),
        address(&f.client_addr).and_then(IntoDatum::into_datum),
        (f.client_port as i32).into_datum(),
        text(&f.application_name),
        text(&f.actor.subject),
        text(f.actor.kind.name()),
        text(&f.actor.on_behalf_of),
        groups.into_datum(),
        text(f.actor.trust.name()),
        text(&f.actor.issuer),
        text(&f.actor.token_id),
    ]
}

fn transaction_values(r: &TransactionRow) -> [Value; 5] {
    let f = &r.facts;
    [
        r.id.into_datum(),
        (f.xid as i64).into_datum(),
        f.committed.into_datum(),
        i64::from(f.unknown_from).into_datum(),
        multirange(&f.rolled_back),
    ]
}

/// An `int8multirange` of ranges, ends included.
fn multirange(ranges: &[(u32, u32)]) -> Value {
    let ranges: Vec<String> = ranges.iter().map(|(a, b)| format!("[{a},{b}]")).collect();
    let text = CString::new(format!("{{{}}}", ranges.join(","))).unwrap_or_default();
    // SAFETY: the type's own input function, in a transaction.
    Some(unsafe {
        pg_sys::OidInputFunctionCall(
            pg_sys::F_MULTIRANGE_IN.into(),
            text.as_ptr().cast_mut(),
            pg_sys::INT8MULTIRANGEOID,
            -1,
        )
    })
}

fn statement_values(r: &StatementRow) -> [Value; 10] {
    let f = &r.facts;
    let functions: Vec<String> = f
        .functions
        .iter()
        .map(|f| server_text(f).into_owned())
        .collect();
    [
        r.id.into_datum(),
        (r.key as i64).into_datum(),
        text(&f.command),
        text(&f.text),
        text(&f.fingerprint),
        json(&f.accesses),
        json(&f.masked),
        (f.full_length > 0)
            .then_some(f.full_length as i64)
            .and_then(IntoDatum::into_datum),
        (!f.digest.is_empty())
            .then_some(f.digest.as_slice())
            .and_then(bytea),
        functions.into_datum(),
    ]
}

fn connection_values(r: &ConnectionRow) -> [Value; 19] {
    let boot = ConnectionFacts::default();
    let f = r.facts.as_ref().unwrap_or(&boot);
    [
        r.id.into_datum(),
        r.at.into_datum(),
        text(r.facts.as_ref().map_or("started", |f| f.event.name())),
        (f.backend as i64).into_datum(),
        (f.pid as i32).into_datum(),
        text(f.kind.name()),
        text(&f.database),
        text(&f.role),
        address(&f.client_addr).and_then(IntoDatum::into_datum),
        (f.client_port as i32).into_datum(),
        text(&f.application_name),
        f.tls.into_datum(),
        text(&f.method),
        text(&f.identity),
        text(&f.sqlstate),
        text(&f.reason),
        (f.count as i64).into_datum(),
        r.duration_us.into_datum(),
        text(f.ended.map_or("", Ending::name)),
    ]
}

fn json(value: &impl serde::Serialize) -> Value {
    let value = serde_json::to_value(value).unwrap_or_default();
    JsonB(server_json(value)).into_datum()
}

/// An address that `inet` accepts; what is none becomes NULL. A zone (`%eth0`) is cut off.
fn address(s: &str) -> Option<Inet> {
    let plain = s.split('%').next().unwrap_or_default();
    plain.parse::<IpAddr>().ok().map(|a| Inet(a.to_string()))
}

/// What a `text` of this database can hold: no NUL and, where the encoding is not UTF-8, no
/// character outside ASCII; such characters are written as `\u{…}`. The payload keeps the original.
pub fn server_text(s: &str) -> Cow<'_, str> {
    // SAFETY: reads a global that is set when the process connects.
    let utf8 = unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as c_int;
    let fits = |c: char| c != '\0' && (utf8 || c.is_ascii());
    if s.chars().all(fits) {
        return Cow::Borrowed(s);
    }
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        if fits(c) {
            out.push(c);
        } else {
            out.extend(c.escape_unicode());
        }
    }
    Cow::Owned(out)
}

/// [`server_text`] for every string of a JSON value.
pub fn server_json(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value as V;
    match value {
        V::String(s) => V::String(server_text(&s).into_owned()),
        V::Array(a) => V::Array(a.into_iter().map(server_json).collect()),
        V::Object(o) => V::Object(o.into_iter().map(|(k, v)| (k, server_json(v))).collect()),
        other => other,
    }
}

/// What verification found.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Events that are what was recorded, and whose projections are.
    pub checked: i64,
    /// The first bad event, and what is wrong with it.
    pub problem: Option<(i64, String)>,
}

const EVENTS: &CStr = c"SELECT seq, at, session, statement, rows, duration_us, flags, kind, \
    outcome, payload, hash FROM warden.event WHERE seq BETWEEN $1 AND $2 ORDER BY seq";
const SESSIONS: &CStr = c"SELECT * FROM warden.session WHERE id BETWEEN $1 AND $2 ORDER BY id";
const TRANSACTIONS: &CStr =
    c"SELECT * FROM warden.transaction WHERE id BETWEEN $1 AND $2 ORDER BY id";
const STATEMENTS: &CStr = c"SELECT * FROM warden.statement WHERE id BETWEEN $1 AND $2 ORDER BY id";
const CONNECTIONS: &CStr =
    c"SELECT * FROM warden.connection_event WHERE id BETWEEN $1 AND $2 ORDER BY id";

/// Walks the ledger from event `from` to event `to`, or to its end.
pub fn verify(from: i64, to: Option<i64>) -> Verdict {
    let from = from.max(1);
    Spi::connect(|_| {
        let mut verdict = Verdict::default();
        verdict.problem = walk(from, to, &mut verdict.checked).err();
        verdict
    })
}

type Check = Result<(), (i64, String)>;

fn walk(from: i64, to: Option<i64>, checked: &mut i64) -> Check {
    let mut chain = Chain {
        seq: from - 1,
        hash: before(from)?,
    };
    let last = to.unwrap_or(i64::MAX);
    let mut events = Stream::open(EVENTS, from, last);
    let mut sessions = Projection::open("session", SESSIONS, from, last);
    let mut statements = Projection::open("statement", STATEMENTS, from, last);
    let mut transactions = Projection::open("transaction", TRANSACTIONS, from, last);
    let mut connections = Projection::open("connection_event", CONNECTIONS, from, last);
    let mut scratch = PgMemoryContexts::new("pg_warden verify");
    loop {
        // SAFETY: nothing that was allocated here for an earlier event is used any more.
        let more = unsafe {
            scratch.reset();
            scratch.switch_to(|_| {
                let Some(row) = events.next::<11>() else {
                    return Ok(false);
                };
                let (e, hash) = event_of(&row).ok_or_else(|| {
                    (
                        chain.seq + 1,
                        format!("event {} is malformed", chain.seq + 1),
                    )
                })?;
                chain.check(&e, &hash).map_err(|error| match error {
                    ChainError::Sequence { expected } => {
                        (expected, format!("event {expected} is missing"))
                    }
                    ChainError::Hash => {
                        (e.seq, format!("event {} is not what was recorded", e.seq))
                    }
                })?;
                sessions.check_before(e.seq)?;
                statements.check_before(e.seq)?;
                transactions.check_before(e.seq)?;
                connections.check_before(e.seq)?;
                let unreadable = || (e.seq, format!("payload of event {} is malformed", e.seq));
                match EventKind::from_i16(e.kind) {
                    Some(EventKind::Session) => {
                        let row = SessionRow::project(e.seq, &e.payload).ok_or_else(unreadable)?;
                        sessions.check(e.seq, session_values(&row))?;
                    }
                    Some(EventKind::Statement) => {
                        let row =
                            StatementRow::project(e.seq, &e.payload).ok_or_else(unreadable)?;
                        statements.check(e.seq, statement_values(&row))?;
                    }
                    Some(EventKind::Transaction) => {
                        let row =
                            TransactionRow::project(e.seq, &e.payload).ok_or_else(unreadable)?;
                        transactions.check(e.seq, transaction_values(&row))?;
                    }
                    Some(EventKind::Connection | EventKind::Boot) => {
                        let row = ConnectionRow::project(&e).ok_or_else(unreadable)?;
                        connections.check(e.seq, connection_values(&row))?;
                    }
                    _ => {}
                }
                Ok(true)
            })
        }?;
        if !more {
            break;
        }
        *checked += 1;
    }
    sessions.check_before(i64::MAX)?;
    statements.check_before(i64::MAX)?;
    transactions.check_before(i64::MAX)?;
    connections.check_before(i64::MAX)?;
    match to {
        Some(to) if to > chain.seq => {
            Err((chain.seq + 1, format!("event {} is missing", chain.seq + 1)))
        }
        Some(_) => Ok(()),
        None => check_head(&chain),
    }
}

/// The events that follow `after`: about as many as one batch takes, at least one if there is any.
/// Connected to SPI.
pub fn events_after(after: i64, limits: Limits) -> Vec<Record> {
    let mut rows = Stream::open(EVENTS, after.saturating_add(1), i64::MAX);
    let (mut found, mut bytes) = (Vec::new(), 0);
    while found.len() < limits.events && bytes < limits.bytes {
        // No column can be NULL.
        let Some((event, hash)) = rows.next::<11>().and_then(|row| event_of(&row)) else {
            break;
        };
        bytes += event.payload.len();
        found.push(Record { event, hash });
    }
    rows.close();
    found
}

/// The hash of the event before `from`.
fn before(from: i64) -> Result<Hash, (i64, String)> {
    if from == 1 {
        return Ok(ORIGIN);
    }
    let mut previous = Stream::open(EVENTS, from - 1, from - 1);
    previous
        .next::<11>()
        .and_then(|row| event_of(&row))
        .and_then(|(_, hash)| hash.try_into().ok())
        .ok_or_else(|| (from - 1, format!("event {} is missing", from - 1)))
}

/// The recorder's own row must agree with the last event.
fn check_head(chain: &Chain) -> Check {
    const HEAD: &CStr = c"SELECT seq, hash FROM warden.journal_position WHERE $1 <= $2";
    let mut head = Stream::open(HEAD, 0, 1);
    let Some(row) = head.next::<2>() else {
        return if chain.seq == 0 {
            Ok(())
        } else {
            Err((
                chain.seq,
                "the row in warden.journal_position is missing".to_owned(),
            ))
        };
    };
    // SAFETY: the columns are a bigint and a bytea.
    let (seq, hash) = unsafe {
        (
            row[0].map_or(0, |d| d.value() as i64),
            row[1].map(|d| bytes_of(d)).unwrap_or_default(),
        )
    };
    if seq > chain.seq {
        let missing = chain.seq + 1;
        return Err((
            missing,
            format!("event {missing} is missing: {seq} events were recorded"),
        ));
    }
    if seq < chain.seq {
        let extra = seq + 1;
        return Err((
            extra,
            format!("event {extra} was not written by the recorder"),
        ));
    }
    if hash != chain.hash {
        return Err((seq, "warden.journal_position holds another hash".to_owned()));
    }
    if head.next::<2>().is_some() {
        return Err((
            seq,
            "warden.journal_position has more than one row".to_owned(),
        ));
    }
    Ok(())
}

fn event_of(row: &[Value; 11]) -> Option<(Event, Vec<u8>)> {
    let int = |i: usize| row[i].map(|d| d.value() as i64);
    let event = Event {
        seq: int(0)?,
        at: int(1)?,
        session: int(2)?,
        statement: int(3)?,
        rows: int(4)?,
        duration_us: int(5)?,
        flags: int(6)? as i32,
        kind: int(7)? as i16,
        outcome: int(8)? as i16,
        // SAFETY: the columns are bytea.
        payload: unsafe { bytes_of(row[9]?) },
    };
    // SAFETY: as above.
    Some((event, unsafe { bytes_of(row[10]?) }))
}

/// # Safety
/// The datum is a bytea.
unsafe fn bytes_of(datum: pg_sys::Datum) -> Vec<u8> {
    // SAFETY: as promised by the caller.
    unsafe { <Vec<u8> as pgrx::FromDatum>::from_datum(datum, false).unwrap_or_default() }
}

/// A projection's rows, in the order of their events.
struct Projection {
    name: &'static str,
    rows: Stream,
}

impl Projection {
    fn open(name: &'static str, query: &CStr, from: i64, to: i64) -> Self {
        Self {
            name,
            rows: Stream::open(query, from, to),
        }
    }

    /// The next row must be the one of event `seq`.
    fn check<const N: usize>(&mut self, seq: i64, expected: [Value; N]) -> Check {
        let name = self.name;
        if self.rows.peek() != Some(seq) {
            return Err((seq, format!("row {seq} of warden.{name} is missing")));
        }
        match self.rows.next::<N>() {
            Some(row) if self.rows.same(&row, &expected) => Ok(()),
            _ => Err((
                seq,
                format!("row {seq} of warden.{name} differs from its event"),
            )),
        }
    }

    /// There must be no row left for an event before `seq`.
    fn check_before(&mut self, seq: i64) -> Check {
        match self.rows.peek() {
            Some(id) if id < seq => Err((
                id,
                format!("row {id} of warden.{} has no such event", self.name),
            )),
            _ => Ok(()),
        }
    }
}

/// The rows of a query, some hundred at a time, under the snapshot of the calling statement.
struct Stream {
    portal: pg_sys::Portal,
    fetched: *mut pg_sys::SPITupleTable,
    next: u64,
    count: u64,
    ended: bool,
}

impl Stream {
    fn open(query: &CStr, from: i64, to: i64) -> Self {
        let mut types = [pg_sys::INT8OID; 2];
        let mut values = [pg_sys::Datum::from(from), pg_sys::Datum::from(to)];
        // SAFETY: connected to SPI; two arguments, neither NULL; read-only.
        let portal = unsafe {
            pg_sys::SPI_cursor_open_with_args(
                std::ptr::null(),
                query.as_ptr(),
                2,
                types.as_mut_ptr(),
                values.as_mut_ptr(),
                std::ptr::null(),
                true,
                0,
            )
        };
        Self {
            portal,
            fetched: std::ptr::null_mut(),
            next: 0,
            count: 0,
            ended: false,
        }
    }

    /// Frees what the end of the transaction would free.
    fn close(self) {
        // SAFETY: opened by `open`; nothing that was fetched is used any more.
        unsafe {
            if !self.fetched.is_null() {
                pg_sys::SPI_freetuptable(self.fetched);
            }
            pg_sys::SPI_cursor_close(self.portal);
        }
    }

    /// Whether there is a row; fetches more if need be.
    fn fill(&mut self) -> bool {
        // SAFETY: the portal is open; what was fetched before is not used any more.
        unsafe {
            if self.next == self.count && !self.ended {
                if !self.fetched.is_null() {
                    pg_sys::SPI_freetuptable(self.fetched);
                }
                pg_sys::SPI_cursor_fetch(self.portal, true, ROWS as _);
                self.fetched = pg_sys::SPI_tuptable;
                self.next = 0;
                self.count = pg_sys::SPI_processed;
                self.ended = self.count == 0;
            }
        }
        !self.ended
    }

    /// The first column, a bigint, of the row that comes next.
    fn peek(&mut self) -> Option<i64> {
        if !self.fill() {
            return None;
        }
        let mut null = false;
        // SAFETY: `fill` has fetched the row.
        unsafe {
            let tuple = *(*self.fetched).vals.add(self.next as usize);
            let id = pg_sys::SPI_getbinval(tuple, (*self.fetched).tupdesc, 1, &mut null);
            (!null).then(|| id.value() as i64)
        }
    }

    /// The next row. What it points to lives until the row after it is asked for.
    fn next<const N: usize>(&mut self) -> Option<[Value; N]> {
        if !self.fill() {
            return None;
        }
        // SAFETY: `fill` has fetched the row; it is deformed into arrays of its width.
        unsafe {
            let desc = (*self.fetched).tupdesc;
            if (*desc).natts as usize != N {
                pgrx::error!("pg_warden: a table of the ledger does not have {N} columns");
            }
            let mut values = [pg_sys::Datum::null(); N];
            let mut nulls = [false; N];
            let tuple = *(*self.fetched).vals.add(self.next as usize);
            pg_sys::heap_deform_tuple(tuple, desc, values.as_mut_ptr(), nulls.as_mut_ptr());
            self.next += 1;
            let mut row = [None; N];
            for i in 0..N {
                row[i] = (!nulls[i]).then_some(values[i]);
            }
            Some(row)
        }
    }

    /// Whether two rows are the same, byte by byte.
    fn same<const N: usize>(&self, a: &[Value; N], b: &[Value; N]) -> bool {
        a.iter().zip(b).enumerate().all(|(i, pair)| match pair {
            (None, None) => true,
            // SAFETY: both are values of the column's type.
            (Some(a), Some(b)) => unsafe {
                let desc = (*self.fetched).tupdesc;
                let (by_value, length) = type_of_column(desc, i);
                pg_sys::ffi::pg_guard_ffi_boundary(|| datum_image_eq(*a, *b, by_value, length))
            },
            _ => false,
        })
    }
}

/// # Safety
/// The descriptor has a column `i`.
unsafe fn type_of_column(desc: pg_sys::TupleDesc, i: usize) -> (bool, c_int) {
    let (mut length, mut by_value) = (0i16, false);
    // SAFETY: column numbers start at 1.
    unsafe {
        let oid = pg_sys::SPI_gettypeid(desc, i as c_int + 1);
        pg_sys::get_typlenbyval(oid, &mut length, &mut by_value);
    }
    (by_value, c_int::from(length))
}
