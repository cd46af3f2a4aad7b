//! What someone does to the ledger while the library is not loaded, and how `warden.verify()`
//! finds it.

use warden_tests::{Cluster, Config, Mode, Result};

/// A ledger of some length, and the number of an execution in its middle.
async fn ledger() -> Result<(Cluster, i64)> {
    let cluster = Cluster::with_warden().await?;
    let app = cluster.connect("app", "postgres").await?;
    for n in 0..10 {
        app.run(&format!("SELECT {n} AS evidence_{n}")).await?;
    }
    let seq = cluster.the_activity("query LIKE '%AS evidence_5'").await?["seq"].as_i64();
    cluster.assert_verifies().await?;
    Ok((cluster, seq.unwrap_or_default()))
}

/// Runs SQL behind the server's back, and returns what `warden.verify()` then says.
async fn tamper(cluster: &mut Cluster, sql: &str) -> Result<(i64, String)> {
    cluster.restart(Config::new(Mode::Plain)).await?;
    let su = cluster.superuser().await?;
    let counting = format!("WITH x AS ({sql} RETURNING 1) SELECT count(*) FROM x");
    assert_eq!(su.number(&counting).await?, 1, "{sql}");
    cluster.restart(Config::new(Mode::Preloaded)).await?;
    let verdict = cluster.verify("postgres").await?;
    assert_eq!(verdict["ok"], false, "not found: {sql}: {verdict}");
    let problem = verdict["problem"].as_str().unwrap_or_default().to_owned();
    assert!(!problem.is_empty(), "{verdict}");
    Ok((verdict["first_bad"].as_i64().unwrap_or_default(), problem))
}

#[tokio::test]
async fn a_changed_event_is_named() -> Result {
    let (mut cluster, seq) = ledger().await?;
    let sql = format!("UPDATE warden.event SET rows = rows + 1 WHERE seq = {seq}");
    assert_eq!(tamper(&mut cluster, &sql).await?.0, seq);
    Ok(())
}

#[tokio::test]
async fn a_changed_payload_is_named() -> Result {
    let (mut cluster, seq) = ledger().await?;
    let sql = format!(
        "UPDATE warden.event
         SET payload = payload || '\\x00'
         WHERE seq = {seq}"
    );
    assert_eq!(tamper(&mut cluster, &sql).await?.0, seq);
    Ok(())
}

#[tokio::test]
async fn a_removed_event_is_named() -> Result {
    let (mut cluster, seq) = ledger().await?;
    let sql = format!("DELETE FROM warden.event WHERE seq = {seq}");
    let (first_bad, problem) = tamper(&mut cluster, &sql).await?;
    assert!(
        [seq, seq + 1].contains(&first_bad),
        "{first_bad} for {seq}: {problem}"
    );
    Ok(())
}

#[tokio::test]
async fn a_removed_newest_event_is_found() -> Result {
    let (mut cluster, _) = ledger().await?;
    tamper(
        &mut cluster,
        "DELETE FROM warden.event WHERE seq = (SELECT max(seq) FROM warden.event)",
    )
    .await?;
    Ok(())
}

#[tokio::test]
async fn a_changed_statement_text_is_named() -> Result {
    let (mut cluster, _) = ledger().await?;
    let su = cluster.superuser().await?;
    let find = "SELECT id FROM warden.statement WHERE text LIKE '%AS evidence_5'";
    let statement = su.number(find).await?;
    let sql =
        format!("UPDATE warden.statement SET text = 'SELECT harmless' WHERE id = {statement}");
    assert_eq!(tamper(&mut cluster, &sql).await?.0, statement);
    Ok(())
}

#[tokio::test]
async fn a_changed_actor_is_named() -> Result {
    let (mut cluster, _) = ledger().await?;
    let su = cluster.superuser().await?;
    let find = "SELECT max(id) FROM warden.session WHERE login_role = 'app'";
    let session = su.number(find).await?;
    let sql = format!("UPDATE warden.session SET actor = 'mallory' WHERE id = {session}");
    assert_eq!(tamper(&mut cluster, &sql).await?.0, session);
    Ok(())
}

#[tokio::test]
async fn a_removed_projection_is_named() -> Result {
    let (mut cluster, _) = ledger().await?;
    let su = cluster.superuser().await?;
    let find = "SELECT id FROM warden.statement WHERE text LIKE '%AS evidence_5'";
    let statement = su.number(find).await?;
    let sql = format!("DELETE FROM warden.statement WHERE id = {statement}");
    assert_eq!(tamper(&mut cluster, &sql).await?.0, statement);
    Ok(())
}

#[tokio::test]
async fn an_invented_event_at_the_end_is_found() -> Result {
    let (mut cluster, _) = ledger().await?;
    tamper(
        &mut cluster,
        "INSERT INTO warden.event
         SELECT seq + 1, at, kind, session, statement, rows, duration_us, outcome, flags, payload, hash
         FROM warden.event ORDER BY seq DESC LIMIT 1",
    )
    .await?;
    Ok(())
}

#[tokio::test]
async fn verify_checks_a_range_and_counts_it() -> Result {
    let (cluster, seq) = ledger().await?;
    let su = cluster.superuser().await?;
    let sql = format!("SELECT * FROM warden.verify({}, {seq})", seq - 4);
    let verdict = su.objects(&sql).await?;
    assert_eq!(verdict[0]["ok"], true, "{verdict:?}");
    assert_eq!(verdict[0]["checked"], 5, "{verdict:?}");
    Ok(())
}
