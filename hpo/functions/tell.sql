-- The end of a lease. All three lock study, trial and attempt, in this order, and change nothing unless the message is
-- that of the live lease's token and bearer. What was answered is kept in short: the same message gets it again.

-- Hold a lease and tell what stands in the way: {"missing"}, {"lost": why}, {"told": state}, {"reply": kept}, {"newer"}
-- (the history is of a format above `p_format`) or NULL.
-- A trial that stock Optuna has ended meanwhile is {"ended"} to a tell.
CREATE OR REPLACE FUNCTION whetstone.hold(
    p_lease bigint, p_token bigint, p_bearer text, p_digest text, p_format integer
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    a whetstone.attempts;
    v_format integer;
BEGIN
    SELECT * INTO a FROM whetstone.attempts WHERE attempt_id = p_lease;
    IF NOT FOUND THEN
        RETURN json_build_object('missing', true);
    END IF;
    PERFORM 1 FROM public.studies WHERE study_id = a.study_id FOR NO KEY UPDATE;
    SELECT format INTO v_format FROM whetstone.studies WHERE study_id = a.study_id;
    IF v_format > p_format THEN
        RETURN json_build_object('newer', v_format, 'study', a.study_id);
    END IF;
    PERFORM 1 FROM public.trials WHERE trial_id = a.trial_id FOR NO KEY UPDATE;
    SELECT * INTO a FROM whetstone.attempts WHERE attempt_id = p_lease FOR NO KEY UPDATE;
    IF NOT FOUND THEN  -- deleted with its study
        RETURN json_build_object('missing', true);
    END IF;
    IF a.bearer <> p_bearer THEN
        RETURN json_build_object('lost', 'this lease belongs to another token');
    END IF;
    IF a.token <> p_token THEN
        RETURN json_build_object('lost', 'this is not the lease''s fencing token');
    END IF;
    IF a.state = 'leased' THEN
        RETURN NULL;
    END IF;
    IF a.told ->> 'digest' = p_digest THEN
        RETURN json_build_object('reply', a.told -> 'reply');
    END IF;
    RETURN whetstone.over(a.state);
END
$$;

-- Why a lease in this state is over.
CREATE OR REPLACE FUNCTION whetstone.over(p_state text) RETURNS json LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE p_state
        WHEN 'lost' THEN json_build_object('lost', 'the lease is over: it was silent for longer than its term, '
                                                   || 'and the trial was taken back')
        WHEN 'released' THEN json_build_object('lost', 'the lease is over: the trial was handed back')
        WHEN 'stalled' THEN json_build_object('lost', 'the lease is over: the trial was handed back as stalled')
        WHEN 'cancelled' THEN json_build_object('lost', 'the lease is over: the trial was cancelled')
        ELSE json_build_object('told', p_state) END
$$;

-- End a live attempt that the caller holds, and count its seconds.
CREATE OR REPLACE FUNCTION whetstone.end_attempt(
    p_lease bigint, p_state text, p_reason text, p_traceback text, p_digest text, p_reply jsonb, p_checkpoint bigint
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    a whetstone.attempts;
BEGIN
    UPDATE whetstone.attempts
    SET state = p_state, reason = p_reason, traceback = p_traceback,
        told = CASE WHEN p_digest IS NOT NULL THEN jsonb_build_object('digest', p_digest, 'reply', p_reply) END,
        checkpoint_epoch = greatest(checkpoint_epoch, p_checkpoint), ended_at = clock_timestamp()
    WHERE attempt_id = p_lease RETURNING * INTO a;
    UPDATE whetstone.studies SET seconds_used = seconds_used + greatest(extract(epoch FROM a.ended_at - a.leased_at), 0)
    WHERE study_id = a.study_id;
END
$$;

-- End an unfinished trial: state, value and marks; false if stock Optuna has ended it.
CREATE OR REPLACE FUNCTION whetstone.finish(
    p_trial integer, p_state text, p_value double precision, p_keys text[], p_texts text[]
) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE public.trials
    SET state = p_state::public.trialstate, datetime_complete = clock_timestamp() AT TIME ZONE 'UTC'
    WHERE trial_id = p_trial AND state IN ('RUNNING', 'WAITING');
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF p_value IS NOT NULL THEN
        INSERT INTO public.trial_values (trial_id, objective, value, value_type) VALUES (p_trial, 0, p_value, 'FINITE')
        ON CONFLICT (trial_id, objective) DO UPDATE SET value = excluded.value, value_type = excluded.value_type;
    END IF;
    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
    SELECT p_trial, a.key, a.text FROM unnest(p_keys, p_texts) AS a (key, text)
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json;
    RETURN true;
END
$$;

-- The last finite value that a trial reported: what a pruned trial is worth, as stock Optuna does it.
CREATE OR REPLACE FUNCTION whetstone.last_report(p_trial integer) RETURNS double precision LANGUAGE sql STABLE AS $$
    SELECT intermediate_value FROM public.trial_intermediate_values
    WHERE trial_id = p_trial AND intermediate_value_type = 'FINITE' ORDER BY step DESC LIMIT 1
$$;

-- What an infeasible trial is worth that does not know: the worst feasible value so far, else its own last report,
-- else 0. Its constraint, not this number, is what tells samplers that it is bad.
CREATE OR REPLACE FUNCTION whetstone.worst(p_study integer, p_trial integer) RETURNS double precision
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT value FROM whetstone.extreme(p_study, NOT whetstone.maximizes(p_study))),
                    whetstone.last_report(p_trial), 0)
