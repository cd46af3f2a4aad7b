//! The record is complete: what a client does, message by message, and all that is in the ledger of it.
//!
//! The tables below are the specification. A row is what happens, what the client does, and the whole
//! record of its session, in the order in which statements began; what a statement ran is indented
//! under it. A step begins with how it is sent:
//!
//! | step | |
//! | --- | --- |
//! | `> SQL` | simple query |
//! | `= SQL` | parse, bind, execute and sync; parameters follow after ` \| ` |
//! | `+ SQL` | the same without sync: a pipeline |
//! | `.` | sync |
//! | `[n SQL` | parse, bind, and execute for n rows |
//! | `]n` | execute on, for n rows more |
//! | `< TEXT` | data of a COPY; `<.` ends it, `<!` lets it fail |
//! | `! SQL` | simple query that sleeps in `pg_sleep`; the answer is not waited for |
//! | `!cancel`, `!terminate`, `!leave`, `!kill` | what then ends it: a cancel request, an administrator, the client going away, `kill -9` |
//!
//! A line of the record is the command; its relations by kind of access (`r`ead, `i`nsert, `u`pdate,
//! `d`elete, `t`runcate, `c`hange of the definition, `m`aintain); rows; how it ended, if it did not succeed; and
//! what became of what it wrote.

use serde_json::Value;
use std::collections::HashMap;
use std::fmt::Write;
use warden_tests::{Client, Cluster, Config, Mode, Raw, Result};

type Row = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

