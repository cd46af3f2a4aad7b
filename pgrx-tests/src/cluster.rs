//! A cluster for one test: made from a template, reached by a Unix socket, gone with the test.
//!
//! The template (`initdb`, once for a server version) and the data directories are under
//! `target/test-clusters`. A failed test shows the end of the server's log, and keeps the data
//! directory if it panicked or if `WARDEN_KEEP_CLUSTERS` is set.

use crate::{Client, Result};
use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use std::fs::{self, File};
use std::future::Future;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// The longest that anything is waited for. Nothing is expected to take so long; no test passes or
/// fails by how fast it is.
const PATIENCE: Duration = Duration::from_secs(90);

/// Whether the server loads the library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `shared_preload_libraries = 'pg_warden'`.
    Preloaded,
    /// The server without us.
    Plain,
}

/// How a cluster starts.
#[derive(Debug, Clone)]
pub struct Config {
    mode: Mode,
    tcp: bool,
    lines: String,
    environment: Vec<(String, PathBuf)>,
    server: Option<String>,
    source: Source,
}

/// Where a data directory comes from.
#[derive(Debug, Clone)]
enum Source {
    Template,
    Initdb,
    Copy(PathBuf),
}

impl Config {
    /// The settings of this mode.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            tcp: false,
            lines: String::new(),
            environment: vec![],
            server: None,
            source: Source::Template,
        }
    }

    /// Another server than that of the other tests, by its pg_config.
    #[must_use]
    pub fn server(mut self, pg_config: &str) -> Self {
        self.server = Some(pg_config.to_owned());
        self
    }

    /// A copy of this data directory, instead of a fresh one.
    #[must_use]
    pub fn copy_of(mut self, data: &Path) -> Self {
        self.source = Source::Copy(data.to_owned());
        self
    }

    /// A cluster with a system identifier of its own; the others share their template's.
    #[must_use]
    pub fn initdb(mut self) -> Self {
        self.source = Source::Initdb;
        self
    }

    /// Listen on 127.0.0.1 too.
    #[must_use]
    pub fn tcp(mut self) -> Self {
        self.tcp = true;
        self
    }

    /// One more variable in the server's environment.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &Path) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// One more line of postgresql.conf.
    #[must_use]
    pub fn line(mut self, line: &str) -> Self {
        self.lines.push_str(line);
        self.lines.push('\n');
        self
    }
}

/// The server's programs.
struct Server {
    bin: PathBuf,
    lib: PathBuf,
    version: String,
}

impl Server {
    fn find(config: Option<String>) -> Result<Self> {
        let config = config
            .or_else(|| std::env::var("WARDEN_PG_CONFIG").ok())
            .unwrap_or_else(|| "pg_config".into());
        let ask = |what: &str| -> Result<String> {
            let out = Command::new(&config)
                .arg(what)
                .output()
                .context(config.clone())?;
            ensure!(out.status.success(), "{config} {what} failed");
            Ok(String::from_utf8(out.stdout)?.trim().to_owned())
        };
        let version = ask("--version")?.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        Ok(Self {
            bin: ask("--bindir")?.into(),
            lib: ask("--pkglibdir")?.into(),
            version,
        })
    }

    /// A server program as a user that the server accepts, ended with this test.
    fn command(&self, program: &str) -> Command {
        let own = self.bin.join(program);
        let program = if own.exists() { own } else { program.into() };
        let mut c = Command::new("setpriv");
        if geteuid().is_root() {
            c.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
        }
        c.arg("--pdeathsig=KILL").arg(program);
        c.env("LC_ALL", "C")
            .env("TZ", "UTC")
            .env_remove("PGHOST")
            .stdin(Stdio::null());
        c
    }
}

/// A running or stopped cluster.
pub struct Cluster {
    server: Server,
    data: PathBuf,
    socket: PathBuf,
    tcp_port: Option<u16>,
    environment: Vec<(String, PathBuf)>,
    postmaster: Option<Child>,
}

