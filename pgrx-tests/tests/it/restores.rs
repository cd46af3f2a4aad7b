//! The ledger goes where the database goes: pg_upgrade, base backups, earlier times.

use anyhow::ensure;
use std::fs;
use std::path::{Path, PathBuf};
use warden_tests::{Cluster, Config, Mode, Result};

/// How often each statement is in the ledger.
async fn counts(cluster: &Cluster, names: &[&str]) -> Result<Vec<i64>> {
    cluster.drained().await?;
    let su = cluster.superuser().await?;
    let mut counts = vec![];
    for name in names {
        let sql =
            format!("SELECT count(*) FROM warden.activity WHERE query LIKE 'SELECT % AS {name}'");
        counts.push(su.number(&sql).await?);
    }
    Ok(counts)
}

async fn run(cluster: &Cluster, name: &str) -> Result {
    let app = cluster.connect("app", "postgres").await?;
    app.run(&format!("SELECT 1 AS {name}")).await
}

/// Why the ledger has gaps.
async fn gaps(cluster: &Cluster) -> Result<Vec<String>> {
    let su = cluster.superuser().await?;
    su.column(
        "SELECT warden.event_detail(kind, payload) ->> 'reason' FROM warden.event
         WHERE kind = 4 ORDER BY seq",
    )
    .await
}

// ------------------------------------------------------------------------------------- pg_upgrade

#[tokio::test]
async fn pg_upgrade_takes_everything_along() -> Result {
    let old_server = std::env::var("WARDEN_PG_CONFIG_OLD").ok();
    let mut config = Config::new(Mode::Preloaded);
    if let Some(server) = &old_server {
        config = config.server(server);
    }
    let mut old = Cluster::with_extension(config).await?;
    let dba = old.connect("dba", "postgres").await?;
    dba.run(
        "CREATE TABLE customer (junk int, id int PRIMARY KEY, email text, name text);
         ALTER TABLE customer DROP COLUMN junk;
         INSERT INTO customer VALUES (1, 'ana@example.com', 'Ana');
         GRANT SELECT, DELETE ON customer TO app;
         CREATE FUNCTION public.first_letter(value text) RETURNS text IMMUTABLE LANGUAGE sql RETURN left(value, 1);
         SELECT warden.mask('customer', 'email', 'warden.partial_email');
         SELECT warden.mask('customer', 'name', 'public.first_letter');
         CREATE ROLE fraud_team LOGIN; GRANT SELECT ON customer TO fraud_team;
         SELECT warden.unmask_for('fraud_team');
         SELECT warden.add_issuer('https://idp.example', 'HS256', 'a secret of at least 32 characters', 'shop')",
    )
    .await?;
    dba.run("CREATE DATABASE bare").await?;
    run(&old, "on_the_old_server").await?;
    assert_eq!(counts(&old, &["on_the_old_server"]).await?, [1]);
    let last = dba.number("SELECT max(seq) FROM warden.event").await?;
    drop(dba);
    old.stop()?;

    let mut new = Cluster::create(Config::new(Mode::Preloaded).initdb())?;
    new.upgrade_from(&old)?;
    new.up().await?;
    // The first statement on the new server, and the session of the one before it.
    run(&new, "on_the_new_server").await?;
    assert_eq!(
        counts(&new, &["on_the_old_server", "on_the_new_server"]).await?,
        [1, 1]
    );
    new.assert_verifies().await?;
    let app = new.connect("app", "postgres").await?;
    assert_eq!(
        app.rows("SELECT email, name FROM customer").await?,
        [[Some("a***@***.com".to_owned()), Some("A".into())]]
    );
    assert_eq!(app.sqlstate("DELETE FROM customer").await?, "WA001");
    let exempt = new.connect("fraud_team", "postgres").await?;
    assert_eq!(
        exempt.value("SELECT email FROM customer").await?,
        "ana@example.com"
    );

    let su = new.superuser().await?;
    assert!(su.number("SELECT max(seq) FROM warden.event").await? > last);
    assert_eq!(
        su.value("SELECT secret_missing FROM warden.issuers")
            .await?,
        "f"
    );
    assert_eq!(gaps(&new).await?, ["server_replaced"]);
    let facts = "SELECT warden.event_detail(kind, payload) FROM warden.event WHERE kind = 4";
    let facts: serde_json::Value = serde_json::from_str(&su.value(facts).await?)?;
    assert_eq!(
        facts["server_version"].as_i64(),
        Some(su.number("SHOW server_version_num").await?)
    );
    let system = su
        .value("SELECT system_identifier FROM pg_control_system()")
        .await?;
    assert_eq!(facts["system"].to_string(), system);
    let origins = su
        .column("SELECT server_version / 10000 FROM warden.ledger_origin ORDER BY id")
        .await?;
    assert_eq!(
        origins,
        [old.major()?.to_string(), new.major()?.to_string()]
    );
    // No session of the old server is still open.
    let open = "SELECT count(*) FROM warden.connections c
         WHERE event = 'connected' AND ended IS NULL AND seq <= (SELECT seq FROM warden.ledger_origin ORDER BY id DESC LIMIT 1)";
    assert_eq!(su.number(open).await?, 0);

    // Nothing of it happens again.
    drop((su, app, exempt));
    new.stop()?;
    new.up().await?;
    run(&new, "after_a_restart").await?;
    let names = ["on_the_old_server", "on_the_new_server", "after_a_restart"];
    assert_eq!(counts(&new, &names).await?, [1, 1, 1]);
    assert_eq!(gaps(&new).await?, ["server_replaced"]);
    new.assert_verifies().await
}

