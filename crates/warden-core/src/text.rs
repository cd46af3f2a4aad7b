//! Normalised SQL text: literals become `$n`, comments and runs of blanks become one blank.
//!
//! Owns: PostgreSQL's lexical rules (`scan.l` of servers 15 to 18), as far as they decide where a
//! literal starts and ends. Receives the bytes of a statement in any server encoding. Emits its
//! normalised text, or a keyed hash of the same text without building it. Never keeps a byte of a
//! literal: what is not terminated is a literal to the end, junk that sticks to a number goes with
//! it, and comments are dropped.
//!
//! Names and keywords are kept as they are written, quoted ones included. A sign in front of a
//! number goes with the number where it cannot be a binary operator (`x = -1`, `(+5)`).

use memchr::{memchr, memchr2, memmem};
use sha2::{Digest, Sha256};
use siphasher::sip::SipHasher13;
use std::borrow::Cow;
use std::hash::Hasher;
use std::ops::Range;

/// Whether `\` escapes in a plain string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backslashes {
    /// It is a character: `standard_conforming_strings` is on.
    Plain,
    /// It escapes.
    Escape,
    /// The setting has changed since the text was parsed. What is a literal one way or the other
    /// is one: behind a `\'` in a plain string, that is everything.
    Either,
}

impl From<bool> for Backslashes {
    /// The value of `standard_conforming_strings`.
    fn from(standard_conforming_strings: bool) -> Self {
        if standard_conforming_strings {
            Self::Plain
        } else {
            Self::Escape
        }
    }
}

/// Which names are kept.
#[derive(Debug, Clone, Copy)]
pub enum Names {
    /// All.
    All,
    /// Keywords only, as this function knows them in lower case: a text that no parser accepted may
    /// hold anything anywhere.
    Keywords(fn(&[u8]) -> bool),
    /// All but what is assigned to a setting with a point in its name: `SET app.token = hush`.
    BeforeSetting(fn(&[u8]) -> bool),
}

/// A normalised statement.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Normalised {
    /// The text, cut at the limit. Bytes that are not UTF-8 are replaced by U+FFFD.
    pub text: String,
    /// Bytes of the normalised text before it was cut; 0 if it was not.
    pub full_length: u64,
    /// SHA-256 of the whole normalised text, if it was cut; else empty.
    pub digest: Vec<u8>,
}

/// Normalises a statement. At most `limit` bytes are kept, cut between characters.
#[must_use]
pub fn normalise(
    sql: impl AsRef<[u8]>,
    backslashes: impl Into<Backslashes>,
    limit: usize,
) -> Normalised {
    normalise_names(sql, backslashes, limit, Names::All)
}

/// As [`normalise`]; names that are not kept become literals.
#[must_use]
pub fn normalise_names(
    sql: impl AsRef<[u8]>,
    backslashes: impl Into<Backslashes>,
    limit: usize,
    names: Names,
) -> Normalised {
    let sql = sql.as_ref();
    let kept = Vec::with_capacity(sql.len().min(limit));
    let mut sink = Cut {
        kept,
        limit,
        total: 0,
        digest: None,
    };
    let mut lexer = Lexer::new(sql, backslashes.into(), &mut sink);
    lexer.names = names;
    lexer.run();
    sink.finish()
}

/// A keyed hash (SipHash-1-3) of the whole normalised text, without building it.
///
/// Two statements have the same hash if, and up to collisions only if, they have the same
/// normalised text.
#[must_use]
pub fn shape_hash(sql: &[u8], backslashes: impl Into<Backslashes>, key: (u64, u64)) -> ShapeHash {
    let mut hashed = Hashed {
        hasher: SipHasher13::new_with_keys(key.0, key.1),
        literals: false,
    };
    Lexer::new(sql, backslashes.into(), &mut hashed).run();
    ShapeHash {
        hash: hashed.hasher.finish(),
        literals: hashed.literals,
    }
}

/// What [`shape_hash`] finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShapeHash {
    /// The hash.
    pub hash: u64,
    /// Whether the text has a literal.
    pub literals: bool,
}

/// A literal of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Literal {
    /// `n` of the `$n` that stands for it.
    pub number: u32,
    /// Where it is.
    pub span: Range<usize>,
    /// A minus goes with the number.
    pub negative: bool,
}

/// The literals of a statement, the first [`Self::KEPT`] of them.
#[derive(Debug, Default)]
pub struct Literals {
    /// In order.
    pub kept: Vec<Literal>,
    /// How many there are.
    pub count: usize,
}

impl Literals {
    /// More than fit into a record.
    pub const KEPT: usize = 128;

    /// Forgets them, and keeps the room.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.count = 0;
    }
}

/// Finds the literals of a statement.
pub fn find_literals(sql: &[u8], backslashes: impl Into<Backslashes>, literals: &mut Literals) {
    literals.clear();
    Lexer::new(sql, backslashes.into(), literals).run();
}

/// What a literal says: without quotes, escapes resolved. A bit string keeps its form, and so does
/// what is not terminated.
#[must_use]
pub fn literal_value<'a>(
    sql: &'a [u8],
    literal: &Literal,
    backslashes: Backslashes,
) -> Cow<'a, [u8]> {
    let raw = sql.get(literal.span.clone()).unwrap_or_default();
    let (quote, escapes) = match raw {
        [b'\'', ..] => (0, backslashes != Backslashes::Plain),
        [b'n' | b'N', b'\'', ..] => (1, backslashes != Backslashes::Plain),
        [b'e' | b'E', b'\'', ..] => (1, true),
        [b'u' | b'U', b'&', b'\'', ..] => return unicode_value(raw),
        [b'$', ..] => {
            let tag = raw[1..]
                .iter()
                .position(|b| *b == b'$')
                .map_or(0, |n| n + 2);
            let body = raw.get(tag..raw.len().saturating_sub(tag).max(tag));
            return Cow::Borrowed(body.unwrap_or(raw));
        }
        _ if literal.negative => return Cow::Owned([b"-", raw].concat()),
        _ => return Cow::Borrowed(raw),
    };
    let mut out = Vec::with_capacity(raw.len());
    for_each_piece(raw, quote, escapes, |piece| out.extend_from_slice(piece));
    if escapes {
        out = unescaped(&out);
    }
    Cow::Owned(out)
}