/// What there is before each row.
const SETUP: &str = "
    CREATE TABLE item (id int PRIMARY KEY, name text, price int);
    CREATE TABLE tag (item int REFERENCES item ON DELETE CASCADE, word text);
    CREATE TABLE later (item int REFERENCES item DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE log (what text);
    CREATE TABLE part (id int, k int) PARTITION BY RANGE (k);
    CREATE TABLE part_a PARTITION OF part FOR VALUES FROM (0) TO (10);
    CREATE TABLE part_b PARTITION OF part FOR VALUES FROM (10) TO (20);
    CREATE TABLE wide AS SELECT g AS n FROM generate_series(1, 100000) g;
    CREATE VIEW cheap AS SELECT id, name FROM item WHERE price < 50;
    CREATE MATERIALIZED VIEW summary AS SELECT count(*) FROM item;
    CREATE FUNCTION inlined(n int) RETURNS SETOF item LANGUAGE sql STABLE AS
        'SELECT * FROM item WHERE id < n';
    CREATE FUNCTION counted() RETURNS bigint LANGUAGE sql VOLATILE AS 'SELECT count(*) FROM item';
    CREATE FUNCTION atomic(n int) RETURNS bigint LANGUAGE sql
        BEGIN ATOMIC SELECT count(*) FROM item WHERE id < n; END;
    CREATE FUNCTION several() RETURNS bigint LANGUAGE sql VOLATILE AS
        'INSERT INTO log VALUES (''s''); SELECT count(*) FROM log';
    CREATE FUNCTION looped() RETURNS int LANGUAGE plpgsql AS $$
        DECLARE r record; n int := 0;
        BEGIN FOR r IN SELECT id FROM item LIMIT 3 LOOP n := n + r.id; END LOOP; RETURN n; END $$;
    CREATE FUNCTION dynamic(q text) RETURNS int LANGUAGE plpgsql AS $$
        DECLARE n int; BEGIN EXECUTE q INTO n; RETURN n; END $$;
    CREATE FUNCTION caught() RETURNS int LANGUAGE plpgsql AS $$
        BEGIN
            BEGIN INSERT INTO item VALUES (1); EXCEPTION WHEN unique_violation THEN RETURN 1; END;
            RETURN 0;
        END $$;
    CREATE FUNCTION fails() RETURNS int LANGUAGE sql AS 'SELECT 1 / (id - id) FROM item';
    CREATE FUNCTION logs() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO public.log VALUES (TG_OP); RETURN NEW; END $$;
    CREATE TABLE watched (id int);
    CREATE TRIGGER logs AFTER INSERT ON watched FOR EACH ROW EXECUTE FUNCTION logs();
    CREATE TABLE watched_late (id int);
    CREATE CONSTRAINT TRIGGER logs AFTER INSERT ON watched_late DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION logs();
    CREATE PROCEDURE moves() LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO log VALUES ('kept'); COMMIT;
            INSERT INTO log VALUES ('undone'); ROLLBACK;
        END $$;
    CREATE PROCEDURE sql_moves() LANGUAGE sql AS 'INSERT INTO log VALUES (''p'')'";

const RESET: &str = "
    SET session_replication_role = replica;
    DELETE FROM item; DELETE FROM tag; DELETE FROM later; DELETE FROM log; DELETE FROM part;
    INSERT INTO item SELECT g, 'item ' || g, g * 10 FROM generate_series(1, 20) g;
    INSERT INTO part VALUES (1, 5), (2, 15)";

#[rustfmt::skip]
const PROTOCOL: &[Row] = &[
    ("a simple query", &["> SELECT name FROM item WHERE id < 4"], &["SELECT r:item 3 rows"]),
    ("nothing", &["> ", "> ;", "> -- a comment", "= "], &[]),
    ("an extended query", &["= SELECT name FROM item WHERE id = $1 | 7"], &["SELECT r:item 1 rows"]),
    ("many in one message", &["> SELECT 1; INSERT INTO log VALUES ('x'); SELECT what FROM log"],
        &["SELECT 1 rows", "INSERT i:log 1 rows committed", "SELECT r:log 1 rows committed"]),
    ("one of many fails", &["> INSERT INTO log VALUES ('x'); SELECT 1 / (id - id) FROM item; SELECT 3"],
        &["INSERT i:log 1 rows rolled back", "SELECT r:item 0 rows failed 22012 rolled back"]),
    ("one of many cannot be analysed", &["> INSERT INTO log VALUES ('x'); SELECT nothing FROM item"],
        &["INSERT i:log 1 rows rolled back", "UNKNOWN failed 42703"]),
    ("a pipeline", &["+ INSERT INTO log VALUES ('x')", "+ SELECT id FROM item", "."],
        &["INSERT i:log 1 rows committed", "SELECT r:item 20 rows committed"]),
    ("a pipeline that fails", &["+ INSERT INTO log VALUES ('x')", "+ SELECT 1 / (id - id) FROM item", "+ SELECT 3", "."],
        &["INSERT i:log 1 rows rolled back", "SELECT r:item 0 rows failed 22012 rolled back"]),
    ("PREPARE and EXECUTE", &["> PREPARE s AS SELECT id FROM item WHERE id < $1", "> EXECUTE s (3)", "> EXECUTE s (4)", "> DEALLOCATE s"],
        &["PREPARE", "EXECUTE 2 rows", "  SELECT r:item 2 rows", "EXECUTE 3 rows", "  SELECT r:item 3 rows", "DEALLOCATE"]),
    ("a cursor", &["> BEGIN", "> DECLARE c CURSOR FOR SELECT id FROM item", "> FETCH 3 FROM c", "> MOVE 2 FROM c", "> CLOSE c", "> COMMIT"],
        &["BEGIN", "DECLARE CURSOR", "  SELECT r:item 5 rows", "FETCH 3 rows", "MOVE 2 rows", "CLOSE CURSOR", "COMMIT"]),
    ("a cursor that COMMIT closes", &["> BEGIN", "> DECLARE c CURSOR FOR SELECT id FROM item", "> FETCH 3 FROM c", "> COMMIT"],
        &["BEGIN", "DECLARE CURSOR", "  SELECT r:item 3 rows", "FETCH 3 rows", "COMMIT"]),
    ("a cursor that ROLLBACK ends", &["> BEGIN", "> DECLARE c CURSOR FOR SELECT id FROM item", "> FETCH 3 FROM c", "> ROLLBACK"],
        &["BEGIN", "DECLARE CURSOR", "  SELECT r:item 3 rows interrupted", "FETCH 3 rows", "ROLLBACK"]),
    ("a cursor that is scrolled", &["> BEGIN", "> DECLARE c SCROLL CURSOR FOR SELECT id FROM item", "> FETCH 3 FROM c", "> FETCH BACKWARD 2 FROM c", "> CLOSE c", "> COMMIT"],
        &["BEGIN", "DECLARE CURSOR", "  SELECT r:item 5 rows", "FETCH 3 rows", "FETCH 2 rows", "CLOSE CURSOR", "COMMIT"]),
    ("a cursor WITH HOLD", &["> DECLARE h CURSOR WITH HOLD FOR SELECT id FROM item", "> FETCH 3 FROM h", "> CLOSE h"],
        &["DECLARE CURSOR", "  SELECT r:item 20 rows", "FETCH 3 rows", "CLOSE CURSOR"]),
    ("a portal in slices", &["[2 SELECT id FROM item", "]3", "."], &["SELECT r:item 5 rows"]),
    ("a portal in slices to its end", &["[15 SELECT id FROM item", "]15", "."], &["SELECT r:item 20 rows"]),
    ("parallel workers", &["> SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0", "> SELECT count(*) FROM wide"],
        &["SET", "SET", "SET", "SELECT r:wide 1 rows"]),
    ("a portal that is not there", &["]5", ".", "> SELECT 1"], &["UNKNOWN failed 34000", "SELECT 1 rows"]),
];

#[rustfmt::skip]
const COPY: &[Row] = &[
    ("COPY FROM STDIN", &["> COPY item (id, name) FROM STDIN", "< 100\tx\n101\ty\n", "<."], &["COPY i:item 2 rows committed"]),
    ("COPY FROM STDIN with a trigger", &["> COPY watched FROM STDIN", "< 1\n", "<."],
        &["COPY i:watched 1 rows committed", "  INSERT i:log 1 rows committed"]),
    ("COPY with bad data", &["> COPY item FROM STDIN", "< x\n", "<."], &["COPY i:item failed 22P02"]),
    ("COPY that the client gives up", &["> COPY item FROM STDIN", "<!"], &["COPY i:item failed 57014"]),
    ("COPY in the extended protocol", &["+ COPY log FROM STDIN", "copy", "< x\n", "<.", "."], &["COPY i:log 1 rows committed"]),
    ("COPY TO STDOUT", &["> COPY item (name) TO STDOUT"], &["COPY r:item 20 rows"]),
    ("COPY of a query", &["> COPY (SELECT id FROM item WHERE id < 4) TO STDOUT"], &["COPY 3 rows", "  SELECT r:item 3 rows"]),
    ("COPY of a write", &["> COPY (INSERT INTO log VALUES ('x') RETURNING what) TO STDOUT"],
        &["COPY 1 rows committed", "  INSERT i:log,r:log 1 rows committed"]),
    ("COPY that fails", &["> COPY (SELECT 1 / (id - id) FROM item) TO STDOUT"], &["COPY failed 22012", "  SELECT r:item 0 rows failed 22012"]),
    ("COPY to a file is not for all", &["> COPY item TO '/nowhere'"], &["COPY r:item failed 42501"]),
];

#[rustfmt::skip]
const FILES: &[Row] = &[
    ("COPY to a file and back", &["> COPY item TO '/tmp/{file}'", "> COPY item FROM '/tmp/{file}' WHERE id < 0"],
        &["COPY r:item 20 rows", "COPY i:item 0 rows"]),
    ("COPY from a file with bad data", &["> COPY (SELECT 'x') TO '/tmp/{file}'", "> COPY item FROM '/tmp/{file}'"],
        &["COPY 1 rows", "  SELECT 1 rows", "COPY i:item failed 22P02"]),
    ("COPY from a file that is not there", &["> COPY item FROM '/nowhere/at/all'"], &["COPY i:item failed 58P01"]),
    ("COPY to a program", &["> COPY item TO PROGRAM 'cat > /dev/null'"], &["COPY r:item 20 rows"]),
];

#[rustfmt::skip]
const NESTED: &[Row] = &[
    ("DO", &["> DO $$ BEGIN INSERT INTO log VALUES ('x'); END $$"], &["DO committed", "  INSERT i:log 1 rows committed"]),
    ("a function that is inlined", &["> SELECT id FROM inlined(4)"], &["SELECT r:item 3 rows"]),
    ("an SQL function", &["> SELECT counted()"], &["SELECT 1 rows", "  SELECT r:item 1 rows"]),
    ("an SQL function of two statements", &["> SELECT several()"],
        &["SELECT 1 rows committed", "  INSERT i:log 1 rows committed", "  SELECT r:log 1 rows committed"]),
    ("an SQL function BEGIN ATOMIC", &["> SELECT atomic(4)"], &["SELECT 1 rows", "  SELECT r:item 1 rows"]),
    ("a loop in plpgsql", &["> SELECT looped()"], &["SELECT 1 rows", "  SELECT r:item 3 rows"]),
    ("dynamic SQL", &["> SELECT dynamic('SELECT id FROM item WHERE id = 2')"], &["SELECT 1 rows", "  SELECT r:item 1 rows"]),
    ("three deep", &["> SELECT dynamic('SELECT looped()')"], &["SELECT 1 rows", "  SELECT 1 rows", "    SELECT r:item 3 rows"]),
    ("dynamic SQL that cannot be parsed", &["> SELECT dynamic('SELEC 1')"], &["SELECT 0 rows failed 42601"]),
    ("an error that is caught", &["> SELECT caught()"], &["SELECT 1 rows committed", "  INSERT i:item 0 rows failed 23505 rolled back"]),
    ("an error that is not caught", &["> SELECT fails()"], &["SELECT 0 rows failed 22012", "  SELECT r:item 0 rows failed 22012"]),
    ("a trigger", &["> INSERT INTO watched VALUES (1)"], &["INSERT i:watched 1 rows committed", "  INSERT i:log 1 rows committed"]),
    ("a deferred trigger", &["> BEGIN", "> INSERT INTO watched_late VALUES (1)", "> COMMIT"],
        &["BEGIN", "INSERT i:watched_late 1 rows committed", "COMMIT committed", "  INSERT i:log 1 rows committed"]),
    ("a deferred trigger of one statement", &["> INSERT INTO watched_late VALUES (1)", "= INSERT INTO watched_late VALUES (1)"],
        &["INSERT i:watched_late 1 rows committed", "  INSERT i:log 1 rows committed", "INSERT i:watched_late 1 rows committed", "  INSERT i:log 1 rows committed"]),
    ("a foreign key's check", &["> INSERT INTO tag VALUES (1, 'x')"], &["INSERT i:tag 1 rows committed"]),
    ("a foreign key's cascade", &["> INSERT INTO tag VALUES (1, 'x')", "> DELETE FROM item WHERE id = 1"],
        &["INSERT i:tag 1 rows committed", "DELETE d:item,r:item 1 rows committed", "  DELETE d:tag,r:tag 1 rows committed"]),
    ("CALL", &["> CALL sql_moves()"], &["CALL committed", "  INSERT i:log 1 rows committed"]),
    ("CALL with transactions", &["> CALL moves()"], &["CALL", "  INSERT i:log 1 rows committed", "  INSERT i:log 1 rows rolled back"]),
    ("EXPLAIN", &["> EXPLAIN SELECT id FROM item"], &["EXPLAIN"]),
    ("EXPLAIN ANALYZE", &["> EXPLAIN ANALYZE SELECT id FROM item"], &["EXPLAIN", "  SELECT r:item 20 rows"]),
    ("EXPLAIN ANALYZE of a write", &["> EXPLAIN ANALYZE INSERT INTO log VALUES ('x')"], &["EXPLAIN committed", "  INSERT i:log 1 rows committed"]),
    ("EXPLAIN ANALYZE EXECUTE", &["> PREPARE s AS SELECT id FROM item", "> EXPLAIN ANALYZE EXECUTE s"], &["PREPARE", "EXPLAIN", "  SELECT r:item 20 rows"]),
    ("EXPLAIN ANALYZE CREATE TABLE AS", &["> EXPLAIN ANALYZE CREATE TABLE made0 AS SELECT id FROM item"],
        &["EXPLAIN committed", "  SELECT r:item 20 rows committed"]),
    ("CREATE TABLE AS", &["> CREATE TABLE made1 AS SELECT id FROM item"],
        &["CREATE TABLE AS c:made1 20 rows committed", "  SELECT r:item 20 rows committed"]),
    ("CREATE TABLE AS EXECUTE", &["> PREPARE s AS SELECT id FROM item", "> CREATE TABLE made2 AS EXECUTE s"],
        &["PREPARE", "CREATE TABLE AS c:made2 20 rows committed", "  SELECT r:item 20 rows committed"]),
    ("SELECT INTO", &["> SELECT id INTO made3 FROM item"], &["SELECT INTO c:made3 20 rows committed", "  SELECT r:item 20 rows committed"]),
    ("CREATE MATERIALIZED VIEW", &["> CREATE MATERIALIZED VIEW made4 AS SELECT id FROM item"],
        &["CREATE MATERIALIZED VIEW c:made4 20 rows committed", "  SELECT r:item 20 rows committed"]),
    ("REFRESH MATERIALIZED VIEW", &["> REFRESH MATERIALIZED VIEW summary"],
        &["REFRESH MATERIALIZED VIEW m:summary committed", "  SELECT r:item 1 rows committed"]),
];

#[rustfmt::skip]
const COMMANDS: &[Row] = &[
    ("UPDATE and DELETE", &["> UPDATE item SET price = 0 WHERE id < 3", "> DELETE FROM item WHERE id = 20"],
        &["UPDATE r:item,u:item 2 rows committed", "DELETE d:item,r:item 1 rows committed", "  DELETE d:tag,r:tag 0 rows committed"]),
    ("RETURNING", &["> INSERT INTO log VALUES ('x') RETURNING what"], &["INSERT i:log,r:log 1 rows committed"]),
    ("ON CONFLICT", &["> INSERT INTO item VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET name = excluded.name"],
        &["INSERT i:item,r:item,u:item 1 rows committed"]),
    ("MERGE", &["> MERGE INTO item USING (VALUES (1, 'a'), (99, 'b')) v (id, name) ON item.id = v.id
                 WHEN MATCHED THEN UPDATE SET name = v.name WHEN NOT MATCHED THEN INSERT VALUES (v.id, v.name)"],
        &["MERGE i:item,r:item,u:item 2 rows committed"]),
    ("a write inside a query", &["> WITH gone AS (DELETE FROM tag WHERE item = 1 RETURNING word) INSERT INTO log SELECT word FROM gone"],
        &["INSERT d:tag,i:log,r:tag 0 rows"]),
    ("FOR UPDATE", &["> SELECT id FROM item WHERE id < 3 FOR UPDATE"], &["SELECT r:item 2 rows committed"]),
    ("a view", &["> SELECT name FROM cheap"], &["SELECT r:cheap,r:item 4 rows"]),
    ("a partition", &["> SELECT id FROM part WHERE k = 5", "> INSERT INTO part VALUES (3, 6)", "> UPDATE part SET k = 16 WHERE id = 1"],
        &["SELECT r:part 1 rows", "INSERT i:part 1 rows committed", "UPDATE r:part,u:part 1 rows committed"]),
    ("a temporary table", &["> CREATE TEMP TABLE t (n int)", "> INSERT INTO t VALUES (1)", "> DROP TABLE t"],
        &["CREATE TABLE c:t committed", "INSERT i:t 1 rows committed", "DROP TABLE c:t committed"]),
    ("two phases", &["> BEGIN", "> INSERT INTO log VALUES ('x')", "> PREPARE TRANSACTION 'two'", "> COMMIT PREPARED 'two'"],
        &["BEGIN", "INSERT i:log 1 rows committed", "PREPARE TRANSACTION committed", "COMMIT PREPARED"]),
    ("savepoints", &["> BEGIN", "> SAVEPOINT a", "> INSERT INTO log VALUES ('x')", "> ROLLBACK TO a", "> RELEASE a", "> INSERT INTO log VALUES ('y')", "> COMMIT"],
        &["BEGIN", "SAVEPOINT", "INSERT i:log 1 rows rolled back", "ROLLBACK rolled back", "RELEASE committed", "INSERT i:log 1 rows committed", "COMMIT committed"]),
    ("settings", &["> SET work_mem = '8MB'", "> SHOW work_mem", "> RESET work_mem", "> SET ROLE app", "> DISCARD ALL"],
        &["SET", "SHOW", "RESET", "SET", "DISCARD ALL"]),
    ("LISTEN and NOTIFY", &["> LISTEN bell", "> NOTIFY bell", "> UNLISTEN bell"], &["LISTEN", "NOTIFY", "UNLISTEN"]),
    ("LOCK", &["> BEGIN", "> LOCK TABLE item IN SHARE MODE", "> COMMIT"], &["BEGIN", "LOCK TABLE m:item", "COMMIT"]),
    ("definitions", &["> CREATE TABLE d (n int)", "> ALTER TABLE d ADD COLUMN m int", "> CREATE INDEX CONCURRENTLY d_n ON d (n)", "> ALTER TABLE d RENAME TO e", "> COMMENT ON TABLE e IS 'x'", "> CREATE VIEW e_view AS SELECT n FROM e", "> DROP VIEW e_view", "> REINDEX TABLE e"],
        &["CREATE TABLE c:d committed", "ALTER TABLE c:d committed", "CREATE INDEX c:d committed", "ALTER TABLE c:d,c:e committed", "COMMENT c:e committed", "CREATE VIEW c:e_view committed", "DROP VIEW c:e_view committed", "REINDEX m:e committed"]),
    ("maintenance", &["> VACUUM item", "> ANALYZE item", "> VACUUM (ANALYZE) item", "> CLUSTER item USING item_pkey"],
        &["VACUUM m:item", "ANALYZE m:item committed", "VACUUM m:item", "CLUSTER m:item committed"]),
    ("large objects", &["> SELECT lo_create(4711)", "> SELECT lo_put(4711, 0, 'x')", "> SELECT lo_get(4711)", "> SELECT lo_unlink(4711)"],
        &["SELECT 1 rows committed", "SELECT 1 rows committed", "SELECT 1 rows", "SELECT 1 rows committed"]),
];

#[rustfmt::skip]
const FAILURES: &[Row] = &[
    ("a syntax error", &["> SELEC 1"], &["UNKNOWN failed 42601"]),
    ("a table that is not there", &["= SELECT * FROM nowhere"], &["UNKNOWN failed 42P01"]),
    ("an error of the planner", &["> SELECT 1 / 0"], &["UNKNOWN failed 22012"]),
    ("a parameter of the wrong type", &["= SELECT id FROM item WHERE id = $1 | x"], &["UNKNOWN failed 22P02"]),
    ("permission denied", &["> SELECT * FROM closed"], &["SELECT r:closed 0 rows failed 42501"]),
    ("permission denied to a command", &["> DROP VIEW closed_view"], &["DROP VIEW c:closed_view failed 42501"]),
    ("rows before the failure", &["> SELECT 1 / (id - 5) FROM item"], &["SELECT r:item 4 rows failed 22012"]),
    ("a constraint", &["> INSERT INTO item VALUES (1)"], &["INSERT i:item 0 rows failed 23505 rolled back"]),
    ("a failed transaction", &["> BEGIN", "> SELEC 1", "> SELECT 2", "> SELECT 3", "> COMMIT", "> SELECT 4"],
        &["BEGIN", "UNKNOWN failed 42601", "UNKNOWN failed 25P02", "UNKNOWN failed 25P02", "COMMIT", "SELECT 1 rows"]),
    ("a failed savepoint", &["> BEGIN", "> SAVEPOINT s", "> SELEC 1", "> SELECT 2", "> ROLLBACK TO s", "> SELECT 1 / (id - id) FROM item", "> SELECT 3", "> ROLLBACK"],
        &["BEGIN", "SAVEPOINT", "UNKNOWN failed 42601", "UNKNOWN failed 25P02", "ROLLBACK", "SELECT r:item 0 rows failed 22012", "UNKNOWN failed 25P02", "ROLLBACK"]),
    ("COMMIT that fails", &["> BEGIN", "> INSERT INTO later VALUES (99)", "> COMMIT", "> SELECT 1"],
        &["BEGIN", "INSERT i:later 1 rows rolled back", "COMMIT failed 23503 rolled back", "SELECT 1 rows"]),
    ("COMMIT of one statement that fails", &["> INSERT INTO later VALUES (99)", "= INSERT INTO later VALUES (98)"],
        &["INSERT i:later 1 rows rolled back", "COMMIT failed 23503", "INSERT i:later 1 rows rolled back", "COMMIT failed 23503"]),
    ("statement_timeout", &["> SET statement_timeout = '50ms'", "> SELECT pg_sleep(1000) FROM item"], &["SET", "SELECT r:item 0 rows failed 57014"]),
    ("blocked", &["> TRUNCATE item", "> DELETE FROM log"], &["TRUNCATE TABLE t:item blocked WA001", "DELETE d:log blocked WA001"]),
    ("cancelled", &["! SELECT pg_sleep(1000) FROM item", "!cancel", "> SELECT 1"], &["SELECT r:item 0 rows failed 57014", "SELECT 1 rows"]),
    ("cancelled in a function", &["! DO $$ BEGIN PERFORM pg_sleep(1000); END $$", "!cancel"], &["DO failed 57014", "  SELECT 0 rows failed 57014"]),
    ("terminated", &["! SELECT pg_sleep(1000) FROM item", "!terminate"], &["SELECT r:item 0 rows interrupted 57P01"]),
    ("terminated in a function", &["! DO $$ BEGIN PERFORM pg_sleep(1000); END $$", "!terminate"], &["DO interrupted 57P01", "  SELECT 0 rows interrupted 57P01"]),
    ("terminated with a cursor open", &["> BEGIN", "> DECLARE c CURSOR FOR SELECT id FROM item", "> FETCH 2 FROM c", "!terminate"],
        &["BEGIN", "DECLARE CURSOR", "  SELECT r:item 2 rows interrupted 57P01", "FETCH 2 rows"]),
    ("the client goes away", &["> BEGIN", "> INSERT INTO log VALUES ('x')", "[2 SELECT id FROM item", "!leave"],
        &["BEGIN", "INSERT i:log 1 rows rolled back", "SELECT r:item 2 rows interrupted rolled back"]),
];

#[tokio::test]
async fn by_every_path_of_the_protocol() -> Result {
    holds(PROTOCOL).await
}

#[tokio::test]
async fn in_a_database_without_the_extension() -> Result {
    holds_for("app", "plain", PROTOCOL).await
}

#[tokio::test]
async fn copy_in_every_form() -> Result {
    holds(COPY).await?;
    holds_for("dba", "postgres", FILES).await
}

#[tokio::test]
async fn what_statements_run() -> Result {
    holds(NESTED).await
}

#[tokio::test]
async fn commands_of_every_kind() -> Result {
    holds(COMMANDS).await
}

#[tokio::test]
async fn failures_of_every_kind() -> Result {
    holds(FAILURES).await
}

#[tokio::test]
async fn sessions_that_stand_in_each_others_way() -> Result {
    let (cluster, dba) = prepared("postgres").await?;
    let mut first = Session::connect(&cluster, "dba", "postgres", "who is first")?;
    let mut second = Session::connect(&cluster, "dba", "postgres", "who gives up")?;
    let mut third = Session::connect(&cluster, "dba", "postgres", "who is in a deadlock")?;
    let update = |n: i32| format!("UPDATE item SET price = 0 WHERE id = {n}");
    let (one, two) = (format!("> {}", update(1)), format!("> {}", update(2)));
    first
        .play(&dba, &["> SET deadlock_timeout = '1h'", "> BEGIN", &one])
        .await?;
    second
        .play(&dba, &["> SET lock_timeout = '10ms'", &one])
        .await?;
    third
        .play(&dba, &["> SET deadlock_timeout = '10ms'", "> BEGIN", &two])
        .await?;
    first.play(&dba, &[&format!("! {}", update(2))]).await?;
    third.play(&dba, &[&one, "> ROLLBACK"]).await?;
    first.raw.answers()?;
    first.play(&dba, &["> COMMIT"]).await?;
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("who is first", &[],
            &["SET", "BEGIN", "UPDATE r:item,u:item 1 rows committed", "UPDATE r:item,u:item 1 rows committed", "COMMIT committed"]),
        ("who gives up", &[], &["SET", "UPDATE r:item,u:item 0 rows failed 55P03 rolled back"]),
        ("who is in a deadlock", &[],
            &["SET", "BEGIN", "UPDATE r:item,u:item 1 rows rolled back", "UPDATE r:item,u:item 0 rows failed 40P01 rolled back", "ROLLBACK"]),
    ];
    proves(&cluster, rows).await
}

#[tokio::test]
async fn a_killed_server_process() -> Result {
    let (cluster, dba) = prepared("postgres").await?;
    #[rustfmt::skip]
    let rows: &[Row] = &[
        ("kill -9 in the middle", &["> BEGIN", "> INSERT INTO log VALUES ('x')", "! SELECT pg_sleep(1000) FROM item", "!kill"],
            &["BEGIN", "INSERT i:log 1 rows rolled back", "SELECT r:item interrupted"]),
    ];
    let (name, steps, _) = rows[0];
    let mut killed = Session::connect(&cluster, "app", "postgres", name)?;
    killed.play(&dba, steps).await?;
    cluster
        .wait_until("the server has started anew", async || {
            Ok(dba.is_closed() && cluster.superuser().await.is_ok())
        })
        .await?;
    proves(&cluster, rows).await
}

#[tokio::test]
async fn logical_replication_on_both_sides() -> Result {
    let (cluster, dba) = prepared("subscriber").await?;
    let publisher = cluster.connect("dba", "postgres").await?;
    publisher
        .run(
            "CREATE TABLE watched (id int PRIMARY KEY); INSERT INTO watched VALUES (1);
             CREATE PUBLICATION p FOR TABLE watched",
        )
        .await?;
    publisher
        .run("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        .await?;
    dba.run("ALTER TABLE watched ENABLE ALWAYS TRIGGER logs")
        .await?;
    dba.run(&format!(
        "CREATE SUBSCRIPTION s CONNECTION 'host={} dbname=postgres user=dba'
         PUBLICATION p WITH (create_slot = false)",
        cluster.scratch().display()
    ))
    .await?;
    let copied = async |n| Ok(dba.number("SELECT count(*) FROM watched").await? == n);
    cluster
        .wait_until("what there was is copied", async || copied(1).await)
        .await?;
    publisher.run("INSERT INTO watched VALUES (2)").await?;
    cluster
        .wait_until("the change is applied", async || copied(2).await)
        .await?;
    // The subscriber asks for what there was; what it then gets is no statement of the publisher's.
    let copy = cluster
        .the_activity("command = 'COPY' AND relations = '{public.watched}'")
        .await?;
    assert_eq!(
        (line(&copy), &copy["database"], &copy["background"]),
        (
            "COPY r:watched 1 rows".into(),
            &"postgres".into(),
            &false.into()
        )
    );
    // No hook sees what it applies, but the triggers that are fired run statements.
    let fired = cluster
        .activity("command = 'INSERT' AND relations = '{public.log}'")
        .await?;
    let fired: Vec<_> = fired
        .iter()
        .map(|f| (line(f), &f["database"], &f["background"]))
        .collect();
    let expected = "INSERT i:log 1 rows committed".to_owned();
    assert_eq!(fired.len(), 2, "{fired:?}");
    for f in fired {
        assert_eq!(f, (expected.clone(), &"subscriber".into(), &true.into()));
    }
    dba.run("ALTER SUBSCRIPTION s DISABLE").await?;
    dba.run("ALTER SUBSCRIPTION s SET (slot_name = NONE)")
        .await?;
    dba.run("DROP SUBSCRIPTION s").await
}

#[tokio::test]
async fn functions_that_are_called_are_named() -> Result {
    let (cluster, dba) = prepared("postgres").await?;
    let app = cluster.connect("app", "postgres").await?;
    dba.run(
        "CREATE SCHEMA own; GRANT ALL ON SCHEMA own TO app;
         CREATE FUNCTION public.same() RETURNS int LANGUAGE sql AS 'SELECT 1';
         CREATE FUNCTION own.same() RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT 2'",
    )
    .await?;
    #[rustfmt::skip]
    let rows: &[(&str, &[&str])] = &[
        ("SELECT abs(-1), id + 1, lower(name) AS f0 FROM item", &[]),
        ("SELECT id AS f1 FROM inlined(4)", &["public.inlined"]),
        ("SELECT counted() AS f2, caught(), counted()", &["public.counted", "public.caught"]),
        ("SELECT lo_create(4711) AS f3", &["pg_catalog.lo_create"]),
        ("SELECT 1 AS f4 WHERE set_config('a.b', 'c', true) = (SELECT 'c' WHERE counted() > 0)", &["public.counted", "pg_catalog.set_config"]),
        ("CALL sql_moves() /* f5 */", &["public.sql_moves"]),
        ("SET search_path = public; SELECT same() AS f6", &["public.same"]),
        ("SET search_path = own; SELECT same() AS f6", &["own.same"]),
    ];
    for (sql, _) in rows {
        app.run(sql).await?;
    }
    let seen = cluster
        .activity("NOT nested AND login_role = 'app' AND (query ~ 'f[0-9]' OR command = 'CALL')")
        .await?;
    for ((sql, expected), seen) in rows.iter().zip(&seen) {
        let mut functions: Vec<_> = seen["functions"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let mut expected = expected.to_vec();
        functions.sort_unstable();
        expected.sort_unstable();
        assert_eq!(functions, expected, "{sql}");
    }
    assert_eq!(seen.len(), rows.len());
    Ok(())
}

#[tokio::test]
async fn definitions_name_what_was_and_what_will_be() -> Result {
    let (cluster, dba) = prepared("postgres").await?;
    dba.run("CREATE SCHEMA own").await?;
    #[rustfmt::skip]
    let rows: &[(&str, &[&str])] = &[
        ("SET search_path = own, public; CREATE TABLE d1 (n int)", &["own.d1"]),
        ("SET search_path = public; CREATE TABLE d1 (n int)", &["public.d1"]),
        ("CREATE VIEW own.d2 AS SELECT 1", &["own.d2"]),
        ("CREATE TEMP TABLE d3 AS SELECT 1", &["pg_temp.d3"]),
        ("ALTER TABLE d1 RENAME TO d4", &["public.d1", "public.d4"]),
        ("ALTER TABLE d4 RENAME n TO m", &["public.d4"]),
        ("ALTER TABLE d4 SET SCHEMA own", &["own.d4", "public.d4"]),
        ("DROP TABLE own.d4, own.d1", &["own.d1", "own.d4"]),
    ];
    for (sql, _) in rows {
        dba.run(sql).await?;
    }
    let seen = cluster
        .activity("NOT nested AND login_role = 'dba' AND command ~ 'TABLE|VIEW' AND query ~ ' (own.)?d[0-9]'")
        .await?;
    for ((sql, expected), seen) in rows.iter().zip(&seen) {
        assert_eq!(seen["relations"], serde_json::json!(expected), "{sql}");
    }
    assert_eq!(seen.len(), rows.len());
    Ok(())
}

#[tokio::test]
async fn the_servers_functions_have_the_names_that_are_recorded() -> Result {
    let cluster = Cluster::start(Config::new(Mode::Plain)).await?;
    let su = cluster.superuser().await?;
    let values: Vec<_> = warden_core::notable::functions()
        .iter()
        .map(|(oid, name)| format!("({oid}, '{name}')"))
        .collect();
    let values = values.join(", ");
    let sql = format!(
        "SELECT f.oid || ' ' || proname FROM (VALUES {values}) f (oid, name)
         JOIN pg_proc p ON p.oid = f.oid AND p.proname <> f.name"
    );
    assert_eq!(su.column(&sql).await?, Vec::<String>::new());
    let sql = format!(
        "SELECT count(*) FROM (VALUES {values}) f (oid, name) JOIN pg_proc p ON p.oid = f.oid"
    );
    assert!(su.number(&sql).await? > 90);
    Ok(())
}

/// Plays each row on a session of its own, and compares what the ledger has of the session.
async fn holds(rows: &[Row]) -> Result {
    holds_for("app", "postgres", rows).await
}

async fn holds_for(user: &str, database: &str, rows: &[Row]) -> Result {
    let (cluster, dba) = prepared(database).await?;
    for (what, steps, _) in rows {
        dba.run(RESET).await?;
        let mut session = Session::connect(&cluster, user, database, what)?;
        session.play(&dba, steps).await?;
        session.gone(&dba).await?;
    }
    proves(&cluster, rows).await
}

/// A cluster with what the rows need in this database, and an administrator who is connected to it.
async fn prepared(database: &str) -> Result<(Cluster, Client)> {
    let config = Config::new(Mode::Preloaded)
        .line("max_prepared_transactions = 2")
        .line("wal_level = logical");
    let cluster = Cluster::with_extension(config).await?;
    if database != "postgres" {
        let dba = cluster.connect("dba", "postgres").await?;
        dba.run(&format!("CREATE DATABASE {database}")).await?;
        let dba = cluster.connect("dba", database).await?;
        dba.run("GRANT CREATE ON SCHEMA public TO app").await?;
    }
    let dba = cluster.connect("dba", database).await?;
    dba.run("CREATE TABLE closed (n int); CREATE VIEW closed_view AS SELECT 1")
        .await?;
    cluster.connect("app", database).await?.run(SETUP).await?;
    dba.run(RESET).await?;
    Ok((cluster, dba))
}

/// Fails unless the ledger has of each row's session what the row says, and is whole.
async fn proves(cluster: &Cluster, rows: &[Row]) -> Result {
    // What was prepared is settled in the recorder's own time.
    let mut wrong = differences(cluster, rows).await?;
    for _ in 0..10 {
        if wrong.is_empty() {
            break;
        }
        wrong = differences(cluster, rows).await?;
    }
    assert!(wrong.is_empty(), "{wrong}");
    let su = cluster.superuser().await?;
    let gaps = su
        .column("SELECT warden.event_detail(kind, payload) FROM warden.event WHERE kind = 4")
        .await?;
    assert!(gaps.is_empty(), "{gaps:#?}");
    // Every transaction has ended, and is not waited for.
    let open = su
        .column("SELECT xid FROM warden.journal_transaction")
        .await?;
    assert!(open.is_empty(), "{open:#?}");
    cluster.assert_verifies().await
}

/// A client whose connection has a name.
struct Session<'a> {
    cluster: &'a Cluster,
    raw: Raw,
}

impl<'a> Session<'a> {
    fn connect(cluster: &'a Cluster, user: &str, database: &str, name: &str) -> Result<Self> {
        let raw = Raw::connect_with(cluster, user, database, &[("application_name", name)])?;
        Ok(Self { cluster, raw })
    }

    async fn play(&mut self, dba: &Client, steps: &[&str]) -> Result {
        for step in steps {
            self.step(dba, step, steps).await?;
        }
        Ok(())
    }

    async fn step(&mut self, dba: &Client, step: &str, steps: &[&str]) -> Result {
        let Self { cluster, raw } = self;
        let (how, rest) = step.split_at(1);
        let mut parts = rest.trim_start().split(" | ");
        let sql = parts.next().unwrap_or_default();
        let parameters: Vec<&str> = parts.collect();
        match how {
            ">" => {
                let file = format!("warden-completeness-{}", std::process::id());
                raw.query(&rest.trim_start().replace("{file}", &file))?;
            }
            "=" => {
                raw.run(sql, &parameters)?;
                raw.sync()?;
            }
            "+" => raw.run(sql, &parameters)?,
            "." => drop(raw.sync()?),
            // The server is ready for the data of a COPY.
            "c" => drop(raw.answers()?),
            "[" => {
                let (rows, sql) = rest.split_once(' ').unwrap_or_default();
                raw.parse("", sql)?;
                raw.bind("", "", &[])?;
                raw.execute("", rows.parse()?)?;
            }
            "]" => raw.execute("", rest.parse()?)?,
            "<" if rest == "." => {
                raw.send(b'c', &[])?;
                if !steps.contains(&"copy") {
                    raw.answers()?;
                }
            }
            "<" if rest == "!" => {
                raw.send(b'f', b"no more\0")?;
                raw.answers()?;
            }
            "<" => raw.send(b'd', &rest.as_bytes()[1..])?,
            "!" if rest == "cancel" => {
                raw.cancel(cluster)?;
                raw.answers()?;
            }
            "!" if rest == "terminate" => {
                let sql = format!("SELECT pg_terminate_backend({}, 60000)", raw.pid());
                dba.run(&sql).await?;
            }
            "!" if rest == "kill" => Cluster::kill(raw.pid().into())?,
            "!" if rest == "leave" => {
                raw.send(b'H', &[])?;
                while raw.read()?.0 != b's' {}
            }
            "!" => {
                raw.send(b'Q', &[sql.as_bytes(), &[0]].concat())?;
                self.waits(dba).await?;
            }
            _ => panic!("not a step: {step}"),
        }
        Ok(())
    }

    /// Waits until the server sleeps, or waits for a lock, for this client.
    async fn waits(&self, dba: &Client) -> Result {
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity
             WHERE pid = {} AND (wait_event = 'PgSleep' OR wait_event_type = 'Lock')",
            self.raw.pid()
        );
        self.cluster
            .wait_until("it waits", async || Ok(dba.number(&sql).await? == 1))
            .await
    }

    /// Goes away, and waits until the server has noticed.
    async fn gone(self, dba: &Client) -> Result {
        let there = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE pid = {}",
            self.raw.pid()
        );
        drop(self.raw);
        self.cluster
            .wait_until("it has ended", async || Ok(dba.number(&there).await? == 0))
            .await
    }
}

