-- What has become of a study since a history last looked (whetstone.changes), and the form in which trials travel.

-- These trials, column by column, in no order. A parameter is its internal value and its place in `spelled`, which
-- holds each name and distribution once, taken from a few of the trials; `places` stands only where a trial has others
-- than these, and a trial with one that is not among them has all its names and distributions in `others`. Attributes
-- are the text that is stored; numbers that JSON lacks are text too. Of its reports a finished trial brings the last;
-- `whole` brings all of every trial, and user attributes. The plan is the same for one trial and for ten thousand.
CREATE OR REPLACE FUNCTION whetstone.trials_as_json(ids integer[], whole boolean) RETURNS json
LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    names text[];
    texts text[];
    usual bigint[];
    strange integer[];
    trials json;
    vals json;
    params json;
    others json;
    marks json;
    notes json;
    reports json;
BEGIN
    SELECT json_build_object(
        'ids', array_agg(t.trial_id), 'numbers', array_agg(t.number), 'states', array_agg(t.state),
        'began', array_agg(t.datetime_start), 'ended', array_agg(t.datetime_complete))
    INTO trials FROM public.trials t WHERE t.trial_id = ANY(ids);

    SELECT json_build_object('ids', array_agg(v.id), 'vals', array_agg(v.val)) INTO vals
    FROM (
        SELECT x.trial_id AS id, CASE x.value_type WHEN 'INF_POS' THEN 'Infinity' WHEN 'INF_NEG' THEN '-Infinity'
            ELSE x.value END AS val
        FROM public.trial_values x WHERE x.trial_id = ANY(ids) ORDER BY x.trial_id, x.objective
    ) AS v;

    SELECT array_agg(d.param_name), array_agg(d.distribution_json), array_agg(d.place) INTO names, texts, usual
    FROM (
        SELECT p.param_name, p.distribution_json, row_number() OVER (ORDER BY min(p.param_id)) - 1 AS place
        FROM public.trial_params p WHERE p.trial_id = ANY(ids[:20] || ids[cardinality(ids) - 19:])
        GROUP BY 1, 2 ORDER BY 3 LIMIT 1000
    ) AS d;
    SELECT json_build_object('ids', array_agg(g.id), 'internals', json_agg(g.internals),
               'places', json_object_agg(g.id, g.places) FILTER (WHERE g.places <> usual)),
           array_agg(g.id) FILTER (WHERE g.unknown)
    INTO params, strange
    FROM (
        SELECT p.trial_id AS id, array_agg(p.param_value ORDER BY p.param_id) AS internals,
            array_agg(d.place ORDER BY p.param_id) AS places, count(*) > count(d.place) AS unknown
        FROM public.trial_params p
        LEFT JOIN unnest(names, texts, usual) AS d (name, text, place)
            ON d.name = p.param_name AND d.text = p.distribution_json
        WHERE p.trial_id = ANY(ids) GROUP BY p.trial_id
    ) AS g;
    SELECT json_object_agg(g.id, g.spelled) INTO others
    FROM (
        SELECT p.trial_id AS id, json_agg(json_build_array(p.param_name, p.distribution_json) ORDER BY p.param_id)
            AS spelled
        FROM public.trial_params p WHERE p.trial_id = ANY(strange) GROUP BY p.trial_id
    ) AS g;

    SELECT json_build_object('ids', array_agg(a.id), 'keys', array_agg(a.key), 'texts', array_agg(a.text)) INTO marks
    FROM (
        SELECT x.trial_id AS id, x.key, x.value_json AS text
        FROM public.trial_system_attributes x WHERE x.trial_id = ANY(ids) ORDER BY x.trial_system_attribute_id
    ) AS a;

    IF whole THEN
        SELECT json_build_object('ids', array_agg(a.id), 'keys', array_agg(a.key), 'texts', array_agg(a.text))
        INTO notes
        FROM (
            SELECT x.trial_id AS id, x.key, x.value_json AS text
            FROM public.trial_user_attributes x WHERE x.trial_id = ANY(ids) ORDER BY x.trial_user_attribute_id
        ) AS a;
        SELECT json_build_object('ids', array_agg(r.id), 'steps', json_agg(r.steps), 'vals', json_agg(r.vals))
        INTO reports
        FROM (
            SELECT x.trial_id AS id, array_agg(x.step ORDER BY x.step) AS steps,
                array_agg(CASE x.intermediate_value_type WHEN 'NAN' THEN 'NaN' WHEN 'INF_POS' THEN 'Infinity'
                          WHEN 'INF_NEG' THEN '-Infinity' ELSE x.intermediate_value END ORDER BY x.step) AS vals
            FROM public.trial_intermediate_values x WHERE x.trial_id = ANY(ids) GROUP BY x.trial_id
        ) AS r;
    ELSE
        SELECT json_build_object('ids', array_agg(t.trial_id), 'steps', array_agg(r.step), 'vals', array_agg(
            CASE r.intermediate_value_type WHEN 'NAN' THEN 'NaN' WHEN 'INF_POS' THEN 'Infinity'
            WHEN 'INF_NEG' THEN '-Infinity' ELSE r.intermediate_value END))
        INTO reports
        FROM public.trials t CROSS JOIN LATERAL (
            SELECT * FROM public.trial_intermediate_values x WHERE x.trial_id = t.trial_id ORDER BY x.step DESC LIMIT 1
        ) AS r
        WHERE t.trial_id = ANY(ids) AND t.state NOT IN ('RUNNING', 'WAITING');
    END IF;

    RETURN json_build_object(
        'trials', trials, 'values', vals, 'params', params, 'others', others,
        'spelled', (SELECT json_agg(json_build_array(d.name, d.text)) FROM unnest(names, texts) AS d (name, text)),
        'marks', marks, 'notes', notes, 'reports', reports);
