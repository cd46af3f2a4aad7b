//! Function calls by the protocol's own message: recorded, masked and ruled as statements are.

use serde_json::{Value, json};
use warden_tests::{Cluster, Raw, Result};

/// A cluster, its administrator, and a session of `app` that sends messages.
async fn cluster() -> Result<(Cluster, warden_tests::Client, Raw)> {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(
        "CREATE TABLE person (id int PRIMARY KEY, email text);
         INSERT INTO person VALUES (1, 'ana@example.com');
         GRANT ALL ON person TO app;
         CREATE FUNCTION email_of(n int) RETURNS text LANGUAGE sql AS
             'SELECT email AS inner_read FROM person WHERE id = n';
         CREATE FUNCTION careful() RETURNS int LANGUAGE plpgsql AS $$
             BEGIN
                 BEGIN INSERT INTO person VALUES (1, 'twice');
                 EXCEPTION WHEN unique_violation THEN RETURN 1;
                 END;
                 RETURN 0;
             END $$;
         CREATE FUNCTION fails() RETURNS int LANGUAGE sql AS 'SELECT 1 / (id - id) FROM person';
         CREATE FUNCTION raises() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
         CREATE FUNCTION closed() RETURNS int LANGUAGE sql AS 'SELECT 1';
         REVOKE ALL ON FUNCTION closed() FROM PUBLIC",
    )
    .await?;
    let raw = Raw::connect(&cluster, "app", "postgres")?;
    Ok((cluster, dba, raw))
}

async fn oid(client: &warden_tests::Client, function: &str) -> Result<u32> {
    let sql = format!("SELECT '{function}'::regprocedure::oid");
    Ok(client.number(&sql).await?.try_into()?)
}

/// Name, outcome and SQLSTATE of each call, in order.
fn brief(calls: &[Value]) -> Vec<(&str, &str, &str)> {
    let text = |v: &'static str, c: &'_ Value| c[v].as_str().unwrap_or("").to_owned();
    calls
        .iter()
        .map(|c| {
            let [q, o, s] = ["query", "outcome", "sqlstate"].map(|v| text(v, c).leak() as &str);
            (q, o, s)
        })
        .collect()
}

#[tokio::test]
async fn large_objects_of_libpq_are_recorded_call_by_call() -> Result {
    let cluster = Cluster::with_warden().await?;
    let file = cluster.data().join("an_object");
    std::fs::write(&file, "some bytes")?;
    let name = file.display();
    cluster.psql(
        "postgres",
        "postgres",
        &format!("\\lo_import '{name}'\nBEGIN;\n\\lo_unlink 1\nROLLBACK;\nSELECT 1 AS after_it;\n"),
    )?;
    let calls = cluster.activity("command = 'FUNCTION CALL'").await?;
    let seen = brief(&calls);
    let done = |name| (name, "succeeded", "");
    assert_eq!(seen[0], done("pg_catalog.lo_creat"));
    assert!(seen.contains(&done("pg_catalog.lowrite")), "{seen:?}");
    let unlink = ("pg_catalog.lo_unlink", "failed", "42704");
    assert_eq!(seen.last(), Some(&unlink), "{seen:?}");
    assert_eq!(calls[0]["committed"], true);
    // Nothing else is blamed for the call's failure.
    assert_eq!(cluster.activity("command = 'UNKNOWN'").await?.len(), 0);
    let after = cluster.the_activity("query LIKE '%after_it'").await?;
    assert_eq!(after["nested"], false);
    Ok(())
}

#[tokio::test]
async fn each_call_has_its_own_outcome() -> Result {
    let (cluster, dba, mut raw) = cluster().await?;
    let email_of = oid(&dba, "email_of(int)").await?;
    let careful = oid(&dba, "careful()").await?;
    let fails = oid(&dba, "fails()").await?;
    let closed = oid(&dba, "closed()").await?;
    let one = 1i32.to_be_bytes();
    raw.query("SELECT 1 AS before_all")?;
    assert_eq!(raw.call(email_of, &[&one])?, ["called"]);
    raw.query("BEGIN")?;
    assert_eq!(raw.call(careful, &[])?, ["called"]);
    raw.query("SAVEPOINT s")?;
    assert_eq!(raw.call(fails, &[])?, ["error 22012"]);
    assert_eq!(raw.call(email_of, &[&one])?, ["error 25P02"]);
    raw.query("ROLLBACK TO s")?;
    raw.query("COMMIT")?;
    assert_eq!(raw.call(closed, &[])?, ["error 42501"]);
    assert_eq!(raw.call(4_000_000_000, &[])?, ["error 42883"]);
    assert_eq!(raw.call(email_of, &[b"x"])?, ["error 08P01"]);
    raw.query("SELECT 1 AS after_all")?;

    let calls = cluster.activity("command = 'FUNCTION CALL'").await?;
    assert_eq!(
        brief(&calls),
        [
            ("public.email_of", "succeeded", ""),
            ("public.careful", "succeeded", ""),
            ("public.fails", "failed", "22012"),
            // What PostgreSQL refuses to look up has no name.
            ("", "failed", "25P02"),
            ("", "failed", "42501"),
            ("", "failed", "42883"),
            ("public.email_of", "failed", "08P01"),
        ]
    );
    assert!(calls.iter().all(|c| c["nested"] == false), "{calls:#?}");
    let inner = cluster
        .the_activity("query LIKE '%inner_read%' AND command = 'SELECT'")
        .await?;
    assert_eq!(inner["parent_position"], calls[0]["position"]);
    assert_eq!(inner["relations"], json!(["public.person"]));
    // Nothing was invented.
    assert_eq!(cluster.activity("command = 'UNKNOWN'").await?.len(), 0);
    let around = cluster.activity("query LIKE '%_all'").await?;
    assert!(around.iter().all(|a| a["nested"] == false), "{around:#?}");
    Ok(())
}

