//! What a plain role, an auditor and an administrator may see and do in schema `warden`.

use warden_tests::{Cluster, Result};

/// What every role may call: it acts on the caller's own session or value only.
const OPEN_TO_ALL: &[&str] = &["login", "logout", "whoami", "version"];

#[tokio::test]
async fn a_plain_role_reads_no_table_and_no_view() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let relations = su
        .column(
            "SELECT relname FROM pg_class
             WHERE relnamespace = 'warden'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S')",
        )
        .await?;
    assert!(relations.contains(&"activity".to_owned()), "{relations:?}");
    let app = cluster.connect("app", "postgres").await?;
    for relation in relations {
        let sqlstate = app
            .sqlstate(&format!("SELECT * FROM warden.{relation}"))
            .await?;
        assert_eq!(sqlstate, "42501", "warden.{relation}");
    }
    Ok(())
}

#[tokio::test]
async fn a_plain_role_writes_nothing() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let open = su
        .column(
            "SELECT c.relname || ' ' || p.privilege FROM pg_class c,
               unnest('{INSERT,UPDATE,DELETE,TRUNCATE,REFERENCES,TRIGGER}'::text[]) p (privilege)
             WHERE relnamespace = 'warden'::regnamespace AND relkind IN ('r', 'p', 'v')
               AND has_table_privilege('app', c.oid, p.privilege)",
        )
        .await?;
    assert_eq!(open, Vec::<String>::new());
    assert_eq!(
        su.value("SELECT has_schema_privilege('app', 'warden', 'CREATE')")
            .await?,
        "f"
    );
    Ok(())
}

#[tokio::test]
async fn a_plain_role_administers_nothing() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    // Mask functions are called in the queries of whoever reads a masked column.
    let callable = su
        .column(
            "SELECT DISTINCT proname FROM pg_proc
             WHERE pronamespace = 'warden'::regnamespace AND has_function_privilege('app', oid, 'EXECUTE')
               AND provolatile = 'v'
             ORDER BY 1",
        )
        .await?;
    for name in callable {
        assert!(
            OPEN_TO_ALL.contains(&name.as_str()),
            "everyone may call warden.{name}()"
        );
    }
    for name in [
        "mask",
        "unmask",
        "unmask_for",
        "remask_for",
        "add_rule",
        "add_issuer",
        "add_sink",
        "verify",
    ] {
        let sql = format!(
            "SELECT count(*) || ' ' || count(*) FILTER (WHERE has_function_privilege('app', oid, 'EXECUTE'))
             FROM pg_proc WHERE pronamespace = 'warden'::regnamespace AND proname = '{name}'"
        );
        let counts = su.value(&sql).await?;
        assert!(
            counts != "0 0" && counts.ends_with(" 0"),
            "warden.{name}: {counts}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn an_auditor_reads_the_activity_and_changes_nothing() -> Result {
    let cluster = Cluster::with_warden().await?;
    cluster.drained().await?;
    let auditor = cluster.connect("auditor", "postgres").await?;
    assert!(
        auditor
            .number("SELECT count(*) FROM warden.activity")
            .await?
            > 0
    );
    for sql in [
        "DELETE FROM warden.event WHERE seq = 1",
        "UPDATE warden.event SET rows = 0 WHERE seq = 1",
        "INSERT INTO warden.event SELECT * FROM warden.event",
        "TRUNCATE warden.event",
    ] {
        let sqlstate = auditor.sqlstate(sql).await?;
        assert!(
            ["42501", "WA001"].contains(&sqlstate.as_str()),
            "{sql}: {sqlstate}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn nobody_writes_the_ledger_not_even_a_superuser() -> Result {
    let cluster = Cluster::with_warden().await?;
    cluster.drained().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    let attempts = [
        "UPDATE warden.event SET rows = 0 WHERE seq = 1",
        "DELETE FROM warden.event WHERE seq = 1",
        "INSERT INTO warden.event SELECT * FROM warden.event WHERE seq = 1",
        "TRUNCATE warden.event",
        "DROP TABLE warden.session CASCADE",
        "ALTER TABLE warden.event ADD COLUMN note text",
        "ALTER TABLE warden.event RENAME TO event_old",
        "CREATE TRIGGER t BEFORE INSERT ON warden.event FOR EACH ROW EXECUTE FUNCTION f()",
        "CREATE RULE r AS ON INSERT TO warden.session DO INSTEAD NOTHING",
        "DELETE FROM warden.statement WHERE id > 0",
        "UPDATE warden.session SET actor = 'someone else' WHERE id > 0",
        "WITH x AS (DELETE FROM warden.event WHERE seq = 1 RETURNING 1) SELECT * FROM x",
        "COPY warden.event FROM '/dev/null'",
        "UPDATE warden.journal_position SET seq = 0 WHERE seq > 0",
    ];
    for sql in attempts {
        assert_eq!(dba.sqlstate(sql).await?, "WA001", "{sql}");
    }
    let seen = cluster
        .activity("outcome = 'blocked' AND login_role = 'dba'")
        .await?;
    assert_eq!(seen.len(), attempts.len(), "{seen:#?}");
    cluster.assert_verifies().await
}

#[tokio::test]
async fn security_definer_functions_pin_their_search_path() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let loose = su
        .column(
            "SELECT oid::regprocedure FROM pg_proc
             WHERE pronamespace = 'warden'::regnamespace AND prosecdef
               AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)",
        )
        .await?;
    assert_eq!(loose, Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn the_schema_belongs_to_who_installs() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE DATABASE theirs OWNER app").await?;
    let app = cluster.connect("app", "theirs").await?;
    let su = cluster.connect("postgres", "theirs").await?;
    app.run("CREATE SCHEMA warden").await?;
    let create = "CREATE EXTENSION pg_warden";
    assert_eq!(su.sqlstate(create).await?, "55000");
    su.run("ALTER SCHEMA warden OWNER TO postgres; CREATE FUNCTION warden.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        .await?;
    assert_eq!(su.sqlstate(create).await?, "55000");
    su.run("DROP SCHEMA warden CASCADE").await?;
    su.run(create).await?;
    for sql in [
        "ALTER SCHEMA warden RENAME TO elsewhere",
        "ALTER SCHEMA warden OWNER TO app",
    ] {
        assert_eq!(su.sqlstate(sql).await?, "WA001", "{sql}");
    }
    Ok(())
}
