//! Dump and restore, with the server's own tools.

use anyhow::ensure;
use warden_tests::{Client, Cluster, Config, Mode, Result};

/// Everything that can be configured, on a table whose numbers of columns change in a dump.
const CONFIGURED: &str = r#"
CREATE ROLE fraud_team;
CREATE ROLE keeper LOGIN SUPERUSER IN ROLE fraud_team, warden_admin;
CREATE ROLE reader LOGIN;
CREATE SCHEMA "Odd schema";
CREATE TABLE "Odd schema"."Customer" (junk int, id int PRIMARY KEY, more junk, "E-mail" text, name text);
"#;

async fn configured() -> Result<Cluster> {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(&CONFIGURED.replace("more junk", "more int"))
        .await?;
    dba.run(
        r#"ALTER TABLE "Odd schema"."Customer" DROP COLUMN junk, DROP COLUMN more;
        INSERT INTO "Odd schema"."Customer" VALUES (1, 'ana@example.com', 'Ana'), (2, 'bo@example.com', 'Bo');
        CREATE TABLE orders (id int PRIMARY KEY, customer int REFERENCES "Odd schema"."Customer", card text);
        INSERT INTO orders VALUES (7, 1, '4111111111111111');
        GRANT USAGE ON SCHEMA "Odd schema" TO reader, app;
        GRANT SELECT ON "Odd schema"."Customer", orders TO reader, fraud_team;
        CREATE FUNCTION public.first_letter(value text) RETURNS text IMMUTABLE LANGUAGE sql RETURN left(value, 1);
        SELECT warden.mask('"Odd schema"."Customer"', 'E-mail', 'warden.partial_email');
        SELECT warden.mask('"Odd schema"."Customer"', 'name', 'public.first_letter');
        SELECT warden.mask('orders', 'card', 'warden.partial_card');
        SELECT warden.unmask_for('fraud_team');
        SELECT warden.add_rule('orders_stay', '{DELETE}', relations => '{orders}', applies_to => '{reader}');
        SELECT warden.enable_rule('no_truncate', false);
        SELECT warden.exclude('noise', '{SELECT}', '{orders}', '{reader}');
        SELECT warden.exclude('former', '{INSERT}');
        SELECT warden.include('former');
        SELECT warden.add_issuer('https://secret.example', 'HS256', 'a secret of at least 32 characters', 'shop')"#,
    )
    .await?;
    Ok(cluster)
}

/// What `reader`, an exempt role and the administrator find in a database.
async fn assert_configured(cluster: &Cluster, database: &str) -> Result {
    let reader = cluster.connect("reader", database).await?;
    let read = r#"SELECT "E-mail", name FROM "Odd schema"."Customer" ORDER BY id"#;
    assert_eq!(
        format!("{:?}", reader.rows(read).await?),
        MASKED,
        "{database}"
    );
    assert_eq!(
        reader.value("SELECT card FROM orders").await?,
        "************1111"
    );
    let keeper = cluster.connect("keeper", database).await?;
    assert_eq!(
        format!("{:?}", keeper.rows(read).await?),
        STORED,
        "{database}"
    );
    let masks = keeper
        .column("SELECT format('%s %s %s', column_name, mask_function, problem) FROM warden.masks ORDER BY 1")
        .await?;
    assert_eq!(
        masks,
        [
            "E-mail warden.partial_email(text) ",
            "card warden.partial_card(text) ",
            "name first_letter(text) ",
        ]
    );
    assert_eq!(
        keeper
            .column("SELECT role FROM warden.mask_exemptions")
            .await?,
        ["fraud_team"]
    );
    assert_eq!(
        reader.sqlstate("DELETE FROM orders WHERE id = 1").await?,
        "WA001"
    );
    let rules = keeper
        .column("SELECT name FROM warden.rule WHERE NOT enabled OR NOT builtin ORDER BY name")
        .await?;
    assert_eq!(rules, ["no_truncate", "orders_stay"]);
    assert_eq!(
        keeper
            .number("SELECT count(*) FROM warden.rule WHERE builtin")
            .await?,
        9
    );
    let exclusions = keeper
        .column("SELECT format('%s %s %s %s', name, active, relations, roles) FROM warden.exclusions ORDER BY 1")
        .await?;
    assert_eq!(exclusions, ["former f {} {}", "noise t {orders} {reader}"]);
    Ok(())
}

const MASKED: &str = r#"[[Some("a***@***.com"), Some("A")], [Some("b***@***.com"), Some("B")]]"#;
const STORED: &str =
    r#"[[Some("ana@example.com"), Some("Ana")], [Some("bo@example.com"), Some("Bo")]]"#;