impl Cluster {
    /// A cluster that preloads the library, with the extension in database `postgres`.
    pub async fn with_warden() -> Result<Self> {
        Self::with_extension(Config::new(Mode::Preloaded)).await
    }

    /// A cluster with these settings and the extension in database `postgres`.
    pub async fn with_extension(config: Config) -> Result<Self> {
        let cluster = Self::start(config).await?;
        let su = cluster.superuser().await?;
        su.run("CREATE EXTENSION pg_warden").await?;
        // The administrator of the tests: what it does is recorded, and not refused.
        su.run(
            "CREATE ROLE dba LOGIN SUPERUSER IN ROLE warden_admin;
             CREATE ROLE auditor LOGIN IN ROLE warden_auditor;
             CREATE ROLE app LOGIN; GRANT CREATE, USAGE ON SCHEMA public TO app",
        )
        .await?;
        Ok(cluster)
    }

    /// A cluster with these settings, and without the extension.
    pub async fn start(config: Config) -> Result<Self> {
        let mut cluster = Self::create(config)?;
        cluster.up().await?;
        Ok(cluster)
    }

    /// As [`Cluster::start`], but stopped.
    pub fn create(config: Config) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let server = Server::find(config.server.clone())?;
        let unique = format!(
            "{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let home = home()?;
        let data = home.join(&unique);
        let socket = std::env::temp_dir().join(format!("warden-{unique}"));
        let mut cluster = Self {
            server,
            data,
            socket,
            tcp_port: None,
            environment: vec![],
            postmaster: None,
        };
        // A failed test of another run, whose process had the same id, may have left one.
        drop(fs::remove_dir_all(&cluster.data));
        match &config.source {
            Source::Template => copy(&template(&cluster.server, &home)?, &cluster.data)?,
            Source::Initdb => initdb(&cluster.server, &cluster.data)?,
            Source::Copy(data) => copy(data, &cluster.data)?,
        }
        own_directory(&cluster.socket)?;
        cluster.configure(config)?;
        Ok(cluster)
    }

    /// Replaces the settings; they hold from the next start on.
    pub fn configure(&mut self, config: Config) -> Result {
        self.tcp_port = match config.tcp {
            true => Some(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()),
            false => None,
        };
        let mut text = format!(
            "listen_addresses = '{}'\nport = {}\nunix_socket_directories = '{}'\n",
            if config.tcp { "127.0.0.1" } else { "" },
            self.tcp_port.unwrap_or(5432),
            self.socket.display(),
        );
        if config.mode == Mode::Preloaded {
            text.push_str("shared_preload_libraries = 'pg_warden'\nwarden.journal_size = '64MB'\n");
        }
        text.push_str(&config.lines);
        self.environment = config.environment;
        fs::write(self.data.join("postgresql.auto.conf"), text)?;
        Ok(())
    }

