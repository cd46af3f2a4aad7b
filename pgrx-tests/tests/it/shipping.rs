//! What is in the ledger arrives at the sinks, whatever they, the network and the server do.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use warden_tests::receiver::{self, Receiver, Reply, Report};
use warden_tests::{Client, Cluster, Result};

/// The longest that anything is waited for.
const PATIENCE: Duration = Duration::from_secs(90);

/// Adds events to the ledger of database `postgres`; returns the last `seq` then.
async fn events(cluster: &Cluster, n: usize) -> Result<i64> {
    let app = cluster.connect("app", "postgres").await?;
    for _ in 0..n {
        app.run("SELECT 1 AS shipped").await?;
    }
    cluster.drained().await?;
    end(&cluster.superuser().await?).await
}

async fn end(su: &Client) -> Result<i64> {
    su.number("SELECT coalesce(max(seq), 0) FROM warden.event")
        .await
}

async fn add(su: &Client, name: &str, url: &str) -> Result {
    su.run(&format!("SELECT warden.add_sink('{name}', '{url}')"))
        .await
}

/// Waits until a receiver has every event up to `end`, and checks that it has all of them.
fn arrived(receiver: &Receiver, end: i64) -> Report {
    let report = receiver.wait(PATIENCE, |r| r.last >= end);
    assert!(report.last >= end, "waiting for {end}: {report:?}");
    assert_eq!(
        (report.first, &report.missing[..]),
        (1, &[][..]),
        "{report:?}"
    );
    assert_eq!(report.problems, Vec::<String>::new());
    report
}

async fn status(su: &Client, sink: &str, column: &str) -> Result<String> {
    su.value(&format!(
        "SELECT coalesce({column}::text, '') FROM warden.sink_status WHERE name = '{sink}'"
    ))
    .await
}

async fn until(cluster: &Cluster, su: &Client, sink: &str, condition: &str) -> Result {
    let sql =
        format!("SELECT count(*) FROM warden.sink_status WHERE name = '{sink}' AND ({condition})");
    cluster
        .wait_until(&format!("{sink}: {condition}"), async || {
            Ok(su.number(&sql).await? > 0)
        })
        .await
}

const SHIPPERS: &str = "SELECT coalesce(max(pid), 0) FROM pg_stat_activity
     WHERE backend_type = 'pg_warden shipper' AND datname = 'postgres'";

async fn shipper(cluster: &Cluster) -> Result<i64> {
    let su = cluster.superuser().await?;
    cluster
        .wait_until("the shipper runs", async || {
            Ok(su.number(SHIPPERS).await? > 0)
        })
        .await?;
    su.number(SHIPPERS).await
}

fn exported(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.data().join("pg_warden/export").join(name)
}

#[tokio::test]
async fn every_event_arrives_once_in_order_and_as_recorded() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let receiver = Receiver::start()?;
    su.run(&format!(
        "SELECT warden.add_sink('siem', '{}', batch_events => 7)",
        receiver.url()
    ))
    .await?;
    add(&su, "file", "file:audit.ndjson").await?;
    let last = events(&cluster, 60).await?;
    let report = arrived(&receiver, last);
    assert_eq!(report.duplicates, Vec::<i64>::new());
    until(&cluster, &su, "file", &format!("delivered_seq >= {last}")).await?;
    let file = fs::read_to_string(exported(&cluster, "audit.ndjson"))?;
    let (sent, kept) = (receiver.lines(), file.lines().collect::<Vec<_>>());
    assert_eq!(sent[..last as usize], kept[..last as usize]);
    for line in &sent[..last as usize] {
        let v: serde_json::Value = serde_json::from_str(line)?;
        let hash = su
            .value(&format!(
                "SELECT encode(hash, 'hex') FROM warden.event WHERE seq = {}",
                v["seq"]
            ))
            .await?;
        assert_eq!(v["ledger"]["hash"], hash);
    }
    assert_eq!(
        fs::metadata(exported(&cluster, "audit.ndjson"))?.mode() & 0o777,
        0o600
    );
    Ok(())
}

#[tokio::test]
async fn errors_of_the_receiver_lose_nothing() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let receiver = Receiver::start()?;
    receiver.script([
        Reply::Status(500),
        Reply::Status(503),
        Reply::Reset,
        Reply::Break,
        Reply::RetryAfter(429, "1".into()),
        Reply::Status(408),
    ]);
    let last = events(&cluster, 20).await?;
    add(&su, "siem", &receiver.url()).await?;
    arrived(&receiver, last);
    until(
        &cluster,
        &su,
        "siem",
        "failed = 6 AND last_success > last_failure",
    )
    .await
}

