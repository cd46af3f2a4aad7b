//! Values of a statement: literals and bind parameters, as they are recorded.
//!
//! Owns: what becomes of a value under each `warden.record_parameters`, the detectors of secrets
//! and of personal data, and the encoding. Receives values as text in any server encoding. Never
//! lets a credential through, whatever the setting: not as a value, and not as a digest.

use crate::tlv::{Reader, Writer};
use memchr::{memchr, memchr_iter, memmem};
use serde::{Serialize, Serializer};
use sha2::{Digest, Sha256};
use siphasher::sip128::{Hasher128, SipHasher24};
use std::fmt;
use std::hash::Hasher;

/// The tag of values, in an intent's tail and in an execution's payload.
pub const TAG: u16 = 7;
/// A longer value is recorded by its digest.
pub const VALUE_LIMIT: usize = 128;
/// Of a longer value, only the length is recorded.
pub const DIGEST_LIMIT: usize = 1 << 20;
/// Bytes that the values of one statement take, encoded.
pub const TOTAL_LIMIT: usize = 2048;

/// `warden.record_parameters`, and what a statement makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The statement is about credentials: none of its values is recorded in any form.
    Withhold,
    /// Digests.
    Digest,
    /// Values, but digests of what a detector knows.
    Safe,
    /// Values.
    All,
}

/// What is recorded of one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// NULL.
    Null,
    /// The value.
    Text(String),
    /// A keyed digest.
    Digest([u8; 16]),
    /// The digest of a long value, and its length in bytes.
    Long([u8; 16], u64),
    /// A value of which nothing but its type and its length in bytes is recorded.
    Opaque(String, u64),
    /// Not recorded: a credential, or a value of a statement about credentials.
    Withheld,
    /// So many further values are not recorded.
    More(u64),
}

/// A value of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// `n` of the `$n` of the normalised text; 0 if it is not about a single one.
    pub number: u32,
    /// What is recorded of it.
    pub value: Value,
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.number > 0 {
            write!(f, "${} = ", self.number)?;
        }
        match &self.value {
            Value::Null => f.write_str("NULL"),
            Value::Text(s) => write!(f, "'{}'", s.replace('\'', "''")),
            Value::Digest(d) => write!(f, "digest {}", Hex(d)),
            Value::Long(d, n) => write!(f, "digest {} of {n} bytes", Hex(d)),
            Value::Opaque(t, n) => write!(f, "{n} bytes of {t}"),
            Value::Withheld => f.write_str("withheld"),
            Value::More(n) => write!(f, "and {n} more"),
        }
    }
}

impl Serialize for Parameter {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// Lower-case hexadecimal.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// A digest as the record shows it.
#[must_use]
pub fn hexadecimal(digest: &[u8; 16]) -> String {
    Hex(digest).to_string()
}

impl Parameter {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.number.to_be_bytes());
        match &self.value {
            Value::Null => out.push(0),
            Value::Text(s) => {
                out.push(1);
                out.extend_from_slice(s.as_bytes());
            }
            Value::Digest(d) => {
                out.push(2);
                out.extend_from_slice(d);
            }
            Value::Long(d, n) => {
                out.push(3);
                out.extend_from_slice(d);
                out.extend_from_slice(&n.to_be_bytes());
            }
            Value::Opaque(t, n) => {
                out.push(4);
                out.extend_from_slice(&n.to_be_bytes());
                out.extend_from_slice(t.as_bytes());
            }
            Value::Withheld => out.push(5),
            Value::More(n) => {
                out.push(6);
                out.extend_from_slice(&n.to_be_bytes());
            }
        }
    }

    fn decode(b: &[u8]) -> Option<Self> {
        let (number, rest) = b.split_first_chunk::<4>()?;
        let (kind, rest) = rest.split_first()?;
        let text = |b: &[u8]| String::from_utf8(b.to_vec()).ok();
        let value = match kind {
            0 => Value::Null,
            1 => Value::Text(text(rest)?),
            2 => Value::Digest(rest.try_into().ok()?),
            3 => {
                let (digest, length) = rest.split_first_chunk::<16>()?;
                Value::Long(*digest, u64::from_be_bytes(length.try_into().ok()?))
            }
            4 => {
                let (length, name) = rest.split_first_chunk::<8>()?;
                Value::Opaque(text(name)?, u64::from_be_bytes(*length))
            }
            5 => Value::Withheld,
            6 => Value::More(u64::from_be_bytes(rest.try_into().ok()?)),
            _ => return None,
        };
        Some(Self {
            number: u32::from_be_bytes(*number),
            value,
        })
    }
}

