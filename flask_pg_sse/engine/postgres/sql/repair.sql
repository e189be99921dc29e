-- Make the rows and triggers what they must be. Each installation runs it, so it repairs what a restore has left. In a
-- healthy log it changes nothing, and takes no lock on which a publisher would wait.
DO $repair$
<<repair>>
DECLARE
    timelines boolean := true;
    statement text;
BEGIN
    -- Ask for the server's timeline as draw_v1() does, with the owner's rights.
    BEGIN
        PERFORM pg_walfile_name(pg_current_wal_lsn());
    EXCEPTION WHEN OTHERS THEN
        timelines := false;
    END;

    -- Two rows, in a copy of a database from before they were impossible.
    DELETE FROM flask_pg_sse.installation i
    WHERE i.ctid <> (SELECT k.ctid FROM flask_pg_sse.installation k ORDER BY k.version DESC, k.ctid LIMIT 1);
    DELETE FROM flask_pg_sse.retention r
    WHERE r.ctid <> (SELECT k.ctid FROM flask_pg_sse.retention k ORDER BY k.pruned_through, k.ctid LIMIT 1);
    IF to_regclass('flask_pg_sse.installation_has_one_row') IS NULL THEN
        CREATE UNIQUE INDEX installation_has_one_row ON flask_pg_sse.installation ((true));
    END IF;
    IF to_regclass('flask_pg_sse.retention_has_one_row') IS NULL THEN
        CREATE UNIQUE INDEX retention_has_one_row ON flask_pg_sse.retention ((true));
    END IF;

    UPDATE flask_pg_sse.installation i SET timelines = repair.timelines WHERE i.timelines <> repair.timelines;

    -- Keep the events that SQL has published, or that were restored, without a row here or below it.
    INSERT INTO flask_pg_sse.retention
    SELECT coalesce((SELECT min(e.id) - 1 FROM flask_pg_sse.event e), flask_pg_sse.draw_v1(1))
    WHERE NOT EXISTS (SELECT FROM flask_pg_sse.retention);
    IF (SELECT min(e.id) <= min(r.pruned_through) FROM flask_pg_sse.event e, flask_pg_sse.retention r) THEN
        LOCK TABLE flask_pg_sse.pruning IN SHARE UPDATE EXCLUSIVE MODE;
        UPDATE flask_pg_sse.retention r
        SET pruned_through = least(r.pruned_through, (SELECT min(e.id) - 1 FROM flask_pg_sse.event e));
    END IF;

    -- pg_restore --disable-triggers leaves all triggers as ordinary ones, and switched off if it was interrupted.
    FOR statement IN
        SELECT concat('ALTER TABLE ', t.tgrelid::regclass, ' ENABLE ', m.mode, ' TRIGGER ', t.tgname)
        FROM (VALUES
            ('flask_pg_sse.installation', 'one_row', 'A', 'ALWAYS'),
            ('flask_pg_sse.retention', 'one_row', 'A', 'ALWAYS'),
            ('flask_pg_sse.event', 'replicated', 'R', 'REPLICA'),
            ('flask_pg_sse.pending', 'publish', 'O', '')
        ) AS m (relation, name, state, mode)
        JOIN pg_trigger t ON t.tgrelid = m.relation::regclass AND t.tgname = m.name AND t.tgenabled::text <> m.state
    LOOP
        EXECUTE statement;
    END LOOP;
END $repair$;
