//! Integration tests of pg_warden: a throwaway cluster for each test, and real clients.
//!
//! Owns what tests share: [`cluster::Cluster`] starts, stops and kills servers, [`client`] talks to
//! them. Receives the server from `WARDEN_PG_CONFIG` (else `pg_config` of the PATH), with the
//! extension installed into it. Never changes anything outside `target/` and its own directory
//! under the system's temporary directory.

pub mod client;
pub mod cluster;
pub mod jwt;
pub mod raw;
pub mod receiver;

pub use client::{Client, DbError, Reading};
pub use cluster::{Cluster, Config, Connector, Mode};
pub use raw::Raw;

/// What a test returns: its `Debug` form names the failing query and the server's message.
pub type Result<T = ()> = anyhow::Result<T>;
