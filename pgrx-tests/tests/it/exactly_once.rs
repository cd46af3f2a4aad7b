//! Every statement that returned its rows is in the ledger, once, whatever was killed.

use anyhow::ensure;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use warden_tests::{Cluster, Config, Connector, Mode, Result};

/// What a client knows of its statements.
#[derive(Debug, Default)]
struct Tally {
    sent: BTreeSet<String>,
    completed: BTreeSet<String>,
}

/// A client that runs statements, each with a name of its own, and counts those that completed.
/// It connects again for as long as it is not told to stop.
struct Counter {
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
    task: tokio::task::JoinHandle<()>,
}

impl Counter {
    fn start(connector: Connector, name: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let tally = Arc::new(Mutex::new(Tally::default()));
        let task = tokio::spawn(count(
            connector,
            name,
            Arc::clone(&stop),
            Arc::clone(&tally),
        ));
        Self { stop, tally, task }
    }

    fn completed(&self) -> usize {
        self.tally.lock().expect("tally").completed.len()
    }

    async fn finish(self) -> Result<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?;
        Ok(std::mem::take(&mut *self.tally.lock().expect("tally")))
    }
}

async fn count(
    connector: Connector,
    name: &'static str,
    stop: Arc<AtomicBool>,
    tally: Arc<Mutex<Tally>>,
) {
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let Ok(client) = connector.connect("app", "postgres", |_| ()).await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            n += 1;
            let alias = format!("{name}_{n}");
            tally.lock().expect("tally").sent.insert(alias.clone());
            match client.rows(&format!("SELECT {n} AS {alias}")).await {
                Ok(rows) if rows.len() == 1 => {
                    tally.lock().expect("tally").completed.insert(alias);
                }
                _ => break,
            }
        }
    }
}

/// Compares what clients know with what the ledger says.
async fn reconcile(cluster: &Cluster, tallies: &[Tally]) -> Result {
    cluster.drained().await?;
    let su = cluster.superuser().await?;
    let rows = su
        .rows(
            "SELECT substring(query FROM 'AS (client.*)$'), outcome FROM warden.activity
             WHERE query LIKE 'SELECT % AS client%'",
        )
        .await?;
    let mut recorded: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for row in rows {
        let mut row = row.into_iter().flatten();
        if let (Some(alias), Some(outcome)) = (row.next(), row.next()) {
            recorded.entry(alias).or_default().push(outcome);
        }
    }
    let mut problems = vec![];
    for tally in tallies {
        ensure!(!tally.completed.is_empty(), "a client completed nothing");
        for alias in &tally.completed {
            match recorded.get(alias).map(Vec::as_slice) {
                Some([outcome]) if outcome == "succeeded" => {}
                other => problems.push(format!("{alias} completed: {other:?}")),
            }
        }
        for alias in tally.sent.difference(&tally.completed) {
            if recorded
                .get(alias)
                .is_some_and(|outcomes| outcomes.len() > 1)
            {
                problems.push(format!("{alias} was cut off: {:?}", recorded[alias]));
            }
        }
    }
    let sent: usize = tallies.iter().map(|t| t.sent.len()).sum();
    ensure!(recorded.len() <= sent, "the ledger invents statements");
    ensure!(
        problems.is_empty(),
        "{} of {sent}: {problems:#?}",
        problems.len()
    );
    cluster.assert_verifies().await
}

/// Lets the clients get on for a while that is different each time.
async fn a_while(counter: &Counter, cluster: &Cluster, round: usize) -> Result {
    let goal = counter.completed() + 20 + 37 * (round % 4);
    cluster
        .wait_until("the client gets on", async || {
            Ok(counter.completed() >= goal)
        })
        .await
}

#[tokio::test]
async fn without_kills_every_statement_is_recorded_once() -> Result {
    let cluster = Cluster::with_warden().await?;
    let a = Counter::start(cluster.connector(), "client_a");
    let b = Counter::start(cluster.connector(), "client_b");
    for round in 0..4 {
        a_while(&a, &cluster, round).await?;
        a_while(&b, &cluster, round).await?;
    }
    reconcile(&cluster, &[a.finish().await?, b.finish().await?]).await
}

