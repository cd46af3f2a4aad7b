//! Guardrails: which rule, if any, refuses a statement.
//!
//! Owns the decision only. Receives what a statement is about to do, as labels and relations, and
//! the rules; emits the rule that refuses it. Who runs it is answered by the caller.

use std::collections::HashSet;

/// Labels that are not command tags.
pub mod label {
    /// An UPDATE, or a MERGE, that changes every row.
    pub const UPDATE_WITHOUT_WHERE: &str = "UPDATE WITHOUT WHERE";
    /// A DELETE, or a MERGE, that deletes every row.
    pub const DELETE_WITHOUT_WHERE: &str = "DELETE WITHOUT WHERE";
    /// ALTER TABLE … DISABLE TRIGGER; a setting that has this effect, and writing under it.
    pub const DISABLE_TRIGGER: &str = "DISABLE TRIGGER";
    /// ALTER TABLE … DISABLE ROW LEVEL SECURITY or NO FORCE ROW LEVEL SECURITY.
    pub const DISABLE_RLS: &str = "DISABLE ROW LEVEL SECURITY";
    /// A DROP … CASCADE of something else that takes a column of a table along.
    pub const CASCADE_TO_COLUMN: &str = "CASCADE TO COLUMN";
}

/// A rule of the table `warden.rule`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// Its name.
    pub name: String,
    /// Command tags and [`label`]s that it forbids.
    pub commands: Vec<String>,
    /// The only relations that it protects; empty for all.
    pub relations: Vec<u32>,
    /// The only roles that it applies to, with their members; empty for all.
    pub applies_to: Vec<u32>,
    /// Roles that it does not apply to, with their members.
    pub exempt: Vec<u32>,
    /// Whether it applies to AI agents only.
    pub agents_only: bool,
    /// What to do instead; may be empty.
    pub hint: String,
}

/// What a statement is about to do.
#[derive(Debug, Clone, Default)]
pub struct Facts<'a> {
    /// Command tags and [`label`]s.
    pub labels: Vec<&'a str>,
    /// Permanent relations that it acts on.
    pub relations: Vec<u32>,
}

/// Who runs a statement.
pub trait Subject {
    /// Whether the current role is, or is a member of, this role; being a superuser does not count.
    fn is_member_of(&self, role: u32) -> bool;
    /// Whether an AI agent acts.
    fn is_agent(&self) -> bool;
}

/// The rules of a database.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    rules: Vec<Rule>,
    labels: HashSet<String>,
}

impl Rules {
    /// Rules, in the order in which they are tried.
    #[must_use]
    pub fn new(rules: Vec<Rule>) -> Self {
        let labels = rules
            .iter()
            .flat_map(|r| r.commands.iter().cloned())
            .collect();
        Self { rules, labels }
    }

    /// Whether any rule speaks of this label: if not, nothing needs to be found out.
    #[must_use]
    pub fn mention(&self, label: &str) -> bool {
        self.labels.contains(label)
    }

    /// The first rule that refuses the statement. An exemption does not cover AI agents.
    #[must_use]
    pub fn refusing(&self, facts: &Facts<'_>, subject: &dyn Subject) -> Option<&Rule> {
        self.rules.iter().find(|r| {
            r.commands
                .iter()
                .any(|c| facts.labels.contains(&c.as_str()))
                && (r.relations.is_empty()
                    || facts.relations.iter().any(|o| r.relations.contains(o)))
                && (!r.agents_only || subject.is_agent())
                && (r.applies_to.is_empty()
                    || r.applies_to.iter().any(|role| subject.is_member_of(*role)))
                && (subject.is_agent() || !r.exempt.iter().any(|role| subject.is_member_of(*role)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Someone {
        roles: Vec<u32>,
        agent: bool,
    }

    impl Subject for Someone {
        fn is_member_of(&self, role: u32) -> bool {
            self.roles.contains(&role)
        }
        fn is_agent(&self) -> bool {
            self.agent
        }
    }

    fn drop_table() -> Facts<'static> {
        Facts {
            labels: vec!["DROP TABLE"],
            relations: vec![42],
        }
    }

    fn rule() -> Rule {
        Rule {
            name: "r".into(),
            commands: vec!["DROP TABLE".into()],
            exempt: vec![10],
            ..Rule::default()
        }
    }

    #[test]
    fn an_exempt_role_passes_and_others_do_not() {
        let rules = Rules::new(vec![rule()]);
        let admin = Someone {
            roles: vec![10],
            agent: false,
        };
        let other = Someone {
            roles: vec![11],
            agent: false,
        };
        assert!(rules.refusing(&drop_table(), &admin).is_none());
        assert!(rules.refusing(&drop_table(), &other).is_some());
    }

    #[test]
    fn an_agent_does_not_pass_as_its_role() {
        let rules = Rules::new(vec![rule()]);
        let agent = Someone {
            roles: vec![10],
            agent: true,
        };
        assert!(rules.refusing(&drop_table(), &agent).is_some());
    }

    #[test]
    fn a_rule_for_one_relation_leaves_others_alone() {
        let rules = Rules::new(vec![Rule {
            relations: vec![7],
            ..rule()
        }]);
        let other = Someone {
            roles: vec![],
            agent: false,
        };
        assert!(rules.refusing(&drop_table(), &other).is_none());
    }

    #[test]
    fn a_rule_for_one_role_leaves_others_alone() {
        let rules = Rules::new(vec![Rule {
            applies_to: vec![5],
            ..rule()
        }]);
        assert!(
            rules
                .refusing(
                    &drop_table(),
                    &Someone {
                        roles: vec![],
                        agent: false
                    }
                )
                .is_none()
        );
        assert!(
            rules
                .refusing(
                    &drop_table(),
                    &Someone {
                        roles: vec![5],
                        agent: false
                    }
                )
                .is_some()
        );
    }
}
