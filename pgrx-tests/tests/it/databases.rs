//! More than one database in a cluster.

use warden_tests::{Client, Cluster, Result};

async fn seen_in(cluster: &Cluster, database: &str, pattern: &str) -> Result<i64> {
    cluster.drained_in(database).await?;
    let client: Client = cluster.connect("postgres", database).await?;
    client
        .number(&format!(
            "SELECT count(*) FROM warden.activity WHERE query LIKE '{pattern}'"
        ))
        .await
}

#[tokio::test]
async fn two_databases_keep_two_ledgers() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE DATABASE second").await?;
    let second = cluster.connect("postgres", "second").await?;
    second.run("CREATE EXTENSION pg_warden").await?;
    let first = cluster.connect("app", "postgres").await?;
    let second = cluster.connect("app", "second").await?;
    for _ in 0..20 {
        first.run("SELECT 1 AS belongs_to_first").await?;
        second.run("SELECT 1 AS belongs_to_second").await?;
    }
    assert_eq!(
        seen_in(&cluster, "postgres", "%AS belongs_to_first").await?,
        20
    );
    assert_eq!(
        seen_in(&cluster, "postgres", "%AS belongs_to_second").await?,
        0
    );
    assert_eq!(
        seen_in(&cluster, "second", "%AS belongs_to_second").await?,
        20
    );
    assert_eq!(
        seen_in(&cluster, "second", "%AS belongs_to_first").await?,
        0
    );
    for database in ["postgres", "second"] {
        let verdict = cluster.verify(database).await?;
        assert_eq!(verdict["ok"], true, "{database}: {verdict}");
    }
    Ok(())
}

#[tokio::test]
async fn a_database_without_the_extension_is_recorded_in_the_home_database() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE DATABASE bare").await?;
    let bare = cluster.connect("app", "bare").await?;
    bare.run("SELECT 1 AS away_from_home").await?;
    let seen = cluster
        .the_activity("query LIKE '%AS away_from_home'")
        .await?;
    assert_eq!(seen["database"], "bare");
    Ok(())
}

#[tokio::test]
async fn databases_are_created_copied_and_dropped_as_ever() -> Result {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("CREATE DATABASE origin").await?;
    let origin = cluster.connect("dba", "origin").await?;
    origin.run("CREATE EXTENSION pg_warden").await?;
    origin.run("SELECT 1 AS in_origin").await?;
    cluster.drained_in("origin").await?;
    drop(origin);
    // The workers of a database must not stand in the way of any of these. The client that has
    // just gone may, for a moment, and PostgreSQL waits for it by itself.
    dba.run("CREATE DATABASE copy TEMPLATE origin").await?;
    dba.run("ALTER DATABASE origin RENAME TO renamed").await?;
    dba.run("DROP DATABASE renamed").await?;
    assert_eq!(seen_in(&cluster, "copy", "%AS in_origin").await?, 1);
    let verdict = cluster.verify("copy").await?;
    assert_eq!(verdict["ok"], true, "{verdict}");
    dba.run("DROP DATABASE copy").await?;
    cluster.drained().await?;
    cluster.assert_verifies().await
}

#[tokio::test]
async fn dropping_a_database_loses_no_event_of_another() -> Result {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("CREATE DATABASE shortlived").await?;
    let short = cluster.connect("dba", "shortlived").await?;
    short.run("CREATE EXTENSION pg_warden").await?;
    for n in 0..30 {
        short.run("SELECT 1 AS doomed").await?;
        dba.run(&format!("SELECT {n} AS lasting")).await?;
    }
    drop(short);
    dba.run("DROP DATABASE shortlived WITH (FORCE)").await?;
    assert_eq!(
        cluster.activity("query LIKE '%AS lasting'").await?.len(),
        30
    );
    cluster.assert_verifies().await
}

#[tokio::test]
async fn who_may_not_touch_a_database_does_not_stop_its_workers() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE DATABASE second").await?;
    su.run("ALTER ROLE app CREATEDB").await?;
    cluster.drained().await?;
    let workers = "SELECT string_agg(pid::text, ',' ORDER BY pid) FROM pg_stat_activity
         WHERE backend_type IN ('pg_warden recorder', 'pg_warden shipper')";
    let before = su.value(workers).await?;
    let app = cluster.connect("app", "second").await?;
    for sql in [
        "DROP DATABASE postgres",
        "ALTER DATABASE postgres RENAME TO mine",
        "ALTER DATABASE postgres SET TABLESPACE pg_default",
        "ALTER DATABASE postgres ALLOW_CONNECTIONS true",
        "CREATE DATABASE third TEMPLATE postgres",
    ] {
        let refused = app.sqlstate(sql).await?;
        assert!(
            ["42501", "55006"].contains(&refused.as_str()),
            "{sql}: {refused}"
        );
    }
    assert_eq!(su.value(workers).await?, before);
    Ok(())
}
