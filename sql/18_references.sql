-- What the configuration refers to. Kept by OID, so that it follows what is renamed; printed, dumped and
-- read by name, so that it finds its object in another database.

CREATE TYPE warden.reference;
CREATE FUNCTION warden.reference_in(cstring) RETURNS warden.reference
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_in_wrapper';
CREATE FUNCTION warden.reference_out(warden.reference) RETURNS cstring
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_out_wrapper';
CREATE FUNCTION warden.reference_send(warden.reference) RETURNS bytea
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_send_wrapper';
CREATE TYPE warden.reference (
    INPUT = warden.reference_in, OUTPUT = warden.reference_out, SEND = warden.reference_send,
    LIKE = pg_catalog.bytea
);
COMMENT ON TYPE warden.reference IS
    'A relation, column, function or role that the configuration refers to: column public.customer.email';
COMMENT ON FUNCTION warden.reference_in(cstring) IS 'Input of warden.reference; what does not exist is kept by name, and looked up again later';
COMMENT ON FUNCTION warden.reference_out(warden.reference) IS 'Output of warden.reference: the names as they are now';
COMMENT ON FUNCTION warden.reference_send(warden.reference) IS 'Binary output of warden.reference: the names as they are now';

CREATE FUNCTION warden.reference_to(relation regclass) RETURNS warden.reference
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_to_relation_wrapper';
CREATE FUNCTION warden.reference_to(relation regclass, column_name name) RETURNS warden.reference
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_to_column_wrapper';
CREATE FUNCTION warden.reference_to(function regprocedure) RETURNS warden.reference
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_to_function_wrapper';
CREATE FUNCTION warden.reference_to(role regrole) RETURNS warden.reference
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_to_role_wrapper';
COMMENT ON FUNCTION warden.reference_to(regclass) IS 'A reference to a relation';
COMMENT ON FUNCTION warden.reference_to(regclass, name) IS 'A reference to a column, by name if it does not exist';
COMMENT ON FUNCTION warden.reference_to(regprocedure) IS 'A reference to a function of one argument';
COMMENT ON FUNCTION warden.reference_to(regrole) IS 'A reference to a role';

CREATE FUNCTION warden.reference_oid(warden.reference) RETURNS oid
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_oid_wrapper';
CREATE FUNCTION warden.reference_column(warden.reference) RETURNS smallint
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'reference_column_wrapper';
COMMENT ON FUNCTION warden.reference_oid(warden.reference) IS 'OID of the object, of a column the relation''s; NULL if it does not exist';
COMMENT ON FUNCTION warden.reference_column(warden.reference) IS 'Number of the column; NULL if it does not exist, or is none';
REVOKE ALL ON TYPE warden.reference FROM PUBLIC;
REVOKE ALL ON FUNCTION
    warden.reference_in(cstring), warden.reference_out(warden.reference), warden.reference_send(warden.reference),
    warden.reference_to(regclass), warden.reference_to(regclass, name), warden.reference_to(regprocedure),
    warden.reference_to(regrole), warden.reference_oid(warden.reference), warden.reference_column(warden.reference)
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.reference_oid(warden.reference), warden.reference_column(warden.reference)
    TO warden_admin, warden_auditor;
