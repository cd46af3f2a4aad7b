-- The ledger: events, what projects them, and the recorder's place in the journal.
-- Only the recorder writes here. No role holds INSERT, UPDATE, DELETE or TRUNCATE.

-- In an order that needs no padding: there are many of them.
CREATE TABLE warden.event (
    seq bigint NOT NULL,
    at timestamptz NOT NULL,
    session bigint NOT NULL,
    statement bigint NOT NULL,
    rows bigint NOT NULL,
    duration_us bigint NOT NULL,
    flags integer NOT NULL,
    kind smallint NOT NULL,
    outcome smallint NOT NULL,
    payload bytea NOT NULL,
    hash bytea NOT NULL,
    PRIMARY KEY (seq)
) PARTITION BY RANGE (seq);
CREATE INDEX event_at_idx ON warden.event USING brin (at) WITH (autosummarize = on);
COMMENT ON TABLE warden.event IS 'The ledger: one row an event, chained by hash. Written by the recorder only.';
COMMENT ON COLUMN warden.event.seq IS 'Place in the chain, from 1, without holes';
COMMENT ON COLUMN warden.event.at IS 'When it happened; a statement: when it started';
COMMENT ON COLUMN warden.event.kind IS '1 session, 2 statement, 3 execution, 4 gap, 5 boot, 6 transaction, 7 connection';
COMMENT ON COLUMN warden.event.session IS 'seq of the session event, or 0';
COMMENT ON COLUMN warden.event.statement IS 'seq of the statement event, or 0';
COMMENT ON COLUMN warden.event.rows IS 'Rows returned or affected, or -1';
COMMENT ON COLUMN warden.event.duration_us IS 'Microseconds, or -1';
COMMENT ON COLUMN warden.event.outcome IS '0 succeeded, 1 failed, 2 blocked, 3 interrupted';
COMMENT ON COLUMN warden.event.flags IS '1 nested, 2 utility, 4 masked, 8 partial, 16 background, 32 committed, 64 rolled back';
COMMENT ON COLUMN warden.event.payload IS 'Details, as warden.event_detail() shows them';
COMMENT ON COLUMN warden.event.hash IS 'SHA-256 over the hash before it and this event';

-- Events 1 to 2^24. The recorder adds the next partitions before they are needed.
CREATE TABLE warden.event_p00000 PARTITION OF warden.event FOR VALUES FROM (1) TO (16777217);
COMMENT ON TABLE warden.event_p00000 IS 'Events 1 to 16777216 of the ledger';

CREATE TABLE warden.session (
    id bigint PRIMARY KEY,
    key bigint NOT NULL,
    backend bigint NOT NULL,
    pid integer NOT NULL,
    backend_start timestamptz NOT NULL,
    database text NOT NULL,
    login_role text NOT NULL,
    effective_role text NOT NULL,
    client_addr inet,
    client_port integer NOT NULL,
    application_name text NOT NULL,
    actor text NOT NULL,
    actor_kind text NOT NULL,
    on_behalf_of text NOT NULL,
    actor_groups text[] NOT NULL,
    trust text NOT NULL,
    issuer text NOT NULL,
    token_id text NOT NULL
);
CREATE INDEX session_key_idx ON warden.session (key);
COMMENT ON TABLE warden.session IS 'Projection of session events: who worked from where, until a role or the actor changed';
COMMENT ON COLUMN warden.session.id IS 'seq of the session event';
COMMENT ON COLUMN warden.session.key IS 'Key of the facts in the journal';
COMMENT ON COLUMN warden.session.backend IS 'Random number of the backend: the same for all facts of a connection';
COMMENT ON COLUMN warden.session.login_role IS 'session_user';
COMMENT ON COLUMN warden.session.effective_role IS 'current_user';
COMMENT ON COLUMN warden.session.trust IS 'How far the identity was checked: role or verified';

