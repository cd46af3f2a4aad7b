//! Mask functions: pure, deterministic, and blind to everything but their argument.
//!
//! They keep what a person needs to recognise a value and no more. What does not look like the
//! expected kind of value is masked whole. And: which errors could show what is masked.

use std::collections::HashSet;

/// What stands for a text that is masked whole.
pub const REDACTED: &str = "***";

/// `ana.lima@example.com` becomes `a***@***.com`.
#[must_use]
pub fn partial_email(value: &str) -> String {
    let Some((local, domain)) = value.rsplit_once('@') else {
        return REDACTED.to_owned();
    };
    let (Some(first), Some((_, ending))) = (local.chars().next(), domain.rsplit_once('.')) else {
        return REDACTED.to_owned();
    };
    let ending_is_plain =
        (2..=10).contains(&ending.len()) && ending.bytes().all(|b| b.is_ascii_alphabetic());
    if local.chars().count() < 2 || !ending_is_plain {
        return REDACTED.to_owned();
    }
    format!("{first}***@***.{ending}")
}

/// Keeps the last `keep` digits; other digits become `*`, and separators stay. Letters and values
/// with fewer than `least` digits are masked whole.
fn last_digits(value: &str, keep: usize, least: usize) -> String {
    let digits = value.chars().filter(char::is_ascii_digit).count();
    let plain = value
        .chars()
        .all(|c| c.is_ascii_digit() || " +-./()".contains(c));
    if digits < least || !plain {
        return REDACTED.to_owned();
    }
    let mut left = digits;
    value
        .chars()
        .map(|c| {
            if !c.is_ascii_digit() {
                return c;
            }
            left -= 1;
            if left < keep { c } else { '*' }
        })
        .collect()
}

/// `+44 20 7946 0958` becomes `+** ** **** **58`.
#[must_use]
pub fn partial_phone(value: &str) -> String {
    last_digits(value, 2, 6)
}

/// `4111 1111 1111 1111` becomes `**** **** **** 1111`.
#[must_use]
pub fn partial_card(value: &str) -> String {
    last_digits(value, 4, 12)
}

/// Whether the DETAIL of errors of this SQLSTATE shows rows: integrity constraints, and WITH CHECK
/// OPTION.
#[must_use]
pub fn detail_shows_rows(sqlstate: &[u8; 5]) -> bool {
    sqlstate.starts_with(b"23") || sqlstate == b"44000"
}

/// Whether an error is about one of these relations (schema, name): by its own fields, or because its
/// message names one, in whatever language and quotes, as a foreign key's does, whose own table is the
/// other one. An error that names no table could be about any.
#[must_use]
pub fn speaks_of<S: std::hash::BuildHasher>(
    relations: &HashSet<(String, String), S>,
    table: Option<&(String, String)>,
    message: &str,
) -> bool {
    table.is_none_or(|t| relations.contains(t))
        || relations
            .iter()
            .any(|(_, name)| message.contains(name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_address_keeps_its_first_letter_and_ending() {
        assert_eq!(partial_email("ana.lima@example.com"), "a***@***.com");
        assert_eq!(partial_email("not an address"), "***");
        assert_eq!(partial_email("x@example.com"), "***");
        assert_eq!(partial_email("ab@localhost"), "***");
    }

    #[test]
    fn a_number_keeps_its_last_digits() {
        assert_eq!(partial_phone("+44 20 7946 0958"), "+** ** **** **58");
        assert_eq!(partial_card("4111 1111 1111 1111"), "**** **** **** 1111");
        assert_eq!(partial_card("1234"), "***");
        assert_eq!(partial_phone("call 0171 123456"), "***");
    }

    proptest! {
        #[test]
        fn no_more_than_the_promised_digits_are_left(v in "\\PC{0,40}") {
            let left = |s: String| s.chars().filter(char::is_ascii_digit).count();
            prop_assert!(left(partial_phone(&v)) <= 2);
            prop_assert!(left(partial_card(&v)) <= 4);
        }

        #[test]
        fn the_local_part_does_not_survive(local in "[a-z0-9.]{2,30}", domain in "[a-z]{3,20}") {
            let m = partial_email(&format!("{local}@{domain}.org"));
            // The ending is promised to be shown.
            let m = m.trim_end_matches(".org");
            prop_assert!(!m.contains(&local) && !m.contains(&domain));
        }
    }

    #[test]
    fn an_error_speaks_of_a_relation_in_any_language() {
        let relations = HashSet::from([("public".to_owned(), "customer".to_owned())]);
        let of = |schema: &str, table: &str| (schema.to_owned(), table.to_owned());
        assert!(speaks_of(&relations, Some(&of("public", "customer")), ""));
        assert!(!speaks_of(&relations, Some(&of("public", "orders")), "no"));
        let german = "Aktualisieren oder Löschen in Tabelle »customer« verletzt Fremdschlüssel";
        assert!(speaks_of(&relations, Some(&of("public", "orders")), german));
        assert!(speaks_of(&relations, None, ""));
    }

    #[test]
    fn constraints_show_rows_and_other_errors_do_not() {
        for code in [b"23505", b"23514", b"23P01", b"44000"] {
            assert!(detail_shows_rows(code));
        }
        for code in [b"22P02", b"42501", b"25P02"] {
            assert!(!detail_shows_rows(code));
        }
    }
}
