"""What must hold: statements over the database itself, and over what clients were told, never over one coordinator.

`Auditor.look` may be asked at any moment (everything it reads is one snapshot); `Auditor.before` and `after` bracket a
step; `compare` holds the books of the clients against the database when all is over. Each returns what is broken, one
sentence each.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import psycopg2.extras

from hpo.protocol import Lease, Verdict
from tests.faults.schedule_clients import Call, measured

RESULTS = ("complete", "infeasible", "pruned", "failed")
_STORED = {"complete": "COMPLETE", "infeasible": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}

_CANCELLED = """EXISTS (SELECT 1 FROM public.trial_system_attributes m
                        WHERE m.trial_id = t.trial_id AND m.key = 'whetstone:cancelled')"""

# Trials with what their attempts come to.
_TRIALS = f"""
    SELECT t.trial_id, t.study_id, t.number, t.state::text AS state, {_CANCELLED} AS cancelled,
           count(a.*) AS attempts, coalesce(max(a.attempt), 0) AS newest,
           count(*) FILTER (WHERE a.state = 'leased') AS live,
           count(*) FILTER (WHERE a.state IN ('complete', 'infeasible', 'pruned', 'failed')) AS results,
           count(*) FILTER (WHERE a.state IN ('lost', 'stalled')) AS deaths,
           max(a.state) FILTER (WHERE a.state IN ('complete', 'infeasible', 'pruned', 'failed')) AS result,
           array_agg(a.attempt ORDER BY a.token) FILTER (WHERE a.attempt IS NOT NULL) AS by_token,
           (SELECT count(*) FROM public.trial_values v WHERE v.trial_id = t.trial_id) AS vals
    FROM public.trials t LEFT JOIN whetstone.attempts a ON a.trial_id = t.trial_id
    WHERE t.study_id = ANY(%(studies)s)
    GROUP BY t.trial_id
