//! What is stopped, for whom, and how the refusal reads.

use warden_tests::{Client, Cluster, Result};

/// A cluster where `app` owns everything that it is going to destroy.
async fn playground() -> Result<(Cluster, Client)> {
    let cluster = Cluster::with_warden().await?;
    cluster
        .superuser()
        .await?
        .run(
            "ALTER ROLE app CREATEDB;
             CREATE SCHEMA pets AUTHORIZATION app;
             GRANT CREATE ON DATABASE postgres TO app",
        )
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run(
        "CREATE TABLE t (n int PRIMARY KEY, v text);
         INSERT INTO t SELECT g, 'v' FROM generate_series(1, 10) g;
         CREATE FUNCTION noop() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER tr BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION noop();
         ALTER TABLE t ENABLE ROW LEVEL SECURITY",
    )
    .await?;
    app.run("CREATE DATABASE victim").await?;
    Ok((cluster, app))
}

/// What the built-in rules stop, and a word of the event's command.
const REFUSED: &[(&str, &str)] = &[
    ("DROP DATABASE victim", "DROP DATABASE"),
    ("DROP DATABASE victim WITH (FORCE)", "DROP DATABASE"),
    ("DROP SCHEMA pets", "DROP SCHEMA"),
    ("DROP TABLE t", "DROP TABLE"),
    (
        "DROP TABLE IF EXISTS t, no_such_table CASCADE",
        "DROP TABLE",
    ),
    ("DROP TABLE postgres.public.t", "DROP TABLE"),
    ("TRUNCATE t", "TRUNCATE TABLE"),
    ("TRUNCATE postgres.public.t", "TRUNCATE TABLE"),
    ("UPDATE t SET v = 'x'", "UPDATE"),
    ("DELETE FROM t", "DELETE"),
    ("ALTER TABLE t DISABLE TRIGGER tr", "ALTER TABLE"),
    ("ALTER TABLE t DISABLE TRIGGER ALL", "ALTER TABLE"),
    ("ALTER TABLE t DISABLE TRIGGER USER", "ALTER TABLE"),
    ("ALTER TABLE t DISABLE ROW LEVEL SECURITY", "ALTER TABLE"),
    (
        "ALTER TABLE t ADD COLUMN w int, DISABLE TRIGGER tr",
        "ALTER TABLE",
    ),
    ("ALTER SYSTEM SET work_mem = '1MB'", "ALTER SYSTEM"),
];

#[tokio::test]
async fn the_built_in_rules_stop_destructive_commands_and_record_them() -> Result {
    let (cluster, app) = playground().await?;
    for (sql, _) in REFUSED {
        let error = app.error(sql).await?;
        assert_eq!(error.code().code(), "WA001", "{sql}: {error:?}");
        assert_eq!(error.severity(), "ERROR", "{sql}");
        assert!(
            !error.message().is_empty() && error.hint().is_some(),
            "{sql}: {error:?}"
        );
    }
    assert_eq!(
        app.number("SELECT count(*) FROM t WHERE v = 'v'").await?,
        10
    );
    let seen = cluster.activity("outcome = 'blocked'").await?;
    let commands: Vec<_> = seen
        .iter()
        .map(|a| a["command"].as_str().unwrap_or(""))
        .collect();
    let expected: Vec<_> = REFUSED.iter().map(|r| r.1).collect();
    assert_eq!(commands, expected);
    for activity in &seen {
        assert_eq!(activity["sqlstate"], "WA001", "{activity}");
        assert_eq!(activity["actor"], "app", "{activity}");
        assert!(
            activity["rule"].as_str().is_some_and(|r| !r.is_empty()),
            "{activity}"
        );
    }
    cluster.assert_verifies().await
}

#[tokio::test]
async fn the_refusal_names_the_rule() -> Result {
    let (cluster, app) = playground().await?;
    let error = app.error("DELETE FROM t").await?;
    let seen = cluster.the_activity("outcome = 'blocked'").await?;
    let rule = seen["rule"].as_str().unwrap_or("?");
    let text = format!("{} {:?}", error.message(), error.detail());
    assert!(text.contains(rule), "{rule} is not in {text}");
    Ok(())
}

#[tokio::test]
async fn an_administrator_may_do_what_the_rules_stop() -> Result {
    let (cluster, _app) = playground().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    // Tables go last.
    let mut sql: Vec<_> = REFUSED.iter().map(|r| r.0).collect();
    sql.retain(|s| !s.starts_with("DROP TABLE") && !s.contains("WITH (FORCE)"));
    sql.push("DROP TABLE t");
    for sql in sql {
        dba.run(sql).await?;
    }
    assert!(cluster.activity("outcome = 'blocked'").await?.is_empty());
    cluster
        .the_activity("command = 'DROP TABLE' AND login_role = 'dba'")
        .await?;
    Ok(())
}

