//! Code that is attached to a table does not show its masked columns to whoever is under the masks.

use serde_json::json;
use warden_tests::jwt::{self, Signer};
use warden_tests::{Client, Cluster, Result};

const EMAIL: &str = "secret1@example.com";

/// `app` owns the tables; `trusted` is exempt; `other` is neither. Whatever a function of theirs gets to
/// see goes to the table `stolen`.
async fn owned() -> Result<(Cluster, Client, Client)> {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(
        "CREATE ROLE trusted LOGIN; CREATE ROLE other LOGIN;
         SELECT warden.unmask_for('trusted');
         GRANT CREATE ON SCHEMA public TO trusted, other;
         CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nowhere;
         GRANT USAGE ON FOREIGN SERVER elsewhere TO app;
         SET ROLE app;
         CREATE FOREIGN TABLE far_away (id int, email text) SERVER elsewhere;
         CREATE TYPE person AS (email text); CREATE TABLE people OF person;
         CREATE DOMAIN address AS text;
         CREATE TABLE customer (id int PRIMARY KEY, name text, email text, home address,
                                lower_email text GENERATED ALWAYS AS (lower(email)) STORED);
         CREATE TABLE part (id int, email text) PARTITION BY RANGE (id);
         CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (100);
         CREATE TABLE base (id int, email text); CREATE TABLE child () INHERITS (base);
         CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE below (id int REFERENCES parent
             ON DELETE CASCADE, email text);
         CREATE TABLE stolen (what text);
         CREATE FUNCTION leak(t text) RETURNS bool LANGUAGE plpgsql IMMUTABLE AS
             $$ BEGIN RAISE NOTICE 'leak %', t; INSERT INTO stolen VALUES (t); RETURN true; END $$;
         CREATE FUNCTION steal() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO stolen VALUES (OLD.email); RETURN coalesce(NEW, OLD); END $$;
         CREATE FUNCTION count_rows() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO stolen SELECT email FROM gone; RETURN NULL; END $$;
         INSERT INTO customer VALUES (1, 'a', 'secret1@example.com', 'secret street'),
                                     (2, 'b', 'secret2@example.com', 'secret road');
         INSERT INTO part VALUES (1, 'secret1@example.com');
         INSERT INTO child VALUES (1, 'secret1@example.com');
         INSERT INTO parent VALUES (1); INSERT INTO below VALUES (1, 'secret1@example.com');
         GRANT ALL ON ALL TABLES IN SCHEMA public TO trusted, other;
         RESET ROLE;
         SELECT warden.mask('people', 'email', 'warden.redact');
         SELECT warden.mask('customer', 'email', 'warden.partial_email');
         SELECT warden.mask('customer', 'home', 'warden.redact');
         SELECT warden.mask('part', 'email', 'warden.redact');
         SELECT warden.mask('base', 'email', 'warden.redact');
         SELECT warden.mask('below', 'email', 'warden.redact')",
    )
    .await?;
    let app = cluster.connect("app", "postgres").await?;
    Ok((cluster, dba, app))
}

async fn assert_nothing_stolen(dba: &Client) -> Result {
    let stolen = dba
        .column("SELECT what FROM stolen WHERE what LIKE '%secret%'")
        .await?;
    assert!(stolen.is_empty(), "{stolen:?}");
    Ok(())
}

