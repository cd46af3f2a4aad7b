//! What configuration refers to: relations, columns, functions and roles.
//!
//! Owns two forms of a reference. The *printed* one consists of names, and is what a dump holds:
//! `column public.customer.email`. The *stored* one holds OIDs, so that it follows what is renamed;
//! what does not exist in this database is stored by its names, and looked up again whenever the
//! configuration is read. Functions are always stored by name: `pg_upgrade` keeps the OIDs of relations, roles and
//! types, and not theirs.
//!
//! Names are bytes in the server's encoding: all of those that a server can have are supersets of
//! ASCII. Catalogs are looked up elsewhere.

const GONE: &[u8] = b"gone";

/// A reference as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// OID of a relation.
    Relation(u32),
    /// OID of a relation, and number of a column.
    Column(u32, i16),
    /// OID of a role.
    Role(u32),
    /// By name.
    Named(Named),
}

/// Names of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// Schema and name.
    Relation(Vec<u8>, Vec<u8>),
    /// Schema and name of the relation, and the column's.
    Column(Vec<u8>, Vec<u8>, Vec<u8>),
    /// Schema and name, and those of the type of its one argument.
    Function(Vec<u8>, Vec<u8>, Vec<u8>, Vec<u8>),
    /// Its name.
    Role(Vec<u8>),
    /// What a reference was to when it was printed, existed no more.
    Gone,
}

impl Reference {
    /// The bytes that a table holds.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Relation(oid) => format!("=relation {oid}").into_bytes(),
            Self::Column(oid, number) => format!("=column {oid}.{number}").into_bytes(),
            Self::Role(oid) => format!("=role {oid}").into_bytes(),
            Self::Named(named) => named.print(),
        }
    }

    /// Reads what [`Self::encode`] wrote.
    #[must_use]
    pub fn decode(stored: &[u8]) -> Option<Self> {
        let Some(object) = stored.strip_prefix(b"=") else {
            return Named::parse(stored).map(Self::Named);
        };
        let (kind, numbers) = std::str::from_utf8(object).ok()?.split_once(' ')?;
        Some(match kind {
            "relation" => Self::Relation(numbers.parse().ok()?),
            "role" => Self::Role(numbers.parse().ok()?),
            "column" => {
                let (oid, number) = numbers.split_once('.')?;
                Self::Column(oid.parse().ok()?, number.parse().ok()?)
            }
            _ => return None,
        })
    }
}

impl Named {
    /// The printed form.
    #[must_use]
    pub fn print(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Relation(schema, name) => {
                out.extend_from_slice(b"relation ");
                dotted(&mut out, &[schema, name]);
            }
            Self::Column(schema, name, column) => {
                out.extend_from_slice(b"column ");
                dotted(&mut out, &[schema, name, column]);
            }
            Self::Function(schema, name, type_schema, type_name) => {
                out.extend_from_slice(b"function ");
                dotted(&mut out, &[schema, name]);
                out.push(b'(');
                dotted(&mut out, &[type_schema, type_name]);
                out.push(b')');
            }
            Self::Role(name) => {
                out.extend_from_slice(b"role ");
                dotted(&mut out, &[name]);
            }
            Self::Gone => out.extend_from_slice(GONE),
        }
        out
    }

    /// Reads the printed form.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        if text == GONE {
            return Some(Self::Gone);
        }
        let at = text.iter().position(|b| *b == b' ')?;
        let (kind, mut rest) = (&text[..at], &text[at + 1..]);
        let mut names = identifiers(&mut rest)?.into_iter();
        let mut next = || names.next();
        let named = match kind {
            b"relation" => Self::Relation(next()?, next()?),
            b"column" => Self::Column(next()?, next()?, next()?),
            b"role" => Self::Role(next()?),
            b"function" => {
                let (schema, name) = (next()?, next()?);
                rest = rest.strip_prefix(b"(")?;
                let mut argument = identifiers(&mut rest)?.into_iter();
                rest = rest.strip_prefix(b")")?;
                let named = Self::Function(schema, name, argument.next()?, argument.next()?);
                if argument.next().is_some() {
                    return None;
                }
                named
            }
            _ => return None,
        };
        (rest.is_empty() && names.next().is_none()).then_some(named)
    }
}