/// Runs a program of the server that must succeed.
fn done(cluster: &Cluster, name: &str, args: &[&str]) -> Result<String> {
    let (fine, text) = cluster.program(name, args, &[])?;
    ensure!(fine, "{name} {args:?} failed: {text}");
    Ok(text)
}

/// A file in the cluster's scratch directory.
fn file(cluster: &Cluster, name: &str) -> String {
    cluster.scratch().join(name).display().to_string()
}

async fn fresh(cluster: &Cluster, database: &str) -> Result<Client> {
    cluster
        .superuser()
        .await?
        .run(&format!("CREATE DATABASE {database}"))
        .await?;
    cluster.connect("keeper", database).await
}

#[tokio::test]
async fn a_dump_carries_the_configuration_into_another_database() -> Result {
    let cluster = configured().await?;
    assert_configured(&cluster, "postgres").await?;
    let script = file(&cluster, "dump.sql");
    done(
        &cluster,
        "pg_dump",
        &["-U", "keeper", "-d", "postgres", "-f", &script],
    )?;
    fresh(&cluster, "restored").await?;
    let args = [
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-U",
        "keeper",
        "-d",
        "restored",
        "-f",
        &script,
    ];
    done(&cluster, "psql", &args)?;
    assert_configured(&cluster, "restored").await?;
    // The ledger is a new one.
    cluster.drained_in("restored").await?;
    let verdict = cluster.verify("restored").await?;
    assert_eq!(verdict["ok"], true, "{verdict}");
    let text = std::fs::read_to_string(&script)?;
    for absent in [
        "COPY warden.event",
        "COPY warden.session",
        "COPY warden.journal",
        "at least 32 characters",
    ] {
        assert!(!text.contains(absent), "the dump has {absent}");
    }
    Ok(())
}

#[tokio::test]
async fn another_server_takes_a_dump_with_jobs_and_with_inserts() -> Result {
    let cluster = configured().await?;
    let other = Cluster::start(Config::new(Mode::Preloaded)).await?;
    let globals = file(&other, "globals.sql");
    std::fs::write(
        &globals,
        done(&cluster, "pg_dumpall", &["-U", "keeper", "--globals-only"])?,
    )?;
    // The roles that both servers have are errors of no consequence.
    let text = other.psql("postgres", "postgres", &std::fs::read_to_string(&globals)?)?;
    assert!(!text.contains("WA001"), "{text}");
    other
        .superuser()
        .await?
        .run("CREATE EXTENSION pg_warden")
        .await?;
    let directory = file(&cluster, "dump");
    done(
        &cluster,
        "pg_dump",
        &[
            "-U", "keeper", "-d", "postgres", "-Fd", "-j", "2", "-f", &directory,
        ],
    )?;
    fresh(&other, "by_jobs").await?;
    done(
        &other,
        "pg_restore",
        &["-U", "keeper", "-d", "by_jobs", "-e", "-j", "3", &directory],
    )?;
    assert_configured(&other, "by_jobs").await?;
    let script = file(&cluster, "inserts.sql");
    done(
        &cluster,
        "pg_dump",
        &["-U", "keeper", "-d", "postgres", "--inserts", "-f", &script],
    )?;
    fresh(&other, "by_inserts").await?;
    let args = [
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-U",
        "keeper",
        "-d",
        "by_inserts",
        "-f",
        &script,
    ];
    done(&other, "psql", &args)?;
    assert_configured(&other, "by_inserts").await
}

#[tokio::test]
async fn a_dump_by_who_reads_masks_is_an_error_and_not_a_dump_of_masks() -> Result {
    let cluster = configured().await?;
    let args = ["-U", "postgres", "-d", "postgres", "-f", "/dev/null"];
    let (fine, text) = cluster.program("pg_dump", &args, &[])?;
    assert!(!fine, "{text}");
    assert!(
        text.contains("is masked for this role") && text.contains("unmask_for"),
        "{text}"
    );
    let script = file(&cluster, "masks.sql");
    done(
        &cluster,
        "pg_dump",
        &[
            "-U",
            "postgres",
            "--enable-row-security",
            "-d",
            "postgres",
            "-f",
            &script,
        ],
    )?;
    let text = std::fs::read_to_string(&script)?;
    assert!(
        text.contains("a***@***.com") && !text.contains("ana@example.com"),
        "{text}"
    );
    Ok(())
}

