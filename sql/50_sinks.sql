-- Sinks: where the ledger is shipped to, and how far each has got.

CREATE TABLE warden.sink (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    url text NOT NULL,
    has_query boolean NOT NULL DEFAULT false,
    enabled boolean NOT NULL DEFAULT true,
    batch_events integer NOT NULL DEFAULT 500,
    batch_bytes integer NOT NULL DEFAULT 1000000,
    ship_from timestamptz NOT NULL DEFAULT '-infinity',
    resumed_at timestamptz NOT NULL DEFAULT '-infinity',
    created_at timestamptz NOT NULL DEFAULT pg_catalog.now(),
    created_by text NOT NULL DEFAULT session_user,
    CONSTRAINT sink_name_is_short CHECK (pg_catalog.octet_length(name) BETWEEN 1 AND 63),
    CONSTRAINT sink_batch_events_in_range CHECK (batch_events BETWEEN 1 AND 10000),
    CONSTRAINT sink_batch_bytes_in_range CHECK (batch_bytes BETWEEN 1000 AND 50000000)
);
CREATE UNIQUE INDEX sink_file_is_unique ON warden.sink (url) WHERE url LIKE 'file:%';
REVOKE ALL ON warden.sink FROM PUBLIC;
COMMENT ON TABLE warden.sink IS 'Where the ledger is shipped to. Changed by warden.add_sink and its siblings, shown by warden.sink_status';
COMMENT ON COLUMN warden.sink.url IS 'http or https URL without credentials and query string, or file:NAME for a file in warden.file_sink_directory';
COMMENT ON COLUMN warden.sink.has_query IS 'The URL has a query string: it is in warden.sink_here';
COMMENT ON COLUMN warden.sink.batch_events IS 'Most events in one request';
COMMENT ON COLUMN warden.sink.batch_bytes IS 'Most bytes in one request; an event that is longer goes alone';
COMMENT ON COLUMN warden.sink.ship_from IS 'Shipping starts at the first event that is not older';
COMMENT ON COLUMN warden.sink.resumed_at IS 'A wait after a failure before this time is over';

-- Rewritten with every batch: free space lets the new version stay on its page. Only the shipper
-- writes it, rows of new and dropped sinks included, so it has no foreign key.
CREATE TABLE warden.sink_cursor (
    sink bigint PRIMARY KEY,
    delivered_seq bigint NOT NULL DEFAULT 0,
    attempted_seq bigint NOT NULL DEFAULT 0,
    sent bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    failures integer NOT NULL DEFAULT 0,
    last_success timestamptz,
    last_failure timestamptz,
    last_error text,
    next_retry timestamptz
) WITH (fillfactor = 50);
REVOKE ALL ON warden.sink_cursor FROM PUBLIC;
COMMENT ON TABLE warden.sink_cursor IS 'How far each sink has got. Only the shipper writes it: after an acknowledgement, never before';
COMMENT ON COLUMN warden.sink_cursor.delivered_seq IS 'The sink has acknowledged every event up to this one';
COMMENT ON COLUMN warden.sink_cursor.attempted_seq IS 'Last event of the batch that was sent last';
COMMENT ON COLUMN warden.sink_cursor.sent IS 'Events acknowledged';
COMMENT ON COLUMN warden.sink_cursor.failed IS 'Requests that failed';
COMMENT ON COLUMN warden.sink_cursor.failures IS 'Requests that failed in a row; 0 after a success';

-- A restored copy of a database must not ship to where the original does, before somebody says so. And
-- a query string may hold a token.
CREATE TABLE warden.sink_here (
    sink bigint PRIMARY KEY,
    query text NOT NULL DEFAULT ''
);
REVOKE ALL ON warden.sink_here FROM PUBLIC;
COMMENT ON TABLE warden.sink_here IS 'Sinks to which this database ships, with the query strings of their URLs. No dump holds it: a restored sink waits for warden.enable_sink()';

-- A dump carries the configuration, but not the cursors: they belong to this ledger.
SELECT pg_catalog.pg_extension_config_dump('warden.sink', '');
SELECT pg_catalog.pg_extension_config_dump('warden.sink_id_seq', '');

CREATE TRIGGER config_changed
    AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON warden.sink
    FOR EACH STATEMENT EXECUTE FUNCTION warden.config_changed();
