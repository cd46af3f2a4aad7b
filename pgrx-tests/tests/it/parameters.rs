//! What is recorded of literals and bind parameters, under each `warden.record_parameters`.

use serde_json::{Value, json};
use warden_tests::{Client, Cluster, Config, Mode, Result};

async fn cluster(setting: &str) -> Result<(Cluster, Client)> {
    let line = format!("warden.record_parameters = {setting}");
    let cluster = Cluster::with_extension(Config::new(Mode::Preloaded).line(&line)).await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run(
        "CREATE TABLE person (id int PRIMARY KEY, name text, ssn text);
         INSERT INTO person VALUES (1, 'Ana', '123-45-6789')",
    )
    .await?;
    Ok((cluster, app))
}

/// The values of the one statement whose text is like this.
async fn values(cluster: &Cluster, like: &str) -> Result<Value> {
    let seen = cluster
        .the_activity(&format!("query LIKE '{like}' AND NOT nested"))
        .await?;
    Ok(seen["parameters"].clone())
}

#[tokio::test]
async fn nothing_is_recorded_under_none() -> Result {
    let (cluster, app) = cluster("none").await?;
    app.query("SELECT $1::text AS silent, 'lit'", &[&"value"])
        .await?;
    assert_eq!(values(&cluster, "%AS silent%").await?, json!([]));
    Ok(())
}

#[tokio::test]
async fn digests_are_the_default_and_the_same_for_equal_values() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SELECT 'same' AS d_one, 42").await?;
    app.query("SELECT $1::text AS d_two, $2::int", &[&"same", &42])
        .await?;
    app.run("SELECT 'other' AS d_three, 43").await?;
    let one = values(&cluster, "%AS d\\_one%").await?;
    let two = values(&cluster, "%AS d\\_two%").await?;
    let three = values(&cluster, "%AS d\\_three%").await?;
    assert!(
        one[0]
            .as_str()
            .unwrap_or_default()
            .starts_with("$1 = digest "),
        "{one}"
    );
    assert_eq!(one, two);
    assert_ne!(one[0], three[0]);
    assert_ne!(one[1], three[1]);
    let text = one.to_string();
    assert!(!text.contains("same") && !text.contains("42\""), "{text}");
    Ok(())
}

#[tokio::test]
async fn an_auditor_who_knows_a_value_finds_its_statements() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SELECT 'needle' AS hay").await?;
    app.run("SELECT 'straw' AS hay").await?;
    cluster.drained().await?;
    let auditor = cluster.connect("auditor", "postgres").await?;
    let found = auditor
        .column(
            "SELECT query FROM warden.activity
             WHERE '$1 = digest ' || warden.value_digest('needle') = ANY (parameters)",
        )
        .await?;
    assert_eq!(found, ["SELECT $1 AS hay"]);
    assert_eq!(
        app.sqlstate("SELECT warden.value_digest('needle')").await?,
        "42501"
    );
    Ok(())
}

#[tokio::test]
async fn values_of_all_kinds_are_recorded_under_all() -> Result {
    let (cluster, app) = cluster("all").await?;
    app.run(
        "SELECT 'it''s' AS kinds, -5, 1.50, E'a\\tb', $q$body$q$, U&'\\0061b', B'01', 'a'\n'b'",
    )
    .await?;
    assert_eq!(
        values(&cluster, "%AS kinds%").await?,
        json!([
            "$1 = 'it''s'",
            "$2 = '-5'",
            "$3 = '1.50'",
            "$4 = 'a\tb'",
            "$5 = 'body'",
            "$6 = 'ab'",
            "$7 = 'B''01'''",
            "$8 = 'ab'"
        ])
    );
    app.query(
        "SELECT $1::text AS bound, $2::int8, $3::bool, $4::float8, $5::text, $6::int4[], 'lit'",
        &[
            &"text",
            &-7i64,
            &true,
            &1.5f64,
            &None::<&str>,
            &vec![1i32, 2],
        ],
    )
    .await?;
    assert_eq!(
        values(&cluster, "%AS bound%").await?,
        json!([
            "$1 = 'text'",
            "$2 = '-7'",
            "$3 = 't'",
            "$4 = '1.5'",
            "$5 = NULL",
            "$6 = '{1,2}'",
            "$7 = 'lit'"
        ])
    );
    Ok(())
}