/// Adds values to a payload.
pub fn put(w: &mut Writer, parameters: &[Parameter]) {
    if !parameters.is_empty() {
        w.put_list(
            TAG,
            parameters.iter().map(|p| {
                let mut b = Vec::new();
                p.encode(&mut b);
                b
            }),
        );
    }
}

/// The values of a payload; `None` if they are malformed.
#[must_use]
pub fn get(r: &Reader<'_>) -> Option<Vec<Parameter>> {
    let items = r.list(TAG).ok()?;
    items.into_iter().map(Parameter::decode).collect()
}

/// Whether these bytes are a tail as [`Tail`] makes it: the last field of an execution's payload.
#[must_use]
pub fn is_tail(bytes: &[u8]) -> bool {
    let Some((head, mut items)) = bytes.split_first_chunk::<HEAD>() else {
        return false;
    };
    let length = u32::from_be_bytes([head[2], head[3], head[4], head[5]]);
    if head[..2] != TAG.to_be_bytes() || items.len() != length as usize {
        return false;
    }
    while !items.is_empty() {
        let Some((length, rest)) = items.split_first_chunk::<4>() else {
            return false;
        };
        let Some((item, rest)) = rest.split_at_checked(u32::from_be_bytes(*length) as usize) else {
            return false;
        };
        if Parameter::decode(item).is_none() {
            return false;
        }
        items = rest;
    }
    length > 0
}

/// Collects the values of one statement into the tail of its intent.
#[derive(Debug)]
pub struct Tail<'a> {
    key: (u64, u64),
    /// Ends in a TLV field; its length is set at the end.
    out: &'a mut Vec<u8>,
    /// Where the field starts.
    start: usize,
    left_out: u64,
}

const HEAD: usize = 6;

impl<'a> Tail<'a> {
    /// Adds to `out`. Digests are made with this key.
    #[must_use]
    pub fn new(key: (u64, u64), out: &'a mut Vec<u8>) -> Self {
        let start = out.len();
        out.extend_from_slice(&TAG.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        Self {
            key,
            out,
            start,
            left_out: 0,
        }
    }

    /// Whether there is room for more.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.out.len() - self.start < TOTAL_LIMIT
    }

    /// Adds a value that is not to be looked at.
    pub fn put(&mut self, number: u32, value: Value) {
        if !self.has_room() {
            self.leave_out(1);
            return;
        }
        let at = self.out.len();
        self.out.extend_from_slice(&[0; 4]);
        Parameter { number, value }.encode(self.out);
        let length = (self.out.len() - at - 4) as u32;
        self.out[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }

    /// Adds what the mode makes of a value.
    pub fn add(&mut self, number: u32, value: &[u8], mode: Mode) {
        if !self.has_room() {
            self.leave_out(1);
            return;
        }
        self.put(number, recorded(value, mode, self.key));
    }

    /// Counts values that are not recorded.
    pub fn leave_out(&mut self, count: u64) {
        self.left_out += count;
    }

    /// Completes the tail; there is none if there was no value.
    pub fn finish(self) {
        let Self { out, start, .. } = self;
        if self.left_out > 0 {
            let at = out.len();
            out.extend_from_slice(&[0; 4]);
            let more = Parameter {
                number: 0,
                value: Value::More(self.left_out),
            };
            more.encode(out);
            let length = (out.len() - at - 4) as u32;
            out[at..at + 4].copy_from_slice(&length.to_be_bytes());
        }
        if out.len() == start + HEAD {
            out.truncate(start);
            return;
        }
        let length = (out.len() - start - HEAD) as u32;
        out[start + 2..start + HEAD].copy_from_slice(&length.to_be_bytes());
    }
}

fn recorded(value: &[u8], mode: Mode, key: (u64, u64)) -> Value {
    let length = value.len() as u64;
    if mode == Mode::Withhold {
        return Value::Withheld;
    }
    // Looked at under every setting: a digest of a password is no better than its hash.
    let finding = finding(&value[..value.len().min(DIGEST_LIMIT)]);
    if finding == Some(Finding::Credential) {
        return Value::Withheld;
    }
    if value.len() > DIGEST_LIMIT {
        return Value::Opaque("text".into(), length);
    }
    if value.len() > VALUE_LIMIT {
        return Value::Long(digest(value, key), length);
    }
    match (mode, finding) {
        (Mode::All, _) | (Mode::Safe, None) => {
            Value::Text(String::from_utf8_lossy(value).into_owned())
        }
        _ => Value::Digest(digest(value, key)),
    }
}

/// A keyed digest (SipHash-2-4, 128 bits): equal values have equal digests, and without the key
/// none can be guessed.
#[must_use]
pub fn digest(value: &[u8], key: (u64, u64)) -> [u8; 16] {
    let mut h = SipHasher24::new_with_keys(key.0, key.1);
    h.write(value);
    h.finish128().as_bytes()
}

/// The key of digests, from the journal's secrets: those make keys of shapes too, which everyone
/// sees who sees the ledger.
#[must_use]
pub fn derive_key(secret: (u64, u64)) -> (u64, u64) {
    let mut h = Sha256::new_with_prefix(b"pg_warden/value/v1\n");
    h.update(secret.0.to_le_bytes());
    h.update(secret.1.to_le_bytes());
    let d: [u8; 32] = h.finalize().into();
    let half = |at: usize| crate::frame::u64le(&d, at).unwrap_or_default();
    (half(0), half(8))
}

/// What a detector knows a value to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// It lets its bearer in somewhere, or is about something that does.
    Credential,
    /// It is about a person, or may be a key.
    Sensitive,
}

