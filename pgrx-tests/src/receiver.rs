//! An HTTP receiver for sinks that can behave badly, and that keeps count of what it was sent.
//!
//! Owns: a listener on 127.0.0.1, a thread a connection, and the events that arrived. Says which
//! are missing and which came twice. Stands for a SIEM in tests and in the quickstart.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How a request is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// 200; the events count as received.
    Accept,
    /// This status; the events do not count.
    Status(u16),
    /// This status, and `Retry-After` with this value.
    RetryAfter(u16, String),
    /// 200 for bodies up to this many bytes, 413 for longer ones.
    UpTo(usize),
    /// 200, after this time.
    Slow(Duration),
    /// Nothing, for as long as the sender waits.
    Hang,
    /// The events count as received, but the connection breaks inside the answer.
    Break,
    /// The connection breaks before the answer; the events do not count.
    Reset,
    /// 307 to this location.
    Redirect(String),
}

/// What arrived.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests, whatever the answer.
    pub requests: usize,
    /// Different events.
    pub events: usize,
    /// Lowest `seq`, or 0.
    pub first: i64,
    /// Highest `seq`, or 0.
    pub last: i64,
    /// Places between first and last that no event has.
    pub missing: Vec<i64>,
    /// Events that came more than once.
    pub duplicates: Vec<i64>,
    /// What was wrong with requests: headers that contradict the body, an id with two contents, …
    pub problems: Vec<String>,
}

#[derive(Default)]
struct State {
    script: VecDeque<Reply>,
    otherwise: Option<Reply>,
    /// By id: `seq`, the line, how often it came.
    events: BTreeMap<String, (i64, String, usize)>,
    requests: usize,
    times: Vec<Instant>,
    problems: Vec<String>,
}

type Observer = Box<dyn Fn(&serde_json::Value, &str) + Send + Sync>;

struct Shared {
    state: Mutex<State>,
    stop: AtomicBool,
    observer: Option<Observer>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running receiver. Dropping it closes the port.
pub struct Receiver {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Listens on a free port of 127.0.0.1 and accepts everything.
    ///
    /// # Errors
    /// If no port can be had.
    pub fn start() -> io::Result<Self> {
        Self::on_port(0, None)
    }

    /// Listens on a port of 127.0.0.1; 0 takes a free one. `observer` gets each new event, and its
    /// line.
    ///
    /// # Errors
    /// If the port cannot be had.
    pub fn on_port(port: u16, observer: Option<Observer>) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            stop: AtomicBool::new(false),
            observer,
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || accept(&listener, &for_thread));
        Ok(Self {
            address,
            shared,
            thread: Some(thread),
        })
    }

    /// The URL to give to `warden.add_sink`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}{}", self.address, path())
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// From now on, every request is answered like this.
    pub fn reply(&self, reply: Reply) {
        let mut state = self.shared.state();
        state.script.clear();
        state.otherwise = Some(reply);
    }

    /// The next requests are answered like these, and those after them as before.
    pub fn script(&self, replies: impl IntoIterator<Item = Reply>) {
        self.shared.state().script.extend(replies);
    }

    /// What has arrived so far.
    #[must_use]
    pub fn report(&self) -> Report {
        let state = self.shared.state();
        let mut seqs: Vec<i64> = state.events.values().map(|(seq, _, _)| *seq).collect();
        seqs.sort_unstable();
        let mut missing = Vec::new();
        for pair in seqs.windows(2) {
            missing.extend(pair[0] + 1..pair[1]);
        }
        let mut duplicates: Vec<i64> = state
            .events
            .values()
            .filter(|e| e.2 > 1)
            .map(|e| e.0)
            .collect();
        duplicates.sort_unstable();
        Report {
            requests: state.requests,
            events: seqs.len(),
            first: seqs.first().copied().unwrap_or_default(),
            last: seqs.last().copied().unwrap_or_default(),
            missing,
            duplicates,
            problems: state.problems.clone(),
        }
    }

    /// The lines of the events, in the order of `seq`.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let state = self.shared.state();
        let mut lines: Vec<_> = state
            .events
            .values()
            .map(|(s, l, _)| (*s, l.clone()))
            .collect();
        lines.sort();
        lines.into_iter().map(|(_, line)| line).collect()
    }

    /// When requests arrived.
    #[must_use]
    pub fn times(&self) -> Vec<Instant> {
        self.shared.state().times.clone()
    }

    /// Waits until the report satisfies `done`; returns the last report either way.
    #[must_use]
    pub fn wait(&self, longest: Duration, done: impl Fn(&Report) -> bool) -> Report {
        let end = Instant::now() + longest;
        loop {
            let report = self.report();
            if done(&report) || Instant::now() > end {
                return report;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The path of this process's receivers. A port may have belonged to another test's receiver a moment
/// ago, and that test's server goes on sending to it.
#[must_use]
pub fn path() -> String {
    format!("/events/{}", std::process::id())
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut connections: Vec<JoinHandle<()>> = Vec::new();
    while !shared.stop.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, _)) => {
                let shared = Arc::clone(shared);
                connections.push(std::thread::spawn(move || {
                    let _ = serve(stream, &shared);
                }));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
        connections.retain(|c| !c.is_finished());
    }
    for c in connections {
        let _ = c.join();
    }
}

/// Answers the requests of one connection.
fn serve(stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(Patient { stream, shared });
    let mine = format!("POST {}", path());
    while let Some(request) = read_request(&mut reader)? {
        let line = request.headers[":request"].as_str();
        if !line
            .strip_prefix(mine.as_str())
            .is_some_and(|rest| rest.starts_with(['?', ' ']))
        {
            answer(&mut writer, 404, "", "no such receiver")?;
            continue;
        }
        let reply = {
            let mut state = shared.state();
            state.requests += 1;
            state.times.push(Instant::now());
            state
                .script
                .pop_front()
                .or_else(|| state.otherwise.clone())
                .unwrap_or(Reply::Accept)
        };
        let body = &request.body;
        match reply {
            Reply::Accept => {
                take(shared, &request);
                answer(&mut writer, 200, "", "ok")?;
            }
            Reply::Slow(time) => {
                sleep(shared, time);
                take(shared, &request);
                answer(&mut writer, 200, "", "ok")?;
            }
            Reply::UpTo(max) if body.len() <= max => {
                take(shared, &request);
                answer(&mut writer, 200, "", "ok")?;
            }
            Reply::UpTo(_) => answer(&mut writer, 413, "", "too large")?,
            Reply::Status(status) => answer(&mut writer, status, "", "no")?,
            Reply::RetryAfter(status, value) => {
                answer(
                    &mut writer,
                    status,
                    &format!("Retry-After: {value}\r\n"),
                    "later",
                )?;
            }
            Reply::Redirect(to) => answer(&mut writer, 307, &format!("Location: {to}\r\n"), "")?,
            Reply::Hang => {
                sleep(shared, Duration::from_secs(3600));
                return Ok(());
            }
            Reply::Break => {
                take(shared, &request);
                writer.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of")?;
                return Ok(());
            }
            Reply::Reset => return Ok(()),
        }
    }
    Ok(())
}

/// Sleeps, but not longer than the receiver lives.
fn sleep(shared: &Shared, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end && !shared.stop.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn answer(to: &mut TcpStream, status: u16, headers: &str, body: &str) -> io::Result<()> {
    let n = body.len();
    to.write_all(
        format!("HTTP/1.1 {status} X\r\nContent-Length: {n}\r\n{headers}\r\n{body}").as_bytes(),
    )
}

/// A stream that waits for bytes for as long as the receiver lives.
struct Patient<'a> {
    stream: TcpStream,
    shared: &'a Shared,
}

impl Read for Patient<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buf) {
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    if self.shared.stop.load(Ordering::Acquire) {
                        return Ok(0);
                    }
                }
                other => return other,
            }
        }
    }
}

