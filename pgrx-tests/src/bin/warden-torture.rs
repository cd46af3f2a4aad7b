//! `warden-torture [SECONDS [CLIENTS [SEED]]]`: clients note what they were answered while processes
//! of the server are killed at random; then ledger, table and receiver are compared with the notes.
//!
//! The server is the one of `WARDEN_PG_CONFIG`. `scripts/torture` builds all that it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use warden_tests::receiver::Receiver;
use warden_tests::{Client, Cluster, Connector, Result};

/// What a client knows of one statement, which has a name of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// It was sent; whether it ran is not known.
    Sent,
    /// It was answered, and so was the end of its transaction, if it writes.
    Answered,
}

/// What a statement does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    WriteInTransaction,
    WriteAndRollBack,
}

#[derive(Debug, Default)]
struct Notes(Mutex<BTreeMap<String, (Kind, Known)>>);

impl Notes {
    fn set(&self, name: &str, kind: Kind, known: Known) {
        self.0
            .lock()
            .expect("notes")
            .insert(name.to_owned(), (kind, known));
    }

    fn answered(&self) -> usize {
        let notes = self.0.lock().expect("notes");
        notes
            .values()
            .filter(|(_, k)| *k == Known::Answered)
            .count()
    }
}

/// SplitMix64: the same seed, the same choices.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

async fn statements(connector: Connector, client: usize, stop: Arc<AtomicBool>, notes: Arc<Notes>) {
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let Ok(server) = connector.connect("app", "postgres", |_| ()).await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            n += 1;
            let kind = [
                Kind::Read,
                Kind::Write,
                Kind::WriteInTransaction,
                Kind::WriteAndRollBack,
            ][n % 4];
            let name = format!("torture_{client}_{n}");
            notes.set(&name, kind, Known::Sent);
            if one(&server, kind, &name).await.is_err() {
                break;
            }
            notes.set(&name, kind, Known::Answered);
        }
    }
}

async fn one(server: &Client, kind: Kind, name: &str) -> Result {
    let write = format!("INSERT INTO tally SELECT '{name}' AS {name}");
    match kind {
        Kind::Read => server.run(&format!("SELECT 1 AS {name}")).await,
        Kind::Write => server.run(&write).await,
        Kind::WriteInTransaction | Kind::WriteAndRollBack => {
            let end = if kind == Kind::WriteInTransaction {
                "COMMIT"
            } else {
                "ROLLBACK"
            };
            server.run("BEGIN").await?;
            server.run(&write).await?;
            server.run(end).await
        }
    }
}

/// Kills something. Returns what.
async fn kill(cluster: &mut Cluster, random: &mut Random) -> Result<&'static str> {
    let choice = random.below(100);
    let (what, condition) = match choice {
        0..40 => ("backend", "usename = 'app'"),
        40..55 => ("recorder", "backend_type ILIKE '%recorder%'"),
        55..70 => ("shipper", "backend_type ILIKE '%shipper%'"),
        70..75 => ("launcher", "backend_type ILIKE '%pg_warden launcher%'"),
        75..80 => ("checkpointer", "backend_type = 'checkpointer'"),
        _ => {
            let what = match choice {
                80..87 => {
                    cluster.kill_postmaster().await?;
                    "postmaster"
                }
                87..94 => {
                    cluster.crash().await?;
                    "everything"
                }
                _ => {
                    cluster.stop_immediate()?;
                    "immediate stop"
                }
            };
            cluster.up().await?;
            return Ok(what);
        }
    };
    let Ok(server) = cluster.superuser().await else {
        return Ok("nothing: the server is not back yet");
    };
    let find =
        format!("SELECT pid FROM pg_stat_activity WHERE {condition} ORDER BY random() LIMIT 1");
    match server.number(&find).await {
        Ok(pid) => {
            // It may have ended by itself.
            drop(Cluster::kill(pid));
            Ok(what)
        }
        Err(_) => Ok("nothing: there was none"),
    }
}

/// What the ledger says of one name.
struct Recorded {
    outcome: String,
    committed: Option<bool>,
}

