//! Passwords, tokens and keys are recorded nowhere and in no form, whatever becomes of the statement
//! that carries them.

use std::path::Path;
use warden_tests::{Client, Cluster, Config, Mode, Result};

/// Part of every planted secret, in a form that no digest or encoding of ours would hide.
const PLANTED: &str = "hunter";

const JWT: &str = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJodW50ZXIifQ.aHVudGVyaHVudGVyaHVudGVy";

async fn cluster(setting: &str) -> Result<Cluster> {
    let line = format!("warden.record_parameters = {setting}\nmax_prepared_transactions = 2");
    Cluster::with_extension(Config::new(Mode::Preloaded).line(&line)).await
}

/// Whether bytes of a file hold a planted secret, upper case or not.
fn holds(bytes: &[u8], secret: &str) -> bool {
    bytes
        .windows(secret.len())
        .any(|w| w.eq_ignore_ascii_case(secret.as_bytes()))
}

fn search(dir: &Path, secret: &str, found: &mut Vec<String>) -> Result {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            search(&path, secret, found)?;
        } else if holds(&std::fs::read(&path)?, secret) {
            found.push(path.display().to_string());
        }
    }
    Ok(())
}

/// Fails if a planted secret is in the ledger, in a view, in the journal, or in what a sink got.
async fn assert_nowhere(cluster: &Cluster, secrets: &[&str]) -> Result {
    let su = cluster.superuser().await?;
    su.run("SELECT warden.add_sink('copy', 'file:copy.ndjson')")
        .await?;
    cluster.drained().await?;
    let all = su.number("SELECT max(seq) FROM warden.event").await?;
    cluster
        .wait_until("the sink has everything", async || {
            Ok(su
                .number("SELECT delivered_seq FROM warden.sink_status WHERE name = 'copy'")
                .await?
                >= all)
        })
        .await?;
    for secret in secrets {
        let mut found = Vec::new();
        search(&cluster.data().join("pg_warden"), secret, &mut found)?;
        assert!(found.is_empty(), "{secret} is in {found:?}");
        for source in [
            "SELECT e.*, encode(payload, 'escape') AS readable, warden.event_detail(kind, payload) AS detail FROM warden.event e",
            "SELECT * FROM warden.statement",
            "SELECT * FROM warden.session",
            "SELECT * FROM warden.activity",
            "SELECT position, encode(frame, 'escape') FROM warden.journal_pending",
        ] {
            let leaks = su
                .rows(&format!(
                    "SELECT r::text FROM ({source}) r WHERE r::text ILIKE '%' || reverse('{}') || '%'",
                    // The search is recorded too.
                    secret.chars().rev().collect::<String>()
                ))
                .await?;
            assert!(leaks.is_empty(), "{secret} in {source}: {leaks:#?}");
        }
    }
    cluster.assert_verifies().await?;
    Ok(())
}