ALTER TABLE warden.sink ENABLE ALWAYS TRIGGER config_changed;

CREATE FUNCTION warden.sink_address(url text) RETURNS text
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'sink_address_wrapper';
CREATE FUNCTION warden.wake_shipper() RETURNS void
    LANGUAGE c AS 'MODULE_PATHNAME', 'wake_shipper_wrapper';
COMMENT ON FUNCTION warden.sink_address(text) IS 'Checks the address of a sink and returns it in its normal form';
COMMENT ON FUNCTION warden.wake_shipper() IS 'Lets the shipper look at its sinks when the transaction has committed';
REVOKE ALL ON FUNCTION warden.sink_address(text), warden.wake_shipper() FROM PUBLIC;

CREATE FUNCTION warden.add_sink(
    name text, url text, batch_events integer DEFAULT 500, batch_bytes integer DEFAULT 1000000,
    from_now boolean DEFAULT false)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    address text;
BEGIN
    IF coalesce(octet_length(add_sink.name), 0) NOT BETWEEN 1 AND 63 THEN
        RAISE EXCEPTION 'sink name must have 1 to 63 bytes'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF add_sink.url IS NULL THEN
        RAISE EXCEPTION 'sink URL must not be null'
            USING ERRCODE = 'null_value_not_allowed',
                  HINT = 'Use https://host[:port]/path, http://host[:port]/path or file:NAME.';
    END IF;
    IF coalesce(add_sink.batch_events, 0) NOT BETWEEN 1 AND 10000 THEN
        RAISE EXCEPTION 'batch_events must be between 1 and 10000'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF coalesce(add_sink.batch_bytes, 0) NOT BETWEEN 1000 AND 50000000 THEN
        RAISE EXCEPTION 'batch_bytes must be between 1000 and 50000000'
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    address := warden.sink_address(add_sink.url);
    IF EXISTS (SELECT FROM warden.sink s WHERE s.name = add_sink.name) THEN
        RAISE EXCEPTION 'sink "%" already exists', add_sink.name
            USING ERRCODE = 'duplicate_object',
                  HINT = 'Use another name, or remove it with warden.drop_sink.';
    END IF;
    IF address LIKE 'file:%' AND EXISTS (SELECT FROM warden.sink s WHERE s.url = address) THEN
        RAISE EXCEPTION 'another sink already writes to "%"', address
            USING ERRCODE = 'duplicate_object', HINT = 'Use another file name.';
    END IF;
    WITH s AS (
        INSERT INTO warden.sink (name, url, has_query, batch_events, batch_bytes, ship_from)
            VALUES (add_sink.name, split_part(address, '?', 1), strpos(address, '?') > 0,
                add_sink.batch_events, add_sink.batch_bytes,
                CASE WHEN add_sink.from_now THEN clock_timestamp() ELSE '-infinity' END)
            RETURNING id
    )
    INSERT INTO warden.sink_here (sink, query)
        SELECT s.id, substr(address, length(split_part(address, '?', 1)) + 1) FROM s;
    PERFORM warden.wake_shipper();
END
$$;
COMMENT ON FUNCTION warden.add_sink(text, text, integer, integer, boolean) IS
    'Ships the ledger to a URL (http, https, or file:NAME): from its beginning, or from_now. At least once, in order';