"""

# Everything that must hold at every moment, as rows that must not be there.
_NEVER = f"""
    WITH trials AS ({_TRIALS}), studies AS (
        SELECT s.study_id, s.state, s.budget_trials, s.concurrency, s.max_attempts FROM whetstone.studies s
        WHERE s.study_id = ANY(%(studies)s)
    )
    SELECT format('trial %%s/%%s is %%s and has %%s live leases', study_id, number, state, live) FROM trials
    WHERE (state = 'RUNNING') <> (live = 1) OR live > 1
    UNION ALL
    SELECT format('trial %%s/%%s has %%s results', study_id, number, results) FROM trials WHERE results > 1
    UNION ALL
    SELECT format('trial %%s/%%s was told %%s and is %%s', study_id, number, result, state) FROM trials
    WHERE results = 1 AND state <> CASE result WHEN 'pruned' THEN 'PRUNED' WHEN 'failed' THEN 'FAIL' ELSE 'COMPLETE' END
    UNION ALL
    SELECT format('trial %%s/%%s is %%s and nobody told that', study_id, number, state) FROM trials
    WHERE results = 0 AND attempts > 0 AND state IN ('COMPLETE', 'PRUNED')
    UNION ALL
    SELECT format('trial %%s/%%s is %%s with %%s values', study_id, number, state, vals) FROM trials
    WHERE (state = 'COMPLETE' AND vals <> 1) OR (state IN ('RUNNING', 'WAITING', 'FAIL') AND vals <> 0) OR vals > 1
    UNION ALL
    SELECT format('the attempts of trial %%s/%%s by their tokens: %%s', study_id, number, by_token) FROM trials
    WHERE attempts > 0 AND (by_token IS DISTINCT FROM ARRAY(SELECT generate_series(1, newest)))
    UNION ALL
    SELECT format('the numbers of study %%s: %%s', study_id, array_agg(number ORDER BY number)) FROM trials
    GROUP BY study_id HAVING min(number) <> 0 OR max(number) <> count(*) - 1 OR count(DISTINCT number) <> count(*)
    UNION ALL
    SELECT format('trial %%s/%%s has died %%s times of %%s', t.study_id, t.number, t.deaths, s.max_attempts)
    FROM trials t JOIN studies s USING (study_id)
    WHERE t.deaths > s.max_attempts OR (t.deaths = s.max_attempts AND (t.state <> 'FAIL' OR t.live > 0))
    UNION ALL
    SELECT format('trial %%s/%%s failed, nobody told so, and it died %%s times', t.study_id, t.number, t.deaths)
    FROM trials t JOIN studies s USING (study_id)
    WHERE t.state = 'FAIL' AND NOT t.cancelled AND t.results = 0 AND t.attempts > 0 AND t.deaths < s.max_attempts
    UNION ALL
    SELECT format('study %%s is stopped and trial %%s is queued', study_id, t.number)
    FROM studies s JOIN trials t USING (study_id) WHERE s.state = 'stopped' AND t.state = 'WAITING'
    UNION ALL
    SELECT format('study %%s is finished and trial %%s is begun and open', study_id, t.number)
    FROM studies s JOIN trials t USING (study_id)
    WHERE s.state = 'finished' AND (t.live > 0 OR (t.state = 'WAITING' AND t.attempts > 0))
    UNION ALL
    SELECT format('study %%s counts %%s trials as used, and they are %%s', s.study_id, w.trials_used, u.used)
    FROM studies s JOIN whetstone.studies w USING (study_id) CROSS JOIN LATERAL (
        SELECT count(*) AS used FROM trials t
        WHERE t.study_id = s.study_id AND t.attempts > 0 AND NOT (t.state = 'FAIL' AND t.cancelled)) u
    WHERE w.trials_used <> u.used
    UNION ALL
    SELECT format('study %%s counts %%s s as used, and they are %%s', s.study_id, w.seconds_used, u.seconds)
    FROM studies s JOIN whetstone.studies w USING (study_id) CROSS JOIN LATERAL (
        SELECT coalesce(sum(extract(epoch FROM a.ended_at - a.leased_at)), 0)::float8 AS seconds
        FROM whetstone.attempts a WHERE a.study_id = s.study_id) u
    WHERE abs(w.seconds_used - u.seconds) > 0.001
    UNION ALL
    SELECT format('lease %%s was taken back %%s before its time', attempt_id, expires_at - ended_at)
    FROM whetstone.attempts
    WHERE study_id = ANY(%(studies)s) AND state = 'lost' AND told IS NULL AND ended_at < expires_at
"""

# Trials that run without a live lease, and for how long.
_OVERDUE = """
    SELECT attempt_id, extract(epoch FROM clock_timestamp() - expires_at)::float8 AS seconds FROM whetstone.attempts
    WHERE study_id = ANY(%(studies)s) AND state = 'leased' AND expires_at < clock_timestamp()
"""

# A study as the rules of leasing see it.
STANDING = f"""
    SELECT s.study_id, s.state, s.budget_trials, s.concurrency,
           (SELECT coalesce(max(attempt_id), 0) FROM whetstone.attempts a WHERE a.study_id = s.study_id) AS newest,
           (SELECT count(*) FROM whetstone.attempts a WHERE a.study_id = s.study_id AND a.state = 'leased') AS live,
           (SELECT count(*) FROM ({_TRIALS}) t WHERE t.study_id = s.study_id AND t.attempts > 0
               AND NOT (t.state = 'FAIL' AND t.cancelled)) AS used
    FROM whetstone.studies s WHERE s.study_id = ANY(%(studies)s)
"""

_BUSY = """
    SELECT count(*) > 0 AS busy FROM pg_stat_activity
    WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()