CREATE TABLE warden.statement (
    id bigint PRIMARY KEY,
    key bigint NOT NULL,
    command text NOT NULL,
    text text NOT NULL,
    fingerprint text NOT NULL,
    relations jsonb NOT NULL,
    masked jsonb NOT NULL,
    full_length bigint,
    digest bytea,
    functions text[] NOT NULL
);
CREATE INDEX statement_key_idx ON warden.statement (key);
COMMENT ON TABLE warden.statement IS 'Projection of statement events: what was asked, without literals';
COMMENT ON COLUMN warden.statement.id IS 'seq of the statement event';
COMMENT ON COLUMN warden.statement.key IS 'Key of the shape in the journal';
COMMENT ON COLUMN warden.statement.text IS 'Statement with $n in place of literals';
COMMENT ON COLUMN warden.statement.fingerprint IS 'pg_query fingerprint: the same on every server version; empty if the text cannot be parsed';
COMMENT ON COLUMN warden.statement.relations IS 'Relations and columns, by kind of access';
COMMENT ON COLUMN warden.statement.masked IS 'Columns that were masked, and by which function';
COMMENT ON COLUMN warden.statement.full_length IS 'Bytes of the text before it was cut; NULL if it was not';
COMMENT ON COLUMN warden.statement.digest IS 'SHA-256 of the whole text, if it was cut';
COMMENT ON COLUMN warden.statement.functions IS 'Functions that it calls by name: users'', and those of PostgreSQL that reach files, large objects, settings, sessions or the server';

CREATE TABLE warden.transaction (
    id bigint PRIMARY KEY,
    xid bigint NOT NULL,
    committed boolean NOT NULL,
    unknown_from bigint NOT NULL,
    rolled_back int8multirange NOT NULL
);
CREATE INDEX transaction_xid_idx ON warden.transaction (xid);
COMMENT ON TABLE warden.transaction IS 'Projection of transaction events: what became of transactions that ended after their statements were in the ledger';
COMMENT ON COLUMN warden.transaction.id IS 'seq of the transaction event';
COMMENT ON COLUMN warden.transaction.xid IS 'Full transaction id, as of pg_current_xact_id()';
COMMENT ON COLUMN warden.transaction.unknown_from IS 'Of subtransactions from this one on it is not known whether they were rolled back; 0 if of all';
COMMENT ON COLUMN warden.transaction.rolled_back IS 'Numbers of subtransactions that were rolled back';

CREATE TABLE warden.journal_position (
    position bigint NOT NULL,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    start bigint NOT NULL
) WITH (fillfactor = 10);
COMMENT ON TABLE warden.journal_position IS 'One row: how far the recorder has read the journal, and the end of the chain';
COMMENT ON COLUMN warden.journal_position.position IS 'Journal position after the last frame recorded';
COMMENT ON COLUMN warden.journal_position.seq IS 'seq of the last event';
COMMENT ON COLUMN warden.journal_position.hash IS 'hash of the last event';
COMMENT ON COLUMN warden.journal_position.start IS 'Journal position at which this ledger began';
-- What the journal holds from an earlier ledger of this database does not belong to this one.
CREATE FUNCTION warden.ledger_begin() RETURNS void
    LANGUAGE c AS 'MODULE_PATHNAME', 'ledger_begin_wrapper';
SELECT warden.ledger_begin();
DROP FUNCTION warden.ledger_begin();

CREATE TABLE warden.ledger_origin (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    seq bigint NOT NULL,
    system bigint NOT NULL,
    timeline integer NOT NULL,
    journal bigint NOT NULL,
    server_version integer NOT NULL,
    since timestamptz NOT NULL DEFAULT pg_catalog.now()
);
COMMENT ON TABLE warden.ledger_origin IS 'Where the ledger was written: one row for the beginning, and one for each pg_upgrade, restored backup, promoted standby or new journal';
COMMENT ON COLUMN warden.ledger_origin.seq IS 'First event that was written there; after a move, a gap event that says so';
COMMENT ON COLUMN warden.ledger_origin.system IS 'System identifier of the cluster';
COMMENT ON COLUMN warden.ledger_origin.timeline IS 'Timeline of the cluster';
COMMENT ON COLUMN warden.ledger_origin.journal IS 'Random number of the journal';

