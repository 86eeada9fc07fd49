"""The statements that read trials and studies, and the one lock that everything which numbers or counts takes first.

Locks are taken in one order everywhere: the study's row, then the trial's, then the attempt's. Under READ COMMITTED a
statement sees what was committed when it began, so whoever counts or numbers reads in a new statement after the lock.
The study's lock is NO KEY UPDATE: it excludes itself and stock Optuna's FOR UPDATE, but not the key-share locks that
foreign keys of trials, attempts and revisions take on the same row, so a report never waits for it.
"""

# ruff: noqa: S608 -- the statements are put together of constants of this module; all values are bound
from __future__ import annotations

import sqlalchemy as sa

WINDOW = 400
"""So many values of all studies are looked through for the best of one, before all of its own are sorted;"""
WIDE = 1_500
"""and so many for a page of trials: those that diverged often share their value, and ties come all or not at all."""
LOOKED_UP = 3_000
"""The marks of so many trials are looked up one by one; where there are more, all trials are read beside them."""

# Lock a study for numbering, counting and changing its state.
LOCK_STUDY = sa.text("SELECT study_id FROM public.studies WHERE study_id = :study FOR NO KEY UPDATE")

# Against everybody, also those who insert trials or attempts. Taken at once: a lock raised later invites a deadlock.
LOCK_STUDY_TO_DELETE = sa.text("SELECT study_id FROM public.studies WHERE study_id = :study FOR UPDATE")

# Lock one trial against another tell, a cancel, an expiry, and stock Optuna's own changes of state.
LOCK_TRIAL = sa.text("""
    SELECT trial_id, number, state::text AS state FROM public.trials WHERE trial_id = :trial_id FOR NO KEY UPDATE
""")

# An infeasible trial is COMPLETE with a violated constraint; a cancelled one is FAIL with our mark. Both marks have a
# partial index. A row's own state looks its mark up as a value, which the planner cannot answer by reading the marks of
# all trials of all studies; a filter leaves it the choice.
_INFEASIBLE = """
    public.trial_system_attributes m
    WHERE m.trial_id = t.trial_id AND m.key = 'constraints:infeasible' AND m.value_json NOT IN ('0', '0.0')
"""
_CANCELLED = "public.trial_system_attributes m WHERE m.trial_id = t.trial_id AND m.key = 'whetstone:cancelled'"
INFEASIBLE = f"(SELECT TRUE FROM {_INFEASIBLE}) IS NOT NULL"
CANCELLED = f"(SELECT TRUE FROM {_CANCELLED}) IS NOT NULL"

STATE = f"""
    CASE t.state
        WHEN 'WAITING' THEN 'queued'
        WHEN 'RUNNING' THEN 'leased'
        WHEN 'PRUNED' THEN 'pruned'
        WHEN 'COMPLETE' THEN CASE WHEN {INFEASIBLE} THEN 'infeasible' ELSE 'complete' END
        ELSE CASE WHEN {CANCELLED} THEN 'cancelled' ELSE 'failed' END
    END
"""

STATE_FILTER = {
    None: "TRUE",
    "queued": "t.state = 'WAITING'",
    "leased": "t.state = 'RUNNING'",
    "pruned": "t.state = 'PRUNED'",
    "complete": f"t.state = 'COMPLETE' AND NOT EXISTS (SELECT 1 FROM {_INFEASIBLE})",
    "infeasible": f"t.state = 'COMPLETE' AND EXISTS (SELECT 1 FROM {_INFEASIBLE})",
    "failed": f"t.state = 'FAIL' AND NOT EXISTS (SELECT 1 FROM {_CANCELLED})",
    "cancelled": f"t.state = 'FAIL' AND EXISTS (SELECT 1 FROM {_CANCELLED})",
}

