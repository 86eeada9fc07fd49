"""A study that begins with what another one has found.

Where every point of the source is a point of the new study and its value means the same there, the source's finished
trials are recorded as the new study's own: origin "seeded", with the study and the number that they come from, counted
in what is suggested and in no budget. Otherwise only what both spaces share is taken over: the source's best points are
queued, partial where they have to be, without their values. The source is read at one moment and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.distributions import distribution_to_json

from hpo import nesting, statements, trials, writing
from hpo.desk import Desk, Known
from hpo.errors import Fault, Invalid, NewerFormat, NotFound
from hpo.protocol import Value
from hpo.space import Flat
from hpo.spec import SeedFrom, StudySpec
from hpo.views import SeedView

ATTRIBUTE = "whetstone:seeded_from"
"""Of a seeded trial: [study, number]. Of a seeded study: what each of its sources gave."""

BY_NAME = sa.text("""
    SELECT s.study_id FROM whetstone.studies s JOIN public.studies o USING (study_id) WHERE o.study_name = :name
""")
FINISHED = sa.text("""
    SELECT EXISTS (SELECT 1 FROM public.trials WHERE study_id = :study AND state = 'COMPLETE')
""")
SEEDED = sa.text("""
    SELECT study_id, value_json FROM public.study_system_attributes
    WHERE key = 'whetstone:seeded_from' AND study_id = ANY(CAST(:studies AS integer[]))
""")

# The finished trials of a study that have a value and every parameter as their study declares it (stock Optuna may have
# stored others), in order, but for those that the new study has already. A trial that was itself seeded keeps its
# root, so that two sources with a common one give its trials once. They are held until they are
# copied: nobody deletes or corrects them meanwhile.
TAKEN = sa.text("""
    WITH given AS (
        SELECT * FROM unnest(CAST(:names AS text[]), CAST(:theirs AS text[])) AS g (name, distribution)
    ),
    whole AS (
        SELECT p.trial_id FROM public.trials t
        JOIN public.trial_params p ON p.trial_id = t.trial_id
        JOIN given g ON g.name = p.param_name AND g.distribution = p.distribution_json
        WHERE t.study_id = :source AND t.state = 'COMPLETE'
        GROUP BY p.trial_id HAVING count(*) = :dimensions
    )
    SELECT t.trial_id, origin.root
    FROM whole JOIN public.trials t USING (trial_id)
    JOIN public.trial_values v ON v.trial_id = t.trial_id AND v.objective = 0 AND v.value_type = 'FINITE'
    CROSS JOIN LATERAL (
        SELECT coalesce(
            (SELECT value_json FROM public.trial_system_attributes
             WHERE trial_id = t.trial_id AND key = 'whetstone:seeded_from'),
            json_build_array(t.study_id, t.number)::text) AS root
    ) origin
    WHERE origin.root NOT IN (
        SELECT m.value_json FROM public.trial_system_attributes m JOIN public.trials mine USING (trial_id)
        WHERE mine.study_id = :study AND m.key = 'whetstone:seeded_from')
    ORDER BY t.number FOR SHARE OF t
""")

# Finished trials of another study as trials of this one, which the caller has locked.
ROWS = sa.text("""
    INSERT INTO public.trials (study_id, number, state, datetime_start, datetime_complete)
    SELECT :study, first.number + taken.place, 'COMPLETE', t.datetime_start, t.datetime_complete
    FROM (SELECT coalesce(max(number), -1) AS number FROM public.trials WHERE study_id = :study) AS first
    CROSS JOIN unnest(CAST(:taken AS integer[])) WITH ORDINALITY AS taken (trial_id, place)
    JOIN public.trials t ON t.trial_id = taken.trial_id
    ORDER BY taken.place RETURNING trial_id, number
