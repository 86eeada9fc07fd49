-- What an ask has to know before it chooses a point, read at one moment.

-- The first of a study's queue for a device of so much memory (NULL: unknown, so anything). `p_begun_only`: the budget
-- is spent, so only what was begun goes on. `p_skip`: trials that the caller knows to be beyond the device; there may be
-- thousands, and NOT IN is hashed where <> ALL is not.
CREATE OR REPLACE FUNCTION whetstone.head(p_study integer, p_begun_only boolean, p_skip integer[])
RETURNS TABLE (trial_id integer, number integer, begun boolean) LANGUAGE plpgsql STABLE AS $$
BEGIN
    -- What was begun is found by its attempts, of which few were broken off, and not by looking through the queue.
    RETURN QUERY
        SELECT t.trial_id, t.number, true FROM whetstone.attempts a JOIN public.trials t ON t.trial_id = a.trial_id
        WHERE a.study_id = p_study AND a.state IN ('released', 'lost', 'stalled')
          AND t.state = 'WAITING' AND t.trial_id NOT IN (SELECT unnest(p_skip))
        ORDER BY t.number LIMIT 1;
    IF FOUND OR p_begun_only THEN
        RETURN;
    END IF;
    RETURN QUERY
        SELECT t.trial_id, t.number, false FROM public.trials t
        WHERE t.study_id = p_study AND t.state = 'WAITING' AND t.trial_id NOT IN (SELECT unnest(p_skip))
        ORDER BY t.number LIMIT 1;
END
$$;

-- What an earlier request with this key was answered: {"digest", "answer"} or NULL.
CREATE OR REPLACE FUNCTION whetstone.answered(p_owner text, p_route text, p_key text) RETURNS json
LANGUAGE sql STABLE AS $$
    SELECT json_build_object('digest', encode(digest, 'hex'), 'answer', answer) FROM whetstone.idempotency
    WHERE owner = p_owner AND route = p_route AND key = p_key AND answer IS NOT NULL
      AND created_at >= clock_timestamp() - interval '24 hours'
$$;

-- Why a study leases nothing now, or NULL. The budget is looked at elsewhere: it lets go on what was begun.
CREATE OR REPLACE FUNCTION whetstone.closed(p_study integer) RETURNS text LANGUAGE plpgsql STABLE AS $$
DECLARE
    s whetstone.studies;
    live bigint;
BEGIN
    SELECT * INTO s FROM whetstone.studies WHERE study_id = p_study;
    IF s.state <> 'running' THEN
        RETURN format('the study is %s', s.state) || CASE WHEN s.reason = '' THEN '' ELSE format(' (%s)', s.reason) END;
    END IF;
    IF s.concurrency IS NOT NULL THEN
        SELECT count(*) INTO live FROM whetstone.attempts WHERE study_id = p_study AND state = 'leased';
        IF live >= s.concurrency THEN
            RETURN format('%s trials of the study are leased: its concurrency allows no more', live);
        END IF;
    END IF;
    RETURN NULL;
END
$$;

-- Studies that may have work, those with the fewest leases first, then the oldest.
CREATE OR REPLACE FUNCTION whetstone.candidates(p_format integer) RETURNS integer[] LANGUAGE sql STABLE AS $$
    SELECT coalesce(array_agg(study_id ORDER BY leased, study_id), '{}') FROM (
        SELECT s.study_id, s.concurrency,
               (SELECT count(*) FROM whetstone.attempts a WHERE a.study_id = s.study_id AND a.state = 'leased') AS leased
        FROM whetstone.studies s WHERE s.state = 'running' AND s.workload <> 'external' AND s.format <= p_format
    ) AS running WHERE concurrency IS NULL OR leased < concurrency
$$;

-- All of it. `p_study` NULL asks for any study, of which `p_guess` is the likeliest. Where the caller samples for that
-- study, the cursor of its history is given, and what has changed since comes along.
CREATE OR REPLACE FUNCTION whetstone.look(
    p_study integer, p_guess integer, p_skip integer[], p_owner text, p_route text, p_key text, p_worker text,
    p_newest integer, p_running integer[], p_waiting integer[], p_revision bigint, p_format integer
) RETURNS json LANGUAGE plpgsql STABLE AS $$
DECLARE
    studies integer[];
    study integer := p_study;
    about record;
    first record;
    spent text;
    queued json;
    changes json;
BEGIN
    IF study IS NULL THEN
        studies := whetstone.candidates(p_format);
        study := studies[1];
    END IF;
    IF study IS NULL OR (p_study IS NULL AND study IS DISTINCT FROM p_guess) THEN
        RETURN json_build_object(
            'studies', to_json(studies), 'answered', whetstone.answered(p_owner, p_route, p_key),
            'worker', whetstone.worker(p_worker));
    END IF;
    SELECT s.state, s.fixed, s.format, s.picked INTO about FROM whetstone.studies s WHERE s.study_id = study;
    IF NOT FOUND THEN
        RETURN json_build_object('missing', true);
    END IF;
    spent := whetstone.spent(study);
    SELECT * INTO first FROM whetstone.head(study, spent IS NOT NULL, p_skip);
    IF first.trial_id IS NOT NULL THEN
        queued := json_build_object(
            'trial_id', first.trial_id, 'number', first.number, 'begun', first.begun,
            'names', (SELECT json_agg(param_name ORDER BY param_id) FROM public.trial_params
                      WHERE trial_id = first.trial_id),
            'internals', (SELECT json_agg(param_value ORDER BY param_id) FROM public.trial_params
                          WHERE trial_id = first.trial_id),
            'fixed', (SELECT value_json FROM public.trial_system_attributes
                      WHERE trial_id = first.trial_id AND key = 'fixed_params'));
    END IF;
    IF p_newest IS NOT NULL THEN
        changes := whetstone.changes(study, p_newest, p_running, p_waiting, p_revision);
    END IF;
    RETURN json_build_object(
        'studies', to_json(studies),
        'study', study,
        'answered', whetstone.answered(p_owner, p_route, p_key),
        'worker', whetstone.worker(p_worker),
        'closed', whetstone.closed(study),
        'spent', spent,
        'fixed', about.fixed,
        'format', about.format,
        'picked', about.picked,
        'head', queued,
        'next', (SELECT coalesce(max(number) + 1, 0) FROM public.trials WHERE study_id = study),
        'changes', changes);
END
$$;