async fn reconcile(cluster: &Cluster, notes: &Notes, receiver: &Receiver) -> Result<Vec<String>> {
    cluster.drained().await?;
    let su = cluster.superuser().await?;
    let mut recorded: BTreeMap<String, Vec<Recorded>> = BTreeMap::new();
    for row in su
        .rows(
            "SELECT substring(query FROM 'AS (torture_[0-9_]+)$'), outcome, committed::text
             FROM warden.activity WHERE query LIKE '% AS torture%'",
        )
        .await?
    {
        if let [Some(name), Some(outcome), committed] = row.as_slice() {
            recorded.entry(name.clone()).or_default().push(Recorded {
                outcome: outcome.clone(),
                committed: committed.as_ref().map(|c| c == "true"),
            });
        }
    }
    let rows: BTreeSet<String> = su
        .column("SELECT name FROM tally")
        .await?
        .into_iter()
        .collect();
    let notes = notes.0.lock().expect("notes").clone();
    let mut problems = Vec::new();
    for (name, (kind, known)) in &notes {
        let found = recorded.remove(name).unwrap_or_default();
        let there = rows.contains(name);
        match found.as_slice() {
            [] if *known == Known::Answered => problems.push(format!("{name} is not recorded")),
            [] if there => problems.push(format!("{name} has written, and is not recorded")),
            [] => {}
            [r] => {
                if *known == Known::Answered && r.outcome != "succeeded" {
                    problems.push(format!(
                        "{name} was answered, and is recorded as {}",
                        r.outcome
                    ));
                }
                let writes = *kind != Kind::Read;
                if writes && r.outcome == "succeeded" && r.committed != Some(there) {
                    problems.push(format!(
                        "{name}: committed is {:?}, its row is {}there",
                        r.committed,
                        if there { "" } else { "not " }
                    ));
                }
            }
            more => problems.push(format!("{name} is recorded {} times", more.len())),
        }
        if *known == Known::Answered
            && there != matches!(kind, Kind::Write | Kind::WriteInTransaction)
        {
            problems.push(format!("{name}: PostgreSQL itself lost or kept its row"));
        }
    }
    problems.extend(recorded.keys().map(|n| format!("{n} was never sent")));
    let verdict = cluster.verify("postgres").await?;
    if verdict["ok"] != true {
        problems.push(format!("the ledger does not verify: {verdict}"));
    }
    // What is read here is recorded too: the receiver only has to reach what there is now.
    let head = su.number("SELECT max(seq) FROM warden.event").await?;
    let report = receiver.wait(Duration::from_secs(120), |r| r.last >= head);
    if report.last < head || !report.missing.is_empty() || !report.problems.is_empty() {
        problems.push(format!(
            "the receiver has events up to {} of {head}, misses {:?}, and says {:?}",
            report.last, report.missing, report.problems
        ));
    }
    println!(
        "{} statements sent, {} rows written, {head} events, {} of them delivered more than once",
        notes.len(),
        rows.len(),
        report.duplicates.len()
    );
    Ok(problems)
}

async fn torture(seconds: u64, clients: usize, seed: u64) -> Result<Vec<String>> {
    println!("{seconds} seconds, {clients} clients, seed {seed}");
    let mut cluster = Cluster::with_warden().await?;
    let receiver = Receiver::start()?;
    let su = cluster.superuser().await?;
    su.run("CREATE TABLE tally (name text)").await?;
    su.run("GRANT INSERT ON tally TO app").await?;
    su.run(&format!(
        "SELECT warden.add_sink('torture', '{}')",
        receiver.url()
    ))
    .await?;
    drop(su);
    let stop = Arc::new(AtomicBool::new(false));
    let notes = Arc::new(Notes::default());
    let tasks: Vec<_> = (0..clients)
        .map(|c| {
            let (stop, notes) = (Arc::clone(&stop), Arc::clone(&notes));
            tokio::spawn(statements(cluster.connector(), c, stop, notes))
        })
        .collect();
    let mut random = Random(seed);
    let mut kills: BTreeMap<&str, usize> = BTreeMap::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        let pause = Duration::from_millis(100 + random.below(2000));
        tokio::time::sleep(pause).await;
        *kills
            .entry(kill(&mut cluster, &mut random).await?)
            .or_default() += 1;
    }
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await?;
    }
    for (what, times) in kills {
        println!("killed {times:4} times: {what}");
    }
    println!("{} statements answered", notes.answered());
    cluster
        .wait_until("the server is back", async || {
            Ok(cluster.superuser().await.is_ok())
        })
        .await?;
    reconcile(&cluster, &notes, &receiver).await
}

fn main() -> Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: u64| match arguments.next() {
        None => Ok(default),
        Some(a) => a.parse::<u64>(),
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let (seconds, clients) = (number(120)?, number(8)?);
    let seed = number(u64::from(now.subsec_nanos()))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let problems = runtime.block_on(torture(seconds, clients as usize, seed))?;
    for p in problems.iter().take(50) {
        println!("{p}");
    }
    if problems.is_empty() {
        println!("nothing is missing, nothing is there twice, nothing is invented");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{} problems", problems.len());
    Ok(ExitCode::FAILURE)
}
