//! What is masked, for whom, and every way around it that must not lead anywhere.

use warden_tests::{Client, Cluster, Result};

/// A cluster whose table `public.customer` has two masked columns, and who may read it.
async fn customers() -> Result<(Cluster, Client, Client)> {
    let cluster = Cluster::with_warden().await?;
    let admin = cluster.superuser().await?;
    admin
        .run(
            "CREATE TABLE customer (id int PRIMARY KEY, junk int, name text, email varchar(60),
                                    card char(19), born date, balance int,
                                    email_lower text GENERATED ALWAYS AS (lower(email)) STORED);
             ALTER TABLE customer DROP COLUMN junk;
             INSERT INTO customer
                 SELECT g, 'name' || g, 'Secret' || g || '@example.com', '4111 1111 1111 ' || 1000 + g,
                        date '1980-05-17', 100 + g
                 FROM generate_series(1, 500) g;
             CREATE VIEW customer_view AS SELECT * FROM customer;
             CREATE TABLE part (id int, email text) PARTITION BY RANGE (id);
             CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (100);
             INSERT INTO part VALUES (1, 'Secret1@example.com');
             CREATE FUNCTION emails() RETURNS SETOF varchar LANGUAGE sql STABLE
                 AS 'SELECT email FROM customer ORDER BY id LIMIT 1';
             CREATE FUNCTION email_of(n int) RETURNS text LANGUAGE plpgsql STABLE
                 AS 'BEGIN RETURN (SELECT email FROM customer WHERE id = n); END';
             SELECT warden.mask('customer', 'email', 'warden.partial_email');
             SELECT warden.mask('customer', 'card', 'warden.partial_card');
             SELECT warden.mask('customer', 'born', 'warden.first_of_year');
             SELECT warden.mask('customer', 'balance', 'warden.zero');
             SELECT warden.mask('part', 'email', 'warden.redact');
             CREATE ROLE trusted LOGIN;
             SELECT warden.unmask_for('trusted');
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO app, trusted;
             ANALYZE customer;",
        )
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    let trusted = cluster.connect("trusted", "postgres").await?;
    Ok((cluster, app, trusted))
}

/// Queries whose answer must not hold what is stored.
const READS: &[&str] = &[
    "SELECT email FROM customer WHERE id = 1",
    "SELECT * FROM customer WHERE id = 1",
    "SELECT c FROM customer c WHERE id = 1",
    "SELECT to_jsonb(c) FROM customer c WHERE id = 1",
    "SELECT (c).email FROM customer c WHERE id = 1",
    "SELECT upper(email) FROM customer WHERE id = 1",
    "SELECT max(email), string_agg(email, ',') FROM customer",
    "SELECT email FROM customer_view WHERE id = 1",
    "SELECT email_lower FROM customer WHERE id = 1",
    "TABLE customer",
    "WITH x AS MATERIALIZED (SELECT * FROM customer) SELECT email FROM x",
    "SELECT (SELECT email FROM customer WHERE id = 1)",
    "SELECT x.email FROM generate_series(1, 1) g, LATERAL (SELECT email FROM customer WHERE id = g) x",
    "SELECT email FROM customer TABLESAMPLE SYSTEM (100)",
    "SELECT email FROM customer WHERE id = 1 FOR UPDATE",
    "SELECT email FROM customer UNION SELECT email FROM customer_view",
    "SELECT * FROM emails()",
    "SELECT email_of(1)",
    "UPDATE customer SET name = 'x' WHERE id = 1 RETURNING *",
    "UPDATE customer SET name = 'x' WHERE id = 1 RETURNING upper(email), email_lower",
    "DELETE FROM customer WHERE id = 499 RETURNING email",
    "INSERT INTO customer (id, email) VALUES (1000, 'Secret1000@example.com') RETURNING email",
    "SELECT email FROM part",
    "SELECT email FROM part_1",
    "SELECT most_common_vals, histogram_bounds FROM pg_stats WHERE tablename = 'customer'",
    "SELECT query_to_xml('SELECT email FROM customer', true, false, '')",
    "EXPLAIN (ANALYZE, VERBOSE) SELECT email FROM customer WHERE email = 'x'",
];