# Everything a row of the trials table shows, for the trials of one page; `place` keeps the page's order. LIMIT 1 makes
# the planner look each trial up: left to itself it reads a table of ten thousand rows to find fifty by key.
TRIAL_ROWS = sa.text(f"""
    SELECT t.trial_id, t.study_id, t.number, {STATE} AS state,
           v.value,
           t.datetime_start AT TIME ZONE 'UTC' AS started_at,
           t.datetime_complete AT TIME ZONE 'UTC' AS ended_at,
           p.names, p.internals, m.keys, m.marks,
           coalesce(a.attempts, 0) AS attempts, a.seconds, a.first_leased_at, a.last_epoch,
           l.state AS last_state, l.reason AS last_reason, l.stop_requested, l.attempt AS last_attempt, w.name AS worker
    FROM unnest(CAST(:trial_ids AS integer[])) WITH ORDINALITY AS page (trial_id, place)
    CROSS JOIN LATERAL (SELECT * FROM public.trials WHERE trial_id = page.trial_id LIMIT 1) t
    LEFT JOIN LATERAL (
        SELECT value FROM public.trial_values WHERE trial_id = page.trial_id AND objective = 0 LIMIT 1
    ) v ON TRUE
    LEFT JOIN LATERAL (
        SELECT array_agg(param_name) AS names, array_agg(param_value) AS internals
        FROM public.trial_params WHERE trial_id = t.trial_id
    ) p ON TRUE
    LEFT JOIN LATERAL (
        SELECT array_agg(key) AS keys, array_agg(value_json) AS marks
        FROM public.trial_system_attributes
        WHERE trial_id = t.trial_id
          AND (key LIKE 'whetstone:%' OR key = 'fixed_params')
    ) m ON TRUE
    LEFT JOIN LATERAL (
        SELECT count(*) AS attempts, min(leased_at) AS first_leased_at,
               sum(extract(epoch FROM coalesce(ended_at, clock_timestamp()) - leased_at)) AS seconds,
               (array_agg(last_epoch ORDER BY attempt DESC) FILTER (WHERE last_epoch IS NOT NULL))[1] AS last_epoch
        FROM whetstone.attempts WHERE trial_id = t.trial_id
    ) a ON TRUE
    LEFT JOIN LATERAL (
        SELECT * FROM whetstone.attempts WHERE trial_id = t.trial_id ORDER BY attempt DESC LIMIT 1
    ) l ON TRUE
    LEFT JOIN whetstone.workers w ON w.worker_id = l.worker_id
    ORDER BY page.place
""")


def trials_by_number(state: str | None) -> sa.TextClause:
    """One page of a study's trials in the order of their numbers, from after `:number`."""
    return sa.text(f"""
        SELECT t.trial_id, t.number, NULL::float8 AS value FROM public.trials t
        WHERE t.study_id = :study AND t.number > :number AND {STATE_FILTER[state]}
        ORDER BY t.number LIMIT :limit
    """)


def _by_value(state: str | None, *, descending: bool, cursor: bool, window: int, study: str = ":study") -> str:
    """The trials that have a finite value, best (or smallest) first.

    The index on values knows no studies. `near` looks through the first few hundred values of all studies and nearly
    always finds enough of this one; where it does not, because others' values stand before, `far` sorts this study's.
    Either way the cost is bounded by the study's own size.
    """
    order, within, least = ("DESC", ">", "-Infinity") if descending else ("ASC", "<", "Infinity")
    beyond, onward = "TRUE", "TRUE"
    if cursor:
        further = "<" if descending else ">"
        onward = f"v.value {further}= :value"
        beyond = f"{onward} AND (v.value <> :value OR t.number > :number)"
    finite = "v.objective = 0 AND v.value IS NOT NULL"
    return f"""
        WITH edge AS (
            SELECT v.value FROM public.trial_values v WHERE {finite} AND {onward}
            ORDER BY v.value {order} OFFSET {window} LIMIT 1
        ), near AS MATERIALIZED (
            SELECT t.trial_id, t.number, v.value FROM (
                SELECT v.trial_id, v.value FROM public.trial_values v
                WHERE {finite} AND {onward} AND v.value {within} coalesce((SELECT value FROM edge), '{least}')
                ORDER BY v.value {order} LIMIT {window}
            ) v CROSS JOIN LATERAL (SELECT * FROM public.trials WHERE trial_id = v.trial_id LIMIT 1) t
            WHERE t.study_id = {study} AND {STATE_FILTER[state]} AND {beyond}
            ORDER BY v.value {order}, t.number LIMIT :limit
        ), enough AS MATERIALIZED (
            SELECT count(*) >= :limit OR NOT EXISTS (SELECT 1 FROM edge) AS found FROM near
        ), far AS (
            SELECT t.trial_id, t.number, v.value FROM public.trials t
            JOIN public.trial_values v ON v.trial_id = t.trial_id
            WHERE NOT (SELECT found FROM enough) AND t.study_id = {study} AND {finite}
              AND {STATE_FILTER[state]} AND {beyond}
            ORDER BY v.value + 0 {order}, t.number LIMIT :limit
        )
        SELECT trial_id, number, value FROM near WHERE (SELECT found FROM enough)
        UNION ALL
        SELECT trial_id, number, value FROM far
    """