CREATE TABLE warden.connection_event (
    id bigint PRIMARY KEY,
    at timestamptz NOT NULL,
    event text NOT NULL,
    backend bigint NOT NULL,
    pid integer NOT NULL,
    kind text NOT NULL,
    database text NOT NULL,
    role text NOT NULL,
    client_addr inet,
    client_port integer NOT NULL,
    application_name text NOT NULL,
    tls boolean NOT NULL,
    method text NOT NULL,
    identity text NOT NULL,
    sqlstate text NOT NULL,
    reason text NOT NULL,
    count bigint NOT NULL,
    duration_us bigint NOT NULL,
    ended text NOT NULL
);
CREATE INDEX connection_event_backend_idx ON warden.connection_event (backend);
CREATE INDEX connection_event_event_idx ON warden.connection_event (event, id);
COMMENT ON TABLE warden.connection_event IS 'Projection of connection and boot events: who connected, was refused or left, and when the server started';
COMMENT ON COLUMN warden.connection_event.id IS 'seq of the event';
COMMENT ON COLUMN warden.connection_event.event IS 'connected, refused, disconnected; started: the server has';
COMMENT ON COLUMN warden.connection_event.backend IS 'Random number of the backend, as in warden.session; 0 if refused';

CREATE TABLE warden.journal_pending (
    position bigint PRIMARY KEY,
    frame bytea NOT NULL
);
COMMENT ON TABLE warden.journal_pending IS 'Statements that have begun and whose end the recorder has not read yet';

CREATE TABLE warden.journal_transaction (
    xid bigint PRIMARY KEY,
    frame bytea NOT NULL
);
COMMENT ON TABLE warden.journal_transaction IS 'Transactions that have not ended, and whose statements are in the ledger';

CREATE FUNCTION warden.event_detail(kind smallint, payload bytea) RETURNS jsonb
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'event_detail_wrapper';
COMMENT ON FUNCTION warden.event_detail(smallint, bytea) IS 'Details of a ledger event, as JSON';

CREATE FUNCTION warden.journal_append_cost(frames integer DEFAULT 100000) RETURNS double precision
    LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'journal_append_cost_wrapper';
COMMENT ON FUNCTION warden.journal_append_cost(integer) IS 'Nanoseconds that an append to the journal takes on this machine; what it appends belongs to no ledger. For superusers';
REVOKE ALL ON FUNCTION warden.journal_append_cost(integer) FROM PUBLIC;

CREATE FUNCTION warden.value_digest(value text) RETURNS text
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'value_digest_wrapper';
COMMENT ON FUNCTION warden.value_digest(text) IS 'The digest under which this value is recorded, to search warden.activity.parameters for it';

CREATE FUNCTION warden.verify(from_seq bigint DEFAULT 1, to_seq bigint DEFAULT NULL)
    RETURNS TABLE (ok boolean, checked bigint, first_bad bigint, problem text)
    LANGUAGE c VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'ledger_verify_wrapper';
COMMENT ON FUNCTION warden.verify(bigint, bigint) IS 'Walks the hash chain and the projections of the ledger, and names the first event that is not what was recorded';