    /// Starts the postmaster and waits until it accepts connections.
    pub async fn up(&mut self) -> Result {
        ensure!(self.postmaster.is_none(), "the cluster runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let child = self
            .server
            .command("postgres")
            .arg("-D")
            .arg(&self.data)
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.postmaster = Some(child);
        let start = Instant::now();
        loop {
            if let Some(status) = self.postmaster.as_mut().context("stopped")?.try_wait()? {
                self.postmaster = None;
                bail!("the postmaster ended: {status}\n{}", self.log());
            }
            if self.superuser().await.is_ok() {
                return Ok(());
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "the server did not start\n{}",
                self.log()
            );
            pause().await;
        }
    }

    /// Stops in an orderly way: clients are thrown out, a checkpoint is written.
    pub fn stop(&mut self) -> Result {
        self.end(Signal::INT)
    }

    /// `pg_ctl stop -m immediate`: as after a crash, but tidy.
    pub fn stop_immediate(&mut self) -> Result {
        self.end(Signal::QUIT)
    }

    /// `kill -9` of the postmaster; waits until its children have noticed and ended.
    pub async fn kill_postmaster(&mut self) -> Result {
        let children = self.processes();
        self.end(Signal::KILL)?;
        gone(&children).await
    }

    /// `kill -9` of every process, whatever it does.
    pub async fn crash(&mut self) -> Result {
        let children = self.processes();
        self.end(Signal::KILL)?;
        for pid in &children {
            // Some have ended by themselves.
            drop(Self::kill(i64::from(*pid)));
        }
        gone(&children).await
    }

    /// Stops a process where it is (SIGSTOP). Only [`Cluster::crash`] ends it.
    pub fn freeze(pid: i64) -> Result {
        kill_process(process(pid)?, Signal::STOP).context("kill -STOP")
    }

    /// Begins a smart shutdown: clients may stay, and new ones are refused.
    pub fn stop_smart(&self) -> Result {
        let child = self
            .postmaster
            .as_ref()
            .context("the cluster does not run")?;
        kill_process(Pid::from_child(child), Signal::TERM).context("kill")
    }

    /// Has the server read its configuration again.
    pub fn reload(&self) -> Result {
        let child = self.postmaster.as_ref().context("stopped")?;
        kill_process(Pid::from_child(child), Signal::HUP).context("kill -HUP")
    }

    /// Lets a process that [`Cluster::freeze`] stopped go on.
    pub fn thaw(pid: i64) -> Result {
        kill_process(process(pid)?, Signal::CONT).context("kill -CONT")
    }

    /// Asks for an orderly stop, and does not wait for it; [`Cluster::stop`] does.
    pub fn ask_to_stop(&self) -> Result {
        let child = self.postmaster.as_ref().context("stopped")?;
        kill_process(Pid::from_child(child), Signal::INT).context("kill -INT")
    }

    fn end(&mut self, signal: Signal) -> Result {
        let mut child = self.postmaster.take().context("the cluster does not run")?;
        kill_process(Pid::from_child(&child), signal)?;
        child.wait()?;
        Ok(())
    }

    /// Stops, and starts with these settings.
    pub async fn restart(&mut self, config: Config) -> Result {
        self.stop()?;
        self.configure(config)?;
        self.up().await
    }

    /// The processes that the postmaster started and that still live.
    fn processes(&self) -> Vec<u32> {
        let Some(child) = &self.postmaster else {
            return vec![];
        };
        let path = format!("/proc/{0}/task/{0}/children", child.id());
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace()
            .filter_map(|p| p.parse().ok())
            .collect()
    }

    /// What the server's processes call themselves: who is connected, and does what.
    pub fn titles(&self) -> Result<Vec<String>> {
        let read = |pid: &u32| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&title).into_owned()
        };
        Ok(self.processes().iter().map(read).collect())
    }

    /// `kill -9` of one server process.
    pub fn kill(pid: i64) -> Result {
        kill_process(process(pid)?, Signal::KILL).context("kill -9")
    }

    /// The recorder of a database, once there is one.
    pub async fn recorder(&self, database: &str) -> Result<i64> {
        let sql = format!(
            "SELECT pid FROM pg_stat_activity
             WHERE backend_type ILIKE '%recorder%' AND datname = '{database}'"
        );
        let start = Instant::now();
        loop {
            // A killed recorder takes all connections with it: ask on a new one each time.
            if let Ok(client) = self.superuser().await
                && let Ok(pid) = client.number(&sql).await
            {
                return Ok(pid);
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "no recorder of {database}\n{}",
                self.log()
            );
            pause().await;
        }
    }

    /// Waits until a process that was killed has thrown everybody out, this witness included, and the
    /// server is back.
    pub async fn back_after_crash(&self, witness: &Client) -> Result {
        self.wait_until("the server has noticed", async || {
            Ok(witness.run("SELECT 1").await.is_err())
        })
        .await?;
        self.wait_until("the server is back", async || {
            Ok(self.superuser().await.is_ok())
        })
        .await
    }

    /// How to connect, for clients that outlive a look at the cluster.
    #[must_use]
    pub fn connector(&self) -> Connector {
        Connector {
            socket: self.socket.clone(),
            port: self.port(),
        }
    }

    /// A connection of the superuser to database `postgres`.
    pub async fn superuser(&self) -> Result<Client> {
        self.connect("postgres", "postgres").await
    }

    /// A connection by the Unix socket.
    pub async fn connect(&self, user: &str, database: &str) -> Result<Client> {
        self.connector().connect(user, database, |_| ()).await
    }

    /// A connection by TCP from 127.0.0.1.
    pub async fn connect_tcp(&self, user: &str, database: &str, name: &str) -> Result<Client> {
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(self.port())
            .user(user)
            .dbname(database);
        connect(config.application_name(name)).await
    }

    /// Runs a script with psql; what it prints to both outputs, in order.
    pub fn psql(&self, user: &str, database: &str, script: &str) -> Result<String> {
        self.psql_bytes(user, database, script.as_bytes())
    }

    /// As [`Self::psql`], with a script in any encoding.
    pub fn psql_bytes(&self, user: &str, database: &str, script: &[u8]) -> Result<String> {
        let file = self.socket.join("script.sql");
        fs::write(&file, script)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
        let both = self.socket.join("psql.out");
        let out = File::create(&both)?;
        self.server
            .command("psql")
            .args(["-X", "-a", "-U", user, "-d", database, "-f"])
            .arg(&file)
            .arg("-h")
            .arg(&self.socket)
            .args(["-p", &self.port().to_string()])
            .stdout(out.try_clone()?)
            .stderr(out)
            .status()
            .context("psql")?;
        let text = String::from_utf8_lossy(&fs::read(both)?).into_owned();
        // psql names the script in front of each error.
        Ok(text.replace(&format!("psql:{}:", file.display()), "psql:"))
    }

    /// Runs one of the server's client programs by the Unix socket: whether it succeeded, and what it
    /// printed to both outputs.
    pub fn program(
        &self,
        name: &str,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Result<(bool, String)> {
        let out = self
            .server
            .command(name)
            .args(args)
            .env("PGHOST", &self.socket)
            .env("PGPORT", self.port().to_string())
            .envs(env.iter().copied())
            .output()
            .with_context(|| name.to_owned())?;
        let text = [out.stdout, out.stderr].concat();
        Ok((
            out.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        ))
    }

    /// Runs pg_upgrade, from a stopped cluster into this one, which has never run.
    pub fn upgrade_from(&self, old: &Self) -> Result {
        if self.major()? >= 18 {
            // This version's are on by themselves, and pg_upgrade wants both to be alike.
            done(
                self.server
                    .command("pg_checksums")
                    .arg("--disable")
                    .arg(&self.data),
            )?;
        }
        done(
            self.server
                .command("pg_upgrade")
                .current_dir(&self.socket)
                .args(["-U", "postgres", "-b"])
                .arg(&old.server.bin)
                .arg("-B")
                .arg(&self.server.bin)
                .arg("-d")
                .arg(&old.data)
                .arg("-D")
                .arg(&self.data)
                .arg("-s")
                .arg(&self.socket),
        )
    }

    /// Waits until a condition holds.
    pub async fn wait_until<F>(&self, what: &str, mut condition: impl FnMut() -> F) -> Result
    where
        F: Future<Output = Result<bool>>,
    {
        let start = Instant::now();
        while !condition().await? {
            ensure!(
                start.elapsed() < PATIENCE,
                "waited in vain until {what}\n{}",
                self.log()
            );
            pause().await;
        }
        Ok(())
    }

    /// Waits until everything that ended before this call is in the ledger of database `postgres`.
    pub async fn drained(&self) -> Result {
        self.drained_in("postgres").await
    }

    /// Waits until everything that ended before this call is in the ledger of a database.
    pub async fn drained_in(&self, database: &str) -> Result {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let n = NUMBER.fetch_add(1, Ordering::Relaxed);
        let marker = format!("marker_{}_{n}", std::process::id());
        // The marker's connection is of its own: it must not inherit a transaction or a role.
        let client = self.connect("postgres", database).await?;
        client.run(&format!("SELECT 1 AS {marker}")).await?;
        let seen = format!(
            "SELECT count(*) FROM warden.activity
             WHERE query LIKE 'SELECT % AS {marker}' AND outcome = 'succeeded'"
        );
        self.wait_until("the recorder has read the journal", async || {
            Ok(client.number(&seen).await? > 0)
        })
        .await
    }

    /// The rows of `warden.activity`, oldest first, that satisfy a condition, as JSON objects.
    pub async fn activity(&self, condition: &str) -> Result<Vec<Value>> {
        self.drained().await?;
        let client = self.superuser().await?;
        client
            .objects(&format!(
                "SELECT * FROM warden.activity WHERE {condition} ORDER BY seq"
            ))
            .await
    }

    /// The one row of `warden.activity` that satisfies a condition.
    pub async fn the_activity(&self, condition: &str) -> Result<Value> {
        let mut rows = self.activity(condition).await?;
        ensure!(
            rows.len() == 1,
            "{} events where {condition}: {rows:#?}",
            rows.len()
        );
        Ok(rows.swap_remove(0))
    }

    /// The rows of `warden.connections`, oldest first, that satisfy a condition, as JSON objects.
    pub async fn connections(&self, condition: &str) -> Result<Vec<Value>> {
        self.drained().await?;
        let client = self.superuser().await?;
        client
            .objects(&format!(
                "SELECT * FROM warden.connections WHERE {condition} ORDER BY seq"
            ))
            .await
    }

    /// The one row of `warden.connections` that satisfies a condition, once there is one.
    pub async fn the_connection(&self, condition: &str) -> Result<Value> {
        let start = Instant::now();
        loop {
            let mut rows = self.connections(condition).await?;
            ensure!(
                rows.len() < 2,
                "{} events where {condition}: {rows:#?}",
                rows.len()
            );
            match rows.pop() {
                Some(row) => return Ok(row),
                None => ensure!(start.elapsed() < PATIENCE, "no event where {condition}"),
            }
            pause().await;
        }
    }

    /// What `warden.verify()` says of the ledger of a database.
    pub async fn verify(&self, database: &str) -> Result<Value> {
        let client = self.connect("postgres", database).await?;
        let mut rows = client.objects("SELECT * FROM warden.verify()").await?;
        ensure!(rows.len() == 1, "{} rows from warden.verify()", rows.len());
        Ok(rows.swap_remove(0))
    }

    /// Fails unless the ledger of database `postgres` verifies.
    pub async fn assert_verifies(&self) -> Result {
        let verdict = self.verify("postgres").await?;
        ensure!(
            verdict["ok"] == true,
            "the ledger does not verify: {verdict}"
        );
        Ok(())
    }

    /// The data directory.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The server's library directory.
    #[must_use]
    pub fn libraries(&self) -> &Path {
        &self.server.lib
    }

    /// The server's programs.
    #[must_use]
    pub fn programs(&self) -> &Path {
        &self.server.bin
    }

    /// The directory of the Unix socket: writable for the server, gone after the test.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        &self.socket
    }

    /// The port of both kinds of socket.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.tcp_port.unwrap_or(5432)
    }

    /// The end of the server's log.
    #[must_use]
    pub fn log(&self) -> String {
        let text = fs::read(self.log_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// The server's whole log.
    pub fn whole_log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.log_path())?).into_owned())
    }

    fn log_path(&self) -> PathBuf {
        self.data.join("server.log")
    }

    /// The number of the server's version: 15, 16, 18.
    pub fn major(&self) -> Result<u32> {
        let text = fs::read_to_string(self.data.join("PG_VERSION"))?;
        Ok(text.trim().parse()?)
    }
}