/// Words that go with credentials. A value or a statement that holds one is about them.
const WORDS: &[&[u8]] = &[
    b"passw",
    b"passphrase",
    b"passcode",
    b"secret",
    b"credential",
    b"token",
    b"api_key",
    b"apikey",
    b"api-key",
    b"access_key",
    b"accesskey",
    b"private_key",
    b"privatekey",
    b"auth_key",
    b"authorization",
    b"identified by",
    b"bearer ",
    b"pwd",
    b"jwt",
    b"scram-sha",
];

/// Functions that take credentials or keys: pgcrypto's, dblink's, our own, and `set_config`.
const FUNCTIONS: &[&[u8]] = &[
    b"set_config",
    b"dblink",
    b"crypt",
    b"hmac",
    b"pgp_",
    b"login",
    b"add_issuer",
    b"add_sink",
    b"query_to_xml",
    b"pg_create_subscription",
];

/// Whether a normalised text is about credentials, so that no value of it may be recorded.
#[must_use]
pub fn is_about_credentials(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    let lower = lower.as_bytes();
    // The text of a query that COPY runs is COPY's, the command line included.
    let program = lower.starts_with(b"copy") && memmem::find(lower, b" program ").is_some();
    program
        || contains_any(lower, WORDS)
        || FUNCTIONS
            .iter()
            .any(|f| memmem::find_iter(lower, f).any(|i| is_called(&lower[i..])))
}

/// Whether a name that starts here is followed by a parenthesis.
fn is_called(text: &[u8]) -> bool {
    let name = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || *b >= 0x80;
    let rest = &text[text.iter().take_while(|b| name(b)).count()..];
    let blank = |b: &&u8| matches!(**b, b' ' | b'"');
    rest.get(rest.iter().take_while(blank).count()) == Some(&b'(')
}

/// Whether a text holds a word that goes with credentials.
#[must_use]
pub fn names_credentials(text: &[u8]) -> bool {
    contains_any(&text.to_ascii_lowercase(), WORDS)
}

/// One pass, for values are short.
fn contains_any(lower: &[u8], words: &[&[u8]]) -> bool {
    let starts = words.iter().fold(0u128, |s, w| s | 1 << (w[0] & 127));
    (0..lower.len()).any(|i| {
        starts >> (lower[i] & 127) & 1 != 0 && words.iter().any(|w| lower[i..].starts_with(w))
    })
}

