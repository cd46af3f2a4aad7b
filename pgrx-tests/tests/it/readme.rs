//! The SQL of README.md and of the guide works when it is pasted.

use anyhow::ensure;
use std::path::Path;
use warden_tests::{Cluster, Config, Mode, Result};

/// The blocks of SQL of a document.
fn blocks(document: &str) -> Result<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(document);
    let text = std::fs::read_to_string(path)?;
    let blocks = text
        .split("```sql\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next());
    Ok(blocks.map(str::to_owned).collect())
}

async fn works(document: &str) -> Result {
    let cluster = Cluster::start(Config::new(Mode::Preloaded)).await?;
    let blocks = blocks(document)?;
    ensure!(!blocks.is_empty(), "{document} holds no SQL");
    let mut script = String::from("\\set ON_ERROR_STOP off\n");
    for block in &blocks {
        script.push_str(block);
    }
    let out = cluster.psql("postgres", "postgres", &script)?;
    let errors: Vec<_> = out.lines().filter(|l| l.contains("ERROR:")).collect();
    ensure!(errors.is_empty(), "{document}: {errors:#?}\n{out}");
    Ok(())
}

#[tokio::test]
async fn the_sql_of_the_readme_works() -> Result {
    works("README.md").await
}

#[tokio::test]
async fn the_sql_of_the_guide_works() -> Result {
    works("docs/guide.md").await
}
