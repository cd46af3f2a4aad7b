-- Roles are shared by all databases of a cluster: created if missing, never dropped.
DO $$
DECLARE
    r text;
BEGIN
    FOREACH r IN ARRAY ARRAY['warden_admin', 'warden_auditor', 'warden_approver', 'warden_agent'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = r) THEN
            EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', r);
        END IF;
    END LOOP;
END
$$;
COMMENT ON ROLE warden_admin IS 'pg_warden: configures masks, guardrails, issuers and sinks; guardrails do not apply to its members';
COMMENT ON ROLE warden_auditor IS 'pg_warden: reads the ledger and verifies it';
COMMENT ON ROLE warden_approver IS 'pg_warden: decides requests for approval';
COMMENT ON ROLE warden_agent IS 'pg_warden: its members count as AI agents';

-- Who installs pg_warden may configure it, and nobody else yet.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_auth_members m
        WHERE m.roleid = 'warden_admin'::pg_catalog.regrole
          AND m.member = current_user::pg_catalog.regrole
    ) THEN
        EXECUTE pg_catalog.format('GRANT warden_admin TO %I WITH ADMIN OPTION', current_user);
    END IF;
END
$$;

-- Who owned the schema before could rename it, or put functions of its own into it.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_roles r ON r.oid = n.nspowner
        WHERE n.nspname = 'warden' AND (r.rolsuper OR r.rolname = current_user)
    ) THEN
        RAISE EXCEPTION 'schema "warden" belongs to another role'
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Drop the schema first.';
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace = 'warden'::pg_catalog.regnamespace)
       OR EXISTS (SELECT FROM pg_catalog.pg_proc WHERE pronamespace = 'warden'::pg_catalog.regnamespace)
       OR EXISTS (SELECT FROM pg_catalog.pg_type WHERE typnamespace = 'warden'::pg_catalog.regnamespace)
    THEN
        RAISE EXCEPTION 'schema "warden" is not empty'
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Drop the schema first.';
    END IF;
END
$$;

COMMENT ON SCHEMA warden IS 'pg_warden: policies, ledger and reports';
GRANT USAGE ON SCHEMA warden TO PUBLIC;

-- Fails, with a HINT, unless the library was loaded by shared_preload_libraries.
CREATE FUNCTION warden.config_changed_probe() RETURNS void
    LANGUAGE c AS 'MODULE_PATHNAME', 'warden_require_preload';
SELECT warden.config_changed_probe();
DROP FUNCTION warden.config_changed_probe();
