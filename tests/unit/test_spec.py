"""A study's document is taken whole or refused whole, with every fault named and nothing of it echoed at length."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.document import in_order
from hpo.errors import Fault, Invalid
from hpo.fixed import merged, replacing
from hpo.spec import UNSET, dump, load, parse, parse_change, parse_trial


class Even:
    """A workload of its own kind: it knows one setting, and trains only even batches of at least `least`."""

    def check(self, settings: Mapping[str, Any]) -> Sequence[Fault]:
        return [Fault(name, "is not a setting") for name in settings if name != "least"]

    def feasible(self, point: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        batch = point.get("batch", 2)
        if batch % 2:
            return "the batch is odd"
        return None if batch >= settings.get("least", 0) else "the batch is too small"


WORKLOADS = {"even": Even()}
LABELS = ["conv1", "conv2", "fc"]
TIED = {"convs": LABELS[:2], "rest": LABELS[2:]}
DOCUMENT: dict[str, Any] = {
    "name": "mini 1",
    "workload": "even",
    "space": [
        {"name": "eta", "type": "float", "low": 1e-4, "high": 0.1, "log": True, "labels": LABELS},
        {"name": "lambda", "type": "float", "low": 0, "high": 0.1, "labels": LABELS, "tied": TIED},
        {"name": "batch", "type": "integer", "low": 1, "high": 256},
        {"name": "init", "type": "categorical", "choices": ["he", "paper", True]},
    ],
    "settings": {"least": 8},
    "budget": {"trials": 24},
    "seed": 7,
}  # fmt: skip

SPACE = parse(DOCUMENT, WORKLOADS).space


def document(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(DOCUMENT), **changes}


def with_entry(**changes: Any) -> dict[str, Any]:
    """A document whose third parameter is `batch` with changes; None takes a field away."""
    made = document(workload="external")
    made["space"][2] = {key: value for key, value in {**made["space"][2], **changes}.items() if value is not None}
    return made


def faults_of(given: Any, workloads: Mapping[str, Any] = WORKLOADS) -> dict[str, str]:
    with pytest.raises(Invalid) as caught:
        parse(given, workloads)
    assert len({fault.at for fault in caught.value.faults}) == len(caught.value.faults), "a place is named once"
    return {fault.at: fault.fault for fault in caught.value.faults}


def test_a_document_survives_being_written_out_and_read_again() -> None:
    spec = parse(
        document(points=[{"eta": 0.01}, {"lambda": {"convs": 0.05}, "batch": 16}], fixed={"init": "he"}), WORKLOADS
    )
    text = json.dumps(dump(spec), allow_nan=False)
    assert parse(json.loads(text), WORKLOADS) == spec
    assert parse(yaml.safe_load(yaml.safe_dump(dump(spec))), WORKLOADS) == spec
    assert load(json.loads(text)) == spec
    assert spec.points[1] == {"lambda[conv1]": 0.05, "lambda[conv2]": 0.05, "batch": 16}
    assert (spec.sampler.name, spec.pruner.name, spec.max_attempts, spec.direction) == ("tpe", "none", 3, "maximize")


def test_a_document_out_of_order_is_written_as_people_write_it() -> None:
    def as_jsonb(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: as_jsonb(value[key]) for key in sorted(value, key=lambda key: (len(key), key))}
        return [as_jsonb(part) for part in value] if isinstance(value, list) else value

    made = dump(parse(document(), WORKLOADS)) | {"space": [*DOCUMENT["space"], 3], "newer": {"b": 1, "a": 2}}
    ordered = in_order(as_jsonb(made))
    assert ordered == made
    assert [*ordered][:3] == ["name", "description", "notes"]
    assert [*ordered][-1] == "newer"
    assert [[*entry] for entry in ordered["space"][:-1]] == [[*entry] for entry in DOCUMENT["space"]]
    assert [*ordered["sampler"]][:2] == ["name", "n_startup_trials"]
    assert [*ordered["budget"]] == ["trials", "hours", "target"]
    assert in_order({"sampler": "tpe", "space": {}, "budget": None}) == {"sampler": "tpe", "space": {}, "budget": None}


def test_a_stored_spec_is_read_back_after_jsonb_rewrote_its_numbers_and_without_its_workload() -> None:
    given = document(workload="external")
    given["space"][0] |= {"high": 1e32}
    given["settings"] = {"large": 1e20}
    spec = parse(given, {})
    stored = dump(spec)
    stored["space"][0]["high"] = 10**32
    stored["workload"] = "gone"
    assert load(stored).space == spec.space


def test_a_missing_seed_is_drawn_and_kept() -> None:
    first, second = (parse(document(seed=None), WORKLOADS) for _ in range(2))
    assert first.seed != second.seed
    assert load(dump(first)).seed == first.seed


def test_every_fault_is_named_at_once_and_where() -> None:
    bad = {
        "name": " x",
        "workload": "evn",
        "directin": "maximize",
        "sampler": {"name": "tpee"},
        "pruner": {"name": "median", "n_startup": 3},
        "budget": {"trials": 0, "hourss": 1, "target": math.inf},
        "max_attempts": True,
        "seed": -1,
        "settings": {"a": "x\0"},
        "space": [
            {"name": "eta[0]", "type": "float", "low": math.nan, "high": "1e-1", "log": 1},
            {
                "name": "m",
                "type": "float",
                "low": 0,
                "high": 1,
                "log": True,
                "labels": ["a", "a"],
                "tied": {"x": ["b"]},
            },
            {"name": "m", "type": "integer", "low": True, "high": 10**500, "step": 0},
            {"name": "c", "type": "categorical", "choices": ["p", "p", {}]},
            {"name": "d", "type": "flaot", "low": 0, "high": 1},
            3,
        ],
        "\ud800": 1,
    }
    faults = faults_of(bad)
    assert {
        "name", "workload", "directin", "sampler.name", "pruner.n_startup", "budget.trials", "budget.hourss",
        "budget.target", "max_attempts", "seed", "settings.a", "space[0].name", "space[0].low", "space[0].high",
        "space[0].log", "space[1].low", "space[1].labels[1]", "space[1].tied.x[0]", "space[2].name", "space[2].low",
        "space[2].high", "space[2].step", "space[3].choices[2]", "space[4].type", "space[5]", "['\\ud800']",
    } == set(faults)  # fmt: skip
    assert "did you mean direction?" in faults["directin"]
    assert "did you mean tpe?" in faults["sampler.name"]
    assert "random, qmc" in faults["sampler.name"]
    assert "did you mean n_startup_trials?" in faults["pruner.n_startup"]
    assert "did you mean hours?" in faults["budget.hourss"]
    assert "did you mean float?" in faults["space[4].type"]
    assert "1.0e-4" in faults["space[0].high"]


@pytest.mark.parametrize(
    ("changes", "at", "words"),
    [
        ({"low": 300}, "space[2].high", "below low"),
        ({"low": 0, "log": True}, "space[2].low", "above 0"),
        ({"step": 100}, "space[2].step", "its highest value is 201"),
        ({"step": 500}, "space[2].step", "larger than the range"),
        ({"log": True, "step": 5}, "space[2].step", "does not go with log"),
        ({"low": 1.5}, "space[2].low", "integer"),
        ({"low": None}, "space[2].low", "missing"),
        ({"high": 2**53 + 1}, "space[2].high", "2^53"),
        ({"type": "float", "high": 1e33}, "space[2].high", "at most 1e+32"),
        ({"type": "float", "low": 0.1, "high": 1.0, "step": 0.4}, "space[2].step", "its highest value is 0.9"),
        ({"labels": []}, "space[2].labels", "at least 1"),
        ({"labels": ["a[b"]}, "space[2].labels[0]", "must be 1-64"),
        ({"labels": ["a", "b"], "tied": {"g": ["a"]}}, "space[2].tied", "misses b"),
        ({"labels": ["a", "b"], "tied": {"g": ["a", "b"], "h": ["b"]}}, "space[2].tied.h[0]", "already"),
        ({"labels": ["a", "b"], "tied": {"g": ["a", "b"], "h": []}}, "space[2].tied.h", "list of labels"),
        ({"labels": ["a", "b"], "tied": {"a": ["a", "b"]}}, "space[2].tied.a", "also a label"),
        ({"labels": ["a", "b"], "tied": "yes"}, "space[2].tied", "true, false"),
        ({"tied": True}, "space[2].tied", "give it labels"),
        ({"name": "x]"}, "space[2].name", "letter or _"),
        ({"name": "eta"}, "space[2].name", "space[0] already"),
        ({"labels": [f"l{n}" for n in range(250)]}, "space", "257 scalar dimensions"),
    ],
)
def test_a_wrong_bound_label_or_tie_is_named(changes: dict[str, Any], at: str, words: str) -> None:
    faults = faults_of(with_entry(**changes))
    assert list(faults) == [at]
    assert words in faults[at]


@pytest.mark.parametrize(
    "changes", [{"low": 256}, {"step": 85}, {"type": "float", "low": 0.1, "high": 0.7, "step": 0.2}]
)
def test_a_constant_and_a_step_that_divides_the_range_are_fine(changes: dict[str, Any]) -> None:
    assert parse(with_entry(**changes), {}).space.names[-2] == "batch"


def test_choices_that_optuna_takes_for_one_are_refused() -> None:
    given = document(workload="external")
    given["space"][3]["choices"] = ["1", 1, True, 1.0]
    assert set(faults_of(given)) == {"space[3].choices[2]", "space[3].choices[3]"}


@pytest.mark.parametrize(
    ("changes", "at", "words"),
    [
        ({"sampler": {"name": "tpe", "n_startup_trials": "10"}}, "sampler.n_startup_trials", "integer"),
        ({"sampler": {"name": "tpe", "popsize": 5}}, "sampler.popsize", "not known"),
        ({"sampler": "gpp"}, "sampler", "did you mean gp?"),
        ({"sampler": {}}, "sampler.name", "missing"),
        ({"sampler": {"name": "cmaes", "lr_adapt": True, "with_margin": True}}, "sampler.lr_adapt", "does not go"),
        ({"pruner": {"name": "hyperband", "max_resource": "atuo"}}, "pruner.max_resource", "or must be 'auto'"),
        ({"pruner": {"name": "hyperband", "min_resource": 9, "max_resource": 3}}, "pruner.max_resource", "below"),
        ({"pruner": {"name": "successive_halving", "bootstrap_count": 1}}, "pruner.bootstrap_count", "not auto"),
        ({"direction": "minimize"}, "direction", "external"),
        ({"direction": "up"}, "direction", "'maximize' or 'minimize'"),
        ({"settings": {"lest": 3}}, "settings.lest", "not a setting"),
        ({"settings": {"least": 1000}}, "space", "none of 64 random points can be trained"),
        ({"points": [{"eta": 5}]}, "points[0].eta", "outside"),
        ({"points": [{}, {"eta": 0.01, "lambda": 0, "batch": 9, "init": "he"}]}, "points[1]", "the batch is odd"),
        ({"concurrency": 0}, "concurrency", "at least 1"),
        ({"name": "a" * 101}, "name", "1-100"),
        ({"description": date(2026, 1, 1)}, "description", "not JSON"),
        ({"notes": "half \ud83d of a pair"}, "notes", "surrogate"),
    ],
)
def test_what_a_study_cannot_do_is_named(changes: dict[str, Any], at: str, words: str) -> None:
    faults = faults_of(document(**changes))
    assert list(faults) == [at]
    assert words in faults[at]


def test_cmaes_over_choices_only_is_refused() -> None:
    given = document(
        workload="external", sampler="cmaes", space=[{"name": "c", "type": "categorical", "choices": ["a", "b"]}]
    )
    assert "use tpe" in faults_of(given)["sampler"]


def test_the_gaussian_process_is_refused_where_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    assert parse(document(sampler="gp"), WORKLOADS).sampler.options["max_trials"] == 400
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert "whetstone[all]" in faults_of(document(sampler="gp"))["sampler"]


def test_documents_that_are_no_documents_are_refused_in_one_line() -> None:
    for nothing in (None, 3, "x", [], [{}]):
        assert list(faults_of(nothing)) == [""]
    deep: Any = {}
    for _ in range(500):
        deep = {"settings": deep}
    assert "deeper" in faults_of(document(settings=deep))[""]
    loop: list[Any] = []
    loop.append(loop)
    assert "deeper" in faults_of(document(settings={"loop": loop}))[""]
    laughs: Any = ["ha"] * 9
    for _ in range(9):
        laughs = [laughs] * 9
    assert "values" in faults_of(document(settings={"laughs": laughs}))[""]


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["float", "tpe", "eta", "a\0", "\ud800", 1e999, -(10**400), "1e-3"])
)
fields = st.sampled_from(
    [*DOCUMENT, "type", "low", "high", "step", "labels", "tied", "choices", "points", "\udfff", "a b"]
)
wild = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields | st.text(), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=300)
@given(field=fields, value=wild, place=st.integers(0, 3), inside=st.booleans())
def test_no_value_anywhere_does_worse_than_be_refused_in_clean_text(
    field: str, value: Any, place: int, inside: bool
) -> None:
    given = document()
    if inside:
        given["space"][place][field] = value
    else:
        given[field] = value
    try:
        spec = parse(given, WORKLOADS)
    except Invalid as error:
        for fault in error.faults:
            json.dumps(str(fault)).encode()
            str(fault).encode()
            assert len(str(fault)) < 1500
    else:
        assert load(json.loads(json.dumps(dump(spec), allow_nan=False))) == spec


def test_a_change_keeps_null_apart_from_absence() -> None:
    change = parse_change({"budget": {"hours": None, "trials": 30}, "concurrency": None}, SPACE)
    assert change.budget == {"hours": None, "trials": 30}
    assert change.concurrency is None
    assert change.state is None
    assert parse_change({"state": "paused"}, SPACE).concurrency is UNSET


def test_a_change_fixes_what_it_names_and_releases_what_is_null() -> None:
    def change(fixed: object) -> Any:
        return parse_change({"fixed": fixed}, SPACE).fixed

    assert change({"batch": 16, "init": True}) == {"batch": 16, "init": True}
    assert change({"eta": {"conv1": 0.01, "fc": None}}) == {"eta[conv1]": 0.01, "eta[fc]": None}
    assert change({"eta": None}) == {"eta[conv1]": None, "eta[conv2]": None, "eta[fc]": None}
    assert change({"lambda": {"conv2": 0.05}}) == {"lambda[conv1]": 0.05, "lambda[conv2]": 0.05}, "tied: one for all"
    assert change({"lambda": {"convs": None}}) == {"lambda[conv1]": None, "lambda[conv2]": None}
    assert change(None) == dict.fromkeys(SPACE.names)
    assert change({}) == {}
    assert merged(SPACE, {"batch": 16, "eta[fc]": 0.1}, {"batch": None, "init": "he"}) == {"eta[fc]": 0.1, "init": "he"}


@given(st.data())
def test_a_change_to_replace_what_is_fixed_leaves_exactly_that(data: st.DataObject) -> None:
    def some() -> dict[str, Any]:
        flat = SPACE.random(np.random.default_rng(data.draw(st.integers(0, 99))))
        kept = data.draw(st.sets(st.sampled_from(sorted(set(SPACE.heads.values())))))
        return {name: value for name, value in flat.items() if SPACE.heads[name] in kept}

    before, wanted = some(), some()
    change = replacing(SPACE.nest(before), SPACE.nest(wanted))
    assert merged(SPACE, before, parse_change({"fixed": change}, SPACE).fixed) == wanted


def test_what_is_fixed_at_launch_must_leave_a_point_that_can_be_trained() -> None:
    assert parse(document(fixed={"batch": 16}), WORKLOADS).fixed == {"batch": 16}
    assert parse(document(fixed={"lambda": 0.05}), WORKLOADS).fixed == dict.fromkeys(SPACE.names[3:6], 0.05)
    assert "the batch is odd" in faults_of(document(fixed={"batch": 15}))["fixed"]
    whole = {"eta": 0.01, "lambda": 0.05, "init": "he", "batch": 15}
    assert faults_of(document(fixed=whole))["fixed"] == "this point can never be trained: the batch is odd"


@pytest.mark.parametrize(
    ("body", "at"),
    [
        ({}, ""),
        ({"state": "finished"}, "state"),
        ({"state": None}, "state"),
        ({"seed": 3}, "seed"),
        ({"budget": {"trials": -1}}, "budget.trials"),
        ({"notes": "\0"}, "notes"),
        ({"fixed": {"eta": {"conv1": 1.0}}}, "fixed.eta.conv1"),
        ({"fixed": {"eta": {"conv7": None}}}, "fixed.eta.conv7"),
        ({"fixed": {"mu": None}}, "fixed.mu"),
        ({"fixed": {"batch": {"conv1": None}}}, "fixed.batch"),
        ({"fixed": {"batch": math.nan}}, "fixed.batch"),
        ({"fixed": {"lambda": {"conv1": 0.05, "conv2": 0.06}}}, "fixed.lambda.conv2"),
        ({"fixed": {"lambda": {"conv1": 0.05, "conv2": None}}}, "fixed.lambda"),
        ({"fixed": [1]}, "fixed"),
        ([], ""),
    ],
)
def test_a_wrong_change_is_named(body: Any, at: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_change(body, SPACE)
    assert [fault.at for fault in caught.value.faults] == [at]


def test_a_point_is_queued_partial_or_recorded_whole() -> None:
    spec = parse(document(), WORKLOADS)
    queued = parse_trial({"params": {"eta": 0.01}}, spec, WORKLOADS)
    assert (queued.outcome, len(queued.params)) == (None, 3)
    whole = {"eta": 0.01, "lambda": 0.0, "batch": 9, "init": "he"}
    recorded = parse_trial({"params": whole, "value": 0.5}, spec, WORKLOADS)
    assert (recorded.outcome, recorded.value, len(recorded.params)) == ("complete", 0.5, 8)
    assert parse_trial({"params": whole, "outcome": "infeasible"}, spec, WORKLOADS).outcome == "infeasible"


@pytest.mark.parametrize(
    ("body", "at"),
    [
        ({"params": {"eta": 0.01}, "value": 0.5}, ["params.lambda", "params.batch", "params.init"]),
        ({"params": {"eta": 0.01, "lambda": 0, "batch": 9, "init": "he"}}, ["params"]),
        ({"params": {"eta": 0.01, "lambda": 0, "batch": 8, "init": "he"}, "value": math.nan}, ["value"]),
        ({"params": {"eta": 0.01, "lambda": 0, "batch": 8, "init": "he"}, "outcome": "complete"}, ["value"]),
        ({"params": {"eta": 0.01, "lambda": 0, "batch": 8, "init": "he"}, "outcome": "failed", "value": 1}, ["value"]),
        ({"value": 1}, ["params"]),
        ({"params": {}, "outcome": "pruned"}, ["outcome"]),
    ],
)
def test_a_wrong_point_is_named(body: Any, at: list[str]) -> None:
    with pytest.raises(Invalid) as caught:
        parse_trial(body, parse(document(), WORKLOADS), WORKLOADS)
    assert [fault.at for fault in caught.value.faults] == at