/// Where the record is not what the rows say.
async fn differences(cluster: &Cluster, rows: &[Row]) -> Result<String> {
    let mut wrong = String::new();
    let records = records(cluster).await?;
    for (what, _, expected) in rows {
        let seen = records.get(*what).map_or(&[][..], Vec::as_slice);
        if seen != *expected {
            write!(
                wrong,
                "{what}:\n  expected {expected:#?}\n  recorded {seen:#?}\n"
            )?;
        }
    }
    Ok(wrong)
}

/// The record of each session, a line a statement.
async fn records(cluster: &Cluster) -> Result<HashMap<String, Vec<String>>> {
    let mut rows = cluster
        .activity("application_name LIKE '% %' OR login_role = 'app'")
        .await?;
    let number = |r: &Value, column: &str| r[column].as_i64().unwrap_or(0);
    rows.sort_by_key(|r| {
        (
            r["at"].to_string(),
            number(r, "parent_position"),
            number(r, "seq"),
        )
    });
    let mut depths = HashMap::from([(0, 0)]);
    let mut sessions: HashMap<String, Vec<String>> = HashMap::new();
    for r in &rows {
        // One whose parent is missing is found by its place.
        let depth = depths
            .get(&number(r, "parent_position"))
            .copied()
            .unwrap_or(9);
        if r["position"].is_i64() {
            depths.insert(number(r, "position"), depth + 1);
        }
        let session = sessions.entry(r["application_name"].to_string().replace('"', ""));
        session
            .or_default()
            .push(format!("{}{}", "  ".repeat(depth), line(r)));
    }
    Ok(sessions)
}

fn line(r: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or("?").to_owned();
    let mut line = text(&r["command"]);
    let mut relations: Vec<String> = Vec::new();
    for a in r["columns"].as_array().into_iter().flatten() {
        let kind = match text(&a["kind"]).as_str() {
            "ddl" => "c".to_owned(),
            kind => kind[..1].replace('s', "r"),
        };
        let schema = match text(&a["schema"]) {
            s if s == "public" || s.is_empty() || s.starts_with("pg_temp") => String::new(),
            s => s + ".",
        };
        relations.push(format!("{kind}:{schema}{}", text(&a["relation"])));
    }
    relations.sort();
    if !relations.is_empty() {
        line += &format!(" {}", relations.join(","));
    }
    if let Some(rows) = r["rows"].as_i64() {
        line += &format!(" {rows} rows");
    }
    if r["outcome"] != "succeeded" {
        line += &format!(" {}", text(&r["outcome"]));
        if r["sqlstate"].is_string() {
            line += &format!(" {}", text(&r["sqlstate"]));
        }
    }
    match r["committed"].as_bool() {
        Some(true) => line + " committed",
        Some(false) => line + " rolled back",
        None => line,
    }
}
