CREATE TABLE warden.exclusion (
    id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text NOT NULL CHECK (name ~ '^[a-z][a-z0-9_]{0,62}$'),
    commands   text[] NOT NULL,
    relations  warden.reference[] NOT NULL,
    roles      warden.reference[] NOT NULL,
    active     boolean NOT NULL DEFAULT true,
    created_by text NOT NULL DEFAULT session_user,
    created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
    ended_by   text,
    ended_at   timestamptz,
    CHECK (pg_catalog.cardinality(commands) + pg_catalog.cardinality(relations) + pg_catalog.cardinality(roles) > 0)
);
CREATE UNIQUE INDEX exclusion_name_idx ON warden.exclusion (name) WHERE active;
COMMENT ON TABLE warden.exclusion IS 'Statements that are not recorded, and those that were not. Use warden.exclude().';
COMMENT ON COLUMN warden.exclusion.commands IS 'Command tags and classes: READ, WRITE, FUNCTION, ROLE, DDL, MISC; empty for all';
COMMENT ON COLUMN warden.exclusion.relations IS 'The only relations; empty for all';
COMMENT ON COLUMN warden.exclusion.roles IS 'The only roles, with their members; empty for all';
COMMENT ON COLUMN warden.exclusion.active IS 'False for an exclusion that has ended';
REVOKE ALL ON warden.exclusion FROM PUBLIC;
GRANT SELECT ON warden.exclusion TO warden_admin, warden_auditor;

-- Those that have ended, too: who looks at a gap in the record wants to know why.
SELECT pg_catalog.pg_extension_config_dump('warden.exclusion', '');
SELECT pg_catalog.pg_extension_config_dump('warden.exclusion_id_seq', '');

CREATE TRIGGER config_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.exclusion
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();
ALTER TABLE warden.exclusion ENABLE ALWAYS TRIGGER config_changed;

CREATE FUNCTION warden.left_out(exclusion integer) RETURNS bigint
    LANGUAGE c VOLATILE STRICT
    AS 'MODULE_PATHNAME', 'left_out_wrapper';
COMMENT ON FUNCTION warden.left_out(integer) IS 'How many statements an exclusion has left out since the server started';

CREATE VIEW warden.exclusions AS
SELECT e.name,
       e.active,
       e.commands,
       ARRAY(SELECT warden.reference_oid(r)::regclass FROM unnest(e.relations) r) AS relations,
       ARRAY(SELECT warden.reference_oid(r)::regrole FROM unnest(e.roles) r) AS roles,
       e.created_by,
       e.created_at,
       e.ended_by,
       e.ended_at,
       warden.left_out(e.id) AS left_out
FROM warden.exclusion e
ORDER BY e.created_at;
COMMENT ON VIEW warden.exclusions IS 'What is not recorded, and was not: who decided it, when, and how many statements that were';
COMMENT ON COLUMN warden.exclusions.left_out IS 'Statements since the server started';
REVOKE ALL ON warden.exclusions FROM PUBLIC;
GRANT SELECT ON warden.exclusions TO warden_admin, warden_auditor;

CREATE FUNCTION warden.exclude(
    name      text,
    commands  text[] DEFAULT '{}',
    relations regclass[] DEFAULT '{}',
    roles     regrole[] DEFAULT '{}'
) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted text[] := (SELECT coalesce(array_agg(upper(c)), '{}') FROM unnest(exclude.commands) c);
    bad text := (SELECT c FROM unnest(wanted) c WHERE c IS NULL OR c !~ '^[A-Z]+( [A-Z]+)*$' LIMIT 1);
BEGIN
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION '"%" is no command', bad
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Use a command tag, as in warden.activity, or READ, WRITE, FUNCTION, ROLE, DDL or MISC.';
    END IF;
    IF cardinality(wanted) + cardinality(exclude.relations) + cardinality(exclude.roles) = 0 THEN
        RAISE EXCEPTION 'an exclusion needs commands, relations or roles'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'warden.record = none switches the record off for the whole cluster.';
    END IF;
    INSERT INTO warden.exclusion (name, commands, relations, roles)
    VALUES (exclude.name, wanted,
            (SELECT coalesce(array_agg(warden.reference_to(r)), '{}') FROM unnest(exclude.relations) r),
            (SELECT coalesce(array_agg(warden.reference_to(r)), '{}') FROM unnest(exclude.roles) r));
END
$$;
COMMENT ON FUNCTION warden.exclude(text, text[], regclass[], regrole[])
    IS 'Statements that are wholly of these commands, on these relations, by these roles, are not recorded any more';

CREATE FUNCTION warden.include(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE warden.exclusion e
    SET active = false, ended_by = session_user, ended_at = now()
    WHERE e.name = include.name AND e.active;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'exclusion "%" does not exist', include.name
            USING ERRCODE = 'undefined_object';
    END IF;
END
$$;
COMMENT ON FUNCTION warden.include(text) IS 'Ends an exclusion; it stays visible in warden.exclusions';

REVOKE ALL ON FUNCTION warden.left_out(integer), warden.include(text),
    warden.exclude(text, text[], regclass[], regrole[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.left_out(integer) TO warden_admin, warden_auditor;
GRANT EXECUTE ON FUNCTION warden.exclude(text, text[], regclass[], regrole[]) TO warden_admin;
GRANT EXECUTE ON FUNCTION warden.include(text) TO warden_admin;
