"""A study that begins with another's trials: their values where they mean the same, else points to try first."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.coordinator import Coordinator
from hpo.errors import Invalid
from hpo.views import OriginView, TrialView
from tests.integration.leases_harness import ask, claim, coordinator, must_claim, point, stock, study, tell

X = {"name": "x", "type": "float", "low": 0.0, "high": 1.0}
ETA = {"name": "eta", "type": "float", "low": 1e-4, "high": 1e-1, "log": True, "labels": ["conv", "fc"]}
CHOICE = {"name": "init", "type": "categorical", "choices": ["he", "paper"]}


def source(desk: Coordinator, name: str = "source", **changes: Any) -> int:
    """A study with four finished trials, the third infeasible, and one that was cancelled."""
    made = desk.create_study(study(name, **changes)).study
    for place in range(4):
        at = {"params": point(0.1 * (place + 1)) | ({"init": "paper"} if "space" in changes else {})}
        value = {"outcome": "infeasible", "reason": "diverged"} if place == 2 else {"value": 0.5 + 0.1 * place}
        desk.add_trial(made, at | value)
    desk.add_trial(made, {"params": {"x": 0.9}})
    desk.cancel_trial(made, 4)
    return made


def trials(desk: Coordinator, number: int) -> list[TrialView]:
    return desk.list_trials(number, limit=1000).items


def fault(desk: Coordinator, **changes: Any) -> tuple[str, str]:
    with pytest.raises(Invalid) as refused:
        desk.create_study(study("refused", **changes))
    assert len(refused.value.faults) == 1
    return refused.value.faults[0].at, refused.value.faults[0].fault


def test_trials_are_taken_over_where_spaces_nest_and_values_mean_the_same(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    first = source(desk)
    wide = [X | {"high": 2.0}, ETA | {"high": 1.0}]
    made = desk.create_study(
        study("wide", space=wide, seed_from=first, budget={"trials": 1}, points=[{"x": 1.5}], sampler="tpe")
    )
    assert [(seed.study, seed.name, seed.exact, seed.trials) for seed in made.seeded] == [(first, "source", True, 4)]
    given, own = trials(desk, made.study)[:4], trials(desk, made.study)[4:]
    assert [(t.trial, t.state, t.value, t.origin) for t in given] == [
        (0, "complete", 0.5, "seeded"),
        (1, "complete", 0.6, "seeded"),
        (2, "infeasible", 0.5, "seeded"),
        (3, "complete", 0.8, "seeded"),
    ]
    assert [t.params for t in given] == [t.params for t in trials(desk, first)[:4]]
    assert [t.seeded_from for t in given] == [OriginView(study=first, trial=place) for place in range(4)]
    assert given[2].reason == "diverged"
    assert [(t.state, t.params) for t in own] == [("queued", {"x": 1.5})]
    assert made.best is not None
    assert (made.best.trial, made.best.seeded_from) == (3, OriginView(study=first, trial=3))
    assert (made.state, made.budget.trials_used, made.budget.hours_used) == ("running", 0, 0.0)
    exported = desk.export(made.study)
    assert exported["trials"][0]["seeded_from"] == {"study": first, "trial": 0}
    # They count in nothing of the budget: one trial of its own is still to come, and the study ends with it.
    desk.patch_study(first, {"state": "paused"})
    lease = must_claim(desk)
    assert (lease.study, lease.trial, lease.params["x"]) == (made.study, 4, 1.5)
    tell(desk, lease)
    assert claim(desk) is None
    assert desk.get_study(made.study).state == "finished"


def test_stock_optuna_reads_seeded_trials_as_its_own(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    space = [X, ETA, CHOICE]
    first = source(desk, space=space)
    other = [CHOICE | {"choices": ["he", "zero", "paper"]}, ETA, X | {"low": -1.0}]
    desk.create_study(study("other", space=other, seed_from={"study": "source", "top": 2}))
    theirs, ours = stock(engine, "source").trials, stock(engine, "other").trials
    assert [t.params for t in ours] == [t.params for t in theirs[:4]], "a choice has another place in the list here"
    assert [t.value for t in ours] == [t.value for t in theirs[:4]]
    assert [t.constraints for t in ours] == [t.constraints for t in theirs[:4]]
    assert [t.datetime_complete for t in ours] == [t.datetime_complete for t in theirs[:4]]
    assert ours[0].distributions["x"].low == -1.0  # type: ignore[attr-defined]
    assert first == 1


def test_seeded_trials_are_not_suggested_again(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    few = [{"name": "x", "type": "integer", "low": 0, "high": 4}]
    first = desk.create_study(study("few", space=few, workload="external")).study
    for x in (0, 1, 3):
        desk.add_trial(first, {"params": {"x": x}, "value": 0.1 * x})
    more = desk.create_study(study("more", space=few, seed_from=first, workload="external")).study
    assert {ask(desk, more).params["x"] for _ in range(2)} == {2, 4}


def test_a_tied_study_seeds_the_untied_one(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    tied = desk.create_study(study("tied", space=[X, ETA | {"tied": True}])).study
    desk.add_trial(tied, {"params": {"x": 0.5, "eta": 0.01}, "value": 0.7})
    made = desk.create_study(study("untied", seed_from=[{"study": tied}]))
    assert made.seeded[0].exact
    assert trials(desk, made.study)[0].params == {"x": 0.5, "eta": {"conv": 0.01, "fc": 0.01}}
    back = desk.create_study(study("back", space=[X, ETA | {"tied": True}], seed_from=made.study))
    assert not back.seeded[0].exact
    assert "tied" in back.seeded[0].why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"settings": {"net": "full"}}, "its settings differ in net"),
        ({"settings": {}}, "its settings differ in net"),
        ({"workload": "external"}, "its workload is ball"),
        ({"workload": "external", "direction": "minimize"}, "its workload is ball"),
        ({"space": [X | {"high": 0.35}, ETA]}, "x has values there that it cannot have here"),
        ({"space": [X, ETA, CHOICE]}, "init is not searched there"),
        ({"space": [X]}, "eta[conv] is not searched here"),
    ],
)
def test_otherwise_the_best_points_are_queued_as_far_as_they_are_shared(
    engine: sa.Engine, changes: dict[str, Any], why: str
) -> None:
    desk = coordinator(engine)
    first = source(desk)
    made = desk.create_study(study("other", seed_from={"study": first, "top": 2}, **changes))
    (seed,) = made.seeded
    assert (seed.exact, seed.why) == (False, why)
    queued = trials(desk, made.study)
    assert [(t.state, t.origin, t.value) for t in queued] == [("queued", "queued", None)] * seed.trials
    assert queued[0].reason == f"from trial 3 of study {first}"
    searched = {parameter["name"] for parameter in made.spec["space"]}
    high = made.spec["space"][0]["high"]
    best = point(0.4)
    wanted = {name: best[name] for name in best if name in searched and not (name == "x" and high < 0.4)}
    assert queued[0].params == wanted, "the best first; what lies outside of the range is left to the sampler"


def test_what_is_fixed_wins_over_what_a_source_teaches(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    made = desk.create_study(study("other", seed_from=source(desk), fixed={"x": 0.75}, settings={}))
    assert trials(desk, made.study)[0].params == {"eta": {"conv": 0.01, "fc": 0.02}}
    assert must_claim(desk).params["x"] != 0.75, "the older study is asked first"
    desk.patch_study(1, {"state": "paused"})
    assert must_claim(desk).params["x"] == 0.75


def test_several_sources_with_a_common_one_give_each_trial_once(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    first = source(desk)
    second = desk.create_study(study("second", seed_from="source")).study
    desk.add_trial(second, {"params": point(0.77), "value": 0.77})
    for place, order in enumerate(([first, second], [second, first])):
        made = desk.create_study(study(f"third-{place}", seed_from=order))
        found = trials(desk, made.study)
        assert len(found) == 5
        assert {(t.seeded_from.study, t.seeded_from.trial) for t in found if t.seeded_from} == {
            *((first, n) for n in range(4)),
            (second, 4),
        }


def test_a_source_that_cannot_teach_is_named(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    empty = desk.create_study(study("empty")).study
    assert fault(desk, seed_from=99) == ("seed_from[0].study", "there is no study 99")
    assert fault(desk, seed_from=["nobody"]) == ("seed_from[0].study", "there is no study of this name")
    assert fault(desk, seed_from="refused") == ("seed_from[0].study", "there is no study of this name")
    assert fault(desk, seed_from=empty) == ("seed_from[0].study", f"study {empty} has no finished trial yet")
    first = source(desk)
    other = [{"name": "z", "type": "float", "low": 0, "high": 1}]
    assert "no parameter" in fault(desk, seed_from=first, space=other)[1]
    assert "do not meet" in fault(desk, seed_from=first, space=[X | {"low": 0.95}])[1]
    assert "stands here twice" in fault(desk, seed_from=[first, "source"])[1]
    at, why = fault(desk, seed_from=first, budget={"target": 0.7})
    assert (at, "0.8 already" in why) == ("budget.target", True)
    assert [item.name for item in desk.list_studies().items] == ["source", "empty"], "nothing half-made is left"


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ({"study": 1, "top": 0}, "seed_from[0].top"),
        ({"study": True}, "seed_from[0].study"),
        ({"top": 3}, "seed_from[0].study"),
        ([1, 1], "seed_from[1].study"),
        ([{"study": 1, "from": 2}], "seed_from[0].from"),
        (list(range(30)), "seed_from"),
        (1.5, "seed_from[0].study"),
        ("", "seed_from[0].study"),
        (2**31, "seed_from[0].study"),
    ],
)
def test_a_faulty_source_is_named(engine: sa.Engine, given: Any, at: str) -> None:
    assert fault(coordinator(engine), seed_from=given)[0] == at


def test_a_seeded_study_outlives_its_source(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    first = source(desk)
    made = desk.create_study(study("heir", seed_from=first)).study
    desk.delete_study(first)
    view = coordinator(engine).get_study(made)
    assert (view.seeded[0].name, view.counts["complete"], view.counts["infeasible"]) == ("source", 3, 1)


def test_trials_that_stock_optuna_stored_otherwise_are_left_out(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    first = source(desk)
    opened = stock(engine, "source")
    trial = opened.ask()
    trial.suggest_float("x", 0.0, 0.5)
    opened.tell(trial, 0.9)
    made = desk.create_study(study("heir", seed_from=first))
    assert made.seeded[0].trials == 4


def test_a_source_deleted_while_it_is_copied_gives_all_that_it_has(engine: sa.Engine) -> None:
    desk = coordinator(engine)
    first = source(desk)
    deleting = threading.Thread(target=coordinator(engine).delete_study, args=[first])

    def copied(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        if "origin.root NOT IN" in statement:
            deleting.start()
            deleting.join(1.0)

    sa.event.listen(engine, "after_cursor_execute", copied)
    made = desk.create_study(study("copy", seed_from=first)).study
    deleting.join(60)
    assert [(trial.state, len(trial.params)) for trial in trials(desk, made)] == [
        ("complete", 2),
        ("complete", 2),
        ("infeasible", 2),
        ("complete", 2),
    ]
    assert [view.study for view in desk.list_studies().items] == [made]