""")

# All that they have. A choice is stored by its place in the list, which may be another one here.
CONTENTS = sa.text("""
    WITH pair AS MATERIALIZED (
        SELECT * FROM unnest(CAST(:taken AS integer[]), CAST(:made AS integer[]), CAST(:roots AS text[]))
            AS p (taken, made, root)
    ),
    params AS (
        INSERT INTO public.trial_params (trial_id, param_name, param_value, distribution_json)
        SELECT pair.made, p.param_name, coalesce(c.new_place, p.param_value), g.distribution
        FROM pair JOIN public.trial_params p ON p.trial_id = pair.taken
        JOIN unnest(CAST(:names AS text[]), CAST(:ours AS text[])) AS g (name, distribution) ON g.name = p.param_name
        LEFT JOIN unnest(CAST(:choice_names AS text[]), CAST(:places AS float8[]), CAST(:new_places AS float8[]))
            AS c (name, place, new_place) ON c.name = p.param_name AND c.place = p.param_value
        ORDER BY p.param_id
    ),
    vals AS (
        INSERT INTO public.trial_values (trial_id, objective, value, value_type)
        SELECT pair.made, 0, v.value, 'FINITE'
        FROM pair JOIN public.trial_values v ON v.trial_id = pair.taken AND v.objective = 0
    )
    INSERT INTO public.trial_system_attributes (trial_id, key, value_json)
    SELECT made, 'whetstone:origin', '"seeded"' FROM pair
    UNION ALL SELECT made, 'whetstone:seeded_from', root FROM pair
    UNION ALL SELECT pair.made, m.key, m.value_json
        FROM pair JOIN public.trial_system_attributes m ON m.trial_id = pair.taken
        WHERE m.key = 'whetstone:reason' OR m.key LIKE 'constraints%'
""")


@dataclass(frozen=True)
class _Taught:
    """Points that a source gives to be tried here, each with where it comes from."""

    points: list[Flat]
    reasons: list[str]


def sow(desk: Desk, conn: sa.Connection, study: int, spec: StudySpec) -> None:
    """Give a new study, whose row the caller has just made, what its sources know.

    Raises:
        Invalid: a source is missing, has no finished trial or nothing in common with this study, or has reached the
            target of its budget.
    """
    if not spec.seed_from:
        return
    seeds: list[SeedView] = []
    faults: list[Fault] = []
    for place, seed in enumerate(spec.seed_from):
        at = f"seed_from[{place}]"
        try:
            source = _source(desk, conn, seed.study, study)
            if any(other.study == source.study for other in seeds):
                faults.append(Fault(f"{at}.study", f"study {source.study} stands here twice"))
                continue
            seeds.append(_from(desk, conn, study, spec, source, seed.top))
        except (NotFound, NewerFormat) as error:
            faults.append(Fault(f"{at}.study", str(error)))
    if not faults and not any(seed.trials for seed in seeds):
        faults.append(Fault("seed_from", "gives no trial: none of them is stored as its study declares it"))
    best = conn.execute(statements.best_trials(spec.direction), {"study": study, "limit": 1}).one_or_none()
    target = spec.budget.target
    if target is not None and best is not None and not spec.better(target, best.value):
        faults.append(Fault("budget.target", f"a seeding trial has reached {best.value:.6g} already: aim beyond it"))
    if faults:
        raise Invalid(faults, what="the study")
    desk.storage.set_study_system_attr(study, ATTRIBUTE, [seed.model_dump() for seed in seeds])


def absent(desk: Desk, conn: sa.Connection, seeds: Sequence[SeedFrom]) -> list[Fault]:
    """Name the sources that are not there or have finished no trial, as `sow` does, before there is a study."""
    faults = []
    for place, seed in enumerate(seeds):
        try:
            _source(desk, conn, seed.study)
        except (NotFound, NewerFormat) as error:
            faults.append(Fault(f"seed_from[{place}].study", str(error)))
    return faults


def of_studies(conn: sa.Connection, studies: Sequence[int]) -> dict[int, list[SeedView]]:
    """What each of these studies was seeded with."""
    found: dict[int, list[SeedView]] = {study: [] for study in studies}
    if studies:
        for row in conn.execute(SEEDED, {"studies": list(studies)}):
            found[row.study_id] = [SeedView.model_validate(seed) for seed in json.loads(row.value_json)]
    return found


def _source(desk: Desk, conn: sa.Connection, named: int | str, study: int | None = None) -> Known:
    number = named if isinstance(named, int) else conn.execute(BY_NAME, {"name": named}).scalar()
    if number is None or number == study:
        raise NotFound("there is no study of this name")
    source = desk.known(conn, number)
    if not conn.execute(FINISHED, {"study": number}).scalar_one():
        raise NotFound(f"study {number} has no finished trial yet")
    return source


def _from(desk: Desk, conn: sa.Connection, study: int, spec: StudySpec, source: Known, top: int) -> SeedView:
    why = _why_not_taken_over(source.spec, spec)
    about = {"study": source.study, "name": source.spec.name}
    if not why:
        count = _take_over(conn, study, spec, source)
        names = [parameter.name for parameter in spec.space.parameters]
        return SeedView(**about, exact=True, trials=count, parameters=names, why="")
    names = nesting.shared_names(source.spec.space, spec.space)
    if not names:
        raise NotFound(f"study {source.study} searches no parameter that this study searches")
    taught = _taught(desk, conn, spec, source, top)
    if not taught.points:
        raise NotFound(f"no value of study {source.study}'s best trials can be tried here: the ranges do not meet")
    writing.queue_all(conn, study, taught.points, taught.reasons)
    return SeedView(**about, exact=False, trials=len(taught.points), parameters=names, why=why)


def _why_not_taken_over(source: StudySpec, spec: StudySpec) -> str:
    """Say why the source's values are not values of this study; empty where they are."""
    for what, theirs, ours in (
        ("workload", source.workload, spec.workload),
        ("direction", source.direction, spec.direction),
    ):
        if theirs != ours:
            return f"its {what} is {theirs}"
    names = sorted({*source.settings, *spec.settings})
    differ = [name for name in names if source.settings.get(name, ...) != spec.settings.get(name, ...)]
    if differ:
        return f"its settings differ in {', '.join(differ[:8])}"
    return nesting.why_not_nested(source.space, spec.space)