#[tokio::test]
async fn every_built_in_type_is_shown_as_the_server_prints_it() -> Result {
    let (cluster, app) = cluster("all").await?;
    app.run("CREATE TYPE mood AS ENUM ('glad', 'sad')").await?;
    app.run(
        "PREPARE typed (numeric, date, timestamptz, interval, uuid, name, jsonb, inet, oid, int2,
                        bytea, mood, point) AS
         SELECT $1 AS typed, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13;
         EXECUTE typed (12.340, '2026-01-02', '2026-01-02 03:04:05+00', '1 day 2 hours',
                        'b3b1f1d0-6f1e-4b8a-9a55-0c6a5b1e2f3d', 'nom', '{\"a\": 1}', '10.0.0.1/8', 7, 3,
                        '\\xdead', 'sad', '(1,2)')",
    )
    .await?;
    let seen = cluster
        .the_activity("query LIKE 'PREPARE%' AND command = 'SELECT'")
        .await?;
    assert_eq!(
        seen["parameters"],
        json!([
            "$1 = '12.340'",
            "$2 = '2026-01-02'",
            "$3 = '2026-01-02 03:04:05+00'",
            "$4 = '1 day 02:00:00'",
            "$5 = 'b3b1f1d0-6f1e-4b8a-9a55-0c6a5b1e2f3d'",
            "$6 = 'nom'",
            "$7 = '{\"a\": 1}'",
            "$8 = '10.0.0.1/8'",
            "$9 = '7'",
            "$10 = '3'",
            "$11 = 2 bytes of bytea",
            "$12 = 4 bytes of mood",
            "$13 = 16 bytes of point"
        ])
    );
    Ok(())
}

#[tokio::test]
async fn safe_keeps_values_but_not_those_of_masked_columns() -> Result {
    let (cluster, app) = cluster("safe").await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("SELECT warden.mask('person', 'ssn', 'warden.redact')")
        .await?;
    app.run("SELECT name AS plain FROM person WHERE id = 1")
        .await?;
    assert_eq!(values(&cluster, "%AS plain%").await?, json!(["$1 = '1'"]));
    app.run(
        "CREATE FUNCTION lookup(text) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END $$",
    )
    .await?;
    for (sql, like) in [
        (
            "SELECT name AS probed FROM person WHERE ssn = '123-45-6789'",
            "%AS probed%",
        ),
        (
            "SELECT (p).ssn = '123-45-6789' AS whole FROM person p",
            "%AS whole%",
        ),
        (
            "INSERT INTO person VALUES (2, 'Bob', '123-45-6789') RETURNING 1 AS inserted",
            "%AS inserted%",
        ),
        (
            "UPDATE person SET ssn = '123-45-6789' WHERE id = 1 RETURNING 1 AS updated",
            "%AS updated%",
        ),
        (
            "WITH x AS (SELECT ssn FROM person) SELECT 1 AS nested_use FROM x WHERE ssn = '123-45-6789'",
            "%AS nested\\_use%",
        ),
        ("SELECT lookup('123-45-6789') AS handed", "%AS handed%"),
    ] {
        app.run(sql).await?;
        let got = values(&cluster, like).await?;
        let got = got.as_array().cloned().unwrap_or_default();
        assert!(!got.is_empty(), "{sql}");
        for v in &got {
            assert!(v.to_string().contains(" = digest "), "{sql}: {v}");
        }
    }
    app.run(
        "PREPARE later (text) AS SELECT name AS by_execute FROM person WHERE ssn = $1;
             EXECUTE later ('123-45-6789')",
    )
    .await?;
    let su = cluster.superuser().await?;
    cluster.drained().await?;
    assert_eq!(
        su.number(
            "SELECT count(*) FROM warden.activity
             WHERE at > (SELECT max(at) FROM warden.activity WHERE query LIKE 'SELECT warden.mask(%')
               AND parameters::text LIKE '%6789%'"
        )
        .await?,
        0
    );
    Ok(())
}

