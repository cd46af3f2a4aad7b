//! Who reads a mask, wherever the column is used.

use serde_json::json;
use warden_tests::jwt::{self, Signer};
use warden_tests::{Client, Cluster, Result};

const EMAIL: &str = "ana.novak@example.com";

/// A cluster whose customers have masked e-mail addresses; sessions of `dba` and `app`.
async fn masked() -> Result<(Cluster, Client, Client)> {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(&format!(
        "CREATE TABLE customer (id int PRIMARY KEY, name text, email text, phone text, born date);
         INSERT INTO customer VALUES (1, 'Ana', '{EMAIL}', '+49 30 1234567', '1980-05-17'),
                                     (2, 'Bo', 'bo@example.org', '+46 8 7654321', '1991-11-02');
         GRANT SELECT, INSERT, UPDATE, DELETE ON customer TO app;
         CREATE TABLE copied (email text); GRANT ALL ON copied TO app;
         CREATE VIEW contact AS SELECT id, email FROM customer; GRANT SELECT ON contact TO app"
    ))
    .await?;
    dba.run("SELECT warden.mask('customer', 'email', 'warden.partial_email')")
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    Ok((cluster, dba, app))
}

/// Every way to read the column that a client has. Each must give the mask, and never the value.
const READS: &[&str] = &[
    "SELECT email FROM customer WHERE id = 1",
    "SELECT c.email FROM customer c WHERE c.id = 1",
    "SELECT c FROM customer c WHERE c.id = 1",
    "SELECT c.* FROM customer c WHERE c.id = 1",
    "SELECT (c).email FROM customer c WHERE c.id = 1",
    "SELECT to_jsonb(c) FROM customer c WHERE c.id = 1",
    "SELECT row_to_json(c) ->> 'email' FROM customer c WHERE c.id = 1",
    "SELECT upper(upper(lower(email))) FROM customer WHERE id = 1",
    "SELECT 'x' || email FROM customer WHERE id = 1",
    "SELECT max(email) FROM customer WHERE id = 1",
    "SELECT string_agg(email, ',') FROM customer WHERE id = 1",
    "SELECT email FROM contact WHERE id = 1",
    "SELECT x.email FROM (SELECT * FROM customer) x WHERE x.id = 1",
    "WITH x AS (SELECT * FROM customer) SELECT email FROM x WHERE id = 1",
    "WITH x AS MATERIALIZED (SELECT * FROM customer) SELECT email FROM x WHERE id = 1",
    "SELECT (SELECT email FROM customer WHERE id = 1)",
    "SELECT email FROM customer WHERE id = 1 FOR UPDATE",
    "SELECT email FROM ONLY customer WHERE id = 1",
    "SELECT l.email FROM (VALUES (1)) v (i) LEFT JOIN customer l ON l.id = v.i",
    "SELECT a.email FROM customer a JOIN customer b USING (id) WHERE id = 1",
    "SELECT email FROM customer WHERE id = 1 UNION SELECT 'nothing'",
    "SELECT x FROM customer, LATERAL (SELECT email AS x) l WHERE id = 1",
    "UPDATE customer SET name = name WHERE id = 1 RETURNING email",
    "DELETE FROM customer WHERE id = 1 RETURNING email",
    "UPDATE customer SET phone = email WHERE id = 1 RETURNING phone",
    "INSERT INTO copied SELECT email FROM customer WHERE id = 1 RETURNING email",
    "INSERT INTO customer (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET name = 'x' RETURNING email",
    "SELECT email FROM customer TABLESAMPLE SYSTEM (100) WHERE id = 1",
    "SELECT array_agg(email) FROM customer WHERE id = 1",
    "SELECT query_to_xml('SELECT email FROM customer WHERE id = 1', true, false, '')",
    "SELECT first_value(email) OVER (ORDER BY id) FROM customer WHERE id = 1",
    "TABLE customer",
];