// ---------------------------------------------------------------------------------------- backups

/// A primary whose WAL goes to an archive.
async fn archiving() -> Result<(Cluster, PathBuf)> {
    let cluster = Cluster::create(Config::new(Mode::Plain))?;
    let archive = cluster.data().with_extension("archive");
    drop(cluster);
    let command = format!("mkdir -p {0} && cp %p {0}/%f", archive.display());
    let config = Config::new(Mode::Preloaded)
        .line("archive_mode = on")
        .line(&format!("archive_command = '{command}'"));
    Ok((Cluster::with_extension(config).await?, archive))
}

fn base_backup(cluster: &Cluster) -> Result<PathBuf> {
    let to = cluster.scratch().join("backup");
    let path = to.display().to_string();
    let args = ["-U", "postgres", "-D", &path, "-c", "fast", "-X", "stream"];
    let (fine, text) = cluster.program("pg_basebackup", &args, &[])?;
    ensure!(fine, "pg_basebackup: {text}");
    Ok(to)
}

/// A cluster at the restore point `target`, from a backup.
async fn at_target(
    backup: &Path,
    archive: &Path,
    prepare: impl FnOnce(&Path) -> Result,
) -> Result<Cluster> {
    let config = Config::new(Mode::Preloaded)
        .copy_of(backup)
        .line(&format!(
            "restore_command = 'cp {}/%f %p'",
            archive.display()
        ))
        .line("recovery_target_name = 'target'")
        .line("recovery_target_action = 'promote'");
    let mut cluster = Cluster::create(config)?;
    fs::write(cluster.data().join("recovery.signal"), "")?;
    prepare(cluster.data())?;
    cluster.up().await?;
    cluster
        .wait_until("recovery has ended", async || {
            let su = cluster.superuser().await?;
            Ok(su.value("SELECT pg_is_in_recovery()").await? == "f")
        })
        .await?;
    Ok(cluster)
}

const NAMES: [&str; 4] = [
    "before_backup",
    "before_target",
    "after_target",
    "in_another_time",
];

async fn goes_on_in_another_time(mut cluster: Cluster) -> Result {
    run(&cluster, "in_another_time").await?;
    assert_eq!(counts(&cluster, &NAMES).await?, [1, 1, 0, 1]);
    assert_eq!(gaps(&cluster).await?, ["timeline_changed"]);
    cluster.assert_verifies().await?;
    let su = cluster.superuser().await?;
    let timelines = "SELECT timeline FROM warden.ledger_origin ORDER BY id";
    assert_eq!(su.column(timelines).await?, ["1", "2"]);
    drop(su);
    cluster.stop()?;
    cluster.up().await?;
    run(&cluster, "after_a_restart").await?;
    assert_eq!(
        counts(&cluster, &["in_another_time", "after_a_restart"]).await?,
        [1, 1]
    );
    assert_eq!(counts(&cluster, &NAMES).await?, [1, 1, 0, 1]);
    assert_eq!(gaps(&cluster).await?, ["timeline_changed"]);
    cluster.assert_verifies().await
}