/// Connects to a cluster by its Unix socket, whether it runs just now or not.
#[derive(Debug, Clone)]
pub struct Connector {
    socket: PathBuf,
    port: u16,
}

impl Connector {
    /// A connection, with more settings.
    pub async fn connect(
        &self,
        user: &str,
        database: &str,
        more: impl FnOnce(&mut tokio_postgres::Config),
    ) -> Result<Client> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.socket)
            .port(self.port)
            .user(user)
            .dbname(database);
        more(&mut config);
        connect(&config).await
    }
}

async fn connect(config: &tokio_postgres::Config) -> Result<Client> {
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    // Its errors reach the client's next query; notices are not looked at.
    tokio::spawn(async move { drop(connection.await) });
    Ok(Client::new(client))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.postmaster.is_some() {
            drop(self.stop_immediate());
        }
        drop(fs::remove_dir_all(&self.socket));
        // Runners show this for failed tests only.
        eprintln!("end of the server's log:\n{}", self.log());
        if std::thread::panicking() || std::env::var_os("WARDEN_KEEP_CLUSTERS").is_some() {
            eprintln!("kept: {}", self.data.display());
        } else {
            drop(fs::remove_dir_all(&self.data));
        }
    }
}

fn process(pid: i64) -> Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("not a process id")
}