/// Commands of an owner that would show, or tell by, masked columns.
const REFUSED: &[&str] = &[
    "CREATE TRIGGER t BEFORE UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION steal()",
    "CREATE CONSTRAINT TRIGGER t AFTER UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION steal()",
    "CREATE TRIGGER t AFTER DELETE ON customer REFERENCING OLD TABLE AS gone
         FOR EACH STATEMENT EXECUTE FUNCTION count_rows()",
    "CREATE TRIGGER t BEFORE UPDATE ON customer FOR EACH ROW
         EXECUTE FUNCTION tsvector_update_trigger(name, 'pg_catalog.simple', email)",
    "CREATE TRIGGER t BEFORE UPDATE ON part_1 FOR EACH ROW EXECUTE FUNCTION steal()",
    "CREATE RULE r AS ON UPDATE TO customer DO ALSO INSERT INTO stolen VALUES (OLD.email)",
    "CREATE INDEX ON customer (leak(email))",
    "CREATE INDEX ON customer ((customer.email || 'x'))",
    "CREATE INDEX ON customer (id) WHERE leak(email)",
    "CREATE INDEX ON customer ((customer::text))",
    "CREATE INDEX ON customer ((leak(lower_email)))",
    "CREATE STATISTICS s ON (leak(email)), id FROM customer",
    "CREATE POLICY p ON customer USING (email LIKE 'secret1%')",
    "CREATE POLICY p ON customer WITH CHECK (leak(email))",
    "ALTER TABLE customer ALTER email TYPE int USING email::int",
    "ALTER TABLE customer ALTER email TYPE varchar(3)",
    "ALTER TABLE customer ALTER name TYPE text USING email",
    "ALTER TABLE customer ALTER name TYPE text USING (leak(customer.email)::text)",
    "ALTER TABLE customer ADD CHECK (leak(email))",
    "ALTER TABLE customer ADD CHECK (email NOT LIKE 'secret1%') NOT VALID",
    "ALTER TABLE customer ADD COLUMN c text CHECK (leak(email))",
    "ALTER TABLE customer ADD COLUMN c bool GENERATED ALWAYS AS (leak(email)) STORED",
    "ALTER TABLE customer ADD EXCLUDE USING btree ((leak(email)) WITH =)",
    "ALTER TABLE customer ALTER lower_email DROP EXPRESSION",
    "ALTER TABLE customer ADD COLUMN d int, ADD CHECK (leak(email))",
    "ALTER DOMAIN address ADD CHECK (leak(VALUE))",
    "ALTER TABLE part DETACH PARTITION part_1",
    "ALTER TABLE child NO INHERIT base",
    "CREATE TABLE part_2 PARTITION OF part (CHECK (leak(email))) FOR VALUES FROM (100) TO (200)",
    "CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM (100) TO (200)
         PARTITION BY LIST ((leak(email)))",
    "ALTER TYPE person ALTER ATTRIBUTE email TYPE varchar CASCADE",
    "CREATE FOREIGN TABLE far PARTITION OF part FOR VALUES FROM (100) TO (200) SERVER elsewhere",
    "ALTER TABLE part ATTACH PARTITION far_away FOR VALUES FROM (100) TO (200)",
    "DO $$ BEGIN ALTER TABLE customer ADD CHECK (leak(email)); END $$",
];

#[tokio::test]
async fn an_owner_attaches_no_code_to_what_is_masked() -> Result {
    let (cluster, dba, app) = owned().await?;
    for sql in REFUSED {
        let error = app.error(sql).await?;
        assert_eq!(error.code().code(), "WA001", "{sql}: {error:?}");
        assert!(error.hint().is_some(), "{sql}");
    }
    // The holder of TRIGGER, and an owner that brings a table of its own.
    let other = cluster.connect("other", "postgres").await?;
    other
        .run(
            "CREATE FUNCTION take() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN INSERT INTO stolen VALUES (OLD.email); RETURN OLD; END $$",
        )
        .await?;
    let sql = "CREATE TRIGGER t BEFORE DELETE ON customer FOR EACH ROW EXECUTE FUNCTION take()";
    assert_eq!(other.sqlstate(sql).await?, "WA001");
    app.run(
        "CREATE TABLE trap (id int, email text) PARTITION BY RANGE (id);
         CREATE TABLE loose (id int, email text);
         CREATE INDEX ON trap (leak(email))",
    )
    .await?;
    dba.run("SELECT warden.mask('loose', 'email', 'warden.redact')")
        .await?;
    let attach = "ALTER TABLE trap ATTACH PARTITION loose FOR VALUES FROM (0) TO (9)";
    assert_eq!(app.sqlstate(attach).await?, "WA001");
    assert_nothing_stolen(&dba).await?;
    let seen = cluster
        .activity("rule = 'masked_ddl' AND outcome = 'blocked'")
        .await?;
    assert_eq!(seen.len(), REFUSED.len() + 2, "{seen:#?}");
    Ok(())
}

