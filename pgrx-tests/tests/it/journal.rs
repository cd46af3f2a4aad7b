//! A damaged journal is reported and survived.

use anyhow::ensure;
use std::fs;
use std::path::PathBuf;
use warden_tests::{Cluster, Result};

/// A stopped cluster whose journal holds statements that no recorder has read.
async fn unread_journal() -> Result<Cluster> {
    let mut cluster = Cluster::with_warden().await?;
    cluster.drained().await?;
    let app = cluster.connect("app", "postgres").await?;
    Cluster::freeze(cluster.recorder("postgres").await?)?;
    for n in 10..30 {
        app.run(&format!("SELECT {n} AS unread_{n}")).await?;
    }
    cluster.crash().await?;
    Ok(cluster)
}

/// The segment file and the offset where a text stands in the journal.
fn find(cluster: &Cluster, text: &str) -> Result<(PathBuf, usize)> {
    for entry in fs::read_dir(cluster.data().join("pg_warden"))? {
        let path = entry?.path();
        if !path.is_file() {
            continue;
        }
        let bytes = fs::read(&path)?;
        if let Some(at) = bytes.windows(text.len()).position(|w| w == text.as_bytes()) {
            return Ok((path, at));
        }
    }
    anyhow::bail!("{text} is not in the journal")
}

/// Starts the server and checks that what is new is recorded, and that the ledger verifies.
async fn survives(cluster: &mut Cluster) -> Result<Vec<String>> {
    cluster.up().await?;
    let app = cluster.connect("app", "postgres").await?;
    app.run("SELECT 1 AS after_the_damage").await?;
    cluster
        .the_activity("query LIKE '%AS after_the_damage'")
        .await?;
    cluster.assert_verifies().await?;
    let su = cluster.superuser().await?;
    su.column("SELECT query FROM warden.activity WHERE query LIKE '%AS unread\\_%' ORDER BY seq")
        .await
}

async fn gaps(cluster: &Cluster) -> Result<Vec<String>> {
    let su = cluster.superuser().await?;
    su.column(
        "SELECT warden.event_detail(kind, payload) ->> 'reason' FROM warden.event
         WHERE kind = 4 ORDER BY seq",
    )
    .await
}

#[tokio::test]
async fn an_unread_journal_is_read_after_a_crash() -> Result {
    let mut cluster = unread_journal().await?;
    let seen = survives(&mut cluster).await?;
    let expected: Vec<_> = (10..30)
        .map(|n| format!("SELECT $1 AS unread_{n}"))
        .collect();
    assert_eq!(seen, expected);
    assert_eq!(gaps(&cluster).await?, Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn a_flipped_byte_is_reported_and_costs_only_its_frame() -> Result {
    let mut cluster = unread_journal().await?;
    let (path, at) = find(&cluster, "AS unread_17")?;
    let mut bytes = fs::read(&path)?;
    bytes[at] ^= 0x20;
    fs::write(&path, bytes)?;
    let seen = survives(&mut cluster).await?;
    for n in (10..30).filter(|n| *n != 17) {
        let text = format!("SELECT $1 AS unread_{n}");
        assert!(seen.contains(&text), "{text} is lost: {seen:?}");
    }
    assert!(!seen.iter().any(|s| s.contains("unread_17")), "{seen:?}");
    assert_eq!(gaps(&cluster).await?, ["journal_damaged"]);
    Ok(())
}

#[tokio::test]
async fn a_torn_tail_is_survived() -> Result {
    let mut cluster = unread_journal().await?;
    let (path, at) = find(&cluster, "AS unread_29")?;
    let mut bytes = fs::read(&path)?;
    bytes[at + 3..].fill(0);
    fs::write(&path, bytes)?;
    let seen = survives(&mut cluster).await?;
    for n in 10..29 {
        let text = format!("SELECT $1 AS unread_{n}");
        assert!(seen.contains(&text), "{text} is lost: {seen:?}");
    }
    Ok(())
}

#[tokio::test]
async fn garbage_over_a_whole_stretch_is_survived() -> Result {
    let mut cluster = unread_journal().await?;
    let (path, from) = find(&cluster, "AS unread_14")?;
    let (same, to) = find(&cluster, "AS unread_24")?;
    ensure!(
        path == same && from < to,
        "the statements lie in order in one segment"
    );
    let mut bytes = fs::read(&path)?;
    bytes[from..to].fill(0xA5);
    fs::write(&path, bytes)?;
    let seen = survives(&mut cluster).await?;
    for n in (10..14).chain(25..30) {
        let text = format!("SELECT $1 AS unread_{n}");
        assert!(seen.contains(&text), "{text} is lost: {seen:?}");
    }
    assert!(!gaps(&cluster).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn the_journal_is_for_the_servers_user_only() -> Result {
    use std::os::unix::fs::PermissionsExt;
    let cluster = Cluster::with_warden().await?;
    let directory = cluster.data().join("pg_warden");
    let mode = |p: &std::path::Path| Ok::<_, anyhow::Error>(fs::metadata(p)?.permissions().mode());
    assert_eq!(mode(&directory)? & 0o077, 0);
    let mut files = 0;
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        assert_eq!(mode(&path)? & 0o077, 0, "{}", path.display());
        files += 1;
    }
    assert!(files > 0);
    Ok(())
}
