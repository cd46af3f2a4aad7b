//! Exclusions: which statements are not recorded.
//!
//! Owns: the classes of commands, and whether an exclusion covers a statement. What no exclusion may
//! cover whatever it says is in [`always_recorded`]; what else is always recorded (the extension's
//! own objects, masked columns, refusals, failures) the caller knows.

use crate::guardrail::Subject;

/// The class of a command, named as in pgaudit: `READ`, `WRITE`, `FUNCTION`, `ROLE`, `DDL` or `MISC`.
#[must_use]
pub fn class(command: &str) -> &'static str {
    let role = |c: &str| c.ends_with(" ROLE") || c.ends_with(" OWNED");
    let ddl = ["CREATE ", "ALTER ", "DROP "];
    match command {
        "SELECT" | "COPY TO" | "DECLARE CURSOR" => "READ",
        "INSERT" | "UPDATE" | "DELETE" | "MERGE" | "TRUNCATE TABLE" | "COPY FROM" => "WRITE",
        "DO" | "CALL" | "FUNCTION CALL" => "FUNCTION",
        "GRANT" | "REVOKE" | "ALTER DEFAULT PRIVILEGES" => "ROLE",
        c if role(c) => "ROLE",
        "COMMENT"
        | "REINDEX"
        | "REFRESH MATERIALIZED VIEW"
        | "IMPORT FOREIGN SCHEMA"
        | "SECURITY LABEL"
        | "SELECT INTO" => "DDL",
        c if ddl.iter().any(|d| c.starts_with(d)) => "DDL",
        _ => "MISC",
    }
}

/// Whether no exclusion covers a command: it can switch off the record, or what protects it.
#[must_use]
pub fn always_recorded(command: &str) -> bool {
    matches!(
        command,
        "ALTER SYSTEM" | "LOAD" | "DROP OWNED" | "REASSIGN OWNED" | "SECURITY LABEL"
    ) || command.ends_with(" EXTENSION")
        || command.ends_with(" DATABASE")
}

/// Statements that are not recorded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exclusion {
    /// Its number.
    pub id: u32,
    /// Classes and command tags, upper case; none for all.
    pub commands: Vec<String>,
    /// The only relations; none for all.
    pub relations: Vec<u32>,
    /// The only roles, with their members; none for all.
    pub roles: Vec<u32>,
}

impl Exclusion {
    /// Whether everything that a statement does is covered: each of its commands, and each relation
    /// that it touches. Where relations are named, a statement that touches none is not covered.
    #[must_use]
    pub fn covers(&self, commands: &[&str], relations: &[u32], subject: &impl Subject) -> bool {
        let command = |c: &&str| {
            let named = |n: &String| n == c || n == class(c);
            self.commands.is_empty() || self.commands.iter().any(named)
        };
        let relation = |r: &u32| self.relations.contains(r);
        commands.iter().all(command)
            && (self.relations.is_empty()
                || !relations.is_empty() && relations.iter().all(relation))
            && (self.roles.is_empty() || self.roles.iter().any(|r| subject.is_member_of(*r)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Member(u32);
    impl Subject for Member {
        fn is_member_of(&self, role: u32) -> bool {
            role == self.0
        }
        fn is_agent(&self) -> bool {
            false
        }
    }

    #[test]
    fn commands_are_in_the_class_where_a_dba_looks_for_them() {
        for (command, expected) in [
            ("SELECT", "READ"),
            ("MERGE", "WRITE"),
            ("COPY FROM", "WRITE"),
            ("CREATE ROLE", "ROLE"),
            ("GRANT ROLE", "ROLE"),
            ("CREATE TABLE AS", "DDL"),
            ("ALTER TABLE", "DDL"),
            ("DO", "FUNCTION"),
            ("BEGIN", "MISC"),
            ("VACUUM", "MISC"),
        ] {
            assert_eq!(class(command), expected, "{command}");
        }
    }

    #[test]
    fn an_exclusion_covers_what_it_covers_wholly() {
        let e = Exclusion {
            id: 1,
            commands: vec!["READ".into(), "INSERT".into()],
            relations: vec![10, 11],
            roles: vec![7],
        };
        let covers = |c: &[&str], r: &[u32], role| e.covers(c, r, &Member(role));
        assert!(covers(&["SELECT"], &[10], 7));
        assert!(covers(&["SELECT", "INSERT"], &[10, 11], 7));
        assert!(
            !covers(&["SELECT", "DELETE"], &[10], 7),
            "a write hides in it"
        );
        assert!(!covers(&["SELECT"], &[10, 12], 7), "another relation");
        assert!(!covers(&["SELECT"], &[], 7), "no relation");
        assert!(!covers(&["SELECT"], &[10], 8), "another role");
        let all = Exclusion::default();
        assert!(all.covers(&["DROP TABLE"], &[], &Member(0)));
    }

    #[test]
    fn what_switches_the_record_off_is_always_recorded() {
        for c in ["ALTER SYSTEM", "DROP EXTENSION", "ALTER DATABASE", "LOAD"] {
            assert!(always_recorded(c), "{c}");
        }
        assert!(!always_recorded("SELECT"));
    }
}
