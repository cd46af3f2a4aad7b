//! Loading, creating, dropping; and a server that loads the library and uses nothing of it.

use warden_tests::{Cluster, Config, Mode, Result};

#[tokio::test]
async fn without_preload_the_extension_says_how_to_load_it() -> Result {
    let cluster = Cluster::start(Config::new(Mode::Plain)).await?;
    let su = cluster.superuser().await?;
    let error = su.error("CREATE EXTENSION pg_warden").await?;
    assert_eq!(error.code().code(), "55000", "{error:?}");
    let hint = error.hint().unwrap_or_default();
    assert!(hint.contains("shared_preload_libraries"), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn create_extension_brings_up_roles_schema_and_workers() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let roles = su
        .column(
            "SELECT rolname FROM pg_roles WHERE rolname LIKE 'warden\\_%' AND NOT rolcanlogin
             ORDER BY 1",
        )
        .await?;
    assert_eq!(
        roles,
        [
            "warden_admin",
            "warden_agent",
            "warden_approver",
            "warden_auditor"
        ]
    );
    assert_eq!(
        su.value("SELECT warden.version()").await?,
        env!("CARGO_PKG_VERSION")
    );
    cluster.recorder("postgres").await?;
    cluster.drained().await?;
    cluster.assert_verifies().await
}

#[tokio::test]
async fn every_public_object_has_a_comment() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let silent = su
        .column(
            "SELECT o FROM (
               SELECT 'table ' || oid::regclass, obj_description(oid, 'pg_class')
               FROM pg_class WHERE relnamespace = 'warden'::regnamespace
                 AND relkind IN ('r', 'p', 'v') AND NOT relispartition
               UNION ALL
               SELECT 'function ' || oid::regprocedure, obj_description(oid, 'pg_proc')
               FROM pg_proc WHERE pronamespace = 'warden'::regnamespace
             ) x (o, comment) WHERE comment IS NULL ORDER BY 1",
        )
        .await?;
    assert_eq!(silent, Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn the_extension_can_be_dropped_and_created_again() -> Result {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    for round in 0..3 {
        cluster.drained().await?;
        dba.run("DROP EXTENSION pg_warden").await?;
        // The empty schema stays, as that of every extension whose control file names one.
        let left = "SELECT count(*) FROM pg_class WHERE relnamespace = 'warden'::regnamespace";
        assert_eq!(dba.number(left).await?, 0, "round {round}");
        dba.run("SELECT 1 AS between_two_ledgers").await?;
        dba.run("CREATE EXTENSION pg_warden").await?;
        dba.run("SELECT 1 AS in_the_new_ledger").await?;
        let seen = cluster.activity("query LIKE '%in_the_new_ledger'").await?;
        assert_eq!(seen.len(), 1, "round {round}: {seen:#?}");
        cluster.assert_verifies().await?;
    }
    Ok(())
}

#[tokio::test]
async fn create_extension_rolled_back_leaves_nothing_behind() -> Result {
    let cluster = Cluster::start(Config::new(Mode::Preloaded)).await?;
    let su = cluster.superuser().await?;
    su.run("BEGIN; CREATE EXTENSION pg_warden; ROLLBACK")
        .await?;
    su.run("CREATE TABLE t (n int); INSERT INTO t VALUES (1); DROP TABLE t")
        .await?;
    su.run("CREATE EXTENSION pg_warden").await?;
    cluster.drained().await?;
    cluster.assert_verifies().await
}

/// What a user does who has never heard of us.
const ORDINARY_LIFE: &str = r#"
CREATE TABLE t (n int PRIMARY KEY, v text);
INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 100) g;
UPDATE t SET v = upper(v);
DELETE FROM t;
TRUNCATE t;
INSERT INTO t VALUES (1, 'one') RETURNING *;
MERGE INTO t USING (VALUES (1, 'x'), (2, 'y')) s (n, v) ON t.n = s.n
  WHEN MATCHED THEN UPDATE SET v = s.v WHEN NOT MATCHED THEN INSERT VALUES (s.n, s.v);