/// Statements with secrets, those that fail included.
const STATEMENTS: &[&str] = &[
    "CREATE TABLE account (id int, password text, note text)",
    "CREATE ROLE r1 LOGIN PASSWORD 'hunter01'",
    "CREATE USER r2 ENCRYPTED PASSWORD E'hunter02'",
    "ALTER ROLE r1 PASSWORD $p$hunter03$p$",
    "ALTER USER r1 WITH PASSWORD U&'hunter04'",
    "ALTER ROLE r1 PASSWORD 'SCRAM-SHA-256$4096:aHVudGVy$hunter05:hunter05'",
    "ALTER ROLE no_such_role PASSWORD 'hunter06'",
    "ALTER ROLE r1 PASSWORD 'hunter07",
    "ALTER ROLE r1 PASSWORD \"hunter08\"",
    "ALTER ROLE r1 PASSWORD hunter09",
    "ALTER ROLE r1 PASSWORD \"hunter10",
    "ALTER ROLE r1 PASSWORD \u{2018}hunter11\u{2019}",
    "ALTER ROLE r1 PASSWORD $x$hunter12",
    "ALTER ROLE r1 PASSWORD E'hun\\'ter' hunter13",
    "ALTER ROLE r1 IDENTIFIED BY hunter14",
    "hunter15",
    "SET PASSWORD FOR r1 = hunter16",
    "CREATE FOREIGN DATA WRAPPER fdw",
    "CREATE SERVER srv FOREIGN DATA WRAPPER fdw OPTIONS (host 'h', password 'hunter17')",
    "CREATE USER MAPPING FOR CURRENT_USER SERVER srv OPTIONS (user 'u', password 'hunter18')",
    "ALTER USER MAPPING FOR CURRENT_USER SERVER srv OPTIONS (SET password 'hunter19')",
    "ALTER SERVER srv OPTIONS (ADD token 'hunter20')",
    "CREATE FOREIGN TABLE ft (n int) SERVER srv OPTIONS (password 'hunter21')",
    "CREATE USER MAPPING FOR CURRENT_USER SERVER srv OPTIONS (password \"hunter22\")",
    "CREATE SUBSCRIPTION sub CONNECTION 'host=/nowhere password=hunter23' PUBLICATION p WITH (connect = false)",
    "ALTER SUBSCRIPTION sub CONNECTION 'host=/nowhere password=hunter24'",
    "ALTER SUBSCRIPTION none CONNECTION 'postgres://u:hunter25@/nowhere'",
    "SET app.secret = 'hunter26'",
    "SET app.secret = hunter27",
    "SET SESSION app.\"key\" TO \"hunter28\"",
    "ALTER ROLE r1 SET app.key = hunter29",
    "ALTER DATABASE postgres SET app.key TO hunter30",
    "CREATE FUNCTION with_setting() RETURNS int LANGUAGE sql SET app.key = hunter31 AS 'SELECT 1'",
    "SELECT set_config('app.key', 'hunter32', false)",
    "SELECT pg_catalog . \"set_config\" ('app.key', 'hunter33', false)",
    "SELECT dblink_connect('host=h user=u password=hunter34')",
    "SELECT * FROM dblink('postgres://u:hunter35@h/d', 'SELECT 1') AS t(n int)",
    "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null; : hunter36'",
    "CREATE FUNCTION atomic(a text) RETURNS text LANGUAGE sql VOLATILE SET work_mem = '4MB' BEGIN ATOMIC INSERT INTO account VALUES (2, a, a) RETURNING note; END",
    "SELECT atomic('hunter83') AS new_password",
    "CREATE FUNCTION relay(a text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SELECT atomic($1)' USING a; EXECUTE format('SELECT %L', a); RETURN a; END $$",
    "SELECT relay('hunter84') AS new_password",
    "COPY (SELECT 1) TO PROGRAM 'exit 1; : hunter37'",
    "SELECT warden.add_issuer('https://i.example', 'HS256', 'hunter38 hunter38 hunter38 hunter38', 'a')",
    "SELECT warden.add_issuer('https://j.example', 'HS256', 'hunter39', 'a')",
    "DO $$ BEGIN EXECUTE 'ALTER ROLE r1 PASSWORD ''hunter40'''; END $$",
    "DO $$ BEGIN EXECUTE 'ALTER ROLE r1 PASSWORD ''hunter41'; END $$",
    "DO 'BEGIN PERFORM 1; /* hunter42 */ END'",
    "CREATE FUNCTION f() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN 'password=hunter43'; END $$",
    "SELECT f()",
    "CREATE PROCEDURE set_password(p text) LANGUAGE plpgsql AS $$ BEGIN EXECUTE format('ALTER ROLE r1 PASSWORD %L', p); END $$",
    "CALL set_password('hunter44')",
    "INSERT INTO account VALUES (1, 'x', 'password: hunter45')",
    "UPDATE account SET password = 'hunter46' WHERE id = 1",
    "PREPARE p1 (text) AS UPDATE account SET password = $1",
    "EXECUTE p1 ('hunter47')",
    "PREPARE p2 AS UPDATE account SET password = 'hunter48'",
    "EXECUTE p2",
    "EXECUTE p3 ('hunter49')",
    "SELECT 1 /* hunter50 */ -- hunter51",
    "SELECT 1 /* hunter52",
    "SELECT E'\\x68unter53\\' hunter54' AS password, 1 / 0",
    "PREPARE TRANSACTION 'hunter55'",
    "NOTIFY channel, 'hunter56 token'",
    "COMMENT ON TABLE account IS 'hunter57'",
    "SECURITY LABEL ON ROLE r1 IS 'hunter58'",
    "ALTER SYSTEM SET primary_conninfo = 'password=hunter59'",
    "EXPLAIN SELECT id FROM account WHERE password = 'hunter60'",
    "DECLARE c CURSOR WITH HOLD FOR SELECT id FROM account WHERE password = 'hunter61'",
    "CREATE TABLE copied AS SELECT id FROM account WHERE password <> 'hunter62'",
    "CREATE ROLE bad OPTION PASSWORD 'hunter63'",
    "SELECT id FROM account WHERE password = \"hunter64\"",
    "SELECT 'hunter65' password FROM nowhere",
    "ALTER ROLE r1 PASSWORD 'a' 'hunter66'",
    "ALTER ROLE r1 PASSWORD 'a'\n'hunter67'",
    "SET app.key = a, hunter68; SELECT nothing",
];

