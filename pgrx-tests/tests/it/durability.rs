//! The record on disk, and what happens when it cannot get there: a full journal, a failing disk.
//!
//! Disks fail on demand: a library loaded before libc takes `fdatasync` over. The files `hold` and
//! `fail` in its directory say what it does. The servers of the tests call it for nothing else: their
//! `fsync` is off.

use anyhow::ensure;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use warden_tests::{Client, Cluster, Config, Mode, Result};

/// The library, and the directory of the files that steer it.
struct Faults(PathBuf);

const FAULTS: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <sys/syscall.h>

static int present(const char *name)
{
    char path[4096];
    const char *dir = getenv("WARDEN_FAULTS");

    if (!dir)
        return 0;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

int fdatasync(int fd)
{
    while (present("hold"))
        usleep(2000);
    if (present("fail"))
    {
        errno = EIO;
        return -1;
    }
    return syscall(SYS_fdatasync, fd);
}
"#;

impl Faults {
    fn build() -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        use std::sync::atomic::{AtomicU32, Ordering};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let n = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("warden-faults-{}-{n}", std::process::id()));
        fs::create_dir_all(&dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        let source = dir.join("faults.c");
        fs::write(&source, FAULTS)?;
        let done = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .arg(dir.join("faults.so"))
            .arg(&source)
            .status()?;
        ensure!(done.success(), "cc failed");
        Ok(Self(dir))
    }

    fn config(&self) -> Config {
        Config::new(Mode::Preloaded)
            .environment("LD_PRELOAD", &self.0.join("faults.so"))
            .environment("WARDEN_FAULTS", &self.0)
    }

    fn set(&self, name: &str) -> Result {
        Ok(fs::write(self.0.join(name), "")?)
    }

    fn clear(&self, name: &str) -> Result {
        Ok(fs::remove_file(self.0.join(name))?)
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

async fn status(client: &Client) -> Result<Value> {
    let mut rows = client
        .objects("SELECT * FROM warden.journal_status()")
        .await?;
    Ok(rows.swap_remove(0))
}

fn number(status: &Value, name: &str) -> i64 {
    status[name].as_i64().expect(name)
}

/// The gaps of the ledger: reasons, and statements concerned.
async fn gaps(cluster: &Cluster) -> Result<Vec<(String, i64)>> {
    cluster.drained().await?;
    let su = cluster.superuser().await?;
    let gaps = su
        .objects(
            "SELECT d ->> 'reason' AS reason, (d ->> 'statements')::bigint AS statements
             FROM warden.event e, warden.event_detail(e.kind, e.payload) d
             WHERE e.kind = 4 ORDER BY e.seq",
        )
        .await?;
    Ok(gaps
        .iter()
        .map(|g| {
            let reason = g["reason"].as_str().unwrap_or_default();
            (reason.to_owned(), number(g, "statements"))
        })
        .collect())
}

/// Waits until a session of role `app` is in a wait event.
async fn waits_for(cluster: &Cluster, su: &Client, condition: &str) -> Result {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state = 'active' AND {condition}"
    );
    cluster
        .wait_until(condition, async || Ok(su.number(&sql).await? > 0))
        .await
}

// -------------------------------------------------------------------------------------- on disk

/// 64 transactions at once, and a disk that answers only when all of them wait: one leader syncs for
/// all. Far less than one sync a statement, by counting.
#[tokio::test]
async fn one_sync_serves_all_who_wait() -> Result {
    const CLIENTS: i64 = 64;
    let faults = Faults::build()?;
    let config = faults
        .config()
        .line("max_connections = 100")
        .line("warden.durability = 'written, write=statement'");
    let cluster = Cluster::with_extension(config).await?;
    let su = cluster.superuser().await?;
    su.run("CREATE TABLE t (n int); GRANT ALL ON t TO app")
        .await?;
    let mut clients = vec![];
    for _ in 0..CLIENTS {
        let client = cluster.connect("app", "postgres").await?;
        client.run("BEGIN").await?;
        clients.push(client);
    }
    let start = status(&su).await?;
    for sql in ["INSERT INTO t VALUES (1)", "COMMIT"] {
        let before = status(&su).await?;
        faults.set("hold")?;
        let running: Vec<_> = clients
            .drain(..)
            .map(|c| tokio::spawn(async move { c.run(sql).await.map(|()| c) }))
            .collect();
        cluster
            .wait_until("all of them wait", async || {
                let waits = number(&status(&su).await?, "waits") - number(&before, "waits");
                Ok(waits == CLIENTS)
            })
            .await?;
        assert!(running.iter().all(|r| !r.is_finished()));
        faults.clear("hold")?;
        for client in running {
            clients.push(client.await??);
        }
        let syncs = number(&status(&su).await?, "syncs") - number(&before, "syncs");
        // What the first one asked for, what came while it was waiting, and a segment's boundary.
        assert!((1..=4).contains(&syncs), "{syncs} syncs for {sql}");
    }
    assert_eq!(su.number("SELECT count(*) FROM t").await?, CLIENTS);
    let end = status(&su).await?;
    assert_eq!(number(&end, "waits") - number(&start, "waits"), 2 * CLIENTS);
    assert_eq!(number(&end, "failures"), 0);
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_commit_is_acknowledged_only_when_its_record_is_on_disk() -> Result {
    let faults = Faults::build()?;
    let config = faults
        .config()
        .line("warden.durability = 'written, write=commit'");
    let cluster = Cluster::with_extension(config).await?;
    let su = cluster.superuser().await?;
    su.run("CREATE TABLE t (n int); GRANT ALL ON t TO app")
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    // Reading is exempt, and so is what has not committed.
    faults.set("hold")?;
    app.run("SELECT 1 AS reads").await?;
    app.run("BEGIN; INSERT INTO t VALUES (1)").await?;
    let before = number(&status(&su).await?, "waits");
    let commit = tokio::spawn(async move { app.run("COMMIT").await.map(|()| app) });
    cluster
        .wait_until("the commit waits", async || {
            Ok(number(&status(&su).await?, "waits") > before)
        })
        .await?;
    assert!(!commit.is_finished());
    faults.clear("hold")?;
    let app = commit.await??;
    let now = status(&su).await?;
    assert!(number(&now, "flushed") <= number(&now, "written"));
    // Nothing recorded, nothing to wait for.
    let app_writes_nothing = number(&now, "syncs");
    app.run("SELECT 1 AS reads_again").await?;
    assert_eq!(number(&status(&su).await?, "syncs"), app_writes_nothing);
    Ok(())
}

#[tokio::test]
async fn written_never_syncs() -> Result {
    let cluster = Cluster::with_warden().await?;
    let su = cluster.superuser().await?;
    su.run("CREATE TABLE t (n int); INSERT INTO t VALUES (1); SELECT * FROM t")
        .await?;
    let status = status(&su).await?;
    assert_eq!((number(&status, "syncs"), number(&status, "waits")), (0, 0));
    Ok(())
}

#[tokio::test]
async fn a_kill_of_everything_loses_no_acknowledged_statement() -> Result {
    let config = Config::new(Mode::Preloaded).line("warden.durability = 'statement'");
    let mut cluster = Cluster::with_extension(config).await?;
    let app = cluster.connect("app", "postgres").await?;
    for n in 0..20 {
        app.run(&format!("SELECT {n} AS kept_{n}")).await?;
    }
    cluster.kill_postmaster().await?;
    cluster.up().await?;
    let seen = cluster.activity("query LIKE '%AS kept\\_%'").await?;
    assert_eq!(seen.len(), 20, "{seen:#?}");
    assert!(seen.iter().all(|e| e["outcome"] == "succeeded"));
    cluster.assert_verifies().await
}

// --------------------------------------------------------------------------------- failing disk

async fn failing(faults: &Faults, on_full: &str) -> Result<(Cluster, Client, Client)> {
    let config = faults
        .config()
        .line("warden.durability = 'written, write=statement'")
        .line(&format!("warden.on_journal_full = '{on_full}'"));
    let cluster = Cluster::with_extension(config).await?;
    let su = cluster.superuser().await?;
    su.run("CREATE TABLE t (n int); GRANT ALL ON t TO app")
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("INSERT INTO t VALUES (0)").await?;
    faults.set("fail")?;
    Ok((cluster, su, app))
}

/// After a failed sync, a second one of the same file proves nothing: no file is in use that has seen
/// one. One warning says so, however many statements meet it.
async fn recovered(cluster: &Cluster, su: &Client, failed: (u64, u64)) -> Result {
    let s = status(su).await?;
    assert_eq!(s["failing"], false, "{s}");
    assert!(number(&s, "failures") > 0, "{s}");
    let now = segments(cluster)?;
    assert!(
        now.get(&failed.0) != Some(&failed.1),
        "{failed:?} in {now:?}"
    );
    let log = cluster.whole_log()?;
    let warnings = log.matches("could not sync the journal").count();
    assert_eq!(warnings, 1, "{log}");
    assert!(log.contains("the journal can be synced again"), "{log}");
    cluster.drained().await?;
    cluster.assert_verifies().await
}

/// Numbers and inodes of the segments.
fn segments(cluster: &Cluster) -> Result<BTreeMap<u64, u64>> {
    use std::os::unix::fs::MetadataExt;
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(cluster.data().join("pg_warden"))? {
        let entry = entry?;
        let name = entry.file_name().into_string().unwrap_or_default();
        if let Some(number) = name.strip_suffix(".seg") {
            found.insert(u64::from_str_radix(number, 16)?, entry.metadata()?.ino());
        }
    }
    Ok(found)
}

/// The segment that is written to.
async fn current(cluster: &Cluster, su: &Client) -> Result<(u64, u64)> {
    let segment = number(&status(su).await?, "written") as u64 >> 24;
    Ok((segment, segments(cluster)?[&segment]))
}

#[tokio::test]
async fn error_refuses_what_cannot_be_synced_and_records_the_refusal() -> Result {
    let faults = Faults::build()?;
    let (cluster, su, app) = failing(&faults, "error").await?;
    let failed = current(&cluster, &su).await?;
    for n in 1..4 {
        let error = app.error(&format!("INSERT INTO t VALUES ({n})")).await?;
        assert_eq!(error.code().code(), "WA005", "{error:?}");
    }
    assert_eq!(su.number("SELECT count(*) FROM t").await?, 1);
    faults.clear("fail")?;
    cluster
        .wait_until("the disk is tried again", async || {
            Ok(app.run("INSERT INTO t VALUES (10)").await.is_ok())
        })
        .await?;
    let refused = cluster
        .activity("query LIKE 'INSERT INTO t%' AND sqlstate = 'WA005' AND outcome = 'blocked'")
        .await?;
    assert!(refused.len() >= 3, "{refused:#?}");
    assert_eq!(gaps(&cluster).await?, []);
    recovered(&cluster, &su, failed).await
}

#[tokio::test]
async fn gap_goes_on_and_counts_what_is_not_on_disk() -> Result {
    let faults = Faults::build()?;
    let (cluster, su, app) = failing(&faults, "gap").await?;
    let failed = current(&cluster, &su).await?;
    // So that the segment is still needed when the disk works again.
    let recorder = cluster.recorder("postgres").await?;
    Cluster::freeze(recorder)?;
    app.run("BEGIN").await?;
    for n in 1..6 {
        app.run(&format!("INSERT INTO t VALUES ({n})")).await?;
    }
    app.run("ROLLBACK").await?;
    faults.clear("fail")?;
    cluster
        .wait_until("the disk is tried again", async || {
            app.run("INSERT INTO t VALUES (10)").await?;
            Ok(status(&su).await?["failing"] == false)
        })
        .await?;
    assert_ne!(segments(&cluster)?.get(&failed.0), None);
    assert_ne!(segments(&cluster)?.get(&failed.0), Some(&failed.1));
    Cluster::thaw(recorder)?;
    let gaps = gaps(&cluster).await?;
    assert!(
        gaps.iter().all(|(r, _)| r == "journal_not_durable"),
        "{gaps:?}"
    );
    let counted: i64 = gaps.iter().map(|(_, n)| n).sum();
    assert!(counted >= 5, "{gaps:?}");
    recovered(&cluster, &su, failed).await
}

#[tokio::test]
async fn block_waits_for_the_disk_and_can_be_cancelled() -> Result {
    let faults = Faults::build()?;
    let (cluster, su, app) = failing(&faults, "block").await?;
    let failed = current(&cluster, &su).await?;
    app.run("SET statement_timeout = '300ms'").await?;
    assert_eq!(app.sqlstate("INSERT INTO t VALUES (1)").await?, "57014");
    app.run("SET statement_timeout = 0").await?;
    let waiting = tokio::spawn(async move { app.run("INSERT INTO t VALUES (2)").await });
    waits_for(
        &cluster,
        &su,
        "query LIKE 'INSERT%' AND wait_event = 'Extension'",
    )
    .await?;
    assert_eq!(su.number("SELECT count(*) FROM t").await?, 1);
    faults.clear("fail")?;
    waiting.await??;
    assert_eq!(su.number("SELECT count(*) FROM t").await?, 2);
    recovered(&cluster, &su, failed).await
}

// --------------------------------------------------------------------------------- full journal

/// A cluster whose recorder is frozen and whose journal is full: for writing as the argument says,
/// for all else with an error. One statement has been refused.
async fn full(writes: &str) -> Result<(Cluster, Client, i64)> {
    let config = Config::new(Mode::Preloaded)
        .line(&format!("warden.on_journal_full = 'error, write={writes}'"));
    let cluster = Cluster::with_extension(config).await?;
    let su = cluster.superuser().await?;
    su.run("CREATE TABLE t (n int); GRANT ALL ON t TO app")
        .await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SELECT 1").await?;
    cluster.drained().await?;
    let recorder = cluster.recorder("postgres").await?;
    Cluster::freeze(recorder)?;
    let code = app.sqlstate(FILL).await?;
    ensure!(code == "WA005", "the journal is not full: {code}");
    // What was left is enough for some small frames.
    for _ in 0..1000 {
        if app.run("SELECT 1").await.is_err() {
            return Ok((cluster, app, recorder));
        }
    }
    anyhow::bail!("the journal is not full")
}

/// Waits until the journal has room.
async fn room(cluster: &Cluster) -> Result {
    cluster
        .wait_until("there is room", async || match cluster.superuser().await {
            Ok(su) => Ok(su.run("SELECT 1 AS room").await.is_ok()),
            Err(_) => Ok(false),
        })
        .await
}

/// What the journal did not hold, once the recorder goes on: reasons and statements of all gaps.
async fn lost(cluster: &Cluster, recorder: i64) -> Result<i64> {
    Cluster::thaw(recorder)?;
    room(cluster).await?;
    let gaps = gaps(cluster).await?;
    assert!(gaps.iter().all(|(r, _)| r == "journal_full"), "{gaps:?}");
    cluster.assert_verifies().await?;
    Ok(gaps.iter().map(|(_, n)| n).sum())
}

/// Statements whose shapes are long fill a journal soon.
const FILL: &str = "DO $$
DECLARE s text; BEGIN
  FOR i IN 1..5000 LOOP
    s := 'SELECT 1 AS filler_' || i;
    FOR c IN 1..400 LOOP s := s || ', 1 AS a_column_with_a_name_that_is_very_very_long_' || c; END LOOP;
    EXECUTE s;
  END LOOP;
END $$";

#[tokio::test]
async fn with_error_statements_fail_while_the_journal_is_full_and_are_counted() -> Result {
    let (cluster, app, recorder) = full("error").await?;
    for _ in 0..3 {
        assert_eq!(app.sqlstate("INSERT INTO t VALUES (1)").await?, "WA005");
    }
    // Nothing else is lost: they, and the one that found the journal full. Looking whether there is
    // room again may have failed as well.
    assert!(lost(&cluster, recorder).await? >= 4);
    assert_eq!(app.number("SELECT count(*) FROM t").await?, 0);
    app.run("INSERT INTO t VALUES (2)").await
}

#[tokio::test]
async fn with_gap_statements_run_while_the_journal_is_full_and_are_counted() -> Result {
    let (cluster, app, recorder) = full("gap").await?;
    for n in 0..7 {
        app.run(&format!("INSERT INTO t VALUES ({n})")).await?;
    }
    assert!(lost(&cluster, recorder).await? >= 8);
    assert_eq!(app.number("SELECT count(*) FROM t").await?, 7);
    let seen = cluster.activity("query LIKE 'INSERT INTO t %'").await?;
    assert_eq!(seen.len(), 0, "{seen:#?}");
    Ok(())
}

#[tokio::test]
async fn with_block_statements_wait_for_room_and_can_be_cancelled() -> Result {
    let (cluster, app, recorder) = full("block").await?;
    // SET is recorded too: the timeout comes with the connection.
    drop(app);
    let connector = cluster.connector();
    let app = connector
        .connect("app", "postgres", |c| {
            c.options("-c statement_timeout=300ms");
        })
        .await?;
    assert_eq!(app.sqlstate("INSERT INTO t VALUES (1)").await?, "57014");
    let patient = cluster.connect("app", "postgres").await?;
    let waiting = tokio::spawn(async move { patient.run("INSERT INTO t VALUES (2)").await });
    Cluster::thaw(recorder)?;
    waiting.await??;
    let su = cluster.superuser().await?;
    assert_eq!(su.column("SELECT n FROM t").await?, ["2"]);
    cluster.the_activity("query LIKE 'INSERT INTO t %'").await?;
    cluster.assert_verifies().await
}

#[tokio::test]
async fn another_setting_ends_the_wait_and_changes_nothing_else_in_a_statement() -> Result {
    let (mut cluster, app, recorder) = full("block").await?;
    drop(app);
    let patient = cluster.connect("app", "postgres").await?;
    let waiting = tokio::spawn(async move {
        let sql = "INSERT INTO t SELECT pg_size_bytes(current_setting('work_mem')) / 1024";
        (patient.run(sql).await, patient)
    });
    // A command that has been read is not interrupted for its settings.
    cluster
        .wait_until("the statement has begun", async || {
            Ok(cluster.titles()?.iter().any(|t| t.contains("INSERT")))
        })
        .await?;
    let gap = "warden.on_journal_full = 'error, write=gap'\nwork_mem = '8MB'";
    cluster.configure(Config::new(Mode::Preloaded).line(gap))?;
    cluster.reload()?;
    let (ended, patient) = waiting.await?;
    ended?;
    assert!(lost(&cluster, recorder).await? >= 1);
    assert_eq!(patient.column("SELECT n FROM t").await?, ["4096"]);
    assert_eq!(
        patient.value("SELECT current_setting('work_mem')").await?,
        "8MB"
    );
    Ok(())
}

#[tokio::test]
async fn statements_that_wait_for_room_do_not_hang_a_shutdown() -> Result {
    let (mut cluster, app, recorder) = full("block").await?;
    let waiting = tokio::spawn(async move { app.run("INSERT INTO t VALUES (1)").await });
    cluster
        .wait_until("the statement waits", async || {
            Ok(cluster.titles()?.iter().any(|t| t.contains("INSERT")))
        })
        .await?;
    cluster.ask_to_stop()?;
    let error = waiting.await?.expect_err("thrown out");
    let code = error
        .downcast_ref::<tokio_postgres::Error>()
        .and_then(|e| e.code());
    assert_eq!(code.map(|c| c.code()), Some("57P01"), "{error:#}");
    // A frozen process ends by no signal but this; the server waits for its processes.
    Cluster::thaw(recorder)?;
    cluster.stop()?;
    cluster.up().await?;
    room(&cluster).await?;
    cluster.drained().await?;
    cluster.assert_verifies().await
}
