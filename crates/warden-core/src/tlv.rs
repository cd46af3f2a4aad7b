//! Length-prefixed binary payloads: `{u16be tag, u32be length, bytes}` with strictly ascending tags.
//!
//! The format is canonical: one value has one encoding, so a payload is hashed as it is stored and
//! never serialised again.

use std::fmt;

/// Why a payload could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlvError {
    /// The payload ends inside a header or a value.
    Truncated,
    /// A tag is not greater than the one before it.
    Order {
        /// The offending tag.
        tag: u16,
    },
    /// A value does not have the form that its tag requires.
    Value {
        /// The offending tag.
        tag: u16,
    },
    /// A required tag is missing.
    Missing {
        /// The missing tag.
        tag: u16,
    },
}

impl fmt::Display for TlvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "payload is truncated"),
            Self::Order { tag } => write!(f, "tag {tag} is out of order"),
            Self::Value { tag } => write!(f, "value of tag {tag} is malformed"),
            Self::Missing { tag } => write!(f, "tag {tag} is missing"),
        }
    }
}

impl std::error::Error for TlvError {}

/// Builds a payload. Tags must be given in strictly ascending order.
#[derive(Debug, Default)]
pub struct Writer {
    buf: Vec<u8>,
    last: Option<u16>,
}

impl Writer {
    /// An empty payload.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one field.
    ///
    /// # Panics
    /// If `tag` is not greater than the tag before it, or `value` is longer than 4 GiB: both are
    /// programming errors of the caller.
    pub fn put(&mut self, tag: u16, value: &[u8]) -> &mut Self {
        assert!(self.last.is_none_or(|l| l < tag), "TLV tags must ascend");
        self.last = Some(tag);
        let len = u32::try_from(value.len()).expect("a TLV value is shorter than 4 GiB");
        self.buf.extend_from_slice(&tag.to_be_bytes());
        self.buf.extend_from_slice(&len.to_be_bytes());
        self.buf.extend_from_slice(value);
        self
    }

    /// Appends a string, unless it is empty.
    pub fn put_str(&mut self, tag: u16, value: &str) -> &mut Self {
        if value.is_empty() {
            self
        } else {
            self.put(tag, value.as_bytes())
        }
    }

    /// Appends a big-endian integer, unless it is zero.
    pub fn put_u64(&mut self, tag: u16, value: u64) -> &mut Self {
        if value == 0 {
            self
        } else {
            self.put(tag, &value.to_be_bytes())
        }
    }

    /// Appends a list as `{u32be length, bytes}` items, unless it is empty.
    pub fn put_list<I, B>(&mut self, tag: u16, items: I) -> &mut Self
    where
        I: IntoIterator<Item = B>,
        B: AsRef<[u8]>,
    {
        let mut value = Vec::new();
        for item in items {
            let item = item.as_ref();
            let len = u32::try_from(item.len()).expect("a TLV item is shorter than 4 GiB");
            value.extend_from_slice(&len.to_be_bytes());
            value.extend_from_slice(item);
        }
        if value.is_empty() {
            self
        } else {
            self.put(tag, &value)
        }
    }

    /// The finished payload.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.buf
    }
}

/// The fields of a payload, by tag.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    fields: Vec<(u16, &'a [u8])>,
}

impl<'a> Reader<'a> {
    /// Parses a payload.
    ///
    /// # Errors
    /// If it is truncated or its tags do not ascend.
    pub fn parse(mut buf: &'a [u8]) -> Result<Self, TlvError> {
        let mut fields: Vec<(u16, &'a [u8])> = Vec::new();
        while !buf.is_empty() {
            let (head, rest) = buf.split_at_checked(6).ok_or(TlvError::Truncated)?;
            let tag = u16::from_be_bytes([head[0], head[1]]);
            let len = u32::from_be_bytes([head[2], head[3], head[4], head[5]]) as usize;
            let (value, rest) = rest.split_at_checked(len).ok_or(TlvError::Truncated)?;
            if fields.last().is_some_and(|(last, _)| *last >= tag) {
                return Err(TlvError::Order { tag });
            }
            fields.push((tag, value));
            buf = rest;
        }
        Ok(Self { fields })
    }

    /// The bytes of a field.
    #[must_use]
    pub fn get(&self, tag: u16) -> Option<&'a [u8]> {
        self.fields.iter().find(|(t, _)| *t == tag).map(|(_, v)| *v)
    }

    /// A string; an absent field is an empty one.
    ///
    /// # Errors
    /// If the bytes are not UTF-8.
    pub fn str(&self, tag: u16) -> Result<String, TlvError> {
        match self.get(tag) {
            None => Ok(String::new()),
            Some(v) => String::from_utf8(v.to_vec()).map_err(|_| TlvError::Value { tag }),
        }
    }

    /// An integer; an absent field is zero.
    ///
    /// # Errors
    /// If the field is not eight bytes long.
    pub fn u64(&self, tag: u16) -> Result<u64, TlvError> {
        match self.get(tag) {
            None => Ok(0),
            Some(v) => v
                .try_into()
                .map(u64::from_be_bytes)
                .map_err(|_| TlvError::Value { tag }),
        }
    }

    /// The items of a list; an absent field is an empty one.
    ///
    /// # Errors
    /// If an item is truncated.
    pub fn list(&self, tag: u16) -> Result<Vec<&'a [u8]>, TlvError> {
        let mut items = Vec::new();
        let mut buf = self.get(tag).unwrap_or_default();
        while !buf.is_empty() {
            let (head, rest) = buf.split_at_checked(4).ok_or(TlvError::Value { tag })?;
            let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
            let (item, rest) = rest.split_at_checked(len).ok_or(TlvError::Value { tag })?;
            items.push(item);
            buf = rest;
        }
        Ok(items)
    }

    /// The items of a list of strings.
    ///
    /// # Errors
    /// If an item is truncated or not UTF-8.
    pub fn strings(&self, tag: u16) -> Result<Vec<String>, TlvError> {
        self.list(tag)?
            .into_iter()
            .map(|v| String::from_utf8(v.to_vec()).map_err(|_| TlvError::Value { tag }))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_written_is_read(a in ".*", n in 1u64.., items in prop::collection::vec(".*", 0..5)) {
            let mut w = Writer::new();
            w.put_str(1, &a).put_u64(2, n).put_list(9, &items);
            let buf = w.finish();
            let r = Reader::parse(&buf).unwrap();
            prop_assert_eq!(r.str(1).unwrap(), a);
            prop_assert_eq!(r.u64(2).unwrap(), n);
            prop_assert_eq!(r.strings(9).unwrap(), items);
        }

        #[test]
        fn no_input_panics(buf in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(r) = Reader::parse(&buf) {
                let _ = (r.str(1), r.u64(2), r.strings(3));
            }
        }
    }

    #[test]
    fn descending_tags_are_refused() {
        let buf = [0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        assert_eq!(Reader::parse(&buf).unwrap_err(), TlvError::Order { tag: 1 });
    }
}
