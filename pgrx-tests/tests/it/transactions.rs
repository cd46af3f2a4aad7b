//! What became of what was written.

use serde_json::Value;
use warden_tests::{Client, Cluster, Config, Mode, Result};

async fn shop() -> Result<(Cluster, Client)> {
    let config = Config::new(Mode::Preloaded).line("max_prepared_transactions = 5");
    let cluster = Cluster::with_extension(config).await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run(
        "CREATE TABLE item (id int PRIMARY KEY, n int);
         CREATE TABLE late (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)",
    )
    .await?;
    Ok((cluster, app))
}

/// An INSERT that can be found again by the name of its alias.
async fn insert(client: &Client, id: u32, marker: &str) -> Result {
    client
        .run(&format!(
            "INSERT INTO item VALUES ({id}) RETURNING id AS m_{marker}"
        ))
        .await
}

/// `committed` of the statement with this marker.
async fn fate(cluster: &Cluster, marker: &str) -> Result<Value> {
    let seen = cluster
        .the_activity(&format!("query LIKE '%AS m_{marker}'"))
        .await?;
    Ok(seen["committed"].clone())
}

#[tokio::test]
async fn a_write_says_whether_it_was_committed() -> Result {
    let (cluster, app) = shop().await?;
    insert(&app, 1, "alone").await?;
    app.run("BEGIN").await?;
    insert(&app, 2, "undone").await?;
    let xid = app.value("SELECT pg_current_xact_id()").await?;
    app.run("ROLLBACK").await?;
    app.run("BEGIN").await?;
    insert(&app, 3, "kept").await?;
    app.run("SAVEPOINT a").await?;
    insert(&app, 4, "in_savepoint").await?;
    app.run("SAVEPOINT b").await?;
    insert(&app, 5, "deeper").await?;
    app.run("RELEASE b; ROLLBACK TO a").await?;
    insert(&app, 6, "after_it").await?;
    app.run("COMMIT").await?;
    app.run("SELECT n AS m_read FROM item").await?;
    for (marker, expected) in [
        ("alone", Value::Bool(true)),
        ("undone", Value::Bool(false)),
        ("kept", Value::Bool(true)),
        ("in_savepoint", Value::Bool(false)),
        ("deeper", Value::Bool(false)),
        ("after_it", Value::Bool(true)),
    ] {
        assert_eq!(fate(&cluster, marker).await?, expected, "{marker}");
    }
    let read = cluster.the_activity("query LIKE '%AS m_read%'").await?;
    assert_eq!(
        (&read["committed"], &read["xid"]),
        (&Value::Null, &Value::Null)
    );
    let undone = cluster.the_activity("query LIKE '%AS m_undone'").await?;
    assert_eq!(undone["xid"].to_string(), xid);
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_failure_at_commit_takes_everything_back() -> Result {
    let (cluster, app) = shop().await?;
    app.run("BEGIN").await?;
    insert(&app, 1, "before").await?;
    app.run("INSERT INTO late VALUES (1), (1)").await?;
    assert_eq!(app.sqlstate("COMMIT").await?, "23505");
    assert_eq!(fate(&cluster, "before").await?, Value::Bool(false));
    Ok(())
}

#[tokio::test]
async fn exception_blocks_are_told_apart() -> Result {
    let (cluster, app) = shop().await?;
    app.run(
        "DO $$ BEGIN
             FOR i IN 1..3000 LOOP
                 BEGIN
                     INSERT INTO item VALUES (i);
                     IF i % 3 = 0 THEN RAISE EXCEPTION 'no'; END IF;
                 EXCEPTION WHEN raise_exception THEN NULL;
                 END;
             END LOOP;
         END $$",
    )
    .await?;
    cluster.drained().await?;
    let su = cluster.superuser().await?;
    let of = |condition: &str| {
        format!(
            "SELECT count(*) FROM warden.activity
             WHERE nested AND command = 'INSERT' AND committed {condition}"
        )
    };
    // Only so many ranges are remembered; beyond them nothing is claimed.
    let (kept, lost) = (su.number(&of("")).await?, su.number(&of("= false")).await?);
    let unknown = su.number(&of("IS NULL")).await?;
    assert_eq!(kept + lost + unknown, 3000);
    assert!(
        lost >= 900 && (1900..=2000).contains(&kept) && lost <= 1000,
        "{kept} {lost}"
    );
    cluster.assert_verifies().await
}

#[tokio::test]
async fn what_a_crash_cut_off_is_rolled_back() -> Result {
    let (cluster, app) = shop().await?;
    insert(&app, 1, "safe").await?;
    app.run("BEGIN").await?;
    insert(&app, 2, "cut_off").await?;
    assert_eq!(fate(&cluster, "cut_off").await?, Value::Null);
    // The server throws everybody out.
    Cluster::kill(cluster.recorder("postgres").await?)?;
    cluster.back_after_crash(&app).await?;
    assert_eq!(fate(&cluster, "safe").await?, Value::Bool(true));
    assert_eq!(fate(&cluster, "cut_off").await?, Value::Bool(false));
    cluster.assert_verifies().await
}

#[tokio::test]
async fn what_is_committed_late_is_known() -> Result {
    let (mut cluster, app) = shop().await?;
    app.run("BEGIN").await?;
    insert(&app, 1, "late").await?;
    app.run("SAVEPOINT a").await?;
    insert(&app, 2, "late_undone").await?;
    cluster.drained().await?;
    app.run("ROLLBACK TO a; COMMIT").await?;
    assert_eq!(fate(&cluster, "late").await?, Value::Bool(true));
    assert_eq!(fate(&cluster, "late_undone").await?, Value::Bool(false));
    cluster.restart(Config::new(Mode::Preloaded)).await?;
    assert_eq!(fate(&cluster, "late").await?, Value::Bool(true));
    cluster.assert_verifies().await
}

#[tokio::test]
async fn prepared_transactions_are_settled_when_they_are_decided() -> Result {
    let (mut cluster, app) = shop().await?;
    for (id, marker) in [(1, "first"), (2, "second"), (3, "third")] {
        app.run("BEGIN").await?;
        insert(&app, id, marker).await?;
        app.run(&format!("PREPARE TRANSACTION '{marker}'")).await?;
    }
    assert_eq!(fate(&cluster, "first").await?, Value::Null);
    app.run("COMMIT PREPARED 'first'").await?;
    app.run("ROLLBACK PREPARED 'second'").await?;
    assert_eq!(fate(&cluster, "first").await?, Value::Bool(true));
    assert_eq!(fate(&cluster, "second").await?, Value::Bool(false));
    assert_eq!(fate(&cluster, "third").await?, Value::Null);
    cluster.kill_postmaster().await?;
    cluster.up().await?;
    let app = cluster.connect("app", "postgres").await?;
    assert_eq!(fate(&cluster, "third").await?, Value::Null);
    app.run("COMMIT PREPARED 'third'").await?;
    assert_eq!(fate(&cluster, "third").await?, Value::Bool(true));
    cluster.assert_verifies().await
}