#[tokio::test]
async fn a_refusal_is_shown_and_tried_again_and_redirects_are_not_followed() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let receiver = Receiver::start()?;
    let elsewhere = Receiver::start()?;
    let last = events(&cluster, 5).await?;
    receiver.reply(Reply::Redirect(elsewhere.url()));
    add(&su, "siem", &format!("{}?token=secret", receiver.url())).await?;
    until(&cluster, &su, "siem", "failed = 1 AND state = 'retrying'").await?;
    let error = status(&su, "siem", "last_error").await?;
    assert!(
        error.contains("307") && error.contains("not followed"),
        "{error}"
    );
    assert!(!status(&su, "siem", "url").await?.contains("secret"));
    let wait = su
        .number(
            "SELECT extract(epoch FROM next_retry - last_failure)::bigint FROM warden.sink_status",
        )
        .await?;
    assert_eq!(wait, 60);
    receiver.reply(Reply::Accept);
    su.run("SELECT warden.enable_sink('siem')").await?;
    arrived(&receiver, last);
    assert_eq!(elsewhere.report().requests, 0);
    Ok(())
}

#[tokio::test]
async fn a_receiver_is_left_alone_for_as_long_as_it_asks() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let receiver = Receiver::start()?;
    receiver.script([Reply::RetryAfter(503, "3".into())]);
    let last = events(&cluster, 1).await?;
    add(&su, "siem", &receiver.url()).await?;
    arrived(&receiver, last);
    let times = receiver.times();
    assert!(
        times[1] - times[0] >= Duration::from_millis(2900),
        "{:?}",
        times[1] - times[0]
    );
    Ok(())
}

#[tokio::test]
async fn batches_that_are_too_large_are_split() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let receiver = Receiver::start()?;
    // More than the longest event, of CREATE EXTENSION, and less than all.
    receiver.reply(Reply::UpTo(60_000));
    let last = events(&cluster, 100).await?;
    add(&su, "siem", &receiver.url()).await?;
    let report = arrived(&receiver, last);
    assert_eq!(report.duplicates, Vec::<i64>::new());
    assert_eq!(status(&su, "siem", "failed").await?, "0");
    Ok(())
}

#[tokio::test]
async fn a_hanging_and_an_absent_sink_delay_no_other() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let (hanging, good) = (Receiver::start()?, Receiver::start()?);
    hanging.reply(Reply::Hang);
    add(&su, "hanging", &hanging.url()).await?;
    add(&su, "absent", "http://127.0.0.1:1/").await?;
    add(&su, "unknown", "http://no.such.host.invalid/").await?;
    add(&su, "good", &good.url()).await?;
    for _ in 0..3 {
        let last = events(&cluster, 10).await?;
        arrived(&good, last);
    }
    until(&cluster, &su, "absent", "failed > 1 AND delivered_seq = 0").await?;
    assert_eq!(hanging.report().requests, 1);
    Ok(())
}

#[tokio::test]
async fn a_receiver_that_comes_back_gets_what_it_missed() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    add(
        &su,
        "siem",
        &format!("http://localhost:{port}{}", receiver::path()),
    )
    .await?;
    let last = events(&cluster, 10).await?;
    until(&cluster, &su, "siem", "failed >= 2").await?;
    let receiver = Receiver::on_port(port, None)?;
    arrived(&receiver, last);
    until(&cluster, &su, "siem", "state <> 'retrying'").await
}

#[tokio::test]
async fn a_sink_can_be_dropped_paused_and_added_again() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let (hanging, receiver) = (Receiver::start()?, Receiver::start()?);
    hanging.reply(Reply::Hang);
    let last = events(&cluster, 10).await?;
    add(&su, "siem", &hanging.url()).await?;
    assert_eq!(hanging.wait(PATIENCE, |r| r.requests == 1).requests, 1);
    su.run("SELECT warden.drop_sink('siem')").await?;
    add(&su, "siem", &receiver.url()).await?;
    arrived(&receiver, last);

    su.run("SELECT warden.disable_sink('siem')").await?;
    // What was under way may still arrive.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = receiver.report().last;
    let last = events(&cluster, 10).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(receiver.report().last, before);
    su.run("SELECT warden.enable_sink('siem')").await?;
    let report = arrived(&receiver, last);
    assert_eq!(report.duplicates, Vec::<i64>::new());

    let late = Receiver::start()?;
    let now = end(&su).await?;
    su.run(&format!(
        "SELECT warden.add_sink('late', '{}', from_now => true)",
        late.url()
    ))
    .await?;
    let last = events(&cluster, 3).await?;
    let report = late.wait(PATIENCE, |r| r.last >= last);
    assert!(report.first > now && report.last >= last, "{report:?}");
    Ok(())
}