"""

# All that a repeated call must leave as it was: everything but the times of renewal.
_WHOLE = {
    "studies": "SELECT to_jsonb(x) FROM whetstone.studies x WHERE study_id = ANY(%(studies)s) ORDER BY study_id",
    "attempts": """SELECT to_jsonb(x) - 'renewed_at' - 'expires_at' FROM whetstone.attempts x
                   WHERE study_id = ANY(%(studies)s) ORDER BY attempt_id""",
    "metrics": """SELECT to_jsonb(x) - 'at' FROM whetstone.metrics x JOIN whetstone.attempts a USING (attempt_id)
                  WHERE a.study_id = ANY(%(studies)s) ORDER BY attempt_id, epoch""",
    "revisions": "SELECT to_jsonb(x) FROM whetstone.revisions x WHERE study_id = ANY(%(studies)s) ORDER BY revision_id",
    "trials": "SELECT to_jsonb(x) FROM public.trials x WHERE study_id = ANY(%(studies)s) ORDER BY trial_id",
    **{
        table: f"""SELECT to_jsonb(x) FROM public.{table} x JOIN public.trials t USING (trial_id)
                   WHERE t.study_id = ANY(%(studies)s) ORDER BY 1"""
        for table in ("trial_values", "trial_params", "trial_system_attributes", "trial_intermediate_values")
    },
}


class Auditor:
    """A reader with a connection of its own to the database, past every proxy and every coordinator."""

    def __init__(self, url: str) -> None:
        self._conn = psycopg2.connect(url, cursor_factory=psycopg2.extras.NamedTupleCursor)
        self._conn.autocommit = True
        self.studies: list[int] = []
        self.planned = 0
        """Points that these studies were launched with."""
        self._before: dict[int, Any] = {}

    def rows(self, statement: str, **values: Any) -> list[Any]:
        with self._conn.cursor() as cursor:
            cursor.execute(statement, {"studies": self.studies, **values})
            return cursor.fetchall()

    def look(self) -> list[str]:
        """What is broken at this moment."""
        return [row[0] for row in self.rows(_NEVER)]

    def overdue(self) -> list[tuple[int, float]]:
        """Leases that are past their term and still count, and by how many seconds."""
        return [(row.attempt_id, row.seconds) for row in self.rows(_OVERDUE)]

    def before(self) -> None:
        self._before = {row.study_id: row for row in self.rows(STANDING)}

    def after(self) -> list[str]:
        """What was leased since `before` and should not have been. At most one call may have changed the study."""
        broken: list[str] = []
        for now in self.rows(STANDING):
            was = self._before.get(now.study_id)
            if was is None:
                continue
            limits = (was.budget_trials, now.budget_trials)
            if None not in limits and now.used > max(was.used, *limits):
                broken.append(f"study {now.study_id} has used {now.used} of {max(limits)} trials (before: {was.used})")
            limits = (was.concurrency, now.concurrency)
            if None not in limits and now.live > max(was.live, *limits):
                broken.append(f"study {now.study_id} has {now.live} leases, and its concurrency is {max(limits)}")
            if was.state == now.state and now.state != "running" and now.newest > was.newest:
                broken.append(f"study {now.study_id} is {now.state} and lease {now.newest} was given")
        return broken

    def whole(self) -> dict[str, str]:
        """Everything stored of these studies, for comparison."""
        return {
            table: json.dumps([row[0] for row in self.rows(statement)], sort_keys=True)
            for table, statement in _WHOLE.items()
        }

    def settle(self) -> None:
        """Wait until nothing is being done any more: what was cut off, or its coordinator killed, ends by itself."""
        end = time.monotonic() + 60
        while any(row.busy for row in self.rows(_BUSY)):
            assert time.monotonic() < end, "PostgreSQL is busy with a query that nobody waits for"
            time.sleep(0.01)

    def close(self) -> None:
        self._conn.close()


def compare(auditor: Auditor, calls: Sequence[Call]) -> list[str]:
    """Hold the clients' books against the database, when nothing is under way any more."""
    trials = {(row.study_id, row.number): row for row in auditor.rows(_TRIALS)}
    attempts = {
        row.attempt_id: row
        for row in auditor.rows(
            "SELECT *, extract(epoch FROM expires_at - renewed_at)::float8 AS term FROM whetstone.attempts "
            "WHERE study_id = ANY(%(studies)s)"
        )
    }
    values = dict(
        auditor.rows(
            "SELECT v.trial_id, v.value FROM public.trial_values v JOIN public.trials t USING (trial_id) "
            "WHERE t.study_id = ANY(%(studies)s)"
        )
    )
    known = [call for call in calls if call.known and call.error is None]
    return [
        *_tells(known, trials, attempts, values),
        *_releases(known, attempts),
        *_reports(auditor, known, attempts),
        *_leases(calls, attempts),
        *_queued(auditor, calls, trials),
        *_cancelled(known, trials),
        *_suggestions(auditor),
    ]