async fn run_all(client: &Client) {
    for sql in STATEMENTS {
        // Many of them fail, as they should.
        drop(client.run(sql).await);
        drop(client.query(*sql, &[]).await);
    }
}

#[tokio::test]
async fn no_password_token_or_key_is_recorded_under_all() -> Result {
    let cluster = cluster("all").await?;
    let dba = cluster.connect("dba", "postgres").await?;
    run_all(&dba).await;
    for sql in [
        "SELECT warden.login($1)",
        "SELECT $1::text AS bearer",
        "UPDATE account SET note = $1",
        "SELECT length($1) AS carried",
    ] {
        drop(dba.query(sql, &[&JWT]).await);
        drop(dba.query(sql, &[&"password=hunter80"]).await);
        drop(dba.query(sql, &[&"https://u:hunter81@host/"]).await);
        drop(
            dba.query(sql, &[&"-----BEGIN PRIVATE KEY-----\nhunter82"])
                .await,
        );
        drop(dba.run(&sql.replace("$1", &format!("'{JWT}'"))).await);
    }
    let seen = cluster
        .activity("command = 'ALTER ROLE' OR query LIKE 'UPDATE account%'")
        .await?;
    assert!(seen.len() > 10, "{}", seen.len());
    assert_nowhere(&cluster, &[PLANTED, "eyJhbGci", "aHVudGVy"]).await
}

#[tokio::test]
async fn no_password_token_or_key_is_recorded_under_digest() -> Result {
    let cluster = cluster("digest").await?;
    let dba = cluster.connect("dba", "postgres").await?;
    run_all(&dba).await;
    assert_nowhere(&cluster, &[PLANTED]).await?;
    // Not even in the form in which an auditor could guess it.
    let su = cluster.superuser().await?;
    for secret in ["hunter01", "hunter46", "hunter47", "hunter32", "hunter44"] {
        let known = su
            .number(&format!(
                "SELECT count(*) FROM warden.activity
                 WHERE parameters::text LIKE '%' || warden.value_digest('{secret}') || '%'
                   AND query NOT LIKE '%value_digest%'"
            ))
            .await?;
        assert_eq!(known, 0, "{secret}");
    }
    Ok(())
}

#[tokio::test]
async fn psql_sets_a_password_that_nobody_reads() -> Result {
    let cluster = cluster("all").await?;
    let hash = "SCRAM-SHA-256$4096:c2FsdA==$storedhunter:serverhunter";
    // What \password sends.
    cluster.psql(
        "dba",
        "postgres",
        &format!(
            "ALTER USER app PASSWORD '{hash}';\n\\set x 'hunter90'\nALTER USER app PASSWORD :'x';\n"
        ),
    )?;
    assert_nowhere(&cluster, &[PLANTED]).await
}