#[tokio::test]
async fn a_call_that_is_killed_is_interrupted_with_its_sqlstate() -> Result {
    let (cluster, dba, mut raw) = cluster().await?;
    let sleep = oid(&dba, "pg_sleep(float8)").await?;
    let body = [&sleep.to_be_bytes()[..], &[0, 1, 0, 1, 0, 1, 0, 0, 0, 8]].concat();
    raw.send(b'F', &[&body[..], &1e6f64.to_be_bytes(), &[0, 1]].concat())?;
    let state = format!(
        "SELECT wait_event FROM pg_stat_activity WHERE pid = {}",
        raw.pid()
    );
    cluster
        .wait_until("it sleeps", async || {
            Ok(dba.value(&state).await? == "PgSleep")
        })
        .await?;
    dba.run(&format!(
        "SELECT pg_terminate_backend({}, 10000)",
        raw.pid()
    ))
    .await?;
    let seen = cluster
        .the_activity("query = 'pg_catalog.pg_sleep'")
        .await?;
    assert_eq!(
        (&seen["outcome"], &seen["sqlstate"]),
        (&json!("interrupted"), &json!("57P01"))
    );
    Ok(())
}

#[tokio::test]
async fn masks_hold_for_called_functions() -> Result {
    let (cluster, dba, mut raw) = cluster().await?;
    dba.run("SELECT warden.mask('person', 'email', 'warden.partial_email')")
        .await?;
    let email_of = oid(&dba, "email_of(int)").await?;
    let one = 1i32.to_be_bytes();
    let mut body = email_of.to_be_bytes().to_vec();
    body.extend([0, 1, 0, 1, 0, 1, 0, 0, 0, 4]);
    raw.send(b'F', &[&body[..], &one, &[0, 1]].concat())?;
    let (mut shown, mut kind) = (Vec::new(), 0);
    while kind != b'Z' {
        let message = raw.read()?;
        kind = message.0;
        if kind == b'V' {
            shown = message.1[4..].to_vec();
        }
    }
    let shown = String::from_utf8(shown)?;
    assert!(shown.starts_with('a') && !shown.contains("ana@"), "{shown}");
    let inner = cluster
        .the_activity("query LIKE '%inner_read%' AND command = 'SELECT'")
        .await?;
    assert_eq!(inner["masked_columns"], json!(["public.person.email"]));
    Ok(())
}

#[tokio::test]
async fn rules_hold_for_calls() -> Result {
    let (cluster, dba, mut raw) = cluster().await?;
    let careful = oid(&dba, "careful()").await?;
    let set_config = oid(&dba, "set_config(text, text, bool)").await?;
    let arguments: [&[u8]; 3] = [b"application_name", b"renamed", &[0]];
    // Its arguments cannot be seen: it might switch triggers off.
    assert_eq!(raw.call(set_config, &arguments)?, ["error WA001"]);
    let mut admin = Raw::connect(&cluster, "dba", "postgres")?;
    assert_eq!(admin.call(set_config, &arguments)?, ["called"]);
    assert_eq!(raw.call(careful, &[])?, ["called"]);
    dba.run("SELECT warden.add_rule('no_calls', '{FUNCTION CALL}')")
        .await?;
    assert_eq!(raw.call(careful, &[])?, ["error WA001"]);
    let blocked = cluster.activity("outcome = 'blocked'").await?;
    let rules: Vec<_> = blocked.iter().map(|b| (&b["query"], &b["rule"])).collect();
    assert_eq!(
        rules,
        [
            (
                &json!("pg_catalog.set_config"),
                &json!("no_disable_trigger")
            ),
            (&json!("public.careful"), &json!("no_calls"))
        ]
    );
    Ok(())
}

#[tokio::test]
async fn an_exclusion_leaves_out_calls_but_not_their_failures() -> Result {
    let (cluster, dba, mut raw) = cluster().await?;
    let careful = oid(&dba, "careful()").await?;
    let raises = oid(&dba, "raises()").await?;
    let logout = oid(&dba, "warden.logout()").await?;
    dba.run("SELECT warden.exclude('calls', '{FUNCTION}', '{}', '{app}')")
        .await?;
    raw.call(careful, &[])?;
    raw.call(raises, &[])?;
    raw.call(logout, &[])?;
    let calls = cluster.activity("command = 'FUNCTION CALL'").await?;
    let seen = brief(&calls);
    assert_eq!(
        seen,
        [
            ("public.raises", "failed", "P0001"),
            // What is ours is never left out.
            ("warden.logout", "succeeded", ""),
        ]
    );
    Ok(())
}