def _tells(known: Sequence[Call], trials: Any, attempts: Any, values: Any) -> list[str]:
    """Every acknowledged outcome is stored, there is one a trial, and the last acknowledged is the trial's."""
    broken: list[str] = []
    outcomes: dict[tuple[int, int], set[tuple[Any, ...]]] = defaultdict(set)
    for call in known:
        if call.method != "tell":
            continue
        assert call.lease is not None
        place, request, reply = (call.lease.study, call.lease.trial), call.args[1], call.answer
        trial, attempt = trials.get(place), attempts.get(call.lease.lease)
        outcomes[place].add((call.lease.lease, request.outcome, request.value))
        if trial is None or attempt is None:
            broken.append(f"{call} was acknowledged, and its trial is gone")
        elif (reply.study, reply.trial, reply.state) != (*place, request.outcome):
            broken.append(f"{call} was answered {reply}")
        elif attempt.state != request.outcome or attempt.told is None:
            broken.append(f"{call} was acknowledged, and the attempt is {attempt.state}")
        elif trial.state != _STORED[request.outcome]:
            broken.append(f"{call} was acknowledged, and the trial is {trial.state}")
        elif reply.value != values.get(trial.trial_id) or (
            request.value is not None and request.value != values.get(trial.trial_id)
        ):
            broken.append(f"{call} was answered {reply.value}, and {values.get(trial.trial_id)} is stored")
    for place, told in outcomes.items():
        if len(told) > 1:
            broken.append(f"trial {place} has more than one acknowledged outcome: {told}")
    return broken


def _releases(known: Sequence[Call], attempts: Any) -> list[str]:
    ends = {"stalled": ("stalled",), "broken": ("lost",)}
    broken: list[str] = []
    for call in known:
        if call.method == "release":
            assert call.lease is not None
            expected = ends.get(call.args[1].reason, ("released", "cancelled"))
            state = attempts[call.lease.lease].state
            if state not in expected:
                broken.append(f"{call} was acknowledged, and the attempt is {state}")
    return broken


def _reports(auditor: Auditor, known: Sequence[Call], attempts: Any) -> list[str]:
    """Every acknowledged epoch is stored with its value, beside the attempt and in Optuna's rows."""
    stored = {
        (row.attempt_id, row.epoch): row.value
        for row in auditor.rows(
            "SELECT m.* FROM whetstone.metrics m JOIN whetstone.attempts a USING (attempt_id) "
            "WHERE a.study_id = ANY(%(studies)s)"
        )
    }
    optunas = {
        (row.trial_id, row.step): row.intermediate_value
        for row in auditor.rows(
            "SELECT i.* FROM public.trial_intermediate_values i JOIN public.trials t USING (trial_id) "
            "WHERE t.study_id = ANY(%(studies)s)"
        )
    }
    of_trial: dict[int, list[int]] = defaultdict(list)
    for attempt in attempts.values():
        of_trial[attempt.trial_id].append(attempt.attempt_id)
    broken: list[str] = []
    for call in known:
        if call.method != "report" or call.answer.verdict == Verdict.LOST:
            continue
        lease, request, _ = call.args
        trial_id = attempts[lease].trial_id
        for item in request.reports:
            if stored.get((lease, item.epoch)) != item.value:
                broken.append(f"{call} was acknowledged, and epoch {item.epoch} is {stored.get((lease, item.epoch))}")
            possible = {measured(other, item.epoch) for other in of_trial[trial_id]}
            if optunas.get((trial_id, item.epoch)) not in possible:
                broken.append(f"{call} was acknowledged, and Optuna has {optunas.get((trial_id, item.epoch))}")
    return broken