#[tokio::test]
async fn what_touches_no_masked_column_goes_on() -> Result {
    let (_cluster, dba, app) = owned().await?;
    app.run(
        "CREATE INDEX ON customer (email); CREATE INDEX ON customer (lower(name)) WHERE id > 0;
         ALTER TABLE customer ADD CHECK (id > 0), ADD COLUMN age int DEFAULT 3 CHECK (age > 0);
         ALTER TABLE customer ALTER name TYPE varchar(100), ALTER id TYPE bigint USING id + 0;
         CREATE STATISTICS s ON id, name FROM customer; ANALYZE customer;
         CREATE POLICY p ON customer USING (id > 0);
         CREATE TRIGGER t AFTER UPDATE ON customer FOR EACH STATEMENT EXECUTE FUNCTION steal();
         DROP TRIGGER t ON customer;
         CREATE TABLE copy_of (LIKE customer INCLUDING ALL);
         CREATE TABLE part_2 PARTITION OF part (CHECK (id < 300)) FOR VALUES FROM (100) TO (200);
         ALTER TABLE customer ADD UNIQUE (email); UPDATE customer SET name = 'x' WHERE id = 1",
    )
    .await?;
    // With masks of its own, a partition may go.
    dba.run("SELECT warden.mask('part_1', 'email', 'warden.redact')")
        .await?;
    app.run("ALTER TABLE part DETACH PARTITION part_1").await?;
    assert_eq!(app.column("SELECT email FROM part_1").await?, ["***"]);
    Ok(())
}

#[tokio::test]
async fn an_exempt_role_attaches_what_it_wants() -> Result {
    let (cluster, dba, app) = owned().await?;
    let trusted = cluster.connect("trusted", "postgres").await?;
    dba.run("CREATE TABLE audit (who text, what text); GRANT INSERT ON audit TO PUBLIC")
        .await?;
    trusted
        .run(
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN INSERT INTO public.audit VALUES (current_user, OLD.email); RETURN NEW; END $$;
             CREATE TRIGGER audit BEFORE UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION note()",
        )
        .await?;
    // It works for everybody, with what is stored.
    app.run("UPDATE customer SET name = 'x' WHERE id = 1")
        .await?;
    assert_eq!(dba.column("SELECT what FROM audit").await?, [EMAIL]);
    // Whoever owns the function decides: in the hands of somebody else, it does not fire.
    app.run("PREPARE p AS UPDATE customer SET name = 'y' WHERE id = 1; EXECUTE p")
        .await?;
    dba.run("ALTER FUNCTION note() OWNER TO app").await?;
    for session in [&app, &trusted, &dba] {
        let error = session
            .error("UPDATE customer SET name = 'z' WHERE id = 1")
            .await?;
        assert_eq!(error.code().code(), "WA001", "{error:?}");
    }
    assert_eq!(app.sqlstate("EXECUTE p").await?, "WA001");
    app.run("INSERT INTO customer (id) VALUES (3); DELETE FROM customer WHERE id = 3")
        .await?;
    dba.run("ALTER FUNCTION note() OWNER TO postgres").await?;
    app.run("EXECUTE p").await
}

#[tokio::test]
async fn triggers_that_came_another_way_do_not_fire() -> Result {
    let (_cluster, dba, app) = owned().await?;
    // An administrator attaches what is not trusted: to the table, to a partition, below a cascade.
    dba.run(
        "SELECT warden.unmask_for('dba');
         CREATE FUNCTION steal_new() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN INSERT INTO stolen VALUES (NEW.email); RETURN NEW; END $$;
         ALTER FUNCTION steal_new() OWNER TO app;
         CREATE TRIGGER t BEFORE DELETE ON below FOR EACH ROW EXECUTE FUNCTION steal();
         CREATE TRIGGER t BEFORE INSERT ON part_1 FOR EACH ROW EXECUTE FUNCTION steal_new();
         CREATE TRIGGER t BEFORE INSERT ON customer FOR EACH ROW EXECUTE FUNCTION steal_new()",
    )
    .await?;
    for sql in [
        "DELETE FROM below WHERE id = 1",
        "DELETE FROM parent WHERE id = 1",
        "INSERT INTO part VALUES (2, 'secret2')",
        "INSERT INTO customer VALUES (9, 'x', 'secret9')",
        "INSERT INTO customer VALUES (1) ON CONFLICT DO NOTHING",
        "MERGE INTO customer c USING (SELECT 9 AS id) s ON s.id = c.id
             WHEN NOT MATCHED THEN INSERT VALUES (9, 'x', 'secret9')",
        "COPY customer (id, email) FROM STDIN",
        "COPY part FROM STDIN",
    ] {
        assert_eq!(app.sqlstate(sql).await?, "WA001", "{sql}");
        assert_eq!(dba.sqlstate(sql).await?, "WA001", "{sql}");
    }
    app.run("UPDATE customer SET name = 'x' WHERE id = 1")
        .await?;
    assert_nothing_stolen(&dba).await
}

