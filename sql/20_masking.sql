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

CREATE FUNCTION warden.code_that_sees(relation regclass, attnum smallint)
    RETURNS TABLE (function regprocedure, used_by text, owner regrole)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH RECURSIVE family(oid) AS (
        SELECT code_that_sees.relation::oid
        UNION SELECT i.inhrelid FROM pg_inherits i JOIN family f ON f.oid = i.inhparent
    ), domains(oid, base) AS (
        SELECT t.oid, t.typbasetype FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE a.attrelid = code_that_sees.relation AND a.attnum = code_that_sees.attnum AND t.typtype = 'd'
        UNION SELECT t.oid, t.typbasetype FROM domains d JOIN pg_type t ON t.oid = d.base AND t.typtype = 'd'
    ), columns(attrelid, attnum) AS (
        SELECT m.attrelid, m.attnum FROM pg_attribute a, family f, pg_attribute m
        WHERE a.attrelid = code_that_sees.relation AND a.attnum = code_that_sees.attnum
          AND m.attrelid = f.oid AND m.attname = a.attname
    ), users(classid, objid) AS (
        -- Constraints, indexes, generated columns and statistics: of the column, or of the whole row.
        SELECT d.classid, d.objid FROM columns c JOIN pg_depend d
            ON d.refclassid = 'pg_class'::regclass AND d.refobjid = c.attrelid AND d.refobjsubid IN (0, c.attnum)
        WHERE d.classid IN ('pg_constraint'::regclass, 'pg_class'::regclass, 'pg_attrdef'::regclass,
                            'pg_statistic_ext'::regclass)
        -- Policies depend on their table in any case.
        UNION SELECT d.classid, d.objid FROM columns c JOIN pg_depend d
            ON d.refclassid = 'pg_class'::regclass AND d.refobjid = c.attrelid AND d.refobjsubid IN (0, c.attnum)
        WHERE d.classid = 'pg_policy'::regclass
          AND (d.refobjsubid > 0 OR NOT EXISTS (
                  SELECT FROM pg_depend o WHERE o.classid = d.classid AND o.objid = d.objid
                    AND o.refclassid = d.refclassid AND o.refobjid = d.refobjid AND o.refobjsubid > 0))
        UNION SELECT 'pg_constraint'::regclass, k.oid FROM domains d JOIN pg_constraint k ON k.contypid = d.oid
    ), seen(function, classid, objid) AS (
        SELECT t.tgfoid, 'pg_trigger'::regclass::oid, t.oid FROM family f JOIN pg_trigger t ON t.tgrelid = f.oid
        WHERE t.tgtype & 1 = 1 OR t.tgoldtable IS NOT NULL OR t.tgnewtable IS NOT NULL
        UNION SELECT d.refobjid, u.classid, u.objid FROM users u JOIN pg_depend d USING (classid, objid)
        WHERE d.refclassid = 'pg_proc'::regclass
        UNION SELECT o.oprcode, u.classid, u.objid FROM users u JOIN pg_depend d USING (classid, objid)
        JOIN pg_operator o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
    )
    SELECT x.function::regprocedure, x.used_by, x.owner::regrole
    FROM (SELECT p.oid, pg_describe_object(s.classid, s.objid, 0), p.proowner
          FROM seen s JOIN pg_proc p ON p.oid = s.function
          -- Rules hand on what others write; they are the table owner's.
          UNION ALL SELECT NULL, pg_describe_object('pg_rewrite'::regclass, w.oid, 0), c.relowner
          FROM family f JOIN pg_rewrite w ON w.ev_class = f.oid JOIN pg_class c ON c.oid = f.oid
          WHERE w.rulename <> '_RETURN') x (function, used_by, owner)
    JOIN pg_roles r ON r.oid = x.owner
    WHERE NOT r.rolsuper
      AND NOT EXISTS (SELECT FROM warden.mask_exemption e WHERE pg_has_role(x.owner, warden.reference_oid(e.role), 'USAGE'))
    ORDER BY 2, 1;
END;
COMMENT ON FUNCTION warden.code_that_sees(regclass, smallint)
    IS 'What hands what is stored in a column to functions of roles which read masks: triggers, constraints, indexes, generated columns, statistics, policies; and such roles'' rules';
REVOKE ALL ON FUNCTION warden.code_that_sees(regclass, smallint) FROM PUBLIC;

CREATE FUNCTION warden.mask(relation regclass, column_name name, mask_function regproc DEFAULT 'warden.redact')
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    kind "char";
    att  pg_attribute;
    fn   pg_proc;
    code record;
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
    SELECT * INTO code FROM warden.code_that_sees(mask.relation, att.attnum) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'column "%" of "%" cannot be masked: % would see what is stored', mask.column_name, mask.relation, code.used_by
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = format('%s belongs to role %s, which would read masks.', coalesce('Its function ' || code.function::text, 'It'), code.owner),
                  HINT = 'Give it to a role that warden.unmask_for() exempts, or drop it. warden.code_that_sees() lists all.';
    END IF;
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
