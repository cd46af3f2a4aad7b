CREATE TABLE warden.issuer (
    issuer         text PRIMARY KEY,
    algorithm      text NOT NULL,
    key            text,
    audience       text NOT NULL,
    kind           text NOT NULL,
    leeway_seconds integer NOT NULL,
    changed_at     timestamptz NOT NULL DEFAULT pg_catalog.now(),
    changed_by     text NOT NULL DEFAULT session_user
);
COMMENT ON TABLE warden.issuer IS 'Issuers of tokens that warden.login() accepts. Use warden.add_issuer() and warden.issuers.';
COMMENT ON COLUMN warden.issuer.issuer IS 'The tokens'' claim "iss", byte for byte';
COMMENT ON COLUMN warden.issuer.algorithm IS 'The only signature algorithm that is accepted';
COMMENT ON COLUMN warden.issuer.key IS 'A public key, as PEM or JWK; NULL for HS256, whose secret is in warden.issuer_secret';
COMMENT ON COLUMN warden.issuer.audience IS 'What the tokens'' claim "aud" must be or contain';
COMMENT ON COLUMN warden.issuer.kind IS 'What the bearers are, unless a token has a claim "act": human, service or agent';
COMMENT ON COLUMN warden.issuer.leeway_seconds IS 'By how much clocks may differ';
REVOKE ALL ON warden.issuer FROM PUBLIC;
SELECT pg_catalog.pg_extension_config_dump('warden.issuer', $$WHERE key IS NULL OR algorithm <> 'HS256'$$);

-- Not in a dump: dumps lie around. A restored issuer without its secret is refused.
CREATE TABLE warden.issuer_secret (
    issuer text PRIMARY KEY,
    secret text NOT NULL
);
COMMENT ON TABLE warden.issuer_secret IS 'Secrets of issuers with HS256: nobody may read them, and no dump holds them. Use warden.add_issuer().';
REVOKE ALL ON warden.issuer_secret FROM PUBLIC;

CREATE TRIGGER config_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.issuer
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();
ALTER TABLE warden.issuer ENABLE ALWAYS TRIGGER config_changed;
CREATE TRIGGER config_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.issuer_secret
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();

CREATE VIEW warden.issuers AS
    SELECT i.issuer, i.algorithm, i.audience, i.kind, i.leeway_seconds, i.changed_at, i.changed_by,
           pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(i.key, 'UTF8')), 'hex') AS key_sha256,
           i.key IS NULL AND NOT EXISTS (SELECT FROM warden.issuer_secret s WHERE s.issuer = i.issuer)
               AS secret_missing
    FROM warden.issuer i;
COMMENT ON VIEW warden.issuers IS 'Issuers of tokens that warden.login() accepts, without their keys';
COMMENT ON COLUMN warden.issuers.key_sha256 IS 'SHA-256 of the public key''s text; NULL for a secret';
COMMENT ON COLUMN warden.issuers.secret_missing IS 'Restored from a dump, which holds no secrets: its tokens are refused until warden.add_issuer() is called again';
REVOKE ALL ON warden.issuers FROM PUBLIC;
GRANT SELECT ON warden.issuers TO warden_admin;

CREATE FUNCTION warden.check_issuer(
    issuer text, algorithm text, key text, audience text, kind text, leeway_seconds integer
) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'warden_check_issuer';
COMMENT ON FUNCTION warden.check_issuer(text, text, text, text, text, integer)
    IS 'Fails, with a hint, unless warden.login() can use such an issuer';
REVOKE ALL ON FUNCTION warden.check_issuer(text, text, text, text, text, integer) FROM PUBLIC;

-- The check comes first: a constraint's error would show the row, and the row holds the key.
CREATE FUNCTION warden.add_issuer(
    issuer         text,
    algorithm      text,
    key            text,
    audience       text,
    kind           text DEFAULT 'human',
    leeway_seconds integer DEFAULT 60
) RETURNS void
    LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT warden.check_issuer(add_issuer.issuer, add_issuer.algorithm, add_issuer.key,
                               add_issuer.audience, add_issuer.kind, add_issuer.leeway_seconds);
    INSERT INTO warden.issuer AS i (issuer, algorithm, key, audience, kind, leeway_seconds)
    VALUES (add_issuer.issuer, add_issuer.algorithm,
            CASE WHEN add_issuer.algorithm <> 'HS256' THEN add_issuer.key END, add_issuer.audience,
            add_issuer.kind, add_issuer.leeway_seconds)
    ON CONFLICT (issuer) DO UPDATE
    SET algorithm = excluded.algorithm, key = excluded.key, audience = excluded.audience,
        kind = excluded.kind, leeway_seconds = excluded.leeway_seconds,
        changed_at = excluded.changed_at, changed_by = excluded.changed_by;
    DELETE FROM warden.issuer_secret s WHERE s.issuer = add_issuer.issuer;
    INSERT INTO warden.issuer_secret (issuer, secret)
    SELECT add_issuer.issuer, add_issuer.key WHERE add_issuer.algorithm = 'HS256';
END;
COMMENT ON FUNCTION warden.add_issuer(text, text, text, text, text, integer)
    IS 'Makes an issuer of tokens known, or replaces its entry. Sessions that are logged in stay so until their tokens expire.';
REVOKE ALL ON FUNCTION warden.add_issuer(text, text, text, text, text, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.add_issuer(text, text, text, text, text, integer) TO warden_admin;

CREATE FUNCTION warden.drop_issuer(issuer text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM warden.issuer_secret s WHERE s.issuer = drop_issuer.issuer;
    DELETE FROM warden.issuer i WHERE i.issuer = drop_issuer.issuer;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no issuer "%"', drop_issuer.issuer
            USING ERRCODE = 'undefined_object', HINT = 'warden.issuers lists them.';
    END IF;
END
$$;
COMMENT ON FUNCTION warden.drop_issuer(text)
    IS 'Removes an issuer: its tokens are refused from now on. Sessions that are logged in stay so until their tokens expire.';
REVOKE ALL ON FUNCTION warden.drop_issuer(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.drop_issuer(text) TO warden_admin;

-- Not STRICT: a NULL token is refused like any other bad one.
CREATE FUNCTION warden.login(token text) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'warden_login';
COMMENT ON FUNCTION warden.login(text)
    IS 'Gives this session the identity of a signed token (JWT) and returns its subject. Not undone by ROLLBACK. A token that is refused (SQLSTATE WA003) takes the former identity away.';

CREATE FUNCTION warden.logout() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'warden_logout';
COMMENT ON FUNCTION warden.logout()
    IS 'Forgets the identity of this session. A session that was an agent''s stays restricted as one until another token is accepted.';

CREATE FUNCTION warden.whoami(
    OUT actor text, OUT actor_kind text, OUT on_behalf_of text, OUT actor_groups text[],
    OUT trust text, OUT issuer text, OUT token_id text, OUT agent boolean,
    OUT session_role text, OUT effective_role text, OUT database text,
    OUT expires_at timestamptz, OUT expired boolean
) LANGUAGE c VOLATILE PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'warden_whoami';
COMMENT ON FUNCTION warden.whoami()
    IS 'Who acts in this session, how far that was checked, and whether the session is restricted as an AI agent''s';

GRANT EXECUTE ON FUNCTION warden.login(text), warden.logout(), warden.whoami() TO PUBLIC;