#[tokio::test]
async fn every_way_to_read_the_column_gives_the_mask() -> Result {
    let (_cluster, _dba, app) = masked().await?;
    let mask = app
        .value(&format!("SELECT warden.partial_email('{EMAIL}')"))
        .await?;
    assert_ne!(mask, EMAIL);
    for sql in READS {
        app.run("BEGIN").await?;
        // A way that is refused is as good as one that is masked.
        let read = app.rows(sql).await;
        app.run("ROLLBACK").await?;
        let text = format!("{read:?}").to_lowercase();
        assert!(!text.contains("novak"), "{sql}: {text}");
        if let Ok(rows) = &read {
            assert!(!rows.is_empty(), "{sql}: nothing to see");
            // XML and JSON keep their own escapes; the mask is in all of them.
            assert!(text.contains(&mask.to_lowercase()), "{sql}: {text}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn probing_by_predicates_errors_and_joins_finds_nothing() -> Result {
    let (_cluster, _dba, app) = masked().await?;
    for sql in [
        format!("SELECT count(*) FROM customer WHERE email = '{EMAIL}'"),
        "SELECT count(*) FROM customer WHERE email LIKE 'ana.n%'".into(),
        format!("SELECT count(*) FROM customer c JOIN (VALUES ('{EMAIL}')) v (e) ON v.e = c.email"),
        format!("SELECT count(*) FROM customer WHERE email IN (SELECT '{EMAIL}')"),
        "SELECT count(*) FROM customer HAVING bool_or(email LIKE '%novak%')".into(),
        format!(
            "SELECT count(*) FROM (SELECT 1 FROM customer GROUP BY email HAVING email = '{EMAIL}') x"
        ),
    ] {
        let found = app.column(&sql).await?;
        assert!(found.is_empty() || found == ["0"], "{sql}: {found:?}");
    }
    let error = app
        .error("SELECT email::int FROM customer WHERE id = 1")
        .await?;
    assert!(!format!("{error:?}").contains("novak"), "{error:?}");
    Ok(())
}

#[tokio::test]
async fn updates_and_deletes_cannot_probe() -> Result {
    let (_cluster, dba, app) = masked().await?;
    for email in [EMAIL, "nobody@example.com"] {
        for sql in [
            format!("UPDATE customer SET name = 'found' WHERE email = '{email}'"),
            format!("DELETE FROM customer WHERE email = '{email}'"),
        ] {
            assert_eq!(app.sqlstate(&sql).await?, "WA001", "{sql}");
        }
    }
    assert_eq!(
        dba.number("SELECT count(*) FROM customer WHERE name = 'Ana'")
            .await?,
        1
    );
    Ok(())
}

#[tokio::test]
async fn copy_gives_the_mask() -> Result {
    let (cluster, _dba, _app) = masked().await?;
    for sql in [
        "COPY customer TO STDOUT",
        "COPY customer (id, email) TO STDOUT WITH (FORMAT csv, HEADER)",
        "COPY (SELECT email FROM customer) TO STDOUT",
        "COPY (TABLE customer) TO STDOUT",
    ] {
        let out = cluster.psql("app", "postgres", &format!("{sql};\n"))?;
        assert!(!out.contains("novak"), "{sql}: {out}");
        assert!(out.contains('@') && !out.contains("ERROR"), "{sql}: {out}");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_copied_under_a_mask_is_the_mask() -> Result {
    let (_cluster, dba, app) = masked().await?;
    app.run("INSERT INTO copied SELECT email FROM customer")
        .await?;
    app.run("CREATE TABLE kept AS SELECT * FROM customer")
        .await?;
    app.run("SELECT * INTO kept_too FROM customer").await?;
    for table in ["copied", "kept", "kept_too"] {
        let sql = format!("SELECT count(*) FROM {table} WHERE email LIKE '%novak%'");
        assert_eq!(dba.number(&sql).await?, 0, "{table}");
    }
    Ok(())
}

#[tokio::test]
async fn functions_cursors_and_prepared_statements_give_the_mask() -> Result {
    let (_cluster, dba, app) = masked().await?;
    app.run(
        "CREATE FUNCTION one() RETURNS text LANGUAGE sql STABLE
           AS 'SELECT email FROM customer WHERE id = 1';
         CREATE FUNCTION many() RETURNS SETOF customer LANGUAGE sql STABLE
           AS 'SELECT * FROM customer';
         CREATE FUNCTION by_plpgsql() RETURNS text LANGUAGE plpgsql
           AS 'BEGIN RETURN (SELECT email FROM customer WHERE id = 1); END';
         CREATE FUNCTION by_execute() RETURNS text LANGUAGE plpgsql AS
           $$ DECLARE r text; BEGIN EXECUTE 'SELECT email FROM customer' INTO r; RETURN r; END $$;
         PREPARE p AS SELECT email FROM customer WHERE id = 1",
    )
    .await?;
    for sql in [
        "SELECT one()",
        "SELECT email FROM many() WHERE id = 1",
        "SELECT by_plpgsql()",
        "SELECT by_execute()",
        "EXECUTE p",
    ] {
        // Often enough for a generic plan.
        for _ in 0..7 {
            let read = app.value(sql).await?;
            assert!(
                read.contains('@') && !read.contains("novak"),
                "{sql}: {read}"
            );
        }
    }
    let fetched = app
        .column("BEGIN; DECLARE c CURSOR FOR SELECT email FROM customer; FETCH ALL FROM c; COMMIT")
        .await?;
    assert!(
        fetched.len() == 2 && !fetched.join("").contains("novak"),
        "{fetched:?}"
    );
    // A function that runs with the rights of an exempt owner is that owner's.
    drop(dba);
    Ok(())
}

#[tokio::test]
async fn exempt_roles_and_their_members_read_what_is_stored() -> Result {
    let (cluster, dba, app) = masked().await?;
    dba.run("CREATE ROLE officers; CREATE ROLE officer LOGIN IN ROLE officers")
        .await?;
    dba.run("GRANT SELECT ON customer TO officers; SELECT warden.unmask_for('officers')")
        .await?;
    let officer = cluster.connect("officer", "postgres").await?;
    let sql = "SELECT email FROM customer WHERE id = 1";
    assert_eq!(officer.value(sql).await?, EMAIL);
    assert_ne!(app.value(sql).await?, EMAIL);
    dba.run("SELECT warden.remask_for('officers')").await?;
    assert_ne!(officer.value(sql).await?, EMAIL);
    Ok(())
}

#[tokio::test]
async fn a_cached_plan_follows_the_role_and_the_policy() -> Result {
    let (cluster, dba, _) = masked().await?;
    dba.run(
        "CREATE ROLE officers; GRANT SELECT ON customer TO officers;
         ALTER ROLE app NOINHERIT; GRANT officers TO app;
         SELECT warden.unmask_for('officers'); GRANT SELECT ON customer TO app",
    )
    .await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("PREPARE p AS SELECT email FROM customer WHERE id = 1")
        .await?;
    let masked = app.value("EXECUTE p").await?;
    dba.run("SELECT warden.unmask('customer', 'email')").await?;
    assert_eq!(app.value("EXECUTE p").await?, EMAIL);
    dba.run("SELECT warden.mask('customer', 'email', 'warden.partial_email')")
        .await?;
    assert_eq!(app.value("EXECUTE p").await?, masked);
    dba.run("SELECT warden.mask('customer', 'email', 'warden.redact')")
        .await?;
    assert_eq!(app.value("EXECUTE p").await?, "***");
    Ok(())
}

#[tokio::test]
async fn an_agent_is_masked_in_an_exempt_role() -> Result {
    let (cluster, dba, app) = masked().await?;
    dba.run("SELECT warden.unmask_for('app')").await?;
    let sql = "SELECT email FROM customer WHERE id = 1";
    assert_eq!(app.value(sql).await?, EMAIL);
    let signer = Signer::generate("HS256");
    dba.query(
        "SELECT warden.add_issuer('https://idp.example', 'HS256', $1, 'shop-db')",
        &[&signer.key()],
    )
    .await?;
    app.run("PREPARE p AS SELECT email FROM customer WHERE id = 1")
        .await?;
    assert_eq!(app.value("EXECUTE p").await?, EMAIL);
    let claims = jwt::claims("https://idp.example", "shop-db", "ana@example.com");
    let token = signer.token(&jwt::with(claims, json!({"act": {"sub": "agent-7"}})));
    app.query("SELECT warden.login($1)", &[&token]).await?;
    assert_ne!(app.value(sql).await?, EMAIL);
    assert_ne!(app.value("EXECUTE p").await?, EMAIL);
    app.run("SELECT warden.logout()").await?;
    assert_ne!(app.value(sql).await?, EMAIL);
    drop(cluster);
    Ok(())
}

#[tokio::test]
async fn what_was_masked_is_recorded() -> Result {
    let (cluster, _dba, app) = masked().await?;
    app.run("SELECT email AS seen_masked FROM customer").await?;
    app.run("SELECT name AS seen_plain FROM customer").await?;
    let masked = cluster.the_activity("query LIKE '%seen_masked%'").await?;
    assert_eq!(masked["masked_columns"], json!(["public.customer.email"]));
    let plain = cluster.the_activity("query LIKE '%seen_plain%'").await?;
    assert_eq!(plain["masked_columns"], json!([]));
    Ok(())
}

#[tokio::test]
async fn statistics_do_not_tell() -> Result {
    let (_cluster, dba, app) = masked().await?;
    dba.run(
        "INSERT INTO customer SELECT g, 'x', 'novak@example.com' FROM generate_series(10, 300) g",
    )
    .await?;
    dba.run("ANALYZE customer").await?;
    let told = app
        .column("SELECT most_common_vals::text || histogram_bounds::text FROM pg_stats WHERE attname = 'email'")
        .await?
        .join("");
    assert!(!told.contains("novak"), "{told}");
    Ok(())
}

#[tokio::test]
async fn errors_do_not_carry_masked_rows() -> Result {
    let (_cluster, _dba, app) = masked().await?;
    for sql in [
        "UPDATE customer SET id = 2 WHERE id = 1",
        "UPDATE customer SET id = NULL WHERE id = 1",
    ] {
        let error = app.error(sql).await?;
        assert!(!format!("{error:?}").contains("novak"), "{error:?}");
    }
    Ok(())
}

#[tokio::test]
async fn integrity_is_kept_on_what_is_stored() -> Result {
    let (_cluster, dba, app) = masked().await?;
    dba.run(
        "ALTER TABLE customer ADD CONSTRAINT customer_email_key UNIQUE (email);
         CREATE TABLE subscriber (email text REFERENCES customer (email) ON UPDATE CASCADE);
         GRANT SELECT, INSERT ON subscriber TO app",
    )
    .await?;
    app.run(&format!("INSERT INTO subscriber VALUES ('{EMAIL}')"))
        .await?;
    assert_eq!(
        app.sqlstate("INSERT INTO subscriber VALUES ('nobody@x')")
            .await?,
        "23503"
    );
    Ok(())
}

#[tokio::test]
async fn row_security_and_column_privileges_stay() -> Result {
    let (_cluster, dba, app) = masked().await?;
    dba.run(
        "ALTER TABLE customer ENABLE ROW LEVEL SECURITY;
         CREATE POLICY first ON customer FOR SELECT TO app USING (id = 1);
         REVOKE SELECT ON customer FROM app; GRANT SELECT (id, email) ON customer TO app",
    )
    .await?;
    assert_eq!(app.rows("SELECT id, email FROM customer").await?.len(), 1);
    assert_eq!(app.sqlstate("SELECT name FROM customer").await?, "42501");
    assert_eq!(app.sqlstate("SELECT * FROM customer").await?, "42501");
    assert_eq!(app.sqlstate("SELECT c FROM customer c").await?, "42501");
    Ok(())
}

#[tokio::test]
async fn a_point_lookup_keeps_its_index() -> Result {
    let (_cluster, dba, app) = masked().await?;
    dba.run("INSERT INTO customer SELECT g, 'x', 'y@z' FROM generate_series(10, 20000) g")
        .await?;
    dba.run("ANALYZE customer").await?;
    let plan = app
        .column("EXPLAIN SELECT email FROM customer WHERE id = 77")
        .await?
        .join("\n");
    assert!(plan.contains("Index Scan"), "{plan}");
    Ok(())
}

#[tokio::test]
async fn only_an_administrator_masks_and_unmasks() -> Result {
    let (_cluster, _dba, app) = masked().await?;
    for sql in [
        "SELECT warden.unmask('customer', 'email')",
        "SELECT warden.unmask_for('app')",
        "SELECT warden.mask('customer', 'name', 'warden.redact')",
        "DELETE FROM warden.mask_policy WHERE true",
        "INSERT INTO warden.mask_exemption VALUES (10)",
    ] {
        let sqlstate = app.sqlstate(sql).await?;
        assert!(
            ["42501", "WA001"].contains(&sqlstate.as_str()),
            "{sql}: {sqlstate}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_function_of_the_same_name_does_not_take_a_masks_place() -> Result {
    let (_cluster, _dba, app) = masked().await?;
    app.run(
        "CREATE FUNCTION partial_email(text) RETURNS text LANGUAGE sql AS 'SELECT $1';
         SET search_path = public, warden",
    )
    .await?;
    assert_ne!(
        app.value("SELECT email FROM customer WHERE id = 1").await?,
        EMAIL
    );
    Ok(())
}

#[tokio::test]
async fn a_function_inside_a_cascade_is_no_foreign_key() -> Result {
    let (cluster, dba, app) = masked().await?;
    dba.run("CREATE UNIQUE INDEX ON customer (email)").await?;
    app.run(
        "CREATE TABLE p (id int PRIMARY KEY); CREATE TABLE c (id int REFERENCES p ON DELETE CASCADE);
         CREATE TABLE stolen (email text); CREATE TABLE victim (n int); INSERT INTO victim VALUES (1);
         CREATE FUNCTION leak(e text) RETURNS bool LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO stolen VALUES (e); RETURN false; END $$;
         CREATE FUNCTION reads() RETURNS SETOF int LANGUAGE sql AS
             'SELECT 1 FROM public.customer WHERE leak(email)';
         CREATE FUNCTION one(wanted text) RETURNS SETOF int LANGUAGE sql AS
             'SELECT 1 FROM public.customer WHERE email = $1';
         CREATE FUNCTION deletes() RETURNS void LANGUAGE sql AS 'DELETE FROM public.victim';
         CREATE TABLE told (n int)",
    )
    .await?;
    for (n, body) in [
        "PERFORM * FROM reads()",
        &format!("INSERT INTO told SELECT * FROM one('{EMAIL}')"),
        "PERFORM deletes()",
    ]
    .into_iter()
    .enumerate()
    {
        app.run(&format!(
            "CREATE OR REPLACE FUNCTION tf() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN {body}; RETURN OLD; END $$;
             CREATE OR REPLACE TRIGGER t BEFORE DELETE ON c FOR EACH ROW EXECUTE FUNCTION tf();
             INSERT INTO p VALUES ({n}); INSERT INTO c VALUES ({n})"
        ))
        .await?;
        let deleted = app.run(&format!("DELETE FROM p WHERE id = {n}")).await;
        assert_eq!(deleted.is_err(), body.contains("deletes"), "{body}");
    }
    let shown = app.column("SELECT email FROM stolen").await?;
    assert_eq!(shown.len(), 2);
    assert!(!shown.contains(&EMAIL.to_owned()), "{shown:?}");
    assert_eq!(app.number("SELECT count(*) FROM told").await?, 0);
    assert_eq!(app.number("SELECT count(*) FROM victim").await?, 1);
    let read = cluster
        .activity("'public.customer' = ANY (relations) AND nested")
        .await?;
    assert!(read.len() >= 2, "{read:#?}");
    Ok(())
}

#[tokio::test]
async fn an_exempt_owners_function_does_not_lend_its_errors() -> Result {
    let (cluster, dba, _) = masked().await?;
    dba.run(
        "CREATE ROLE officer; SELECT warden.unmask_for('officer');
         GRANT SELECT, UPDATE ON customer TO officer; GRANT CREATE ON SCHEMA public TO officer;
         ALTER TABLE customer ADD CHECK (id > 0);
         SET ROLE officer;
         CREATE FUNCTION turn(n int) RETURNS void LANGUAGE sql SECURITY DEFINER AS
             'UPDATE customer SET id = -n WHERE id = n';
         RESET ROLE",
    )
    .await?;
    let app = cluster.connect("app", "postgres").await?;
    for sql in ["SELECT turn(1)", "UPDATE customer SET id = -1 WHERE id = 1"] {
        let error = app.error(sql).await?;
        assert_eq!(error.code().code(), "23514", "{sql}");
        assert!(!format!("{error:?}").contains("novak"), "{sql}: {error:?}");
    }
    // A session whose first statement it is.
    dba.run("CREATE UNIQUE INDEX ON customer (phone)").await?;
    let fresh = cluster.psql(
        "app",
        "postgres",
        "COPY customer FROM STDIN;\n9\tx\ty\t+49 30 1234567\t2000-01-01\n\\.\n",
    )?;
    assert!(fresh.contains("unique constraint"), "{fresh}");
    assert!(fresh.contains("not shown"), "{fresh}");
    Ok(())
}

#[tokio::test]
async fn a_barrier_views_condition_does_not_pass_as_a_policys() -> Result {
    let (_cluster, dba, app) = masked().await?;
    // The policy looks at the same column, as its owner may.
    dba.run(
        "ALTER TABLE customer ENABLE ROW LEVEL SECURITY;
         CREATE POLICY p ON customer USING (email LIKE '%@%') WITH CHECK (true);
         CREATE POLICY r ON customer AS RESTRICTIVE USING (email IS NOT NULL)",
    )
    .await?;
    app.run(
        "CREATE VIEW guess WITH (security_barrier) AS SELECT * FROM customer WHERE email LIKE 'ana.n%';
         CREATE VIEW outside WITH (security_barrier) AS SELECT * FROM guess WHERE id > 0;
         CREATE VIEW plain WITH (security_barrier) AS SELECT * FROM customer WHERE id > 0",
    )
    .await?;
    for sql in [
        "UPDATE guess SET name = 'x' WHERE id = 1",
        "DELETE FROM guess WHERE id = 1",
        "UPDATE outside SET name = 'x' WHERE id = 1",
    ] {
        assert_eq!(app.sqlstate(sql).await?, "WA001", "{sql}");
    }
    assert_eq!(app.number("SELECT count(*) FROM guess").await?, 0);
    for sql in [
        "UPDATE plain SET name = 'x' WHERE id = 1",
        "UPDATE customer SET name = 'y' WHERE id = 1",
        "DELETE FROM customer WHERE id = 2",
    ] {
        app.run(sql).await?;
    }
    assert_eq!(app.column("SELECT name FROM customer").await?, ["y"]);
    Ok(())
}
