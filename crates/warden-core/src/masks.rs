//! Mask functions: pure, deterministic, and blind to everything but their argument.
//!
//! They keep what a person needs to recognise a value and no more. What does not look like the
//! expected kind of value is masked whole.

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
}
