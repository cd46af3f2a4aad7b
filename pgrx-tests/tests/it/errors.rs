//! An error reaches the client as PostgreSQL raised it.

use warden_tests::{Cluster, Config, Mode, Result};

const ERRORS: &str = r#"
\set VERBOSITY default
SET client_min_messages = notice;
CREATE TABLE parent (id int PRIMARY KEY, kind text NOT NULL CHECK (kind <> ''));
CREATE TABLE child (id int PRIMARY KEY, parent int REFERENCES parent, n smallint,
  during int4range, EXCLUDE USING gist (during WITH &&));
CREATE DOMAIN positive AS int CONSTRAINT is_positive CHECK (VALUE > 0);
INSERT INTO parent VALUES (1, 'a');
INSERT INTO parent VALUES (1, 'b');
\errverbose
INSERT INTO parent VALUES (2, NULL);
\errverbose
INSERT INTO parent VALUES (2, '');
\errverbose
INSERT INTO child VALUES (1, 99);
\errverbose
INSERT INTO child VALUES (1, 1, 5, '[1,5]');
INSERT INTO child VALUES (2, 1, 5, '[2,3]');
\errverbose
DELETE FROM parent WHERE id = 1;
\errverbose
UPDATE child SET n = 70000 WHERE id = 1;
\errverbose
SELECT (-1)::positive;
\errverbose
SELECT 'twelve'::int;
\errverbose
SELECT kind::date FROM parent;
\errverbose
SELECT 1 / (id - id) FROM parent;
\errverbose
SELECT 1 / 0;
\errverbose
SELECT * FROM pg_authid;
\errverbose
SELECT no_such_column FROM parent;
\errverbose
SELEKT 1;
\errverbose
SELECT * FROM no_such_table;
\errverbose
SELECT no_such_function(1, 'a');
\errverbose
CREATE TABLE parent (id int);
\errverbose
ALTER TABLE parent ADD COLUMN kind int;
\errverbose
CREATE FUNCTION inner_failure(n int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN
  RETURN 100 / n;
END $$;
CREATE FUNCTION middle(n int) RETURNS int LANGUAGE plpgsql AS $$
DECLARE r int;
BEGIN
  SELECT inner_failure(n) INTO r;
  RETURN r;
END $$;
CREATE FUNCTION outer_failure(n int) RETURNS int LANGUAGE sql AS 'SELECT middle(n)';
SELECT outer_failure(0);
\errverbose
DO $$ BEGIN PERFORM outer_failure(0); END $$;
\errverbose
CREATE FUNCTION raises() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'no %', 'way' USING ERRCODE = 'ZZ042', DETAIL = 'a detail', HINT = 'a hint',
    SCHEMA = 's', TABLE = 't', COLUMN = 'c', CONSTRAINT = 'k', DATATYPE = 'd';
END $$;
SELECT raises();
\errverbose
DO $$
BEGIN
  INSERT INTO parent VALUES (1, 'again');
EXCEPTION WHEN unique_violation THEN
  RAISE NOTICE 'caught %', SQLERRM;
  PERFORM raises();
END $$;
\errverbose
DO $$
DECLARE s text; d text; h text; c text; k text;
BEGIN
  INSERT INTO parent VALUES (1, 'again');
EXCEPTION WHEN OTHERS THEN
  GET STACKED DIAGNOSTICS s = RETURNED_SQLSTATE, d = PG_EXCEPTION_DETAIL, h = PG_EXCEPTION_HINT,
    c = PG_EXCEPTION_CONTEXT, k = CONSTRAINT_NAME;
  RAISE NOTICE '% % % % %', s, d, h, c, k;
END $$;
CREATE FUNCTION on_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM inner_failure(0); RETURN NEW; END $$;
CREATE TRIGGER tr AFTER UPDATE ON parent FOR EACH ROW EXECUTE FUNCTION on_change();
UPDATE parent SET kind = 'c' WHERE id = 1;
\errverbose
PREPARE p (int) AS SELECT 10 / $1;
EXECUTE p (0);
\errverbose
BEGIN;
DECLARE c CURSOR FOR SELECT 1 / (g - 2) FROM generate_series(1, 3) g;
FETCH 1 FROM c;
FETCH 1 FROM c;
\errverbose
SELECT 1;
\errverbose
ROLLBACK;
BEGIN; SAVEPOINT s; SELECT 1 / 0; ROLLBACK TO s; SELECT 'goes on'; COMMIT;
COPY parent FROM STDIN;
x	y
\.
\errverbose
COPY parent FROM '/no/such/file';
\errverbose
CREATE TABLE later (n int REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
BEGIN; INSERT INTO later VALUES (99); COMMIT;
\errverbose
SET statement_timeout = '50ms';
SELECT pg_sleep(10);
\errverbose
RESET statement_timeout;
SELECT json_build_object('a', 1) -> 'a' -> 0 ->> 'b', '{bad json'::json;
\errverbose
SELECT xmin::text::int / 0 FROM parent FOR UPDATE;
\errverbose
SELECT 'still alive';
"#;

#[tokio::test]
async fn errors_are_the_same_with_and_without_us() -> Result {
    let plain = Cluster::start(Config::new(Mode::Plain)).await?;
    plain
        .superuser()
        .await?
        .run("CREATE ROLE app LOGIN; GRANT CREATE ON SCHEMA public TO app")
        .await?;
    let ours = Cluster::with_warden().await?;
    let expected = plain.psql("app", "postgres", ERRORS)?;
    for sign in [
        "SCHEMA NAME:",
        "CONSTRAINT NAME:",
        "LOCATION:",
        "CONTEXT:",
        "still alive",
    ] {
        assert!(expected.contains(sign), "the script shows no {sign}");
    }
    let actual = ours.psql("app", "postgres", ERRORS)?;
    for (n, (a, e)) in actual.lines().zip(expected.lines()).enumerate() {
        assert_eq!(a, e, "line {n} of psql's output");
    }
    assert_eq!(actual, expected);
    Ok(())
}

#[tokio::test]
async fn backtraces_of_rust_do_not_reach_clients() -> Result {
    let ours = Cluster::with_warden().await?;
    let app = ours.connect("app", "postgres").await?;
    let error = app.error("SELECT 1 / 0").await?;
    assert!(
        error.detail().is_none() && error.hint().is_none(),
        "{error:?}"
    );
    Ok(())
}