#[tokio::test]
async fn what_is_harmless_goes_on() -> Result {
    let (cluster, app) = playground().await?;
    app.run("UPDATE t SET v = 'w' WHERE n = 1").await?;
    app.run("DELETE FROM t WHERE n = 2").await?;
    app.run("ALTER TABLE t ADD COLUMN w int").await?;
    app.run("CREATE VIEW seen AS SELECT n FROM t; DROP VIEW seen")
        .await?;
    app.run("INSERT INTO t (n) VALUES (50) ON CONFLICT (n) DO UPDATE SET v = 'again'")
        .await?;
    app.run("UPDATE t SET v = s.v FROM (VALUES (3, 'z')) s (n, v) WHERE s.n = t.n")
        .await?;
    app.run("EXPLAIN UPDATE t SET v = 'x' WHERE n = 1").await?;
    assert!(cluster.activity("outcome = 'blocked'").await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_rule_is_not_evaded_by_where_the_statement_hides() -> Result {
    let (_cluster, app) = playground().await?;
    app.run(
        "CREATE FUNCTION wipe() RETURNS void LANGUAGE sql AS 'DELETE FROM t';
         CREATE FUNCTION wipe_plpgsql() RETURNS void LANGUAGE plpgsql AS 'BEGIN DELETE FROM t; END';
         CREATE FUNCTION wipe_dynamic() RETURNS void LANGUAGE plpgsql AS
           $$ BEGIN EXECUTE 'DELETE ' || 'FROM t'; END $$;
         CREATE PROCEDURE wipe_call() LANGUAGE plpgsql AS 'BEGIN TRUNCATE t; END'",
    )
    .await?;
    app.run("PREPARE wiped AS DELETE FROM t").await.ok();
    for sql in [
        "WITH gone AS (DELETE FROM t RETURNING n) SELECT count(*) FROM gone",
        "WITH same AS (UPDATE t SET v = 'x' RETURNING n) SELECT count(*) FROM same",
        "DO $$ BEGIN DELETE FROM t; END $$",
        "DO $$ BEGIN EXECUTE 'DROP TABLE t'; END $$",
        "SELECT wipe()",
        "SELECT wipe_plpgsql()",
        "SELECT wipe_dynamic()",
        "CALL wipe_call()",
        "EXPLAIN ANALYZE DELETE FROM t",
        "CREATE TABLE caught AS WITH g AS (DELETE FROM t RETURNING n) SELECT * FROM g",
        "COPY (DELETE FROM t RETURNING n) TO STDOUT",
        "DELETE FROM ONLY public.t",
        "/* no harm */ delete\nfrom\tt",
    ] {
        let error = app.error(sql).await?;
        assert_eq!(error.code().code(), "WA001", "{sql}: {error:?}");
    }
    // The same, where the error is of the parse tree and not of a message's text.
    let statement = app.prepare("DELETE FROM t").await;
    if let Ok(statement) = statement {
        let error = app.execute(&statement, &[]).await.expect_err("a refusal");
        assert_eq!(error.code().map(|c| c.code()), Some("WA001"));
    }
    assert_eq!(app.number("SELECT count(*) FROM t").await?, 10);
    Ok(())
}

#[tokio::test]
async fn a_refusal_that_a_function_catches_stays_a_refusal() -> Result {
    let (cluster, app) = playground().await?;
    app.run("DO $$ BEGIN DELETE FROM t; EXCEPTION WHEN OTHERS THEN NULL; END $$")
        .await?;
    assert_eq!(app.number("SELECT count(*) FROM t").await?, 10);
    cluster
        .the_activity("outcome = 'blocked' AND nested")
        .await?;
    Ok(())
}

#[tokio::test]
async fn set_role_does_not_lend_the_administrators_right() -> Result {
    let (cluster, _app) = playground().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE lead_dev LOGIN; GRANT app TO lead_dev")
        .await?;
    let lead = cluster.connect("lead_dev", "postgres").await?;
    assert_eq!(lead.sqlstate("SET ROLE warden_admin").await?, "42501");
    lead.run("SET ROLE app").await?;
    assert_eq!(lead.sqlstate("DROP TABLE t").await?, "WA001");
    Ok(())
}

#[tokio::test]
async fn what_a_drop_takes_along_is_protected() -> Result {
    let (cluster, app) = playground().await?;
    app.run(
        "CREATE TYPE mood AS ENUM ('good'); CREATE TABLE diary (n int, m mood);
         CREATE DOMAIN score AS int; CREATE TABLE game (n int, s score);
         CREATE TYPE person AS (name text); CREATE TABLE people OF person;
         CREATE FUNCTION twice(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1 * 2';
         CREATE TABLE made (n int, m int GENERATED ALWAYS AS (twice(n)) STORED);
         CREATE VIEW seen AS SELECT twice(n) FROM t;
         CREATE TABLE part (n int) PARTITION BY RANGE (n);
         CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (9)",
    )
    .await?;
    for sql in [
        "DROP TYPE mood CASCADE",
        "DROP DOMAIN score CASCADE",
        "DROP TYPE person CASCADE",
        "DROP FUNCTION twice CASCADE",
        "DO $$ BEGIN DROP TYPE mood CASCADE; END $$",
    ] {
        let error = app.error(sql).await?;
        assert_eq!(error.code().code(), "WA001", "{sql}: {error:?}");
        assert!(
            error.detail().is_some_and(|d| d.contains("public.")),
            "{error:?}"
        );
    }
    let seen = cluster.activity("outcome = 'blocked'").await?;
    assert_eq!(seen.len(), 5, "{seen:#?}");
    assert!(
        seen.iter().all(|a| a["rule"] == "no_drop_table"),
        "{seen:#?}"
    );
    // A partition of its own rule does not go with its parent.
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(
        "SELECT warden.enable_rule('no_drop_table', false);
         SELECT warden.add_rule('keep', '{DROP TABLE}', relations => '{part_1}')",
    )
    .await?;
    assert_eq!(app.sqlstate("DROP TABLE part").await?, "WA001");
    dba.run("SELECT warden.enable_rule('no_drop_table')")
        .await?;
    // What takes nothing along, or nothing that lasts.
    app.run(
        "ALTER TABLE diary DROP COLUMN m; CREATE TEMP TABLE passing (m mood); DROP TYPE mood CASCADE;
         DROP VIEW seen; CREATE MATERIALIZED VIEW kept AS SELECT n FROM t;
         REFRESH MATERIALIZED VIEW kept; ALTER TABLE game ALTER n TYPE bigint",
    )
    .await?;
    dba.run("DROP FUNCTION twice CASCADE; DROP DOMAIN score CASCADE; DROP TABLE part")
        .await
}

#[tokio::test]
async fn a_merge_that_changes_every_row_counts_as_one_without_where() -> Result {
    let (_cluster, app) = playground().await?;
    for sql in [
        "MERGE INTO t USING (SELECT 1) s ON true WHEN MATCHED THEN DELETE",
        "MERGE INTO t USING (SELECT 1 AS x) s ON s.x = 1 WHEN MATCHED AND true THEN DELETE",
        "MERGE INTO t USING (SELECT 1) s ON true WHEN MATCHED THEN UPDATE SET v = 'x'",
        "MERGE INTO t USING (SELECT 1) s ON true
         WHEN MATCHED AND t.n < 0 THEN UPDATE SET v = 'x' WHEN MATCHED THEN DELETE",
    ] {
        assert_eq!(app.sqlstate(sql).await?, "WA001", "{sql}");
    }
    app.run("MERGE INTO t USING (SELECT 1 AS n) s ON s.n = t.n WHEN MATCHED THEN DELETE")
        .await?;
    app.run("MERGE INTO t USING (SELECT 1) s ON true WHEN MATCHED AND t.n = 2 THEN DELETE")
        .await?;
    assert_eq!(app.number("SELECT count(*) FROM t").await?, 8);
    Ok(())
}

#[tokio::test]
async fn triggers_are_not_switched_off_by_a_setting() -> Result {
    let (cluster, app) = playground().await?;
    let su = cluster.superuser().await?;
    su.run("GRANT SET ON PARAMETER session_replication_role TO app; ALTER ROLE app CREATEROLE")
        .await?;
    app.run("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        .await?;
    for sql in [
        "SET session_replication_role = replica",
        "SET LOCAL session_replication_role = replica",
        "ALTER ROLE app SET session_replication_role = replica",
        "ALTER DATABASE postgres SET session_replication_role = replica",
        "ALTER FUNCTION f() SET session_replication_role = replica",
        "CREATE FUNCTION g() RETURNS int LANGUAGE sql SET session_replication_role = replica AS 'SELECT 1'",
    ] {
        assert_eq!(app.sqlstate(sql).await?, "WA001", "{sql}");
    }
    // What no command shows: what is written then is refused.
    let by_option = cluster
        .connector()
        .connect("app", "postgres", |c| {
            c.options("-c session_replication_role=replica");
        })
        .await?;
    app.run("SELECT set_config('session_replication_role', 'replica', false)")
        .await?;
    for session in [&app, &by_option] {
        for sql in [
            "UPDATE t SET v = 'w' WHERE n = 1",
            "INSERT INTO t VALUES (77)",
            "DELETE FROM t WHERE n = 1",
            "WITH x AS (DELETE FROM t WHERE n = 1 RETURNING n) SELECT * FROM x",
            "DO $$ BEGIN UPDATE t SET v = 'w' WHERE n = 1; END $$",
            "COPY t FROM STDIN",
        ] {
            assert_eq!(session.sqlstate(sql).await?, "WA001", "{sql}");
        }
        assert_eq!(
            session
                .number("SELECT count(*) FROM t WHERE v = 'v'")
                .await?,
            10
        );
        session
            .run("CREATE TEMP TABLE own (n int); INSERT INTO own VALUES (1)")
            .await?;
    }
    app.run("SELECT set_config('session_replication_role', 'origin', false)")
        .await?;
    app.run("UPDATE t SET v = 'w' WHERE n = 1").await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("SET session_replication_role = replica; UPDATE t SET v = 'w' WHERE n = 2")
        .await
}
