CREATE FUNCTION warden.config_changed() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'warden_config_changed';
COMMENT ON FUNCTION warden.config_changed() IS 'Trigger of the configuration tables: every session reads them again before its next statement';
REVOKE ALL ON FUNCTION warden.config_changed() FROM PUBLIC;

CREATE TABLE warden.mask_policy (
    target   warden.reference NOT NULL,
    function warden.reference NOT NULL
);
COMMENT ON TABLE warden.mask_policy IS 'Masked columns. Use warden.mask(), and the view warden.masks.';
COMMENT ON COLUMN warden.mask_policy.target IS 'The column; of one that does not exist, the relation cannot be read';
COMMENT ON COLUMN warden.mask_policy.function IS 'The mask; of one that does not exist, the column reads as NULL';

CREATE TABLE warden.mask_exemption (
    role warden.reference NOT NULL
);
COMMENT ON TABLE warden.mask_exemption IS 'Roles whose members read what is stored. Use warden.unmask_for().';

-- A dump carries them by name, but not what is gone.
SELECT pg_catalog.pg_extension_config_dump('warden.mask_policy', $$WHERE target::text <> 'gone'$$);
SELECT pg_catalog.pg_extension_config_dump('warden.mask_exemption', $$WHERE role::text <> 'gone'$$);

CREATE TRIGGER config_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.mask_policy
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();
CREATE TRIGGER config_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.mask_exemption
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();
-- Whatever session_replication_role says.
ALTER TABLE warden.mask_policy ENABLE ALWAYS TRIGGER config_changed;
ALTER TABLE warden.mask_exemption ENABLE ALWAYS TRIGGER config_changed;
REVOKE ALL ON warden.mask_policy, warden.mask_exemption FROM PUBLIC;

CREATE VIEW warden.masks AS
    SELECT warden.reference_oid(p.target)::regclass AS relation,
           a.attname AS column_name,
           warden.reference_oid(p.function)::regprocedure AS mask_function,
           CASE WHEN a.attname IS NULL
                    THEN p.target::text || ' does not exist: its relation, if there is one, cannot be read'
                WHEN warden.reference_oid(p.function) IS NULL
                    THEN p.function::text || ' does not exist: the column reads as NULL'
           END AS problem
    FROM warden.mask_policy p
    LEFT JOIN pg_catalog.pg_attribute a
        ON a.attrelid = warden.reference_oid(p.target) AND a.attnum = warden.reference_column(p.target)
    WHERE p.target::text <> 'gone';
COMMENT ON VIEW warden.masks IS 'Masked columns and their mask functions';
COMMENT ON COLUMN warden.masks.problem IS 'What a restored mask refers to and is not there, and what follows; NULL if all is well';
CREATE VIEW warden.mask_exemptions AS
    SELECT warden.reference_oid(e.role)::regrole AS role FROM warden.mask_exemption e
    WHERE warden.reference_oid(e.role) IS NOT NULL;
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
    -- One at a time: there is no key that a reference by name and one by OID have in common.
    LOCK TABLE warden.mask_policy IN SHARE ROW EXCLUSIVE MODE;
    UPDATE warden.mask_policy p SET function = warden.reference_to(mask.mask_function::regprocedure)
        WHERE p.target::text = warden.reference_to(mask.relation, mask.column_name)::text;
    IF NOT FOUND THEN
        INSERT INTO warden.mask_policy (target, function)
        VALUES (warden.reference_to(mask.relation, mask.column_name),
                warden.reference_to(mask.mask_function::regprocedure));
    END IF;
END
$$;
COMMENT ON FUNCTION warden.mask(regclass, name, regproc)
    IS 'Everyone but members of exempt roles reads the mask of this column, wherever it is used';

CREATE FUNCTION warden.unmask(relation regclass, column_name name)
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    -- By name: the mask of a column that does not exist can be removed as well.
    DELETE FROM warden.mask_policy p
        WHERE p.target::text = warden.reference_to(unmask.relation, unmask.column_name)::text;
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
    INSERT INTO warden.mask_exemption
    SELECT warden.reference_to(r) FROM (SELECT DISTINCT u AS r FROM unnest(roles) u) x
    WHERE NOT EXISTS (SELECT FROM warden.mask_exemption e WHERE warden.reference_oid(e.role) = r);
END;
COMMENT ON FUNCTION warden.unmask_for(regrole[])
    IS 'Members of these roles read what is stored; AI agents are masked all the same';

CREATE FUNCTION warden.remask_for(VARIADIC roles regrole[])
    RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    DELETE FROM warden.mask_exemption e WHERE warden.reference_oid(e.role) IN (SELECT r::oid FROM unnest(roles) r);
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