$$;

-- Store the outcome of a trial, once: {"reply": ...} or what `hold` answers. A study deleted meanwhile has no lease.
CREATE OR REPLACE FUNCTION whetstone.tell(
    p_lease bigint, p_token bigint, p_bearer text, p_digest text, p_outcome text, p_value double precision,
    p_reason text, p_traceback text, p_checkpoint bigint, p_tasks integer, p_bits bytea, p_format integer
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    held json := whetstone.hold(p_lease, p_token, p_bearer, p_digest, p_format);
    a whetstone.attempts;
    v_value double precision := p_value;
    v_keys text[] := '{}';
    v_texts text[] := '{}';
    reply jsonb;
BEGIN
    IF held IS NOT NULL THEN
        RETURN held;
    END IF;
    SELECT * INTO a FROM whetstone.attempts WHERE attempt_id = p_lease;
    IF p_outcome = 'infeasible' AND v_value IS NULL THEN
        v_value := whetstone.worst(a.study_id, a.trial_id);
    ELSIF p_outcome = 'pruned' AND v_value IS NULL THEN
        v_value := whetstone.last_report(a.trial_id);
    END IF;
    IF p_reason <> '' THEN
        v_keys := v_keys || 'whetstone:reason'::text;
        v_texts := v_texts || to_json(p_reason)::text;
    END IF;
    IF p_outcome IN ('complete', 'infeasible') THEN
        v_keys := v_keys || 'constraints:infeasible'::text;
        v_texts := v_texts || CASE p_outcome WHEN 'infeasible' THEN '1.0' ELSE '0.0' END::text;
    END IF;
    IF p_outcome = 'infeasible' AND p_reason LIKE 'out of memory%' THEN
        v_keys := v_keys || 'whetstone:out_of_memory'::text;
        v_texts := v_texts || coalesce(a.memory_bytes, 0)::text;
    END IF;
    IF NOT whetstone.finish(a.trial_id, CASE p_outcome WHEN 'pruned' THEN 'PRUNED' WHEN 'failed' THEN 'FAIL'
                                        ELSE 'COMPLETE' END, v_value, v_keys, v_texts) THEN
        RETURN json_build_object('ended', 'by another program');
    END IF;
    IF p_bits IS NOT NULL THEN
        INSERT INTO whetstone.answers (trial_id, tasks, bits) VALUES (a.trial_id, p_tasks, p_bits);
    END IF;
    reply := jsonb_build_object(
        'study', a.study_id, 'trial', a.trial_number, 'state', p_outcome, 'value', v_value);
    PERFORM whetstone.end_attempt(p_lease, p_outcome, p_reason, p_traceback, p_digest, reply, p_checkpoint);
    PERFORM whetstone.lease_ended(a.study_id);
    RETURN json_build_object('reply', reply);
END
$$;

-- Take a trial back unfinished ("released", "stalled" or "lost"): {"reply": ...} or what `hold` answers. It is cancelled
-- where that was asked for or its study is stopped, failed where its workers have died too often, else queued again.
CREATE OR REPLACE FUNCTION whetstone.give_back(
    p_lease bigint, p_token bigint, p_bearer text, p_digest text, p_how text, p_why text, p_checkpoint bigint,
    p_format integer
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    held json := whetstone.hold(p_lease, p_token, p_bearer, p_digest, p_format);
BEGIN
    IF held IS NOT NULL THEN
        RETURN held;
    END IF;
    RETURN json_build_object('reply', whetstone.taken_back(p_lease, p_digest, p_how, p_why, p_checkpoint));
END
$$;

-- A lease that is overdue by the clock as it is now that its row is held; {"trial", "state", "why"} or NULL.
CREATE OR REPLACE FUNCTION whetstone.expire(p_lease bigint, p_format integer) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    a whetstone.attempts;
    why text;
    reply jsonb;
BEGIN
    SELECT * INTO a FROM whetstone.attempts WHERE attempt_id = p_lease;
    IF NOT FOUND OR whetstone.hold(p_lease, a.token, a.bearer, NULL, p_format) IS NOT NULL THEN
        RETURN NULL;
    END IF;
    SELECT * INTO a FROM whetstone.attempts WHERE attempt_id = p_lease AND expires_at < clock_timestamp();
    IF NOT FOUND THEN
        RETURN NULL;  -- renewed while we were on our way
    END IF;
    why := format('its worker %s was silent for %s s',
                  coalesce((SELECT name FROM whetstone.workers WHERE worker_id = a.worker_id), '(unknown)'),
                  round(extract(epoch FROM clock_timestamp() - a.renewed_at)::numeric, 1));
    reply := whetstone.taken_back(p_lease, NULL, 'lost', why, NULL);
    RETURN json_build_object('study', a.study_id, 'trial', a.trial_number, 'state', reply ->> 'state', 'why', why);
END
$$;

-- End a live attempt, which the caller holds, without an outcome.
CREATE OR REPLACE FUNCTION whetstone.taken_back(
    p_lease bigint, p_digest text, p_how text, p_why text, p_checkpoint bigint
) RETURNS jsonb LANGUAGE plpgsql AS $$
DECLARE
    a whetstone.attempts;
    s whetstone.studies;
    asked text;
    deaths bigint;
    moved boolean := true;
    becomes text;
    reply jsonb;
BEGIN
    SELECT * INTO a FROM whetstone.attempts WHERE attempt_id = p_lease;
    SELECT * INTO s FROM whetstone.studies WHERE study_id = a.study_id;
    asked := coalesce(nullif(a.stop_requested, ''), CASE WHEN s.state = 'stopped' THEN 'the study was stopped' END);
    SELECT count(*) + (p_how <> 'released')::integer INTO deaths FROM whetstone.attempts
    WHERE trial_id = a.trial_id AND state IN ('lost', 'stalled');
    IF asked IS NOT NULL THEN
        becomes := 'cancelled';
        moved := whetstone.finish(a.trial_id, 'FAIL', NULL, ARRAY['whetstone:cancelled', 'whetstone:reason'],
                                  ARRAY['true', to_json(asked)::text]);
        IF moved THEN
            UPDATE whetstone.studies SET trials_used = trials_used - 1 WHERE study_id = a.study_id;
        END IF;
    ELSIF p_how <> 'released' AND deaths >= s.max_attempts THEN
        becomes := 'failed';
        moved := whetstone.finish(
            a.trial_id, 'FAIL', NULL, ARRAY['whetstone:reason'],
            ARRAY[to_json(format('given up: %s died; the last: %s',
                                 CASE WHEN deaths = 1 THEN '1 attempt' ELSE format('%s attempts', deaths) END,
                                 p_why))::text]);
    ELSE
        becomes := 'queued';
        UPDATE public.trials SET state = 'WAITING' WHERE trial_id = a.trial_id AND state = 'RUNNING';
        moved := FOUND;
    END IF;
    IF NOT moved THEN  -- stock Optuna has ended the trial: its word stands, only our attempt is over
        becomes := whetstone.state_of(a.trial_id);
    END IF;
    reply := jsonb_build_object('study', a.study_id, 'trial', a.trial_number, 'state', becomes, 'value', NULL);
    PERFORM whetstone.end_attempt(
        p_lease, CASE WHEN asked IS NOT NULL AND p_how = 'released' THEN 'cancelled' ELSE p_how END,
        p_why, '', p_digest, reply, p_checkpoint);
    PERFORM whetstone.lease_ended(a.study_id);
    RETURN reply;
END
$$;

-- What people call the state of a trial.
CREATE OR REPLACE FUNCTION whetstone.state_of(p_trial integer) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT CASE t.state
        WHEN 'WAITING' THEN 'queued'
        WHEN 'RUNNING' THEN 'leased'
        WHEN 'PRUNED' THEN 'pruned'
        WHEN 'COMPLETE' THEN CASE WHEN EXISTS (
            SELECT 1 FROM public.trial_system_attributes m WHERE m.trial_id = t.trial_id
            AND m.key = 'constraints:infeasible' AND m.value_json NOT IN ('0', '0.0')) THEN 'infeasible' ELSE 'complete' END
        ELSE CASE WHEN EXISTS (
            SELECT 1 FROM public.trial_system_attributes m WHERE m.trial_id = t.trial_id
            AND m.key = 'whetstone:cancelled') THEN 'cancelled' ELSE 'failed' END
    END FROM public.trials t WHERE t.trial_id = p_trial
$$;
