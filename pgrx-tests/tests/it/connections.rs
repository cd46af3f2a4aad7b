//! Who connects, who is refused, and how sessions end.

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use warden_tests::{Client, Cluster, Config, Mode, Result};

/// A cluster that listens on TCP, with these lines before those of pg_hba.conf.
async fn guarded(hba: &str) -> Result<Cluster> {
    guarded_with(Config::new(Mode::Preloaded).tcp(), hba).await
}

async fn guarded_with(config: Config, hba: &str) -> Result<Cluster> {
    let cluster = Cluster::with_extension(config).await?;
    let path = cluster.data().join("pg_hba.conf");
    let old = fs::read_to_string(&path)?;
    fs::write(&path, format!("{hba}\n{old}"))?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE locked LOGIN PASSWORD 'right'; CREATE ROLE group_role NOLOGIN")
        .await?;
    su.run("SELECT pg_reload_conf()").await?;
    // The postmaster reads the file when it gets to it.
    cluster
        .wait_until("pg_hba.conf is read", async || {
            Ok(cluster.connect("probe", "postgres").await.is_err())
        })
        .await?;
    Ok(cluster)
}

/// Hashing is the client's work with SCRAM: too slow for a storm.
const STORM: &str = "local all probe reject\nlocal all locked password";
const PASSWORD: &str = "local all probe reject\nlocal all locked scram-sha-256";

async fn login(cluster: &Cluster, password: &str) -> Result<Client> {
    cluster
        .connector()
        .connect("locked", "postgres", |c| {
            c.password(password).application_name("till 7");
        })
        .await
}

/// SQLSTATE and message of a connection that must fail.
fn refusal(result: Result<Client>) -> Result<String> {
    match result {
        Ok(_) => anyhow::bail!("connected"),
        Err(e) => Ok(said(&e)),
    }
}

fn said(e: &anyhow::Error) -> String {
    match e
        .downcast_ref::<tokio_postgres::Error>()
        .and_then(|e| e.as_db_error())
    {
        Some(e) => format!("{}: {}", e.code().code(), e.message()),
        None => format!("{e:?}"),
    }
}

#[tokio::test]
async fn a_connection_is_recorded_before_its_first_statement() -> Result {
    let cluster = Cluster::with_extension(Config::new(Mode::Preloaded).tcp()).await?;
    let _idle = cluster.connect_tcp("app", "postgres", "till 7").await?;
    let seen = cluster
        .the_connection("event = 'connected' AND role = 'app'")
        .await?;
    assert_eq!(seen["database"], "postgres");
    assert_eq!(seen["kind"], "client");
    assert_eq!(seen["client_addr"], "127.0.0.1");
    assert!(seen["client_port"].as_i64() > Some(0), "{seen}");
    assert_eq!(seen["application_name"], "till 7");
    assert_eq!(seen["tls"], false);
    assert_eq!(seen["method"], "trust");
    assert_eq!(seen["ended"], Value::Null);
    let su = cluster.superuser().await?;
    let pid = su
        .number("SELECT pid FROM pg_stat_activity WHERE application_name = 'till 7'")
        .await?;
    assert_eq!(seen["pid"].as_i64(), Some(pid));
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_connection_and_its_statements_are_of_the_same_backend() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SELECT 1 AS by_app").await?;
    let connected = cluster
        .the_connection("event = 'connected' AND role = 'app'")
        .await?;
    let su = cluster.superuser().await?;
    let backend = su
        .column("SELECT DISTINCT backend FROM warden.session WHERE login_role = 'app'")
        .await?;
    assert_eq!(backend, [connected["backend"].to_string()]);
    Ok(())
}

