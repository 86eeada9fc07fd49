-- The lease: trial, parameters, attributes, attempt, counters and the kept answer, together or not at all.
--
-- Answers {"lease", "token", "trial_id", "number", "attempt", "saved", "last_epoch"}; {"earlier": answer} where the key
-- was answered before; {"again": "..."} where somebody was quicker and all is to be looked at anew; {"nothing": why};
-- {"reused"} and {"missing"}. Only the first changes anything. `p_number` is that of the new trial, or of the queued one
-- that `p_head` names. The same `p_request`, and the same key, get the same lease.
CREATE OR REPLACE FUNCTION whetstone.lease(
    p_study integer, p_head integer, p_number integer, p_skip integer[],
    p_names text[], p_internals double precision[], p_distributions text[],
    p_keys text[], p_texts text[], p_study_keys text[], p_study_texts text[], p_picked jsonb,
    p_worker text, p_device text, p_memory bigint, p_version text, p_bearer text,
    p_route text, p_key text, p_digest bytea, p_request text, p_template jsonb, p_term_s double precision
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    why text;
    kept record;
    w record;
    head record;
    v_trial integer;
    v_attempts integer;
    v_saved integer;
    v_last bigint;
    v_lease bigint;
    v_token bigint;
    found_state text;
    dynamic jsonb;
    earlier json;
BEGIN
    IF p_key IS NULL THEN
        earlier := whetstone.leased(p_request);
        IF earlier IS NOT NULL THEN
            RETURN earlier;
        END IF;
    ELSE
        INSERT INTO whetstone.idempotency AS k (owner, route, key, digest)
        VALUES (p_bearer, p_route, p_key, p_digest)
        ON CONFLICT (owner, route, key) DO UPDATE
            SET digest = excluded.digest, answer = NULL, created_at = clock_timestamp()
            WHERE k.created_at < clock_timestamp() - interval '24 hours' OR k.answer IS NULL;
        IF NOT FOUND THEN
            SELECT digest, answer INTO kept FROM whetstone.idempotency
            WHERE owner = p_bearer AND route = p_route AND key = p_key;
            RETURN CASE WHEN kept.digest = p_digest THEN json_build_object('earlier', kept.answer)
                        ELSE json_build_object('reused', true) END;
        END IF;
    END IF;

    PERFORM 1 FROM public.studies WHERE study_id = p_study FOR NO KEY UPDATE;
    IF p_key IS NULL THEN  -- a call whose connection was lost may have been at work until now
        earlier := whetstone.leased(p_request);
        IF earlier IS NOT NULL THEN
            RETURN earlier;
        END IF;
    END IF;
    IF NOT EXISTS (SELECT 1 FROM whetstone.studies WHERE study_id = p_study) THEN
        RETURN whetstone.not_leased(p_bearer, p_route, p_key, json_build_object('missing', true));
    END IF;
    why := whetstone.closed(p_study);
    IF why IS NOT NULL THEN
        RETURN whetstone.not_leased(p_bearer, p_route, p_key, json_build_object('nothing', why));
    END IF;
    why := whetstone.spent(p_study);
    SELECT * INTO head FROM whetstone.head(p_study, why IS NOT NULL, p_skip);
    IF p_head IS NULL AND head.trial_id IS NOT NULL THEN
        RETURN whetstone.not_leased(p_bearer, p_route, p_key, json_build_object('again', 'a trial was queued'));
    END IF;
    IF p_head IS NULL AND why IS NOT NULL THEN
        RETURN whetstone.not_leased(
            p_bearer, p_route, p_key, json_build_object('nothing', format('the study''s budget is spent: %s', why)));
    END IF;
    IF p_head IS NULL
        AND p_number <> (SELECT coalesce(max(number) + 1, 0) FROM public.trials WHERE study_id = p_study) THEN
        RETURN whetstone.not_leased(p_bearer, p_route, p_key, json_build_object('again', 'the number is taken'));
    END IF;
    IF p_head IS NOT NULL THEN
        SELECT t.state INTO found_state FROM public.trials t WHERE t.trial_id = p_head FOR NO KEY UPDATE;
        IF found_state IS DISTINCT FROM 'WAITING' THEN  -- another worker has it, or stock Optuna
            RETURN whetstone.not_leased(p_bearer, p_route, p_key, json_build_object('again', 'the trial was taken'));
        END IF;
        IF why IS NOT NULL AND NOT EXISTS (SELECT 1 FROM whetstone.attempts a WHERE a.trial_id = p_head) THEN
            RETURN whetstone.not_leased(p_bearer, p_route, p_key, json_build_object('again', 'the budget is spent'));
        END IF;
    END IF;
    SELECT * INTO w FROM whetstone.seen(p_worker, p_device, p_memory, p_version, p_bearer);
    IF w.draining THEN
        RETURN whetstone.not_leased(p_bearer, p_route, p_key, json_build_object('draining', true));
    END IF;

    INSERT INTO public.study_system_attributes (study_id, key, value_json)
    SELECT p_study, a.key, a.text FROM unnest(p_study_keys, p_study_texts) AS a (key, text)
    ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json;
    IF p_head IS NULL THEN
        INSERT INTO public.trials (study_id, number, state, datetime_start)
        VALUES (p_study, p_number, 'RUNNING', clock_timestamp() AT TIME ZONE 'UTC')
        RETURNING trial_id INTO v_trial;
        v_attempts := 0;
    ELSE
        v_trial := p_head;
        UPDATE public.trials SET state = 'RUNNING', datetime_start = clock_timestamp() AT TIME ZONE 'UTC'
        WHERE trial_id = v_trial;
        SELECT coalesce(max(attempt), 0), max(attempt) FILTER (WHERE checkpoint_epoch IS NOT NULL), max(last_epoch)
        INTO v_attempts, v_saved, v_last FROM whetstone.attempts WHERE trial_id = v_trial;
    END IF;
    INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
    SELECT v_trial, p.name, p.internal, p.distribution
    FROM unnest(p_names, p_internals, p_distributions) WITH ORDINALITY AS p (name, internal, distribution, place)
    ORDER BY p.place
    ON CONFLICT (trial_id, param_name) DO NOTHING;
    IF p_head IS NOT NULL AND cardinality(p_names) > 0 THEN
        INSERT INTO whetstone.revisions (study_id, trial_id, what) VALUES (p_study, v_trial, 'completed');
    END IF;
    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
    SELECT v_trial, a.key, a.text FROM unnest(p_keys, p_texts) AS a (key, text)
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json;
    INSERT INTO whetstone.attempts (study_id, trial_id, trial_number, attempt, token, worker_id, bearer, device,
                                    memory_bytes, resumed_from, request, leased_at, renewed_at, expires_at)
    SELECT p_study, v_trial, p_number, v_attempts + 1, nextval('whetstone.fencing'), w.worker_id, p_bearer, w.device,
           w.memory_bytes, v_saved, CASE WHEN p_key IS NULL THEN p_request END,
           clock.now, clock.now, clock.now + make_interval(secs => p_term_s)
    FROM (SELECT clock_timestamp() AS now) AS clock
    RETURNING attempt_id, token INTO v_lease, v_token;
    UPDATE whetstone.studies SET trials_used = trials_used + (v_attempts = 0)::integer,
        picked = coalesce(p_picked, picked)
    WHERE study_id = p_study AND (v_attempts = 0 OR p_picked IS NOT NULL);
    dynamic := jsonb_build_object('lease', v_lease, 'token', v_token, 'trial', p_number, 'attempt', v_attempts + 1,
                                  'last_epoch', v_last);
    IF p_key IS NOT NULL THEN
        UPDATE whetstone.idempotency SET answer = p_template || dynamic || jsonb_build_object(
            'artifacts', format('%s/attempts/%s', p_template ->> 'artifacts', v_attempts + 1),
            'resume', CASE WHEN v_saved IS NOT NULL
                           THEN format('%s/attempts/%s', p_template ->> 'artifacts', v_saved) END)
        WHERE owner = p_bearer AND route = p_route AND key = p_key;
    END IF;
    PERFORM whetstone.notify('trial', p_study);
    RETURN json_build_object('lease', v_lease, 'token', v_token, 'trial_id', v_trial, 'number', p_number,
                             'attempt', v_attempts + 1, 'saved', v_saved, 'last_epoch', v_last);
END
$$;

-- Nothing came of a request: its key is free again.
CREATE OR REPLACE FUNCTION whetstone.not_leased(p_owner text, p_route text, p_key text, p_why json) RETURNS json
LANGUAGE plpgsql AS $$
BEGIN
    IF p_key IS NOT NULL THEN
        DELETE FROM whetstone.idempotency WHERE owner = p_owner AND route = p_route AND key = p_key AND answer IS NULL;
    END IF;
    RETURN p_why;
END
$$;

-- What an earlier call of the same request was given, or NULL.
CREATE OR REPLACE FUNCTION whetstone.leased(p_request text) RETURNS json LANGUAGE sql STABLE AS $$
    SELECT json_build_object(
        'lease', a.attempt_id, 'token', a.token, 'trial_id', a.trial_id, 'number', a.trial_number,
        'attempt', a.attempt, 'saved', a.resumed_from,
        'last_epoch', (SELECT max(last_epoch) FROM whetstone.attempts
                       WHERE trial_id = a.trial_id AND attempt < a.attempt))
    FROM whetstone.attempts a WHERE a.request = p_request
$$;