def _leases(calls: Sequence[Call], attempts: Any) -> list[str]:
    """A lease is somebody's: as many as were answered, and at most one more for each call that was never answered."""
    broken: list[str] = []
    given: dict[int, list[Call]] = defaultdict(list)
    unknown = 0
    for call in calls:
        if call.method not in ("claim", "ask"):
            continue
        leased = call.known and call.error is None and call.answer is not None
        if leased:
            given[call.answer.lease].append(call)
        # Without a key every try may have been done; with one at most one of them, and then that one is answered,
        # unless it was still on its way when a repetition found nothing to lease.
        if call.once is None:
            unknown += call.tries - (1 if call.known else 0)
        elif not leased and (call.tries > 1 or not call.known):
            unknown += 1
    for number, to in given.items():
        lease: Lease = to[0].answer
        attempt = attempts.get(number)
        if len({(call.client, call.once.key if call.once else id(call)) for call in to}) > 1:
            broken.append(f"lease {number} was given out {len(to)} times: {'; '.join(map(str, to))}")
        if attempt is None:
            broken.append(f"lease {number} was given out and is not stored")
        elif (attempt.token, attempt.study_id, attempt.trial_number, attempt.attempt) != (
            lease.token,
            lease.study,
            lease.trial,
            lease.attempt,
        ):
            broken.append(f"lease {number} was given out as {lease} and is stored as {attempt}")
        elif attempt.state == "leased" and abs(attempt.term - lease.term_s) > 0.001:
            broken.append(f"lease {number} has a term of {attempt.term} s instead of {lease.term_s}")
    if not len(given) <= len(attempts) <= len(given) + unknown:
        broken.append(f"{len(attempts)} leases are stored, {len(given)} were given out, {unknown} at most besides")
    return broken


def _queued(auditor: Auditor, calls: Sequence[Call], trials: Any) -> list[str]:
    """What was queued, recorded or queued again is there, once."""
    origins = Counter(
        row.value_json.strip('"')
        for row in auditor.rows(
            "SELECT value_json FROM public.trial_system_attributes m JOIN public.trials t USING (trial_id) "
            "WHERE t.study_id = ANY(%(studies)s) AND m.key = 'whetstone:origin'"
        )
    )
    broken: list[str] = []
    for origin in ("queued", "recorded"):
        made: set[tuple[int, int]] = set()
        unknown = 0
        for call in calls:
            recorded = call.method == "add_trial" and "value" in call.args[1]
            if call.method not in ("add_trial", "requeue_trial") or recorded != (origin == "recorded"):
                continue
            if not call.known:
                unknown += 1
            elif call.error is None:
                place = (call.answer.study, call.answer.trial)
                if place not in trials:
                    broken.append(f"{call} was answered with trial {place}, which is not there")
                made.add(place)
        stored = origins[origin] - (auditor.planned if origin == "queued" else 0)
        if not len(made) <= stored <= len(made) + unknown:
            broken.append(f"{stored} trials are {origin}, {len(made)} calls were answered, {unknown} were not")
    return broken


def _cancelled(known: Sequence[Call], trials: Any) -> list[str]:
    """A cancelled trial stays so; one whose worker was asked to stop is not leased to another."""
    broken: list[str] = []
    for call in known:
        if call.method == "cancel_trial":
            view = call.answer
            trial = trials[(view.study, view.trial)]
            if view.state == "cancelled" and not (trial.state == "FAIL" and trial.cancelled):
                broken.append(f"{call} was acknowledged, and the trial is {trial.state}")
            if trial.attempts > view.attempts:
                broken.append(f"{call} was acknowledged, and the trial was leased again")
    return broken


def _suggestions(auditor: Auditor) -> list[str]:
    """No two trials of a study were given the same suggestion."""
    found = auditor.rows("""
        SELECT t.study_id, array_agg(t.number) AS numbers FROM public.trials t
        JOIN public.trial_system_attributes m ON m.trial_id = t.trial_id AND m.key = 'whetstone:origin'
             AND m.value_json = '"suggested"'
        JOIN LATERAL (SELECT array_agg(param_value ORDER BY param_name) AS point FROM public.trial_params p
                      WHERE p.trial_id = t.trial_id) p ON TRUE
        WHERE t.study_id = ANY(%(studies)s) GROUP BY t.study_id, p.point HAVING count(*) > 1
    """)
    return [f"trials {row.numbers} of study {row.study_id} are one and the same point" for row in found]