#[tokio::test]
async fn safe_knows_cards_and_addresses_and_lengths() -> Result {
    let (cluster, app) = cluster("safe").await?;
    app.run("SELECT '4111 1111 1111 1111' AS found, 'ana@example.com', 4111111111111111, 'Ana'")
        .await?;
    let got = values(&cluster, "%AS found%").await?;
    for i in 0..3 {
        assert!(got[i].to_string().contains("digest"), "{got}");
    }
    assert_eq!(got[3], "$4 = 'Ana'");
    app.run(&format!("SELECT '{}' AS long", "x ".repeat(300)))
        .await?;
    let got = values(&cluster, "%AS long%").await?;
    assert!(got[0].to_string().contains(" of 600 bytes"), "{got}");
    Ok(())
}

#[tokio::test]
async fn what_is_recorded_of_one_statement_is_bounded() -> Result {
    let (cluster, app) = cluster("all").await?;
    let many: Vec<String> = (0..5000).map(|n| format!("'value {n}'")).collect();
    app.run(&format!(
        "SELECT 1 AS many WHERE 'x' IN ({})",
        many.join(",")
    ))
    .await?;
    let got = values(&cluster, "%AS many%").await?;
    let got = got.as_array().cloned().unwrap_or_default();
    assert!(got.len() < 200, "{}", got.len());
    let more = got.last().map(Value::to_string).unwrap_or_default();
    assert_eq!(more, format!("\"and {} more\"", 5002 - (got.len() - 1)));
    let su = cluster.superuser().await?;
    let longest = su
        .number("SELECT max(length(payload)) FROM warden.event WHERE kind = 3")
        .await?;
    assert!(longest < 4096, "{longest}");
    Ok(())
}

#[tokio::test]
async fn values_survive_a_statement_that_never_ends() -> Result {
    let (mut cluster, app) = cluster("all").await?;
    let pid = app.number("SELECT pg_backend_pid()").await?;
    let sleeper = tokio::spawn(async move {
        // Ends with the server.
        drop(
            app.run("SELECT pg_sleep(1000), 'last words' AS never")
                .await,
        );
    });
    let su = cluster.superuser().await?;
    cluster
        .wait_until("the statement is open in the ledger", async || {
            Ok(su
                .number(&format!(
                    "SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
                ))
                .await?
                == 1)
        })
        .await?;
    cluster.drained().await?;
    drop(su);
    cluster.crash().await?;
    cluster.up().await?;
    sleeper.await?;
    let seen = cluster.the_activity("query LIKE '%AS never%'").await?;
    assert_eq!(seen["outcome"], "interrupted");
    assert_eq!(
        seen["parameters"],
        json!(["$1 = '1000'", "$2 = 'last words'"])
    );
    cluster.assert_verifies().await?;
    Ok(())
}

#[tokio::test]
async fn variables_of_functions_are_not_looked_at() -> Result {
    let (cluster, app) = cluster("all").await?;
    app.run(
        "CREATE FUNCTION inner_values(v text) RETURNS int LANGUAGE plpgsql AS $$
         DECLARE r record;
         BEGIN
           SELECT id INTO r FROM person AS inner_p WHERE name = v AND ssn <> 'const';
           EXECUTE 'SELECT 1 AS dynamic WHERE $1 = ''q''' USING v;
           RETURN r.id;
         END $$;
         SELECT inner_values('Ana') AS outer_p",
    )
    .await?;
    let inner = cluster
        .the_activity("query LIKE '%AS inner\\_p%' AND nested")
        .await?;
    assert_eq!(inner["parameters"], json!(["$1 = 'const'"]), "{inner}");
    let dynamic = cluster
        .the_activity("query LIKE '%AS dynamic%' AND nested")
        .await?;
    assert_eq!(
        dynamic["parameters"],
        json!(["$1 = 'Ana'", "$2 = '1'", "$3 = 'q'"]),
        "{dynamic}"
    );
    Ok(())
}

