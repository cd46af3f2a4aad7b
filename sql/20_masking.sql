CREATE FUNCTION warden.config_changed() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'warden_config_changed';
COMMENT ON FUNCTION warden.config_changed() IS 'Trigger of the configuration tables: every session reads them again before its next statement';
REVOKE ALL ON FUNCTION warden.config_changed() FROM PUBLIC;

CREATE TABLE warden.mask_policy (
    relation oid NOT NULL,
    attnum   smallint NOT NULL,
    function oid NOT NULL,
    PRIMARY KEY (relation, attnum)
);
COMMENT ON TABLE warden.mask_policy IS 'Masked columns by OID. Use warden.mask(); the view warden.masks shows names.';

CREATE TABLE warden.mask_exemption (
    role oid PRIMARY KEY
);
COMMENT ON TABLE warden.mask_exemption IS 'Roles whose members read what is stored. Use warden.unmask_for().';

CREATE TRIGGER config_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.mask_policy
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();
CREATE TRIGGER config_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.mask_exemption
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();
REVOKE ALL ON warden.mask_policy, warden.mask_exemption FROM PUBLIC;

CREATE VIEW warden.masks AS
    SELECT p.relation::regclass AS relation, a.attname AS column_name, p.function::regprocedure AS mask_function
    FROM warden.mask_policy p
    JOIN pg_catalog.pg_attribute a ON a.attrelid = p.relation AND a.attnum = p.attnum;
COMMENT ON VIEW warden.masks IS 'Masked columns and their mask functions';
CREATE VIEW warden.mask_exemptions AS
    SELECT role::regrole AS role FROM warden.mask_exemption;
COMMENT ON VIEW warden.mask_exemptions IS 'Roles whose members read what is stored; AI agents are masked all the same';
REVOKE ALL ON warden.masks, warden.mask_exemptions FROM PUBLIC;
GRANT SELECT ON warden.masks, warden.mask_exemptions TO warden_admin, warden_auditor;

CREATE FUNCTION warden.mask(relation regclass, column_name name, mask_function regproc DEFAULT 'warden.redact')
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind "char";
    att  pg_attribute;
    fn   pg_proc;
BEGIN
    SELECT c.relkind INTO kind FROM pg_class c WHERE c.oid = mask.relation;
    IF kind IS NULL OR kind NOT IN ('r', 'p', 'm', 'f') THEN
        RAISE EXCEPTION 'cannot mask a column of "%"', mask.relation
            USING ERRCODE = 'wrong_object_type',
                  DETAIL = 'It is not a table, partitioned table, materialized view or foreign table.',
                  HINT = 'Mask the table that a view reads from.';
    END IF;
    IF mask.relation::oid < 16384 THEN
        RAISE EXCEPTION 'cannot mask a column of a system catalog' USING ERRCODE = 'wrong_object_type';
    END IF;
    SELECT * INTO att FROM pg_attribute a
        WHERE a.attrelid = mask.relation AND a.attname = mask.column_name AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'column "%" of relation "%" does not exist', mask.column_name, mask.relation
            USING ERRCODE = 'undefined_column';
    END IF;
    SELECT * INTO fn FROM pg_proc p WHERE p.oid = mask.mask_function;
    IF fn.prokind <> 'f' OR fn.proretset OR fn.pronargs <> 1 OR fn.provolatile = 'v' THEN
        RAISE EXCEPTION 'function % cannot be a mask', mask.mask_function::regprocedure
            USING ERRCODE = 'wrong_object_type',
                  DETAIL = 'A mask takes one value, returns one value, and is not VOLATILE.';
    END IF;
    BEGIN
        -- Parsed only, never run.
        EXECUTE format('PREPARE warden_mask_check AS SELECT %s(NULL::%s)::%s', mask.mask_function,
                       format_type(att.atttypid, att.atttypmod), format_type(att.atttypid, att.atttypmod));
        EXECUTE 'DEALLOCATE warden_mask_check';
    EXCEPTION WHEN undefined_function OR cannot_coerce OR datatype_mismatch THEN
        RAISE EXCEPTION 'function % cannot mask a column of type %', mask.mask_function::regprocedure,
                        format_type(att.atttypid, att.atttypmod)
            USING ERRCODE = 'datatype_mismatch',
                  HINT = 'warden.mask_null masks a column of any type.';
    END;
    INSERT INTO warden.mask_policy VALUES (mask.relation, att.attnum, mask.mask_function)
        ON CONFLICT ON CONSTRAINT mask_policy_pkey DO UPDATE SET function = excluded.function;
END
$$;
COMMENT ON FUNCTION warden.mask(regclass, name, regproc)
    IS 'Everyone but members of exempt roles reads the mask of this column, wherever it is used';

CREATE FUNCTION warden.unmask(relation regclass, column_name name)
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM warden.mask_policy p USING pg_attribute a
        WHERE p.relation = unmask.relation AND a.attrelid = p.relation AND a.attnum = p.attnum
          AND a.attname = unmask.column_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'column "%" of relation "%" is not masked', unmask.column_name, unmask.relation
            USING ERRCODE = 'undefined_object';
    END IF;
END
$$;
COMMENT ON FUNCTION warden.unmask(regclass, name) IS 'Removes the mask of a column';

CREATE FUNCTION warden.unmask_for(VARIADIC roles regrole[])
    RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO warden.mask_exemption SELECT r::oid FROM unnest(roles) r ON CONFLICT DO NOTHING;
END;
COMMENT ON FUNCTION warden.unmask_for(regrole[])
    IS 'Members of these roles read what is stored; AI agents are masked all the same';

CREATE FUNCTION warden.remask_for(VARIADIC roles regrole[])
    RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    DELETE FROM warden.mask_exemption WHERE role IN (SELECT r::oid FROM unnest(roles) r);
END;
COMMENT ON FUNCTION warden.remask_for(regrole[]) IS 'Members of these roles read masks again';

REVOKE ALL ON FUNCTION warden.mask(regclass, name, regproc), warden.unmask(regclass, name),
    warden.unmask_for(regrole[]), warden.remask_for(regrole[]) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.mask(regclass, name, regproc), warden.unmask(regclass, name),
    warden.unmask_for(regrole[]), warden.remask_for(regrole[]) TO warden_admin;

CREATE FUNCTION warden.first_of_year(value date) RETURNS date
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN pg_catalog.make_date(EXTRACT(year FROM value)::integer, 1, 1);
COMMENT ON FUNCTION warden.first_of_year(date) IS 'Mask: the first day of the year of a date';
CREATE FUNCTION warden.zero(value numeric) RETURNS numeric
    LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
    RETURN 0::numeric;
COMMENT ON FUNCTION warden.zero(numeric) IS 'Mask: 0 for every number';
COMMENT ON FUNCTION warden.partial_email(text) IS 'Mask: the first letter and the domain''s ending: a***@***.com';
COMMENT ON FUNCTION warden.partial_phone(text) IS 'Mask: the last two digits of a telephone number';
COMMENT ON FUNCTION warden.partial_card(text) IS 'Mask: the last four digits of a card number';
COMMENT ON FUNCTION warden.redact(text) IS 'Mask: *** for every text';
COMMENT ON FUNCTION warden.mask_null(anyelement) IS 'Mask: NULL for a value of any type';