END
$$;

-- The study, and of its trials those above `newest`, those of `running` that run no more, those of `waiting` that wait
-- no more, and those that a revision above `revision` names: their ids, and what they are in `columns`. NULL where
-- there is no such study. Trials of a study are numbered in the order of their ids, and revisions are added under its
-- lock: so neither turns up below what was seen.
CREATE OR REPLACE FUNCTION whetstone.changes(
    study integer, newest integer, running integer[], waiting integer[], revision bigint
) RETURNS json LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    name text;
    direction text;
    attributes json;
    revised integer[];
    latest bigint;
    ids integer[];
    next integer;
    last integer;
BEGIN
    SELECT s.study_name, d.direction::text INTO name, direction
    FROM public.studies s JOIN public.study_directions d ON d.study_id = s.study_id AND d.objective = 0
    WHERE s.study_id = study;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT json_object_agg(a.key, a.value_json) INTO attributes
    FROM public.study_system_attributes a WHERE a.study_id = study;
    SELECT max(r.revision_id), array_agg(r.trial_id) INTO latest, revised
    FROM whetstone.revisions r WHERE r.study_id = study AND r.revision_id > revision;
    -- Between two bounds: with one of them the planner expects a third of the study, and reads all of it.
    SELECT coalesce((SELECT t.number + 1 FROM public.trials t WHERE t.trial_id = newest), 0), max(t.number)
    INTO next, last FROM public.trials t WHERE t.study_id = study;
    SELECT array_agg(changed.id ORDER BY changed.id) INTO ids FROM (
        SELECT t.trial_id AS id FROM public.trials t WHERE t.study_id = study AND t.number BETWEEN next AND last
        UNION
        SELECT t.trial_id FROM unnest(running) AS r (id) JOIN public.trials t ON t.trial_id = r.id
        WHERE t.state <> 'RUNNING'
        UNION
        SELECT t.trial_id FROM unnest(waiting) AS w (id) JOIN public.trials t ON t.trial_id = w.id
        WHERE t.state <> 'WAITING'
        UNION
        SELECT unnest(revised)
    ) AS changed;
    RETURN json_build_object(
        'name', name, 'direction', direction, 'attributes', coalesce(attributes, '{}'),
        'revision', coalesce(latest, revision), 'trials', coalesce(ids, '{}'),
        'columns', CASE WHEN ids IS NOT NULL THEN whetstone.trials_as_json(ids, false) END);
END
$$;