#[tokio::test]
async fn a_disconnection_is_recorded_with_its_duration() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SET application_name = 'renamed'; SELECT pg_sleep(0.2)")
        .await?;
    drop(app);
    let seen = cluster
        .the_connection("event = 'disconnected' AND role = 'app'")
        .await?;
    assert_eq!(seen["ended"], "normal");
    assert_eq!(seen["sqlstate"], Value::Null);
    assert_eq!(seen["application_name"], "renamed");
    let su = cluster.superuser().await?;
    let long = "SELECT duration BETWEEN interval '0.2 s' AND interval '10 min'
                FROM warden.connections WHERE event = 'disconnected' AND role = 'app'";
    assert_eq!(su.value(long).await?, "t");
    let began = cluster
        .the_connection("event = 'connected' AND role = 'app'")
        .await?;
    assert_eq!(
        (&began["ended"], &began["ended_at"]),
        (&json!("normal"), &seen["at"])
    );
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_terminated_session_says_so() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    let pid = app.number("SELECT pg_backend_pid()").await?;
    let su = cluster.superuser().await?;
    su.run(&format!("SELECT pg_terminate_backend({pid})"))
        .await?;
    let seen = cluster
        .the_connection("event = 'disconnected' AND role = 'app'")
        .await?;
    assert_eq!(seen["ended"], "terminated");
    assert_eq!(seen["sqlstate"], "57P01");
    let reason = "terminating connection due to administrator command";
    assert_eq!(seen["reason"], reason);
    Ok(())
}

#[tokio::test]
async fn a_session_that_a_fatal_error_ends_says_which() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SET idle_session_timeout = '50ms'").await?;
    let seen = cluster
        .the_connection("event = 'disconnected' AND role = 'app'")
        .await?;
    assert_eq!(
        (&seen["ended"], &seen["sqlstate"]),
        (&json!("fatal"), &json!("57P05"))
    );
    Ok(())
}

#[tokio::test]
async fn a_killed_session_is_ended_by_the_restart_of_the_server() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    let pid = app.number("SELECT pg_backend_pid()").await?;
    cluster
        .the_connection("event = 'connected' AND role = 'app'")
        .await?;
    Cluster::kill(pid)?;
    cluster
        .wait_until("the server is back", async || {
            Ok(app.is_closed() && cluster.superuser().await.is_ok())
        })
        .await?;
    let seen = cluster
        .the_connection("event = 'connected' AND role = 'app' AND ended IS NOT NULL")
        .await?;
    assert_eq!(seen["ended"], "lost");
    let started = cluster
        .connections(&format!(
            "event = 'server started' AND seq > {}",
            seen["seq"]
        ))
        .await?;
    assert_eq!(started[0]["at"], seen["ended_at"]);
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_wrong_password_is_recorded() -> Result {
    let cluster = guarded(PASSWORD).await?;
    let message = refusal(login(&cluster, "wr0ng-secret").await)?;
    assert!(message.contains("28P01"), "{message}");
    let _right = login(&cluster, "right").await?;
    let seen = cluster
        .the_connection("event = 'refused' AND role = 'locked'")
        .await?;
    assert_eq!(seen["sqlstate"], "28P01");
    let reason = "password authentication failed for user \"locked\"";
    assert_eq!(seen["reason"], reason);
    assert_eq!(seen["count"], 1);
    assert_eq!(seen["database"], "postgres");
    assert_eq!(seen["method"], "scram-sha-256");
    assert_eq!(seen["application_name"], "till 7");
    assert!(!seen.to_string().contains("secret"), "{seen}");
    let admitted = cluster
        .the_connection("event = 'connected' AND role = 'locked'")
        .await?;
    assert_eq!(
        (&admitted["method"], &admitted["identity"]),
        (&json!("scram-sha-256"), &json!("locked"))
    );
    cluster.assert_verifies().await
}