SELECT * FROM t ORDER BY n;
COPY t TO STDOUT;
BEGIN; DECLARE c CURSOR FOR SELECT * FROM t ORDER BY n; FETCH 1 FROM c; CLOSE c; COMMIT;
PREPARE p (int) AS SELECT v FROM t WHERE n = $1;
EXECUTE p (1);
EXPLAIN (COSTS OFF) SELECT * FROM t WHERE n = 1;
DO $$ BEGIN PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN RAISE NOTICE 'caught'; END $$;
SELECT 1 / 0;
SELECT no_such_column FROM t;
SET warden.journal_size = '1GB';
SHOW shared_preload_libraries \gset
CREATE DATABASE copied TEMPLATE template1;
DROP DATABASE copied;
DROP TABLE t;
"#;

#[tokio::test]
async fn preloaded_without_extension_behaves_as_plain_postgresql() -> Result {
    let plain = Cluster::start(Config::new(Mode::Plain)).await?;
    let ours = Cluster::start(Config::new(Mode::Preloaded)).await?;
    // The setting is ours: plain PostgreSQL takes it for a placeholder.
    let script = ORDINARY_LIFE.replace("SET warden.journal_size = '1GB';\n", "");
    let expected = plain.psql("postgres", "postgres", &script)?;
    assert!(expected.contains("one"), "{expected}");
    assert_eq!(ours.psql("postgres", "postgres", &script)?, expected);
    Ok(())
}

#[tokio::test]
async fn a_session_cannot_change_the_settings() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    for setting in app
        .column("SELECT name FROM pg_settings WHERE name LIKE 'warden.%'")
        .await?
    {
        let error = app.sqlstate(&format!("SET {setting} = DEFAULT")).await?;
        assert!(
            ["55P02", "42501"].contains(&error.as_str()),
            "{setting}: {error}"
        );
    }
    // An unknown setting with our prefix is a mistake, not a placeholder.
    assert_eq!(
        app.sqlstate("SET warden.no_such_setting = 1").await?,
        "42602"
    );
    Ok(())
}

#[tokio::test]
async fn control_file_library_and_extension_have_one_version() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let versions = "SELECT DISTINCT v FROM pg_extension, pg_available_extensions a,
         unnest(ARRAY[extversion, default_version, installed_version, warden.version()]) v
         WHERE extname = 'pg_warden' AND a.name = extname";
    assert_eq!(su.column(versions).await?, [env!("CARGO_PKG_VERSION")]);
    if cluster.major()? >= 18 {
        let module = "SELECT module_name || ' ' || version FROM pg_get_loaded_modules()
             WHERE file_name LIKE 'pg_warden%'";
        let expected = format!("pg_warden {}", env!("CARGO_PKG_VERSION"));
        assert_eq!(su.value(module).await?, expected);
    }
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("ALTER EXTENSION pg_warden UPDATE").await?;
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_library_of_another_version_reads_no_users_data_and_says_what_to_do() -> Result {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("CREATE TABLE t (n int); INSERT INTO t VALUES (1)")
        .await?;
    cluster.drained().await?;
    // As after the installation of a new library.
    dba.run("UPDATE pg_extension SET extversion = '0.0.9' WHERE extname = 'pg_warden'")
        .await?;
    let later = cluster.connect("dba", "postgres").await?;
    for sql in ["SELECT * FROM t", "COPY t TO STDOUT"] {
        let error = later.error(sql).await?;
        assert_eq!(error.code().code(), "WA001", "{error:?}");
        assert!(error.message().contains("0.0.9"), "{error:?}");
        assert!(
            error.hint().unwrap_or_default().contains("UPDATE"),
            "{error:?}"
        );
    }
    let error = later.error("SELECT * FROM warden.verify()").await?;
    assert_eq!(error.code().code(), "55000", "{error:?}");
    // Catalogs can be read, and rows be added: to look around, and not to stop what must not stop.
    later
        .run("SELECT count(*) FROM pg_class; INSERT INTO t VALUES (2)")
        .await?;
    later
        .run(&format!(
            "UPDATE pg_extension SET extversion = '{}' WHERE extname = 'pg_warden'",
            env!("CARGO_PKG_VERSION")
        ))
        .await?;
    later.run("ALTER EXTENSION pg_warden UPDATE").await?;
    assert_eq!(later.number("SELECT count(*) FROM t").await?, 2);
    cluster.drained().await?;
    cluster.assert_verifies().await
}