#[tokio::test]
async fn a_column_is_not_masked_while_untrusted_code_sees_it() -> Result {
    let (_cluster, dba, app) = owned().await?;
    for (makes, drops) in [
        (
            "CREATE TRIGGER t BEFORE UPDATE ON fresh FOR EACH ROW EXECUTE FUNCTION steal()",
            "DROP TRIGGER t ON fresh",
        ),
        ("CREATE INDEX i ON fresh (leak(email))", "DROP INDEX i"),
        (
            "ALTER TABLE fresh ADD CONSTRAINT c CHECK (leak(email))",
            "ALTER TABLE fresh DROP CONSTRAINT c",
        ),
        (
            "ALTER TABLE fresh ADD COLUMN g bool GENERATED ALWAYS AS (leak(email)) STORED",
            "ALTER TABLE fresh DROP COLUMN g",
        ),
        (
            "CREATE POLICY p ON fresh USING (leak(email))",
            "DROP POLICY p ON fresh",
        ),
        (
            "CREATE RULE r AS ON INSERT TO fresh DO ALSO INSERT INTO stolen VALUES (NEW.email)",
            "DROP RULE r ON fresh",
        ),
        (
            "CREATE STATISTICS s ON (leak(email)), id FROM fresh",
            "DROP STATISTICS s",
        ),
    ] {
        app.run("CREATE TABLE IF NOT EXISTS fresh (id int, name text, email text)")
            .await?;
        app.run(makes).await?;
        let mask = "SELECT warden.mask('fresh', 'email', 'warden.redact')";
        let error = dba.error(mask).await?;
        assert_eq!(error.code().code(), "55000", "{makes}: {error:?}");
        assert!(error.hint().is_some());
        app.run(drops).await?;
        dba.run(mask).await?;
        dba.run("SELECT warden.unmask('fresh', 'email')").await?;
    }
    // What sees other columns only is no hindrance.
    app.run(
        "ALTER TABLE fresh ADD CHECK (leak(name)); CREATE POLICY p ON fresh USING (leak(name))",
    )
    .await?;
    dba.run("SELECT warden.mask('fresh', 'email', 'warden.redact')")
        .await
}

#[tokio::test]
async fn an_agent_does_not_replace_the_function_of_a_trigger() -> Result {
    let (cluster, dba, _app) = owned().await?;
    let trusted = cluster.connect("trusted", "postgres").await?;
    let function = "CREATE OR REPLACE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
                    $$ BEGIN RETURN NEW; END $$";
    trusted.run(function).await?;
    trusted
        .run("CREATE TRIGGER n BEFORE UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION note()")
        .await?;
    trusted.run(function).await?;
    let signer = Signer::generate("HS256");
    dba.query(
        "SELECT warden.add_issuer('https://idp.example', 'HS256', $1, 'shop-db')",
        &[&signer.key()],
    )
    .await?;
    let claims = jwt::claims("https://idp.example", "shop-db", "ana@example.com");
    let token = signer.token(&jwt::with(claims, json!({"act": {"sub": "agent-7"}})));
    trusted.query("SELECT warden.login($1)", &[&token]).await?;
    assert_eq!(trusted.sqlstate(function).await?, "WA001");
    trusted
        .run("UPDATE customer SET name = 'x' WHERE id = 1")
        .await
}
