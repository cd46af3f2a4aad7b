-- How the journal does.

CREATE FUNCTION warden.journal_status()
    RETURNS TABLE (
        written bigint, consumed bigint, flushed bigint, unread_bytes bigint, size_bytes bigint,
        syncs bigint, waits bigint, failures bigint, failing boolean)
    LANGUAGE c STRICT AS 'MODULE_PATHNAME', 'journal_status_wrapper';
COMMENT ON FUNCTION warden.journal_status() IS
    'One row: positions written, read by every recorder, and on disk (flushed counts only under warden.durability other than written); bytes unread, and allowed; since server start: fdatasync calls, waits for one, failures; and whether the last one failed';
REVOKE ALL ON FUNCTION warden.journal_status() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.journal_status() TO warden_auditor, warden_admin;