#[tokio::test]
async fn the_server_stops_while_a_request_hangs_and_goes_on_where_it_was() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let receiver = Receiver::start()?;
    let first = events(&cluster, 10).await?;
    add(&su, "siem", &receiver.url()).await?;
    arrived(&receiver, first);
    receiver.reply(Reply::Hang);
    let last = events(&cluster, 10).await?;
    let requests = receiver.report().requests;
    let _ = receiver.wait(Duration::from_secs(5), |r| r.requests > requests);
    drop(su);
    let start = Instant::now();
    cluster.stop()?;
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "{:?}",
        start.elapsed()
    );
    receiver.reply(Reply::Accept);
    cluster.up().await?;
    let report = arrived(&receiver, last);
    assert!(
        report.duplicates.iter().all(|seq| *seq > first),
        "{report:?}"
    );
    Ok(())
}

#[tokio::test]
async fn kill_nine_of_shipper_and_server_loses_nothing_and_changes_nothing() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Slow(Duration::from_millis(20)));
    {
        let su = cluster.superuser().await?;
        su.run(&format!(
            "SELECT warden.add_sink('siem', '{}', batch_events => 5)",
            receiver.url()
        ))
        .await?;
        add(&su, "file", "file:killed.ndjson").await?;
    }
    for _ in 0..3 {
        events(&cluster, 30).await?;
        let killed = shipper(&cluster).await?;
        Cluster::kill(killed)?;
        // It takes all connections with it: ask on a new one each time.
        cluster
            .wait_until("another shipper runs", async || {
                let Ok(su) = cluster.superuser().await else {
                    return Ok(false);
                };
                let sql = format!("{SHIPPERS} AND pid <> {killed}");
                Ok(su.number(&sql).await.is_ok_and(|n| n > 0))
            })
            .await?;
    }
    events(&cluster, 30).await?;
    cluster.kill_postmaster().await?;
    cluster.up().await?;
    let last = events(&cluster, 5).await?;
    arrived(&receiver, last);
    let su = cluster.superuser().await?;
    until(&cluster, &su, "file", &format!("delivered_seq >= {last}")).await?;
    let mut seqs: Vec<i64> = fs::read_to_string(exported(&cluster, "killed.ndjson"))?
        .lines()
        .filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok()?["seq"].as_i64())
        .collect();
    seqs.sort_unstable();
    seqs.dedup();
    assert_eq!(seqs[..last as usize], (1..=last).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test]
async fn the_extension_can_be_dropped_while_a_request_hangs() -> Result {
    let cluster = Cluster::with_warden().await?;
    let dba = cluster.connect("dba", "postgres").await?;
    let receiver = Receiver::start()?;
    receiver.reply(Reply::Hang);
    events(&cluster, 5).await?;
    add(&dba, "siem", &receiver.url()).await?;
    assert_eq!(receiver.wait(PATIENCE, |r| r.requests == 1).requests, 1);
    dba.run("DROP EXTENSION pg_warden").await?;
    cluster
        .wait_until("the shipper has ended", async || {
            let sql = "SELECT count(*) FROM pg_stat_activity
                       WHERE backend_type = 'pg_warden shipper'";
            Ok(dba.number(sql).await? == 0)
        })
        .await?;
    dba.run("CREATE EXTENSION pg_warden").await?;
    let again = Receiver::start()?;
    add(&dba, "siem", &again.url()).await?;
    let last = events(&cluster, 5).await?;
    arrived(&again, last);
    let log = cluster.whole_log()?;
    assert!(!log.contains("does not exist"), "{log}");
    Ok(())
}