#[tokio::test]
async fn no_read_shows_what_is_stored() -> Result {
    let (_cluster, app, _) = customers().await?;
    // Servers can be built without XML.
    let xml = app.run("SELECT xmlforest(1 AS x)").await.is_ok();
    for sql in READS.iter().filter(|sql| xml || !sql.contains("_to_xml")) {
        let shown = format!("{:?}", app.rows(sql).await?).to_lowercase();
        assert!(!shown.contains("secret"), "{sql}: {shown}");
        assert!(!shown.contains("4111 1111"), "{sql}: {shown}");
    }
    Ok(())
}

#[tokio::test]
async fn a_superuser_and_an_owner_without_exemption_read_masks() -> Result {
    let (cluster, ..) = customers().await?;
    let admin = cluster.superuser().await?;
    assert_eq!(
        admin
            .value("SELECT email FROM customer WHERE id = 1")
            .await?,
        "S***@***.com"
    );
    Ok(())
}

#[tokio::test]
async fn masks_keep_types_and_unmasked_columns() -> Result {
    let (_cluster, app, trusted) = customers().await?;
    let row = "SELECT concat_ws('|', id, name, email, card, born, balance, pg_typeof(email),
                                pg_typeof(card), pg_typeof(born), pg_typeof(balance))
               FROM customer WHERE id = 7";
    assert_eq!(
        app.value(row).await?,
        "7|name7|S***@***.com|**** **** **** 1007|1980-01-01|0|\
         character varying|character|date|integer"
    );
    assert_eq!(
        trusted.value(row).await?,
        "7|name7|Secret7@example.com|4111 1111 1111 1007|1980-05-17|107|\
         character varying|character|date|integer"
    );
    Ok(())
}

#[tokio::test]
async fn conditions_read_masks_too() -> Result {
    let (_cluster, app, trusted) = customers().await?;
    for condition in [
        "email = 'Secret3@example.com'",
        "email LIKE 'Secret%'",
        "card = '4111 1111 1111 1003'",
        "born = date '1980-05-17'",
        "balance > 100",
        "email_lower LIKE 'secret%'",
    ] {
        let count = format!("SELECT count(*) FROM customer WHERE {condition}");
        assert_eq!(app.number(&count).await?, 0, "{condition}");
        assert!(trusted.number(&count).await? > 0, "{condition}");
    }
    Ok(())
}

#[tokio::test]
async fn a_change_that_reads_a_masked_column_is_refused_and_recorded() -> Result {
    let (cluster, app, trusted) = customers().await?;
    for sql in [
        "UPDATE customer SET name = 'x' WHERE email = 'Secret1@example.com'",
        "UPDATE customer SET name = email WHERE id = 1",
        "UPDATE customer SET email = email WHERE id = 1",
        "DELETE FROM customer WHERE card LIKE '4111%'",
        "DELETE FROM customer c WHERE c::text LIKE '%Secret%'",
        "UPDATE customer SET name = 'x' WHERE email_lower = 'secret1@example.com'",
        "INSERT INTO customer (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET name = customer.email",
        "UPDATE customer SET name = 'x' WHERE id = 1 AND EXISTS (SELECT 1 WHERE balance > 0)",
        "MERGE INTO customer c USING (SELECT 1 AS id) s ON c.id = s.id
         WHEN MATCHED AND c.balance > 0 THEN UPDATE SET name = 'x'",
    ] {
        assert_eq!(app.sqlstate(sql).await?, "WA001", "{sql}");
    }
    app.run("UPDATE customer SET email = 'new@example.com' WHERE id = 2")
        .await?;
    let truth = trusted
        .value("SELECT email FROM customer WHERE id = 2")
        .await?;
    assert_eq!(truth, "new@example.com");
    cluster.drained().await?;
    let refused = cluster
        .activity("outcome = 'blocked' AND rule = 'masked_dml'")
        .await?;
    assert_eq!(refused.len(), 9, "{refused:?}");
    Ok(())
}

