//! `warden-verify`: checks a shipped ledger on any machine.

use clap::Parser;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use warden_core::ledger::{Hash, ORIGIN};
use warden_verify::{Verifier, parse_hash};

/// Verifies a ledger that a sink of pg_warden has written, without a server.
///
/// Every event's hash covers the event and the hash before it. The files are read as one ledger, in
/// the order given. Repeated events are accepted if they are identical. Only `seq` and `ledger` of
/// each line are under the hash; the other fields are for people and receivers.
///
/// Exit status: 0 if the ledger is what was recorded, 1 if it is not (the first bad event is named),
/// 2 if a file cannot be read or an option is wrong.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Files of one JSON object a line.
    #[arg(required = true, value_name = "FILE.ndjson")]
    files: Vec<PathBuf>,
    /// Number of the first event, if the files do not start with event 1; needs --previous.
    #[arg(long, value_name = "SEQ", default_value_t = 1, requires = "previous",
          value_parser = clap::value_parser!(i64).range(1..))]
    from: i64,
    /// Hash of the event before the first one: 64 hexadecimal digits.
    #[arg(long, value_name = "HASH", value_parser = hash)]
    previous: Option<Hash>,
    /// Hash that the last event must have: shows that nothing was cut off at the end.
    #[arg(long, value_name = "HASH", value_parser = hash)]
    head: Option<Hash>,
}

fn hash(text: &str) -> Result<Hash, String> {
    parse_hash(text).ok_or_else(|| "not 64 hexadecimal digits".to_owned())
}

enum Failure {
    Bad(String),
    Input(String),
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(v) => {
            let head: String = v.head().iter().map(|b| format!("{b:02x}")).collect();
            println!(
                "ok: {} events, last {}, {} repeated lines\nhead {head}",
                v.events(),
                v.last(),
                v.repeated()
            );
            ExitCode::SUCCESS
        }
        Err(Failure::Bad(e)) => {
            eprintln!("BAD: {e}");
            ExitCode::from(1)
        }
        Err(Failure::Input(e)) => {
            eprintln!("warden-verify: {e}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<Verifier, Failure> {
    let mut v = Verifier::starting(options.from, options.previous.unwrap_or(ORIGIN));
    for path in &options.files {
        read(path, &mut v)?;
    }
    if let Some(head) = &options.head {
        v.expect_head(head)
            .map_err(|e| Failure::Bad(e.to_string()))?;
    }
    Ok(v)
}

fn read(path: &Path, v: &mut Verifier) -> Result<(), Failure> {
    let input = |e: std::io::Error| Failure::Input(format!("{}: {e}", path.display()));
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(input)?);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if file.read_until(b'\n', &mut line).map_err(input)? == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        v.line(&line)
            .map_err(|e| Failure::Bad(format!("{e} ({}, line {number})", path.display())))?;
    }
    Ok(())
}