/// What a value is, as far as its form tells.
#[must_use]
pub fn finding(value: &[u8]) -> Option<Finding> {
    // The shortest thing that any detector knows.
    if value.len() < 5 {
        return None;
    }
    let digits = value.iter().all(|b| b.is_ascii_digit() || *b == b'-');
    if !digits && is_credential(value) {
        return Some(Finding::Credential);
    }
    (has_card(value) || !digits && (has_email(value) || has_random_token(value)))
        .then_some(Finding::Sensitive)
}

fn is_credential(value: &[u8]) -> bool {
    const PREFIXES: &[&[u8]] = &[
        b"$2a$",
        b"$2b$",
        b"$2y$",
        b"$argon2",
        b"$1$",
        b"$5$",
        b"$6$",
        b"$y$",
        b"akia",
        b"ghp_",
        b"gho_",
        b"github_pat_",
        b"glpat-",
        b"xoxb-",
        b"xoxp-",
        b"sk-",
        b"sk_live_",
        b"rk_live_",
        b"aiza",
        b"sha512:",
        b"pbkdf2",
    ];
    let lower = value.to_ascii_lowercase();
    contains_any(&lower, WORDS)
        || memmem::find(value, b"-----BEGIN").is_some()
        || PREFIXES.iter().any(|p| lower.starts_with(p))
        || is_md5(&lower)
        || has_url_credentials(value)
        || has_jwt(value)
}

/// A role's password as PostgreSQL stores it.
fn is_md5(lower: &[u8]) -> bool {
    lower.len() == 35 && lower.starts_with(b"md5") && lower[3..].iter().all(u8::is_ascii_hexdigit)
}

/// `scheme://user:password@host`.
fn has_url_credentials(value: &[u8]) -> bool {
    memmem::find_iter(value, b"://").any(|i| {
        let rest = &value[i + 3..];
        let end = rest
            .iter()
            .position(|b| b.is_ascii_whitespace() || matches!(b, b'/' | b'?' | b'#'))
            .unwrap_or(rest.len());
        // A password may hold a slash, though it should not.
        let whole = rest
            .iter()
            .position(u8::is_ascii_whitespace)
            .unwrap_or(rest.len());
        let colon = memchr(b':', &rest[..end]);
        colon.is_some_and(|c| memchr(b'@', &rest[c..whole]).is_some())
    })
}

/// Base64url segments with points between, the first the beginning of a JSON object.
fn has_jwt(value: &[u8]) -> bool {
    let part = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    memmem::find_iter(value, b"eyJ").any(|i| {
        let rest = &value[i..];
        let header = rest.iter().take_while(|b| part(b)).count();
        header >= 10 && rest.get(header) == Some(&b'.') && rest.get(header + 1).is_some_and(part)
    })
}

/// A payment card's number, blanks and hyphens between digits included.
fn has_card(value: &[u8]) -> bool {
    if value.len() < 13 {
        return false;
    }
    let mut digits = Vec::with_capacity(19);
    for b in value.iter().chain([&b'\n']) {
        match b {
            b'0'..=b'9' => digits.push(b - b'0'),
            b' ' | b'-' => {}
            _ => {
                if (13..=19).contains(&digits.len()) && luhn(&digits) {
                    return true;
                }
                digits.clear();
            }
        }
    }
    false
}

fn luhn(digits: &[u8]) -> bool {
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(i, d)| match (i % 2, u32::from(*d)) {
            (0, d) => d,
            (_, d) if d > 4 => d * 2 - 9,
            (_, d) => d * 2,
        })
        .sum();
    sum.is_multiple_of(10) && digits.iter().any(|d| *d != 0)
}