#[tokio::test]
async fn a_huge_statement_is_cut_and_its_length_and_digest_are_kept() -> Result {
    let (cluster, app) = cluster("all").await?;
    let huge = "x".repeat(100 << 20);
    app.run(&format!("SELECT length('{huge}') AS hundred_megabytes"))
        .await?;
    let seen = cluster
        .the_activity("query LIKE '%hundred_megabytes'")
        .await?;
    assert_eq!(
        seen["parameters"],
        json!([format!("$1 = {} bytes of text", (100 << 20) + 2)])
    );
    app.query("SELECT length($1) AS bound_megabytes", &[&huge])
        .await?;
    let seen = cluster
        .the_activity("query LIKE '%bound_megabytes'")
        .await?;
    assert_eq!(
        seen["parameters"],
        json!([format!("$1 = {} bytes of text", 100 << 20)])
    );
    drop(huge);

    // Names are kept: 5 MB of them are cut.
    let names: Vec<String> = (0..1000)
        .map(|n| format!("1 AS \"column_{n}_{}\"", "n".repeat(5000)))
        .collect();
    app.run(&format!("SELECT {}", names.join(", "))).await?;
    let seen = cluster.the_activity("query LIKE '%column\\_0\\_%'").await?;
    assert!(
        seen["query_length"].as_i64() > Some(5_000_000),
        "{}",
        seen["query_length"]
    );
    assert_eq!(seen["query"].as_str().map(str::len), Some(64 * 1024));
    assert_eq!(seen["query_digest"].as_str().map(str::len), Some(66));
    assert_eq!(
        seen["parameters"],
        json!(["withheld"]),
        "a text that was cut is not searched"
    );
    cluster.assert_verifies().await?;
    Ok(())
}

#[tokio::test]
async fn thousands_of_relations_fit_into_the_journal() -> Result {
    let (cluster, app) = cluster("none").await?;
    let columns: Vec<String> = (0..1000)
        .map(|n| format!("column_{n}_{} int", "n".repeat(50)))
        .collect();
    app.run(&format!("CREATE TABLE wide ({})", columns.join(", ")))
        .await?;
    let mut sql = String::new();
    for n in 0..30 {
        sql.push_str(&format!("CREATE TABLE wide_{n} () INHERITS (wide);"));
    }
    app.run(&sql).await?;
    let all: Vec<String> = (0..30)
        .map(|n| format!("SELECT count(w) FROM wide_{n} w"))
        .collect();
    // Two megabytes of columns: the statement must neither wait nor fail.
    app.run(&format!("{} /* x */", all.join(" UNION ALL ")))
        .await?;
    let seen = cluster
        .the_activity("query LIKE 'SELECT count(w) FROM wide\\_0%'")
        .await?;
    assert_eq!(seen["outcome"], "succeeded");
    assert_eq!(seen["relations"].as_array().map(Vec::len), Some(30));
    cluster.assert_verifies().await?;
    Ok(())
}

#[tokio::test]
async fn no_session_changes_what_is_recorded() -> Result {
    let (cluster, app) = cluster("digest").await?;
    let su = cluster.superuser().await?;
    for client in [&app, &su] {
        assert_eq!(
            client
                .sqlstate("SET warden.record_parameters = 'none'")
                .await?,
            "55P02"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_row_of_any_length_is_found_by_its_number() -> Result {
    let (cluster, app) = cluster("none").await?;
    let names: Vec<String> = (0..200)
        .map(|n| format!("1 AS \"column number {n}\""))
        .collect();
    app.run(&format!("SELECT {}", names.join(", "))).await?;
    let id = cluster
        .the_activity("query LIKE '%column number 150%'")
        .await?["seq"]
        .clone();
    let su = cluster.superuser().await?;
    su.run("SET enable_seqscan = off").await?;
    let text = su
        .value(&format!(
            "SELECT text FROM warden.statement WHERE id =
               (SELECT statement FROM warden.event WHERE seq = {id})"
        ))
        .await?;
    assert!(text.contains("column number 150"), "{text}");
    cluster.assert_verifies().await?;
    Ok(())
}
