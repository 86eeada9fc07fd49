-- What decides whether a study leases on. The caller of `settle` holds the study's lock.

-- A number in six significant digits, for people.
CREATE OR REPLACE FUNCTION whetstone.short(x double precision) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN x = 0 OR x IN ('Infinity', '-Infinity', 'NaN') THEN x::text
        WHEN abs(x) BETWEEN 1e-4 AND 1e15
            THEN trim_scale(round(x::numeric, 5 - floor(log(abs(x)::numeric))::integer))::text
        ELSE x::text
    END
$$;

-- The best feasible trial of a study, or the worst: on equal values the earlier one.
CREATE OR REPLACE FUNCTION whetstone.extreme(
    p_study integer, p_highest boolean, OUT value double precision, OUT number integer
) LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF p_highest THEN
        SELECT v.value, t.number INTO value, number
        FROM public.trial_values v JOIN public.trials t ON t.trial_id = v.trial_id
        WHERE t.study_id = p_study AND v.objective = 0 AND v.value IS NOT NULL AND t.state = 'COMPLETE'
          AND NOT EXISTS (SELECT 1 FROM public.trial_system_attributes m WHERE m.trial_id = t.trial_id
                          AND m.key = 'constraints:infeasible' AND m.value_json NOT IN ('0', '0.0'))
        ORDER BY v.value DESC, t.number LIMIT 1;
    ELSE
        SELECT v.value, t.number INTO value, number
        FROM public.trial_values v JOIN public.trials t ON t.trial_id = v.trial_id
        WHERE t.study_id = p_study AND v.objective = 0 AND v.value IS NOT NULL AND t.state = 'COMPLETE'
          AND NOT EXISTS (SELECT 1 FROM public.trial_system_attributes m WHERE m.trial_id = t.trial_id
                          AND m.key = 'constraints:infeasible' AND m.value_json NOT IN ('0', '0.0'))
        ORDER BY v.value, t.number LIMIT 1;
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION whetstone.maximizes(p_study integer) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT direction = 'MAXIMIZE' FROM public.study_directions WHERE study_id = p_study AND objective = 0
$$;

-- Which budget of a study is spent, in words, or NULL.
CREATE OR REPLACE FUNCTION whetstone.spent(p_study integer) RETURNS text LANGUAGE plpgsql STABLE AS $$
DECLARE
    s whetstone.studies;
    best record;
    upward boolean;
    live double precision;
BEGIN
    SELECT * INTO s FROM whetstone.studies WHERE study_id = p_study;
    IF s.budget_target IS NOT NULL THEN
        upward := whetstone.maximizes(p_study);
        SELECT * INTO best FROM whetstone.extreme(p_study, upward);
        IF (CASE WHEN upward THEN best.value >= s.budget_target ELSE best.value <= s.budget_target END) THEN
            RETURN format('trial %s reached %s; the target was %s',
                          best.number, whetstone.short(best.value), whetstone.short(s.budget_target));
        END IF;
    END IF;
    IF s.trials_used >= s.budget_trials THEN
        RETURN CASE WHEN s.budget_trials = 1 THEN 'its 1 trial is done'
                    ELSE format('all %s trials are done', s.budget_trials) END;
    END IF;
    IF s.budget_hours IS NOT NULL THEN
        SELECT coalesce(sum(extract(epoch FROM clock_timestamp() - leased_at)), 0) INTO live
        FROM whetstone.attempts WHERE study_id = p_study AND state = 'leased';
        IF s.seconds_used + live >= 3600 * s.budget_hours THEN
            RETURN format('its budget of training time is used (%s h)', whetstone.short(s.budget_hours));
        END IF;
    END IF;
    RETURN NULL;
END
$$;

-- Tell every process once this transaction commits (`hpo.events`).
CREATE OR REPLACE FUNCTION whetstone.notify(p_kind text, p_study integer) RETURNS void LANGUAGE sql AS $$
    SELECT pg_notify('whetstone', format('{"kind": "%s", "study": %s}', p_kind, p_study))
$$;

-- Finish the study if its budget is spent and nothing that was begun is open.
CREATE OR REPLACE FUNCTION whetstone.settle(p_study integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    why text;
BEGIN
    IF NOT EXISTS (SELECT 1 FROM whetstone.studies WHERE study_id = p_study AND state IN ('running', 'paused')) THEN
        RETURN;
    END IF;
    why := whetstone.spent(p_study);
    IF why IS NULL
        OR EXISTS (SELECT 1 FROM whetstone.attempts WHERE study_id = p_study AND state = 'leased')
        OR EXISTS (SELECT 1 FROM whetstone.head(p_study, true, '{}')) THEN
        RETURN;
    END IF;
    UPDATE whetstone.studies SET state = 'finished', reason = why, finished_at = clock_timestamp()
    WHERE study_id = p_study;
    PERFORM whetstone.notify('study', p_study);
END
$$;

-- A lease has ended: the study may be done, and where it is not, there is room for another lease.
CREATE OR REPLACE FUNCTION whetstone.lease_ended(p_study integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM whetstone.settle(p_study);
    PERFORM whetstone.notify('trial', p_study);
    PERFORM whetstone.notify('work', p_study);
END
$$;
