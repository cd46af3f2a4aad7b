//! No symbol of ours may stand in for one of the server's.

use anyhow::ensure;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use warden_tests::{Cluster, Config, Mode, Result};

/// The dynamic symbols that a file defines.
fn defined(file: &Path) -> Result<BTreeSet<String>> {
    let out = Command::new("nm")
        .args(["-D", "--defined-only", "--format=just-symbols"])
        .arg(file)
        .output()?;
    ensure!(
        out.status.success(),
        "nm {}: {}",
        file.display(),
        String::from_utf8_lossy(&out.stderr)
    );
    let text = String::from_utf8(out.stdout)?;
    Ok(text
        .lines()
        .map(|l| l.split('@').next().unwrap_or(l).to_owned())
        .collect())
}

#[tokio::test]
async fn the_library_defines_no_symbol_of_the_server() -> Result {
    let cluster = Cluster::start(Config::new(Mode::Plain)).await?;
    let server = defined(&cluster.programs().join("postgres"))?;
    assert!(server.contains("palloc") && server.contains("errstart"));
    let ours = defined(&cluster.libraries().join("pg_warden.so"))?;
    assert!(ours.contains("Pg_magic_func"));
    let both: Vec<_> = ours.intersection(&server).collect();
    assert!(both.is_empty(), "{both:?}");
    Ok(())
}
