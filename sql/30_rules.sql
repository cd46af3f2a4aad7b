CREATE TABLE warden.rule (
    name        text PRIMARY KEY CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
    commands    text[] NOT NULL CHECK (pg_catalog.cardinality(commands) > 0),
    relations   warden.reference[] NOT NULL DEFAULT '{}',
    applies_to  warden.reference[] NOT NULL DEFAULT '{}',
    exempt      warden.reference[] NOT NULL DEFAULT '{}',
    agents_only boolean NOT NULL DEFAULT false,
    hint        text NOT NULL DEFAULT '',
    enabled     boolean NOT NULL DEFAULT true,
    builtin     boolean NOT NULL DEFAULT false
);
COMMENT ON TABLE warden.rule IS 'Guardrails: statements that are refused with SQLSTATE WA001. Use warden.add_rule().';
COMMENT ON COLUMN warden.rule.commands IS 'Command tags, and UPDATE WITHOUT WHERE, DELETE WITHOUT WHERE, DISABLE TRIGGER, DISABLE ROW LEVEL SECURITY, CASCADE TO COLUMN';
COMMENT ON COLUMN warden.rule.relations IS 'The only relations protected; empty for all';
COMMENT ON COLUMN warden.rule.applies_to IS 'The only roles, with their members, that it applies to; empty for all';
COMMENT ON COLUMN warden.rule.exempt IS 'Roles, with their members, that it does not apply to; AI agents are never exempt';
COMMENT ON COLUMN warden.rule.hint IS 'Shown as HINT to whom is refused';
REVOKE ALL ON warden.rule FROM PUBLIC;
GRANT SELECT ON warden.rule TO warden_admin, warden_auditor;

CREATE TRIGGER config_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.rule
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();

CREATE FUNCTION warden.add_rule(
    name        text,
    commands    text[],
    relations   regclass[] DEFAULT '{}',
    applies_to  regrole[] DEFAULT '{}',
    exempt      regrole[] DEFAULT '{warden_admin}',
    agents_only boolean DEFAULT false,
    hint        text DEFAULT ''
) RETURNS void
    LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO warden.rule (name, commands, relations, applies_to, exempt, agents_only, hint)
    SELECT add_rule.name,
           (SELECT array_agg(upper(c)) FROM unnest(add_rule.commands) c),
           (SELECT coalesce(array_agg(warden.reference_to(r)), '{}') FROM unnest(add_rule.relations) r),
           (SELECT coalesce(array_agg(warden.reference_to(r)), '{}') FROM unnest(add_rule.applies_to) r),
           (SELECT coalesce(array_agg(warden.reference_to(r)), '{}') FROM unnest(add_rule.exempt) r),
           add_rule.agents_only, add_rule.hint;
END;
COMMENT ON FUNCTION warden.add_rule(text, text[], regclass[], regrole[], regrole[], boolean, text)
    IS 'Adds a guardrail: the commands are refused to everyone but the exempt roles and their members';

CREATE FUNCTION warden.drop_rule(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM warden.rule r WHERE r.name = drop_rule.name AND NOT r.builtin;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no rule "%" that can be dropped', drop_rule.name
            USING ERRCODE = 'undefined_object',
                  HINT = 'Built-in rules are switched off with warden.enable_rule(name, false).';
    END IF;
END
$$;
COMMENT ON FUNCTION warden.drop_rule(text) IS 'Removes a guardrail that warden.add_rule() made';

CREATE FUNCTION warden.enable_rule(name text, enabled boolean DEFAULT true) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE warden.rule r SET enabled = enable_rule.enabled WHERE r.name = enable_rule.name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'rule "%" does not exist', enable_rule.name
            USING ERRCODE = 'undefined_object';
    END IF;
END
$$;
COMMENT ON FUNCTION warden.enable_rule(text, boolean) IS 'Switches a guardrail on or off';

REVOKE ALL ON FUNCTION warden.add_rule(text, text[], regclass[], regrole[], regrole[], boolean, text) FROM PUBLIC;
REVOKE ALL ON FUNCTION warden.drop_rule(text) FROM PUBLIC;
REVOKE ALL ON FUNCTION warden.enable_rule(text, boolean) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.add_rule(text, text[], regclass[], regrole[], regrole[], boolean, text) TO warden_admin;
GRANT EXECUTE ON FUNCTION warden.drop_rule(text) TO warden_admin;
GRANT EXECUTE ON FUNCTION warden.enable_rule(text, boolean) TO warden_admin;

INSERT INTO warden.rule (name, commands, exempt, hint, builtin)
SELECT r.name, r.commands, ARRAY[warden.reference_to('warden_admin'::regrole)], r.hint, true
FROM (VALUES
    ('no_drop_database', '{DROP DATABASE}'::text[], 'Ask a member of warden_admin to drop the database.'),
    ('no_drop_schema', '{DROP SCHEMA}', 'Ask a member of warden_admin to drop the schema.'),
    ('no_drop_table', '{DROP TABLE,DROP OWNED,CASCADE TO COLUMN}', 'Ask a member of warden_admin to drop the table.'),
    ('no_truncate', '{TRUNCATE TABLE}', 'Use DELETE with a WHERE clause, or ask a member of warden_admin.'),
    ('no_update_without_where', '{UPDATE WITHOUT WHERE}', 'Add a WHERE clause that selects the rows to change.'),
    ('no_delete_without_where', '{DELETE WITHOUT WHERE}', 'Add a WHERE clause that selects the rows to delete.'),
    ('no_alter_system', '{ALTER SYSTEM}', 'Ask a member of warden_admin to change the server''s configuration.'),
    ('no_disable_trigger', '{DISABLE TRIGGER}', 'Ask a member of warden_admin to disable the trigger.'),
    ('no_disable_rls', '{DISABLE ROW LEVEL SECURITY}', 'Ask a member of warden_admin to disable row-level security.')
) AS r (name, commands, hint);

-- Built-in rules come with the extension. Of them, a dump carries those that are switched off; put in
-- again, such a row switches off the rule that is there.
SELECT pg_catalog.pg_extension_config_dump('warden.rule', 'WHERE NOT builtin OR NOT enabled');
CREATE FUNCTION warden.restore_builtin_rule() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE warden.rule r SET enabled = NEW.enabled WHERE r.name = NEW.name AND r.builtin;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION warden.restore_builtin_rule() IS 'Trigger of warden.rule: a built-in rule in a dump is a change of the one that is there';
REVOKE ALL ON FUNCTION warden.restore_builtin_rule() FROM PUBLIC;
CREATE TRIGGER restore_builtin_rule BEFORE INSERT ON warden.rule
    FOR EACH ROW WHEN (NEW.builtin) EXECUTE FUNCTION warden.restore_builtin_rule();
ALTER TABLE warden.rule ENABLE ALWAYS TRIGGER restore_builtin_rule;
ALTER TABLE warden.rule ENABLE ALWAYS TRIGGER config_changed;