/// Hands on what is between the quotes, a doubled quote as one.
fn for_each_piece(raw: &[u8], quote: usize, escapes: bool, mut f: impl FnMut(&[u8])) {
    let mut nothing = Nothing;
    let lexer = Lexer::new(raw, Backslashes::Plain, &mut nothing);
    let (mut i, mut start) = (quote + 1, quote + 1);
    while i < raw.len() {
        match raw[i] {
            b'\\' if escapes => i += 2,
            b'\'' if lexer.at(i + 1) == b'\'' => {
                f(&raw[start..=i]);
                i += 2;
                start = i;
            }
            b'\'' => {
                f(&raw[start..i]);
                match lexer.continuation(i + 1) {
                    Some(next) => {
                        i = next + 1;
                        start = i;
                    }
                    None => return,
                }
            }
            _ => i += 1,
        }
    }
    f(raw.get(start..).unwrap_or_default());
}

/// Resolves the escapes of `E'…'`.
fn unescaped(s: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(s.len());
    let mut i = 0;
    while i < s.len() {
        if s[i] != b'\\' || i + 1 == s.len() {
            out.push(s[i]);
            i += 1;
            continue;
        }
        let c = s[i + 1];
        i += 2;
        let (radix, most) = match c {
            b'b' => {
                out.push(8);
                continue;
            }
            b'f' => {
                out.push(12);
                continue;
            }
            b'n' => {
                out.push(b'\n');
                continue;
            }
            b'r' => {
                out.push(b'\r');
                continue;
            }
            b't' => {
                out.push(b'\t');
                continue;
            }
            b'0'..=b'7' => {
                i -= 1;
                (8, 3)
            }
            b'x' => (16, 2),
            b'u' => (16, 4),
            b'U' => (16, 8),
            _ => {
                out.push(c);
                continue;
            }
        };
        let (n, length) = digits(&s[i..], radix, most);
        i += length;
        if length == 0 {
            out.push(c);
        } else if matches!(c, b'u' | b'U') {
            push_char(&mut out, n);
        } else {
            out.push(n as u8);
        }
    }
    out
}

/// The number that `s` starts with, and how many digits it has.
fn digits(s: &[u8], radix: u32, most: usize) -> (u32, usize) {
    let mut n = 0u32;
    for (i, b) in s.iter().take(most).enumerate() {
        match char::from(*b).to_digit(radix) {
            Some(d) => n = n.wrapping_mul(radix).wrapping_add(d),
            None => return (n, i),
        }
    }
    (n, s.len().min(most))
}

fn push_char(out: &mut Vec<u8>, n: u32) {
    let c = char::from_u32(n).unwrap_or(char::REPLACEMENT_CHARACTER);
    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

/// `U&'…'`; with UESCAPE, the escapes stay as they are.
fn unicode_value(raw: &[u8]) -> Cow<'_, [u8]> {
    let mut inner = Vec::with_capacity(raw.len());
    for_each_piece(raw, 2, false, |piece| inner.extend_from_slice(piece));
    if raw.last() != Some(&b'\'') || contains_word(raw, b"uescape") {
        return Cow::Owned(inner);
    }
    let mut out = Vec::with_capacity(inner.len());
    let mut i = 0;
    while i < inner.len() {
        if inner[i] != b'\\' {
            out.push(inner[i]);
            i += 1;
            continue;
        }
        let (skip, most) = if inner.get(i + 1) == Some(&b'+') {
            (2, 6)
        } else {
            (1, 4)
        };
        let (n, length) = digits(inner.get(i + skip..).unwrap_or_default(), 16, most);
        if length == most {
            push_char(&mut out, n);
            i += skip + most;
        } else {
            out.push(b'\\');
            // A doubled backslash is one.
            i += 1 + usize::from(inner.get(i + 1) == Some(&b'\\'));
        }
    }
    Cow::Owned(out)
}

fn contains_word(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len())
        .any(|w| w.eq_ignore_ascii_case(word))
}

/// Where normalised bytes go.
trait Sink {
    /// False if nobody looks at the bytes: then literals need no numbers.
    const LIVE: bool = true;
    /// False if names are always kept.
    const NAMES: bool = false;
    fn put(&mut self, bytes: &[u8]);
    /// A literal was passed over.
    #[inline]
    fn literal(&mut self, _number: u32, _span: Range<usize>, _negative: bool) {}
}

impl Sink for Literals {
    fn put(&mut self, _: &[u8]) {}

    fn literal(&mut self, number: u32, span: Range<usize>, negative: bool) {
        self.count += 1;
        if self.kept.len() < Self::KEPT {
            self.kept.push(Literal {
                number,
                span,
                negative,
            });
        }
    }
}

struct Hashed {
    hasher: SipHasher13,
    literals: bool,
}

impl Sink for Hashed {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.hasher.write(bytes);
    }

    #[inline]
    fn literal(&mut self, _number: u32, _span: Range<usize>, _negative: bool) {
        self.literals = true;
    }
}

/// Only the numbers of the parameters are of interest.
struct Nothing;

impl Sink for Nothing {
    const LIVE: bool = false;
    fn put(&mut self, _: &[u8]) {}
}

/// Keeps the first bytes, and digests all of them if there are more.
struct Cut {
    kept: Vec<u8>,
    limit: usize,
    total: u64,
    digest: Option<Sha256>,
}