/// The message of the first connection that is refused.
async fn once_refused(connect: impl AsyncFn() -> Result<Client>) -> Result<String> {
    let start = Instant::now();
    loop {
        match connect().await {
            Err(e) => return Ok(said(&e)),
            Ok(_) => anyhow::ensure!(start.elapsed().as_secs() < 90, "connections go on"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Connects in vain, and returns the one event of it.
async fn refused(cluster: &Cluster, user: &str, database: &str, sqlstate: &str) -> Result<Value> {
    let message = refusal(cluster.connect(user, database).await)?;
    assert!(message.contains(sqlstate), "{user}@{database}: {message}");
    let condition =
        format!("event = 'refused' AND role = '{user}' AND database = '{database}' AND count = 1");
    let seen = cluster.the_connection(&condition).await?;
    assert_eq!(seen["sqlstate"], sqlstate, "{seen}");
    let reason = seen["reason"].as_str().unwrap_or_default();
    assert_eq!(message, format!("{sqlstate}: {reason}"));
    assert_eq!(
        cluster
            .connections(&format!("event = 'connected' AND pid = {}", seen["pid"]))
            .await?,
        Vec::<Value>::new()
    );
    Ok(seen)
}

#[tokio::test]
async fn every_kind_of_refusal_is_recorded_with_its_reason() -> Result {
    let cluster = guarded(
        "local all probe reject\nlocal postgres barred reject\nhost all app 127.0.0.1/32 reject",
    )
    .await?;
    let su = cluster.superuser().await?;
    su.run(
        "CREATE ROLE barred LOGIN; CREATE ROLE narrow LOGIN CONNECTION LIMIT 0;
         CREATE ROLE outsider LOGIN",
    )
    .await?;
    su.run("CREATE DATABASE small CONNECTION LIMIT 0").await?;
    su.run("CREATE DATABASE closed ALLOW_CONNECTIONS false")
        .await?;
    su.run("CREATE DATABASE private").await?;
    su.run("REVOKE CONNECT ON DATABASE private FROM PUBLIC")
        .await?;
    for (user, database, sqlstate) in [
        ("app", "no_such_database", "3D000"),
        ("no_such_role", "postgres", "28000"),
        ("group_role", "postgres", "28000"),
        ("barred", "postgres", "28000"),
        ("narrow", "postgres", "53300"),
        ("app", "small", "53300"),
        ("app", "closed", "55000"),
        ("outsider", "private", "42501"),
    ] {
        refused(&cluster, user, database, sqlstate).await?;
    }
    let far = refusal(cluster.connect_tcp("app", "postgres", "x").await)?;
    assert!(far.contains("pg_hba.conf rejects"), "{far}");
    let seen = cluster
        .the_connection("event = 'refused' AND client_addr = '127.0.0.1'")
        .await?;
    assert_eq!(seen["method"], "reject");
    cluster.assert_verifies().await
}

#[tokio::test]
async fn without_an_entry_in_pg_hba_the_attempt_is_recorded() -> Result {
    let cluster = guarded("local all probe reject").await?;
    let path = cluster.data().join("pg_hba.conf");
    let open = fs::read_to_string(&path)?;
    fs::write(&path, open.replace("host    all", "# host    all"))?;
    cluster
        .superuser()
        .await?
        .run("SELECT pg_reload_conf()")
        .await?;
    let message = once_refused(async || cluster.connect_tcp("app", "postgres", "x").await).await?;
    assert!(message.contains("no pg_hba.conf entry"), "{message}");
    let seen = cluster
        .the_connection("event = 'refused' AND client_addr = '127.0.0.1'")
        .await?;
    assert!(
        seen["reason"]
            .as_str()
            .is_some_and(|r| r.starts_with("no pg_hba.conf entry for host \"127.0.0.1\"")),
        "{seen}"
    );
    Ok(())
}

#[tokio::test]
async fn too_many_clients_are_recorded() -> Result {
    let cluster = Cluster::with_extension(
        Config::new(Mode::Preloaded)
            .line("max_connections = 8\nsuperuser_reserved_connections = 3"),
    )
    .await?;
    let mut held = vec![];
    let message = loop {
        match cluster.connect("app", "postgres").await {
            Ok(client) => held.push(client),
            Err(e) => break said(&e),
        }
        assert!(held.len() < 8);
    };
    assert!(message.contains("53300"), "{message}");
    let seen = cluster
        .the_connection("event = 'refused' AND role = 'app'")
        .await?;
    assert_eq!(seen["sqlstate"], "53300");
    Ok(())
}

/// Number of refusals of `locked` that the ledger knows, and number of their events.
async fn storm(cluster: &Cluster) -> Result<(i64, i64)> {
    let seen = cluster
        .connections("event = 'refused' AND role = 'locked'")
        .await?;
    let sum = seen.iter().filter_map(|s| s["count"].as_i64()).sum();
    Ok((sum, seen.len() as i64))
}

#[tokio::test]
async fn a_storm_of_failures_becomes_a_few_events_that_count_them_all() -> Result {
    let mut cluster = guarded(STORM).await?;
    for _ in 0..200 {
        refusal(login(&cluster, "wrong").await)?;
    }
    let (_, events) = storm(&cluster).await?;
    assert!((1..20).contains(&events), "{events} events");
    // What is still being counted is recorded when the server stops.
    cluster.restart(Config::new(Mode::Preloaded)).await?;
    let (sum, events) = storm(&cluster).await?;
    assert_eq!(sum, 200);
    assert!(events < 20, "{events} events");
    cluster.assert_verifies().await
}

#[tokio::test]
async fn what_was_counted_is_recorded_when_the_window_is_over() -> Result {
    let config = Config::new(Mode::Preloaded).line("warden.connection_failure_window = 1");
    let cluster = guarded_with(config, STORM).await?;
    for _ in 0..50 {
        refusal(login(&cluster, "wrong").await)?;
    }
    cluster
        .wait_until("all are recorded", async || {
            Ok(storm(&cluster).await?.0 == 50)
        })
        .await
}

#[tokio::test]
async fn concurrent_failures_are_counted_too() -> Result {
    let mut cluster = guarded(STORM).await?;
    for _ in 0..10 {
        let tries: Vec<_> = (0..8)
            .map(|_| {
                let connector = cluster.connector();
                tokio::spawn(async move {
                    let wrong = |c: &mut tokio_postgres::Config| {
                        c.password("wrong");
                    };
                    connector
                        .connect("locked", "postgres", wrong)
                        .await
                        .is_err()
                })
            })
            .collect();
        for t in tries {
            assert!(t.await?);
        }
    }
    cluster.restart(Config::new(Mode::Preloaded)).await?;
    assert_eq!(storm(&cluster).await?.0, 80);
    Ok(())
}

#[tokio::test]
async fn more_kinds_of_failures_than_can_be_counted_are_recorded_one_by_one() -> Result {
    let cluster = Cluster::with_warden().await?;
    for n in 0..200 {
        refusal(cluster.connect(&format!("guess_{n}"), "postgres").await)?;
    }
    let seen = cluster
        .connections("event = 'refused' AND role LIKE 'guess%'")
        .await?;
    assert_eq!(seen.len(), 200);
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_server_that_starts_or_stops_refuses_on_record() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE late LOGIN").await?;
    // A smart shutdown waits for clients, and refuses new ones.
    cluster.stop_smart()?;
    let message = once_refused(async || cluster.connect("late", "postgres").await).await?;
    assert!(message.contains("57P03"), "{message}");
    drop((app, su));
    cluster.stop()?;
    cluster.up().await?;
    let seen = cluster
        .connections("event = 'refused' AND role = 'late'")
        .await?;
    assert_eq!(seen[0]["sqlstate"], "57P03");
    assert_eq!(seen[0]["reason"], "the database system is shutting down");
    cluster.assert_verifies().await
}

#[tokio::test]
async fn each_database_has_the_connections_of_its_name_in_its_ledger() -> Result {
    let config = Config::new(Mode::Preloaded).line("warden.connection_failure_window = 0");
    let cluster = guarded_with(config, STORM).await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("CREATE DATABASE second").await?;
    let second = cluster.connect("dba", "second").await?;
    second.run("CREATE EXTENSION pg_warden").await?;
    cluster.drained_in("second").await?;
    let fails = async |database: &str| {
        let connector = cluster.connector();
        let wrong = |c: &mut tokio_postgres::Config| {
            c.password("wrong");
        };
        refusal(connector.connect("locked", database, wrong).await)
    };
    let count = async |database: &str, of: &str| -> Result<i64> {
        cluster.drained_in(database).await?;
        let client = cluster.connect("postgres", database).await?;
        client
            .number(&format!(
                "SELECT coalesce(sum(count), 0) FROM warden.connections
                 WHERE event = 'refused' AND role = 'locked' AND database = '{of}'"
            ))
            .await
    };
    cluster
        .wait_until("the name is known", async || {
            fails("second").await?;
            Ok(count("second", "second").await? > 0)
        })
        .await?;
    drop(second);
    dba.run("ALTER DATABASE second RENAME TO renamed").await?;
    cluster
        .wait_until("the new name is known", async || {
            fails("renamed").await?;
            Ok(count("renamed", "renamed").await? > 0)
        })
        .await?;
    let seen = count("postgres", "second").await?;
    fails("second").await?;
    assert_eq!(count("postgres", "second").await?, seen + 1);
    Ok(())
}

#[tokio::test]
async fn replication_connections_are_sessions_of_their_own_kind() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE copier LOGIN REPLICATION").await?;
    let (ok, said) = cluster.program(
        "psql",
        &[
            "-X",
            "-U",
            "copier",
            "-c",
            "IDENTIFY_SYSTEM",
            "dbname=postgres replication=database",
        ],
        &[],
    )?;
    assert!(ok, "{said}");
    let seen = cluster
        .the_connection("event = 'connected' AND role = 'copier'")
        .await?;
    assert_eq!(
        (&seen["kind"], &seen["database"]),
        (&json!("replication"), &json!("postgres"))
    );
    cluster
        .the_connection("event = 'disconnected' AND role = 'copier' AND kind = 'replication'")
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_base_backup_is_on_record() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE copier LOGIN REPLICATION").await?;
    fs::set_permissions(cluster.scratch(), fs::Permissions::from_mode(0o777))?;
    let target = cluster.scratch().join("backup");
    let target = target.to_string_lossy();
    let (ok, said) = cluster.program(
        "pg_basebackup",
        &["-U", "copier", "-D", &target, "-c", "fast", "--no-sync"],
        &[],
    )?;
    assert!(ok, "{said}");
    cluster
        .wait_until("both connections have ended", async || {
            let seen = cluster
                .connections("event = 'disconnected' AND role = 'copier'")
                .await?;
            Ok(seen.len() == 2
                && seen.iter().all(|s| {
                    s["kind"] == "replication" && s["application_name"] == "pg_basebackup"
                }))
        })
        .await
}

#[tokio::test]
async fn a_change_of_the_session_user_shows_from_the_next_statement_on() -> Result {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    dba.run("SET SESSION AUTHORIZATION app").await?;
    dba.run("SELECT 1 AS as_app").await?;
    dba.run("RESET SESSION AUTHORIZATION").await?;
    dba.run("SELECT 2 AS as_dba").await?;
    let seen = cluster
        .activity("query LIKE 'SELECT $1 AS as_%' OR command LIKE 'SET' OR command = 'RESET'")
        .await?;
    let who: Vec<_> = seen
        .iter()
        .map(|s| (s["login_role"].as_str(), s["query"].as_str()))
        .collect();
    assert_eq!(
        who,
        [
            (Some("dba"), Some("SET SESSION AUTHORIZATION app")),
            (Some("app"), Some("SELECT $1 AS as_app")),
            (Some("app"), Some("RESET SESSION AUTHORIZATION")),
            (Some("dba"), Some("SELECT $1 AS as_dba")),
        ]
    );
    let su = cluster.superuser().await?;
    let backends = "SELECT count(DISTINCT backend) FROM warden.session s
        JOIN warden.activity a ON a.pid = s.pid WHERE a.query LIKE '%AS as_dba'";
    assert_eq!(su.number(backends).await?, 1);
    Ok(())
}

/// Attempts that fail, as psql shows them.
fn attempts(cluster: &Cluster) -> Result<String> {
    let mut shown = String::new();
    for options in [
        "dbname=no_such_database user=app",
        "dbname=postgres user=no_such_role",
        "dbname=postgres user=group_role",
        "dbname=postgres user=barred",
        "dbname=postgres user=locked password=wrong",
        "dbname=postgres user=app options='-c search_path=a -c no.such=1 -c work_mem=x'",
        "dbname=postgres user=app replication=database",
    ] {
        let socket = cluster.scratch().display().to_string();
        let (ok, said) = cluster.program("psql", &["-X", "-c", "SELECT 1", options], &[])?;
        assert!(!ok, "{options}: {said}");
        shown += &said.replace(&socket, "SOCKET");
    }
    Ok(shown)
}

#[tokio::test]
async fn refused_clients_see_the_same_errors_with_and_without_us() -> Result {
    let mut shown = vec![];
    for mode in [Mode::Plain, Mode::Preloaded] {
        let cluster = Cluster::start(Config::new(mode)).await?;
        let su = cluster.superuser().await?;
        su.run(
            "CREATE ROLE app LOGIN; CREATE ROLE barred LOGIN; CREATE ROLE group_role;
             CREATE ROLE locked LOGIN PASSWORD 'right'",
        )
        .await?;
        let path = cluster.data().join("pg_hba.conf");
        let old = fs::read_to_string(&path)?;
        fs::write(
            &path,
            format!("local all barred reject\nlocal all locked scram-sha-256\n{old}"),
        )?;
        su.run("SELECT pg_reload_conf()").await?;
        cluster
            .wait_until("pg_hba.conf is read", async || {
                Ok(cluster.connect("barred", "postgres").await.is_err())
            })
            .await?;
        shown.push(attempts(&cluster)?);
        if mode == Mode::Preloaded {
            // So far, the library is loaded and no database has the extension.
            su.run("CREATE EXTENSION pg_warden").await?;
            assert_eq!(
                cluster.connections("event = 'refused'").await?,
                Vec::<Value>::new()
            );
            shown.push(attempts(&cluster)?);
            let seen = cluster.connections("event = 'refused'").await?;
            assert!(seen.len() >= 7, "{seen:#?}");
        }
    }
    assert_eq!(shown[0], shown[1]);
    assert_eq!(shown[0], shown[2]);
    Ok(())
}

#[tokio::test]
async fn nothing_is_recorded_where_no_database_has_the_extension() -> Result {
    let cluster = Cluster::start(Config::new(Mode::Preloaded)).await?;
    assert!(cluster.connect("no_such_role", "postgres").await.is_err());
    let su = cluster.superuser().await?;
    su.run("SELECT 1").await?;
    let journal = fs::read_dir(cluster.data().join("pg_warden"))?
        .flatten()
        .filter(|e| e.path().extension().is_some_and(|x| x == "seg"));
    assert_eq!(journal.count(), 0);
    Ok(())
}

#[tokio::test]
async fn nobody_but_auditors_reads_connections_and_nobody_writes_them() -> Result {
    let cluster = Cluster::with_warden().await?;
    cluster.drained().await?;
    let app = cluster.connect("app", "postgres").await?;
    for table in ["connections", "connection_event"] {
        let sql = format!("SELECT * FROM warden.{table}");
        assert_eq!(app.sqlstate(&sql).await?, "42501");
    }
    let auditor = cluster.connect("auditor", "postgres").await?;
    assert!(
        auditor
            .number("SELECT count(*) FROM warden.connections")
            .await?
            > 0
    );
    let dba = cluster.connect("dba", "postgres").await?;
    let sql = "DELETE FROM warden.connection_event WHERE id > 0";
    assert_eq!(dba.sqlstate(sql).await?, "WA001");
    Ok(())
}

#[tokio::test]
async fn a_changed_connection_is_named() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    let _app = cluster.connect("app", "postgres").await?;
    let seen = cluster
        .the_connection("event = 'connected' AND role = 'app'")
        .await?;
    cluster.restart(Config::new(Mode::Plain)).await?;
    let su = cluster.superuser().await?;
    su.run(&format!(
        "UPDATE warden.connection_event SET role = 'ana' WHERE id = {}",
        seen["seq"]
    ))
    .await?;
    cluster.restart(Config::new(Mode::Preloaded)).await?;
    let verdict = cluster.verify("postgres").await?;
    assert_eq!(verdict["first_bad"], seen["seq"], "{verdict}");
    Ok(())
}

#[tokio::test]
async fn refusals_are_recorded_even_if_the_log_does_not_show_them() -> Result {
    let config = Config::new(Mode::Preloaded).line("log_min_messages = panic");
    let cluster = guarded_with(config, PASSWORD).await?;
    refusal(login(&cluster, "wrong").await)?;
    let seen = cluster
        .the_connection("event = 'refused' AND role = 'locked'")
        .await?;
    assert_eq!(
        (&seen["reason"], &seen["sqlstate"]),
        (&json!("authentication failed"), &json!("28000"))
    );
    refusal(cluster.connect("app", "no_such_database").await)?;
    let seen = cluster
        .the_connection("event = 'refused' AND database = 'no_such_database'")
        .await?;
    assert_eq!(seen["reason"], Value::Null);
    Ok(())
}

#[tokio::test]
async fn clients_of_a_server_that_recovers_are_refused_on_record() -> Result {
    let config = Config::new(Mode::Preloaded).line("warden.connection_failure_window = 0");
    let mut cluster = Cluster::with_extension(config).await?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE eager LOGIN; CREATE TABLE t AS SELECT generate_series(1, 300000)")
        .await?;
    // The names of databases are on disk.
    cluster.drained().await?;
    cluster.stop_immediate()?;
    let connector = cluster.connector();
    let eager = tokio::spawn(async move {
        let mut refused = 0;
        loop {
            match connector.connect("eager", "postgres", |_| ()).await {
                Ok(_) => return refused,
                Err(e) if said(&e).starts_with("57P03") => refused += 1,
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    cluster.up().await?;
    let refused: usize = eager.await?;
    let seen = cluster
        .connections("event = 'refused' AND role = 'eager'")
        .await?;
    assert_eq!(seen.len(), refused, "{seen:#?}");
    assert!(seen.iter().all(|s| s["sqlstate"] == "57P03"), "{seen:#?}");
    cluster.assert_verifies().await
}

#[tokio::test]
async fn tls_shows() -> Result {
    let cluster = Cluster::with_extension(Config::new(Mode::Preloaded).tcp()).await?;
    let su = cluster.superuser().await?;
    if su.value("SHOW ssl_library").await?.is_empty() {
        return Ok(());
    }
    let file = |name: &str| cluster.data().join(name).to_string_lossy().into_owned();
    let (key, crt) = (file("server.key"), file("server.crt"));
    let request = "req -x509 -nodes -newkey rsa:2048 -days 2 -subj /CN=localhost";
    let mut args: Vec<&str> = request.split(' ').collect();
    args.extend(["-keyout", &key, "-out", &crt]);
    let (ok, said) = cluster.program("openssl", &args, &[])?;
    assert!(ok, "{said}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    su.run("ALTER SYSTEM SET ssl = on").await?;
    su.run("SELECT pg_reload_conf()").await?;
    let options = "host=127.0.0.1 dbname=postgres user=app sslmode=require";
    cluster
        .wait_until("TLS is on", async || {
            let args = ["-X", "-c", "SELECT 1", options];
            // Certificates of whoever runs the tests are nobody's business.
            Ok(cluster
                .program("psql", &args, &[("HOME", "/nonexistent")])?
                .0)
        })
        .await?;
    let seen = cluster
        .the_connection("event = 'connected' AND role = 'app'")
        .await?;
    assert_eq!(
        (&seen["tls"], &seen["application_name"]),
        (&json!(true), &json!("psql"))
    );
    Ok(())
}

#[tokio::test]
async fn what_a_background_worker_runs_is_flagged() -> Result {
    let cluster =
        Cluster::with_extension(Config::new(Mode::Preloaded).line("wal_level = logical")).await?;
    let su = cluster.superuser().await?;
    for sql in [
        "CREATE DATABASE target",
        "CREATE TABLE fruit (id int PRIMARY KEY)",
        "CREATE PUBLICATION pub FOR TABLE fruit",
        "SELECT pg_create_logical_replication_slot('sub', 'pgoutput')",
    ] {
        su.run(sql).await?;
    }
    let target = cluster.connect("postgres", "target").await?;
    let socket = cluster.scratch().display();
    let port = cluster.port();
    for sql in [
        "CREATE TABLE fruit (id int PRIMARY KEY)",
        "CREATE TABLE basket (id int)",
        "CREATE FUNCTION pick() RETURNS trigger LANGUAGE plpgsql AS
         'BEGIN INSERT INTO public.basket VALUES (NEW.id); RETURN NEW; END'",
        "CREATE TRIGGER pick AFTER INSERT ON fruit FOR EACH ROW EXECUTE FUNCTION pick()",
        "ALTER TABLE fruit ENABLE ALWAYS TRIGGER pick",
        &format!(
            "CREATE SUBSCRIPTION sub CONNECTION 'host={socket} port={port} dbname=postgres user=postgres'
             PUBLICATION pub WITH (create_slot = false, copy_data = false, slot_name = 'sub')"
        ),
    ] {
        target.run(sql).await?;
    }
    su.run("INSERT INTO fruit VALUES (1)").await?;
    cluster
        .wait_until("the row has arrived", async || {
            Ok(target.number("SELECT count(*) FROM basket").await? == 1)
        })
        .await?;
    let seen = cluster
        .the_activity("query LIKE 'INSERT INTO public.basket%'")
        .await?;
    assert_eq!(
        (&seen["background"], &seen["database"]),
        (&json!(true), &json!("target"))
    );
    assert_eq!(cluster.activity("background").await?.len(), 1);
    // The worker is no client of its database; what it reads from is one of the other.
    let clients = cluster
        .connections("event = 'connected' AND application_name = 'sub'")
        .await?;
    assert!(
        clients
            .iter()
            .all(|c| c["kind"] == "replication" && c["database"] == "postgres")
            && !clients.is_empty(),
        "{clients:#?}"
    );
    target.run("ALTER SUBSCRIPTION sub DISABLE").await
}