#[tokio::test]
async fn a_restored_issuer_without_its_secret_is_refused_and_says_why() -> Result {
    let cluster = configured().await?;
    let script = file(&cluster, "dump.sql");
    done(
        &cluster,
        "pg_dump",
        &["-U", "keeper", "-d", "postgres", "-f", &script],
    )?;
    let keeper = fresh(&cluster, "restored").await?;
    done(
        &cluster,
        "psql",
        &["-X", "-U", "keeper", "-d", "restored", "-f", &script],
    )?;
    let missing = "SELECT secret_missing FROM warden.issuers";
    assert_eq!(keeper.value(missing).await?, "t");
    // {"alg":"HS256"} {"iss":"https://secret.example"}, and some signature.
    let login = "SELECT warden.login('eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJodHRwczovL3NlY3JldC5leGFtcGxlIn0.AAAA')";
    let error = keeper.error(login).await?;
    assert_eq!(error.code().code(), "WA003");
    assert!(
        error
            .detail()
            .unwrap_or_default()
            .contains("a dump does not carry it"),
        "{error:?}"
    );
    keeper
        .run("SELECT warden.add_issuer('https://secret.example', 'HS256', 'another secret of 32 characters or more', 'shop')")
        .await?;
    assert_eq!(keeper.value(missing).await?, "f");
    let error = keeper.error(login).await?;
    assert!(
        !error.detail().unwrap_or_default().contains("dump"),
        "{error:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_restored_mask_without_its_column_stops_all_reading() -> Result {
    let cluster = configured().await?;
    let script = file(&cluster, "data.sql");
    done(
        &cluster,
        "pg_dump",
        &["-U", "keeper", "-d", "postgres", "-f", &script],
    )?;
    // Somebody has edited the dump; another table was left out.
    let text = std::fs::read_to_string(&script)?
        .replace("    name text\n", "    full_name text\n")
        .replace("(id, \"E-mail\", name)", "(id, \"E-mail\", full_name)")
        .replace("TABLE public.orders ", "TABLE public.purchases ")
        .replace("COPY public.orders ", "COPY public.purchases ");
    std::fs::write(&script, text)?;
    let keeper = fresh(&cluster, "restored").await?;
    cluster.program(
        "psql",
        &["-X", "-U", "keeper", "-d", "restored", "-f", &script],
        &[],
    )?;
    let reader = cluster.connect("reader", "restored").await?;
    keeper
        .run(r#"GRANT SELECT ON "Odd schema"."Customer" TO reader"#)
        .await?;
    for sql in [
        r#"SELECT id FROM "Odd schema"."Customer""#,
        r#"COPY "Odd schema"."Customer" TO STDOUT"#,
        r#"SELECT count(*) FROM "Odd schema"."Customer""#,
    ] {
        let error = reader.error(sql).await?;
        assert_eq!(error.code().code(), "WA001", "{sql}: {error:?}");
        assert!(
            error.message().contains("\"Odd schema\".\"Customer\".name"),
            "{error:?}"
        );
    }
    let problems = keeper
        .column("SELECT problem FROM warden.masks WHERE problem IS NOT NULL ORDER BY 1")
        .await?;
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(
        problems[1].contains("public.orders.card does not exist"),
        "{problems:?}"
    );
    // A table with the name is masked from its first row on.
    keeper
        .run("CREATE TABLE orders (id int, card text); INSERT INTO orders VALUES (1, '4111111111111111'); GRANT SELECT ON orders TO reader")
        .await?;
    assert_eq!(
        reader.value("SELECT card FROM orders").await?,
        "************1111"
    );
    keeper
        .run(
            r#"SELECT warden.mask('"Odd schema"."Customer"', 'full_name', 'warden.redact');
            SELECT warden.unmask('"Odd schema"."Customer"', 'name')"#,
        )
        .await?;
    let read = r#"SELECT full_name FROM "Odd schema"."Customer" ORDER BY id"#;
    assert_eq!(reader.column(read).await?, ["***", "***"]);
    Ok(())
}

#[tokio::test]
async fn masks_rules_and_exemptions_follow_what_is_renamed() -> Result {
    let cluster = configured().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(
        r#"ALTER TABLE "Odd schema"."Customer" RENAME COLUMN "E-mail" TO mail;
        ALTER TABLE "Odd schema"."Customer" RENAME TO client;
        ALTER SCHEMA "Odd schema" RENAME TO crm;
        ALTER ROLE fraud_team RENAME TO investigators"#,
    )
    .await?;
    let reader = cluster.connect("reader", "postgres").await?;
    assert_eq!(
        reader
            .column("SELECT mail FROM crm.client ORDER BY id")
            .await?,
        ["a***@***.com", "b***@***.com"]
    );
    let keeper = cluster.connect("keeper", "postgres").await?;
    assert_eq!(
        keeper
            .value("SELECT mail FROM crm.client WHERE id = 1")
            .await?,
        "ana@example.com"
    );
    let script = file(&cluster, "dump.sql");
    done(
        &cluster,
        "pg_dump",
        &["-U", "keeper", "-d", "postgres", "-f", &script],
    )?;
    let text = std::fs::read_to_string(&script)?;
    assert!(
        text.contains("column crm.client.mail\t") && text.contains("role investigators"),
        "{text}"
    );
    Ok(())
}

#[tokio::test]
async fn what_is_gone_is_not_dumped_and_matches_nobody() -> Result {
    let cluster = configured().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run(
        "SELECT warden.add_rule('nobody_grants', '{GRANT}', applies_to => '{reader}', exempt => '{fraud_team}');
         ALTER TABLE orders DROP COLUMN card;
         REVOKE ALL ON ALL TABLES IN SCHEMA public, \"Odd schema\" FROM reader, fraud_team;
         REVOKE ALL ON SCHEMA \"Odd schema\" FROM reader;
         DROP ROLE reader, fraud_team",
    )
    .await?;
    let script = file(&cluster, "dump.sql");
    dba.run("CREATE ROLE exempt; SELECT warden.unmask_for('exempt'); GRANT exempt TO keeper")
        .await?;
    done(
        &cluster,
        "pg_dump",
        &["-U", "keeper", "-d", "postgres", "-f", &script],
    )?;
    fresh(&cluster, "restored").await?;
    let args = [
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-U",
        "keeper",
        "-d",
        "restored",
        "-f",
        &script,
    ];
    done(&cluster, "psql", &args)?;
    let keeper = cluster.connect("keeper", "restored").await?;
    assert_eq!(
        keeper
            .value("SELECT exempt FROM warden.rule WHERE name = 'nobody_grants'")
            .await?,
        "{gone}"
    );
    assert_eq!(
        keeper
            .value("SELECT applies_to FROM warden.rule WHERE name = 'nobody_grants'")
            .await?,
        "{gone}"
    );
    assert_eq!(keeper.number("SELECT count(*) FROM warden.masks").await?, 2);
    assert_eq!(
        keeper
            .column("SELECT role FROM warden.mask_exemptions")
            .await?,
        ["exempt"]
    );
    // The rule was for a role that is gone, and has not become one for all.
    keeper
        .run("CREATE TABLE t (); GRANT SELECT ON t TO app")
        .await
}

#[tokio::test]
async fn an_ordinary_role_moves_its_schema_without_the_extension() -> Result {
    let cluster = configured().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("CREATE TABLE mine (id int PRIMARY KEY, v text); INSERT INTO mine VALUES (1, 'one')")
        .await?;
    let script = file(&cluster, "mine.sql");
    done(
        &cluster,
        "pg_dump",
        &["-U", "app", "-d", "postgres", "-t", "mine", "-f", &script],
    )?;
    let plain = Cluster::start(Config::new(Mode::Plain)).await?;
    plain
        .superuser()
        .await?
        .run("CREATE ROLE app LOGIN; GRANT CREATE ON SCHEMA public TO app")
        .await?;
    let args = [
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-U",
        "app",
        "-d",
        "postgres",
        "-f",
        &script,
    ];
    done(&plain, "psql", &args)?;
    // And back, into a server with the extension.
    app.run("ALTER TABLE mine RENAME TO old").await?;
    app.run("ALTER INDEX mine_pkey RENAME TO old_pkey").await?;
    done(&cluster, "psql", &args)?;
    assert_eq!(app.value("SELECT v FROM mine").await?, "one");
    Ok(())
}

#[tokio::test]
async fn a_restored_sink_ships_nothing_before_it_is_enabled() -> Result {
    let cluster = configured().await?;
    let keeper = cluster.connect("keeper", "postgres").await?;
    keeper
        .run(
            "SELECT warden.add_sink('archive', 'file:events.ndjson');
             SELECT warden.add_sink('siem', 'http://127.0.0.1:1/in?token=of-the-original')",
        )
        .await?;
    let script = file(&cluster, "dump.sql");
    let args = ["-U", "keeper", "-d", "postgres", "-f", &script];
    done(&cluster, "pg_dump", &args)?;
    assert!(!std::fs::read_to_string(&script)?.contains("of-the-original"));
    let keeper = fresh(&cluster, "restored").await?;
    let args = ["-X", "-U", "keeper", "-d", "restored", "-f", &script];
    done(&cluster, "psql", &args)?;
    let states = "SELECT format('%s %s %s', name, url, state) FROM warden.sink_status";
    assert_eq!(
        keeper.column(states).await?,
        [
            "archive file:events.ndjson restored",
            "siem http://127.0.0.1:1/in?... restored"
        ]
    );
    let error = keeper.error("SELECT warden.enable_sink('siem')").await?;
    assert_eq!(error.code().code(), "55000", "{error:?}");
    keeper.run("SELECT warden.enable_sink('archive')").await?;
    cluster
        .wait_until("the sink has all", async || {
            Ok(keeper
                .value("SELECT state FROM warden.sink_status WHERE name = 'archive'")
                .await?
                == "up to date")
        })
        .await
}