impl Sink for Cut {
    const NAMES: bool = true;
    fn put(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        if let Some(digest) = &mut self.digest {
            digest.update(bytes);
            return;
        }
        let room = self.limit - self.kept.len();
        if bytes.len() > room {
            let mut digest = Sha256::new_with_prefix(&self.kept);
            digest.update(bytes);
            self.digest = Some(digest);
            // One byte more than fits tells whether the cut is between two characters.
            self.kept.extend_from_slice(&bytes[..=room]);
        } else {
            self.kept.extend_from_slice(bytes);
        }
    }
}

impl Cut {
    fn finish(mut self) -> Normalised {
        let cut = self.digest.is_some();
        if cut {
            let continues = |b: u8| b & 0xc0 == 0x80;
            let mut end = self.limit;
            while end > 0 && self.limit - end < 3 && continues(self.kept[end]) {
                end -= 1;
            }
            self.kept.truncate(end);
        }
        let text = String::from_utf8(self.kept)
            .unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
        Normalised {
            text,
            full_length: if cut { self.total } else { 0 },
            digest: self
                .digest
                .map(|d| d.finalize().to_vec())
                .unwrap_or_default(),
        }
    }
}

const SPACE: u8 = 1;
const DIGIT: u8 = 2;
const IDENT_START: u8 = 4;
const IDENT: u8 = 8;
const OPERATOR: u8 = 16;
/// Operators with one of these may end in `+` or `-`.
const OPERATOR_SPECIAL: u8 = 32;

static CLASS: [u8; 256] = {
    let mut t = [0u8; 256];
    let mut i = 0;
    while i < 256 {
        t[i] = match i as u8 {
            // PostgreSQL never sees NUL, and no text of ours may hold one.
            0 | b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c => SPACE,
            b'0'..=b'9' => DIGIT | IDENT,
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | 0x80..=0xff => IDENT_START | IDENT,
            b'$' => IDENT,
            b'+' | b'-' | b'*' | b'/' | b'<' | b'>' | b'=' => OPERATOR,
            b'~' | b'!' | b'@' | b'#' | b'%' | b'^' | b'&' | b'|' | b'`' | b'?' => {
                OPERATOR | OPERATOR_SPECIAL
            }
            _ => 0,
        };
        i += 1;
    }
    t
};

#[inline]
fn is(b: u8, class: u8) -> bool {
    CLASS[b as usize] & class != 0
}

/// One pass over a statement. What needs no change is left in the run `run..pos` and handed to the
/// sink in one piece.
struct Lexer<'a, S> {
    sql: &'a [u8],
    pos: usize,
    /// Where the bytes start that are still to be handed on as they are.
    run: usize,
    /// The last byte handed on; 0 before the first.
    last: u8,
    /// Whether the last token may end an operand, so that a sign is a binary operator.
    operand: bool,
    backslashes: Backslashes,
    names: Names,
    setting: Setting,
    /// The number that follows has a minus.
    negative: bool,
    /// The highest parameter so far.
    max_param: u32,
    /// The number of the last literal, once there is one.
    literal: Option<u32>,
    sink: &'a mut S,
}

/// How far a `SET name.name = value` has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Setting {
    No,
    Set,
    Name,
    Custom,
    Value,
}

impl<'a, S: Sink> Lexer<'a, S> {
    fn new(sql: &'a [u8], backslashes: Backslashes, sink: &'a mut S) -> Self {
        let (pos, run, last, operand, max_param, literal) = (0, 0, 0, false, 0, None);
        Self {
            sql,
            pos,
            run,
            last,
            operand,
            backslashes,
            names: Names::All,
            setting: Setting::No,
            negative: false,
            max_param,
            literal,
            sink,
        }
    }

    /// The byte at `i`, or 0 behind the end.
    #[inline]
    fn at(&self, i: usize) -> u8 {
        self.sql.get(i).copied().unwrap_or(0)
    }

    fn run(&mut self) {
        while let Some(&b) = self.sql.get(self.pos) {
            let class = CLASS[b as usize];
            if class & IDENT_START != 0 {
                self.word(b);
            } else if class & SPACE != 0 {
                self.blank();
            } else if class & DIGIT != 0 {
                self.number();
            } else if class & OPERATOR != 0 {
                self.operator(b);
            } else {
                self.punctuation(b);
            }
        }
        self.flush();
    }

    /// Hands the run on. The caller moves `run` behind what it replaces.
    #[inline]
    fn flush(&mut self) {
        if self.run < self.pos {
            self.last = self.sql[self.pos - 1];
            self.sink.put(&self.sql[self.run..self.pos]);
        }
    }