#[tokio::test]
async fn backslashes_and_quotes_hide_nothing_when_their_meaning_changes() -> Result {
    let cluster = cluster("all").await?;
    let dba = cluster.connect("dba", "postgres").await?;
    // Parsed as one message while it was on, run while it is off.
    dba.run(
        "SET standard_conforming_strings = off;
         SELECT 'a\\' AS one, ' hunter70 ' AS two, 'b'",
    )
    .await
    .ok();
    dba.run("SELECT 'a\\' , ' hunter71 ' AS two, 'password'")
        .await
        .ok();
    dba.run("SELECT U&'a\\' , ' hunter72 ' AS two, 'b'")
        .await
        .ok();
    dba.run("ALTER ROLE app PASSWORD 'a\\'hunter73'").await.ok();
    dba.run("PREPARE q AS SELECT 'password a\\' , hunter74 ' AS one")
        .await
        .ok();
    dba.run("SET standard_conforming_strings = on").await?;
    dba.run("EXECUTE q").await.ok();
    dba.run("ALTER ROLE app PASSWORD 'a\\'hunter75'").await.ok();
    dba.run("SET backslash_quote = off; ALTER ROLE app PASSWORD E'a\\'hunter76'")
        .await
        .ok();
    assert_nowhere(&cluster, &["hunter73", "hunter74", "hunter75", "hunter76"]).await?;
    // Literals may be values under `all`, but are never part of the text.
    let su = cluster.superuser().await?;
    let texts = su
        .rows("SELECT text FROM warden.statement WHERE text LIKE '%hunter%'")
        .await?;
    assert!(texts.is_empty(), "{texts:#?}");
    Ok(())
}

#[tokio::test]
async fn encodings_whose_second_byte_is_a_quote_hide_nothing() -> Result {
    let cluster = cluster("all").await?;
    let su = cluster.superuser().await?;
    su.run("CREATE DATABASE euc TEMPLATE template0 ENCODING 'EUC_JP' LC_COLLATE 'C' LC_CTYPE 'C'")
        .await?;
    su.run(
        "CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'",
    )
    .await?;
    for database in ["postgres", "euc", "ascii"] {
        for encoding in ["SJIS", "BIG5", "GBK"] {
            // 0x83 0x5c is one character in these: the second byte is a backslash. 0x81 0x60 and
            // the like are harmless.
            let mut script =
                format!("\\set ON_ERROR_STOP 0\nSET client_encoding = '{encoding}';\n")
                    .into_bytes();
            for sql in [
                &b"ALTER ROLE app PASSWORD 'hunter91 \x83\x5c';\n"[..],
                b"ALTER ROLE app PASSWORD E'\x83\x5c' hunter92;\n",
                b"ALTER ROLE app PASSWORD '\x83\x5c''hunter93';\n",
                b"ALTER ROLE app PASSWORD '\x83' hunter94;\n",
                b"SELECT '\x95\x5c' AS \"\x95\x5c\", 'password hunter95';\n",
            ] {
                script.extend_from_slice(sql);
            }
            cluster.psql_bytes("dba", database, &script)?;
        }
    }
    assert_nowhere(&cluster, &[PLANTED]).await
}

#[tokio::test]
async fn a_text_that_the_server_cut_leaks_nothing_where_it_was_cut() -> Result {
    let cluster = cluster("all").await?;
    let dba = cluster.connect("dba", "postgres").await?;
    // pg_stat_activity keeps 1023 bytes: the cut moves through the literal, quote by quote.
    for pad in 960..1030 {
        let pad = "x".repeat(pad);
        for secret in [
            "'hunter''hunter'",
            "E'hun\\'hunter'",
            "$q$hunter$q$",
            "\"hunter\"",
            "hunter",
        ] {
            dba.run(&format!("ALTER ROLE {pad} PASSWORD {secret} {secret} oops"))
                .await
                .ok();
        }
    }
    assert_nowhere(&cluster, &[PLANTED]).await
}

#[tokio::test]
async fn a_statement_that_no_parser_accepts_keeps_its_keywords_only() -> Result {
    let cluster = cluster("all").await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SELECT 1").await?;
    assert_eq!(
        app.sqlstate("SELECT FROM WHERE tippfehler = 'x'").await?,
        "42601"
    );
    assert_eq!(app.sqlstate("SELECT n FROM not_there").await?, "42P01");
    let seen = cluster.activity("outcome = 'failed'").await?;
    let texts: Vec<_> = seen.iter().map(|a| a["query"].clone()).collect();
    assert_eq!(
        texts,
        ["SELECT FROM WHERE $1 = $2", "SELECT n FROM not_there"]
    );
    Ok(())
}
