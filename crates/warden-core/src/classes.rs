//! Settings that may differ by the class of a statement: `statement, read=written`.
//!
//! One value for all, then exceptions. What a class is, PostgreSQL decides as for `log_statement`;
//! see [`Class`].

use std::fmt;

/// The class of a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Changes nothing: SELECT, COPY TO, SHOW, transaction control.
    Read = 0,
    /// Changes rows: INSERT, UPDATE, DELETE, MERGE, COPY FROM, TRUNCATE, SELECT with such a part or
    /// with row locks.
    Write = 1,
    /// Changes definitions: CREATE, ALTER, DROP, and the like.
    Ddl = 2,
    /// Changes roles, privileges or the server: GRANT, CREATE ROLE, ALTER SYSTEM, and the like.
    Admin = 3,
}

/// The classes, in the order of their numbers, as they are written.
const CLASSES: [&str; 4] = ["read", "write", "ddl", "admin"];

/// A value that a setting may have.
pub trait Choice: Copy + 'static {
    /// Every value, as it is written.
    const NAMES: &'static [(&'static str, Self)];
}

/// When a record is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// Written to the journal: survives the death of any process.
    Written = 0,
    /// On disk before the commit of its transaction is acknowledged.
    Commit = 1,
    /// On disk before the statement runs; its end, before the commit is acknowledged.
    Statement = 2,
}

impl Choice for Durability {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("written", Self::Written),
        ("commit", Self::Commit),
        ("statement", Self::Statement),
    ];
}

/// What happens to a statement that cannot be recorded as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFull {
    /// It waits.
    Block = 0,
    /// It fails.
    Error = 1,
    /// It goes on; the loss is recorded.
    Gap = 2,
}

impl Choice for OnFull {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("block", Self::Block),
        ("error", Self::Error),
        ("gap", Self::Gap),
    ];
}

/// A value for each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByClass<T>([T; CLASSES.len()]);

impl<T: Choice> ByClass<T> {
    /// The value of a class.
    #[must_use]
    pub fn of(&self, class: Class) -> T {
        self.0[class as usize]
    }

    /// Reads a setting: one value for all, then `class=value` for exceptions.
    ///
    /// # Errors
    /// A [`Mistake`], for the administrator to read.
    pub fn parse(text: &str) -> Result<Self, Mistake> {
        let mut all = None;
        let mut own = [None; CLASSES.len()];
        for item in text.split(',').map(str::trim) {
            match item.split_once('=') {
                None => {
                    if all.replace(value::<T>(item)?).is_some() {
                        return Err(Mistake(
                            "There is more than one value for all classes.".into(),
                        ));
                    }
                }
                Some((class, item)) => {
                    let class = class.trim();
                    let known = CLASSES.iter().position(|c| c.eq_ignore_ascii_case(class));
                    let Some(i) = known else {
                        return Err(Mistake(format!(
                            "There is no class \"{class}\" of statements. Classes are: {}.",
                            CLASSES.join(", ")
                        )));
                    };
                    if own[i].replace(value::<T>(item.trim())?).is_some() {
                        return Err(Mistake(format!("Class \"{class}\" is named twice.")));
                    }
                }
            }
        }
        let Some(all) = all else {
            return Err(Mistake(
                "A value for all classes is missing; exceptions follow it.".into(),
            ));
        };
        Ok(Self(own.map(|v| v.unwrap_or(all))))
    }
}

fn value<T: Choice>(text: &str) -> Result<T, Mistake> {
    let found = T::NAMES.iter().find(|(n, _)| n.eq_ignore_ascii_case(text));
    found.map(|(_, v)| *v).ok_or_else(|| {
        let names: Vec<_> = T::NAMES.iter().map(|(n, _)| *n).collect();
        Mistake(format!(
            "\"{text}\" is not a value. Values are: {}.",
            names.join(", ")
        ))
    })
}

/// What is wrong with a setting: a sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake(String);

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Class; 4] = [Class::Read, Class::Write, Class::Ddl, Class::Admin];

    fn parse(text: &str) -> Result<[Durability; 4], String> {
        let by = ByClass::parse(text).map_err(|e| e.to_string())?;
        Ok(ALL.map(|c| by.of(c)))
    }

    #[test]
    fn one_value_holds_for_all_classes() {
        assert_eq!(parse("commit"), Ok([Durability::Commit; 4]));
    }

    #[test]
    fn exceptions_hold_for_their_class_only() {
        use Durability::{Commit, Statement, Written};
        assert_eq!(
            parse(" Statement , read=written,DDL = commit"),
            Ok([Written, Statement, Commit, Statement])
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, said) in [
            ("", "\"\" is not a value"),
            ("read=written", "for all classes is missing"),
            ("written, commit", "more than one value"),
            ("written, select=commit", "no class \"select\""),
            ("written, read=fsync", "\"fsync\" is not a value"),
            ("written, read=commit, read=commit", "named twice"),
            ("written,", "\"\" is not a value"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-z=, ]{0,60}") {
            let _ = parse(&text);
        }
    }
}
