-- What a pruner asks about one trial: what the trial itself has reported, and of the others what the asking process
-- does not know yet. NULL where there is no such study.
--
-- `p_newest` is the largest trial id it has heard of, `p_open` those that had not ended then, `p_revision` the last
-- correction: `ended` are those that have ended since, `open` those that have not. `p_behind` are ended trials whose
-- values at `p_step` it lacks, NULL all of the study; `at` are values of complete trials at the trial's last step,
-- which is `p_step` unless a later one was stored before. `p_rungs` and `p_longest` say what else is wanted.
CREATE OR REPLACE FUNCTION whetstone.judging(
    p_study integer, p_trial integer, p_step integer, p_newest integer, p_open integer[], p_revision bigint,
    p_behind integer[], p_rungs boolean, p_longest boolean
) RETURNS json LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    about record;
    own json;
    last_step integer;
    revised integer[];
    latest bigint;
    ended integer[];
    still integer[];
    at json;
    rungs json;
    longest json;
BEGIN
    SELECT s.study_name AS name, a.value_json AS resource INTO about
    FROM public.studies s
    LEFT JOIN public.study_system_attributes a ON a.study_id = s.study_id AND a.key = 'whetstone:pruner_resource'
    WHERE s.study_id = p_study;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;

    SELECT json_build_object('steps', array_agg(r.step), 'vals', array_agg(CASE r.intermediate_value_type
               WHEN 'NAN' THEN 'NaN' WHEN 'INF_POS' THEN 'Infinity' WHEN 'INF_NEG' THEN '-Infinity'
               ELSE r.intermediate_value END)),
           greatest(max(r.step), p_step)
    INTO own, last_step FROM public.trial_intermediate_values r WHERE r.trial_id = p_trial;

    SELECT max(r.revision_id), array_agg(r.trial_id) INTO latest, revised
    FROM whetstone.revisions r WHERE r.study_id = p_study AND r.revision_id > p_revision;

    SELECT array_agg(t.trial_id) FILTER (WHERE t.state NOT IN ('RUNNING', 'WAITING')),
           array_agg(t.trial_id) FILTER (WHERE t.state IN ('RUNNING', 'WAITING'))
    INTO ended, still
    FROM (
        SELECT n.trial_id, n.state FROM public.trials n
        WHERE n.study_id = p_study
          AND n.number > coalesce((SELECT x.number FROM public.trials x WHERE x.trial_id = p_newest), -1)
        UNION ALL
        SELECT o.trial_id, o.state FROM unnest(p_open) AS open (id) JOIN public.trials o ON o.trial_id = open.id
    ) AS t;

    IF p_behind IS NULL THEN
        SELECT json_build_object('ids', array_agg(t.trial_id), 'vals', array_agg(CASE r.intermediate_value_type
                   WHEN 'NAN' THEN 'NaN' WHEN 'INF_POS' THEN 'Infinity' WHEN 'INF_NEG' THEN '-Infinity'
                   ELSE r.intermediate_value END))
        INTO at FROM public.trials t CROSS JOIN LATERAL (
            SELECT * FROM public.trial_intermediate_values x WHERE x.trial_id = t.trial_id AND x.step = last_step LIMIT 1
        ) AS r
        WHERE t.study_id = p_study AND t.state = 'COMPLETE';
    ELSE
        SELECT json_build_object('ids', array_agg(t.id), 'vals', array_agg(CASE r.intermediate_value_type
                   WHEN 'NAN' THEN 'NaN' WHEN 'INF_POS' THEN 'Infinity' WHEN 'INF_NEG' THEN '-Infinity'
                   ELSE r.intermediate_value END))
        INTO at FROM unnest(p_behind || ended) AS t (id)
        JOIN public.trial_intermediate_values r ON r.trial_id = t.id AND r.step = last_step;
    END IF;

    IF p_rungs THEN
        SELECT json_agg(json_build_array(t.trial_id, t.number, r.key, r.value_json)) INTO rungs
        FROM unnest(ended || still) AS wanted (id) JOIN public.trials t ON t.trial_id = wanted.id
        JOIN public.trial_system_attributes r ON r.trial_id = t.trial_id AND r.key LIKE 'completed\_rung\_%';
    END IF;
    IF p_longest THEN
        SELECT json_agg(json_build_array(t.id, r.step)) INTO longest
        FROM unnest(ended) AS t (id) CROSS JOIN LATERAL (
            SELECT x.step FROM public.trial_intermediate_values x WHERE x.trial_id = t.id ORDER BY x.step DESC LIMIT 1
        ) AS r;
    END IF;

    RETURN json_build_object(
        'name', about.name, 'resource', about.resource, 'own', own, 'step', last_step,
        'revision', coalesce(latest, p_revision), 'revised', coalesce(revised, '{}'),
        'ended', coalesce(ended, '{}'), 'open', coalesce(still, '{}'),
        'complete', (SELECT json_agg(t.trial_id) FROM public.trials t
                     WHERE t.trial_id = ANY(ended) AND t.state = 'COMPLETE'),
        'marks', (SELECT json_agg(json_build_array(a.trial_id, a.key, a.value_json))
                  FROM public.trial_system_attributes a
                  WHERE a.trial_id = ANY(ended) AND (a.key = 'whetstone:cancelled'
                      OR a.key LIKE 'constraints%' AND a.value_json NOT IN ('0', '0.0'))),
        'at', at, 'rungs', rungs, 'longest', longest);
END
$$;