struct Request {
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut headers = BTreeMap::new();
    headers.insert(":request".to_owned(), line.trim().to_owned());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers
        .get("content-length")
        .and_then(|v| v.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some(Request { headers, body }))
}

/// Counts the events of a request, and checks what it says about itself.
fn take(shared: &Shared, request: &Request) {
    let mut problems = Vec::new();
    let text = String::from_utf8_lossy(&request.body);
    if !text.ends_with('\n') {
        problems.push("the body does not end with a newline".to_owned());
    }
    if request.headers.get("content-type").map(String::as_str) != Some("application/x-ndjson") {
        problems.push("the content type is not application/x-ndjson".to_owned());
    }
    let mut events = Vec::new();
    for line in text.lines() {
        match serde_json::from_str::<serde_json::Value>(line) {
            Ok(v) => match (v["id"].as_str(), v["seq"].as_i64()) {
                (Some(id), Some(seq)) => events.push((id.to_owned(), seq, line.to_owned(), v)),
                _ => problems.push("an event has no id or no seq".to_owned()),
            },
            Err(e) => problems.push(format!("a line is no JSON: {e}")),
        }
    }
    if events.windows(2).any(|w| w[0].1 >= w[1].1) {
        problems.push("events are not in the order of seq".to_owned());
    }
    let number = |name: &str| {
        request
            .headers
            .get(name)
            .and_then(|v| v.parse::<i64>().ok())
    };
    let ends = (events.first().map(|e| e.1), events.last().map(|e| e.1));
    if (number("x-warden-first-seq"), number("x-warden-last-seq")) != ends {
        problems.push("the headers do not name the events".to_owned());
    }
    let mut fresh = Vec::new();
    {
        let mut state = shared.state();
        for (id, seq, line, value) in events {
            match state.events.get_mut(&id) {
                Some((_, known, times)) => {
                    *times += 1;
                    if *known != line {
                        problems.push(format!("event {id} came with two contents"));
                    }
                }
                None => {
                    state.events.insert(id, (seq, line.clone(), 1));
                    fresh.push((value, line));
                }
            }
        }
        state.problems.extend(problems);
    }
    if let Some(observer) = &shared.observer {
        for (value, line) in fresh {
            observer(&value, &line);
        }
    }
}
