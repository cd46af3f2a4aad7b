//! What an exclusion leaves out of the record, and what it never does.

use serde_json::{Value, json};
use warden_tests::{Client, Cluster, Config, Mode, Result};

/// A cluster with two tables, its administrator, and a session of `app`.
async fn cluster() -> Result<(Cluster, Client, Client)> {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run(
        "CREATE TABLE queue (id int, job text); CREATE TABLE person (id int, ssn text);
         INSERT INTO queue VALUES (1, 'x'); INSERT INTO person VALUES (1, '123')",
    )
    .await?;
    Ok((cluster, dba, app))
}

/// The texts of statements that name this, oldest first.
async fn texts(cluster: &Cluster, like: &str) -> Result<Vec<Value>> {
    let seen = cluster
        .activity(&format!("query LIKE '%{like}%' AND login_role = 'app'"))
        .await?;
    Ok(seen.into_iter().map(|a| a["query"].clone()).collect())
}

#[tokio::test]
async fn reads_of_one_relation_by_one_role_are_left_out() -> Result {
    let (cluster, dba, app) = cluster().await?;
    dba.run("SELECT warden.exclude('poller', '{read}', '{queue}', '{app}')")
        .await?;
    app.run("SELECT id AS out_a FROM queue").await?;
    app.run("SELECT id AS in_a FROM person").await?;
    app.run("SELECT q.id AS in_b FROM queue q, person p")
        .await?;
    app.run("UPDATE queue SET job = 'in_c' WHERE id > 0 RETURNING id AS in_c")
        .await?;
    app.run("WITH w AS (DELETE FROM queue WHERE id > 0 RETURNING id) SELECT id AS in_d FROM w")
        .await?;
    app.run("SELECT 1 AS in_e").await?;
    dba.run("SELECT id AS in_f FROM queue").await?;
    assert_eq!(texts(&cluster, "out\\_").await?, [] as [Value; 0]);
    assert_eq!(texts(&cluster, "in\\__").await?.len(), 5);
    assert_eq!(cluster.activity("query LIKE '%in\\_f%'").await?.len(), 1);
    cluster.assert_verifies().await?;
    Ok(())
}

#[tokio::test]
async fn an_exclusion_is_itself_on_record_and_shows_what_it_left_out() -> Result {
    let (cluster, dba, app) = cluster().await?;
    dba.run("SELECT warden.exclude('everything', '{read,write,function,role,ddl,misc}')")
        .await?;
    for _ in 0..3 {
        app.run("SELECT 1 AS out_a").await?;
    }
    let auditor = cluster.connect("auditor", "postgres").await?;
    let shown = auditor
        .objects("SELECT * FROM warden.exclusions WHERE name = 'everything'")
        .await?;
    assert_eq!(shown[0]["created_by"], "dba");
    assert_eq!(shown[0]["active"], true);
    assert!(shown[0]["left_out"].as_i64() >= Some(3), "{shown:?}");
    dba.run("SELECT warden.include('everything')").await?;
    app.run("SELECT 1 AS in_a").await?;
    let shown = auditor
        .objects("SELECT * FROM warden.exclusions WHERE name = 'everything'")
        .await?;
    assert_eq!(
        (&shown[0]["active"], &shown[0]["ended_by"]),
        (&json!(false), &json!("dba"))
    );
    for call in ["SELECT warden.exclude(%", "SELECT warden.include(%"] {
        let seen = cluster
            .the_activity(&format!("query LIKE '{call}' AND NOT nested"))
            .await?;
        assert_eq!(seen["login_role"], "dba");
    }
    // And the change of the table, under the call.
    let writes = cluster
        .activity("nested AND relations = '{warden.exclusion}' AND command IN ('INSERT', 'UPDATE')")
        .await?;
    assert_eq!(writes.len(), 2, "{writes:#?}");
    assert_eq!(texts(&cluster, "out\\_a").await?, [] as [Value; 0]);
    assert_eq!(texts(&cluster, "in\\_a").await?.len(), 1);
    // The same name may come again.
    dba.run("SELECT warden.exclude('everything', '{read}')")
        .await?;
    assert_eq!(
        dba.sqlstate("SELECT warden.exclude('everything', '{read}')")
            .await?,
        "23505"
    );
    cluster.assert_verifies().await?;
    Ok(())
}