#[tokio::test]
async fn a_prepared_statement_follows_the_role() -> Result {
    let (cluster, ..) = customers().await?;
    let admin = cluster.superuser().await?;
    admin
        .run("SET plan_cache_mode = force_generic_plan; PREPARE p AS SELECT email FROM customer WHERE id = 1")
        .await?;
    for _ in 0..3 {
        assert_eq!(admin.value("EXECUTE p").await?, "S***@***.com");
        admin.run("SET ROLE trusted").await?;
        assert_eq!(admin.value("EXECUTE p").await?, "Secret1@example.com");
        admin.run("RESET ROLE").await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_change_of_policy_reaches_cached_plans_of_other_sessions() -> Result {
    let (cluster, app, _) = customers().await?;
    let admin = cluster.superuser().await?;
    app.run("PREPARE p AS SELECT name FROM customer WHERE id = 1")
        .await?;
    assert_eq!(app.value("EXECUTE p").await?, "name1");
    admin
        .run("SELECT warden.mask('customer', 'name', 'warden.redact')")
        .await?;
    assert_eq!(app.value("EXECUTE p").await?, "***");
    admin
        .run("SELECT warden.unmask('customer', 'name')")
        .await?;
    assert_eq!(app.value("EXECUTE p").await?, "name1");
    Ok(())
}

#[tokio::test]
async fn copies_hold_masks() -> Result {
    let (cluster, app, _) = customers().await?;
    for command in [
        "COPY customer TO STDOUT",
        "COPY customer (id, email) TO STDOUT",
        "COPY (SELECT * FROM customer) TO STDOUT",
    ] {
        let out = cluster.psql("app", "postgres", &format!("{command};"))?;
        assert!(
            out.contains("S***@***.com") && !out.contains("Secret"),
            "{command}: {out}"
        );
    }
    app.run("CREATE TEMP TABLE copy AS SELECT * FROM customer")
        .await?;
    let stolen = "SELECT count(*) FROM copy WHERE email LIKE 'Secret%'";
    assert_eq!(app.number(stolen).await?, 0);
    Ok(())
}

#[tokio::test]
async fn an_error_does_not_show_the_row() -> Result {
    let (cluster, app, _) = customers().await?;
    cluster
        .superuser()
        .await?
        .run("ALTER TABLE customer ADD CONSTRAINT short CHECK (length(name) < 20)")
        .await?;
    let error = app
        .error("UPDATE customer SET name = repeat('x', 30) WHERE id = 1")
        .await?;
    assert_eq!(error.code().code(), "23514");
    assert_eq!(error.constraint(), Some("short"));
    assert!(!format!("{error:?}").contains("Secret"), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn an_unmasked_column_keeps_its_index() -> Result {
    let (_cluster, app, _) = customers().await?;
    let plan = app
        .column("EXPLAIN (COSTS OFF) SELECT email FROM customer WHERE id = 5")
        .await?;
    assert!(plan.join("\n").contains("Index Scan"), "{plan:?}");
    Ok(())
}

#[tokio::test]
async fn the_record_names_the_masked_columns() -> Result {
    let (cluster, app, _) = customers().await?;
    app.run("SELECT id, email FROM customer WHERE id = 1")
        .await?;
    cluster.drained().await?;
    let event = cluster
        .the_activity("query LIKE 'SELECT id, email FROM customer%'")
        .await?;
    assert_eq!(
        event["masked_columns"],
        serde_json::json!(["public.customer.email"])
    );
    Ok(())
}
