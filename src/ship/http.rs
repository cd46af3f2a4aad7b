//! HTTP sinks: POSTs a batch, and reads the answer.
//!
//! Redirects are not followed, proxies from the environment are not used, and the answer's body is
//! read but never kept. TLS trusts the machine's certificate authorities (`SSL_CERT_FILE` included).

use crate::ship::Answer;
use reqwest::{Client, Response, header, redirect};
use std::error::Error as _;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use warden_core::sink::{Batch, Verdict, classify, retry_after};

/// Longest time to connect, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time from the first byte sent to the last byte of the answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The runtime is not driven while nothing is to send: an older connection may have died unseen.
const IDLE_CONNECTION: Duration = Duration::from_secs(5);
/// How much of an answer is read, to use the connection again.
const ANSWER_BYTES: usize = 64 * 1024;
/// Longest error text.
const ERROR_BYTES: usize = 500;

/// The client that all HTTP sinks share.
pub struct Http(Client);

impl Http {
    /// A client. Must be called inside the runtime.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new() -> Result<Self, String> {
        let mut roots = rustls::RootCertStore::empty();
        // None found is no error: then HTTPS says "unknown issuer", and HTTP works.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .pool_idle_timeout(IDLE_CONNECTION)
            .pool_max_idle_per_host(1)
            .user_agent(concat!("pg_warden/", env!("CARGO_PKG_VERSION")))
            .build()
            .map(Self)
            .map_err(describe)
    }

    /// Sends a batch. `id` is the same whenever the same events are sent.
    pub fn post(&self, url: &str, id: &str, batch: &Batch) -> impl Future<Output = Answer> + use<> {
        let request = self
            .0
            .post(url)
            .header(header::CONTENT_TYPE, "application/x-ndjson")
            .header("Idempotency-Key", id)
            .header("X-Warden-First-Seq", batch.first_seq)
            .header("X-Warden-Last-Seq", batch.last_seq)
            .header("X-Warden-Events", batch.events)
            .body(batch.body.clone());
        async move {
            match request.send().await {
                Ok(response) => read(response).await,
                Err(e) => Answer::retry(describe(e)),
            }
        }
    }
}

async fn read(mut response: Response) -> Answer {
    let status = response.status();
    let asked = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| retry_after(v, unix_now()));
    let mut left = ANSWER_BYTES;
    loop {
        match response.chunk().await {
            Ok(None) => break,
            Ok(Some(chunk)) => match left.checked_sub(chunk.len()) {
                Some(n) => left = n,
                None => break,
            },
            // An acknowledgement that is cut off may have been about to say something else.
            Err(e) => return Answer::retry(describe(e)),
        }
    }
    let verdict = classify(status.as_u16());
    let error = match verdict {
        Verdict::Delivered => String::new(),
        _ if status.is_redirection() => {
            format!("the receiver answered {status}; redirects are not followed")
        }
        _ => format!("the receiver answered {status}"),
    };
    Answer {
        verdict,
        retry_after: asked,
        error,
    }
}

fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// An error and its causes, without the URL, whose query may hold a secret.
fn describe(e: reqwest::Error) -> String {
    let e = e.without_url();
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(c) = cause {
        let _ = write!(text, ": {c}");
        cause = c.source();
    }
    text.retain(|c| !c.is_control());
    let mut end = text.len().min(ERROR_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
