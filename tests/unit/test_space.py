"""A point keeps its meaning between its two forms, and whatever is wrong with one is named."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hpo.errors import Invalid
from hpo.parameters import read_space
from hpo.space import SearchSpace, show

LABELS = ["conv1", "conv2", "fc"]


def space_of(*entries: dict[str, Any]) -> SearchSpace:
    space, faults = read_space(list(entries))
    assert not faults, faults
    assert space is not None
    return space


SPACE = space_of(
    {"name": "eta", "type": "float", "low": 1e-4, "high": 0.1, "log": True, "labels": LABELS},
    {"name": "lambda", "type": "float", "low": 0, "high": 0.1, "labels": LABELS, "tied": True},
    {"name": "mu", "type": "float", "low": 0, "high": 1, "labels": LABELS, "tied": {"convs": LABELS[:2], "fc": ["fc"]}},
    {"name": "batch", "type": "integer", "low": 32, "high": 256, "step": 32},
    {"name": "depth", "type": "integer", "low": 1, "high": 1000, "log": True},
    {"name": "drop", "type": "float", "low": 0, "high": 0.9, "step": 0.1},
    {"name": "init", "type": "categorical", "choices": ["he", True, 3]},
)  # fmt: skip


def test_optunas_names_and_distributions_are_those_of_the_declaration() -> None:
    assert SPACE.names[:3] == ("eta[conv1]", "eta[conv2]", "eta[fc]")
    assert SPACE.distributions["eta[fc]"] == FloatDistribution(1e-4, 0.1, log=True)
    assert SPACE.distributions["batch"] == IntDistribution(32, 256, step=32)
    assert SPACE.distributions["init"] == CategoricalDistribution(["he", True, 3])


def test_a_tied_group_is_one_dimension_named_after_its_first_label() -> None:
    assert list(SPACE.reduced) == [
        "eta[conv1]", "eta[conv2]", "eta[fc]", "lambda[conv1]", "mu[conv1]", "mu[fc]", "batch", "depth", "drop", "init",
    ]  # fmt: skip


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    entries: list[dict[str, Any]] = []
    for place in range(draw(st.integers(1, 5))):
        entry: dict[str, Any] = {
            "name": f"p{place}",
            "type": draw(st.sampled_from(["float", "integer", "categorical"])),
        }
        if entry["type"] == "categorical":
            options = [True, False, "a", "b", 2, 3, 0.5, "é"]
            entry["choices"] = draw(st.lists(st.sampled_from(options), min_size=1, max_size=5, unique_by=repr))
        elif entry["type"] == "float":
            entry["low"] = draw(st.floats(1e-6, 10))
            entry["high"] = entry["low"] * draw(st.floats(1.5, 1e6))
            entry["log"] = draw(st.booleans())
        else:
            entry["step"] = draw(st.integers(1, 10))
            entry["low"] = draw(st.integers(-100, 100))
            entry["high"] = entry["low"] + entry["step"] * draw(st.integers(0, 50))
        if draw(st.booleans()):
            entry["labels"] = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True))
            ties: list[Any] = [False, True, {f"group{n}": [label] for n, label in enumerate(entry["labels"])}]
            half = len(entry["labels"]) // 2
            if half:
                ties.append({"low": entry["labels"][:half], "high": entry["labels"][half:]})
            entry["tied"] = draw(st.sampled_from(ties))
        entries.append(entry)
    return space_of(*entries)


@settings(max_examples=150)
@given(space=spaces(), seed=st.integers(0, 2**32 - 1))
def test_nesting_and_flattening_any_point_gives_it_back_in_order_and_type(space: SearchSpace, seed: int) -> None:
    flat = space.random(np.random.default_rng(seed))
    nested = space.nest(flat)
    again = space.flatten(nested)
    assert list(again) == list(space.names)
    assert [(type(value), value) for value in again.values()] == [(type(flat[name]), flat[name]) for name in again]
    assert [entry.name for entry in space.parameters] == list(nested)
    for name, distribution in space.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(flat[name]))
    for parameter in space.parameters:
        for group in parameter.groups:
            assert len({flat[parameter.flat_name(label)] for label in group.labels}) == 1
    reduced = {name: flat[name] for name in space.reduced}
    assert space.expand(reduced) == flat


def test_random_points_fill_their_ranges_evenly_in_the_logarithm_where_it_says_so() -> None:
    rng = np.random.default_rng(1)
    points = [SPACE.random(rng) for _ in range(2000)]
    below = sum(float(point["eta[conv1]"]) < math.sqrt(1e-4 * 0.1) for point in points)
    assert 900 < below < 1100
    assert {point["batch"] for point in points} == set(range(32, 257, 32))
    assert {repr(point["init"]) for point in points} == {"'he'", "True", "3"}
    assert {point["drop"] for point in points} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}
    assert 0.20 < sum(int(point["depth"]) < 4 for point in points) / 2000 < 0.35


def test_a_scalar_stands_for_all_labels_and_a_group_for_its_members() -> None:
    flat = SPACE.flatten(
        {
            "eta": 0.01,
            "lambda": 0.05,
            "mu": {"convs": 0.5, "fc": 1},
            "batch": 64.0,
            "depth": 3,
            "drop": 0.3,
            "init": True,
        }
    )
    assert [flat[f"eta[{label}]"] for label in LABELS] == [0.01] * 3
    assert [flat[f"lambda[{label}]"] for label in LABELS] == [0.05] * 3
    assert (flat["mu[conv1]"], flat["mu[conv2]"], flat["mu[fc]"]) == (0.5, 0.5, 1.0)
    assert (type(flat["batch"]), type(flat["mu[fc]"]), flat["init"]) == (int, float, True)


def test_every_wrong_value_of_a_point_is_named_with_its_place() -> None:
    wrong = {
        "eta": {"conv1": 1.0, "conv2": "1e-3", "fc": float("nan"), "conv9": 0.1},
        "mu": {"convs": 0.5, "conv1": 0.6},
        "batch": 33,
        "depth": True,
        "drop": 0.25,
        "init": 1,
        "sigma": 1,
    }
    with pytest.raises(Invalid) as caught:
        SPACE.flatten(wrong)
    faults = {fault.at: fault.fault for fault in caught.value.faults}
    assert set(faults) == {
        "sigma", "eta.conv1", "eta.conv2", "eta.fc", "eta.conv9", "lambda", "mu.conv1", "mu.fc", "batch", "depth",
        "drop", "init",
    }  # fmt: skip
    assert "0.0001 to 0.1" in faults["eta.conv1"]
    assert "1.0e-4" in faults["eta.conv2"]
    assert faults["mu.conv1"] == "is tied to a component that is given another value"
    assert faults["lambda"] == "is missing"
    assert "'he', true, 3" in faults["init"]


def test_true_is_not_one_and_one_is_not_true() -> None:
    flags = space_of({"name": "flag", "type": "categorical", "choices": [True, False]})
    numbers = space_of({"name": "number", "type": "categorical", "choices": [1, 0]})
    with pytest.raises(Invalid, match="1 fault"):
        flags.flatten({"flag": 1})
    with pytest.raises(Invalid, match="1 fault"):
        numbers.flatten({"number": True})
    assert flags.flatten({"flag": True})["flag"] is True
    assert numbers.flatten({"number": 0.0}) == {"number": 0}


def test_a_partial_point_may_leave_out_labels_but_not_contradict_a_tie() -> None:
    flat = SPACE.flatten({"eta": {"fc": 0.01}, "mu": {"conv2": 0.25}}, partial=True)
    assert flat == {"eta[fc]": 0.01, "mu[conv1]": 0.25, "mu[conv2]": 0.25}
    with pytest.raises(Invalid):
        SPACE.flatten({"mu": {"conv1": 0.2, "conv2": 0.25}}, partial=True)


def test_a_finite_space_is_enumerated_without_repetition() -> None:
    space = space_of(
        {"name": "a", "type": "integer", "low": 0, "high": 4, "step": 2},
        {"name": "b", "type": "float", "low": 0.1, "high": 0.4, "step": 0.1, "labels": ["x", "y"], "tied": True},
        {"name": "c", "type": "categorical", "choices": ["p", "q"]},
    )
    assert space.size == 3 * 4 * 2
    points = [space.point(index) for index in range(space.size)]
    assert len({space.key(point) for point in points}) == space.size
    assert {point["b[y]"] for point in points} == {0.1, 0.2, 0.3, 0.4}
    assert SPACE.size is None


def test_values_computed_in_doubles_are_brought_back_to_grid_bounds_and_type() -> None:
    assert SPACE.cast({"drop": np.float64(0.1 + 0.2)}) == {"drop": 0.3}
    assert SPACE.cast({"eta[fc]": 0.1 + 1e-17, "batch": np.float64(63.9999)}) == {"eta[fc]": 0.1, "batch": 64}
    assert SPACE.key({"drop": 0.30000000000000004}) is None


@given(st.recursive(st.none() | st.text() | st.floats() | st.integers() | st.binary(), st.lists))
def test_whatever_is_shown_of_the_input_is_short_and_printable(value: Any) -> None:
    text = show(value)
    assert len(text) <= 60
    assert text.isascii()
    assert text.isprintable()


odd_keys = st.sampled_from(["eta", "mu", "init", "conv1", "batch", "\ud800", "convs"]) | st.text()
odd_points = st.recursive(
    st.none() | st.text() | st.floats() | st.integers() | st.booleans(),
    lambda inner: st.lists(inner) | st.dictionaries(odd_keys, inner),
    max_leaves=12,
)


@given(point=odd_points)
def test_no_point_however_odd_does_worse_than_be_refused(point: Any) -> None:
    flat, faults = SPACE.read(point, partial=True)
    for fault in faults:
        str(fault).encode()
    if not faults:
        assert SPACE.nest(flat) is not None
