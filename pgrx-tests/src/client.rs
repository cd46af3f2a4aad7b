//! A client connection, with the few ways of asking that tests need.

use crate::Result;
use anyhow::{Context, anyhow};
use serde_json::Value;
use std::ops::Deref;
use tokio_postgres::SimpleQueryMessage;

/// The server's error, with all its fields.
pub type DbError = tokio_postgres::error::DbError;

/// A connection; its driver runs on the test's runtime and ends with it.
pub struct Client(tokio_postgres::Client);

/// The rows of a query as text, by the simple protocol; NULL is `None`.
pub type Reading = Vec<Vec<Option<String>>>;

impl Client {
    pub(crate) fn new(client: tokio_postgres::Client) -> Self {
        Self(client)
    }

    /// Runs statements by the simple protocol.
    pub async fn run(&self, sql: &str) -> Result {
        self.0
            .batch_execute(sql)
            .await
            .with_context(|| format!("running {sql}"))
    }

    /// The rows of a query, each value as the server prints it.
    pub async fn rows(&self, sql: &str) -> Result<Reading> {
        let messages = self
            .0
            .simple_query(sql)
            .await
            .with_context(|| format!("reading {sql}"))?;
        let rows = messages.iter().filter_map(|m| match m {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|i| row.get(i).map(str::to_owned))
                    .collect(),
            ),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// The first column of every row; NULL becomes an empty string.
    pub async fn column(&self, sql: &str) -> Result<Vec<String>> {
        let rows = self.rows(sql).await?;
        Ok(rows
            .into_iter()
            .map(|mut r| r.swap_remove(0).unwrap_or_default())
            .collect())
    }

    /// The one value of a query of one row; NULL becomes an empty string.
    pub async fn value(&self, sql: &str) -> Result<String> {
        let mut rows = self.column(sql).await?;
        anyhow::ensure!(
            rows.len() == 1,
            "{} rows instead of one from {sql}",
            rows.len()
        );
        Ok(rows.swap_remove(0))
    }

    /// The one number of a query of one row.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        let value = self.value(sql).await?;
        value
            .parse()
            .with_context(|| format!("{value:?} from {sql}"))
    }

    /// The rows of a query, each as a JSON object.
    pub async fn objects(&self, sql: &str) -> Result<Vec<Value>> {
        let sql = format!("SELECT to_jsonb(r)::text FROM ({sql}) r");
        let rows = self.column(&sql).await?;
        rows.iter()
            .map(|r| serde_json::from_str(r).map_err(Into::into))
            .collect()
    }

    /// The error of statements that must fail.
    pub async fn error(&self, sql: &str) -> Result<DbError> {
        match self.0.batch_execute(sql).await {
            Ok(()) => Err(anyhow!("no error from {sql}")),
            Err(e) => match e.as_db_error() {
                Some(db) => Ok(db.clone()),
                None => Err(e).with_context(|| format!("running {sql}")),
            },
        }
    }

    /// The SQLSTATE of statements that must fail.
    pub async fn sqlstate(&self, sql: &str) -> Result<String> {
        Ok(self.error(sql).await?.code().code().to_owned())
    }
}

impl Deref for Client {
    type Target = tokio_postgres::Client;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}