def trials_by_value(state: str | None, *, descending: bool, cursor: bool) -> sa.TextClause:
    """One page of the trials that have a finite value, in its order; with `cursor` from after (`:value`, `:number`)."""
    order = "DESC" if descending else "ASC"
    return sa.text(
        f"{_by_value(state, descending=descending, cursor=cursor, window=WIDE)} ORDER BY value {order}, number"
    )


def trials_without_value(state: str | None) -> sa.TextClause:
    """One page of the trials that have no finite value, in the order of their numbers, from after `:number`.

    A complete trial always has a row of values, so only those few that hold no number have to be looked at.
    """
    return sa.text(f"""
        SELECT t.trial_id, t.number, NULL::float8 AS value FROM public.trials t
        WHERE t.study_id = :study AND t.number > :number AND {STATE_FILTER[state]}
          AND CASE WHEN t.state = 'COMPLETE' THEN t.trial_id IN (
                  SELECT v.trial_id FROM public.trial_values v WHERE v.objective = 0 AND v.value IS NULL)
              ELSE (SELECT v.value FROM public.trial_values v WHERE v.trial_id = t.trial_id AND v.objective = 0) IS NULL
              END
        ORDER BY t.number LIMIT :limit
    """)


def best_trials(direction: str) -> sa.TextClause:
    """The best feasible trials of one study; on equal values the earlier one is the better."""
    return trials_by_value("complete", descending=direction == "maximize", cursor=False)


def best_of_each(direction: str) -> sa.TextClause:
    """The best feasible trial of each of several studies of one direction, where it has one."""
    best = _by_value("complete", descending=direction == "maximize", cursor=False, window=WINDOW, study="s.study_id")
    return sa.text(f"""
        SELECT s.study_id, b.trial_id FROM unnest(CAST(:studies AS integer[])) AS s (study_id)
        CROSS JOIN LATERAL ({best}) AS b
    """)


def progress(direction: str) -> sa.TextClause:
    """Every finished trial in order of finishing, with the best feasible value so far."""
    extreme = "max" if direction == "maximize" else "min"
    return sa.text(f"""
        SELECT number, state, value, ended_at,
               {extreme}(value) FILTER (WHERE state = 'complete') OVER (ORDER BY ended_at, number) AS best
        FROM (
            SELECT t.number, v.value, t.datetime_complete AT TIME ZONE 'UTC' AS ended_at,
                   CASE t.state
                       WHEN 'PRUNED' THEN 'pruned'
                       WHEN 'COMPLETE' THEN CASE WHEN i.trial_id IS NULL THEN 'complete' ELSE 'infeasible' END
                       ELSE CASE WHEN c.trial_id IS NULL THEN 'failed' ELSE 'cancelled' END
                   END AS state
            FROM public.trials t
            LEFT JOIN public.trial_values v ON v.trial_id = t.trial_id AND v.objective = 0
            LEFT JOIN public.trial_system_attributes i ON i.trial_id = t.trial_id
                 AND i.key = 'constraints:infeasible' AND i.value_json NOT IN ('0', '0.0')
            LEFT JOIN public.trial_system_attributes c ON c.trial_id = t.trial_id AND c.key = 'whetstone:cancelled'
            WHERE t.study_id = :study AND t.state IN ('COMPLETE', 'PRUNED', 'FAIL') AND t.datetime_complete IS NOT NULL
        ) AS finished
        ORDER BY ended_at, number
    """)