fn dotted(out: &mut Vec<u8>, names: &[&Vec<u8>]) {
    for (i, name) in names.iter().enumerate() {
        if i > 0 {
            out.push(b'.');
        }
        let plain =
            !name.is_empty() && name.iter().all(|b| is_plain(*b)) && !name[0].is_ascii_digit();
        if plain {
            out.extend_from_slice(name);
            continue;
        }
        out.push(b'"');
        for b in name.iter() {
            if *b == b'"' {
                out.push(b'"');
            }
            out.push(*b);
        }
        out.push(b'"');
    }
}

/// What needs no quotes. Without them, no other byte is accepted.
fn is_plain(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'
}

/// Takes identifiers with points between them off the front of `rest`.
fn identifiers(rest: &mut &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    loop {
        found.push(identifier(rest)?);
        match rest.strip_prefix(b".") {
            Some(after) => *rest = after,
            None => return Some(found),
        }
    }
}

fn identifier(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    if let Some(mut quoted) = rest.strip_prefix(b"\"") {
        loop {
            let (b, after) = quoted.split_first()?;
            quoted = after;
            match (*b, quoted.first()) {
                (b'"', Some(b'"')) => {
                    name.push(b'"');
                    quoted = &quoted[1..];
                }
                (b'"', _) => break,
                (0, _) => return None,
                _ => name.push(*b),
            }
        }
        *rest = quoted;
    } else {
        let n = rest.iter().take_while(|b| is_plain(**b)).count();
        name.extend_from_slice(&rest[..n]);
        *rest = &rest[n..];
    }
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn b(s: &str) -> Vec<u8> {
        s.as_bytes().to_vec()
    }

    #[test]
    fn references_are_printed_as_people_write_them() {
        for (named, text) in [
            (
                Named::Relation(b("public"), b("customer")),
                "relation public.customer",
            ),
            (
                Named::Column(b("public"), b("Order"), b("e-mail")),
                "column public.\"Order\".\"e-mail\"",
            ),
            (
                Named::Function(b("warden"), b("redact"), b("pg_catalog"), b("text")),
                "function warden.redact(pg_catalog.text)",
            ),
            (Named::Role(b("o\"hara")), "role \"o\"\"hara\""),
        ] {
            assert_eq!(String::from_utf8_lossy(&named.print()), text);
            assert_eq!(Named::parse(text.as_bytes()), Some(named));
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for text in [
            "",
            "relation",
            "relation ",
            "relation customer",
            "relation a.b.c",
            "relation public.Customer",
            "column a.b",
            "column a.b.c ",
            "role a.b",
            "role \"a",
            "role \"\"",
            "role #16432",
            "function a.b",
            "function a.b(c)",
            "function a.b(c.d",
            "function a.b(c.d.e)",
            "table a.b",
            "=relation",
            "=relation x",
            "=column 1",
            "=function 1",
        ] {
            assert_eq!(Reference::decode(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_name_survives_both_forms(
            name in prop::collection::vec(1u8..=255, 1..20),
            other in prop::collection::vec(1u8..=255, 1..20),
            oid in any::<u32>(),
            number in any::<i16>(),
        ) {
            for r in [
                Reference::Relation(oid),
                Reference::Column(oid, number),
                Reference::Role(oid),
                Reference::Named(Named::Gone),
                Reference::Named(Named::Role(name.clone())),
                Reference::Named(Named::Relation(name.clone(), other.clone())),
                Reference::Named(Named::Column(name.clone(), other.clone(), name.clone())),
                Reference::Named(Named::Function(
                    name.clone(), other.clone(), other.clone(), name.clone())),
            ] {
                prop_assert_eq!(Reference::decode(&r.encode()), Some(r));
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = Reference::decode(&bytes);
        }
    }
}
