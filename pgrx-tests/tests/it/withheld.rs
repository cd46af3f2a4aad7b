//! Errors do not show rows to those who read masks, wherever they are raised.

use warden_tests::DbError;
use warden_tests::{Client, Cluster, Config, Mode, Result};

/// Tables with constraints of every kind, all of them about masked columns; a session of `app`.
async fn constrained() -> Result<(Cluster, Client)> {
    let cluster = Cluster::with_warden().await?;
    cluster
        .superuser()
        .await?
        .run(
            "CREATE TABLE customer (
                 id int PRIMARY KEY, name text CHECK (name <> 'bad'), age int NOT NULL,
                 email text UNIQUE, slot int4range,
                 card text CONSTRAINT one_card UNIQUE DEFERRABLE INITIALLY DEFERRED,
                 EXCLUDE USING gist (slot WITH &&) DEFERRABLE INITIALLY DEFERRED);
             CREATE TABLE team (id int PRIMARY KEY);
             CREATE TABLE subscriber (email text REFERENCES customer (email)
                                                 DEFERRABLE INITIALLY DEFERRED);
             CREATE TABLE part (id int, email text) PARTITION BY RANGE (id);
             CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM (0) TO (100);
             CREATE VIEW adults AS SELECT * FROM customer WHERE age > 17 WITH CHECK OPTION;
             INSERT INTO customer VALUES 
                 (1, 'a', 20, 'secret1@example.com', '[10,20)', 'secret card 1'),
                 (2, 'b', 30, 'secret2@example.com', '[30,40)', 'secret card 2');
             INSERT INTO subscriber VALUES ('secret1@example.com');
             INSERT INTO part VALUES (1, 'secret1@example.com');
             SELECT warden.mask('customer', 'email', 'warden.partial_email');
             SELECT warden.mask('customer', 'card', 'warden.redact');
             SELECT warden.mask('customer', 'slot', 'warden.mask_null');
             SELECT warden.mask('part', 'email', 'warden.redact');
             CREATE ROLE trusted LOGIN; SELECT warden.unmask_for('trusted');
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO app, trusted",
        )
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    Ok((cluster, app))
}

fn assert_withheld(error: &DbError, sql: &str) {
    let shown = format!("{error:?}");
    assert!(
        !shown.contains("secret") && !shown.contains("[10,20)"),
        "{sql}: {shown}"
    );
    assert_eq!(
        error.detail(),
        Some("The row is not shown: the table has masked columns."),
        "{sql}: {shown}"
    );
}

/// What fails, by which error; with the rows of masked columns in its DETAIL.
const FAILING: &[(&str, &str)] = &[
    // As a transaction of its own: the error comes with the commit.
    (
        "INSERT INTO customer VALUES (3, 'c', 9, 'x', NULL, 'secret card 1')",
        "23505",
    ),
    (
        "INSERT INTO customer VALUES (3, 'c', 9, 'x', '[15,16)')",
        "23P01",
    ),
    ("DELETE FROM customer WHERE id = 1", "23503"),
    (
        "DO $$ BEGIN DELETE FROM customer WHERE id = 1; END $$",
        "23503",
    ),
    ("BEGIN; DELETE FROM customer WHERE id = 1; COMMIT", "23503"),
    (
        "BEGIN; DELETE FROM customer WHERE id = 1; SET CONSTRAINTS ALL IMMEDIATE",
        "23503",
    ),
    (
        "BEGIN; DELETE FROM customer WHERE id = 1; PREPARE TRANSACTION 'x'",
        "23503",
    ),
    ("UPDATE customer SET name = 'bad' WHERE id = 1", "23514"),
    ("UPDATE customer SET age = NULL WHERE id = 1", "23502"),
    ("UPDATE customer SET id = 2 WHERE id = 1", "23505"),
    ("UPDATE part SET id = 500 WHERE id = 1", "23514"),
    ("UPDATE part_1 SET id = 500 WHERE id = 1", "23514"),
    ("UPDATE adults SET age = 3 WHERE id = 1", "44000"),
];

