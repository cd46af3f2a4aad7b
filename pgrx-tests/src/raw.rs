//! A client that speaks the protocol message by message, where `tokio-postgres` does not reach: function
//! calls, portals in slices, pipelines, and going away at any point.

use crate::{Cluster, Result};
use anyhow::{Context, bail, ensure};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connection by the Unix socket. Dropped without [`Raw::terminate`], it just goes away.
#[derive(Debug)]
pub struct Raw {
    stream: UnixStream,
    pid: i32,
    key: i32,
}

/// A string as the protocol ends it.
fn string(s: &str) -> Vec<u8> {
    [s.as_bytes(), &[0]].concat()
}

impl Raw {
    /// Connects.
    pub fn connect(cluster: &Cluster, user: &str, database: &str) -> Result<Self> {
        Self::connect_with(cluster, user, database, &[])
    }

    /// Connects, with more parameters in the startup packet.
    pub fn connect_with(
        cluster: &Cluster,
        user: &str,
        database: &str,
        more: &[(&str, &str)],
    ) -> Result<Self> {
        let mut raw = Self {
            stream: open(cluster)?,
            pid: 0,
            key: 0,
        };
        let mut body = 196_608i32.to_be_bytes().to_vec();
        for (name, value) in [("user", user), ("database", database)].iter().chain(more) {
            body.extend([string(name), string(value)].concat());
        }
        body.push(0);
        raw.stream.write_all(&framed(&body))?;
        raw.answers()?;
        Ok(raw)
    }

    /// The process that serves this connection.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Asks the server to cancel what runs, as Ctrl-C in psql does.
    pub fn cancel(&self, cluster: &Cluster) -> Result {
        let body = [80_877_102, self.pid, self.key].map(i32::to_be_bytes);
        open(cluster)?.write_all(&framed(&body.concat()))?;
        Ok(())
    }

    /// Sends one message.
    pub fn send(&mut self, kind: u8, body: &[u8]) -> Result {
        self.stream
            .write_all(&[&[kind], &framed(body)[..]].concat())?;
        Ok(())
    }

    /// Simple query.
    pub fn query(&mut self, sql: &str) -> Result<Vec<String>> {
        self.send(b'Q', &string(sql))?;
        self.answers()
    }

    /// Parse.
    pub fn parse(&mut self, statement: &str, sql: &str) -> Result {
        let body = [string(statement), string(sql), vec![0, 0]].concat();
        self.send(b'P', &body)
    }

    /// Bind, with parameters and results as text.
    pub fn bind(&mut self, portal: &str, statement: &str, parameters: &[&str]) -> Result {
        let mut body = [string(portal), string(statement), vec![0, 0]].concat();
        body.extend((parameters.len() as u16).to_be_bytes());
        for p in parameters {
            body.extend((p.len() as u32).to_be_bytes());
            body.extend(p.as_bytes());
        }
        body.extend([0, 0]);
        self.send(b'B', &body)
    }

    /// Execute; at most so many rows, if it is not 0.
    pub fn execute(&mut self, portal: &str, rows: u32) -> Result {
        self.send(
            b'E',
            &[string(portal), rows.to_be_bytes().to_vec()].concat(),
        )
    }

    /// Parse, bind and execute without names.
    pub fn run(&mut self, sql: &str, parameters: &[&str]) -> Result {
        self.parse("", sql)?;
        self.bind("", "", parameters)?;
        self.execute("", 0)
    }

    /// Sync, and what the server has answered since.
    pub fn sync(&mut self) -> Result<Vec<String>> {
        self.send(b'S', &[])?;
        self.answers()
    }

    /// Function call, with binary arguments and result.
    pub fn call(&mut self, function: u32, arguments: &[&[u8]]) -> Result<Vec<String>> {
        let mut body = function.to_be_bytes().to_vec();
        body.extend([0, 1, 0, 1]);
        body.extend((arguments.len() as u16).to_be_bytes());
        for a in arguments {
            body.extend((a.len() as u32).to_be_bytes());
            body.extend(*a);
        }
        body.extend([0, 1]);
        self.send(b'F', &body)?;
        self.answers()
    }

    /// Says goodbye.
    pub fn terminate(mut self) -> Result {
        self.send(b'X', &[])
    }

    /// The next message.
    pub fn read(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        ensure!(
            (4..1 << 24).contains(&length),
            "a message of {length} bytes"
        );
        let mut body = vec![0; length as usize - 4];
        self.stream.read_exact(&mut body)?;
        Ok((head[0], body))
    }

    /// What comes until the server waits for the client: command tags, `error SQLSTATE`, `suspended`,
    /// `called`, `copy in`, `copy out`. Rows are left out.
    pub fn answers(&mut self) -> Result<Vec<String>> {
        let mut seen = Vec::new();
        loop {
            let (kind, body) = self.read()?;
            match kind {
                b'Z' => return Ok(seen),
                b'C' => seen.push(text(&body)),
                b'E' => {
                    let mut fields = body.split(|b| *b == 0);
                    let code = fields.find(|f| f.first() == Some(&b'C'));
                    let code = code.context("an error without SQLSTATE")?;
                    seen.push(format!("error {}", text(&code[1..])));
                    ensure!(self.pid != 0, "refused: {}", text(&body));
                }
                b's' => seen.push("suspended".into()),
                b'V' => seen.push("called".into()),
                b'H' => seen.push("copy out".into()),
                b'G' => {
                    seen.push("copy in".into());
                    return Ok(seen);
                }
                b'K' => {
                    let number = |i: usize| -> Result<i32> {
                        Ok(i32::from_be_bytes(body[i..i + 4].try_into()?))
                    };
                    (self.pid, self.key) = (number(0)?, number(4)?);
                }
                b'R' if body[..4] != [0; 4] => bail!("a password is asked for"),
                _ => {}
            }
        }
    }
}

fn open(cluster: &Cluster) -> Result<UnixStream> {
    let path = cluster
        .scratch()
        .join(format!(".s.PGSQL.{}", cluster.port()));
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(90)))?;
    Ok(stream)
}

/// With its length in front.
fn framed(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

fn text(bytes: &[u8]) -> String {
    let text = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8_lossy(text).into_owned()
}