#[tokio::test]
async fn kill_nine_of_a_backend_loses_and_doubles_nothing() -> Result {
    let cluster = Cluster::with_warden().await?;
    let a = Counter::start(cluster.connector(), "client_a");
    let b = Counter::start(cluster.connector(), "client_b");
    for round in 0..5 {
        a_while(&a, &cluster, round).await?;
        let su = cluster.superuser().await?;
        let find = "SELECT min(pid) FROM pg_stat_activity WHERE usename = 'app'";
        Cluster::kill(su.number(find).await?)?;
        a_while(&b, &cluster, round + 1).await?;
    }
    reconcile(&cluster, &[a.finish().await?, b.finish().await?]).await
}

#[tokio::test]
async fn kill_nine_of_the_recorder_loses_and_doubles_nothing() -> Result {
    let cluster = Cluster::with_warden().await?;
    let a = Counter::start(cluster.connector(), "client_a");
    for round in 0..5 {
        a_while(&a, &cluster, round).await?;
        Cluster::kill(cluster.recorder("postgres").await?)?;
        a_while(&a, &cluster, round + 1).await?;
    }
    reconcile(&cluster, &[a.finish().await?]).await
}

#[tokio::test]
async fn kill_nine_of_the_postmaster_loses_and_doubles_nothing() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    let a = Counter::start(cluster.connector(), "client_a");
    for round in 0..4 {
        a_while(&a, &cluster, round).await?;
        if round % 2 == 0 {
            cluster.kill_postmaster().await?;
        } else {
            cluster.crash().await?;
        }
        cluster.up().await?;
        a_while(&a, &cluster, round + 1).await?;
    }
    reconcile(&cluster, &[a.finish().await?]).await
}

#[tokio::test]
async fn a_restart_in_any_mode_loses_and_doubles_nothing() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    let a = Counter::start(cluster.connector(), "client_a");
    for round in 0..3 {
        a_while(&a, &cluster, round).await?;
        cluster.stop_immediate()?;
        cluster.up().await?;
        a_while(&a, &cluster, round).await?;
        cluster.restart(Config::new(Mode::Preloaded)).await?;
    }
    reconcile(&cluster, &[a.finish().await?]).await
}

#[tokio::test]
async fn a_statement_cut_off_by_kill_nine_is_recorded_as_interrupted() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    let pid = app.number("SELECT pg_backend_pid()").await?;
    let asleep = tokio::spawn(async move { app.run("SELECT pg_sleep(600) AS cut_off").await });
    let su = cluster.superuser().await?;
    let find = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
    );
    cluster
        .wait_until("the statement sleeps", async || {
            Ok(su.number(&find).await? == 1)
        })
        .await?;
    Cluster::kill(pid)?;
    assert!(asleep.await?.is_err());
    cluster.back_after_crash(&su).await?;
    let seen = cluster.the_activity("query LIKE '%AS cut_off'").await?;
    assert_eq!(seen["outcome"], "interrupted");
    Ok(())
}

#[tokio::test]
async fn a_client_that_is_terminated_leaves_a_closed_event() -> Result {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    let pid = app.number("SELECT pg_backend_pid()").await?;
    let asleep = tokio::spawn(async move { app.run("SELECT pg_sleep(600) AS ended").await });
    let su = cluster.superuser().await?;
    let find = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'"
    );
    cluster
        .wait_until("the statement sleeps", async || {
            Ok(su.number(&find).await? == 1)
        })
        .await?;
    su.run(&format!("SELECT pg_terminate_backend({pid})"))
        .await?;
    assert!(asleep.await?.is_err());
    let seen = cluster.the_activity("query LIKE '%AS ended'").await?;
    let outcome = seen["outcome"].as_str().unwrap_or_default();
    assert!(["failed", "interrupted"].contains(&outcome), "{seen}");
    Ok(())
}