#[tokio::test]
async fn no_constraint_shows_the_row_when_it_fails() -> Result {
    let (_cluster, app) = constrained().await?;
    for (sql, code) in FAILING {
        let error = app.error(sql).await?;
        assert_eq!(error.code().code(), *code, "{sql}: {error:?}");
        assert_withheld(&error, sql);
        app.run("ROLLBACK").await?;
    }
    Ok(())
}

#[tokio::test]
async fn the_commit_of_a_sessions_first_statement_shows_no_row() -> Result {
    let (cluster, _) = constrained().await?;
    for sql in [
        "DO $$ BEGIN DELETE FROM customer WHERE id = 1; END $$",
        "BEGIN; SAVEPOINT a; DELETE FROM customer WHERE id = 1; RELEASE a; COMMIT",
    ] {
        let fresh = cluster.connect("app", "postgres").await?;
        assert_withheld(&fresh.error(sql).await?, sql);
    }
    Ok(())
}

#[tokio::test]
async fn errors_before_do_not_open_the_way() -> Result {
    let (_cluster, app) = constrained().await?;
    let fails = "DO $$ BEGIN DELETE FROM customer WHERE id = 1; END $$";
    for before in ["", "BEGIN", "BEGIN; SAVEPOINT a"] {
        app.run(before).await?;
        assert_eq!(app.sqlstate("SELEKT 1").await?, "42601");
        // In a transaction that has failed, nothing of ours hears of the next error.
        if !before.is_empty() {
            assert_eq!(app.sqlstate("SELECT 1").await?, "25P02");
        }
        app.run("ROLLBACK").await?;
        assert_withheld(&app.error(fails).await?, before);
    }
    // By the extended protocol, where no text is parsed any more.
    let delete = app.prepare("DELETE FROM customer WHERE id = 1").await?;
    for _ in 0..3 {
        let error = app.execute(&delete, &[]).await.expect_err("a foreign key");
        assert_withheld(error.as_db_error().expect("of the server"), "an execution");
    }
    Ok(())
}

#[tokio::test]
async fn what_a_block_catches_shows_no_row() -> Result {
    let (_cluster, app) = constrained().await?;
    app.run(
        "CREATE FUNCTION told() RETURNS text LANGUAGE plpgsql AS $$
         DECLARE d text;
         BEGIN
             UPDATE customer SET name = 'bad' WHERE id = 1;
             RETURN 'no error';
         EXCEPTION WHEN OTHERS THEN
             GET STACKED DIAGNOSTICS d = PG_EXCEPTION_DETAIL;
             RETURN d;
         END $$",
    )
    .await?;
    let told = app.value("SELECT told()").await?;
    assert!(told.contains("not shown"), "{told}");
    Ok(())
}

#[tokio::test]
async fn exempt_roles_and_other_tables_keep_their_details() -> Result {
    let (cluster, app) = constrained().await?;
    let trusted = cluster.connect("trusted", "postgres").await?;
    for sql in [
        "DELETE FROM customer WHERE id = 1",
        "UPDATE customer SET name = 'bad' WHERE id = 1",
    ] {
        let error = trusted.error(sql).await?;
        assert!(
            error.detail().is_some_and(|d| d.contains("secret1")),
            "{error:?}"
        );
    }
    app.run("INSERT INTO team VALUES (1)").await?;
    let error = app.error("INSERT INTO team VALUES (1)").await?;
    assert_eq!(error.detail(), Some("Key (id)=(1) already exists."));
    Ok(())
}

#[tokio::test]
async fn the_log_shows_no_row_either() -> Result {
    let (cluster, app) = constrained().await?;
    app.error("BEGIN; DELETE FROM customer WHERE id = 1; COMMIT")
        .await?;
    let log = cluster.whole_log()?;
    assert!(log.contains("DETAIL:  The row is not shown"), "{log}");
    assert!(!log.contains("Key (email)=(secret1"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_backtrace_that_the_environment_asks_for_is_not_taken() -> Result {
    let config = Config::new(Mode::Preloaded).environment("RUST_BACKTRACE", "1".as_ref());
    let cluster = Cluster::with_extension(config).await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("CREATE TABLE t (n int)").await?;
    // Raised while our planner hook looks at the condition.
    let error = app.error("DELETE FROM t WHERE 1 / 0 = 1").await?;
    assert_eq!(error.code().code(), "22012");
    assert_eq!(error.detail(), None);
    Ok(())
}