    /// Replaces `pos..end` by the next `$n`.
    fn literal(&mut self, end: usize) {
        self.flush();
        let span = self.pos..end;
        let negative = std::mem::take(&mut self.negative);
        self.pos = end;
        self.run = end;
        self.operand = true;
        if !S::LIVE {
            return;
        }
        let n = match self.literal {
            Some(n) => n,
            None => self.highest_param(),
        }
        .saturating_add(1);
        self.literal = Some(n);
        self.sink.literal(n, span, negative);
        let mut buf = [0u8; 13];
        let mut i = buf.len();
        // `SELECT'x'AS y` is `SELECT $1 AS y`: a number that touches a word would join it.
        if is(self.at(end), IDENT) {
            i -= 1;
            buf[i] = b' ';
        }
        let mut rest = n;
        loop {
            i -= 1;
            buf[i] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        i -= 1;
        buf[i] = b'$';
        if is(self.last, IDENT) {
            self.sink.put(b" ");
        }
        self.last = buf[buf.len() - 1];
        self.sink.put(&buf[i..]);
    }

    /// The highest parameter of the whole statement. Looks ahead only if there can be one.
    fn highest_param(&self) -> u32 {
        let rest = &self.sql[self.pos..];
        let possible =
            memchr::memchr_iter(b'$', rest).any(|i| rest.get(i + 1).is_some_and(|b| is(*b, DIGIT)));
        if !possible {
            return self.max_param;
        }
        let mut nothing = Nothing;
        let mut ahead = Lexer::new(rest, self.backslashes, &mut nothing);
        ahead.run();
        self.max_param.max(ahead.max_param)
    }

    /// The end of blanks and comments that start at `i`.
    fn skip_blank(&self, mut i: usize) -> usize {
        loop {
            let b = self.at(i);
            if i >= self.sql.len() {
                return self.sql.len();
            } else if is(b, SPACE) {
                i += 1;
            } else if b == b'-' && self.at(i + 1) == b'-' {
                i = self.line_end(i);
            } else if b == b'/' && self.at(i + 1) == b'*' {
                i = self.comment_end(i);
            } else {
                return i;
            }
        }
    }

    fn line_end(&self, i: usize) -> usize {
        memchr2(b'\n', b'\r', &self.sql[i..]).map_or(self.sql.len(), |n| i + n)
    }

    /// Comments nest. One that is not terminated goes to the end.
    fn comment_end(&self, i: usize) -> usize {
        let mut depth = 1;
        let mut i = i + 2;
        while let Some(n) = memchr2(b'*', b'/', self.sql.get(i..).unwrap_or_default()) {
            i += n;
            match (self.sql[i], self.at(i + 1)) {
                (b'/', b'*') => {
                    depth += 1;
                    i += 2;
                }
                (b'*', b'/') => {
                    depth -= 1;
                    i += 2;
                    if depth == 0 {
                        return i;
                    }
                }
                _ => i += 1,
            }
        }
        self.sql.len()
    }

    /// Blanks and comments: one blank, or none at both ends of the text.
    #[inline]
    fn blank(&mut self) {
        let next = self.at(self.pos + 1);
        let alone = self.sql[self.pos] == b' '
            && next != 0
            && !is(next, SPACE)
            && !matches!(next, b'-' | b'/');
        if alone && (self.run < self.pos || !matches!(self.last, 0 | b' ')) {
            self.pos += 1;
        } else {
            self.blanks();
        }
    }

    fn blanks(&mut self) {
        let end = self.skip_blank(self.pos);
        self.flush();
        self.pos = end;
        self.run = end;
        if end < self.sql.len() && !matches!(self.last, 0 | b' ') {
            self.last = b' ';
            self.sink.put(b" ");
        }
    }

    /// A name or a keyword, or a literal whose form a letter gives.
    #[inline]
    fn word(&mut self, b: u8) {
        let next = self.at(self.pos + 1);
        if next == b'\'' {
            let quote = self.pos + 1;
            match b {
                b'e' | b'E' => {
                    return self.literal(self.string_end(quote, Backslashes::Escape));
                }
                b'b' | b'B' | b'x' | b'X' => {
                    return self.literal(self.string_end(quote, Backslashes::Plain));
                }
                b'n' | b'N' => {
                    return self.literal(self.string_end(quote, self.backslashes));
                }
                _ => {}
            }
        } else if next == b'&' && (b == b'u' || b == b'U') {
            match self.at(self.pos + 2) {
                b'\'' => {
                    // Where backslashes escape, PostgreSQL refuses this form: who wrote it may have
                    // escaped a quote.
                    let backslashes = match self.backslashes {
                        Backslashes::Plain => Backslashes::Plain,
                        _ => Backslashes::Either,
                    };
                    let end = self.string_end(self.pos + 2, backslashes);
                    return self.literal(self.uescape_end(end));
                }
                b'"' => return self.quoted_name(self.pos + 2),
                _ => {}
            }
        }
        let mut i = self.pos + 1;
        while i < self.sql.len() && is(self.sql[i], IDENT) {
            i += 1;
        }
        if S::NAMES && self.hides(i, false) {
            return self.literal(i);
        }
        self.pos = i;
        self.operand = true;
    }

    /// Whether the name up to `end` is not kept.
    #[cold]
    fn hides(&mut self, end: usize, quoted: bool) -> bool {
        let word = self.sql[self.pos..end].to_ascii_lowercase();
        match self.names {
            Names::All => false,
            Names::Keywords(is_keyword) => quoted || !is_keyword(&word),
            Names::BeforeSetting(is_keyword) => {
                self.setting = match (self.setting, word.as_slice()) {
                    (Setting::Value, _) => return quoted || !is_keyword(&word),
                    (Setting::Custom, b"to") if !quoted => Setting::Value,
                    (Setting::Custom, _) => Setting::Custom,
                    (_, b"set") if !quoted => Setting::Set,
                    (Setting::Set, b"local" | b"session") if !quoted => Setting::Set,
                    (Setting::Set, _) => Setting::Name,
                    _ => Setting::No,
                };
                false
            }
        }
    }

    /// The end of `UESCAPE 'c'` behind the string that ends at `end`, or `end`.
    fn uescape_end(&self, end: usize) -> usize {
        let word = self.skip_blank(end);
        let Some(w) = self.sql.get(word..word + 7) else {
            return end;
        };
        if !w.eq_ignore_ascii_case(b"uescape") {
            return end;
        }
        let quote = self.skip_blank(word + 7);
        if self.at(quote) == b'\'' {
            self.string_end(quote, self.backslashes)
        } else {
            end
        }
    }

    /// The end of a string whose opening quote is at `quote`, continuations on later lines
    /// included.
    fn string_end(&self, quote: usize, backslashes: Backslashes) -> usize {
        let mut i = quote + 1;
        loop {
            let rest = self.sql.get(i..).unwrap_or_default();
            let found = if backslashes != Backslashes::Plain {
                memchr2(b'\'', b'\\', rest)
            } else {
                memchr(b'\'', rest)
            };
            let Some(n) = found else {
                return self.sql.len();
            };
            i += n;
            let next = self.at(i + 1);
            if self.sql[i] == b'\\' && next == b'\'' && backslashes == Backslashes::Either {
                return self.sql.len();
            }
            if self.sql[i] == b'\\' || next == b'\'' {
                i += 2;
            } else if let Some(next) = self.continuation(i + 1) {
                i = next + 1;
            } else {
                return i + 1;
            }
        }
    }

    /// The opening quote of a string's continuation: behind blanks with at least one line break;
    /// `--` comments may stand between.
    fn continuation(&self, mut i: usize) -> Option<usize> {
        let mut newline = false;
        loop {
            match self.at(i) {
                b'\n' | b'\r' => {
                    newline = true;
                    i += 1;
                }
                b' ' | b'\t' | 0x0b | 0x0c => i += 1,
                b'-' if self.at(i + 1) == b'-' => i = self.line_end(i),
                b'\'' if newline => return Some(i),
                _ => return None,
            }
        }
    }

    /// A quoted name is kept; one that is not terminated is no name, and may hold anything.
    fn quoted_name(&mut self, quote: usize) {
        let mut i = quote + 1;
        loop {
            let rest = self.sql.get(i..).unwrap_or_default();
            let Some(n) = memchr(b'"', rest) else {
                return self.literal(self.sql.len());
            };
            i += n + 1;
            if self.at(i) != b'"' {
                break;
            }
            i += 1;
        }
        if S::NAMES && self.hides(i, true) {
            return self.literal(i);
        }
        self.pos = i;
        self.operand = true;
    }

    /// A number, and any word that sticks to it: PostgreSQL calls that trailing junk.
    fn number(&mut self) {
        let start = self.pos;
        let mut i = start;
        let mut point = false;
        let radix = self.sql[i] == b'0'
            && matches!(self.at(i + 1), b'x' | b'X' | b'o' | b'O' | b'b' | b'B');
        loop {
            let b = self.at(i);
            if is(b, IDENT) {
                i += 1;
                let exponent = !radix && (b == b'e' || b == b'E');
                if exponent && matches!(self.at(i), b'+' | b'-') && is(self.at(i + 1), DIGIT) {
                    i += 1;
                }
            } else if b == b'.' && !point && !radix && self.at(i + 1) != b'.' {
                point = true;
                i += 1;
            } else {
                break;
            }
        }
        self.literal(i);
    }

    fn number_starts_at(&self, i: usize) -> bool {
        let b = self.at(i);
        is(b, DIGIT) || (b == b'.' && is(self.at(i + 1), DIGIT))
    }

    fn operator(&mut self, first: u8) {
        let start = self.pos;
        let mut i = start;
        let mut special = false;
        while i < self.sql.len() && is(self.sql[i], OPERATOR) {
            let pair = (self.sql[i], self.at(i + 1));
            if pair == (b'-', b'-') || pair == (b'/', b'*') {
                break;
            }
            special |= is(self.sql[i], OPERATOR_SPECIAL);
            i += 1;
        }
        if i == start {
            return self.blanks();
        }
        if !special {
            while i > start + 1 && matches!(self.sql[i - 1], b'+' | b'-') {
                i -= 1;
            }
        }
        if i == start + 1 && !self.operand && (first == b'-' || first == b'+') {
            let number = self.skip_blank(i);
            if self.number_starts_at(number) {
                self.flush();
                self.pos = number;
                self.run = number;
                self.negative = first == b'-';
                return self.number();
            }
        }
        if S::NAMES && self.setting == Setting::Custom && &self.sql[start..i] == b"=" {
            self.setting = Setting::Value;
        }
        self.pos = i;
        self.operand = false;
    }

    fn punctuation(&mut self, b: u8) {
        match b {
            b'\'' => self.literal(self.string_end(self.pos, self.backslashes)),
            b'"' => self.quoted_name(self.pos),
            b'$' => self.dollar(),
            b'.' if self.at(self.pos + 1) == b'.' => {
                self.pos += 2;
                self.operand = false;
            }
            b'.' if is(self.at(self.pos + 1), DIGIT) => self.number(),
            _ => {
                if S::NAMES && b == b';' {
                    self.setting = Setting::No;
                }
                if S::NAMES && b == b'.' && self.setting == Setting::Name {
                    self.setting = Setting::Custom;
                }
                self.pos += 1;
                self.operand = b == b')' || b == b']';
            }
        }
    }

    /// A parameter, a dollar-quoted string, or a lone dollar sign.
    fn dollar(&mut self) {
        let start = self.pos;
        let mut i = start + 1;
        if is(self.at(i), DIGIT) {
            let mut n = 0u32;
            while is(self.at(i), DIGIT) {
                n = n
                    .saturating_mul(10)
                    .saturating_add(u32::from(self.at(i) - b'0'));
                i += 1;
            }
            self.max_param = self.max_param.max(n);
            self.pos = i;
            self.operand = true;
            return;
        }
        if is(self.at(i), IDENT_START) {
            while self.at(i) != b'$' && is(self.at(i), IDENT) {
                i += 1;
            }
        }
        if self.at(i) == b'$' {
            let tag = &self.sql[start..=i];
            let body = &self.sql[i + 1..];
            let end = memmem::find(body, tag).map_or(self.sql.len(), |n| i + 1 + n + tag.len());
            return self.literal(end);
        }
        self.pos = start + 1;
        self.operand = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn n(sql: &str) -> String {
        normalise(sql, true, usize::MAX - 1).text
    }

    fn off(sql: &str) -> String {
        normalise(sql, false, usize::MAX - 1).text
    }

    #[test]
    fn literals_become_numbered_parameters() {
        for (sql, expected) in [
            ("SELECT 1", "SELECT $1"),
            (
                "SELECT 'a', 'it''s', E'\\'x', B'01', X'ff', N'n'",
                "SELECT $1, $2, $3, $4, $5, $6",
            ),
            ("SELECT U&'d!0061' UESCAPE '!', 2", "SELECT $1, $2"),
            ("SELECT U&'a' /* c */ uescape\n'!'||1", "SELECT $1||$2"),
            (
                "SELECT u&\"d!0061\", \"a\"\"b\"",
                "SELECT u&\"d!0061\", \"a\"\"b\"",
            ),
            ("SELECT $$a'b$$, $t$x$$y$t$, $_1$z$_1$", "SELECT $1, $2, $3"),
            (
                "SELECT 0x1F, 0b01, 0o17, 1_000, 1e5, 1.5e-3, .5, 5., 1.e+2",
                "SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9",
            ),
            ("SELECT 1..10", "SELECT $1..$2"),
            ("SELECT'x'AS y", "SELECT $1 AS y"),
            ("SELECT 'x'y", "SELECT $1 y"),
            ("SELECT.5", "SELECT $1"),
            ("SELECT 'a'\n  'b'", "SELECT $1"),
            ("SELECT 'a' -- c\n -- d\n 'b'", "SELECT $1"),
            ("SELECT E'a'\n'b\\'c' , 2", "SELECT $1 , $2"),
            ("SELECT 'a' 'b'", "SELECT $1 $2"),
            ("SELECT 'a' /* \n */ 'b'", "SELECT $1 $2"),
            ("SELECT 123abc", "SELECT $1"),
            (
                "SELECT a[1], b.c, t1.c2, x::int4",
                "SELECT a[$1], b.c, t1.c2, x::int4",
            ),
            ("DO $$ begin null; end $$", "DO $1"),
        ] {
            assert_eq!(n(sql), expected, "{sql}");
        }
    }

    #[test]
    fn literals_are_numbered_after_the_highest_parameter() {
        assert_eq!(n("SELECT 'a', $2, 'b', $1"), "SELECT $3, $2, $4, $1");
        assert_eq!(n("SELECT 'a $9', $2 -- $7"), "SELECT $3, $2");
        assert_eq!(n("SELECT 1, \"$5\", a$6"), "SELECT $1, \"$5\", a$6");
        assert_eq!(
            n("SELECT $99999999999999999999, 1"),
            "SELECT $99999999999999999999, $4294967295"
        );
    }

    #[test]
    fn blanks_and_comments_collapse() {
        for (sql, expected) in [
            ("  SELECT\t\n a  FROM\r\n t  ", "SELECT a FROM t"),
            (
                "/* x */ SELECT/* /* nested */ */a--c\nFROM t -- end",
                "SELECT a FROM t",
            ),
            ("SELECT a/**/-/**/b", "SELECT a - b"),
            ("SELECT 1 /* open 'secret'", "SELECT $1"),
            ("SELECT a --secret\r, b", "SELECT a , b"),
            ("SELECT '--', '/*', 2", "SELECT $1, $2, $3"),
            ("", ""),
            (" \n ", ""),
            ("--only", ""),
        ] {
            assert_eq!(n(sql), expected, "{sql}");
        }
    }

    #[test]
    fn a_sign_goes_with_its_number_unless_it_is_an_operator() {
        for (sql, expected) in [
            ("x = -1", "x = $1"),
            ("x=-1", "x=$1"),
            ("x = - 1", "x = $1"),
            ("f(+1, -2.5)", "f($1, $2)"),
            ("x -1", "x -$1"),
            ("x - -1", "x - $1"),
            ("(x)-1", "(x)-$1"),
            ("a[1]-1", "a[$1]-$2"),
            ("$1-1", "$1-$2"),
            ("'a'-1", "$1-$2"),
            ("x @- 1", "x @- $1"),
            ("x @-1", "x @-$1"),
            ("x +-1", "x +$1"),
            ("x <-1", "x <$1"),
            ("5--1\n+2", "$1 +$2"),
        ] {
            assert_eq!(n(sql), expected, "{sql}");
        }
    }

    #[test]
    fn operators_end_where_a_comment_starts() {
        assert_eq!(n("a <--secret\nb"), "a < b");
        assert_eq!(n("a */*secret*/b"), "a * b");
        assert_eq!(n("a ->> 'k' #>> '{x}' || b"), "a ->> $1 #>> $2 || b");
        assert_eq!(n("a @> '{}'::jsonb"), "a @> $1::jsonb");
        assert_eq!(n("a ? 'k'"), "a ? $1");
    }

    #[test]
    fn backslashes_count_where_the_setting_says_so() {
        assert_eq!(n(r"SELECT '\', 'secret'"), "SELECT $1, $2");
        assert_eq!(off(r"SELECT '\', ', secret, '"), "SELECT $1, secret, $2");
        assert_eq!(off(r"SELECT 'it\'s secret', 1"), "SELECT $1, $2");
        assert_eq!(n(r"SELECT E'\\', secret"), "SELECT $1, secret");
        assert_eq!(off(r"SELECT B'\', N'\', secret'"), "SELECT $1, $2");
    }

    #[test]
    fn what_is_not_terminated_is_a_literal_to_the_end() {
        for sql in [
            "ALTER ROLE a PASSWORD 'secret",
            "ALTER ROLE a PASSWORD E'secret\\'",
            "ALTER ROLE a PASSWORD $x$secret$x",
            "ALTER ROLE a PASSWORD $$secret",
            "ALTER ROLE a PASSWORD \"secret",
            "ALTER ROLE a PASSWORD U&\"secret\"\"",
            "ALTER ROLE a PASSWORD U&'secret''",
            "ALTER ROLE a PASSWORD X'secret",
        ] {
            assert_eq!(n(sql), "ALTER ROLE a PASSWORD $1", "{sql}");
        }
    }

    #[test]
    fn passwords_and_tokens_do_not_survive() {
        assert_eq!(
            n("CREATE ROLE ana LOGIN PASSWORD 'hunter2' VALID UNTIL '2030-01-01'"),
            "CREATE ROLE ana LOGIN PASSWORD $1 VALID UNTIL $2"
        );
        assert_eq!(
            n("select warden.login('eyJh.eyJz.c2ln')"),
            "select warden.login($1)"
        );
    }

    #[test]
    fn a_long_text_is_cut_between_characters_and_digested() {
        let sql = "SELECT é, \"日本\" FROM t WHERE a = 'x'";
        let whole = n(sql);
        for limit in 0..whole.len() {
            let cut = normalise(sql, true, limit);
            assert!(
                cut.text.len() <= limit && cut.text.len() + 3 > limit,
                "{limit}"
            );
            assert!(whole.starts_with(&cut.text));
            assert_eq!(cut.full_length, whole.len() as u64);
            assert_eq!(cut.digest, Sha256::digest(&whole).to_vec());
        }
        let cut = normalise(sql, true, whole.len());
        assert_eq!((cut.full_length, cut.digest.len()), (0, 0));
    }

    #[test]
    fn bytes_that_are_not_utf8_are_replaced() {
        assert_eq!(
            normalise(b"SELECT \xe9\xff, 'x\xff'", true, 100).text,
            "SELECT \u{fffd}\u{fffd}, $1"
        );
        assert_eq!(normalise(b"a\0b", true, 100).text, "a b");
    }

    /// A literal that contains `secret`, and the way it may be written.
    fn literal() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("'SECRET'".to_owned()),
            Just("'it''s SECRET -- /* $$ \" '".to_owned()),
            Just("e'\\'SECRET\\\\'".to_owned()),
            Just("'SECRET'\n 'SECRET'".to_owned()),
            Just("'SECRET' -- SECRET '\n 'SECRET'".to_owned()),
            Just("b'SECRET'".to_owned()),
            Just("X'SECRET'".to_owned()),
            Just("N'SECRET'".to_owned()),
            Just("U&'SECRET' UESCAPE '!'".to_owned()),
            Just("$$SECRET ' \" /* -- $$".to_owned()),
            Just("$SECRET$SECRET $$ $x$ ' $SECRET$".to_owned()),
            Just("4711SECRET".to_owned()),
            Just("-4711.5e-7".to_owned()),
            Just("/* SECRET /* ' */ ' */".to_owned()),
            Just("-- SECRET ' \" $$ /*\n".to_owned()),
        ]
    }