fn has_email(value: &[u8]) -> bool {
    memchr_iter(b'@', value).any(|i| {
        let local = i > 0 && !value[i - 1].is_ascii_whitespace();
        let domain = value[i + 1..]
            .split(|b| !(b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-') || *b >= 0x80))
            .next()
            .unwrap_or_default();
        local && memchr(b'.', domain).is_some_and(|dot| dot > 0 && dot + 1 < domain.len())
    })
}

/// A run of characters that looks like nothing that a person writes.
fn has_random_token(value: &[u8]) -> bool {
    let part = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=' | b'_' | b'-');
    value
        .split(|b| !part(b))
        .filter(|run| run.len() >= 20 && !is_uuid(run))
        .any(|run| {
            let count = |f: fn(&u8) -> bool| run.iter().filter(|b| f(b)).count();
            let digits = count(u8::is_ascii_digit);
            let hexadecimal = run.iter().all(u8::is_ascii_hexdigit);
            let mixed = count(u8::is_ascii_uppercase) > 1 && count(u8::is_ascii_lowercase) > 1;
            digits > 1 && digits < run.len() && (mixed || hexadecimal) && entropy(run) > 3.0
        })
}

fn is_uuid(run: &[u8]) -> bool {
    run.len() == 36
        && run.iter().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => *b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

/// Bits a character, by how often each occurs.
fn entropy(run: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    for b in run {
        counts[*b as usize] += 1;
    }
    let n = run.len() as f64;
    counts
        .iter()
        .filter(|c| **c > 0)
        .map(|c| f64::from(*c) / n)
        .map(|p| -p * p.log2())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: (u64, u64) = (1, 2);
    const CREDENTIALS: &[&str] = &[
        "host=db user=x password=hunter2",
        "host=db Password = 'hunter2'",
        "ALTER ROLE x PASSWORD 'hunter2'",
        r#"{"client_secret": "x"}"#,
        "postgres://app:hunter2@db/prod",
        "see amqp://u:p/w@host",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln",
        "-----BEGIN EC PRIVATE KEY-----\nMHc",
        "$2b$12$abcdefghijklmnopqrstuv",
        "SCRAM-SHA-256$4096:c2FsdA==$a:b",
        "md5e10adc3949ba59abbe56e057f20f883e",
        "Bearer abc",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_16C7e42F292c6912E7710c838347Ae178B4a",
    ];
    const SENSITIVE: &[&str] = &[
        "4111111111111111",
        "card 4111-1111-1111-1111 exp 12/29",
        "ana@example.com",
        "Ana <ana.novak@mail.example.org>",
        "9f86d081884c7d659a2feaa0c55ad015",
        "kX9mP2vQ7rT4wY8zA1bC3dE5",
    ];
    const HARMLESS: &[&str] = &[
        "",
        "5",
        "2026-11-25 10:00:00+00",
        "Ana Novak",
        "pending",
        "4111111111111112",
        "00000000000000000000",
        "b3b1f1d0-6f1e-4b8a-9a55-0c6a5b1e2f3d",
        "https://example.com/a?b=c",
        "user @ home",
        "internationalisation_of_names",
        "a price of 12.50 EUR",
    ];

    fn parameters(tail: &[u8]) -> Vec<Parameter> {
        get(&Reader::parse(tail).unwrap()).unwrap()
    }

    #[test]
    fn detectors_know_what_they_should() {
        for v in CREDENTIALS {
            assert_eq!(finding(v.as_bytes()), Some(Finding::Credential), "{v}");
        }
        for v in SENSITIVE {
            assert_eq!(finding(v.as_bytes()), Some(Finding::Sensitive), "{v}");
        }
        for v in HARMLESS {
            assert_eq!(finding(v.as_bytes()), None, "{v}");
        }
    }

    #[test]
    fn credentials_are_withheld_under_every_setting() {
        for v in CREDENTIALS {
            for mode in [Mode::Digest, Mode::Safe, Mode::All, Mode::Withhold] {
                assert_eq!(recorded(v.as_bytes(), mode, KEY), Value::Withheld, "{v}");
            }
        }
    }

    #[test]
    fn each_setting_keeps_what_it_says() {
        let plain = |m| recorded(b"pending", m, KEY);
        let mail = |m| recorded(b"ana@example.com", m, KEY);
        assert_eq!(plain(Mode::All), Value::Text("pending".into()));
        assert_eq!(plain(Mode::Safe), Value::Text("pending".into()));
        assert_eq!(plain(Mode::Digest), Value::Digest(digest(b"pending", KEY)));
        assert_eq!(plain(Mode::Withhold), Value::Withheld);
        assert_eq!(mail(Mode::All), Value::Text("ana@example.com".into()));
        assert_eq!(
            mail(Mode::Safe),
            Value::Digest(digest(b"ana@example.com", KEY))
        );
    }

    #[test]
    fn long_values_are_digests_and_huge_ones_a_length() {
        let long = vec![b'x'; VALUE_LIMIT + 1];
        assert_eq!(
            recorded(&long, Mode::All, KEY),
            Value::Long(digest(&long, KEY), VALUE_LIMIT as u64 + 1)
        );
        let huge = vec![b' '; DIGEST_LIMIT + 1];
        assert_eq!(
            recorded(&huge, Mode::All, KEY),
            Value::Opaque("text".into(), DIGEST_LIMIT as u64 + 1)
        );
    }

    #[test]
    fn equal_values_have_equal_digests_under_the_same_key_only() {
        assert_eq!(digest(b"x", KEY), digest(b"x", KEY));
        assert_ne!(digest(b"x", KEY), digest(b"y", KEY));
        assert_ne!(digest(b"x", KEY), digest(b"x", (1, 3)));
    }

    #[test]
    fn texts_about_credentials_are_known() {
        for sql in [
            "UPDATE users SET password = $1 WHERE id = $2",
            "SELECT set_config($1, $2, $3)",
            "SELECT warden.login($1)",
            "SELECT \"login\" ($1)",
            "SELECT dblink_connect($1)",
            "SELECT id FROM users WHERE h = crypt($1, h)",
            "SELECT * FROM api_tokens WHERE id = $1",
            "COPY (SELECT $1) TO PROGRAM $2",
        ] {
            assert!(is_about_credentials(sql), "{sql}");
        }
        for sql in [
            "SELECT name FROM item WHERE id = $1",
            "SELECT last_login FROM users WHERE id = $1",
            "SELECT n FROM t WHERE c > $1",
        ] {
            assert!(!is_about_credentials(sql), "{sql}");
        }
    }

    #[test]
    fn a_record_reads_like_the_servers_log() {
        let mut tail = Vec::new();
        let mut t = Tail::new(KEY, &mut tail);
        t.add(1, b"it's", Mode::All);
        t.put(2, Value::Null);
        t.put(3, Value::Opaque("box".into(), 32));
        t.add(4, b"x", Mode::Withhold);
        t.leave_out(7);
        t.finish();
        let read: Vec<_> = parameters(&tail).iter().map(Parameter::to_string).collect();
        assert_eq!(
            read,
            [
                "$1 = 'it''s'",
                "$2 = NULL",
                "$3 = 32 bytes of box",
                "$4 = withheld",
                "and 7 more"
            ]
        );
    }

    proptest! {
        #[test]
        fn a_tail_is_bounded_and_survives(values in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..300)) {
            let mut intent = b"before".to_vec();
            let mut t = Tail::new(KEY, &mut intent);
            for (i, v) in values.iter().enumerate() {
                t.add(i as u32 + 1, v, Mode::All);
            }
            t.finish();
            let tail = intent.strip_prefix(b"before").unwrap();
            // A value of bytes that are not UTF-8 grows threefold.
            prop_assert!(tail.len() < TOTAL_LIMIT + 3 * VALUE_LIMIT + 64);
            if !values.is_empty() {
                let read = parameters(tail);
                let left_out = match read.last().map(|p| &p.value) {
                    Some(Value::More(n)) => *n as usize - 1,
                    _ => 0,
                };
                prop_assert_eq!(read.len() + left_out, values.len());
                let mut w = Writer::new();
                put(&mut w, &read);
                prop_assert_eq!(w.finish(), tail);
                prop_assert!(is_tail(tail));
                prop_assert!(!is_tail(&tail[..tail.len() - 1]));
                prop_assert!(!is_tail(&[tail, &[0]].concat()));
            }
        }

        #[test]
        fn no_value_and_no_payload_panics(b in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = finding(&b);
            let _ = Parameter::decode(&b);
            let tail = [&TAG.to_be_bytes()[..], &(b.len() as u32).to_be_bytes(), &b].concat();
            let reads = Reader::parse(&tail).is_ok_and(|r| get(&r).is_some_and(|p| !p.is_empty()));
            prop_assert_eq!(is_tail(&tail), reads);
            if let Ok(r) = Reader::parse(&b) {
                let _ = get(&r);
            }
        }

        #[test]
        fn a_password_is_found_wherever_it_stands(before in "[ -~]{0,20}", after in "[ -~]{0,20}") {
            let v = format!("{before}password={after}");
            prop_assert_eq!(recorded(v.as_bytes(), Mode::All, KEY), Value::Withheld);
        }
    }
}