/// Waits until processes have ended.
async fn gone(pids: &[u32]) -> Result {
    let start = Instant::now();
    while pids
        .iter()
        .any(|p| Path::new("/proc").join(p.to_string()).exists())
    {
        ensure!(
            start.elapsed() < PATIENCE,
            "processes of a killed server go on"
        );
        pause().await;
    }
    Ok(())
}

/// Between two looks.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

/// Where test clusters live.
fn home() -> Result<PathBuf> {
    let home = match std::env::var_os("WARDEN_TEST_DIR") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-clusters"),
    };
    own_directory(&home)?;
    Ok(home.canonicalize()?)
}

/// Makes a directory that the server's user may write to.
fn own_directory(path: &Path) -> Result {
    fs::create_dir_all(path)?;
    if geteuid().is_root() {
        done(Command::new("chown").arg("postgres:postgres").arg(path))?;
    }
    Ok(())
}

/// A fresh cluster of this server's version, made once and copied by every test.
fn template(server: &Server, home: &Path) -> Result<PathBuf> {
    let path = home.join(format!("template-{}", server.version));
    let lock = File::create(home.join(format!("{}.lock", server.version)))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    if path.exists() {
        return Ok(path);
    }
    let fresh = home.join(format!("fresh-{}", server.version));
    drop(fs::remove_dir_all(&fresh));
    initdb(server, &fresh)?;
    fs::rename(&fresh, &path)?;
    Ok(path)
}

fn initdb(server: &Server, path: &Path) -> Result {
    done(
        server
            .command("initdb")
            .args([
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "-D",
            ])
            .arg(path),
    )?;
    // Kills of processes, and not of machines, are what these tests do.
    let mut conf = fs::read_to_string(path.join("postgresql.conf"))?;
    conf.push_str(
        "fsync = off\nshared_buffers = '32MB'\nmax_connections = 40\nlog_line_prefix = '%m [%p] %q%u@%d '
max_worker_processes = 16\nlog_statement_stats = off\nlc_messages = 'C'\ntimezone = 'UTC'\n",
    );
    fs::write(path.join("postgresql.conf"), conf)?;
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result {
    done(
        Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(from)
            .arg(to),
    )
}

fn done(command: &mut Command) -> Result {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    let text = [out.stdout, out.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    ensure!(out.status.success(), "{command:?} failed: {text}");
    Ok(())
}