CREATE VIEW warden.activity AS
SELECT e.seq,
       e.at,
       s.actor,
       s.actor_kind,
       NULLIF(s.on_behalf_of, '') AS on_behalf_of,
       s.trust,
       s.login_role,
       s.effective_role,
       s.database,
       s.client_addr,
       s.application_name,
       s.pid,
       q.command,
       q.text AS query,
       ARRAY(SELECT DISTINCT pg_catalog.concat_ws('.', NULLIF(a ->> 'schema', ''), a ->> 'relation')
             FROM pg_catalog.jsonb_array_elements(q.relations) a ORDER BY 1) AS relations,
       q.relations AS columns,
       q.functions,
       NULLIF(e.rows, -1) AS rows,
       NULLIF(e.duration_us, -1) AS duration_us,
       NULLIF(e.duration_us, -1) * interval '1 microsecond' AS duration,
       CASE e.outcome WHEN 0 THEN 'succeeded' WHEN 1 THEN 'failed' WHEN 2 THEN 'blocked'
                      WHEN 3 THEN 'interrupted' END AS outcome,
       NULLIF(d.detail ->> 'sqlstate', '') AS sqlstate,
       CASE WHEN e.flags & 32 <> 0 THEN true
            WHEN e.flags & 64 <> 0 THEN false
            WHEN d.xid IS NOT NULL THEN (
                SELECT CASE
                    WHEN NOT t.committed THEN false
                    WHEN t.rolled_back @> d.subtransaction THEN false
                    WHEN t.unknown_from <> 0 AND d.subtransaction >= t.unknown_from THEN NULL
                    ELSE true END
                FROM warden.transaction t WHERE t.xid = d.xid AND t.id > e.seq ORDER BY t.id LIMIT 1)
       END AS committed,
       d.xid,
       ARRAY(SELECT pg_catalog.concat_ws('.', m ->> 'relation', m ->> 'column')
             FROM pg_catalog.jsonb_array_elements(q.masked) m
             WHERE e.flags & 4 <> 0 ORDER BY 1) AS masked_columns,
       NULLIF(d.detail ->> 'rule', '') AS rule,
       e.flags & 1 <> 0 AS nested,
       e.flags & 16 <> 0 AS background,
       NULLIF((d.detail ->> 'position')::bigint, 0) AS position,
       NULLIF((d.detail ->> 'parent')::bigint, 0) AS parent_position,
       ARRAY(SELECT pg_catalog.jsonb_array_elements_text(d.detail -> 'parameters')) AS parameters,
       q.full_length AS query_length,
       q.digest AS query_digest
FROM warden.event e
LEFT JOIN warden.session s ON s.id = e.session
LEFT JOIN warden.statement q ON q.id = e.statement
CROSS JOIN LATERAL (
    SELECT x.detail, NULLIF((x.detail ->> 'xid')::bigint, 0) AS xid,
           greatest((x.detail ->> 'subtransaction')::bigint, 1) AS subtransaction
    FROM (SELECT warden.event_detail(e.kind, e.payload) AS detail OFFSET 0) x
) d
WHERE e.kind = 3
ORDER BY e.seq DESC;
COMMENT ON VIEW warden.activity IS 'Who did what, when, from where, and what came of it: one row a statement, newest first';
COMMENT ON COLUMN warden.activity.query IS 'Statement with $n in place of literals';
COMMENT ON COLUMN warden.activity.columns IS 'Relations and columns, by kind of access';
COMMENT ON COLUMN warden.activity.functions IS 'Functions that it calls by name: users'', and those of PostgreSQL that reach files, large objects, settings, sessions or the server';
COMMENT ON COLUMN warden.activity.rule IS 'Guardrail or mask that decided';
COMMENT ON COLUMN warden.activity.background IS 'A background worker ran it, and no client';
COMMENT ON COLUMN warden.activity.parameters IS 'Values of the $n in query, as warden.record_parameters says';
COMMENT ON COLUMN warden.activity.query_length IS 'Bytes of query before it was cut; NULL if it was not';
COMMENT ON COLUMN warden.activity.query_digest IS 'SHA-256 of the whole query, if it was cut';
COMMENT ON COLUMN warden.activity.committed IS 'Whether what it wrote was committed; NULL if it wrote nothing, or if its transaction has not ended yet';
COMMENT ON COLUMN warden.activity.xid IS 'Its full transaction id, if the transaction had one';
COMMENT ON COLUMN warden.activity.position IS 'By which statements that it ran refer to it; NULL if it ran none';
COMMENT ON COLUMN warden.activity.parent_position IS 'position of the statement that ran this one';