#[tokio::test]
async fn no_exclusion_silences_what_matters() -> Result {
    let (cluster, dba, app) = cluster().await?;
    dba.run(
        "SELECT warden.mask('person', 'ssn', 'warden.redact');
         CREATE ROLE cleared; GRANT cleared TO app; SELECT warden.unmask_for('cleared');
         CREATE ROLE bot LOGIN IN ROLE warden_agent; GRANT SELECT ON queue TO bot;
         SELECT warden.exclude('everything', '{read,write,function,role,ddl,misc}',
                               roles => '{app,dba,bot}');
         SELECT warden.exclude('all_of_app', roles => '{app,dba,bot}')",
    )
    .await?;
    // Refusals.
    assert_eq!(app.sqlstate("DROP TABLE queue").await?, "WA001");
    assert_eq!(app.sqlstate("DELETE FROM queue").await?, "WA001");
    // Failures, running or not.
    assert_eq!(
        app.sqlstate("SELECT id / 0 AS failed_a FROM queue").await?,
        "22012"
    );
    assert_eq!(
        app.sqlstate("ALTER TABLE queue ADD failed_b nope").await?,
        "42704"
    );
    assert_eq!(app.sqlstate("SELECT failed_c FROM nowhere").await?, "42P01");
    // Masked columns, by whoever.
    app.run("SELECT ssn AS masked_a FROM person").await?;
    app.run("SET ROLE cleared; RESET ROLE").await?;
    app.run("COPY person (ssn) TO STDOUT").await.ok();
    app.run("SELECT id AS out_a FROM person").await?;
    // Agents.
    let bot = cluster.connect("bot", "postgres").await?;
    bot.run("SELECT id AS by_bot FROM queue").await?;
    // This extension.
    app.run("SELECT actor AS own_a FROM warden.whoami()")
        .await?;
    dba.run("GRANT warden_auditor TO cleared").await?;
    dba.run("SELECT count(*) AS own_b FROM warden.rule").await?;
    dba.run("COMMENT ON SCHEMA warden IS 'own_c'").await?;
    dba.run(
        "SET search_path = warden, public; ALTER FUNCTION include(text) COST 7; RESET search_path",
    )
    .await?;
    dba.run("ALTER SYSTEM SET work_mem = '5MB'").await.ok();
    dba.run("SELECT 1 AS out_b; SET work_mem = '5MB'; DO $$ BEGIN PERFORM 1 AS out_c; END $$; CREATE TABLE out_d ()")
        .await?;

    for condition in [
        "outcome = 'blocked' AND command = 'DROP TABLE'",
        "outcome = 'blocked' AND command = 'DELETE'",
        "outcome = 'failed' AND query LIKE '%failed\\_a%'",
        "outcome = 'failed' AND query LIKE '%failed\\_b%'",
        "outcome = 'failed' AND query LIKE '%failed\\_c%'",
        "query LIKE '%masked\\_a%'",
        "query LIKE 'COPY person%' AND NOT nested",
        "query LIKE '%by\\_bot%'",
        "query LIKE '%own\\_a%'",
        "query LIKE 'GRANT warden\\_auditor%'",
        "query LIKE '%own\\_b%'",
        "query LIKE 'COMMENT ON SCHEMA warden%'",
        "query LIKE 'ALTER FUNCTION include%'",
        "command = 'ALTER SYSTEM'",
    ] {
        let seen = cluster.activity(condition).await?;
        assert_eq!(seen.len(), 1, "{condition}: {seen:#?}");
    }
    let silent = cluster.activity("query LIKE '%out\\__%'").await?;
    assert!(silent.is_empty(), "{silent:#?}");
    cluster.assert_verifies().await?;
    Ok(())
}

#[tokio::test]
async fn set_role_leads_into_no_exclusion() -> Result {
    let (cluster, dba, app) = cluster().await?;
    dba.run(
        "CREATE ROLE batch LOGIN; GRANT batch TO dba; GRANT SELECT ON queue TO batch;
         SELECT warden.exclude('nightly', roles => '{batch}')",
    )
    .await?;
    let su = cluster.superuser().await?;
    su.run("SET ROLE batch; SELECT id AS in_a FROM queue; RESET ROLE")
        .await?;
    let batch = cluster.connect("batch", "postgres").await?;
    batch
        .run("SELECT id AS out_a FROM queue; SELECT 1 AS out_b")
        .await?;
    drop(app);
    let seen = cluster
        .activity("query LIKE '%in\\_a%' OR query LIKE '%out\\__%'")
        .await?;
    assert_eq!(seen.len(), 1, "{seen:#?}");
    Ok(())
}

#[tokio::test]
async fn only_administrators_exclude() -> Result {
    let (cluster, dba, app) = cluster().await?;
    let auditor = cluster.connect("auditor", "postgres").await?;
    for client in [&app, &auditor] {
        assert_eq!(
            client
                .sqlstate("SELECT warden.exclude('x', '{read}')")
                .await?,
            "42501"
        );
        assert_eq!(
            client.sqlstate("SELECT warden.include('x')").await?,
            "42501"
        );
    }
    for (call, sqlstate) in [
        ("warden.exclude('x')", "22023"),
        ("warden.exclude('x', '{rea;d}')", "22023"),
        ("warden.exclude('X', '{read}')", "23514"),
        ("warden.include('x')", "42704"),
    ] {
        assert_eq!(
            dba.sqlstate(&format!("SELECT {call}")).await?,
            sqlstate,
            "{call}"
        );
    }
    assert_eq!(dba.sqlstate("SET warden.record = 'none'").await?, "55P02");
    Ok(())
}

#[tokio::test]
async fn record_none_leaves_what_no_exclusion_could_cover() -> Result {
    let cluster =
        Cluster::with_extension(Config::new(Mode::Preloaded).line("warden.record = none")).await?;
    let app = cluster.connect("app", "postgres").await?;
    let dba = cluster.connect("dba", "postgres").await?;
    app.run("SELECT 1 AS out_a; CREATE TABLE t (id int)")
        .await?;
    assert_eq!(app.sqlstate("DROP TABLE t").await?, "WA001");
    dba.run("SELECT warden.exclude('more', '{read}')").await?;
    let seen = |condition: &'static str| {
        let su = cluster.superuser();
        async move {
            su.await?
                .number(&format!(
                    "SELECT count(*) FROM warden.activity WHERE {condition}"
                ))
                .await
        }
    };
    cluster
        .wait_until("the exclusion is on record", async || {
            Ok(seen("query LIKE 'SELECT warden.exclude(%' AND outcome = 'succeeded'").await? == 1)
        })
        .await?;
    assert_eq!(
        seen("outcome = 'blocked' AND command = 'DROP TABLE'").await?,
        1
    );
    assert_eq!(
        seen("query LIKE '%out\\_a%' OR query LIKE 'CREATE TABLE t (%'").await?,
        0
    );
    Ok(())
}