#[tokio::test]
async fn only_administrators_configure_sinks_and_only_with_valid_addresses() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE ROLE config LOGIN IN ROLE warden_admin")
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    let auditor = cluster.connect("auditor", "postgres").await?;
    let admin = cluster.connect("config", "postgres").await?;
    admin
        .run("SELECT warden.add_sink('one', 'http://127.0.0.1:1/?token=secret')")
        .await?;
    for sql in [
        "SELECT warden.add_sink('x', 'file:x')",
        "SELECT warden.drop_sink('one')",
        "SELECT warden.enable_sink('one')",
        "SELECT warden.disable_sink('one')",
        "SELECT warden.sink_address('file:x')",
        "SELECT warden.wake_shipper()",
        "SELECT * FROM warden.sink",
        "SELECT * FROM warden.sink_cursor",
        "UPDATE warden.sink SET url = 'x' WHERE id = 1",
    ] {
        assert_eq!(app.sqlstate(sql).await?, "42501", "{sql}");
        assert_eq!(auditor.sqlstate(sql).await?, "42501", "{sql}");
    }
    assert_eq!(
        app.sqlstate("SELECT * FROM warden.sink_status").await?,
        "42501"
    );
    assert_eq!(admin.sqlstate("SELECT * FROM warden.sink").await?, "42501");
    // Who moves a cursor makes events disappear on their way: not even a superuser may.
    for client in [&app, &admin, &su] {
        for sql in [
            "UPDATE warden.sink_cursor SET delivered_seq = 9",
            "DELETE FROM warden.sink_cursor",
        ] {
            assert_eq!(client.sqlstate(sql).await?, "WA001", "{sql}");
        }
    }
    for reader in [&auditor, &admin] {
        assert_eq!(
            reader.value("SELECT url FROM warden.sink_status").await?,
            "http://127.0.0.1:1/?..."
        );
    }
    for url in [
        "file:/etc/passwd",
        "file:../x",
        "file:.x",
        "file:a/b",
        "ftp://h/",
        "http://",
        "https://u:p@h/",
        "/tmp/x",
        "",
    ] {
        let e = admin
            .error(&format!("SELECT warden.add_sink('bad', '{url}')"))
            .await?;
        assert_eq!(e.code().code(), "22023", "{url}");
        assert!(e.hint().is_some(), "{url}");
    }
    let e = admin
        .error("SELECT warden.add_sink('one', 'http://h/')")
        .await?;
    assert_eq!(
        (e.code().code(), e.message()),
        ("42710", "sink \"one\" already exists")
    );
    let e = admin.error("SELECT warden.drop_sink('two')").await?;
    assert_eq!((e.code().code(), e.hint().is_some()), ("42704", true));
    let e = admin
        .error("SELECT warden.add_sink('n', 'http://h/', batch_events => 0)")
        .await?;
    assert_eq!(e.code().code(), "22023");
    Ok(())
}

#[tokio::test]
async fn a_file_sink_ends_a_torn_line_and_follows_no_link() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    add(&su, "file", "file:torn.ndjson").await?;
    let last = events(&cluster, 3).await?;
    until(&cluster, &su, "file", &format!("delivered_seq >= {last}")).await?;
    su.run("SELECT warden.disable_sink('file')").await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let file = exported(&cluster, "torn.ndjson");
    OpenOptions::new()
        .append(true)
        .open(&file)?
        .write_all(b"{\"id\":\"to")?;
    su.run("SELECT warden.enable_sink('file')").await?;
    let last = events(&cluster, 3).await?;
    until(&cluster, &su, "file", &format!("delivered_seq >= {last}")).await?;
    let text = fs::read_to_string(&file)?;
    let torn = text
        .lines()
        .filter(|l| serde_json::from_str::<serde_json::Value>(l).is_err());
    assert_eq!(torn.collect::<Vec<_>>(), ["{\"id\":\"to"]);

    let outside = cluster.scratch().join("outside");
    symlink(&outside, exported(&cluster, "link"))?;
    add(&su, "link", "file:link").await?;
    until(
        &cluster,
        &su,
        "link",
        "failed > 0 AND last_error LIKE 'cannot append%'",
    )
    .await?;
    assert!(!outside.exists());
    Ok(())
}

#[tokio::test]
async fn the_shipper_starts_no_thread() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    let receiver = Receiver::start()?;
    events(&cluster, 5).await?;
    add(&su, "http", &receiver.url()).await?;
    add(&su, "tls", &receiver.url().replace("http:", "https:")).await?;
    add(
        &su,
        "hosts",
        &receiver.url().replace("127.0.0.1", "localhost"),
    )
    .await?;
    add(&su, "dns", "https://no.such.host.invalid/").await?;
    let tasks = format!("/proc/{}/task", shipper(&cluster).await?);
    for sink in ["tls", "dns"] {
        until(&cluster, &su, sink, "failed > 0").await?;
        assert_eq!(fs::read_dir(&tasks)?.count(), 1);
    }
    for sink in ["http", "hosts"] {
        until(&cluster, &su, sink, "delivered_seq > 0").await?;
    }
    assert_eq!(fs::read_dir(&tasks)?.count(), 1);
    Ok(())
}
