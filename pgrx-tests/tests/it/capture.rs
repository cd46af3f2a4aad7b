//! What is recorded of a statement, and which statements are.

use serde_json::{Value, json};
use warden_tests::{Cluster, Config, Mode, Result};

/// A cluster with a table of `app`, and a session of `app`.
async fn shop() -> Result<(Cluster, warden_tests::Client)> {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run(
        "CREATE TABLE item (id int PRIMARY KEY, name text, price int);
         INSERT INTO item SELECT g, 'item ' || g, g * 10 FROM generate_series(1, 20) g",
    )
    .await?;
    Ok((cluster, app))
}

/// The columns that an activity touches in this way, of all relations, sorted.
fn columns(activity: &Value, kind: &str) -> Vec<String> {
    let mut names = vec![];
    for access in activity["columns"].as_array().into_iter().flatten() {
        if access["kind"] == kind {
            let relation = format!("{}.{}", text(&access["schema"]), text(&access["relation"]));
            let columns = access["columns"].as_array().into_iter().flatten();
            names.extend(columns.map(|c| format!("{relation}.{}", text(c))));
        }
    }
    names.sort();
    names
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

#[tokio::test]
async fn a_select_is_recorded_with_its_columns_and_rows() -> Result {
    let (cluster, app) = shop().await?;
    app.run("SELECT name FROM item AS reading WHERE price > 100")
        .await?;
    let seen = cluster
        .the_activity("query LIKE '%AS reading WHERE%'")
        .await?;
    assert_eq!(
        seen["query"],
        "SELECT name FROM item AS reading WHERE price > $1"
    );
    assert_eq!(seen["command"], "SELECT");
    assert_eq!(seen["rows"], 10);
    assert_eq!(seen["outcome"], "succeeded");
    assert_eq!(seen["sqlstate"], Value::Null);
    assert_eq!(seen["nested"], false);
    assert_eq!(seen["relations"], json!(["public.item"]));
    assert_eq!(
        columns(&seen, "select"),
        ["public.item.name", "public.item.price"]
    );
    assert!(seen["duration_us"].as_i64() >= Some(0), "{seen}");
    Ok(())
}

#[tokio::test]
async fn who_and_from_where_is_recorded() -> Result {
    let cluster = Cluster::with_extension(Config::new(Mode::Preloaded).tcp()).await?;
    cluster
        .superuser()
        .await?
        .run("CREATE ROLE clerk; GRANT clerk TO app")
        .await?;
    let app = cluster.connect_tcp("app", "postgres", "till 7").await?;
    app.run("SET ROLE clerk; SELECT 1 AS from_far").await?;
    let seen = cluster.the_activity("query LIKE '%from_far'").await?;
    assert_eq!(seen["login_role"], "app");
    assert_eq!(seen["effective_role"], "clerk");
    assert_eq!(seen["database"], "postgres");
    assert_eq!(seen["client_addr"], "127.0.0.1");
    assert_eq!(seen["application_name"], "till 7");
    assert_eq!(seen["actor"], "app");
    assert_eq!(seen["trust"], "role");
    assert_eq!(
        seen["pid"].as_i64(),
        Some(app.number("SELECT pg_backend_pid()").await?)
    );
    Ok(())
}

#[tokio::test]
async fn a_change_of_role_or_application_name_shows_from_the_next_statement_on() -> Result {
    let (cluster, app) = shop().await?;
    cluster
        .superuser()
        .await?
        .run("CREATE ROLE clerk; GRANT clerk TO app")
        .await?;
    app.run("SELECT 1 AS role_step_a").await?;
    app.run("SET ROLE clerk").await?;
    app.run("SET application_name = 'renamed'").await?;
    app.run("SELECT 1 AS role_step_b").await?;
    app.run("RESET ROLE").await?;
    app.run("SELECT 1 AS role_step_c").await?;
    let seen = cluster.activity("query LIKE '%role_step__'").await?;
    let roles: Vec<_> = seen.iter().map(|a| a["effective_role"].clone()).collect();
    assert_eq!(roles, ["app", "clerk", "app"]);
    assert_eq!(seen[1]["application_name"], "renamed");
    Ok(())
}

#[tokio::test]
async fn writes_are_recorded_with_columns_by_kind_of_access() -> Result {
    let (cluster, app) = shop().await?;
    app.run("INSERT INTO item (id, name) VALUES (100, 'a'), (101, 'b')")
        .await?;
    app.run("UPDATE item SET price = price + 1 WHERE name = 'a'")
        .await?;
    app.run("DELETE FROM item WHERE id = 101").await?;
    let insert = cluster
        .the_activity("query LIKE 'INSERT INTO item (id, name)%'")
        .await?;
    assert_eq!(
        (&insert["command"], &insert["rows"]),
        (&json!("INSERT"), &json!(2))
    );
    assert_eq!(
        columns(&insert, "insert"),
        ["public.item.id", "public.item.name"]
    );
    let update = cluster
        .the_activity("query LIKE 'UPDATE item SET price%'")
        .await?;
    assert_eq!(
        (&update["command"], &update["rows"]),
        (&json!("UPDATE"), &json!(1))
    );
    assert_eq!(columns(&update, "update"), ["public.item.price"]);
    assert_eq!(
        columns(&update, "select"),
        ["public.item.name", "public.item.price"]
    );
    let delete = cluster
        .the_activity("query LIKE 'DELETE FROM item WHERE%'")
        .await?;
    assert_eq!(
        (&delete["command"], &delete["rows"]),
        (&json!("DELETE"), &json!(1))
    );
    assert_eq!(columns(&delete, "select"), ["public.item.id"]);
    let kinds: Vec<_> = delete["columns"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|a| text(&a["kind"]))
        .collect();
    assert!(kinds.contains(&"delete"), "{delete}");
    Ok(())
}

#[tokio::test]
async fn a_merge_is_recorded() -> Result {
    let (cluster, app) = shop().await?;
    app.run(
        "MERGE INTO item USING (VALUES (1, 'new'), (500, 'other')) s (id, name)
           ON item.id = s.id
         WHEN MATCHED THEN UPDATE SET name = s.name
         WHEN NOT MATCHED THEN INSERT (id, name) VALUES (s.id, s.name)",
    )
    .await?;
    let seen = cluster.the_activity("command = 'MERGE'").await?;
    assert_eq!(seen["rows"], 2);
    assert_eq!(columns(&seen, "update"), ["public.item.name"]);
    assert_eq!(
        columns(&seen, "insert"),
        ["public.item.id", "public.item.name"]
    );
    Ok(())
}

#[tokio::test]
async fn copy_is_recorded_in_both_directions() -> Result {
    let (cluster, _) = shop().await?;
    cluster.psql(
        "app",
        "postgres",
        "COPY item (id, name) FROM STDIN;\n700\tcopied\n701\tcopied\n\\.\n\
         COPY item (name) TO STDOUT;\n\
         COPY (SELECT price FROM item WHERE id < 4) TO STDOUT;\n",
    )?;
    let seen = cluster
        .activity("command LIKE 'COPY%' AND NOT nested")
        .await?;
    assert_eq!(seen.len(), 3, "{seen:#?}");
    assert_eq!(seen[0]["rows"], 2);
    assert_eq!(
        columns(&seen[0], "insert"),
        ["public.item.id", "public.item.name"]
    );
    assert_eq!(seen[1]["rows"], 22);
    assert_eq!(columns(&seen[1], "select"), ["public.item.name"]);
    assert_eq!(seen[2]["rows"], 3);
    let query = cluster
        .activity("query LIKE '%price FROM item WHERE id%'")
        .await?;
    let read: Vec<_> = query.iter().flat_map(|a| columns(a, "select")).collect();
    assert!(read.contains(&"public.item.price".into()), "{query:#?}");
    Ok(())
}

#[tokio::test]
async fn utility_commands_are_recorded() -> Result {
    let (cluster, app) = shop().await?;
    app.run("CREATE TABLE fresh (n int)").await?;
    app.run("ALTER TABLE fresh ADD COLUMN extra text").await?;
    app.run("CREATE INDEX fresh_n ON fresh (n)").await?;
    app.run("GRANT SELECT ON fresh TO auditor").await?;
    app.run("VACUUM fresh").await?;
    for (command, relation) in [
        ("CREATE TABLE", None),
        ("ALTER TABLE", Some("public.fresh")),
        ("CREATE INDEX", Some("public.fresh")),
        ("GRANT", None),
        ("VACUUM", None),
    ] {
        let seen = cluster
            .the_activity(&format!(
                "command = '{command}' AND query LIKE '%fresh%' AND NOT nested"
            ))
            .await?;
        assert_eq!(seen["outcome"], "succeeded");
        if let Some(relation) = relation {
            assert_eq!(seen["relations"], json!([relation]), "{seen}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn every_statement_of_one_message_is_recorded() -> Result {
    let (cluster, app) = shop().await?;
    app.run("SELECT 1 AS many_a; SELECT 2 AS many_b; SELECT 3 AS many_c")
        .await?;
    let seen = cluster.activity("query LIKE '%AS many\\__'").await?;
    let texts: Vec<_> = seen.iter().map(|a| a["query"].clone()).collect();
    assert_eq!(
        texts,
        [
            "SELECT $1 AS many_a",
            "SELECT $1 AS many_b",
            "SELECT $1 AS many_c"
        ]
    );
    Ok(())
}

#[tokio::test]
async fn nested_statements_are_recorded_under_their_parent() -> Result {
    let (cluster, app) = shop().await?;
    app.run(
        "CREATE FUNCTION cheapest() RETURNS int LANGUAGE plpgsql AS $$
         DECLARE found int;
         BEGIN SELECT min(price) INTO found FROM item AS inner_read; RETURN found; END $$",
    )
    .await?;
    app.run("SELECT cheapest() AS outer_read").await?;
    let outer = cluster.the_activity("query LIKE '%outer_read'").await?;
    let inner = cluster
        .the_activity("query LIKE '%inner_read' AND nested")
        .await?;
    assert_eq!(outer["nested"], false);
    assert_eq!(inner["parent_position"], outer["position"]);
    assert_eq!(columns(&inner, "select"), ["public.item.price"]);
    Ok(())
}

#[tokio::test]
async fn a_do_block_is_recorded_with_what_it_runs() -> Result {
    let (cluster, app) = shop().await?;
    app.run("DO $$ BEGIN UPDATE item SET price = 0 WHERE id = 3; END $$")
        .await?;
    let block = cluster.the_activity("command = 'DO'").await?;
    let inner = cluster
        .the_activity("query LIKE 'UPDATE item SET price%'")
        .await?;
    assert_eq!(inner["parent_position"], block["position"]);
    // What is in the block may be a secret: its text is a literal.
    assert!(!block["query"].to_string().contains("UPDATE"), "{block}");
    Ok(())
}

#[tokio::test]
async fn a_failed_statement_is_recorded_with_its_sqlstate() -> Result {
    let (cluster, app) = shop().await?;
    cluster
        .superuser()
        .await?
        .run("CREATE TABLE closed (n int)")
        .await?;
    for (sql, sqlstate) in [
        (
            "SELECT price / (price - price) AS fails_running FROM item",
            "22012",
        ),
        ("SELECT 1 / 0 AS fails_planning", "22012"),
        ("SELECT n AS fails_permission FROM closed", "42501"),
        (
            "INSERT INTO item (id) VALUES (1) /* not text */ RETURNING id AS fails_unique",
            "23505",
        ),
        (
            "ALTER TABLE item ADD COLUMN name int /* fails_utility */",
            "42701",
        ),
    ] {
        assert_eq!(app.sqlstate(sql).await?, sqlstate, "{sql}");
    }
    let seen = cluster
        .activity("outcome = 'failed' AND login_role = 'app'")
        .await?;
    let states: Vec<_> = seen.iter().map(|a| a["sqlstate"].clone()).collect();
    assert_eq!(
        states,
        ["22012", "22012", "42501", "23505", "42701"],
        "{seen:#?}"
    );
    Ok(())
}

#[tokio::test]
async fn what_fails_after_a_savepoint_is_recorded_once() -> Result {
    let (cluster, app) = shop().await?;
    app.run("BEGIN; INSERT INTO item (id) VALUES (100)").await?;
    for (sql, sqlstate) in [
        ("SELEKT 1", "42601"),
        ("SELECT no_such_column FROM item", "42703"),
        ("SELECT * FROM no_such_table", "42P01"),
        ("SELECT 1 / (price - price) FROM item", "22012"),
        ("INSERT INTO item (id) VALUES (100)", "23505"),
        (
            "DO $$ BEGIN RAISE 'no' USING ERRCODE = 'ZZ001'; END $$",
            "ZZ001",
        ),
    ] {
        app.run("SAVEPOINT a").await?;
        assert_eq!(app.sqlstate(sql).await?, sqlstate, "{sql}");
        app.run("ROLLBACK TO a; RELEASE a").await?;
    }
    app.run(
        "DO $$ BEGIN
             FOR i IN 1..3 LOOP
                 BEGIN RAISE 'caught' USING ERRCODE = 'ZZ002'; EXCEPTION WHEN OTHERS THEN NULL; END;
             END LOOP;
         END $$; COMMIT",
    )
    .await?;
    let seen = cluster
        .activity("outcome = 'failed' AND login_role = 'app' AND NOT nested")
        .await?;
    let states: Vec<_> = seen.iter().map(|a| a["sqlstate"].clone()).collect();
    assert_eq!(
        states,
        ["42601", "42703", "42P01", "22012", "23505", "ZZ001"],
        "{seen:#?}"
    );
    for failed in &seen {
        assert_ne!(failed["committed"], true, "{failed}");
    }
    Ok(())
}

#[tokio::test]
async fn a_rolled_back_select_is_recorded() -> Result {
    let (cluster, app) = shop().await?;
    app.run("BEGIN; SELECT name FROM item AS peeked; ROLLBACK")
        .await?;
    let seen = cluster.the_activity("query LIKE '%AS peeked'").await?;
    assert_eq!(
        (&seen["outcome"], &seen["rows"]),
        (&json!("succeeded"), &json!(20))
    );
    Ok(())
}

#[tokio::test]
async fn a_rolled_back_write_is_recorded_and_undone() -> Result {
    let (cluster, app) = shop().await?;
    app.run("BEGIN; DELETE FROM item WHERE id > 5; ROLLBACK")
        .await?;
    assert_eq!(app.number("SELECT count(*) FROM item").await?, 20);
    let seen = cluster
        .the_activity("query LIKE 'DELETE FROM item WHERE id > $1'")
        .await?;
    assert_eq!(seen["rows"], 15);
    Ok(())
}

#[tokio::test]
async fn a_read_only_transaction_is_recorded() -> Result {
    let (cluster, app) = shop().await?;
    app.run("BEGIN READ ONLY; SELECT name FROM item AS looked; COMMIT")
        .await?;
    cluster.the_activity("query LIKE '%AS looked'").await?;
    Ok(())
}

#[tokio::test]
async fn a_statement_in_a_rolled_back_savepoint_is_recorded() -> Result {
    let (cluster, app) = shop().await?;
    app.run(
        "BEGIN; SAVEPOINT s; UPDATE item SET name = 'x' WHERE id = 1; ROLLBACK TO s;
         SELECT 1 AS after_savepoint; COMMIT",
    )
    .await?;
    cluster
        .the_activity("query LIKE 'UPDATE item SET name%'")
        .await?;
    cluster
        .the_activity("query LIKE '%after_savepoint'")
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_cursor_is_recorded_once_with_the_rows_that_were_fetched() -> Result {
    let (cluster, app) = shop().await?;
    app.run(
        "BEGIN; DECLARE c CURSOR FOR SELECT name FROM item AS by_cursor;
         FETCH 3 FROM c; FETCH 4 FROM c; CLOSE c; COMMIT",
    )
    .await?;
    let seen = cluster
        .activity("query LIKE '%AS by_cursor%' AND command = 'SELECT'")
        .await?;
    assert_eq!(seen.len(), 1, "{seen:#?}");
    assert_eq!(seen[0]["rows"], 7);
    Ok(())
}

#[tokio::test]
async fn a_prepared_statement_is_recorded_at_each_execution() -> Result {
    let (cluster, app) = shop().await?;
    let statement = app
        .prepare("SELECT name AS extended FROM item WHERE id = $1")
        .await?;
    for id in 1..=8 {
        assert_eq!(app.query(&statement, &[&id]).await?.len(), 1);
    }
    let seen = cluster
        .activity("query LIKE 'SELECT name AS extended%'")
        .await?;
    assert_eq!(seen.len(), 8);
    assert!(seen.iter().all(|a| a["rows"] == 1), "{seen:#?}");
    Ok(())
}

#[tokio::test]
async fn no_literal_and_no_parameter_reaches_the_ledger() -> Result {
    let (cluster, app) = shop().await?;
    app.run("SELECT 'hush-1' AS quiet, $$hush-2$$, E'hush\\x2d3', U&'hush-4', 424242")
        .await?;
    app.run("SELECT 1 AS quiet /* hush-5 */ -- hush-6").await?;
    app.query("SELECT $1::text AS quiet", &[&"hush-7"]).await?;
    app.run("CREATE ROLE nobody_likes PASSWORD 'hush-8'")
        .await
        .ok();
    app.run("ALTER ROLE app PASSWORD 'hush-9'").await.ok();
    cluster.drained().await?;
    let su = cluster.superuser().await?;
    let leaks = su
        .rows(
            "SELECT e.seq, encode(e.payload, 'escape') FROM warden.event e
             WHERE encode(e.payload, 'escape') ~ 'hush.[1-9]|424242'",
        )
        .await?;
    assert!(leaks.is_empty(), "{leaks:#?}");
    for file in std::fs::read_dir(cluster.data().join("pg_warden"))? {
        let path = file?.path();
        if path.is_file() {
            let bytes = std::fs::read(&path)?;
            let found = bytes.windows(5).any(|w| w == b"hush-" || w == b"hush\\");
            assert!(!found, "a literal is in {}", path.display());
        }
    }
    Ok(())
}

#[tokio::test]
async fn explain_is_recorded_and_runs_nothing() -> Result {
    let (cluster, app) = shop().await?;
    app.run("EXPLAIN SELECT name FROM item AS explained")
        .await?;
    app.run("EXPLAIN ANALYZE SELECT name FROM item AS analysed")
        .await?;
    let seen = cluster.activity("command = 'EXPLAIN'").await?;
    assert_eq!(seen.len(), 2, "{seen:#?}");
    // What EXPLAIN ANALYZE runs is recorded under it.
    let run = cluster
        .the_activity("nested AND command = 'SELECT'")
        .await?;
    assert_eq!(run["parent_position"], seen[1]["position"]);
    assert_eq!(columns(&run, "select"), ["public.item.name"]);
    Ok(())
}

#[tokio::test]
async fn a_parallel_query_is_recorded_once() -> Result {
    let (cluster, app) = shop().await?;
    app.run(
        "CREATE TABLE wide AS SELECT g AS n FROM generate_series(1, 200000) g;
         ANALYZE wide",
    )
    .await?;
    app.run(
        "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0;
         SET min_parallel_table_scan_size = 0; SET max_parallel_workers_per_gather = 2",
    )
    .await?;
    let plan = app
        .column("EXPLAIN SELECT count(*) FROM wide AS crowd")
        .await?
        .join("\n");
    assert!(plan.contains("Gather"), "{plan}");
    app.run("SELECT count(*) FROM wide AS crowd").await?;
    let seen = cluster
        .activity("query LIKE 'SELECT count(*) FROM wide%'")
        .await?;
    assert_eq!(seen.len(), 1, "{seen:#?}");
    Ok(())
}

#[tokio::test]
async fn the_view_is_newest_first_with_one_row_a_statement() -> Result {
    let (cluster, app) = shop().await?;
    for n in 0..5 {
        app.run(&format!("SELECT {n} AS ordered_{n}")).await?;
    }
    cluster.drained().await?;
    let auditor = cluster.connect("auditor", "postgres").await?;
    let seen = auditor
        .column("SELECT query FROM warden.activity WHERE query LIKE '%AS ordered\\__'")
        .await?;
    let expected: Vec<_> = (0..5)
        .rev()
        .map(|n| format!("SELECT $1 AS ordered_{n}"))
        .collect();
    assert_eq!(seen, expected);
    Ok(())
}

#[tokio::test]
async fn a_statement_that_is_toasted_is_found_again() -> Result {
    let (cluster, app) = shop().await?;
    // Names are kept as they are written; digests of numbers do not compress well.
    let names = "SELECT string_agg('1 AS c_' || md5(n::text), ', ') FROM generate_series(1, 400) n";
    let long = format!("SELECT {}", app.value(names).await?);
    app.run(&long).await?;
    app.run(&long).await?;
    let seen = cluster.activity("length(query) > 10000").await?;
    assert_eq!(seen.len(), 2);
    let su = cluster.superuser().await?;
    su.run("SET enable_seqscan = off; SET enable_bitmapscan = off")
        .await?;
    let by_index = "SELECT count(*) FROM warden.statement WHERE id > 0 AND length(text) > 10000";
    assert_eq!(su.number(by_index).await?, 1);
    cluster.assert_verifies().await
}

#[tokio::test]
async fn parallel_workers_run_no_statements_of_their_own() -> Result {
    let (cluster, app) = shop().await?;
    app.run(
        "CREATE FUNCTION peek(q text) RETURNS text LANGUAGE plpgsql STABLE PARALLEL SAFE AS
             $$ DECLARE r text; BEGIN EXECUTE q INTO r; RETURN r; END $$",
    )
    .await?;
    // It has another name since 16.
    app.run(
        "SELECT set_config(name, 'on', false) FROM pg_settings
         WHERE name IN ('force_parallel_mode', 'debug_parallel_query')",
    )
    .await?;
    let peek = "SELECT peek('SELECT name AS peeked FROM item LIMIT 1')";
    app.run(peek).await?;
    let inner = cluster
        .the_activity("query LIKE '%AS peeked%' AND nested")
        .await?;
    assert_eq!(inner["login_role"], "app");
    for (sql, parallel) in [(peek, false), ("SELECT count(*) FROM item", true)] {
        let plan = app.column(&format!("EXPLAIN {sql}")).await?.concat();
        assert_eq!(plan.contains("Gather"), parallel, "{sql}: {plan}");
    }
    Ok(())
}