# A study's number, name, direction and everything of ours.
STUDY_ROWS = """
    SELECT s.*, o.study_name, d.direction::text AS direction
    FROM whetstone.studies s
    JOIN public.studies o ON o.study_id = s.study_id
    JOIN public.study_directions d ON d.study_id = s.study_id AND d.objective = 0
"""
STUDY = sa.text(f"{STUDY_ROWS} WHERE s.study_id = :study")

# The newest studies first. An exact match of the name comes before all, and only on the first page.
STUDIES = sa.text(f"""
    {STUDY_ROWS}
    WHERE (CAST(:state AS text) IS NULL OR s.state = :state)
      AND (CAST(:name AS text) IS NULL OR strpos(lower(o.study_name), lower(:name)) > 0)
      AND (:first OR o.study_name IS DISTINCT FROM :name)
      AND (CAST(:before AS bigint) IS NULL OR s.study_id < :before)
    ORDER BY (o.study_name IS NOT DISTINCT FROM :name) DESC, s.study_id DESC LIMIT :limit
""")

# Trials by study and state: counted from an index, of which the marked are taken away, found by their marks. These know
# no studies: the trials of few are looked up, those of many are found by reading all.
COUNTS = sa.text("""
    WITH marks AS MATERIALIZED (
        SELECT m.trial_id, CAST('COMPLETE' AS public.trialstate) AS state FROM public.trial_system_attributes m
        WHERE m.key = 'constraints:infeasible' AND m.value_json NOT IN ('0', '0.0')
        UNION ALL
        SELECT m.trial_id, 'FAIL' FROM public.trial_system_attributes m WHERE m.key = 'whetstone:cancelled'
    ), few AS MATERIALIZED (
        SELECT count(*) <= :few AS found FROM marks
    ), marked AS MATERIALIZED (
        SELECT t.study_id, t.state, count(*) AS trials
        FROM marks m CROSS JOIN LATERAL (SELECT * FROM public.trials WHERE trial_id = m.trial_id LIMIT 1) t
        WHERE (SELECT found FROM few) AND t.state = m.state AND t.study_id = ANY(CAST(:studies AS integer[]))
        GROUP BY 1, 2
        UNION ALL
        SELECT t.study_id, t.state, count(*)
        FROM marks m JOIN public.trials t ON t.trial_id = m.trial_id AND t.state = m.state
        WHERE NOT (SELECT found FROM few) AND t.study_id = ANY(CAST(:studies AS integer[]))
        GROUP BY 1, 2
    )
    SELECT s.study_id, k.name AS state, c.trials - coalesce(m.trials, 0) AS trials
    FROM unnest(CAST(:studies AS integer[])) AS s (study_id)
    CROSS JOIN (VALUES
        (CAST('WAITING' AS public.trialstate), 'queued'), ('RUNNING', 'leased'), ('PRUNED', 'pruned'),
        ('COMPLETE', 'complete'), ('FAIL', 'failed')
    ) AS k (state, name)
    CROSS JOIN LATERAL (
        SELECT count(*) AS trials FROM public.trials t WHERE t.study_id = s.study_id AND t.state = k.state
    ) AS c
    LEFT JOIN marked m ON m.study_id = s.study_id AND m.state = k.state
    UNION ALL
    SELECT study_id, CASE state WHEN 'COMPLETE' THEN 'infeasible' ELSE 'cancelled' END, trials FROM marked
""")

# What of their budgets studies have used: counted by whoever begins or ends an attempt, and what is running now.
USED = sa.text("""
    SELECT s.study_id, s.trials_used AS trials, (s.seconds_used + coalesce(live.seconds, 0)) / 3600 AS hours
    FROM whetstone.studies s
    CROSS JOIN LATERAL (
        SELECT sum(extract(epoch FROM clock_timestamp() - a.leased_at)) AS seconds
        FROM whetstone.attempts a WHERE a.study_id = s.study_id AND a.state = 'leased'
    ) AS live
    WHERE s.study_id = ANY(CAST(:studies AS integer[]))
""")