/// A backup, an archive that goes beyond the target, and the stopped primary.
async fn history() -> Result<(Cluster, PathBuf, PathBuf)> {
    let (mut primary, archive) = archiving().await?;
    run(&primary, NAMES[0]).await?;
    primary.drained().await?;
    let backup = base_backup(&primary)?;
    run(&primary, NAMES[1]).await?;
    primary.drained().await?;
    let su = primary.superuser().await?;
    su.run("SELECT pg_create_restore_point('target')").await?;
    run(&primary, NAMES[2]).await?;
    primary.drained().await?;
    su.run("SELECT pg_switch_wal()").await?;
    drop(su);
    primary.stop()?;
    Ok((primary, backup, archive))
}

#[tokio::test]
async fn a_database_at_an_earlier_time_goes_on_with_its_ledger() -> Result {
    let (_primary, backup, archive) = history().await?;
    // The journal of the backup is older than the ledger will be.
    let restored = at_target(&backup, &archive, |_| Ok(())).await?;
    goes_on_in_another_time(restored).await?;
    drop(fs::remove_dir_all(&archive));
    Ok(())
}

#[tokio::test]
async fn a_journal_of_a_later_time_is_not_replayed() -> Result {
    let (primary, backup, archive) = history().await?;
    let restored = at_target(&backup, &archive, |data| {
        let journal = data.join("pg_warden");
        fs::remove_dir_all(&journal)?;
        let copied = std::process::Command::new("cp")
            .arg("-a")
            .arg(primary.data().join("pg_warden"))
            .arg(&journal)
            .status()?;
        ensure!(copied.success(), "cp");
        Ok(())
    })
    .await?;
    goes_on_in_another_time(restored).await?;
    drop(fs::remove_dir_all(&archive));
    Ok(())
}

#[tokio::test]
async fn a_lost_journal_directory_is_a_new_origin() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    run(&cluster, "before").await?;
    cluster.drained().await?;
    cluster.stop()?;
    fs::remove_dir_all(cluster.data().join("pg_warden"))?;
    cluster.up().await?;
    run(&cluster, "after").await?;
    assert_eq!(counts(&cluster, &["before", "after"]).await?, [1, 1]);
    assert_eq!(gaps(&cluster).await?, ["journal_replaced"]);
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_copy_of_a_stopped_cluster_goes_on_where_it_was() -> Result {
    let mut cluster = Cluster::with_warden().await?;
    run(&cluster, "before_the_copy").await?;
    cluster.drained().await?;
    cluster.stop()?;
    let copy = Cluster::start(Config::new(Mode::Preloaded).copy_of(cluster.data())).await?;
    run(&copy, "in_the_copy").await?;
    assert_eq!(
        counts(&copy, &["before_the_copy", "in_the_copy"]).await?,
        [1, 1]
    );
    copy.assert_verifies().await?;
    cluster.up().await?;
    run(&cluster, "in_the_original").await?;
    assert_eq!(
        counts(
            &cluster,
            &["before_the_copy", "in_the_copy", "in_the_original"]
        )
        .await?,
        [1, 0, 1]
    );
    assert_eq!(gaps(&cluster).await?, Vec::<String>::new());
    assert_eq!(gaps(&copy).await?, Vec::<String>::new());
    cluster.assert_verifies().await
}

#[tokio::test]
async fn a_running_clusters_base_backup_goes_on_without_an_archive() -> Result {
    let cluster = Cluster::with_warden().await?;
    run(&cluster, "before_the_backup").await?;
    cluster.drained().await?;
    let backup = base_backup(&cluster)?;
    run(&cluster, "after_the_backup").await?;
    cluster.drained().await?;
    let mut copy = Cluster::start(Config::new(Mode::Preloaded).copy_of(&backup)).await?;
    run(&copy, "in_the_copy").await?;
    let names = ["before_the_backup", "after_the_backup", "in_the_copy"];
    assert_eq!(counts(&copy, &names).await?, [1, 0, 1]);
    copy.assert_verifies().await?;
    copy.stop()?;
    copy.up().await?;
    assert_eq!(counts(&copy, &names).await?, [1, 0, 1]);
    copy.assert_verifies().await
}
