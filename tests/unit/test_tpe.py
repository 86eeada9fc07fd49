"""TPE on arrays gives the points of Optuna's own, bit for bit, whatever has happened in the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from hpo import tpe
from hpo.history import CONSTRAINT, Entry, Snapshot
from hpo.samplers import Session, derive
from hpo.snapshot import STRETCH, Entries, changed
from hpo.spec import StudySpec
from hpo.suggest import stored
from tests.unit.test_samplers import SPACE, Study, spec_of

FLOATS: list[dict[str, Any]] = [
    {"name": "x", "type": "float", "low": -1, "high": 2, "labels": ["a", "b", "c"]},
    {"name": "y", "type": "float", "low": 1e-5, "high": 0.1, "log": True, "labels": ["a", "b"]},
]
GRID: list[dict[str, Any]] = [
    {"name": "n", "type": "integer", "low": 1, "high": 900, "log": True},
    {"name": "s", "type": "float", "low": 0, "high": 1, "step": 0.125},
    {"name": "c", "type": "categorical", "choices": ["u", "v", "w"]},
]
PAPER: list[dict[str, Any]] = [
    {"name": name, "type": "float", "low": 0, "high": 1, "labels": [f"l{i}" for i in range(6)]}
    for name in ("eta", "mu", "lambda")
]


def played(spec: StudySpec, trials: int, *, infeasible: bool = True) -> Study:
    """A study of random points with all that may happen to them, equal values among them."""
    study, rng = Study(spec), np.random.default_rng(3)
    for number in range(trials):
        made = stored(spec.space, spec.space.random(rng))
        kind, value = int(rng.integers(12)), round(float(rng.normal()), 1)
        if kind == 0:
            study.add(made, TrialState.RUNNING)
        elif kind == 1:
            study.add(made, TrialState.WAITING)
        elif kind == 2:
            study.add(made, TrialState.FAIL)
        elif kind == 3:
            reports = {int(rng.integers(1, 4)): float("nan") if number % 7 == 0 else value} if number % 3 else {}
            study.add(made, TrialState.PRUNED, None, {}, reports)
        elif kind == 4 and infeasible:
            study.add(made, TrialState.COMPLETE, value, {CONSTRAINT: 1})
        else:
            study.add(made, TrialState.COMPLETE, value)
    return study


def moment(study: Study, entries: Sequence[Entry] | None = None) -> Snapshot:
    held = study.snapshot
    return Snapshot(held.name, held.direction, tuple(held.entries if entries is None else entries), held.attributes)


def stock(spec: StudySpec, snapshot: Snapshot, number: int) -> Session:
    session = Session(spec, snapshot, number, spec.seed, {})
    session._sampler = TPESampler(seed=derive(spec.seed, number), **spec.sampler.options)
    return session


@pytest.mark.parametrize("liar", [True, False])
@pytest.mark.parametrize("multivariate", [True, False])
@pytest.mark.parametrize("space", [SPACE, FLOATS, GRID, PAPER], ids=["mixed", "floats", "grid", "paper"])
def test_the_points_are_those_of_the_stock_sampler(space: list[dict[str, Any]], multivariate: bool, liar: bool) -> None:
    sampler = {"name": "tpe", "multivariate": multivariate, "constant_liar": liar}
    for direction, trials in [("maximize", 9), ("maximize", 40), ("minimize", 300)]:
        spec = spec_of(sampler, space, direction=direction)
        study = played(spec, trials, infeasible=trials > 40)
        table = tpe.Table(spec.space)
        for number in range(trials, trials + 4):
            session = Session(spec, moment(study), number, spec.seed, {}, table)
            expected = stock(spec, moment(study), number)
            for _ in range(3):  # asked again, when a point was refused
                assert session.ask().reduced == expected.ask().reduced


def test_where_few_trials_are_complete_the_good_ones_are_chosen_as_stock_does() -> None:
    spec = spec_of("tpe", FLOATS)
    study = played(spec, 400)
    few = [entry for entry in study.entries if entry.trial.state != TrialState.COMPLETE or entry.infeasible]
    assert {entry.trial.state for entry in few} >= {TrialState.PRUNED, TrialState.COMPLETE}
    for number in range(400, 406):
        session = Session(spec, moment(study, few), number, spec.seed, {})
        assert session.ask().reduced == stock(spec, moment(study, few), number).ask().reduced


def test_a_table_that_followed_a_study_is_one_made_anew() -> None:
    spec = spec_of("tpe")
    before, after = played(spec, 90).entries, played(spec, 150).entries
    table = tpe.Table(spec.space)
    running = [entry if place % 5 else played(spec, 1).entries[0] for place, entry in enumerate(before)]
    for entries in (running[:40], running, after, after[:100], before):
        table.update(entries)
        fresh = tpe.Table(spec.space)
        fresh.update(entries)
        study = Study(spec)
        followed = Session(spec, moment(study, entries), 500, 1, {}, table).ask()
        assert followed == Session(spec, moment(study, entries), 500, 1, {}, fresh).ask()
        assert table.values.tolist() == fresh.values.tolist()
        assert table.kinds.tolist() == fresh.kinds.tolist()


def test_beyond_what_is_affordable_the_good_trials_are_of_all_and_the_poorer_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tpe, "MOST", 400)
    spec = spec_of("tpe", FLOATS)
    study = played(spec, 900)
    session = Session(spec, moment(study), 900, spec.seed, {})
    below, above = session._sampler.halves  # type: ignore[attr-defined]
    assert len(below) == 25
    assert len(above) == 400
    assert min(below) < 100
    assert min(above) > 300
    kept = [study.entries[place] for place in sorted([*below, *above])]
    assert session.ask().reduced == stock(spec, moment(study, kept), 900).ask().reduced


def test_the_trial_itself_is_not_among_those_it_is_chosen_by() -> None:
    spec = spec_of("tpe", FLOATS)
    study = played(spec, 40)
    feasible = [entry for entry in study.entries if entry.state == TrialState.COMPLETE and not entry.infeasible]
    best = max(feasible, key=lambda entry: entry.value or -9.0).number
    others = [entry for entry in study.entries if entry.number != best]
    with_it = Session(spec, moment(study), best, spec.seed, {}).ask()
    assert with_it == Session(spec, moment(study, others), best, spec.seed, {}).ask()


def test_what_changed_is_found_wherever_it_stands() -> None:
    entries = played(spec_of("random", FLOATS), 700).entries
    other = played(spec_of("random", FLOATS), 700).entries
    for places in ([], [0], [255, 256], [511, 699], list(range(300, 600))):
        mixed = [other[place] if place in places else entry for place, entry in enumerate(entries)]
        assert changed(tuple(entries), tuple(mixed)) == places
        assert changed(entries, tuple(mixed)) == places
    assert changed(entries[:600], entries) == list(range(600, 700))
    assert changed(entries, entries[:600]) == []
    assert changed((), entries[:3]) == [0, 1, 2]


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 700])
def test_entries_that_share_what_has_not_changed_are_the_list_they_were_made_from(length: int) -> None:
    plain = played(spec_of("random", FLOATS), 700).entries
    other = played(spec_of("random", FLOATS), 700).entries
    shared = Entries().renewed(plain[:length], set())
    assert list(shared) == plain[:length]
    assert len(shared) == length
    assert changed((), shared) == list(range(length))
    for cut in (slice(None), slice(3, 300), slice(-300, None), slice(400, 2), slice(256, 512), slice(None, None, -7)):
        assert shared[cut] == tuple(plain[:length][cut])
    for place in (-length - 1, length):
        with pytest.raises(IndexError):
            shared[place]
    mixed = [other[place] if place in (0, 255, 256, 699) else entry for place, entry in enumerate(plain)]
    later = shared.renewed(mixed, {0, 1, 2, length // STRETCH})
    assert list(later) == mixed
    assert later[-1] is mixed[699]
    assert changed(shared, later) == [*(place for place in (0, 255, 256, 699) if place < length), *range(length, 700)]
    assert changed(plain[:length], later) == changed(shared, later)
    assert changed(later, shared) == [place for place in (0, 255, 256, 699) if place < length]