CREATE FUNCTION warden.drop_sink(name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM warden.sink_here h USING warden.sink s WHERE s.id = h.sink AND s.name = drop_sink.name;
    DELETE FROM warden.sink s WHERE s.name = drop_sink.name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'sink "%" does not exist', drop_sink.name
            USING ERRCODE = 'undefined_object', HINT = 'warden.sink_status shows the sinks.';
    END IF;
    PERFORM warden.wake_shipper();
END
$$;
COMMENT ON FUNCTION warden.drop_sink(text) IS 'Stops shipping to a sink and forgets how far it had got';

CREATE FUNCTION warden.enable_sink(name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF EXISTS (
        SELECT FROM warden.sink s WHERE s.name = enable_sink.name AND s.has_query
           AND NOT EXISTS (SELECT FROM warden.sink_here h WHERE h.sink = s.id)
    ) THEN
        RAISE EXCEPTION 'the query string of the URL of sink "%" is missing', enable_sink.name
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'A dump does not carry it: it may hold a token.',
                  HINT = 'Remove the sink with warden.drop_sink, and add it again.';
    END IF;
    INSERT INTO warden.sink_here (sink) SELECT s.id FROM warden.sink s WHERE s.name = enable_sink.name
        ON CONFLICT DO NOTHING;
    UPDATE warden.sink s SET enabled = true, resumed_at = clock_timestamp()
        WHERE s.name = enable_sink.name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'sink "%" does not exist', enable_sink.name
            USING ERRCODE = 'undefined_object', HINT = 'warden.sink_status shows the sinks.';
    END IF;
    PERFORM warden.wake_shipper();
END
$$;
COMMENT ON FUNCTION warden.enable_sink(text) IS
    'Goes on shipping to a sink where it had stopped; a sink that waits after a failure is tried at once';

CREATE FUNCTION warden.disable_sink(name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE warden.sink s SET enabled = false WHERE s.name = disable_sink.name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'sink "%" does not exist', disable_sink.name
            USING ERRCODE = 'undefined_object', HINT = 'warden.sink_status shows the sinks.';
    END IF;
END
$$;
COMMENT ON FUNCTION warden.disable_sink(text) IS 'Pauses shipping to a sink; nothing is lost meanwhile';

REVOKE ALL ON FUNCTION
    warden.add_sink(text, text, integer, integer, boolean), warden.drop_sink(text),
    warden.enable_sink(text), warden.disable_sink(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    warden.add_sink(text, text, integer, integer, boolean), warden.drop_sink(text),
    warden.enable_sink(text), warden.disable_sink(text) TO warden_admin;

CREATE VIEW warden.sink_status AS
SELECT
    s.name,
    CASE WHEN s.has_query THEN s.url || '?...' ELSE s.url END AS url,
    CASE WHEN NOT s.enabled THEN 'disabled'
        WHEN here.sink IS NULL THEN 'restored'
        WHEN coalesce(c.failures, 0) > 0 THEN 'retrying'
        WHEN h.seq > coalesce(c.delivered_seq, 0) THEN 'shipping'
        ELSE 'up to date' END AS state,
    coalesce(c.delivered_seq, 0) AS delivered_seq,
    greatest(h.seq - coalesce(c.delivered_seq, 0), 0) AS lag_events,
    o.at AS oldest_unacknowledged,
    coalesce(c.sent, 0) AS sent,
    coalesce(c.failed, 0) AS failed,
    c.last_error,
    c.last_failure,
    c.last_success,
    c.next_retry
FROM warden.sink s
LEFT JOIN warden.sink_cursor c ON c.sink = s.id
LEFT JOIN warden.sink_here here ON here.sink = s.id
CROSS JOIN (SELECT coalesce((SELECT e.seq FROM warden.event e ORDER BY e.seq DESC LIMIT 1), 0) AS seq) h
LEFT JOIN LATERAL (
    SELECT e.at FROM warden.event e WHERE e.seq > coalesce(c.delivered_seq, 0) ORDER BY e.seq LIMIT 1
) o ON true
ORDER BY s.name;
REVOKE ALL ON warden.sink_status FROM PUBLIC;
GRANT SELECT ON warden.sink_status TO warden_auditor, warden_admin;
COMMENT ON VIEW warden.sink_status IS 'One row a sink: how far it has got, what it lacks, and why';
COMMENT ON COLUMN warden.sink_status.url IS 'Where to; a query string is not shown';
COMMENT ON COLUMN warden.sink_status.state IS 'disabled, restored (from a dump: it waits for warden.enable_sink), retrying, shipping or up to date';
COMMENT ON COLUMN warden.sink_status.delivered_seq IS 'The sink has acknowledged every event up to this one';
COMMENT ON COLUMN warden.sink_status.lag_events IS 'Events in the ledger that the sink has not acknowledged';
COMMENT ON COLUMN warden.sink_status.oldest_unacknowledged IS 'When the first of them happened';
COMMENT ON COLUMN warden.sink_status.sent IS 'Events acknowledged';
COMMENT ON COLUMN warden.sink_status.failed IS 'Requests that failed';
COMMENT ON COLUMN warden.sink_status.last_error IS 'Why the last of them failed; last_success tells whether that is over';
COMMENT ON COLUMN warden.sink_status.next_retry IS 'When the sink is tried again; null if nothing failed';

COMMENT ON FUNCTION warden.version() IS 'The version of the library that is loaded';