def _take_over(conn: sa.Connection, study: int, spec: StudySpec, source: Known) -> int:
    """Record the source's finished trials here, however many there are in three statements; return their number."""
    stored = _mapping(source.spec, spec)
    taken = conn.execute(TAKEN, {"study": study, "source": source.study, **stored}).all()
    if not taken:
        return 0
    ids = [row.trial_id for row in taken]
    made = sorted(conn.execute(ROWS, {"study": study, "taken": ids}), key=lambda row: row.number)
    pairs = {"taken": ids, "made": [row.trial_id for row in made], "roots": [row.root for row in taken]}
    conn.execute(CONTENTS, {**pairs, **stored})
    return len(ids)


def _mapping(source: StudySpec, spec: StudySpec) -> dict[str, Any]:
    """How the source's parameters are stored there and here."""
    theirs, ours = source.space.distributions, spec.space.distributions
    here = nesting.by_flat_name(spec.space)
    moved = [
        (name, place, ours[name].to_internal_repr(here[name].cast(choice)))
        for name, parameter in nesting.by_flat_name(source.space).items()
        for place, choice in enumerate(parameter.choices)
    ]
    return {
        "names": list(ours),
        "theirs": [distribution_to_json(theirs[name]) for name in ours],
        "ours": [distribution_to_json(ours[name]) for name in ours],
        "dimensions": len(ours),
        "choice_names": [name for name, _, _ in moved],
        "places": [float(place) for _, place, _ in moved],
        "new_places": [float(place) for _, _, place in moved],
    }


def _taught(desk: Desk, conn: sa.Connection, spec: StudySpec, source: Known, top: int) -> _Taught:
    """The source's best points as far as they can be tried here, the best first, each once."""
    workload = desk.workloads.get(spec.workload)
    seen: set[tuple[tuple[str, Value], ...]] = set()
    taught = _Taught([], [])
    for trial in trials.best_of(conn, source, top):
        # Without what is fixed: that was chosen for this study, the point was not.
        told = nesting.shared(trial.params, spec.space)
        flat = {name: value for name, value in told.items() if name not in spec.fixed}
        key = tuple(sorted(flat.items()))
        if not flat or key in seen:
            continue
        whole = len(flat) == len(spec.space.names)
        if whole and workload is not None and workload.feasible(spec.space.nest(flat), spec.settings) is not None:
            continue
        seen.add(key)
        taught.points.append(flat)
        taught.reasons.append(f"from trial {trial.trial} of study {source.study}")
    return taught