-- A killed backend says nothing: the server then starts anew, and that ended all sessions before.
CREATE VIEW warden.connections AS
SELECT c.id AS seq,
       c.at,
       CASE c.event WHEN 'started' THEN 'server started' ELSE c.event END AS event,
       NULLIF(c.reason, '') AS reason,
       NULLIF(c.sqlstate, '') AS sqlstate,
       NULLIF(c.count, 0) AS count,
       NULLIF(c.role, '') AS role,
       NULLIF(c.database, '') AS database,
       CASE WHEN c.event <> 'started' THEN c.kind END AS kind,
       c.client_addr,
       NULLIF(c.client_port, 0) AS client_port,
       NULLIF(c.application_name, '') AS application_name,
       CASE WHEN c.event <> 'started' THEN c.tls END AS tls,
       NULLIF(c.method, '') AS method,
       NULLIF(c.identity, '') AS identity,
       NULLIF(c.pid, 0) AS pid,
       NULLIF(c.duration_us, -1) * interval '1 microsecond' AS duration,
       NULLIF(coalesce(e.ended, c.ended), '') AS ended,
       CASE WHEN c.event = 'disconnected' THEN c.at ELSE e.at END AS ended_at,
       NULLIF(c.backend, 0) AS backend
FROM warden.connection_event c
LEFT JOIN LATERAL (
    SELECT x.at, x.ended FROM (
        (SELECT d.id, d.at, d.ended FROM warden.connection_event d
         WHERE d.backend = c.backend AND d.event = 'disconnected' ORDER BY d.id LIMIT 1)
        UNION ALL
        (SELECT b.id, b.at, 'lost' FROM warden.connection_event b
         WHERE b.event = 'started' AND b.id > c.id ORDER BY b.id LIMIT 1)
    ) x ORDER BY x.id LIMIT 1
) e ON c.event = 'connected'
ORDER BY c.id DESC;
COMMENT ON VIEW warden.connections IS 'Who connected, was refused or disconnected, from where and why: one row an event, newest first';
COMMENT ON COLUMN warden.connections.event IS 'connected, refused, disconnected, or server started';
COMMENT ON COLUMN warden.connections.reason IS 'What PostgreSQL said when it refused or ended the connection';
COMMENT ON COLUMN warden.connections.count IS 'Identical refusals that the row stands for; at is the time of the last one';
COMMENT ON COLUMN warden.connections.kind IS 'client or replication';
COMMENT ON COLUMN warden.connections.tls IS 'Whether the connection is encrypted with TLS';
COMMENT ON COLUMN warden.connections.method IS 'Authentication method of pg_hba.conf';
COMMENT ON COLUMN warden.connections.identity IS 'Who the method found the client to be, before it became a role';
COMMENT ON COLUMN warden.connections.duration IS 'How long the session was, once it has disconnected';
COMMENT ON COLUMN warden.connections.ended IS 'How the session ended: normal, terminated (by an administrator), fatal, or lost (killed: the server started anew); null while it is open';
COMMENT ON COLUMN warden.connections.ended_at IS 'When the session ended; for a lost one, when the server started anew';
COMMENT ON COLUMN warden.connections.backend IS 'The same for all rows of a session here and in warden.session';

REVOKE ALL ON warden.event, warden.event_p00000, warden.session, warden.statement, warden.transaction,
    warden.connection_event, warden.journal_position, warden.journal_pending, warden.journal_transaction,
    warden.ledger_origin, warden.activity, warden.connections FROM PUBLIC;
GRANT SELECT ON warden.event, warden.session, warden.statement, warden.transaction, warden.connection_event,
    warden.journal_position, warden.ledger_origin, warden.activity, warden.connections TO warden_auditor;
REVOKE ALL ON FUNCTION warden.event_detail(smallint, bytea), warden.verify(bigint, bigint),
    warden.value_digest(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION warden.value_digest(text) TO warden_auditor;
GRANT EXECUTE ON FUNCTION warden.event_detail(smallint, bytea) TO warden_auditor, warden_admin;
GRANT EXECUTE ON FUNCTION warden.verify(bigint, bigint) TO warden_auditor, warden_admin;
