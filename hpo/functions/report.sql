-- Take down a batch of reports and renew the lease: {"lost": why}, {"newer"} as `hold` says it, or {"study", "trial_id", "number", "stop", "state"}.
-- It takes a share of the trial's lock (where it brings values, whose rows refer to the trial) before the attempt's, so
-- it waits for no sampler and no other trial. On an epoch reported twice the later report speaks. The attributes are a
-- pruner's. The same batch again changes nothing.
CREATE OR REPLACE FUNCTION whetstone.report(
    p_lease bigint, p_token bigint, p_bearer text, p_term_s double precision, p_checkpoint bigint,
    p_epochs bigint[], p_values double precision[], p_texts text[],
    p_keys text[], p_marks text[], p_study_keys text[], p_study_marks text[], p_format integer
) RETURNS json LANGUAGE plpgsql AS $$
DECLARE
    v_state text;
    a record;
    over json;
BEGIN
    SELECT s.study_id, s.format INTO a FROM whetstone.attempts t JOIN whetstone.studies s USING (study_id)
    WHERE t.attempt_id = p_lease;
    IF a.format > p_format THEN
        RETURN json_build_object('newer', a.format, 'study', a.study_id);
    END IF;
    IF cardinality(p_epochs) > 0 THEN
        SELECT t.state::text INTO v_state FROM public.trials t
        WHERE t.trial_id = (SELECT trial_id FROM whetstone.attempts WHERE attempt_id = p_lease) FOR KEY SHARE;
    END IF;
    UPDATE whetstone.attempts
    SET renewed_at = clock_timestamp(), expires_at = clock_timestamp() + make_interval(secs => p_term_s),
        checkpoint_epoch = greatest(checkpoint_epoch, p_checkpoint),
        last_epoch = greatest(last_epoch, (SELECT max(epoch) FROM unnest(p_epochs) AS e (epoch)))
    WHERE attempt_id = p_lease AND token = p_token AND bearer = p_bearer AND state = 'leased'
    RETURNING study_id, trial_id, trial_number, worker_id, stop_requested INTO a;
    IF NOT FOUND THEN
        SELECT * INTO a FROM whetstone.attempts WHERE attempt_id = p_lease;
        IF a.attempt_id IS NULL OR a.bearer <> p_bearer THEN
            RETURN json_build_object('lost', 'this lease is not known, or belongs to another token');
        ELSIF a.state = 'leased' THEN
            RETURN json_build_object('lost', 'this is not the lease''s fencing token');
        END IF;
        over := whetstone.over(a.state);
        RETURN json_build_object('lost', coalesce(
            over ->> 'lost', format('the lease is over: the trial was told %s', over ->> 'told')));
    END IF;
    -- The leave of an earlier process of its name may have come after its own introduction.
    UPDATE whetstone.workers SET last_seen = clock_timestamp(), stopped = false WHERE worker_id = a.worker_id;
    IF cardinality(p_epochs) > 0 THEN
        INSERT INTO whetstone.metrics (attempt_id, epoch, value, metrics)
        SELECT p_lease, m.epoch, m.value, m.metrics::jsonb
        FROM unnest(p_epochs, p_values, p_texts) AS m (epoch, value, metrics)
        ON CONFLICT (attempt_id, epoch) DO UPDATE
            SET value = excluded.value, metrics = excluded.metrics, at = clock_timestamp();
        IF v_state = 'RUNNING' THEN
            INSERT INTO public.trial_intermediate_values
                (trial_id, step, intermediate_value, intermediate_value_type)
            SELECT a.trial_id, r.epoch, r.value, 'FINITE' FROM unnest(p_epochs, p_values) AS r (epoch, value)
            WHERE r.value IS NOT NULL
            ON CONFLICT (trial_id, step) DO UPDATE SET intermediate_value = excluded.intermediate_value,
                intermediate_value_type = excluded.intermediate_value_type;
            INSERT INTO public.study_system_attributes (study_id, key, value_json)
            SELECT a.study_id, m.key, m.text FROM unnest(p_study_keys, p_study_marks) AS m (key, text)
            ON CONFLICT (study_id, key) DO UPDATE SET value_json = excluded.value_json;
            INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
            SELECT a.trial_id, m.key, m.text FROM unnest(p_keys, p_marks) AS m (key, text)
            ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json;
        END IF;
        PERFORM whetstone.notify('trial', a.study_id);
    END IF;
    RETURN json_build_object('study', a.study_id, 'trial_id', a.trial_id, 'number', a.trial_number,
                             'stop', a.stop_requested, 'state', v_state);
END
$$;