    fn filler() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("SELECT".to_owned()),
            Just("a$b".to_owned()),
            Just("\"q '' /* -- \"\"x\"".to_owned()),
            Just("u&\"q ' \"".to_owned()),
            Just("$3".to_owned()),
            "[-+*/<>=~!@#%^&|?]{1,3}",
            Just("::int".to_owned()),
            Just("(".to_owned()),
            Just(")".to_owned()),
            Just(",".to_owned()),
            Just("\n".to_owned()),
            Just("  ".to_owned()),
        ]
    }

    fn statement() -> impl Strategy<Value = String> {
        // Blanks between the tokens, so that a token is what it is meant to be.
        prop::collection::vec(prop_oneof![literal(), filler()], 0..12).prop_map(|v| {
            let mut s = String::new();
            for t in v {
                // An operator that contains a comment's start would swallow what follows.
                let t = t.replace("--%", "%");
                if t.chars().all(|c| "-+*/<>=~!@#%^&|?".contains(c))
                    && (t.contains("--") || t.contains("/*"))
                {
                    continue;
                }
                s.push_str(&t);
                s.push(' ');
            }
            s
        })
    }

    /// Texts full of what starts and ends tokens.
    fn soup() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            prop::sample::select(b"'\"$\\-/*eEbBxXnNuU&@+.01_a \n\r\xc3".to_vec())
                .prop_map(|b| vec![b]),
            Just(b"$$".to_vec()),
            Just(b"--".to_vec()),
            Just(b"/*".to_vec()),
            Just(b"*/".to_vec()),
            Just(b"U&'".to_vec()),
            Just(b" UESCAPE ".to_vec()),
            Just(b"$1".to_vec()),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|v| v.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn no_byte_of_a_literal_or_comment_survives(sql in statement()) {
            let text = n(&sql);
            prop_assert!(!text.contains("SECRET") && !text.contains("4711"), "{} -> {}", sql, text);
        }

        #[test]
        fn no_input_panics_and_the_result_is_stable(sql in soup(), scs: bool) {
            let once = normalise(&sql, scs, 1 << 20);
            if std::str::from_utf8(&sql).is_ok() {
                let twice = normalise(&once.text, scs, 1 << 20);
                prop_assert_eq!(&once, &twice);
            }
        }

        #[test]
        fn equal_texts_have_equal_hashes_and_others_do_not(
            a in statement(), b in statement(), soup_a in soup(), soup_b in soup(), scs: bool
        ) {
            let key = (1, 2);
            for (a, b) in [(a.as_bytes(), b.as_bytes()), (&soup_a, &soup_b)] {
                let (ta, tb) = (normalise(a, scs, 1 << 20), normalise(b, scs, 1 << 20));
                let lossy = |t: &Normalised| t.text.contains('\u{fffd}');
                if !lossy(&ta) && !lossy(&tb) {
                    let (ha, hb) = (shape_hash(a, scs, key), shape_hash(b, scs, key));
                    prop_assert_eq!(ta == tb, ha.hash == hb.hash);
                    let mut literals = Literals::default();
                    find_literals(a, scs, &mut literals);
                    prop_assert_eq!(ha.literals, literals.count > 0);
                    // The hash is that of the text itself.
                    let mut h = SipHasher13::new_with_keys(key.0, key.1);
                    h.write(ta.text.as_bytes());
                    prop_assert_eq!(ha.hash, h.finish());
                }
            }
        }

        #[test]
        fn literals_do_not_change_the_shape(x in "[a-z']{0,20}", y in "[0-9]{1,9}") {
            let sql = format!("SELECT a FROM t WHERE b = '{}' AND c > {y}", x.replace('\'', "''"));
            let other = "SELECT a FROM t WHERE b = $$z$$ AND c > 0x10";
            prop_assert_eq!(shape_hash(sql.as_bytes(), true, (3, 4)), shape_hash(other.as_bytes(), true, (3, 4)));
        }
    }

    fn values(sql: &str, backslashes: Backslashes) -> Vec<(u32, String)> {
        let mut literals = Literals::default();
        find_literals(sql.as_bytes(), backslashes, &mut literals);
        let value = |l| literal_value(sql.as_bytes(), l, backslashes);
        literals
            .kept
            .iter()
            .map(|l| (l.number, String::from_utf8_lossy(&value(l)).into_owned()))
            .collect()
    }

    #[test]
    fn literals_are_read_as_the_server_reads_them() {
        for (sql, expected) in [
            (
                "SELECT 'it''s', -5, - /* 7 */ 2.5e-3, 6",
                &["it's", "-5", "-2.5e-3", "6"][..],
            ),
            ("SELECT 3 - 2, x -1", &["3", "2", "1"]),
            (
                "SELECT E'a\\tb\\x41\\101\\u00e9\\'', N'n'",
                &["a\tbAA\u{e9}'", "n"],
            ),
            ("SELECT $$x$$, $q$y$$z$q$, 'a'\n 'b'", &["x", "y$$z", "ab"]),
            (
                "SELECT U&'\\0061\\+000062\\\\', U&'!0061' UESCAPE '!'",
                &["ab\\", "!0061"],
            ),
            ("SELECT B'01', x'ff', 'open", &["B'01'", "x'ff'", "open"]),
        ] {
            let got = values(sql, Backslashes::Plain);
            let got: Vec<_> = got.iter().map(|(_, v)| v.as_str()).collect();
            assert_eq!(got, expected, "{sql}");
        }
        let off = values("SELECT 'a\\'b\\n'", Backslashes::Escape);
        assert_eq!(off, [(1, "a'b\n".to_owned())]);
        assert_eq!(
            values("SELECT $2, 'x', $1, 'y'", Backslashes::Plain)[0],
            (3, "x".into())
        );
    }

    #[test]
    fn where_backslashes_are_in_doubt_nothing_behind_them_is_shown() {
        let either = |sql: &str| normalise(sql, Backslashes::Either, 1 << 20).text;
        assert_eq!(either("SELECT 'a\\' , 'hush' , 'b'"), "SELECT $1");
        assert_eq!(either("SELECT 'a\\b' , hush"), "SELECT $1 , hush");
        assert_eq!(either("SELECT U&'a\\' hush"), "SELECT $1");
        assert_eq!(either("SELECT E'a\\'b' , name"), "SELECT $1 , name");
        let off = normalise("SELECT U&'a\\' hush", false, 1 << 20).text;
        assert_eq!(off, "SELECT $1");
    }

    fn few(word: &[u8]) -> bool {
        matches!(
            word,
            b"select" | b"from" | b"set" | b"to" | b"alter" | b"role" | b"off" | b"password"
        )
    }

    #[test]
    fn names_are_literals_where_they_may_be_secrets() {
        let keywords = |sql| normalise_names(sql, true, 1 << 20, Names::Keywords(few)).text;
        assert_eq!(
            keywords("ALTER ROLE x PASSWORD hush"),
            "ALTER ROLE $1 PASSWORD $2"
        );
        assert_eq!(
            keywords("ALTER ROLE x PASSWORD \"hush\""),
            "ALTER ROLE $1 PASSWORD $2"
        );
        assert_eq!(
            keywords("ALTER ROLE x PASSWORD \"hush"),
            "ALTER ROLE $1 PASSWORD $2"
        );
        let setting = |sql| normalise_names(sql, true, 1 << 20, Names::BeforeSetting(few)).text;
        for (sql, expected) in [
            ("SET app.key = hush", "SET app.key = $1"),
            (
                "SET LOCAL app.\"key\" TO \"hush\", hush",
                "SET LOCAL app.\"key\" TO $1, $2",
            ),
            (
                "ALTER ROLE x SET app.key TO off",
                "ALTER ROLE x SET app.key TO off",
            ),
            ("SET search_path = a, b", "SET search_path = a, b"),
            (
                "SET a.b = hush; SELECT c.d FROM e",
                "SET a.b = $1; SELECT c.d FROM e",
            ),
        ] {
            assert_eq!(setting(sql), expected);
        }
    }

    proptest! {
        #[test]
        fn a_literal_is_read_as_it_was_written(v in "[^\\x00]{0,30}") {
            let quoted = format!("SELECT '{}'", v.replace('\'', "''"));
            prop_assert_eq!(values(&quoted, Backslashes::Plain), [(1, v.clone())]);
            let escaped = format!("SELECT E'{}'", v.replace('\\', "\\\\").replace('\'', "\\'"));
            prop_assert_eq!(values(&escaped, Backslashes::Plain), [(1, v)]);
        }

        #[test]
        fn no_text_panics_whatever_is_looked_for(sql in soup()) {
            for b in [Backslashes::Plain, Backslashes::Escape, Backslashes::Either] {
                values(&String::from_utf8_lossy(&sql), b);
                let _ = normalise_names(&sql, b, 1000, Names::Keywords(few));
                let _ = normalise_names(&sql, b, 1000, Names::BeforeSetting(few));
            }
        }
    }
}
